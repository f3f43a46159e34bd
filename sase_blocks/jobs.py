"""Many independent runs, called jobs: one after another in this process, or on the machines of a Ray cluster.

Each job has a folder with a ``result.json`` that is written when the job ends. The folder is the memory: the same call
again does what is missing, and a job that was killed goes on from what it left there. No job writes outside its folder.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from sase_blocks.reading import one_line, parse_json, quoted, read_text
from sase_blocks.runs import check_writable, keep_process_group, lock_folder, write_text
from sase_blocks.runs import say as print_line

__all__ = [
    'Each',
    'Ended',
    'Outcome',
    'Ray',
    'check_jobs',
    'check_settings',
    'each_in_turn',
    'job_folder',
    'run_jobs',
    'share',
]

Job = dict[str, Any]
Result = dict[str, Any]
T = TypeVar('T')

RESULT = 'result.json'  # in the folder of a job
ANSWERS = 10.0  # seconds within which the head of a cluster has to
JOBS = 'jobs.json'  # beside the folders: the jobs and what they have in common


class Ended(NamedTuple):
    """How a call ended: its value, or the text of its error; and the seconds it took."""

    value: Any
    error: str
    seconds: float


# From a function and its arguments to the number of an argument and how the call with it ended, in any order.
Each = Callable[[Callable[[Any], Any], Sequence[Any]], Iterator[tuple[int, Ended]]]


class Outcome(NamedTuple):
    """From the key of a job to its result, or to the text of its error."""

    results: dict[str, Result]
    errors: dict[str, str]

    def check(self, what: str = 'jobs') -> dict[str, Result]:
        """The results. Raises RuntimeError, with the first job that failed and its error, unless there are all."""
        if self.errors:
            key, text = next(iter(self.errors.items()))
            total = len(self.results) + len(self.errors)
            count = f'all {total}' if not self.results else f'{len(self.errors)} of {total}'
            raise RuntimeError(f'{count} {what} failed; the first one, {key}: {text}')
        return self.results


# ---- where the calls are made ----


def each_in_turn(function: Callable[[Any], Any], arguments: Sequence[Any]) -> Iterator[tuple[int, Ended]]:
    """Call a function with each argument in this process. Ctrl-C and ``sys.exit`` pass through."""
    for number, argument in enumerate(arguments):
        yield number, _call(function, argument)


@dataclass(frozen=True)
class Ray:
    """Machines of a Ray cluster (extra ``ray``), on which calls are Ray tasks.

    A program that has called ``ray.init`` uses that cluster. Otherwise the first call joins one, and stays to the end
    of the process; Ray's usage reports are switched off. All machines need this package, the same folder for results,
    and the data under the same path.

    Args:
        address: 'auto' for the cluster that this machine belongs to, 'HOST:PORT' of its head, or 'local' for this
            machine alone.
        gpus: of a call; a part of one, such as 0.5, lets several calls share a GPU. Default: 1 if the cluster has GPUs.
        retries: how often a call is made again after its worker or machine has died.

    Raises:
        ValueError: a wrong argument.
    """

    address: str = 'auto'
    gpus: float | None = None
    retries: int = 3

    def __post_init__(self) -> None:
        if not self.address.strip():
            raise ValueError(f"ray: expected 'auto', 'local' or HOST:PORT, got {self.address!r}")
        if self.gpus is not None and not (0 <= self.gpus < 1 or (self.gpus >= 1 and self.gpus == int(self.gpus))):
            raise ValueError(f'ray gpus: expected a whole number or a part of one GPU, got {self.gpus}')
        if self.retries < 0:
            raise ValueError(f'ray retries: expected at least 0, got {self.retries}')

    def connect(self) -> list[dict[str, float]]:
        """Join the cluster. -> what each of its machines has: 'CPU', 'GPU', ...

        Raises:
            ImportError: Ray is missing. ValueError: there is no such cluster, or no machine has so many GPUs.
        """
        os.environ.setdefault('RAY_USAGE_STATS_ENABLED', '0')
        try:
            import ray
        except ImportError as error:
            raise ImportError(f'--ray needs Ray ({error}): pip install "sase-blocks[ray]"') from error
        if int(os.environ.get('WORLD_SIZE', '1')) > 1:
            raise ValueError('--ray starts its own processes: leave torchrun or accelerate launch out')
        if not ray.is_initialized():
            more: dict[str, Any] = {'include_dashboard': False} if self.address == 'local' else {}
            try:
                self._knock()
                ray.init(self.address, log_to_driver=False, logging_level=logging.ERROR, **more)
            except (OSError, RuntimeError, ValueError) as error:
                raise ValueError(
                    f'there is no Ray cluster at {quoted(self.address)} ({one_line(error, 300)}); start one with `ray '
                    f"start --head`, or use this machine alone with 'local'"
                ) from error
        machines = [dict(node['Resources']) for node in ray.nodes() if node['Alive']]
        most = max(machine.get('GPU', 0.0) for machine in machines)
        if self.gpus is not None and self.gpus > most:
            raise ValueError(f'ray gpus: a job asks for {self.gpus:g}, and no machine of the cluster has over {most:g}')
        return machines

    def _knock(self) -> None:
        """Raise OSError or ValueError unless something answers at HOST:PORT; Ray would wait for minutes."""
        host, colon, port = self.address.rpartition(':')
        if colon and '://' not in self.address:
            with socket.create_connection((host, int(port)), timeout=ANSWERS):
                pass

    def describe(self) -> str:
        """The cluster in a few words; joins it."""
        machines = self.connect()
        cpus, gpus = (int(sum(machine.get(name, 0) for machine in machines)) for name in ('CPU', 'GPU'))
        return f'Ray: {len(machines)} machine{"s"[: len(machines) > 1]} with {gpus} GPUs and {cpus} CPUs'

    def each(self, function: Callable[[Any], Any], arguments: Sequence[Any]) -> Iterator[tuple[int, Ended]]:
        """Call a function with each argument, wherever there is room.

        A worker gets the function once and keeps it: what the function keeps, its next call there finds. Relative
        paths are those of this process.
        """
        machines = self.connect()
        import ray

        gpus = self.gpus
        if gpus is None:
            gpus = float(any(machine.get('GPU', 0) for machine in machines))
        task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=self.retries)(_call_on_worker)
        # In a list, or Ray would unpack it before each call.
        held = [ray.put(function)]
        running = {task.remote(held, os.getcwd(), argument): number for number, argument in enumerate(arguments)}
        try:
            while running:
                (done,), _ = ray.wait(list(running), num_returns=1)
                number = running.pop(done)
                try:
                    ended = ray.get(done)
                except ray.exceptions.RayError as error:
                    ended = Ended(None, f'{type(error).__name__}: {one_line(error)}', 0.0)
                yield number, ended
        finally:
            for left in running:  # Ctrl-C, or an error of the caller
                ray.cancel(left, force=True)


_held: dict[Any, Callable[[Any], Any]] = {}  # in a worker of Ray: the function it was given last


def _call_on_worker(held: list[Any], folder: str, argument: Any) -> Ended:
    (reference,) = held
    if reference not in _held:
        import ray

        with contextlib.suppress(OSError):  # another machine may not have it
            os.chdir(folder)
        _held.clear()
        _held[reference] = ray.get(reference)
    return _call(_held[reference], argument)


def _call(function: Callable[[Any], Any], argument: Any) -> Ended:
    began = time.monotonic()
    value, text = None, ''
    try:
        value = function(argument)
    except Exception as error:
        text = f'{type(error).__name__}: {one_line(error)}'
    return Ended(value, text, round(time.monotonic() - began, 3))


def share(function: Callable[[Any], Any], drive: Callable[[Each], T], cpu: bool = False) -> T:
    """Let all processes of a launch (torchrun, accelerate) make the calls that the first one decides on.

    Args:
        function: what is called, in every process.
        drive: runs in the first process alone, with an ``Each`` that calls ``function`` wherever the launch has a
            process; its value, or its error, is that of ``share`` in all of them.
        cpu: whether the processes use the CPU.
    """
    world, rank, broadcast = _launch(cpu)
    if world == 1:
        return drive(each_in_turn)
    from accelerate.utils import gather_object

    def work(arguments: Sequence[Any]) -> list[Ended]:
        ended: list[Ended] = gather_object([_call(function, one) for one in arguments[rank : rank + 1]])
        return ended

    def each(_: Callable[[Any], Any], arguments: Sequence[Any]) -> Iterator[tuple[int, Ended]]:
        for start in range(0, len(arguments), world):
            part = arguments[start : start + world]
            broadcast(('work', part))
            yield from enumerate(work(part), start)

    turn: tuple[str, Any] = ('work', ())
    if rank == 0:
        try:
            turn = ('end', drive(each))
        except Exception as error:
            turn = ('raise', error)
        broadcast(turn)
    else:
        while (turn := broadcast(None))[0] == 'work':
            work(turn[1])
    if turn[0] == 'raise':
        raise turn[1]
    value: T = turn[1]
    return value


def _launch(cpu: bool) -> tuple[int, int, Callable[[Any], Any]]:
    """Processes of this launch, the number of this one, and a function that gives all the first one's value."""
    world = int(os.environ.get('WORLD_SIZE', '1'))
    if world < 2:
        return 1, 0, lambda value: value
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    def broadcast(value: Any) -> Any:
        PartialState(cpu=cpu)  # every run resets it
        values = [value]
        broadcast_object_list(values)
        return values[0]

    rank = PartialState(cpu=cpu).process_index
    keep_process_group()
    return world, rank, broadcast


