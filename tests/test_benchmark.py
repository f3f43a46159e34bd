"""benchmarks/blocks.py: its table and JSON on a tiny shape, known counts, and its refusals. No times."""

import importlib.util
import json
import math
import re
import sys
import warnings
from pathlib import Path

import pytest
import torch
from conftest import mostly_slow
from torch import nn

from sase_blocks import create_block
from sase_blocks.blocks import BLOCKS
from sase_blocks.insertion import IdentityStart

SCRIPT = Path(__file__).parent.parent / 'benchmarks' / 'blocks.py'


@pytest.fixture(scope='module')
def bench():
    """The script as a module; its main sets torch to one thread, which is undone here."""
    threads = torch.get_num_threads()
    sys.path.insert(0, str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location('benchmark_blocks', SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # a dataclass looks its module up there
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(SCRIPT.parent))
    for name in (spec.name, 'meter'):
        del sys.modules[name]
    torch.set_num_threads(threads)


TINY = ['--shapes', '8x6x5', '--batch', '2', '--rounds', '4', '--device', 'cpu']


def test_table_and_json(bench, tmp_path, capsys):
    names = ['sase', 'timm/se', 'channel_squeeze/avg', 'spatial_excite/conv3x3', 'spatial/avg,conv3x3']
    options = ['--mode', 'eager', '--dtype', 'fp32', 'bf16', '--layout', 'nchw', 'channels_last']
    arguments = [*TINY, *options, '--blocks', *names, '--no-figure', '--out', str(tmp_path / 'new' / 'bench')]
    assert bench.main(arguments) == 0
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / 'new' / 'bench.json').read_text())
    settings = {(row['dtype'], row['layout']) for row in result['rows']}
    assert settings == {(dtype, layout) for dtype in ('fp32', 'bf16') for layout in ('nchw', 'channels_last')}
    assert [row['block'] for row in result['rows'][:6]] == ['clone, again', *names]
    assert len(result['rows']) == 24
    for row in result['rows']:
        assert row['failure'] is None
        assert row['shape'] == '8x6x5'
        assert row['forward_clones'] == pytest.approx(row['forward_ms'] / row['clone_ms'])
        if row['block'] != 'clone, again':
            assert row['forward_backward_ms'] > 0
            assert math.isfinite(row['spread'])
    assert result['seed'] == 0
    assert result['versions']['torch'] == torch.__version__.partition('+')[0]
    assert result['command'].startswith('python benchmarks/blocks.py --shapes 8x6x5')
    assert result['left_out'] == []
    for name in names:
        assert printed.count(f'\n{name} ') == 4
    assert '2 x 8x6x5 bf16 channels_last' in printed
    assert not (tmp_path / 'new' / 'bench.png').exists()


@pytest.mark.slow
def test_figure(bench, tmp_path):
    arguments = [*TINY, '--mode', 'eager', '--blocks', 'timm/se', 'timm/eca', '--out', str(tmp_path / 'bench')]
    assert bench.main(arguments) == 0
    assert (tmp_path / 'bench.png').read_bytes().startswith(b'\x89PNG')


@pytest.mark.slow
def test_compiled_counts_traversals(bench, tmp_path):
    arguments = [*TINY, '--mode', 'compiled', '--blocks', 'sase', '--no-figure', '--out', str(tmp_path / 'bench')]
    assert bench.main(arguments) == 0
    row = json.loads((tmp_path / 'bench.json').read_text())['rows'][1]
    assert row['mode'] == 'compiled'
    assert row['error_against_eager'] < 1e-5
    assert row['forward_traversals_counted'] > 2
    assert row['kept_for_backward_x'] >= 1


@pytest.mark.slow
def test_time_limit_leaves_out_and_says_so(bench, tmp_path, capsys):
    arguments = [*TINY, '--minutes', '0', '--blocks', 'timm/eca', '--out', str(tmp_path / 'bench')]
    assert bench.main(arguments) == 0
    assert json.loads((tmp_path / 'bench.json').read_text())['left_out'] == ['2 x 8 x 6 x 5 fp32 nchw']
    assert 'left out after 0 minutes' in capsys.readouterr().out


