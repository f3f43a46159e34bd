"""The search of SASE (arXiv 2411.08333): an attention block for the user's data (extra ``search``)."""

from .campaigns import campaign
from .config import SearchConfig
from .mixed import MixedBlock
from .network import SearchNetwork
from .searching import search
from .space import SearchSpace

__all__ = ['MixedBlock', 'SearchConfig', 'SearchNetwork', 'SearchSpace', 'campaign', 'search']
