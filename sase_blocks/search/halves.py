"""Two halves of one training set: one trains the weights, the other is held out, and is not augmented.

Which image is in which half is a function of the seed, with the same share of every class in both. Images up to 64 px
are decoded once.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision import transforms
from tqdm import tqdm

from sase_blocks.data import (
    SMALL,
    Samples,
    create_transforms,
    derive_seed,
    inspect_images,
    open_training_data,
    same_data,
)
from sase_blocks.runs import drop_broken, resuming

from .batches import Batches, LoadedBatches, MemoryBatches

__all__ = [
    'Arrays',
    'Halves',
    'check_images',
    'decode',
    'describe_facts',
    'find_samples',
    'halves',
    'halves_of_images',
    'open_halves',
]

SPLIT, RELABEL = 101, 102  # streams of random numbers, see derive_seed
# Images (N, C, H, W) of uint8, labels (N,), names of the classes.
Arrays = tuple[Tensor, Tensor, Sequence[str]]


@dataclass
class Halves:
    """What a search learns from.

    Attributes:
        weights: the half that trains the weights.
        held_out: the half that trains the logits.
        facts: classes, counts, the fingerprint of the data and the indices of the held-out half, for the checkpoint.
    """

    weights: Batches
    held_out: Batches
    facts: dict[str, Any]

    @property
    def classes(self) -> list[str]:
        return list(self.facts['classes'])

    def __str__(self) -> str:
        return describe_facts(self.facts)


def describe_facts(facts: Mapping[str, Any]) -> str:
    """A line on the data of a search."""
    return (
        f'{facts["weights"]} images for the weights and {facts["held_out"]} held out, of '
        f'{len(facts["classes"])} classes (data {facts["fingerprint"]})'
    )


def find_samples(config: Any, accelerator: Any) -> Samples:
    """The training split that a configuration names; raises as ``data.open_training_data``."""
    with accelerator.main_process_first():  # it may download
        return open_training_data(
            config.data,
            config.dataset,
            split=config.train_split,
            download=config.download,
            num_classes=config.num_classes,
        )


def open_halves(
    config: Any,
    accelerator: Any,
    data: Samples | Arrays,
    data_config: Mapping[str, Any],
    memory_format: torch.memory_format,
    *,
    null: bool = False,
    trains_on_both: bool = True,
    checked: bool = False,
) -> Halves:
    """The halves of a search by its settings: without broken images, on the device, at least one batch to train on.

    Args:
        config: with fraction, hflip, seed, batch_size, workers, skip_broken.
        accelerator: accelerate's.
        data: the training split, or images, labels and classes, see ``halves_of_images``.
        data_config, null: see ``halves``.
        trains_on_both: whether the held-out half is trained on, too.
        checked: whether broken images are left out already.

    Raises:
        ValueError: a broken image, too few images.
    """
    common: dict[str, Any] = {
        'fraction': config.fraction,
        'null': null,
        'hflip': config.hflip,
        'seed': config.seed,
        'device': accelerator.device,
        'memory_format': memory_format,
    }
    if isinstance(data, Samples):
        if not checked:
            (data,) = drop_broken(config.skip_broken, accelerator, data)
        workers, main = min(config.workers, os.cpu_count() or 1), accelerator.is_main_process
        found = halves(data, data_config, workers=workers, progress=main, **common)
    else:
        found = halves_of_images(*data, **common)
    parts = [('for the weights', found.weights)] + ([('held out', found.held_out)] if trains_on_both else [])
    for part, images in parts:
        if len(images) < config.batch_size:
            raise ValueError(
                f'{len(images)} images {part} are fewer than one batch of {config.batch_size}; '
                f'lower --batch-size or change --fraction'
            )
    return found


def check_same_data(last: Path, saved: Mapping[str, Any], found: Halves) -> None:
    """Raise a ValueError unless the halves are of the data whose facts the checkpoint ``last`` holds."""
    with resuming(last):
        same, before = same_data(saved, found.facts), describe_facts(saved)
    if not same:
        raise ValueError(f'{last.parent} holds a search on other data: {before}, this is {describe_facts(found.facts)}')


def halves(
    samples: Samples,
    data_config: Mapping[str, Any],
    *,
    fraction: float = 0.5,
    null: bool = False,
    hflip: float = 0.5,
    seed: int = 0,
    workers: int = 0,
    device: torch.device | str = 'cpu',
    memory_format: torch.memory_format = torch.contiguous_format,
    progress: bool = True,
) -> Halves:
    """Cut a training set in two, with the same share of every class in both.

    Args:
        samples: the training set.
        data_config: of ``data.image_config``: input_size, mean, std, ...
        fraction: of each class that trains the weights, between 0 and 1.
        null: give every image the label of another one, at random, within each half: nothing can then be learned
            that holds in the other half, and what still wins does so by construction.
        hflip: probability of a flip of the weights' images.
        seed: of the split, the order and the augmentation.
        workers: processes that load images above 64 px.

    Raises:
        ValueError: a class with fewer than two images, a broken image.
    """
    labels = torch.as_tensor(samples.labels())
    print_of = samples.fingerprint or inspect_images(samples, progress=progress)[1]
    _, height, width = data_config['input_size']
    placed: dict[str, Any] = {'device': device, 'memory_format': memory_format}
    if max(height, width) <= SMALL:
        images = decode(samples, (height, width), progress=progress)
        statistics = (data_config['mean'], data_config['std'])
        return halves_of_images(
            images, labels, samples.classes, fraction=fraction, null=null, hflip=hflip, seed=seed,
            statistics=statistics, print_of=print_of, **placed,
        )  # fmt: skip
    parts, used, facts = _cut(labels, samples.classes, fraction, null, seed, print_of)
    weights, held_out = (
        LoadedBatches(
            samples.part(part),
            used[part],
            transform,
            seed=seed,
            stream=stream,
            workers=workers,
            **placed,
        )
        for stream, (part, transform) in enumerate(zip(parts, create_transforms(data_config, hflip=hflip), strict=True))
    )
    return Halves(weights, held_out, facts)


def halves_of_images(
    images: Tensor,
    labels: Tensor,
    classes: Sequence[str],
    *,
    fraction: float = 0.5,
    null: bool = False,
    hflip: float = 0.5,
    seed: int = 0,
    statistics: tuple[Sequence[float], Sequence[float]] | None = None,
    print_of: str | None = None,
    device: torch.device | str = 'cpu',
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Halves:
    """``halves`` of images that are a tensor already.

    Args:
        images: (N, C, H, W), uint8.
        labels: (N,), int64.
        statistics: mean and standard deviation of each channel, in parts of 255; None: those of the weights' half.
        print_of: the fingerprint of the data; None: a hash of images and labels.
    """
    check_images(images, labels)
    if print_of is None:
        print_of = hashlib.sha256(images.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()[:16]
    parts, used, facts = _cut(labels, classes, fraction, null, seed, print_of)
    if statistics is None:
        std, mean = torch.std_mean(images[parts[0]].float() / 255, dim=(0, 2, 3))
        statistics = (mean.tolist(), std.clamp_min(1e-3).tolist())
    weights, held_out = (
        MemoryBatches(
            images[part],
            used[part],
            mean=statistics[0],
            std=statistics[1],
            augment=stream == 0,
            hflip=hflip,
            seed=seed,
            stream=stream,
            device=device,
            memory_format=memory_format,
        )
        for stream, part in enumerate(parts)
    )
    return Halves(weights, held_out, facts)


def check_images(images: Tensor, labels: Tensor) -> None:
    """Raise a ValueError unless these are images as ``Arrays`` holds them."""
    if images.dtype != torch.uint8 or images.dim() != 4 or len(images) != len(labels):
        raise ValueError(
            f'expected uint8 images (N, C, H, W) and N labels, got {images.dtype} {tuple(images.shape)} and '
            f'{len(labels)} labels'
        )


def _cut(
    labels: Tensor, classes: Sequence[str], fraction: float, null: bool, seed: int, print_of: str
) -> tuple[tuple[list[int], list[int]], Tensor, dict[str, Any]]:
    parts = split_classes(labels, classes, fraction, seed)
    facts = {
        'classes': list(classes),
        'weights': len(parts[0]),
        'held_out': len(parts[1]),
        'fingerprint': print_of,
        'held_out_indices': parts[1],
    }
    return parts, relabelled(labels, parts, seed) if null else labels, facts


def split_classes(labels: Tensor, classes: Sequence[str], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Positions of the two parts, each sorted; ``fraction`` of every class, and at least one image of it, in each."""
    first: list[int] = []
    second: list[int] = []
    generator = torch.Generator().manual_seed(derive_seed(seed, SPLIT))
    for number, name in enumerate(classes):
        members = torch.nonzero(labels == number).flatten()
        if len(members) < 2:
            raise ValueError(f'class {name!r} has {len(members)} training images, a split in two parts needs 2 or more')
        members = members[torch.randperm(len(members), generator=generator)]
        cut = min(max(round(fraction * len(members)), 1), len(members) - 1)
        first += members[:cut].tolist()
        second += members[cut:].tolist()
    return sorted(first), sorted(second)


