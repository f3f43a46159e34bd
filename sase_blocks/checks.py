"""Checks of the arguments of blocks and models: channels, sizes and feature maps."""

from typing import Any

import torch
from torch import Tensor


def check_channels(channels: Any, owner: str) -> int:
    """The channel count as an int, or a ValueError that names ``owner``."""
    if isinstance(channels, bool) or not isinstance(channels, int) or channels < 1:
        raise ValueError(f'{owner} needs channels to be an int of at least 1, got {channels!r}')
    return channels


def check_feat_size(feat_size: Any, owner: str) -> tuple[int, int]:
    """(H, W) from an int or a pair of ints, or a ValueError that names ``owner``."""
    size = (feat_size, feat_size) if isinstance(feat_size, int) else feat_size
    if (
        not isinstance(size, (tuple, list))
        or len(size) != 2
        or not all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in size)
    ):
        raise ValueError(f'{owner} needs feat_size to be (H, W) or an int, each at least 1, got {feat_size!r}')
    return (size[0], size[1])


# torch.fx.wrap keeps the function whole in a symbolic trace, because it depends on a real tensor's dtype and rank,
# which a traced proxy does not know.
@torch.fx.wrap
def check_features(x: Tensor, channels: int) -> None:
    """Raise unless ``x`` is a floating (B, channels, H, W); ``channels`` 0 accepts any number."""
    if x.dim() != 4:
        raise ValueError(f'expected a feature map of shape (B, C, H, W), got {x.dim()} dimensions: {x.shape}')
    if not x.is_floating_point():
        raise TypeError(f'expected a floating-point feature map, got {x.dtype}; convert it with x.float()')
    if channels > 0 and x.shape[1] != channels:
        raise ValueError(f'built for {channels} channels, got {x.shape[1]} in an input of shape {x.shape}')