@pytest.mark.parametrize(
    ('function', 'traversals'),
    [
        (lambda x: x.clone(), 2),
        (lambda x: x * 2 + 1, 4),
        (lambda x: x.detach().transpose(1, 2).unsqueeze(0)[..., :2].flatten(0, 1), 0),
        (lambda x: x.transpose(1, 2).flatten(2), 2),
        (lambda x: x.relu_(), 2),
        (lambda x: x + x[:1].expand_as(x), 2 + 1 / 4),
    ],
    ids=['clone', 'two operations', 'views alone', 'a reshape that copies', 'in place', 'expanded'],
)
def test_bytes_of_eager_operators(bench, function, traversals):
    x = torch.randn(4, 8, 6, 5)
    with bench.CountBytes() as count:
        function(x)
    assert count.bytes == traversals * x.numel() * 4


class Cube(nn.Module):
    """x^3 by two products: keeps x, and its square."""

    def forward(self, x):
        return x * x * x


def passes(bench, module, x):
    """Traversals of x forward and backward, and sizes of x kept: whole ones, without what is small."""
    x = x.clone().requires_grad_()
    with bench.CountBytes() as forward:
        y = module(x)
    with bench.CountBytes() as backward:
        y.backward(torch.ones_like(y))
    kept = bench.kept_bytes(lambda: module(x), bench.storages_of(module))
    return [n / x.numel() / x.element_size() for n in (forward.bytes, backward.bytes, kept)]


# What has the size of x: a gate that is neither a sum nor a product, or all of y, in blocks without a gate.
WHOLE_GATE = (
    *('bam', 'ge', 'ge_theta', 'ge_plus', 'sge', 'ema', 'simam', 'triplet', 'scoord', 'strip', 'nam', 'caa'),
    *('mlca', 'gam'),
    *('lka', 'lska', 'msca', 'lsk'),
)
WITHOUT_GATE = ('criss_cross', 'shuffle', 'sk')


@pytest.mark.parametrize('dtype', mostly_slow([torch.float32, torch.bfloat16], torch.bfloat16), ids=str)
def test_an_inserted_block_makes_the_passes_of_the_block_alone(bench, dtype):
    """Nothing of the size of x is read, written or kept more where the gate is small, a sum or a product.

    Where it is neither, fewer than the 3, 14 and 1 of an interpolation of x and block(x). Without a gate, these.
    """
    x = torch.randn(2, 64, 16, 16, dtype=dtype)
    for name in BLOCKS:
        alone, inserted = (passes(bench, m.to(dtype), x) for m in (create_block(name, 64), as_inserted(name)))
        more = [b - a for a, b in zip(alone, inserted, strict=True)]
        if name in ('coord', 'ela', 'scsa'):  # the gradient of alpha reads that of the product once
            assert all(0 <= n < most for n, most in zip(more, (0.3, 2, 0.3), strict=True)), (name, more)
        elif name in WHOLE_GATE:
            assert all(0 <= n < most for n, most in zip(more, (2.3, 8.3, 1.3), strict=True)), (name, more)
        elif name in WITHOUT_GATE:
            assert all(0 <= n < most for n, most in zip(more, (3.1, 14.1, 1.1), strict=True)), (name, more)
        else:  # of the size of one traversal are these: nothing
            assert all(0 <= n < 0.3 for n in more), (name, more)


def as_inserted(name):
    return IdentityStart(create_block(name, 64))


def test_kept_bytes(bench):
    x = torch.randn(4, 8, 6, 5, requires_grad=True)
    linear = nn.Linear(5, 5, bias=False)
    parameters = bench.storages_of(linear)
    assert bench.kept_bytes(lambda: Cube()(x), set()) == 2 * x.numel() * 4
    assert bench.kept_bytes(lambda: linear(x), parameters) == x.numel() * 4


def test_modules_for_train_and_eval_share_parameters(bench):
    module = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    copy = bench.clone_module(module).eval()
    assert module.training
    assert module[1].training
    assert [id(p) for p in copy.parameters()] == [id(p) for p in module.parameters()]
    assert copy[1].running_mean is module[1].running_mean


class Broken(nn.Module):
    def forward(self, x):
        raise RuntimeError('no kernel for this\nsecond line')


def test_a_block_that_fails_costs_only_its_own_row(bench, tmp_path, capsys, monkeypatch):
    chosen = [bench.Candidate('broken', lambda channels, feat_size: Broken()), *bench.candidates(['timm/se'])]
    monkeypatch.setattr(bench, 'candidates', lambda names: chosen)
    assert bench.main([*TINY, '--mode', 'eager', '--no-figure', '--out', str(tmp_path / 'bench')]) == 1
    rows = json.loads((tmp_path / 'bench.json').read_text())['rows']
    assert [row['failure'] for row in rows] == [None, 'RuntimeError: no kernel for this', None]
    assert 'failed: RuntimeError: no kernel for this' in capsys.readouterr().out


