"""Local and axial self-attention over feature maps, as layers for backbones."""

from .axial import AXES, AxialSelfAttention, AxisAttention
from .axial_routes import AXIAL_ROUTES, axial_attention
from .local import POSITIONS, LocalSelfAttention
from .local_routes import BORDERS, LOCAL_ROUTES, local_attention
from .trio import OPERATORS, TrioBlock, build_operator

__all__ = [
    'AXES',
    'AXIAL_ROUTES',
    'BORDERS',
    'LOCAL_ROUTES',
    'OPERATORS',
    'POSITIONS',
    'AxialSelfAttention',
    'AxisAttention',
    'LocalSelfAttention',
    'TrioBlock',
    'axial_attention',
    'build_operator',
    'local_attention',
]
