"""Model arguments from the command line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import timm

from sase_blocks.reading import parse_json, quoted

__all__ = ['is_ours', 'model_arguments']


def model_arguments(pairs: Sequence[str], genotype: str | None, attn_stages: Sequence[int] | None) -> dict[str, Any]:
    """Convert the three options to keyword arguments of a model. Raises ValueError if a pair is not KEY=VALUE."""
    args: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition('=')
        if not equals or not key.isidentifier():
            raise ValueError(f'--model-args takes KEY=VALUE, got {quoted(pair)}')
        try:
            args[key] = parse_json(value, 'a value of --model-args')
        except ValueError:
            if value.lstrip().startswith(('[', '{')):
                raise
            # Plain text, such as avg.
            args[key] = {'True': True, 'False': False, 'None': None}.get(value, value)
    if genotype is not None:
        args['genotype'] = genotype
    if attn_stages is not None:
        args['attn_stages'] = list(attn_stages)
    return args


def is_ours(name: str) -> bool:
    """Whether this package registered the timm model ``name``."""
    return bool(timm.model_entrypoint(name).__module__.startswith('sase_blocks.'))
