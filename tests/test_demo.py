"""The demo end to end, small; its data, its counting, its table, and what it refuses."""

import json
import re
import sys

import pytest
import timm
import torch
from matplotlib.image import imread

from sase_blocks.demo import NETWORKS, count_macs, format_table, load_digits, run_demo, train


class SilentBar:
    def update(self):
        pass

    def set_postfix_str(self, text, refresh):
        pass


@pytest.mark.slow
def test_demo(tmp_path, capsys):
    out = tmp_path / 'new' / 'folder'
    results = run_demo(out, epochs=1, seed=3, limit=32)
    assert json.loads((out / 'results.json').read_text()) == results
    assert sorted(path.name for path in out.iterdir()) == ['attention_maps.png', 'learning_curves.png', 'results.json']
    assert {key: results[key] for key in ('epochs', 'seed', 'train_images', 'test_images')} == {
        'epochs': 1, 'seed': 3, 'train_images': 32, 'test_images': 32,
    }  # fmt: skip
    assert results['versions']['torch'] == torch.__version__
    assert {'platform', 'processor', 'threads'} <= set(results['machine'])
    assert 'epochs=1, seed=3, limit=32' in results['command']
    compile(results['command'], 'command', 'exec')

    networks = results['networks']
    assert tuple(networks) == tuple(results['history']) == NETWORKS
    assert networks['none']['time_ratio'] == 1
    for name, row in networks.items():
        log = results['history'][name]
        assert [entry['epoch'] for entry in log] == [1.0]
        assert row['test_accuracy'] == log[-1]['acc1']
        assert 0 <= row['test_accuracy'] <= 100
        assert row['ms_per_image'] > 0
    # Attention costs parameters and MACs, but few: the same network carries it.
    for name in NETWORKS[1:]:
        for key in ('parameters', 'macs'):
            assert networks['none'][key] < networks[name][key] < 1.02 * networks['none'][key]

    printed = capsys.readouterr().out
    for label, row in zip(('no attention', 'se', 'cbam', 'sase'), networks.values(), strict=True):
        assert re.search(rf'^{label} +{row["test_accuracy"]:.2f} % +{row["parameters"]:,} ', printed, re.MULTILINE)
    assert 'it does not show which block is better' in printed

    for name, size in (('learning_curves.png', (528, 1216)), ('attention_maps.png', None)):
        picture = imread(out / name)
        assert size is None or picture.shape[:2] == size
        assert min(picture.shape[:2]) > 400
        assert picture[..., :3].std() > 0.05, f'{name} is blank'


def test_table():
    row = {'test_accuracy': 98.5, 'parameters': 272186, 'macs': 40_550_000, 'ms_per_image': 1.5, 'time_ratio': 1.0}
    slow = {**row, 'test_accuracy': 97.5, 'ms_per_image': 3.75, 'time_ratio': 2.5}
    lines = format_table({'networks': {'none': row, 'sase': slow}, 'test_images': 360}).splitlines()
    assert lines[0].split('  ')[0] == 'network'
    assert lines[2].split() == ['no', 'attention', '98.50', '%', '272,186', '40.5', 'M', '1.500', '1.00']
    assert lines[3].split() == ['sase', '97.50', '%', '272,186', '40.5', 'M', '3.750', '2.50']
    assert len({len(line) for line in lines[:4]}) == 1
    # sqrt(0.98 * 0.02 / 360) = 0.7 points, and 1 / 360 is 0.28 points.
    assert 'one image is 0.28 points' in lines[5]
    assert 'about 0.7 points' in lines[5]


def test_digits():
    digits = load_digits()
    assert digits.train_images.shape == (1437, 1, 32, 32)
    assert digits.test_images.shape == (360, 1, 32, 32)
    assert digits.train_images.dtype == torch.float32
    assert digits.train_images.mean().abs() < 1e-4
    assert (digits.train_images.std() - 1).abs() < 1e-4
    share = digits.test_labels.bincount() / digits.train_labels.bincount()
    assert share.shape == (10,)
    assert (share - 360 / 1437).abs().max() < 0.02
    # No image is on both sides.
    train_set = {image.numpy().tobytes() for image in digits.train_images}
    assert not any(image.numpy().tobytes() in train_set for image in digits.test_images)
    small = load_digits(16)
    assert torch.equal(small.train_images, digits.train_images[:16])
    assert torch.equal(small.test_labels, digits.test_labels[:16])


@pytest.mark.slow
def test_training_follows_the_seed():
    digits = load_digits(48)

    def log(seed):
        torch.manual_seed(0)
        model = timm.create_model('resnet20_cifar', in_chans=1, num_classes=10)
        return train(model, digits, epochs=1, seed=seed, bar=SilentBar())

    first = log(0)
    assert [row['epoch'] for row in first] == [0.5, 1.0]
    assert log(0) == first
    assert log(1)[0]['train_loss'] != first[0]['train_loss']


def test_macs():
    def stage(before, channels, pixels):
        first, others, shortcut = 9 * before * channels, 5 * 9 * channels**2, before * channels
        return pixels * (first + others + (shortcut if before != channels else 0))

    by_hand = 9 * 16 * 32**2 + stage(16, 16, 32**2) + stage(16, 32, 16**2) + stage(32, 64, 8**2) + 64 * 10
    model = timm.create_model('resnet20_cifar', in_chans=1, num_classes=10).train()
    assert count_macs(model, (1, 32, 32)) == by_hand
    assert model.training
    assert next(model.parameters()).device.type == 'cpu'


def a_file(path):
    path.write_text('')
    return path


@pytest.mark.parametrize(
    ('arguments', 'error', 'text'),
    [
        (lambda path: {'out': path, 'epochs': 0}, ValueError, 'epochs must be at least 1, got 0'),
        (lambda path: {'out': path, 'limit': 15}, ValueError, 'limit must be at least 16 images, got 15'),
        (lambda path: {'out': a_file(path / 'file')}, OSError, 'output folder .*file cannot be written: '),
        (lambda path: {'out': a_file(path / 'file') / 'below'}, OSError, 'output folder .*below cannot be written: '),
    ],
)
def test_refused(tmp_path, arguments, error, text):
    with pytest.raises(error, match=text):
        run_demo(**arguments(tmp_path))
    assert not (tmp_path / 'results.json').exists()


@pytest.mark.parametrize('name', ['sklearn', 'matplotlib', 'tqdm'])
def test_library_missing(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=rf'needs {name}: pip install "sase-blocks\[demo\]"'):
        run_demo(tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


@pytest.mark.slow
@pytest.mark.parametrize('genotype', NETWORKS)
def test_learns(genotype):
    torch.manual_seed(0)
    model = timm.create_model('resnet20_cifar', in_chans=1, num_classes=10, genotype=genotype)
    log = train(model, load_digits(), epochs=2, seed=0, bar=SilentBar())
    assert log[-1]['acc1'] > 90
