"""Many independent runs, called jobs: one after another in this process, or on the machines of a Ray cluster.

Each job has a folder, with a ``result.json`` in it once the job has ended. The folders are the memory: the same call
again runs only the missing jobs, and a killed job continues from its files. No job writes outside its folder.
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
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from sase_blocks.reading import one_line, parse_json, quoted, read_text
from sase_blocks.runs import check_writable, import_extra, is_main, keep_process_group, lock_folder, write_json
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
JOBS = 'jobs.json'  # beside the folders: the jobs and their common settings
ANSWERS = 10.0  # seconds to wait for the head of a cluster


class Ended(NamedTuple):
    """How a call ended: its value or the text of its error, and its seconds."""

    value: Any
    error: str
    seconds: float


# Calls a function with each argument. Yields the number of an argument and how its call ended, in any order.
Each = Callable[[Callable[[Any], Any], Sequence[Any]], Iterator[tuple[int, Ended]]]


class Outcome(NamedTuple):
    """Maps the key of a job to its result, or to the text of its error."""

    results: dict[str, Result]
    errors: dict[str, str]

    def check(self, what: str = 'jobs') -> dict[str, Result]:
        """The results. Raises RuntimeError with the first failed job and its error, if there is one."""
        if self.errors:
            key, text = next(iter(self.errors.items()))
            total = len(self.results) + len(self.errors)
            count = f'all {total}' if not self.results else f'{len(self.errors)} of {total}'
            raise RuntimeError(f'{count} {what} failed; the first one, {key}: {text}')
        return self.results


# ---- where calls run ----


def each_in_turn(function: Callable[[Any], Any], arguments: Sequence[Any]) -> Iterator[tuple[int, Ended]]:
    """Call a function with each argument in this process. Ctrl-C and ``sys.exit`` pass through."""
    for number, argument in enumerate(arguments):
        yield number, _call(function, argument)


def _call(function: Callable[[Any], Any], argument: Any) -> Ended:
    began = time.monotonic()
    value, text = None, ''
    try:
        value = function(argument)
    except Exception as error:
        text = f'{type(error).__name__}: {one_line(error)}'
    return Ended(value, text, round(time.monotonic() - began, 3))


def share(
    function: Callable[[Any], Any],
    drive: Callable[[Each], T],
    *,
    cpu: bool = False,
    ray: Ray | None = None,
    together: bool = False,
) -> T:
    """Make calls on Ray, or in all processes of this launch (torchrun, accelerate), as ``drive`` decides.

    Args:
        drive: runs in the first process only, with an ``Each`` for ``function``. All processes return its value or
            raise its error.
        cpu: whether the processes use the CPU.
        ray: the machines to use in place of a launch.
        together: make each call in all processes and take the first one's result. Default: in one of them.
    """
    if ray is not None or (world := int(os.environ.get('WORLD_SIZE', '1'))) < 2:
        return drive(each_in_turn if ray is None else ray.each)
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list, gather_object

    rank = PartialState(cpu=cpu).process_index
    keep_process_group()
    size = 1 if together else world

    def broadcast(value: Any) -> Any:
        PartialState(cpu=cpu)  # every run resets it
        values = [value]
        broadcast_object_list(values)
        return values[0]

    def work(arguments: Sequence[Any]) -> list[Ended]:
        if together:
            return [_call(function, one) for one in arguments]
        ended: list[Ended] = gather_object([_call(function, one) for one in arguments[rank : rank + 1]])
        return ended

    def each(_: Callable[[Any], Any], arguments: Sequence[Any]) -> Iterator[tuple[int, Ended]]:
        for start in range(0, len(arguments), size):
            part = arguments[start : start + size]
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


@dataclass(frozen=True)
class Ray:
    """Machines of a Ray cluster (extra ``ray``) that run calls as Ray tasks.

    A program that has called ``ray.init`` uses that cluster. Otherwise the first call joins one until the process
    ends, with Ray's usage reports off. All machines need this package, the same folder for results, and the data under
    the same path.

    Args:
        address: 'auto' for this machine's cluster, 'HOST:PORT' of a head, or 'local' for this machine only.
        gpus: per call; with a fraction such as 0.5 several calls share a GPU. Default: 1 if the cluster has GPUs.
        retries: further tries of a call whose worker or machine has died.

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
            raise ValueError(f'ray gpus: expected a whole number or a fraction of one GPU, got {self.gpus}')
        if self.retries < 0:
            raise ValueError(f'ray retries: expected at least 0, got {self.retries}')

    def connect(self) -> list[dict[str, float]]:
        """Join the cluster. -> the resources of each machine: 'CPU', 'GPU', ...

        Raises:
            ImportError: Ray is missing. ValueError: there is no such cluster, or no machine has so many GPUs.
        """
        os.environ.setdefault('RAY_USAGE_STATS_ENABLED', '0')
        ray = import_extra('ray', '--ray needs Ray', 'ray')
        if int(os.environ.get('WORLD_SIZE', '1')) > 1:
            raise ValueError('--ray starts its own processes: leave torchrun or accelerate launch out')
        if not ray.is_initialized():
            more: dict[str, Any] = {'include_dashboard': False} if self.address == 'local' else {}
            try:
                host, colon, port = self.address.rpartition(':')
                if colon and '://' not in self.address:  # Ray would wait minutes for a head that does not answer
                    socket.create_connection((host, int(port)), timeout=ANSWERS).close()
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

    def describe(self) -> str:
        """Join the cluster. -> a short text about it."""
        machines = self.connect()
        cpus, gpus = (int(sum(machine.get(name, 0) for machine in machines)) for name in ('CPU', 'GPU'))
        return f'Ray: {len(machines)} machine{"s"[: len(machines) > 1]} with {gpus} GPUs and {cpus} CPUs'

    def each(self, function: Callable[[Any], Any], arguments: Sequence[Any]) -> Iterator[tuple[int, Ended]]:
        """Call a function with each argument, on any free worker.

        A worker gets the function once, so the function keeps its state between calls. Relative paths start at the
        folder of this process.
        """
        machines = self.connect()
        import ray

        gpus = float(any(machine.get('GPU', 0) for machine in machines)) if self.gpus is None else self.gpus
        task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=self.retries)(_call_on_worker)
        held = [ray.put(function)]  # in a list, or Ray would unpack it before each call
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
            for left in running:  # after Ctrl-C or an error of the caller
                ray.cancel(left, force=True)


