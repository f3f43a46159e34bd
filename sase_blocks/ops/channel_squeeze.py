"""Channel squeezes: (B, C, H, W) -> (B, C, 1, 1), one number a channel, taken over H and W.

The seven of SASE (arXiv 2411.08333, the channel squeeze set), in its order. What differs from the authors' code:
roots have a finite gradient at 0, deviations of a single position are 0 instead of NaN, sums run in fp32 for fp16 and
bf16 inputs, group counts below 2 are allowed, any image size is taken, and the two weights of a mixer start at 1/2
(theirs are drawn with a random sign, which kills the ReLU behind them in about half of the draws).
"""

import math
from abc import abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .normalization import BatchNorm2d
from .primitive import Primitive, check_features, contract_rows, mix, narrow, safe_sqrt, scaled_gram, widen

torch.fx.wrap('check_features')  # wrapping is by the module in which a function is called


def channel_avg(x: Tensor) -> Tensor:
    """Mean over H and W. (B, C, H, W) -> (B, C, 1, 1)."""
    return x.mean((2, 3), keepdim=True)


@torch.fx.wrap
def channel_l2_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """L2 norm over H and W of the instance-normalised, affine map. weight, bias: (C,).

    Instance norm leaves mean 0 and variance v / (v + eps), so the sum of squares has the closed form
    HW * (weight^2 v / (v + eps) + bias^2) and one variance is all that is read from x.
    """
    v = torch.var(widen(x), dim=(2, 3), correction=0, keepdim=True)
    w, b = widen(weight).reshape(1, -1, 1, 1), widen(bias).reshape(1, -1, 1, 1)
    return narrow(safe_sqrt((x.shape[2] * x.shape[3]) * (w * w * (v / (v + eps)) + b * b)), x)


@torch.fx.wrap
def channel_p_norm(x: Tensor) -> Tensor:
    """4-norm over H and W: (sum x^4)^(1/4)."""
    square = widen(x).square()
    return narrow(safe_sqrt(safe_sqrt((square * square).sum((2, 3), keepdim=True))), x)


