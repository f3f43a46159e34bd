"""Spatial and channel synergistic attention, SCSA (arXiv 2407.05128): gates from strips, then between the channels.

The spatial part (SMSA) gates rows and columns. The channel part (PCSA) is a self-attention between the channels of the
gated map, on means over windows. Differences from the authors' code, with equal results: values are averaged before the
attention instead of after it, and maps smaller than a window have one window. The attention map has C x C / num_heads
values for each image, whatever the image's size.
"""

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sase_blocks.checks import check_int, check_kernel_size
from sase_blocks.numerics import narrow, widen
from sase_blocks.ops import GroupNorm

from .graph import CHANNEL, MAP, Edge, Graph
from .strip import COLUMNS, ROWS, RowsTimesColumns


def window_matrix(size: int, window: int, like: Tensor) -> Tensor:
    """Means over windows, without a rest of less than a window, as a matrix with a row for each window and one of 0.

    A size below ``window`` has one window. The row of 0 keeps their number above 1, which compilers and export would
    treat as a case of its own.
    """
    rows = max(size // window, 1) + 1
    i = torch.arange(rows, device=like.device)[:, None]
    j = torch.arange(size, device=like.device)[None, :]
    inside = ((j // window == i) & ((i == 0) | ((i + 1) * window <= size))).to(like.dtype)
    return inside / inside.sum(1, keepdim=True).clamp_min(1)


@torch.fx.wrap
def channel_attention(
    z: Tensor,
    window: int,
    heads: int,
    norm_weight: Tensor,
    norm_bias: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    eps: float,
) -> Tensor:
    """sigmoid of the mean of softmax(q k^T / sqrt(C / heads)) v over the positions, (B, C, H, W) -> (B, C, 1, 1).

    q, k and v are the means over windows, layer-normalised over channels and positions, times a vector (C,) each.
    """
    rows, columns = window_matrix(z.shape[2], window, z), window_matrix(z.shape[3], window, z)
    y = widen(rows @ z @ columns.transpose(0, 1)).flatten(2)  # (B, C, N)
    real = (widen(rows).sum(1)[:, None] * widen(columns).sum(1)).flatten()  # 1, or 0 where there is no window
    n = real.sum()
    y = (y - y.sum((1, 2), keepdim=True) / (y.shape[1] * n)) * real
    y = y * torch.rsqrt(y.square().sum((1, 2), keepdim=True) / (y.shape[1] * n) + eps)
    y = (y * widen(norm_weight)[:, None] + widen(norm_bias)[:, None]) * real
    size = z.shape[1] // heads
    q = (y * (widen(query)[:, None] / math.sqrt(size))).unflatten(1, (heads, size))
    k = (y * widen(key)[:, None]).unflatten(1, (heads, size))
    v = (y.sum(2) / n * widen(value)).reshape(-1, heads, size, 1)
    attention = torch.softmax(q @ k.transpose(2, 3), 3)
    return narrow(torch.sigmoid((attention @ v).reshape(-1, z.shape[1], 1, 1)), z)


class SynergisticAttention(RowsTimesColumns):
    """Spatial and channel synergistic attention, SCSA (arXiv 2407.05128, section 3): y = z * c(z), z = x * a_h * a_w.

    a_h and a_w are sigmoid(GroupNorm(convolutions)) of the means over W and over H. Each quarter of the channels has
    depthwise convolutions of another size, which rows and columns share. c is sigmoid of the mean result of a
    self-attention between the channels of z, whose tokens are layer-normalised means over windows.

    Args:
        channels: C, a multiple of 4.
        num_heads: of the self-attention, a divisor of C.
        window_size: height and width of the windows. A shorter axis is one window, and a rest at the end is left out.
        kernel_sizes: of the four convolutions, odd.
        feat_size: ignored; all blocks accept it.
        device, dtype: of the parameters.

    Raises:
        ValueError: bad channels or options; in ``forward`` another rank or number of channels.
    """

    per_channel: ClassVar[dict[str, int]] = dict.fromkeys(
        ('norm_h', 'norm_w', 'norm_weight', 'norm_bias', 'query', 'key', 'value'), 0
    )

    def __init__(
        self,
        channels: int,
        feat_size: Any = None,
        *,
        num_heads: int = 1,
        window_size: int = 7,
        kernel_sizes: tuple[int, int, int, int] = (3, 5, 7, 9),
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(channels)
        name = type(self).__name__
        kwargs: dict[str, Any] = {'device': device, 'dtype': dtype}
        if channels % 4:
            raise ValueError(f'{name} has four groups of channels and needs a multiple of 4 of them, got {channels}')
        if channels % check_int(num_heads, 'num_heads', name):
            raise ValueError(f'{name} needs num_heads to divide its {channels} channels, got {num_heads}')
        if not isinstance(kernel_sizes, (tuple, list)) or len(kernel_sizes) != 4:
            raise ValueError(f'{name} needs kernel_sizes to be four odd ints, got {kernel_sizes!r}')
        self.num_heads = num_heads
        self.window_size = check_int(window_size, 'window_size', name)
        n = channels // 4
        self.convs = nn.ModuleList(
            nn.Conv1d(n, n, check_kernel_size(k, name), padding=k // 2, groups=n, **kwargs) for k in kernel_sizes
        )
        self.norm_h = GroupNorm(4, channels, **kwargs)
        self.norm_w = GroupNorm(4, channels, **kwargs)
        self.norm_weight = nn.Parameter(torch.empty(channels, **kwargs))
        self.norm_bias = nn.Parameter(torch.empty(channels, **kwargs))
        self.query = nn.Parameter(torch.empty(channels, **kwargs))
        self.key = nn.Parameter(torch.empty(channels, **kwargs))
        self.value = nn.Parameter(torch.empty(channels, **kwargs))
        self.eps = 1e-5
        self.reset_parameters()

    def current_channels(self) -> int:
        return self.query.shape[0]

    def channel_multiple(self) -> int:
        return math.lcm(4, self.num_heads)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.ones_(self.norm_weight)
        nn.init.zeros_(self.norm_bias)
        for weight in (self.query, self.key, self.value):
            nn.init.uniform_(weight, -1, 1)  # as in torch's depthwise 1x1 convolutions

    def keep_rest(self, keep: Tensor) -> None:
        """The convolutions. A channel that comes to another group gets its kernel cut, or padded with zeros."""
        convs: list[Any] = list(self.convs)
        size, n = max(conv.weight.shape[2] for conv in convs), len(keep) // 4
        margins = [(size - conv.weight.shape[2]) // 2 for conv in convs]
        kernels = torch.cat([F.pad(conv.weight, (m, m)) for conv, m in zip(convs, margins, strict=True)])[keep]
        biases = torch.cat([conv.bias for conv in convs])[keep]
        for i, (conv, m) in enumerate(zip(convs, margins, strict=True)):
            part = slice(i * n, (i + 1) * n)
            conv.weight = nn.Parameter(kernels[part, :, m : size - m].clone(), conv.weight.requires_grad)
            conv.bias = nn.Parameter(biases[part].clone(), conv.bias.requires_grad)

    def strip(self, s: Tensor) -> Tensor:
        """The four convolutions on the quarters of a strip (B, C, L)."""
        n = s.shape[1] // 4
        return torch.cat([conv(s[:, i * n : (i + 1) * n]) for i, conv in enumerate(self.convs)], 1)

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        rows = torch.sigmoid(self.norm_h(self.strip(x.mean(3)))).unsqueeze(3)
        columns = torch.sigmoid(self.norm_w(self.strip(x.mean(2)))).unsqueeze(2)
        c = channel_attention(
            x * rows * columns,
            self.window_size,
            self.num_heads,
            self.norm_weight,
            self.norm_bias,
            self.query,
            self.key,
            self.value,
            self.eps,
        )
        return rows * c, columns

    def graph(self) -> Graph:
        nodes = {'x': MAP, 'h': ROWS, 'w': COLUMNS, 'z': MAP, 't': 'C x H/7 x W/7', 'c': CHANNEL, 'y': MAP}
        nodes['t'] = f'C x H/{self.window_size} x W/{self.window_size}'
        strip = 'four convs, norm, sigmoid'
        edges = (
            Edge('x', 'h', 'mean over W'),
            Edge('x', 'w', 'mean over H'),
            Edge('h', 'z', strip),
            Edge('w', 'z', strip),
            Edge('x', 'z'),
            Edge('z', 't', 'windows, norm'),
            Edge('t', 'c', 'self-attention, avg, sigmoid'),
            Edge('c', 'y'),
            Edge('z', 'y'),
        )
        return Graph(nodes, edges, 'y = z * sigmoid(avg(attention(t))), z = x * sigmoid(a_h) * sigmoid(a_w)')

    def extra_repr(self) -> str:
        return f'{self.current_channels()}, num_heads={self.num_heads}, window_size={self.window_size}'
