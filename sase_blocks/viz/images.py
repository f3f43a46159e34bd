"""Read image files as input for a network."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn

from sase_blocks.data import MODES, create_transforms, image_config
from sase_blocks.images import check_depth, decode_image
from sase_blocks.reading import printable

__all__ = ['read_images']


def read_images(
    paths: Sequence[str | os.PathLike[str]], model: nn.Module, img_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Read image files and bring them to the network's size and normalisation, as in the validation of ``train``.

    Args:
        paths: files that Pillow can read.
        model: a network. Its ``pretrained_cfg`` gives size, crop, interpolation, mean and standard deviation; timm's
            defaults (224 px, ImageNet) fill in missing values. Its ``in_chans``, or its first convolution, decides
            between colour and grey images.
        img_size: height and width in px; default: the network's.

    Returns:
        The batch ``(B, C, H, W)`` for the network, and the same images from 0 to 1, for drawing.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is no image or of 32 bits a pixel (see ``images.decode_image``), no file at all, or a
            network that takes neither 1 nor 3 channels.
    """
    if not paths:
        raise ValueError('there is no image to read')
    config = image_config(model, img_size)
    channels, mean, std = config['input_size'][0], config['mean'], config['std']
    if channels not in MODES:
        raise ValueError(f'the network takes images of {channels} channels; image files have 1 (grey) or 3 (colour)')
    _, transform = create_transforms(config)
    largest: dict[Path, int] = {}
    images = torch.stack([transform(_read(Path(path), MODES[channels], largest)) for path in paths])
    for path, text in check_depth(largest).items():
        raise ValueError(f'{printable(str(path))} is {text}')
    scale, shift = torch.tensor(std).view(-1, 1, 1), torch.tensor(mean).view(-1, 1, 1)
    return images, (images * scale + shift).clamp(0, 1)


def _read(path: Path, mode: str, largest: dict[Path, int]) -> Image.Image:
    name = printable(str(path))
    if not path.exists():
        raise FileNotFoundError(f'there is no image {name}')
    if path.is_dir():
        raise ValueError(f'{name} is a folder, expected an image; name the images in it')
    if not path.is_file():
        raise ValueError(f'{name} is not a regular file, expected an image')
    try:
        image, deepest = decode_image(path.read_bytes(), mode)
    except UnidentifiedImageError:
        raise ValueError(f'{name} is not an image that Pillow can read') from None
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        raise ValueError(f'{name} is a broken image: {" ".join(str(error).split())}') from error
    if deepest is not None:
        largest[path] = deepest
    return image
