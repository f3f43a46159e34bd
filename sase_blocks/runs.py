"""What every long run has: settings that are options too, a folder, a progress line, a resumable log, one launcher.

``train.py`` and ``search/`` stand on it. Everything random in a run is a function of the seed and of the place in the
run, so that its checkpoint needs no random states.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import math
import os
import platform
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import field, fields, replace
from pathlib import Path
from typing import Any

import einops
import timm
import torch
from torch import Tensor, distributed
from tqdm import tqdm

from .checkpoint import read_checkpoint
from .data import Samples, inspect_images

LOOK_EVERY = 20  # steps between looks at the loss; a look waits for the GPU
LINE_EVERY = 30.0  # seconds between progress lines where there is no terminal
ASK_EVERY = 1.0  # seconds between looks at a folder that another run has


# ---- settings ----


def setting(default: Any, help: str, **more: Any) -> Any:
    """A field of a configuration with the text that the command line shows for it.

    More: ``choices``; ``free=True`` for a setting that a resumed run may change; ``place=True`` for where something
    lies, which may change too, while what lies there is compared otherwise.
    """
    return field(default=default, metadata={'help': help, **more})


def demand(config: Any, good: bool, name: str, expected: str) -> None:
    """Raise a ValueError that names the setting and its value unless ``good``."""
    if not good:
        raise ValueError(f'{name} must be {expected}, got {getattr(config, name)!r}')


def demand_choices(config: Any) -> None:
    """``demand`` for every setting with ``choices``."""
    for entry in fields(config):
        choices = entry.metadata.get('choices')
        demand(config, not choices or getattr(config, entry.name) in choices, entry.name, f'one of {choices}')


def saved_run(config: Any, last: Path, needed: tuple[str, ...], command: str) -> dict[str, Any] | None:
    """The checkpoint ``last`` to resume from, None for a fresh start.

    Raises:
        ValueError: there is one and ``config.resume`` is off, it lacks a key of ``needed``, or its settings differ.
    """
    if not last.exists():
        return None
    if not config.resume:
        raise ValueError(f'{last.parent} holds a run already: --resume continues it, another --out starts a new one')
    saved = read_checkpoint(last)
    if not all(name in saved for name in needed):
        raise ValueError(f'{last} is not a checkpoint of `{command}`, it cannot be resumed')
    differing = []
    for entry in fields(config):
        now = getattr(config, entry.name)
        before = saved['config'].get(entry.name, now)
        if before != now and not entry.metadata.get('free') and not entry.metadata.get('place'):
            differing.append(f'{entry.name} was {before!r} and is {now!r}')
    if differing:
        raise ValueError(f'{last} was made with other settings: {"; ".join(differing)}; set them back or change --out')
    return saved


# ---- the launcher ----


@contextlib.contextmanager
def launched(config: Any, purpose: str, extra: str = 'train') -> Iterator[Any]:
    """accelerate's ``Accelerator`` for one run, with the settings cpu, mixed_precision and tensorboard of ``config``.

    Raises:
        ImportError: accelerate or tensorboard is missing; the text names ``extra``.
    """
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
        from accelerate.utils import DataLoaderConfiguration

        if config.tensorboard:
            import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f'{purpose} needs accelerate and tensorboard ({error}): pip install "sase-blocks[{extra}]"'
        ) from error
    accelerator = Accelerator(
        cpu=config.cpu,
        mixed_precision=config.mixed_precision,
        # A batch is cut among the processes, so that their number does not change the run.
        dataloader_config=DataLoaderConfiguration(split_batches=True, non_blocking=True),
    )
    try:
        yield accelerator
    finally:
        keep_process_group()
        AcceleratorState._reset_state(reset_partial_state=True)  # or a second run would get this one's settings


def keep_process_group() -> None:
    """Let the process group of a launch, if there is one, live to the end of the process.

    The next run uses it. A second group would meet the addresses of the first one in the launcher's store, and fail
    wherever one process is faster than another.
    """
    if distributed.is_available() and distributed.is_initialized():
        _destroy_at_exit()


@functools.cache
def _destroy_at_exit() -> None:
    atexit.register(lambda: distributed.destroy_process_group() if distributed.is_initialized() else None)


def is_main() -> bool:
    """Is this the first process of its launch? For what is said or written outside of a run."""
    return os.environ.get('RANK', '0') == '0'


@contextlib.contextmanager
def be_deterministic(enabled: bool = True) -> Iterator[None]:
    """Within this context only algorithms that give the same result every time; then the settings of before again.

    The settings are those of the process: torch's, cuDNN's, and the variable CUBLAS_WORKSPACE_CONFIG, which is set
    unless it is already. With ``enabled=False`` nothing changes.
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