# ---- jobs with folders ----


def run_jobs(
    jobs: Sequence[Mapping[str, Any]],
    work: Callable[[Job], Result],
    out: str | Path,
    *,
    settings: Mapping[str, Any] | None = None,
    describe: Callable[[Job, Result], str] | None = None,
    ray: Ray | None = None,
    say: Callable[[str], None] | None = None,
    cpu: bool = False,
) -> Outcome:
    """Do all jobs, each once. Called again, this does only what is missing; what failed before is tried again.

    Under torchrun or accelerate all processes of the launch do each job together.

    Args:
        jobs: dicts that JSON can hold, each with a 'key', a text that no other one has.
        work: does one job, given as a dict, and returns a dict that JSON can hold. What it leaves belongs into
            ``job_folder(out, key)``, from where a later call for the same job goes on. For Ray it must be picklable.
        out: the folder of the folders. One call at a time has it.
        settings: what all jobs have in common; ``out`` with other settings, or with another job of the same key, is
            refused.
        describe: a line about a finished job, from the job and its result.
        ray: the machines to use. Default: one job after another in this process.
        say: prints a line. Default: print.
        cpu: whether the processes of a launch use the CPU.

    Returns:
        Results and errors by key, in the order of the jobs. A job that fails does not stop the others.

    Raises:
        ImportError: Ray is missing.
        ValueError: no jobs, unfit jobs, other settings, a cluster that is none, a folder that another call has.
        OSError: ``out`` cannot be written.
    """
    say = say or print_line
    out = Path(out)
    listed = _check_list(jobs)
    _, rank, broadcast = _launch(cpu)
    with contextlib.ExitStack() as stack:
        results: dict[str, Result] = {}
        problem: Exception | None = None
        if rank == 0:
            try:
                if ray is not None:
                    say(ray.describe())
                check_writable(out)
                if (other := lock_folder(out, stack)) is not None:
                    raise ValueError(
                        f'{out} is being written by another run, {other}: start this one again when that has ended'
                    )
                _remember(out, dict(settings or {}), listed)
                results = _results(out, listed)
            except Exception as error:
                problem = error
        results, problem = broadcast((results, problem))
        if problem is not None:
            raise problem
        missing = [job for key, job in listed.items() if key not in results]
        tell = say if rank == 0 else (lambda text: None)
        if results:
            tell(f'{len(results)} of {len(listed)} jobs are done already')
        errors: dict[str, str] = {}
        each = each_in_turn if ray is None else ray.each
        for number, (result, wrong, seconds) in each(_Work(work, out.absolute(), rank == 0, ray is not None), missing):
            job = missing[number]
            if wrong:
                errors[job['key']] = wrong
                text = f'failed: {wrong}'
            else:
                results[job['key']] = result
                text = f'{describe(job, result) if describe else "done"} ({seconds:.0f} s)'
            tell(f'{len(results) + len(errors)}/{len(listed)} {job["key"]}: {text}')
        outcome = Outcome(
            {key: results[key] for key in listed if key in results},
            {key: errors[key] for key in listed if key in errors},
        )
        return Outcome(*broadcast(tuple(outcome)))


