"""Image data: what is refused before any work, and that augmentation depends on (seed, epoch, index) alone."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from sase_blocks.data import (
    EpochSampler,
    TransformedSamples,
    create_transforms,
    derive_seed,
    find_broken,
    open_data,
    seeded,
)

MEAN_STD = {'mean': (0.5, 0.4, 0.3), 'std': (0.2, 0.3, 0.4), 'interpolation': 'bilinear', 'crop_pct': 0.9}


def make_images(root, train=4, val=2, classes=('cat', 'dog', 'owl'), size=12, val_name='val', suffix='png'):
    """Class folders of noise whose colour tells the class."""
    rng = np.random.default_rng(0)
    for split, count in (('train', train), (val_name, val)):
        for label, name in enumerate(classes):
            folder = Path(root, split, name)
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 255, (size, size, 3), dtype=np.uint8)
                pixels[..., label % 3] //= 4
                Image.fromarray(pixels).save(folder / f'{i}.{suffix}')
    return Path(root)


def truncate(path, part=0.7):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])


def remove(root, pattern):
    for path in sorted(root.glob(pattern), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


@pytest.mark.parametrize(
    ('spoil', 'error', 'says'),
    [
        (
            lambda r: remove(r, '**/*'),
            FileNotFoundError,
            r'no folder train.*\(it holds: none\).*expected ROOT/',
        ),
        (lambda r: (remove(r, '**/*'), r.rmdir()), FileNotFoundError, 'there is no data folder'),
        (lambda r: remove(r, 'val/**/*') or (r / 'val').rmdir(), FileNotFoundError, 'no folder val or .*holds: train'),
        (lambda r: remove(r, 'train/*/*'), ValueError, r'train holds no images'),
        (lambda r: remove(r, 'val/**/*'), ValueError, r'val holds no images'),
        (lambda r: remove(r, '*/[do]*/*'), ValueError, r'the data has one class \(cat\)'),
        (lambda r: remove(r, 'val/owl/*'), ValueError, 'only in train: owl; only in val: none'),
        (lambda r: (r / 'val/dog').rename(r / 'val/hog'), ValueError, 'only in train: dog; only in val: hog'),
        (lambda r: (r / 'train/cat/0.png').rename(r / 'train/0.png'), ValueError, 'images outside any class folder'),
    ],
)
def test_wrong_folder_is_refused(tmp_path, spoil, error, says):
    root = make_images(tmp_path / 'data')
    spoil(root)
    with pytest.raises(error, match=says):
        open_data(root)


@pytest.mark.parametrize(
    ('dataset', 'says'),
    [
        ('torch/cifar10', 'cannot open the train split of torch/cifar10.*--download'),
        ('torch/nothing', 'cannot open the train split of torch/nothing'),
        ('wds/shards', 'read as a stream'),
    ],
)
def test_wrong_data_set_by_name_is_refused(tmp_path, dataset, says):
    with pytest.raises(ValueError, match=says):
        open_data(tmp_path, dataset)


@pytest.mark.parametrize('val_name', ['val', 'validation', 'test'])
def test_class_folders_are_opened(tmp_path, val_name):
    train, val = open_data(make_images(tmp_path, val_name=val_name))
    assert (train.classes, len(train), len(val)) == (['cat', 'dog', 'owl'], 12, 6)
    image, label = train.load(5)
    assert (image.mode, image.size, label) == ('RGB', (12, 12), 1)
    assert Path(train.name(5)).parts[-3:] == ('train', 'dog', '1.png')


def test_data_set_by_name_is_opened(tmp_path):
    """torchvision's image folder stands for the data sets that are no timm readers."""
    root = make_images(tmp_path)
    train, val = open_data(root, 'torch/image_folder')
    assert (train.classes, len(train), len(val), train.load(11)[1]) == (['cat', 'dog', 'owl'], 12, 6, 2)
    assert train.name(3) == 'train[3]'
    assert find_broken(train) == {}


@pytest.mark.parametrize('suffix', ['jpg', 'png'])
def test_broken_images_are_found_named_and_left_out(tmp_path, suffix):
    root = make_images(tmp_path, size=64, suffix=suffix)
    truncate(root / f'train/dog/1.{suffix}')  # its header is whole
    (root / f'train/owl/3.{suffix}').write_bytes(b'no image at all')
    train, val = open_data(root)
    broken = find_broken(train, progress=False)
    assert find_broken(val, progress=False) == {}
    assert [Path(text.split(': ')[0]).parts[-2:] for text in broken.values()] == [
        ('dog', f'1.{suffix}'),
        ('owl', f'3.{suffix}'),
    ]
    kept = train.without(broken)
    assert len(kept) == 10
    assert find_broken(kept, progress=False) == {}
    assert Path(kept.name(5)).parts[-2:] == ('dog', f'2.{suffix}')


