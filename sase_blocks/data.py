"""Image data for training: class folders or any data set timm knows by name, checked before any work.

What augmentation does to a sample is a function of (seed, epoch, index) alone, so that a run does not depend on the
number of workers or processes, and continues after a stop as if it had not stopped.
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import ImageDataset, create_dataset, create_transform
from timm.data.readers.reader_image_folder import ReaderImageFolder
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from torchvision import transforms
from tqdm import tqdm

TRAIN_FOLDERS = ('train', 'training')
VAL_FOLDERS = ('val', 'validation', 'valid', 'test', 'eval')
LAYOUT = 'expected ROOT/train/CLASS/*.jpg and ROOT/val/CLASS/*.jpg (or validation/ or test/ in place of val/)'
SMALL = 64  # px; up to this size images are trained on as CIFAR is, above it as ImageNet is

# Streams of random numbers; see derive_seed.
SHUFFLE, AUGMENT, MODEL = 1, 2, 3

Transform = Callable[[Image.Image], Tensor]


@dataclass
class Samples:
    """One split of a data set: the images as they are stored, without transforms.

    Attributes:
        source: a timm or torchvision data set with an index.
        classes: class names in the order of their labels.
        indices: which of the images of ``source`` are used.
        split: its name, for messages.
    """

    source: Any
    classes: list[str]
    indices: Sequence[int]
    split: str

    def __len__(self) -> int:
        return len(self.indices)

    def load(self, position: int) -> tuple[Image.Image, int]:
        """Image (RGB) and label number ``position``.

        Raises:
            ValueError: the image cannot be decoded; the text names it. (timm would put its neighbour in its place.)
        """
        index = self.indices[position]
        if not isinstance(self.source, ImageDataset):  # torchvision's
            image, label = self.source[index]
            return image.convert('RGB'), int(label)
        try:
            file, label = self.source.reader[index]
            with file, Image.open(file) as image:
                return image.convert('RGB'), int(label)
        except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, ...
            raise ValueError(
                f'broken image {self.name(position)}: {" ".join(str(error).split())}; replace or remove it, or let '
                f'the check before training leave it out with --skip-broken'
            ) from error

    def name(self, position: int) -> str:
        """The file of an image, or the split and its index where it has none."""
        index = self.indices[position]
        if isinstance(self.source, ImageDataset) and isinstance(self.source.reader, ReaderImageFolder):
            return str(self.source.reader.samples[index][0])
        return f'{self.split}[{index}]'

    def without(self, broken: Mapping[int, str]) -> Samples:
        """The same split less the positions in ``broken``."""
        if not broken:
            return self
        kept = [index for position, index in enumerate(self.indices) if position not in broken]
        return Samples(self.source, self.classes, kept, self.split)


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
        train_split, val_split: the splits of a data set by name.
        download: whether a data set by name may be downloaded.
        num_classes: needed where the data set by name does not know it.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no images, a single class, classes that differ between the splits, an unknown name.
    """
    options: dict[str, Any] = {'download': download, 'num_classes': num_classes}
    train = open_training_data(root, dataset, split=train_split, **options)
    val = _open_split(Path(root), dataset, val_split if dataset else 'val', VAL_FOLDERS, **options)
    if train.classes != val.classes:
        only_train = sorted(set(train.classes) - set(val.classes))
        only_val = sorted(set(val.classes) - set(train.classes))
        raise ValueError(
            f'the classes of {train.split} and {val.split} differ: '
            f'only in {train.split}: {_some(only_train)}; only in {val.split}: {_some(only_val)}'
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
        raise ValueError(f'the data has one class ({", ".join(train.classes)}), training needs two or more; {LAYOUT}')
    return train


def _open_split(
    root: Path, dataset: str, split: str, folders: Sequence[str], *, download: bool, num_classes: int | None
) -> Samples:
    if dataset:
        samples = _open_named(dataset, root, split, download, num_classes)
    else:
        if not root.is_dir():
            raise FileNotFoundError(f'there is no data folder {root}; {LAYOUT}')
        samples = _open_folder(_split_folder(root, folders), split)
    if len(samples) == 0:
        raise ValueError(f'the {samples.split} split of {dataset or root} holds no images')
    return samples


def _some(names: Sequence[str]) -> str:
    return (', '.join(names[:5]) + (f' and {len(names) - 5} more' if len(names) > 5 else '')) or 'none'


def _split_folder(root: Path, names: Sequence[str]) -> Path:
    for name in names:
        if (root / name).is_dir():
            return root / name
    found = sorted(entry.name for entry in root.iterdir())
    raise FileNotFoundError(f'{root} has no folder {" or ".join(names)} (it holds: {_some(found)}); {LAYOUT}')


def _open_folder(folder: Path, split: str) -> Samples:
    try:
        source = create_dataset('', root=str(folder), search_split=False)
    except RuntimeError as error:  # timm found no image
        raise ValueError(f'{folder} holds no images; {LAYOUT}') from error
    class_to_idx: dict[str, int] = source.reader.class_to_idx
    if '' in class_to_idx:
        raise ValueError(f'{folder} holds images outside any class folder; {LAYOUT}')
    return Samples(source, sorted(class_to_idx, key=class_to_idx.__getitem__), range(len(source)), split)


def _open_named(name: str, root: Path, split: str, download: bool, num_classes: int | None) -> Samples:
    if name.partition('/')[0].lower() in ('hfids', 'tfds', 'wds'):
        raise ValueError(f'{name} is read as a stream, whose samples have no index; use class folders, torch/ or hfds/')
    try:
        source = create_dataset(name, root=str(root), split=split, download=download)
    except ImportError:
        raise
    except Exception as error:  # AssertionError for an unknown name, RuntimeError for missing files, ...
        hint = '' if download else ' If it is not there yet, --download may get it.'
        raise ValueError(f'cannot open the {split} split of {name} in {root}: {error}.{hint}') from error
    classes = getattr(source, 'classes', None)
    if classes is None:
        by_name = getattr(getattr(source, 'reader', None), 'class_to_idx', None)
        classes = sorted(by_name, key=by_name.__getitem__) if by_name else None
    if classes is None and num_classes is None:
        raise ValueError(f'{name} does not tell its number of classes; give it with --num-classes')
    names = [str(c) for c in classes] if classes is not None else [str(c) for c in range(num_classes or 0)]
    return Samples(source, names, range(len(source)), split)


def find_broken(samples: Samples, *, progress: bool = True) -> dict[int, str]:
    """Decode every image file once, at the lowest resolution its format offers.

    Costs about 0.2 ms for a CIFAR-sized and 2 ms for an ImageNet-sized JPEG and CPU core. Data sets that hold arrays
    are taken as good.

    Returns:
        From the position of each broken image to its name and what is wrong with it.
    """
    if not isinstance(samples.source, ImageDataset):
        return {}

    def check(positions: range) -> dict[int, str]:
        broken = {}
        for position in positions:
            try:
                file, _ = samples.source.reader[samples.indices[position]]
                with file, Image.open(file) as image:
                    image.draft('RGB', (1, 1))  # a JPEG is then decoded at 1/8 of its size, yet read to its end
                    image.load()
            except Exception as error:
                broken[position] = f'{samples.name(position)}: {error}'
        return broken

    chunk = 64
    chunks = [range(start, min(start + chunk, len(samples))) for start in range(0, len(samples), chunk)]
    found: dict[int, str] = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        bar = tqdm(total=len(samples), desc=f'checking {samples.split}', unit='img', disable=None if progress else True)
        with bar:
            for positions, broken in zip(chunks, pool.map(check, chunks), strict=True):
                found.update(broken)
                bar.update(len(positions))
    return found


def create_transforms(
    data_config: Mapping[str, Any], *, hflip: float = 0.5, auto_augment: str | None = None
) -> tuple[Transform, Transform]:
    """Training and validation transforms, from an RGB image to a normalised (3, H, W) tensor.

    Args:
        data_config: of ``timm.data.resolve_data_config``: input_size, mean, std, interpolation, crop_pct.
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


@contextmanager
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
