"""Mixed local channel attention, MLCA (doi 10.1016/j.engappai.2023.106442): ECA on a grid of cells and on their mean.

As in the authors' code, the local convolution runs along the channels of one cell after the other, so that the last
channels of a cell also read the first ones of the next. Difference: the kernel size is at least 3, as in ``eca``.
"""

from typing import Any

import torch
from torch import Tensor, nn

from sase_blocks.checks import check_int, check_share
from sase_blocks.ops.channel_excite import eca_kernel_size
from sase_blocks.ops.primitive import adaptive_avg_pool

from .base import AttentionModule
from .graph import CHANNEL, MAP, Edge, Graph

torch.fx.wrap('adaptive_avg_pool')  # must be wrapped in each module that calls it


class MixedLocalChannelAttention(AttentionModule):
    """Mixed local channel attention, MLCA (Wan et al., Engineering Applications of AI 2023, section 3.1).

    y = x * unpool((1 - w) sigmoid(conv_1(q)) + w sigmoid(conv_2(l))). l are the means of s x s cells, as in adaptive
    average pooling, and q is the mean of l. Unpooling is adaptive average pooling from s x s to H x W. The convolutions
    run along the channels and have no biases.

    Args:
        channels: C, at least 1.
        local_size: s, the cells of a row or column.
        local_weight: w, from 0 to 1.
        kernel_size: of the convolutions, odd, or by default the odd number near (log2(C) + beta) / gamma, at least 3.
        gamma, beta: see ``kernel_size``.
        feat_size: ignored; all blocks accept it.
        device, dtype: of the parameters.

    Raises:
        ValueError: bad channels or options; in ``forward`` another rank or number of channels.
    """

    def __init__(
        self,
        channels: int,
        feat_size: Any = None,
        *,
        local_size: int = 5,
        local_weight: float = 0.5,
        kernel_size: int | None = None,
        gamma: int = 2,
        beta: int = 1,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(channels)
        name = type(self).__name__
        self.local_size = check_int(local_size, 'local_size', name)
        self.local_weight = check_share(local_weight, 'local_weight', name)
        k = eca_kernel_size(channels, kernel_size, gamma, beta, name)
        kwargs: dict[str, Any] = {'padding': k // 2, 'bias': False, 'device': device, 'dtype': dtype}
        self.conv_global = nn.Conv1d(1, 1, k, **kwargs)
        self.conv_local = nn.Conv1d(1, 1, k, **kwargs)

    def gate(self, x: Tensor) -> Tensor:
        size = self.local_size
        cells = adaptive_avg_pool(x, size, size)  # (B, C, s, s)
        q = self.conv_global(cells.mean((2, 3)).unsqueeze(1)).transpose(1, 2).unsqueeze(3)
        rows = self.conv_local(cells.flatten(2).transpose(1, 2).flatten(1).unsqueeze(1))  # (B, 1, s s C)
        z = rows.reshape(-1, size * size, x.shape[1]).transpose(1, 2).unflatten(2, (size, size))
        mixed = torch.lerp(torch.sigmoid(q).expand_as(z), torch.sigmoid(z), self.local_weight)
        return adaptive_avg_pool(mixed, x.shape[2], x.shape[3])

    def graph(self) -> Graph:
        cells = f'C x {self.local_size} x {self.local_size}'
        nodes = {'x': MAP, 'l': cells, 'q': CHANNEL, 'a_l': cells, 'a_g': CHANNEL, 'a': MAP, 'y': MAP}
        edges = (
            Edge('x', 'l', 'local avg'),
            Edge('l', 'q', 'avg'),
            Edge('l', 'a_l', 'conv, sigmoid'),
            Edge('q', 'a_g', 'conv, sigmoid'),
            Edge('a_l', 'a', 'mix, unpool'),
            Edge('a_g', 'a'),
            Edge('a', 'y'),
            Edge('x', 'y'),
        )
        return Graph(nodes, edges, 'y = x * unpool((1 - w) * sigmoid(conv(q)) + w * sigmoid(conv(l)))')

    def extra_repr(self) -> str:
        return f'{self.channels}, local_size={self.local_size}, local_weight={self.local_weight}'
