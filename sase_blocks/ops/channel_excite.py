"""Channel excitations: (B, C, 1, 1) -> (B, C, 1, 1), from squeezed statistics to an attention over channels.

First come the seven of SASE (arXiv 2411.08333, the channel excitation set) in its order, then those of other published
blocks (``EXTENDED_SETS``), each from the paper it names. ``gated`` says whether the output is already a gate. The MLP's
is not, as in the SASE authors' code. Our changes: weights before a ReLU start with a non-negative sum, so that no
branch starts dead, and overflow inside a stack of fp16 convolutions saturates.
"""

import math
from abc import abstractmethod
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sase_blocks.checks import check_features, check_int, check_kernel_size, check_reduction
from sase_blocks.numerics import narrow, widen

from .layers import Linear
from .normalization import BatchNorm2d
from .primitive import BOTH, Primitive, round_width, turn_positive_

torch.fx.wrap('narrow')
torch.fx.wrap('check_features')  # must be wrapped in each module that calls it


def channel_affine(q: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """sigmoid(weight * q + bias), per channel. q: (B, C, 1, 1); weight, bias: (C,)."""
    return torch.sigmoid(weight.reshape(1, -1, 1, 1) * q + bias.reshape(1, -1, 1, 1))


def eca_kernel_size(channels: int, kernel_size: int | None, gamma: int, beta: int, owner: str) -> int:
    """The given size, or for None the odd size near (log2(C) + beta) / gamma of ECA (arXiv 1910.03151, section 3.2).

    It is at least 3, as in timm. Raises ValueError for an option of ``owner`` out of its range.
    """
    if kernel_size is None:
        size = int((math.log2(channels) + check_int(beta, 'beta', owner, 0)) / check_int(gamma, 'gamma', owner))
        kernel_size = max(size if size % 2 else size + 1, 3)
    elif (gamma, beta) != (2, 1):
        raise ValueError(f'{owner} computes kernel_size from gamma and beta: pass these or {kernel_size=}, not both')
    if check_kernel_size(kernel_size, owner) > 2 * channels + 1:
        raise ValueError(
            f'{owner} of {channels} channels needs kernel_size to be at most {2 * channels + 1}, got {kernel_size}'
        )
    return kernel_size


@torch.fx.wrap
def wrap_around(z: Tensor, pad: int) -> Tensor:
    """Circular padding, (B, C) -> (B, C + 2 pad), also with fewer channels than ``pad``, as after pruning."""
    channels = z.shape[1]
    if pad > channels:
        times = (pad + channels - 1) // channels
        start = times * channels - pad
        return z.repeat(1, 2 * times + 1)[:, start : start + channels + 2 * pad]
    return torch.cat([z[:, channels - pad :], z, z[:, :pad]], 1)


@torch.fx.wrap
def channel_norm_tanh(q: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """1 + tanh(weight * q' + bias) for q' = sqrt(C) q / (sum of q^2 over C + eps)^(1/2). weight, bias: (C,)."""
    wide = widen(q)
    scale = math.sqrt(q.shape[1]) * torch.rsqrt(wide.square().sum(1, keepdim=True) + eps)
    w, b = widen(weight).reshape(1, -1, 1, 1), widen(bias).reshape(1, -1, 1, 1)
    return narrow(1 + torch.tanh(w * (wide * scale) + b), q)


class ChannelExcite(Primitive):
    """Base of the channel excitations. Shape: (B, C, 1, 1) -> (B, C, 1, 1).

    Raises in ``forward``: ValueError for another rank or number of channels, TypeError for a non-floating input.
    """

    gated: ClassVar[bool] = True  # whether the output is already a gate; if not, a composition adds a sigmoid

    def forward(self, q: Tensor) -> Tensor:
        check_features(q, self.current_channels())
        return self.excite(q)

    @abstractmethod
    def excite(self, q: Tensor) -> Tensor:
        """The attention for a checked q."""


class ChannelConv(ChannelExcite):
    """One or more 1-d convolutions along C without biases, ReLU between them, then a sigmoid. One is as in ECA."""

    kernel_sizes: ClassVar[tuple[int, ...]] = (3,)

    def __init__(self, channels: int, feat_size: Any = None, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__(channels, feat_size)
        self.convs = nn.ModuleList(
            nn.Conv1d(1, 1, k, padding=k // 2, bias=False, device=device, dtype=dtype) for k in self.kernel_sizes
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for conv in self.convs:
            assert isinstance(conv, nn.Conv1d)
            conv.reset_parameters()
            if len(self.convs) > 1:
                turn_positive_(conv.weight)

    def excite(self, q: Tensor) -> Tensor:
        z = q.flatten(1).unsqueeze(1)  # b c 1 1 -> b 1 c
        for i, conv in enumerate(self.convs):
            if i > 0:
                z = torch.relu(z)
                z = narrow(z, z)
            z = conv(z)
        return torch.sigmoid(z).transpose(1, 2).unsqueeze(3)


class ChannelConv3Triple(ChannelConv):
    """Three convolutions of size 3 ('3conv1D_3')."""

    paper_key = '3conv1D_3'
    kernel_sizes = (3, 3, 3)


class ChannelMLP(ChannelExcite):
    """C -> max(1, C // reduction) -> C with a ReLU between, no biases and **no gate at the end** ('2conv_1x1').

    Squeeze-and-Excitation (arXiv 1709.01507) has reduction 16, and scSE (arXiv 1803.02579, section 2.1) 2.
    """

    paper_key = '2conv_1x1'
    gated = False
    per_channel: ClassVar[dict[str, int]] = {'fc1': 1, 'fc2': 0}

    def __init__(
        self, channels: int, feat_size: Any = None, *, reduction: int = 16, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__(channels, feat_size)
        hidden = max(1, channels // check_reduction(reduction, channels, type(self).__name__))
        # Linear layers give the same numbers as 1x1 convolutions. But a wide convolution in the graph makes a compiler
        # first copy x into channels_last, two more traversals of it.
        self.fc1 = Linear(channels, hidden, bias=False, device=device, dtype=dtype)
        self.fc2 = Linear(hidden, channels, bias=False, device=device, dtype=dtype)
        self.reset_parameters()

    def current_channels(self) -> int:
        return self.fc1.weight.shape[1]

    def reset_parameters(self) -> None:
        self.fc1.reset_parameters()
        turn_positive_(self.fc1.weight)
        self.fc2.reset_parameters()

    def excite(self, q: Tensor) -> Tensor:
        return self.fc2(torch.relu(self.fc1(q.flatten(1))))[:, :, None, None]


class ChannelConv3(ChannelConv):
    """One convolution of size 3 ('conv1D_3')."""

    paper_key = 'conv1D_3'
    kernel_sizes = (3,)


class ChannelConv5(ChannelConv):
    """One convolution of size 5 ('conv1D_5')."""

    paper_key = 'conv1D_5'
    kernel_sizes = (5,)


class ChannelConv7(ChannelConv):
    """One convolution of size 7 ('conv1D_7')."""

    paper_key = 'conv1D_7'
    kernel_sizes = (7,)


class ChannelConv3Double(ChannelConv):
    """Two convolutions of size 3 ('2conv1D_3')."""

    paper_key = '2conv1D_3'
    kernel_sizes = (3, 3)


class ChannelAffine(ChannelExcite):
    """sigmoid(weight * q + bias) per channel, started at 1 and 0 ('affine').

    The parameters are 1-d, so that optimisers that exclude 1-d parameters from weight decay exclude these.
    """

    paper_key = 'affine'
    per_channel: ClassVar[dict[str, int]] = {'weight': 0, 'bias': 0}

    def __init__(self, channels: int, feat_size: Any = None, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__(channels, feat_size)
        self.weight = nn.Parameter(torch.empty(channels, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(channels, device=device, dtype=dtype))
        self.reset_parameters()

    def current_channels(self) -> int:
        return self.weight.shape[0]

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def excite(self, q: Tensor) -> Tensor:
        return channel_affine(q, self.weight, self.bias)


# ---- beyond the paper's set ----


class ChannelIdentity(ChannelExcite):
    """The statistic itself, for a squeeze that has its own weights. A composition makes it a gate."""

    gated = False

    def excite(self, q: Tensor) -> Tensor:
        return q


class ChannelNorm(ChannelExcite):
    """Batch norm of the statistic, as in SRM (arXiv 1903.10829, section 3)."""

    gated = False
    per_channel: ClassVar[dict[str, int]] = {'norm': 0}

    def __init__(self, channels: int, feat_size: Any = None, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__(channels, feat_size)
        self.norm = BatchNorm2d(channels, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        self.norm.reset_parameters()

    def excite(self, q: Tensor) -> Tensor:
        return self.norm(q)


class ChannelNormTanh(ChannelExcite):
    """Channel normalisation and tanh gate of the gated channel transformation (arXiv 1909.11519, section 3).

    The gate is 1 + tanh(...), in (0, 2). Its parameters start at zero, so the gate starts at 1.
    """

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
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def excite(self, q: Tensor) -> Tensor:
        return channel_norm_tanh(q, self.weight, self.bias, self.eps)


class ChannelFC(ChannelExcite):
    """One C -> C linear layer with bias and a hard sigmoid: the eSE module of CenterMask (arXiv 1911.06667)."""

    per_channel: ClassVar[dict[str, int]] = {'fc': BOTH}

    def __init__(self, channels: int, feat_size: Any = None, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__(channels, feat_size)
        self.fc = Linear(channels, channels, device=device, dtype=dtype)
        self.reset_parameters()

    def current_channels(self) -> int:
        return self.fc.weight.shape[1]

    def reset_parameters(self) -> None:
        self.fc.reset_parameters()

    def excite(self, q: Tensor) -> Tensor:
        # A hard sigmoid, written out, because torch's has no second derivative, which a second-order search needs.
        return ((self.fc(q.flatten(1)) + 3).clamp(0, 6) / 6)[:, :, None, None]


class ChannelConvECA(ChannelExcite):
    """One convolution along C without bias, then a sigmoid: ECA (arXiv 1910.03151, section 3).

    Its size is ``kernel_size``, by default the odd number near (log2(C) + beta) / gamma, at least 3.
    """

    def __init__(
        self,
        channels: int,
        feat_size: Any = None,
        *,
        kernel_size: int | None = None,
        gamma: int = 2,
        beta: int = 1,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(channels, feat_size)
        k = eca_kernel_size(channels, kernel_size, gamma, beta, type(self).__name__)
        self.convs = nn.ModuleList([nn.Conv1d(1, 1, k, padding=k // 2, bias=False, device=device, dtype=dtype)])
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.convs[0].reset_parameters()  # type: ignore[operator]

    def excite(self, q: Tensor) -> Tensor:
        return torch.sigmoid(self.convs[0](q.flatten(1).unsqueeze(1))).transpose(1, 2).unsqueeze(3)


class ChannelConvCircular(ChannelConvECA):
    """ECA's convolution with circular padding: timm's circular ECA, not in the paper."""

    def excite(self, q: Tensor) -> Tensor:
        weight: Tensor = self.convs[0].weight  # type: ignore[assignment]
        ring = wrap_around(q.flatten(1), weight.shape[2] // 2)
        return torch.sigmoid(F.conv1d(ring.unsqueeze(1), weight)).transpose(1, 2).unsqueeze(3)


class ChannelConvMLP(ChannelExcite):
    """ECA with hidden maps: each statistic to C // reduction values, ReLU, then ECA's convolution to one.

    timm's experiment ('ecam'), in no paper. The number of hidden maps is a multiple of 8.
    """

    def __init__(
        self,
        channels: int,
        feat_size: Any = None,
        *,
        reduction: int = 8,
        kernel_size: int | None = None,
        gamma: int = 2,
        beta: int = 1,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(channels, feat_size)
        name = type(self).__name__
        hidden = round_width(channels / check_reduction(reduction, channels, name), 0.9)
        k = eca_kernel_size(channels, kernel_size, gamma, beta, name)
        self.conv1 = nn.Conv1d(1, hidden, 1, device=device, dtype=dtype)
        self.conv2 = nn.Conv1d(hidden, 1, k, padding=k // 2, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.conv1.reset_parameters()
        self.conv2.reset_parameters()

    def excite(self, q: Tensor) -> Tensor:
        z = torch.relu(self.conv1(q.flatten(1).unsqueeze(1)))
        z = narrow(z, z)
        return torch.sigmoid(self.conv2(z)).transpose(1, 2).unsqueeze(3)


class ChannelMLPNorm(ChannelExcite):
    """C -> layer norm -> ReLU -> C with biases, no gate: the transform of GCNet (arXiv 1904.11492, section 3.3).

    The hidden width is max(1, C // reduction). The second layer has the default initialisation. timm and the authors'
    code start it at zero if its result is added.
    """

    gated = False
    per_channel: ClassVar[dict[str, int]] = {'fc1': 1, 'fc2': 0}

    def __init__(
        self, channels: int, feat_size: Any = None, *, reduction: int = 16, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__(channels, feat_size)
        hidden = max(1, channels // check_reduction(reduction, channels, type(self).__name__))
        self.fc1 = Linear(channels, hidden, device=device, dtype=dtype)
        self.norm = nn.LayerNorm(hidden, device=device, dtype=dtype)
        self.fc2 = Linear(hidden, channels, device=device, dtype=dtype)
        self.reset_parameters()

    def current_channels(self) -> int:
        return self.fc1.weight.shape[1]

    def reset_parameters(self) -> None:
        for layer in (self.fc1, self.norm, self.fc2):
            layer.reset_parameters()

    def excite(self, q: Tensor) -> Tensor:
        return self.fc2(torch.relu(self.norm(self.fc1(q.flatten(1)))))[:, :, None, None]


class ChannelMLPBatchNorm(ChannelExcite):
    """C -> max(1, C // reduction) -> ReLU -> C with biases, batch norm, no gate: BAM (arXiv 1807.06514, eq. 3)."""

    gated = False
    per_channel: ClassVar[dict[str, int]] = {'fc1': 1, 'fc2': 0, 'norm': 0}

    def __init__(
        self, channels: int, feat_size: Any = None, *, reduction: int = 16, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__(channels, feat_size)
        hidden = max(1, channels // check_reduction(reduction, channels, type(self).__name__))
        self.fc1 = Linear(channels, hidden, device=device, dtype=dtype)
        self.fc2 = Linear(hidden, channels, device=device, dtype=dtype)
        self.norm = BatchNorm2d(channels, device=device, dtype=dtype)
        self.reset_parameters()

    def current_channels(self) -> int:
        return self.fc1.weight.shape[1]

    def reset_parameters(self) -> None:
        for layer in (self.fc1, self.fc2, self.norm):
            layer.reset_parameters()
        turn_positive_(self.fc1.weight)

    def excite(self, q: Tensor) -> Tensor:
        return self.norm(self.fc2(torch.relu(self.fc1(q.flatten(1))))[:, :, None, None])
