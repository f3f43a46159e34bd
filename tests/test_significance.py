"""The tests behind the verdicts of the searches, against counts of what chance alone gives."""

import math
import sys

import numpy as np
import pytest

from sase_blocks.comparing.significance import holm, load_stats, not_worse, paired_test, seeds_needed, shown_from


@pytest.mark.parametrize(
    ('p', 'adjusted'),
    [
        ([], []),
        ([0.2], [0.2]),
        ([0.01, 0.04, 0.03], [0.03, 0.06, 0.06]),
        ([0.5, 0.6, 0.9], [1, 1, 1]),
        ([0.01, math.nan, 0.03], [0.03, math.nan, 0.06]),  # an untestable comparison still counts
        ([math.nan], [math.nan]),
        ([[0.01, 0.04], [0.9, 0.001]], [[0.02, 0.04], [0.9, 0.002]]),
    ],
)
def test_holm(p, adjusted):
    np.testing.assert_allclose(holm(p), adjusted)


@pytest.mark.parametrize('differences', [[], [3.0], [3.0, 3.0], [0.0] * 5, [0.1 + 0.2 - 0.3, 0.0, 0.0]])
def test_no_spread_proves_nothing(differences):
    assert all(math.isnan(value) for value in paired_test(differences))


def test_from_where_a_difference_is_shown():
    """A mean difference of so many standard deviations has exactly the p value that Holm requires of the smallest."""
    for seeds, comparisons in ((2, 1), (3, 5), (8, 5)):
        spread = np.arange(seeds) - (seeds - 1) / 2
        spread /= spread.std(ddof=1)
        p, *_ = paired_test(spread + shown_from(seeds, comparisons))
        assert p * comparisons == pytest.approx(0.05)


@pytest.mark.parametrize(
    ('difference', 'spread', 'comparisons'),
    [(0.5, 0.1, 1), (0.5, 0.5, 1), (0.5, 0.5, 5), (1.0, 3.0, 3), (9.0, 0.01, 20)],
)
def test_seeds_that_show_a_difference(difference, spread, comparisons):
    """So many show it in 80 of 100 simulated comparisons, and one seed less does not."""
    rng, runs, needed = np.random.default_rng(0), 20_000, seeds_needed(difference, spread, comparisons)
    shown = {}
    for seeds in (needed, needed - 1):
        p, *_ = paired_test(rng.normal(difference, spread, (runs, seeds)))
        shown[seeds] = (p * comparisons <= 0.05).mean()
    slack = 3 * math.sqrt(0.8 * 0.2 / runs)
    assert shown[needed] > 0.8 - slack
    assert shown[needed - 1] < 0.8 + slack


def test_seeds_for_a_difference_that_is_far_too_small():
    assert seeds_needed(1e-3, 1.0, 1) == pytest.approx(((1.959964 + 0.841621) * 1e3) ** 2, rel=1e-4)


@pytest.mark.parametrize(
    ('networks', 'images', 'right'), [(2, 60, 0.5), (8, 12, 0.5), (40, 287, 0.85), (100, 1000, 0.3)]
)
def test_equal_networks_are_told_apart_by_chance_alone(networks, images, right):
    """At most one search in twenty, although the best network is picked."""
    rng, runs = np.random.default_rng(networks), 200
    counts = rng.binomial(images, right, (runs, networks))
    wrong = sum(not all(not_worse(100 * row / images, images)) for row in counts)
    assert wrong / runs < 0.05 + 3 * math.sqrt(0.05 * 0.95 / runs)
    # A much better network is found.
    counts[:, 0] = rng.binomial(images, 0.99, runs)
    better = 8 * math.sqrt(2 * right * (1 - right) / images) < 0.99 - right
    assert not better or sum(sum(not_worse(100 * row / images, images)) == 1 for row in counts) > 0.9 * runs


@pytest.mark.parametrize(
    ('scores', 'images', 'expected'),
    [
        ([50.0], 10, [True]),
        ([0.0, 0.0], 10, [True, True]),
        ([100.0, 100.0, 0.0], 10, [True, True, False]),
        ([60.0, 50.0], 10, [True, True]),
        ([60.0, 50.0], 10_000, [True, False]),
        ([100 / 3, 200 / 3], 3, [True, True]),
    ],
)
def test_networks_that_may_be_as_good(scores, images, expected):
    assert not_worse(scores, images) == expected


def test_scipy_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, 'scipy', None)
    for call in (load_stats, lambda: paired_test([1, 2]), lambda: not_worse([1.0], 10)):
        with pytest.raises(ImportError, match=r'pip install "sase-blocks\[search\]"'):
            call()
