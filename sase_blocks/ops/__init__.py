"""Squeeze and excitation primitives in four sets, each a plain dict from a name to a class, in the paper's order.

| set | shape | reads |
|---|---|---|
| ``CHANNEL_SQUEEZE`` | (B, C, H, W) -> (B, C, 1, 1) | a feature map |
| ``CHANNEL_EXCITE`` | (B, C, 1, 1) -> (B, C, 1, 1) | a channel squeeze |
| ``SPATIAL_SQUEEZE`` | (B, C, H, W) -> (B, 1, H, W) | a feature map |
| ``SPATIAL_EXCITE`` | (B, 1, H, W) -> (B, 1, H, W) | a spatial squeeze |

The operations and their order come from SASE (arXiv 2411.08333). ``cls.paper_key`` is the authors' name for each.
``EXTENDED_SETS`` adds the primitives of other published blocks to the paper's in the same four sets.
"""

import difflib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from sase_blocks.reading import quoted

from .channel_excite import (
    ChannelAffine,
    ChannelConv,
    ChannelConv3,
    ChannelConv3Double,
    ChannelConv3Triple,
    ChannelConv5,
    ChannelConv7,
    ChannelConvCircular,
    ChannelConvECA,
    ChannelConvMLP,
    ChannelExcite,
    ChannelFC,
    ChannelIdentity,
    ChannelMLP,
    ChannelMLPBatchNorm,
    ChannelMLPNorm,
    ChannelNorm,
    ChannelNormTanh,
    channel_affine,
    channel_norm_tanh,
)
from .channel_squeeze import (
    ChannelAttentionPool,
    ChannelAvg,
    ChannelAvgMax,
    ChannelAvgPlusMax,
    ChannelAvgSkew,
    ChannelAvgStd,
    ChannelDCT,
    ChannelGSoP,
    ChannelL2,
    ChannelL2Norm,
    ChannelMax,
    ChannelPNorm,
    ChannelSecondOrder,
    ChannelSqueeze,
    ChannelStyle,
    channel_attention_pool,
    channel_covariance,
    channel_dct,
    channel_l2,
    channel_l2_norm,
    channel_p_norm,
    channel_style,
)
from .layers import Conv2d, Linear
from .normalization import BatchNorm2d, GroupNorm
from .options import add_options, format_name, parse_name
from .primitive import Primitive, no_weight_decay
from .spatial_excite import (
    SpatialAffine,
    SpatialConv,
    SpatialConv3,
    SpatialConv3Double,
    SpatialConv3Separable,
    SpatialConv5,
    SpatialConv5Separable,
    SpatialConv7,
    SpatialConvNorm,
    SpatialExcite,
    SpatialIdentity,
    SpatialNorm,
    spatial_affine,
)
from .spatial_squeeze import (
    SpatialAvg,
    SpatialAvgMax,
    SpatialAvgPlusMax,
    SpatialAvgSkew,
    SpatialAvgStd,
    SpatialDilated,
    SpatialL2Norm,
    SpatialMax,
    SpatialPNorm,
    SpatialProject,
    SpatialSecondOrder,
    SpatialSqueeze,
    spatial_covariance,
    spatial_l2_norm,
    spatial_p_norm,
)
from .statistics import avg_max, avg_plus_max, avg_skew, avg_std

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


# The paper's sets plus the primitives of other published blocks: a second, larger search space.
EXTENDED_CHANNEL_SQUEEZE: dict[str, type[ChannelSqueeze]] = {
    **CHANNEL_SQUEEZE,
    'max': ChannelMax,
    'avg_plus_max': ChannelAvgPlusMax,
    'attention': ChannelAttentionPool,
    'style': ChannelStyle,
    'l2': ChannelL2,
    'dct': ChannelDCT,
    'gsop': ChannelGSoP,
}

EXTENDED_CHANNEL_EXCITE: dict[str, type[ChannelExcite]] = {
    **CHANNEL_EXCITE,
    'identity': ChannelIdentity,
    'norm': ChannelNorm,
    'norm_tanh': ChannelNormTanh,
    'fc': ChannelFC,
    'conv_eca': ChannelConvECA,
    'conv_circular': ChannelConvCircular,
    'conv_mlp': ChannelConvMLP,
    'mlp_norm': ChannelMLPNorm,
    'mlp_batch_norm': ChannelMLPBatchNorm,
}

EXTENDED_SPATIAL_SQUEEZE: dict[str, type[SpatialSqueeze]] = {
    **SPATIAL_SQUEEZE,
    'max': SpatialMax,
    'avg_plus_max': SpatialAvgPlusMax,
    'project': SpatialProject,
    'dilated': SpatialDilated,
}

EXTENDED_SPATIAL_EXCITE: dict[str, type[SpatialExcite]] = {
    **SPATIAL_EXCITE,
    'identity': SpatialIdentity,
    'norm': SpatialNorm,
    'conv_norm': SpatialConvNorm,
}

EXTENDED_SETS: dict[str, Mapping[str, type[Primitive]]] = {
    'channel_squeeze': EXTENDED_CHANNEL_SQUEEZE,
    'channel_excite': EXTENDED_CHANNEL_EXCITE,
    'spatial_squeeze': EXTENDED_SPATIAL_SQUEEZE,
    'spatial_excite': EXTENDED_SPATIAL_EXCITE,
}