def test_broken_image_met_in_training_is_an_error_with_its_name(tmp_path):
    """Not its neighbour in its place, which is what timm's data set does."""
    root = make_images(tmp_path)
    truncate(root / 'train/dog/1.png')
    train, _ = open_data(root)
    with pytest.raises(ValueError, match=r'broken image .*dog.1\.png'):
        train.load(5)


@pytest.mark.parametrize('size', [12, 96])
def test_augmentation_depends_on_seed_epoch_and_index_alone(tmp_path, size):
    train, _ = open_data(make_images(tmp_path, size=20))
    config = {'input_size': (3, size, size), **MEAN_STD}
    transform, _ = create_transforms(config, auto_augment='rand-m9-mstd0.5' if size > 64 else None)

    def epoch(number, seed=0, **loading):
        sampler = EpochSampler(len(train), seed, shuffle=True)
        sampler.epoch = number
        loader = DataLoader(TransformedSamples(train, transform, seed), sampler=sampler, **loading)
        return torch.cat([images for images, _ in loader])

    reference = epoch(1, batch_size=4)
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    torch.manual_seed(5)
    for loading in ({'batch_size': 3}, {'batch_size': 4, 'num_workers': 2, 'persistent_workers': True}):
        assert torch.equal(epoch(1, **loading), reference)
    data = TransformedSamples(train, transform, 0)
    assert not torch.equal(data[1, 3][0], data[2, 3][0])
    assert not torch.equal(data[1, 3][0], TransformedSamples(train, transform, 1)[1, 3][0])
    assert data[1, 3][0].shape == (3, size, size)


def test_order_depends_on_seed_and_epoch():
    def order(seed, epoch, shuffle=True):
        sampler = EpochSampler(20, seed, shuffle=shuffle)
        sampler.epoch = epoch
        return list(sampler)

    assert order(0, 3) == order(0, 3)
    assert sorted(order(0, 3)) == [(3, i) for i in range(20)] == order(0, 3, shuffle=False)
    places = {tuple(i for _, i in order(seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(places) == 9
    assert len({derive_seed(0, a, b, c) for a in range(3) for b in range(5) for c in range(5)}) == 75


def test_seeded_restores_the_generators():
    def draw():
        return torch.rand(1).item(), np.random.rand(), random.random()  # noqa: NPY002

    def start():
        torch.manual_seed(1)
        np.random.seed(1)  # noqa: NPY002
        random.seed(1)

    start()
    undisturbed = [draw(), draw()]
    start()
    first = draw()
    drawn = []
    for _ in range(2):
        with seeded(7):
            drawn.append(draw())
    assert drawn[0] == drawn[1]
    assert [first, draw()] == undisturbed


@pytest.mark.parametrize('size', [12, 96])
def test_validation_is_the_normalised_image(size):
    """Images that fit already: nothing but the model's mean and standard deviation is applied."""
    pixels = np.random.default_rng(0).integers(0, 255, (size, size, 3), dtype=np.uint8)
    config = {'input_size': (3, size, size), **MEAN_STD, 'crop_pct': 1.0}
    _, transform = create_transforms(config)
    expected = (pixels / 255 - np.array(MEAN_STD['mean'])) / np.array(MEAN_STD['std'])
    torch.testing.assert_close(
        transform(Image.fromarray(pixels)), torch.from_numpy(expected).permute(2, 0, 1).float(), atol=1e-5, rtol=1e-5
    )


def test_flips_can_be_switched_off_and_policies_need_large_images():
    left = Image.fromarray(np.tile(np.arange(12, dtype=np.uint8)[None, :, None], (12, 1, 3)))
    for hflip, flipped in ((0.0, {False}), (1.0, {True}), (0.5, {False, True})):
        transform, _ = create_transforms({'input_size': (3, 12, 12), **MEAN_STD}, hflip=hflip)
        found = set()
        for i in range(20):
            with seeded(i):
                row = transform(left)[0, 6]
            found.add(bool(row[7] < row[4]))
        assert found == flipped
    with pytest.raises(ValueError, match='larger than 64 px'):
        create_transforms({'input_size': (3, 32, 32), **MEAN_STD}, auto_augment='rand-m9')
