"""Checkpoint files: written atomically, read without running any code in them.

A checkpoint is written under a temporary name next to its target and renamed onto it, so that a killed process or a
full disk keeps the last good file. Reading allows only tensors and plain Python values.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, cast

import torch

from .reading import one_line


def save_checkpoint(state: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """Write ``state`` to ``path`` atomically: the file is always either the old one or the complete new one.

    The temporary file is ``path`` + '.tmp'. If a killed process leaves one, it is harmless, and the next save of the
    same path overwrites it. Only one process at a time may write a path.

    Args:
        state: tensors and plain Python values, because ``read_checkpoint`` accepts nothing else.
        path: the file; its folder must exist.

    Raises:
        OSError: the file could not be written (full disk, no permission). The old file at ``path`` stays.
    """
    target = Path(path)
    temporary = target.with_name(target.name + '.tmp')
    try:
        with temporary.open('wb') as file:
            writer = _Writer(file)
            torch.save(dict(state), cast(IO[bytes], writer))
            if writer.error is not None:
                raise writer.error
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        kept = 'the last good one is still there' if target.is_file() else 'nothing was left behind'
        raise OSError(f'could not write the checkpoint {target} ({_first_line(error)}); {kept}') from error
    _fsync_folder(target.parent)
    return target


class _Writer:
    """A file for torch.save that keeps its first failed write, to raise it afterwards.

    An exception inside torch's zip writer aborts the process, and given a path it hides the system's reason.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        if self.error is None:
            try:
                self.file.write(data)
            except OSError as error:
                self.error = error
        return memoryview(data).nbytes

    def flush(self) -> None:
        pass


def _fsync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` survive a power cut, if the system can (not Windows, not every network)."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def read_checkpoint(
    path: str | os.PathLike[str], map_location: torch.device | str = 'cpu', *, advice: str = ''
) -> dict[str, Any]:
    """Read a file of ``save_checkpoint``, of ``torch.save`` or, if its name ends so, of safetensors.

    This runs nothing in the file. It accepts only tensors, plain Python values, numpy numbers (training scripts often
    store the best accuracy as one) and ``argparse.Namespace`` (their options, for example timm's).

    Args:
        path: the file.
        map_location: device of the tensors.
        advice: what to do about a rejected file, for the message; default: by the reason.

    Returns:
        The dict in the file: a checkpoint or a bare state dict.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is truncated, is not a checkpoint, needs code to load, or holds no dict.
        OSError: the file cannot be read.
    """
    source = Path(path)
    if not source.exists():
        raise FileNotFoundError(f'there is no checkpoint {source}')
    todo = f'; {advice}' if advice else ''
    damaged = advice or 'copy or download it again'
    if not source.is_file():  # reading a pipe would never end
        raise ValueError(
            f'{source} is a {"folder" if source.is_dir() else "device or pipe"}, expected a checkpoint file{todo}'
        )
    if source.suffix == '.safetensors':
        return _read_safetensors(source, map_location, damaged)
    with source.open('rb'):  # reports a missing permission as such, not as a broken file
        pass
    try:
        with torch.serialization.safe_globals([argparse.Namespace, *_numpy_scalars()]), warnings.catch_warnings():
            warnings.simplefilter('ignore')  # about pickle protocols, which do not help with the error below
            state = torch.load(source, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's message recommends weights_only=False, ours must not.
        named = re.search(r'GLOBAL ([\w.]+)', str(error))
        if named:
            found, damaged = (
                f'it holds {named.group(1)}',
                advice or 'if you trust its author, ask for the state dict alone',
            )
        else:
            found = 'it is damaged or holds something else'
        raise ValueError(
            f'refused to load {source}: {found}, and only tensors and plain values are safe to load; nothing in it '
            f'was run; {damaged}'
        ) from error
    except Exception as error:  # a damaged file fails as RuntimeError, EOFError, KeyError, UnicodeDecodeError, ...
        raise ValueError(_damaged(source, error, damaged)) from error
    if not isinstance(state, dict):
        raise ValueError(f'{source} holds a {type(state).__name__}, expected a dict with a state dict{todo}')
    return state


def _first_line(error: BaseException) -> str:
    return one_line(error, 200).split('. ')[0]


def _damaged(path: Path, error: Exception, advice: str) -> str:
    return (
        f'{path} is truncated, damaged or no checkpoint ({path.stat().st_size} bytes; {type(error).__name__}: '
        f'{_first_line(error)}); {advice}'
    )


def _read_safetensors(path: Path, device: torch.device | str, advice: str) -> dict[str, Any]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError(f'reading {path} needs the package safetensors: pip install safetensors') from error
    try:
        tensors: dict[str, Any] = load_file(path, device=str(device))
    except SafetensorError as error:
        raise ValueError(_damaged(path, error, advice)) from error
    return tensors


def _numpy_scalars() -> list[Any]:
    """Only what the unpickler needs to build a numpy number, under the module names of numpy 1 and 2."""
    import numpy as np

    scalar = np.float64(0).__reduce__()[0]  # its import path depends on numpy's version
    numbers = [type(np.dtype(code)) for code in '?bBhHiIlLqQefd']
    return [(scalar, 'numpy.core.multiarray.scalar'), (scalar, 'numpy._core.multiarray.scalar'), np.dtype, *numbers]
