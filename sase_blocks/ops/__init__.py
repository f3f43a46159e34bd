"""Squeeze and excitation primitives in four sets, each a plain dict from a name to a class, in the paper's order.

| set | shape | reads |
|---|---|---|
| ``CHANNEL_SQUEEZE`` | (B, C, H, W) -> (B, C, 1, 1) | a feature map |
| ``CHANNEL_EXCITE`` | (B, C, 1, 1) -> (B, C, 1, 1) | a channel squeeze |
| ``SPATIAL_SQUEEZE`` | (B, C, H, W) -> (B, 1, H, W) | a feature map |
| ``SPATIAL_EXCITE`` | (B, 1, H, W) -> (B, 1, H, W) | a spatial squeeze |

The operations and their order are those of SASE (arXiv 2411.08333); ``cls.paper_key`` is the authors' name for each.
"""

import difflib
from collections.abc import Mapping

from .channel_excite import (
    ChannelAffine,
    ChannelConv,
    ChannelConv3,
    ChannelConv3Double,
    ChannelConv3Triple,
    ChannelConv5,
    ChannelConv7,
    ChannelExcite,
    ChannelMLP,
    channel_affine,
)
from .channel_squeeze import (
    ChannelAvg,
    ChannelAvgMax,
    ChannelAvgSkew,
    ChannelAvgStd,
    ChannelL2Norm,
    ChannelPNorm,
    ChannelSecondOrder,
    ChannelSqueeze,
    channel_avg,
    channel_avg_max,
    channel_avg_skew,
    channel_avg_std,
    channel_covariance,
    channel_l2_norm,
    channel_p_norm,
)
from .normalization import BatchNorm2d
from .primitive import Primitive, check_channels, check_features, mix
from .spatial_excite import (
    SpatialAffine,
    SpatialConv,
    SpatialConv3,
    SpatialConv3Double,
    SpatialConv3Separable,
    SpatialConv5,
    SpatialConv5Separable,
    SpatialConv7,
    SpatialExcite,
    spatial_affine,
)
from .spatial_squeeze import (
    SpatialAvg,
    SpatialAvgMax,
    SpatialAvgSkew,
    SpatialAvgStd,
    SpatialL2Norm,
    SpatialPNorm,
    SpatialSecondOrder,
    SpatialSqueeze,
    spatial_avg,
    spatial_avg_max,
    spatial_avg_skew,
    spatial_avg_std,
    spatial_covariance,
    spatial_l2_norm,
    spatial_p_norm,
)

CHANNEL_SQUEEZE: dict[str, type[ChannelSqueeze]] = {
    'avg': ChannelAvg,
    'l2_norm': ChannelL2Norm,
    'p_norm': ChannelPNorm,
    'avg_max': ChannelAvgMax,
    'avg_std': ChannelAvgStd,
    'avg_skew': ChannelAvgSkew,
    'second_order': ChannelSecondOrder,
}

CHANNEL_EXCITE: dict[str, type[ChannelExcite]] = {
    'conv3_x3': ChannelConv3Triple,
    'mlp': ChannelMLP,
    'conv3': ChannelConv3,
    'conv5': ChannelConv5,
    'conv7': ChannelConv7,
    'conv3_x2': ChannelConv3Double,
    'affine': ChannelAffine,
}

SPATIAL_SQUEEZE: dict[str, type[SpatialSqueeze]] = {
    'avg': SpatialAvg,
    'l2_norm': SpatialL2Norm,
    'p_norm': SpatialPNorm,
    'avg_max': SpatialAvgMax,
    'avg_std': SpatialAvgStd,
    'avg_skew': SpatialAvgSkew,
    'second_order': SpatialSecondOrder,
}

SPATIAL_EXCITE: dict[str, type[SpatialExcite]] = {
    'conv1x3_3x1': SpatialConv3Separable,
    'conv1x5_5x1': SpatialConv5Separable,
    'conv3x3': SpatialConv3,
    'conv5x5': SpatialConv5,
    'conv7x7': SpatialConv7,
    'conv3x3_x2': SpatialConv3Double,
    'affine': SpatialAffine,
}

SETS: dict[str, Mapping[str, type[Primitive]]] = {
    'channel_squeeze': CHANNEL_SQUEEZE,
    'channel_excite': CHANNEL_EXCITE,
    'spatial_squeeze': SPATIAL_SQUEEZE,
    'spatial_excite': SPATIAL_EXCITE,
}


def primitive_name(set_name: str, name: object) -> str:
    """The name of a primitive in one of the four sets, from its name or the paper's key.

    Raises:
        ValueError: no such primitive; the text lists the valid names and suggests the nearest.
    """
    table = SETS[set_name]
    if isinstance(name, str):
        if name in table:
            return name
        for ours, cls in table.items():
            if name == cls.paper_key:
                return ours
    keys = {**{n: n for n in table}, **{str(cls.paper_key): n for n, cls in table.items() if cls.paper_key}}
    near = difflib.get_close_matches(str(name), keys, n=1, cutoff=0.4)
    hint = f"; did you mean '{near[0]}'?" if near else '.'
    raise ValueError(
        f'{name!r} is not a {set_name.replace("_", " ")}{hint} Valid names: {", ".join(table)} '
        f'(or the keys of the paper: {", ".join(str(c.paper_key) for c in table.values() if c.paper_key)})'
    )


__all__ = [
    'CHANNEL_EXCITE',
    'CHANNEL_SQUEEZE',
    'SETS',
    'SPATIAL_EXCITE',
    'SPATIAL_SQUEEZE',
    'BatchNorm2d',
    'ChannelAffine',
    'ChannelAvg',
    'ChannelAvgMax',
    'ChannelAvgSkew',
    'ChannelAvgStd',
    'ChannelConv',
    'ChannelConv3',
    'ChannelConv3Double',
    'ChannelConv3Triple',
    'ChannelConv5',
    'ChannelConv7',
    'ChannelExcite',
    'ChannelL2Norm',
    'ChannelMLP',
    'ChannelPNorm',
    'ChannelSecondOrder',
    'ChannelSqueeze',
    'Primitive',
    'SpatialAffine',
    'SpatialAvg',
    'SpatialAvgMax',
    'SpatialAvgSkew',
    'SpatialAvgStd',
    'SpatialConv',
    'SpatialConv3',
    'SpatialConv3Double',
    'SpatialConv3Separable',
    'SpatialConv5',
    'SpatialConv5Separable',
    'SpatialConv7',
    'SpatialExcite',
    'SpatialL2Norm',
    'SpatialPNorm',
    'SpatialSecondOrder',
    'SpatialSqueeze',
    'channel_affine',
    'channel_avg',
    'channel_avg_max',
    'channel_avg_skew',
    'channel_avg_std',
    'channel_covariance',
    'channel_l2_norm',
    'channel_p_norm',
    'check_channels',
    'check_features',
    'mix',
    'primitive_name',
    'spatial_affine',
    'spatial_avg',
    'spatial_avg_max',
    'spatial_avg_skew',
    'spatial_avg_std',
    'spatial_covariance',
    'spatial_l2_norm',
    'spatial_p_norm',
]
