"""Triplet attention (arXiv 2010.03045): CBAM's spatial gate over each of the three pairs of axes of x."""

from typing import Any

import torch
from torch import Tensor

from sase_blocks.ops import SpatialConvNorm

from .base import AttentionModule
from .graph import MAP, Edge, Graph


def z_pool(x: Tensor, dim: int) -> Tensor:
    """Maximum and mean over one axis, stacked as the second axis. (B, C, H, W), dim -> (B, 2, ., .)."""
    return torch.stack([x.amax(dim), x.mean(dim)], 1)


class TripletAttention(AttentionModule):
    """Triplet attention (arXiv 2010.03045, section 3): y = x * (gate_cw + gate_hc + gate_hw) / 3.

    Each gate is a convolution of the maximum and the mean over the third axis, batch norm and a sigmoid. Instead of a
    rotation, a gate over two axes broadcasts along the third.

    Args:
        channels: C, at least 1.
        kernel_size: k of the three convolutions, odd.
        feat_size: ignored; all blocks accept it.
        device, dtype: of the parameters.

    Raises:
        ValueError: bad channels or kernel_size; in ``forward`` another rank or number of channels.
    """

    def __init__(
        self, channels: int, feat_size: Any = None, *, kernel_size: int = 7, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__(channels)
        kwargs: dict[str, Any] = {'maps': 2, 'kernel_size': kernel_size, 'device': device, 'dtype': dtype}
        self.gate_cw = SpatialConvNorm(channels, **kwargs)
        self.gate_hc = SpatialConvNorm(channels, **kwargs)
        self.gate_hw = SpatialConvNorm(channels, **kwargs)

    def gate(self, x: Tensor) -> Tensor:
        cw = self.gate_cw(z_pool(x, 2)).squeeze(1).unsqueeze(2)  # (B, C, 1, W)
        hc = self.gate_hc(z_pool(x.transpose(1, 2), 3)).squeeze(1).transpose(1, 2).unsqueeze(3)  # (B, C, H, 1)
        hw = self.gate_hw(z_pool(x, 1))  # (B, 1, H, W)
        return (cw + hc + hw) / 3

    def graph(self) -> Graph:
        nodes = {'x': MAP}
        edges: list[Edge] = []
        k = self.gate_hw.conv.kernel_size[0]
        for name, over, shape in (('cw', 'H', 'C x 1 x W'), ('hc', 'W', 'C x H x 1'), ('hw', 'C', '1 x H x W')):
            nodes[name] = f'2 x {shape.replace(" x 1", "").replace("1 x ", "")}'
            nodes[f'a_{name}'] = shape
            edges += [
                Edge('x', name, f'max, mean over {over}'),
                Edge(name, f'a_{name}', f'conv{k}x{k}, norm, sigmoid'),
                Edge(f'a_{name}', 'y'),
            ]
        return Graph({**nodes, 'y': MAP}, (*edges, Edge('x', 'y')), 'y = x * (a_cw + a_hc + a_hw) / 3')
