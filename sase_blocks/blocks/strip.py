"""Blocks that squeeze x along one axis at a time: each row and each column becomes one number per channel.

These are coordinate attention (arXiv 2103.02907), efficient local attention (arXiv 2403.01123), and timm's two
variants, which are in no paper. All have h = mean over W, (B, C, H), w = mean over H, (B, C, W), and two gates that
broadcast.
"""

import math
from abc import abstractmethod
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sase_blocks.checks import check_groups, check_kernel_size, check_reduction
from sase_blocks.ops import BatchNorm2d, GroupNorm, Linear
from sase_blocks.ops.primitive import round_width

from .base import AttentionModule, fade_product
from .graph import MAP, Edge, Graph

torch.fx.wrap('fade_product')  # must be wrapped in each module that calls it

ROWS, COLUMNS = 'C x H x 1', 'C x 1 x W'


def _graph(label: str, formula: str) -> Graph:
    nodes = {'x': MAP, 'h': ROWS, 'w': COLUMNS, 'a_h': ROWS, 'a_w': COLUMNS, 'y': MAP}
    edges = (
        Edge('x', 'h', 'mean over W'),
        Edge('x', 'w', 'mean over H'),
        Edge('h', 'a_h', label),
        Edge('w', 'a_w', label),
        Edge('a_h', 'y'),
        Edge('a_w', 'y'),
        Edge('x', 'y'),
    )
    return Graph(nodes, edges, formula)


