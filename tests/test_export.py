"""`sase-blocks export`: the file of a checkpoint gives the outputs of its network."""

import json

import onnxruntime
import pytest
import torch

from sase_blocks import cli
from sase_blocks.checkpoint import save_checkpoint
from sase_blocks.networks import NetworkConfig, build_network, load_model

pytestmark = pytest.mark.usefixtures('one_thread')

CONFIG = {'model': 'test_resnet', 'model_args': {}, 'img_size': 64, 'insert': 'cbam(reduction=4)', 'stages': [2]}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The working directory, with a checkpoint as `train` writes it."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model, inserted = build_network(NetworkConfig(**CONFIG), 3)
    with torch.no_grad():
        for parameter in inserted.parameters:
            parameter.add_(0.3)
    data = {'classes': ['c\udce4t', 'dog', 'ox']}
    save_checkpoint({'state_dict': model.state_dict(), 'config': CONFIG, 'data': data}, tmp_path / 'best.pt')
    return tmp_path


def run(capsys, *argv):
    code = cli.main(['export', *argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize(
    ('file', 'argv', 'fused'),
    [
        ('a.onnx', [], True),
        ('a.pt2', [], True),
        pytest.param('a.pt2', ['--no-fuse', '--dynamic', 'batch', '--no-check'], False, marks=pytest.mark.slow),
    ],
)
@pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore::FutureWarning')
def test_export_of_a_checkpoint(capsys, here, file, argv, fused):
    code, out, err = run(capsys, '--checkpoint', 'best.pt', '-o', file, *argv)
    assert (code, err) == (0, '')
    assert ('batch norms folded' in out) == fused
    assert ('not checked' in out) == ('--no-check' in argv)
    assert ('batch x 3 x 64 x 64' if '--dynamic' in argv else 'batch x 3 x height x width') in out
    x = torch.randn(3, 3, 64, 64) if '--dynamic' in argv else torch.randn(3, 3, 40, 72)
    names = ('model', 'insert', 'classes', 'input_size', 'mean', 'std', 'interpolation', 'crop_pct')
    if file.endswith('.onnx'):
        session = onnxruntime.InferenceSession(file)
        y = torch.from_numpy(session.run(None, {'input': x.numpy()})[0])
        facts = session.get_modelmeta().custom_metadata_map
    else:
        facts = dict.fromkeys(names, '')
        y = torch.export.load(file, extra_files=facts).module()(x)
    torch.testing.assert_close(y, load_model('best.pt').model(x).detach(), atol=1e-4, rtol=1e-4)
    facts = {name: json.loads(text) for name, text in facts.items()}
    assert set(facts) == set(names)
    assert (facts['classes'], facts['input_size']) == (['c\udce4t', 'dog', 'ox'], [3, 64, 64])
    assert facts['insert'] == CONFIG['insert']


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore::FutureWarning')
def test_export_without_a_checkpoint(capsys, here):
    argv = ['--model', 'test_resnet', '--insert', 'se', '--start', 'paper', '--img-size', '64', '-o', 'a.pt2']
    code, out, _ = run(capsys, *argv)
    assert (code, "se (start='paper') in ResNet: 4 places" in out, 'has its initial weights' in out) == (0, True, True)


@pytest.mark.parametrize(
    ('argv', 'says'),
    [
        (['--checkpoint', 'best.pt', '-o', 'a.pth'], "is exported as .onnx or, for torch.export, as .pt2, got 'a.pth'"),
        (['--checkpoint', 'best.pt', '-o', 'a.pt2', '--opset', '20'], '--opset is for .onnx'),
        (['--checkpoint', 'best.pt', '-o', 'a.onnx', '--opset', '17'], 'opset_version must be an int of at least 18'),
        (['--checkpoint', 'best.pt', '-o', 'no/a.onnx'], 'no/a.onnx is in a folder that does not exist'),
        (['--checkpoint', 'no.pt', '-o', 'a.onnx'], 'there is no checkpoint no.pt'),
        (['--checkpoint', 'best.pt', '-o', 'a.onnx', '--insert', 'se'], 'leave out --insert'),
        (['-o', 'a.onnx'], 'pass --model NAME'),
        (['--model', 'test_resnet', '--insert', 'sasse', '-o', 'a.onnx'], "Did you mean 'sase'"),
        (['--model', 'test_resnet', '--img-size', '32', '-o', 'a.pt2'], "larger input_size, or dynamic='batch'"),
    ],
)
@pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore::FutureWarning')
def test_mistakes(capsys, here, argv, says):
    code, _, err = run(capsys, *argv)
    assert (code, err.count('\n'), says in err) == (2, 1, True), err
    assert [path.name for path in here.iterdir()] == ['best.pt']


def test_a_fused_network_that_differs_is_not_written(capsys, here, monkeypatch):
    from sase_blocks.cli import export
    from sase_blocks.deploy import fuse

    def spoiled(model):
        report = fuse(model)
        model.fc.bias.data += 1
        return report

    monkeypatch.setattr(export, 'fuse', spoiled)
    code, _, err = run(capsys, '--checkpoint', 'best.pt', '-o', 'a.onnx')
    assert (code, 'the fused network differs from torch by' in err) == (2, True)
    assert [path.name for path in here.iterdir()] == ['best.pt']
