"""Statistical tests behind the verdicts of comparisons and searches. Not in the papers.

If there is nothing to find, at most ``LEVEL`` of the runs claim anything, however many blocks, edges or networks each
compares.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from sase_blocks.runs import import_extra

LEVEL = 0.05
POWER = 0.8  # probability to show a difference of a given size, see seeds_needed
QUANTILES = (np.arange(500) + 0.5) / 500
SAME = 1e-9  # largest difference of equal accuracies in percent, by rounding


def load_stats() -> Any:
    """``scipy.stats``; raises ImportError that names the extra. Call it before the work whose results it judges."""
    return import_extra('scipy', 'verdicts need SciPy', 'search').stats


def paired_test(differences: Any) -> tuple[Any, Any, Any]:
    """Two-sided t-test of the hypothesis that the mean of paired differences (..., seeds) is 0.

    Equal differences have no spread to test their mean against, so they give NaN. They are common, because accuracies
    come in steps of one image.

    Returns:
        p and both ends of the 1 - LEVEL interval of the mean, each (...); NaN for fewer than two seeds and for equal
        differences.

    Raises:
        ImportError: SciPy is missing (extra ``search``).
    """
    stats = load_stats()
    values = np.asarray(differences, dtype=np.float64)
    if values.shape[-1] < 2:
        unknown = np.full(values.shape[:-1], np.nan)
        return unknown, unknown.copy(), unknown.copy()
    equal = np.ptp(values, axis=-1) <= SAME
    result = stats.ttest_1samp(np.where(equal[..., None], np.arange(values.shape[-1]), values), 0.0, axis=-1)
    interval = result.confidence_interval(1 - LEVEL)
    p, low, high = (np.where(equal, np.nan, part) for part in (result.pvalue, interval.low, interval.high))
    return p, low, high


def shown_from(seeds: int, comparisons: int) -> float:
    """The smallest mean difference, in standard deviations over the seeds, that ``paired_test`` and ``holm`` show.

    ``seeds`` is at least 2. The first of the comparisons to be shown counts. Raises ImportError if SciPy is missing.
    """
    return float(load_stats().t.isf(LEVEL / (2 * comparisons), seeds - 1) / seeds**0.5)


def seeds_needed(difference: float, spread: float, comparisons: int) -> int:
    """The fewest seeds that show a mean difference in the first of the comparisons with probability ``POWER``.

    Args:
        difference: above 0, in percent.
        spread: standard deviation of the paired differences over the seeds, above 0.
        comparisons: for Holm's method.

    Raises:
        ImportError: SciPy is missing (extra ``search``).
    """
    stats, level = load_stats(), LEVEL / (2 * comparisons)
    # With a known spread. An estimated one needs some more.
    known = ((stats.norm.isf(level) + stats.norm.ppf(POWER)) * spread / difference) ** 2
    seeds = max(2, math.floor(known))
    while True:
        # The noncentral t distribution, as a mean over quantiles of the estimated spread: scipy's own overflows.
        estimated = np.sqrt(stats.chi2.ppf(QUANTILES, seeds - 1) / (seeds - 1))
        ahead = difference * seeds**0.5 / spread
        if stats.norm.sf(stats.t.isf(level, seeds - 1) * estimated - ahead).mean() >= POWER:
            return seeds
        seeds += 1


def holm(p: Any) -> Any:
    """Adjust p values for multiple comparisons (Holm, "A simple sequentially rejective multiple test procedure", 1979).

    However the comparisons depend on each other, at most ``LEVEL`` of runs without any true difference have a value
    below LEVEL.

    Args:
        p: (..., comparisons). NaN, for a comparison that could not be tested, counts and stays NaN.
    """
    p = np.asarray(p, dtype=np.float64)
    order = np.argsort(p, axis=-1)  # NaN last
    steps = np.take_along_axis(p, order, -1) * np.arange(p.shape[-1], 0, -1)
    adjusted = np.empty_like(p)
    np.put_along_axis(adjusted, order, np.minimum(np.maximum.accumulate(steps, axis=-1), 1.0), -1)
    return adjusted


def not_worse(scores: Sequence[float], images: int) -> list[bool]:
    """Whether each network may be as good as the best, by accuracies in percent on the same ``images`` images.

    Fisher's exact test of each against the best. The best was picked by these scores, so the bound is Bonferroni's over
    all ordered pairs, which holds for any pick. The test assumes different images for each network. As they are the
    same, it errs on the side of "may be".

    Raises:
        ImportError: SciPy is missing (extra ``search``).
    """
    right = np.rint(np.asarray(scores, dtype=np.float64) * images / 100).astype(int)
    best = right.max()
    # The chance that the best network has so many of all correct answers or more if they fall on either at random.
    p = load_stats().hypergeom.sf(best - 1, 2 * images, best + right, images)
    return ((p * len(right) * (len(right) - 1) > LEVEL) | (right == best)).tolist()
