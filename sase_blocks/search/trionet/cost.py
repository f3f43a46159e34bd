"""Cost of a network: multiply-accumulates including attention, parameters, and measured milliseconds.

The first two are exact sums over cached blocks, so a search can query thousands of networks. MACs do not count batch
norms, activations and poolings, as usual.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from sase_blocks.models import Architecture
from sase_blocks.models.architecture import Block, Stage
from sase_blocks.profiling import milliseconds_per_image
from sase_blocks.selfattention import TrioBlock

from .meta_device import meta_device
from .space import TrioSpace

__all__ = ['Latency', 'Limits', 'bound', 'count_number', 'macs', 'parameters']


@lru_cache(maxsize=65536)
def _block(block: Block, channels: int, out: int, stride: int, size: int, heads: int) -> tuple[int, int]:
    """(MACs, parameters) of one block on a square map."""
    with meta_device() as meta:
        module = _build(block, channels, out, stride, size, heads, device=meta)
    after = -(-size // stride)
    count = block.width * (channels * size**2 + out * after**2)
    if not isinstance(module.shortcut, nn.Identity):
        count += channels * out * after**2
    if isinstance(module.middle, nn.Conv2d):
        count += module.middle.weight.numel() * after**2
    else:
        count += module.middle.multiply_adds(size, size)  # type: ignore[operator]
    return count, sum(p.numel() for p in module.parameters())


def _build(block: Block, channels: int, out: int, stride: int, size: int, heads: int, **kwargs: Any) -> TrioBlock:
    return TrioBlock(channels, block.operator, out, block.width, stride, block.kernel_size, heads, size, **kwargs)


def _sum(architecture: Architecture, which: int) -> int:
    return sum(
        _block(block, channels, architecture.stages[i].width, stride, size, architecture.heads)[which]
        for i, _, block, channels, stride, size in architecture.places()
    )


def macs(architecture: Architecture, num_classes: int = 1000, in_chans: int = 3) -> int:
    """Multiply-accumulates for one image of the architecture's size."""
    k, stride = (7, 2) if architecture.reduction == 4 else (3, 1)
    stem = k**2 * in_chans * architecture.stem * (-(-architecture.image_size // stride)) ** 2
    return stem + _sum(architecture, 0) + architecture.stages[-1].width * num_classes


def parameters(architecture: Architecture, num_classes: int = 1000, in_chans: int = 3) -> int:
    """Number of parameters, including norms and position tables."""
    k = 7 if architecture.reduction == 4 else 3
    stem = (k**2 * in_chans + 2) * architecture.stem
    return stem + _sum(architecture, 1) + (architecture.stages[-1].width + 1) * num_classes


class Latency:
    """Milliseconds per batch on this device, as a sum over parts, each measured at its first use.

    The parts are the stem's convolution, on RGB images, and the blocks. Their sum is not the time of a network, which
    overlaps them, but is free for a search once the parts are measured.

    Args:
        device: where to measure.
        batch: images per batch.
        rounds: number of rounds; the median counts.
    """

    def __init__(self, device: torch.device | str = 'cpu', batch: int = 1, rounds: int = 9) -> None:
        self.device, self.batch, self.rounds = torch.device(device), batch, rounds
        self.parts: dict[tuple[Any, ...], float] = {}

    def __call__(self, architecture: Architecture) -> float:
        total = self._of(('stem', architecture.stem, architecture.reduction, architecture.image_size))
        for i, _, block, channels, stride, size in architecture.places():
            total += self._of((block, channels, architecture.stages[i].width, stride, size, architecture.heads))
        return total

    def _of(self, key: tuple[Any, ...]) -> float:
        if key not in self.parts:
            if key[0] == 'stem':
                _, width, reduction, size = key
                k, channels = (7, 3) if reduction == 4 else (3, 3)
                module: nn.Module = nn.Conv2d(3, width, k, 2 if reduction == 4 else 1, k // 2, bias=False)
            else:
                module, channels, size = _build(*key), key[1], key[4]
            module.to(self.device)
            images = torch.randn(self.batch, channels, size, size, device=self.device)
            self.parts[key] = self.batch * milliseconds_per_image({'': module}, images, self.rounds)['']
        return self.parts[key]


@dataclass(frozen=True)
class Limits:
    """Maximum cost of a network; None for no limit.

    Args:
        macs: multiply-accumulates per image.
        parameters: number of parameters.
        milliseconds: as measured by ``Latency``.
    """

    macs: int | None = None
    parameters: int | None = None
    milliseconds: float | None = None


def count_number(text: str | float | None) -> int | None:
    """Parse a count such as '300M', '1.2G', '25k' or '5e6'.

    Raises:
        ValueError: not a count, or below 1.
    """
    if text is None:
        return None
    units = {'k': 1e3, 'm': 1e6, 'g': 1e9, 'b': 1e9, 't': 1e12}
    stripped = str(text).strip()
    scale = units.get(stripped[-1:].lower(), 1)
    try:
        value = round(float(stripped[:-1] if scale > 1 else stripped) * scale)
    except (ValueError, OverflowError):
        value = 0
    if value < 1:
        raise ValueError(f'a count must be a number such as 300M, 1.2G or 250000, got {text!r}')
    return value


def bound(
    space: TrioSpace, measure: Callable[[Architecture], float], pick: Callable[..., Any] = min
) -> tuple[float, Architecture]:
    """The cheapest (``pick=max``: the most expensive) network of a space by ``macs`` or ``parameters``, exactly.

    The cost is a sum over the blocks, and a block's cost depends only on its own choices, its stage's width and the
    width before it. So it suffices to track, stage by stage, the best network for every width.
    """
    ends = []
    for image in space.image_sizes:

        def cost(stages: tuple[Stage, ...], image: int = image) -> float:
            return measure(Architecture(image, space.stem, space.reduction, space.heads, stages))

        best: list[tuple[Stage, ...]] = [()]
        for number, (depths, widths) in enumerate(zip(space.depths, space.widths, strict=True), start=1):
            best = [
                pick(
                    (s for before in best for s in _stages(space, number, width, depths, before, cost, pick)), key=cost
                )
                for width in widths
            ]
        ends += [
            (cost(stages), Architecture(image, space.stem, space.reduction, space.heads, stages)) for stages in best
        ]
    value, network = pick(ends, key=lambda end: end[0])
    return value, network


def _stages(
    space: TrioSpace,
    number: int,
    width: int,
    depths: tuple[int, ...],
    before: tuple[Stage, ...],
    cost: Callable[[tuple[Stage, ...]], float],
    pick: Callable[..., Any],
) -> Iterator[tuple[Stage, ...]]:
    """``before`` plus one stage of the best blocks, at its minimum and maximum depth."""
    kinds = [
        Block(operator, size, space.width(width, expansion))
        for operator in space.stage_operators(number)
        for size in space.sizes(operator)
        for expansion in space.expansions
    ]
    first = pick(kinds, key=lambda kind: cost((*before, Stage(width, (kind,)))))
    more = pick(kinds, key=lambda kind: cost((*before, Stage(width, (first, kind)))))
    for depth in (depths[0], depths[-1]):
        yield (*before, Stage(width, (first,) + (more,) * (depth - 1)))
