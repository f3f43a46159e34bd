"""Batches of images on the device, for the steps of a search.

Images up to 64 px lie on the device as bytes and are augmented there, a whole batch at a time; larger ones come from
loading processes. In both ways what a step gets is a function of (seed, epoch, step) alone, whatever the number of
processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from sase_blocks.data import AUGMENT, SHUFFLE, Samples, TransformedSamples, derive_seed
from sase_blocks.runs import annotate_errors

__all__ = ['Batches', 'LoadedBatches', 'MemoryBatches']

PADDING = 4  # px, of the random crop of small images


class Batches(Protocol):
    """Images and labels."""

    def __len__(self) -> int:
        """Images."""

    def epoch(self, epoch: int, batch_size: int, first: int, last: int, rank: int, world: int) -> Iterator[Any]:
        """(images, labels) on the device for the steps ``first`` to ``last`` of an epoch: this process's part."""


def order_of(count: int, seed: int, stream: int, epoch: int, wanted: int) -> Tensor:
    """``wanted`` positions below ``count``, shuffled as a function of (seed, stream, epoch), repeated if needed."""
    parts, have, again = [], 0, 0
    while have < wanted:
        generator = torch.Generator().manual_seed(derive_seed(seed, SHUFFLE, stream, epoch, again))
        parts.append(torch.randperm(count, generator=generator))
        have, again = have + count, again + 1
    return torch.cat(parts)[:wanted]


def share(batch_size: int, rank: int, world: int) -> slice:
    """The part of a batch that one process works on."""
    size = batch_size // world
    return slice(rank * size, (rank + 1) * size)


class MemoryBatches:
    """Small images that lie on the device as bytes.

    Args:
        images: (N, C, H, W), uint8.
        labels: (N,), int64.
        mean, std: of each channel, in parts of 255.
        augment: whether to crop at random (4 px of padding, black) and to flip.
        hflip: probability of a flip.
        seed, stream: of order and augmentation; ``stream`` tells the halves apart.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        augment: bool,
        hflip: float = 0.5,
        seed: int = 0,
        stream: int = 0,
        device: torch.device | str = 'cpu',
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        self.images, self.labels = images.to(device), labels.to(device)
        self.mean = torch.tensor(mean, device=device).mul(255).reshape(1, -1, 1, 1)
        self.std = torch.tensor(std, device=device).mul(255).reshape(1, -1, 1, 1)
        self.augment, self.hflip = augment, hflip
        self.seed, self.stream = seed, stream
        self.memory_format = memory_format

    def __len__(self) -> int:
        return len(self.labels)

    def epoch(
        self, epoch: int, batch_size: int, first: int, last: int, rank: int = 0, world: int = 1
    ) -> Iterator[tuple[Tensor, Tensor]]:
        device = self.images.device
        order = order_of(len(self), self.seed, self.stream, epoch, last * batch_size).to(device)
        part = share(batch_size, rank, world)
        draws = None
        if self.augment:
            # Of every image: what happens to it in an epoch does not depend on when its turn comes.
            generator = torch.Generator().manual_seed(derive_seed(self.seed, AUGMENT, self.stream, epoch))
            corner = torch.randint(0, 2 * PADDING + 1, (len(self), 2), generator=generator)
            flip = torch.rand(len(self), 1, generator=generator) < self.hflip
            draws = torch.cat([corner, flip], 1).to(device)
        for step in range(first, last):
            index = order[step * batch_size : (step + 1) * batch_size][part]
            images = self.images[index]
            if draws is not None:
                images = cropped(images, draws[index])
            images = (images - self.mean) / self.std
            yield images.contiguous(memory_format=self.memory_format), self.labels[index]


def cropped(images: Tensor, draws: Tensor) -> Tensor:
    """(B, C, H, W) padded by 4 px of zeros, cut to its size at the corner draws[:, :2], flipped where draws[:, 2]."""
    b, _, h, w = images.shape
    padded = F.pad(images, (PADDING,) * 4).permute(0, 2, 3, 1)
    rows = draws[:, 0, None] + torch.arange(h, device=images.device)
    columns = torch.arange(w, device=images.device)
    columns = torch.where(draws[:, 2, None] > 0, w - 1 - columns, columns) + draws[:, 1, None]
    which = torch.arange(b, device=images.device)[:, None, None]
    return padded[which, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


class _Plan(Sampler[list[tuple[int, int]]]):
    """A batch sampler whose batches are set before each epoch, also for workers that live through many."""

    def __init__(self) -> None:
        self.batches: list[list[tuple[int, int]]] = []

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class LoadedBatches:
    """Images that processes load and transform. ``labels`` takes the place of the data's, which may be shuffled."""

    def __init__(
        self,
        samples: Samples,
        labels: Tensor,
        transform: Any,
        *,
        seed: int,
        stream: int,
        workers: int,
        device: torch.device | str,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        self.samples, self.labels = samples, labels
        self.seed, self.stream = seed, stream
        self.device, self.memory_format = torch.device(device), memory_format
        self.plan = _Plan()
        self.loader = DataLoader(
            _Numbered(TransformedSamples(samples, transform, derive_seed(seed, AUGMENT, stream))),
            batch_sampler=self.plan,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=self.device.type == 'cuda',
        )

    def __len__(self) -> int:
        return len(self.samples)

    def epoch(
        self, epoch: int, batch_size: int, first: int, last: int, rank: int = 0, world: int = 1
    ) -> Iterator[tuple[Tensor, Tensor]]:
        order = order_of(len(self), self.seed, self.stream, epoch, last * batch_size).tolist()
        part = share(batch_size, rank, world)
        self.plan.batches = [
            [(epoch, position) for position in order[step * batch_size : (step + 1) * batch_size][part]]
            for step in range(first, last)
        ]
        for images, positions in annotate_errors(self.loader):
            images = images.to(self.device, non_blocking=True).contiguous(memory_format=self.memory_format)
            yield images, self.labels[positions].to(self.device, non_blocking=True)


class _Numbered(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """The transformed samples with their position in the place of their label."""

    def __init__(self, samples: TransformedSamples) -> None:
        self.samples = samples

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        return self.samples[key][0], key[1]
