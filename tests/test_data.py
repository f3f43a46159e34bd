"""Image data: faults are found before any work, and a batch depends only on the seed, the epoch and the step."""

import io
import os
import pickle
import random
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import mostly_slow
from PIL import Image
from timm.data import ImageDataset
from timm.data.readers.reader_image_folder import ReaderImageFolder
from torch import nn
from torch.nn import functional as F
from torchvision.datasets import FakeData

from sase_blocks import data
from sase_blocks.data import (
    Batches,
    SmallImages,
    TransformedSamples,
    create_transforms,
    derive_seed,
    image_config,
    inspect_images,
    listing,
    load_small_images,
    open_data,
    open_split,
    same_data,
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


def disguise(root):
    """The class cat gets a name that is not UTF-8, as one of its images does, and all of them lie in folders below."""
    for split in ('train', 'val'):
        folder = os.fsencode(root / split)
        os.rename(folder + b'/cat', folder + b'/c\xe4t')
        for i, name in enumerate(sorted(os.listdir(folder + b'/c\xe4t'))):
            part = folder + b'/c\xe4t/part%d' % (i % 2)
            os.makedirs(part, exist_ok=True)
            os.rename(folder + b'/c\xe4t/' + name, part + (b'/\xff\n' if i == 0 else b'/') + name)
    return root


def truncate(path, part=0.7):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])


def bind(path):
    """A socket, which stays in its folder when it is closed. Its path may be too long for the system."""
    here = os.getcwd()
    os.chdir(path.parent)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path.name)
    os.chdir(here)


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
        (
            lambda r: (remove(r, '*/[do]*/*'), remove(r, '*/[do]*')),
            ValueError,
            r'the train split has one class \(cat\)',
        ),
        (lambda r: (remove(r, 'val/owl/*'), remove(r, 'val/owl')), ValueError, 'only in train: owl; only in val: none'),
        (
            lambda r: [shutil.rmtree(r / 'val' / c) for c in ('owl', 'dog')],
            ValueError,
            'only in train: dog, owl; only in',
        ),
        (lambda r: remove(r, '*/owl/*'), ValueError, 'class folders without an image in .*train: owl'),
        (lambda r: remove(r, 'val/[do]*/*'), ValueError, 'class folders without an image in .*val: dog, owl'),
        (lambda r: (r / 'val/dog').rename(r / 'val/hog'), ValueError, 'only in train: dog; only in val: hog'),
        (lambda r: (r / 'train/cat/0.png').rename(r / 'train/0.png'), ValueError, 'images outside any class folder'),
        (lambda r: os.mkfifo(r / 'train/cat/a.png'), ValueError, r'cat.a\.png is not a regular file'),
        (lambda r: os.mkfifo(r / 'val/owl/a.jpg'), ValueError, r'owl.a\.jpg is not a regular file'),
        (lambda r: bind(r / 'train/cat/a.png'), ValueError, r'cat.a\.png is not a regular file'),
        (lambda r: (r / 'train/cat/a.png').symlink_to('/dev/null'), ValueError, r'cat.a\.png is not a regular file'),
        (lambda r: (r / 'train/cat/a.png').symlink_to('gone.png'), ValueError, r'cat.a\.png is not a regular file'),
        (lambda r: (r / 'train/cat/part').symlink_to('gone'), ValueError, r'cat.part is not a regular file'),
        (lambda r: (r / 'train/pig').symlink_to('gone'), ValueError, r'train.pig is not a regular file'),
        (lambda r: (r / 'train/cat/a.png').mkdir(), ValueError, r'cat.a\.png is a folder without images'),
        (lambda r: (r / 'train/cat/all').symlink_to('../..'), ValueError, 'is a link to a folder that it lies in'),
    ],
)
def test_wrong_folder_is_refused(tmp_path, spoil, error, says):
    root = make_images(tmp_path / 'data')
    spoil(root)
    with pytest.raises(error, match=says):
        open_data(root)


FOLDERS = (
    'folder',
    'image_folder',
    'torch',
    'any/Name',
    'torch/image_folder',
    'Torch/Folder',
)  # of timm, for class folders


