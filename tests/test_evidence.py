"""What benchmarks/evidence.py prepares."""

import importlib.util
from pathlib import Path

import pytest
from PIL import Image

SCRIPT = Path(__file__).parent.parent / 'benchmarks' / 'evidence.py'


@pytest.fixture(scope='module')
def evidence():
    spec = importlib.util.spec_from_file_location('benchmark_evidence', SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def cifar(tmp_path):
    for number in range(30):  # three images of each class
        file = tmp_path / 'cifar' / 'train' / f'class{number % 10}' / f'{number:02d}.png'
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (32, 32), (number, 0, 0)).save(file)
    return tmp_path / 'cifar'


def test_the_first_images_of_each_class(evidence, cifar, tmp_path):
    counts = evidence.write_images(cifar, tmp_path / 'out', 'train', 2, download=False)
    assert counts == {f'class{n}': 2 for n in range(10)}
    colours = [
        Image.open(tmp_path / 'out' / 'train' / 'class3' / name).getpixel((0, 0))[0]
        for name in ('0000.png', '0001.png')
    ]
    assert colours == [3, 13]


def test_too_few_images(evidence, cifar, tmp_path):
    with pytest.raises(SystemExit, match='expected 4 train images in each of 10 classes'):
        evidence.write_images(cifar, tmp_path / 'out', 'train', 4, download=False)


def test_no_images(evidence, tmp_path):
    with pytest.raises(SystemExit, match='--download'):
        evidence.write_images(tmp_path / 'nothing', tmp_path / 'out', 'train', 4, download=False)


def test_no_weights(evidence, tmp_path, monkeypatch):
    monkeypatch.setattr(evidence, 'PACKAGE', 'no_such_package')
    with pytest.raises(SystemExit, match='no_such_package is not installed'):
        evidence.write_weights(tmp_path / 'weights.pth')
