"""The operations of a mixed edge in one pass over what they read; the results are those of each called by itself. Ours.

- the squeezes of x share its statistics (``moments.py``). The gated map ``gate * x`` needs none over (H, W) of its
  own: its mean is ``gate * m``, its variance ``gate^2 * v``.
- the second-order squeezes of both spatial edges share their pooling, which commutes with the gate.
- excitations that convolve the same small tensor are one convolution (``convolutions.py``).
- what is computed from small tensors is not kept but computed again in the backward pass (``parts.py``).

The perceptron, the affine ones, whatever is not of the paper's sets, and any subclass is called by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sase_blocks.ops import (
    ChannelL2Norm,
    ChannelSecondOrder,
    SpatialL2Norm,
    SpatialSecondOrder,
)
from sase_blocks.ops.normalization import BatchNorm2d
from sase_blocks.ops.primitive import (
    adaptive_avg_pool,
    contract_rows,
    narrow,
    widen,
)
from sase_blocks.ops.spatial_squeeze import pool_to

from .moments import (
    OF_MOMENTS,
    ChannelMoments,
    Formula,
    Plan,
    SpatialStatistics,
    channel_l2,
    moments,
    spatial_l2,
    spatial_statistics,
)
from .parts import Part, Recomputed, alone

__all__ = ['SharedSqueezes']


class SharedSqueezes:
    """The squeezes of one feature map x (B, C, H, W)."""

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self.wide = widen(x)
        self._over_positions: tuple[Tensor, ...] | None = None
        self._pooled: dict[int, Tensor] = {}

    def channel(self, ops: Sequence[Any]) -> list[Part]:
        """What the channel squeezes give for x: (B, C, 1, 1) each."""
        n = self.x.shape[2] * self.x.shape[3]
        shared = _worth_sharing(ops)
        outputs = []
        for op in ops:
            if shared and type(op) in OF_MOMENTS:
                weights = [widen(p) for p in op.parameters()]
                formula = partial(channel_l2, eps=op.eps) if type(op) is ChannelL2Norm else OF_MOMENTS[type(op)]
                output = narrow(formula(self.over_positions(), weights, n), self.x)
            elif type(op) is ChannelSecondOrder and self.x.shape[1] % op.groups == 0:
                members = self.x.shape[1] // op.groups
                z = self.wide.flatten(2).unflatten(1, (op.groups, members)).sum(2) * (1 / members)
                output = _second_order(op, z, again=False).to(self.x.dtype)[:, :, None, None]
            else:
                output = op(self.x)
            outputs.append(output)
        return alone(outputs)

    def spatial(
        self, gated_ops: Sequence[Any], gate: Tensor, plain_ops: Sequence[Any]
    ) -> tuple[list[Part], list[Part]]:
        """What the first squeezes give for ``gate * x`` and the others for x: (B, 1, H, W) each."""
        wide_gate = gate.to(self.wide.dtype)
        edges = ((gated_ops, wide_gate), (plain_ops, None))
        norms = [(op, factor) for ops, factor in edges for op in ops if type(op) is SpatialL2Norm]
        plan = Plan(_worth_sharing(gated_ops), _worth_sharing(plain_ops), bool(norms))
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
        parts, positions = [], []
        recipe: list[tuple[Formula, int, int, int]] = []
        tensors = [*stats]
        for i, op in enumerate(ops):
            if type(op) is SpatialL2Norm or (stats and type(op) in OF_MOMENTS):
                weights = [widen(p) for p in op.parameters()]
                if type(op) is SpatialL2Norm:
                    recipe.append((spatial_l2, len(tensors), 2, len(weights)))
                    tensors += sums.pop(0)
                else:
                    recipe.append((OF_MOMENTS[type(op)], len(tensors), 0, len(weights)))
                tensors += weights
                positions.append(i)
            elif type(op) is SpatialSecondOrder:
                pooled = self.pooled(op.grid)
                pooled = pooled if gate is None else pooled * gate.to(pooled.dtype)
                small = _second_order(op, pooled.flatten(2).transpose(1, 2), again=True)
                small = small.reshape(-1, 1, op.grid, op.grid)
                same = small.shape[2:] == self.x.shape[2:]
                parts.append(Part.of(i, small.to(self.x.dtype) if same else pool_to(small, self.x)))
            else:
                parts.append(Part.of(i, op(self.x, gate)))
        if positions:
            function = partial(_spatial_maps, tuple(recipe), self.x.shape[1], self.x.dtype)
            parts.insert(0, Part(positions, function, tensors, again=True))
        return parts

    def over_positions(self) -> tuple[Tensor, ...]:
        """The moments of each channel over H and W."""
        if self._over_positions is None:
            # A compiler fuses the formulas and chooses what to keep; functions of autograd are in its way.
            compiling = torch.compiler.is_compiling()
            self._over_positions = moments((2, 3), self.wide, None) if compiling else ChannelMoments.apply(self.wide)
        return self._over_positions

    def pooled(self, grid: int) -> Tensor:
        """x averaged over grid x grid windows: (B, C, grid, grid)."""
        if grid not in self._pooled:
            height, width = self.x.shape[2:]
            if height % grid or width % grid:
                self._pooled[grid] = adaptive_avg_pool(self.wide, grid, grid)
            elif (height, width) == (grid, grid):
                self._pooled[grid] = self.wide
            else:
                self._pooled[grid] = F.avg_pool2d(self.wide, (height // grid, width // grid))
        return self._pooled[grid]


def _spatial_maps(
    recipe: Sequence[tuple[Formula, int, int, int]], channels: int, dtype: torch.dtype, *tensors: Tensor
) -> Tensor:
    """The maps of an edge from its statistics. Of each formula: where its tensors start, how many sums and weights."""
    maps = []
    for formula, start, sums, weights in recipe:
        stats = tensors[start : start + sums] or tensors[:5]
        maps.append(formula(stats, tensors[start + sums : start + sums + weights], channels))
    stack = torch.stack(maps)
    return stack.clamp(-65504.0, 65504.0).to(dtype) if dtype == torch.float16 else stack.to(dtype)


def _worth_sharing(ops: Sequence[Any]) -> bool:
    return sum(type(op) in OF_MOMENTS for op in ops) > 1


def _rate(eps: float, var: Tensor, gate: Tensor | None) -> Tensor:
    """What normalises each channel of gate * x, whose variance is gate^2 var, times the gate itself."""
    return torch.rsqrt(var + eps) if gate is None else gate * torch.rsqrt(gate * gate * var + eps)


def _second_order(op: Any, z: Tensor, again: bool) -> Tensor:
    """What the second-order squeezes do with their N averages z (B, N, P): the linear map of N normed rows.

    The values of a spatial one's 8 x 8 grid, those of a channel one's groups of channels. again: compute the rows again
    for the backward pass.
    """
    norm = op.norm
    ours = type(norm) is BatchNorm2d and norm.training and norm.track_running_stats and norm.momentum is not None
    if ours and not torch.compiler.is_compiling() and z.numel() > z.shape[1] ** 2 and z.shape[1] > 1:
        inputs = (z, op.row_weight, norm.weight, norm.bias)
        function = partial(_contracted, norm.eps, [norm])
        q = Recomputed.apply(function, *inputs) if again else function(*inputs)
    else:
        q = contract_rows(norm(_covariance(z).unsqueeze(3)).squeeze(3), op.row_weight)
    return op.fc(torch.relu(q))


def _covariance(z: Tensor) -> Tensor:
    """(B, N, P) -> (B, N, N), divided by N - 1. In fp32 the product needs no scaling, and keeps one factor.

    Here and below sums are scaled behind, and minus signs are on the small tensors: the gradients of means and of
    differences are maps otherwise, and fresh memory is what costs.
    """
    z = z + z.sum(2, keepdim=True) * (-1 / z.shape[2])
    with torch.autocast(z.device.type, enabled=False):
        return torch.baddbmm(z.new_zeros(()), z, z.transpose(1, 2), beta=0, alpha=1 / max(z.shape[1] - 1, 1))


def _contracted(
    eps: float, to_update: list[BatchNorm2d], z: Tensor, row_weight: Tensor, weight: Tensor, bias: Tensor
) -> Tensor:
    """``contract_rows`` of the normed covariance: the norm is affine, so it can come behind. -> (B, N).

    ``to_update`` holds the norm whose running statistics are to be moved, and is empty when this is computed again.
    """
    rows = _covariance(z)
    n = rows.numel() // rows.shape[1]
    mean = rows.sum((0, 2)) * (1 / n)
    centred = rows + (-mean)[:, None]
    var = (centred * centred).sum((0, 2)) * (1 / n)
    for norm in (to_update.pop() for _ in to_update[:]):
        with torch.no_grad():
            norm.num_batches_tracked.add_(1)  # type: ignore[union-attr]
            for running, new in ((norm.running_mean, mean), (norm.running_var, var * (n / (n - 1)))):
                running.lerp_(new.to(running.dtype), norm.momentum)  # type: ignore[union-attr,arg-type]
    kernel = row_weight.to(rows.dtype)
    scale = weight.to(rows.dtype) * torch.rsqrt(var + eps)
    contracted = scale * (centred * kernel).sum(2) + bias.to(rows.dtype) * kernel.sum(1)
    return contracted.to(weight.dtype)
