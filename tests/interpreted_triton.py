"""The Triton kernels of local self-attention in Triton's interpreter, on a CPU: equal to float64, in both orders.

Not collected by itself: `test_selfattention_triton.py` starts it in a process of its own, since Triton reads
TRITON_INTERPRET when it is imported. The interpreter takes about a second for one tile: maps are tiny. It cuts what it
converts to bf16 off, where a GPU rounds.
"""

import pytest
import torch
from test_selfattention import kept, local_arguments, local_loops, near, with_gradients
from triton.runtime.interpreter import InterpretedFunction

from sase_blocks.selfattention import LocalSelfAttention, local_attention, local_triton
from sase_blocks.selfattention import local_triton_backward as backward_kernels
from sase_blocks.selfattention import local_triton_forward as forward_kernels

F32 = torch.float32


@pytest.fixture(autouse=True)
def parts_are_called_as_they_are(monkeypatch):
    """A launch puts the interpreter behind Triton's language; again at each call of a part, it takes half the time."""
    whole = InterpretedFunction.__call__

    def call(self, *args, **kwargs):
        ours = self.fn.__module__.startswith('sase_blocks')
        return self.rewrite()(*args, **kwargs) if ours else whole(self, *args, **kwargs)

    monkeypatch.setattr(InterpretedFunction, '__call__', call)


def fused(border):
    return lambda *a: local_attention(*a, border, 'triton')


def reference(border):
    return lambda *a: local_attention(*a, border, 'blocks')


def compare(arguments, border, tolerance, expected=None):
    """Result and gradients against float64, ||a - b|| / ||b||; with one key some are 0, and numbers of 1 the scale."""
    found = with_gradients(fused(border), arguments)
    wide = [x.detach().double().requires_grad_() for x in arguments]
    expected = with_gradients(expected or reference(border), wide)
    for name, a, b in zip(('y', 'q', 'k', 'v', 'tables'), found, expected, strict=True):
        assert a.dtype == (arguments[3] if name == 'tables' else arguments[0]).dtype
        error = (a.double() - b).norm() / (b.norm() if b.norm() > 1e-9 else b.numel() ** 0.5)
        assert error < tolerance, f'{name}: {error:.1e}'


def in_layout(arguments, layout):
    """The same numbers as views of NCHW maps, of channels_last maps, or of one map with q, k and v in it."""
    *maps, table = (x.detach() for x in arguments)
    if layout == 'nchw':
        maps = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in maps]
    elif layout == 'channels_last':
        maps = [x.permute(0, 3, 4, 2, 1).contiguous().permute(0, 4, 3, 1, 2) for x in maps]
    elif layout == 'together':
        maps = list(torch.cat([x.transpose(3, 4) for x in maps], 1).transpose(3, 4).chunk(3, 1))
    return [x.requires_grad_() for x in (*maps, table)]


SMALL = [
    # height, width, k, heads, d, batch, terms, border, layout
    (5, 7, 3, 1, 6, 1, 1, 'zero', 'nchw'),
    (3, 9, 5, 1, 2, 1, 1, 'mask', 'channels_last'),
    (9, 2, 3, 1, 4, 1, 3, 'mask', 'nchw'),
    (2, 3, 3, 2, 4, 1, 3, 'zero', 'together'),
    (8, 8, 7, 1, 4, 1, 3, 'zero', 'channels_last'),
    (4, 3, 11, 1, 4, 1, 3, 'mask', 'nchw'),
    (1, 1, 9, 1, 2, 2, 1, 'mask', 'nchw'),
    (2, 2, 1, 1, 2, 1, 3, 'mask', 'nchw'),
]


@pytest.mark.parametrize(('height', 'width', 'size', 'heads', 'd', 'batch', 'terms', 'border', 'layout'), SMALL)
def test_fp32_equals_float64(height, width, size, heads, d, batch, terms, border, layout):
    arguments = local_arguments(terms, heads, d, height, width, size, batch, F32)
    compare(in_layout(arguments, layout), border, 3e-6)


@pytest.mark.parametrize(('terms', 'border'), [(3, 'zero'), (3, 'mask')])
def test_equals_loops(terms, border):
    arguments = local_arguments(terms, 1, 4, 3, 4, 3, 1, F32)
    compare(arguments, border, 3e-6, lambda *a: local_loops(*a, border))


@pytest.mark.slow
@pytest.mark.parametrize('border', ['zero', 'mask'])
@pytest.mark.parametrize('terms', [1, 3])
@pytest.mark.parametrize('size', [1, 3, 5, 7, 9, 11])
@pytest.mark.parametrize(
    ('height', 'width', 'heads', 'd', 'batch', 'layout'),
    [(17, 10, 1, 6, 1, 'nchw'), (7, 9, 2, 16, 2, 'channels_last'), (9, 16, 3, 18, 1, 'together'), (8, 1, 1, 32, 1, '')],
)
def test_fp32_equals_float64_at_many_sizes(height, width, size, heads, d, batch, terms, border, layout):
    test_fp32_equals_float64(height, width, size, heads, d, batch, terms, border, layout)


