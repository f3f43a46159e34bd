"""Image data for training: class folders or any data set timm knows by name, checked before any work.

What augmentation does to a sample is a function of (seed, epoch, index) alone, so that a run does not depend on the
number of workers or processes, and continues after a stop as if it had not stopped.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from torch.utils.data import Dataset, Sampler
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
MODES = {1: 'L', 3: 'RGB'}  # of images, by their channels, as Pillow calls them
SMALL = 64  # px; up to this size images are trained on as CIFAR is, above it as ImageNet is

# Streams of random numbers; see derive_seed.
SHUFFLE, AUGMENT, MODEL = 1, 2, 3

Transform = Callable[[Image.Image], Tensor]


@dataclass(frozen=True)
class Samples:
    """One split of a data set: the images as they are stored, without transforms.

    Attributes:
        source: ``ImageFiles``, or a timm or torchvision data set with an index.
        classes: class names in the order of their labels.
        indices: which of the images of ``source`` are used.
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

        The image is the content of a file, or an image where the data set decodes by itself.
        """
        index = self.indices[position]
        stored: bytes | Image.Image
        if isinstance(self.source, ImageFiles):
            path, label = self.source.samples[index]
            if not os.path.isfile(path):  # a pipe would be waited for
                raise ValueError('no regular file')
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
            raise ValueError(f'its label {label} is none of the {len(self.classes)} classes')
        return stored, int(label)

    def load(self, position: int) -> tuple[Image.Image, int]:
        """Image (upright, in ``mode``) and label number ``position``.

        Raises:
            ValueError: the image cannot be decoded; the text names it. (timm would put its neighbour in its place.)
        """
        try:
            stored, label = self.read(position)
            return decode_image(stored, self.mode)[0], label
        except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, ...
            raise ValueError(
                f'broken image {self.name(position)}: {" ".join(str(error).split())}; replace or remove it, or let '
                f'the check before training leave it out with --skip-broken'
            ) from error

    def name(self, position: int) -> str:
        """The file of an image, or the split and its index where it has none; for messages."""
        index = self.indices[position]
        if isinstance(self.source, ImageFiles):
            return printable(self.source.samples[index][0])
        return f'{self.split}[{index}]'

    def labels(self) -> list[int]:
        """The label of every image, without decoding where the data set lists them."""
        if isinstance(self.source, ImageFiles):
            return [self.source.samples[index][1] for index in self.indices]
        targets = getattr(self.source, 'targets', None)
        if targets is not None:
            return [int(targets[index]) for index in self.indices]
        return [self.read(position)[1] for position in range(len(self))]

    def without(self, broken: Mapping[int, str]) -> Samples:
        """The same split less the positions in ``broken``."""
        if not broken:
            return self
        return self.part([position for position in range(len(self)) if position not in broken])

    def part(self, positions: Sequence[int]) -> Samples:
        """These positions of the split alone."""
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
        root: a folder with train/ and val/, validation/ or test/ in it, each with one folder a class; for a data set
            by name, where it is or will be stored.
        dataset: '' for class folders, or a name of ``timm.data.create_dataset``: 'torch/cifar10', 'hfds/USER/NAME', ...
            A name for which timm reads class folders, such as 'folder', opens them as '' does, but by their splits.
        train_split, val_split: the splits of a data set by name; for class folders by name, their folders in ``root``.
        download: whether a data set by name may be downloaded.
        num_classes: needed where the data set by name does not know it; anywhere else it must be right.

    Classes are the folders directly under train/; an image belongs to the class it lies under, however deep. Names that
    start with a dot are ignored, and so are the folders that macOS and NAS systems leave (``SIDE_FOLDERS``).

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no images, in a split or in one of its class folders; images outside the class folders; a name of
            an image that is no regular file; a single class, classes that differ between the splits or from
            ``num_classes``; an unknown name.
    """
    options: dict[str, Any] = {'download': download, 'num_classes': num_classes}
    train = open_training_data(root, dataset, split=train_split, **options)
    val = _open_split(Path(root), dataset, val_split if dataset else 'val', VAL_FOLDERS, **options)
    if train.classes != val.classes:
        only_train = sorted(set(train.classes) - set(val.classes))
        only_val = sorted(set(val.classes) - set(train.classes))
        raise ValueError(
            f'the classes of {train.split} and {val.split} differ: '
            f'only in {train.split}: {some(only_train)}; only in {val.split}: {some(only_val)}'
        )
    return train, val


def open_training_data(
    root: str | os.PathLike[str],
    dataset: str = '',
    *,
    split: str = 'train',
    download: bool = False,
    num_classes: int | None = None,
) -> Samples:
    """Open the training split alone; ``open_data`` says what the arguments are and what is raised."""
    train = _open_split(
        Path(root), dataset, split if dataset else 'train', TRAIN_FOLDERS, download=download, num_classes=num_classes
    )
    if len(train.classes) < 2:
        raise ValueError(f'the data has one class ({some(train.classes)}), training needs two or more; {LAYOUT}')
    return train


