"""Blocks by name: a plain dict from names to builders, and the one function that looks them up."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from sase_blocks.ops.options import add_options, format_name, parse_name, split_names
from sase_blocks.reading import quoted, shorten

from .attention import SASE, AttentionBlock
from .base import AttentionModule
from .caa import ContextAnchorAttention
from .compose import ChannelAttention, ParallelAttention, SequentialAttention, SpatialAttention
from .criss_cross import CrissCrossAttention
from .double import DoubleAttention
from .dual import DualAttention
from .gam import GlobalAttention
from .gather_excite import GatherExcite
from .genotype import SASE_GENOTYPE, Genotype, split_stages
from .graph import Graph, chain
from .grn import GlobalResponseNorm
from .grouped import EfficientMultiScaleAttention, SpatialGroupEnhance
from .large_kernel import (
    LargeKernelAttention,
    LargeSelectiveKernel,
    LargeSeparableKernelAttention,
    MultiScaleConvAttention,
)
from .mlca import MixedLocalChannelAttention
from .nam import NormAttention
from .polarized import PolarizedSelfAttention
from .scsa import SynergisticAttention
from .selective_kernel import SelectiveKernel
from .shuffle import ShuffleAttention
from .simam import SimAM
from .strip import CoordinateAttention, EfficientLocalAttention, SimpleCoordinateAttention, StripAttention
from .triplet import TripletAttention


def se(channels: int, *, reduction: int = 16, **kwargs: Any) -> nn.Module:
    """Squeeze-and-Excitation (arXiv 1709.01507, eq. 2 to 4), without biases as in its ResNets."""
    return ChannelAttention(channels, 'avg', 'mlp', reduction=reduction, **kwargs)


def ese(channels: int, **kwargs: Any) -> nn.Module:
    """Effective SE of CenterMask (arXiv 1911.06667, the eSE module)."""
    return ChannelAttention(channels, 'avg', 'fc', **kwargs)


def eca(channels: int, *, kernel_size: int | None = None, gamma: int = 2, beta: int = 1, **kwargs: Any) -> nn.Module:
    """Efficient channel attention (arXiv 1910.03151, section 3)."""
    options: dict[str, Any] = {'kernel_size': kernel_size, 'gamma': gamma, 'beta': beta}
    return ChannelAttention(channels, 'avg', 'conv_eca', **options, **kwargs)


def ecam(
    channels: int,
    *,
    reduction: int = 8,
    kernel_size: int | None = None,
    gamma: int = 2,
    beta: int = 1,
    **kwargs: Any,
) -> nn.Module:
    """Efficient channel attention with hidden maps, an experiment of timm in no paper."""
    options: dict[str, Any] = {'reduction': reduction, 'kernel_size': kernel_size, 'gamma': gamma, 'beta': beta}
    return ChannelAttention(channels, 'avg', 'conv_mlp', **options, **kwargs)


def ceca(channels: int, *, kernel_size: int | None = None, gamma: int = 2, beta: int = 1, **kwargs: Any) -> nn.Module:
    """Circular efficient channel attention, timm's variant of ECA (arXiv 1910.03151) in no paper."""
    options: dict[str, Any] = {'kernel_size': kernel_size, 'gamma': gamma, 'beta': beta}
    return ChannelAttention(channels, 'avg', 'conv_circular', **options, **kwargs)


def cbam(channels: int, *, reduction: int = 16, kernel_size: int = 7, **kwargs: Any) -> nn.Module:
    """Convolutional block attention module (arXiv 1807.06521, eq. 1 to 3), with the authors' batch norm."""
    return SequentialAttention(
        ChannelAttention(channels, ('avg', 'max'), 'mlp', reduction=reduction, **kwargs),
        SpatialAttention(channels, ('avg', 'max'), 'conv_norm', kernel_size=kernel_size, **kwargs),
    )


def lcbam(channels: int, *, reduction: int = 16, kernel_size: int = 7, **kwargs: Any) -> nn.Module:
    """Light CBAM, timm's variant (of arXiv 1807.06521): mean and maximum are averaged before anything else."""
    return SequentialAttention(
        ChannelAttention(channels, 'avg_plus_max', 'mlp', reduction=reduction, **kwargs),
        SpatialAttention(channels, 'avg_plus_max', 'conv_norm', kernel_size=kernel_size, **kwargs),
    )


def bam(channels: int, *, reduction: int = 16, dilation: int = 4, **kwargs: Any) -> nn.Module:
    """Bottleneck attention module (arXiv 1807.06514, eq. 1 to 4)."""
    channel = 'avg', f'mlp_batch_norm(reduction={reduction!r})'
    spatial = f'dilated(reduction={reduction!r}, dilation={dilation!r})', 'norm'
    return ParallelAttention(channels, channel, spatial, joint=True, **kwargs)


