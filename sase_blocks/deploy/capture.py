"""The parts of every exported file: checks before, capture by ``torch.export``, comparison with torch, and writing."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sase_blocks.insertion.checking import check_inserted
from sase_blocks.insertion.insertion import example_of
from sase_blocks.insertion.refusal import check_changeable

__all__ = [
    'TOLERANCE',
    'Checks',
    'axes',
    'capture',
    'compare',
    'describe_checks',
    'explaining',
    'prepare',
    'write',
]

TOLERANCE = 1e-4

# Shape of each input, and the largest difference of the outputs, relative to the largest output or 1.
Checks = tuple[tuple[tuple[int, ...], float], ...]


def prepare(
    model: nn.Module,
    file: str | os.PathLike[str],
    input_size: int | tuple[int, ...] | None,
    dynamic: bool | str,
    check: bool,
) -> tuple[Path, Tensor]:
    """The path to write, and the images to export with. Raises the errors of ``export_onnx`` about the arguments."""
    check_changeable(model, 'export')
    target = Path(file)
    if dynamic not in (True, False, 'batch'):
        raise ValueError(f"dynamic must be True, False or 'batch', got {dynamic!r}")
    if target.is_dir() or not target.parent.is_dir():
        what = 'is a folder' if target.is_dir() else 'is in a folder that does not exist'
        raise FileNotFoundError(f'{target} {what}: pass a file in an existing folder')
    weights = [*model.parameters(), *model.buffers()]
    if check and any(t.dtype in (torch.float16, torch.bfloat16) for t in weights):
        raise ValueError(f'half precision cannot agree to {TOLERANCE:g}: export model.float(), or pass check=False')
    example, _ = example_of(model, input_size, None)
    if example is None:
        raise ValueError(f'the image size of {type(model).__name__} is unknown: pass input_size=(H, W)')
    image = example[0].repeat(2 if dynamic else 1, 1, 1, 1)
    check_inserted(model, image)
    return target, image


def axes(dynamic: bool | str) -> dict[int, str]:
    """The dynamic axes of the input, with their names."""
    return {0: 'batch', 2: 'height', 3: 'width'} if dynamic is True else {0: 'batch'} if dynamic else {}


def capture(model: nn.Module, image: Tensor, dynamic: bool | str) -> tuple[torch.export.ExportedProgram, int]:
    """The program of ``torch.export`` and the number of outputs. Call it inside ``explaining``."""
    try:
        outputs = pytree.tree_leaves(model(image))
    except Exception as error:
        raise ValueError(
            f'the forward of {type(model).__name__} fails for an input of {tuple(image.shape)}: {_cause(error)}; pass '
            f'an input_size that it accepts'
        ) from error
    with explaining(model, image, dynamic):
        shapes = (dict.fromkeys(axes(dynamic), torch.export.Dim.DYNAMIC),) if dynamic else None
        return torch.export.export(model, (image,), dynamic_shapes=shapes, strict=False), len(outputs)


@contextlib.contextmanager
def explaining(model: nn.Module, image: Tensor, dynamic: bool | str) -> Iterator[None]:
    """Within this context, an error of an exporter is a RuntimeError of one line that says what to try."""
    try:
        yield
    except Exception as error:
        smaller = {True: "; try dynamic='batch'", 'batch': '; try dynamic=False'}.get(dynamic, '')
        raise RuntimeError(
            f'{type(model).__name__} cannot be exported for an input of {tuple(image.shape)}: {_cause(error)}{smaller}'
        ) from error


def _cause(error: BaseException) -> str:
    """The first line of the root cause, which the exporter wraps in pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f'{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ""}'


def compare(model: nn.Module, run: Callable[[Tensor], Any], image: Tensor, dynamic: bool | str, who: str) -> Checks:
    """Differences of ``run``, called ``who``, from the model at the exported shape and, if it is dynamic, another one.

    Raises RuntimeError if one is above ``TOLERANCE``, or ``run`` fails.
    """
    shapes = [tuple(image.shape)]
    if dynamic:
        _, channels, height, width = image.shape
        # Add multiples of 32: many networks accept only those.
        shapes.append((1, channels, height + 32, width + 64) if dynamic is True else (1, channels, height, width))
    found: list[tuple[tuple[int, ...], float]] = []
    for shape in shapes:
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(image)
        expected = [y.cpu() for y in pytree.tree_leaves(model(x))]
        if not all(y.isfinite().all() for y in expected):
            raise RuntimeError(
                f'torch itself gives non-finite values for standard normal noise of {shape}, so the outputs '
                f'cannot be compared: load trained weights first, or pass check=False; nothing was written'
            )
        try:
            actual = [y.cpu() for y in pytree.tree_leaves(run(x))]
        except Exception as error:
            # A map of one position in the exported size, for example, limits a program to that size.
            other = "; try a larger input_size, or dynamic='batch'" if dynamic is True and found else ''
            raise RuntimeError(
                f'{who} fails for an input of {shape}: {_cause(error)}; nothing was written{other}'
            ) from error
        worst = 0.0
        for y, z in zip(actual, expected, strict=True):
            scale = max(1.0, z.abs().max().item())
            difference = (y - z).abs().max().item() / scale if y.shape == z.shape else math.inf
            if not difference <= TOLERANCE:
                raise RuntimeError(
                    f'{who} differs from torch by {difference:.1e} for an input of {shape}, but only '
                    f'{TOLERANCE:g} is allowed; nothing was written'
                )
            worst = max(worst, difference)
        found.append((shape, worst))
    return tuple(found)


def describe_checks(checks: Checks, who: str) -> list[str]:
    """The lines of a report about its checks."""
    if not checks:
        return ['  not checked']
    return [f'  {who} differs by {difference:.1e} at {" x ".join(map(str, shape))}' for shape, difference in checks]


def write(path: Path, data: bytes) -> None:
    """Write a file under a temporary name and rename it, so it is never half-written."""
    temporary = path.with_name(f'{path.name}.tmp')
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
