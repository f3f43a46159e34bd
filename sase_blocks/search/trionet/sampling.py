"""Sample the networks that a supernet trains: Hierarchical Sampling (arXiv 2111.07547) and uniform draws.

The public part of the paper only names the idea; this is our interpretation. If every block draws its operator
independently, nearly every network is an even mixture: all of 16 blocks are convolutions once in 43 million draws, so
pure networks are never trained and are then ranked wrongly. Hierarchical Sampling first draws a distribution over the
operators, then every block's operator from it. With the default, Dirichlet(1, 1, 1), all compositions (number of blocks
of each kind) of N blocks are equally likely, 1 / C(N + 2, 2) each.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .space import TrioSpace

__all__ = ['LAWS', 'Law', 'draw', 'hierarchical', 'uniform']

# Maps a generator and the number of operators to their probabilities, drawn once per network.
Law = Callable[[np.random.Generator, int], np.ndarray]


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
        space: the search space.
        rng: the random generator.
        law: see ``Law``. Blocks that may not be attentions are always convolutions.
        extent: 'largest' or 'smallest': all sizes at that end, with operators still drawn to favour none.

    Raises:
        ValueError: an unknown extent, or a law that does not return probabilities.
    """
    if extent not in (None, 'largest', 'smallest'):
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
            choices = [value for value in values if value.partition('/')[0].rstrip('0123456789') == operator]
        # The values of a gene rise, also within one operator.
        at = {'largest': len(choices) - 1, 'smallest': 0}.get(extent or '')
        genome[name] = choices[int(rng.integers(len(choices))) if at is None else at]
    return genome
