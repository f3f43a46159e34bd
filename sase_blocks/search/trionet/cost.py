"""Cost of a network: multiply-accumulates including attention, parameters, and measured milliseconds; and its limits.

The first two are exact sums over cached blocks, so a search can query thousands of networks. As usual, MACs leave out
batch norms, activations and poolings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any

import torch
from torch import nn

from sase_blocks.models import Architecture
from sase_blocks.models.architecture import Block, Stage
from sase_blocks.profiling import milliseconds_per_image
from sase_blocks.selfattention import TrioBlock

from .meta_device import meta_device
from .space import TrioSpace

# The setting of each limit.
SETTINGS = {'macs': 'max_macs', 'parameters': 'max_params', 'milliseconds': 'max_ms'}


def _stem(reduction: int) -> tuple[int, int]:
    """(kernel size, stride)."""
    return (7, 2) if reduction == 4 else (3, 1)


def _parts(architecture: Architecture) -> Iterator[tuple[Block, int, int, int, int, int]]:
    """(block, channels in, channels out, stride, map height and width, heads) of every block."""
    for i, _, block, channels, stride, size in architecture.places():
        yield block, channels, architecture.stages[i].width, stride, size, architecture.heads


def _build(block: Block, channels: int, out: int, stride: int, size: int, heads: int, **kwargs: Any) -> TrioBlock:
    return TrioBlock(channels, block.operator, out, block.width, stride, block.kernel_size, heads, size, **kwargs)


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


def macs(architecture: Architecture, num_classes: int = 1000, in_chans: int = 3) -> int:
    """Multiply-accumulates for one image of the architecture's size."""
    k, stride = _stem(architecture.reduction)
    stem = k**2 * in_chans * architecture.stem * (-(-architecture.image_size // stride)) ** 2
    return stem + sum(_block(*part)[0] for part in _parts(architecture)) + architecture.stages[-1].width * num_classes


def parameters(architecture: Architecture, num_classes: int = 1000, in_chans: int = 3) -> int:
    """Number of parameters, including norms and position tables."""
    stem = (_stem(architecture.reduction)[0] ** 2 * in_chans + 2) * architecture.stem
    head = (architecture.stages[-1].width + 1) * num_classes
    return stem + sum(_block(*part)[1] for part in _parts(architecture)) + head


class Latency:
    """Milliseconds per image on a device, as a sum over parts, each measured at its first use.

    The parts are the stem's convolution, on RGB images, and the blocks. A network overlaps them, so their sum is not
    its time. But the sum costs a search nothing once the parts are measured. The median of ``rounds`` counts.
    """

    def __init__(self, device: torch.device | str = 'cpu', rounds: int = 9) -> None:
        self.device, self.rounds = torch.device(device), rounds
        self.parts: dict[tuple[Any, ...], float] = {}

    def __call__(self, architecture: Architecture) -> float:
        (k, stride), size = _stem(architecture.reduction), architecture.image_size
        stem = partial(nn.Conv2d, 3, architecture.stem, k, stride, k // 2, bias=False)
        total = self._time((architecture.stem, k, size), stem, 3, size)
        for part in _parts(architecture):
            total += self._time(part, partial(_build, *part), part[1], part[4])
        return total

    def _time(self, key: tuple[Any, ...], build: Callable[[], nn.Module], channels: int, size: int) -> float:
        if key not in self.parts:
            image = torch.randn(1, channels, size, size, device=self.device)
            self.parts[key] = milliseconds_per_image({'': build().to(self.device)}, image, self.rounds)['']
        return self.parts[key]


class Costs:
    """The costs of networks on one data set, the limits on them, and the one that the search weighs against accuracy.

    Args:
        num_classes, in_chans: of the data.
        device: where to measure milliseconds.
        **limits: maximum 'macs' per image, 'parameters' and 'milliseconds' (``Latency``); None for no limit. The search
            weighs the first cost with a limit, or MACs.
    """

    def __init__(
        self, num_classes: int, in_chans: int = 3, device: torch.device | str = 'cpu', **limits: float | None
    ) -> None:
        self.measures: dict[str, Callable[[Architecture], float]] = {
            'macs': lambda network: macs(network, num_classes, in_chans),
            'parameters': lambda network: parameters(network, num_classes, in_chans),
            'milliseconds': Latency(device),
        }
        self.limits = {name: limits.get(name) for name in self.measures}
        self.given = {name: most for name, most in self.limits.items() if most is not None}
        self.objective = next(iter(self.given), 'macs')

    def fit(self, network: Architecture) -> bool:
        """Whether a network is within all limits."""
        return all(self.measures[name](network) <= most for name, most in self.given.items())

    def __call__(self, network: Architecture) -> float:
        """The cost to weigh."""
        return float(self.measures[self.objective](network))

    def check(self, space: TrioSpace) -> None:
        """Raise a ValueError for a limit below the cheapest network of a space or above the most expensive one."""
        for name, most in self.given.items():
            timed = name == 'milliseconds'  # to measure every part of a space would take long
            low, high = (
                bound(space.end(extent) if timed else space, self.measures[name], pick)
                for extent, pick in (('smallest', min), ('largest', max))
            )
            if not low[0] <= most <= high[0]:
                unit, scale = ('ms', 1.0) if timed else ('M', 1e6)
                text, least, largest = (f'{value / scale:.4g} {unit}' for value in (most, low[0], high[0]))
                where = 'below the cheapest' if most < low[0] else 'above the most expensive'
                raise ValueError(
                    f'{SETTINGS[name]} is {text}, {where} network of the space, which go from {least} ({low[1]}) to '
                    f'{largest} ({high[1]}); choose a limit between them' + ('' if most < low[0] else ', or none')
                )


def count_number(text: str | float | None) -> int | None:
    """Parse a count such as '300M', '1.2G', '25k' or '5e6'. Raises ValueError for another text or a count below 1."""
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
    """The cheapest (``pick=max``: the most expensive) network of a space, exactly, by a cost that adds up over blocks.

    A block's cost depends only on its own choices, its stage's width and the width before it. So this tracks the best
    network for every width, stage by stage.
    """

    def build(image: int, *stages: Stage) -> Architecture:
        return Architecture(image, space.stem, space.reduction, space.heads, stages)

    ends: list[Architecture] = []
    for image in space.image_sizes:
        best: list[tuple[Stage, ...]] = [()]
        for number, (depths, widths) in enumerate(zip(space.depths, space.widths, strict=True), start=1):
            found = []
            for width in widths:
                blocks = space.blocks[number, width].values()
                options = []
                for before in best:
                    first = pick(blocks, key=lambda one: measure(build(image, *before, Stage(width, (one,)))))
                    more = pick(blocks, key=lambda one: measure(build(image, *before, Stage(width, (first, one)))))
                    options.append((*before, Stage(width, (first, *[more] * (pick(depths) - 1)))))
                found.append(pick(options, key=lambda stages: measure(build(image, *stages))))
            best = found
        ends += [build(image, *stages) for stages in best]
    network = pick(ends, key=measure)
    return measure(network), network