_held: dict[Any, Callable[[Any], Any]] = {}  # in a Ray worker: its last function


def _call_on_worker(held: list[Any], folder: str, argument: Any) -> Ended:
    (reference,) = held
    if reference not in _held:
        import ray

        with contextlib.suppress(OSError):  # another machine may not have it
            os.chdir(folder)
        _held.clear()
        _held[reference] = ray.get(reference)
    return _call(_held[reference], argument)


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
    stop: Callable[[], bool] | None = None,
) -> Outcome:
    """Run all jobs, each once. The same call again runs only missing and failed jobs.

    Under torchrun or accelerate all processes of the launch run each job together.

    Args:
        jobs: dicts of JSON values, each with its own 'key', a text.
        work: runs one job and returns a dict of JSON values. It writes to ``job_folder(out, key)``, from where a later
            call for the same job continues. For Ray it must be picklable.
        out: the folder of the folders. Only one call at a time can write to it.
        settings: the settings that all jobs share. An ``out`` with other settings, or another job of the same key,
            raises ValueError.
        describe: returns a line about a finished job, from the job and its result.
        ray: the machines to use. Default: one job after another in this process.
        say: prints a line. Default: print.
        cpu: whether the processes of a launch use the CPU.
        stop: called after each job. Once it returns True, no further job starts, and Ray ends those that run. The
            outcome then lacks jobs.

    Returns:
        Results and errors by key, in the order of the jobs. A failed job does not stop the others.

    Raises:
        ImportError: Ray is missing.
        ValueError: no jobs, wrong jobs, other settings, no such cluster, or another call that writes to ``out``.
        OSError: ``out`` cannot be written.
    """
    listed, place, tell = _check_list(jobs), Path(out), say or print_line
    run = partial(_run_job, work, place.absolute(), ray is not None)

    def drive(each: Each) -> Outcome:
        if ray is not None:
            tell(ray.describe())
        check_writable(place)
        with contextlib.ExitStack() as stack:
            if (other := lock_folder(place, stack)) is not None:
                raise ValueError(f'{place} is being written by another run, {other}; start again after it')
            _remember(place, dict(settings or {}), listed)
            done, errors = _results(place, listed), dict[str, str]()
            missing = [job for key, job in listed.items() if key not in done]
            if done:
                tell(f'{len(done)} of {len(listed)} jobs are done already')
            for number, (result, error, seconds) in each(run, missing):
                job = missing[number]
                if error:
                    errors[job['key']] = error
                    text = f'failed: {error}'
                else:
                    done[job['key']] = result
                    text = f'{describe(job, result) if describe else "done"} ({seconds:.0f} s)'
                tell(f'{len(done) + len(errors)}/{len(listed)} {job["key"]}: {text}')
                if stop is not None and stop():
                    break
        return Outcome(
            {key: done[key] for key in listed if key in done},
            {key: errors[key] for key in listed if key in errors},
        )

    return share(run, drive, cpu=cpu, ray=ray, together=True)