def leave_out_broken(skip: bool, accelerator: Any, *splits: Samples) -> list[Samples]:
    """The main process looks at all images; every process then raises the same error, or leaves out the same ones.

    Returns:
        The splits, with their fingerprints.
    """
    from accelerate.utils import broadcast_object_list

    found = [inspect_images(samples) if accelerator.is_main_process else ({}, '') for samples in splits]
    broadcast_object_list(found)
    broken = [text for positions, _ in found for text in positions.values()]
    if broken and not skip:
        more = f' (and {len(broken) - 1} more)' if len(broken) > 1 else ''
        raise ValueError(f'broken image {broken[0]}{more}; replace or remove it, or leave it out with --skip-broken')
    if broken and accelerator.is_main_process:
        shown = '\n'.join(f'  {text}' for text in broken[:10]) + ('\n  ...' if len(broken) > 10 else '')
        print(f'warning: {len(broken)} broken image{"s"[: len(broken) > 1]} left out:\n{shown}', flush=True)
    kept = [
        replace(samples.without(positions), fingerprint=fingerprint)
        for samples, (positions, fingerprint) in zip(splits, found, strict=True)
    ]
    for samples in kept:
        if len(samples) == 0:
            raise ValueError(f'every image of the {samples.split} split is broken, the first one: {broken[0]}')
    return kept


def named_errors(loader: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches, where an error in a loading process is raised as that error and not as its printed traceback."""
    try:
        yield from loader
    except ValueError as error:
        if str(error).startswith('Caught ValueError'):
            raise ValueError(str(error).strip().splitlines()[-1].removeprefix('ValueError: ')) from None
        raise


# ---- the folder ----


def check_writable(out: Path) -> None:
    """Make the folder ``out``. Raises OSError if nothing can be written there."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise OSError(f'the output folder {out} cannot be written: {error.strerror or error}') from error


@contextlib.contextmanager
def alone_in(config: Any, accelerator: Any) -> Iterator[None]:
    """Within this context no other run writes into the folder ``config.out``, which is made.

    With ``config.resume`` it waits for the run that does, to go on with what that one leaves. The lock is the system's,
    on the file ``.lock``, so it is gone with its process, however that ends; other machines see it where a network
    folder hands locks on. Where there are none a warning says so, and on Windows nothing is guarded.

    Raises:
        ValueError: another run writes there, and ``config.resume`` is off.
        OSError: nothing can be written there.
    """
    from accelerate.utils import broadcast_object_list

    out, waiting = Path(config.out), False
    check_writable(out)
    with contextlib.ExitStack() as stack:
        while True:
            found = [_lock(out / '.lock', stack) if accelerator.is_main_process else None]
            broadcast_object_list(found)
            if found[0] is None:
                break
            text = f'{out} is being written by another run, {found[0]}'
            if not config.resume:
                raise ValueError(
                    f'{text}: --resume waits for it and goes on from there, another --out starts a new one'
                )
            if not waiting and accelerator.is_main_process:
                print(f'{text}; waiting for it', flush=True)
            waiting = True
            time.sleep(ASK_EVERY)
        yield


def _lock(path: Path, stack: contextlib.ExitStack) -> str | None:
    """Lock a file, made for it, until the stack is closed, which removes it. -> who has it, if somebody else has."""
    try:
        # Not flock: processes that load images would inherit it, and keep it when they outlive a killed run.
        from fcntl import LOCK_EX, LOCK_NB, lockf
    except ImportError:
        return None
    try:
        with contextlib.ExitStack() as opened:
            file = opened.enter_context(path.open('ab+', buffering=0))
            try:
                lockf(file, LOCK_EX | LOCK_NB)
                if not os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    raise FileNotFoundError
            except (BlockingIOError, PermissionError):
                file.seek(0)
                return file.read().decode() or 'which has just begun'
            except FileNotFoundError:  # removed by its last owner after it was opened here
                return _lock(path, stack)
            opened.callback(path.unlink, missing_ok=True)
            stack.push(opened.pop_all())
    except OSError as error:
        print(f'warning: nothing keeps other runs out of {path.parent}: {error.strerror}', flush=True)
        return None
    with contextlib.suppress(OSError):  # what a full disk spoils is noticed where something is saved
        file.truncate(0)
        file.write(f'process {os.getpid()} on {socket.gethostname()}'.encode())
    return None


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is at every moment either the old one or the whole new one."""
    temporary = path.with_name(path.name + '.tmp')
    temporary.write_text(text, encoding='utf-8')
    temporary.replace(path)


def rows_until(metrics: Path, epoch: int) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl up to an epoch; what a killed run wrote after its last checkpoint is left out."""
    rows = []
    for line in metrics.read_text(encoding='utf-8').splitlines() if metrics.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):  # a line cut short
            rows.append(json.loads(line))
    return [row for row in rows if row['epoch'] <= epoch]


