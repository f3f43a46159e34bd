"""Image data for training and search: class folders or any data set that timm knows by name, checked before any work.

Order and augmentation depend only on the seed, the epoch and the image. A run therefore does not depend on the number
of loading or training processes, and a resumed run equals an uninterrupted one.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import ImageDataset, create_dataset, create_transform, resolve_data_config
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from timm.layers import SpaceToDepth
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.datasets import DatasetFolder
from tqdm import tqdm

from .images import (
    LAYOUT,
    TRAIN_FOLDERS,
    VAL_FOLDERS,
    ImageFiles,
    check_depth,
    decode_image,
    find_images,
    split_folder,
)
from .reading import printable, some

STREAMS = ('hfids', 'tfds', 'wds')  # prefixes of timm's names of data sets
MODES = {1: 'L', 3: 'RGB'}  # Pillow's image mode for each number of channels
SMALL = 64  # px; images up to this size are augmented as for CIFAR, larger ones as for ImageNet
PADDING = 4  # px, of the random crop of small images

# Streams of random numbers; see derive_seed.
SHUFFLE, AUGMENT, MODEL = 1, 2, 3

Transform = Callable[[Image.Image], Tensor]


@dataclass(frozen=True)
class Samples:
    """One split of a data set: images as they are stored, without transforms.

    Attributes:
        source: ``ImageFiles``, or a timm or torchvision data set with an index.
        classes: class names in the order of their labels.
        indices: the used images of ``source``.
        split: its name, for messages.
        mode: Pillow's name for what ``load`` returns, 'RGB' or 'L' (grey); see ``in_channels``.
        fingerprint: of the images and their labels, see ``inspect_images``; None before the images are checked.
    """

    source: Any
    classes: list[str]
    indices: Sequence[int]
    split: str
    mode: str = 'RGB'
    fingerprint: str | None = None

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, position: int) -> tuple[bytes | Image.Image, int]:
        """Image and label number ``position`` as they are stored.

        The image is the content of a file, or an image if the data set decodes by itself.
        """
        index = self.indices[position]
        stored: bytes | Image.Image
        if isinstance(self.source, ImageFiles):
            path, label = self.source.samples[index]
            if not os.path.isfile(path):  # reading a pipe would block
                raise ValueError('not a regular file')
            with open(path, 'rb') as file:
                stored = file.read()
        elif isinstance(self.source, ImageDataset) and isinstance(self.source.reader, ReaderImageInTar):
            # The reader's own open file has one position, which threads and forked workers would move for each other.
            reader = self.source.reader
            (member, archive, inner), label = reader.samples[index], reader.targets[index]
            with Path(reader.root, archive or '').open('rb') as file:
                file.seek(member.offset_data + (inner.offset_data if inner else 0))
                stored = file.read(member.size)
        elif isinstance(self.source, ImageDataset):
            file, label = self.source.reader[index]
            with file:
                stored = file.read()
        else:  # torchvision's
            stored, label = self.source[index]
        if not 0 <= label < len(self.classes):
            raise ValueError(f'its label {label} is not one of the {len(self.classes)} classes')
        return stored, int(label)

    def load(self, position: int) -> tuple[Image.Image, int]:
        """Image (upright, in ``mode``) and label number ``position``.

        Raises:
            ValueError: the image cannot be decoded; names it. (timm would return a neighbouring image instead.)
        """
        try:
            stored, label = self.read(position)
            return decode_image(stored, self.mode)[0], label
        except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, ...
            raise ValueError(
                f'broken image {self.name(position)}: {" ".join(str(error).split())}; replace or remove it, or '
                f'leave it out with --skip-broken'
            ) from error

    def name(self, position: int) -> str:
        """The file of an image, or the split and its index if it has none, for messages."""
        index = self.indices[position]
        if isinstance(self.source, ImageFiles):
            return printable(self.source.samples[index][0])
        return f'{self.split}[{index}]'

    def labels(self) -> list[int]:
        """The label of every image, without decoding if the data set lists them."""
        if isinstance(self.source, ImageFiles):
            return [self.source.samples[index][1] for index in self.indices]
        targets = getattr(self.source, 'targets', None)
        if targets is not None:
            return [int(targets[index]) for index in self.indices]
        return [self.read(position)[1] for position in range(len(self))]

    def part(self, positions: Sequence[int]) -> Samples:
        """Only these positions of the split."""
        return replace(self, indices=[self.indices[position] for position in positions], fingerprint=None)

    def in_channels(self, channels: int) -> Samples:
        """The same split, loaded in grey for 1 channel and in colour for 3.

        Raises:
            ValueError: any other number of channels.
        """
        if channels not in MODES:
            raise ValueError(f'the model takes images of {channels} channels; image files have 1 (grey) or 3 (colour)')
        return replace(self, mode=MODES[channels])


# ---- opening ----


def open_data(
    root: str | os.PathLike[str],
    dataset: str = '',
    *,
    train_split: str = 'train',
    val_split: str = 'validation',
    download: bool = False,
    num_classes: int | None = None,
) -> tuple[Samples, Samples]:
    """Open the training and the validation split of a data set.

    Args:
        root: a folder that holds train/ and val/, validation/ or test/, each with one folder per class; for a data set
            by name, where it is or will be stored.
        dataset: '' for class folders, or a name of ``timm.data.create_dataset``: 'torch/cifar10', 'hfds/USER/NAME', ...
            A name for which timm reads class folders, such as 'folder', opens them as '' does, but by their splits.
        train_split, val_split: the splits of a data set by name; for class folders by name, their folders in ``root``.
        download: whether a data set by name may be downloaded.
        num_classes: needed if the data set by name does not define it; otherwise it must be right.

    Classes are the folders directly under train/. They may have subfolders. Names that start with a dot are ignored,
    and so are the folders that macOS and NAS systems add (``SIDE_FOLDERS``).

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no images in a split or a class folder; images outside class folders; something named like an image
            that is not a regular file; a single class; classes that differ between the splits or from ``num_classes``;
            an unknown name.
    """
    options: dict[str, Any] = {'download': download, 'num_classes': num_classes}
    train = open_split(root, dataset, train_split, **options)
    val = open_split(root, dataset, val_split if dataset else 'val', min_classes=1, **options)
    if train.classes != val.classes:
        only_train = sorted(set(train.classes) - set(val.classes))
        only_val = sorted(set(val.classes) - set(train.classes))
        raise ValueError(
            f'the classes of {train.split} and {val.split} differ: '
            f'only in {train.split}: {some(only_train)}; only in {val.split}: {some(only_val)}'
        )
    return train, val


def open_split(
    root: str | os.PathLike[str],
    dataset: str = '',
    split: str = 'train',
    *,
    download: bool = False,
    num_classes: int | None = None,
    min_classes: int = 2,
) -> Samples:
    """Open one split; arguments and errors as in ``open_data``. Without ``dataset``, ``split`` is 'train' or 'val'."""
    root = Path(root)
    if dataset and not _is_folder(dataset, root, split):
        samples = _open_named(dataset, root, split, download, num_classes)
    else:
        if not root.is_dir():
            raise FileNotFoundError(f'there is no data folder {root}; {LAYOUT}')
        # As in timm, these splits have other names, too. Unlike in timm, the root never replaces them.
        same = next((names for names in (TRAIN_FOLDERS, VAL_FOLDERS) if split in names and split != 'test'), ())
        files, classes = find_images(split_folder(root, list(dict.fromkeys((split, *same)))))
        samples = Samples(files, classes, range(len(files.samples)), split)
    if len(samples) == 0:
        raise ValueError(f'the {split} split of {dataset or root} holds no images')
    if num_classes not in (None, len(samples.classes)):
        raise ValueError(
            f'num_classes is {num_classes}, but {split} has {len(samples.classes)} classes '
            f'({some(samples.classes)}); leave --num-classes out'
        )
    if len(samples.classes) < min_classes:
        raise ValueError(f'the {split} split has one class ({some(samples.classes)}), expected two or more; {LAYOUT}')
    return samples


def _is_folder(name: str, root: Path, split: str) -> bool:
    """Whether ``timm.data.create_dataset`` reads class folders under this name: every name without a known prefix."""
    prefix, slash, rest = name.lower().partition('/')
    if prefix == 'torch' and slash:
        return rest in ('folder', 'image_folder')
    if prefix in STREAMS or (prefix == 'hfds' and slash):
        return False
    return not (root.is_file() or (root / split).is_file())  # an archive


def _open_named(name: str, root: Path, split: str, download: bool, num_classes: int | None) -> Samples:
    if name.partition('/')[0].lower() in STREAMS:
        raise ValueError(f'{name} is read as a stream, whose samples have no index; use class folders, torch/ or hfds/')
    try:
        source = create_dataset(name, root=str(root), split=split, download=download)
    except ImportError:
        raise
    except Exception as error:  # AssertionError for an unknown name, RuntimeError for missing files, ...
        hint = '' if download else ' If it is not there yet, use --download.'
        raise ValueError(f'cannot open the {split} split of {name} in {root}: {error}.{hint}') from error
    classes = getattr(source, 'classes', None)
    if isinstance(source, DatasetFolder):  # its own loader clips 16 bits to white
        source = ImageFiles(str(source.root), source.samples)
    if classes is None:
        by_name = getattr(getattr(source, 'reader', None), 'class_to_idx', None)
        classes = sorted(by_name, key=by_name.__getitem__) if by_name else None
    if classes is None and num_classes is None:
        raise ValueError(f'{name} does not define its number of classes; give it with --num-classes')
    names = [str(c) for c in classes] if classes is not None else [str(c) for c in range(num_classes or 0)]
    count = len(source.samples) if isinstance(source, ImageFiles) else len(source)
    return Samples(source, names, range(count), split)


# ---- checking ----


def inspect_images(samples: Samples) -> tuple[dict[int, str], str]:
    """Read and decode every image once, at the lowest resolution its format offers.

    A CPU core needs about 0.2 ms for a CIFAR-sized and 2 ms for an ImageNet-sized JPEG. Data sets that hold an array of
    images are not decoded.

    Returns:
        The name and the fault of each broken image, by its position. The fingerprint of the other images: a hash of the
        classes and, in order, of the labels and the file contents, without names.
    """
    digest = hashlib.sha256(os.fsencode('\0'.join(samples.classes)))
    data = getattr(samples.source, 'data', None)
    if isinstance(data, np.ndarray | Tensor):
        indices, targets = np.asarray(samples.indices), getattr(samples.source, 'targets', None)
        labels = samples.labels() if targets is None else np.asarray(targets)[indices]
        for array in (np.asarray(data)[indices], np.asarray(labels)):
            digest.update(np.ascontiguousarray(array).data)
        return {}, digest.hexdigest()[:16]
    digests = np.zeros((len(samples), digest.digest_size), dtype=np.uint8)
    broken: dict[int, str] = {}
    largest: dict[int, int] = {}

    def check(position: int) -> None:
        try:
            stored, label = samples.read(position)
            _, deepest = decode_image(stored, samples.mode, smallest=True)
            content = stored if isinstance(stored, bytes) else stored.tobytes()
            digests[position] = np.frombuffer(hashlib.sha256(b'%d ' % label + content).digest(), dtype=np.uint8)
            if deepest is not None:
                largest[position] = deepest
        except Exception as error:
            broken[position] = ' '.join(str(error).split())

    _for_each(check, len(samples), f'checking {samples.split}')
    broken.update(check_depth(largest))
    digest.update(np.delete(digests, list(broken), axis=0).data)
    return {i: f'{samples.name(i)}: {broken[i]}' for i in sorted(broken)}, digest.hexdigest()[:16]


def _for_each(work: Callable[[int], None], count: int, text: str) -> None:
    """Call ``work`` with the numbers below ``count``, on all CPU cores, with a progress bar."""

    def some_of_them(numbers: range) -> int:
        for number in numbers:
            work(number)
        return len(numbers)

    chunks = [range(start, min(start + 64, count)) for start in range(0, count, 64)]
    bar = tqdm(total=count, desc=text, unit='img', disable=None if os.environ.get('RANK', '0') == '0' else True)
    with ThreadPoolExecutor(os.cpu_count()) as pool, bar:
        for done in pool.map(some_of_them, chunks):
            bar.update(done)


def listing(samples: Samples) -> str:
    """A hash of the classes, the labels and, for files, their names and sizes. Reads no image."""
    digest = hashlib.sha256(os.fsencode('\0'.join(samples.classes)))
    if isinstance(samples.source, ImageFiles):
        for index in samples.indices:
            path, label = samples.source.samples[index]
            name = path.removeprefix(samples.source.root)
            digest.update(os.fsencode(f'{name}\0{label} {os.path.getsize(path)}\0'))
    else:
        digest.update(f'{len(samples)}'.encode())
    return digest.hexdigest()[:16]


def name_data(*splits: Samples) -> str:
    """A text that is equal for equal images, by their contents if checked, else by names and sizes."""
    return '+'.join(split.fingerprint or f'names {listing(split)}' for split in splits)


def same_data(saved: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether two runs' facts about their data agree, as far as both know them.

    The listing counts only if one of them has no fingerprint: files may be renamed if their order stays.
    """
    keys = {key for key in saved.keys() & now.keys() if None not in (saved[key], now[key])}
    if 'fingerprint' in keys:
        keys.discard('listing')
    return all(saved[key] == now[key] for key in keys)


