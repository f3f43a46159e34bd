"""The space of a TrioNet search (from the abstract of arXiv 2111.07547), its points, and how they are drawn.

Only the paper's three operators are public. Not in the paper: both spaces here. A point is an ``Architecture``. A
search works on genes: every choice by name, as text, for all blocks that a network can have, so a gene keeps its
meaning when the depth changes. Genomes that differ only in unused blocks are the same point.

The public part of the paper only names Hierarchical Sampling; this is our interpretation. If every block draws its
operator independently, nearly every network is an even mixture: all of 16 blocks are convolutions once in 43 million
draws, so pure networks are never trained and are then ranked wrongly. Hierarchical Sampling first draws a distribution
over the operators, then every block's operator from it. With the default, Dirichlet(1, 1, 1), all compositions (number
of blocks of each kind) of N blocks are equally likely, 1 / C(N + 2, 2) each.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np

from sase_blocks.models import Architecture
from sase_blocks.models.architecture import REDUCTIONS, Block, Stage
from sase_blocks.reading import parse_file, parse_json, quoted, shorten
from sase_blocks.selfattention import OPERATORS

Genome = Mapping[str, str]
# Maps a generator and the number of operators to their probabilities, drawn once per network.
Law = Callable[[np.random.Generator, int], np.ndarray]
ENDS = {'smallest': 0, 'largest': -1}  # where an extent is among the values of a gene


@dataclass(frozen=True)
class TrioSpace:
    """The choices and their values. Stages are counted from 1, values are in rising order.

    Args:
        image_sizes: heights and widths of the images, px.
        stem: width of the stem.
        reduction: reduction of the stem, 1 or 4, see ``Architecture``.
        heads: number of heads of all attentions; operator widths are multiples of 2 x heads.
        depths: for each stage, the number of blocks; smaller depths use the first ones.
        widths: for each stage, its channels.
        expansions: for each block, operator width as a fraction of the stage's, rounded to 2 x heads.
        kernels: kernel sizes of each convolution.
        windows: window sizes of each local attention.
        attention_stages: the stages that may use attention; the others use convolutions.
        operators: operators that a block may use.

    Raises:
        ValueError: an inconsistent space; the message names the field.

    Examples:
        >>> space = TrioSpace((32,), 16, 1, 4, ((1, 2),) * 3, ((64,), (128,), (256,)), attention_stages=(2, 3))
        >>> space.size
        800
    """

    image_sizes: tuple[int, ...]
    stem: int
    reduction: int
    heads: int
    depths: tuple[tuple[int, ...], ...]
    widths: tuple[tuple[int, ...], ...]
    expansions: tuple[float, ...] = (0.25,)
    kernels: tuple[int, ...] = (3,)
    windows: tuple[int, ...] = (3, 7)
    attention_stages: tuple[int, ...] = ()
    operators: tuple[str, ...] = tuple(OPERATORS)

    def __post_init__(self) -> None:
        for entry in fields(self):  # lists of a JSON file
            value = getattr(self, entry.name)
            if isinstance(value, list):
                value = tuple(tuple(inner) if isinstance(inner, list) else inner for inner in value)
                object.__setattr__(self, entry.name, value)
        for name, good, expected in self._checks():
            if not good:
                raise ValueError(f'{name} of the space must be {expected}, got {quoted(getattr(self, name))}')

    def _checks(self) -> Iterator[tuple[str, bool, str]]:
        """Fields, whether their values are right, and what they must be. A check may assume the ones before it."""
        for name in ('stem', 'heads'):
            yield name, _is_rising((getattr(self, name),)), 'an int of at least 1'
        yield 'reduction', self.reduction in REDUCTIONS, 'one of 1, 4'
        for name in ('image_sizes', 'kernels', 'windows'):
            yield name, _is_rising(getattr(self, name)), 'ints of at least 1 in rising order'
            yield name, name == 'image_sizes' or all(k % 2 for k in getattr(self, name)), 'odd'
        for name in ('depths', 'widths'):
            value = getattr(self, name)
            good = isinstance(value, tuple) and len(value) > 0 and all(map(_is_rising, value))
            yield name, good, 'for each stage ints of at least 1 in rising order'
        stages, chosen = len(self.depths), self.attention_stages
        yield 'widths', len(self.widths) == stages, f'for as many stages as depths, which has {stages}'
        yield 'expansions', _is_rising(self.expansions, (int, float)), 'numbers above 0 in rising order'
        good = isinstance(self.operators, tuple) and 0 < len(set(self.operators)) == len(self.operators)
        yield 'operators', good and set(self.operators) <= set(OPERATORS), f'some of {", ".join(OPERATORS)}'
        every = set(range(1, stages + 1))
        good = chosen == () or (_is_rising(chosen) and set(chosen) <= every)
        yield 'attention_stages', good, f'stages from 1 to {stages} in rising order'
        good = 'conv' in self.operators or set(chosen) == every
        yield 'attention_stages', good, "all stages, as 'conv' is not among the operators"

    # ---- choices ----

    def width(self, stage_width: int, expansion: float) -> int:
        """Channels of an operator: ``expansion`` times its stage's, rounded to the nearest multiple of 2 x heads."""
        unit = 2 * self.heads
        return max(unit, int(stage_width * expansion / unit + 0.5) * unit)

    def stage_operators(self, stage: int) -> tuple[str, ...]:
        """The operators that a block of a stage may use."""
        return self.operators if stage in self.attention_stages else ('conv',)

    def sizes(self, operator: str) -> tuple[int | None, ...]:
        """The kernels or windows of an operator; (None,) for axial attention."""
        return {'conv': self.kernels, 'local': self.windows, 'axial': (None,)}[operator]

    @cached_property
    def blocks(self) -> dict[tuple[int, int], dict[str, Block]]:
        """The choices of a block by (stage, width): gene value -> block. Several values may give one block."""
        return {
            (stage, width): {
                # All digits of the expansion, so that rounding does not depend on the text.
                f'{operator}{size or ""}/{float(expansion)}': Block(operator, size, self.width(width, expansion))
                for operator in self.stage_operators(stage)
                for size in self.sizes(operator)
                for expansion in self.expansions
            }
            for stage, widths in enumerate(self.widths, start=1)
            for width in widths
        }

    @cached_property
    def genes(self) -> dict[str, tuple[str, ...]]:
        """Every gene and its values, as text."""
        found = {'image': tuple(map(str, self.image_sizes))}
        for stage, (depths, widths) in enumerate(zip(self.depths, self.widths, strict=True), start=1):
            found[f'stage {stage} depth'] = tuple(map(str, depths))
            found[f'stage {stage} width'] = tuple(map(str, widths))
            for number in range(1, max(depths) + 1):
                found[f'stage {stage} block {number}'] = tuple(self.blocks[stage, widths[0]])
        return found

    def architecture(self, genome: Genome) -> Architecture:
        """The point of a genome. Raises ValueError for a missing gene or an invalid value."""
        for name, values in self.genes.items():
            if genome.get(name) not in values:
                raise ValueError(f'gene {name!r} must be one of {", ".join(values)}, got {genome.get(name)!r}')
        stages = []
        for stage in range(1, len(self.depths) + 1):
            width, depth = (int(genome[f'stage {stage} {name}']) for name in ('width', 'depth'))
            chosen = (genome[f'stage {stage} block {number}'] for number in range(1, depth + 1))
            stages.append(Stage(width, tuple(self.blocks[stage, width][value] for value in chosen)))
        return Architecture(int(genome['image']), self.stem, self.reduction, self.heads, tuple(stages))

    def check(self, architecture: Architecture) -> None:
        """Raise a ValueError that names the first mismatch if an architecture is not in this space."""
        allowed: list[tuple[str, Any, tuple[Any, ...]]] = [
            *((name, getattr(architecture, name), (getattr(self, name),)) for name in ('stem', 'reduction', 'heads')),
            ('number of stages', len(architecture.stages), (len(self.depths),)),
            ('image size', architecture.image_size, self.image_sizes),
        ]
        stages = zip(architecture.stages, self.depths, self.widths, strict=False)
        for number, (stage, depths, stage_widths) in enumerate(stages, start=1):
            of, widths = f'stage {number}:', tuple(dict.fromkeys(self.width(stage.width, e) for e in self.expansions))
            allowed += [(f'{of} depth', len(stage.blocks), depths), (f'{of} width', stage.width, stage_widths)]
            for block in stage.blocks:
                allowed += [
                    (f'{of} operator', block.operator, self.stage_operators(number)),
                    (f'{of} size of {block}', block.kernel_size, self.sizes(block.operator)),
                    (f'{of} width of {block}', block.width, widths),
                ]
        for name, value, values in allowed:
            if value not in values:
                known = ', '.join(map(str, values))
                raise ValueError(f'the architecture is not in this space: {name} is {value}, not one of {known}')

    def end(self, extent: str) -> TrioSpace:
        """The part of the space with its 'largest' or its 'smallest' sizes. The operators stay free."""
        at = ENDS[extent]
        sizes: dict[str, Any] = {
            name: (getattr(self, name)[at],) for name in ('image_sizes', 'expansions', 'kernels', 'windows')
        }
        sizes |= {name: tuple((values[at],) for values in getattr(self, name)) for name in ('depths', 'widths')}
        return replace(self, **sizes)

    @cached_property
    def size(self) -> int:
        """Number of different networks in the space."""
        count = len(self.image_sizes)
        for stage, (depths, widths) in enumerate(zip(self.depths, self.widths, strict=True), start=1):
            count *= sum(len(set(self.blocks[stage, w].values())) ** depth for w in widths for depth in depths)
        return count

    # ---- text ----

    def to_dict(self) -> dict[str, Any]:
        """As plain data, the same for a space from JSON or from Python."""
        return dict(json.loads(json.dumps(asdict(self))))

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> TrioSpace:
        """Inverse of ``to_dict``. Raises ValueError for anything else."""
        names = [entry.name for entry in fields(cls)]
        if not isinstance(value, Mapping):
            raise ValueError(f'a space must be a JSON object of {", ".join(names)}, got {quoted(value)}')
        if unknown := sorted(set(value) - set(names)):
            raise ValueError(f'a space has no {shorten(", ".join(unknown))}; it has {", ".join(names)}')
        try:
            return cls(**value)
        except TypeError as error:
            raise ValueError(f'not a space: {str(error).replace("TrioSpace.__init__() ", "")}') from None

    @classmethod
    def parse(cls, text: str) -> TrioSpace:
        """A built-in space by name, or a space from a JSON file. Raises ValueError as the class, or for neither."""
        if text in SPACES:
            return SPACES[text]
        if not text.endswith('.json'):
            raise ValueError(f'there is no space {quoted(text)}: give {", ".join(SPACES)} or a .json file')
        return parse_file(text, 'space', lambda content: cls.from_dict(parse_json(content, 'a space')))


