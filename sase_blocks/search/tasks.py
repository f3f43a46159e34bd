"""A queue of independent tasks in one Optuna study, worked off by any number of processes on any number of machines.

Every worker runs the same command with the same storage. A task is a trial of the study: queued, claimed by one worker,
finished with its result as a user attribute. What a worker that died has left behind is queued again.

Optuna 5 has heartbeats of its own, but only in databases, only for ``Study.optimize``, on the machine's clock where the
database is a SQLite file, and none in a journal file, where the trial of a killed worker stays running for ever. So a
worker counts up a user attribute of its trial here, and the others, who wait for it, call it dead when the count has
stood still for ``patience`` seconds of their own clock. On the same machine a dead process is known at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from sase_blocks.runs import keep_process_group

__all__ = ['Outcome', 'run_tasks']

Task = dict[str, Any]
Result = dict[str, Any]
T = TypeVar('T')


class Outcome(NamedTuple):
    """What a study holds in the end: from the key of a task to its result, or to the text of its error."""

    results: dict[str, Result]
    errors: dict[str, str]


def run_tasks(
    tasks: Sequence[Mapping[str, Any]],
    work: Callable[[Task], Result],
    storage: str | Path,
    study_name: str,
    *,
    settings: Mapping[str, Any] | None = None,
    describe: Callable[[Task, Result], str] | None = None,
    say: Callable[[str], None] | None = None,
    heartbeat: float = 15.0,
    patience: float = 90.0,
    poll: float = 2.0,
    timeout: float = 60.0,
    deaths: int = 5,
    cpu: bool = False,
) -> Outcome:
    """Do all tasks once, together with every other process that runs the same command, and wait for the last one.

    Run again, the command does only what is missing. A task that raises is reported and does not stop the others; it
    is tried again when the command starts while no task is running. Under ``torchrun`` or ``accelerate launch`` all
    processes are one worker: the first one speaks to the study, all call ``work``.

    Args:
        tasks: dicts that JSON can hold, each with a 'key', a text that no other has. The study may grow: a command with
            more tasks than it holds adds them.
        work: does one task, given as a dict, and returns a dict that JSON can hold. It should be able to continue what
            an earlier, killed call for the same task has left behind.
        storage: a SQLite file (made with its folder if missing); a journal file, if its name ends in '.journal', also
            good on network folders such as NFS, where SQLite is not; or the URL of a database, such as
            'postgresql://USER:PASSWORD@HOST/NAME'.
        study_name: of the study in the storage.
        settings: what all tasks have in common; a study with other settings is refused.
        describe: a line about a finished task, from the task and its result.
        say: prints a line. Default: print.
        heartbeat: seconds between a worker's signs of life.
        patience: seconds without one after which a worker counts as dead.
        poll: seconds between looks at the study, while there is nothing to do.
        timeout: seconds for which a storage that does not answer is tried again.
        deaths: after as many workers have died in one task, it has failed.
        cpu: for the processes of torchrun: these use the CPU.

    Returns:
        Results and errors of these tasks by key, in their order.

    Raises:
        ImportError: Optuna, or the driver of the database, is missing (extra ``search``).
        ValueError: no tasks, tasks without or with equal keys, a study with other settings or tasks.
        OSError: the storage is locked, gone, damaged or not writable.
        RuntimeError: every task has failed.
    """
    listed = _check_tasks(tasks)
    main, broadcast = _processes(cpu)
    say = say or (lambda text: print(text, flush=True))
    # What the first process decides is sent to the others as (what, more): 'task', 'wait', 'end' or 'raise'.
    turns: Iterator[tuple[str, Any]] | None = None
    if main:
        queue = _Queue(listed, storage, study_name, dict(settings or {}), patience, timeout, deaths)
        turns = _turns(queue, work, describe, say, heartbeat, poll)
    while True:
        turn: tuple[str, Any] = ('', None)
        if turns is not None:
            try:
                turn = next(turns)
            except Exception as error:
                turn = ('raise', error)
        what, more = broadcast(turn)
        if what == 'raise':
            raise more
        if what == 'end':
            return Outcome(*more)
        if what == 'task' and not main:
            with contextlib.suppress(Exception):  # the first process reports it
                work(more)


def _check_tasks(tasks: Sequence[Mapping[str, Any]]) -> dict[str, Task]:
    if not tasks:
        raise ValueError('there are no tasks to run')
    listed: dict[str, Task] = {}
    for task in tasks:
        key = task.get('key')
        if not isinstance(key, str) or not key:
            raise ValueError(f"a task needs a 'key', a text of its own, got {dict(task)!r}")
        if key in listed:
            raise ValueError(f'two tasks have the key {key!r}')
        try:
            listed[key] = json.loads(json.dumps(dict(task)))  # as the study will hold it
        except TypeError as error:
            raise ValueError(f'task {key}: {error}; a task is stored as JSON') from None
    return listed


def _processes(cpu: bool) -> tuple[bool, Callable[[T], T]]:
    """Is this the first process of its launch, and the function that gives all of them the first one's value."""
    if int(os.environ.get('WORLD_SIZE', '1')) < 2:
        return True, lambda value: value
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    def broadcast(value: T) -> T:
        PartialState(cpu=cpu)  # every run resets it
        values = [value]
        broadcast_object_list(values)
        return values[0]

    main = PartialState(cpu=cpu).is_main_process
    keep_process_group()
    return main, broadcast


