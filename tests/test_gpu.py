"""Everything that a GPU must show, on one: `make gpu` runs it, the other targets leave it out.

The device comes from one place. Developers without a GPU run the file on the CPU, where what is CUDA's alone (events,
graphs, the sync debug mode, the Triton route) is left out of each test:

    SASE_BLOCKS_TEST_DEVICE=cpu python -m pytest -m gpu tests/test_gpu.py
"""

import copy
import json
import math
import os
import warnings
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import test_contract as contract
import test_search_run
import test_search_shared as shared
import test_selfattention_contract
import test_trionet_search
import timm
import torch
from test_data import make_images
from torch import Tensor, nn

from sase_blocks import compile_blocks, runs
from sase_blocks.search.sase import searching as sase_search
from sase_blocks.search.sase.config import SearchConfig
from sase_blocks.search.trionet import SuperNet, TrioConfig, TrioSpace, hierarchical
from sase_blocks.search.trionet import search as search_trionet
from sase_blocks.search.trionet.cost import Latency
from sase_blocks.search.trionet.training import SupernetTraining, networks_of, sandwich_step
from sase_blocks.selfattention import (
    AXIAL_ROUTES,
    BORDERS,
    LOCAL_ROUTES,
    POSITIONS,
    AxialSelfAttention,
    LocalSelfAttention,
    axial_attention,
    local_attention,
)
from sase_blocks.selfattention.local_routes import eager_route
from sase_blocks.selfattention.local_triton import trusted
from sase_blocks.train import TrainConfig, train

DEVICE = os.environ.get('SASE_BLOCKS_TEST_DEVICE', 'cuda')
CUDA = DEVICE == 'cuda'

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(CUDA and not torch.cuda.is_available(), reason='torch finds no CUDA device here'),
    pytest.mark.filterwarnings('ignore:Synchronization debug mode is a prototype'),
]

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
HALVES = pytest.mark.parametrize('dtype', [F16, BF16], ids=str)
ROUTES = [route for route in LOCAL_ROUTES if CUDA or route != 'triton']
FASTEST = 'triton' if CUDA else 'recompute'


@pytest.fixture(autouse=True)
def full_fp32():
    """fp32 is fp32: by default a GPU rounds what convolutions multiply to tf32, which has the digits of fp16."""
    switches = (torch.backends.cudnn, torch.backends.cuda.matmul)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # new versions of torch have another name for them, old ones have not
        before = [switch.allow_tf32 for switch in switches]
        for switch in switches:
            switch.allow_tf32 = False
        yield
        for switch, value in zip(switches, before, strict=True):
            switch.allow_tf32 = value


@contextmanager
def no_waiting():
    """Within this context whatever makes the CPU wait for the GPU is an error."""
    if CUDA:
        torch.cuda.set_sync_debug_mode('error')
    try:
        yield
    finally:
        if CUDA:
            torch.cuda.set_sync_debug_mode('default')


def near(found, expected, tolerance: float, least: float = 0.0) -> None:
    """Tensors, or dicts of them by name: ||a - b|| / ||b|| is at most ``tolerance``.

    Of a tensor of nearly nothing, by itself or beside the others (with ``least``, a part of the largest: the gradient
    of a bias in front of a batch norm is what rounding leaves of 0), that much stands for its numbers.
    """
    if isinstance(found, Tensor):
        found, expected = {'': found}, {'': expected}
    assert found.keys() == expected.keys()
    assert {name: x.shape for name, x in found.items()} == {name: x.shape for name, x in expected.items()}
    found, expected = ({n: x.detach().cpu().double() for n, x in xs.items()} for xs in (found, expected))
    size = {name: float(x.norm()) / math.sqrt(max(1, x.numel())) for name, x in expected.items()}
    far = {}
    for name, b in expected.items():
        floor = max(0.01, least * max(size.values()))
        distance = float((found[name] - b).norm()) / math.sqrt(max(1, b.numel())) / max(size[name], floor)
        if not distance <= tolerance:  # NaN is far
            far[name] = distance
    assert far == {}


