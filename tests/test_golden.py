"""Every primitive and seven whole blocks against the SASE authors' own code, float64, values and gradients."""

import pytest
import torch
from golden_data import section

from sase_blocks import AttentionBlock, Genotype, convert_paper_state_dict
from sase_blocks.blocks.genotype import SASE_GENOTYPE
from sase_blocks.ops import SETS

OPS = [(set_name, name) for set_name, table in SETS.items() for name in table]
# An edge on which the converter would meet an operation of the set.
EDGE = {'channel_squeeze': 0, 'channel_excite': 1, 'spatial_squeeze': 4, 'spatial_excite': 5}
BLOCKS = ['found', *(f'random{i}' for i in range(6))]


@pytest.mark.parametrize(('set_name', 'name'), OPS, ids=lambda v: v)
def test_primitive_equals_the_authors(set_name, name):
    cls = SETS[set_name][name]
    data = section('sase_ops.npz', f'{set_name}/{cls.paper_key}/')
    op = cls(32, feat_size=(7, 6), dtype=torch.float64).train()
    edge = EDGE[set_name]
    state = {f'_ops.{edge}.{k.removeprefix("state/")}': v for k, v in data.items() if k.startswith('state/')}
    if state:
        ours = convert_paper_state_dict(state)
        op.load_state_dict({k.split('.', 1)[1]: v for k, v in ours.items()})
    x = data['x'].clone().requires_grad_()
    y = op(x)
    y.backward(data['gy'])
    torch.testing.assert_close(y, data['y'], rtol=0, atol=1e-10)
    torch.testing.assert_close(x.grad, data['gx'], rtol=0, atol=1e-10)


@pytest.mark.parametrize('name', BLOCKS)
def test_block_equals_the_authors(name):
    data = section('sase_blocks.npz', f'{name}/')
    block = AttentionBlock(32, Genotype.from_paper(data['genotype']), feat_size=(7, 6), dtype=torch.float64)
    pick = lambda prefix: {k.removeprefix(prefix): v for k, v in data.items() if k.startswith(prefix)}  # noqa: E731
    block.load_state_dict(convert_paper_state_dict(pick('state/')))
    x = data['x'].clone().requires_grad_()
    torch.testing.assert_close(block.eval()(x), data['y_eval'], rtol=0, atol=1e-9)
    y = block.train()(x)
    y.backward(data['gy'])
    torch.testing.assert_close(y, data['y_train'], rtol=0, atol=1e-9)
    torch.testing.assert_close(x.grad, data['gx'], rtol=0, atol=1e-9)
    expected = convert_paper_state_dict(pick('grad/'))
    assert {k for k, p in block.named_parameters() if p.grad is not None} == set(expected)
    for key, grad in expected.items():
        torch.testing.assert_close(
            block.get_parameter(key).grad, grad, rtol=0, atol=1e-9, msg=lambda m, k=key: f'{k}: {m}'
        )


def test_every_paper_key_is_golden():
    for set_name, table in SETS.items():
        assert len(table) == 7
        for cls in table.values():
            assert section('sase_ops.npz', f'{set_name}/{cls.paper_key}/'), cls.paper_key


def test_found_block_is_the_papers():
    assert list(SASE_GENOTYPE.to_paper()) == section('sase_blocks.npz', 'found/')['genotype']