def _turns(
    queue: _Queue,
    work: Callable[[Task], Result],
    describe: Callable[[Task, Result], str] | None,
    say: Callable[[str], None],
    heartbeat: float,
    poll: float,
) -> Iterator[tuple[str, Any]]:
    """What the worker does, turn by turn: a task, on which it works when asked for the next turn; waiting; the end."""
    total = len(queue.tasks)
    queue.open()
    queue.retry_failed()
    told = {key for key, state in queue.states().items() if state.over}
    if told:
        say(f'{len(told)} of {total} tasks are done already')

    def report() -> list[str]:
        """Tell of each task that is over now, and return what is still going on."""
        for key, state in (states := queue.states()).items():
            if not state.over or key in told:
                continue
            told.add(key)
            text = f'failed: {state.error}'
            if state.status == 'done':
                done = describe(queue.tasks[key], state.attrs['result']) if describe else 'done'
                text = f'{done} ({state.attrs["seconds"]:.0f} s)'
            say(f'{len(told)}/{total} {key}: {text}')
        return [f'{key} ({_whose(state.attrs)})' for key, state in states.items() if not state.over]

    waiting = False
    while True:
        queue.bury_the_dead()
        queue.fill()
        taken = queue.take()
        if taken is not None:
            waiting = False
            trial, task = taken
            with _beating(trial, heartbeat):
                yield 'task', task
                attrs, interrupt = _attempt(work, task)
                if not queue.end(trial, attrs):
                    say(f'{task["key"]}: another worker took this one for dead and may do the task as well')
            if interrupt is not None:
                raise interrupt
            report()
            continue
        going_on = report()
        if not going_on:
            break
        if not waiting:
            waiting = True
            more = f' and {len(going_on) - 3} more' if len(going_on) > 3 else ''
            say(f'waiting for what other workers do: {", ".join(going_on[:3])}{more}')
        # Short turns, for the other processes of the launch wait for each of them, and not for ever.
        time.sleep(poll)
        yield 'wait', None
    states = queue.states()
    results = {key: state.attrs['result'] for key, state in states.items() if state.status == 'done'}
    errors = {key: state.error for key, state in states.items() if state.status == 'failed'}
    if not results:
        key, text = next(iter(errors.items()))
        raise RuntimeError(f'all {len(errors)} tasks failed; the first one, {key}: {text}')
    yield 'end', (results, errors)


def _attempt(work: Callable[[Task], Result], task: Task) -> tuple[dict[str, Any], BaseException | None]:
    """What to store of one attempt, and what to raise once it is stored."""
    began = time.monotonic()
    try:
        result = work(json.loads(json.dumps(task)))
        json.dumps(result)
    except Exception as error:
        return {'error': f'{type(error).__name__}: {" ".join(str(error).split())}'[:1000]}, None
    except BaseException as error:  # Ctrl-C or sys.exit: the worker stops, and the task is left to the next one
        return {'interrupted': True}, error
    return {'result': result, 'seconds': round(time.monotonic() - began, 3)}, None


class _State(NamedTuple):
    """Where a task stands: 'missing', 'waiting', 'running', 'done' or 'failed'; and the attributes of its trial."""

    status: str
    attrs: Mapping[str, Any]
    error: str = ''

    @property
    def over(self) -> bool:
        return self.status in ('done', 'failed')


