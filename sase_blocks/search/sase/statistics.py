"""Statistics of a feature map that several operations of a mixed edge share. Not in the paper.

Six of the seven squeezes in each of SASE's sets are functions of the mean, the second to fourth central moments and the
maximum, over (H, W) or over C. The formulas subtract the mean first, so a mean far from 0 costs no digits. Their
intermediate results are as large as the map. The backward pass computes them again instead of keeping them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

PIECE = 2**18  # elements of a map that go through its statistics at a time on a CPU


class Moments(NamedTuple):
    """Mean, second, third and fourth central moment and maximum. The squeezed dimensions stay as 1."""

    mean: Tensor
    second: Tensor
    third: Tensor
    fourth: Tensor
    top: Tensor


def moments(x: Tensor, dims: tuple[int, ...], gate: Tensor | None = None) -> Moments:
    """The moments over ``dims`` of x (B, C, H, W), or of ``gate * x`` for a gate (B, C, 1, 1)."""
    if torch.compiler.is_compiling():  # a compiler fuses the formulas and chooses what to keep
        return Moments(*_moments(dims, x, gate))
    return Moments(*_Moments.apply(dims, x, gate))


def _moments(dims: tuple[int, ...], x: Tensor, gate: Tensor | None) -> tuple[Tensor, ...]:
    y = x if gate is None else x * gate
    mean = y.mean(dims, keepdim=True)
    z = y - mean
    square = z * z
    powers = [p.mean(dims, keepdim=True) for p in (square, square * z, square * square)]
    return (mean, *powers, y.amax(dims, keepdim=True))


class _Moments(torch.autograd.Function):
    """``_moments`` that keeps its inputs and outputs.

    Its derivative is a cubic in y. With autograd's derivative and checkpointing it takes twice as long, and a step of
    the search 15 % longer.
    """

    @staticmethod
    def forward(dims: tuple[int, ...], x: Tensor, gate: Tensor | None) -> tuple[Tensor, ...]:
        return in_pieces(partial(_moments, dims), x, gate)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.dims, *tensors = inputs
        mean, second, third, _, top = output
        ctx.save_for_backward(*tensors, mean, second, third, top)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        found = in_pieces(partial(_moments_backward, ctx.dims), *ctx.saved_tensors, *grads)
        return None, found[0], found[1] if len(found) > 1 else None


def _moments_backward(dims: tuple[int, ...], x: Tensor, gate: Tensor | None, *small: Tensor) -> tuple[Tensor, ...]:
    """The gradients of x and of the gate. small: the moments but the fourth, and the gradients of all five."""
    mean, second, third, top, *grads, g_top = small
    y = x if gate is None else x * gate
    n = y.numel() // mean.numel()
    g1, g2, g3, g4 = (g * (k / n) for k, g in enumerate(grads, 1))
    z = y - mean
    grad = ((g4 * z + g3) * z + g2) * z + (g1 - g3 * second - g4 * third)
    # Equal maxima share the gradient, as in amax. On a CPU a comparison with a bool result takes twice as long.
    there = torch.eq(y.detach(), top.detach(), out=torch.empty_like(y.detach()))
    grad = grad + there * (g_top / there.sum(dims, keepdim=True))
    return (grad,) if gate is None else (grad * gate, (grad * x).sum((2, 3), keepdim=True))


def normed_sums(x: Tensor, mean: Tensor, rates: Tensor) -> tuple[Tensor, Tensor]:
    """Sum and sum of squares over C of ``(x - mean) * rate``, for each of K rates.

    x: (B, C, H, W); mean: (B, C, 1, 1); rates: (B, K, C) -> two of (B, K, H, W).
    """
    z = x - mean
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


def in_pieces(function: Callable[..., tuple[Tensor, ...]], x: Tensor, *others: Tensor | None) -> tuple[Tensor, ...]:
    """``function(x, *others)``, on a CPU for a few images at a time, whose intermediate results stay in the cache.

    The batch is the first dimension of every tensor and result.
    """
    images = max(1, PIECE * len(x) // max(1, x.numel()))
    if x.device.type != 'cpu' or torch.compiler.is_compiling() or images >= len(x):
        return function(x, *others)
    count = -(-len(x) // images)
    pieces = [[None] * count if t is None else t.split(images) for t in (x, *others)]
    return tuple(torch.cat(results) for results in zip(*map(function, *pieces), strict=True))


def recomputed(function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)`` with torch's checkpointing: it keeps only its inputs. Parameters must be among ``args``."""
    if torch.compiler.is_compiling():  # a compiler chooses what to keep
        return function(*args)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, determinism_check='none')
