"""Insert attention into any network, especially a pretrained one: ``insert``, ``check`` and ``remove``."""

from .checking import CheckReport, check
from .insertion import insert, remove
from .replacement import replace_convolutions
from .report import CheckpointKeys, InsertedPlace, InsertReport
from .surgery import IdentityStart

__all__ = [
    'CheckReport',
    'CheckpointKeys',
    'IdentityStart',
    'InsertReport',
    'InsertedPlace',
    'check',
    'insert',
    'remove',
    'replace_convolutions',
]