def write_rows(metrics: Path, rows: list[dict[str, Any]]) -> None:
    """metrics.jsonl with these rows and no others."""
    write_text(metrics, ''.join(json.dumps(row) + '\n' for row in rows))


def append_row(metrics: Path, row: Mapping[str, Any]) -> None:
    """One more line of metrics.jsonl."""
    with metrics.open('a', encoding='utf-8') as file:
        file.write(json.dumps(row) + '\n')


def check_finite(losses: list[float], first_step: int, last: Path, advice: str) -> None:
    """Raise a FloatingPointError with the step and the last good checkpoint unless all losses are finite."""
    for step, loss in enumerate(losses, first_step):
        if not math.isfinite(loss):
            kept = f'the last good checkpoint is {last}' if last.exists() else 'no checkpoint was written yet'
            raise FloatingPointError(f'the loss is {loss} at step {step}; {kept}. {advice}')


def open_log(config: Any, out: Path, step: int) -> Any:
    """A TensorBoard log in ``out`` from a step on, or None where ``config.tensorboard`` is off."""
    if not config.tensorboard:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(out / 'tensorboard'), purge_step=step)


def environment() -> dict[str, dict[str, Any]]:
    """What a result was made with: 'versions' and 'machine'."""
    versions = {'python': platform.python_version()}
    versions |= {module.__name__: str(module.__version__) for module in (torch, timm, einops)}
    return {
        'versions': versions,
        'machine': {'platform': platform.platform(), 'threads': torch.get_num_threads()},
    }


# ---- progress ----


class Progress:
    """A bar over all steps with the time left on a terminal, and plain lines now and then elsewhere."""

    def __init__(self, total: int, done: int, *, enabled: bool) -> None:
        self.bar = tqdm(total=total, initial=done, unit='step', disable=None if enabled else True)
        self.enabled = enabled
        self.total, self.first, self.done = total, done, done
        self.began = self.last_line = time.perf_counter()

    def update(self, done: int, label: str, loss: float) -> None:
        self.bar.set_description(label, refresh=False)
        self.bar.set_postfix_str(f'loss {loss:.4f}', refresh=False)
        self.bar.update(done - self.done)
        self.done = done
        if self.bar.disable and time.perf_counter() - self.last_line > LINE_EVERY:
            self.line(f'{label}: step {done}/{self.total}, loss {loss:.4f}, {self.left()} left')

    def left(self) -> str:
        """Time left of the run as H:MM:SS."""
        rate = (time.perf_counter() - self.began) / max(self.done - self.first, 1)
        return str(tqdm.format_interval(rate * (self.total - self.done)))

    def line(self, text: str) -> None:
        if self.enabled:
            self.last_line = time.perf_counter()
            if self.bar.disable:
                print(text, flush=True)
            else:
                self.bar.write(text)

    def close(self) -> None:
        self.bar.close()
