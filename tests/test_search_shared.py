"""The shared form of the mixed block: equal to the plain one, to the second order, in a part of its memory."""

import copy
from contextlib import suppress

import pytest
import torch
from torch import Tensor, nn

from sase_blocks.ops import ChannelPNorm, SpatialAvgStd, SpatialL2Norm
from sase_blocks.search.sase import excitations, mixed, second_order, squeezes, statistics
from sase_blocks.search.sase.mixed import MixedBlock
from sase_blocks.search.sase.network import SearchNetwork
from sase_blocks.search.sase.space import EDGES, SearchSpace

SUBSETS = {
    'paper': 'paper',
    'extended': 'extended',
    'one operation': 'channel_squeeze=avg; channel_excite=conv3; gate_excite=affine; gated_squeeze=l2_norm; '
    'spatial_squeeze=max; spatial_excite=conv1x3_3x1',
    'no moments': 'channel_squeeze=second_order,max; gated_squeeze=second_order,l2_norm; '
    'spatial_squeeze=avg,second_order',
    'options': 'channel_squeeze=avg,second_order,second_order(reduction=8); '
    'channel_excite=mlp,mlp(reduction=4),conv_eca(kernel_size=5); gated_squeeze=second_order(grid=4),second_order,avg; '
    'spatial_squeeze=dilated(dilation=2),second_order(grid=3),avg; spatial_excite=conv_norm(kernel_size=3),conv3x3',
    'turned round': 'channel_squeeze=second_order,p_norm,avg_max; channel_excite=affine,conv7,mlp,conv3_x2; '
    'gated_squeeze=avg_skew,second_order,p_norm,l2_norm; spatial_squeeze=l2_norm,max,avg_std,avg_max; '
    'spatial_excite=conv3x3_x2,affine,conv5x5,conv1x3_3x1',
}


def pair(space: str, channels: int, size: tuple[int, int], fair: bool, dtype: torch.dtype) -> list[MixedBlock]:
    """A plain and a shared block with the same parameters, none at its start."""
    torch.manual_seed(0)
    plain = MixedBlock(channels, SearchSpace.parse(space), size, fair=fair, form='plain', dtype=dtype)
    with torch.no_grad():
        for p in plain.parameters():
            p += 0.1 * torch.randn_like(p)
    twin = MixedBlock(channels, plain.space, size, fair=fair, form='shared', dtype=dtype)
    twin.load_state_dict(plain.state_dict())
    return [plain, twin]


def derivatives(block: MixedBlock, x: Tensor, second: bool = True) -> dict[str, Tensor]:
    """Output, gradients and gradients of their squared norm, for x, every parameter and every edge's weights."""
    generator = torch.Generator().manual_seed(1)
    weights = [torch.rand(n, generator=generator, dtype=torch.float64).to(x) for n in block.space.sizes]
    block.probabilities = tuple((w / w.sum()).requires_grad_() for w in weights)
    inputs = {'x': x.detach().requires_grad_(), **dict(block.named_parameters())}
    inputs |= {f'weights of {edge}': p for edge, p in zip(EDGES, block.probabilities, strict=True)}
    y = block(inputs['x'])
    direction = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y)
    tensors = list(inputs.values())
    grads = torch.autograd.grad((y * direction).sum() + y.square().mean(), tensors, create_graph=second)
    found = {'y': y} | {f'd {name}': g for name, g in zip(inputs, grads, strict=True)}
    if second:
        norm = sum(g.square().sum() / g.numel() for g in grads)
        assert isinstance(norm, Tensor)
        twice = torch.autograd.grad(norm, tensors, allow_unused=True)
        found |= {f'dd {name}': g for name, g in zip(inputs, twice, strict=True) if g is not None}
    return {name: value.detach() for name, value in found.items()}


