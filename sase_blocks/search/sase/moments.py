"""Statistics of one feature map that are taken together, and the product with its gate, keeping nothing but the map.

Six of the seven squeezes of each of SASE's sets are functions of the mean, the second, third and fourth central moment
and the maximum, over (H, W) or over C. The mean is removed first, so that a mean far from 0 costs no digits; the
backward pass is a cubic in the map and can be differentiated again. Ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sase_blocks.numerics import widen

__all__ = [
    'Plan',
    'PositionStatistics',
    'Positions',
    'SpatialStatistics',
    'gated',
    'group_means',
    'position_statistics',
    'spatial_statistics',
]


Buffer = Tensor | None  # where a step writes; None for fresh memory, as what a graph is recorded of needs


def moments(
    dims: tuple[int, ...], x: Tensor, gate: Tensor | None, buffers: Sequence[Buffer] = (None, None, None)
) -> tuple[Tensor, ...]:
    """Mean, second, third and fourth central moment and maximum of ``gate * x`` over ``dims``, which are kept as 1."""
    a, b, c = buffers
    y = x if gate is None else torch.mul(x, gate, out=a)
    mean = y.mean(dims, keepdim=True)
    top = y.amax(dims, keepdim=True)
    z = torch.sub(y, mean, out=a)
    square = torch.mul(z, z, out=b)
    second = square.mean(dims, keepdim=True)
    third = torch.mul(square, z, out=c).mean(dims, keepdim=True)
    fourth = torch.mul(square, square, out=b).mean(dims, keepdim=True)
    return mean, second, third, fourth, top


def moments_backward(
    dims: tuple[int, ...],
    x: Tensor,
    gate: Tensor | None,
    stats: Sequence[Tensor],
    grads: Sequence[Tensor],
    buffers: Sequence[Buffer],
) -> tuple[Tensor, Tensor | None]:
    """The gradients of ``moments`` for x, in the first buffer, and for the gate. There are three buffers."""
    mean, second, third, _, top = stats
    g1, g2, g3, g4, g_top = grads
    a, b, c = buffers
    y = x if gate is None else torch.mul(x, gate, out=a)
    n = y.numel() // mean.numel()
    # A comparison into floats is vectorised, and one into truth values is not. Equal maxima share the gradient.
    c = torch.empty_like(x, requires_grad=False) if c is None else c
    at_top = torch.eq(y.detach(), top.detach(), out=c)
    share = g_top / at_top.sum(dims, keepdim=True)
    z = torch.sub(y, mean, out=b)
    grad = torch.add(torch.mul(z, g4 * (4 / n), out=a), g3 * (3 / n), out=a)
    grad = torch.add(torch.mul(grad, z, out=a), g2 * (2 / n), out=a)
    grad = torch.add(torch.mul(grad, z, out=a), (g1 - 3 * g3 * second - 4 * g4 * third) / n, out=a)
    grad = torch.add(grad, torch.mul(at_top, share, out=b), out=a)
    if gate is None:
        return grad, None
    grad_gate = torch.mul(grad, x, out=b).sum((2, 3), keepdim=True)
    return torch.mul(grad, gate, out=a), grad_gate


def averages(x: Tensor, grid: int) -> Tensor:
    """Means of the windows of a grid x grid, (B, C, H, W) -> (B, C, grid, grid); H and W are multiples of grid."""
    rows = x.unflatten(2, (grid, x.shape[2] // grid)).sum(3)
    with torch.autocast(x.device.type, enabled=False):
        return rows @ _columns(grid, x)


def _columns(grid: int, x: Tensor) -> Tensor:
    """(W, grid): the product of sums over the rows of windows with it averages over the windows."""
    height, width = x.shape[2:]
    eye = torch.eye(grid, device=x.device, dtype=x.dtype)
    return eye.repeat_interleave(width // grid, 0) * (grid * grid / (height * width))


def group_means(x: Tensor, groups: int) -> Tensor:
    """(B, C, H, W) -> (B, groups, H, W)."""
    members = x.shape[1] // groups
    return x.unflatten(1, (groups, members)).sum(2) * (1 / members)


class Positions(NamedTuple):
    """What is taken beside the moments over H and W: averages over a grid, means over groups of channels; 0 for not."""

    grid: int = 0
    groups: int = 0


def position_statistics(
    plan: Positions, x: Tensor, buffers: Sequence[Buffer] = (None, None, None)
) -> tuple[Tensor, ...]:
    """``moments`` over H and W, then ``averages`` and ``group_means`` if they are in the plan."""
    found = moments((2, 3), x, None, buffers)
    found += (averages(x, plan.grid),) if plan.grid else ()
    return found + ((group_means(x, plan.groups),) if plan.groups else ())


class PositionStatistics(torch.autograd.Function):
    """``position_statistics`` that keeps nothing but x, and small tensors; differentiable twice."""

    @staticmethod
    def forward(plan: Positions, x: Tensor) -> tuple[Tensor, ...]:
        return in_pieces(lambda buffers, x: position_statistics(plan, x, buffers), 3, x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.plan, x = inputs
        ctx.save_for_backward(x, *output[:5])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        def function(buffers: Sequence[Buffer], x: Tensor, *small: Tensor) -> tuple[Tensor]:
            grad = moments_backward((2, 3), x, None, small[:5], small[5:10], buffers)[0]
            rest = list(small[10:])
            if ctx.plan.grid:
                with torch.autocast(x.device.type, enabled=False):
                    rows = rest.pop(0) @ _columns(ctx.plan.grid, x).t()
                grad = _plus_each(grad, 2, rows, buffers[0])
            if ctx.plan.groups:
                means = rest.pop(0)
                grad = _plus_each(grad, 1, means * (means.shape[1] / x.shape[1]), buffers[0])
            return (grad,)

        return None, in_pieces(function, 3, *ctx.saved_tensors, *grads, maps=1)[0]


def _plus_each(grad: Tensor, dim: int, each: Tensor, out: Buffer) -> Tensor:
    """grad plus what ``each`` has for every run of equal length along ``dim``."""
    runs = (each.shape[dim], grad.shape[dim] // each.shape[dim])
    where = None if out is None else out.unflatten(dim, runs)
    return torch.add(grad.unflatten(dim, runs), each.unsqueeze(dim + 1), out=where).flatten(dim, dim + 1)


def normed_sums(x: Tensor, mean: Tensor, rates: Tensor, buffers: Sequence[Buffer] = (None, None)) -> tuple[Tensor, ...]:
    """Sum and sum of squares over C of ``(x - mean) * rate`` for each of K rates.

    mean: (B, C, 1, 1); rates: (B, K, C) -> two of (B, K, H, W).
    """
    a, b = buffers
    z = torch.sub(x, mean, out=a)
    if torch.compiler.is_compiling():  # sums of products fuse with the moments, and matrix products do not
        normed = z.unsqueeze(1) * rates[..., None, None]
        return normed.sum(2), normed.square().sum(2)
    with torch.autocast(x.device.type, enabled=False):
        sums = torch.bmm(rates, z.flatten(2))
        squares = torch.bmm(rates * rates, torch.mul(z, z, out=b).flatten(2))
    return sums.unflatten(2, x.shape[2:]), squares.unflatten(2, x.shape[2:])


def normed_sums_backward(
    x: Tensor, mean: Tensor, rates: Tensor, g_sums: Tensor, g_squares: Tensor, buffers: Sequence[Buffer]
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of ``normed_sums`` for x, in the first buffer, mean and rates. There are two buffers."""
    a, b = buffers
    with torch.autocast(x.device.type, enabled=False):
        g1, g2 = g_sums.flatten(2), g_squares.flatten(2)
        z = torch.sub(x, mean, out=b)
        grad = torch.bmm((2 * rates * rates).transpose(1, 2), g2).view(x.shape)
        grad = torch.mul(grad, z, out=a)
        grad = torch.add(grad, torch.bmm(rates.transpose(1, 2), g1).view(x.shape), out=a)
        grad_rates = torch.bmm(g1, z.flatten(2).transpose(1, 2))
        square = torch.mul(z, z, out=b).flatten(2)
        grad_rates = grad_rates + 2 * rates * torch.bmm(g2, square.transpose(1, 2))
    return grad, -grad.sum((2, 3), keepdim=True), grad_rates


