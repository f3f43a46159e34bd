"""Many runs: each job runs once, a killed one continues, jobs and settings of another folder raise an error."""

import contextlib
import json
import multiprocessing
import os
import signal
import socket
import sys

import pytest
from test_data import make_images

from sase_blocks.jobs import Outcome, Ray, check_jobs, job_folder, run_jobs
from sase_blocks.runs import lock_folder

JOBS = [{'key': key, 'value': value} for value, key in enumerate('abcdef')]


@pytest.fixture(scope='session')
def processes():
    """Processes that start from one with everything imported."""
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['sase_blocks.jobs', 'sase_blocks.train', 'accelerate'])
    return context


@pytest.fixture
def lines():
    return []


def square(job):
    return {'square': job['value'] ** 2}


# ---- one process ----


def test_results_and_what_a_second_command_does(tmp_path, lines):
    out = tmp_path / 'new folder {#?}'
    done = []

    def work(job):
        done.append(job['key'])
        (job_folder(out, job['key']) / 'left').touch()
        return square(job)

    def describe(job, result):
        return f'{job["value"]}^2 = {result["square"]}'

    first = run_jobs(JOBS[:3], work, out, describe=describe, say=lines.append)
    assert first.results == {'a': {'square': 0}, 'b': {'square': 1}, 'c': {'square': 4}}
    assert first.check() == first.results
    assert list(first.results) == done == ['a', 'b', 'c']
    assert first.errors == {}
    assert lines == ['1/3 a: 0^2 = 0 (0 s)', '2/3 b: 1^2 = 1 (0 s)', '3/3 c: 2^2 = 4 (0 s)']
    assert {path.name for path in out.iterdir()} == {'a', 'b', 'c', 'jobs.json'}
    assert {path.name for path in (out / 'a').iterdir()} == {'left', 'result.json'}
    assert json.loads((out / 'b' / 'result.json').read_text()) == {'job': JOBS[1], 'result': {'square': 1}}
    # Again: nothing to do. With another job, in another order: only that one. With fewer jobs: only theirs.
    assert run_jobs(JOBS[:3], work, out, say=lines.append) == first
    assert lines[3:] == ['3 of 3 jobs are done already']
    more = run_jobs([JOBS[3], *JOBS[:3]], work, str(out), say=lines.append)
    assert (done, list(more.results)) == (['a', 'b', 'c', 'd'], ['d', 'a', 'b', 'c'])
    assert lines[4:] == ['3 of 4 jobs are done already', '4/4 d: done (0 s)']
    assert run_jobs(JOBS[1:2], work, out, say=lines.append).results == {'b': {'square': 1}}
    assert len(done) == 4
    # A deleted result is made again.
    (out / 'b' / 'result.json').unlink()
    run_jobs(JOBS[:4], work, out, say=lines.append)
    assert done[4:] == ['b']


def test_failing_jobs_are_reported_and_tried_again_by_the_next_command(tmp_path, lines):
    wrong, calls = {'b': ValueError('a\nlong story'), 'c': None}, []

    def work(job):
        calls.append(job['key'])
        if isinstance(wrong.get(job['key']), Exception):
            raise wrong[job['key']]
        return {'tensor': {1, 2}} if job['key'] in wrong else square(job)

    outcome = run_jobs(JOBS[:4], work, tmp_path, say=lines.append)
    assert list(outcome.results) == ['a', 'd']
    assert outcome.errors['b'] == 'ValueError: a long story'
    assert 'set is not JSON serializable' in outcome.errors['c']
    assert '2/4 b: failed: ValueError: a long story' in lines
    with pytest.raises(RuntimeError, match=r'^2 of 4 searches failed; the first one, b: ValueError: a long story$'):
        outcome.check('searches')
    with pytest.raises(RuntimeError, match=r'^all 1 jobs failed; the first one, x: no$'):
        Outcome({}, {'x': 'no'}).check()
    wrong.clear()
    calls.clear()
    assert list(run_jobs(JOBS[:4], work, tmp_path, say=lines.append).results) == list('abcd')
    assert calls == ['b', 'c']


