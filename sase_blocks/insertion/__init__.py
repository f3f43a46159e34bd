"""Insertion of attention into any network, pretrained ones first of all: ``insert``, its report, and ``remove``."""

from .insertion import insert, remove
from .replacement import replace_convolutions
from .report import CheckpointKeys, InsertedPlace, InsertReport
from .surgery import IdentityStart

__all__ = [
    'CheckpointKeys',
    'IdentityStart',
    'InsertReport',
    'InsertedPlace',
    'insert',
    'remove',
    'replace_convolutions',
]
