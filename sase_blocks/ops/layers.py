"""A convolution and a linear layer that do not subclass ``nn.Conv2d`` and ``nn.Linear``, for blocks in other networks.

timm's networks reinitialise every ``nn.Conv2d`` and many ``nn.Linear``, also in their attention slots, and zero their
biases (VoVNet fails if there is none). Most call nothing afterwards that could restore a block's initialisation, so
they must not recognise these layers.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Conv2d(nn.modules.conv._ConvNd):
    """Has the arguments, the initialisation and the results of ``nn.Conv2d`` with zero padding.

    Shape: (B, in_channels, H, W) -> (B, out_channels, H', W').
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        **factory: Any,
    ) -> None:
        sizes = map(nn.modules.utils._pair, (kernel_size, stride, padding, dilation))
        super().__init__(in_channels, out_channels, *sizes, False, (0, 0), groups, bias, 'zeros', **factory)  # type: ignore[call-arg]

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Linear(nn.Module):
    """Initialises and computes like ``nn.Linear``. Shape: (..., in_features) -> (..., out_features)."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, **factory: Any) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features, **factory))
        self.bias = nn.Parameter(torch.empty(out_features, **factory)) if bias else None
        self.reset_parameters()

    reset_parameters: Any = nn.Linear.reset_parameters
    forward: Any = nn.Linear.forward
    extra_repr: Any = nn.Linear.extra_repr
