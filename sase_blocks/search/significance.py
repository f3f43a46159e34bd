"""Statistical tests behind the verdicts of the searches. Not in the papers.

Where there is nothing to find, at most ``LEVEL`` of the runs claim anything, however many blocks, edges or networks
each of them compares.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ['LEVEL', 'holm', 'load_stats', 'not_worse', 'paired_test', 'shown_from']

LEVEL = 0.05
SAME = 1e-9  # accuracies in percent that differ by no more are equal, and differ by rounding alone


def load_stats() -> Any:
    """``scipy.stats``. Raises ImportError that names the extra; call it before the work whose results it judges."""
    try:
        from scipy import stats
    except ImportError as error:
        raise ImportError(f'verdicts need SciPy ({error}): pip install "sase-blocks[search]"') from error
    return stats


def paired_test(differences: Any) -> tuple[Any, Any, Any]:
    """Student's t-test, two-sided, of the hypothesis that the mean of paired differences is 0.

    Equal differences have no spread to test their mean against, so they give NaN. They are common, because accuracies
    come in steps of one image.

    Args:
        differences: (..., seeds), such as the accuracies of two blocks with the same seeds, subtracted.

    Returns:
        p and both ends of the 1 - LEVEL interval of the mean, each (...), NaN for fewer than two seeds and where all
        differences are equal.

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
    """The smallest mean difference, in its standard deviations over the seeds, that ``paired_test`` and ``holm`` show.

    Args:
        seeds: at least 2.
        comparisons: how many are made; the first one to be shown counts.

    Raises:
        ImportError: SciPy is missing (extra ``search``).
    """
    return float(load_stats().t.isf(LEVEL / (2 * comparisons), seeds - 1) / seeds**0.5)


def holm(p: Any) -> Any:
    """Adjust p values for multiple comparisons (Holm, "A simple sequentially rejective multiple test procedure", 1979).

    Whatever the dependence between them, at most ``LEVEL`` of runs without any true difference have one below LEVEL.

    Args:
        p: (..., comparisons). NaN, for what could not be tested, counts as a comparison and stays NaN.

    Returns:
        The adjusted values, of the same shape, at most 1.
    """
    p = np.asarray(p, dtype=np.float64)
    order = np.argsort(p, axis=-1)  # NaN last
    steps = np.take_along_axis(p, order, -1) * np.arange(p.shape[-1], 0, -1)
    adjusted = np.empty_like(p)
    np.put_along_axis(adjusted, order, np.minimum(np.maximum.accumulate(steps, axis=-1), 1.0), -1)
    return adjusted


def not_worse(scores: Sequence[float], images: int) -> list[bool]:
    """Which of several networks may be as good as the best of them, by accuracies on the same images.

    Fisher's exact test of each against the best. The best was picked by these scores, so the bound is Bonferroni's over
    all ordered pairs, which holds for any pick. The test takes the images of each network for a sample of its own. As
    they are the same, it errs on the side of "may be".

    Args:
        scores: of each network, percent.
        images: how many were scored.

    Returns:
        For each network; True for the best.

    Raises:
        ImportError: SciPy is missing (extra ``search``).
    """
    right = np.rint(np.asarray(scores, dtype=np.float64) * images / 100).astype(int)
    best = right.max()
    # As many or more of all right answers on the side of the best network, if each image were dealt to a side by lot.
    p = load_stats().hypergeom.sf(best - 1, 2 * images, best + right, images)
    return ((p * len(right) * (len(right) - 1) > LEVEL) | (right == best)).tolist()
