"""Statistics of one feature map that are taken together, and the product with its gate, keeping nothing but the map.

Six of the seven squeezes of each of SASE's sets are functions of the mean, the second, third and fourth central moment
and the maximum, over (H, W) or over C. The mean is removed first, so that a mean far from 0 costs no digits; the
backward pass is a cubic in the map and can be differentiated again. Ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sase_blocks.ops import (
    ChannelAvg,
    ChannelAvgMax,
    ChannelAvgSkew,
    ChannelAvgStd,
    ChannelL2Norm,
    ChannelPNorm,
    SpatialAvg,
    SpatialAvgMax,
    SpatialAvgSkew,
    SpatialAvgStd,
    SpatialPNorm,
)
from sase_blocks.ops.primitive import (
    mix,
    safe_sqrt,
    widen,
)
from sase_blocks.ops.spatial_squeeze import resize_map

__all__ = ['OF_MOMENTS', 'gate_of', 'gated', 'moments']


def moments(dims: tuple[int, ...], x: Tensor, gate: Tensor | None) -> tuple[Tensor, ...]:
    """Mean, second, third and fourth central moment and maximum of ``gate * x`` over ``dims``, which are kept as 1."""
    y = x if gate is None else x * gate
    mean = y.mean(dims, keepdim=True)
    top = y.amax(dims, keepdim=True)
    z = y - mean
    square = z * z
    second = square.mean(dims, keepdim=True)
    third = (square * z).mean(dims, keepdim=True)
    fourth = (square * square).mean(dims, keepdim=True)
    return mean, second, third, fourth, top


def moments_backward(
    dims: tuple[int, ...],
    x: Tensor,
    gate: Tensor | None,
    stats: Sequence[Tensor],
    grads: Sequence[Tensor],
) -> tuple[Tensor, Tensor | None]:
    """The gradients of ``moments`` for x and for the gate."""
    mean, second, third, _, top = stats
    g1, g2, g3, g4, g_top = grads
    y = x if gate is None else x * gate
    n = y.numel() // mean.numel()
    z = y - mean
    # A comparison into floats is vectorised, and one into truth values is not. Equal maxima share the gradient.
    at_top = torch.eq(y.detach(), top.detach(), out=torch.empty_like(z, requires_grad=False))
    share = g_top / at_top.sum(dims, keepdim=True)
    grad = z * (g4 * (4 / n))
    grad = _times_plus(_plus(grad, g3 * (3 / n)), z, g2 * (2 / n))
    grad = _times_plus(grad, z, (g1 - 3 * g3 * second - 4 * g4 * third) / n)
    grad = _plus(grad, _times(at_top, share))
    if gate is None:
        return grad, None
    return grad * gate, (grad * x).sum((2, 3), keepdim=True)


def _times(a: Tensor, b: Tensor) -> Tensor:
    """a * b, in the memory of ``a`` where no graph needs it: fresh memory costs more than the product."""
    return a * b if torch.is_grad_enabled() else a.mul_(b)


def _plus(a: Tensor, b: Tensor) -> Tensor:
    """a + b, likewise."""
    return a + b if torch.is_grad_enabled() else a.add_(b)


def _times_plus(a: Tensor, z: Tensor, b: Tensor) -> Tensor:
    """a * z + b, likewise."""
    return torch.addcmul(b, a, z) if torch.is_grad_enabled() else a.mul_(z).add_(b)


class ChannelMoments(torch.autograd.Function):
    """``moments`` over H and W that keeps nothing but x, and small tensors; differentiable twice."""

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, ...]:
        return in_pieces(lambda x: moments((2, 3), x, None), x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs, *output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        def function(x: Tensor, *small: Tensor) -> tuple[Tensor]:
            return (moments_backward((2, 3), x, None, small[:5], small[5:])[0],)

        return in_pieces(function, *ctx.saved_tensors, *grads)[0]


def normed_sums(x: Tensor, mean: Tensor, rates: Tensor) -> tuple[Tensor, ...]:
    """Sum and sum of squares over C of ``(x - mean) * rate`` for each of K rates.

    mean: (B, C, 1, 1); rates: (B, K, C) -> two of (B, K, H, W).
    """
    z = x - mean
    if torch.compiler.is_compiling():  # sums of products fuse with the moments, and matrix products do not
        normed = z.unsqueeze(1) * rates[..., None, None]
        return normed.sum(2), normed.square().sum(2)
    with torch.autocast(x.device.type, enabled=False):
        z = z.flatten(2)
        sums, squares = torch.bmm(rates, z), torch.bmm(rates * rates, z * z)
    return sums.unflatten(2, x.shape[2:]), squares.unflatten(2, x.shape[2:])


def normed_sums_backward(
    x: Tensor, mean: Tensor, rates: Tensor, g_sums: Tensor, g_squares: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of ``normed_sums`` for x, mean and rates."""
    with torch.autocast(x.device.type, enabled=False):
        z = (x - mean).flatten(2)
        g1, g2 = g_sums.flatten(2), g_squares.flatten(2)
        twice = 2 * z
        grad = _times_plus(torch.bmm((rates * rates).transpose(1, 2), g2), twice, torch.bmm(rates.transpose(1, 2), g1))
        grad_rates = torch.bmm(g1, z.transpose(1, 2)) + rates * torch.bmm(g2, (twice * z).transpose(1, 2))
        grad = grad.unflatten(2, x.shape[2:])
    return grad, -grad.sum((2, 3), keepdim=True), grad_rates