def off(found: dict[str, Tensor], expected: dict[str, Tensor], least: float = 1.0) -> dict[str, float]:
    """The largest difference of each tensor over its largest value, or over ``least`` of the largest of its kind."""
    assert found.keys() == expected.keys()
    kinds = {name: name.split(' ')[0] for name in expected}
    largest = {k: max(float(v.abs().max()) for n, v in expected.items() if kinds[n] == k) for k in kinds.values()}
    return {
        name: float((found[name] - value).abs().max()) / max(float(value.abs().max()), least * largest[kinds[name]])
        for name, value in expected.items()
    }


def worst(errors: dict[str, float]) -> tuple[float, str]:
    return max((error, name) for name, error in errors.items())


@pytest.mark.parametrize('fair', [False, True], ids=['paper-mixing', 'fair'])
@pytest.mark.parametrize('space', SUBSETS.values(), ids=SUBSETS)
def test_equals_the_plain_form(space, fair):
    plain, twin = pair(space, 16, (8, 8), fair, torch.float64)
    x = torch.randn(3, 16, 8, 8, dtype=torch.float64)
    second = space != 'extended'  # torch has no second derivative of a hard sigmoid
    assert worst(off(derivatives(twin, x, second), derivatives(plain, x, second), least=1e-4)) < (1e-10, '')
    for (name, a), (_, b) in zip(plain.named_buffers(), twin.named_buffers(), strict=True):
        assert torch.allclose(a.double(), b.double(), rtol=1e-12, atol=1e-14), name


CASES = {  # channels, feature size built for, shape of x
    'fp32 as in the paper': (16, (16, 16), (8, 16, 16, 16)),
    'odd sizes': (6, (7, 5), (2, 6, 7, 5)),
    'another size than built for': (8, (8, 8), (2, 8, 12, 9)),
    'one image': (8, (8, 8), (1, 8, 8, 8)),
    'rows longer than a band': (4, (3, 70), (2, 4, 3, 70)),
    'more channels than a band': (72, (4, 4), (2, 72, 4, 4)),
    'one channel': (1, (4, 4), (3, 1, 4, 4)),
    'one position': (8, (1, 1), (3, 8, 1, 1)),
}


@pytest.mark.parametrize(
    ('channels', 'size', 'shape'),
    [
        pytest.param(*CASES[name], id=name, marks=pytest.mark.slow if name in ('one image', 'one channel') else ())
        for name in CASES
    ],
)
def test_shapes(channels, size, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    for memory_format in (torch.contiguous_format, torch.channels_last):
        plain, twin = pair('paper', channels, size, False, torch.float32)
        x = x.to(memory_format=memory_format)
        found = {name: value.double() for name, value in derivatives(twin, x, False).items()}
        assert worst(off(found, derivatives(plain.double(), x.double(), False))) < (1e-6, '')
    plain, twin = pair('paper', channels, size, False, torch.float64)
    x, second = x.double(), channels > 1 and size != (1, 1)  # a deviation of one value, 0, has an infinite curvature
    for training in (True, False):
        found, expected = (derivatives(block.train(training), x, second) for block in (twin, plain))
        assert worst(off(found, expected, least=1e-6)) < (1e-9, '')


@pytest.mark.parametrize('form', ['plain', 'shared'])
def test_the_format_of_the_input_comes_back(form):
    block = MixedBlock(8, SearchSpace.parse('paper'), (8, 8), form=form)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 8, 8, 8).to(memory_format=memory_format).requires_grad_()
        y = block(x)
        (grad,) = torch.autograd.grad(y, x, torch.randn(2, 8, 8, 8))
        assert y.is_contiguous(memory_format=memory_format)
        assert grad.is_contiguous(memory_format=memory_format)


def test_what_learns():
    network = SearchNetwork(
        nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)),
        SearchSpace.parse('paper'),
        where='1',
        input_size=(3, 8, 8),
    )
    x, weights = torch.randn(4, 3, 8, 8), list(network.weights().values())
    for learners, still, of_weights in (([network.logits], weights, False), (weights, [network.logits], True)):
        expected = torch.autograd.grad(network(x).square().sum(), learners)
        with suppress(RuntimeError), network.learning(weights=of_weights):
            found = torch.autograd.grad(network(x).square().sum(), learners)
            assert not any(parameter.requires_grad for parameter in still)
            assert all(gradient.is_contiguous() for gradient in found)  # fused optimisers read them as they lie
            raise RuntimeError
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(found, expected, strict=True))
        assert all(parameter.requires_grad for parameter in still)


