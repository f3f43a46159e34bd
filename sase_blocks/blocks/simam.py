"""SimAM (ICML 2021, proceedings.mlr.press/v139/yang21o.html): an energy for every neuron, without parameters."""

from typing import Any

import torch
from torch import Tensor

from sase_blocks.checks import check_positive
from sase_blocks.numerics import narrow, widen

from .base import AttentionModule
from .graph import MAP, Edge, Graph


@torch.fx.wrap
def inverse_energy(x: Tensor, e_lambda: float) -> Tensor:
    """(x - mean)^2 / (4 (variance + e_lambda)) + 1/2 over H and W, the variance divided by HW - 1 (at least 1)."""
    wide = widen(x)
    square = (wide - wide.mean((2, 3), keepdim=True)).square()
    var = square.sum((2, 3), keepdim=True) / max(x.shape[2] * x.shape[3] - 1, 1)
    return narrow(square / (4 * (var + e_lambda)) + 0.5, x)


class SimAM(AttentionModule):
    """SimAM (Yang et al., ICML 2021, section 3): y = x * sigmoid(1 / e), one gate for every element of x.

    Args:
        channels: C, at least 1.
        e_lambda: the regulariser lambda of the variance, above 0; 1e-4 as in the paper.
        feat_size, device, dtype: ignored; all blocks accept them.

    Raises:
        ValueError: bad channels or e_lambda; in ``forward`` another rank or number of channels.
    """

    def __init__(
        self, channels: int, feat_size: Any = None, *, e_lambda: float = 1e-4, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__(channels)
        self.e_lambda = check_positive(e_lambda, 'e_lambda', type(self).__name__)

    def gate(self, x: Tensor) -> Tensor:
        return torch.sigmoid(inverse_energy(x, self.e_lambda))

    def graph(self) -> Graph:
        nodes = {'x': MAP, '1 / e': MAP, 'y': MAP}
        edges = (Edge('x', '1 / e', 'inverse energy'), Edge('1 / e', 'y'), Edge('x', 'y'))
        return Graph(nodes, edges, 'y = x * sigmoid((x - mean)^2 / (4 (var + lambda)) + 1/2)')

    def extra_repr(self) -> str:
        return f'{self.channels}, e_lambda={self.e_lambda}'
