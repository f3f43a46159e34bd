"""timm entries: ResNet-50/101 (arXiv 1512.03385) with an attention block in every bottleneck, as in SASE (2411.08333).

The block fills the attention slot of timm's own ResNet, after the last batch norm and before the shortcut is added.
Every block in ``list_blocks()`` has ``resnet50_NAME`` and ``resnet101_NAME``; ``*_channel`` and ``*_spatial`` take
primitives by name. Arguments are plain strings and numbers, so model configurations can be serialised:

    timm.create_model('resnet50_sase')
    timm.create_model('resnet50_sase', genotype='avg,conv3,affine,avg,avg,conv7x7', attn_stages=(3, 4))
    timm.create_model('resnet50_channel', squeeze='avg_std', excite='conv5')

There are no pretrained weights; ``load_checkpoint`` reads the authors'.
"""

# timm groups models by the last part of their module's name: this file's name puts ours into timm's ResNet family, with
# its tests and feature tools.
from __future__ import annotations

import builtins
import keyword
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, is_model, register_model
from timm.models.resnet import Bottleneck, ResNet

from sase_blocks.blocks import BLOCKS, ChannelAttention, Genotype, SpatialAttention
from sase_blocks.convert import checkpoint_filter_fn
from sase_blocks.ops.primitive import children_without_decay

from .slots import BlockBuilder, Genotypes, block_builder, fill_slots, refuse_block_attention

__all__ = ['register_resnet']

LAYERS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
ALL_STAGES = (1, 2, 3, 4)

default_cfgs: dict[str, dict[str, Any]] = {}


def imagenet_cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        'url': '',
        'num_classes': 1000,
        'input_size': (3, 224, 224),
        'pool_size': (7, 7),
        'crop_pct': 0.875,
        'interpolation': 'bilinear',
        'mean': IMAGENET_DEFAULT_MEAN,
        'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'conv1',
        'classifier': 'fc',
        'license': 'mit',
        **kwargs,
    }


class AttentionResNet(ResNet):
    """timm's ResNet, plus the list of parameters without weight decay for timm's optimisers."""

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay, besides vectors."""
        return children_without_decay(self)


def _resnet(
    build: BlockBuilder | tuple[BlockBuilder, ...] | None,
    attn_stages: Any,
    img_size: int | tuple[int, int],
    **kwargs: Any,
) -> ResNet:
    refuse_block_attention(kwargs)
    model = AttentionResNet(**kwargs)
    fill_slots(model, build, attn_stages, img_size, device=kwargs.get('device'), dtype=kwargs.get('dtype'))
    return model


def _create(
    variant: str,
    pretrained: bool,
    depth: int,
    build: BlockBuilder | tuple[BlockBuilder, ...] | None,
    attn_stages: Any = ALL_STAGES,
    img_size: int | tuple[int, int] = 224,
    **kwargs: Any,
) -> ResNet:
    kwargs = {'block': Bottleneck, 'layers': LAYERS[depth], **kwargs}
    return build_model_with_cfg(
        partial(_resnet, build, attn_stages, img_size),
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        **kwargs,
    )


def _register(name: str, doc: str, create: Callable[..., ResNet]) -> None:
    """Make ``create(pretrained, **kwargs)`` a timm entry point of this module under ``name``."""

    def entry(pretrained: bool = False, **kwargs: Any) -> ResNet:
        return create(pretrained, **kwargs)

    entry.__name__ = entry.__qualname__ = name
    entry.__doc__ = doc
    default_cfgs[name] = imagenet_cfg()
    setattr(sys.modules[__name__], name, register_model(entry))


def _register_genotype(name: str, depth: int, default: str | Genotype, **defaults: Any) -> None:
    def create(pretrained: bool, genotype: Genotypes = default, **kwargs: Any) -> ResNet:
        return _create(name, pretrained, depth, block_builder(genotype), **{**defaults, **kwargs})

    _register(
        name,
        f"""ResNet-{depth} with attention in every bottleneck; by default ``{default}``.

        Args:
            pretrained: there are no published weights; False.
            genotype: a block's name, a genotype as text or JSON, a search's .json file, or 'none'; several genotypes,
                separated by semicolons, are one for each stage.
            attn_stages: the stages that get the block, from 1 to 4; default: all.
            img_size: image size for per-position parameters; default: 224.
            **kwargs: timm's ResNet arguments.
        """,
        create,
    )


def register_resnet(
    name: str,
    genotype: str | Genotype,
    *,
    depth: int = 50,
    attn_stages: tuple[int, ...] = ALL_STAGES,
    img_size: int | tuple[int, int] = 224,
) -> None:
    """Register a ResNet with your own block; ``timm.create_model(name)`` then builds it, in this process.

    Args:
        name: a new model name, a valid identifier.
        genotype: a block's name, a ``Genotype``, or its text or JSON.
        depth: 50 or 101.
        attn_stages: the stages that get the block.
        img_size: image size for per-position parameters.

    Raises:
        ValueError: the name is taken by timm, Python or this module or is not an identifier, or the genotype or depth
            is unknown.
    """
    if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name):
        raise ValueError(f'a model name must be a valid identifier such as resnet50_mine, got {name!r}')
    if is_model(name):
        raise ValueError(f'timm already has a model {name!r}; choose another name')
    if name in globals() or hasattr(builtins, name):  # the entry point becomes a name of this module
        raise ValueError(f'{name!r} is used by the code of {__name__}; choose another name, such as resnet{depth}_mine')
    if depth not in LAYERS:
        raise ValueError(f'depth must be one of {", ".join(map(str, LAYERS))}, got {depth!r}')
    if block_builder(genotype) is None:
        raise ValueError("genotype='none' would register a plain ResNet, which timm has; give a block or a genotype")
    _register_genotype(name, depth, genotype, attn_stages=attn_stages, img_size=img_size)


def _register_channel(name: str, depth: int) -> None:
    def create(pretrained: bool, squeeze: str = 'avg', excite: str = 'conv3', **kwargs: Any) -> ResNet:
        build = partial(ChannelAttention, squeeze=squeeze, excite=excite)
        return _create(name, pretrained, depth, build, **kwargs)

    _register(name, f'ResNet-{depth} with ``ChannelAttention(squeeze=, excite=)`` in every bottleneck.', create)


def _register_spatial(name: str, depth: int) -> None:
    def create(pretrained: bool, squeeze: str = 'avg_max', excite: str = 'conv7x7', **kwargs: Any) -> ResNet:
        build = partial(SpatialAttention, squeeze=squeeze, excite=excite)
        return _create(name, pretrained, depth, build, **kwargs)

    _register(name, f'ResNet-{depth} with ``SpatialAttention(squeeze=, excite=)`` in every bottleneck.', create)


for _depth in LAYERS:
    for _block in BLOCKS:
        _register_genotype(f'resnet{_depth}_{_block}', _depth, _block)
    _register_channel(f'resnet{_depth}_channel', _depth)
    _register_spatial(f'resnet{_depth}_spatial', _depth)
