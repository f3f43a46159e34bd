"""A convolution and a linear layer that do not subclass ``nn.Conv2d`` and ``nn.Linear``, for blocks in other networks.

timm's networks reinitialise every ``nn.Conv2d`` and many ``nn.Linear``, also in their attention slots, and zero their
biases (VoVNet fails if there is none). Most call nothing afterwards that could restore a block's initialisation, so
they must not recognise these layers.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.utils import _pair


class Conv2d(_ConvNd):
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
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        sizes = _pair(kernel_size), _pair(stride), _pair(padding), _pair(dilation)
        super().__init__(in_channels, out_channels, *sizes, False, _pair(0), groups, bias, 'zeros', device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Linear(nn.Module):
    """Initialises and computes like ``nn.Linear``. Shape: (..., in_features) -> (..., out_features)."""

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_features)
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f'{self.in_features}, {self.out_features}, bias={self.bias is not None}'