# ---- transforms ----


def image_config(model: nn.Module, img_size: int | None = None) -> dict[str, Any]:
    """``timm.data.resolve_data_config`` for the channels that the model takes.

    Args:
        model: its ``pretrained_cfg`` gives size, crop, interpolation, mean and standard deviation; timm's defaults
            (224 px, ImageNet) fill in missing values.
        img_size: height and width in px; default: the model's.

    Returns:
        input_size (C, H, W), mean and std of C channels, interpolation, crop_pct, ... If timm's mean and std have
        another number of channels, each channel gets their average.
    """
    config: dict[str, Any] = resolve_data_config({} if img_size is None else {'img_size': img_size}, model=model)
    channels = getattr(model, 'in_chans', None)
    if not isinstance(channels, int):  # older versions of timm do not keep it
        channels = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), 3)
        channels //= next((m.bs**2 for m in model.modules() if isinstance(m, SpaceToDepth)), 1)  # TResNet's stem
    return config_for(config, channels)


def config_for(config: Mapping[str, Any], channels: int) -> dict[str, Any]:
    """timm's ``config`` for this number of channels; see ``image_config``."""
    found = {**config, 'input_size': (channels, *config['input_size'][1:])}
    for name in ('mean', 'std'):
        if len(config[name]) != channels:
            found[name] = (fmean(config[name]),) * channels
    return found


