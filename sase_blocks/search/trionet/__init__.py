"""The search of TrioNet (arXiv 2111.07547): a network of convolutions and attentions for the user's data and budget."""

from .config import TrioConfig
from .sampling import draw, hierarchical, uniform
from .searching import search
from .space import SPACES, TrioSpace
from .supernet import SubNetwork, SuperNet
from .training import load_supernet

__all__ = [
    'SPACES',
    'SubNetwork',
    'SuperNet',
    'TrioConfig',
    'TrioSpace',
    'draw',
    'hierarchical',
    'load_supernet',
    'search',
    'uniform',
]
