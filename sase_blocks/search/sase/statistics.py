"""Statistics of a feature map that several operations of a mixed edge share. Ours.

Six of the seven squeezes of each of SASE's sets are functions of the mean, the second, third and fourth central moment
and the maximum, over (H, W) or over C. The mean is removed first, so that a mean far from 0 costs no digits. The steps
between a map and its statistics are as large as the map, so ``recomputed`` computes them again in the backward pass
instead of keeping them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

__all__ = [
    'Moments',
    'central_moments',
    'group_means',
    'images_at_once',
    'joined',
    'moments',
    'normed_sums',
    'recomputed',
    'window_means',
]

PIECE = 2**18  # elements: on a CPU a piece of the batch this large stays in the cache from one step to the next


class Moments(NamedTuple):
    """Mean, second, third and fourth central moment and maximum; the squeezed dimensions are kept as 1."""

    mean: Tensor
    second: Tensor
    third: Tensor
    fourth: Tensor
    top: Tensor


def moments(y: Tensor, dims: tuple[int, ...]) -> Moments:
    """The moments of ``y`` over ``dims``."""
    top = maximum(y, dims)
    return Moments(*central_moments(y, dims)[0], top)


def central_moments(y: Tensor, dims: tuple[int, ...]) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """Mean, second, third and fourth moment of ``y`` over ``dims``; y without its mean, and the square of that."""
    # The scale behind the sum: the gradient of a mean is a map, and that of a sum is not.
    total = y.sum(dims, keepdim=True)
    scale = total.numel() / y.numel()
    mean = total * scale
    z = y + mean * -1
    square = z * z
    sums = [p.sum(dims, keepdim=True) * scale for p in (square, square * z, square * square)]
    return (mean, *sums), z, square


def maximum(y: Tensor, dims: tuple[int, ...]) -> Tensor:
    """``amax``, with which equal maxima share the gradient, as the mean of all places that have it.

    On a CPU the backward pass takes a third of the time of that of ``amax``, but it keeps a map.
    """
    constant = y.detach()
    there = torch.eq(constant, constant.amax(dims, keepdim=True), out=torch.empty_like(constant))
    return (y * there).sum(dims, keepdim=True) / there.sum(dims, keepdim=True)


def normed_sums(z: Tensor, square: Tensor, rates: Tensor) -> tuple[Tensor, Tensor]:
    """Sum and sum of squares over C of ``z * rate``, for each of K rates.

    z and its square: (B, C, H, W); rates: (B, K, C) -> two of (B, K, H, W).
    """
    if torch.compiler.is_compiling():  # sums of products fuse with the moments, and matrix products do not
        normed = z.unsqueeze(1) * rates[..., None, None]
        return normed.sum(2), normed.square().sum(2)
    with torch.autocast(z.device.type, enabled=False):
        sums = torch.bmm(rates, z.flatten(2))
        squares = torch.bmm(rates * rates, square.flatten(2))
    return sums.unflatten(2, z.shape[2:]), squares.unflatten(2, z.shape[2:])


def window_means(x: Tensor, grid: int) -> Tensor:
    """Means of the windows of a grid x grid, (B, C, H, W) -> (B, C, grid, grid); H and W are multiples of grid."""
    height, width = x.shape[2:]
    columns = torch.eye(grid, device=x.device, dtype=x.dtype).repeat_interleave(width // grid, 0)
    with torch.autocast(x.device.type, enabled=False):
        return x.unflatten(2, (grid, height // grid)).sum(3) @ (columns * (grid * grid / (height * width)))


def group_means(x: Tensor, groups: int) -> Tensor:
    """(B, C, H, W) -> (B, groups, H, W)."""
    members = x.shape[1] // groups
    return x.unflatten(1, (groups, members)).sum(2) * (1 / members)


def images_at_once(x: Tensor) -> int:
    """How many images of the batch x go through the statistics at a time."""
    if x.device.type != 'cpu' or torch.compiler.is_compiling():
        return max(1, len(x))
    return max(1, PIECE * len(x) // max(1, x.numel()))


def joined(pieces: Iterable[Sequence[Tensor]]) -> list[Tensor]:
    """The results for pieces of the batch as those for all of it."""
    return [torch.cat(results) if len(results) > 1 else results[0] for results in zip(*pieces, strict=True)]


def recomputed(function: Callable[..., Sequence[Tensor]], *tensors: Tensor) -> Sequence[Tensor]:
    """``function(*tensors)``, which keeps its inputs alone and computes the rest again in the backward pass."""
    if torch.compiler.is_compiling():  # a compiler itself chooses what to keep
        return function(*tensors)
    return checkpoint(function, *tensors, use_reentrant=False, preserve_rng_state=False, determinism_check='none')
