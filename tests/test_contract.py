"""What every attention module is asked, one row a module.

The rows are made from the tables of the library, so that a new primitive or block is asked by itself; the test at the
end makes sure that no module escapes. Capturing (TorchScript, FX, compile, export) takes most of the time: `make test`
captures the blocks, `make test-slow` every primitive by itself.
"""

import contextlib
import copy
import inspect
import itertools
import pickle
from collections.abc import Callable
from dataclasses import dataclass

import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import sase_blocks
from sase_blocks import ops
from sase_blocks.blocks import BLOCKS, AttentionModule
from sase_blocks.ops import EXTENDED_SETS

C, SIZE = 32, (7, 6)

# TorchScript is deprecated in torch, not yet in timm, whose tests ask for it.
pytestmark = [
    pytest.mark.filterwarnings('ignore:.torch.jit.*is deprecated'),
    pytest.mark.filterwarnings("ignore:The TorchScript type system doesn't support instance-level annotations"),
]

# What the four sets read and give, for a map of (b, c, h, w).
READS = {
    'channel_squeeze': lambda b, c, h, w: (b, c, h, w),
    'channel_excite': lambda b, c, h, w: (b, c, 1, 1),
    'spatial_squeeze': lambda b, c, h, w: (b, c, h, w),
    'spatial_excite': lambda b, c, h, w: (b, 1, h, w),
    'block': lambda b, c, h, w: (b, c, h, w),
}
GIVES = {
    'channel_squeeze': lambda b, c, h, w: (b, c, 1, 1),
    'channel_excite': lambda b, c, h, w: (b, c, 1, 1),
    'spatial_squeeze': lambda b, c, h, w: (b, 1, h, w),
    'spatial_excite': lambda b, c, h, w: (b, 1, h, w),
    'block': lambda b, c, h, w: (b, c, h, w),
}


@dataclass(frozen=True)
class Row:
    kind: str
    name: str
    build: Callable[..., nn.Module]
    # The smallest map that an exported module takes, where it is not 2: the learned gathers of Gather-Excite shrink a
    # map 8 times, and one that shrinks to a single position is another graph.
    smallest: int = 2
    # What the channels must be a multiple of, where every group of them has parts of its own.
    multiple: int = 1

    def make(self, channels: int = C, **kwargs) -> nn.Module:
        torch.manual_seed(0)
        return self.build(channels, feat_size=SIZE, **kwargs)

    def input(self, b=2, c=C, h=SIZE[0], w=SIZE[1], scale=1.0, dtype=torch.float32, seed=1) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(READS[self.kind](b, c, h, w), generator=generator, dtype=torch.float64) * scale
        return x.to(dtype)


def _genotype_block(text: str) -> Callable[..., nn.Module]:
    return lambda channels, **kwargs: sase_blocks.create_block(text, channels, **kwargs)


ROWS = [Row(kind, name, cls) for kind, table in EXTENDED_SETS.items() for name, cls in table.items()]
SMALLEST = {'ge_theta': 9, 'ge_plus': 9}
MULTIPLE = {'shuffle': 2, 'scsa': 4}
ROWS += [Row('block', name, build, SMALLEST.get(name, 2), MULTIPLE.get(name, 1)) for name, build in BLOCKS.items()]
# Three genotypes that together hold every primitive of the spatial sets and both kinds of size-bound parameters.
ROWS += [
    Row('block', text, _genotype_block(text))
    for text in (
        'second_order,conv3_x3,mlp,l2_norm,second_order,affine',
        'avg_skew,conv3_x2,conv7,avg_std,avg_skew,conv1x5_5x1',
        'l2_norm,conv5,conv3,avg_max,p_norm,conv7x7',
    )
]
every_row = pytest.mark.parametrize('row', ROWS, ids=lambda r: f'{r.kind}-{r.name}')
# Blocks that differ from another one by an option or a layer.
VARIANTS = ('ese', 'ecam', 'ceca', 'lcbam', 'gca', 'ge_theta', 'ge_plus', 'scoord', 'lska')
captured_row = pytest.mark.parametrize(
    'row',
    [
        pytest.param(
            r,
            id=f'{r.kind}-{r.name}',
            marks=() if r.kind == 'block' and r.name not in VARIANTS else pytest.mark.slow,
        )
        for r in ROWS
    ],
)


