"""Attention blocks: the genotype, the six-edge block, the two small compositions, and the blocks by name."""

from .attention import SASE, AttentionBlock
from .compiling import BLOCK_TYPES, compile_blocks
from .compose import ChannelAttention, SpatialAttention
from .genotype import SASE_GENOTYPE, Genotype
from .named import BLOCKS, create_block, list_blocks, resolve_block

__all__ = [
    'BLOCKS',
    'BLOCK_TYPES',
    'SASE',
    'SASE_GENOTYPE',
    'AttentionBlock',
    'ChannelAttention',
    'Genotype',
    'SpatialAttention',
    'compile_blocks',
    'create_block',
    'list_blocks',
    'resolve_block',
]
