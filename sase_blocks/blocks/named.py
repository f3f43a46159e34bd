"""Blocks by name: a plain dict from names to builders, and the one function that looks them up."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from sase_blocks.reading import quoted, shorten

from .attention import SASE, AttentionBlock
from .base import AttentionModule
from .compose import ChannelAttention, ParallelAttention, SequentialAttention, SpatialAttention
from .gather_excite import GatherExcite
from .genotype import SASE_GENOTYPE, Genotype, split_stages
from .graph import Graph, chain
from .grouped import EfficientMultiScaleAttention, SpatialGroupEnhance
from .simam import SimAM
from .strip import CoordinateAttention, EfficientLocalAttention, SimpleCoordinateAttention, StripAttention
from .triplet import TripletAttention


def se(channels: int, **kwargs: Any) -> nn.Module:
    """Squeeze-and-Excitation (arXiv 1709.01507, eq. 2 to 4), reduction 16, without biases as in its ResNets."""
    return ChannelAttention(channels, 'avg', 'mlp', **kwargs)


def ese(channels: int, **kwargs: Any) -> nn.Module:
    """Effective SE of CenterMask (arXiv 1911.06667, the eSE module)."""
    return ChannelAttention(channels, 'avg', 'fc', **kwargs)


def eca(channels: int, **kwargs: Any) -> nn.Module:
    """Efficient channel attention (arXiv 1910.03151, section 3)."""
    return ChannelAttention(channels, 'avg', 'conv_eca', **kwargs)


def ecam(channels: int, **kwargs: Any) -> nn.Module:
    """Efficient channel attention with hidden maps, an experiment of timm in no paper."""
    return ChannelAttention(channels, 'avg', 'conv_mlp', **kwargs)


def ceca(channels: int, **kwargs: Any) -> nn.Module:
    """Circular efficient channel attention, timm's variant of ECA (arXiv 1910.03151) in no paper."""
    return ChannelAttention(channels, 'avg', 'conv_circular', **kwargs)


def cbam(channels: int, **kwargs: Any) -> nn.Module:
    """Convolutional block attention module (arXiv 1807.06521, eq. 1 to 3), with the authors' batch norm."""
    return SequentialAttention(
        ChannelAttention(channels, ('avg', 'max'), 'mlp', **kwargs),
        SpatialAttention(channels, ('avg', 'max'), 'conv_norm', **kwargs),
    )


def lcbam(channels: int, **kwargs: Any) -> nn.Module:
    """Light CBAM, timm's variant (of arXiv 1807.06521): mean and maximum are averaged before anything else."""
    return SequentialAttention(
        ChannelAttention(channels, 'avg_plus_max', 'mlp', **kwargs),
        SpatialAttention(channels, 'avg_plus_max', 'conv_norm', **kwargs),
    )


def bam(channels: int, **kwargs: Any) -> nn.Module:
    """Bottleneck attention module (arXiv 1807.06514, eq. 1 to 4)."""
    return ParallelAttention(channels, ('avg', 'mlp_batch_norm'), ('dilated', 'norm'), joint=True, **kwargs)


def scse(channels: int, **kwargs: Any) -> nn.Module:
    """Concurrent spatial and channel SE (arXiv 1803.02579, section 2), the two results added."""
    return ParallelAttention(channels, ('avg', 'mlp(reduction=2)'), ('project', 'identity'), **kwargs)


def gc(channels: int, **kwargs: Any) -> nn.Module:
    """Global context block (arXiv 1904.11492, section 3.3) that scales x, as in timm."""
    return ChannelAttention(channels, 'attention', 'mlp_norm', **kwargs)


def gca(channels: int, **kwargs: Any) -> nn.Module:
    """Global context block (arXiv 1904.11492, section 3.3) that adds to x, as in the paper."""
    return ChannelAttention(channels, 'attention', 'mlp_norm', add=True, **kwargs)


def ge(channels: int, **kwargs: Any) -> nn.Module:
    """Gather-Excite without parameters (arXiv 1810.12348, GE-theta-minus), extent 8."""
    return GatherExcite(channels, **kwargs)