def scse(channels: int, *, reduction: int = 2, **kwargs: Any) -> nn.Module:
    """Concurrent spatial and channel SE (arXiv 1803.02579, section 2), the two results added."""
    return ParallelAttention(channels, ('avg', 'mlp'), ('project', 'identity'), reduction=reduction, **kwargs)


def gc(channels: int, *, reduction: int = 16, **kwargs: Any) -> nn.Module:
    """Global context block (arXiv 1904.11492, section 3.3) that scales x, as in timm."""
    return ChannelAttention(channels, 'attention', 'mlp_norm', reduction=reduction, **kwargs)


def gca(channels: int, *, reduction: int = 16, **kwargs: Any) -> nn.Module:
    """Global context block (arXiv 1904.11492, section 3.3) that adds to x, as in the paper."""
    return ChannelAttention(channels, 'attention', 'mlp_norm', add=True, reduction=reduction, **kwargs)


def ge(channels: int, *, extent: int = 8, **kwargs: Any) -> nn.Module:
    """Gather-Excite without parameters (arXiv 1810.12348, GE-theta-minus)."""
    return GatherExcite(channels, extent=extent, **kwargs)


def ge_theta(channels: int, *, extent: int = 8, **kwargs: Any) -> nn.Module:
    """Gather-Excite with a learned gather (arXiv 1810.12348, GE-theta)."""
    return GatherExcite(channels, extent=extent, parameters=True, **kwargs)


def ge_plus(channels: int, *, extent: int = 8, reduction: int = 16, **kwargs: Any) -> nn.Module:
    """Gather-Excite with a learned gather and excite (arXiv 1810.12348, GE-theta-plus)."""
    return GatherExcite(channels, extent=extent, parameters=True, mlp=True, reduction=reduction, **kwargs)


def srm(channels: int, **kwargs: Any) -> nn.Module:
    """Style-based recalibration module (arXiv 1903.10829, section 3)."""
    return ChannelAttention(channels, 'style', 'norm', **kwargs)


def gct(channels: int, **kwargs: Any) -> nn.Module:
    """Gated channel transformation (arXiv 1909.11519, section 3); starts as the identity."""
    return ChannelAttention(channels, 'l2', 'norm_tanh', **kwargs)


def fca(channels: int, *, frequencies: int = 16, reduction: int = 16, **kwargs: Any) -> nn.Module:
    """Frequency channel attention, FcaNet (arXiv 2012.11879, section 3), with its best frequencies."""
    return ChannelAttention(channels, 'dct', 'mlp', frequencies=frequencies, reduction=reduction, **kwargs)


def gsop(channels: int, *, rd_channels: int = 128, **kwargs: Any) -> nn.Module:
    """Global second-order pooling along the channels, GSoP-Net (arXiv 1811.12006, section 3)."""
    return ChannelAttention(channels, 'gsop', 'identity', rd_channels=rd_channels, **kwargs)


# The builder of each block, in the documentation's order. The first line of its docstring names the paper.
BLOCKS: dict[str, Callable[..., nn.Module]] = {
    'sase': SASE,
    'se': se,
    'ese': ese,
    'eca': eca,
    'ecam': ecam,
    'ceca': ceca,
    'cbam': cbam,
    'lcbam': lcbam,
    'bam': bam,
    'scse': scse,
    'gc': gc,
    'gca': gca,
    'ge': ge,
    'ge_theta': ge_theta,
    'ge_plus': ge_plus,
    'srm': srm,
    'gct': gct,
    'fca': fca,
    'gsop': gsop,
    'sge': SpatialGroupEnhance,
    'ema': EfficientMultiScaleAttention,
    'shuffle': ShuffleAttention,
    'simam': SimAM,
    'triplet': TripletAttention,
    'coord': CoordinateAttention,
    'scoord': SimpleCoordinateAttention,
    'ela': EfficientLocalAttention,
    'strip': StripAttention,
    'lka': LargeKernelAttention,
    'lska': LargeSeparableKernelAttention,
    'msca': MultiScaleConvAttention,
    'lsk': LargeSelectiveKernel,
    'polarized': PolarizedSelfAttention,
    'a2': DoubleAttention,
    'criss_cross': CrissCrossAttention,
    'dual': DualAttention,
    'sk': SelectiveKernel,
    'nam': NormAttention,
    'grn': GlobalResponseNorm,
    'caa': ContextAnchorAttention,
    'mlca': MixedLocalChannelAttention,
    'scsa': SynergisticAttention,
    'gam': GlobalAttention,
}


