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

from .slots import BlockBuilder, block_builder, fill_slots, refuse_block_attention

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
    """timm's ResNet with attention in its slots, and the list of parameters without weight decay for timm's optimisers.

    Args:
        build: see ``fill_slots``; None for no attention.
        attn_stages: the stages that get the attention.
        img_size: image size for per-position parameters.
        **kwargs: timm's ResNet arguments.
    """

    def __init__(
        self,
        build: BlockBuilder | tuple[BlockBuilder, ...] | None = None,
        attn_stages: Any = ALL_STAGES,
        img_size: int | tuple[int, int] = 224,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        fill_slots(self, build, attn_stages, img_size, device=kwargs.get('device'), dtype=kwargs.get('dtype'))

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay, besides vectors."""
        return children_without_decay(self)


def _register(
    name: str,
    depth: int,
    doc: str,
    builder: Callable[..., BlockBuilder | tuple[BlockBuilder, ...] | None],
    options: dict[str, Any],
    **defaults: Any,
) -> None:
    """Make a timm entry point of this module, with ``builder(**options)`` in its slots.

    Args:
        options: arguments of the entry point that go to ``builder``, with their defaults.
        **defaults: of other arguments of the entry point.
    """

    def entry(pretrained: bool = False, **kwargs: Any) -> ResNet:
        kwargs = {'block': Bottleneck, 'layers': LAYERS[depth], **options, **defaults, **kwargs}
        refuse_block_attention(kwargs)
        build = builder(**{option: kwargs.pop(option) for option in options})
        return build_model_with_cfg(
            AttentionResNet, name, pretrained, pretrained_filter_fn=checkpoint_filter_fn, build=build, **kwargs
        )

    entry.__name__ = entry.__qualname__ = name
    entry.__doc__ = doc
    default_cfgs[name] = imagenet_cfg()
    setattr(sys.modules[__name__], name, register_model(entry))


def _register_genotype(name: str, depth: int, genotype: str | Genotype, **defaults: Any) -> None:
    doc = f"""ResNet-{depth} with attention in every bottleneck; by default ``{genotype}``.

        Args:
            pretrained: there are no published weights; False.
            genotype: a block's name, maybe with options (``'se(reduction=8)'``), a genotype as text or JSON, a search's
                .json file, or 'none'; several, separated by semicolons, are one for each stage.
            attn_stages: the stages that get the block, from 1 to 4; default: all.
            img_size: image size for per-position parameters; default: 224.
            **kwargs: timm's ResNet arguments.
        """
    _register(name, depth, doc, block_builder, {'genotype': genotype}, **defaults)


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
        genotype: a block's name, maybe with options, a ``Genotype``, or its text or JSON.
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


def _register_half(name: str, depth: int, half: type[ChannelAttention | SpatialAttention], **options: str) -> None:
    doc = f'ResNet-{depth} with ``{half.__name__}(squeeze=, excite=)`` in every bottleneck.'
    _register(name, depth, doc, partial(partial, half), options)


for _depth in LAYERS:
    for _block in BLOCKS:
        _register_genotype(f'resnet{_depth}_{_block}', _depth, _block)
    _register_half(f'resnet{_depth}_channel', _depth, ChannelAttention, squeeze='avg', excite='conv3')
    _register_half(f'resnet{_depth}_spatial', _depth, SpatialAttention, squeeze='avg_max', excite='conv7x7')