def relabelled(labels: Tensor, parts: Sequence[Sequence[int]], seed: int) -> Tensor:
    """The labels shuffled among the images of each part."""
    new = labels.clone()
    for stream, positions in enumerate(parts):
        generator = torch.Generator().manual_seed(derive_seed(seed, RELABEL, stream))
        index = torch.tensor(positions)
        new[index] = labels[index[torch.randperm(len(index), generator=generator)]]
    return new


def decode(samples: Samples, size: tuple[int, int], *, progress: bool = True) -> Tensor:
    """All images of a split, resized and cut to ``size``. -> (N, C, H, W), uint8.

    Raises:
        ValueError: an image cannot be decoded, the text names it.
    """
    fit = transforms.Compose([transforms.Resize(min(size)), transforms.CenterCrop(size)])
    channels = len(samples.mode)  # 'RGB' or 'L'
    out = np.empty((len(samples), *size, channels), dtype=np.uint8)

    def load(position: int) -> None:
        out[position] = np.asarray(fit(samples.load(position)[0])).reshape(*size, channels)

    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        tqdm(total=len(samples), desc='reading images', unit='img', disable=None if progress else True) as bar,
    ):
        for _ in pool.map(load, range(len(samples))):
            bar.update()
    return torch.from_numpy(out).permute(0, 3, 1, 2).contiguous()
