"""The demo end to end, small; its data, its counting, and what it refuses."""

import json
import re
import sys

import pytest
import timm
import torch
from matplotlib.image import imread

from sase_blocks.demo import NETWORKS, load_digits, run_demo
from sase_blocks.profiling import count_macs


@pytest.mark.slow
def test_demo(tmp_path, capsys):
    out = tmp_path / 'new' / 'folder'
    result = run_demo(out, epochs=1, seeds=[3], limit=32)
    assert json.loads((out / 'comparison.json').read_text()) == result
    assert {path.name for path in out.iterdir() if path.is_file()} == {
        'attention_maps.png', 'learning_curves.png', 'comparison.png', 'comparison.json', 'comparison.csv',
        'comparison.txt', 'epochs.csv', 'jobs.json',
    }  # fmt: skip
    assert (result['seeds'], result['images'], result['budget']['epochs']) == ([3], 32, 1)
    rows = {row['name']: row for row in result['candidates']}
    assert tuple(rows) == NETWORKS
    # Attention costs parameters and MACs, but few: the same network carries it.
    for name in NETWORKS[1:]:
        for key in ('parameters', 'macs'):
            assert rows['none'][key] < rows[name][key] < 1.02 * rows['none'][key]
    printed = capsys.readouterr().out
    for name, row in rows.items():
        assert re.search(rf'^{name} +{row["mean"]:.2f} .* {row["parameters"]:,} ', printed, re.MULTILINE)
    assert 'it does not show which block is better' in printed
    for name, size in (('learning_curves.png', (568, 1216)), ('attention_maps.png', None)):
        picture = imread(out / name)
        assert size is None or picture.shape[:2] == size
        assert min(picture.shape[:2]) > 400
        assert picture[..., :3].std() > 0.05, f'{name} is blank'
    # Again: nothing to train. Other settings: refused.
    assert run_demo(out, epochs=1, seeds=[3], limit=32) == result
    assert '8 of 8 jobs are done already' in capsys.readouterr().out
    with pytest.raises(ValueError, match='other settings: epochs was 1 and is 2'):
        run_demo(out, epochs=2, seeds=[3], limit=32)


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
        (lambda path: {'out': path, 'limit': 31}, ValueError, 'limit must be at least 32 images, got 31'),
        (lambda path: {'out': a_file(path / 'file')}, OSError, 'output folder .*file cannot be written: '),
        (lambda path: {'out': a_file(path / 'file') / 'below'}, OSError, 'output folder .*below cannot be written: '),
    ],
)
def test_refused(tmp_path, arguments, error, text):
    with pytest.raises(error, match=text):
        run_demo(**arguments(tmp_path))
    assert not (tmp_path / 'results.json').exists()


@pytest.mark.parametrize('name', ['sklearn', 'matplotlib', 'scipy', 'accelerate'])
def test_library_missing(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=rf'needs {name}: pip install "sase-blocks\[demo\]"'):
        run_demo(tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


@pytest.mark.slow
def test_learns(tmp_path):
    for row in run_demo(tmp_path)['candidates']:
        assert row['mean'] > 90, row['name']