# Names of earlier versions, and what they are now.
RENAMED: dict[str, dict[str, str]] = {
    'channel_excite': {'mlp_half': 'mlp(reduction=2)'},
    'spatial_excite': {'conv7x7_norm': 'conv_norm'},
}


def primitive_name(set_name: str, name: object) -> str:
    """The name of a primitive in one of the four extended sets, with its options in their canonical text.

    Args:
        set_name: one of ``EXTENDED_SETS``.
        name: the name or the paper's key, maybe with options: ``mlp(reduction=4)``.

    Raises:
        ValueError: no such primitive or option. The message lists the valid ones and suggests the nearest name.
    """
    table, given = EXTENDED_SETS[set_name], name
    if isinstance(name, str):
        name, options = parse_name(name)
        for ours, cls in table.items():
            if name in (ours, cls.paper_key):
                return format_name(ours, cls, options)
        if name in RENAMED.get(set_name, {}):
            raise ValueError(f'{quoted(name)} is now {RENAMED[set_name][name]!r}')
    keys = {**{n: n for n in table}, **{str(cls.paper_key): n for n, cls in table.items() if cls.paper_key}}
    near = difflib.get_close_matches(str(name), keys, n=1, cutoff=0.4)
    hint = f"; did you mean '{near[0]}'?" if near else '.'
    raise ValueError(
        f'{quoted(given)} is not a {set_name.replace("_", " ")}{hint} Valid names: {", ".join(table)} '
        f'(or the keys of the paper: {", ".join(str(c.paper_key) for c in table.values() if c.paper_key)})'
    )


def primitive_names(choices: Sequence[tuple[str, object]], **options: Any) -> list[str]:
    """``primitive_name`` of each (set, name), with each of ``options`` added to the one primitive that has it.

    Raises:
        ValueError: as in ``primitive_name``.
        TypeError: an option that no primitive has, or that several have.
    """
    names = [primitive_name(set_name, name) for set_name, name in choices]
    classes = [EXTENDED_SETS[set_name][parse_name(name)[0]] for (set_name, _), name in zip(choices, names, strict=True)]
    return add_options(list(zip(names, classes, strict=True)), options)


def resolve_primitive(set_name: str, name: str) -> Callable[..., Any]:
    """The class of a primitive with its options, as a callable of channels. Raises ValueError as ``primitive_name``."""
    name, options = parse_name(primitive_name(set_name, name))
    cls = EXTENDED_SETS[set_name][name]
    return partial(cls, **options) if options else cls


__all__ = [
    'CHANNEL_EXCITE',
    'CHANNEL_SQUEEZE',
    'EXTENDED_CHANNEL_EXCITE',
    'EXTENDED_CHANNEL_SQUEEZE',
    'EXTENDED_SETS',
    'EXTENDED_SPATIAL_EXCITE',
    'EXTENDED_SPATIAL_SQUEEZE',
    'SETS',
    'SPATIAL_EXCITE',
    'SPATIAL_SQUEEZE',
    'BatchNorm2d',
    'ChannelAffine',
    'ChannelAttentionPool',
    'ChannelAvg',
    'ChannelAvgMax',
    'ChannelAvgPlusMax',
    'ChannelAvgSkew',
    'ChannelAvgStd',
    'ChannelConv',
    'ChannelConv3',
    'ChannelConv3Double',
    'ChannelConv3Triple',
    'ChannelConv5',
    'ChannelConv7',
    'ChannelConvCircular',
    'ChannelConvECA',
    'ChannelConvMLP',
    'ChannelDCT',
    'ChannelExcite',
    'ChannelFC',
    'ChannelGSoP',
    'ChannelIdentity',
    'ChannelL2',
    'ChannelL2Norm',
    'ChannelMLP',
    'ChannelMLPBatchNorm',
    'ChannelMLPNorm',
    'ChannelMax',
    'ChannelNorm',
    'ChannelNormTanh',
    'ChannelPNorm',
    'ChannelSecondOrder',
    'ChannelSqueeze',
    'ChannelStyle',
    'Conv2d',
    'GroupNorm',
    'Linear',
    'Primitive',
    'SpatialAffine',
    'SpatialAvg',
    'SpatialAvgMax',
    'SpatialAvgPlusMax',
    'SpatialAvgSkew',
    'SpatialAvgStd',
    'SpatialConv',
    'SpatialConv3',
    'SpatialConv3Double',
    'SpatialConv3Separable',
    'SpatialConv5',
    'SpatialConv5Separable',
    'SpatialConv7',
    'SpatialConvNorm',
    'SpatialDilated',
    'SpatialExcite',
    'SpatialIdentity',
    'SpatialL2Norm',
    'SpatialMax',
    'SpatialNorm',
    'SpatialPNorm',
    'SpatialProject',
    'SpatialSecondOrder',
    'SpatialSqueeze',
    'avg_max',
    'avg_plus_max',
    'avg_skew',
    'avg_std',
    'channel_affine',
    'channel_attention_pool',
    'channel_covariance',
    'channel_dct',
    'channel_l2',
    'channel_l2_norm',
    'channel_norm_tanh',
    'channel_p_norm',
    'channel_style',
    'no_weight_decay',
    'primitive_name',
    'primitive_names',
    'resolve_primitive',
    'spatial_affine',
    'spatial_covariance',
    'spatial_l2_norm',
    'spatial_p_norm',
]
