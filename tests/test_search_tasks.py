"""The queue of tasks: each is done once, by whomever; a worker that dies loses nothing; wrong studies are refused."""

import contextlib
import json
import multiprocessing
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
import sqlalchemy
from test_data import make_images

from sase_blocks.search import study as module
from sase_blocks.search.tasks import _Queue, run_tasks

TASKS = [{'key': key, 'value': value} for value, key in enumerate('abcdef')]
FILES = ['tasks.db', pytest.param('tasks.journal', marks=pytest.mark.slow)]
DATABASE = os.environ.get('SASE_BLOCKS_TEST_DATABASE', '')  # see `make test-database`
STORAGES = [*FILES, *([pytest.param(DATABASE, id='database')] if DATABASE else [])]


@pytest.fixture(scope='session')
def processes():
    """Processes that start from one with everything imported."""
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['sase_blocks.search.tasks', 'sase_blocks.train', 'accelerate', 'optuna'])
    return context


@pytest.fixture
def lines():
    return []


def wait_for(condition, process):
    """Until it is true, which the process is to bring about."""
    while not condition():
        assert process.is_alive(), f'ended with {process.exitcode}'
        time.sleep(0.02)


def square(task):
    return {'square': task['value'] ** 2}


def place(folder, storage):
    """Where a test has its storage; a database is emptied."""
    if '://' not in storage:
        return folder / storage
    engine = sqlalchemy.create_engine(storage)
    tables = sqlalchemy.MetaData()
    tables.reflect(engine)
    tables.drop_all(engine)
    engine.dispose()
    return storage


# Seconds for what a slow machine must not decide; SQLite can wait for no more than 24 days.
FOR_EVER = 1e6


def queue(path, tasks=TASKS, settings=None, patience=90.0, timeout=60.0, deaths=5):
    made = _Queue({task['key']: task for task in tasks}, path, 'test', settings or {}, patience, timeout, deaths)
    made.open()
    return made


# ---- one worker ----


@pytest.mark.parametrize('storage', STORAGES)
def test_results_and_what_a_second_command_does(tmp_path, lines, clock, storage):
    path = place(tmp_path / 'new folder {#?}', storage)
    done = []

    def work(task):
        done.append(task['key'])
        return square(task)

    def describe(task, result):
        return f'{task["value"]}^2 = {result["square"]}'

    first = run_tasks(TASKS[:3], work, path, 'test', describe=describe, say=lines.append)
    assert first.results == {'a': {'square': 0}, 'b': {'square': 1}, 'c': {'square': 4}}
    assert list(first.results) == done == ['a', 'b', 'c']
    assert first.errors == {}
    assert lines == ['1/3 a: 0^2 = 0 (0 s)', '2/3 b: 1^2 = 1 (0 s)', '3/3 c: 2^2 = 4 (0 s)']
    # Again: nothing to do. With another task, in another order: that one alone.
    assert run_tasks(TASKS[:3], work, path, 'test', say=lines.append) == first
    assert lines[3:] == ['3 of 3 tasks are done already']
    more = run_tasks([TASKS[3], *TASKS[:3]], work, str(path), 'test', say=lines.append)
    assert (done, list(more.results)) == (['a', 'b', 'c', 'd'], ['d', 'a', 'b', 'c'])
    assert lines[4:] == ['3 of 4 tasks are done already', '4/4 d: done (0 s)']
    # Another study in the same storage has tasks of its own.
    assert run_tasks(TASKS[:1], work, path, 'other', say=lines.append).results == {'a': {'square': 0}}
    assert done == ['a', 'b', 'c', 'd', 'a']