def create_transforms(
    data_config: Mapping[str, Any], *, hflip: float = 0.5, auto_augment: str | None = None
) -> tuple[Transform, Transform]:
    """Training and validation transforms, from an image in RGB or grey to a normalised (C, H, W) tensor.

    Args:
        data_config: of ``image_config``: input_size, mean, std, interpolation, crop_pct.
        hflip: probability of a horizontal flip; 0 for text and digits.
        auto_augment: a policy of timm, such as 'rand-m9-mstd0.5', for images larger than 64 px.

    Images up to 64 px: random crop with padding 4, flip. Larger: timm's random resized crop, flip, colour jitter.
    """
    _, height, width = data_config['input_size']
    if max(height, width) > SMALL:
        train = create_transform(**data_config, is_training=True, hflip=hflip, auto_augment=auto_augment)
        return train, create_transform(**data_config, is_training=False)
    if auto_augment:
        raise ValueError(f'auto_augment {auto_augment!r} is for images larger than {SMALL} px, these are {height} px')
    fit = [transforms.Resize(min(height, width)), transforms.CenterCrop((height, width))]  # nothing if it fits already
    tensor = [transforms.ToTensor(), transforms.Normalize(data_config['mean'], data_config['std'])]
    crop = [transforms.RandomCrop((height, width), padding=PADDING), transforms.RandomHorizontalFlip(hflip)]
    return transforms.Compose([*fit, *crop, *tensor]), transforms.Compose([*fit, *tensor])


