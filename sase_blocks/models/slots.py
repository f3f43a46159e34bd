"""Fill the attention slot of timm's residual blocks, from plain strings and numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from sase_blocks.blocks import Genotype, resolve_block, split_stages
from sase_blocks.checks import check_feat_size
from sase_blocks.reading import quoted

BlockBuilder = Callable[..., nn.Module]


Genotypes = str | Genotype | Sequence[str | Genotype] | None


def block_builder(genotype: Genotypes) -> BlockBuilder | tuple[BlockBuilder, ...] | None:
    """Turn an entry point's ``genotype=`` into a function of channels; None and 'none' mean no attention.

    Several genotypes (a sequence, separated by semicolons, or in a search's .json file) give a tuple, one for each
    stage.

    Raises:
        ValueError: an unknown block name, or a bad genotype or file; the message says what is valid.
    """
    if genotype is None or genotype == 'none':
        return None
    if isinstance(genotype, (str, Genotype)):
        genotype = split_stages(str(genotype))
    if not isinstance(genotype, Sequence) or not genotype:
        raise TypeError(f'genotype must be a block name, a genotype or a sequence of them, got {quoted(genotype)}')
    builders = tuple(resolve_block(one) for one in genotype)
    return builders[0] if len(builders) == 1 else builders


def check_stages(stages: Any, depth: int, argument: str = 'attn_stages') -> tuple[int, ...]:
    """``stages`` as sorted distinct numbers from 1 to ``depth``. Raises ValueError that names argument and value."""
    values = [stages] if isinstance(stages, int) else list(stages) if isinstance(stages, Iterable) else [stages]
    if any(isinstance(s, bool) or not isinstance(s, int) or not 1 <= s <= depth for s in values):
        raise ValueError(f'{argument} takes stage numbers from 1 to {depth}, got {stages!r}')
    return tuple(sorted(set(values)))


def fill_slots(
    model: nn.Module,
    build: BlockBuilder | tuple[BlockBuilder, ...] | None,
    stages: Any,
    img_size: int | tuple[int, int],
    **factory_kwargs: Any,
) -> None:
    """Put ``build(channels, feat_size=...)`` into ``block.se`` of every residual block of the given stages.

    ``img_size`` and the stage's reduction give the feature size for per-position parameters. A tuple of builders has
    one for each stage of the network.

    Raises:
        ValueError: bad stages or image size, or if the number of builders differs from the number of stages.
    """
    info: Any = model.feature_info
    chosen = check_stages(stages, len(info) - 1)
    if build is None:
        return
    builders = build if isinstance(build, tuple) else (build,) * (len(info) - 1)
    if len(builders) != len(info) - 1:
        raise ValueError(f'got {len(builders)} genotypes, one for each stage, for a network of {len(info) - 1} stages')
    height, width = check_feat_size(img_size, 'img_size')
    for stage in chosen:
        reduction = info[stage]['reduction']
        feat_size = (math.ceil(height / reduction), math.ceil(width / reduction))
        blocks: Any = model.get_submodule(f'layer{stage}')
        for block in blocks:
            block.se = builders[stage - 1](info[stage]['num_chs'], feat_size=feat_size, **factory_kwargs)


def refuse_block_attention(kwargs: dict[str, Any]) -> None:
    """Raise ValueError for ``block_args=dict(attn_layer=...)``, which would conflict with our slots."""
    if 'attn_layer' in (kwargs.get('block_args') or {}):
        raise ValueError(
            "block_args['attn_layer'] is set, but this entry point fills the attention slot itself: give genotype=... "
            "here, or use timm's plain resnet50 with attn_layer"
        )