# ---- draws ----


def hierarchical(rng: np.random.Generator, count: int, concentration: float = 1.0) -> np.ndarray:
    """Probabilities from Dirichlet(concentration, ...): 1 for equally likely compositions, less for purer networks."""
    return rng.dirichlet(np.full(count, concentration))


def uniform(rng: np.random.Generator, count: int) -> np.ndarray:
    """Equal probabilities: every block draws its operator independently."""
    return np.full(count, 1 / count)


LAWS: dict[str, Law] = {'hierarchical': hierarchical, 'uniform': uniform}


def draw(
    space: TrioSpace, rng: np.random.Generator, law: Law = hierarchical, extent: str | None = None
) -> dict[str, str]:
    """A random genome: operators by ``law``, everything else uniformly.

    Args:
        law: see ``Law``. Blocks that may not be attentions are always convolutions.
        extent: 'largest' or 'smallest': all sizes at that end, with operators still drawn to favour none.

    Raises:
        ValueError: an unknown extent, or a law that does not return probabilities.
    """
    if extent not in (None, *ENDS):
        raise ValueError(f"extent must be 'largest', 'smallest' or None, got {extent!r}")
    chances = np.asarray(law(rng, len(space.operators)), dtype=np.float64)
    if chances.shape != (len(space.operators),) or not ((chances >= 0).all() and abs(chances.sum() - 1) <= 1e-6):
        raise ValueError(f'a law must return {len(space.operators)} probabilities, got {chances!r}')
    genome = {}
    for name, values in space.genes.items():
        choices = list(values)
        if ' block ' in name:
            allowed = space.stage_operators(int(name.split()[1]))
            operator = space.operators[rng.choice(len(chances), p=chances / chances.sum())]
            operator = operator if operator in allowed else allowed[0]
            choices = [value for value in values if value.startswith(operator)]
        # The values of a gene rise, also within one operator.
        genome[name] = choices[int(rng.integers(len(choices))) if extent is None else ENDS[extent]]
    return genome


