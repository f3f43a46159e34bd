"""The parts of every long run: an earlier run to resume, the data, a folder, progress, a resumable log, one launcher.

``train.py`` and ``search/`` use them. All randomness in a run depends only on the seed and the step, so a checkpoint
needs no random states.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import json
import math
import os
import platform
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import einops
import timm
import torch
from filelock import FileLock, Timeout
from torch import Tensor, distributed
from tqdm import tqdm

from .checkpoint import read_checkpoint
from .data import Samples, inspect_images, open_data, open_split
from .reading import format_toml, one_line, parse_file, parse_toml, printable, quoted
from .settings import fixed_settings

LOSS_CHECK_STEPS = 20  # steps between reads of the loss, which wait for the GPU
PROGRESS_LINE_SECONDS = 30.0  # seconds between progress lines where there is no terminal
CONFIG = 'config.toml'  # in the folder of a run
LOCK_POLL_SECONDS = 1.0  # seconds between tries for a folder that another run has


# ---- settings of an earlier run ----


def saved_run(
    config: Any, last: Path, needed: Sequence[str], command: str, hints: Mapping[str, str] | None = None
) -> dict[str, Any] | None:
    """The checkpoint ``last`` to resume from, None for a new run.

    ``hints`` by setting replace the advice about a run with other settings.

    Raises:
        ValueError: there is one without ``config.resume``, it is damaged or lacks a key of ``needed``, or its settings
            differ.
    """
    if not last.exists():
        return None
    if not config.resume:
        raise ValueError(f'{last.parent} holds a run already: --resume continues it, another --out starts a new one')
    saved = read_checkpoint(last, advice=_start_over(last))
    missing = [name for name in needed if name not in saved]
    if needed[0] in missing or not isinstance(saved[needed[0]], dict):
        raise ValueError(f'{last} is not a checkpoint of `{command}`, it cannot be resumed; give another --out')
    if missing:
        raise ValueError(f'{last} cannot be resumed, it lacks {", ".join(missing)}; {_start_over(last)}')
    fixed = fixed_settings(config)
    known = [name for name in fixed if name in saved['config']]  # an older version may have had fewer
    if 2 * len(known) < len(fixed):
        raise ValueError(f'{last} cannot be resumed, it lacks most of its settings; {_start_over(last)}')
    with resuming(last):
        values = [(name, saved['config'][name], fixed[name]) for name in known]
        differing = [
            f'{name} was {quoted(before)} and is {quoted(now)}' for name, before, now in values if before != now
        ]
    if differing:
        other = [name for name, before, now in values if before != now]
        advice = (hints or {}).get(other[0], '') if len(other) == 1 else ''
        advice = advice or 'set them back or change --out'
        raise ValueError(f'{last} was made with other settings: {"; ".join(differing)}; {advice}')
    return saved


def settings_of_run(kind: type[Any], out: str | os.PathLike[str]) -> dict[str, Any]:
    """The settings of the run in a folder, without ``out`` and ``resume``; empty if there is no run.

    They are in the run's checkpoint or, before its first one, in its ``config.toml``.

    Raises:
        ValueError: a damaged checkpoint or file.
    """
    last, written = Path(out) / 'last.pt', Path(out) / CONFIG
    if last.exists():
        found = read_checkpoint(last, advice=_start_over(last)).get('config')
    else:
        found = parse_file(written, 'settings', parse_toml) if written.exists() else {}
    names = {entry.name for entry in fields(kind)} - {'out', 'resume'}
    return {name: value for name, value in found.items() if name in names} if isinstance(found, dict) else {}


def write_settings(config: Any, command: str) -> None:
    """Write ``config.toml`` to the folder of a run: the settings that repeat it in another folder."""
    lines = [f'# {command} --config {CONFIG} --out ANOTHER_FOLDER repeats this run']
    for entry in fields(config):
        value = getattr(config, entry.name)
        if entry.name in ('out', 'resume') or value is None:
            continue
        try:
            lines.append(f'{entry.name} = {format_toml(value)}')
        except ValueError as error:
            lines.append(f'# {entry.name} must be given as an option: {printable(str(error))}')
    write_text(Path(config.out) / CONFIG, '\n'.join([*lines, '']))


def _start_over(last: Path) -> str:
    """What to do about a checkpoint that cannot be resumed."""
    best = last.with_name('best.pt')
    return 'delete it to start over' + (f'; {best} has the best weights, copy it first' if best.exists() else '')


@contextlib.contextmanager
def resuming(last: Path) -> Iterator[None]:
    """Within this context, a value that does not fit raises a one-line ValueError that names ``last``."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ValueError(
            f'{last} cannot be resumed, what it holds does not fit ({type(error).__name__}: {one_line(error, 300)}); '
            f'{_start_over(last)}'
        ) from error


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """``optimizer.load_state_dict`` with checks of types and shapes.

    Raises:
        ValueError: a type or a shape differs from ``optimizer``.
    """
    fresh = [dict(group) for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for before, group in zip(fresh, optimizer.param_groups, strict=True):
        for name in before.keys() - {'params'}:
            if name not in group or not _same_kind(before[name], group[name]):
                found = quoted(group[name]) if name in group else 'missing'
                raise ValueError(f'{name} of the optimizer is {found}, expected one like {quoted(before[name])}')
        expected = _state_after_a_step(optimizer, group)
        for parameter in group['params']:
            values = optimizer.state.get(parameter)
            if not values:  # it had no gradient yet
                continue
            for name, example in expected.items():
                value = values.get(name)
                shape = parameter.shape if example.dim() else example.shape
                if not isinstance(value, Tensor) or value.shape != shape:
                    found = f'a tensor of {tuple(value.shape)}' if isinstance(value, Tensor) else quoted(value)
                    raise ValueError(f'{name} of the optimizer is {found}, expected a tensor of {tuple(shape)}')


def _same_kind(a: Any, b: Any) -> bool:
    """Whether both are numbers, tuples of one length, or of one type. None matches a bool: on, off or default."""
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(map(_same_kind, a, b))
    kinds: list[Any] = [(bool, type(None)), (int, float), type(a)]
    return isinstance(b, next(kind for kind in kinds if isinstance(a, kind)))


def _state_after_a_step(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors that the optimizer keeps for a parameter of ``group``, found with a small parameter on the CPU."""
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.zeros(2)
    make: Any = type(optimizer)  # its defaults do not matter, because a group has all settings
    twin = make([{**group, 'params': [parameter]}])
    twin.step()
    return {name: value for name, value in twin.state[parameter].items() if isinstance(value, Tensor)}


def whole_number(value: Any, name: str, most: int) -> int:
    """A count in a checkpoint. Raises ValueError unless it is an int from 0 to ``most``."""
    if not isinstance(value, int) or not 0 <= value <= most:
        raise ValueError(f'{name} is {quoted(value)}, expected an int from 0 to {most}')
    return value


def import_extra(module: str, need: str, extra: str) -> Any:
    """An optional module. Raises an ImportError that says what needs it and names the extra."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f'{need} ({error}): pip install "sase-blocks[{extra}]"') from error


@contextlib.contextmanager
def open_accelerator(config: Any, purpose: str, extra: str = 'train') -> Iterator[Any]:
    """accelerate's ``Accelerator`` for one run, with the settings cpu, mixed_precision and tensorboard of ``config``.

    Raises:
        ImportError: accelerate or tensorboard is missing; the text names ``extra``.
        ValueError: the processes of this launch cannot share a batch equally.
    """
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState

        if config.tensorboard:
            import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f'{purpose} needs accelerate and tensorboard ({error}): pip install "sase-blocks[{extra}]"'
        ) from error
    this = object()
    _launches.add(this)
    try:
        accelerator = Accelerator(cpu=config.cpu, mixed_precision=config.mixed_precision)
        if config.batch_size % (world := accelerator.num_processes):
            raise ValueError(f'batch_size {config.batch_size} cannot be split over {world} processes')
        yield accelerator
    finally:
        _launches.discard(this)
        keep_process_group()
        if not _launches:  # else another thread's run still uses this state
            AcceleratorState._reset_state(reset_partial_state=True)  # or the next run would get this one's settings


_launches: set[object] = set()  # active runs of this process


def keep_process_group() -> None:
    """Keep the process group of a launch, if there is one, to the end of the process, for the next run.

    A second group would find the addresses of the first one in the launcher's store, and fail if one process is faster
    than another.
    """
    if distributed.is_available() and distributed.is_initialized():
        _destroy_at_exit()


@functools.cache
def _destroy_at_exit() -> None:
    atexit.register(lambda: distributed.destroy_process_group() if distributed.is_initialized() else None)


def is_main() -> bool:
    """Whether this is the first process of its launch, for messages and files outside of a run."""
    return os.environ.get('RANK', '0') == '0'


@contextlib.contextmanager
def be_deterministic(enabled: bool = True) -> Iterator[None]:
    """Use deterministic algorithms within this context, and restore the settings after it.

    These are torch's and cuDNN's settings of the process, and CUBLAS_WORKSPACE_CONFIG unless it is set already.
    """
    if not enabled:
        yield
        return
    name = 'CUBLAS_WORKSPACE_CONFIG'
    variable, benchmark = os.environ.get(name), torch.backends.cudnn.benchmark
    mode, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    try:
        os.environ.setdefault(name, ':4096:8')
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
        yield
    finally:
        torch.use_deterministic_algorithms(mode, warn_only=warn_only)
        torch.backends.cudnn.benchmark = benchmark
        if variable is None:
            os.environ.pop(name, None)


# ---- the data ----


def open_samples(config: Any, accelerator: Any, *, both: bool) -> list[Samples]:
    """The training split of a configuration and, with ``both``, its validation split; only the first process downloads.

    Raises the errors of ``data.open_data``.
    """
    options = {'download': config.download, 'num_classes': config.num_classes}
    with accelerator.main_process_first():
        if not both:
            return [open_split(config.data, config.dataset, config.train_split, **options)]
        splits = {'train_split': config.train_split, 'val_split': config.val_split}
        return list(open_data(config.data, config.dataset, **splits, **options))


def report_broken(broken: Sequence[str], skip: bool) -> None:
    """Raise a ValueError that names the first of these broken images. With ``skip``, print a warning instead."""
    if not broken:
        return
    if not skip:
        more = f' (and {len(broken) - 1} more)' if len(broken) > 1 else ''
        raise ValueError(f'broken image {broken[0]}{more}; replace or remove it, or leave it out with --skip-broken')
    shown = '\n'.join(f'  {text}' for text in broken[:10]) + ('\n  ...' if len(broken) > 10 else '')
    say(f'warning: {len(broken)} broken image{"s"[: len(broken) > 1]} left out:\n{shown}')


def drop_broken(skip: bool, accelerator: Any, *splits: Samples) -> list[Samples]:
    """Decode all images in the main process. All processes then raise the same error, or leave out the same images.

    Returns:
        The splits, with their fingerprints.
    """
    from accelerate.utils import broadcast_object_list

    found = [inspect_images(samples) if accelerator.is_main_process else ({}, '') for samples in splits]
    broadcast_object_list(found)
    broken = [text for positions, _ in found for text in positions.values()]
    if not skip or accelerator.is_main_process:
        report_broken(broken, skip)
    kept = [
        replace(
            samples.part([i for i in range(len(samples)) if i not in positions]) if positions else samples,
            fingerprint=fingerprint,
        )
        for samples, (positions, fingerprint) in zip(splits, found, strict=True)
    ]
    for samples in kept:
        if len(samples) == 0:
            raise ValueError(f'every image of the {samples.split} split is broken, the first one: {broken[0]}')
    return kept


# ---- the folder ----


def check_writable(out: Path, *, make: bool = True) -> None:
    """Raise OSError unless files can be written to the folder ``out``, which it makes unless ``make`` is off."""
    place = out
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        if make:
            place = out
            out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise OSError(f'the output folder {out} cannot be written: {error.strerror or error}') from error


@contextlib.contextmanager
def run_lock(config: Any, accelerator: Any) -> Iterator[None]:
    """Within this context no other run writes to the folder ``config.out``, which it makes.

    With ``config.resume`` it waits for the other run to end. The lock is the system's, on the file ``.lock``, and ends
    with its process. Processes that load images may outlive it and do not inherit the lock (filelock closes it in a
    fork). Other machines see the lock if the network folder supports locks. Without locks it prints a warning.

    Raises:
        ValueError: another run writes there, and ``config.resume`` is off.
        OSError: nothing can be written there.
    """
    from accelerate.utils import broadcast_object_list

    out, waiting = Path(config.out), False
    check_writable(out)
    with contextlib.ExitStack() as stack:
        while True:
            found = [lock_folder(out, stack) if accelerator.is_main_process else None]
            broadcast_object_list(found)
            if found[0] is None:
                break
            text = f'{out} is being written by another run, {found[0]}'
            if not config.resume:
                raise ValueError(
                    f'{text}: --resume waits for it and goes on from there, another --out starts a new one'
                )
            if not waiting and accelerator.is_main_process:
                say(f'{text}; waiting for it')
            waiting = True
            time.sleep(LOCK_POLL_SECONDS)
        yield


def lock_folder(out: Path, stack: contextlib.ExitStack) -> str | None:
    """Lock a folder until the stack closes. -> the owner, if another run has it."""
    file, owner = out / '.lock', out / '.lock-owner'
    try:
        # Shared by the threads of a process, or two runs in one process would both get it. Without the system's locks,
        # a soft lock would outlive its process.
        stack.enter_context(FileLock(file, blocking=False, thread_local=False, fallback_to_soft=False))
    except Timeout:
        with contextlib.suppress(OSError):
            return owner.read_text(encoding='utf-8', errors='replace')
        return 'which has just begun'
    except OSError as error:
        say(f'warning: nothing keeps other runs out of {out}: {error.strerror}')
        return None
    for path in (file, owner):
        stack.callback(_remove, path)  # Windows removes a locked file itself
    with contextlib.suppress(OSError):  # the next save reports a full disk
        owner.write_text(f'process {os.getpid()} on {socket.gethostname()}', encoding='utf-8')
    return None


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a file atomically: it is always either the old one or the complete new one."""
    temporary = path.with_name(f'{path.name}.{os.getpid()}.tmp')  # workers of one search write the same results
    temporary.write_text(text, encoding='utf-8')
    temporary.replace(path)


def write_json(path: Path, value: Any) -> None:
    """``write_text`` of a value as JSON."""
    write_text(path, json.dumps(value, indent=2) + '\n')


def read_rows(metrics: Path, epoch: int) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl up to an epoch. A killed run may have written more after its last checkpoint."""
    rows = []
    for line in metrics.read_text(encoding='utf-8', errors='replace').splitlines() if metrics.exists() else []:
        with contextlib.suppress(ValueError, RecursionError):  # a line cut short, or damaged
            rows.append(json.loads(line))
    rows = [row for row in rows if isinstance(row, dict) and isinstance(row.get('epoch'), int)]
    return [row for row in rows if row['epoch'] <= epoch]


def write_rows(metrics: Path, rows: list[dict[str, Any]]) -> None:
    """Write metrics.jsonl with these rows only."""
    write_text(metrics, ''.join(json.dumps(row) + '\n' for row in rows))


def append_row(metrics: Path, row: Mapping[str, Any]) -> None:
    """Add a line to metrics.jsonl."""
    with metrics.open('a', encoding='utf-8') as file:
        file.write(json.dumps(row) + '\n')


def check_finite(losses: list[float], first_step: int, last: Path, advice: str) -> None:
    """Raise a FloatingPointError with the step and the last good checkpoint unless all losses are finite."""
    for step, loss in enumerate(losses, first_step):
        if not math.isfinite(loss):
            kept = f'the last good checkpoint is {last}' if last.exists() else 'no checkpoint was written yet'
            raise FloatingPointError(f'the loss is {loss} at step {step}; {kept}. {advice}')


def environment() -> dict[str, dict[str, Any]]:
    """The 'versions' and the 'machine' behind a result."""
    versions = {'python': platform.python_version()}
    versions |= {module.__name__: str(module.__version__) for module in (torch, timm, einops)}
    return {
        'versions': versions,
        'machine': {'platform': platform.platform(), 'threads': torch.get_num_threads()},
    }


# ---- progress ----


def say(text: str) -> None:
    """Print and flush a line, with escapes for control characters, which the name of a file may contain."""
    print(printable(text, keep='\n\t'), flush=True)


class RunLog:
    """The log of a run: metrics.jsonl and TensorBoard's in ``config.out``, progress and messages on the screen.

    Progress is a bar on a terminal, and a line now and then elsewhere. Only the main process writes and prints.

    Args:
        steps: steps per epoch.
        step: where the run starts. Removes rows of later steps, which a killed run may leave.
    """

    def __init__(self, config: Any, accelerator: Any, steps: int, step: int) -> None:
        self.main, self.metrics = accelerator.is_main_process, Path(config.out) / 'metrics.jsonl'
        self.rows = read_rows(self.metrics, step // steps)
        self.writer: Any = None
        if self.main:
            write_rows(self.metrics, self.rows)
            if config.tensorboard:
                from torch.utils.tensorboard import SummaryWriter

                self.writer = SummaryWriter(str(Path(config.out) / 'tensorboard'), purge_step=step)
        self.epochs, self.steps, self.total = config.epochs, steps, config.epochs * steps
        self.accelerator, self.first, self.step = accelerator, step, step
        self.unseen: list[Tensor] = []
        self.bar = tqdm(total=self.total, initial=step, unit='step', disable=None if self.main else True)
        self.began = self.last_line = time.perf_counter()

    def add(self, row: dict[str, Any], scalars: Mapping[str, float] | None = None) -> None:
        """Append a row to metrics.jsonl, and its values, or ``scalars``, to the TensorBoard log."""
        self.rows.append(row)
        if self.main:
            append_row(self.metrics, row)
        if self.writer:
            for name, value in (scalars or row).items():
                self.writer.add_scalar(name, value, self.step)
            self.writer.flush()

    def count(self, losses: Tensor) -> Tensor | None:
        """Count a step. Its losses stay on the device until the next read.

        Returns:
            Every ``LOSS_CHECK_STEPS`` and at the end of an epoch the losses of all steps since the last read, as means
            over all processes, (steps, ...). Else None.
        """
        self.unseen.append(losses)
        self.step += 1
        if len(self.unseen) < LOSS_CHECK_STEPS and self.step % self.steps:
            return None
        seen: Tensor = self.accelerator.reduce(torch.stack(self.unseen), 'mean').cpu()
        label = f'epoch {-(-self.step // self.steps)}/{self.epochs}'
        loss = f'loss {float(seen[-1].flatten()[0]):.4f}'  # the first loss of a step
        self.bar.set_description(label, refresh=False)
        self.bar.set_postfix_str(loss, refresh=False)
        self.bar.update(len(seen))
        self.unseen = []
        if self.bar.disable and time.perf_counter() - self.last_line > PROGRESS_LINE_SECONDS:
            self.line(f'{label}: step {self.step}/{self.total}, {loss}, {self.left()} left')
        return seen

    def left(self) -> str:
        """Time left of the run as H:MM:SS."""
        rate = (time.perf_counter() - self.began) / max(self.step - self.first, 1)
        return str(tqdm.format_interval(rate * (self.total - self.step)))

    def line(self, text: str) -> None:
        """Print a line."""
        if self.main:
            self.last_line = time.perf_counter()
            if self.bar.disable:
                say(text)
            else:
                self.bar.write(printable(text, keep='\n\t'))

    def close(self) -> None:
        self.bar.close()
        if self.writer:
            self.writer.close()
