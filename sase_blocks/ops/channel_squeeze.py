"""Channel squeezes: (B, C, H, W) -> (B, C, 1, 1), one number per channel, taken over H and W.

First come the seven of SASE (arXiv 2411.08333, the channel squeeze set) in its order, then those of other published
blocks (``EXTENDED_SETS``), each from the paper it names. Differences from the SASE authors' code: roots have a finite
gradient at 0, deviations of a single position are 0 instead of NaN, sums run in fp32 for fp16 and bf16 inputs, group
counts below 2 and any image size are allowed, and the two weights of a mixer start at 1/2 (theirs start with random
signs, which kills the next ReLU in about half of the draws).
"""

import math
from abc import abstractmethod
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sase_blocks.checks import check_features, check_int, check_reduction
from sase_blocks.numerics import narrow, safe_sqrt, widen

from .layers import Conv2d, Linear
from .normalization import BatchNorm2d
from .primitive import Primitive, contract_rows, pooling_matrix, project, scaled_gram
from .statistics import avg_max, avg_plus_max, avg_skew, avg_std

torch.fx.wrap('check_features')  # must be wrapped in each module that calls it
torch.fx.wrap('avg_max')
torch.fx.wrap('avg_skew')
torch.fx.wrap('avg_std')


@torch.fx.wrap
def channel_l2_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """L2 norm over H and W of the instance-normalised, affine map. weight, bias: (C,).

    Instance norm gives mean 0 and variance v / (v + eps), so the sum of squares has the closed form
    HW * (weight^2 v / (v + eps) + bias^2) and needs only one variance of x.
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
def channel_covariance(x: Tensor, groups: int) -> Tensor:
    """Covariance, over the positions, of ``groups`` averages of neighbouring channels.

    (B, C, H, W) -> (B, groups, groups), in fp32 for half inputs. Divided by groups - 1 (at least 1), as by the authors.
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

    Raises in ``forward``: ValueError for another rank or number of channels, TypeError for a non-floating input.
    """

    def forward(self, x: Tensor) -> Tensor:
        check_features(x, self.current_channels())
        return self.squeeze(x)

    @abstractmethod
    def squeeze(self, x: Tensor) -> Tensor:
        """The statistic of a checked x."""


class ChannelAvg(ChannelSqueeze):
    """Global average pooling ('GAP')."""

    paper_key = 'GAP'

    def squeeze(self, x: Tensor) -> Tensor:
        return x.mean((2, 3), keepdim=True)


class ChannelL2Norm(ChannelSqueeze):
    """L2 norm of the instance-normalised map ('L2-norm'), with the norm's affine parameters.

    With untrained parameters it is sqrt(HW) for nearly every input, as in the authors' code.
    """

    paper_key = 'L2-norm'
    per_channel: ClassVar[dict[str, int]] = {'weight': 0, 'bias': 0}

    def __init__(self, channels: int, feat_size: Any = None, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__(channels, feat_size)
        self.weight = nn.Parameter(torch.empty(channels, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(channels, device=device, dtype=dtype))
        self.eps = 1e-5
        self.reset_parameters()

    def current_channels(self) -> int:
        return self.weight.shape[0]

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
    """Base of the squeezes that mix two statistics with two weights, shared by all channels."""

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
        return avg_max(x, self.weight, [2, 3])


class ChannelAvgStd(MixedChannelSqueeze):
    """Mean and unbiased standard deviation, mixed, then ReLU ('GAP+std')."""

    paper_key = 'GAP+std'

    def squeeze(self, x: Tensor) -> Tensor:
        return avg_std(x, self.weight, [2, 3])


class ChannelAvgSkew(MixedChannelSqueeze):
    """Mean and third central moment, mixed, then ReLU ('SkewPooling')."""

    paper_key = 'SkewPooling'

    def squeeze(self, x: Tensor) -> Tensor:
        return avg_skew(x, self.weight, [2, 3])


class ChannelSecondOrder(ChannelSqueeze):
    """Covariance of channel groups, batch norm, row convolution, ReLU, 1x1 convolution ('2nd-order pooling').

    The C channels are averaged to max(1, C // reduction) groups. Each row of the covariance becomes one number through
    its own kernel, and a linear layer maps the groups back to C.
    """

    paper_key = '2nd-order pooling'
    per_channel: ClassVar[dict[str, int]] = {'fc': 0}

    def __init__(
        self, channels: int, feat_size: Any = None, *, reduction: int = 4, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__(channels, feat_size)
        g = max(1, channels // check_reduction(reduction, channels, type(self).__name__))
        self.norm = BatchNorm2d(g, device=device, dtype=dtype)
        self.row_weight = nn.Parameter(torch.empty(g, g, device=device, dtype=dtype))
        self.fc = Linear(g, channels, bias=False, device=device, dtype=dtype)
        self.reset_parameters()

    def current_channels(self) -> int:
        return self.fc.weight.shape[0]

    def reset_parameters(self) -> None:
        self.norm.reset_parameters()
        nn.init.kaiming_uniform_(self.row_weight, a=math.sqrt(5))  # as in torch's convolutions
        self.fc.reset_parameters()

    def squeeze(self, x: Tensor) -> Tensor:
        rows = channel_covariance(x, self.row_weight.shape[0]).unsqueeze(3)  # (B, g, g, 1): row, column
        q = self.fc(torch.relu(contract_rows(self.norm(rows).squeeze(3), self.row_weight)))  # (B, C)
        return q.to(x.dtype)[:, :, None, None]


# ---- beyond the paper's set ----

# FcaNet's sixteen best frequencies (row, column) on ImageNet, in units of a 7 x 7 spectrum.
DCT_FREQUENCIES = (
    (0, 0), (0, 1), (6, 0), (0, 5), (0, 2), (1, 0), (1, 2), (4, 0),
    (5, 0), (1, 6), (3, 0), (0, 4), (0, 6), (0, 3), (3, 5), (2, 2),
)  # fmt: skip


def dct_basis(frequencies: Tensor, size: int) -> Tensor:
    """Orthonormal DCT-II rows (F, size) for the given (F,) frequencies."""
    position = torch.arange(size, device=frequencies.device, dtype=frequencies.dtype) + 0.5
    frequency = frequencies[:, None]
    wave = torch.cos(math.pi / size * frequency * position)
    return wave * torch.sqrt((1 + (frequency > 0).to(frequencies.dtype)) / size)


def octal_digits(numbers: list[int], like: Tensor) -> Tensor:
    """The eight octal digits of each number, lowest first, as one tensor: (8 N,). fp32 holds their 24 bits."""
    power = torch.pow(8.0, torch.arange(8, device=like.device, dtype=like.dtype))
    shifted = torch.cat([torch.floor(number / power) for number in numbers])
    return shifted - 8 * torch.floor(shifted / 8)


@torch.fx.wrap
def channel_dct(
    x: Tensor, rows: list[int], columns: list[int], height: int, width: int, frequencies: int = 16
) -> Tensor:
    """One of the first DCT coefficients per channel: channel c of C has frequency number c * frequencies // C.

    If x (B, C, H, W) has another size, it is first average-pooled to height x width. Frequencies are in units of a 7 x
    7 spectrum, so those of a larger map are multiplied by height // 7 and width // 7. rows, columns: the sixteen
    frequencies as the octal digits of two numbers, lowest first, because a tensor would be copied from the host at
    every call, which breaks a CUDA graph. -> (B, C, 1, 1).
    """
    wide = widen(x)
    u = octal_digits(rows, wide) * max(1, height // 7)
    v = octal_digits(columns, wide) * max(1, width // 7)
    pool_h = pooling_matrix(x.shape[2], height, wide)
    pool_w = pooling_matrix(x.shape[3], width, wide)
    of_channel = torch.arange(x.shape[1], device=x.device) * frequencies // x.shape[1]
    # Sums of products, because autocast would run matrix products in half precision.
    weight_h = (dct_basis(u, height)[:, :, None] * pool_h).sum(1)[of_channel]  # (C, H)
    weight_w = (dct_basis(v, width)[:, :, None] * pool_w).sum(1)[of_channel]  # (C, W)
    weight = weight_h[:, :, None] * weight_w[:, None, :]
    return narrow((wide * weight).sum((2, 3), keepdim=True), x)


@torch.fx.wrap
def position_covariance(x: Tensor) -> Tensor:
    """Covariance of the channels over the positions, divided by HW. (B, C, H, W) -> (B, C, C), fp32 for half inputs."""
    z = widen(x).flatten(2)
    return scaled_gram(z - z.mean(2, keepdim=True)) / (x.shape[2] * x.shape[3])


@torch.fx.wrap
def channel_l2(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """weight * (sum of squares over H and W + eps)^(1/2). weight: (C,)."""
    total = widen(x).square().sum((2, 3), keepdim=True)
    return narrow(widen(weight).reshape(1, -1, 1, 1) * torch.sqrt(total + eps), x)


@torch.fx.wrap
def channel_style(x: Tensor, weight: Tensor) -> Tensor:
    """weight[c, 0] * mean + weight[c, 1] * standard deviation over H and W. weight: (C, 2)."""
    var, avg = torch.var_mean(widen(x), dim=(2, 3), correction=0, keepdim=True)
    w = widen(weight)
    return narrow(w[:, 0].reshape(1, -1, 1, 1) * avg + w[:, 1].reshape(1, -1, 1, 1) * safe_sqrt(var), x)


@torch.fx.wrap
def channel_attention_pool(x: Tensor, weight: Tensor) -> Tensor:
    """Mean over the positions weighted by softmax(weight . x). weight: (C,)."""
    attention = project(x, weight).flatten(2).softmax(2).unflatten(2, (x.shape[2], x.shape[3]))
    return narrow((widen(x) * attention).sum((2, 3), keepdim=True), x)


class ChannelMax(ChannelSqueeze):
    """Global max pooling, used with the mean in CBAM (arXiv 1807.06521, eq. 2)."""

    def squeeze(self, x: Tensor) -> Tensor:
        return x.amax((2, 3), keepdim=True)


class ChannelAvgPlusMax(ChannelSqueeze):
    """(mean + maximum) / 2 without weights, as in timm's light CBAM."""

    def squeeze(self, x: Tensor) -> Tensor:
        return avg_plus_max(x, [2, 3])


class ChannelAttentionPool(ChannelSqueeze):
    """Attention pooling of GCNet (arXiv 1904.11492, section 3.3): the mean weighted by a softmax over all positions.

    Omits the bias of timm and the authors' code, because the softmax cancels it.
    """

    per_channel: ClassVar[dict[str, int]] = {'weight': 0}

    def __init__(self, channels: int, feat_size: Any = None, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__(channels, feat_size)
        self.weight = nn.Parameter(torch.empty(channels, device=device, dtype=dtype))
        self.reset_parameters()

    def current_channels(self) -> int:
        return self.weight.shape[0]

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=math.sqrt(2 / self.weight.shape[0]))  # He, fan in

    def squeeze(self, x: Tensor) -> Tensor:
        return channel_attention_pool(x, self.weight)


class ChannelStyle(ChannelSqueeze):
    """Style pooling and channel-wise full connection of SRM (arXiv 1903.10829, section 3): a mean and a deviation."""

    per_channel: ClassVar[dict[str, int]] = {'weight': 0}

    def __init__(self, channels: int, feat_size: Any = None, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__(channels, feat_size)
        self.weight = nn.Parameter(torch.empty(channels, 2, device=device, dtype=dtype))
        self.reset_parameters()

    def current_channels(self) -> int:
        return self.weight.shape[0]

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))  # as in torch's linear layers

    def squeeze(self, x: Tensor) -> Tensor:
        return channel_style(x, self.weight)


