"""The squeezes of the mixed edges, computed together from statistics that they share. Ours.

- Six squeezes of each set are formulas of the moments (``statistics.py``). The gated map ``gate * x`` needs no moments
  over (H, W) of its own: its mean is ``gate * mean``, its variance ``gate^2 * variance``.
- The second-order squeezes of both spatial edges share their pooling, which commutes with the gate
  (``second_order.py``).

Any operation that is not of the paper's sets, and any subclass, is called by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sase_blocks.numerics import narrow, safe_sqrt, widen
from sase_blocks.ops import (
    ChannelAvg,
    ChannelAvgMax,
    ChannelAvgSkew,
    ChannelAvgStd,
    ChannelL2Norm,
    ChannelPNorm,
    ChannelSecondOrder,
    SpatialAvg,
    SpatialAvgMax,
    SpatialAvgSkew,
    SpatialAvgStd,
    SpatialL2Norm,
    SpatialPNorm,
    SpatialSecondOrder,
)
from sase_blocks.ops.primitive import adaptive_avg_pool
from sase_blocks.ops.spatial_squeeze import pool_to, resize_map

from .outputs import Outputs
from .second_order import second_order
from .statistics import (
    Moments,
    centred_moments,
    group_means,
    images_at_once,
    joined,
    moments,
    normed_sums,
    recomputed,
    window_means,
)

__all__ = ['SharedSqueezes']


def p_norm(stats: Moments, n: int) -> Tensor:
    return safe_sqrt(safe_sqrt(fourth_power_sum(stats, n)))


def fourth_power_sum(stats: Moments, n: int) -> Tensor:
    """The sum of fourth powers from the mean and the central moments."""
    square = stats.mean * stats.mean
    # Products and sums apart: on a CPU torch.addcmul is several times as slow as both.
    total = torch.add(stats.fourth, stats.mean * stats.third, alpha=4)
    return (total + square * torch.add(square, stats.second, alpha=6)) * n


def deviation(stats: Moments, n: int) -> Tensor:
    return safe_sqrt(stats.second * (n / max(n - 1, 1)))


# What the moments give by themselves, and what is mixed with the mean, relu(w_0 mean + w_1 other). By the exact class:
# a subclass may compute another thing.
Formula = Callable[[Moments, int], Tensor]
BY_THEMSELVES: dict[type, Formula] = {
    ChannelAvg: lambda stats, n: stats.mean,
    SpatialAvg: lambda stats, n: stats.mean,
    ChannelPNorm: p_norm,
    SpatialPNorm: p_norm,
}
BESIDE_MEAN: dict[type, Formula] = {
    ChannelAvgMax: lambda stats, n: stats.top,
    SpatialAvgMax: lambda stats, n: stats.top,
    ChannelAvgStd: deviation,
    SpatialAvgStd: deviation,
    ChannelAvgSkew: lambda stats, n: stats.third,
    SpatialAvgSkew: lambda stats, n: stats.third,
}
OF_MOMENTS = (*BY_THEMSELVES, *BESIDE_MEAN, ChannelL2Norm)


def beside_mean(ops: Sequence[Any], stats: Moments, n: int) -> Tensor:
    """What operations of ``BESIDE_MEAN`` give; n: values that were squeezed. -> (operations, B, ...)."""
    others = torch.stack([BESIDE_MEAN[type(op)](stats, n) for op in ops])
    of_mean, of_other = torch.stack([widen(op.weight) for op in ops]).view(-1, 2, 1, 1, 1, 1).unbind(1)
    return torch.relu(of_mean * stats.mean + of_other * others)


def channel_l2(op: ChannelL2Norm, stats: Moments, n: int) -> Tensor:
    w, b = widen(op.weight).view(-1, 1, 1), widen(op.bias).view(-1, 1, 1)
    return safe_sqrt(n * (w * w * (stats.second / (stats.second + op.eps)) + b * b))


def spatial_l2(op: SpatialL2Norm, total: Tensor, squares: Tensor, n: int) -> Tensor:
    """From the sum and the sum of squares of the normed map over its n channels."""
    weight, bias = widen(op.weight), widen(op.bias)
    if weight.shape != total.shape[2:]:
        weight, bias = resize_map(weight, total), resize_map(bias, total)
    # The sum of (weight * normed + bias)^2 as deviations from the mean and the mean: neither cancels.
    avg = total * (1 / n)
    deviations = torch.relu(torch.sub(squares, avg * avg, alpha=n))
    shifted = weight * avg + bias
    return safe_sqrt(torch.add(weight * weight * deviations, shifted * shifted, alpha=n))


class SharedSqueezes:
    """The squeezes of one feature map x (B, C, H, W)."""

    def __init__(self, x: Tensor, channel_ops: Sequence[Any], spatial_ops: Sequence[Any]) -> None:
        self.x = x
        self.wide = widen(x)
        self.channel_ops = channel_ops
        # What else is taken in the pass over x that takes the moments: means over groups of channels, over windows.
        channels, height, width = x.shape[1:]
        sharing = _sharing(channel_ops)
        of_groups = {op.row_weight.shape[0] for op in channel_ops if sharing and type(op) is ChannelSecondOrder}
        grids = {op.grid for op in spatial_ops if sharing and type(op) is SpatialSecondOrder}
        self.groups = next((n for n in of_groups if channels % n == 0), 0)
        self.grid = next((n for n in grids if height % n == width % n == 0 and height * width > n * n), 0)
        self.images = images_at_once(x)
        self.pieces = self.wide.split(self.images)
        self.centred: list[tuple[Tensor, Tensor]] = []  # of each piece: x without its mean over H and W, and its square
        self._over_positions: list[Tensor] = []

    def over_positions(self) -> list[Tensor]:
        """The moments of each channel over H and W, then the means over windows and over groups, if they are taken."""
        if not self._over_positions:
            results = []
            for x in self.pieces:
                found, *centred = centred_moments(x, (2, 3))
                self.centred.append((centred[0], centred[1]))
                means = (window_means(x, self.grid),) if self.grid else ()
                means += (group_means(x, self.groups),) if self.groups else ()
                results.append((*found, *means))
            self._over_positions = joined(results)
        return self._over_positions

    def channel(self) -> Outputs:
        """What the channel squeezes give for x: (B, C, 1, 1) each."""
        ops, n = self.channel_ops, self.x.shape[2] * self.x.shape[3]
        stats = Moments(*self.over_positions()[:5]) if _sharing(ops) else None
        found: dict[int, Tensor] = {}
        for i, op in enumerate(ops):
            if stats and type(op) is ChannelL2Norm:
                found[i] = channel_l2(op, stats, n)
            elif type(op) is ChannelSecondOrder and self.x.shape[1] % op.row_weight.shape[0] == 0:
                taken = self.groups == op.row_weight.shape[0]
                means = self.over_positions()[-1] if taken else group_means(self.wide, op.row_weight.shape[0])
                found[i] = second_order(op, means.flatten(2).transpose(1, 2))[:, :, None, None]
        return self._outputs(ops, stats, n, found, lambda op: op(self.x))

    def spatial(self, gated_ops: Sequence[Any], gate: Tensor, plain_ops: Sequence[Any]) -> tuple[Outputs, Outputs]:
        """What the first squeezes give for ``gate * x`` and the others for x: (B, 1, H, W) each."""
        gate = gate.to(self.wide.dtype)
        edges = ((gated_ops, gate), (plain_ops, None))
        norms = [(op, factor) for ops, factor in edges for op in ops if type(op) is SpatialL2Norm]

        gates = gate.split(self.images)
        results = [() for _ in self.pieces]
        if _sharing(gated_ops):
            results = [recomputed(_gated_moments, *piece) for piece in zip(self.pieces, gates, strict=True)]
        if _sharing(plain_ops):
            results = [(*found, *recomputed(_gated_moments, x)) for found, x in zip(results, self.pieces, strict=True)]
        if norms:
            var = self.over_positions()[1]
            rates = torch.stack([_rate(op.eps, var, factor) for op, factor in norms], 1).flatten(2).split(self.images)
            results = [
                (*found, *normed_sums(*centred, rate))
                for found, centred, rate in zip(results, self.centred, rates, strict=True)
            ]
        maps = joined(results)
        sums = list(zip(*(m.split(1, 1) for m in maps[-2:]), strict=True)) if norms else []  # in the order of norms
        gated = self._spatial(gated_ops, gate, maps, sums)
        return gated, self._spatial(plain_ops, None, maps, sums)

    def _spatial(
        self, ops: Sequence[Any], gate: Tensor | None, maps: list[Tensor], sums: list[tuple[Tensor, Tensor]]
    ) -> Outputs:
        """What one edge's squeezes give; takes its moments from ``maps`` and its normed sums from ``sums``."""
        n = self.x.shape[1]
        stats = Moments(*maps[:5]) if _sharing(ops) else None
        if stats:
            del maps[:5]
        found: dict[int, Tensor] = {}
        for i, op in enumerate(ops):
            if type(op) is SpatialL2Norm:
                found[i] = spatial_l2(op, *sums.pop(0), n)
            elif type(op) is SpatialSecondOrder:
                small = second_order(op, self.pooled(op.grid).flatten(2), None if gate is None else gate.flatten(2))
                found[i] = self._spread(small.view(-1, 1, op.grid, op.grid))
        return self._outputs(ops, stats, n, found, lambda op: op(self.x, gate))

    def pooled(self, grid: int) -> Tensor:
        """x averaged over grid x grid windows: (B, C, grid, grid)."""
        height, width = self.x.shape[2:]
        if grid == self.grid:
            return self.over_positions()[5]
        if (height, width) == (grid, grid):
            return self.wide
        if height % grid == width % grid == 0:
            return window_means(self.wide, grid)
        with torch.autocast(self.x.device.type, enabled=False):  # it is two products
            return adaptive_avg_pool(self.wide, grid, grid)

    def _spread(self, s: Tensor) -> Tensor:
        """(B, 1, h, w) pooled adaptively to the H and W of x. To a multiple of h and w it repeats values."""
        (h, w), (height, width) = s.shape[2:], self.x.shape[2:]
        return pool_to(s, self.x) if height % h or width % w else F.interpolate(s, (height, width))

    def _outputs(
        self,
        ops: Sequence[Any],
        stats: Moments | None,
        n: int,
        found: dict[int, Tensor],
        call: Callable[[Any], Tensor],
    ) -> Outputs:
        """The outputs of an edge: those that are found, those of the moments, and the others called one by one."""
        mixed = tuple(i for i, op in enumerate(ops) if stats and type(op) in BESIDE_MEAN)
        for i, op in enumerate(ops):
            if stats and type(op) in BY_THEMSELVES:
                found[i] = BY_THEMSELVES[type(op)](stats, n)
        found = {i: narrow(y, self.x) for i, y in found.items()}
        found |= {i: call(op) for i, op in enumerate(ops) if i not in found and i not in mixed}
        outputs = {tuple(found): torch.stack(list(found.values()))} if found else {}
        if stats and mixed:
            outputs[mixed] = narrow(beside_mean([ops[i] for i in mixed], stats, n), self.x)
        return outputs


def _sharing(ops: Sequence[Any]) -> bool:
    return sum(type(op) in OF_MOMENTS for op in ops) > 1


def _gated_moments(x: Tensor, gate: Tensor | None = None) -> Moments:
    return moments(x if gate is None else x * gate, (1,))


def _rate(eps: float, var: Tensor, gate: Tensor | None) -> Tensor:
    """What normalises each channel of gate * x, whose variance is gate^2 var, times the gate itself."""
    return torch.rsqrt(var + eps) if gate is None else gate * torch.rsqrt(gate * gate * var + eps)
