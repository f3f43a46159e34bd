"""sase_blocks/selfattention: what every layer is asked, by the functions of test_contract.py, and wrong arguments."""

import copy

import pytest
import test_contract as contract
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from sase_blocks.selfattention import AxialSelfAttention, AxisAttention, LocalSelfAttention, local_attention

pytestmark = contract.pytestmark


def near(actual, expected, tolerance):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def _row(name: str, cls: type[nn.Module], smallest: int = 2, **options) -> contract.Row:
    def build(channels, feat_size=None, **kwargs):
        size = {'size': feat_size} if cls is AxialSelfAttention else {}
        return cls(channels, 4, **size, **options, **kwargs)

    return contract.Row('block', name, build, smallest)


ROWS = [
    _row('local', LocalSelfAttention, kernel_size=5),
    _row('local-3', LocalSelfAttention, kernel_size=3, border='mask'),
    _row('local-position', LocalSelfAttention, kernel_size=5, position='position_sensitive', border='mask'),
    _row('axial', AxialSelfAttention),
]
every_row = pytest.mark.parametrize('row', ROWS, ids=lambda row: row.name)

CHECKS = {
    'any size': contract.test_any_size,
    'batch independence': contract.test_batch_independence,
    'constant input': contract.test_finite_at_constant_input,
    'fp16': lambda row: contract.test_half_precision_at_large_activations(row, torch.float16),
    'bf16': lambda row: contract.test_half_precision_at_large_activations(row, torch.bfloat16),
    'autocast': contract.test_autocast,
    'channels_last': contract.test_channels_last,
    'input unchanged': contract.test_input_is_not_changed,
    'copies': contract.test_copies,
    'torchscript': contract.test_torchscript,
    'fx': contract.test_fx_and_script_of_it,
    'meta': contract.test_meta_device,
    'reset and state dict': contract.test_reset_parameters_and_state_dict,
    'update_bn': contract.test_recalibration_of_batch_norms,
    'wrong inputs': contract.test_wrong_inputs,
    'wrong channels': contract.test_wrong_channels,
}


@every_row
@pytest.mark.parametrize('check', CHECKS.values(), ids=CHECKS)
def test_contract(row, check):
    check(row)


captured_rows = pytest.mark.parametrize('row', [pytest.param(r, id=r.name) for r in ROWS])


@pytest.mark.slow
@captured_rows
def test_export(row):
    contract.test_export_with_dynamic_batch_and_size(row)


@pytest.mark.slow
@captured_rows
def test_compile_fullgraph_dynamic(row):
    """Not once for every size. (A single block of queries in a row or column is another graph, as a size of 1 is.)"""
    torch._dynamo.reset()
    counter = CompileCounter()
    layer = row.make().train()
    compiled = torch.compile(copy.deepcopy(layer), backend=counter, fullgraph=True, dynamic=True)
    for b, h, w in [(2, 15, 9), (3, 9, 16), (4, 22, 13)]:
        x = row.input(b, h=h, w=w)
        near(compiled(x), layer(x), 1e-5)
    assert counter.frame_count <= 2


@every_row
def test_half_is_near_float64(row):
    """Logits and softmax are in fp32: the error is that of the rounded projections."""
    for dtype, tolerance in ((torch.float16, 0.02), (torch.bfloat16, 0.15)):
        half = row.make().to(dtype).eval()
        wide = copy.deepcopy(half).double()
        x = row.input(dtype=dtype)
        expected = wide(x.double())
        error = (half(x).double() - expected).norm() / expected.norm()
        assert error < tolerance


@every_row
def test_every_parameter_gets_a_gradient(row):
    layer = row.make().train()
    _, gradients = contract.grads(layer, row.input(4))
    assert all(g is not None for g in gradients.values())
    # The softmax does not see what the norm of the logits adds.
    none = [name for name, g in gradients.items() if not g.abs().max() > 0]
    assert none == [name for name in gradients if name.endswith('logit_norm.bias')]


