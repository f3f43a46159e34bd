"""The two small compositions: one squeeze and one excitation make a gate on x, along the channels or the positions.

``ChannelAttention(C, 'avg', 'mlp')`` is Squeeze-and-Excitation (arXiv 1709.01507, eq. 2 to 4), ``('avg', 'conv3')`` is
ECA (arXiv 1910.03151) at k = 3; the rest of the 49 + 49 pairs have no name.
"""

from typing import Any

import torch
from torch import Tensor, nn

from sase_blocks.ops import CHANNEL_EXCITE, CHANNEL_SQUEEZE, SPATIAL_EXCITE, SPATIAL_SQUEEZE, primitive_name


class ChannelAttention(nn.Module):
    """y = x * excite(squeeze(x)), one gate a channel. Shape: (B, C, H, W) -> (B, C, H, W).

    An excitation that does not end in a gate (``mlp``) gets a sigmoid here.

    Args:
        channels: C, at least 1.
        squeeze: a name from ``ops.CHANNEL_SQUEEZE`` or the paper's key.
        excite: a name from ``ops.CHANNEL_EXCITE`` or the paper's key.
        feat_size: accepted by all blocks; no channel primitive needs it.
        device, dtype: of the parameters.

    Raises:
        ValueError: bad channels or names; in ``forward`` another rank or number of channels.
    """

    def __init__(
        self,
        channels: int,
        squeeze: str = 'avg',
        excite: str = 'mlp',
        feat_size: int | tuple[int, int] | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        args: dict[str, Any] = {'feat_size': feat_size, 'device': device, 'dtype': dtype}
        self.squeeze = CHANNEL_SQUEEZE[primitive_name('channel_squeeze', squeeze)](channels, **args)
        self.excite = CHANNEL_EXCITE[primitive_name('channel_excite', excite)](channels, **args)
        self.gate = nn.Identity() if self.excite.gated else nn.Sigmoid()

    def reset_parameters(self) -> None:
        """Draw the parameters anew."""
        self.squeeze.reset_parameters()
        self.excite.reset_parameters()

    def zero_init_last(self) -> None:
        """timm's hook after it has re-drawn every Conv2d of a ResNet: bring back our own initialisation."""
        self.reset_parameters()

    def gates(self, x: Tensor) -> tuple[Tensor, None]:
        """The channel attention (B, C, 1, 1), and None for the spatial one."""
        return self.gate(self.excite(self.squeeze(x))), None

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.excite(self.squeeze(x))).to(x.dtype)


class SpatialAttention(nn.Module):
    """y = x * excite(squeeze(x)), one gate a position. Shape: (B, C, H, W) -> (B, C, H, W).

    Args:
        channels: C, at least 1.
        squeeze: a name from ``ops.SPATIAL_SQUEEZE`` or the paper's key.
        excite: a name from ``ops.SPATIAL_EXCITE`` or the paper's key.
        feat_size: (H, W), needed by ``l2_norm`` and ``affine``, which have parameters per position.
        device, dtype: of the parameters.

    Raises:
        ValueError: bad channels or names, or feat_size missing; in ``forward`` another rank.
    """

    def __init__(
        self,
        channels: int,
        squeeze: str = 'avg_max',
        excite: str = 'conv7x7',
        feat_size: int | tuple[int, int] | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        args: dict[str, Any] = {'feat_size': feat_size, 'device': device, 'dtype': dtype}
        self.squeeze = SPATIAL_SQUEEZE[primitive_name('spatial_squeeze', squeeze)](channels, **args)
        self.excite = SPATIAL_EXCITE[primitive_name('spatial_excite', excite)](channels, **args)

    def reset_parameters(self) -> None:
        """Draw the parameters anew."""
        self.squeeze.reset_parameters()
        self.excite.reset_parameters()

    def zero_init_last(self) -> None:
        """timm's hook after it has re-drawn every Conv2d of a ResNet: bring back our own initialisation."""
        self.reset_parameters()

    def gates(self, x: Tensor) -> tuple[None, Tensor]:
        """None for the channel attention, and the spatial one (B, 1, H, W)."""
        return None, self.excite(self.squeeze(x))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.excite(self.squeeze(x)).to(x.dtype)
