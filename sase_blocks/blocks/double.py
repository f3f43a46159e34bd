"""Double attention, A2-Nets (arXiv 1810.11579): gathers descriptors from all positions, and distributes them again.

There is no code by the authors. Much of the code in other collections takes the second softmax over the positions, not
over the descriptors, so that its weights at a position do not sum to 1.
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sase_blocks.checks import check_reduction
from sase_blocks.ops import Conv2d, Linear

from .base import AttentionModule, fade_value
from .graph import MAP, Edge, Graph

torch.fx.wrap('fade_value')  # must be wrapped in each module that calls it


class DoubleAttention(AttentionModule):
    """Double attention, A2-Nets (arXiv 1810.11579, section 3): y = x + W_r G softmax(V).

    G = A softmax(B)^T has n = C // reduction descriptors of as many channels. A, B and V are 1x1 convolutions of x. The
    softmax of B is over the positions and cancels a bias, so B has none. That of V is over the n descriptors.

    Memory: both products are linear in A, so W_r A is applied to the descriptors, and the only new maps are B, V and y.
    No map is HW x HW.

    Args:
        channels: C, at least 1.
        reduction: from 1 to C (to 16 for fewer channels).
        feat_size: ignored; all blocks accept it.
        device, dtype: of the parameters.

    Raises:
        ValueError: bad channels or reduction; in ``forward`` another rank or number of channels.
    """

    per_channel: ClassVar[dict[str, int]] = {'feature': 1, 'gather': 1, 'distribute': 1, 'out': 0}

    def __init__(
        self, channels: int, feat_size: Any = None, *, reduction: int = 4, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__(channels)
        kwargs: dict[str, Any] = {'device': device, 'dtype': dtype}
        hidden = max(1, channels // check_reduction(reduction, channels, type(self).__name__))
        self.feature = Linear(channels, hidden, **kwargs)
        self.gather = Conv2d(channels, hidden, 1, bias=False, **kwargs)
        self.distribute = Conv2d(channels, hidden, 1, **kwargs)
        self.out = Linear(hidden, channels, **kwargs)

    def current_channels(self) -> int:
        return self.out.weight.shape[0]

    def gate(self, x: Tensor) -> Tensor:
        """The mean of the n attention maps (B, 1, H, W), for the pictures."""
        b, _, height, width = x.shape
        return torch.softmax(self.gather(x).flatten(2), 2).mean(1).reshape(b, 1, height, width)

    def add_values(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """y for this weight and bias of the last layer."""
        attention = torch.softmax(self.gather(x).flatten(2), 2).to(x.dtype)
        descriptors = attention @ x.flatten(2).transpose(1, 2)  # (B, n, C)
        descriptors = F.linear(self.feature(descriptors), weight, bias)
        vectors = torch.softmax(self.distribute(x), 1).flatten(2)
        z = descriptors.transpose(1, 2) @ vectors.to(descriptors.dtype)
        return x + z.reshape(x.shape).to(x.dtype)

    def attend(self, x: Tensor) -> Tensor:
        return self.add_values(x, self.out.weight, self.out.bias)  # type: ignore[arg-type]

    def faded(self, x: Tensor, alpha: Tensor | None) -> Tensor:
        # The weights of a position sum to 1, so they keep the biases.
        weight, bias = fade_value(self.out.weight, alpha), fade_value(self.out.bias, alpha)  # type: ignore[arg-type]
        return self.add_values(x, weight, bias)

    def graph(self) -> Graph:
        maps = 'n x H x W'
        nodes = {'x': MAP, 'a': maps, 'g': 'n x C', 'v': maps, 'y': MAP}
        edges = (
            Edge('x', 'a', 'conv1x1, softmax over HW'),
            Edge('a', 'g', 'weighted mean of x, mlp'),
            Edge('x', 'g'),
            Edge('x', 'v', 'conv1x1, softmax over n'),
            Edge('g', 'y', 'sum weighted by v'),
            Edge('v', 'y'),
            Edge('x', 'y'),
        )
        return Graph(nodes, edges, 'y = x + g . v, g = mlp(x . softmax(b)), v = softmax(conv1x1(x))')