@pytest.mark.slow
@pytest.mark.parametrize('cls', [LocalSelfAttention, AxialSelfAttention])
def test_stride_rounds_up_and_exports(cls):
    layer = cls(16, 4, stride=2, **({'kernel_size': 3} if cls is LocalSelfAttention else {})).eval()
    for h, w in [(1, 1), (2, 3), (7, 6), (14, 9)]:
        assert layer(torch.randn(1, 16, h, w)).shape == (1, 16, (h + 1) // 2, (w + 1) // 2)
    size = {2: torch.export.Dim('h', min=3, max=512), 3: torch.export.Dim('w', min=3, max=512)}
    exported = torch.export.export(layer, (torch.randn(1, 16, 9, 8),), dynamic_shapes=(size,)).module()
    for h, w in [(3, 4), (12, 13)]:
        x = torch.randn(1, 16, h, w)
        near(exported(x), layer(x), 1e-5)


@pytest.mark.parametrize('cls', [LocalSelfAttention, AxialSelfAttention])
def test_frozen_projection_and_input(cls):
    """Only what asks for a gradient gets one, also from the routes with a backward of their own."""
    layer = cls(16, 4).train()
    for name, p in layer.named_parameters():
        p.requires_grad_('relative' in name)
    layer(torch.randn(2, 16, 6, 5)).sum().backward()
    assert {n for n, p in layer.named_parameters() if p.grad is not None} == {
        n for n, _ in layer.named_parameters() if 'relative' in n
    }


def q_and_table(d=4, size=3):
    return [torch.randn(1, 2, d, 5, 5)] * 3 + [torch.randn(1, 2, d // 2, size)]


WRONG = [
    ('heads', lambda: LocalSelfAttention(12, 8), '2 x heads = 16 .*channels=12 with heads=8'),
    ('half a head', lambda: LocalSelfAttention(24, 8), '2 x heads = 16 .*channels=24'),
    ('axial heads', lambda: AxialSelfAttention(20, 4), '2 x heads = 8 .*channels=20'),
    ('no heads', lambda: AxialSelfAttention(16, 0), 'heads to be an int of at least 1, got 0'),
    ('even window', lambda: LocalSelfAttention(16, 4, 6), 'odd kernel_size .*got 6'),
    ('no window', lambda: LocalSelfAttention(16, 4, -1), 'odd kernel_size .*got -1'),
    ('position', lambda: LocalSelfAttention(16, 4, position='rel'), "sasa, position_sensitive, got 'rel'"),
    ('border', lambda: LocalSelfAttention(16, 4, border='wrap'), "zero, mask, got 'wrap'"),
    ('route', lambda: LocalSelfAttention(16, 4, route='unfold'), "shifts, blocks, recompute, triton, got 'unfold'"),
    ('axial route', lambda: AxialSelfAttention(16, 4, route='blocks'), "einsum, recompute, got 'blocks'"),
    ('stride', lambda: LocalSelfAttention(16, 4, stride=3), 'stride 1 or 2 .*got 3'),
    ('size', lambda: AxialSelfAttention(16, 4, (7, 0)), r'feat_size .*got \(7, 0\)'),
    ('axis size', lambda: AxisAttention(16, 16, 4, 0), 'got 0'),
    ('axis', lambda: AxisAttention(16, 16, 4, 7, 'depth'), "height, width, got 'depth'"),
    ('empty', lambda: LocalSelfAttention(16, 4)(torch.empty(1, 16, 0, 4)), 'empty map.* got 0 x 4'),
    ('empty axial', lambda: AxialSelfAttention(16, 4)(torch.empty(1, 16, 0, 4)), 'empty map'),
    ('channels', lambda: AxialSelfAttention(16, 4)(torch.randn(1, 8, 4, 4)), 'built for 16 channels, got 8'),
    ('function route', lambda: local_attention(*q_and_table(), route='x'), 'shifts, blocks, recompute, triton, got x'),
    ('function border', lambda: local_attention(*q_and_table(), border='x'), 'zero, mask, got x'),
    ('function window', lambda: local_attention(*q_and_table(size=4)), 'k odd'),
    ('function shapes', lambda: local_attention(*q_and_table()[:2], torch.randn(1, 2, 4, 5, 4), None), 'one shape'),
]


@pytest.mark.parametrize(('call', 'text'), [w[1:] for w in WRONG], ids=[w[0] for w in WRONG])
def test_wrong_arguments(call, text):
    with pytest.raises(ValueError, match=text):
        call()


@pytest.mark.parametrize('cls', [LocalSelfAttention, AxialSelfAttention])
def test_recompute_cannot_be_captured(cls):
    layer, x = cls(16, 4, route='recompute'), torch.randn(1, 16, 7, 7)
    with pytest.raises(Exception, match='cannot be captured'):
        torch.export.export(layer.eval(), (x,))
    with pytest.raises(torch.jit.Error, match='TorchScript cannot run'):
        torch.jit.script(layer)(x)


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore::FutureWarning', 'ignore::UserWarning')
@every_row
def test_onnx(row):
    contract.test_onnx_with_dynamic_batch_and_size(row)


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore::FutureWarning', 'ignore::UserWarning')
@every_row
def test_inductor_gradients(row):
    """Compiled against eager: the output and every gradient."""
    torch._dynamo.reset()
    layer = row.make().train()
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True)
    x = row.input(2, h=15, w=14)
    (gx, gp), (cx, cp) = contract.grads(layer, x), contract.grads(compiled, x)
    near(cx, gx, 1e-4)
    for name, g in gp.items():
        near(cp['_orig_mod.' + name], g, 1e-3)