# ---- batches ----


class TransformedSamples(Dataset[tuple[Tensor, int]]):
    """Samples with transforms, indexed by (epoch, position): each epoch has another augmentation.

    Args:
        seed: of the order and the augmentation.
        stream: number of these samples, if a run uses several parts of a data set, which then differ in both.
        labels: replace the samples' own.
    """

    def __init__(
        self,
        samples: Samples,
        transform: Transform,
        seed: int,
        stream: int | None = None,
        labels: Sequence[int] | None = None,
    ) -> None:
        self.samples, self.transform, self.labels = samples, transform, labels
        self.seed, self.stream = seed, stream

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, position = key
        image, label = self.samples.load(position)
        seed = self.seed if self.stream is None else derive_seed(self.seed, AUGMENT, self.stream)
        with seeded(derive_seed(seed, AUGMENT, epoch, position)):
            return self.transform(image), label if self.labels is None else self.labels[position]

    def __getitems__(self, batch: tuple[int, np.ndarray]) -> list[tuple[Tensor, int]]:
        epoch, positions = batch
        return [self[epoch, position] for position in positions.tolist()]


class SmallImages:
    """Small images as bytes on a device, which augments and normalises whole batches.

    Args:
        images: (N, C, H, W), uint8; see ``load_small_images``.
        labels: (N,), int64.
        mean, std: of each channel, for pixels from 0 to 1.
        seed, stream: see ``TransformedSamples``.
        hflip: augment with a random crop (4 px of black padding) and a flip of this probability; default: neither.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        mean: Sequence[float],
        std: Sequence[float],
        seed: int = 0,
        stream: int = 0,
        hflip: float | None = None,
        device: torch.device | str = 'cpu',
    ) -> None:
        self.images, self.labels = images.to(device), labels.to(device)
        self.mean, self.std = (torch.tensor(x, device=device).mul(255).reshape(1, -1, 1, 1) for x in (mean, std))
        self.seed, self.stream, self.hflip = seed, stream, hflip
        self.drawn = -1, torch.empty(0)  # an epoch, and the corner (y, x) and flip of all its images

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, batch: tuple[int, Tensor]) -> tuple[Tensor, Tensor]:
        epoch, positions = batch
        images = self.images[positions]
        if self.hflip is not None:
            if self.drawn[0] != epoch:  # an image's augmentation does not depend on when its turn comes
                generator = torch.Generator().manual_seed(derive_seed(self.seed, AUGMENT, self.stream, epoch))
                corner = torch.randint(0, 2 * PADDING + 1, (len(self), 2), generator=generator)
                flip = torch.rand(len(self), 1, generator=generator) < self.hflip
                self.drawn = epoch, torch.cat([corner, flip], 1).to(images.device)
            images = _crop_and_flip(images, self.drawn[1][positions])
        return (images - self.mean) / self.std, self.labels[positions]


def _crop_and_flip(images: Tensor, draws: Tensor) -> Tensor:
    """(B, C, H, W) padded with zeros, cropped to its size at the corner draws[:, :2], flipped where draws[:, 2]."""
    b, _, h, w = images.shape
    padded = F.pad(images, (PADDING,) * 4).permute(0, 2, 3, 1)
    rows = draws[:, 0, None] + torch.arange(h, device=images.device)
    columns = torch.arange(w, device=images.device)
    columns = torch.where(draws[:, 2, None] > 0, w - 1 - columns, columns) + draws[:, 1, None]
    which = torch.arange(b, device=images.device)[:, None, None]
    return padded[which, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def load_small_images(samples: Samples, size: tuple[int, int]) -> Tensor:
    """All images of a split, resized and cropped to ``size``. -> (N, C, H, W), uint8.

    Raises:
        ValueError: an image cannot be decoded; the text names it.
    """
    fit = transforms.Compose([transforms.Resize(min(size)), transforms.CenterCrop(size)])
    out = np.empty((len(samples), *size, len(samples.mode)), dtype=np.uint8)  # 'RGB' or 'L'

    def load(position: int) -> None:
        out[position] = np.asarray(fit(samples.load(position)[0])).reshape(out.shape[1:])

    _for_each(load, len(samples), 'reading images')
    return torch.from_numpy(out).permute(0, 3, 1, 2).contiguous()


class Batches:
    """Batches of images and labels on a device. A batch depends only on the seed, the epoch and the step.

    The number of loading processes does not change it, and all training processes together get the batch of one.

    Args:
        images: loaded by ``workers`` processes, or already on ``device``.
        shuffle: draw a new order for each epoch.
        workers: loading processes, at most one per CPU core.
    """

    def __init__(
        self,
        images: TransformedSamples | SmallImages,
        *,
        shuffle: bool = True,
        workers: int = 0,
        device: torch.device | str = 'cpu',
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        self.images, self.shuffle = images, shuffle
        self.device, self.memory_format = torch.device(device), memory_format
        self.plan: list[Any] = []  # epoch and positions of the batches to load
        self.begun = 0  # epochs
        self.loader: DataLoader[Any] | None = None
        if isinstance(images, TransformedSamples):
            workers = min(workers, os.cpu_count() or 1)
            self.loader = DataLoader(
                images,
                batch_sampler=self.plan,
                num_workers=workers,
                persistent_workers=workers > 0,
                pin_memory=self.device.type == 'cuda',
            )

    def __len__(self) -> int:
        """Images, not batches."""
        return len(self.images)

    def epoch(
        self, epoch: int, batch_size: int, first: int, last: int, rank: int = 0, world: int = 1, end: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Images (B, C, H, W) and labels (B,) of the steps ``first`` to ``last`` of an epoch.

        Args:
            batch_size: over all processes.
            rank, world: number of this process, and of all; each gets its share of every batch.
            end: where the epoch ends within its last batch, in images; default: that batch is also full.

        Raises:
            ValueError: an image cannot be decoded; the message names it.
        """
        order, size = self._order(epoch, last * batch_size)[:end], batch_size // world
        positions: Any = order.to(self.device) if self.loader is None else order.numpy()
        starts = range(first * batch_size + rank * size, last * batch_size, batch_size)
        plan: list[Any] = [(epoch, positions[start : start + size]) for start in starts]
        self.plan[:] = plan
        self.begun += 1
        number = self.begun
        batches: Iterable[Any] = map(self.images.__getitems__, plan) if self.loader is None else self.loader
        try:
            for images, labels in batches:
                if self.begun != number:
                    raise RuntimeError('a newer epoch of these batches has begun, and loading processes serve only one')
                images = images.to(self.device, non_blocking=True).contiguous(memory_format=self.memory_format)
                yield images, labels.to(self.device, non_blocking=True)
        except ValueError as error:
            if str(error).startswith('Caught ValueError'):  # and the traceback of a loading process
                raise ValueError(str(error).strip().splitlines()[-1].removeprefix('ValueError: ')) from None
            raise

    def once(self, batch_size: int, count: int | None = None, rank: int = 0, world: int = 1) -> Iterator[Any]:
        """The first images of the first epoch, each once; default: all. Batches are as in ``epoch``.

        The last batch may be smaller. For several processes it is full, and the caller must drop images beyond
        ``count``.
        """
        count = len(self) if count is None else min(count, len(self))
        steps = -(-count // batch_size)
        return self.epoch(0, batch_size, 0, steps, rank, world, count if world == 1 else None)

    def _order(self, epoch: int, count: int) -> Tensor:
        """The positions of the first ``count`` images of an epoch. After the last image they repeat."""
        if not self.shuffle:
            return torch.arange(count) % len(self)
        rounds, stream = [], self.images.stream
        for again in range(-(-count // len(self))):
            place = (epoch,) if stream is None else (stream, epoch, again)  # one part alone is never used up
            generator = torch.Generator().manual_seed(derive_seed(self.images.seed, SHUFFLE, *place))
            rounds.append(torch.randperm(len(self), generator=generator))
        return torch.cat(rounds)[:count]


# ---- random numbers ----


def derive_seed(seed: int, stream: int, *place: int) -> int:
    """A 63-bit seed for one use (``stream``) of random numbers at one place in a run, such as (epoch, position)."""
    return int(np.random.SeedSequence((seed, stream, *place)).generate_state(1, np.uint64)[0] >> 1)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Within this context, seed the generators of torch (CPU), numpy and Python, and restore them afterwards.

    These are the global generators, from which timm's and torchvision's transforms draw.
    """
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    random.seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        random.setstate(states[2])
