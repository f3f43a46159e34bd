"""ONNX files, and every named block in a network through every exporter, compiler and narrow type."""

import copy
import re
import sys

import onnx
import onnxruntime
import pytest
import timm
import torch
import torch._inductor
from conftest import mostly_slow
from timm.models.resnet import BasicBlock
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from sase_blocks import create_block
from sase_blocks.blocks import BLOCKS
from sase_blocks.deploy import capture, export_onnx, export_program, fuse, onnx_file

# TorchScript is deprecated in torch, not yet in timm, whose tests ask for it.
pytestmark = [
    pytest.mark.filterwarnings('ignore:.torch.jit.*is deprecated'),
    pytest.mark.filterwarnings("ignore:The TorchScript type system doesn't support instance-level annotations"),
]


def settled(model: nn.Module) -> nn.Module:
    """The model in eval mode, every batch norm with parameters and statistics as training might leave them."""
    g = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.2, 0.6, generator=g)
            nn.init.uniform_(module.bias, -0.3, 0.3, generator=g)
            nn.init.uniform_(module.running_mean, -0.3, 0.3, generator=g)
            nn.init.uniform_(module.running_var, 0.5, 2.0, generator=g)
    return model.eval()


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    return settled(timm.create_model('resnet20_cifar', genotype=name, layers=(1, 1, 1), channels=(8, 16, 32)))


def network_of_blocks(names: tuple[str, ...] = tuple(BLOCKS)) -> nn.Module:
    """A residual network in which each residual branch ends in another named block."""
    torch.manual_seed(0)
    layers = -(-len(names) // 3)
    model = timm.create_model('resnet20_cifar', layers=(layers, layers, layers), channels=(8, 8, 16))
    places = [module for module in model.modules() if isinstance(module, BasicBlock)]
    for name, place in zip(names, places, strict=False):
        place.se = create_block(name, place.conv2.out_channels, feat_size=8)
    return settled(model)


def images(batch: int = 2, height: int = 32, width: int = 40) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


every_block = pytest.mark.parametrize('name', BLOCKS)
# Alone, every block is asked the same in test_contract.py.
some_blocks = pytest.mark.parametrize('name', mostly_slow(BLOCKS, 'sase', 'ge_theta'))


# ---- whole networks ----


@some_blocks
def test_torchscript(name):
    model = network(name)
    script = torch.jit.script(model)
    for x in (images(), images(3, 48, 33)):
        torch.testing.assert_close(script(x), model(x))


@some_blocks
@pytest.mark.parametrize('dtype', mostly_slow([torch.float16, torch.bfloat16], torch.float16), ids=str)
def test_half_precision_and_autocast(name, dtype):
    """In eval and train mode finite; in eval mode as the float32 network up to the precision of the type."""
    model = network(name)
    expected = model(images())
    scale = expected.abs().max().item()
    half = copy.deepcopy(model).to(dtype)
    actual = half(images().to(dtype))
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.float(), expected, rtol=0, atol=0.05 * scale)
    with torch.autocast('cpu', dtype=dtype):
        torch.testing.assert_close(model(images()).float(), expected, rtol=0, atol=0.05 * scale)
        model.train()(images(8)).float().sum().backward()
    half.train()(images(8).to(dtype)).float().sum().backward()
    for trained in (model, half):
        assert all(p.grad.isfinite().all() for p in trained.parameters() if p.grad is not None)


def dynamic_shapes() -> tuple[dict]:
    return (dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC),)


