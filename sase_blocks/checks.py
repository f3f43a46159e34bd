"""Checks of the arguments of blocks and models: channels, options, sizes and feature maps."""

import math
from typing import Any

import torch
from torch import Tensor


def check_int(value: Any, name: str, owner: str, least: int = 1, most: int | None = None) -> int:
    """The argument ``name`` of ``owner``, or a ValueError unless it is an int from ``least`` to ``most``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least or (most is not None and value > most):
        limits = f'of at least {least}' if most is None else f'from {least} to {most}'
        raise ValueError(f'{owner} needs {name} to be an int {limits}, got {value!r}')
    return value


def check_positive(value: Any, name: str, owner: str) -> float:
    """The argument ``name`` of ``owner``, or a ValueError unless it is a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f'{owner} needs {name} to be a finite number above 0, got {value!r}')
    return value


def check_share(value: Any, name: str, owner: str) -> float:
    """The argument ``name`` of ``owner``, or a ValueError unless it is a number from 0 to 1."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ValueError(f'{owner} needs {name} to be a number from 0 to 1, got {value!r}')
    return value


def check_channels(channels: Any, owner: str) -> int:
    """The channel count as an int, or a ValueError that names ``owner``."""
    return check_int(channels, 'channels', owner)


def check_reduction(reduction: Any, channels: int, owner: str, default: int = 16) -> int:
    """The factor by which ``owner`` reduces its channels, or a ValueError unless it is an int from 1 to C.

    Fewer channels than ``default`` also accept any reduction up to it, and leave the least hidden width.
    """
    most = max(channels, default)
    if isinstance(reduction, int) and reduction > most:
        raise ValueError(f'{owner} of {channels} channels needs reduction to be at most {most}, got {reduction}')
    return check_int(reduction, 'reduction', owner)


def check_kernel_size(kernel_size: Any, owner: str) -> int:
    """The kernel size, or a ValueError unless it is an odd int of at least 1."""
    if isinstance(kernel_size, int) and kernel_size % 2 == 0:
        raise ValueError(f'{owner} needs an odd kernel_size, which keeps the size of the map, got {kernel_size!r}')
    return check_int(kernel_size, 'kernel_size', owner)


def check_groups(groups: Any, channels: int, owner: str) -> int:
    """The number of groups, or a ValueError unless it is an int that divides the channels."""
    if channels % check_int(groups, 'groups', owner):
        raise ValueError(f'{owner} needs groups to divide its {channels} channels, got {groups}')
    return groups


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


def check_optional_size(feat_size: Any, owner: str, needed: bool = False) -> tuple[int, int] | None:
    """``check_feat_size``, or None for None unless ``owner`` needs the size."""
    if needed and feat_size is None:
        raise ValueError(
            f'{owner} has parameters per position and needs feat_size=(H, W), the size of the feature map it will '
            f'mostly see (it is interpolated for any other), got feat_size=None'
        )
    return None if feat_size is None else check_feat_size(feat_size, owner)


@torch.fx.wrap  # stays whole in a symbolic trace, whose proxies have no dtype and rank
def check_features(x: Tensor, channels: int) -> None:
    """Raise unless ``x`` is a floating (B, channels, H, W); ``channels`` 0 accepts any number."""
    if x.dim() != 4:
        raise ValueError(f'expected a feature map of shape (B, C, H, W), got {x.dim()} dimensions: {x.shape}')
    if not x.is_floating_point():
        raise TypeError(f'expected a floating-point feature map, got {x.dtype}; convert it with x.float()')
    if channels > 0 and x.shape[1] != channels:
        raise ValueError(f'built for {channels} channels, got {x.shape[1]} in an input of shape {x.shape}')