class Plan(NamedTuple):
    """What is taken over C: the moments of gate * x, those of x, the normed sums."""

    gated: bool
    plain: bool
    normed: bool


def spatial_statistics(plan: Plan, x: Tensor, gate: Any, mean: Any, rates: Any) -> tuple[Tensor, ...]:
    """The moments of ``gate * x`` and of x, and the normed sums: up to 5 + 5 + 2 maps."""
    gated = moments((1,), x, gate) if plan.gated else ()
    plain = moments((1,), x, None) if plan.plain else ()
    return (*gated, *plain, *(normed_sums(x, mean, rates) if plan.normed else ()))


class SpatialStatistics(torch.autograd.Function):
    """``spatial_statistics`` that keeps nothing but x, and small tensors; differentiable twice."""

    @staticmethod
    def forward(plan: Plan, x: Tensor, gate: Any, mean: Any, rates: Any) -> tuple[Tensor, ...]:
        return in_pieces(partial(spatial_statistics, plan), x, gate, mean, rates)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.plan, *tensors = inputs
        ctx.save_for_backward(*tensors, *output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        plan, maps = ctx.plan, len(grads)

        def function(x: Tensor, gate: Any, mean: Any, rates: Any, *small: Tensor) -> tuple[Tensor, ...]:
            stats, grads = list(small[:maps]), list(small[maps:])
            parts, found = [], []
            for wanted, factor in ((plan.gated, gate), (plan.plain, None)):
                if wanted:
                    part, grad_gate = moments_backward((1,), x, factor, stats[:5], grads[:5])
                    parts.append(part)
                    found += [] if grad_gate is None else [grad_gate]
                    del stats[:5], grads[:5]
            if plan.normed:
                part, *others = normed_sums_backward(x, mean, rates, *grads)
                parts.append(part)
                found += others
            return (reduce(_plus, parts), *found)

        found = list(in_pieces(function, *ctx.saved_tensors, *grads))
        grad_x = found.pop(0)
        grad_gate = found.pop(0) if plan.gated else None
        return None, grad_x, grad_gate, *(found or (None, None))


PIECE = 2**18  # elements: on a CPU a piece of the batch this large stays in the cache from one operation to the next


def in_pieces(function: Callable[..., tuple[Tensor, ...]], x: Tensor, *others: Tensor | None) -> tuple[Tensor, ...]:
    """``function(x, *others)`` on a few images at a time, where no gradient is recorded. Each result has the batch."""
    images = max(1, PIECE * len(x) // max(1, x.numel()))
    if x.device.type != 'cpu' or images >= len(x) or torch.is_grad_enabled():
        return function(x, *others)
    columns = [[None] * -(-len(x) // images) if t is None else t.split(images) for t in (x, *others)]
    results = [function(*piece) for piece in zip(*columns, strict=True)]
    return tuple(torch.cat(parts) for parts in zip(*results, strict=True))


def fourth_power_sum(stats: Sequence[Tensor], n: int) -> Tensor:
    """The sum of fourth powers from the mean and the central moments."""
    mean, second, third, fourth, _ = stats
    square = mean * mean
    return n * (fourth + 4 * mean * third + square * (6 * second + square))


def _p_norm(stats: Sequence[Tensor], weights: Sequence[Tensor], n: int) -> Tensor:
    return safe_sqrt(safe_sqrt(fourth_power_sum(stats, n)))


def _avg_max(stats: Sequence[Tensor], weights: Sequence[Tensor], n: int) -> Tensor:
    return torch.relu(mix(stats[0], stats[4], weights[0]))


def _avg_std(stats: Sequence[Tensor], weights: Sequence[Tensor], n: int) -> Tensor:
    return torch.relu(mix(stats[0], safe_sqrt(stats[1] * (n / max(n - 1, 1))), weights[0]))


def _avg_skew(stats: Sequence[Tensor], weights: Sequence[Tensor], n: int) -> Tensor:
    return torch.relu(mix(stats[0], stats[2], weights[0]))


def channel_l2(stats: Sequence[Tensor], weights: Sequence[Tensor], n: int, eps: float = 1e-5) -> Tensor:
    w, b = (weight.reshape(1, -1, 1, 1) for weight in weights)
    return safe_sqrt(n * (w * w * (stats[1] / (stats[1] + eps)) + b * b))


def spatial_l2(sums: Sequence[Tensor], weights: Sequence[Tensor], n: int) -> Tensor:
    total, squares = sums
    weight, bias = (resize_map(weight, total) for weight in weights)
    # The sum of (weight * normed + bias)^2 as deviations from the mean and the mean: neither cancels.
    avg = total / n
    deviation = (squares - total * avg).clamp_min(0)
    return safe_sqrt(weight * weight * deviation + n * (weight * avg + bias).square())


Formula = Callable[[Sequence[Tensor], Sequence[Tensor], int], Tensor]

# Functions of the moments and the operation's own parameters, by the exact class: a subclass may compute another thing.
OF_MOMENTS: dict[type, Formula] = {
    ChannelAvg: lambda stats, weights, n: stats[0],
    ChannelL2Norm: channel_l2,
    ChannelPNorm: _p_norm,
    ChannelAvgMax: _avg_max,
    ChannelAvgStd: _avg_std,
    ChannelAvgSkew: _avg_skew,
    SpatialAvg: lambda stats, weights, n: stats[0],
    SpatialPNorm: _p_norm,
    SpatialAvgMax: _avg_max,
    SpatialAvgStd: _avg_std,
    SpatialAvgSkew: _avg_skew,
}


class Gated(torch.autograd.Function):
    """``x * (1 + (c + a) / 2)`` that keeps x, c and a; differentiable twice."""

    @staticmethod
    def forward(x: Tensor, c: Tensor, a: Tensor) -> Tensor:
        return in_pieces(lambda x, c, a: (x * gate_of(c, a).to(x.dtype),), x, c, a)[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        def function(x: Tensor, c: Tensor, a: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
            product = widen(grad * x)
            grad_c = 0.5 * product.sum((2, 3), keepdim=True)
            grad_a = 0.5 * product.sum(1, keepdim=True)
            return grad * gate_of(c, a).to(x.dtype), grad_c.to(c.dtype), grad_a.to(a.dtype)

        return in_pieces(function, *ctx.saved_tensors, grad)


def gate_of(c: Tensor, a: Tensor) -> Tensor:
    """1 + (c + a) / 2 in the order that adds the small ones first. -> (B, C, H, W)."""
    return (1 + c / 2) + a / 2


def gated(x: Tensor, c: Tensor, a: Tensor) -> Tensor:
    """``x * (1 + (c + a) / 2)``, keeping no map but x."""
    if torch.compiler.is_compiling():
        return x * gate_of(c, a).to(x.dtype)
    return Gated.apply(x, c, a)
