"""The data of a search: a training set split into training and held-out images.

The split depends only on the seed and keeps the share of every class. Held-out images are not augmented.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sase_blocks.data import (
    SMALL,
    Batches,
    Samples,
    SmallImages,
    TransformedSamples,
    create_transforms,
    derive_seed,
    inspect_images,
    load_small_images,
)

SPLIT, RELABEL = 101, 102  # streams of random numbers, see derive_seed
# Images (N, C, H, W) of uint8, labels (N,), names of the classes.
Arrays = tuple[Tensor, Tensor, Sequence[str]]


@dataclass
class SearchData:
    """The two parts of a training set."""

    training: Batches  # train the weights
    held_out: Batches  # train the mixture of a search, or score its candidates
    facts: dict[str, Any]  # for the checkpoint: classes, counts, fingerprint, indices of the held-out images


def describe_data(facts: Mapping[str, Any]) -> str:
    """The facts of ``SearchData`` in a few words."""
    return (
        f'{facts["weights"]} training and {facts["held_out"]} held-out images of {len(facts["classes"])} classes '
        f'(data {facts["fingerprint"]})'
    )


def split_data(
    data: Samples | Arrays,
    config: Any,
    data_config: Mapping[str, Any] | None = None,
    *,
    device: torch.device | str = 'cpu',
    null: bool = False,
    trains_on_both: bool = True,
) -> SearchData:
    """Split a training set, with the same share of every class in both parts.

    Args:
        data: the training set. Images up to 64 px are decoded once and kept on the device.
        config: the settings of a search.
        data_config: of ``data.image_config``, for ``Samples``. Arrays are normalised by the mean and the standard
            deviation of their training part.
        null: shuffle the labels within each part. Nothing that is learned then holds in the other part, and what still
            wins does so by construction.
        trains_on_both: whether the held-out part needs a full batch, too.

    Raises:
        ValueError: a class with fewer than two images, a part with fewer images than one batch, a broken image, arrays
            of another form.
    """
    data_config = data_config or {}
    if isinstance(data, Samples):
        labels, classes = torch.as_tensor(data.labels()), list(data.classes)
        fingerprint = data.fingerprint or inspect_images(data)[1]
    else:
        check_arrays(*data[:2])
        labels, classes = data[1], list(data[2])
        fingerprint = hashlib.sha256(data[0].numpy().tobytes() + labels.numpy().tobytes()).hexdigest()[:16]
    parts = split_classes(labels, classes, config.fraction, config.seed)
    if null:
        labels = shuffle_labels(labels, parts, config.seed)
    facts = {'classes': classes, 'weights': len(parts[0]), 'held_out': len(parts[1]), 'fingerprint': fingerprint}
    for part, name in zip(parts, ('training', 'held-out') if trains_on_both else ('training',), strict=False):
        if len(part) < config.batch_size:
            raise ValueError(
                f'{len(part)} {name} images are fewer than one batch of {config.batch_size}; '
                f'lower --batch-size or change --fraction'
            )
    sets: list[TransformedSamples | SmallImages]
    if isinstance(data, Samples) and max(size := data_config['input_size'][1:]) > SMALL:
        transforms = create_transforms(data_config, hflip=config.hflip)
        sets = [
            TransformedSamples(data.part(part), transforms[stream], config.seed, stream, labels[part].tolist())
            for stream, part in enumerate(parts)
        ]
    else:
        if isinstance(data, Samples):
            images, mean, std = load_small_images(data, size), data_config['mean'], data_config['std']
        else:
            images = data[0]
            deviation, average = torch.std_mean(images[parts[0]].float() / 255, dim=(0, 2, 3))
            mean, std = average.tolist(), deviation.clamp_min(1e-3).tolist()
        hflip = (config.hflip, None)  # held-out images are not augmented
        sets = [
            SmallImages(images[part], labels[part], mean, std, config.seed, stream, hflip[stream], device)
            for stream, part in enumerate(parts)
        ]
    layout = config.memory_format
    training, held_out = (Batches(p, workers=config.workers, device=device, memory_format=layout) for p in sets)
    return SearchData(training, held_out, {**facts, 'held_out_indices': parts[1]})


def check_arrays(images: Tensor, labels: Tensor) -> None:
    """Raise a ValueError unless these are images and labels as ``Arrays`` holds them."""
    if images.dtype != torch.uint8 or images.dim() != 4 or len(images) != len(labels):
        raise ValueError(
            f'expected uint8 images (N, C, H, W) and N labels, got {images.dtype} {tuple(images.shape)} and '
            f'{len(labels)} labels'
        )


def split_classes(labels: Tensor, classes: Sequence[str], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Sorted positions of the two parts. The first has ``fraction`` of every class, each at least one image of it."""
    parts: tuple[list[int], list[int]] = [], []
    generator = torch.Generator().manual_seed(derive_seed(seed, SPLIT))
    for number, name in enumerate(classes):
        members = torch.nonzero(labels == number).flatten()
        if len(members) < 2:
            raise ValueError(f'class {name!r} has {len(members)} training images, a split in two parts needs 2 or more')
        members = members[torch.randperm(len(members), generator=generator)]
        cut = min(max(round(fraction * len(members)), 1), len(members) - 1)
        parts[0].extend(members[:cut].tolist())
        parts[1].extend(members[cut:].tolist())
    return sorted(parts[0]), sorted(parts[1])


def shuffle_labels(labels: Tensor, parts: Sequence[Sequence[int]], seed: int) -> Tensor:
    """The labels, shuffled among the images of each part."""
    new = labels.clone()
    for stream, positions in enumerate(parts):
        generator = torch.Generator().manual_seed(derive_seed(seed, RELABEL, stream))
        index = torch.tensor(positions)
        new[index] = labels[index[torch.randperm(len(index), generator=generator)]]
    return new
