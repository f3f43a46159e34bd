"""The space of the SASE search (arXiv 2411.08333): the choices of the six edges, and the meaning of logits.

The paper's space has 7 operations per edge. Not in the paper: any other choice of names, such as a subset, the extended
sets, or a different list for each edge.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from sase_blocks.blocks import Genotype
from sase_blocks.ops import EXTENDED_SETS, SETS, primitive_name
from sase_blocks.ops.options import split_names
from sase_blocks.reading import parse_file, parse_json, quoted

EDGES = tuple(Genotype.SET_OF)


@dataclass(frozen=True)
class SearchSpace:
    """The choices of each edge: primitives' names or the paper's keys, maybe with options, stored as in ``Genotype``.

    The logits of a space are one flat vector: the operations of edge 0, then those of edge 1, and so on (``sizes``).

    Args:
        channel_squeeze, channel_excite, gate_excite, gated_squeeze, spatial_squeeze, spatial_excite: as in
            ``Genotype``; each one or more names of the edge's set in ``ops.EXTENDED_SETS``.

    Raises:
        ValueError: an edge without operations, a repeated or an unknown name.

    Examples:
        >>> space = SearchSpace.parse('paper')
        >>> space.sizes, space.genotypes
        ((7, 7, 7, 7, 7, 7), 117649)
        >>> SearchSpace.parse('channel_squeeze=avg,avg_max; gate_excite=affine').genotypes
        4802
        >>> SearchSpace.parse('channel_excite=mlp,2conv_1x1(reduction=4)').channel_excite
        ('mlp', 'mlp(reduction=4)')
    """

    channel_squeeze: tuple[str, ...]
    channel_excite: tuple[str, ...]
    gate_excite: tuple[str, ...]
    gated_squeeze: tuple[str, ...]
    spatial_squeeze: tuple[str, ...]
    spatial_excite: tuple[str, ...]

    def __post_init__(self) -> None:
        for edge, set_name in Genotype.SET_OF.items():
            given = getattr(self, edge)
            try:
                if isinstance(given, str) or not isinstance(given, Sequence):
                    raise ValueError(f'expected a list of names, got {quoted(given)}')
                names = tuple(primitive_name(set_name, name) for name in given)
                if not names:
                    raise ValueError('no operation is left; give at least one name')
                if twice := sorted({name for name in names if names.count(name) > 1}):
                    raise ValueError(f'{", ".join(twice)} is in it twice')
            except ValueError as error:
                raise ValueError(f'search space, {edge}: {error}') from None
            object.__setattr__(self, edge, names)

    @classmethod
    def of(cls, edges: Mapping[str, Sequence[str]]) -> SearchSpace:
        """From lists of names by edge; other edges have the paper's seven operations."""
        if unknown := sorted(set(edges) - set(EDGES)):
            raise ValueError(f'a search space has no edge {quoted(unknown[0])}; edges: {", ".join(EDGES)}')
        paper: dict[str, Sequence[str]] = {edge: tuple(SETS[set_name]) for edge, set_name in Genotype.SET_OF.items()}
        return cls(**{**paper, **edges})  # type: ignore[arg-type]

    @classmethod
    def parse(cls, text: str) -> SearchSpace:
        """From 'paper', 'extended', ``'EDGE=NAME,NAME; EDGE=...'``, a JSON object of lists, or the path of such a file.

        Raises ValueError for anything else.
        """
        text = text.strip()
        if (sets := {'paper': SETS, 'extended': EXTENDED_SETS}.get(text)) is not None:
            return cls.of({edge: tuple(sets[set_name]) for edge, set_name in Genotype.SET_OF.items()})
        return parse_file(text, 'search space', cls._of_text) if text.endswith('.json') else cls._of_text(text)

    @classmethod
    def _of_text(cls, text: str) -> SearchSpace:
        edges: Any = {}
        if text.startswith(('{', '[')):
            edges = parse_json(text, 'a search space')
        else:
            for part in filter(None, split_names(text, ';')):
                edge, equals, names = part.partition('=')
                edges[edge.strip()] = list(filter(None, split_names(names))) if equals else None
        if not isinstance(edges, dict) or not edges or None in edges.values():
            raise ValueError(
                f"a search space is 'paper', 'extended', 'EDGE=NAME,NAME; ...' or a JSON object of lists by edge, got "
                f'{quoted(text)}'
            )
        return cls.of(edges)

    def to_dict(self) -> dict[str, list[str]]:
        """Edge -> names, in edge order; what ``of`` takes."""
        return {edge: list(names) for edge, names in self}

    def __str__(self) -> str:
        for name in ('paper', 'extended'):
            if self == SearchSpace.parse(name):
                return name
        paper = SearchSpace.of({})
        return '; '.join(f'{edge}={",".join(names)}' for edge, names in self if names != getattr(paper, edge))

    def __iter__(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        """(edge, names) in edge order."""
        return ((f.name, getattr(self, f.name)) for f in fields(self))

    def __contains__(self, genotype: Genotype) -> bool:
        return all(getattr(genotype, edge) in names for edge, names in self)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Operations on each edge."""
        return tuple(len(names) for _, names in self)

    @property
    def genotypes(self) -> int:
        """Number of blocks in the space."""
        return math.prod(self.sizes)

    @property
    def labels(self) -> list[str]:
        """'EDGE.NAME' for each logit."""
        return [f'{edge}.{name}' for edge, names in self for name in names]

    def probabilities(self, logits: Tensor) -> tuple[Tensor, ...]:
        """The softmax of each edge. logits: (..., sum of sizes) -> six tensors (..., size)."""
        return tuple(part.softmax(-1) for part in logits.split(self.sizes, dim=-1))

    def genotype(self, logits: Tensor) -> Genotype:
        """The operation with the largest logit on each edge, the first of equal ones. logits: (sum of sizes,)."""
        if logits.shape != (sum(self.sizes),):
            raise ValueError(f'expected {sum(self.sizes)} logits, got a tensor of shape {tuple(logits.shape)}')
        parts = logits.split(self.sizes)
        return Genotype.of([names[int(torch.argmax(part))] for (_, names), part in zip(self, parts, strict=True)])

    def random(self, seed: int) -> Genotype:
        """A uniformly random genotype, equal for equal seeds."""
        generator = torch.Generator().manual_seed(seed)
        return self.genotype(torch.rand(sum(self.sizes), generator=generator))