@contextlib.contextmanager
def case(*what):
    """Says in which case of a loop something failed."""
    try:
        yield
    except (Exception, pytest.fail.Exception) as error:
        raise AssertionError(f'case {what}: {error}') from error


def grads(module: nn.Module, x: Tensor, scale: float = 1.0) -> tuple[Tensor, dict[str, Tensor]]:
    x = x.clone().requires_grad_()
    y = module(x)
    generator = torch.Generator().manual_seed(2)
    y.backward((torch.randn(y.shape, generator=generator, dtype=torch.float64) * scale).to(y.dtype))
    return x.grad, {name: p.grad for name, p in module.named_parameters()}


@every_row
def test_any_size(row):
    sizes = [(2, 7, 6), (1, 1, 1), (3, 1, 1), (1, 13, 5), (2, 2, 9), (1, 8, 8), (2, 17, 16)]
    for module in (row.make().train(), row.make().eval()):
        for b, h, w in sizes:
            with case(f'training={module.training}', b, h, w):
                y = module(row.input(b, C, h, w))
                assert y.shape == GIVES[row.kind](b, C, h, w)
                assert y.isfinite().all()


@every_row
def test_any_number_of_channels(row):
    for channels, (b, h, w) in itertools.product([1, 2, 3, 5, 7, 8, 12, 16, 33], [(1, 1, 1), (2, 7, 6)]):
        with case(channels, b, h, w):
            if channels % row.multiple:
                with pytest.raises(
                    ValueError, match=f'needs (an even number|a multiple of 4) of them, got {channels}$'
                ):
                    row.make(channels)
                continue
            module = row.make(channels).train()
            x = row.input(b, channels, h, w)
            assert module(x).shape == GIVES[row.kind](b, channels, h, w)
            gx, gp = grads(module, x)
            assert all(g is None or g.isfinite().all() for g in [gx, *gp.values()])


@every_row
def test_batch_independence(row):
    module = row.make(dtype=torch.float64).eval()
    x = row.input(5, dtype=torch.float64)
    torch.testing.assert_close(module(x)[2:3], module(x[2:3]), rtol=1e-12, atol=1e-12)


@every_row
def test_finite_at_constant_input(row):
    for training, fill in itertools.product((True, False), (0.0, 3.0, -1.0)):
        with case(f'{training=}', fill):
            module = row.make().train(training)
            x = torch.full_like(row.input(), fill)
            gx, gp = grads(module, x)
            assert module(x).isfinite().all()
            assert gx.isfinite().all()
            assert all(g.isfinite().all() for g in gp.values())


@every_row
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_at_large_activations(row, dtype):
    """Finite wherever the float64 result is representable, and near it. (Batch norm over two values is chaotic.)"""
    x = row.input(8, scale=300.0, dtype=dtype)
    wide, half = row.make(dtype=torch.float64).train(), row.make().to(dtype).train()
    wide.load_state_dict({k: v.double() if v.is_floating_point() else v for k, v in half.state_dict().items()})
    expected, actual = wide(x.double()), half(x)
    assert actual.dtype == dtype
    representable = expected.abs() < torch.finfo(dtype).max / 2
    assert not actual.isnan().any()
    assert actual[representable].isfinite().all()
    if row.kind.endswith('squeeze'):
        torch.testing.assert_close(
            actual[representable].double(), expected[representable], rtol=0.02, atol=0.02 * expected.abs().max().item()
        )
    # A sum over all positions of gradient * activation must fit too, as the gradient of a gate: hence the small scale.
    gx, gp = grads(half, x, scale=0.01)
    wide_gx, wide_gp = grads(wide, x.double(), scale=0.01)
    for actual, expected in [(gx, wide_gx), *((gp[name], wide_gp[name]) for name in gp)]:
        assert not actual.isnan().any()
        assert actual[expected.abs() < torch.finfo(dtype).max / 2].isfinite().all()


