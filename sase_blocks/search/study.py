"""An Optuna study that any number of processes on any number of machines work on together.

A study made with other settings is refused. Each trial is claimed by one worker, and that of a worker that died is
failed, so that what it stood for can be queued again. A storage that is locked for a while is tried again.

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
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

__all__ = ['State', 'Study', 'beating', 'describe_owner']

T = TypeVar('T')


class State(NamedTuple):
    """'missing' (to be queued), 'waiting', 'running', 'done' or 'failed', and the attributes of one of its trials."""

    status: str
    attrs: Mapping[str, Any]
    error: str = ''

    @property
    def over(self) -> bool:
        return self.status in ('done', 'failed')


class Study:
    """One study in one storage, as a queue of marked trials.

    What a trial stands for is its user attribute ``mark``, a text; several trials may stand for the same. Trials
    without it are none of ours. Further attributes are owner and beat of a claimed trial and, in a failed one, one of
    error, interrupted or duplicate; a failed trial with none of these is of a worker that died. With the attribute
    again, what failed before is forgotten.

    Args:
        storage: a SQLite file, a '.journal' file or the URL of a database; see ``search.tasks.run_tasks``.
        study_name: of the study in the storage.
        mark: the user attribute that says what a trial stands for.
        directions: of the trials' values, 'minimize' or 'maximize' each.
        patience: seconds without a sign of life after which a worker counts as dead.
        timeout: seconds for which a storage that does not answer is tried again.
        deaths: after as many workers have died over one thing, it has failed.

    Raises:
        ImportError: Optuna is missing (extra ``search``).
    """

    def __init__(
        self,
        storage: str | Path,
        study_name: str,
        *,
        mark: str,
        directions: Sequence[str] = ('minimize',),
        patience: float = 90.0,
        timeout: float = 60.0,
        deaths: int = 5,
    ) -> None:
        try:
            import optuna
        except ImportError as error:
            raise ImportError(f'a study needs Optuna ({error}): pip install "sase-blocks[search]"') from error
        self.optuna = optuna
        self.states_of_trials = optuna.trial.TrialState
        self.storage = storage
        self.study_name = study_name
        self.mark = mark
        self.directions = list(directions)
        self.patience = patience
        self.timeout = timeout
        self.deaths = deaths
        self.file: Path | None = None if '://' in str(storage) else Path(storage)
        self.inode: int | None = None
        self.study: Any = None  # Optuna's
        self.seen: dict[int, tuple[Any, float]] = {}  # of running trials: the last beat, and when it was new

    # ---- the storage ----

    def open(self, settings: Mapping[str, Any]) -> None:
        """Open or make the study, and refuse one that was made with other settings (JSON must be able to hold them).

        Raises:
            ValueError: other settings (each is named), or a storage that is none.
            ImportError: the driver of the database is missing.
            OSError: the storage is locked, gone, damaged or not writable.
        """
        settings = json.loads(json.dumps(dict(settings)))  # as the study will hold them
        self.connect()
        stored = self.patiently(lambda: self.study.user_attrs)
        if 'settings' not in stored:
            self.patiently(lambda: self.study.set_user_attr('settings', settings))
            stored = self.patiently(lambda: self.study.user_attrs)
        before = stored['settings']
        names = sorted({*before, *settings})
        differing = [
            f'{name} was {before.get(name)!r} and is {settings.get(name)!r}'
            for name in names
            if before.get(name) != settings.get(name)
        ]
        if differing:
            raise ValueError(
                f'{self.name()} was made with other settings: {"; ".join(differing)}; set them back or start elsewhere'
            )

    def connect(self) -> None:
        """``open`` without a look at the settings; raises what that raises about the storage."""
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
                self.study = self.patiently(self._open)
        finally:
            self.optuna.logging.set_verbosity(verbosity)

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
                raise ImportError(f'{self.name()} needs the driver of its database ({error.__cause__})') from error
        if isinstance(storage, optuna.storages.RDBStorage):
            weakref.finalize(self, storage.engine.dispose)  # closes its connections with this object
        return optuna.create_study(
            study_name=self.study_name,
            storage=storage,
            sampler=optuna.samplers.RandomSampler(),
            directions=self.directions,
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

        storage = self.optuna.storages.RDBStorage('sqlite:///study', {'creator': connect})
        sqlalchemy.event.listen(
            storage.engine, 'begin', lambda connection: connection.exec_driver_sql('BEGIN IMMEDIATE')
        )
        return storage

    def name(self) -> str:
        """The study, for messages; a password in its URL is not shown."""
        where = str(self.storage)
        if '@' in where and '://' in where:
            scheme, _, rest = where.partition('://')
            where = f'{scheme}://{rest.rpartition("@")[2]}'
        return f'the study {self.study_name!r} in {where}'

    def patiently(self, action: Callable[[], T]) -> T:
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
                raise OSError(f'{self.name()} is gone ({error}); start the command again') from error
            except sqlalchemy.exc.ArgumentError as error:
                raise ValueError(
                    f'a storage is a SQLite file, a .journal file or the URL of a database, got {self.storage!r}: '
                    f'{_reason(error)}'
                ) from error
            except (self.optuna.exceptions.StorageInternalError, sqlalchemy.exc.SQLAlchemyError, OSError) as error:
                cause = error.__cause__ if isinstance(error.__cause__, sqlalchemy.exc.SQLAlchemyError) else error
                if isinstance(cause, sqlalchemy.exc.DatabaseError) and _is_damage(cause):
                    raise OSError(
                        f'{self.name()} is no database, or damaged: {_reason(cause)}; give another --storage, or '
                        f'delete it to start over'
                    ) from error
                if time.monotonic() > until or not isinstance(cause, (*transient, OSError)):
                    raise OSError(
                        f'{self.name()} does not answer: {_reason(cause)}. What is finished is kept in it; once it '
                        f'answers again, the same command does the rest'
                    ) from error
            except json.JSONDecodeError as error:
                raise OSError(
                    f'{self.name()} is no journal, or damaged: {error}; give another --storage, or delete it to start '
                    f'over'
                ) from error
            time.sleep(random.uniform(0.1, 0.5))

    # ---- the trials ----

    def trials(self) -> list[Any]:
        """The marked trials, in the order of their numbers."""
        trials = self.patiently(lambda: self.study.get_trials(deepcopy=False))
        return [trial for trial in trials if self.mark in trial.user_attrs]

    def states(self) -> dict[str, State]:
        """Where each marked thing stands, in the order of the first trials for them."""
        trials: dict[str, list[Any]] = {}
        for trial in self.trials():
            trials.setdefault(trial.user_attrs[self.mark], []).append(trial)
        return {name: self._state(of_one) for name, of_one in trials.items()}

    def _state(self, trials: list[Any]) -> State:
        """Where a thing stands, from all trials for it."""
        states = self.states_of_trials
        for status, state in (('done', states.COMPLETE), ('running', states.RUNNING), ('waiting', states.WAITING)):
            for trial in trials:
                if trial.state == state:
                    return State(status, trial.user_attrs)
        lost = 0
        for trial in reversed(trials):
            attrs = trial.user_attrs
            if 'error' in attrs:
                return State('failed', attrs, attrs['error'])
            lost += not ('duplicate' in attrs or 'interrupted' in attrs)
            if lost >= self.deaths:
                return State('failed', attrs, f'{lost} workers died in it, the last one {describe_owner(attrs)}')
            if 'again' in attrs:
                break
        return State('missing', {})

    def add(
        self,
        attrs: Mapping[str, Any],
        params: Mapping[str, Any] | None = None,
        distributions: Mapping[str, Any] | None = None,
        values: Sequence[float] | None = None,
    ) -> None:
        """Queue a trial, at once with all that it holds: user attributes, the mark among them, and parameters.

        With values it is not queued but complete.
        """
        states = self.states_of_trials
        trial = self.optuna.trial.create_trial(
            state=states.WAITING if values is None else states.COMPLETE,
            values=values,
            user_attrs=dict(attrs),
            params=dict(params or {}),
            distributions=dict(distributions or {}),
        )
        self.patiently(lambda: self.study.add_trial(trial))

    def take(self) -> tuple[Any, Any | None] | None:
        """Claim the first waiting trial, which no other worker then gets; None if there is none.

        Workers that queue the same thing at the same moment queue it twice. Then the second of the pair is another
        trial for it, which is complete, or waits or runs with a lower number: the claimed one is to be given up.
        """
        states = self.states_of_trials
        while any(trial.state == states.WAITING for trial in self.trials()):
            trial = self.patiently(self.study.ask)
            name = trial.user_attrs.get(self.mark)
            if name is None:  # others were faster, and Optuna has made a trial of nothing
                self.patiently(lambda: self.study.tell(trial, state=states.FAIL))  # noqa: B023  # called at once
                continue
            others = [t for t in self.trials() if t.user_attrs[self.mark] == name and t.number != trial.number]
            others.sort(key=lambda other: other.state != states.COMPLETE)
            for other in others:
                if other.state == states.COMPLETE or (not other.state.is_finished() and other.number < trial.number):
                    return trial, other
            if self.set(trial, {'owner': _this_process()}):
                return trial, None
        return None

    def end(self, trial: Any, attrs: Mapping[str, Any], values: Sequence[float] | None = None) -> bool:
        """Store how a trial ended: complete with values, failed without.

        Returns:
            False if another worker has declared this one dead before. Values are kept all the same, in a new trial.
        """
        states = self.states_of_trials
        state = states.FAIL if values is None else states.COMPLETE
        if self.set(trial, attrs):
            told = self.patiently(lambda: self.study.tell(trial, values, state, skip_if_finished=True))
            if told.state == state:
                return True
        if values is not None:
            attrs = {**trial.user_attrs, **attrs}
            self.add(attrs, trial.params, trial.distributions, values)
        return False

    def set(self, trial: Any, attrs: Mapping[str, Any]) -> bool:
        """Set attributes of a running trial; False if it is not running any more."""
        for name, value in attrs.items():
            try:
                self.patiently(lambda: trial.set_user_attr(name, value))  # noqa: B023  # called at once
            except self.optuna.exceptions.UpdateFinishedTrialError:
                return False
        return True

    def bury_the_dead(self) -> None:
        """Fail the running trials of workers that have died, so that what they stood for is missing again."""
        now = time.monotonic()
        running = [trial for trial in self.trials() if trial.state == self.states_of_trials.RUNNING]
        self.seen = {t.number: self.seen.get(t.number, ('new', now)) for t in running}
        for trial in running:
            beat, since = self.seen[trial.number]
            present = trial.user_attrs.get('beat')
            if beat != present:
                since = now
                self.seen[trial.number] = present, now
            if now - since >= self.patience or _is_gone(trial.user_attrs.get('owner')):
                self.bury(trial)

    def bury(self, trial: Any) -> None:
        """Fail a trial of which nobody knows how it ended, unless it is over meanwhile."""
        with contextlib.suppress(self.optuna.exceptions.UpdateFinishedTrialError):
            fail = self.states_of_trials.FAIL
            self.patiently(lambda: self.study.tell(trial.number, state=fail, skip_if_finished=True))


# ---- workers ----


@contextlib.contextmanager
def beating(trial: Any, interval: float) -> Iterator[None]:
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
    """Who has a trial: for people, and, where the system tells (Linux), so that its end can be noticed at once."""
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
    """Did the owner of a trial run on this machine, and does it no longer?"""
    if owner is None or owner['machine'] is None or owner['started'] is None or owner['machine'] != _machine():
        return False
    return _started(owner['pid']) != owner['started']


def describe_owner(attrs: Mapping[str, Any]) -> str:
    owner = attrs.get('owner')
    return f'process {owner["pid"]} on {owner["host"]}' if owner else 'not begun'


def _is_damage(error: BaseException) -> bool:
    """Does SQLite say that a file will never answer?"""
    return any(text in _reason(error) for text in ('file is not a database', 'disk image is malformed'))


def _reason(error: BaseException) -> str:
    """The first line of what a database said, without the statement and the links that SQLAlchemy adds."""
    text = str(getattr(error, 'orig', None) or error).strip()
    return text.splitlines()[0] if text else type(error).__name__
