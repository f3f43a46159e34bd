"""Shuffle attention, SA-Net (arXiv 2102.00240): in each group, one half of the channels is gated along the channels and
the other half along the positions, and a channel shuffle mixes the groups.

Differences from the authors' code: the number of groups has a default for every even width, and the norm runs in fp32
for fp16 and bf16.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from sase_blocks.checks import check_int
from sase_blocks.ops import channel_affine

from .base import AttentionModule, fade_map
from .graph import MAP, Edge, Graph
from .grouped import check_multiple, instance_norm

for _function in ('check_multiple', 'fade_map', 'instance_norm'):
    torch.fx.wrap(_function)  # must be wrapped in each module that calls it

HALF_MAP, HALF_CHANNEL = 'C/2 x H x W', 'C/2 x 1 x 1'


class ShuffleAttention(AttentionModule):
    """Shuffle attention, SA-Net (arXiv 2102.00240, eq. 2 to 6): y = shuffle(x * sigmoid([a_c, a_s])), in each group.

    For the halves x_1 and x_2 of a group, a_c = w_1 avg(x_1) + b_1 and a_s = w_2 norm(x_2) + b_2. All groups share
    their weights, and the norm is an instance norm. The shuffle interleaves the first and the last C / 2 channels. The
    weights start at 0 and the biases at 1, as in the authors' code.

    Args:
        channels: C, even.
        groups: G, with C a multiple of 2 G. Default: 64 as in the authors' code, or half of the greatest common divisor
            of C and 128.
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
        name, kwargs = type(self).__name__, {'device': device, 'dtype': dtype}
        if channels % 2:
            raise ValueError(f'{name} splits its channels in halves and needs an even number of them, got {channels}')
        groups = math.gcd(channels, 128) // 2 if groups is None else check_int(groups, 'groups', name)
        if channels % (2 * groups):
            raise ValueError(f'{name} needs 2 * groups to divide its {channels} channels, got groups={groups}')
        half = channels // (2 * groups)
        self.channel_weight = nn.Parameter(torch.empty(half, **kwargs))
        self.channel_bias = nn.Parameter(torch.empty(half, **kwargs))
        self.norm_weight = nn.Parameter(torch.empty(half, **kwargs))
        self.norm_bias = nn.Parameter(torch.empty(half, **kwargs))
        self.spatial_weight = nn.Parameter(torch.empty(half, **kwargs))
        self.spatial_bias = nn.Parameter(torch.empty(half, **kwargs))
        self.eps = 1e-5
        self.reset_parameters()

    def channel_multiple(self) -> int:
        return 2 * self.norm_weight.shape[0]

    def reset_parameters(self) -> None:
        for weight in (self.channel_weight, self.spatial_weight, self.norm_bias):
            nn.init.zeros_(weight)
        for bias in (self.channel_bias, self.spatial_bias, self.norm_weight):
            nn.init.ones_(bias)

    def gate(self, x: Tensor) -> Tensor:
        b, channels, height, width = x.shape
        half = self.norm_weight.shape[0]
        check_multiple(x, 2 * half)
        x = x.reshape(b * (channels // (2 * half)), 2 * half, height, width)
        c = channel_affine(x[:, :half].mean((2, 3), keepdim=True), self.channel_weight, self.channel_bias)
        s = instance_norm(x[:, half:], self.norm_weight, self.norm_bias, self.eps)
        s = channel_affine(s, self.spatial_weight, self.spatial_bias)
        return torch.cat([c.expand(-1, -1, height, width), s], 1).reshape(b, channels, height, width)

    def attend(self, x: Tensor) -> Tensor:
        return torch.channel_shuffle(x * self.gate(x).to(x.dtype), 2)

    def faded(self, x: Tensor, alpha: Tensor | None) -> Tensor:
        return fade_map(x, self.attend(x), alpha)

    def graph(self) -> Graph:
        nodes = {'x': MAP, 'x1': HALF_MAP, 'x2': HALF_MAP, 'q': HALF_CHANNEL, 's': HALF_MAP, 'z': MAP, 'y': MAP}
        edges = (
            Edge('x', 'x1', 'first halves'),
            Edge('x', 'x2', 'second halves'),
            Edge('x1', 'q', 'avg'),
            Edge('x2', 's', 'norm'),
            Edge('q', 'z', 'affine, sigmoid'),
            Edge('x1', 'z'),
            Edge('s', 'z', 'affine, sigmoid'),
            Edge('x2', 'z'),
            Edge('z', 'y', 'shuffle'),
        )
        return Graph(nodes, edges, 'y = shuffle([x1 * sigmoid(affine(avg(x1))), x2 * sigmoid(affine(norm(x2)))])')