@every_row
def test_autocast(row):
    for dtype in (torch.float16, torch.bfloat16):
        with case(dtype):
            module = row.make().train()
            with torch.autocast('cpu', dtype=dtype):
                y = module(row.input(scale=300.0, dtype=dtype))
            assert not y.isnan().any()
            assert y.dtype in (dtype, torch.float32)
            if row.kind == 'block':
                assert y.dtype == dtype


@every_row
def test_channels_last(row):
    module = row.make(dtype=torch.float64).eval()
    x = row.input(dtype=torch.float64)
    y = module(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(y, module(x), rtol=1e-10, atol=1e-10)
    if row.kind == 'block':
        assert y.is_contiguous(memory_format=torch.channels_last)


@every_row
def test_input_is_not_changed(row):
    x = row.input()
    before = x.clone()
    row.make().train()(x)
    assert torch.equal(x, before)


@every_row
def test_every_parameter_gets_a_gradient(row):
    """No branch is dead at birth. Sixteen samples: a unit may still be off for one.

    In train mode a bias in front of a batch norm has the gradient 0, and rounding decides whether it reads as 0: biases
    are asked in eval mode.
    """
    for seed in range(5):
        torch.manual_seed(seed)
        module = row.build(64, feat_size=SIZE)
        # A factor or a squared term that starts at 0 (the scale of SGE, the gate of GCT, the bias of the channel L2
        # norm) blocks gradients by the paper's design: it is moved off 0.
        for parameter in module.parameters():
            if not parameter.any():
                nn.init.constant_(parameter, 0.1)
        x = row.input(16, 64, seed=seed)
        for training in (True, False):
            module.zero_grad()
            _, gp = grads(module.train(training), x)
            dead = [name for name, g in gp.items() if g is None or not g.abs().max() > 0]
            assert [name for name in dead if not (training and name.endswith('bias'))] == [], f'{seed=} {training=}'


@every_row
def test_copies(row):
    module = row.make().eval()
    x = row.input()
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x), module(x))
        assert other.state_dict().keys() == module.state_dict().keys()
        assert not {p.data_ptr() for p in other.parameters()} & {p.data_ptr() for p in module.parameters()}


@captured_row
def test_torchscript(row):
    for mode in (True, False):
        module = row.make().train(mode)
        script = torch.jit.script(copy.deepcopy(module))
        for x in (row.input(), row.input(3, C, 9, 4)):
            torch.testing.assert_close(script(x), module(x))


@captured_row
def test_fx_and_script_of_it(row):
    for mode in (True, False):
        module = row.make().train(mode)
        traced = torch.fx.symbolic_trace(copy.deepcopy(module))
        x = row.input(3, C, 9, 4)
        torch.testing.assert_close(traced(x), module(x))
    torch.testing.assert_close(torch.jit.script(traced)(x), module(x))


@captured_row
def test_compile_fullgraph_dynamic(row):
    """Captured whole, and not once for every size. (With inductor and gradients: test_compiling.py.)"""
    torch._dynamo.reset()
    counter = CompileCounter()
    module = row.make().train()
    compiled = torch.compile(copy.deepcopy(module), backend=counter, fullgraph=True, dynamic=True)
    for b, h, w in [(2, 7, 6), (3, 9, 4), (4, 5, 8)]:
        x = row.input(b, C, h, w)
        torch.testing.assert_close(compiled(x), module(x))
    assert counter.frame_count <= 2


def dynamic_shape(row: Row) -> dict:
    shape = {0: torch.export.Dim('batch', min=1, max=64)}
    if row.kind != 'channel_excite':
        shape[2] = torch.export.Dim('height', min=row.smallest, max=512)
        shape[3] = torch.export.Dim('width', min=row.smallest, max=512)
    return shape


def example(row: Row) -> Tensor:
    return row.input() if row.smallest == 2 else row.input(h=2 * row.smallest, w=3 * row.smallest)


