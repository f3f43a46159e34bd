"""Image files: found in class folders, decoded to 8 bits per channel, and checked."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile
from timm.data import get_img_extensions
from timm.utils import natural_key
from torchvision.datasets.folder import IMG_EXTENSIONS

from .reading import printable, some

TRAIN_FOLDERS = ('train', 'training')
VAL_FOLDERS = ('val', 'validation', 'valid', 'test', 'eval')
LAYOUT = 'expected ROOT/train/CLASS/*.jpg and ROOT/val/CLASS/*.jpg (or validation/ or test/ in place of val/)'
SIDE_FOLDERS = ('__MACOSX', '@eaDir')  # copies and previews of images, made by macOS and NAS systems
BITS_PER_SAMPLE = 258  # TIFF tag

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


def split_folder(root: Path, names: Sequence[str]) -> Path:
    """The first folder of ``names`` that exists in ``root``; raises FileNotFoundError if there is none."""
    for name in names:
        if (root / name).is_dir():
            return root / name
    found = sorted(entry.name for entry in root.iterdir())
    raise FileNotFoundError(f'{root} has no folder {" or ".join(names)} (it holds: {some(found)}); {LAYOUT}')


def find_images(folder: Path) -> tuple[ImageFiles, list[str]]:
    """The image files in class folders, and the class names in the order of their labels.

    Raises:
        ValueError: see ``data.open_data``.
    """
    found: dict[str, list[str]] = {}
    for entry in _visible(folder):
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
        raise ValueError(f'class folders without an image in {folder}: {some(empty)}; fill or remove them')
    samples = [(path, label) for label, name in enumerate(classes) for path in found[name]]
    # By path over all classes, as timm's reader sorts: runs depend on this order.
    samples.sort(key=lambda sample: _order(sample[0]))
    return ImageFiles(str(folder), samples), classes


def subfolders(folder: str | Path) -> list[str]:
    """The names of the folders in a folder, in the order of class labels."""
    return sorted((entry.name for entry in _visible(folder) if entry.is_dir()), key=_order)


def images_below(folder: str | Path) -> list[str]:
    """The image files in a folder and its subfolders, in natural order. Raises the errors of ``find_images``."""
    return sorted(_images_below(str(folder)), key=_order)


def _order(name: str) -> tuple[Any, str]:
    """Sort key: numbers by value, as timm sorts; ties by the name itself, not by the file system."""
    return natural_key(name), name


def _visible(folder: str | Path) -> Iterator[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        yield from (e for e in entries if not e.name.startswith('.') and e.name not in SIDE_FOLDERS)


def _is_image(name: str) -> bool:
    suffix = os.path.splitext(name)[1].lower()
    return suffix in IMG_EXTENSIONS or suffix in get_img_extensions(as_set=True)


def _images_below(folder: str) -> Iterator[str]:
    """The image files in a folder and its subfolders.

    Raises:
        ValueError: something named like an image is not a regular file, or is a folder without images; a broken link,
            or a link to a folder that it lies in.
        OSError: a folder cannot be read.
    """
    for entry in _visible(folder):
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
    """Raise a ValueError unless this is a file or a link to one: reading anything else might block."""
    if not entry.is_file():
        what = 'a folder without images' if entry.is_dir() else 'not a regular file or a link to one'
        raise ValueError(f'{printable(entry.path)} is {what}; replace or remove it')


def decode_image(stored: bytes | Image.Image, mode: str, *, smallest: bool = False) -> tuple[Image.Image, int | None]:
    """Decode an image, apply its EXIF orientation, and convert it to 8 bits per channel.

    16-bit grey is scaled from its range: 0..65535, or less if a TIFF states fewer bits. In 16-bit colour, and grey with
    alpha, Pillow keeps the upper 8 bits. Transparency is dropped, as by Pillow's ``convert``.

    Args:
        stored: the content of a file, or an image.
        mode: 'RGB' or 'L'.
        smallest: decode a JPEG at 1/8 of its size, but completely.

    Returns:
        The image, and the largest stored value of a 16-bit image (None for all others); see ``check_depth``. For colour
        and alpha it is the largest value with these upper 8 bits, known only for PNG and TIFF.

    Raises:
        UnidentifiedImageError: a format that Pillow does not know.
        ValueError: 32 bits per pixel, whose range is unknown.
        Exception: from Pillow's decoders, for a broken file.
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
        with contextlib.suppress(Exception):  # unreadable EXIF is ignored
            ImageOps.exif_transpose(image, in_place=True)
        largest = None
        # Pillow loads 16-bit PGM, and in older versions PNG, in its 32-bit mode.
        if image.mode.startswith('I;16') or (image.mode == 'I' and image.format in ('PNG', 'PPM')):
            bits = image.tag_v2[BITS_PER_SAMPLE][0] if isinstance(image, TiffImageFile) else 16
            values = np.asarray(image).astype(np.uint32)
            limit = 2**bits - 1
            if bits == 16:
                largest = int(values.max())
            image = Image.fromarray(((values * 255 + limit // 2) // limit).astype(np.uint8))
        elif deep:
            colours = np.asarray(image)[..., : 1 if image.mode == 'LA' else 3]  # without alpha
            largest = 256 * int(colours.max()) + 255
        elif image.mode in ('I', 'F'):
            kind = 'floating-point' if image.mode == 'F' else 'integer'
            raise ValueError(f'32-bit {kind} pixels have no known range; scale the image and save it with 8 or 16 bits')
        if image.mode == 'P' and 'transparency' in image.info:
            image = image.convert('RGBA')  # or Pillow warns
        return image.convert(mode), largest


def _is_deep_colour(image: Image.Image) -> bool:
    """Whether an image, not yet decoded, has 16 bits per channel of which Pillow will keep the upper 8."""
    if image.format not in ('PNG', 'TIFF') or image.mode not in ('LA', 'RGB', 'RGBA', 'RGBa', 'RGBX'):
        return False
    # Each tile: decoder, box, offset and arguments, of which the only or the first one is Pillow's raw mode.
    raw = [args if isinstance(args, str) else args[0] for *_, args in getattr(image, 'tile', ())]
    return any(';16' in mode for mode in raw)


def check_depth(largest: Mapping[T, int]) -> dict[T, str]:
    """The fault of 16-bit images, by their largest values, if all of them are below 4096.

    They then store 12 bits or fewer, which a file does not state. A single one among brighter images is merely dark.
    """
    if not largest or max(largest.values()) >= 4096:
        return {}
    return {
        key: f'a 16-bit image of values up to {value} among 16-bit images that all stay below 4096, so nearly black: '
        f'scale the values to 0..65535, or save 8 bits'
        for key, value in largest.items()
    }
