"""Where the residual branch ends in the blocks of known networks: one row per block class, from timm and torchvision.

The place is the papers': after the last norm of the branch, before the shortcut is added. Not in the papers: the end of
the branch, after the layer scale, in ConvNeXt and in pre-activation RegNet, ResNetV2 and NFNet, whose norm, if any,
comes earlier; the end of mobile networks' blocks that change size and add no shortcut; and the new features of each
dense layer in DenseNet, which adds nothing. Rows are classes of blocks, not of networks, so that a backbone inside a
detector or a segmentation model is also known.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from timm.models import _efficientnet_blocks as mbconv
from timm.models import (
    byobnet,
    convnext,
    cspnet,
    densenet,
    nfnet,
    regnet,
    res2net,
    resnest,
    resnet,
    resnetv2,
    rexnet,
    senet,
    sknet,
)
from torch import nn
from torchvision.models import convnext as tv_convnext
from torchvision.models import densenet as tv_densenet
from torchvision.models import efficientnet as tv_efficientnet
from torchvision.models import mnasnet as tv_mnasnet
from torchvision.models import mobilenetv2 as tv_mobilenetv2
from torchvision.models import mobilenetv3 as tv_mobilenetv3
from torchvision.models import regnet as tv_regnet
from torchvision.models import resnet as tv_resnet

from .surgery import AFTER, BEFORE, SLOT

Site = tuple[str, str]  # a child of the block, '' for the block itself, and one of the ways of surgery.py


class Family(NamedTuple):
    """Where attention goes in a class of blocks.

    Args:
        site: where and how it goes into a given block; None if the block has no place (an option removed its shortcut).
        channels: the number of channels there, from the last layer of the branch.
        stage: a pattern for the block's name whose group is its stage number, and the first stage's number; None:
            consecutive residual blocks of equal width count as one stage.
        norm: the last norm of the branch. A ``where`` that matches it means this site.
    """

    site: Callable[[Any], Site | None]
    channels: Callable[[Any], int]
    stage: tuple[str, int] | None = None
    norm: str = ''


def _always(at: str, how: str) -> Callable[[Any], Site]:
    return lambda block: (at, how)


_LAYER = (r'(?:^|\.)layer(\d+)\b', 1)
_STAGES = (r'(?:^|\.)stages[._](\d+)\b', 0)
_BLOCKS = (r'(?:^|\.)blocks\.(\d+)\b', 0)
_S = (r'(?:^|\.)s(\d+)\b', 1)
_TRUNK = (r'(?:^|\.)block(\d+)\b', 1)
_MNASNET = (r'(?:^|\.)layers\.(\d+)\b', 8)
_NO_STAGE = (r'(?!)', 1)
_DENSE = (r'denseblock(\d+)\b', 1)

# In timm's blocks the residual branch ends in a drop-path child. In torchvision it is often one nn.Sequential.
_BASIC = Family(_always('se', SLOT), lambda b: b.conv2.out_channels, _LAYER, 'bn2')
_BOTTLE = Family(_always('se', SLOT), lambda b: b.conv3.out_channels, _LAYER, 'bn3')
_MBCONV = Family(
    lambda b: ('drop_path', BEFORE) if b.has_skip else ('', AFTER), lambda b: b.conv_pwl.out_channels, _BLOCKS, 'bn3'
)
_REGNET = Family(lambda b: None if b.downsample is None else ('drop_path', BEFORE), lambda b: b.conv3.out_channels, _S)
# Not after the layer, which takes a tensor or a list, because TorchScript accepts no hook for both.
_DENSE_LAYER = Family(_always('conv2', AFTER), lambda b: b.conv2.out_channels, _DENSE)
_BEFORE_DROP = Family(_always('drop_path', BEFORE), lambda b: b.conv3.out_channels, _STAGES)
_BYOB_1X1 = _BEFORE_DROP._replace(channels=lambda b: b.conv3_1x1.conv.out_channels, norm='conv3_1x1.bn')
_HF_LAYER = Family(_always('layer', AFTER), lambda b: b.layer[-1].convolution.out_channels, _STAGES)
_TV_BLOCK = Family(_always('block', AFTER), lambda b: b.out_channels)

FAMILIES: dict[type[nn.Module], Family] = {
    resnet.BasicBlock: _BASIC,
    resnet.Bottleneck: _BOTTLE,
    res2net.Bottle2neck: _BOTTLE,
    sknet.SelectiveKernelBasic: _BASIC._replace(channels=lambda b: b.conv2.conv.out_channels, norm='conv2.bn'),
    sknet.SelectiveKernelBottleneck: _BOTTLE._replace(channels=lambda b: b.conv3.conv.out_channels, norm='conv3.bn'),
    tv_resnet.BasicBlock: _BASIC._replace(site=_always('bn2', AFTER)),
    tv_resnet.Bottleneck: _BOTTLE._replace(site=_always('bn3', AFTER)),
    convnext.ConvNeXtBlock: Family(_always('drop_path', BEFORE), lambda b: b.conv_dw.out_channels, _STAGES),
    tv_convnext.CNBlock: Family(_always('stochastic_depth', BEFORE), lambda b: len(b.layer_scale)),
    mbconv.DepthwiseSeparableConv: _MBCONV._replace(channels=lambda b: b.conv_pw.out_channels, norm='bn2'),
    mbconv.InvertedResidual: _MBCONV,
    mbconv.CondConvResidual: _MBCONV,
    mbconv.EdgeResidual: _MBCONV._replace(norm='bn2'),
    mbconv.UniversalInvertedResidual: _MBCONV._replace(channels=lambda b: b.pw_proj.conv.out_channels, norm=''),
    mbconv.ConvBnAct: _MBCONV._replace(  # without a shortcut it is a plain convolution, as in a head
        site=lambda b: ('drop_path', BEFORE) if b.has_skip else None, channels=lambda b: b.conv.out_channels, norm='bn1'
    ),
    tv_efficientnet.MBConv: _TV_BLOCK,
    tv_efficientnet.FusedMBConv: _TV_BLOCK,
    tv_mobilenetv3.InvertedResidual: _TV_BLOCK,
    tv_mobilenetv2.InvertedResidual: _TV_BLOCK._replace(site=_always('conv', AFTER)),
    regnet.Bottleneck: _REGNET._replace(channels=lambda b: b.conv3.conv.out_channels, norm='conv3.bn'),
    regnet.PreBottleneck: _REGNET,
    tv_regnet.ResBottleneckBlock: Family(_always('f', AFTER), lambda b: b.f.c[0].out_channels, _TRUNK),
    resnetv2.PreActBasic: _BEFORE_DROP._replace(channels=lambda b: b.conv2.out_channels),
    resnetv2.PreActBottleneck: _BEFORE_DROP,
    resnetv2.Bottleneck: _BEFORE_DROP._replace(norm='norm3'),
    nfnet.NormFreeBlock: _BEFORE_DROP,
    byobnet.BasicBlock: _BEFORE_DROP._replace(channels=lambda b: b.conv2_kxk.conv.out_channels, norm='conv2_kxk.bn'),
    byobnet.BottleneckBlock: _BEFORE_DROP._replace(
        channels=lambda b: b.conv3_1x1.conv.out_channels, norm='conv3_1x1.bn'
    ),
    byobnet.DarkBlock: _BEFORE_DROP._replace(channels=lambda b: b.conv2_kxk.conv.out_channels, norm='conv2_kxk.bn'),
    byobnet.EdgeBlock: _BEFORE_DROP._replace(channels=lambda b: b.conv2_1x1.conv.out_channels, norm='conv2_1x1.bn'),
    byobnet.SelfAttnBlock: _BYOB_1X1,
    cspnet.BottleneckBlock: _BEFORE_DROP._replace(channels=lambda b: b.conv3.conv.out_channels, norm='conv3.bn'),
    cspnet.DarkBlock: _BEFORE_DROP._replace(channels=lambda b: b.conv2.conv.out_channels, norm='conv2.bn'),
    cspnet.EdgeBlock: _BEFORE_DROP._replace(channels=lambda b: b.conv2.conv.out_channels, norm='conv2.bn'),
    rexnet.LinearBottleneck: Family(  # the block itself adds the shortcut, to some channels
        _always('conv_pwl', AFTER), lambda b: b.out_channels, _NO_STAGE, 'conv_pwl.bn'
    ),
    resnest.ResNestBottleneck: Family(_always('bn3', AFTER), lambda b: b.conv3.out_channels, _LAYER, 'bn3'),
    senet.SEResNetBlock: Family(_always('se_module', AFTER), lambda b: b.conv2.out_channels, _LAYER, 'bn2'),
    senet.SEBottleneck: Family(_always('se_module', AFTER), lambda b: b.conv3.out_channels, _LAYER, 'bn3'),
    tv_mnasnet._InvertedResidual: Family(_always('layers', AFTER), lambda b: b.layers[-1].num_features, _MNASNET),
    densenet.DenseLayer: _DENSE_LAYER,
    tv_densenet._DenseLayer: _DENSE_LAYER,
}
_BY_FORWARD = {cls.forward: family for cls, family in FAMILIES.items()}

# Blocks of a library that may not be installed, by their forward's module and name.
_TRANSFORMERS = 'transformers.models'
_BY_NAME = {
    f'{_TRANSFORMERS}.resnet.modeling_resnet.ResNetBasicLayer.forward': _HF_LAYER,
    f'{_TRANSFORMERS}.resnet.modeling_resnet.ResNetBottleNeckLayer.forward': _HF_LAYER,
    f'{_TRANSFORMERS}.regnet.modeling_regnet.RegNetXLayer.forward': _HF_LAYER,
    f'{_TRANSFORMERS}.regnet.modeling_regnet.RegNetYLayer.forward': _HF_LAYER,
    f'{_TRANSFORMERS}.convnext.modeling_convnext.ConvNextLayer.forward': Family(
        _always('drop_path', BEFORE), lambda b: b.dwconv.out_channels, _STAGES
    ),
}


def family_of(module: nn.Module) -> Family | None:
    """The row of a block, or None for anything else, including a subclass with its own forward."""
    forward = type(module).forward
    return _BY_FORWARD.get(forward) or _BY_NAME.get(f'{forward.__module__}.{forward.__qualname__}')


def numbered_blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module, Family, int | None]]:
    """Every known block of a network: name, block, row, and stage (from 1, None if unknown)."""
    stage, last_width = 0, 0
    for name, module in model.named_modules():
        family = family_of(module)
        if family is None:
            continue
        if family.stage is None:
            width = family.channels(module)
            stage += width != last_width or not getattr(module, 'use_res_connect', True)
            last_width = width
            yield name, module, family, stage
        else:
            pattern, first = family.stage
            match = re.search(pattern, name)
            yield name, module, family, None if match is None else int(match[1]) - first + 1