def _open_split(
    root: Path, dataset: str, split: str, folders: Sequence[str], *, download: bool, num_classes: int | None
) -> Samples:
    if dataset and not _is_folder(dataset, root, split):
        samples = _open_named(dataset, root, split, download, num_classes)
    else:
        if dataset:  # train and validation may have their other names, as with timm; the root never stands in
            same = next((names for names in (TRAIN_FOLDERS, VAL_FOLDERS) if split in names and split != 'test'), ())
            folders = list(dict.fromkeys((split, *same)))
        if not root.is_dir():
            raise FileNotFoundError(f'there is no data folder {root}; {LAYOUT}')
        files, classes = find_images(split_folder(root, folders))
        samples = Samples(files, classes, range(len(files.samples)), split)
    if len(samples) == 0:
        raise ValueError(f'the {samples.split} split of {dataset or root} holds no images')
    if num_classes not in (None, len(samples.classes)):
        raise ValueError(
            f'num_classes is {num_classes}, but {samples.split} has {len(samples.classes)} classes '
            f'({some(samples.classes)}); leave --num-classes out'
        )
    return samples


def _is_folder(name: str, root: Path, split: str) -> bool:
    """Whether ``timm.data.create_dataset`` reads class folders under this name: any without a prefix it knows."""
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
        hint = '' if download else ' If it is not there yet, --download may get it.'
        raise ValueError(f'cannot open the {split} split of {name} in {root}: {error}.{hint}') from error
    classes = getattr(source, 'classes', None)
    if isinstance(source, DatasetFolder):  # its own loader clips 16 bits to white
        source = ImageFiles(str(source.root), source.samples)
    if classes is None:
        by_name = getattr(getattr(source, 'reader', None), 'class_to_idx', None)
        classes = sorted(by_name, key=by_name.__getitem__) if by_name else None
    if classes is None and num_classes is None:
        raise ValueError(f'{name} does not tell its number of classes; give it with --num-classes')
    names = [str(c) for c in classes] if classes is not None else [str(c) for c in range(num_classes or 0)]
    count = len(source.samples) if isinstance(source, ImageFiles) else len(source)
    return Samples(source, names, range(count), split)


# ---- checking ----


def find_broken(samples: Samples, *, progress: bool = True) -> dict[int, str]:
    """From the position of each broken image to its name and what is wrong with it; see ``inspect_images``."""
    return inspect_images(samples, progress=progress)[0]


def inspect_images(samples: Samples, *, progress: bool = True) -> tuple[dict[int, str], str]:
    """Read and decode every image once, at the lowest resolution its format offers.

    Costs about 0.2 ms for a CIFAR-sized and 2 ms for an ImageNet-sized JPEG and CPU core. Data sets that hold an array
    of images are taken as good.

    Returns:
        From the position of each broken image to its name and what is wrong with it; and the fingerprint of the
        others: a hash of the classes and, in their order, of the labels and the contents of the files. Names are not
        in it.
    """
    digest = hashlib.sha256(_classes_text(samples))
    data = getattr(samples.source, 'data', None)
    if isinstance(data, np.ndarray | Tensor):
        indices, targets = np.asarray(samples.indices), getattr(samples.source, 'targets', None)
        labels = samples.labels() if targets is None else np.asarray(targets)[indices]
        for array in (np.asarray(data)[indices], np.asarray(labels)):
            digest.update(np.ascontiguousarray(array).data)
        return {}, digest.hexdigest()[:16]
    digests = np.zeros((len(samples), digest.digest_size), dtype=np.uint8)

    def check(positions: range) -> tuple[dict[int, str], dict[int, int]]:
        broken, largest = {}, {}
        for position in positions:
            try:
                stored, label = samples.read(position)
                _, deepest = decode_image(stored, samples.mode, smallest=True)
                content = stored if isinstance(stored, bytes) else stored.tobytes()
                digests[position] = np.frombuffer(hashlib.sha256(b'%d ' % label + content).digest(), dtype=np.uint8)
            except Exception as error:
                broken[position] = f'{samples.name(position)}: {" ".join(str(error).split())}'
                continue
            if deepest is not None:
                largest[position] = deepest
        return broken, largest

    chunk = 64
    chunks = [range(start, min(start + chunk, len(samples))) for start in range(0, len(samples), chunk)]
    found: dict[int, str] = {}
    depths: dict[int, int] = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        bar = tqdm(total=len(samples), desc=f'checking {samples.split}', unit='img', disable=None if progress else True)
        with bar:
            for positions, (broken, largest) in zip(chunks, pool.map(check, chunks), strict=True):
                found.update(broken)
                depths.update(largest)
                bar.update(len(positions))
    found.update({position: f'{samples.name(position)}: {text}' for position, text in check_depth(depths).items()})
    digest.update(np.delete(digests, list(found), axis=0).data)
    return dict(sorted(found.items())), digest.hexdigest()[:16]


