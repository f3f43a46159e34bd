"""A queue of independent tasks in one Optuna study, worked off by any number of processes on any number of machines.

Every worker runs the same command with the same storage. A task is a trial of the study: queued, claimed by one worker,
finished with its result as a user attribute. What a worker that died has left behind is queued again.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from sase_blocks.runs import keep_process_group
from sase_blocks.runs import say as print_line
from sase_blocks.search.study import State, Study, beating, describe_owner

__all__ = ['Outcome', 'check_queue', 'run_tasks']

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
            'postgresql+psycopg://USER:PASSWORD@HOST/NAME'.
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
    say = say or print_line
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


def check_queue(storage: str | Path, study_name: str, settings: Mapping[str, Any]) -> None:
    """Raise now what ``run_tasks`` would raise about Optuna, the storage, or a study made with other settings."""
    Study(storage, study_name, mark='key').open(settings)


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
        return [f'{key} ({describe_owner(state.attrs)})' for key, state in states.items() if not state.over]

    waiting = False
    while True:
        queue.study.bury_the_dead()
        queue.fill()
        taken = queue.take()
        if taken is not None:
            waiting = False
            trial, task = taken
            with beating(trial, heartbeat):
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


class _Queue:
    """The tasks in their study. Its trials have the attributes key and task, and a complete one result and seconds."""

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
        self.tasks = tasks
        self.settings = settings
        self.study = Study(storage, study_name, mark='key', patience=patience, timeout=timeout, deaths=deaths)

    def open(self) -> None:
        """Open or make the study, and refuse one of other settings or tasks."""
        self.study.open(self.settings)
        name = self.study.name()
        held = {attrs['key']: attrs['task'] for attrs in (trial.user_attrs for trial in self.study.trials())}
        for key, task in held.items():
            if key not in self.tasks:
                raise ValueError(
                    f'{name} was made for other tasks: it holds {key}, which is none of the {len(self.tasks)} '
                    f'asked for; ask for what it holds, or more, or start elsewhere'
                )
            if task != self.tasks[key]:
                raise ValueError(f'{name} was made for other tasks: {key} was {task} and is {self.tasks[key]}')

    def states(self) -> dict[str, State]:
        """Where each of the tasks stands, in their order."""
        held = self.study.states()
        return {key: held.get(key, State('missing', {})) for key in self.tasks}

    def _add(self, key: str, **attrs: Any) -> None:
        self.study.add({'key': key, 'task': self.tasks[key], **attrs})

    def fill(self) -> None:
        """Queue every task that is neither there nor over. What two processes queue at once, ``take`` sorts out."""
        for key, state in self.states().items():
            if state.status == 'missing':
                self._add(key)

    def retry_failed(self) -> None:
        """Queue the failed tasks of earlier commands again, unless another worker is at work."""
        self.study.bury_the_dead()
        states = self.states()
        if not any(state.status == 'running' for state in states.values()):
            for key, state in states.items():
                if state.status == 'failed':
                    self._add(key, again=True)

    def take(self) -> tuple[Any, Task] | None:
        """Claim the first waiting task, which no other worker then gets; None if there is none."""
        while (taken := self.study.take()) is not None:
            trial, same = taken
            if same is None:
                return trial, trial.user_attrs['task']
            self.end(trial, {'duplicate': True})
        return None

    def end(self, trial: Any, attrs: Mapping[str, Any]) -> bool:
        """Store how a trial ended. False if another worker has declared this one dead before."""
        return self.study.end(trial, attrs, [0.0] if 'result' in attrs else None)  # nothing is optimised
