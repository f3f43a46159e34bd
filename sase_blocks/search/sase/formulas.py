"""What the squeezes make of the statistics in ``moments.py``, and the gradients of the spatial ones written out. Ours.

Spatial squeezes work on maps of many positions, where what costs is fresh memory for every step and the graph of the
steps. So their gradients are written out, step by step in place. A second derivative goes through the formulas.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sase_blocks.numerics import safe_sqrt
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
    SpatialL2Norm,
    SpatialPNorm,
)
from sase_blocks.ops.primitive import mix
from sase_blocks.ops.spatial_squeeze import resize_map

from .parts import Gradients

__all__ = ['BESIDE_MEAN', 'OF_MOMENTS', 'PURE', 'SpatialMaps', 'beside_mean', 'channel_l2']

TINY = 1e-30  # what safe_sqrt adds


def fourth_power_sum(stats: Sequence[Tensor], n: int) -> Tensor:
    """The sum of fourth powers from the mean and the central moments."""
    mean, second, third, fourth = stats[:4]
    square = mean * mean
    # Products and sums apart: on a CPU torch.addcmul is several times as slow as both.
    total = torch.add(fourth, mean * third, alpha=4)
    return (total + square * torch.add(square, second, alpha=6)) * n


def p_norm(stats: Sequence[Tensor], n: int) -> Tensor:
    return safe_sqrt(safe_sqrt(fourth_power_sum(stats, n)))


def deviation(stats: Sequence[Tensor], n: int) -> Tensor:
    return safe_sqrt(stats[1] * (n / max(n - 1, 1)))


def channel_l2(stats: Sequence[Tensor], weight: Tensor, bias: Tensor, n: int, eps: float) -> Tensor:
    w, b = weight.view(-1, 1, 1), bias.view(-1, 1, 1)
    return safe_sqrt(n * (w * w * (stats[1] / (stats[1] + eps)) + b * b))


def spatial_l2(tensors: Sequence[Tensor], n: int) -> Tensor:
    total, squares, weight, bias = tensors
    if weight.shape != total.shape[2:]:
        weight, bias = resize_map(weight, total), resize_map(bias, total)
    # The sum of (weight * normed + bias)^2 as deviations from the mean and the mean: neither cancels.
    avg = total / n
    deviations = (squares - total * avg).clamp_min(0)
    shifted = weight * avg + bias
    return safe_sqrt(torch.add(weight * weight * deviations, shifted * shifted, alpha=n))


# What the moments give by themselves, and what is mixed with the mean, relu(w_0 mean + w_1 other). By the exact class:
# a subclass may compute another thing.
Formula = Callable[[Sequence[Tensor], int], Tensor]
PURE: dict[type, Formula] = {
    ChannelAvg: lambda stats, n: stats[0],
    SpatialAvg: lambda stats, n: stats[0],
    ChannelPNorm: p_norm,
    SpatialPNorm: p_norm,
}
BESIDE_MEAN: dict[type, Formula] = {
    ChannelAvgMax: lambda stats, n: stats[4],
    SpatialAvgMax: lambda stats, n: stats[4],
    ChannelAvgStd: deviation,
    SpatialAvgStd: deviation,
    ChannelAvgSkew: lambda stats, n: stats[2],
    SpatialAvgSkew: lambda stats, n: stats[2],
}
OF_MOMENTS = (*PURE, *BESIDE_MEAN, ChannelL2Norm)


def beside_mean(kinds: Sequence[type], stats: Sequence[Tensor], weights: Sequence[Tensor], n: int) -> Tensor:
    """The operations of ``BESIDE_MEAN`` at once: (operations, B, ...)."""
    others = torch.stack([BESIDE_MEAN[kind](stats, n) for kind in kinds])
    of_mean, of_other = torch.stack(tuple(weights)).view(-1, 2, 1, 1, 1, 1).unbind(1)
    return torch.relu(of_mean * stats[0] + of_other * others)


@dataclass
class SpatialMaps:
    """The maps that spatial squeezes make of their statistics: called with tensors, gives (operations, B, 1, H, W).

    ``kinds``: first those of ``PURE``, then at most one ``SpatialL2Norm``, then those of ``BESIDE_MEAN``. The tensors:
    the moments over C, five maps, if there are kinds other than the L2 norm; the L2 norm's two sums, weight and bias;
    the two weights of each of the others.
    """

    kinds: tuple[type, ...]
    channels: int
    dtype: torch.dtype

    def _split(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        normed = SpatialL2Norm in self.kinds
        begin = 5 if len(self.kinds) > normed else 0
        end = begin + 4 if normed else begin
        return list(tensors[:begin]), list(tensors[begin:end]), list(tensors[end:])

    def each(self, *tensors: Tensor) -> list[Tensor]:
        """The maps one by one."""
        stats, normed, weights = self._split(tensors)
        rest = iter(weights)
        maps = []
        for kind in self.kinds:
            if kind in PURE:
                found = PURE[kind](stats, self.channels)
            elif kind is SpatialL2Norm:
                found = spatial_l2(normed, self.channels)
            else:
                found = torch.relu(mix(stats[0], BESIDE_MEAN[kind](stats, self.channels), next(rest)))
            if self.dtype == torch.float16:
                found = found.clamp(-65504.0, 65504.0)
            maps.append(found.to(self.dtype))
        return maps

    def __call__(self, *tensors: Tensor) -> Tensor:
        return torch.stack(self.each(*tensors))

    def vjp(
        self, grad: Tensor, tensors: Sequence[Tensor], kept: Sequence[Tensor], needed: Sequence[bool]
    ) -> Gradients | None:
        """The gradients of the tensors, see ``gradients``."""
        found = self.gradients(list(grad.clone().unbind(0)), tensors)
        return None if found is None else [*found[1]]

    def weighted_vjp(
        self, grad: Tensor, weights: Tensor, tensors: Sequence[Tensor], kept: Sequence[Tensor], needed: Sequence[bool]
    ) -> Gradients | None:
        """The gradients of weights and tensors for that of the weighted sum of the maps."""
        found = self.gradients([grad * w for w in weights.to(grad.dtype).unbind(0)], tensors)
        if found is None:
            return None
        maps, grads = found
        if not needed[0]:
            return [None, *grads]
        return [torch.stack([_dot(grad, m) for m in maps]).to(weights.dtype), *grads]

    def gradients(self, grads: Sequence[Tensor], tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]] | None:
        """The maps, and the gradients of the tensors for those of the maps, in whose memory it works.

        None for half inputs and for maps of another size than the L2 norm was built for: these go through autograd.
        """
        stats, normed, weights = self._split(tensors)
        if tensors[0].dtype != self.dtype or (normed and normed[2].shape != normed[0].shape[2:]):
            return None
        n = self.channels
        into = [torch.zeros_like(t) for t in stats]
        maps, of_norm, of_weights = [], [], []
        rest = iter(weights)
        for kind, g in zip(self.kinds, grads, strict=True):
            if kind is SpatialAvg:
                into[0] += g
                maps.append(stats[0])
            elif kind is SpatialPNorm:
                maps.append(_p_norm_gradients(g, stats, n, into))
            elif kind is SpatialL2Norm:
                output, *of_norm = _l2_gradients(g, normed, n)
                maps.append(output)
            else:
                other = BESIDE_MEAN[kind](stats, n)
                first, second = next(rest).unbind(0)
                step = stats[0] * first
                output = torch.mul(other, second).add_(step).relu_()
                g *= torch.gt(output, 0, out=step)
                of_weights.append(torch.stack([_dot(g, stats[0]), _dot(g, other)]))
                into[0] += torch.mul(g, first, out=step)
                g *= second
                if kind is SpatialAvgStd:
                    into[1].add_(g.div_(other), alpha=0.5 * n / max(n - 1, 1))
                else:
                    into[4 if kind is SpatialAvgMax else 2] += g
                maps.append(output)
        return maps, [*into, *of_norm, *of_weights]


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.dot(a.flatten(), b.flatten())


def _p_norm_gradients(g: Tensor, stats: Sequence[Tensor], n: int, into: Sequence[Tensor]) -> Tensor:
    """Adds the gradients of ``p_norm`` for the moments to ``into``; -> the p-norm."""
    mean, second, third, fourth = stats[:4]
    square = mean * mean
    step = torch.add(square, second, alpha=6).mul_(square)
    total = torch.mul(mean, third).mul_(4).add_(fourth).add_(step).mul_(n)
    root = total.add_(TINY).sqrt_()
    norm = torch.add(root, TINY, out=step).sqrt_()
    g.div_(root.mul_(norm)).mul_(n / 4)
    into[3].add_(g)
    into[2].add_(torch.mul(mean, g, out=root), alpha=4)
    into[1].add_(torch.mul(square, g, out=root), alpha=6)
    torch.add(square, second, alpha=3, out=root).mul_(mean).add_(third)
    into[0].add_(root.mul_(g), alpha=4)
    return norm


def _l2_gradients(g: Tensor, tensors: Sequence[Tensor], n: int) -> tuple[Tensor, ...]:
    """``spatial_l2`` and its gradients for its four tensors."""
    total, squares, weight, bias = tensors
    avg = total * (1 / n)
    deviations = torch.mul(total, avg).neg_().add_(squares).clamp_min_(0)
    shifted = (weight * avg).add_(bias)
    step = shifted * shifted
    norm = torch.mul(deviations, weight * weight).add_(step, alpha=n).add_(TINY).sqrt_()
    g.div_(norm).mul_(0.5)
    g_shifted = shifted.mul_(g).mul_(2 * n)
    g_weight = torch.mul(deviations, g, out=step).sum((0, 1)).mul_(2 * weight)
    g_weight += torch.mul(g_shifted, avg, out=step).sum((0, 1))
    inside = torch.gt(deviations, 0, out=step)
    g_squares = g.mul_(weight * weight).mul_(inside)
    # total is in avg = total / n, and beside it in total * avg.
    g_total = torch.mul(g_shifted, weight, out=deviations).mul_(1 / n).sub_(avg.mul_(g_squares), alpha=2)
    return norm, g_total, g_squares, g_weight, g_shifted.sum((0, 1))