def _classes_text(samples: Samples) -> bytes:
    return os.fsencode('\0'.join(samples.classes))


def listing(samples: Samples) -> str:
    """A hash of the classes, the labels and, for files, of their names and sizes, which needs no image to be read."""
    digest = hashlib.sha256(_classes_text(samples))
    if isinstance(samples.source, ImageFiles):
        for index in samples.indices:
            path, label = samples.source.samples[index]
            name = path.removeprefix(samples.source.root)
            digest.update(os.fsencode(f'{name}\0{label} {os.path.getsize(path)}\0'))
    else:
        digest.update(f'{len(samples)}'.encode())
    return digest.hexdigest()[:16]


def name_data(*splits: Samples) -> str:
    """A text that is the same for the same images: of their contents if they are checked, else of names and sizes."""
    return '+'.join(split.fingerprint or f'names {listing(split)}' for split in splits)


def same_data(saved: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether the facts of two runs on data agree, apart from what one of them does not know.

    The listing counts only where one of them has no fingerprint: files may be renamed as long as their order stays.
    """
    keys = {key for key in saved.keys() & now.keys() if None not in (saved[key], now[key])}
    if 'fingerprint' in keys:
        keys.discard('listing')
    return all(saved[key] == now[key] for key in keys)


# ---- transforms and order ----


def image_config(model: nn.Module, img_size: int | None = None) -> dict[str, Any]:
    """``timm.data.resolve_data_config`` for the channels that the model takes.

    Args:
        model: its ``pretrained_cfg`` says size, crop, interpolation, mean and standard deviation; timm's defaults
            (224 px, ImageNet) stand in for what it does not say.
        img_size: height and width in px; default: the model's.

    Returns:
        input_size (C, H, W), mean and std of C channels, interpolation, crop_pct, ... Where timm's mean and std are of
        another number of channels, each channel gets their means.
    """
    config: dict[str, Any] = resolve_data_config({} if img_size is None else {'img_size': img_size}, model=model)
    channels = getattr(model, 'in_chans', None)
    if not isinstance(channels, int):  # older versions of timm do not keep it
        channels = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), 3)
        channels //= next((m.bs**2 for m in model.modules() if isinstance(m, SpaceToDepth)), 1)  # TResNet's stem
    return config_for(config, channels)


def config_for(config: Mapping[str, Any], channels: int) -> dict[str, Any]:
    """timm's ``config`` for images of so many channels; see ``image_config``."""
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
    crop = [transforms.RandomCrop((height, width), padding=4), transforms.RandomHorizontalFlip(hflip)]
    return transforms.Compose([*fit, *crop, *tensor]), transforms.Compose([*fit, *tensor])


class TransformedSamples(Dataset[tuple[Tensor, int]]):
    """Samples with transforms, indexed by (epoch, position): see ``EpochSampler``."""

    def __init__(self, samples: Samples, transform: Transform, seed: int) -> None:
        self.samples = samples
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, position = key
        image, label = self.samples.load(position)
        with seeded(derive_seed(self.seed, AUGMENT, epoch, position)):
            return self.transform(image), label


class EpochSampler(Sampler[tuple[int, int]]):
    """Yields (epoch, position) for every position, shuffled as a function of (seed, epoch).

    The epoch travels with the position and so reaches workers that live through many epochs. It is a plain attribute,
    set before each epoch: accelerate would call a ``set_epoch`` with a count of its own, which starts at 0 on resume.
    """

    def __init__(self, length: int, seed: int, *, shuffle: bool) -> None:
        self.length = length
        self.seed = seed
        self.shuffle = shuffle
        self.epoch = 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order: Sequence[int] = range(self.length)
        if self.shuffle:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, SHUFFLE, self.epoch))
            order = torch.randperm(self.length, generator=generator).tolist()
        return zip(itertools.repeat(self.epoch), order)


def derive_seed(seed: int, stream: int, *place: int) -> int:
    """A 63-bit seed for one use (``stream``) of random numbers at one place of a run, such as (epoch, position)."""
    return int(np.random.SeedSequence((seed, stream, *place)).generate_state(1, np.uint64)[0] >> 1)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Within this context the generators of torch (CPU), numpy and Python start from ``seed``; restored after.

    All three, and the global ones, since that is where the transforms of timm and torchvision draw from.
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