def test_in_pieces_of_the_batch(monkeypatch):
    plain, twin = pair('paper', 8, (8, 8), False, torch.float64)
    x = torch.randn(5, 8, 8, 8, dtype=torch.float64)
    monkeypatch.setattr(statistics, 'PIECE', 2 * 8 * 8 * 8)  # 2 + 2 + 1 images
    assert worst(off(derivatives(twin, x, False), derivatives(plain, x, False), least=1e-6)) < (1e-10, '')


def test_equal_maxima_share_the_gradient():
    plain, twin = pair('paper', 8, (8, 8), False, torch.float64)
    x = torch.randint(-1, 2, (2, 8, 8, 8), generator=torch.Generator().manual_seed(3)).double()
    assert worst(off(derivatives(twin, x), derivatives(plain, x), least=1e-6)) < (1e-10, '')


def test_zero_input_has_finite_gradients():
    twin = pair('paper', 8, (8, 8), False, torch.float32)[1]
    assert all(value.isfinite().all() for value in derivatives(twin, torch.zeros(2, 8, 8, 8), False).values())


@pytest.mark.parametrize('where', ['everywhere', 'by channel', 'by position', 'by image'])
def test_a_mean_far_from_zero_costs_no_digits(where):
    generator = torch.Generator().manual_seed(4)
    noise = torch.randn(4, 16, 16, 16, generator=generator, dtype=torch.float64)
    shape = {'everywhere': (1, 1, 1, 1), 'by channel': (1, 16, 1, 1), 'by position': (1, 1, 16, 16)}
    shift = 100 + 20 * torch.randn(shape.get(where, (4, 1, 1, 1)), generator=generator, dtype=torch.float64)
    x = (noise + shift).float()
    for dims in ((2, 3), (1,)):
        for gate in (None, torch.full((4, 16, 1, 1), 0.7)):
            expected = statistics.moments(x.double(), dims, None if gate is None else gate.double())
            found = statistics.moments(x, dims, gate)
            for power, (a, b) in enumerate(zip(found[:4], expected[:4], strict=True), 1):
                assert (a - b).abs().max() < 2e-4 * b.abs().max(), power
            total, fourth = squeezes.fourth_power_sum(found, 16), squeezes.fourth_power_sum(expected, 16)
            assert (total / fourth - 1).abs().max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize('gated', [False, True])
def test_twice_differentiable(gated):
    generator = torch.Generator().manual_seed(5)

    def tensor(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64).requires_grad_()

    x, gate, norm = tensor(2, 4, 4, 2), tensor(2, 4, 1, 1), SpatialL2Norm(4, (4, 2)).double()
    gate_or_not = (gate,) if gated else ()

    def normed(x: Tensor, *gate: Tensor) -> tuple[Tensor, ...]:
        return squeezes.SharedSqueezes(x).normed_sums([(norm, gate[0] if gate else None)])[0]

    def rows(kernel: Tensor, values: Tensor, *gate: Tensor) -> tuple[Tensor, ...]:
        return second_order.row_sums(kernel, values, gate[0] if gate else None)

    for function, inputs in (
        (lambda x, *gate: statistics.moments(x, (2, 3), *gate), (x, *gate_or_not)),
        (lambda x, *gate: statistics.moments(x, (1,), *gate), (x, *gate_or_not)),
        (normed, (x, *gate_or_not)),
        (rows, (tensor(5, 5), tensor(2, 2, 5), *((tensor(2, 2, 1),) if gated else ()))),
        (rows, (tensor(3, 3), tensor(2, 4, 3), *((tensor(2, 4, 1),) if gated else ()))),
        (lambda kernel, x: rows(kernel, x.transpose(1, 2)), (tensor(3, 3), tensor(2, 3, 4))),
        (lambda x, c, a: statistics.recomputed(mixed._times_gate, x, c, a), (x, gate, tensor(2, 1, 4, 2))),
        (lambda a, b: statistics.recomputed(lambda a, b: ((a * b).sin(),), a, b * a), (x, gate)),
    ):
        outputs = function(*inputs)
        total = sum(o.square().sum() for o in (outputs if isinstance(outputs, tuple) else (outputs,)))
        once, recorded = (torch.autograd.grad(total, inputs, retain_graph=True, create_graph=c) for c in (False, True))
        assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(once, recorded, strict=True))
        for i, expected in enumerate(once):  # where no other gradient is needed
            outputs = function(*(t if i == j else t.detach() for j, t in enumerate(inputs)))
            total = sum(o.square().sum() for o in (outputs if isinstance(outputs, tuple) else (outputs,)))
            assert torch.allclose(torch.autograd.grad(total, inputs[i])[0], expected, rtol=1e-12)
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