def list_blocks() -> list[str]:
    """The names that ``create_block`` accepts."""
    return list(BLOCKS)


def create_block(block: str | Genotype, channels: int, *, act_layer: Any = None, **kwargs: Any) -> nn.Module:
    """Build an attention block, (B, C, H, W) -> (B, C, H, W).

    ``functools.partial(create_block, 'cbam')`` fits ``attn_layer=`` or ``se_layer=`` of every timm model with a slot.

    Args:
        block: a name from ``list_blocks()``, maybe with options (``'cbam(reduction=8, kernel_size=3)'``), a
            ``Genotype``, a genotype's text or JSON, or a search's .json file.
        channels: C, at least 1.
        act_layer: ignored. Some timm models pass their activation to the attention, but a block uses its paper's.
        **kwargs: ``feat_size``, ``device``, ``dtype``, and the block's options, ``reduction=8``. Those of a genotype go
            to the one primitive that has them.

    Raises:
        ValueError: an unknown name, a bad genotype, or an option with a bad name in a text or a bad value. The message
            lists the valid ones.
        TypeError: an argument that the block does not have. The message lists its options.

    Examples:
        >>> create_block('se', 64, reduction=4)  # doctest: +ELLIPSIS
        ChannelAttention(...
    """
    options = {key: kwargs.pop(key) for key in list(kwargs) if key not in ('feat_size', 'device', 'dtype')}
    return resolve_block(block_name(block, **options))(channels, **kwargs)


def block_name(block: str | Genotype, **options: Any) -> str:
    """The canonical text of what ``create_block`` takes: a name with options, or a genotype. Raises the same errors.

    Examples:
        >>> block_name('cbam(kernel_size=3, reduction=16)'), block_name('se', reduction=4)
        ('cbam(kernel_size=3)', 'se(reduction=4)')
    """
    found = _read_block(block)
    if isinstance(found, Genotype):
        return str(found.with_options(**options))
    name, given = found
    return add_options([(format_name(name, BLOCKS[name], given), BLOCKS[name])], options)[0]


def resolve_block(block: str | Genotype) -> Callable[..., nn.Module]:
    """The builder that ``create_block`` would use, as a callable of channels. Raises the same errors."""
    found = _read_block(block_name(block))
    if isinstance(found, Genotype):
        return partial(AttentionBlock, genotype=found)
    name, options = found
    return partial(BLOCKS[name], **options) if options else BLOCKS[name]


def _read_block(block: str | Genotype) -> Genotype | tuple[str, dict[str, Any]]:
    """A genotype, or the name of a block and its options, which may be wrong."""
    if isinstance(block, Genotype):
        return block
    if not isinstance(block, str):
        raise TypeError(f'expected a block name, a Genotype or its text, got {quoted(block)}')
    stages = split_stages(block)
    if len(stages) > 1:
        raise ValueError(
            f'{shorten(block)} holds {len(stages)} genotypes, one for each stage; genotype= of our models takes all of '
            f'them, but here pass one: {shorten("; ".join(stages), 500)}'
        )
    text = stages[0]
    if text.startswith(('{', '[')) or len(split_names(text)) > 1:
        return Genotype.parse(text)
    name, options = parse_name(text)
    if name not in BLOCKS:
        near = difflib.get_close_matches(name, BLOCKS, n=1, cutoff=0.4)
        hint = f" Did you mean '{near[0]}'?" if near else ''
        raise ValueError(
            f'unknown attention block {quoted(text)}.{hint} Blocks: {", ".join(BLOCKS)}; or give a genotype, six names '
            f"with commas between such as '{SASE_GENOTYPE}'"
        )
    return name, options


def block_graph(block: str | Genotype | nn.Module) -> Graph:
    """The graph of a block as plain data.

    Args:
        block: as in ``create_block``, or a block itself. A sequence of blocks becomes one graph.

    Raises:
        ValueError: an unknown name or a bad genotype.
        TypeError: a module that is not a block of this library.
    """
    module = block if isinstance(block, nn.Module) else resolve_block(block)(64, feat_size=8, device='meta')
    parts = list(module) if isinstance(module, nn.Sequential) else [module]
    if not parts or not all(isinstance(part, AttentionModule) for part in parts):
        raise TypeError(f'expected a block of sase_blocks or a sequence of them, got {type(module).__name__}')
    return chain([part.graph() for part in parts if isinstance(part, AttentionModule)])