@pytest.mark.parametrize('error', [KeyboardInterrupt, SystemExit])
def test_what_stops_the_command_leaves_the_job_to_the_next(tmp_path, lines, error):
    calls = []

    def work(job):
        calls.append(job['key'])
        if calls == ['a', 'b']:
            raise error
        return square(job)

    with pytest.raises(error):
        run_jobs(JOBS[:3], work, tmp_path, say=lines.append)
    assert len(run_jobs(JOBS[:3], work, tmp_path, say=lines.append).results) == 3
    assert calls == ['a', 'b', 'b', 'c']


def _killed(out):
    def work(job):
        with open(out / 'begun', 'a') as file:
            file.write(f'{job["key"]}\n')
        half = job_folder(out, job['key']) / 'half'
        if job['key'] == 'c' and not half.exists():
            half.write_text('was here')
            os.kill(os.getpid(), signal.SIGKILL)
        return {**square(job), 'half': half.exists()}

    run_jobs(JOBS, work, out, say=[].append)


@pytest.mark.slow
def test_a_killed_command_goes_on(processes, tmp_path):
    for code in (-signal.SIGKILL, 0):
        process = processes.Process(target=_killed, args=(tmp_path,))
        process.start()
        process.join()
        assert process.exitcode == code
    assert (tmp_path / 'begun').read_text().split() == ['a', 'b', 'c', 'c', 'd', 'e', 'f']
    results = run_jobs(JOBS, lambda job: pytest.fail('done'), tmp_path, say=[].append).results
    assert results == {job['key']: {**square(job), 'half': job['key'] == 'c'} for job in JOBS}


# ---- one launch of several processes ----


def _process_of_a_launch(rank, port, data, folder):
    launch = {'RANK': rank, 'LOCAL_RANK': rank, 'WORLD_SIZE': 2, 'LOCAL_WORLD_SIZE': 2, 'MASTER_PORT': port}
    os.environ.update({name: str(value) for name, value in launch.items()})
    os.environ.update(MASTER_ADDR='127.0.0.1', GLOO_SOCKET_IFNAME='lo', OMP_NUM_THREADS='1')
    import torch

    from sase_blocks.train import TrainConfig, train

    torch.set_num_threads(1)
    said = []
    out = folder / 'out'

    def work(job):
        if job['key'] == 'c':
            raise ValueError('not this one')
        config = TrainConfig(
            data, model='resnet20_cifar', out=str(job_folder(out, job['key'])), img_size=12, epochs=1, batch_size=4,
            workers=0, cpu=True, tensorboard=False,
        )  # fmt: skip
        with contextlib.redirect_stdout(None):
            loss = train(config)['loss']
        # A second process group would find the first one's addresses, and hang if one process is faster.
        return {'loss': loss, 'group': torch.distributed.is_initialized()}

    outcome = run_jobs(JOBS[:3], work, out, say=said.append, cpu=True)
    (folder / f'{rank}.json').write_text(json.dumps([outcome, said]))
    with pytest.raises(ValueError, match='made for another job'):
        run_jobs([{'key': 'a', 'value': 7}], work, out, cpu=True)
    with pytest.raises(ValueError, match='leave torchrun or accelerate launch out'):
        run_jobs(JOBS[:1], work, out, cpu=True, ray=Ray())
    (folder / f'{rank}.refused').touch()


@pytest.mark.slow
def test_processes_of_one_launch_do_each_job_together(processes, to_a_good_end, tmp_path):
    """As under torchrun: both train together, one writes the folder, both get the outcome."""
    pytest.importorskip('ray', reason='Ray is not installed (extra ray)')
    data = str(make_images(tmp_path / 'images', train=7, val=3, classes=('cat', 'dog')))
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    both = [
        processes.Process(target=_process_of_a_launch, args=(rank, port, data, tmp_path), daemon=True)
        for rank in (0, 1)
    ]
    to_a_good_end(both)
    ((results, errors), said), (other, silence) = (json.loads((tmp_path / f'{r}.json').read_text()) for r in (0, 1))
    assert other == [results, errors]
    assert [result['group'] for result in results.values()] == [True, True]
    assert (list(results), errors, silence) == (['a', 'b'], {'c': 'ValueError: not this one'}, [])
    assert [line[:6] for line in said] == ['1/3 a:', '2/3 b:', '3/3 c:']
    assert all((tmp_path / f'{rank}.refused').exists() for rank in (0, 1))


# ---- refusals ----