class RowsTimesColumns(AttentionModule):
    """Base of the blocks whose gate is a product of one gate per row and one per column."""

    @abstractmethod
    def gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The gates (B, C, H, 1) and (B, C, 1, W) for a checked x."""

    def gate(self, x: Tensor) -> Tensor:
        rows, columns = self.gates(x)
        return rows * columns

    def faded_gate(self, x: Tensor, alpha: Tensor | None) -> Tensor:
        rows, columns = self.gates(x)
        return fade_product(rows, columns, alpha)


class CoordinateAttention(RowsTimesColumns):
    """Coordinate attention (arXiv 2103.02907, eq. 4 to 9): y = x * sigmoid(F_h(f_h)) * sigmoid(F_w(f_w)).

    f = hardswish(norm(F_1([h; w]))) has max(8, C // reduction) channels and is split again. There are no biases.

    Args:
        channels: C, at least 1.
        reduction: r of eq. 6, from 1 to C (to 32 for fewer channels).
        feat_size: ignored; all blocks accept it.
        device, dtype: of the parameters.

    Raises:
        ValueError: bad channels or reduction; in ``forward`` another rank or number of channels.
    """

    per_channel: ClassVar[dict[str, int]] = {'conv1': 1, 'conv_h': 0, 'conv_w': 0}

    def __init__(
        self, channels: int, feat_size: Any = None, *, reduction: int = 32, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__(channels)
        kwargs: dict[str, Any] = {'device': device, 'dtype': dtype}
        hidden = max(8, channels // check_reduction(reduction, channels, type(self).__name__, 32))
        self.conv1 = nn.Conv1d(channels, hidden, 1, bias=False, **kwargs)
        self.norm = BatchNorm2d(hidden, **kwargs)
        self.conv_h = nn.Conv1d(hidden, channels, 1, bias=False, **kwargs)
        self.conv_w = nn.Conv1d(hidden, channels, 1, bias=False, **kwargs)

    def current_channels(self) -> int:
        return self.conv_h.weight.shape[0]

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        strips = torch.cat([x.mean(3), x.mean(2)], 2)  # (B, C, H + W)
        f = F.hardswish(self.norm(self.conv1(strips)))
        f_h, f_w = f[:, :, : x.shape[2]], f[:, :, x.shape[2] :]
        return torch.sigmoid(self.conv_h(f_h)).unsqueeze(3), torch.sigmoid(self.conv_w(f_w)).unsqueeze(2)

    def graph(self) -> Graph:
        return _graph('shared conv, norm, hardswish; conv', 'y = x * sigmoid(a_h) * sigmoid(a_w)')


class SimpleCoordinateAttention(AttentionModule):
    """timm's simple coordinate attention: linear layers, SiLU, no norm, y = x * sigmoid(a_h + a_w). In no paper.

    Args:
        channels: C, at least 1.
        reduction: the hidden width is C / reduction, rounded to a multiple of 8; from 1 to C (to 16 for fewer
            channels).
        feat_size: ignored; all blocks accept it.
        device, dtype: of the parameters.

    Raises:
        ValueError: bad channels or reduction; in ``forward`` another rank or number of channels.
    """

    per_channel: ClassVar[dict[str, int]] = {'fc1': 1, 'fc_h': 0, 'fc_w': 0}

    def __init__(
        self, channels: int, feat_size: Any = None, *, reduction: int = 6, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__(channels)
        reduction = check_reduction(reduction, channels, type(self).__name__)
        hidden = round_width(channels / reduction)
        self.fc1 = Linear(channels, hidden, device=device, dtype=dtype)
        self.fc_h = Linear(hidden, channels, device=device, dtype=dtype)
        self.fc_w = Linear(hidden, channels, device=device, dtype=dtype)

    def current_channels(self) -> int:
        return self.fc1.weight.shape[1]

    def gate(self, x: Tensor) -> Tensor:
        a_h = self.fc_h(F.silu(self.fc1(x.mean(3).transpose(1, 2)))).transpose(1, 2)
        a_w = self.fc_w(F.silu(self.fc1(x.mean(2).transpose(1, 2)))).transpose(1, 2)
        return torch.sigmoid(a_h.unsqueeze(3) + a_w.unsqueeze(2))

    def graph(self) -> Graph:
        return _graph('shared fc, silu; fc', 'y = x * sigmoid(a_h + a_w)')


class EfficientLocalAttention(RowsTimesColumns):
    """Efficient local attention (arXiv 2403.01123, section 3, variant ELA-B): y = x * gate_h * gate_w.

    gate = sigmoid(GroupNorm(depthwise convolution)). timm's ``ela`` has a SiLU before the sigmoid and one group.

    Args:
        channels: C, at least 1.
        kernel_size: of the convolutions, odd; 7 in the variants B and L, 5 in T and S.
        groups: of the norms, a divisor of C. Default: 16, or the greatest common divisor of C and 16.
        feat_size: ignored; all blocks accept it.
        device, dtype: of the parameters.

    Raises:
        ValueError: bad channels, kernel_size or groups; in ``forward`` another rank or number of channels.
    """

    per_channel: ClassVar[dict[str, int]] = {'conv_h': 0, 'conv_w': 0, 'norm_h': 0, 'norm_w': 0}

    def __init__(
        self,
        channels: int,
        feat_size: Any = None,
        *,
        kernel_size: int = 7,
        groups: int | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(channels)
        name, kwargs = type(self).__name__, {'device': device, 'dtype': dtype}
        k = check_kernel_size(kernel_size, name)
        groups = math.gcd(channels, 16) if groups is None else check_groups(groups, channels, name)
        self.conv_h = nn.Conv1d(channels, channels, k, padding=k // 2, groups=channels, bias=False, **kwargs)
        self.conv_w = nn.Conv1d(channels, channels, k, padding=k // 2, groups=channels, bias=False, **kwargs)
        self.norm_h = GroupNorm(groups, channels, **kwargs)
        self.norm_w = GroupNorm(groups, channels, **kwargs)

    def current_channels(self) -> int:
        return self.conv_h.weight.shape[0]

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        gate_h = torch.sigmoid(self.norm_h(self.conv_h(x.mean(3))))
        gate_w = torch.sigmoid(self.norm_w(self.conv_w(x.mean(2))))
        return gate_h.unsqueeze(3), gate_w.unsqueeze(2)

    def graph(self) -> Graph:
        return _graph(f'depthwise conv{self.conv_h.kernel_size[0]}, group norm', 'y = x * sigmoid(a_h) * sigmoid(a_w)')


class StripAttention(AttentionModule):
    """timm's strip attention: a depthwise convolution along each strip, y = x * sigmoid(a_h + a_w). In no paper.

    Args:
        channels: C, at least 1.
        kernel_size: of the convolutions, odd.
        feat_size: ignored; all blocks accept it.
        device, dtype: of the parameters.

    Raises:
        ValueError: bad channels or kernel_size; in ``forward`` another rank or number of channels.
    """

    per_channel: ClassVar[dict[str, int]] = {'conv_h': 0, 'conv_w': 0}

    def __init__(
        self, channels: int, feat_size: Any = None, *, kernel_size: int = 3, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__(channels)
        kwargs: dict[str, Any] = {'device': device, 'dtype': dtype}
        k = check_kernel_size(kernel_size, type(self).__name__)
        self.conv_h = nn.Conv1d(channels, channels, k, padding=k // 2, groups=channels, bias=False, **kwargs)
        self.conv_w = nn.Conv1d(channels, channels, k, padding=k // 2, groups=channels, bias=False, **kwargs)

    def current_channels(self) -> int:
        return self.conv_h.weight.shape[0]

    def gate(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.conv_h(x.mean(3)).unsqueeze(3) + self.conv_w(x.mean(2)).unsqueeze(2))

    def graph(self) -> Graph:
        return _graph(f'depthwise conv{self.conv_h.kernel_size[0]}', 'y = x * sigmoid(a_h + a_w)')
