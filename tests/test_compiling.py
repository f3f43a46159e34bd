"""compile_blocks with inductor: equal to eager with gradients, for every shape that a network brings."""

import pytest
import timm
import torch
import torch._dynamo

from sase_blocks import SASE, compile_blocks

# dynamo looks at .grad of what it traces, and the warning would be an error here.
pytestmark = pytest.mark.filterwarnings('ignore:The .grad attribute of a Tensor that is not a leaf')


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def run(block, x):
    x = x.clone().requires_grad_()
    y = block(x)
    torch.manual_seed(3)
    y.backward(torch.randn_like(y))
    return y.detach(), x.grad, {n: p.grad for n, p in block.named_parameters()}


@pytest.mark.slow
def test_a_block_compiled_equals_eager():
    torch.manual_seed(0)
    eager = SASE(24)
    compiled = SASE(24)
    compiled.load_state_dict(eager.state_dict())
    assert compile_blocks(compiled) == ['']
    assert compiled.state_dict().keys() == eager.state_dict().keys()
    x = torch.randn(2, 24, 9, 7)
    for mode in (True, False):
        (y, gx, gp), (cy, cgx, cgp) = run(eager.train(mode), x), run(compiled.train(mode), x)
        torch.testing.assert_close(cy, y, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(cgx, gx, rtol=1e-4, atol=1e-5)
        for name in gp:
            torch.testing.assert_close(cgp[name], gp[name], rtol=1e-3, atol=1e-4, msg=name)
    torch.testing.assert_close(compiled.state_dict(), eager.state_dict(), rtol=1e-5, atol=1e-6)
    zero = torch.zeros_like(x)
    assert all(g.isfinite().all() for g in [run(compiled.train(), zero)[1]])


@pytest.mark.slow
def test_a_network_compiles_every_block_and_never_falls_back():
    """Four widths in two modes at two batch sizes are 16 graphs, twice dynamo's default limit."""
    model = torch.nn.ModuleList(SASE(c) for c in (4, 6, 8, 10))
    assert compile_blocks(model, backend='eager', dynamic=False) == ['0', '1', '2', '3']
    limit = 'recompile_limit' if hasattr(torch._dynamo.config, 'recompile_limit') else 'cache_size_limit'
    assert getattr(torch._dynamo.config, limit) >= 64
    torch._dynamo.utils.counters.clear()
    for batch in (4, 3):
        for mode in (True, False):
            for block in model.train(mode):
                block(torch.randn(batch, block.channels, 5, 5))
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] == 16


def test_names_and_nothing_to_compile():
    model = timm.create_model('resnet20_cifar', genotype='cbam', attn_stages=(1,))
    assert compile_blocks(model, backend='eager')[:2] == ['layer1.0.se.0', 'layer1.0.se.1']
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    with pytest.raises(ValueError, match='ResNet holds no attention block'):
        compile_blocks(timm.create_model('resnet18'))
