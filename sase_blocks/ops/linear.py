"""A linear layer without bias that is no ``nn.Linear``."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BiasFreeLinear(nn.Module):
    """y = x W^T. Shape: (..., in_features) -> (..., out_features); the weight starts as that of ``nn.Linear``.

    Some of timm's networks set the bias of every ``nn.Linear`` that they find to zero, and fail where there is none
    (VoVNet), or draw the weights anew (EfficientNet); an attention in their slot keeps its start with this one.
    """

    def __init__(self, in_features: int, out_features: int, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)

    def extra_repr(self) -> str:
        return f'{self.weight.shape[1]}, {self.weight.shape[0]}'
