"""Image data for training: class folders or any data set timm knows by name, checked before any work.

What augmentation does to a sample is a function of (seed, epoch, index) alone, so that a run does not depend on the
number of workers or processes, and continues after a stop as if it had not stopped.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile
from timm.data import ImageDataset, create_dataset, create_transform, get_img_extensions, resolve_data_config
from timm.layers import SpaceToDepth
from timm.utils import natural_key
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler
from torchvision import transforms
from torchvision.datasets import DatasetFolder
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

from .reading import printable

TRAIN_FOLDERS = ('train', 'training')
VAL_FOLDERS = ('val', 'validation', 'valid', 'test', 'eval')
LAYOUT = 'expected ROOT/train/CLASS/*.jpg and ROOT/val/CLASS/*.jpg (or validation/ or test/ in place of val/)'
SIDE_FOLDERS = ('__MACOSX', '@eaDir')  # copies and previews of the images beside them
STREAMS = ('hfids', 'tfds', 'wds')  # prefixes of timm's names of data sets
MODES = {1: 'L', 3: 'RGB'}  # of images, by their channels, as Pillow calls them
BITS_PER_SAMPLE = 258  # a tag of TIFF
SMALL = 64  # px; up to this size images are trained on as CIFAR is, above it as ImageNet is

# Streams of random numbers; see derive_seed.
SHUFFLE, AUGMENT, MODEL = 1, 2, 3

Transform = Callable[[Image.Image], Tensor]
T = TypeVar('T')


@dataclass(frozen=True)
class ImageFiles:
    """Image files of class folders.

    Attributes:
        root: the folder that holds the class folders.
        samples: path and label of each file.
    """

    root: str
    samples: list[tuple[str, int]]


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
        raise ValueError(f'the data has one class ({_some(train.classes)}), training needs two or more; {LAYOUT}')
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
        samples = _open_folder(_split_folder(root, folders), split)
    if len(samples) == 0:
        raise ValueError(f'the {samples.split} split of {dataset or root} holds no images')
    if num_classes not in (None, len(samples.classes)):
        raise ValueError(
            f'num_classes is {num_classes}, but {samples.split} has {len(samples.classes)} classes '
            f'({_some(samples.classes)}); leave --num-classes out'
        )
    return samples


def _some(names: Sequence[str]) -> str:
    return (', '.join(map(printable, names[:5])) + (f' and {len(names) - 5} more' if len(names) > 5 else '')) or 'none'


def _split_folder(root: Path, names: Sequence[str]) -> Path:
    for name in names:
        if (root / name).is_dir():
            return root / name
    found = sorted(entry.name for entry in root.iterdir())
    raise FileNotFoundError(f'{root} has no folder {" or ".join(names)} (it holds: {_some(found)}); {LAYOUT}')


def _open_folder(folder: Path, split: str) -> Samples:
    found: dict[str, list[str]] = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            if _is_hidden(entry.name):
                continue
            if entry.is_dir():
                found[entry.name] = list(_images_below(entry.path))
            elif _is_image(entry.name):
                raise ValueError(f'{folder} holds images outside any class folder ({printable(entry.name)}); {LAYOUT}')
            elif entry.is_symlink():
                _check_regular(entry)
    classes = sorted(found, key=_order)
    empty = [name for name in classes if not found[name]]
    if len(empty) == len(classes):
        raise ValueError(f'{folder} holds no images; {LAYOUT}')
    if empty:
        raise ValueError(f'class folders without an image in {folder}: {_some(empty)}; fill or remove them')
    samples = [(path, label) for label, name in enumerate(classes) for path in found[name]]
    # By path over all classes: the order that timm's reader has, which runs depend on.
    samples.sort(key=lambda sample: _order(sample[0]))
    return Samples(ImageFiles(str(folder), samples), classes, range(len(samples)), split)


def _order(name: str) -> tuple[Any, str]:
    """Sort key: numbers by value, as timm sorts; ties by the name itself, not by the file system."""
    return natural_key(name), name


def _is_hidden(name: str) -> bool:
    return name.startswith('.') or name in SIDE_FOLDERS


def _is_image(name: str) -> bool:
    suffix = os.path.splitext(name)[1].lower()
    return suffix in IMG_EXTENSIONS or suffix in get_img_extensions(as_set=True)


def _images_below(folder: str) -> Iterator[str]:
    """The image files in a folder and its subfolders.

    Raises:
        ValueError: what bears the name of an image and is no regular file, a folder without images included; a link to
            nowhere or to a folder that it lies in.
        OSError: a folder cannot be read.
    """
    with os.scandir(folder) as entries:
        for entry in entries:
            if _is_hidden(entry.name):
                continue
            if entry.is_dir():
                if entry.is_symlink() and Path(folder).resolve().is_relative_to(Path(entry.path).resolve()):
                    raise ValueError(f'{printable(entry.path)} is a link to a folder that it lies in; remove it')
                inside = list(_images_below(entry.path))
                if _is_image(entry.name) and not inside:
                    _check_regular(entry)
                yield from inside
            elif _is_image(entry.name):
                _check_regular(entry)
                yield entry.path
            elif entry.is_symlink():
                _check_regular(entry)


def _check_regular(entry: os.DirEntry[str]) -> None:
    """Reading anything else might wait for ever. A link to a file is a file."""
    if not entry.is_file():
        what = 'a folder without images' if entry.is_dir() else 'no regular file, nor a link to one'
        raise ValueError(f'{printable(entry.path)} is {what}; replace or remove it')


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


# ---- decoding and checking ----


def decode_image(stored: bytes | Image.Image, mode: str, *, smallest: bool = False) -> tuple[Image.Image, int | None]:
    """Decode an image, turn it as its EXIF orientation says, and bring it to 8 bits a channel.

    Grey of 16 bits is scaled by its range: 0..65535, or less where a TIFF states fewer bits. Of colour and of grey with
    alpha of 16 bits, Pillow keeps the upper 8. Transparency is dropped, as Pillow's ``convert`` does.

    Args:
        stored: the content of a file, or an image.
        mode: 'RGB' or 'L'.
        smallest: decode a JPEG at 1/8 of its size, yet to its end.

    Returns:
        The image, and the largest stored value of a 16-bit one (None for all others); see ``check_depth``. In colour
        and with alpha it is the largest value that has these upper 8 bits, and known for PNG and TIFF alone.

    Raises:
        UnidentifiedImageError: of no format that Pillow knows.
        ValueError: 32 bits a pixel, whose range is unknown.
        Exception: whatever Pillow's decoders raise for a broken file.
    """
    with contextlib.ExitStack() as stack:
        try:
            image = stored if isinstance(stored, Image.Image) else stack.enter_context(Image.open(io.BytesIO(stored)))
        except UnidentifiedImageError:  # whose text shows the BytesIO
            raise UnidentifiedImageError('cannot identify image file') from None
        if smallest:
            image.draft('RGB', (1, 1))
        deep = _is_deep_colour(image)  # decoding forgets it
        image.load()
        with contextlib.suppress(Exception):  # EXIF that cannot be read: as without
            ImageOps.exif_transpose(image, in_place=True)
        largest = None
        # Pillow has 16-bit PGM, and in older versions PNG, in the mode for 32 bits.
        if image.mode.startswith('I;16') or (image.mode == 'I' and image.format in ('PNG', 'PPM')):
            bits = image.tag_v2[BITS_PER_SAMPLE][0] if isinstance(image, TiffImageFile) else 16
            values = np.asarray(image).astype(np.uint32)
            limit = 2**bits - 1
            if bits == 16:
                largest = int(values.max())
            image = Image.fromarray(((values * 255 + limit // 2) // limit).astype(np.uint8))
        elif deep:
            colours = np.asarray(image)[..., : 1 if image.mode == 'LA' else 3]  # less alpha
            largest = 256 * int(colours.max()) + 255
        elif image.mode in ('I', 'F'):
            kind = 'floating-point' if image.mode == 'F' else 'integer'
            raise ValueError(f'32-bit {kind} pixels have no known range; scale the image and save it with 8 or 16 bits')
        if image.mode == 'P' and 'transparency' in image.info:
            image = image.convert('RGBA')  # Pillow warns where this step is left out
        return image.convert(mode), largest


def _is_deep_colour(image: Image.Image) -> bool:
    """Whether an image not yet decoded stores 16 bits a channel of which Pillow will keep the upper 8."""
    if image.format not in ('PNG', 'TIFF') or image.mode not in ('LA', 'RGB', 'RGBA', 'RGBa', 'RGBX'):
        return False
    # Each tile: decoder, box, offset and its arguments, of which the only or the first is Pillow's raw mode.
    raw = [args if isinstance(args, str) else args[0] for *_, args in getattr(image, 'tile', ())]
    return any(';16' in mode for mode in raw)


def check_depth(largest: Mapping[T, int]) -> dict[T, str]:
    """What is wrong with 16-bit images, by their largest values, if none is above 4095.

    Then 12 bits or fewer were stored in 16, which a file does not tell. One such image among others is a dark one.
    """
    if not largest or max(largest.values()) >= 4096:
        return {}
    return {
        key: f'a 16-bit image of values up to {value} among 16-bit images that all stay below 4096, so nearly black: '
        f'scale the values to 0..65535, or save 8 bits'
        for key, value in largest.items()
    }


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