class _Queue:
    """The study, as a queue. Its trials have the attributes key, task, owner and beat, and in the end one of result
    (with seconds), error, interrupted, duplicate; a failed trial with none of these is of a worker that died.
    """

    def __init__(
        self,
        tasks: dict[str, Task],
        storage: str | Path,
        study_name: str,
        settings: dict[str, Any],
        patience: float,
        timeout: float,
        deaths: int,
    ) -> None:
        try:
            import optuna
        except ImportError as error:
            raise ImportError(f'a queue of tasks needs Optuna ({error}): pip install "sase-blocks[search]"') from error
        self.optuna = optuna
        self.tasks = tasks
        self.storage = storage
        self.study_name = study_name
        self.settings = json.loads(json.dumps(settings))
        self.patience = patience
        self.timeout = timeout
        self.deaths = deaths
        self.file: Path | None = None if '://' in str(storage) else Path(storage)
        self.inode: int | None = None
        self.study: Any = None
        self.seen: dict[int, tuple[Any, float]] = {}  # of running trials: the last beat, and when it was new

    # ---- the study ----

    def open(self) -> None:
        """Open or make the study, and refuse one of other settings or tasks."""
        if self.file is not None:
            try:
                self.file.parent.mkdir(parents=True, exist_ok=True)
                with self.file.open('ab'):
                    pass
            except OSError as error:
                raise OSError(f'the study {self.file} cannot be written: {error.strerror or error}') from error
            self.inode = self.file.stat().st_ino
        verbosity = self.optuna.logging.get_verbosity()
        self.optuna.logging.set_verbosity(self.optuna.logging.WARNING)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')  # of what Optuna calls experimental
                # Two processes that make the tables at the same moment get in each other's way: once more, then.
                self.study = self._patiently(self._open)
        finally:
            self.optuna.logging.set_verbosity(verbosity)
        stored = self._patiently(lambda: self.study.user_attrs)
        if 'settings' not in stored:
            self._patiently(lambda: self.study.set_user_attr('settings', self.settings))
            stored = self._patiently(lambda: self.study.user_attrs)
        before = stored['settings']
        names = sorted({*before, *self.settings})
        differing = [
            f'{name} was {before.get(name)!r} and is {self.settings.get(name)!r}'
            for name in names
            if before.get(name) != self.settings.get(name)
        ]
        if differing:
            raise ValueError(
                f'{self._name()} was made with other settings: {"; ".join(differing)}; set them back or start elsewhere'
            )
        held = {attrs['key']: attrs['task'] for attrs in (trial.user_attrs for trial in self._trials())}
        for key, task in held.items():
            if key not in self.tasks:
                raise ValueError(
                    f'{self._name()} was made for other tasks: it holds {key}, which is none of the {len(self.tasks)} '
                    f'asked for; ask for what it holds, or more, or start elsewhere'
                )
            if task != self.tasks[key]:
                raise ValueError(f'{self._name()} was made for other tasks: {key} was {task} and is {self.tasks[key]}')

    def _open(self) -> Any:
        optuna = self.optuna
        if self.file is not None and self.file.name.endswith('.journal'):
            from optuna.storages.journal import JournalFileBackend

            storage = optuna.storages.JournalStorage(JournalFileBackend(str(self.file)))
        elif self.file is not None:
            storage = self._open_sqlite(self.file)
        else:
            try:
                storage = optuna.storages.RDBStorage(str(self.storage))
            except ImportError as error:
                raise ImportError(f'{self._name()} needs the driver of its database ({error.__cause__})') from error
        return optuna.create_study(
            study_name=self.study_name,
            storage=storage,
            sampler=optuna.samplers.RandomSampler(),
            load_if_exists=True,
        )

    def _open_sqlite(self, file: Path) -> Any:
        """A SQLite file in which a transaction locks before it reads.

        By default Python's driver locks at the first write, so that two workers may both read that a trial waits, and
        both take it.
        """
        import sqlite3

        import sqlalchemy

        def connect() -> sqlite3.Connection:
            return sqlite3.connect(file, timeout=self.timeout, isolation_level=None, check_same_thread=False)

        storage = self.optuna.storages.RDBStorage('sqlite:///tasks', {'creator': connect})
        sqlalchemy.event.listen(
            storage.engine, 'begin', lambda connection: connection.exec_driver_sql('BEGIN IMMEDIATE')
        )
        return storage

    def _name(self) -> str:
        """The study, for messages; a password in its URL is not shown."""
        where = str(self.storage)
        if '@' in where and '://' in where:
            scheme, _, rest = where.partition('://')
            where = f'{scheme}://{rest.rpartition("@")[2]}'
        return f'the study {self.study_name!r} in {where}'

    def _patiently(self, action: Callable[[], T]) -> T:
        """``action()``, again and again for ``timeout`` seconds while the storage does not answer."""
        import sqlalchemy.exc

        transient = (sqlalchemy.exc.OperationalError, sqlalchemy.exc.IntegrityError)
        until = time.monotonic() + self.timeout
        while True:
            try:
                if self.file is not None and self.file.stat().st_ino != self.inode:
                    raise FileNotFoundError('another file is in its place')
                return action()
            except FileNotFoundError as error:
                raise OSError(f'{self._name()} is gone ({error}); start the command again') from error
            except sqlalchemy.exc.ArgumentError as error:
                raise ValueError(
                    f'a storage is a SQLite file, a .journal file or the URL of a database, got {self.storage!r}: '
                    f'{_reason(error)}'
                ) from error
            except (self.optuna.exceptions.StorageInternalError, sqlalchemy.exc.SQLAlchemyError, OSError) as error:
                cause = error.__cause__ if isinstance(error.__cause__, sqlalchemy.exc.SQLAlchemyError) else error
                if time.monotonic() > until or not isinstance(cause, (*transient, OSError)):
                    raise OSError(
                        f'{self._name()} does not answer: {_reason(cause)}. What is finished is kept in it; once it '
                        f'answers again, the same command does the rest'
                    ) from error
            except json.JSONDecodeError as error:
                raise OSError(f'{self._name()} is damaged: {error}') from error
            time.sleep(random.uniform(0.1, 0.5))

    # ---- the tasks ----

    def _trials(self) -> list[Any]:
        """The trials that stand for a task, in the order of their numbers."""
        trials = self._patiently(lambda: self.study.get_trials(deepcopy=False))
        return [trial for trial in trials if 'key' in trial.user_attrs]

    def states(self) -> dict[str, _State]:
        """Where each of the tasks stands, in their order."""
        trials: dict[str, list[Any]] = {key: [] for key in self.tasks}
        for trial in self._trials():
            trials.setdefault(trial.user_attrs['key'], []).append(trial)
        return {key: self._state(trials[key]) for key in self.tasks}

    def _state(self, trials: list[Any]) -> _State:
        """Where a task stands, from all trials for it."""
        states = self.optuna.trial.TrialState
        for status, state in (('done', states.COMPLETE), ('running', states.RUNNING), ('waiting', states.WAITING)):
            for trial in trials:
                if trial.state == state:
                    return _State(status, trial.user_attrs)
        lost = 0
        for trial in reversed(trials):
            attrs = trial.user_attrs
            if 'error' in attrs:
                return _State('failed', attrs, attrs['error'])
            lost += not ('duplicate' in attrs or 'interrupted' in attrs)
            if lost >= self.deaths:
                return _State('failed', attrs, f'{lost} workers died in it, the last one {_whose(attrs)}')
            if 'again' in attrs:
                break
        return _State('missing', {})

    def _add(self, key: str, **attrs: Any) -> None:
        attrs = {'key': key, 'task': self.tasks[key], **attrs}
        self._patiently(lambda: self.study.enqueue_trial({}, user_attrs=attrs))

    def fill(self) -> None:
        """Queue every task that is neither there nor over. What two processes queue at once, ``take`` sorts out."""
        for key, state in self.states().items():
            if state.status == 'missing':
                self._add(key)

    def retry_failed(self) -> None:
        """Queue the failed tasks of earlier commands again, unless another worker is at work."""
        self.bury_the_dead()
        states = self.states()
        if not any(state.status == 'running' for state in states.values()):
            for key, state in states.items():
                if state.status == 'failed':
                    self._add(key, again=True)

    def take(self) -> tuple[Any, Task] | None:
        """Claim the first waiting task, which no other worker then gets; None if there is none."""
        states = self.optuna.trial.TrialState
        while any(trial.state == states.WAITING for trial in self._trials()):
            trial = self._patiently(self.study.ask)
            key = trial.user_attrs.get('key')
            if key is None:  # others were faster, and Optuna has made a trial of nothing
                self._patiently(lambda: self.study.tell(trial, state=states.FAIL))  # noqa: B023  # called at once
                continue
            others = [t for t in self._trials() if t.user_attrs['key'] == key and t.number != trial.number]
            if any(
                other.state == states.COMPLETE or (not other.state.is_finished() and other.number < trial.number)
                for other in others
            ):
                self.end(trial, {'duplicate': True})
                continue
            if self._set(trial, {'owner': _this_process()}):
                return trial, trial.user_attrs['task']
        return None

    def end(self, trial: Any, attrs: Mapping[str, Any]) -> bool:
        """Store how a trial ended. False if another worker has declared this one dead before."""
        states = self.optuna.trial.TrialState
        if 'result' in attrs:
            ended: dict[str, Any] = {'state': states.COMPLETE, 'values': [0.0]}  # nothing is optimised
        else:
            ended = {'state': states.FAIL}
        if self._set(trial, attrs):
            told = self._patiently(lambda: self.study.tell(trial, **ended, skip_if_finished=True))
            if told.state == ended['state']:
                return True
        if 'result' in attrs:  # it is a result for all that
            attrs = {**trial.user_attrs, **attrs}
            again = self.optuna.trial.create_trial(**ended, user_attrs=attrs)
            self._patiently(lambda: self.study.add_trial(again))
        return False

    def _set(self, trial: Any, attrs: Mapping[str, Any]) -> bool:
        """Set attributes of a running trial; False if it is not running any more."""
        for name, value in attrs.items():
            try:
                self._patiently(lambda: trial.set_user_attr(name, value))  # noqa: B023  # called at once
            except self.optuna.exceptions.UpdateFinishedTrialError:
                return False
        return True

    def bury_the_dead(self) -> None:
        """Fail the running trials of workers that have died, so that their tasks are missing again."""
        states = self.optuna.trial.TrialState
        now = time.monotonic()
        running = [trial for trial in self._trials() if trial.state == states.RUNNING]
        self.seen = {t.number: self.seen.get(t.number, ('new', now)) for t in running}
        for trial in running:
            beat, since = self.seen[trial.number]
            present = trial.user_attrs.get('beat')
            if beat != present:
                self.seen[trial.number] = present, now
            elif now - since < self.patience:
                pass
            else:
                self._bury(trial)
                continue
            if _is_gone(trial.user_attrs.get('owner')):
                self._bury(trial)

    def _bury(self, trial: Any) -> None:
        state = self.optuna.trial.TrialState.FAIL
        with contextlib.suppress(self.optuna.exceptions.UpdateFinishedTrialError):
            self._patiently(lambda: self.study.tell(trial.number, state=state, skip_if_finished=True))


