"""A network of TrioNet's blocks (arXiv 2111.07547) from an architecture, found by a search or written by hand.

    timm.create_model('trionet', architecture='image 32; stem 16; heads 4; 64: conv3/16*2; 128: local5/32 + axial/32')
    timm.create_model('trionet', architecture='runs/architecture.json', checkpoint_path='runs/network.pt')

The blocks are ``TrioBlock``, from the paper's abstract and figure. Not in the paper: the stem, the pooled linear
classifier and the strides, which follow ResNet, and the default architecture, a handmade mixture.
"""

import os
from functools import partial
from typing import Any

import torch
from timm.models import build_model_with_cfg, checkpoint_seq, register_model
from torch import Tensor, nn

from sase_blocks.checks import check_feat_size
from sase_blocks.ops import BatchNorm2d
from sase_blocks.selfattention import TrioBlock

from .architecture import Architecture
from .base import StagedNetwork
from .resnet import imagenet_cfg

__all__ = ['DEFAULT', 'TrioNet', 'read_architecture']

DEFAULT = (
    'image 224; stem 64/4; heads 8; 256: conv3/64*3; 512: conv3/128*4; 1024: local7/256*3 + axial/256*3; '
    '2048: axial/512*3'
)


class TrioNet(StagedNetwork):
    """A stem, stages of ``TrioBlock`` and a classifier.

    Shape: (B, in_chans, H, W) -> (B, num_classes), any H and W; features of the stem and of every stage.

    Args:
        architecture: see ``Architecture``.
        num_classes: number of classes; 0 for no classifier.
        in_chans: input channels.
        img_size: (H, W) in px, or an int, for the size of axial attention's tables; default: the architecture's.
        global_pool: pooling before the classifier.
        drop_rate: dropout before the classifier.
        zero_init_last: whether blocks start as the identity.
        device, dtype: device and dtype of the parameters.
    """

    def __init__(
        self,
        architecture: Architecture,
        num_classes: int = 1000,
        in_chans: int = 3,
        img_size: int | tuple[int, int] | None = None,
        global_pool: str = 'avg',
        drop_rate: float = 0.0,
        zero_init_last: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        names = [f'stages.{i}' for i in range(len(architecture.stages))]
        super().__init__(names, num_classes, in_chans, drop_rate)
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        large = architecture.reduction == 4
        stride, k = (2, 7) if large else (1, 3)
        self.conv1 = nn.Conv2d(in_chans, architecture.stem, k, stride, k // 2, bias=False, **dd)
        self.bn1 = BatchNorm2d(architecture.stem, **dd)
        self.act1 = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if large else nn.Identity()
        info: list[dict[str, Any]] = [{'num_chs': architecture.stem, 'reduction': stride, 'module': 'act1'}]
        size = check_feat_size(architecture.image_size if img_size is None else img_size, 'img_size')
        size = (-(-size[0] // architecture.reduction), -(-size[1] // architecture.reduction))
        reduction = architecture.reduction
        stages: list[list[nn.Module]] = [[] for _ in architecture.stages]
        for i, _, block, channels, stride, _ in architecture.places():
            out = architecture.stages[i].width
            window, heads = block.kernel_size, architecture.heads
            stages[i].append(TrioBlock(channels, block.operator, out, block.width, stride, window, heads, size, **dd))
            size = (-(-size[0] // stride), -(-size[1] // stride))
            reduction *= stride
            if len(stages[i]) == len(architecture.stages[i].blocks):
                info.append({'num_chs': out, 'reduction': reduction, 'module': f'stages.{i}'})
        self.stages = nn.Sequential(*(nn.Sequential(*blocks) for blocks in stages))
        self.add_head(info, global_pool, **dd)
        self.init_weights(zero_init_last)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Parameter groups for layer-wise learning rates."""
        return {'stem': r'^conv1|bn1', 'blocks': r'^stages\.(\d+)' if coarse else r'^stages\.(\d+)\.(\d+)'}

    def forward_stem(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, stem, H', W'), before the max pool."""
        return self.act1(self.bn1(self.conv1(x)))

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, C, H', W') of the last stage."""
        x = self.maxpool(self.forward_stem(x))
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.stages, x, flatten=True)
        return self.stages(x)


def read_architecture(architecture: Any) -> Architecture:
    """Read an ``Architecture``, its text or JSON, or the path of a file with either or with a search's result.

    Raises:
        ValueError: a bad text or file. TypeError: neither a text nor an architecture.
    """
    if isinstance(architecture, Architecture):
        return architecture
    if isinstance(architecture, os.PathLike) or str(architecture).endswith(('.json', '.txt')):
        return Architecture.read(architecture)
    return Architecture.parse(architecture)


default_cfgs: dict[str, dict[str, Any]] = {'trionet': imagenet_cfg()}


@register_model
def trionet(pretrained: bool = False, architecture: Any = DEFAULT, **kwargs: Any) -> TrioNet:
    """A network of TrioNet's blocks. Not in the paper: the default, a handmade mixture.

    Args:
        pretrained: there are no published weights; False.
        architecture: see ``read_architecture``.
        **kwargs: arguments of ``TrioNet``.
    """
    found = read_architecture(architecture)
    size = found.image_size if kwargs.get('img_size') is None else kwargs['img_size']
    height, width = check_feat_size(size, 'img_size')
    facts: dict[str, Any] = {'input_size': (3, height, width)}
    if max(height, width) <= 64:
        facts['crop_pct'] = 1.0
    kwargs['pretrained_cfg_overlay'] = {**facts, **(kwargs.get('pretrained_cfg_overlay') or {})}
    return build_model_with_cfg(
        partial(TrioNet, found),
        'trionet',
        pretrained,
        feature_cfg={'out_indices': tuple(range(len(found.stages) + 1)), 'flatten_sequential': True},
        **kwargs,
    )