def job_folder(out: str | Path, key: str) -> Path:
    """The folder of the job with this key."""
    return Path(out) / re.sub(r'[^\w.-]+', '_', key)


@dataclass(frozen=True)
class _Work:
    """One job with its result on disk."""

    work: Callable[[Job], Result]
    out: Path
    writes: bool
    logs: bool  # what a job on another machine prints goes into its folder

    def __call__(self, job: Job) -> Result:
        folder = job_folder(self.out, job['key'])
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            if self.logs:
                log = stack.enter_context((folder / 'log.txt').open('a', encoding='utf-8'))
                stack.enter_context(contextlib.redirect_stdout(log))
                stack.enter_context(contextlib.redirect_stderr(log))
            result = self.work(json.loads(json.dumps(job)))
        text = json.dumps({'job': job, 'result': result}, indent=2)
        if self.writes:
            write_text(folder / RESULT, text + '\n')
        stored: Result = json.loads(text)['result']
        return stored


def check_jobs(out: str | Path, settings: Mapping[str, Any], ray: Ray | None = None) -> None:
    """Raise now what ``run_jobs`` would raise about ``out`` with other settings, and about Ray."""
    if ray is not None:
        ray.connect()
    check_settings(_held_in(Path(out))['settings'], settings, f'{out}')