@pytest.mark.parametrize(
    ('jobs', 'says'),
    [
        ([], 'there are no jobs'),
        ([{'value': 1}], "a job needs a 'key'"),
        ([{'key': 3}], "a job needs a 'key', a text of its own, got {'key': 3}"),
        ([{'key': '..'}], "a job needs a 'key'"),
        ([{'key': 'a'}, {'key': 'a'}], "two jobs have the keys 'a' and 'a'"),
        ([{'key': 'a b'}, {'key': 'a/b'}], "two jobs have the keys 'a b' and 'a/b', which stand for one folder"),
        ([{'key': 'a', 'value': {1}}], 'job a: .*set is not JSON'),
    ],
)
def test_wrong_jobs(tmp_path, jobs, says):
    with pytest.raises(ValueError, match=says):
        run_jobs(jobs, square, tmp_path / 'out')
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ('jobs', 'settings', 'says'),
    [
        (JOBS[:2], {'lr': 0.2, 'epochs': (1, 2)}, r'made with other settings: lr was 0\.1 and is 0\.2; set them back'),
        (JOBS[:2], {'lr': 0.1}, r'other settings: epochs was \[1, 2\] and is None'),
        ([JOBS[0], {'key': 'b', 'value': 7}], {'lr': 0.1, 'epochs': (1, 2)}, 'another job: b was {.*1} and is {.*7}'),
    ],
)
def test_a_folder_made_for_something_else_is_refused(tmp_path, jobs, settings, says):
    first = run_jobs(JOBS[:2], square, tmp_path, settings={'lr': 0.1, 'epochs': (1, 2)}, say=[].append)
    with pytest.raises(ValueError, match=says):
        run_jobs(jobs, square, tmp_path, settings=settings)
    if 'settings' in says:
        with pytest.raises(ValueError, match=says):
            check_jobs(tmp_path, settings)
    again = run_jobs(JOBS[:2], square, tmp_path, settings={'epochs': [1, 2], 'lr': 0.1}, say=[].append)
    assert again == first


@pytest.mark.parametrize(
    ('file', 'text', 'says'),
    [
        ('jobs.json', 'no JSON', 'is damaged: .* is no valid JSON'),
        ('jobs.json', '', 'is damaged: .* is empty'),
        ('jobs.json', '[1]', 'is damaged: it holds no settings and jobs; delete it'),
        ('a/result.json', '{"result"', 'is damaged: .* is no valid JSON.*; delete it'),
        ('a/result.json', '{}', 'is damaged: it holds no result; delete it and start again'),
    ],
)
def test_damaged_files(tmp_path, file, text, says):
    run_jobs(JOBS[:2], square, tmp_path, say=[].append)
    (tmp_path / file).write_text(text)
    with pytest.raises(ValueError, match=f'{file} {says}'):
        run_jobs(JOBS[:2], square, tmp_path, say=[].append)


def test_a_folder_that_cannot_be_had(tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(OSError, match=r'the output folder .*file cannot be written'):
        run_jobs(JOBS, square, tmp_path / 'file')
    with contextlib.ExitStack() as stack:
        assert lock_folder(tmp_path, stack) is None
        with pytest.raises(ValueError, match=rf'written by another run, process {os.getpid()} on .*again after'):
            run_jobs(JOBS, square, tmp_path)
    assert len(run_jobs(JOBS, square, tmp_path, say=[].append).results) == 6


@pytest.mark.parametrize(
    ('arguments', 'says'),
    [
        ({'address': ' '}, "ray: expected 'auto', 'local' or HOST:PORT, got ' '"),
        ({'gpus': -1}, 'ray gpus: expected a whole number or a fraction of one GPU, got -1'),
        ({'gpus': 1.5}, 'got 1.5'),
        ({'gpus': float('nan')}, 'got nan'),
        ({'retries': -1}, 'ray retries: expected at least 0, got -1'),
    ],
)
def test_wrong_machines(arguments, says):
    with pytest.raises(ValueError, match=says):
        Ray(**arguments)


def test_missing_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'ray', None)
    with pytest.raises(ImportError, match=r'pip install "sase-blocks\[ray\]"'):
        run_jobs(JOBS, square, tmp_path, ray=Ray())
    assert not list(tmp_path.iterdir())
