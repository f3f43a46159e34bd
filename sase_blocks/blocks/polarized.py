"""Polarized self-attention (arXiv 2107.00782): one gate along the channels, one along the positions, both by a softmax.

The authors' code differs from the paper. Its parallel form has no layer norm and takes the softmax of the spatial
branch after the product. Its sequential form takes that softmax over the positions and has a bottleneck in the channel
branch. Here both forms follow the paper.
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sase_blocks.numerics import narrow, widen
from sase_blocks.ops import Linear
from sase_blocks.ops.channel_squeeze import ChannelAttentionPool
from sase_blocks.ops.eager import times_sum

from .base import AttentionModule, fade_product, fade_sum
from .graph import CHANNEL, MAP, SPATIAL, Edge, Graph

for _function in ('fade_product', 'fade_sum', 'times_sum'):
    torch.fx.wrap(_function)  # must be wrapped in each module that calls it


@torch.fx.wrap
def normed_gate(z: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Sigmoid of a layer norm over the channels. (B, C) -> (B, C). weight, bias: (C,)."""
    return narrow(torch.sigmoid(F.layer_norm(widen(z), weight.shape, widen(weight), widen(bias), eps)), z)


@torch.fx.wrap
def weighted_gate(x: Tensor, weight: Tensor) -> Tensor:
    """Sigmoid of the weighted sum of the channels, (B, C, H, W) -> (B, 1, H, W). weight: (B, C)."""
    return narrow(torch.sigmoid((widen(x) * widen(weight)[:, :, None, None]).sum(1, keepdim=True)), x)


class PolarizedSelfAttention(AttentionModule):
    """Polarized self-attention (arXiv 2107.00782, section 3): y = x * (a_c + a_s), or a_s after a_c.

    a_c = sigmoid(norm(W_z W_v x softmax(W_q x))) with a softmax over the positions and a layer norm over the channels.
    a_s = sigmoid(softmax(W_q avg(x)) . W_v x) with a softmax over the C / 2 channels of W_q and W_v. Only the norm has
    a bias.

    Memory: both products are linear in W_v x, so they use x itself and make only maps of one channel, none of C / 2
    channels or of HW x HW.

    Args:
        channels: C, at least 1.
        parallel: y = x * a_c + x * a_s; if False, y = z * a_s(z) for z = x * a_c(x), the sequential form.
        feat_size: ignored; all blocks accept it.
        device, dtype: of the parameters.

    Raises:
        ValueError: bad channels or parallel; in ``forward`` another rank or number of channels.
    """

    per_channel: ClassVar[dict[str, int]] = {
        'channel_value': 1,
        'channel_out': 0,
        'norm_weight': 0,
        'norm_bias': 0,
        'spatial_query': 1,
        'spatial_value': 1,
    }

    def __init__(
        self, channels: int, feat_size: Any = None, *, parallel: bool = True, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__(channels)
        kwargs: dict[str, Any] = {'device': device, 'dtype': dtype}
        if parallel is not True and parallel is not False:
            raise ValueError(f'{type(self).__name__} needs parallel to be True or False, got {parallel!r}')
        self.parallel = parallel
        hidden = max(1, channels // 2)
        self.channel_query = ChannelAttentionPool(channels, **kwargs)
        self.channel_value = Linear(channels, hidden, bias=False, **kwargs)
        self.channel_out = Linear(hidden, channels, bias=False, **kwargs)
        self.norm_weight = nn.Parameter(torch.empty(channels, **kwargs))
        self.norm_bias = nn.Parameter(torch.empty(channels, **kwargs))
        self.eps = 1e-5
        self.spatial_query = Linear(channels, hidden, bias=False, **kwargs)
        self.spatial_value = Linear(channels, hidden, bias=False, **kwargs)
        self.reset_parameters()

    def current_channels(self) -> int:
        return self.norm_weight.shape[0]

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.ones_(self.norm_weight)
        nn.init.zeros_(self.norm_bias)

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """a_c (B, C, 1, 1) and a_s (B, 1, H, W) for a checked x."""
        z = self.channel_out(self.channel_value(self.channel_query(x).flatten(1)))
        c = normed_gate(z, self.norm_weight, self.norm_bias, self.eps)
        q = x.mean((2, 3))
        p = torch.softmax(self.spatial_query(q if self.parallel else q * c), 1)
        v = F.linear(p, self.spatial_value.weight.t())
        return c[:, :, None, None], weighted_gate(x, v if self.parallel else v * c)

    def gate(self, x: Tensor) -> Tensor:
        c, s = self.gates(x)
        return c + s if self.parallel else c * s

    def attend(self, x: Tensor) -> Tensor:
        c, s = self.gates(x)
        return times_sum(x, c, s) if self.parallel else x * (c * s).to(x.dtype)

    def faded(self, x: Tensor, alpha: Tensor | None) -> Tensor:
        c, s = self.gates(x)
        if not self.parallel:
            return x * fade_product(c, s, alpha).to(x.dtype)
        c, s = fade_sum(c, s, alpha)
        return times_sum(x, c, s)

    def graph(self) -> Graph:
        nodes = {'x': MAP, 'q': CHANNEL, 'a_c': CHANNEL, 'p': 'C/2 x 1 x 1', 'a_s': SPATIAL, 'y': MAP}
        channel = [Edge('x', 'q', 'attention'), Edge('q', 'a_c', 'mlp, norm, sigmoid')]
        if self.parallel:
            source, middle, formula = 'x', [Edge('a_c', 'y')], 'y = x * (a_c + a_s)'
        else:
            nodes = {**dict(list(nodes.items())[:3]), 'z': MAP, **dict(list(nodes.items())[3:])}
            source, middle, formula = 'z', [Edge('a_c', 'z'), Edge('x', 'z')], 'y = z * a_s(z), z = x * a_c(x)'
        spatial = [Edge(source, 'p', 'avg, fc, softmax'), Edge('p', 'a_s', 'dot product with fc'), Edge(source, 'a_s')]
        return Graph(nodes, (*channel, *middle, *spatial, Edge('a_s', 'y'), Edge(source, 'y')), formula)
