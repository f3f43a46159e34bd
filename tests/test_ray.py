"""Jobs on Ray give the bits of one process, whatever is killed. The cluster is this machine only."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
from test_data import make_images
from test_search_run import SPACE as SASE_SPACE
from test_trionet_search import SPACE, pictures

from sase_blocks.cli import main
from sase_blocks.comparing import CompareConfig, compare, parse_candidate
from sase_blocks.jobs import Ray, job_folder, run_jobs
from sase_blocks.search.sase import SearchConfig, campaign
from sase_blocks.search.sase.campaigns import evaluation_budget
from sase_blocks.search.trionet import TrioConfig, search

os.environ['RAY_USAGE_STATS_ENABLED'] = '0'
os.environ['RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER'] = '0'  # as below: everything is bound to 127.0.0.1
# On a busy machine a worker takes minutes to start or is slow to answer, and Ray would take it for dead.
os.environ.update({'RAY_worker_register_timeout_seconds': '3600', 'RAY_health_check_timeout_ms': '3600000'})
ray = pytest.importorskip('ray', reason='Ray is not installed (extra ray)')
from ray.cluster_utils import Cluster  # noqa: E402

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # or each worker would import all of the above

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures('one_thread'),
    pytest.mark.filterwarnings('default'),  # Ray's own
]

JOBS = [{'key': key, 'value': value} for value, key in enumerate('abc')]


def start(*cpus):
    """A cluster of machines with so many CPUs each, all on this machine."""
    head, *others = [{'num_cpus': count, 'include_dashboard': False} for count in cpus]
    made = Cluster(initialize_head=True, head_node_args=head)
    for node in others:
        made.add_node(**node)
    return made


@pytest.fixture(scope='module')
def address():
    """A cluster of one machine with 2 CPUs."""
    made = start(2)
    yield made.address
    ray.shutdown()
    made.shutdown()


def square(job):
    return {'square': job['value'] ** 2, 'root': job['value'] ** 0.5}


def wait_for(path, process):
    """Wait until the file exists, which the process makes."""
    while not path.exists():
        assert process.poll() is None, f'ended with {process.returncode}'
        time.sleep(0.02)


def test_results_are_those_of_one_process_and_what_always_fails_is_named(address, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    machines = Ray(address)
    lines = []

    def work(job):
        if job['key'] == 'fails':
            raise ValueError('a\nlong story')
        print('said by', job['key'])
        return square(job)

    jobs = [{'key': 'fails'}, *JOBS]
    here = run_jobs(jobs, work, 'here', say=[].append)
    there = run_jobs(jobs, work, 'there', say=lines.append, ray=machines)  # a path of this process
    assert there == here
    assert there.errors == {'fails': 'ValueError: a long story'}
    with pytest.raises(RuntimeError, match=r'^1 of 4 jobs failed; the first one, fails: ValueError: a long story$'):
        there.check()
    for key in 'abc':
        assert (job_folder('there', key) / 'result.json').read_bytes() == (
            job_folder('here', key) / 'result.json'
        ).read_bytes()
        assert (job_folder('there', key) / 'log.txt').read_text() == f'said by {key}\n'
    assert lines[0] == 'Ray: 1 machine with 0 GPUs and 2 CPUs'
    assert [line.split()[0] for line in lines[1:]] == ['1/4', '2/4', '3/4', '4/4']
    with pytest.raises(ValueError, match=r'ray gpus: a job asks for 1, and no machine of the cluster has over 0'):
        run_jobs(jobs, work, 'gpus', ray=Ray(gpus=1))
    assert not Path('gpus').exists()
    # A function keeps its state on a worker between calls.

    class Counting:
        calls = 0

        def __call__(self, argument):
            self.calls += 1
            return self.calls, os.getpid(), argument

    counting = Counting()
    ended = dict(machines.each(counting, range(8)))
    assert [ended[number].value[2] for number in range(8)] == list(range(8))
    workers = [one.value[1] for one in ended.values()]
    assert max(one.value[0] for one in ended.values()) == max(workers.count(pid) for pid in workers)
    assert counting.calls == 0


def test_a_worker_that_is_killed(address, tmp_path):
    """Killed once, a job continues from its files. Killed always, only this job fails."""
    machines = Ray(address, retries=2)

    def work(job):
        folder = job_folder(tmp_path, job['key'])
        with (folder / 'tries').open('a') as file:
            file.write('x')
        tries = len((folder / 'tries').read_text())
        if job['key'] == 'always' or (job['key'] == 'b' and tries == 1):
            os.kill(os.getpid(), signal.SIGKILL)
        return {**square(job), 'tries': tries}

    outcome = run_jobs([*JOBS, {'key': 'always'}], work, tmp_path, say=[].append, ray=machines)
    assert outcome.results == {job['key']: {**square(job), 'tries': 1 + (job['key'] == 'b')} for job in JOBS}
    assert outcome.errors.keys() == {'always'}
    assert outcome.errors['always'].startswith('WorkerCrashedError: The worker died')
    assert len((tmp_path / 'always' / 'tries').read_text()) == 3


def test_a_machine_that_is_lost(tmp_path):
    """Two machines have one job each. When the first is done, the other machine is removed, and its job runs again."""
    ray.shutdown()  # from another test's cluster
    started = start(0, 1, 1)

    def work(job):
        folder = job_folder(tmp_path, job['key'])
        other = job_folder(tmp_path, 'a' if job['key'] == 'b' else 'b')
        again = (folder / 'node').exists()
        (folder / 'node.tmp').write_text(ray.get_runtime_context().get_node_id())
        (folder / 'node.tmp').rename(folder / 'node')
        while not (other / 'node').exists() or (job['key'] == 'b' and not again):
            time.sleep(0.02)
        return {**square(job), 'again': again}

    def lose(line):
        if ' a: ' in line:
            lost = (tmp_path / 'b' / 'node').read_text()
            (node,) = [node for node in started.worker_nodes if node.node_id == lost]
            started.remove_node(node, allow_graceful=False)

    try:
        outcome = run_jobs(JOBS[:2], work, tmp_path, say=lose, ray=Ray(started.address))
    finally:
        ray.shutdown()
        started.shutdown()
    assert outcome.check() == {
        'a': {**square(JOBS[0]), 'again': False},
        'b': {**square(JOBS[1]), 'again': True},
    }


DRIVER = """
import os, sys, time
from sase_blocks.jobs import Ray, job_folder, run_jobs

