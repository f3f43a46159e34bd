"""The operations with gradients of their own: equal to autograd's on the plain formula, in every mode of autograd."""

import itertools

import pytest
import torch
from conftest import mostly_slow

from sase_blocks import create_block
from sase_blocks.ops import eager
from sase_blocks.ops.statistics import channel_mean

pytestmark = [
    pytest.mark.filterwarnings('ignore:.torch.jit.*is deprecated'),
    pytest.mark.filterwarnings('ignore:There is a performance drop'),  # of vmap, about torch's own operators
]


def plain_mean_max(x, dims):
    return x.mean(dims, True), x.amax(dims, True)


def plain_fourth_powers(x, gate):
    y = x if gate is None else gate * x
    return (y**4).sum(1, keepdim=True)


X, CHANNEL, MAP = (2, 3, 4, 5), (2, 3, 1, 1), (2, 1, 4, 5)
# Name -> the operation, the shapes of its tensors, and the formula.
CASES = {
    'mean_max over H and W': (lambda x: eager.mean_max(x, [2, 3]), (X,), lambda x: plain_mean_max(x, (2, 3))),
    'mean_max over C': (lambda x: eager.mean_max(x, [1]), (X,), lambda x: plain_mean_max(x, 1)),
    'channel_mean': (channel_mean, (X,), lambda x: x.mean(1, True)),
    'fourth_powers': (eager.fourth_powers, (X, CHANNEL), plain_fourth_powers),
    'fourth_powers, no gate': (lambda x: eager.fourth_powers(x, None), (X,), lambda x: plain_fourth_powers(x, None)),
    'times_sum': (eager.times_sum, (X, CHANNEL, MAP), lambda x, a, b: x * (a + b)),
}  # fmt: skip
FORMATS = (torch.contiguous_format, torch.channels_last)


@pytest.fixture(params=mostly_slow(list(CASES), *list(CASES)[:1], *list(CASES)[3:4], *list(CASES)[5:]))
def case(request, one_thread):
    function, shapes, plain = CASES[request.param]
    return function, [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes], plain


def as_tuple(y):
    return y if isinstance(y, tuple) else (y,)


def gradients(function, tensors, create_graph=False):
    """Of a sum that no result enters alone or linearly."""
    total = sum((y * (i + 1)).sin().sum() for i, y in enumerate(as_tuple(function(*tensors))))
    return torch.autograd.grad(total, tensors, create_graph=create_graph)


def test_values_and_gradients(case):
    function, tensors, plain = case
    for memory_format in FORMATS:
        laid_out = [t.detach().contiguous(memory_format=memory_format).requires_grad_() for t in tensors]
        torch.testing.assert_close(function(*laid_out), plain(*laid_out), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradients(function, laid_out), gradients(plain, laid_out), rtol=1e-12, atol=1e-12)


def test_second_order_batched_and_forward_mode(case):
    function, tensors, _ = case
    assert torch.autograd.gradcheck(function, tensors, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, tensors, check_batched_grad=True)


def test_functorch(case):
    function, tensors, plain = case
    tensors = [t.detach() for t in tensors]

    def grad(f):
        def total(*args):
            return sum((y * (i + 1)).sin().sum() for i, y in enumerate(as_tuple(f(*args))))

        return torch.func.grad(total, argnums=tuple(range(len(tensors))))

    for dims in itertools.product((0, None), repeat=len(tensors)):
        if any(dim == 0 for dim in dims):
            batched = [t if dim is None else torch.stack([t, 2 * t]) for t, dim in zip(tensors, dims, strict=True)]
            for wrap in (lambda f: f, grad):
                torch.testing.assert_close(
                    torch.vmap(wrap(function), dims)(*batched), torch.vmap(wrap(plain), dims)(*batched)
                )
    hessians = [torch.func.hessian(lambda *args, f=f: grad(f)(*args)[0].sum())(*tensors) for f in (function, plain)]
    torch.testing.assert_close(*hessians)


def test_equal_maxima_share_the_gradient():
    x = torch.tensor([1.0, 3.0, 3.0, 2.0]).reshape(1, 1, 2, 2).requires_grad_()
    for dims, expected in (([2, 3], [0, 0.5, 0.5, 0]), ([1], [1, 1, 1, 1])):
        (grad,) = torch.autograd.grad(eager.mean_max(x, dims)[1].sum(), x)
        assert grad.flatten().tolist() == expected


def test_a_mean_whose_sum_does_not_fit():
    assert channel_mean(torch.full((1, 512, 1, 1), 300.0, dtype=torch.float16)).item() == 300


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype, one_thread):
    """Values and gradients near those of float64 at activations of standard deviation 300 and of 1e-3."""
    for function, shapes, plain in CASES.values():
        for scale in (300, 1e-3):
            half = [
                torch.randn(shape).mul(scale if i == 0 else 1).to(dtype).requires_grad_()
                for i, shape in enumerate(shapes)
            ]
            wide = [t.detach().double().requires_grad_() for t in half]
            results, expected = as_tuple(function(*half)), as_tuple(plain(*wide))
            for y, reference in zip(results, expected, strict=True):
                torch.testing.assert_close(y.double(), reference, rtol=0.02, atol=0.01 * reference.abs().max().item())
            small = 1 / max(y.abs().max().item() for y in expected)
            found = torch.autograd.grad(
                [y.float() * small for y in results], half, [torch.ones_like(y, dtype=torch.float32) for y in results]
            )
            references = torch.autograd.grad(
                [y * small for y in expected], wide, [torch.ones_like(y) for y in expected]
            )
            for g, reference in zip(found, references, strict=True):
                torch.testing.assert_close(g.double(), reference, rtol=0.02, atol=0.02 * reference.abs().max().item())


def test_no_function_where_the_formula_belongs():
    """TorchScript, a compiler, a trace and dual numbers get the plain formula."""
    a, b, x = (torch.randn(shape) for shape in (CHANNEL, MAP, X))
    script = torch.jit.script(eager.times_sum)
    assert '^' not in str(script.inlined_graph)  # the mark of a Python function
    traced = torch.jit.trace(lambda x, a, b: eager.times_sum(x, a, b), (x, a, b))
    assert '^' not in str(traced.graph)
    exported = torch.export.export(create_block('sase', 3).eval(), (x,))
    assert not [n for n in exported.graph.nodes if 'autograd' in str(n.target)]
    torch.testing.assert_close(script(x, a, b), eager.times_sum(x, a, b))
