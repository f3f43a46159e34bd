"""NAM, normalisation-based attention (arXiv 2111.12419): the scales of a batch norm say how much a channel matters.

This is the channel submodule, as in the authors' code. The spatial one (eq. 3) has parameters for each position of a
map of a fixed size, and the authors took it out of their code. Differences from that code: the gradient of the scales
also runs through their shares, as in the formula, where the code stops it. Scales that are all 0 give no NaN.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor

from sase_blocks.numerics import narrow, widen
from sase_blocks.ops import BatchNorm2d

from .base import AttentionModule
from .graph import MAP, Edge, Graph


@torch.fx.wrap
def shares(weight: Tensor) -> Tensor:
    """Each absolute value divided by the sum of all, 0 if all are 0. (C,) -> (C,)."""
    size = widen(weight).abs()
    return narrow(size / size.sum().clamp_min(1e-30), weight)


class NormAttention(AttentionModule):
    """NAM, normalisation-based attention (arXiv 2111.12419, eq. 1 and 2): y = x * sigmoid(w * norm(x)).

    w = abs(gamma) / sum(abs(gamma)) over the channels, where gamma is the scale of the batch norm. The formula has no
    absolute values, the authors' code has.

    Args:
        channels: C, at least 1.
        feat_size: ignored; all blocks accept it.
        device, dtype: of the parameters.

    Raises:
        ValueError: bad channels; in ``forward`` another rank or number of channels.
    """

    per_channel: ClassVar[dict[str, int]] = {'norm': 0}

    def __init__(self, channels: int, feat_size: Any = None, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__(channels)
        self.norm = BatchNorm2d(channels, device=device, dtype=dtype)

    def current_channels(self) -> int:
        return self.norm.weight.shape[0]

    def gate(self, x: Tensor) -> Tensor:
        return torch.sigmoid(shares(self.norm.weight).reshape(1, -1, 1, 1) * self.norm(x))

    def graph(self) -> Graph:
        nodes = {'x': MAP, 'z': MAP, 'y': MAP}
        edges = (Edge('x', 'z', 'batch norm'), Edge('z', 'y', 'shares of the scales, sigmoid'), Edge('x', 'y'))
        return Graph(nodes, edges, 'y = x * sigmoid(w * norm(x)), w = abs(gamma) / sum(abs(gamma))')
