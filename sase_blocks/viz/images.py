"""Images from files, as a network takes them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import torch
from PIL import Image, UnidentifiedImageError
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn

__all__ = ['read_images']


def read_images(
    paths: Sequence[str | os.PathLike[str]], model: nn.Module, img_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Read image files and bring them to the network's size and normalisation, with timm's evaluation transforms.

    Args:
        paths: files that Pillow can read.
        model: a network; its ``pretrained_cfg`` says size, crop, interpolation, mean and standard deviation, and timm's
            defaults (224 px, ImageNet) stand in for what it does not say. Its first convolution says whether it takes
            colour or grey images.
        img_size: height and width in px; default: the network's.

    Returns:
        The batch ``(B, C, H, W)`` for the network, and the same images from 0 to 1, for drawing.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is no image, no file at all, or a network that takes neither 1 nor 3 channels.
    """
    if not paths:
        raise ValueError('there is no image to read')
    depth = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), 3)
    if depth not in (1, 3):
        raise ValueError(f'the network takes images of {depth} channels; image files have 1 (grey) or 3 (colour)')
    config = resolve_data_config({} if img_size is None else {'img_size': img_size}, model=model)
    mean, std = config['mean'], config['std']
    if depth == 1:
        mean, std = (fmean(mean),), (fmean(std),)
    config |= {'mean': mean, 'std': std}
    transform = create_transform(**config, is_training=False)
    images = torch.stack([transform(_read(Path(path), 'L' if depth == 1 else 'RGB')) for path in paths])
    scale, shift = torch.tensor(std).view(-1, 1, 1), torch.tensor(mean).view(-1, 1, 1)
    return images, (images * scale + shift).clamp(0, 1)


def _read(path: Path, mode: str) -> Image.Image:
    if not path.exists():
        raise FileNotFoundError(f'there is no image {path}')
    if path.is_dir():
        raise ValueError(f'{path} is a folder, expected an image; name the images in it')
    try:
        with Image.open(path) as image:
            return image.convert(mode)
    except UnidentifiedImageError:
        raise ValueError(f'{path} is no image that Pillow knows') from None
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        raise ValueError(f'{path} is a broken image: {" ".join(str(error).split())}') from error
