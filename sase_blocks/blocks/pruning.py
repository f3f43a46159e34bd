"""Prune the channels of an existing block, together with the network around it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from sase_blocks.ops import GroupNorm, Linear
from sase_blocks.ops.primitive import BOTH, Primitive

from .base import AttentionModule


@torch.no_grad()
def keep_channels(block: nn.Module, keep: Sequence[int]) -> None:
    """Reduce a block to some of its channels, in place, for a pruned network. Hidden widths stay.

    The parameters are new objects, so make the optimiser afterwards. Parts without a parameter per channel follow the
    new channel order: the neighbours in ``eca``, the frequencies in ``fca``, and the groups, which keep their size. In
    ``sge`` a group gets the parameters of its first channel's old group. In a grouped convolution, channels from
    different old groups get the weight 0 between them.

    Args:
        block: a block of this library, or a module with blocks of the same channels.
        keep: the indices to keep, each once, in the order of the new channels.

    Raises:
        TypeError: no block of this library in ``block``.
        ValueError: no channels, a repeated or unknown one, or a number not divisible into the block's groups. The
            block is unchanged.
    """
    parts = [part for part in block.modules() if isinstance(part, AttentionModule | Primitive)]
    if not parts:
        raise TypeError(f'expected a block of sase_blocks, got {type(block).__name__}')
    index = list(keep)
    for part in parts:
        if not index or len(set(index)) < len(index) or not all(0 <= i < part.channels for i in index):
            raise ValueError(
                f'keep must be some of the {part.channels} channels of {type(part).__name__}, each once, got {index}'
            )
        multiple = part.channel_multiple() if isinstance(part, AttentionModule) else 1
        if len(index) % multiple:
            raise ValueError(
                f'{type(part).__name__} of {part.channels} channels has groups and keeps a multiple of {multiple} '
                f'channels, got {len(index)}; prune to such a multiple (round_to={multiple} in torch-pruning)'
            )
    for part in parts:
        if isinstance(part, AttentionModule):
            part.keep_rest(torch.tensor(index))
        for path, axis in part.per_channel.items():
            for owner, name, tensor in _tensors(part, path):
                if tensor.dim() > max(axis, 0):  # a bias has no entry per input
                    size = part.channels // tensor.shape[max(axis, 0)]  # channels per entry, the groups of sge
                    entries = torch.tensor(index[::size], device=tensor.device) // size
                    both = axis == BOTH and tensor.dim() > 1
                    kept = _between(tensor, entries) if both else tensor.index_select(max(axis, 0), entries)
                    if isinstance(tensor, nn.Parameter):
                        kept = nn.Parameter(kept, tensor.requires_grad)
                    setattr(owner, name, kept)
        part.channels = len(index)
    for layer in block.modules():
        _fit(layer)


def _tensors(part: nn.Module, path: str) -> list[tuple[nn.Module, str, Tensor]]:
    """The parameters and buffers with values per channel: of a layer, of the layers in it, or one by its name."""
    owner: Any = part
    for name in path.split('.'):
        found = getattr(owner, name, None)
        if found is None:  # this block has no such part
            return []
        if isinstance(found, Tensor):
            return [(owner, name, found)]
        owner = found
    return [
        (module, name, tensor)
        for module in owner.modules()
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None
    ]


def _between(weight: Tensor, keep: Tensor) -> Tensor:
    """The weight of a layer from the channels to the channels, for some of them. Groups, if any, keep their size."""
    size = weight.shape[1]
    if size == weight.shape[0]:
        return weight[keep][:, keep]
    inputs = keep.reshape(-1, size).repeat_interleave(size, 0)  # of each output
    together = inputs // size == (keep // size)[:, None]
    return weight[keep[:, None], inputs % size] * together.reshape(*inputs.shape, *(1,) * (weight.dim() - 2))


def _fit(layer: Any) -> None:
    """Update the sizes that a layer stores besides its weight, because some of torch's layers use them."""
    if isinstance(layer, _ConvNd):
        layer.groups = layer.weight.shape[0] // layer.weight.shape[1] if layer.groups > 1 else 1  # of BOTH, if grouped
        layer.out_channels, layer.in_channels = layer.weight.shape[0], layer.weight.shape[1] * layer.groups
    elif isinstance(layer, Linear):
        layer.out_features, layer.in_features = layer.weight.shape
    elif isinstance(layer, nn.BatchNorm2d):
        layer.num_features = len(layer.bias)
    elif isinstance(layer, GroupNorm):
        layer.num_channels = len(layer.bias)
