"""The squeezes of the mixed edges, from statistics that they share. Not in the paper.

- Six squeezes in each set are formulas of the moments (``statistics.py``). The gated map ``gate * x`` needs no moments
  over (H, W) of its own: its mean is ``gate * mean``, its variance ``gate^2 * variance``.
- The second-order squeezes of both spatial edges share their pooling, which commutes with the gate
  (``second_order.py``).

An operation that is not in the paper's sets, and any subclass, runs on its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
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

from .second_order import second_order
from .statistics import (
    Moments,
    group_means,
    in_pieces,
    moments,
    normed_sums,
    recomputed,
    window_means,
)


def p_norm(stats: Moments, n: int) -> Tensor:
    return safe_sqrt(safe_sqrt(fourth_power_sum(stats, n)))


def fourth_power_sum(stats: Moments, n: int) -> Tensor:
    """The sum of fourth powers from the mean and the central moments."""
    mean, second, third, fourth = stats[:4]
    # Not torch.addcmul, which on a CPU takes several times as long as a product and a sum.
    inner = torch.add(mean * mean, second, alpha=6)
    return (fourth + mean * torch.add(mean * inner, third, alpha=4)) * n


def deviation(stats: Moments, n: int) -> Tensor:
    return safe_sqrt(stats.second * (n / max(n - 1, 1)))


# Formulas of the moments alone, and those that are mixed with the mean, relu(w_0 mean + w_1 formula). By exact class,
# because a subclass may compute something else.
Formula = Callable[[Moments, int], Tensor]
ALONE: dict[type, Formula] = {
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
OF_MOMENTS = (*ALONE, *BESIDE_MEAN, ChannelL2Norm)


def beside_mean(ops: Sequence[Any], stats: Moments | None, n: int) -> dict[int, Tensor]:
    """The outputs of those of ``ops`` that are in ``BESIDE_MEAN``, by position. n: the number of squeezed values."""
    chosen = [i for i, op in enumerate(ops) if stats and type(op) in BESIDE_MEAN]
    if not stats or not chosen:
        return {}
    others = torch.stack([BESIDE_MEAN[type(ops[i])](stats, n) for i in chosen])
    of_mean, of_other = torch.stack([widen(ops[i].weight) for i in chosen]).view(-1, 2, 1, 1, 1, 1).unbind(1)
    return dict(zip(chosen, torch.relu(of_mean * stats.mean + of_other * others).unbind(0), strict=True))


def channel_l2(op: ChannelL2Norm, stats: Moments, n: int) -> Tensor:
    w, b = widen(op.weight).view(-1, 1, 1), widen(op.bias).view(-1, 1, 1)
    return safe_sqrt(n * (w * w * (stats.second / (stats.second + op.eps)) + b * b))


def spatial_l2(op: SpatialL2Norm, total: Tensor, squares: Tensor, n: int) -> Tensor:
    """From the sum and the sum of squares of the normed map over its n channels."""
    weight, bias = widen(op.weight), widen(op.bias)
    if weight.shape != total.shape[2:]:
        weight, bias = resize_map(weight, total), resize_map(bias, total)
    # The sum of (weight * normed + bias)^2, split into deviations from the mean and the mean, which do not cancel.
    avg = total * (1 / n)
    deviations = torch.relu(torch.sub(squares, avg * avg, alpha=n))
    shifted = weight * avg + bias
    return safe_sqrt(torch.add(weight * weight * deviations, shifted * shifted, alpha=n))


class SharedSqueezes:
    """The squeezes of one feature map x (B, C, H, W)."""

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self.wide = widen(x)
        self._over_positions: Moments | None = None
        self._pooled: dict[int, Tensor] = {}

    def channel(self, ops: Sequence[Any]) -> list[Tensor]:
        """The outputs of channel squeezes of x, (B, C, 1, 1) each."""
        n = self.x.shape[2] * self.x.shape[3]
        stats = self.over_positions() if _sharing(ops) else None
        found = beside_mean(ops, stats, n)
        for i, op in enumerate(ops):
            if stats and type(op) in ALONE:
                found[i] = ALONE[type(op)](stats, n)
            elif stats and type(op) is ChannelL2Norm:
                found[i] = channel_l2(op, stats, n)
            elif type(op) is ChannelSecondOrder and self.x.shape[1] % op.row_weight.shape[0] == 0:
                means = group_means(self.wide, op.row_weight.shape[0])
                found[i] = second_order(op, means.flatten(2).transpose(1, 2))[:, :, None, None]
            elif i not in found:
                found[i] = op(self.x)
        return [narrow(found[i], self.x) for i in range(len(ops))]

    def spatial(
        self, gated_ops: Sequence[Any], gate: Tensor, plain_ops: Sequence[Any]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The outputs of the gated squeezes of ``gate * x`` and of the plain ones of x, (B, 1, H, W) each."""
        gate = gate.to(self.wide.dtype)
        edges = ((gated_ops, gate), (plain_ops, None))
        sums = iter(self.normed_sums([(op, g) for ops, g in edges for op in ops if type(op) is SpatialL2Norm]))
        gated, plain = (self._spatial(ops, g, sums) for ops, g in edges)
        return gated, plain

    def _spatial(self, ops: Sequence[Any], gate: Tensor | None, sums: Iterator[tuple[Tensor, Tensor]]) -> list[Tensor]:
        n = self.x.shape[1]
        stats = moments(self.wide, (1,), gate) if _sharing(ops) else None
        found = beside_mean(ops, stats, n)
        for i, op in enumerate(ops):
            if stats and type(op) in ALONE:
                found[i] = ALONE[type(op)](stats, n)
            elif type(op) is SpatialL2Norm:
                found[i] = spatial_l2(op, *next(sums), n)
            elif type(op) is SpatialSecondOrder:
                small = second_order(op, self.pooled(op.grid).flatten(2), None if gate is None else gate.flatten(2))
                found[i] = self._spread(small.view(-1, 1, op.grid, op.grid))
            elif i not in found:
                found[i] = op(self.x, gate)
        return [narrow(found[i], self.x) for i in range(len(ops))]

    def over_positions(self) -> Moments:
        """The moments of each channel over H and W."""
        if self._over_positions is None:
            self._over_positions = moments(self.wide, (2, 3))
        return self._over_positions

    def normed_sums(self, norms: Sequence[tuple[SpatialL2Norm, Tensor | None]]) -> list[tuple[Tensor, Tensor]]:
        """The sum and the sum of squares over C of x, or of a gate times x, normed over H and W."""
        if not norms:
            return []
        mean, var = self.over_positions()[:2]
        # The factor that normalises a channel of gate * x, whose variance is gate^2 var, times the gate.
        rates = [
            torch.rsqrt(var + op.eps) if gate is None else gate * torch.rsqrt(gate * gate * var + op.eps)
            for op, gate in norms
        ]
        stack = torch.stack(rates, 1).flatten(2)
        sums, squares = recomputed(in_pieces, normed_sums, self.wide, mean, stack)
        return list(zip(sums.split(1, 1), squares.split(1, 1), strict=True))

    def pooled(self, grid: int) -> Tensor:
        """x averaged over grid x grid windows: (B, C, grid, grid)."""
        height, width = self.x.shape[2:]
        if (height, width) == (grid, grid):
            return self.wide
        if grid not in self._pooled:
            if height % grid == width % grid == 0:
                self._pooled[grid] = window_means(self.wide, grid)
            else:
                with torch.autocast(self.x.device.type, enabled=False):  # it is two products
                    self._pooled[grid] = adaptive_avg_pool(self.wide, grid, grid)
        return self._pooled[grid]

    def _spread(self, s: Tensor) -> Tensor:
        """(B, 1, h, w) pooled adaptively to the H and W of x. Multiples of h and w repeat the values."""
        (h, w), (height, width) = s.shape[2:], self.x.shape[2:]
        if height % h or width % w:
            return pool_to(s, self.x)
        return s[..., :, None, :, None].expand(-1, 1, h, height // h, w, width // w).reshape(-1, 1, height, width)


def _sharing(ops: Sequence[Any]) -> bool:
    return sum(type(op) in OF_MOMENTS for op in ops) > 1