# ---- workers ----


@contextlib.contextmanager
def _beating(trial: Any, interval: float) -> Iterator[None]:
    """Within this context a thread counts up the trial's beat."""
    stop = threading.Event()

    def beat() -> None:
        count = 0
        while not stop.wait(interval):
            count += 1
            # A storage that fails for a while is no reason to end; a trial that was taken away ends elsewhere.
            with contextlib.suppress(Exception):
                trial.set_user_attr('beat', count)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _this_process() -> dict[str, Any]:
    """Who has a task: for people, and, where the system tells (Linux), so that its end can be noticed at once."""
    pid = os.getpid()
    return {'host': socket.gethostname(), 'pid': pid, 'machine': _machine(), 'started': _started(pid)}


def _machine() -> str | None:
    """What tells one system's process numbers from another's, containers on one machine included."""
    try:
        return f'{Path("/proc/sys/kernel/random/boot_id").read_text().strip()} {os.readlink("/proc/self/ns/pid")}'
    except OSError:
        return None


def _started(pid: int) -> int | None:
    """When a process of this machine started, in ticks; None if there is none or it has ended."""
    try:
        state, *rest = Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()
    except OSError:
        return None
    return None if state in 'ZX' else int(rest[18])


def _is_gone(owner: Mapping[str, Any] | None) -> bool:
    """Did the owner of a task run on this machine, and does it no longer?"""
    if owner is None or owner['machine'] is None or owner['started'] is None or owner['machine'] != _machine():
        return False
    return _started(owner['pid']) != owner['started']


def _whose(attrs: Mapping[str, Any]) -> str:
    owner = attrs.get('owner')
    return f'process {owner["pid"]} on {owner["host"]}' if owner else 'not begun'


def _reason(error: BaseException) -> str:
    """The first line of what a database said, without the statement and the links that SQLAlchemy adds."""
    text = str(getattr(error, 'orig', None) or error).strip()
    return text.splitlines()[0] if text else type(error).__name__
