"""Attention blocks: the genotype, the six-edge block, compositions of primitives, and the blocks by name."""

from .attention import SASE, AttentionBlock
from .base import AttentionModule
from .caa import ContextAnchorAttention
from .compiling import compile_blocks
from .compose import ChannelAttention, ParallelAttention, SequentialAttention, SpatialAttention
from .criss_cross import CrissCrossAttention
from .double import DoubleAttention
from .dual import DualAttention
from .gam import GlobalAttention
from .gather_excite import GatherExcite
from .genotype import SASE_GENOTYPE, Genotype, split_stages
from .graph import Edge, Graph
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
from .named import BLOCKS, block_graph, block_name, create_block, list_blocks, resolve_block
from .polarized import PolarizedSelfAttention
from .pruning import keep_channels
from .scsa import SynergisticAttention
from .selective_kernel import SelectiveKernel
from .shuffle import ShuffleAttention
from .simam import SimAM
from .strip import CoordinateAttention, EfficientLocalAttention, SimpleCoordinateAttention, StripAttention
from .triplet import TripletAttention

__all__ = [
    'BLOCKS',
    'SASE',
    'SASE_GENOTYPE',
    'AttentionBlock',
    'AttentionModule',
    'ChannelAttention',
    'ContextAnchorAttention',
    'CoordinateAttention',
    'CrissCrossAttention',
    'DoubleAttention',
    'DualAttention',
    'Edge',
    'EfficientLocalAttention',
    'EfficientMultiScaleAttention',
    'GatherExcite',
    'Genotype',
    'GlobalAttention',
    'GlobalResponseNorm',
    'Graph',
    'LargeKernelAttention',
    'LargeSelectiveKernel',
    'LargeSeparableKernelAttention',
    'MixedLocalChannelAttention',
    'MultiScaleConvAttention',
    'NormAttention',
    'ParallelAttention',
    'PolarizedSelfAttention',
    'SelectiveKernel',
    'SequentialAttention',
    'ShuffleAttention',
    'SimAM',
    'SimpleCoordinateAttention',
    'SpatialAttention',
    'SpatialGroupEnhance',
    'StripAttention',
    'SynergisticAttention',
    'TripletAttention',
    'block_graph',
    'block_name',
    'compile_blocks',
    'create_block',
    'keep_channels',
    'list_blocks',
    'resolve_block',
    'split_stages',
]
