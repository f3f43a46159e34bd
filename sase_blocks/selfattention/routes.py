"""Shared by functions with several routes: argument checks, and tests for capture and autocast.

A route is one way to compute a formula. None lets the function choose; a name forces a route, for tests and
measurements.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sase_blocks.checks import check_features
from sase_blocks.numerics import narrow, widen


def check_choice(what: str, value: Any, known: Sequence[str]) -> None:
    """Raise unless ``value`` is one of the names in ``known``."""
    if value not in known:
        raise ValueError(f'{what} must be one of {", ".join(known)}, got {value!r}')


def check_heads(channels: int, heads: Any, parts: int, why: str, owner: str) -> int:
    """The number of heads as an int, or a ValueError that names ``owner``.

    ``parts``: number of equal parts that the channels of one head are split into, with the reason ``why``.
    """
    if isinstance(heads, bool) or not isinstance(heads, int) or heads < 1:
        raise ValueError(f'{owner} needs heads to be an int of at least 1, got {heads!r}')
    if channels % (parts * heads):
        raise ValueError(
            f'{owner} needs channels to be a multiple of {parts} x heads = {parts * heads} ({why}), '
            f'got channels={channels} with heads={heads}'
        )
    return heads


def check_stride(stride: Any, owner: str) -> int:
    """1 or 2, or a ValueError that names ``owner``."""
    if isinstance(stride, bool) or stride not in (1, 2):
        raise ValueError(f'{owner} has stride 1 or 2 (a 2 x 2 average pool), got {stride!r}')
    return int(stride)


@torch.fx.wrap
def check_map(x: Tensor, channels: int) -> None:
    """``check_features``, and check that the map has at least one position."""
    check_features(x, channels)
    if x.shape[2] < 1 or x.shape[3] < 1:
        raise ValueError(f'attention over an empty map: H and W must be at least 1, got {x.shape[2]} x {x.shape[3]}')


def captured() -> bool:
    """Whether a compiler, an exporter or a tracer is active; custom autograd functions are then not allowed."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def exported() -> bool:
    """Whether the captured graph must also work for other map sizes."""
    return bool(torch.compiler.is_exporting()) or torch.jit.is_tracing()


def autocast_active(device: torch.device) -> bool:
    """Whether autocast would run products on ``device`` in half precision. (The meta device has no autocast.)"""
    return device.type != 'meta' and torch.is_autocast_enabled(device.type)


def chunks(first: int, second: int, numbers: int, x: Tensor) -> Iterator[tuple[slice, slice]]:
    """Pairs of slices of two leading axes, so that the work for one pair stays small.

    ``numbers``: how many numbers one element of the two axes needs. On a CPU a chunk fits into the cache; on a GPU it
    is large enough to make launch overhead negligible.
    """
    limit = max(1, (2**21 if x.device.type == 'cpu' else 2**26) // max(1, numbers))
    inner = min(second, limit)
    outer = max(1, limit // second) if inner == second else 1
    for i in range(0, first, outer):
        for j in range(0, second, inner):
            yield slice(i, i + outer), slice(j, j + inner)


@torch.fx.wrap
def halve(x: Tensor) -> Tensor:
    """2 x 2 average pool, (B, C, H, W) -> (B, C, ceil(H / 2), ceil(W / 2)): a last odd row or column counts twice.

    Equal to a pool that ignores positions outside; the strided convolutions of a ResNet round up in the same way.
    """
    if not torch.jit.is_scripting():  # noqa: SIM102 - TorchScript skips code only under such a line
        if captured():  # a pool that rounds up, and in torch 2.8 any pool, would fix the exported sizes to odd or even
            wide = widen(x)
            wide = wide[:, :, ::2] + torch.cat([wide[:, :, 1:], wide[:, :, -1:]], 2)[:, :, ::2]
            wide = wide[:, :, :, ::2] + torch.cat([wide[:, :, :, 1:], wide[:, :, :, -1:]], 3)[:, :, :, ::2]
            return narrow(wide / 4, x)
    return F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False)
