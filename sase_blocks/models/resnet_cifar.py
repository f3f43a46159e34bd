"""The small ResNet for 32 x 32 images (arXiv 1512.03385, section 4.2), with timm's blocks and its attention slot.

A 3x3 stem of 16 channels without pooling, then three stages of 16, 32 and 64 channels. Three basic blocks per stage
make ResNet-20, the network of the SASE search. As in that search, a shortcut that changes width is a 1x1 projection
with batch norm; the ResNet paper pads with zeros.
"""

from functools import partial
from typing import Any

import torch
from timm.layers import get_act_layer, get_norm_layer
from timm.models import build_model_with_cfg, checkpoint_seq, register_model
from timm.models.resnet import BasicBlock, make_blocks
from torch import Tensor, nn

from sase_blocks.convert import checkpoint_filter_fn

from .base import StagedNetwork
from .slots import Genotypes, block_builder, fill_slots, refuse_block_attention

__all__ = ['CifarResNet']

STAGES = ('layer1', 'layer2', 'layer3')
ALL_STAGES = (1, 2, 3)


class CifarResNet(StagedNetwork):
    """ResNet for small images.

    Shape: (B, in_chans, H, W) -> (B, num_classes); features at H, H/2 and H/4.

    Args:
        layers: basic blocks in each of the three stages.
        num_classes: number of classes; 0 for no classifier.
        in_chans: input channels.
        channels: widths of the three stages; the stem has the first.
        global_pool, drop_rate, drop_path_rate, act_layer, norm_layer, zero_init_last, block_args: as timm's ResNet.
        device, dtype: device and dtype of the parameters.
    """

    def __init__(
        self,
        layers: tuple[int, int, int] = (3, 3, 3),
        num_classes: int = 10,
        in_chans: int = 3,
        channels: tuple[int, int, int] = (16, 32, 64),
        global_pool: str = 'avg',
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        act_layer: Any = nn.ReLU,
        norm_layer: Any = nn.BatchNorm2d,
        zero_init_last: bool = True,
        block_args: dict[str, Any] | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(STAGES, num_classes, in_chans, drop_rate)
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        act_layer, norm_layer = get_act_layer(act_layer), get_norm_layer(norm_layer)
        self.conv1 = nn.Conv2d(in_chans, channels[0], 3, padding=1, bias=False, **dd)
        self.bn1 = norm_layer(channels[0], **dd)
        self.act1 = act_layer(inplace=True)
        self.maxpool = nn.Identity()
        stages, info = make_blocks(
            (BasicBlock,) * len(STAGES),
            channels,
            layers,
            channels[0],
            drop_path_rate=drop_path_rate,
            act_layer=act_layer,
            norm_layer=norm_layer,
            **(block_args or {}),
            **dd,
        )
        (_, self.layer1), (_, self.layer2), (_, self.layer3) = stages
        # make_blocks assumes ResNet's stem, which reduces by 4.
        stem = {'num_chs': channels[0], 'reduction': 1, 'module': 'act1'}
        self.add_head([stem, *({**entry, 'reduction': entry['reduction'] // 4} for entry in info)], global_pool, **dd)
        self.init_weights(zero_init_last)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Parameter groups for layer-wise learning rates."""
        return {'stem': r'^conv1|bn1', 'blocks': r'^layer(\d+)' if coarse else r'^layer(\d+)\.(\d+)'}

    def forward_stem(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, channels[0], H, W)."""
        return self.act1(self.bn1(self.conv1(x)))

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, channels[-1], H/4, W/4)."""
        x = self.forward_stem(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq([self.layer1, self.layer2, self.layer3], x, flatten=True)
        x = self.layer1(x)
        x = self.layer2(x)
        return self.layer3(x)


default_cfgs: dict[str, dict[str, Any]] = {
    'resnet20_cifar': {
        'url': '',
        'num_classes': 10,
        'input_size': (3, 32, 32),
        'pool_size': (8, 8),
        'crop_pct': 1.0,
        'interpolation': 'bilinear',
        'mean': (0.4914, 0.4822, 0.4465),
        'std': (0.2470, 0.2435, 0.2616),
        'first_conv': 'conv1',
        'classifier': 'fc',
        'license': 'mit',
    },
}


def _cifar_resnet(genotype: Any, attn_stages: Any, img_size: int | tuple[int, int], **kwargs: Any) -> CifarResNet:
    if genotype is not None:
        refuse_block_attention(kwargs)
    model = CifarResNet(**kwargs)
    build = block_builder(genotype)
    fill_slots(model, build, attn_stages, img_size, device=kwargs.get('device'), dtype=kwargs.get('dtype'))
    return model


@register_model
def resnet20_cifar(
    pretrained: bool = False,
    genotype: Genotypes = None,
    attn_stages: tuple[int, ...] = ALL_STAGES,
    img_size: int | tuple[int, int] = 32,
    **kwargs: Any,
) -> CifarResNet:
    """ResNet-20 for small images, plain or with attention after the second batch norm of every basic block.

    Args:
        pretrained: there are no published weights; False.
        genotype: a block's name, maybe with options (``'se(reduction=8)'``), a genotype as text or JSON, a search's
            .json file, or None for no attention; several, separated by semicolons, are one for each stage.
        attn_stages: the stages that get the block, from 1 to 3; default: all.
        img_size: image size for per-position parameters; default: 32.
        **kwargs: arguments of ``CifarResNet``.
    """
    return build_model_with_cfg(
        partial(_cifar_resnet, genotype, attn_stages, img_size),
        'resnet20_cifar',
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={'out_indices': (0, 1, 2, 3)},
        **kwargs,
    )