def test_functional_call_reaches_every_parameter():
    plain, twin = pair('paper', 8, (8, 8), False, torch.float64)
    x = torch.randn(2, 8, 8, 8, dtype=torch.float64)
    found = []
    for block in (plain, twin):
        block.probabilities = tuple(torch.full((n,), 1 / n, dtype=torch.float64) for n in block.space.sizes)
        other = {name: (1.5 * p).detach().requires_grad_() for name, p in block.named_parameters()}
        y = torch.func.functional_call(block, other, (x,))
        block.probabilities = None  # as SearchNetwork does, before the backward pass
        grads = torch.autograd.grad(y.square().sum(), list(other.values()))
        found.append({'y': y.detach()} | {f'd {name}': g for name, g in zip(other, grads, strict=True)})
    assert worst(off(found[1], found[0], least=1e-6)) < (1e-10, '')


def test_a_subclass_is_called_by_itself():
    class Twice(ChannelPNorm):
        def squeeze(self, x: Tensor) -> Tensor:
            return 2 * super().squeeze(x)

    class Half(SpatialAvgStd):
        def squeeze(self, x: Tensor) -> Tensor:
            return super().squeeze(x) / 2

    plain, twin = pair('paper', 8, (8, 8), False, torch.float64)
    for block in (plain, twin):
        block.get_submodule('channel_squeeze')['p_norm'] = Twice(8).double()  # type: ignore[operator]
        block.get_submodule('gated_squeeze')['avg_std'] = Half(8).double()  # type: ignore[operator]
    x = torch.randn(2, 8, 8, 8, dtype=torch.float64)
    assert worst(off(derivatives(twin, x), derivatives(plain, x), least=1e-6)) < (1e-10, '')


@pytest.mark.parametrize('size', [(8, 8), (16, 16), (12, 12), (5, 6)], ids=str)
def test_half_precision(size):
    """At the size of the second order's grid, at a multiple, and where windows of its pooling overlap."""
    plain, twin = pair('paper', 16, size, False, torch.float32)
    x = torch.randn(4, 16, *size)
    expected = derivatives(plain, x, False)
    with torch.autocast('cpu', torch.bfloat16):
        found = derivatives(twin, x.bfloat16(), False)
        reference = derivatives(plain, x.bfloat16(), False)
    assert found['y'].dtype == reference['y'].dtype
    assert found['d x'].dtype == reference['d x'].dtype
    error, of_plain = off(found, expected), off(reference, expected)
    assert worst(error)[0] < max(0.05, 2 * worst(of_plain)[0])
    for form in pair('paper', 16, size, False, torch.bfloat16):
        assert all(value.isfinite().all() for value in derivatives(form, x.bfloat16(), False).values())


def test_observer_sees_the_same():
    plain, twin = pair('paper', 8, (8, 8), True, torch.float64)
    x = torch.randn(2, 8, 8, 8, dtype=torch.float64)
    seen: list[list[Tensor]] = [[], []]
    for block, stacks in zip((plain, twin), seen, strict=True):
        block.observer = lambda edge, stack, stacks=stacks: stacks.append(stack.detach())
        block(x)
    assert len(seen[0]) == len(EDGES)
    for a, b in zip(*seen, strict=True):
        assert a.shape == b.shape
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