def job_folder(out: str | Path, key: str) -> Path:
    """The folder of the job with this key."""
    return Path(out) / re.sub(r'[^\w.-]+', '_', key)


def _run_job(work: Callable[[Job], Result], out: Path, logs: bool, job: Job) -> Result:
    """Run a job and write its result; with ``logs``, on another machine, its output goes to log.txt in its folder."""
    folder = job_folder(out, job['key'])
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        if logs:
            log = stack.enter_context((folder / 'log.txt').open('a', encoding='utf-8'))
            stack.enter_context(contextlib.redirect_stdout(log))
            stack.enter_context(contextlib.redirect_stderr(log))
        result = work(_as_json(job))
    if is_main():
        write_json(folder / RESULT, {'job': job, 'result': result})
    return _as_json(result)


def check_jobs(out: str | Path, settings: Mapping[str, Any], ray: Ray | None = None) -> None:
    """Raise now the errors of ``run_jobs`` about Ray and about an ``out`` with other settings."""
    if ray is not None:
        ray.connect()
    check_settings(_remembered(Path(out))['settings'], settings, f'{out}')


def check_settings(before: Mapping[str, Any], now: Mapping[str, Any], where: str) -> None:
    """Raise a ValueError that names the differences if ``where`` was made with other settings; {} matches all."""
    now = _as_json(now)
    differing = [
        f'{name} was {quoted(before.get(name))} and is {quoted(now.get(name))}'
        for name in sorted({*before, *now})
        if before and before.get(name) != now.get(name)
    ]
    if differing:
        raise ValueError(f'{where} was made with other settings: {"; ".join(differing)}; set them back or change --out')


def _as_json(value: Mapping[str, Any]) -> dict[str, Any]:
    """The value after a round trip through JSON."""
    return dict(json.loads(json.dumps(dict(value))))


def _read(path: Path, *keys: str) -> dict[str, Any]:
    """A JSON object from a file, with an object under each key."""
    try:
        held = parse_json(read_text(path, 'result'), 'the results of a run')
        if not isinstance(held, dict) or not all(isinstance(held.get(key), dict) for key in keys):
            raise ValueError(f'it holds no {" and ".join(keys)}')
    except ValueError as error:
        raise ValueError(f'{path} is damaged: {error}; delete it and start again') from None
    return held


def _remembered(out: Path) -> dict[str, Any]:
    """The settings and jobs of an earlier call; empty without one."""
    path = out / JOBS
    return _read(path, 'settings', 'jobs') if path.exists() else {'settings': {}, 'jobs': {}}


def _remember(out: Path, settings: dict[str, Any], jobs: dict[str, Job]) -> None:
    """Compare settings and jobs with those of earlier calls, and write them."""
    held = _remembered(out)
    check_settings(held['settings'], settings, f'{out}')
    for key, job in jobs.items():
        if held['jobs'].get(key, job) != job:
            raise ValueError(
                f'{out} was made for another job: {key} was {held["jobs"][key]} and is {job}; set it back or change '
                f'--out'
            )
    now = {'settings': settings, 'jobs': {**held['jobs'], **jobs}}
    if now != held:
        write_json(out / JOBS, now)


def _results(out: Path, jobs: Mapping[str, Job]) -> dict[str, Result]:
    """The results of earlier calls."""
    paths = {key: job_folder(out, key) / RESULT for key in jobs}
    return {key: _read(path, 'result')['result'] for key, path in paths.items() if path.exists()}


def _check_list(jobs: Sequence[Mapping[str, Any]]) -> dict[str, Job]:
    """The jobs by key. Raises ValueError for wrong ones."""
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
            listed[key] = _as_json(job)
        except TypeError as error:
            raise ValueError(f'job {key}: {error}; a job is stored as JSON') from None
    return listed
