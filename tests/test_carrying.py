"""Inserted attention carried over to a network that was built anew."""

import copy
from functools import partial

import pytest
import timm
import torch
from torch import nn
from torchvision.models import resnet18, swin_t

import sase_blocks
from sase_blocks.insertion.carrying import carry_over, inserted_attention


def stack():
    return nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1))


CASES = {  # slots, hooks after a module, a child at the end of a sequence, a layout
    'slot': (partial(timm.create_model, 'test_resnet'), {}),
    'after': (resnet18, {'input_size': 64}),
    'append': (stack, {'where': '0', 'input_size': 16}),
    'layout': (swin_t, {'where': 'features.1.?', 'input_size': 64}),
}


@pytest.mark.parametrize('start', ['identity', 'paper'])
@pytest.mark.parametrize('case', CASES)
def test_attention_carried_over(case, start):
    build, options = CASES[case]
    model, new = build().eval(), build().eval()
    sase_blocks.insert(model, 'cbam', start=start, **options)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    model.requires_grad_(False)
    attention = inserted_attention(model)
    assert carry_over(attention, new) == list(attention)
    assert sase_blocks.check(new, 64).calls.keys() == attention.keys()
    assert {k for k, p in new.named_parameters() if not p.requires_grad} == set()
    new.load_state_dict(model.state_dict())  # the same keys
    x = torch.randn(2, 3, 64, 64)
    y = new(x)
    assert torch.equal(y, model(x))

    # Copies of its own, which remain when they are carried over again, and can be removed.
    for part in attention.values():
        for parameter in part.parameters():
            parameter += 1
    assert carry_over(attention, new) == []
    assert torch.equal(new(x), y)
    assert torch.equal(copy.deepcopy(new)(x), y)
    assert sase_blocks.remove(new) == list(attention)
    assert not torch.equal(new(x), y)


def test_another_network_is_left_as_it_is():
    model, other = resnet18(), stack()
    sase_blocks.insert(model, 'se', input_size=64)
    keys = list(other.state_dict())
    with pytest.raises(
        ValueError, match="8 of 8 modules with inserted attention are not in this Sequential, such as 'l"
    ):
        carry_over(inserted_attention(model), other)
    assert list(other.state_dict()) == keys
    assert carry_over({}, other) == []