def _is_rising(values: Any, kinds: Any = int) -> bool:
    """Whether this is a tuple of one or more finite numbers of these kinds above 0 in rising order."""
    if not isinstance(values, tuple) or not values:
        return False
    good = all(isinstance(value, kinds) and not isinstance(value, bool) for value in values)
    return good and all(a < b for a, b in itertools.pairwise((0, *values, math.inf)))


SPACES = {
    # ResNet-50 at its widest, without attention in the first stage, where maps are largest.
    'imagenet': TrioSpace(
        image_sizes=(160, 192, 224),
        stem=64,
        reduction=4,
        heads=8,
        depths=((2, 3), (2, 3, 4), (2, 4, 6), (2, 3)),
        widths=((128, 256), (256, 384, 512), (512, 768, 1024), (1024, 1536, 2048)),
        expansions=(0.125, 0.1875, 0.25),
        kernels=(3, 5),
        windows=(3, 5, 7),
        attention_stages=(2, 3, 4),
    ),
    # Small enough for two CPU cores: attention at 16 x 16 and 8 x 8.
    'cifar': TrioSpace(
        image_sizes=(32,),
        stem=16,
        reduction=1,
        heads=4,
        depths=((1, 2), (1, 2, 3), (1, 2, 3)),
        widths=((32, 64), (64, 96, 128), (128, 192, 256)),
        expansions=(0.125, 0.25),
        kernels=(3, 5),
        windows=(3, 5, 7),
        attention_stages=(2, 3),
    ),
}