@pytest.mark.parametrize('dataset', FOLDERS)
def test_class_folders_by_name_are_read_as_those_without(tmp_path, dataset):
    root = make_images(tmp_path / 'data')
    (root / 'train/dog/part').mkdir()
    (root / 'train/dog/0.png').rename(root / 'train/dog/part/0.png')
    for hidden in ('train/.hidden/0.png', 'train/cat/.0.png', 'train/__MACOSX/0.png'):
        (root / hidden).parent.mkdir(exist_ok=True)
        shutil.copy(root / 'val/cat/0.png', root / hidden)
    truncate(root / 'train/owl/1.png')
    by_name, plain = open_data(root, dataset), open_data(root)
    assert [(s.classes, s.source) for s in by_name] == [(s.classes, s.source) for s in plain]
    (text,) = inspect_images(by_name[0])[0].values()
    assert text.startswith(str(root / 'train/owl/1.png'))

    shutil.copytree(root / 'val', root / 'extra')
    assert open_split(root, dataset, split='extra').source.root == str(root / 'extra')
    for split in ('gone', 'test'):  # not the root, nor another split in its place
        with pytest.raises(FileNotFoundError, match=rf'has no folder {split} \(it holds: extra, train, val\)'):
            open_data(root, dataset, val_split=split)
    os.mkfifo(root / 'train/cat/a.png')
    with pytest.raises(ValueError, match=r'cat.a\.png is not a regular file'):
        open_data(root, dataset)
    with pytest.raises(FileNotFoundError, match='there is no data folder'):
        open_data(tmp_path / 'gone', dataset)


def test_archive_is_read_without_an_open_file_that_threads_and_workers_would_share(tmp_path):
    make_images(tmp_path)
    plain = open_split(tmp_path)
    inner = tmp_path / 'inner'
    for name in plain.classes:
        shutil.make_archive(str(inner / name), 'tar', tmp_path / 'train', name)
    for number, folder in enumerate((tmp_path / 'train', inner)):  # images, or an archive for each class
        archive = shutil.make_archive(str(tmp_path / f'{number}'), 'tar', folder)
        train = open_split(archive, 'folder', num_classes=3)
        assert (train.classes, len(train)) == (['0', '1', '2'], 12)
        assert inspect_images(train)[0] == {}
        again = pickle.loads(pickle.dumps(train))  # no open file is left in it
        assert [again.read(i) for i in range(12)] == [plain.read(i) for i in range(12)], folder
        truncate(Path(archive))
        assert 0 < len(inspect_images(train)[0]) < 12


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


class Reader(list):
    """A reader of timm's, as Hugging Face's data sets have: open files and labels."""

    class_to_idx = {'dog': 1, 'cat': 0}  # noqa: RUF012

    def __getitem__(self, index):
        content, label = super().__getitem__(index)
        return io.BytesIO(content), label


def test_data_set_by_name_is_opened(tmp_path, monkeypatch):
    """One that torchvision decodes, one that a reader of timm gives as files, and one in memory."""
    root = make_images(tmp_path)
    good = (root / 'train/cat/0.png').read_bytes()
    sources = {
        'decoded': FakeData(5, (3, 9, 9), num_classes=2),
        'reader': ImageDataset(root='', reader=Reader([(good, 0), (good[:-90], 1), (good, 1), (good, 2)])),
        'array': FakeData(5, (3, 9, 9), num_classes=2),
    }
    sources['array'].data = np.arange(5, dtype=np.uint8)
    sources['array'].targets = [0, 1, 1, 0, 1]
    monkeypatch.setattr(data, 'create_dataset', lambda name, **options: sources[name.removeprefix('torch/')])
    train = open_split(root, 'torch/decoded', num_classes=2)
    assert (train.classes, len(train), train.name(3), train.load(3)[0].size) == (['0', '1'], 5, 'train[3]', (9, 9))
    assert inspect_images(train)[0] == {}
    train = open_split(root, 'torch/reader')
    assert (train.classes, train.load(2)[0].size, train.part([1, 2]).labels()) == (['cat', 'dog'], (12, 12), [1, 1])
    broken = inspect_images(train)[0]
    assert list(broken) == [1, 3]
    assert broken[3] == 'train[3]: its label 2 is not one of the 2 classes'
    prints = set()
    for sources['array'].data[0] in (0, 7):
        broken, fingerprint = inspect_images(open_split(root, 'torch/array', num_classes=2))
        assert broken == {}
        prints.add(fingerprint)
    assert len(prints) == 2


@pytest.mark.parametrize(('dataset', 'count'), [('', 3), ('torch/image_folder', 3)])
def test_number_of_classes_that_the_data_contradict_is_refused(tmp_path, dataset, count):
    root = make_images(tmp_path)
    open_data(root, dataset, num_classes=count)
    for wrong in (count - 1, count + 7):
        for opened in (open_data, open_split):
            with pytest.raises(ValueError, match=f'num_classes is {wrong}, but train has 3 classes .*cat, dog, owl'):
                opened(root, dataset, num_classes=wrong)


