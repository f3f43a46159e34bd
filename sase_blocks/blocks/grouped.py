"""Blocks with a separate spatial gate for each group of channels: SGE (arXiv 1905.09646), EMA (arXiv 2305.13563)."""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sase_blocks.checks import check_groups
from sase_blocks.numerics import narrow, safe_sqrt, widen
from sase_blocks.ops import Conv2d

from .base import AttentionModule
from .graph import MAP, Edge, Graph

GROUPS = 'G x H x W'


@torch.fx.wrap
def check_multiple(x: Tensor, multiple: int) -> None:
    """Raise unless the channels of ``x`` are a multiple of ``multiple``."""
    if x.shape[1] % multiple != 0:
        raise ValueError(
            f'expected a multiple of {multiple} channels, which are grouped, got {x.shape[1]}; '
            f'prune to such a multiple (round_to={multiple} in torch-pruning)'
        )


@torch.fx.wrap
def group_similarity(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Similarity of each position's vector to its group's mean, normalised over the positions. -> (B, G, H, W)."""
    grouped = widen(x).unflatten(1, (groups, x.shape[1] // groups))
    c = (grouped * grouped.mean((3, 4), keepdim=True)).sum(2)
    var, mean = torch.var_mean(c, dim=(2, 3), correction=0, keepdim=True)
    c = (c - mean) / (safe_sqrt(var) + eps)
    return narrow(c * widen(weight).reshape(1, -1, 1, 1) + widen(bias).reshape(1, -1, 1, 1), x)


class SpatialGroupEnhance(AttentionModule):
    """Spatial group-wise enhance (arXiv 1905.09646, section 3): y = x * sigmoid(a), one gate per group and position.

    The scale starts at 0 and the shift at 1, as in the authors' code.

    Args:
        channels: C, at least 1.
        groups: G, a divisor of C. Default: 64, the paper's choice for ResNets, or the greatest common divisor of C and
            64.
        feat_size: ignored; all blocks accept it.
        device, dtype: of the parameters.

    Raises:
        ValueError: bad channels or groups; in ``forward`` another rank or number of channels.
    """

    per_channel: ClassVar[dict[str, int]] = {'weight': 0, 'bias': 0}

    def __init__(
        self,
        channels: int,
        feat_size: Any = None,
        *,
        groups: int | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(channels)
        groups = math.gcd(channels, 64) if groups is None else check_groups(groups, channels, type(self).__name__)
        self.weight = nn.Parameter(torch.empty(groups, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(groups, device=device, dtype=dtype))
        self.eps = 1e-5
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.ones_(self.bias)

    def channel_multiple(self) -> int:
        return self.channels // self.weight.shape[0]

    def gate(self, x: Tensor) -> Tensor:
        groups = self.weight.shape[0]
        check_multiple(x, groups)
        a = torch.sigmoid(group_similarity(x, groups, self.weight, self.bias, self.eps))
        return a.repeat_interleave(x.shape[1] // groups, 1)

    def graph(self) -> Graph:
        nodes = {'x': MAP, 'g': 'C x 1 x 1', 'c': GROUPS, 'a': GROUPS, 'y': MAP}
        edges = (
            Edge('x', 'g', 'avg'),
            Edge('g', 'c', 'dot product in each group'),
            Edge('x', 'c'),
            Edge('c', 'a', 'normalise, affine'),
            Edge('a', 'y'),
            Edge('x', 'y'),
        )
        return Graph(nodes, edges, 'y = x * sigmoid(affine(normalise(x . avg(x))))')


@torch.fx.wrap
def instance_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Normalise each sample's channels to mean 0, variance 1 over the positions, then affine. weight, bias: (C,)."""
    wide = widen(x)
    var, mean = torch.var_mean(wide, dim=(2, 3), correction=0, keepdim=True)
    normed = (wide - mean) * torch.rsqrt(var + eps)
    return narrow(normed * widen(weight).reshape(1, -1, 1, 1) + widen(bias).reshape(1, -1, 1, 1), x)


class EfficientMultiScaleAttention(AttentionModule):
    """Efficient multi-scale attention (arXiv 2305.13563, section 3): y = x * sigmoid(s_1 + s_2).

    All G groups of C / G channels share their weights. Each has a strip branch u = norm(x * sigmoid(F(h)) *
    sigmoid(F(w))) with a shared 1x1 convolution F, and v = 3x3 convolution of x. Then s_1 = softmax(avg(u)) . v and s_2
    = softmax(avg(v)) . u.

    Args:
        channels: C, at least 1.
        groups: G, a divisor of C. Default: 32 as in the authors' code, or the greatest common divisor of C and 32.
        feat_size: ignored; all blocks accept it.
        device, dtype: of the parameters.

    Raises:
        ValueError: bad channels or groups; in ``forward`` another rank or number of channels.
    """

    def __init__(
        self,
        channels: int,
        feat_size: Any = None,
        *,
        groups: int | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(channels)
        kwargs: dict[str, Any] = {'device': device, 'dtype': dtype}
        groups = math.gcd(channels, 32) if groups is None else check_groups(groups, channels, type(self).__name__)
        width = channels // groups
        self.conv1x1 = nn.Conv1d(width, width, 1, **kwargs)
        self.conv3x3 = Conv2d(width, width, 3, padding=1, **kwargs)
        self.norm_weight = nn.Parameter(torch.empty(width, **kwargs))
        self.norm_bias = nn.Parameter(torch.empty(width, **kwargs))
        self.eps = 1e-5
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.ones_(self.norm_weight)
        nn.init.zeros_(self.norm_bias)

    def channel_multiple(self) -> int:
        return self.conv3x3.weight.shape[1]

    def gate(self, x: Tensor) -> Tensor:
        b, channels, height, width = x.shape
        size = self.conv3x3.weight.shape[1]
        check_multiple(x, size)
        groups = channels // size
        x = x.reshape(b * groups, size, height, width)
        strips = torch.sigmoid(self.conv1x1(torch.cat([x.mean(3), x.mean(2)], 2)))
        u = x * (strips[:, :, :height].unsqueeze(3) * strips[:, :, height:].unsqueeze(2))
        u = instance_norm(u, self.norm_weight, self.norm_bias, self.eps)
        v = self.conv3x3(x)
        s = (torch.softmax(u.mean((2, 3), keepdim=True), 1) * v).sum(1, keepdim=True)
        s = s + (torch.softmax(v.mean((2, 3), keepdim=True), 1) * u).sum(1, keepdim=True)
        gate = torch.sigmoid(s).reshape(b, groups, height, width)
        return gate.repeat_interleave(size, 1)

    def graph(self) -> Graph:
        nodes = {'x': MAP, 'h, w': 'C x (H + W)', 'u': MAP, 'v': MAP, 's': GROUPS, 'y': MAP}
        edges = (
            Edge('x', 'h, w', 'means over W and H'),
            Edge('h, w', 'u', 'conv1x1, gate x, norm'),
            Edge('x', 'v', 'conv3x3'),
            Edge('u', 's', 'softmax(avg) . v'),
            Edge('v', 's', 'softmax(avg) . u'),
            Edge('s', 'y'),
            Edge('x', 'y'),
        )
        return Graph(nodes, edges, 'y = x * sigmoid(softmax(avg(u)) . v + softmax(avg(v)) . u), in each group')
