"""timm entries after TrioNet (arXiv 2111.07547): ResNets whose bottleneck has convolution, local or axial attention.

The operator replaces the middle 3x3 convolution in the bottlenecks of timm's own ResNet. A convolution keeps its
parameter names, so with ``operators='conv'`` the state dict matches timm's ResNet.

    timm.create_model('resnet50_trionet')                                    # our handmade mixture
    timm.create_model('resnet50_trionet', operators='conv,conv,local*3+axial*3,axial')
    timm.create_model('resnet26_sasa')          # all local: Stand-Alone Self-Attention, Ramachandran et al. 2019
    timm.create_model('axial_resnet50')         # all axial: Axial-DeepLab, Wang et al. 2020, in its form for ImageNet

``operators`` is one operator for all blocks, or one entry for each of the four stages, separated by commas. An entry
is an operator for the whole stage, or a sum of operators with counts, from the first block on: ``local*3+axial*3``. An
operator is ``conv``, ``local`` or ``axial``; a number after the first two is the kernel or window size: ``conv5``,
``local3``.

The networks that the paper found are not public and not included, and there are no pretrained weights.
"""

# Arguments are plain strings and numbers, so model configurations can be serialised.
from __future__ import annotations

import math
import re
from functools import partial
from typing import Any

from timm.models import build_model_with_cfg, register_model
from timm.models.resnet import Bottleneck, ResNet
from torch import nn

from sase_blocks.checks import check_feat_size
from sase_blocks.selfattention import OPERATORS, build_operator

from .resnet import AttentionResNet, imagenet_cfg

__all__ = ['parse_operators', 'set_operators']