def gradients(function, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The result of ``function()`` and its gradients for the inputs, for one random direction."""
    y = function()
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=F64).to(y)
    found = torch.autograd.grad(y, list(inputs.values()), direction, allow_unused=True)
    return {'y': y.detach()} | {f'd {n}': g for n, g in zip(inputs, found, strict=True) if g is not None}


def of_module(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    return gradients(lambda: module(x), {'x': x, **dict(module.named_parameters())})


def wide(module: nn.Module) -> nn.Module:
    """A copy of it on the CPU in float64."""
    return copy.deepcopy(module).to('cpu', F64)


# ---------------------------------------------------------------------------------- every primitive, block and layer

every_row = pytest.mark.parametrize(
    'row', [*contract.ROWS, *test_selfattention_contract.ROWS], ids=lambda row: f'{row.kind}-{row.name}'
)


@every_row
@pytest.mark.parametrize('mode', ['train', 'eval'])
def test_fp32_is_near_float64(row, mode):
    """A batch norm over a covariance, and the skewness, leave fewer digits than products do."""
    module = row.make().train(mode == 'train')
    reference, module = wide(module), module.to(DEVICE)
    x = row.input(8)
    near(of_module(module, x.to(DEVICE)), of_module(reference, x.double()), 1e-3, least=0.01)
    buffers = {n: b for n, b in module.named_buffers() if b.is_floating_point()}
    near(buffers, {n: b for n, b in reference.named_buffers() if n in buffers}, 1e-3)


@every_row
@HALVES
def test_half_is_finite_at_large_activations(row, dtype):
    """Wherever the result in float64 can be written in that type."""
    module = row.make().to(dtype).train()
    reference, module = wide(module), module.to(DEVICE)
    x = row.input(8, scale=300.0, dtype=dtype)
    results = []
    for m, inputs in ((module, x.to(DEVICE)), (reference, x.double())):
        inputs = inputs.requires_grad_()
        y = m(inputs)
        direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=F64)
        tensors = {'x': inputs, **dict(m.named_parameters())}
        # A sum over all positions of gradient * activation must fit, too: hence the small gradient.
        found = torch.autograd.grad(y, list(tensors.values()), (0.01 * direction).to(y))
        results.append({'y': y, **dict(zip(tensors, found, strict=True))})
    assert results[0]['y'].dtype == dtype
    for name, expected in results[1].items():
        found = results[0][name].cpu()
        assert not found.isnan().any(), name
        assert found[expected.abs() < torch.finfo(dtype).max / 2].isfinite().all(), name


@every_row
def test_channels_last(row):
    module = row.make().eval().to(DEVICE)
    x = row.input().to(DEVICE)
    y = module(x.contiguous(memory_format=torch.channels_last))
    near(y, module(x), 1e-5)
    if row.kind == 'block':
        assert y.is_contiguous(memory_format=torch.channels_last)


# ------------------------------------------------------------------------------------------------------ local attention


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def local_inputs(
    size: int, terms: int, height: int, width: int, dtype=F32, table=None, layout='nchw', d=16
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """q, k, v and the tables on the device, and the same numbers in float64 on the CPU."""
    maps = {}
    for seed, name in enumerate('qkv'):
        x = draw(seed, 2, d * 2, height, width).div(d**0.25).to(DEVICE, dtype)
        x = x.contiguous(memory_format=torch.channels_last) if layout == 'channels_last' else x
        maps[name] = x.unflatten(1, (d, 2)).transpose(1, 2)  # as LocalSelfAttention hands them on
    maps['tables'] = draw(3, terms, 2, d // 2, size).div(d**0.25).to(DEVICE, dtype if table is None else table)
    maps = {name: x.requires_grad_() for name, x in maps.items()}
    return maps, {name: x.detach().cpu().double().requires_grad_() for name, x in maps.items()}


def of_local(inputs: dict[str, Tensor], border: str, route: str | None) -> dict[str, Tensor]:
    return gradients(lambda: local_attention(*inputs.values(), border, route), inputs)


@pytest.mark.parametrize('border', BORDERS)
@pytest.mark.parametrize('terms', [1, 3])
@pytest.mark.parametrize(('size', 'height', 'width'), [(3, 13, 9), (5, 7, 18), (7, 15, 13)])
def test_local_routes_in_fp32(size, height, width, terms, border):
    inputs, exact = local_inputs(size, terms, height, width)
    expected = of_local(exact, border, 'blocks')
    for route in (*ROUTES, None):
        near(of_local(inputs, border, route), expected, 1e-5)


LOCAL_HALF = [  # k, terms, border, layout, dtype of the tables where it is not that of the maps
    (7, 1, 'zero', 'nchw', F32),
    (7, 1, 'zero', 'channels_last', None),
    (5, 3, 'mask', 'channels_last', F32),
    (3, 3, 'zero', 'nchw', None),
]


@HALVES
@pytest.mark.parametrize(('size', 'terms', 'border', 'layout', 'table'), LOCAL_HALF)
def test_local_routes_in_half(dtype, size, terms, border, layout, table):
    """The portable routes compute in fp32 and round the result once; triton rounds weights and logits' gradients."""
    inputs, exact = local_inputs(size, terms, 11, 15, dtype, table, layout)
    expected = of_local(exact, border, 'blocks')
    once = {F16: 1e-3, BF16: 8e-3}[dtype]
    for route in (*ROUTES, None):
        fused = CUDA and route in ('triton', None)
        near(of_local(inputs, border, route), expected, 5 * once if fused else once)


@pytest.mark.parametrize(('height', 'width'), [(1, 1), (1, 40), (56, 56), (3, 2)])
def test_local_at_other_sizes(height, width):
    inputs, exact = local_inputs(7, 1, height, width, d=8)
    expected = of_local(exact, 'zero', 'blocks')
    for route in ROUTES:
        near(of_local(inputs, 'zero', route), expected, 1e-5)


@pytest.mark.parametrize('dtype', [F32, BF16], ids=str)
def test_local_gives_the_same_bits_again(dtype):
    inputs, _ = local_inputs(7, 3, 29, 27, dtype)
    first = of_local(inputs, 'zero', FASTEST)
    for _ in range(3):
        again = of_local(inputs, 'zero', FASTEST)
        assert [name for name in first if not torch.equal(again[name], first[name])] == []


@pytest.mark.parametrize('dtype', [F32, F16, BF16], ids=str)
@pytest.mark.parametrize(('size', 'terms', 'd', 'layout'), [(7, 1, 16, 'nchw'), (3, 3, 8, 'channels_last')])
def test_triton_passes_its_check_and_is_chosen(dtype, size, terms, d, layout):
    inputs, _ = local_inputs(size, terms, 14, 14, dtype, layout=layout, d=d)
    with warnings.catch_warnings():
        warnings.simplefilter('error', RuntimeWarning)  # which a failed check is
        assert trusted(*inputs.values(), False) is CUDA
        assert (eager_route(*inputs.values(), False) == 'triton') is CUDA


@pytest.mark.parametrize('position', POSITIONS)
@pytest.mark.parametrize('dtype', [F32, BF16], ids=str)
def test_a_cuda_graph_captures_it(position, dtype):
    torch.manual_seed(0)
    layer = LocalSelfAttention(32, 2, 5, position).to(DEVICE, dtype)
    x = torch.randn(2, 32, 14, 14, device=DEVICE, dtype=dtype, requires_grad=True)
    other = torch.randn_like(x)
    tensors = {'x': x, **dict(layer.named_parameters())}
    direction = torch.randn_like(x)

    def step():
        y = layer(x)
        return [y, *torch.autograd.grad(y, list(tensors.values()), direction)]

    if CUDA:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # the check, and what libraries set up at their first use
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = step()
    with torch.no_grad():
        x.copy_(other)
    if CUDA:
        graph.replay()
        torch.cuda.synchronize()
    else:
        found = step()
    names = ['y', *tensors]
    found = {name: value.clone() for name, value in zip(names, found, strict=True)}
    # In a graph a library may take another kernel for a convolution.
    near(found, dict(zip(names, step(), strict=True)), {F32: 1e-5, BF16: 1e-2}[dtype])


@HALVES
@pytest.mark.parametrize(
    'make',
    [
        lambda: LocalSelfAttention(32, 2, 7),
        lambda: LocalSelfAttention(32, 2, 5, 'position_sensitive', 'mask', stride=2),
        lambda: AxialSelfAttention(32, 2, (11, 14)),
    ],
    ids=['local', 'position-sensitive', 'axial'],
)
def test_layers_under_autocast(make, dtype):
    torch.manual_seed(0)
    layer = make().train()
    reference, layer = wide(layer), layer.to(DEVICE)
    x = torch.randn(8, 32, 11, 14)
    with torch.autocast(DEVICE, dtype=dtype):
        found = of_module(layer, x.to(DEVICE))
    assert found['y'].dtype == dtype
    expected = of_module(reference, x.double())
    near(found['y'], expected['y'], {F16: 0.02, BF16: 0.1}[dtype])
    assert all(g.isfinite().all() for g in found.values())
    near(found['d x'], expected['d x'], {F16: 0.03, BF16: 0.2}[dtype])


def second(function, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of the squared norm of the gradients."""
    y = function()
    direction = draw(9, *y.shape).to(y)
    once = torch.autograd.grad(y, list(inputs.values()), direction, create_graph=True)
    norm = sum(g.square().mean() for g in once)
    twice = torch.autograd.grad(norm, list(inputs.values()))
    return {f'dd {name}': g for name, g in zip(inputs, twice, strict=True)}


@pytest.mark.parametrize('route', [*ROUTES, None])
@pytest.mark.parametrize(('size', 'terms', 'border'), [(3, 1, 'zero'), (5, 3, 'mask')])
def test_local_second_derivative(route, size, terms, border):
    inputs, exact = local_inputs(size, terms, 7, 9)
    expected = second(lambda: local_attention(*exact.values(), border, 'blocks'), exact)
    near(second(lambda: local_attention(*inputs.values(), border, route), inputs), expected, 1e-4)


# ------------------------------------------------------------------------------------------------------ axial attention


def axial_inputs(length: int, g: int, dtype=F32, built=None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    shapes = {name: (2, 5, 4, length, n) for name, n in (('q', g // 2), ('k', g // 2), ('v', g))}
    shapes |= {'tables': (2 * g, 2 * (built or length) - 1), 'scale': (3, 4)}
    inputs = {
        name: draw(seed, *shape).div(g**0.25).to(DEVICE, dtype).requires_grad_()
        for seed, (name, shape) in enumerate(shapes.items())
    }
    return inputs, {name: x.detach().cpu().double().requires_grad_() for name, x in inputs.items()}


def of_axial(inputs: dict[str, Tensor], route: str | None) -> dict[str, Tensor]:
    return gradients(lambda: torch.cat(axial_attention(*inputs.values(), route)), inputs)


AXIAL = pytest.mark.parametrize(('length', 'g', 'built'), [(14, 8, None), (7, 32, None), (33, 8, 20), (9, 8, 20)])


@AXIAL
def test_axial_routes_in_fp32(length, g, built):
    inputs, exact = axial_inputs(length, g, built=built)
    expected = of_axial(exact, 'einsum')
    for route in (*AXIAL_ROUTES, None):
        near(of_axial(inputs, route), expected, 1e-5)


@HALVES
@AXIAL
def test_axial_routes_in_half(dtype, length, g, built):
    inputs, exact = axial_inputs(length, g, dtype, built)
    expected = of_axial(exact, 'einsum')
    for route in (*AXIAL_ROUTES, None):
        near(of_axial(inputs, route), expected, {F16: 1e-3, BF16: 8e-3}[dtype])


@pytest.mark.parametrize('route', [*AXIAL_ROUTES, None])
def test_axial_second_derivative(route):
    inputs, exact = axial_inputs(9, 8)
    expected = second(lambda: torch.cat(axial_attention(*exact.values(), 'einsum')), exact)
    near(second(lambda: torch.cat(axial_attention(*inputs.values(), route)), inputs), expected, 1e-4)


# ---------------------------------------------------------------------------------------------------------- compilation


@pytest.mark.filterwarnings('ignore::UserWarning', 'ignore::DeprecationWarning')  # of dynamo's own
@pytest.mark.parametrize('how', ['compile_blocks', 'torch.compile'])
def test_a_compiled_stage_equals_eager(how):
    """The blocks alone, or all of it; then the last batch of an epoch, which is smaller."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    eager = timm.create_model('resnet50_sase', img_size=64).layer1.to(DEVICE).train()
    compiled = copy.deepcopy(eager)
    if how == 'compile_blocks':
        assert len(compile_blocks(compiled)) == 3
        function = compiled
    else:
        function = torch.compile(compiled, fullgraph=True)
    for batch in (4, 3):
        x = torch.randn(batch, 64, 16, 16, device=DEVICE)
        found = [of_module(eager, x)]
        x = x.clone().requires_grad_()
        found += [gradients(lambda x=x: function(x), {'x': x, **dict(compiled.named_parameters())})]
        near(found[1], found[0], 1e-3, least=0.01)
    floats = [{n: b for n, b in m.named_buffers() if b.is_floating_point()} for m in (compiled, eager)]
    near(*floats, 1e-4)
    torch._dynamo.reset()


# ------------------------------------------------------------------------------------------------------ the SASE search


@pytest.mark.parametrize('fair', [False, True], ids=['paper-mixing', 'fair'])
@pytest.mark.parametrize('space', ['paper', 'turned round'])
def test_both_forms_of_the_mixture(space, fair):
    """Plain and shared on the device, twice differentiated in float64, once in fp32 against float64 on the CPU."""
    forms = shared.pair(shared.SUBSETS[space], 16, (8, 8), fair, F64)
    x = draw(0, 3, 16, 8, 8)
    exact = shared.derivatives(forms[0], x, False)
    plain, twin = (shared.derivatives(copy.deepcopy(form).to(DEVICE), x.to(DEVICE)) for form in forms)
    assert shared.worst(shared.off(twin, plain, least=1e-4)) < (1e-9, '')
    for form in forms:
        form.probabilities = None
        found = shared.derivatives(form.float().to(DEVICE), x.float().to(DEVICE), False)
        found = {name: value.cpu().double() for name, value in found.items()}
        assert shared.worst(shared.off(found, exact)) < (1e-5, '')


def search_config(out: Path, **settings) -> SearchConfig:
    return SearchConfig(out=str(out), **{**test_search_run.SMALL, 'cpu': not CUDA, **settings})


STEPS = test_search_run.STEPS


@pytest.mark.parametrize('settings', [{}, {'mixed_precision': 'bf16', 'channels_last': True}], ids=['fp32', 'bf16'])
@pytest.mark.parametrize('space', [test_search_run.SPACE, 'paper'], ids=['small', 'paper'])
@pytest.mark.parametrize('order', ['1', '2'])
def test_no_step_of_a_search_waits(order, space, settings, tmp_path, monkeypatch):
    """From the end of the first step to that of the last: steps, the next batches, and what is noted of each."""
    step, seen = sase_search._Search.train_step, []

    def watched(self, *arguments):
        if CUDA and self.step == STEPS - 1:
            seen.append(torch.cuda.get_sync_debug_mode())
        found = step(self, *arguments)
        seen.append(self.step)
        if CUDA:
            torch.cuda.set_sync_debug_mode('error' if self.step < STEPS - 1 else 'default')
        return found

    monkeypatch.setattr(sase_search._Search, 'train_step', watched)
    assert runs.LOSS_CHECK_STEPS > STEPS  # a look at the losses waits, and is one in twenty steps
    try:
        config = search_config(tmp_path, order=order, space=space, epochs=1, save_minutes=60.0, **settings)
        result = sase_search.search(config, test_search_run.pictures())
    finally:
        if CUDA:
            torch.cuda.set_sync_debug_mode('default')
    assert result['genotype']
    assert seen == [*range(STEPS - 1), *([2] if CUDA else []), STEPS - 1]  # 2 stands for 'error'


@pytest.mark.parametrize('deterministic', [False, True], ids=['fast', 'deterministic'])
@pytest.mark.parametrize('order', ['1', '2'])
def test_a_search_resumes(order, deterministic, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runs, 'LOSS_CHECK_STEPS', 2)
    step = sase_search._Search.train_step

    def interrupted(self, *arguments):
        if self.step == STEPS + 3:
            raise KeyboardInterrupt
        return step(self, *arguments)

    options = {'order': order, 'deterministic': deterministic}
    try:
        whole = sase_search.search(search_config(tmp_path / 'whole', **options), test_search_run.pictures())
        config = search_config(tmp_path / 'cut', **options)
        with monkeypatch.context() as patch:
            patch.setattr(sase_search._Search, 'train_step', interrupted)
            with pytest.raises(KeyboardInterrupt):
                sase_search.search(config, test_search_run.pictures())
        result = sase_search.search(replace(config, resume=True), test_search_run.pictures())
    finally:
        torch.use_deterministic_algorithms(False)
    said = capsys.readouterr().out
    assert f'on {DEVICE}' in said
    assert f'resuming at step {STEPS + 2} of {2 * STEPS}' in said
    logits = [np.load(tmp_path / name / 'alphas.npz')['logits'] for name in ('cut', 'whole')]
    assert logits[0].shape == logits[1].shape
    assert np.abs(logits[1][-1] - logits[1][0]).max() > 0.01
    if deterministic:
        assert np.array_equal(*logits)
        assert result['genotype'] == whole['genotype']
    else:
        np.testing.assert_allclose(*logits, atol=1e-3)


# ------------------------------------------------------------------------------------------------ the TrioNet supernet


def batch(dtype, count=6) -> tuple[Tensor, Tensor]:
    return draw(0, count, 1, 12, 12).to(dtype), torch.arange(count) % 3


@pytest.mark.parametrize('sharing', ['heads', 'plain'])
def test_a_sandwich_step(sharing):
    """The gradients of all networks of a step, against float64 on the CPU; the same step again waits for nothing."""
    torch.manual_seed(0)
    supernet = SuperNet(TrioSpace.from_dict(test_trionet_search.SPACE), 3, 1, sharing)
    reference, supernet = wide(supernet), supernet.to(DEVICE)
    networks = networks_of(supernet.space, hierarchical, 0, 0, 6)
    assert {block.operator for n in networks for block in n.stages[1].blocks} == {'conv', 'local', 'axial'}
    found = []
    for net, dtype, device in ((supernet, F32, DEVICE), (reference, F64, 'cpu')):
        images, labels = (x.to(device) for x in batch(dtype))
        losses = sandwich_step(net, networks, images, labels, label_smoothing=0.1, autocast=nullcontext)
        grads = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
        found.append({'losses': losses, **{name: g.clone() for name, g in grads.items()}})
    assert all(x.isfinite().all() for x in found[0].values())
    near(*found, 1e-3, least=0.01)
    images, labels = (x.to(DEVICE) for x in batch(F32))
    with no_waiting():
        sandwich_step(supernet, networks, images, labels, label_smoothing=0.1, autocast=nullcontext)


def trionet_config(folder: Path, **settings) -> TrioConfig:
    (folder / 'space.json').write_text(json.dumps(test_trionet_search.SPACE))
    return TrioConfig(
        data='', out=str(folder / 'run'), space=str(folder / 'space.json'), epochs=2, batch_size=12, fraction=0.75,
        lr=0.05, evaluations=8, population=4, calibration=24, workers=0, cpu=not CUDA, tensorboard=False, **settings,
    )  # fmt: skip


@pytest.mark.parametrize('precision', ['no', 'bf16'])
def test_a_trionet_search_ends(precision, tmp_path, monkeypatch, capsys):
    pytest.importorskip('optuna', reason='the evolution needs Optuna')
    devices = set()
    step = SupernetTraining.train_step

    def watched(self, images, labels):
        devices.add(images.device.type)
        return step(self, images, labels)

    monkeypatch.setattr(SupernetTraining, 'train_step', watched)
    config = trionet_config(tmp_path, max_macs='40k', mixed_precision=precision)
    images, test = test_trionet_search.pictures(), test_trionet_search.pictures(30, seed=1)[:2]
    result = search_trionet(config, images, test)
    assert devices == {DEVICE}
    assert result['cost']['macs'] <= 40_000
    assert 0 <= result['test_accuracy'] <= 100
    again = search_trionet(replace(config, resume=True), images, test)
    assert again['architecture'] == result['architecture']


def test_milliseconds_of_a_network():
    space = TrioSpace.from_dict(test_trionet_search.SPACE)
    latency = Latency(torch.device(DEVICE))
    for network in networks_of(space, hierarchical, 0, 0, 0):
        assert 0 < latency(network) < 1e4


# ------------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize('compiled', [False, True], ids=['eager', 'compiled'])
@pytest.mark.filterwarnings('ignore::UserWarning', 'ignore::DeprecationWarning')  # of dynamo's own
def test_an_epoch_in_bf16(compiled, tmp_path, capsys):
    data = make_images(tmp_path / 'images', train=10, val=5)
    config = TrainConfig(
        data=str(data), out=str(tmp_path / 'run'), model='resnet20_cifar', img_size=12, epochs=1, batch_size=8,
        model_args={'genotype': 'sase', 'attn_stages': [3]}, mixed_precision='bf16', channels_last=True,
        compile=compiled, workers=0, cpu=not CUDA, tensorboard=False,
    )  # fmt: skip
    result = train(config)
    assert f'on {DEVICE}, mixed precision bf16' in capsys.readouterr().out
    assert math.isfinite(result['loss'])
    assert math.isfinite(result['history'][0]['train_loss'])
    torch._dynamo.reset()
