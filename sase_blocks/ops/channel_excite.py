"""Channel excitations: (B, C, 1, 1) -> (B, C, 1, 1), from squeezed statistics to an attention over channels.

The seven of SASE (arXiv 2411.08333, the channel excitation set), in its order. All but the MLP end in a sigmoid; the
MLP has no gate at the end, as in the authors' code, and says so in ``gated``. What differs: weights in front of a
ReLU start with a non-negative sum, so that no branch is born dead, and overflow inside a stack of fp16 convolutions
saturates.
"""

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .primitive import Primitive, check_features, saturate, turn_positive_

torch.fx.wrap('saturate')
torch.fx.wrap('check_features')  # wrapping is by the module in which a function is called


def channel_affine(q: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """sigmoid(weight * q + bias), per channel. q: (B, C, 1, 1); weight, bias: (C,)."""
    return torch.sigmoid(weight.reshape(1, -1, 1, 1) * q + bias.reshape(1, -1, 1, 1))


class ChannelExcite(Primitive):
    """Base of the channel excitations. Shape: (B, C, 1, 1) -> (B, C, 1, 1).

    Raises in ``forward``: ValueError for another rank or number of channels, TypeError for a non-floating input.
    """

    gated: ClassVar[bool] = True  # whether the output is already in (0, 1)

    def forward(self, q: Tensor) -> Tensor:
        check_features(q, self.channels)
        return self.excite(q)

    @abstractmethod
    def excite(self, q: Tensor) -> Tensor:
        """The attention for a checked q."""


class ChannelConv(ChannelExcite):
    """One or more 1-d convolutions along C, ReLU between them, a sigmoid at the end; no biases. As in ECA for one."""

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
                z = saturate(torch.relu(z))
            z = conv(z)
        return torch.sigmoid(z).transpose(1, 2).unsqueeze(3)


class ChannelConv3Triple(ChannelConv):
    """Three convolutions of size 3 ('3conv1D_3')."""

    paper_key = '3conv1D_3'
    kernel_sizes = (3, 3, 3)


class ChannelMLP(ChannelExcite):
    """C -> max(1, C // 16) -> C with a ReLU between, no biases and **no gate at the end** ('2conv_1x1')."""

    paper_key = '2conv_1x1'
    gated = False

    def __init__(self, channels: int, feat_size: Any = None, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__(channels, feat_size)
        hidden = max(1, channels // 16)
        # Linear, not 1x1 convolutions: the same numbers, and a wide convolution in the graph makes a compiler copy x
        # into channels_last first, which is two more traversals of it.
        self.fc1 = nn.Linear(channels, hidden, bias=False, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden, channels, bias=False, device=device, dtype=dtype)
        self.reset_parameters()

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

    The parameters are 1-d, so that optimisers which leave 1-d parameters out of weight decay leave these out.
    """

    paper_key = 'affine'

    def __init__(self, channels: int, feat_size: Any = None, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__(channels, feat_size)
        self.weight = nn.Parameter(torch.empty(channels, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(channels, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def excite(self, q: Tensor) -> Tensor:
        return channel_affine(q, self.weight, self.bias)