LAYERS = {26: (1, 2, 4, 1), 38: (2, 3, 5, 2), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
# Convolution where maps are large and features local, attention where they are small.
HAND_MADE = {50: 'conv,conv,local*3+axial*3,axial', 101: 'conv,conv,local*12+axial*11,axial'}

_OPERATOR = re.compile(r'(?P<name>[a-z]+)(?P<kernel>\d+)?(?:\*(?P<count>\d+))?')

Operator = tuple[str, int | None]


def parse_operators(text: str, layers: tuple[int, ...]) -> tuple[tuple[Operator, ...], ...]:
    """The operator of every block, by stage: ('conv', None), ('local', 3), ...; None is the operator's default size.

    Args:
        text: see the module docstring.
        layers: blocks in each stage.

    Raises:
        ValueError: the text is invalid; the message gives the position.

    Examples:
        >>> parse_operators('conv,local3+axial', (1, 2))
        ((('conv', None),), (('local', 3), ('axial', None)))
    """
    if not isinstance(text, str):
        raise TypeError(f"operators must be a text such as 'conv,conv,local*3+axial*3,axial', got {text!r}")

    def fail(at: int, what: str) -> ValueError:
        return ValueError(f'operators: {what}, at character {at + 1} of {text!r}')

    entries = text.split(',')
    several = len(entries) > 1
    if not several and '*' not in text and '+' not in text:
        entries *= len(layers)
    if len(entries) != len(layers):
        raise ValueError(
            f'operators has {len(entries)} entries, expected one for all blocks or one for each of the {len(layers)} '
            f'stages: {text!r}'
        )
    stages = []
    at = 0
    for entry, depth in zip(entries, layers, strict=True):
        blocks: list[Operator] = []
        place = at
        for term in entry.split('+'):
            stripped = term.strip()
            inner = place + len(term) - len(term.lstrip())
            match = _OPERATOR.fullmatch(stripped)
            if match is None or match['name'] not in OPERATORS:
                known = ', '.join(OPERATORS)
                raise fail(inner, f'{stripped!r} is not an operator; there are {known}, as in local, local3 or local*2')
            kernel = int(match['kernel']) if match['kernel'] else None
            if kernel is not None and (match['name'] == 'axial' or kernel % 2 == 0):
                expected = 'axial takes no size' if match['name'] == 'axial' else 'a size must be odd'
                raise fail(inner, f'{stripped!r}: {expected}')
            alone = match['count'] is None and '+' not in entry
            blocks += [(match['name'], kernel)] * (depth if alone else int(match['count'] or 1))
            place += len(term) + 1
        if len(blocks) != depth:
            raise fail(at, f'{entry.strip()!r} names {len(blocks)} blocks, but the stage has {depth}')
        stages.append(tuple(blocks))
        at += len(entry) + 1 if several else 0
    return tuple(stages)


def set_operators(
    model: nn.Module,
    operators: str,
    img_size: int | tuple[int, int] = 224,
    heads: int = 8,
    **factory_kwargs: Any,
) -> None:
    """Replace the 3x3 convolutions of a timm ResNet of bottlenecks, in place; 'conv' leaves a block unchanged.

    Args:
        model: timm's ``ResNet`` with ``Bottleneck`` blocks, without groups.
        operators: see the module docstring.
        img_size: image size for axial attention's tables; other sizes work, too.
        heads: number of heads of the attentions.
        **factory_kwargs: ``device``, ``dtype``.

    Raises:
        ValueError: a bad text or image size, channels that the heads do not divide, or blocks other than bottlenecks.
    """
    height, width = check_feat_size(img_size, 'img_size')
    stages = [getattr(model, f'layer{i}') for i in range(1, 5)]
    chosen = parse_operators(operators, tuple(len(stage) for stage in stages))
    reduction = 4
    for stage, names in zip(stages, chosen, strict=True):
        for block, (name, kernel) in zip(stage, names, strict=True):
            stride = block.stride if isinstance(block.stride, int) else block.stride[0]
            size = (math.ceil(height / reduction), math.ceil(width / reduction))
            reduction *= stride
            if (name, kernel or 3) == ('conv', 3):
                continue
            conv = block.conv2 if isinstance(block, Bottleneck) else None
            if not isinstance(conv, nn.Conv2d) or conv.groups != 1:
                raise ValueError(f'operators need bottlenecks with a plain 3x3 convolution, got {type(block).__name__}')
            middle, needs_norm = build_operator(
                name, conv.out_channels, conv.stride[0], kernel, heads, size, **factory_kwargs
            )
            block.conv2 = middle
            if not needs_norm:
                block.bn2 = nn.Identity()


class AxialBottleneck(Bottleneck):
    """Axial-DeepLab's bottleneck: twice as wide outside as inside."""

    expansion = 2


NAMES = (
    'resnet50_trionet', 'resnet101_trionet', 'resnet26_sasa', 'resnet38_sasa', 'resnet50_sasa',
    'axial_resnet26', 'axial_resnet50',
)  # fmt: skip
default_cfgs: dict[str, dict[str, Any]] = {name: imagenet_cfg() for name in NAMES}


def _network(operators: str, img_size: int | tuple[int, int], heads: int, scale: float | None, **kwargs: Any) -> ResNet:
    model = AttentionResNet(**kwargs)
    dd = {'device': kwargs.get('device'), 'dtype': kwargs.get('dtype')}
    if scale is not None:
        _scale_stem(model, scale, **dd)
    set_operators(model, operators, img_size, heads, **dd)
    return model


def _scale_stem(model: Any, scale: float, **dd: Any) -> None:
    """Scale the stem as in Axial-ResNet; timm's always has 64 channels."""
    width, first = int(64 * scale), model.layer1[0]
    old, shortcut = model.conv1, first.downsample[0]
    if width == old.out_channels:
        return
    model.conv1 = nn.Conv2d(old.in_channels, width, old.kernel_size, old.stride, old.padding, bias=False, **dd)
    model.bn1 = type(model.bn1)(width, **dd)
    first.conv1 = nn.Conv2d(width, first.conv1.out_channels, 1, bias=False, **dd)
    first.downsample[0] = nn.Conv2d(width, shortcut.out_channels, 1, shortcut.stride, bias=False, **dd)
    for conv in (model.conv1, first.conv1, first.downsample[0]):
        nn.init.kaiming_normal_(conv.weight, mode='fan_out', nonlinearity='relu')
    model.feature_info[0]['num_chs'] = width


def _create(
    variant: str,
    pretrained: bool,
    depth: int,
    operators: str,
    img_size: int | tuple[int, int] = 224,
    heads: int = 8,
    scale: float | None = None,
    **kwargs: Any,
) -> ResNet:
    kwargs = {'block': Bottleneck, 'layers': LAYERS[depth], **kwargs}
    return build_model_with_cfg(partial(_network, operators, img_size, heads, scale), variant, pretrained, **kwargs)


@register_model
def resnet50_trionet(pretrained: bool = False, operators: str = HAND_MADE[50], **kwargs: Any) -> ResNet:
    """ResNet-50 with TrioNet's operators. Not in the paper: the default, a handmade mixture.

    Args:
        pretrained: there are no published weights; False.
        operators: the operator of each block, see the module docstring.
        img_size: image size for axial attention's tables; default: 224.
        heads: number of heads of the attentions; default: 8.
        **kwargs: timm's ResNet arguments.
    """
    return _create('resnet50_trionet', pretrained, 50, operators, **kwargs)


@register_model
def resnet101_trionet(pretrained: bool = False, operators: str = HAND_MADE[101], **kwargs: Any) -> ResNet:
    """ResNet-101 with TrioNet's operators; see ``resnet50_trionet``."""
    return _create('resnet101_trionet', pretrained, 101, operators, **kwargs)


@register_model
def resnet26_sasa(pretrained: bool = False, operators: str = 'local', **kwargs: Any) -> ResNet:
    """ResNet-26 with local self-attention in every bottleneck (arXiv 1906.05909), a convolution as its stem."""
    return _create('resnet26_sasa', pretrained, 26, operators, **kwargs)


@register_model
def resnet38_sasa(pretrained: bool = False, operators: str = 'local', **kwargs: Any) -> ResNet:
    """ResNet-38 with local self-attention in every bottleneck (arXiv 1906.05909), a convolution as its stem."""
    return _create('resnet38_sasa', pretrained, 38, operators, **kwargs)


@register_model
def resnet50_sasa(pretrained: bool = False, operators: str = 'local', **kwargs: Any) -> ResNet:
    """ResNet-50 with local self-attention in every bottleneck (arXiv 1906.05909), a convolution as its stem."""
    return _create('resnet50_sasa', pretrained, 50, operators, **kwargs)


def _axial(variant: str, pretrained: bool, depth: int, scale: float, operators: str, **kwargs: Any) -> ResNet:
    widths = tuple(int(planes * scale) for planes in (128, 256, 512, 1024))
    kwargs = {'block': AxialBottleneck, 'channels': widths, **kwargs}
    return _create(variant, pretrained, depth, operators, scale=scale, **kwargs)


@register_model
def axial_resnet26(pretrained: bool = False, scale: float = 0.5, operators: str = 'axial', **kwargs: Any) -> ResNet:
    """Axial-ResNet-26 (arXiv 2003.07853): axial attention in every bottleneck, ``scale`` times as wide."""
    return _axial('axial_resnet26', pretrained, 26, scale, operators, **kwargs)


@register_model
def axial_resnet50(pretrained: bool = False, scale: float = 0.5, operators: str = 'axial', **kwargs: Any) -> ResNet:
    """Axial-ResNet-50 (arXiv 2003.07853): axial attention in every bottleneck, ``scale`` times as wide."""
    return _axial('axial_resnet50', pretrained, 50, scale, operators, **kwargs)