class Plan(NamedTuple):
    """What is taken over C: the moments of gate * x, those of x, the normed sums."""

    gated: bool
    plain: bool
    normed: bool


def spatial_statistics(
    plan: Plan, x: Tensor, gate: Any, mean: Any, rates: Any, buffers: Sequence[Buffer] = (None, None, None)
) -> tuple[Tensor, ...]:
    """The moments of ``gate * x`` and of x, and the normed sums: up to 5 + 5 + 2 maps."""
    gated = moments((1,), x, gate, buffers) if plan.gated else ()
    plain = moments((1,), x, None, buffers) if plan.plain else ()
    return (*gated, *plain, *(normed_sums(x, mean, rates, buffers[:2]) if plan.normed else ()))


class SpatialStatistics(torch.autograd.Function):
    """``spatial_statistics`` that keeps nothing but x, and small tensors; differentiable twice."""

    @staticmethod
    def forward(plan: Plan, x: Tensor, gate: Any, mean: Any, rates: Any) -> tuple[Tensor, ...]:
        def function(buffers: Sequence[Buffer], x: Tensor, gate: Any, mean: Any, rates: Any) -> tuple[Tensor, ...]:
            return spatial_statistics(plan, x, gate, mean, rates, buffers)

        return in_pieces(function, 3, x, gate, mean, rates)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.plan, *tensors = inputs
        ctx.save_for_backward(*tensors, *output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        plan, maps = ctx.plan, len(grads)

        def function(
            buffers: Sequence[Buffer], x: Tensor, gate: Any, mean: Any, rates: Any, *small: Tensor
        ) -> tuple[Tensor, ...]:
            total, a, b, c = buffers
            stats, grads = list(small[:maps]), list(small[maps:])
            sum_of: Tensor | None = None
            found = []
            for wanted, factor in ((plan.gated, gate), (plan.plain, None)):
                if wanted:
                    first = total if sum_of is None else a
                    part, grad_gate = moments_backward((1,), x, factor, stats[:5], grads[:5], (first, b, c))
                    sum_of = part if sum_of is None else torch.add(sum_of, part, out=total)
                    found += [] if grad_gate is None else [grad_gate]
                    del stats[:5], grads[:5]
            if plan.normed:
                first = total if sum_of is None else a
                part, *others = normed_sums_backward(x, mean, rates, grads[0], grads[1], (first, b))
                sum_of = part if sum_of is None else torch.add(sum_of, part, out=total)
                found += others
            assert sum_of is not None
            return (sum_of, *found)

        found = list(in_pieces(function, 4, *ctx.saved_tensors, *grads, maps=1))
        grad_x = found.pop(0)
        grad_gate = found.pop(0) if plan.gated else None
        return None, grad_x, grad_gate, *(found or (None, None))


PIECE = 2**18  # elements: on a CPU a piece of the batch this large stays in the cache from one operation to the next


def in_pieces(
    function: Callable[..., tuple[Tensor, ...]], buffers: int, x: Tensor, *others: Tensor | None, maps: int = 0
) -> tuple[Tensor, ...]:
    """``function(buffers, x, *others)`` on a few images at a time, where no gradient is recorded.

    Each result has the batch. The function gets as many buffers as asked for, of the shape of its x, for its steps,
    which then take no fresh memory. Its first results, ``maps`` of them, are what it wrote into the first buffers.
    Where a gradient is recorded the buffers are None.
    """
    if torch.is_grad_enabled():
        return function([None] * buffers, x, *others)
    images = len(x) if x.device.type != 'cpu' else max(1, min(len(x), PIECE * len(x) // max(1, x.numel())))
    whole = [torch.empty_like(x) for _ in range(maps)]
    spare = [torch.empty_like(x[:images]) for _ in range(buffers - maps)]
    if images >= len(x):
        return (*whole, *function([*whole, *spare], x, *others)[maps:])
    results = []
    for start in range(0, len(x), images):
        piece = slice(start, start + images)
        n = len(x[piece])
        inside = [*(t[piece] for t in whole), *(t[:n] for t in spare)]
        results.append(function(inside, x[piece], *(None if t is None else t[piece] for t in others))[maps:])
    return (*whole, *(torch.cat(parts) for parts in zip(*results, strict=True)))


class Gated(torch.autograd.Function):
    """``x * (1 + (c + a) / 2)`` that keeps x, c and a; differentiable twice."""

    @staticmethod
    def forward(x: Tensor, c: Tensor, a: Tensor) -> Tensor:
        return in_pieces(lambda buffers, x, c, a: (_times_gate(x, c, a, buffers[0]),), 1, x, c, a, maps=1)[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        def function(buffers: Sequence[Buffer], x: Tensor, c: Tensor, a: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
            product = widen(torch.mul(grad, x, out=buffers[1]))
            grad_c = 0.5 * product.sum((2, 3), keepdim=True)
            grad_a = 0.5 * product.sum(1, keepdim=True)
            return _times_gate(grad, c, a, buffers[0]), grad_c.to(c.dtype), grad_a.to(a.dtype)

        return in_pieces(function, 2, *ctx.saved_tensors, grad, maps=1)


def _times_gate(x: Tensor, c: Tensor, a: Tensor, out: Buffer) -> Tensor:
    if out is None or out.dtype != c.dtype:
        return torch.mul(x, gate_of(c, a).to(x.dtype), out=out)
    return torch.mul(torch.add(1 + c / 2, a / 2, out=out), x, out=out)


def gate_of(c: Tensor, a: Tensor) -> Tensor:
    """1 + (c + a) / 2 in the order that adds the small ones first. -> (B, C, H, W)."""
    return (1 + c / 2) + a / 2


def gated(x: Tensor, c: Tensor, a: Tensor) -> Tensor:
    """``x * (1 + (c + a) / 2)``, keeping no map but x."""
    if torch.compiler.is_compiling():
        return x * gate_of(c, a).to(x.dtype)
    return Gated.apply(x, c, a)
