"""sase-blocks: squeeze and excitation primitives, attention blocks made of them, and tools to insert these.

``import sase_blocks`` registers the models: ``timm.create_model('resnet50_sase')``.
"""

from importlib.metadata import PackageNotFoundError, version

from .blocks import (
    SASE,
    AttentionBlock,
    ChannelAttention,
    Genotype,
    SpatialAttention,
    compile_blocks,
    create_block,
    keep_channels,
    list_blocks,
)
from .convert import LoadReport, convert_paper_state_dict, load_checkpoint
from .deploy import FuseReport, OnnxReport, ProgramReport, export_onnx, export_program, fuse
from .insertion import (
    CheckpointKeys,
    CheckReport,
    InsertedPlace,
    InsertReport,
    check,
    insert,
    remove,
    replace_convolutions,
)
from .models import register_resnet
from .ops import no_weight_decay
from .selfattention import AxialSelfAttention, LocalSelfAttention, TrioBlock

try:
    __version__ = version('sase-blocks')
except PackageNotFoundError:  # imported from a source tree that is not installed
    __version__ = '0+unknown'

__all__ = [
    'SASE',
    'AttentionBlock',
    'AxialSelfAttention',
    'ChannelAttention',
    'CheckReport',
    'CheckpointKeys',
    'FuseReport',
    'Genotype',
    'InsertReport',
    'InsertedPlace',
    'LoadReport',
    'LocalSelfAttention',
    'OnnxReport',
    'ProgramReport',
    'SpatialAttention',
    'TrioBlock',
    'check',
    'compile_blocks',
    'convert_paper_state_dict',
    'create_block',
    'export_onnx',
    'export_program',
    'fuse',
    'insert',
    'keep_channels',
    'list_blocks',
    'load_checkpoint',
    'no_weight_decay',
    'register_resnet',
    'remove',
    'replace_convolutions',
]
