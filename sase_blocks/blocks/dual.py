"""Dual attention, DANet (arXiv 1809.02983): each position attends to all positions, each channel to all channels.

In DANet the two are branches of the segmentation head. Each has convolutions before and after it, and each adds its own
input. Here both read x, and y = x + both. Differences from the authors' code: this one x, and no bias of the key, which
the softmax cancels. The code's channel attention has a minus sign that the paper's eq. 3 has not, so that a channel
attends most to the channels least like it. Here it has it, too.
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sase_blocks.checks import check_reduction
from sase_blocks.numerics import widen
from sase_blocks.ops import Conv2d
from sase_blocks.ops.primitive import BOTH, scaled_gram

from .base import AttentionModule, fade_value
from .graph import MAP, Edge, Graph

torch.fx.wrap('fade_value')  # must be wrapped in each module that calls it


@torch.fx.wrap
def attend_positions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The mean of v over all positions, weighted by softmax(q . k). q, k: (B, D, H, W), v: (B, C, H, W) -> as v.

    The fused kernels take values of the size of the keys, without gaps, so those of v are several heads of size D, all
    with the same q and k.
    """
    channels, size = v.shape[1], q.shape[1]
    heads = (channels + size - 1) // size
    v_heads = F.pad(v.flatten(2), (0, 0, 0, heads * size - channels)).unflatten(1, (heads, size))
    q = q.flatten(2).transpose(1, 2).contiguous().unsqueeze(1).expand(-1, heads, -1, -1)
    k = k.flatten(2).transpose(1, 2).contiguous().unsqueeze(1).expand(-1, heads, -1, -1)
    z = F.scaled_dot_product_attention(q, k, v_heads.transpose(2, 3).contiguous(), scale=1.0)
    return z.transpose(2, 3).flatten(1, 2)[:, :channels].reshape(v.shape)


@torch.fx.wrap
def channel_weights(x: Tensor) -> Tensor:
    """softmax(-x_i . x_j) over the channels j, (B, C, H, W) -> (B, C, C), in fp32 for half inputs."""
    return torch.softmax(-scaled_gram(widen(x).flatten(2)), 2)


class DualAttention(AttentionModule):
    """Dual attention, DANet (arXiv 1809.02983, eq. 1 to 4): y = x + position_gamma * p + channel_gamma * c.

    p is the mean of v over all positions, weighted by softmax(q . k), where q, k and v are 1x1 convolutions of x. c is
    the mean of the channels of x, weighted by softmax(-x_i . x_j). Both factors start at 0, so the block starts as the
    identity.

    Memory: p comes from ``F.scaled_dot_product_attention``, whose fused kernels compute the HW x HW weights in pieces
    and keep none. Where torch has no fused kernel (a symbolic export, for example), they are whole. The time grows with
    (HW)^2 in either case.

    Args:
        channels: C, at least 1.
        reduction: q and k have C // reduction channels; from 1 to C (to 16 for fewer channels).
        feat_size: ignored; all blocks accept it.
        device, dtype: of the parameters.

    Raises:
        ValueError: bad channels or reduction; in ``forward`` another rank or number of channels.
    """

    per_channel: ClassVar[dict[str, int]] = {'query_conv': 1, 'key_conv': 1, 'value_conv': BOTH}

    def __init__(
        self, channels: int, feat_size: Any = None, *, reduction: int = 8, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__(channels)
        kwargs: dict[str, Any] = {'device': device, 'dtype': dtype}
        hidden = max(1, channels // check_reduction(reduction, channels, type(self).__name__))
        self.query_conv = Conv2d(channels, hidden, 1, **kwargs)
        self.key_conv = Conv2d(channels, hidden, 1, bias=False, **kwargs)
        self.value_conv = Conv2d(channels, channels, 1, **kwargs)
        self.position_gamma = nn.Parameter(torch.zeros(1, **kwargs))
        self.channel_gamma = nn.Parameter(torch.zeros(1, **kwargs))

    def current_channels(self) -> int:
        return self.value_conv.weight.shape[0]

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.zeros_(self.position_gamma)
        nn.init.zeros_(self.channel_gamma)

    def gate(self, x: Tensor) -> Tensor:
        """The weight that each channel receives (B, C, 1, 1), for the pictures."""
        return channel_weights(x).sum(1)[:, :, None, None]

    def add_values(self, x: Tensor, position_gamma: Tensor, channel_gamma: Tensor) -> Tensor:
        """y for these factors."""
        p = attend_positions(self.query_conv(x), self.key_conv(x), self.value_conv(x))
        c = (channel_weights(x).to(x.dtype) @ x.flatten(2)).reshape(x.shape)
        return x + (position_gamma * p + channel_gamma * c).to(x.dtype)

    def attend(self, x: Tensor) -> Tensor:
        return self.add_values(x, self.position_gamma, self.channel_gamma)

    def faded(self, x: Tensor, alpha: Tensor | None) -> Tensor:
        return self.add_values(x, fade_value(self.position_gamma, alpha), fade_value(self.channel_gamma, alpha))

    def graph(self) -> Graph:
        nodes = {'x': MAP, 's': 'HW x HW', 'p': MAP, 'r': 'C x C', 'c': MAP, 'y': MAP}
        edges = (
            Edge('x', 's', 'conv1x1, q . k, softmax'),
            Edge('x', 'p', 'conv1x1'),
            Edge('s', 'p', 'weighted sum'),
            Edge('x', 'r', 'softmax(-x . x)'),
            Edge('x', 'c'),
            Edge('r', 'c', 'weighted sum'),
            Edge('p', 'y', 'position_gamma'),
            Edge('c', 'y', 'channel_gamma'),
            Edge('x', 'y'),
        )
        formula = 'y = x + position_gamma * p + channel_gamma * c, p = softmax(q . k) . v, c = softmax(-x . x) . x'
        return Graph(nodes, edges, formula)
