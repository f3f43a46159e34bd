"""What an evolution searches and finds: genes with functions of them, and candidates with a score and a cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

__all__ = ['Candidate', 'Genome', 'Problem', 'best', 'front']

Genome = dict[str, str]


@dataclass(frozen=True)
class Problem:
    """What is searched: the genes, and functions of them.

    Args:
        genes: from the name of a gene to its choices.
        decode: the text of the network that a genome stands for. Several genomes may give the same: genes that are of
            no effect are ignored here.
        fits: do the hard limits allow this network? Cheap: asked of all that is drawn.
        cost: of a network; less is better.
        score: of a network; more is better. Expensive: asked once of each.
        draw: a random genome of the law by which the first generation, or all of a random search, is drawn.
    """

    genes: Mapping[str, Sequence[str]]
    decode: Callable[[Genome], str]
    fits: Callable[[str], bool]
    cost: Callable[[str], float]
    score: Callable[[str], float]
    draw: Callable[[np.random.Generator], Genome]

    def check(self) -> None:
        """Refuse genes that are none."""
        if not self.genes:
            raise ValueError('there are no genes to search')
        for name, choices in self.genes.items():
            if isinstance(choices, str) or not choices or not all(isinstance(choice, str) for choice in choices):
                raise ValueError(f'gene {name}: expected a list of texts to choose from, got {choices!r}')
            if len(set(choices)) < len(choices):
                raise ValueError(f'gene {name}: a choice stands twice in {list(choices)}')

    def check_genome(self, genome: Mapping[str, str], what: str) -> Genome:
        """The genome, with its genes in their order; ``what`` says in an error whose it is."""
        if genome.keys() != self.genes.keys():
            differing = sorted(genome.keys() ^ self.genes.keys())
            raise ValueError(f'{what} has other genes than are searched: {", ".join(differing)}')
        for name, choices in self.genes.items():
            if genome[name] not in choices:
                raise ValueError(f'{what}: gene {name} is {genome[name]!r}, expected one of {", ".join(choices)}')
        return {name: genome[name] for name in self.genes}


class Candidate(NamedTuple):
    """A network that was scored: its text, values, a genome of it and the number of its trial in the study."""

    text: str
    score: float
    cost: float
    genome: Genome
    number: int


def front(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those that no other one beats, that is, equals or betters in score and cost and betters in one of them.

    Returns:
        Sorted by cost; equals in cost and score all stay, sorted by text.
    """
    chosen: list[Candidate] = []
    for one in sorted(candidates, key=lambda one: (one.cost, -one.score, one.text)):
        if not chosen or one.score > chosen[-1].score or (one.score, one.cost) == (chosen[-1].score, chosen[-1].cost):
            chosen.append(one)
    return chosen


def best(candidates: Sequence[Candidate]) -> Candidate:
    """The highest score; of equals the cheapest, then the first by text."""
    if not candidates:
        raise ValueError('there are no candidates')
    return min(candidates, key=lambda one: (-one.score, one.cost, one.text))
