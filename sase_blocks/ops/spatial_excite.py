"""Spatial excitations: (B, 1, H, W) -> (B, 1, H, W), from squeezed statistics to an attention over positions.

First come the seven of SASE (arXiv 2411.08333, the spatial excitation set) in its order. All end in a sigmoid, and only
the affine one has a bias. Then come those of other published blocks (``EXTENDED_SETS``). Our changes: weights before a
ReLU start with a non-negative sum, overflow inside a stack of fp16 convolutions saturates, and per-position parameters
are interpolated for maps of another size.
"""

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sase_blocks.checks import check_features, check_kernel_size
from sase_blocks.numerics import narrow

from .layers import Conv2d
from .normalization import BatchNorm2d
from .primitive import Primitive, turn_positive_
from .spatial_squeeze import resize_map

torch.fx.wrap('check_features')  # must be wrapped in each module that calls it
torch.fx.wrap('resize_map')
torch.fx.wrap('narrow')


def spatial_affine(s: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """sigmoid(weight * s + bias), per position. s: (B, 1, H, W); weight, bias: broadcastable to it."""
    return torch.sigmoid(weight * s + bias)


class SpatialExcite(Primitive):
    """Base of the spatial excitations. Shape: (B, 1, H, W) -> (B, 1, H, W), any H and W.

    Raises in ``forward``: ValueError for another rank or for more than one channel, TypeError for a non-floating input.
    """

    gated: ClassVar[bool] = True  # whether the output is already a gate; if not, a composition adds a sigmoid

    def __init__(self, channels: int, feat_size: Any = None, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__(channels, feat_size)
        self.maps = 1  # number of input statistics, stacked along the channels

    def forward(self, s: Tensor) -> Tensor:
        check_features(s, self.maps)
        return self.excite(s)

    @abstractmethod
    def excite(self, s: Tensor) -> Tensor:
        """The attention for a checked s."""


class SpatialConv(SpatialExcite):
    """One or two convolutions of one channel without biases, same padding, then a sigmoid."""

    kernel_sizes: ClassVar[tuple[tuple[int, int], ...]] = ((3, 3),)
    relu_between: ClassVar[bool] = False

    def __init__(self, channels: int, feat_size: Any = None, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__(channels, feat_size)
        self.with_relu = self.relu_between  # TorchScript sees only instance attributes
        self.convs = nn.ModuleList(
            Conv2d(1, 1, (kh, kw), padding=(kh // 2, kw // 2), bias=False, device=device, dtype=dtype)
            for kh, kw in self.kernel_sizes
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for conv in self.convs:
            assert isinstance(conv, Conv2d)
            conv.reset_parameters()
            if self.relu_between:
                turn_positive_(conv.weight)

    def excite(self, s: Tensor) -> Tensor:
        for i, conv in enumerate(self.convs):
            if i > 0:
                s = torch.relu(s) if self.with_relu else s
                s = narrow(s, s)
            s = conv(s)
        return torch.sigmoid(s)


class SpatialConv3Separable(SpatialConv):
    """A 1 x 3 convolution, then a 3 x 1 ('conv_3x1_1x3')."""

    paper_key = 'conv_3x1_1x3'
    kernel_sizes = ((1, 3), (3, 1))


class SpatialConv5Separable(SpatialConv):
    """A 1 x 5 convolution, then a 5 x 1 ('conv_5x1_1x5')."""

    paper_key = 'conv_5x1_1x5'
    kernel_sizes = ((1, 5), (5, 1))


class SpatialConv3(SpatialConv):
    """One 3 x 3 convolution ('conv_3x3')."""

    paper_key = 'conv_3x3'
    kernel_sizes = ((3, 3),)


class SpatialConv5(SpatialConv):
    """One 5 x 5 convolution ('conv_5x5')."""

    paper_key = 'conv_5x5'
    kernel_sizes = ((5, 5),)


class SpatialConv7(SpatialConv):
    """One 7 x 7 convolution ('conv_7x7'), as in CBAM."""

    paper_key = 'conv_7x7'
    kernel_sizes = ((7, 7),)


class SpatialConv3Double(SpatialConv):
    """Two 3 x 3 convolutions with a ReLU between ('2conv_3x3')."""

    paper_key = '2conv_3x3'
    kernel_sizes = ((3, 3), (3, 3))
    relu_between = True


class SpatialAffine(SpatialExcite):
    """sigmoid(weight * s + bias) per position, started at 1 and 0 ('affine').

    Requires ``feat_size``. The H x W parameters are interpolated for maps of another size.
    """

    paper_key = 'affine'
    needs_feat_size = True

    def __init__(self, channels: int, feat_size: Any = None, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__(channels, feat_size)
        self.weight = nn.Parameter(torch.empty(self.feat_size, device=device, dtype=dtype))  # type: ignore[arg-type]
        self.bias = nn.Parameter(torch.empty(self.feat_size, device=device, dtype=dtype))  # type: ignore[arg-type]
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {'weight', 'bias'}

    def excite(self, s: Tensor) -> Tensor:
        return spatial_affine(s, resize_map(self.weight, s), resize_map(self.bias, s))


# ---- beyond the paper's set ----


class SpatialIdentity(SpatialExcite):
    """The statistic itself, for a squeeze that has its own weights. A composition makes it a gate."""

    gated = False

    def excite(self, s: Tensor) -> Tensor:
        return s


class SpatialNorm(SpatialExcite):
    """Batch norm of the statistic, as in BAM (arXiv 1807.06514, eq. 4)."""

    gated = False

    def __init__(self, channels: int, feat_size: Any = None, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__(channels, feat_size)
        self.norm = BatchNorm2d(1, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        self.norm.reset_parameters()

    def excite(self, s: Tensor) -> Tensor:
        return self.norm(s)


class SpatialConvNorm(SpatialExcite):
    """One convolution from ``maps`` statistics, batch norm and a sigmoid, as in CBAM (arXiv 1807.06521, eq. 3).

    The batch norm is in the authors' code and timm, but not in the formula. ``forward`` takes (B, maps, H, W).
    """

    def __init__(
        self,
        channels: int,
        feat_size: Any = None,
        maps: int = 1,
        *,
        kernel_size: int = 7,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(channels, feat_size)
        self.maps = maps
        k = check_kernel_size(kernel_size, type(self).__name__)
        self.conv = Conv2d(maps, 1, k, padding=k // 2, bias=False, device=device, dtype=dtype)
        self.norm = BatchNorm2d(1, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.conv.reset_parameters()
        self.norm.reset_parameters()

    def excite(self, s: Tensor) -> Tensor:
        return torch.sigmoid(self.norm(self.conv(s)))
