"""Structured pruning of a network with attention, by torch-pruning: python examples/prune_channels.py

torch-pruning traces a network by its gradients and misreads the inside of the blocks. So this example presents every
block as one layer that keeps its channels. ``keep_channels`` prunes it together with the layer before it.
pip install "sase-blocks[ecosystem]"
"""

from typing import Any

import timm
import torch
import torch_pruning as tp
from torch import Tensor, nn

from sase_blocks import insert, keep_channels
from sase_blocks.blocks import AttentionModule


class BlockPruner(tp.BasePruningFunc):
    """A block as one layer with equal input and output channels."""

    def prune_out_channels(self, layer: Any, idxs: list[int]) -> nn.Module:
        keep_channels(layer, sorted(set(range(layer.channels)) - set(idxs)))
        return layer

    def get_out_channels(self, layer: Any) -> int:
        return layer.channels

    prune_in_channels, get_in_channels = prune_out_channels, get_out_channels


def make_pruner(model: nn.Module, x: Tensor, **options: Any) -> tp.pruner.BasePruner:
    """torch-pruning's magnitude pruner, with its options. Call its ``step()``."""
    blocks = [module for module in model.modules() if isinstance(module, AttentionModule)]
    # While torch-pruning traces the network, each block returns its input, which tells all about its channels.
    hooks = [block.register_forward_hook(lambda block, inputs, y: 1 * inputs[0]) for block in blocks]
    pruners = dict.fromkeys(map(type, blocks), BlockPruner())
    importance = tp.importance.MagnitudeImportance()
    pruner = tp.pruner.MagnitudePruner(model, x, importance, customized_pruners=pruners, **options)
    for hook in hooks:
        hook.remove()
    return pruner


def main() -> None:
    torch.manual_seed(0)
    model = timm.create_model('resnet18', num_classes=10)
    insert(model, 'se')
    x = torch.randn(2, 3, 64, 64)
    before = sum(p.numel() for p in model.parameters())
    # With sge, ema or ela also pass round_to=, because their groups need a multiple, which the error names.
    make_pruner(model, x, pruning_ratio=0.5, ignored_layers=[model.fc]).step()
    after = sum(p.numel() for p in model.parameters())
    model(x).sum().backward()
    print(f'resnet18 with SE: {before:,} -> {after:,} parameters, classes {model(x).shape[1]}')


if __name__ == '__main__':
    main()