def make(out):
    def work(job):
        folder = job_folder(out, job['key'])
        with open(folder / 'begun', 'a') as file:
            file.write('x')
        half = (folder / 'half').exists()
        (folder / 'half').touch()
        while job['key'] == 'b' and not half:
            time.sleep(0.02)
        return {'half': half}
    return work

def drive(out, address, say=print):
    return run_jobs([{'key': key} for key in 'abc'], make(out), out, ray=Ray(address), say=say)

if __name__ == '__main__':
    drive(sys.argv[1], sys.argv[2])
"""


def test_a_command_that_is_killed(address, tmp_path, monkeypatch):
    """Started again, it runs the missing jobs. The interrupted job continues from its files."""
    (tmp_path / 'driver_of_a_test.py').write_text(DRIVER)
    out = tmp_path / 'out'
    with subprocess.Popen([sys.executable, tmp_path / 'driver_of_a_test.py', out, address]) as driver:
        for key, name in (('a', 'result.json'), ('c', 'result.json'), ('b', 'half')):
            wait_for(out / key / name, driver)
        driver.kill()
    assert driver.returncode == -signal.SIGKILL
    monkeypatch.syspath_prepend(tmp_path)
    import driver_of_a_test

    lines = []
    outcome = driver_of_a_test.drive(out, address, lines.append)
    assert outcome.check() == {'a': {'half': False}, 'b': {'half': True}, 'c': {'half': False}}
    assert [(out / key / 'begun').read_text() for key in 'abc'] == ['x', 'xx', 'x']
    assert lines[1] == '2 of 3 jobs are done already'


def test_searches_and_their_evaluation(address, tmp_path):
    data = str(make_images(tmp_path / 'images', train=8, val=2, classes=('cat', 'dog')))
    config = SearchConfig(
        data=data, out=str(tmp_path / 'here'), space=SASE_SPACE, img_size=12, batch_size=4, epochs=1, hessian_every=0,
        model_args={'layers': [1, 1, 1], 'channels': [8, 16, 16]}, cpu=True, tensorboard=False, workers=0,
    )  # fmt: skip
    found = {}
    for name, machines in (('here', None), ('there', Ray(address))):
        one = replace(config, out=str(tmp_path / name))
        found[name] = campaign(
            one, seeds=[0, 1], null=True, budget=evaluation_budget(one), evaluations=1, baselines=['none'], ray=machines
        )
    here, there = found['here'], found['there']
    for kind in ('searches', 'null'):
        for seed in ('0', '1'):
            for part in ('genotype', 'logits', 'edges'):
                assert there[kind][seed][part] == here[kind][seed][part]
    assert there['agreement'] == here['agreement']
    accuracies = [[row['accuracies'] for row in one['evaluation']['candidates']] for one in (here, there)]
    assert accuracies[0] == accuracies[1]
    for folder in ('seed-0', 'null-1', 'evaluation/none_seed_0'):
        rows = [(tmp_path / name / folder / 'metrics.jsonl').read_text().splitlines() for name in found]
        times = ('seconds_per_step', 'seconds', 'images_per_second')
        here, there = ([{k: v for k, v in json.loads(r).items() if k not in times} for r in part] for part in rows)
        assert here == there


def test_a_comparison(address, tmp_path):
    data = str(make_images(tmp_path / 'images', train=8, val=2, classes=('cat', 'dog')))
    budget = CompareConfig(
        data=data, out=str(tmp_path / 'here'), model='test_resnet', img_size=32, batch_size=4, epochs=2, cpu=True,
        tensorboard=False, workers=0,
    )  # fmt: skip
    candidates = [parse_candidate(text) for text in ('none', 'p=se@start=paper')]
    here = compare(candidates, budget, seeds=[0, 1])
    there = compare(candidates, replace(budget, out=str(tmp_path / 'there')), seeds=[0, 1], ray=Ray(address))
    for key in ('accuracies', 'epochs', 'difference', 'interval', 'parameters', 'macs', 'kept_ratio'):
        assert [row[key] for row in there['candidates']] == [row[key] for row in here['candidates']]
    assert there['summary'] == here['summary']
    # A stop ends the trainings that run; later they go on from their files.
    out = str(tmp_path / 'stopped')
    options = {'hours': 1, 'clock': count(0, 3600).__next__}
    stopped = compare(candidates, replace(budget, out=out), seeds=[0, 1], ray=Ray(address), **options)
    assert len(stopped['seeds']) < 2
    ended = compare(candidates, replace(budget, out=out), seeds=[0, 1], ray=Ray(address))
    assert [row['accuracies'] for row in ended['candidates']] == [row['accuracies'] for row in here['candidates']]


@pytest.mark.parametrize('files', [False, True], ids=['images', 'files'])
def test_scores_of_networks(address, tmp_path, files):
    (tmp_path / 'space.json').write_text(json.dumps(SPACE))
    data = str(make_images(tmp_path / 'images', train=8, val=2, classes=('cat', 'dog'))) if files else ''
    config = TrioConfig(
        data=data, out=str(tmp_path / 'here'), space=str(tmp_path / 'space.json'), epochs=1, batch_size=4,
        fraction=0.75, lr=0.05, evaluations=8, population=3, calibration=8, networks=0, workers=0, cpu=True,
        tensorboard=False,
    )  # fmt: skip
    machines = Ray(address)
    images = None if files else pictures()
    here = search(config, images)
    there = search(replace(config, out=str(tmp_path / 'there')), images, ray=machines)
    for name in ('architecture', 'score', 'front', 'pure', 'evaluations'):
        assert there[name] == here[name]
    (file,) = (Path(config.out) / 'candidates').iterdir()
    rows = [
        sorted((tmp_path / name / 'candidates' / file.name).read_text().splitlines()[1:]) for name in ('here', 'there')
    ]
    assert rows[0] == rows[1]


def test_a_cluster_that_is_none(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv('RAY_ADDRESS', raising=False)
    ray.shutdown()
    data = str(make_images(tmp_path / 'images', train=8, val=2, classes=('cat', 'dog')))
    for address in ('nowhere', '127.0.0.1:1'):
        assert (
            main(f'search sase --data {data} --out {tmp_path / "run"} --seeds 0,1 --cpu --ray {address}'.split()) == 2
        )
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith(f'sase-blocks: error: there is no Ray cluster at {address!r} (')
        assert "start one with `ray start --head`, or use this machine alone with 'local'" in error
    assert not (tmp_path / 'run' / 'seed-0').exists()
