"""The space of the SASE search (arXiv 2411.08333): what each of the six edges chooses from, and what logits mean in it.

The paper's space holds 7 operations an edge. Any other choice of names is a space as well (ours): a subset, the
extended sets, a different list for each edge.
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
from sase_blocks.reading import parse_json, quoted, read_text

__all__ = ['EDGES', 'SearchSpace']

EDGES = tuple(Genotype.SET_OF)


@dataclass(frozen=True)
class SearchSpace:
    """The names that each edge chooses from; primitives' names or the paper's keys, stored as names.

    The logits of a space are one flat vector: the operations of edge 0, then of edge 1, and so on (``sizes``).

    Args:
        channel_squeeze, channel_excite, gate_excite, gated_squeeze, spatial_squeeze, spatial_excite: as in
            ``Genotype``; each at least one name of the edge's set in ``ops.EXTENDED_SETS``, none twice.

    Raises:
        ValueError: an edge without operations, a name twice, an unknown name.

    Examples:
        >>> space = SearchSpace.parse('paper')
        >>> space.sizes, space.genotypes
        ((7, 7, 7, 7, 7, 7), 117649)
        >>> SearchSpace.parse('channel_squeeze=avg,avg_max; gate_excite=affine').genotypes
        4802
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
            if isinstance(given, str) or not isinstance(given, Sequence):
                raise ValueError(f'search space, {edge}: expected a list of names, got {quoted(given)}')
            try:
                names = tuple(primitive_name(set_name, name) for name in given)
            except ValueError as error:
                raise ValueError(f'search space, {edge}: {error}') from None
            if not names:
                raise ValueError(f'search space, {edge}: no operation is left; give at least one name')
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise ValueError(f'search space, {edge}: {", ".join(twice)} is in it twice')
            object.__setattr__(self, edge, names)

    @classmethod
    def of(cls, edges: Mapping[str, Sequence[str]]) -> SearchSpace:
        """From lists of names by edge; an edge that is not named has the paper's seven operations."""
        unknown = sorted(set(edges) - set(EDGES))
        if unknown:
            raise ValueError(f'a search space has no edge {quoted(unknown[0])}; edges: {", ".join(EDGES)}')
        paper: dict[str, Sequence[str]] = {edge: tuple(SETS[set_name]) for edge, set_name in Genotype.SET_OF.items()}
        return cls(**{**paper, **edges})  # type: ignore[arg-type]

    @classmethod
    def parse(cls, text: str) -> SearchSpace:
        """From 'paper', 'extended', ``'EDGE=NAME,NAME; EDGE=...'``, a JSON object of lists, or the path of such a file.

        Raises:
            ValueError: none of these.
        """
        text = text.strip()
        if text == 'paper':
            return cls.of({})
        if text == 'extended':
            return cls.of({edge: tuple(EXTENDED_SETS[set_name]) for edge, set_name in Genotype.SET_OF.items()})
        if text.endswith('.json'):
            content = read_text(text, 'search space')
            try:
                return cls._of_text(content)
            except ValueError as error:
                raise ValueError(f'{text}: {error}') from None
        return cls._of_text(text)

    @classmethod
    def _of_text(cls, text: str) -> SearchSpace:
        edges: Any = {}
        if text.startswith(('{', '[')):
            edges = parse_json(text, 'a search space')
        else:
            for part in filter(None, (part.strip() for part in text.split(';'))):
                edge, equals, names = part.partition('=')
                edges[edge.strip()] = [name.strip() for name in names.split(',') if name.strip()] if equals else None
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
        """How many blocks the space holds."""
        return math.prod(self.sizes)

    @property
    def labels(self) -> list[str]:
        """'EDGE.NAME' for each logit."""
        return [f'{edge}.{name}' for edge, names in self for name in names]

    def probabilities(self, logits: Tensor) -> tuple[Tensor, ...]:
        """The softmax of each edge. logits: (..., sum of sizes) -> six tensors (..., size)."""
        return tuple(part.softmax(-1) for part in logits.split(self.sizes, dim=-1))

    def genotype(self, logits: Tensor) -> Genotype:
        """The operation with the largest logit on each edge; of equal ones the first. logits: (sum of sizes,)."""
        if logits.shape != (sum(self.sizes),):
            raise ValueError(f'expected {sum(self.sizes)} logits, got a tensor of shape {tuple(logits.shape)}')
        parts = logits.split(self.sizes)
        return Genotype.of([names[int(torch.argmax(part))] for (_, names), part in zip(self, parts, strict=True)])

    def random(self, seed: int) -> Genotype:
        """One genotype of the space, uniformly; the same one for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        return self.genotype(torch.rand(sum(self.sizes), generator=generator))