@pytest.mark.slow
def test_without_sase_blocks_it_times_timm(bench, tmp_path, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name, *rest: None if name == 'sase_blocks' else find(name))
    assert bench.main([*TINY, '--mode', 'eager', '--no-figure', '--out', str(tmp_path / 'bench')]) == 0
    output = capsys.readouterr()
    assert 'sase_blocks is not installed' in output.err
    names = [row['block'] for row in json.loads((tmp_path / 'bench.json').read_text())['rows']]
    assert names == ['clone, again', 'timm/se', 'timm/eca', 'timm/cbam', 'timm/gc']


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--blocks', 'sasse'], "unknown block 'sasse'"),
        (['--blocks', 'avg,mlp,affine'], 'got 3'),
        (['--blocks', 'channel/avg,mpl'], 'mpl'),
        (['--shapes', '64x14'], "'64x14' is no shape"),
        (['--shapes', '64x0x14'], 'size below 1'),
        (['--batch', '0'], 'at least 1'),
        (['--rounds', '0'], 'at least 1'),
        (['--dtype', 'int8'], 'int8'),
    ],
)
def test_refusals(bench, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        bench.main(['--device', 'cpu', *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.fixture
def traffic(bench):  # which makes benchmarks/meter.py importable
    spec = importlib.util.spec_from_file_location('benchmark_traffic', SCRIPT.with_name('traffic.py'))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # inductor's, about a GPU that is not there
        yield module


@pytest.mark.slow
@pytest.mark.parametrize(
    'without',
    [pytest.param((), id='as it is'), pytest.param(('triton',), id='no Triton', marks=pytest.mark.slow)],
)
def test_planned_traffic_of_sase(traffic, without, monkeypatch):
    """Three passes over x forward and no copy of it: a wide convolution in the block would make it six traversals."""
    from torch.utils import _triton

    for name, known in list(vars(_triton).items()):
        if name.startswith('has_triton'):
            known()  # remembered: there is no device
    for name in without:
        monkeypatch.setitem(sys.modules, name, None)
    try:
        forward, backward, kept = traffic.traversals(
            traffic.builders()['sase'](256).bfloat16(),
            torch.randn(2, 256, 28, 28, requires_grad=True, dtype=torch.bfloat16),
        )
    except traffic.CannotPlan as error:
        if tuple(int(n) for n in torch.__version__.split('.')[:2]) <= (2, 15):
            raise
        pytest.skip(str(error))
    assert 4 <= forward < 4.3
    assert backward < 7.6
    assert 1 <= kept < 1.3


@pytest.mark.slow
def test_a_torch_that_plans_otherwise_is_named(traffic, capsys, monkeypatch):
    monkeypatch.setattr('torch._inductor.scheduler.Scheduler', lambda operations: operations.gone)
    monkeypatch.setattr(sys, 'argv', ['traffic.py', 'eca', '--shapes', '8x4x4', '--batch', '1'])
    with pytest.raises(SystemExit) as stop:
        traffic.main()
    assert re.fullmatch(
        r"traffic.py: torch .* does not plan without a GPU .*\(AttributeError: .*'gone'\); use .*", str(stop.value)
    )


# Backward passes of torch's own operators that earlier versions make with more copies.
MORE_BEFORE_2_14 = ('ema', 'shuffle', 'criss_cross', 'dual', 'lsk', 'scsa')


@pytest.mark.parametrize('dtype', mostly_slow(['float32', 'bfloat16'], 'bfloat16'))
def test_eager_traffic_is_as_in_the_table(traffic, capsys, dtype):
    """Counted, not timed. To write the table anew: the last command in the docstring of benchmarks/traffic.py."""
    table = (SCRIPT.parent / 'results' / 'traffic' / 'eager.txt').read_text().splitlines()
    expected = [line for line in table[2:] if dtype in line.split()]
    traffic.main(['--eager', '--shapes', '256x56x56', '--dtype', dtype])
    found = capsys.readouterr().out.splitlines()
    assert found[:2] == table[:2]
    if tuple(int(n) for n in torch.__version__.split('.')[:2]) >= (2, 14):
        assert found[2:] == expected
        return
    for line, row in zip(found[2:], expected, strict=True):
        (*name, forward, backward, kept), (*name_then, forward_then, backward_then, kept_then) = (
            line.split(),
            row.split(),
        )
        assert (name, forward, kept) == (name_then, forward_then, kept_then)
        most = 1.2 * float(backward_then) if name[0] in MORE_BEFORE_2_14 else float(backward_then)
        assert float(backward_then) <= float(backward) <= most, line