def test_failing_tasks_are_reported_and_tried_again_by_the_next_command(tmp_path, lines):
    wrong, calls = {'b': ValueError('a\nlong story'), 'c': None}, []

    def work(task):
        calls.append(task['key'])
        if isinstance(wrong.get(task['key']), Exception):
            raise wrong[task['key']]
        return {'tensor': {1, 2}} if task['key'] in wrong else square(task)

    outcome = run_tasks(TASKS[:4], work, tmp_path / 'tasks.db', 'test', say=lines.append)
    assert list(outcome.results) == ['a', 'd']
    assert outcome.errors['b'] == 'ValueError: a long story'
    assert 'set is not JSON serializable' in outcome.errors['c']
    assert '2/4 b: failed: ValueError: a long story' in lines
    wrong.clear()
    calls.clear()
    assert list(run_tasks(TASKS[:4], work, tmp_path / 'tasks.db', 'test', say=lines.append).results) == list('abcd')
    assert calls == ['b', 'c']


def test_all_failed(tmp_path, lines):
    def work(task):
        raise OSError(f'no disk for {task["key"]}')

    with pytest.raises(RuntimeError, match='all 2 tasks failed; the first one, a: OSError: no disk for a'):
        run_tasks(TASKS[:2], work, tmp_path / 'tasks.db', 'test', say=lines.append)


def test_ctrl_c_leaves_the_task_to_the_next_command(tmp_path, lines):
    def stop(task):
        if task['key'] == 'b':
            raise KeyboardInterrupt
        return square(task)

    for _ in range(3):  # more often than a task may see its worker die
        with pytest.raises(KeyboardInterrupt):
            run_tasks(TASKS[:3], stop, tmp_path / 'tasks.db', 'test', say=lines.append, deaths=2)
    calls = []

    def work(task):
        calls.append(task['key'])
        return square(task)

    assert len(run_tasks(TASKS[:3], work, tmp_path / 'tasks.db', 'test', say=lines.append, deaths=2).results) == 3
    assert calls == ['b']


# ---- several workers ----


def _worker(path, folder, options, setup):
    """Notes each task it begins and ends in ``folder``; the task it begins first hangs where ``folder/hang`` is."""
    if setup == 'no pid':
        module._is_gone = lambda owner: False
    me = f'{os.getpid()}'

    def work(task):
        with open(folder / 'begun', 'a') as file:
            file.write(f'{task["key"]} {me}\n')
        if setup == 'hang':
            (folder / 'hangs.tmp').write_text(task['key'])
            (folder / 'hangs.tmp').rename(folder / 'hangs')  # there with what it says
            while True:
                time.sleep(1000)
        with open(folder / 'ended', 'a') as file:
            file.write(f'{task["key"]} {me}\n')
        return square(task)

    options = dict(options)
    if (barrier := options.pop('barrier', None)) is not None:
        barrier.wait()
    with open(folder / f'{me}.log', 'w') as log:
        outcome = run_tasks(
            TASKS, work, path, 'test', say=lambda line: print(line, file=log, flush=True), poll=0.05, **options
        )
    (folder / f'{me}.json').write_text(json.dumps(outcome.results))


