"""Blocks by name: a plain dict from a name to what builds the block, and the one function that looks in it."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from .attention import SASE, AttentionBlock
from .compose import ChannelAttention, SpatialAttention
from .genotype import SASE_GENOTYPE, Genotype


def se(channels: int, **kwargs: Any) -> nn.Module:
    """Squeeze-and-Excitation (arXiv 1709.01507) at reduction 16 without biases."""
    return ChannelAttention(channels, 'avg', 'mlp', **kwargs)


def cbam_like(channels: int, **kwargs: Any) -> nn.Module:
    """Channel, then spatial attention, in the order of CBAM (arXiv 1807.06521) and from the paper's primitives.

    Ours: CBAM passes mean and maximum through the MLP separately and has batch norm in its spatial branch.
    """
    return nn.Sequential(
        ChannelAttention(channels, 'avg_max', 'mlp', **kwargs),
        SpatialAttention(channels, 'avg_max', 'conv7x7', **kwargs),
    )


BLOCKS: dict[str, Callable[..., nn.Module]] = {
    'sase': SASE,
    'se': se,
    'cbam_like': cbam_like,
}


def list_blocks() -> list[str]:
    """The names that ``create_block`` takes."""
    return list(BLOCKS)


def create_block(block: str | Genotype, channels: int, **kwargs: Any) -> nn.Module:
    """Build an attention block, (B, C, H, W) -> (B, C, H, W).

    Args:
        block: a name from ``list_blocks()``, a ``Genotype``, or a genotype's text or JSON.
        channels: C, at least 1.
        **kwargs: ``feat_size``, ``device``, ``dtype``.

    Raises:
        ValueError: an unknown name or a bad genotype; the text says what there is.

    >>> create_block('se', 64)  # doctest: +ELLIPSIS
    ChannelAttention(...
    """
    return resolve_block(block)(channels, **kwargs)


def resolve_block(block: str | Genotype) -> Callable[..., nn.Module]:
    """What ``create_block`` would build, as a callable of channels; raises as it does, before anything is built."""
    if isinstance(block, str) and block in BLOCKS:
        return BLOCKS[block]
    if isinstance(block, str):
        if ',' not in block and not block.lstrip().startswith(('{', '[')):
            near = difflib.get_close_matches(block, BLOCKS, n=1, cutoff=0.4)
            hint = f" Did you mean '{near[0]}'?" if near else ''
            raise ValueError(
                f'unknown attention block {block!r}.{hint} Blocks: {", ".join(BLOCKS)}; or give a genotype, '
                f"six names with commas between such as '{SASE_GENOTYPE}'"
            )
        block = Genotype.parse(block)
    if not isinstance(block, Genotype):
        raise TypeError(f'expected a block name, a Genotype or its text, got {block!r}')
    return partial(AttentionBlock, genotype=block)
