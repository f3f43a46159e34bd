"""Selective kernel convolution, SKNet (arXiv 1903.06586): each channel chooses between convolutions of several sizes.

In SKNet it replaces the 3x3 convolution of a ResNeXt bottleneck. Here it is a block that keeps the shape. It is not a
gate, because its result is a new map. Difference from the authors' code: torch's initialisation of the layers.
"""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sase_blocks.checks import check_groups, check_int, check_reduction
from sase_blocks.ops import BatchNorm2d, Conv2d, Linear
from sase_blocks.ops.primitive import BOTH

from .base import AttentionModule, fade_map
from .graph import CHANNEL, MAP, Edge, Graph

torch.fx.wrap('fade_map')  # must be wrapped in each module that calls it


class SelectiveKernel(AttentionModule):
    """Selective kernel convolution, SKNet (arXiv 1903.06586, eq. 1 to 6): y = a_1 u_1 + ... + a_M u_M.

    u_i is a grouped 3x3 convolution of x with dilation i, batch norm and a ReLU, a kernel of size 2 i + 1. For each
    channel, (a_1, ..., a_M) is a softmax of linear layers of z = relu(norm(W avg(u_1 + ... + u_M))). The layers have no
    biases.

    Args:
        channels: C, at least 1.
        num_paths: M, at least 2.
        groups: G of the convolutions, a divisor of C. Default: 32, or the greatest common divisor of C and 32.
        reduction: r, from 1 to C (to 16 for fewer channels). The width of z is C // r, at least ``min_rd_channels``.
        min_rd_channels: L, at least 1.
        feat_size: ignored; all blocks accept it.
        device, dtype: of the parameters.

    Raises:
        ValueError: bad channels or options; in ``forward`` another rank or number of channels.
    """

    per_channel: ClassVar[dict[str, int]] = {'paths': BOTH, 'fc': 1, 'select': 0}

    def __init__(
        self,
        channels: int,
        feat_size: Any = None,
        *,
        num_paths: int = 2,
        groups: int | None = None,
        reduction: int = 16,
        min_rd_channels: int = 32,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(channels)
        name = type(self).__name__
        kwargs: dict[str, Any] = {'device': device, 'dtype': dtype}
        groups = math.gcd(channels, 32) if groups is None else check_groups(groups, channels, name)
        hidden = channels // check_reduction(reduction, channels, name)
        hidden = max(hidden, check_int(min_rd_channels, 'min_rd_channels', name))
        paths = range(1, check_int(num_paths, 'num_paths', name, 2) + 1)
        self.paths = nn.ModuleList(
            nn.Sequential(
                Conv2d(channels, channels, 3, padding=d, dilation=d, groups=groups, bias=False, **kwargs),
                BatchNorm2d(channels, **kwargs),
                nn.ReLU(),
            )
            for d in paths
        )
        self.fc = Linear(channels, hidden, bias=False, **kwargs)
        self.norm = BatchNorm2d(hidden, **kwargs)
        self.select = nn.ModuleList(Linear(hidden, channels, bias=False, **kwargs) for _ in paths)

    def current_channels(self) -> int:
        weight: Tensor = self.select[0].weight  # type: ignore[assignment]
        return weight.shape[0]

    def channel_multiple(self) -> int:
        conv: Any = self.paths[0][0]  # type: ignore[index]
        return 1 if conv.groups == 1 else conv.weight.shape[1]

    def reset_parameters(self) -> None:
        for module in self.modules():
            if isinstance(module, (Conv2d, BatchNorm2d, Linear)):
                module.reset_parameters()

    def branches(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """The maps u_i (B, C, H, W) of a checked x, and the weights a (B, M, C, 1, 1)."""
        maps = [path(x) for path in self.paths]
        q = torch.stack([u.mean((2, 3)) for u in maps]).sum(0)
        z = torch.relu(self.norm(self.fc(q)))
        a = torch.softmax(torch.stack([fc(z) for fc in self.select], 1), 1)
        return maps, a[:, :, :, None, None]

    def gate(self, x: Tensor) -> Tensor:
        """The weight of the largest kernel (B, C, 1, 1), for the pictures."""
        return self.branches(x)[1][:, -1]

    def attend(self, x: Tensor) -> Tensor:
        maps, a = self.branches(x)
        y = maps[0] * a[:, 0]
        for i in range(1, len(maps)):
            y = y + maps[i] * a[:, i]
        return y.to(x.dtype)

    def faded(self, x: Tensor, alpha: Tensor | None) -> Tensor:
        return fade_map(x, self.attend(x), alpha)

    def graph(self) -> Graph:
        maps = [f'u{i + 1}' for i in range(len(self.paths))]
        nodes = {'x': MAP, **dict.fromkeys(maps, MAP), 'q': CHANNEL, 'a': f'{len(maps)} x C x 1 x 1', 'y': MAP}
        edges = []
        for i, u in enumerate(maps):
            size = 'conv3x3' if i == 0 else f'conv3x3, dilation {i + 1}'
            edges += [Edge('x', u, f'{size}, norm, relu'), Edge(u, 'q', 'avg'), Edge(u, 'y')]
        edges += [Edge('q', 'a', 'mlp, softmax'), Edge('a', 'y')]
        formula = ' + '.join(f'a{i + 1} * {u}' for i, u in enumerate(maps))
        return Graph(nodes, tuple(edges), f'y = {formula}, a = softmax(mlp(avg({" + ".join(maps)})))')