@pytest.mark.parametrize(
    ('dtype', 'table', 'terms', 'tolerance'),
    [(torch.float16, F32, 1, 3e-3), (torch.bfloat16, torch.bfloat16, 3, 4e-2)],
)
def test_half(dtype, table, terms, tolerance):
    *maps, relative = (x.detach() for x in local_arguments(terms, 1, 6, 6, 5, 3, 1, F32))
    maps = [x.to(dtype).requires_grad_() for x in maps]
    compare([*maps, relative.to(table).requires_grad_()], 'zero', tolerance)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_at_large_activations(dtype):
    """Logits in the tens of thousands and v at the end of fp16: finite, and the result is right."""
    q, k, v, relative = (x.detach() for x in local_arguments(1, 1, 8, 4, 4, 3, 1, F32))
    arguments = [(100 * q).to(dtype), (100 * k).to(dtype), (1.5e4 * v).to(dtype), (100 * relative).to(dtype)]
    arguments = [x.requires_grad_() for x in arguments]
    y = fused('mask')(*arguments)
    expected = reference('mask')(*(x.detach().double() for x in arguments))
    near(y.double() / 1.5e4, expected / 1.5e4, 2e-2)
    gradients = torch.autograd.grad(y, arguments, torch.full_like(y, 1e4))
    assert all(g.isfinite().all() for g in (y, *gradients))


def test_second_derivative():
    arguments = local_arguments(3, 1, 2, 3, 2, 3, 1, F32)
    wide = [x.detach().double().requires_grad_() for x in arguments]
    found = []
    for function, inputs in ((fused('zero'), arguments), (reference('zero'), wide)):
        first = torch.autograd.grad(function(*inputs).square().sum(), inputs, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), inputs))
    for a, b in zip(*found, strict=True):
        near(a.double() / b.abs().max(), b / b.abs().max(), 1e-5)


def test_what_is_kept_and_what_is_asked_for():
    q, k, v, relative = local_arguments(1, 1, 4, 3, 3, 3, 1, F32)
    numbers = 4 * q.numel() + relative.numel() + q.shape[3] * q.shape[4]  # y, too, and one number a query
    assert kept(fused('zero'), [q, k, v, relative]) == 4 * numbers
    fused('zero')(q, k.detach(), v, relative.detach()).sum().backward()  # a gradient with strides of 0
    expected = torch.autograd.grad(reference('zero')(q, k, v, relative).sum(), (q, v))
    assert (k.grad, relative.grad) == (None, None)
    near([q.grad, v.grad], list(expected), 1e-5)
    assert fused('zero')(q[:0], k[:0], v[:0], relative).shape == (0, 1, 4, 3, 3)


def test_layer_under_autocast():
    torch.manual_seed(0)
    layer, x = LocalSelfAttention(8, 2, 3, route='triton'), torch.randn(1, 8, 4, 5)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    near(y.float(), LocalSelfAttention.forward(layer, x), 3e-2)
    y.sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == F32 for p in layer.parameters())


def test_check_passes_and_leaves_the_random_state(monkeypatch):
    monkeypatch.setattr(local_triton, 'CHECKED', (1, 5, 2))
    q, k, v, relative = (x.detach() for x in local_arguments(1, 1, 4, 3, 3, 3, 1, F32))
    before = torch.get_rng_state()
    with torch.inference_mode():
        assert local_triton.trusted(q, k, v, relative, True)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize('wrong', ['the result', 'the gradient of k', 'the gradient of the tables', 'RuntimeError'])
def test_check_names_the_difference(wrong, monkeypatch):
    """The kernels replaced by another route with one fault."""

    def forward(*a):
        if wrong == 'RuntimeError':
            raise RuntimeError('no kernel image\nfor this device')
        return reference('zero')(*a[:4]) * (1.01 if wrong == 'the result' else 1), None

    def backward(q, k, v, relative, y, lse, dy, mask):
        inputs = [x.detach().requires_grad_() for x in (q, k, v, relative)]
        found = list(torch.autograd.grad(reference('zero')(*inputs), inputs, dy))
        if 'gradient' in wrong:
            found[1 if wrong.endswith('k') else 3].neg_()
        return found

    monkeypatch.setattr(forward_kernels, 'forward', forward)
    monkeypatch.setattr(backward_kernels, 'backward', backward)
    kind = (torch.device('cpu'), F32, F32, 4, 3, 3, False, True)
    with torch.enable_grad():
        fault = local_triton.difference(*kind)
    assert fault.splitlines() == [fault]
    assert fault.startswith(wrong)
    with monkeypatch.context() as patch:
        patch.setattr(local_triton, 'TOLERANCE', {F32: 3.0})
        assert (local_triton.difference(*kind) is None) == (wrong != 'RuntimeError')