def ge_theta(channels: int, **kwargs: Any) -> nn.Module:
    """Gather-Excite with a learned gather (arXiv 1810.12348, GE-theta), extent 8."""
    return GatherExcite(channels, parameters=True, **kwargs)


def ge_plus(channels: int, **kwargs: Any) -> nn.Module:
    """Gather-Excite with a learned gather and excite (arXiv 1810.12348, GE-theta-plus), extent 8."""
    return GatherExcite(channels, parameters=True, mlp=True, **kwargs)


def srm(channels: int, **kwargs: Any) -> nn.Module:
    """Style-based recalibration module (arXiv 1903.10829, section 3)."""
    return ChannelAttention(channels, 'style', 'norm', **kwargs)


def gct(channels: int, **kwargs: Any) -> nn.Module:
    """Gated channel transformation (arXiv 1909.11519, section 3); starts as the identity."""
    return ChannelAttention(channels, 'l2', 'norm_tanh', **kwargs)


def fca(channels: int, **kwargs: Any) -> nn.Module:
    """Frequency channel attention, FcaNet (arXiv 2012.11879, section 3), with its sixteen best frequencies."""
    return ChannelAttention(channels, 'dct', 'mlp', **kwargs)


def gsop(channels: int, **kwargs: Any) -> nn.Module:
    """Global second-order pooling along the channels, GSoP-Net (arXiv 1811.12006, section 3)."""
    return ChannelAttention(channels, 'gsop', 'identity', **kwargs)


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
    'simam': SimAM,
    'triplet': TripletAttention,
    'coord': CoordinateAttention,
    'scoord': SimpleCoordinateAttention,
    'ela': EfficientLocalAttention,
    'strip': StripAttention,
}


def list_blocks() -> list[str]:
    """The names that ``create_block`` accepts."""
    return list(BLOCKS)


def create_block(block: str | Genotype, channels: int, *, act_layer: Any = None, **kwargs: Any) -> nn.Module:
    """Build an attention block, (B, C, H, W) -> (B, C, H, W).

    ``functools.partial(create_block, 'cbam')`` fits ``attn_layer=`` or ``se_layer=`` of every timm model with a slot.

    Args:
        block: a name from ``list_blocks()``, a ``Genotype``, a genotype's text or JSON, or a search's .json file.
        channels: C, at least 1.
        act_layer: ignored. Some timm models pass their activation to the attention, but a block uses its paper's.
        **kwargs: ``feat_size``, ``device``, ``dtype``.

    Raises:
        ValueError: an unknown name or a bad genotype. The message lists the valid ones.

    Examples:
        >>> create_block('se', 64)  # doctest: +ELLIPSIS
        ChannelAttention(...
    """
    return resolve_block(block)(channels, **kwargs)


def resolve_block(block: str | Genotype) -> Callable[..., nn.Module]:
    """The builder that ``create_block`` would use, as a callable of channels. Raises the same errors."""
    if isinstance(block, str) and block in BLOCKS:
        return BLOCKS[block]
    if isinstance(block, str):
        stages = split_stages(block)
        if len(stages) > 1:
            raise ValueError(
                f'{shorten(block)} holds {len(stages)} genotypes, one for each stage; genotype= of our models takes '
                f'all of them, but here pass one: {shorten("; ".join(stages), 500)}'
            )
        block = stages[0]
        if ',' not in block and not block.lstrip().startswith(('{', '[')):
            near = difflib.get_close_matches(block, BLOCKS, n=1, cutoff=0.4)
            hint = f" Did you mean '{near[0]}'?" if near else ''
            raise ValueError(
                f'unknown attention block {quoted(block)}.{hint} Blocks: {", ".join(BLOCKS)}; or give a genotype, '
                f"six names with commas between such as '{SASE_GENOTYPE}'"
            )
        block = Genotype.parse(block)
    if not isinstance(block, Genotype):
        raise TypeError(f'expected a block name, a Genotype or its text, got {quoted(block)}')
    return partial(AttentionBlock, genotype=block)


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
