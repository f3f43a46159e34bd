"""The search network and its gradients against the numbers of the SASE authors' code (tests/golden/README.md)."""

import json
import re
import zlib

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from golden_data import GOLDEN, load

from sase_blocks.blocks import Genotype
from sase_blocks.convert import convert_paper_state_dict
from sase_blocks.ops import SETS
from sase_blocks.search.sase.bilevel import VirtualStep, logits_gradient
from sase_blocks.search.sase.network import SearchNetwork
from sase_blocks.search.sase.space import EDGES, SearchSpace

LR, MOMENTUM, DECAY, CLIP = 0.025, 0.9, 5e-4, 5.0


def filled(name: str, shape: list[int]) -> torch.Tensor:
    """A tensor of the state that tests/golden/README.md defines by its key and shape."""
    if name.endswith('num_batches_tracked'):
        return torch.tensor(0)
    r = np.random.default_rng(zlib.crc32(f'search/{name}'.encode())).standard_normal(shape)
    last = name.rsplit('.', 1)[-1]
    if last in ('running_mean', 'bias', 'beta'):
        return torch.from_numpy(0.1 * r)
    if last == 'running_var':
        return torch.from_numpy(np.exp(0.1 * r))
    if last == 'alpha' or (last == 'weight' and len(shape) == 1):
        return torch.from_numpy(1 + 0.1 * r)
    gain = 0.1 if 'attention._ops' in name else 2
    return torch.from_numpy(r * np.sqrt(gain / np.prod(shape[1:])))


def converted(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Maps the authors' search keys (``..._ops.EDGE._ops.NUMBER.REST``) to ours."""
    out = {}
    for key, value in state.items():
        key = key.removeprefix('model.').replace('.shortcut.', '.downsample.').replace('.attention.', '.se.')
        if match := re.fullmatch(r'(.*\.)_ops\.(\d)\._ops\.(\d)\.(.+)', key):
            prefix, edge, number, rest = match[1], int(match[2]), int(match[3]), match[4]
            ((ours, tensor),) = convert_paper_state_dict({f'_ops.{edge}.{rest}': value}).items()
            name = list(SETS[Genotype.SET_OF[EDGES[edge]]])[number]
            out[f'{prefix}{EDGES[edge]}.{name}.{ours.split(".", 1)[1]}'] = tensor
        elif key.endswith('mixer.0.weight'):
            out[key.replace('mixer.0.weight', 'mix_weight')] = value.flatten()
        else:
            out[key.replace('mixer.1.', 'norm.')] = value
    return out


@pytest.fixture(params=[pytest.param('plain', marks=pytest.mark.slow), 'shared'])
def network(request) -> SearchNetwork:
    model = timm.create_model('resnet20_cifar')
    net = SearchNetwork(model, SearchSpace.parse('paper'), fair=False, form=request.param).double().train()
    shapes = json.loads((GOLDEN / 'sase_search_state_shapes.json').read_text())
    net.model.load_state_dict(converted({key: filled(key, shape) for key, shape in shapes.items()}))
    net.logits.data = golden('alphas').reshape(1, 42).clone()
    return net


def golden(name: str) -> torch.Tensor:
    return load('sase_search_step.npz')[name]


def batch(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    return golden(f'x_{name}'), golden(f'y_{name}')


def close(actual: torch.Tensor, name: str, tolerance: float) -> None:
    expected = golden(name)
    assert (actual.reshape(expected.shape) - expected).abs().max() <= tolerance * expected.abs().max().clamp_min(1)


def test_one_step(network):
    assert sum(w.numel() for w in network.weights().values()) == 459_455
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with network.statistics_kept():
        close(network(batch('train0')[0]), 'logits_train0', 1e-9)
    first = logits_gradient(network, F.cross_entropy, '1', batch('valid0'))
    close(first.loss, 'valid_loss0', 1e-9)
    close(first.gradient, 'alpha_grad_first_order0', 1e-9)

    step = VirtualStep(LR, MOMENTUM, DECAY)
    exact = logits_gradient(network, F.cross_entropy, '2', batch('valid0'), batch('train0'), step)
    close(exact.gradient, 'alpha_grad_unrolled0_exact', 1e-8)
    difference = logits_gradient(network, F.cross_entropy, '2-fd', batch('valid0'), batch('train0'), step)
    close(difference.gradient, 'alpha_grad_unrolled0_finite_difference', 1e-5)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())

    optimizer = torch.optim.SGD(network.weights().values(), LR, MOMENTUM, weight_decay=DECAY)
    loss = F.cross_entropy(network(batch('train0')[0]), batch('train0')[1])
    close(loss.detach(), 'train_loss0', 1e-9)
    loss.backward()
    close(torch.nn.utils.clip_grad_norm_(network.weights().values(), CLIP), 'grad_norm0', 1e-9)
    optimizer.step()
    with network.statistics_kept():
        loss = F.cross_entropy(network(batch('train1')[0]), batch('train1')[1])
    close(loss.detach(), 'train_loss1_after_step', 1e-9)

    buffers = {name: optimizer.state[w]['momentum_buffer'] for name, w in network.weights().items()}
    step = VirtualStep(LR, MOMENTUM, DECAY, buffers)
    exact = logits_gradient(network, F.cross_entropy, '2', batch('valid1'), batch('train1'), step)
    close(exact.gradient, 'alpha_grad_unrolled1_exact', 1e-8)
    difference = logits_gradient(network, F.cross_entropy, '2-fd', batch('valid1'), batch('train1'), step)
    close(difference.gradient, 'alpha_grad_unrolled1_finite_difference', 1e-5)