def read(folder, name):
    """(task, process) of each line."""
    path = folder / name
    return [tuple(line.split()) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.slow
@pytest.mark.parametrize('storage', STORAGES)
@pytest.mark.parametrize(
    'setup',
    [
        pytest.param('', id='known-by-its-pid'),
        pytest.param('no pid', id='known-by-its-silence', marks=pytest.mark.slow),
    ],
)
def test_a_killed_workers_task_is_taken_up(processes, tmp_path, storage, setup):
    options = {'heartbeat': 0.1, 'patience': 0.5 if setup else FOR_EVER, 'timeout': FOR_EVER}
    path = place(tmp_path, storage)
    dying = processes.Process(target=_worker, args=(path, tmp_path, options, 'hang'), daemon=True)
    dying.start()
    wait_for((tmp_path / 'hangs').exists, dying)
    living = processes.Process(target=_worker, args=(path, tmp_path, options, setup), daemon=True)
    if not setup:
        living.start()
        log = tmp_path / f'{living.pid}.log'
        wait_for(lambda: log.exists() and 'waiting for' in log.read_text(), living)
    os.kill(dying.pid, signal.SIGKILL)
    dying.join()
    if setup:  # not earlier: where only silence tells, a slow machine would make the first one seem dead while it lives
        living.start()
    living.join()
    assert living.exitcode == 0
    begun, ended = read(tmp_path, 'begun'), read(tmp_path, 'ended')
    hung = (tmp_path / 'hangs').read_text()
    assert sorted(key for key, _ in ended) == list('abcdef')
    assert {pid for _, pid in ended} == {str(living.pid)}
    assert (hung, str(dying.pid)) in begun
    assert (hung, str(living.pid)) in begun
    assert json.loads((tmp_path / f'{living.pid}.json').read_text()) == {t['key']: square(t) for t in TASKS}
    if not setup:
        assert len(begun) == 7
        waiting = f'waiting for what other workers do: {hung} (process {dying.pid} on {socket.gethostname()})'
        assert waiting in log.read_text()
        assert log.read_text().count('6/6') == 1


@pytest.mark.slow
@pytest.mark.parametrize('storage', STORAGES)
def test_workers_that_start_at_once_do_each_task_once(processes, to_a_good_end, tmp_path, storage):
    options = {'barrier': processes.Barrier(3), 'patience': FOR_EVER, 'timeout': FOR_EVER}
    path = place(tmp_path, storage)
    workers = [processes.Process(target=_worker, args=(path, tmp_path, options, ''), daemon=True) for _ in range(3)]
    to_a_good_end(workers)
    assert sorted(key for key, _ in read(tmp_path, 'begun')) == list('abcdef')
    outcomes = [json.loads((tmp_path / f'{worker.pid}.json').read_text()) for worker in workers]
    assert outcomes == [{t['key']: square(t) for t in TASKS}] * 3


def _process_of_a_launch(rank, port, data, folder):
    launch = {'RANK': rank, 'LOCAL_RANK': rank, 'WORLD_SIZE': 2, 'LOCAL_WORLD_SIZE': 2, 'MASTER_PORT': port}
    os.environ.update({name: str(value) for name, value in launch.items()})
    os.environ.update(MASTER_ADDR='127.0.0.1', GLOO_SOCKET_IFNAME='lo', OMP_NUM_THREADS='1')
    import torch

    from sase_blocks.train import TrainConfig, train

    torch.set_num_threads(1)
    said = []

    def work(task):
        if task['key'] == 'c':
            raise ValueError('not this one')
        config = TrainConfig(
            data, model='resnet20_cifar', out=str(folder / task['key']), img_size=12, epochs=1, batch_size=4,
            workers=0, cpu=True, tensorboard=False,
        )  # fmt: skip
        with contextlib.redirect_stdout(None):
            loss = train(config)['loss']
        # A second process group would meet the first one's addresses, and hang where one process is faster.
        return {'loss': loss, 'group': torch.distributed.is_initialized()}

    outcome = run_tasks(TASKS[:3], work, folder / 'tasks.db', 'test', say=said.append, poll=0.05, cpu=True)
    (folder / f'{rank}.json').write_text(json.dumps([outcome, said]))
    with pytest.raises(ValueError, match='made for other tasks'):
        run_tasks(TASKS[:1], work, folder / 'tasks.db', 'test', cpu=True)
    (folder / f'{rank}.refused').touch()


@pytest.mark.slow
def test_processes_of_one_launch_are_one_worker(processes, to_a_good_end, tmp_path):
    """As under torchrun: both train together, one speaks to the study, both get the outcome."""
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


# ---- who is dead ----


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands until it is set."""

    class Clock:
        now = 0.0

    monkeypatch.setattr(module.time, 'monotonic', lambda: Clock.now)
    return Clock


@pytest.mark.parametrize('storage', STORAGES)
def test_silence(tmp_path, clock, storage):
    path = place(tmp_path, storage)
    mine, other = queue(path), queue(path)
    mine.fill()
    trial, task = mine.take()
    assert task == TASKS[0]
    for now, beat, status in [
        (1000, None, 'running'),  # seen for the first time, however long it may have been silent
        (1089, None, 'running'),
        (1095, 1, 'running'),  # a beat just in time
        (1180, None, 'running'),
        (1190, None, 'missing'),
    ]:
        clock.now = now
        if beat is not None:
            trial.set_user_attr('beat', beat)
        other.study.bury_the_dead()
        assert other.states()['a'].status == status, now
    other.fill()
    assert other.states()['a'].status == 'waiting'
    # It was alive after all: its result counts, and nobody does the task again.
    assert mine.end(trial, {'result': {'square': 0}, 'seconds': 1.0}) is False
    assert other.states()['a'].attrs['result'] == {'square': 0}
    taken = []
    while (more := other.take()) is not None:
        taken.append(more[1]['key'])
    assert taken == list('bcdef')


def test_a_task_that_kills_its_workers_fails(tmp_path, clock):
    made = queue(tmp_path / 'tasks.db', TASKS[:1], deaths=3)
    for _ in range(4):  # Ctrl-C is no death
        made.fill()
        trial, _ = made.take()
        made.end(trial, {'interrupted': True})
    for _ in range(3):
        assert made.states()['a'].status == 'missing'
        made.fill()
        trial, _ = made.take()
        made.study.bury(trial)
    state = made.states()['a']
    assert state.status == 'failed'
    assert re.fullmatch(rf'3 workers died in it, the last one process {os.getpid()} on .+', state.error)
    made.fill()
    assert made.take() is None
    # A new command tries it again, as often.
    made.retry_failed()
    for _ in range(3):
        made.fill()
        trial, _ = made.take()
        made.study.bury(trial)
    assert made.states()['a'].status == 'failed'


def test_no_failed_task_is_tried_again_while_another_worker_runs(tmp_path):
    made = queue(tmp_path / 'tasks.db', TASKS[:2])
    made.fill()
    first, _ = made.take()
    made.end(first, {'error': 'ValueError: no'})
    second, _ = made.take()
    made.retry_failed()
    assert [state.status for state in made.states().values()] == ['failed', 'running']
    made.end(second, {'interrupted': True})
    made.retry_failed()
    assert [state.status for state in made.states().values()] == ['waiting', 'missing']


def test_a_task_queued_twice_is_done_once(tmp_path):
    left, right = (queue(tmp_path / 'tasks.db', TASKS[:1]) for _ in range(2))
    left._add('a')
    right._add('a')
    trial, _ = left.take()
    assert right.take() is None
    assert right.states()['a'].status == 'running'
    left.end(trial, {'result': {}, 'seconds': 0.0})
    assert left.take() is None


@pytest.mark.skipif(sys.platform != 'linux', reason='process numbers are compared on Linux alone')
def test_whose_process_is_gone():
    mine = module._this_process()
    with subprocess.Popen([sys.executable, '-c', '']) as gone:
        pass
    for changes, expected in [
        ({}, False),
        ({'pid': gone.pid}, True),
        ({'started': mine['started'] - 1}, True),  # the number was given to another process
        ({'pid': gone.pid, 'machine': 'another'}, False),
        ({'pid': gone.pid, 'machine': None}, False),
    ]:
        assert module._is_gone({**mine, **changes}) is expected, changes
    assert module._is_gone(None) is False


# ---- refusals ----


@pytest.mark.parametrize(
    ('tasks', 'says'),
    [
        ([], 'there are no tasks'),
        ([{'value': 1}], "a task needs a 'key'"),
        ([{'key': 3}], "a task needs a 'key', a text of its own, got {'key': 3}"),
        ([{'key': 'a'}, {'key': 'a'}], "two tasks have the key 'a'"),
        ([{'key': 'a', 'value': {1}}], 'task a: .*set is not JSON'),
    ],
)
def test_wrong_tasks(tmp_path, tasks, says):
    with pytest.raises(ValueError, match=says):
        run_tasks(tasks, square, tmp_path / 'tasks.db', 'test')
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ('tasks', 'settings', 'says'),
    [
        (TASKS[:2], {'lr': 0.2, 'epochs': (1, 2)}, r'made with other settings: lr was 0\.1 and is 0\.2; set them back'),
        (TASKS[:2], {'lr': 0.1}, r'other settings: epochs was \[1, 2\] and is None'),
        (TASKS[:1], {'lr': 0.1, 'epochs': (1, 2)}, 'for other tasks: it holds b, which is none of the 1 asked for'),
        ([TASKS[0], {'key': 'b', 'value': 7}], {'lr': 0.1, 'epochs': (1, 2)}, 'b was {.*1} and is {.*7}'),
    ],
)  # fmt: skip
def test_a_study_made_for_something_else_is_refused(tmp_path, tasks, settings, says):
    path = tmp_path / 'tasks.db'
    first = run_tasks(TASKS[:2], square, path, 'test', settings={'lr': 0.1, 'epochs': (1, 2)}, say=[].append)
    with pytest.raises(ValueError, match=says):
        run_tasks(tasks, square, path, 'test', settings=settings)
    again = run_tasks(TASKS[:2], square, path, 'test', settings={'epochs': [1, 2], 'lr': 0.1}, say=[].append)
    assert again == first


def folder_in_the_way(path):
    path.mkdir()


def file_above(path):
    path.parent.rmdir()
    path.parent.write_text('')


def no_database(path):
    path.write_text('this is no database, and no journal either\n' * 30)


@pytest.mark.parametrize(
    ('storage', 'spoil', 'says'),
    [
        ('tasks.db', folder_in_the_way, 'cannot be written: Is a directory'),
        ('tasks.journal', file_above, 'cannot be written: '),
        (
            'tasks.db',
            no_database,
            'is no database, or damaged: file is not a database; give another --storage, or delete it',
        ),
        ('tasks.journal', no_database, 'is no journal, or damaged: .*; give another --storage, or delete it'),
    ],
)
def test_storage_that_cannot_be_used(tmp_path, storage, spoil, says):
    path = tmp_path / 'folder' / storage
    path.parent.mkdir()
    spoil(path)
    with pytest.raises(OSError, match=rf'the study .*{storage}.* {says}'):
        run_tasks(TASKS, square, path, 'test', timeout=0.1)


def test_locked_storage(tmp_path):
    path = tmp_path / 'tasks.db'
    run_tasks(TASKS[:1], square, path, 'test', say=[].append)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute('BEGIN EXCLUSIVE')
        with pytest.raises(OSError, match=r'tasks\.db does not answer: database is locked\. What is finished is kept'):
            run_tasks(TASKS, square, path, 'test', timeout=0.1)
        other.execute('ROLLBACK')
    assert len(run_tasks(TASKS, square, path, 'test', say=[].append).results) == 6


@pytest.mark.parametrize('storage', FILES)
def test_storage_that_is_deleted_meanwhile(tmp_path, storage):
    path = tmp_path / storage

    def work(task):
        path.unlink()
        return square(task)

    with pytest.raises(OSError, match=r'is gone .*start the command again'):
        run_tasks(TASKS, work, path, 'test', say=[].append)
    assert len(run_tasks(TASKS, square, path, 'test', say=[].append).results) == 6


@pytest.mark.parametrize(
    ('url', 'error', 'says'),
    [
        ('nosuch://host/name', ValueError, "a storage is a SQLite file, a .journal file or the URL of .*'nosuch://"),
        ('mysql+asyncmy://me:secret@host/name', ImportError, 'mysql.*@?host/name needs the driver of its database'),
    ],
)
def test_databases_that_do_not_exist(url, error, says):
    with pytest.raises(error, match=says) as caught:
        run_tasks(TASKS, square, url, 'test', timeout=0.1)
    assert 'secret' not in str(caught.value)


def test_missing_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'optuna', None)
    with pytest.raises(ImportError, match=r'pip install "sase-blocks\[search\]"'):
        run_tasks(TASKS, square, Path(tmp_path / 'tasks.db'), 'test')
