"""Which networks a supernet trains on: Hierarchical Sampling (arXiv 2111.07547) and uniform draws.

What is public of the paper names the idea; this reading of it is ours. If every block draws its operator by itself,
nearly every network is an even mixture: of 16 blocks, all are convolutions once in 43 million draws, so pure networks
are never trained and are then ranked wrongly. Hierarchical Sampling draws a distribution over the operators first, and
every block's operator from it. With the default, Dirichlet(1, 1, 1), all compositions (how many blocks of each kind)
of N blocks are equally likely, 1 / C(N + 2, 2) each.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .space import TrioSpace

__all__ = ['LAWS', 'Law', 'draw', 'hierarchical', 'uniform']

# From a generator and the number of operators to their probabilities, drawn once for each network.
Law = Callable[[np.random.Generator, int], np.ndarray]


def hierarchical(rng: np.random.Generator, count: int, concentration: float = 1.0) -> np.ndarray:
    """Probabilities from Dirichlet(concentration, ...): 1 for equally likely compositions, less for purer networks."""
    return rng.dirichlet(np.full(count, concentration))


def uniform(rng: np.random.Generator, count: int) -> np.ndarray:
    """Equal probabilities: every block's operator by itself."""
    return np.full(count, 1 / count)


LAWS: dict[str, Law] = {'hierarchical': hierarchical, 'uniform': uniform}


def draw(
    space: TrioSpace, rng: np.random.Generator, law: Law = hierarchical, extent: str | None = None
) -> dict[str, str]:
    """A random genome: operators by ``law``, everything else uniformly.

    Args:
        space: of the genes.
        rng: what is drawn from.
        law: see ``Law``. A block that may not be an attention is a convolution whatever it says.
        extent: 'largest' or 'smallest': all sizes at that end, the operators still drawn, so that none is privileged.

    Raises:
        ValueError: an unknown extent, or a law that gives no probabilities.
    """
    if extent not in (None, 'largest', 'smallest'):
        raise ValueError(f"extent must be 'largest', 'smallest' or None, got {extent!r}")
    chances = np.asarray(law(rng, len(space.operators)), dtype=np.float64)
    if chances.shape != (len(space.operators),) or not ((chances >= 0).all() and abs(chances.sum() - 1) <= 1e-6):
        raise ValueError(f'a law gives {len(space.operators)} probabilities, got {chances!r}')
    genome = {}
    for name, values in space.genes.items():
        choices = list(values)
        if ' block ' in name:
            allowed = space.stage_operators(int(name.split()[1]))
            operator = space.operators[rng.choice(len(chances), p=chances / chances.sum())]
            operator = operator if operator in allowed else allowed[0]
            choices = [value for value in values if value.partition('/')[0].rstrip('0123456789') == operator]
        # The values of a gene are in rising order, those of one operator, too.
        at = {'largest': len(choices) - 1, 'smallest': 0}.get(extent or '')
        genome[name] = choices[int(rng.integers(len(choices))) if at is None else at]
    return genome