class ChannelL2(ChannelSqueeze):
    """Global context embedding of the gated channel transformation (arXiv 1909.11519, section 3): weighted 2-norm."""

    per_channel: ClassVar[dict[str, int]] = {'weight': 0}

    def __init__(self, channels: int, feat_size: Any = None, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__(channels, feat_size)
        self.weight = nn.Parameter(torch.empty(channels, device=device, dtype=dtype))
        self.eps = 1e-5
        self.reset_parameters()

    def current_channels(self) -> int:
        return self.weight.shape[0]

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def squeeze(self, x: Tensor) -> Tensor:
        return channel_l2(x, self.weight, self.eps)


class ChannelDCT(ChannelSqueeze):
    """Multi-spectral pooling of FcaNet (arXiv 2012.11879, section 3), with its best frequencies, 1 to 16 of them.

    The spectrum has the size ``feat_size``, 7 x 7 by default. Maps of another size are average-pooled to it, as in the
    authors' code. Our addition: any number of channels, with one frequency for each sixteenth.
    """

    def __init__(
        self, channels: int, feat_size: Any = None, *, frequencies: int = 16, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__(channels, feat_size)
        self.frequencies = check_int(frequencies, 'frequencies', type(self).__name__, most=len(DCT_FREQUENCIES))
        self.height, self.width = self.feat_size or (7, 7)
        halves = (DCT_FREQUENCIES[:8], DCT_FREQUENCIES[8:])
        self.rows = [sum(row * 8**i for i, (row, _) in enumerate(half)) for half in halves]
        self.columns = [sum(column * 8**i for i, (_, column) in enumerate(half)) for half in halves]

    def squeeze(self, x: Tensor) -> Tensor:
        return channel_dct(x, self.rows, self.columns, self.height, self.width, self.frequencies)


class ChannelGSoP(ChannelSqueeze):
    """Second-order pooling of GSoP-Net (arXiv 1811.12006, section 3), as in the authors' code.

    A 1x1 convolution, batch norm and ReLU reduce x to c = min(rd_channels, C) channels. Their c x c covariance over the
    positions is batch-normalised, each row becomes four numbers through its own kernel, and a linear layer gives C.
    """

    per_channel: ClassVar[dict[str, int]] = {'reduce': 1, 'fc': 0}

    def __init__(
        self, channels: int, feat_size: Any = None, *, rd_channels: int = 128, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__(channels, feat_size)
        c = min(check_int(rd_channels, 'rd_channels', type(self).__name__, most=max(channels, 128)), channels)
        self.reduce = Conv2d(channels, c, 1, device=device, dtype=dtype)
        self.reduce_norm = BatchNorm2d(c, device=device, dtype=dtype)
        self.norm = BatchNorm2d(c, device=device, dtype=dtype)
        self.row_weight = nn.Parameter(torch.empty(c, 4, c, device=device, dtype=dtype))
        self.row_bias = nn.Parameter(torch.empty(c, 4, device=device, dtype=dtype))
        self.fc = Linear(4 * c, channels, device=device, dtype=dtype)
        self.reset_parameters()

    def current_channels(self) -> int:
        return self.fc.weight.shape[0]

    def reset_parameters(self) -> None:
        for layer in (self.reduce, self.reduce_norm, self.norm, self.fc):
            layer.reset_parameters()
        bound = 1 / math.sqrt(self.row_weight.shape[2])  # as in torch's convolutions with this fan-in
        nn.init.uniform_(self.row_weight, -bound, bound)
        nn.init.uniform_(self.row_bias, -bound, bound)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {'row_bias'}

    def squeeze(self, x: Tensor) -> Tensor:
        z = torch.relu(self.reduce_norm(self.reduce(x)))
        rows = self.norm(position_covariance(z).unsqueeze(3)).squeeze(3)  # (B, c, c)
        q = torch.einsum('brj,rkj->brk', rows, self.row_weight) + self.row_bias
        return self.fc(q.flatten(1)).to(x.dtype)[:, :, None, None]
