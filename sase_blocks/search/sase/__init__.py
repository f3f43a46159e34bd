"""The search of SASE (arXiv 2411.08333): an attention block for the user's data."""

from .mixed import MixedBlock
from .network import SearchNetwork
from .space import SearchSpace

__all__ = ['MixedBlock', 'SearchNetwork', 'SearchSpace']
