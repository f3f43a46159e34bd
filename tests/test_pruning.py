"""A block goes by its parameters, not by what it was built with, and can be cut down to some of its channels."""

import copy
import re

import pytest
import torch
from torch import nn

from sase_blocks import create_block, insert, keep_channels, list_blocks
from sase_blocks.blocks import AttentionModule
from sase_blocks.ops.primitive import Primitive

SIZE = (8, 8)
# Their parameters are not for channels, or for groups of them, so they take other numbers of channels, too.
ANY_NUMBER = {'eca', 'ecam', 'ceca', 'ge', 'simam', 'triplet', 'sge', 'ema', 'shuffle', 'mlca'}
# What these compute of a channel depends on where it stands among the others.
ORDERED = {'eca', 'ecam', 'ceca', 'fca', 'sge', 'ema', 'ela', 'triplet', 'shuffle', 'sk', 'mlca', 'scsa'}


def built(name: str, channels: int = 64) -> nn.Module:
    """In eval mode and float64, every parameter and statistic drawn, so that each entry counts."""
    torch.manual_seed(0)
    block = create_block(name, channels, feat_size=SIZE, dtype=torch.float64).eval()
    for tensor in (*block.parameters(), *block.buffers()):
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.1, 1.0)
    return block


def example(channels: int) -> torch.Tensor:
    return torch.randn(2, channels, *SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def cut_like(block: nn.Module, other: nn.Module) -> None:
    """Every tensor of a block to the sizes of another, by hand, and what torch's layers compute by beside them."""
    sizes = dict(other.named_modules())
    for path, module in block.named_modules():
        for kind in (module._parameters, module._buffers):
            for name, tensor in kind.items():
                if tensor is not None:
                    cut = tensor.detach()[tuple(slice(n) for n in getattr(sizes[path], name).shape)].clone()
                    kind[name] = nn.Parameter(cut) if isinstance(tensor, nn.Parameter) else cut
        for name in ('groups', 'normalized_shape'):
            if isinstance(module, nn.modules.conv._ConvNd | nn.LayerNorm) and hasattr(module, name):
                setattr(module, name, getattr(sizes[path], name))


@pytest.mark.parametrize('name', list_blocks())
def test_a_block_cut_by_hand_is_one_of_that_width(name):
    block, narrow = built(name), built(name, 32)
    cut_like(block, narrow)
    narrow.load_state_dict(block.state_dict())
    x = example(32)
    torch.testing.assert_close(block(x), narrow(x), rtol=1e-12, atol=1e-12)
    if name not in ANY_NUMBER:
        with pytest.raises((ValueError, RuntimeError)) as error:
            block(example(64))
        assert '\n' not in str(error.value)
    drawn = copy.deepcopy(block)
    drawn.apply(lambda module: module.reset_parameters() if hasattr(module, 'reset_parameters') else None)
    assert drawn(x).isfinite().all()


@pytest.mark.parametrize('name', list_blocks())
def test_keep_channels(name):
    block, x = built(name), example(64)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(2)).tolist()
    moved = copy.deepcopy(block)
    keep_channels(moved, order)
    if name not in ORDERED:
        torch.testing.assert_close(moved(x[:, order]), block(x)[:, order], rtol=1e-12, atol=1e-12)
    # Half of the channels: all hidden sizes stay, and what is left is what was there.
    half = copy.deepcopy(block)
    next(half.parameters(), torch.zeros(1)).requires_grad_(False)
    needs = [p.requires_grad for p in half.parameters()]
    keep_channels(half, range(0, 64, 2))
    y = half.train()(example(32).requires_grad_())
    assert y.shape == (2, 32, *SIZE)
    assert y.isfinite().all()
    y.sum().backward()
    assert [p.requires_grad for p in half.parameters()] == needs
    assert all(p.grad.isfinite().all() for p in half.parameters() if p.requires_grad)
    parts = [part for part in half.modules() if isinstance(part, AttentionModule | Primitive)]
    assert [part.extra_repr() for part in parts if not part.extra_repr().startswith('32')] == []
    # A second time, and a network around it.
    keep_channels(nn.Sequential(half), range(16))
    assert half(example(16)).shape == (2, 16, *SIZE)
    copy.deepcopy(half).load_state_dict(half.state_dict())


def test_keep_channels_in_an_inserted_block():
    network = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU())
    insert(network, 'se', where='0')
    keep_channels(network[0].inserted_attention, [1, 2, 5])
    network[0].weight, network[0].bias = nn.Parameter(network[0].weight[[1, 2, 5]]), None
    assert network(torch.randn(1, 3, 8, 8)).shape == (1, 3, 6, 6)


def test_keep_channels_of_grouped_convolutions():
    """Where no new group takes old ones apart: what the whole block computes without the other channels."""
    for options, kept, groups in (({'groups': 1}, [5, 0, 1, 63], 1), ({'groups': 16}, [0, 3, 1, 4, 61, 8, 62, 60], 2)):
        block = create_block('sk', 64, dtype=torch.float64, **options).eval()
        part, x = copy.deepcopy(block), example(64)
        keep_channels(part, kept)
        assert part.paths[0][0].groups == groups
        dropped = [i for i in range(64) if i not in kept]
        x[:, dropped] = 0
        block.fc.weight.data[:, dropped] = 0
        torch.testing.assert_close(part(x[:, kept]), block(x)[:, kept], rtol=1e-12, atol=1e-12)


WRONG = [
    ('se', [], 'some of the 64 channels of ChannelAttention, each once'),
    ('se', [0, 0], 'each once, got [0, 0]'),
    ('se', [64], 'some of the 64 channels'),
    ('se', [-1], 'some of the 64 channels'),
    ('ema', range(31), 'multiple of 2 channels, got 31; prune to such a multiple (round_to=2'),
    ('sk', range(31), 'multiple of 2 channels, got 31; prune to such a multiple (round_to=2'),
    ('ela', range(24), 'multiple of 16 channels, got 24; prune to such a multiple (round_to=16'),
]


def test_wrong_channels_leave_the_block_as_it_was():
    for name, keep, text in WRONG:
        block = built(name)
        state = {key: value.shape for key, value in block.state_dict().items()}
        with pytest.raises(ValueError, match=re.escape(text)) as error:
            keep_channels(block, keep)
        assert '\n' not in str(error.value)
        assert {key: value.shape for key, value in block.state_dict().items()} == state
        assert block(example(64)).shape == (2, 64, *SIZE)
    with pytest.raises(TypeError, match='expected a block of sase_blocks, got ReLU'):
        keep_channels(nn.ReLU(), [0])


def test_grouped_blocks_name_the_multiple():
    for name, channels, given, multiple in (('ema', 128, 66, 4), ('sge', 128, 96, 64), ('shuffle', 128, 65, 2)):
        text = rf'multiple of {multiple} channels.* got {given}; .*round_to={multiple}\b'
        with pytest.raises(ValueError, match=text) as error:
            built(name, channels)(example(given))
        assert '\n' not in str(error.value)