def check_settings(before: Mapping[str, Any], now: Mapping[str, Any], where: str) -> None:
    """Raise a ValueError that names the differences unless the settings ``where`` something was made are these."""
    now = json.loads(json.dumps(dict(now)))  # as a file holds them
    differing = [
        f'{name} was {quoted(before.get(name))} and is {quoted(now.get(name))}'
        for name in sorted({*before, *now})
        if before and before.get(name) != now.get(name)
    ]
    if differing:
        raise ValueError(f'{where} was made with other settings: {"; ".join(differing)}; set them back or change --out')


def _held_in(out: Path) -> dict[str, Any]:
    """The settings and jobs that ``out`` was made with; empty ones where there are none yet."""
    path = out / JOBS
    if not path.exists():
        return {'settings': {}, 'jobs': {}}
    held = _read(path)
    if not all(isinstance(held.get(name), dict) for name in ('settings', 'jobs')):
        raise ValueError(f'{path} is not what a command with several runs writes; delete it, or give another --out')
    return held


def _read(path: Path) -> dict[str, Any]:
    try:
        held = parse_json(read_text(path, 'result'), 'the results of a run')
    except ValueError as error:
        raise ValueError(f'{path} is damaged: {error}; delete it, and what it stands for is done again') from None
    return held if isinstance(held, dict) else {}


def _remember(out: Path, settings: dict[str, Any], jobs: dict[str, Job]) -> None:
    """Write what ``out`` is made with, or compare it."""
    held = _held_in(out)
    check_settings(held['settings'], settings, f'{out}')
    for key, job in jobs.items():
        if key in held['jobs'] and held['jobs'][key] != job:
            raise ValueError(
                f'{out} was made for another job: {key} was {held["jobs"][key]} and is {job}; set it back or change '
                f'--out'
            )
    now = {'settings': settings, 'jobs': {**held['jobs'], **jobs}}
    if now != held:
        write_text(out / JOBS, json.dumps(now, indent=2) + '\n')


def _results(out: Path, jobs: Mapping[str, Job]) -> dict[str, Result]:
    """The results that are there already."""
    found: dict[str, Result] = {}
    for key in jobs:
        path = job_folder(out, key) / RESULT
        if path.exists():
            result = _read(path).get('result')
            if not isinstance(result, dict):
                raise ValueError(f'{path} is damaged: it holds no result; delete it, and the job is done again')
            found[key] = result
    return found


def _check_list(jobs: Sequence[Mapping[str, Any]]) -> dict[str, Job]:
    if not jobs:
        raise ValueError('there are no jobs to run')
    listed: dict[str, Job] = {}
    folders: dict[Path, str] = {}
    for job in jobs:
        key = job.get('key')
        if not isinstance(key, str) or not key.strip('.'):
            raise ValueError(f"a job needs a 'key', a text of its own, got {quoted(dict(job))}")
        other = folders.setdefault(job_folder('', key), key)
        if key in listed or other != key:
            raise ValueError(f'two jobs have the keys {other!r} and {key!r}, which stand for one folder')
        try:
            listed[key] = json.loads(json.dumps(dict(job)))  # as a file holds it
        except TypeError as error:
            raise ValueError(f'job {key}: {error}; a job is stored as JSON') from None
    return listed
