"""Statistics of a feature map that several operations of a mixed edge share. Ours.

Six of the seven squeezes of each of SASE's sets are functions of the mean, the second, third and fourth central moment
and the maximum, over (H, W) or over C. The mean is removed first, so that a mean far from 0 costs no digits. The steps
between a map and its statistics are as large as the map, so ``recomputed`` computes them again in the backward pass
instead of keeping them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

__all__ = ['Moments', 'group_means', 'moments', 'normed_sums', 'recomputed', 'window_means']

PIECE = 2**18  # elements: on a CPU a piece of the batch this large stays in the cache from one step to the next


class Moments(NamedTuple):
    """Mean, second, third and fourth central moment and maximum; the squeezed dimensions are kept as 1."""

    mean: Tensor
    second: Tensor
    third: Tensor
    fourth: Tensor
    top: Tensor


def moments(y: Tensor, dims: tuple[int, ...]) -> Moments:
    """The moments of ``y`` over ``dims``. Equal maxima share the gradient."""
    top = y.amax(dims, keepdim=True)
    # The scale behind the sum: the gradient of a mean is a map, and that of a sum is not.
    scale = top.numel() / y.numel()
    mean = y.sum(dims, keepdim=True) * scale
    z = y - mean
    square = z * z
    second, third, fourth = (p.sum(dims, keepdim=True) * scale for p in (square, square * z, square * square))
    return Moments(mean, second, third, fourth, top)


def normed_sums(z: Tensor, rates: Tensor) -> tuple[Tensor, Tensor]:
    """Sum and sum of squares over C of ``z * rate``, for each of K rates.

    z: (B, C, H, W); rates: (B, K, C) -> two of (B, K, H, W).
    """
    if torch.compiler.is_compiling():  # sums of products fuse with the moments, and matrix products do not
        normed = z.unsqueeze(1) * rates[..., None, None]
        return normed.sum(2), normed.square().sum(2)
    with torch.autocast(z.device.type, enabled=False):
        sums = torch.bmm(rates, z.flatten(2))
        squares = torch.bmm(rates * rates, (z * z).flatten(2))
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


def recomputed(function: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> tuple[Tensor, ...]:
    """``function(*tensors)``, which keeps its inputs alone and computes the rest again in the backward pass.

    The function and its results treat each image of the batch (the first dimension of every tensor) by itself: on a
    CPU a few images at a time go through it, which then stay in the cache.
    """
    if torch.compiler.is_compiling():  # a compiler itself chooses what to keep
        return function(*tensors)
    x = tensors[0]
    pieces = -(-x.numel() // PIECE) if x.device.type == 'cpu' else 1
    if pieces == 1:
        return _checkpointed(function, *tensors)
    images = -(-len(x) // pieces)
    results = [_checkpointed(function, *piece) for piece in zip(*(t.split(images) for t in tensors), strict=True)]
    return tuple(torch.cat(parts) for parts in zip(*results, strict=True))


def _checkpointed(function: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> tuple[Tensor, ...]:
    return checkpoint(function, *tensors, use_reentrant=False, preserve_rng_state=False, determinism_check='none')