def test_classes_are_the_first_level_and_hidden_names_are_ignored(tmp_path):
    root = make_images(tmp_path, classes=('cat', 'dog'))
    plain = [(s.classes, s.source.samples) for s in open_data(root)]
    for hidden in ('.ipynb_checkpoints', '.git/objects', '__MACOSX/cat', '@eaDir', 'cat/.ipynb_checkpoints'):
        for split in ('train', 'val'):
            (root / split / hidden).mkdir(parents=True)
            shutil.copy(root / 'val/cat/0.png', root / split / hidden / '0.png')
    for junk in ('.DS_Store', '._a.jpg', 'Thumbs.db', 'readme.txt', '.hidden.png'):
        for folder in ('train', 'train/cat', 'val/dog'):
            (root / folder / junk).write_bytes(b'nothing')
    assert [(s.classes, s.source.samples) for s in open_data(root)] == plain

    for i, name in enumerate(('cat/part1/a.png', 'cat/part2/deep/b.TIF', 'dog/part1/c.webp', 'dog/x.png/d.bmp')):
        for split in ('train', 'val'):
            (root / split / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new('L', (5, 5), i).save(root / split / name)
    for samples, own in zip(open_data(root), (4, 2), strict=True):
        assert samples.classes == ['cat', 'dog']
        assert samples.labels() == [0] * (own + 2) + [1] * (own + 2)
        assert [samples.name(i).endswith(('b.TIF', 'd.bmp')) for i in (own + 1, 2 * own + 3)] == [True, True]
    shutil.rmtree(root / 'train/dog')
    (root / 'train/dog').symlink_to(root / 'val/dog')  # folders and files may be links
    assert len(open_split(root)) == 6 + 4


def test_order_is_timms_and_not_the_file_systems(tmp_path, monkeypatch):
    """Runs and results of earlier versions depend on it. timm leaves open the order of names that differ in case."""
    names = ['b10', 'b2', 'B1', 'a', 'a b', 'a-1', 'ä']
    files = ['10.png', '9.png', 'img2.png', 'img10.png', 'IMG3.PNG', '007.jpg']
    for name in names:
        (tmp_path / 'train' / name).mkdir(parents=True)
        for file in files:
            (tmp_path / 'train' / name / file).touch()
    train = open_split(tmp_path)
    theirs = ReaderImageFolder(str(tmp_path / 'train'))
    assert train.source.samples == theirs.samples
    assert {name: i for i, name in enumerate(train.classes)} == theirs.class_to_idx
    for name in ('1.png', '01.png', 'A.png', 'a.png'):
        (tmp_path / 'train' / 'a' / name).touch()
    (tmp_path / 'train' / 'B2').mkdir()
    (tmp_path / 'train' / 'B2' / '1.png').touch()
    first, real = open_split(tmp_path), os.scandir

    class Backwards:
        def __init__(self, path):
            with real(path) as entries:
                self.entries = sorted(entries, key=lambda entry: entry.name, reverse=self.turned)

        turned = True
        __enter__ = lambda self: iter(self.entries)  # noqa: E731
        __exit__ = lambda self, *_: None  # noqa: E731

    for Backwards.turned in (True, False):
        monkeypatch.setattr(os, 'scandir', Backwards)
        again = open_split(tmp_path)
        assert (again.classes, again.source.samples) == (first.classes, first.source.samples)


def test_names_that_are_not_utf8(tmp_path):
    root = make_images(tmp_path, classes=('cat', 'dog'))
    os.rename(os.fsencode(root / 'train/cat'), os.fsencode(root) + b'/train/c\xe4t')
    os.rename(os.fsencode(root / 'train/dog/1.png'), os.fsencode(root) + b'/train/dog/\xff\n.png')
    with pytest.raises(ValueError, match=r'only in train: c\\udce4t; only in val: cat') as caught:
        open_data(root)
    train = open_split(root)
    assert train.labels() == [0] * 4 + [1] * 4
    broken, fingerprint = inspect_images(train)
    assert (broken, len(fingerprint), len(listing(train))) == ({}, 16, 16)
    truncate(Path(train.source.samples[7][0]))
    (text,) = inspect_images(train)[0].values()
    with pytest.raises(ValueError, match='broken image') as also:
        train.load(7)
    for shown in (text, str(caught.value), str(also.value)):
        assert shown.isprintable()
        shown.encode()
    assert r'dog/\udcff\n.png' in text


@pytest.mark.parametrize('suffix', ['jpg', 'png'])
def test_broken_images_are_found_named_and_left_out(tmp_path, suffix):
    root = make_images(tmp_path, size=64, suffix=suffix)
    truncate(root / f'train/dog/1.{suffix}')  # its header is whole
    (root / f'train/owl/3.{suffix}').write_bytes(b'no image at all')
    train, val = open_data(root)
    broken = inspect_images(train)[0]
    assert broken[11] == f'{root}/train/owl/3.{suffix}: cannot identify image file'
    with pytest.raises(ValueError, match=rf'3\.{suffix}: cannot identify image file; replace'):
        train.load(11)
    assert inspect_images(val)[0] == {}
    assert [Path(text.split(': ')[0]).parts[-2:] for text in broken.values()] == [
        ('dog', f'1.{suffix}'),
        ('owl', f'3.{suffix}'),
    ]
    kept = train.part([i for i in range(12) if i not in broken])
    assert len(kept) == 10
    assert inspect_images(kept)[0] == {}
    assert Path(kept.name(5)).parts[-2:] == ('dog', f'2.{suffix}')


def test_broken_image_met_in_training_is_an_error_with_its_name(tmp_path):
    """Not its neighbour in its place, which is what timm's data set does."""
    root = make_images(tmp_path)
    truncate(root / 'train/dog/1.png')
    train, _ = open_data(root)
    with pytest.raises(ValueError, match=r'broken image .*dog.1\.png'):
        train.load(5)


# ---- the same data ----


def swap(folder):
    """All images of a class exchanged, under the old names; these noisy ones keep even their sizes."""
    for path in sorted(folder.iterdir()):
        size = path.stat().st_size
        Image.fromarray(255 - np.asarray(Image.open(path))).save(path)
        assert path.stat().st_size == size


@pytest.mark.parametrize(
    ('change', 'contents', 'names'),
    [
        (lambda r: None, False, False),
        (lambda r: [os.utime(path) for path in r.rglob('*.png')], False, False),
        (lambda r: (r / 'train').rename(r / 'training'), False, False),
        (lambda r: swap(r / 'train/dog'), True, False),
        (lambda r: Image.new('RGB', (12, 12)).save(r / 'train/dog/0.png'), True, True),
        (lambda r: (r / 'train/dog/3.png').rename(r / 'train/dog/4.png'), False, True),
        (lambda r: (r / 'train/dog/3.png').unlink(), True, True),
        (lambda r: (r / 'train/dog').rename(r / 'train/pig'), True, True),
        (lambda r: (r / 'train/cat/3.png').rename(r / 'train/dog/3.png'), True, True),
        (lambda r: (r / 'train/dog/0.png').rename(r / 'train/cat/9.png'), True, True),  # in the same order
    ],
    ids=['nothing', 'times', 'root', 'swap', 'one', 'renamed', 'one less', 'class renamed', 'moved', 'label'],
)
def test_fingerprints(tmp_path, change, contents, names):
    root = make_images(tmp_path)
    before = open_split(root)
    before = inspect_images(before)[1], listing(before)
    change(root)
    after = open_split(root)
    assert (inspect_images(after)[1] != before[0]) == contents
    assert (listing(after) != before[1]) == names


def test_facts_are_compared_as_far_as_both_runs_know_them():
    facts = {'train': 3, 'fingerprint': 'a', 'listing': 'b'}
    for other, same in (
        (facts, True),
        ({**facts, 'fingerprint': None}, True),  # a run without the check
        ({'train': 3}, True),  # a run of an earlier version
        ({**facts, 'listing': 'c'}, True),  # renamed
        ({**facts, 'train': 4}, False),
        ({**facts, 'fingerprint': 'c'}, False),
        ({**facts, 'fingerprint': None, 'listing': 'c'}, False),
    ):
        assert same_data(other, facts) is same_data(facts, other) is same


# ---- channels ----


@pytest.mark.parametrize(
    ('name', 'arguments', 'img_size', 'expected'),
    [
        ('resnet20_cifar', {}, None, ((3, 32, 32), 3)),
        ('resnet20_cifar', {'in_chans': 1}, 12, ((1, 12, 12), 1)),
        ('test_efficientnet', {'in_chans': 1}, None, ((1, 160, 160), 1)),
        ('test_vit', {'in_chans': 1}, None, ((1, 160, 160), 1)),
        ('resnet20_cifar', {'in_chans': 5}, None, ((5, 32, 32), 5)),
    ],
)
def test_channels_are_those_of_the_model(name, arguments, img_size, expected):
    model = timm.create_model(name, **arguments)
    config = image_config(model, img_size)
    assert (config['input_size'], len(config['mean'])) == expected
    assert len(config['std']) == expected[1]


def test_channels_of_folded_stems():
    """TResNet's first convolution has 16 times the channels of the images."""
    from timm.layers import SpaceToDepth

    net = nn.Sequential(SpaceToDepth(4), nn.Conv2d(48, 8, 1))
    assert image_config(net)['input_size'] == (3, 224, 224)


@pytest.mark.parametrize('size', [12, 96])
def test_grey_images_are_loaded_for_one_channel(tmp_path, size):
    train, _ = open_data(make_images(tmp_path, size=20))
    with pytest.raises(ValueError, match='takes images of 4 channels; image files have 1'):
        train.in_channels(4)
    grey = train.in_channels(1)
    assert (train.load(0)[0].mode, grey.load(0)[0].mode) == ('RGB', 'L')
    config = {**MEAN_STD, 'input_size': (1, size, size), 'mean': (0.4,), 'std': (0.3,)}
    for transform in create_transforms(config, auto_augment='rand-m9-mstd0.5-n4' if size > 64 else None):
        samples = TransformedSamples(grey, transform, 0)
        for i in range(len(samples)):
            assert samples[0, i][0].shape == (1, size, size)


# ---- order and augmentation ----


def batches_of(kind, root, workers=0, seed=0, **more):
    """Batches of augmented images: as a training loads small and large ones, and as a search holds small ones."""
    train, _ = open_data(root)
    size = 96 if kind == 'large' else 12
    if kind == 'bytes':
        images = load_small_images(train, (size, size))
        return Batches(SmallImages(images, torch.as_tensor(train.labels()), (0.4,), (0.3,), seed, 1, hflip=0.5), **more)
    transform, _ = create_transforms(
        {'input_size': (3, size, size), **MEAN_STD}, auto_augment='rand-m9-mstd0.5' if kind == 'large' else None
    )
    return Batches(TransformedSamples(train, transform, seed), workers=workers, **more)


@pytest.mark.parametrize('kind', mostly_slow(['small', 'large', 'bytes'], 'small', 'bytes'))
def test_a_batch_depends_on_seed_epoch_and_step_alone(tmp_path, kind):
    root = make_images(tmp_path, size=20)
    first = batches_of(kind, root)
    whole = list(first.epoch(1, 4, 0, 3))
    images, labels = map(torch.cat, zip(*whole, strict=True))
    assert images.shape == (12, 3, *[96 if kind == 'large' else 12] * 2)
    assert sorted(labels.tolist()) == sorted(open_data(root)[0].labels())
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    torch.manual_seed(5)
    workers = batches_of(kind, root, workers=2)
    for case, steps in {
        'again': first.epoch(1, 4, 0, 3),
        'other batches': first.epoch(1, 3, 0, 4),
        'by processes': workers.epoch(1, 4, 0, 3),
        'by the same processes': workers.epoch(1, 4, 0, 3),
        'channels last': batches_of(kind, root, memory_format=torch.channels_last).epoch(1, 4, 0, 3),
    }.items():
        assert torch.equal(torch.cat([batch for batch, _ in steps]), images), case
    assert next(iter(batches_of(kind, root, memory_format=torch.channels_last).epoch(1, 4, 0, 1)))[0].is_contiguous(
        memory_format=torch.channels_last
    )
    for step, (batch, _) in enumerate(workers.epoch(1, 4, 1, 3), start=1):  # a resumed epoch
        assert torch.equal(batch, whole[step][0])
    shares = zip(*(list(first.epoch(1, 4, 0, 3, rank, 2)) for rank in (0, 1)), strict=True)
    for (batch, _), parts in zip(whole, shares, strict=True):
        assert torch.equal(torch.cat([part for part, _ in parts]), batch)

    older = first.epoch(1, 4, 0, 3)
    next(older)
    next(first.epoch(2, 4, 0, 3))
    with pytest.raises(RuntimeError, match='a newer epoch of these batches has begun'):
        next(older)

    def of_image(batches, epoch, label):
        """The first image of a class; which one that is differs with the order."""
        return next(batch[labels == label][0] for batch, labels in batches.epoch(epoch, 12, 0, 1))

    for other in (of_image(first, 2, 1), of_image(batches_of(kind, root, seed=1), 1, 1)):
        assert not torch.equal(other, of_image(first, 1, 1))


def test_an_image_is_augmented_anew_in_each_epoch_and_with_each_seed(tmp_path):
    samples = batches_of('small', make_images(tmp_path)).images
    for other in (samples[2, 3], TransformedSamples(samples.samples, samples.transform, 1)[1, 3]):
        assert not torch.equal(samples[1, 3][0], other[0])
        assert samples[1, 3][1] == other[1] == 0
    assert TransformedSamples(samples.samples, samples.transform, 0, labels=[7] * 12)[1, 3][1] == 7


def test_order_and_augmentation_of_existing_runs():
    """With other values, a run of an earlier version would not resume as it began."""

    def part(stream):
        images = torch.zeros(5, 1, 4, 4, dtype=torch.uint8)
        return SmallImages(images, torch.arange(5), (0,), (1,), 3, stream, None if stream is None else 0.5)

    def order(epoch, count=5, stream=None, **more):
        (batch,) = Batches(part(stream), **more).epoch(epoch, count, 0, 1)
        return batch[1].tolist()

    assert [order(0), order(1)] == [[1, 0, 4, 3, 2], [1, 4, 3, 0, 2]]  # of a training
    assert order(0, 12, stream=0) == [1, 2, 3, 0, 4, 3, 2, 1, 4, 0, 3, 1]  # of a search, each time in a new order
    assert order(0, 12, stream=1) == [0, 4, 2, 3, 1, 1, 3, 0, 4, 2, 0, 2]
    assert order(1, stream=1) == [1, 4, 3, 2, 0]
    assert order(7, 7, shuffle=False) == [0, 1, 2, 3, 4, 0, 1]
    images = part(1)
    next(Batches(images).epoch(7, 5, 0, 1))
    assert images.drawn[1].tolist() == [[8, 1, 0], [7, 8, 1], [2, 1, 1], [4, 2, 1], [5, 4, 0]]
    assert len({derive_seed(0, a, b, c) for a in range(3) for b in range(5) for c in range(5)}) == 75


@pytest.mark.parametrize(('world', 'sizes'), [(1, [4, 4, 2]), (2, [2, 2, 2])])
def test_every_image_comes_once(world, sizes):
    """Of several processes the last batch is full, and starts again at the first image."""
    images = SmallImages(torch.zeros(10, 1, 4, 4, dtype=torch.uint8), torch.arange(10), (0,), (1,))
    for shuffle in (False, True):
        batches = Batches(images, shuffle=shuffle)
        parts = [[labels for _, labels in batches.once(4, rank=rank, world=world)] for rank in range(world)]
        assert [len(labels) for labels in parts[0]] == sizes
        seen = torch.cat([torch.cat(step) for step in zip(*parts, strict=True)]).tolist()
        assert sorted(seen[:10]) == list(range(10))
        assert shuffle or seen == [i % 10 for i in range(len(seen))]
        assert [labels.tolist() for _, labels in batches.once(4, 5)] == [seen[:4], seen[4:5]]
        assert sum(len(labels) for _, labels in batches.once(4, 99)) == 10


@pytest.mark.parametrize('workers', [0, 1])
def test_broken_image_of_a_batch_is_an_error_of_one_line(tmp_path, workers):
    root = make_images(tmp_path)
    truncate(root / 'train/dog/1.png')
    with pytest.raises(ValueError, match=r'^broken image [^\n]*dog.1\.png: [^\n]*; replace or remove it[^\n]*$'):
        list(batches_of('small', root, workers).epoch(0, 4, 0, 3))


def test_flip_and_crop_of_small_images():
    images = torch.randint(0, 255, (48, 3, 12, 12), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    batches = Batches(SmallImages(images, torch.arange(48), [0.0] * 3, [1 / 255] * 3, hflip=1.0))
    windows = F.pad(images.flip(3), (4,) * 4).unfold(2, 12, 1).unfold(3, 12, 1).flatten(2, 3)  # (N, C, 81, 12, 12)
    places = set()
    for image, label in zip(*next(iter(batches.epoch(0, 48, 0, 1))), strict=True):
        ((place,),) = (windows[label].float() == image[:, None]).flatten(2).all(-1).all(0).nonzero(as_tuple=True)
        places.add(int(place))
    assert len(places) > 20


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


@pytest.mark.slow
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