def kept(block: nn.Module, x: Tensor) -> int:
    """Bytes that autograd keeps between forward and backward: distinct storages, parameters not."""
    parameters = {p.untyped_storage().data_ptr() for p in block.parameters()}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = block(x)  # alive until all is counted, or a freed storage's address could come again
    del y
    return sum(storages.values())


@pytest.mark.parametrize('fair', [False, True], ids=['paper-mixing', 'fair'])
def test_kept_memory(fair):
    of_shared = of_maps = 0
    for channels, size in ((16, 32), (32, 16), (64, 8)):
        x = torch.randn(32, channels, size, size, requires_grad=True)
        plain, twin = pair('paper', channels, (size, size), fair, torch.float32)
        for block in (plain, twin):
            block.probabilities = tuple(torch.full((7,), 1 / 7, requires_grad=True) for _ in EDGES)
        assert kept(twin, x) <= kept(plain, x) / 2
        of_shared, of_maps = of_shared + kept(twin, x), of_maps + x.numel() * x.element_size()
    if not fair:  # half of what the authors' own code keeps, 14 maps
        assert of_shared <= 7 * of_maps


def test_selections_are_made_once():
    like = torch.ones(1)
    with torch.inference_mode():
        first = excitations.selection(5, 11, like)
    assert excitations.selection(5, 11, like) is first
    assert not first.is_inference()


# Not the paper's space, which takes inductor a quarter of an hour on two slow cores.
TO_COMPILE = (
    'channel_squeeze=avg,p_norm,avg_std; channel_excite=conv3,conv7; gate_excite=conv3_x2,affine; '
    'gated_squeeze=p_norm,l2_norm; spatial_squeeze=avg,avg_max; spatial_excite=conv3x3,conv1x3_3x1'
)


def to_compile(fair):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8))
    return SearchNetwork(model, SearchSpace.parse(TO_COMPILE), fair=fair, where='1', input_size=(3, 8, 8))


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore::UserWarning', 'ignore::DeprecationWarning')  # of dynamo's own
@pytest.mark.parametrize(
    'fair', [pytest.param(False, id='paper-mixing', marks=pytest.mark.slow), pytest.param(True, id='fair')]
)
def test_a_block_is_one_graph(fair):
    from sase_blocks.search.sase.compiling import compile_mixed_blocks

    network = to_compile(fair)
    compile_mixed_blocks(network, backend='eager', fullgraph=True)  # raises at whatever breaks the graph
    x = torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(network(x), to_compile(fair)(x))


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore::UserWarning', 'ignore::DeprecationWarning')  # of dynamo's own
@pytest.mark.parametrize('fair', [False, True], ids=['paper-mixing', 'fair and channels_last'])
def test_compiled(fair):
    from sase_blocks.search.sase.compiling import compile_mixed_blocks

    network = to_compile(fair)
    memory_format = torch.channels_last if fair else torch.contiguous_format
    network.to(memory_format=memory_format)
    reference = copy.deepcopy(network)
    assert compile_mixed_blocks(network) == list(network.blocks)
    x = torch.randn(4, 3, 8, 8).to(memory_format=memory_format)
    found = []
    for net in (network, reference):
        y = net(x)
        named = {'logits': net.logits, **net.weights()}
        grads = torch.autograd.grad(y.square().sum(), list(named.values()))
        found.append({'y': y.detach()} | {f'd {name}': g for name, g in zip(named, grads, strict=True)})
    assert worst(off(*found)) < (1e-5, '')
    for (name, a), (_, b) in zip(network.named_buffers(), reference.named_buffers(), strict=True):
        assert torch.allclose(a.float(), b.float(), rtol=1e-4, atol=1e-6), name
    # Which of torch's refusals comes first depends on what inductor could reuse.
    with pytest.raises(RuntimeError, match=r'double backward|donated'):  # noqa: PT012
        (grad,) = torch.autograd.grad(network(x).square().sum(), network.logits, create_graph=True)
        torch.autograd.grad(grad.sum(), network.logits)
