"""Global response normalisation, ConvNeXt V2 (arXiv 2301.00808): channels compete by the norms of their maps.

ConvNeXt V2 has it on the hidden channels of its MLPs. Differences from the authors' code: (B, C, H, W) maps, sums of
squares in fp32 for fp16 and bf16, and a finite gradient where a channel is 0.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sase_blocks.numerics import narrow, safe_sqrt, widen

from .base import AttentionModule, fade
from .graph import CHANNEL, MAP, Edge, Graph

torch.fx.wrap('fade')  # must be wrapped in each module that calls it


@torch.fx.wrap
def response(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """1 + weight * n, n = g / (mean of g over C + eps) for the L2 norms g of the channels. -> (B, C, 1, 1)."""
    g = safe_sqrt(widen(x).square().sum((2, 3), keepdim=True))
    n = g / (g.mean(1, keepdim=True) + eps)
    return narrow(1 + widen(weight).reshape(1, -1, 1, 1) * n, x)


@torch.fx.wrap
def shift(bias: Tensor, alpha: Tensor | None) -> Tensor:
    """The bias (C,) as (1, C, 1, 1), times alpha."""
    bias = bias.reshape(1, -1, 1, 1)
    return bias if alpha is None else alpha.to(bias.dtype) * bias


class GlobalResponseNorm(AttentionModule):
    """Global response normalisation, ConvNeXt V2 (arXiv 2301.00808, eq. 1 to 3): y = x * (1 + gamma * n) + beta.

    n = g / mean(g) for the L2 norms g of the channels over all positions, as in the paper's algorithm 1 and the code.
    Its eq. 2 has the sum instead of the mean. gamma and beta start at 0, so the block starts as the identity.

    Args:
        channels: C, at least 1.
        feat_size: ignored; all blocks accept it.
        device, dtype: of the parameters.

    Raises:
        ValueError: bad channels; in ``forward`` another rank or number of channels.
    """

    per_channel: ClassVar[dict[str, int]] = {'weight': 0, 'bias': 0}

    def __init__(self, channels: int, feat_size: Any = None, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__(channels)
        self.weight = nn.Parameter(torch.empty(channels, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(channels, device=device, dtype=dtype))
        self.eps = 1e-6
        self.reset_parameters()

    def current_channels(self) -> int:
        return self.weight.shape[0]

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def gate(self, x: Tensor) -> Tensor:
        return response(x, self.weight, self.eps)

    def attend(self, x: Tensor) -> Tensor:
        return x * self.gate(x) + self.bias.reshape(1, -1, 1, 1).to(x.dtype)

    def faded(self, x: Tensor, alpha: Tensor | None) -> Tensor:
        return x * fade(self.gate(x), alpha) + shift(self.bias, alpha).to(x.dtype)

    def graph(self) -> Graph:
        nodes = {'x': MAP, 'g': CHANNEL, 'n': CHANNEL, 'y': MAP}
        edges = (Edge('x', 'g', 'L2 norm'), Edge('g', 'n', 'divide by the mean'), Edge('n', 'y'), Edge('x', 'y'))
        return Graph(nodes, edges, 'y = x * (1 + gamma * n) + beta, n = g / mean(g)')