@pytest.mark.slow
def test_export_with_dynamic_batch_and_size():
    model = network_of_blocks()
    exported = torch.export.export(model, (images(),), dynamic_shapes=dynamic_shapes()).module()
    for x in (images(3, 64, 48), images(2, 33, 37)):
        torch.testing.assert_close(exported(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_compile_fullgraph_dynamic():
    """One graph for all sizes. (Each block alone: test_contract.py; with inductor: test_compiling.py.)"""
    torch._dynamo.reset()
    model, counter = network_of_blocks(), CompileCounter()
    compiled = torch.compile(copy.deepcopy(model), backend=counter, fullgraph=True, dynamic=True)
    for x in (images(), images(3, 64, 48), images(4, 33, 37)):
        torch.testing.assert_close(compiled(x), model(x))
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore::FutureWarning', 'ignore::UserWarning')
@pytest.mark.parametrize('part', range(4))
def test_aot_inductor(part, tmp_path):
    """A fourth of the blocks compiled ahead of time for the CPU, run at another size and batch, too."""
    model = network_of_blocks(tuple(BLOCKS)[part::4])
    exported = torch.export.export(model, (images(),), dynamic_shapes=dynamic_shapes())
    package = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / 'model.pt2'))
    loaded = torch._inductor.aoti_load_package(package)
    for x in (images(), images(3, 64, 48)):
        torch.testing.assert_close(loaded(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@every_block
def test_onnx_of_a_network(name, tmp_path):
    """Folded, with dynamic batch and size, compared by export_onnx itself, and here at sizes down to a few pixels."""
    model = network(name)
    fuse(model)
    report = export_onnx(model, tmp_path / 'model.onnx')
    assert report.input_shape == ('batch', 3, 'height', 'width')
    assert [shape for shape, _ in report.checks] == [(2, 3, 32, 32), (1, 3, 64, 96)]
    session = onnxruntime.InferenceSession(report.file)
    for x in (images(3, 17, 45), images(1, 8, 5)):
        (y,) = session.run(None, {'input': x.numpy()})
        torch.testing.assert_close(torch.from_numpy(y), model(x), rtol=0, atol=1e-4)
    kinds = {node.op_type for node in onnx.load(report.file).graph.node}
    assert ('BatchNormalization' in kinds) == (name in ('srm', 'gsop', 'nam'))


@pytest.mark.slow
@pytest.mark.parametrize('name', ['resnet50_sase', 'resnet50_ge_theta', 'mobilenetv3_small_100'])
def test_onnx_of_a_large_network(name, tmp_path):
    torch.manual_seed(0)
    model = settled(timm.create_model(name, num_classes=10))
    assert len(export_onnx(model, tmp_path / 'model.onnx', 64).checks) == 2


# ---- export_onnx ----


class Small(nn.Module):
    def __init__(self, several: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.dropout = nn.Dropout(0.5)
        self.several = several

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        y = self.dropout(torch.relu(self.conv(x)))
        return [y, y.mean((2, 3))] if self.several else y.mean((2, 3))


class Data(Small):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > 0 else x


def test_the_file_and_its_report(tmp_path):
    model, file = Small().train(), tmp_path / 'model.onnx'
    torch.manual_seed(0)
    state = torch.get_rng_state()
    report = export_onnx(model, file, (20, 24), metadata={'classes': '["a"]'})
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert [path.name for path in tmp_path.iterdir()] == ['model.onnx']
    assert (report.file, report.bytes, report.opset >= 18) == (file, file.stat().st_size, True)
    assert report.input_shape == ('batch', 3, 'height', 'width')
    assert [shape for shape, _ in report.checks] == [(2, 3, 20, 24), (1, 3, 52, 88)]
    assert re.search(r'model.onnx: opset \d+, input batch x 3 x height x width', str(report))
    assert 'onnxruntime differs by ' in str(report)
    proto = onnx.load(file)
    assert [value.name for value in (*proto.graph.input, *proto.graph.output)] == ['input', 'output']
    assert any(node.name.startswith('conv/') for node in proto.graph.node)
    assert b'test_deploy.py' not in file.read_bytes()  # no stack traces
    assert onnxruntime.InferenceSession(file).get_modelmeta().custom_metadata_map == {'classes': '["a"]'}


@pytest.mark.parametrize(
    ('arguments', 'shape', 'checks', 'outputs'),
    [
        pytest.param({'dynamic': 'batch', 'input_size': 16}, ('batch', 3, 16, 16), 2, 1, marks=pytest.mark.slow),
        pytest.param({'dynamic': False, 'input_size': (3, 16, 12)}, (1, 3, 16, 12), 1, 1, marks=pytest.mark.slow),
        pytest.param(
            *({'check': False, 'opset_version': 18, 'input_size': [16, 16]}, ('batch', 3, 'height', 'width'), 0, 2),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_may_change(arguments, shape, checks, outputs, tmp_path):
    report = export_onnx(Small(several=outputs == 2), tmp_path / 'model.onnx', **arguments)
    assert report.input_shape == shape
    assert len(report.checks) == checks
    assert ('not checked' in str(report)) == (checks == 0)
    assert report.opset == arguments.get('opset_version', report.opset)
    session = onnxruntime.InferenceSession(report.file)
    assert [o.name for o in session.get_outputs()] == (['output'] if outputs == 1 else ['output0', 'output1'])


WRONG = {
    'opset too old': ({'opset_version': 17}, ValueError, 'opset_version must be an int of at least 18.*got 17'),
    'no opset': ({'opset_version': '18'}, ValueError, "at least 18.*got '18'"),
    'dynamic': ({'dynamic': 'height'}, ValueError, "dynamic must be True, False or 'batch', got 'height'"),
    'no size': ({'input_size': None}, ValueError, r'the image size of Small is unknown: pass input_size'),
    'size': ({'input_size': (0, 8)}, ValueError, r'input_size must be an int, \(H, W\) or .*got \(0, 8\)'),
    'size too small': ({'input_size': 2}, ValueError, r'the forward of Small fails .*\(2, 3, 2, 2\)'),
    'channels': ({'input_size': (4, 9, 9)}, ValueError, r'the forward of Small fails .*\(2, 4, 9, 9\).*4 channels'),
    'folder': ({'file': 'no/model.onnx'}, FileNotFoundError, 'is in a folder that does not exist'),
    'a folder': ({'file': '.'}, FileNotFoundError, 'is a folder'),
    'half': ({'model': Small().half()}, ValueError, r'export model.float\(\), or pass check=False'),
    'control flow': ({'model': Data()}, RuntimeError, r"Data cannot be exported.*try dynamic='batch'"),
    'new opset': ({'opset_version': 99}, ValueError, 'opset_version=99 cannot be written.*the exporter gave'),
}


@pytest.mark.parametrize('name', [pytest.param(n, marks=pytest.mark.slow if n == 'new opset' else ()) for n in WRONG])
def test_one_clear_error_and_nothing_written(name, tmp_path):
    arguments, error, text = WRONG[name]
    arguments = {'model': Small(), 'input_size': 16, 'file': 'model.onnx', **arguments}
    model = arguments.pop('model')
    mode = model.training
    with pytest.raises(error, match=f'(?s){text}'):
        export_onnx(model, tmp_path / arguments.pop('file'), **arguments)
    assert list(tmp_path.iterdir()) == []
    assert model.training == mode


def test_a_size_that_the_exporter_fixed_is_an_error():
    helper = onnx.helper
    image = helper.make_tensor_value_info('input', 1, ['s0', 3, 8, 's1'])
    graph = helper.make_graph([], 'graph', [image], [helper.make_tensor_value_info('output', 1, ['s0', 's1//2'])])
    with pytest.raises(ValueError, match='the exporter fixed height at 8'):
        onnx_file._name_axes(graph, True)
    onnx_file._name_axes(graph, 'batch')
    assert [dim.dim_param for dim in graph.output[0].type.tensor_type.shape.dim] == ['batch', 's1//2']


@pytest.mark.slow
def test_a_file_that_differs_is_not_written(tmp_path, monkeypatch):
    file = tmp_path / 'model.onnx'
    file.write_text('the last good one')
    monkeypatch.setattr(capture, 'TOLERANCE', -1.0)
    with pytest.raises(RuntimeError, match=r'onnxruntime differs from torch by .* nothing was written'):
        export_onnx(Small(), file, 16)
    assert file.read_text() == 'the last good one'
    monkeypatch.setattr(capture, 'TOLERANCE', 1e-4)
    monkeypatch.setattr(capture.os, 'replace', lambda *paths: (_ for _ in ()).throw(OSError('disk full')))
    with pytest.raises(OSError, match='disk full'):
        export_onnx(Small(), file, 16)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [('model.onnx', 'the last good one')]


# ---- export_program ----


@pytest.mark.parametrize(
    ('arguments', 'shape', 'checks'),
    [
        ({}, ('batch', 3, 'height', 'width'), [(2, 3, 16, 16), (1, 3, 48, 80)]),
        ({'dynamic': 'batch'}, ('batch', 3, 16, 16), [(2, 3, 16, 16), (1, 3, 16, 16)]),
        ({'dynamic': False}, (1, 3, 16, 16), [(1, 3, 16, 16)]),
        ({'check': False}, ('batch', 3, 'height', 'width'), []),
    ],
)
@pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore::FutureWarning')
def test_the_program_and_its_report(arguments, shape, checks, tmp_path):
    model, file = Small().train(), tmp_path / 'model.pt2'
    report = export_program(model, file, 16, metadata={'classes': '["a"]'}, **arguments)
    assert model.training
    assert [path.name for path in tmp_path.iterdir()] == ['model.pt2']
    assert (report.file, report.bytes, report.input_shape) == (file, file.stat().st_size, shape)
    assert [shape for shape, _ in report.checks] == checks
    assert 'torch.export' in str(report)
    assert ('not checked' in str(report)) == (not checks)
    extra = {'classes': ''}
    program = torch.export.load(file, extra_files=extra).module()
    assert extra == {'classes': '["a"]'}
    x = torch.randn(*(n if isinstance(n, int) else 16 for n in shape)) if shape[0] == 1 else torch.randn(5, 3, 16, 16)
    torch.testing.assert_close(program(x), model.eval()(x))


@pytest.mark.parametrize(
    'name', ['dynamic', 'no size', 'size', 'size too small', 'channels', 'folder', 'a folder', 'half', 'control flow']
)
def test_a_wrong_program_is_one_clear_error(name, tmp_path):
    arguments, error, text = WRONG[name]
    arguments = {'model': Small(), 'input_size': 16, 'file': 'model.pt2', **arguments}
    with pytest.raises(error, match=f'(?s){text}'):
        export_program(arguments.pop('model'), tmp_path / arguments.pop('file'), **arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore::FutureWarning')
def test_a_program_that_differs_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(capture, 'TOLERANCE', -1.0)
    with pytest.raises(RuntimeError, match=r'torch\.export differs from torch by .* nothing was written'):
        export_program(Small(), tmp_path / 'model.pt2', 16)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(('library', 'check'), [('onnx', False), ('onnxscript', False), ('onnxruntime', True)])
def test_a_missing_library_is_named(library, check, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError, match=rf'needs {library}: pip install "sase-blocks\[export\]"'):
        export_onnx(Small(), tmp_path / 'model.onnx', 16, check=check)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_network_that_is_not_finite_in_torch_is_not_blamed_on_onnxruntime(tmp_path):
    model = Small().eval()
    with torch.no_grad():
        next(model.parameters()).fill_(float('inf'))
    with pytest.raises(RuntimeError, match=r'torch itself gives non-finite values .*check=False'):
        export_onnx(model, tmp_path / 'model.onnx', 32)
    assert list(tmp_path.iterdir()) == []
