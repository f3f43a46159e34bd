"""Statistics of a map over the squeezed dimensions: (2, 3) in a channel squeeze, (1,) in a spatial one.

Each keeps the squeezed dimensions at size 1. The pairs of SASE (arXiv 2411.08333) mix two statistics with two weights,
then apply a ReLU. For fp16 and bf16 inputs the sums run in fp32.
"""

import torch
from torch import Tensor

from sase_blocks.numerics import narrow, safe_sqrt, widen

from .eager import mean_max
from .primitive import mix

torch.fx.wrap('mean_max')  # must be wrapped in each module that calls it


def squeezed_size(x: Tensor, dims: list[int]) -> int:
    """The number of values of ``x`` in one statistic over ``dims``."""
    n = 1
    for dim in dims:
        n = n * x.shape[dim]
    return n


@torch.fx.wrap
def channel_mean(x: Tensor) -> Tensor:
    """Mean over C. The gradient of a sum is a view, that of a mean is written out. But fp16 sums may be infinite."""
    return x.mean(1, keepdim=True) if x.dtype == torch.float16 else x.sum(1, keepdim=True) / x.shape[1]


@torch.fx.wrap
def avg_max(x: Tensor, weight: Tensor, dims: list[int]) -> Tensor:
    """ReLU of the weighted mean and maximum over ``dims``. weight: (2,)."""
    avg, top = mean_max(x, dims)
    return narrow(torch.relu(mix(widen(avg), widen(top), widen(weight))), x)


@torch.fx.wrap
def avg_std(x: Tensor, weight: Tensor, dims: list[int]) -> Tensor:
    """ReLU of the weighted mean and unbiased standard deviation over ``dims`` (0 for one value). weight: (2,)."""
    n = squeezed_size(x, dims)
    var, avg = torch.var_mean(widen(x), dim=dims, correction=0, keepdim=True)
    return narrow(torch.relu(mix(avg, safe_sqrt(var * n / max(n - 1, 1)), widen(weight))), x)


@torch.fx.wrap
def avg_skew(x: Tensor, weight: Tensor, dims: list[int]) -> Tensor:
    """ReLU of the weighted mean and third central moment over ``dims``. weight: (2,)."""
    wide = widen(x)
    avg = wide.mean(dims, keepdim=True)
    centred = wide - avg
    skew = (centred * centred * centred).mean(dims, keepdim=True)
    return narrow(torch.relu(mix(avg, skew, widen(weight))), x)


def avg_plus_max(x: Tensor, dims: list[int]) -> Tensor:
    """(mean + maximum) / 2 over ``dims``."""
    avg, top = mean_max(x, dims)
    return 0.5 * avg + 0.5 * top
