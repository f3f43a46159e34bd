"""The operations of a mixed edge in one pass over what they read; the results are those of each called by itself. Ours.

- the squeezes of x share its statistics (``moments.py``). The gated map ``gate * x`` needs none over (H, W) of its
  own: its mean is ``gate * m``, its variance ``gate^2 * v``.
- the second-order squeezes of both spatial edges share their pooling, which commutes with the gate, and are computed
  without their covariance (``second_order.py``).
- excitations that convolve the same small tensor are one convolution (``convolutions.py``).
- what is computed from small tensors is not kept but computed again in the backward pass (``parts.py``).

On small tensors it is the number of operations that costs, so these are few and of several outputs each. The
perceptron, the affine ones, whatever is not of the paper's sets, and any subclass is called by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sase_blocks.numerics import narrow, widen
from sase_blocks.ops import ChannelL2Norm, ChannelSecondOrder, SpatialL2Norm, SpatialSecondOrder
from sase_blocks.ops.primitive import adaptive_avg_pool
from sase_blocks.ops.spatial_squeeze import pool_to

from .formulas import BESIDE_MEAN, OF_MOMENTS, PURE, SpatialMaps, beside_mean, channel_l2
from .moments import (
    Plan,
    Positions,
    PositionStatistics,
    SpatialStatistics,
    group_means,
    position_statistics,
    spatial_statistics,
)
from .parts import Part
from .second_order import second_order

__all__ = ['SharedSqueezes']


class SharedSqueezes:
    """The squeezes of one feature map x (B, C, H, W)."""

    def __init__(self, x: Tensor, channel_ops: Sequence[Any], spatial_ops: Sequence[Any]) -> None:
        self.x = x
        self.wide = widen(x)
        channels, height, width = x.shape[1:]
        # What else is taken in the pass over x that the moments need; a compiler puts passes together itself.
        grid = groups = 0
        if _worth_sharing(channel_ops) and not torch.compiler.is_compiling():
            grids = {op.grid for op in spatial_ops if type(op) is SpatialSecondOrder}
            grid = next((n for n in grids if height % n == width % n == 0 and height * width > n * n), 0)
            of_groups = {op.row_weight.shape[0] for op in channel_ops if type(op) is ChannelSecondOrder}
            groups = next((n for n in of_groups if channels % n == 0), 0)
        self._plan = Positions(grid, groups)
        self._over_positions: tuple[Tensor, ...] | None = None

    def channel(self, ops: Sequence[Any]) -> list[Part]:
        """What the channel squeezes give for x: (B, C, 1, 1) each."""
        shared = _worth_sharing(ops)
        n = self.x.shape[2] * self.x.shape[3]
        outputs: dict[int, Tensor] = {}
        for i, op in enumerate(ops):
            if shared and type(op) in PURE:
                outputs[i] = narrow(PURE[type(op)](self.over_positions()[:5], n), self.x)
            elif shared and type(op) is ChannelL2Norm:
                l2 = channel_l2(self.over_positions(), widen(op.weight), widen(op.bias), n, op.eps)
                outputs[i] = narrow(l2, self.x)
            elif type(op) is ChannelSecondOrder and self.x.shape[1] % op.row_weight.shape[0] == 0:
                taken = self._plan.groups == op.row_weight.shape[0]
                means = self.over_positions()[-1] if taken else group_means(self.wide, op.row_weight.shape[0])
                outputs[i] = second_order(op, means.flatten(2).transpose(1, 2)).to(self.x.dtype)[:, :, None, None]
            elif not (shared and type(op) in BESIDE_MEAN):
                outputs[i] = op(self.x)
        mixed = [i for i in range(len(ops)) if i not in outputs]
        parts = [Part.of(outputs)] if outputs else []
        if mixed:
            kinds, weights = [type(ops[i]) for i in mixed], [widen(ops[i].weight) for i in mixed]
            parts.append(Part.of_stack(mixed, narrow(beside_mean(kinds, self.over_positions(), weights, n), self.x)))
        return parts

    def spatial(
        self, gated_ops: Sequence[Any], gate: Tensor, plain_ops: Sequence[Any]
    ) -> tuple[list[Part], list[Part]]:
        """What the first squeezes give for ``gate * x`` and the others for x: (B, 1, H, W) each."""
        wide_gate = gate.to(self.wide.dtype)
        edges = ((gated_ops, wide_gate), (plain_ops, None))
        norms = [(op, factor) for ops, factor in edges for op in ops if type(op) is SpatialL2Norm]
        plan = Plan(_worth_sharing(gated_ops), _worth_sharing(plain_ops), len(norms) > 0)
        maps: list[Tensor] = []
        if any(plan):
            mean = rates = None
            if norms:
                mean, var = self.over_positions()[:2]
                rates = torch.stack([_rate(op.eps, var, factor) for op, factor in norms], 1).flatten(2)
            inputs = (plan, self.wide, wide_gate if plan.gated else None, mean, rates)
            compiling = torch.compiler.is_compiling()
            maps = list(spatial_statistics(*inputs) if compiling else SpatialStatistics.apply(*inputs))
        gated_stats = [maps.pop(0) for _ in range(5)] if plan.gated else []
        plain_stats = [maps.pop(0) for _ in range(5)] if plan.plain else []
        # One column of the normed sums for each norm, in the order above.
        sums = list(zip(*(m.split(1, 1) for m in maps), strict=True))
        gated = self._spatial(gated_ops, gate, gated_stats, sums)
        return gated, self._spatial(plain_ops, None, plain_stats, sums)

    def _spatial(
        self, ops: Sequence[Any], gate: Tensor | None, stats: list[Tensor], sums: list[tuple[Tensor, Tensor]]
    ) -> list[Part]:
        pure = [i for i, op in enumerate(ops) if stats and type(op) in PURE]
        normed = [i for i, op in enumerate(ops) if type(op) is SpatialL2Norm]
        mixed = [i for i, op in enumerate(ops) if stats and type(op) in BESIDE_MEAN]
        tensors = [*stats]
        for i in normed:
            tensors += [*sums.pop(0), widen(ops[i].weight), widen(ops[i].bias)]
        tensors += [widen(ops[i].weight) for i in mixed]
        positions = [*pure, *normed, *mixed]
        kinds = tuple(type(ops[i]) for i in positions)
        outputs: dict[int, Tensor] = {}
        parts = []
        for i, op in enumerate(ops):
            if type(op) is SpatialSecondOrder:
                factor = None if gate is None else gate.to(self.wide.dtype).flatten(2)
                small = second_order(op, self.pooled(op.grid).flatten(2), factor)
                parts.append(Part.of({i: small.view(-1, 1, op.grid, op.grid)}, partial(_spread, self.x)))
            elif i not in positions:
                outputs[i] = op(self.x, gate)
        if outputs:
            parts.append(Part.of(outputs))
        if positions:
            parts.insert(0, Part(positions, SpatialMaps(kinds, self.x.shape[1], self.x.dtype), tensors, again=True))
        return parts

    def over_positions(self) -> tuple[Tensor, ...]:
        """The moments of each channel over H and W, and what else is in the plan."""
        if self._over_positions is None:
            # A compiler fuses the formulas and chooses what to keep; functions of autograd are in its way.
            take = position_statistics if torch.compiler.is_compiling() else PositionStatistics.apply
            self._over_positions = take(self._plan, self.wide)
        return self._over_positions

    def pooled(self, grid: int) -> Tensor:
        """x averaged over grid x grid windows: (B, C, grid, grid)."""
        height, width = self.x.shape[2:]
        if grid == self._plan.grid:
            return self.over_positions()[5]
        if (height, width) == (grid, grid):
            return self.wide
        if height % grid == width % grid == 0:
            return F.avg_pool2d(self.wide, (height // grid, width // grid))
        with torch.autocast(self.x.device.type, enabled=False):  # it is two products
            return adaptive_avg_pool(self.wide, grid, grid)


def _spread(x: Tensor, grid: Tensor) -> Tensor:
    """(..., h, w) pooled adaptively to the H and W of x, in its dtype. To a multiple of h and w it repeats values."""
    (h, w), (height, width) = grid.shape[-2:], x.shape[2:]
    grid = grid.to(x.dtype)
    if height % h or width % w:
        return pool_to(grid.flatten(0, -4), x).view(*grid.shape[:-2], height, width)
    if (h, w) == (height, width):
        return grid
    lead = grid.shape[:-2]
    return grid[..., :, None, :, None].expand(*lead, h, height // h, w, width // w).reshape(*lead, height, width)


def _worth_sharing(ops: Sequence[Any]) -> bool:
    return sum(type(op) in OF_MOMENTS for op in ops) > 1


def _rate(eps: float, var: Tensor, gate: Tensor | None) -> Tensor:
    """What normalises each channel of gate * x, whose variance is gate^2 var, times the gate itself."""
    return torch.rsqrt(var + eps) if gate is None else gate * torch.rsqrt(gate * gate * var + eps)
