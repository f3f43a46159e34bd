"""Criss-cross attention, CCNet (arXiv 1811.11721): each position attends to its row and its column, twice.

In CCNet it stands in the segmentation head, between two convolutions. Difference from the authors' code: the key has no
bias, because the softmax cancels it.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sase_blocks.checks import check_int, check_reduction
from sase_blocks.numerics import widen
from sase_blocks.ops import Conv2d
from sase_blocks.ops.primitive import BOTH

from .base import AttentionModule, fade_map
from .graph import MAP, Edge, Graph

torch.fx.wrap('fade_map')  # must be wrapped in each module that calls it


@torch.fx.wrap
def cross_weights(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(q . k) over the H + W - 1 positions in the row and column of each. q, k: (B, D, H, W).

    -> the weights in the columns (B, W, H, H) and in the rows (B, H, W, W), each from a position to another, in fp32
    for half inputs. The position itself counts in its row. The products are of values of at most 1, because autocast
    would run them in fp16 and overflow.
    """
    height = q.shape[2]
    q, k = widen(q), widen(k)
    scale_q = q.detach().abs().amax((1, 2, 3), keepdim=True).clamp_min(1e-15)
    scale_k = k.detach().abs().amax((1, 2, 3), keepdim=True).clamp_min(1e-15)
    q, k, scale = q / scale_q, k / scale_k, scale_q * scale_k
    columns = scale * (q.permute(0, 3, 2, 1) @ k.permute(0, 3, 1, 2))
    rows = scale * (q.permute(0, 2, 3, 1) @ k.permute(0, 2, 1, 3))
    itself = torch.eye(height, dtype=torch.bool, device=q.device)
    columns = columns.masked_fill(itself, -float('inf')).transpose(1, 2)
    a = torch.softmax(torch.cat([columns, rows], 3), 3)
    return a[:, :, :, :height].transpose(1, 2), a[:, :, :, height:]


class CrissCrossAttention(AttentionModule):
    """Criss-cross attention, CCNet (arXiv 1811.11721, eq. 1 to 3): y = x + gamma * sum of a_i v_i, repeated.

    The sum is over the row and the column of each position, and a is a softmax of q . k over them, where q, k and v are
    1x1 convolutions of x. The second pass, with the same parameters, reaches all positions. gamma is from the authors'
    code. It starts at 0, so the block starts as the identity.

    Memory: HW (H + W) weights in each pass, not (HW)^2.

    Args:
        channels: C, at least 1.
        reduction: q and k have C // reduction channels; from 1 to C (to 16 for fewer channels).
        recurrence: R, the number of passes.
        feat_size: ignored; all blocks accept it.
        device, dtype: of the parameters.

    Raises:
        ValueError: bad channels or options; in ``forward`` another rank or number of channels.
    """

    per_channel: ClassVar[dict[str, int]] = {'query_conv': 1, 'key_conv': 1, 'value_conv': BOTH}

    def __init__(
        self,
        channels: int,
        feat_size: Any = None,
        *,
        reduction: int = 8,
        recurrence: int = 2,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(channels)
        name = type(self).__name__
        kwargs: dict[str, Any] = {'device': device, 'dtype': dtype}
        hidden = max(1, channels // check_reduction(reduction, channels, name))
        self.recurrence = check_int(recurrence, 'recurrence', name)
        self.query_conv = Conv2d(channels, hidden, 1, **kwargs)
        self.key_conv = Conv2d(channels, hidden, 1, bias=False, **kwargs)
        self.value_conv = Conv2d(channels, channels, 1, **kwargs)
        self.gamma = nn.Parameter(torch.zeros(1, **kwargs))

    def current_channels(self) -> int:
        return self.value_conv.weight.shape[0]

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.zeros_(self.gamma)

    def gate(self, x: Tensor) -> Tensor:
        """The weight that each position receives in the first pass (B, 1, H, W), for the pictures."""
        columns, rows = cross_weights(self.query_conv(x), self.key_conv(x))
        return (columns.sum(2).transpose(1, 2) + rows.sum(2)).unsqueeze(1)

    def attend(self, x: Tensor) -> Tensor:
        for _ in range(self.recurrence):
            columns, rows = cross_weights(self.query_conv(x), self.key_conv(x))
            v = self.value_conv(x)
            z = (columns.to(v.dtype) @ v.permute(0, 3, 2, 1)).permute(0, 3, 2, 1)
            z = z + (rows.to(v.dtype) @ v.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            x = x + (self.gamma * z).to(x.dtype)
        return x

    def faded(self, x: Tensor, alpha: Tensor | None) -> Tensor:
        return fade_map(x, self.attend(x), alpha)

    def graph(self) -> Graph:
        nodes, edges = {'x': MAP}, []
        source = 'x'
        for i in range(self.recurrence):
            a, z = f'a{i + 1}', 'y' if i == self.recurrence - 1 else f'z{i + 1}'
            nodes |= {a: '(H + W) x H x W', z: MAP}
            edges += [
                Edge(source, a, 'conv1x1, q . k in row and column, softmax'),
                Edge(a, z, 'gamma * sum weighted by a'),
                Edge(source, z, 'conv1x1'),
                Edge(source, z),
            ]
            source = z
        passes = '' if self.recurrence == 1 else f', {self.recurrence} times'
        return Graph(nodes, tuple(edges), f'y = x + gamma * sum(softmax(q . k) * v) over row and column{passes}')