@torch.fx.wrap
def channel_avg_max(x: Tensor, weight: Tensor) -> Tensor:
    """ReLU of the weighted mean and maximum over H and W. weight: (2,)."""
    avg, top = x.mean((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    return narrow(torch.relu(mix(widen(avg), widen(top), widen(weight))), x)


@torch.fx.wrap
def channel_avg_std(x: Tensor, weight: Tensor) -> Tensor:
    """ReLU of the weighted mean and unbiased standard deviation over H and W (0 for one position). weight: (2,)."""
    n = x.shape[2] * x.shape[3]
    var, avg = torch.var_mean(widen(x), dim=(2, 3), correction=0, keepdim=True)
    return narrow(torch.relu(mix(avg, safe_sqrt(var * n / max(n - 1, 1)), widen(weight))), x)


@torch.fx.wrap
def channel_avg_skew(x: Tensor, weight: Tensor) -> Tensor:
    """ReLU of the weighted mean and third central moment over H and W. weight: (2,)."""
    wide = widen(x)
    avg = wide.mean((2, 3), keepdim=True)
    centred = wide - avg
    skew = (centred * centred * centred).mean((2, 3), keepdim=True)
    return narrow(torch.relu(mix(avg, skew, widen(weight))), x)


@torch.fx.wrap
def channel_covariance(x: Tensor, groups: int) -> Tensor:
    """Covariance, over the positions, of ``groups`` averages of neighbouring channels.

    (B, C, H, W) -> (B, groups, groups), in fp32 for half inputs. Divided by groups - 1 as the authors do (at least 1).
    """
    flat = widen(x).flatten(2)
    if x.shape[1] % groups == 0:
        z = flat.unflatten(1, (groups, x.shape[1] // groups)).mean(2)
    else:
        z = F.adaptive_avg_pool1d(flat.transpose(1, 2), groups).transpose(1, 2)
    z = z - z.mean(2, keepdim=True)
    return scaled_gram(z) / max(groups - 1, 1)


class ChannelSqueeze(Primitive):
    """Base of the channel squeezes. Shape: (B, C, H, W) -> (B, C, 1, 1), any H and W.

    Raises in ``forward``: ValueError for another rank, TypeError for a non-floating input.
    """

    def forward(self, x: Tensor) -> Tensor:
        check_features(x, 0)
        return self.squeeze(x)

    @abstractmethod
    def squeeze(self, x: Tensor) -> Tensor:
        """The statistic of a checked x."""


class ChannelAvg(ChannelSqueeze):
    """Global average pooling ('GAP')."""

    paper_key = 'GAP'

    def squeeze(self, x: Tensor) -> Tensor:
        return channel_avg(x)


class ChannelL2Norm(ChannelSqueeze):
    """L2 norm of the instance-normalised map ('L2-norm'), with the norm's affine parameters.

    With untrained parameters it is sqrt(HW) for nearly every input, as in the authors' code.
    """

    paper_key = 'L2-norm'

    def __init__(self, channels: int, feat_size: Any = None, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__(channels, feat_size)
        self.weight = nn.Parameter(torch.empty(channels, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(channels, device=device, dtype=dtype))
        self.eps = 1e-5
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def squeeze(self, x: Tensor) -> Tensor:
        return channel_l2_norm(x, self.weight, self.bias, self.eps)


class ChannelPNorm(ChannelSqueeze):
    """4-norm ('p-norm')."""

    paper_key = 'p-norm'

    def squeeze(self, x: Tensor) -> Tensor:
        return channel_p_norm(x)


class MixedChannelSqueeze(ChannelSqueeze):
    """Base of the squeezes that mix two statistics by two weights, the same for all channels."""

    def __init__(self, channels: int, feat_size: Any = None, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__(channels, feat_size)
        self.weight = nn.Parameter(torch.empty(2, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, 0.5)


class ChannelAvgMax(MixedChannelSqueeze):
    """Mean and maximum, mixed, then ReLU ('GAP+GMP')."""

    paper_key = 'GAP+GMP'

    def squeeze(self, x: Tensor) -> Tensor:
        return channel_avg_max(x, self.weight)


class ChannelAvgStd(MixedChannelSqueeze):
    """Mean and unbiased standard deviation, mixed, then ReLU ('GAP+std')."""

    paper_key = 'GAP+std'

    def squeeze(self, x: Tensor) -> Tensor:
        return channel_avg_std(x, self.weight)


class ChannelAvgSkew(MixedChannelSqueeze):
    """Mean and third central moment, mixed, then ReLU ('SkewPooling')."""

    paper_key = 'SkewPooling'

    def squeeze(self, x: Tensor) -> Tensor:
        return channel_avg_skew(x, self.weight)


class ChannelSecondOrder(ChannelSqueeze):
    """Covariance of channel groups, batch norm, row convolution, ReLU, 1x1 convolution ('2nd-order pooling').

    The C channels are averaged to max(1, C // 4) groups; row g of the covariance becomes one number through its own
    kernel, and a linear map takes the groups back to C.
    """

    paper_key = '2nd-order pooling'

    def __init__(self, channels: int, feat_size: Any = None, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__(channels, feat_size)
        self.groups = max(1, channels // 4)
        g = self.groups
        self.norm = BatchNorm2d(g, device=device, dtype=dtype)
        self.row_weight = nn.Parameter(torch.empty(g, g, device=device, dtype=dtype))
        self.fc = nn.Linear(g, channels, bias=False, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.norm.reset_parameters()
        nn.init.kaiming_uniform_(self.row_weight, a=math.sqrt(5))  # as torch's convolutions
        self.fc.reset_parameters()

    def squeeze(self, x: Tensor) -> Tensor:
        rows = channel_covariance(x, self.groups).unsqueeze(3)  # (B, g, g, 1): row, column
        q = self.fc(torch.relu(contract_rows(self.norm(rows).squeeze(3), self.row_weight)))  # (B, C)
        return q.to(x.dtype)[:, :, None, None]