@captured_row
def test_export_with_dynamic_batch_and_size(row):
    module, small = row.make().eval(), row.smallest
    exported = torch.export.export(module, (example(row),), dynamic_shapes=(dynamic_shape(row),)).module()
    for b, h, w in [(1, small, small + 1), (3, 12, 14)]:
        x = row.input(b, C, h, w)
        torch.testing.assert_close(exported(x), module(x), rtol=1e-4, atol=1e-5)


@every_row
def test_meta_device(row):
    y = row.make(device='meta')(torch.empty(READS[row.kind](2, C, *SIZE), device='meta'))
    assert y.is_meta
    assert y.shape == GIVES[row.kind](2, C, *SIZE)


@every_row
def test_reset_parameters_and_state_dict(row):
    module, other = row.make(), row.make()
    reset = getattr(other, 'reset_parameters', None)
    if reset is not None:
        with torch.no_grad():
            for p in other.parameters():
                p.fill_(float('nan'))
        reset()
        assert all(p.isfinite().all() for p in other.parameters())
    other.load_state_dict(module.state_dict())
    x = row.input()
    assert torch.equal(module.eval()(x), other.eval()(x))


@every_row
def test_recalibration_of_batch_norms(row):
    """torch's update_bn sets each momentum to None, for a plain mean over all batches."""
    module = row.make().train()
    batches = [row.input(4, seed=seed) for seed in range(3)]
    torch.optim.swa_utils.update_bn(batches, module)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            assert part.momentum == 0.1
            assert int(part.num_batches_tracked) == 3
    if row.name == 'norm':  # the input is what is normalised
        (norm,) = [part for part in module.modules() if isinstance(part, nn.BatchNorm2d)]
        expected = torch.stack([x.mean((0, 2, 3)) for x in batches]).mean(0)
        torch.testing.assert_close(norm.running_mean, expected)


WRONG_INPUTS = [
    ('3-d', lambda x: x[0], ValueError, '4|dimensions'),
    ('integers', lambda x: x.int(), TypeError, 'floating'),
]


@every_row
def test_wrong_inputs(row):
    for name, make, error, text in WRONG_INPUTS:
        with case(name), pytest.raises(error, match=text):
            row.make()(make(row.input()))


@every_row
def test_wrong_channels(row):
    for channels in (0, -1, 1.5, True, '8', None):
        with case(channels), pytest.raises(ValueError, match='channels'):
            row.build(channels, feat_size=SIZE)


def test_no_module_escapes():
    """Every concrete primitive and every public block class of the library stands in a row."""
    bases = {ops.Primitive, ops.ChannelSqueeze, ops.ChannelExcite, ops.SpatialSqueeze, ops.SpatialExcite}

    def subclasses(cls):
        for sub in cls.__subclasses__():
            yield sub
            yield from subclasses(sub)

    tabled = {cls for table in EXTENDED_SETS.values() for cls in table.values()}
    concrete = {c for c in subclasses(ops.Primitive) if not c.__subclasses__() or c.paper_key} - bases
    assert concrete <= tabled, concrete - tabled
    rows = {type(module) for row in ROWS for module in row.make().modules()}
    # The search's mixture is no block of the library: test_search_shared.py and test_search_golden.py ask it.
    blocks = {c for c in subclasses(AttentionModule) if c.__module__.startswith('sase_blocks.blocks.')}
    blocks = {c for c in blocks if not inspect.isabstract(c)}
    assert blocks <= rows, blocks - rows


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore::FutureWarning', 'ignore::UserWarning')
@every_row
def test_onnx_with_dynamic_batch_and_size(row):
    module, small = row.make().eval(), row.smallest
    shapes = (dynamic_shape(row),)
    program = torch.onnx.export(module, (example(row),), dynamo=True, dynamic_shapes=shapes, verbose=False)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    for b, h, w in [(2, small, small + 1), (3, 12, 14)]:
        x = row.input(b, C, h, w)
        (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(y), module(x), rtol=1e-4, atol=1e-4)
