"""Is the found block better than others? Statistics and the table of an evaluation (``evaluate.py``).

Trainings with the same seed see the same batches and augmentation, so blocks are compared seed by seed
(``search/significance.py``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from sase_blocks.search.significance import LEVEL, holm, paired_test, shown_from

__all__ = ['compare', 'format_table']

MORE_SEEDS = 5  # of which a verdict says what they would show, or of twice as many as there are
TEST = (
    'difference: block minus found, mean over the seeds that both have; interval: 95 %, of each difference alone; '
    'p: two-sided paired t-test; p_adjusted: by Holm over the baselines'
)


def compare(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Statistics of candidates with name, kind and 'accuracies' by seed: the keys candidates, verdicts, test and rank.

    The found block is compared with each baseline by a paired t-test over the seeds that both have, and the p values
    are adjusted by Holm for the number of baselines: if no baseline differs from the found block, at most one
    evaluation in 20 says that one does. The intervals are those of each difference alone, not adjusted.

    Raises:
        ImportError: SciPy is missing (extra ``search``).
    """
    candidates = [{**row, **_statistics(list(row['accuracies'].values()))} for row in rows]
    first = next(row for row in candidates if row['kind'] == 'found')
    for row in candidates:
        row |= {'difference': None, 'interval': None, 'p': None, 'p_adjusted': None}
        differences = _differences(row, first)
        if row is first or not differences:
            continue
        row['difference'] = fmean(differences)
        p, low, high = (float(value) for value in paired_test(differences))
        if not math.isnan(p):
            row['interval'] = [low, high]
            row['p'] = p if row['kind'] == 'baseline' else None
    baselines = [row for row in candidates if row['kind'] == 'baseline']
    tested = [row for row in baselines if row['p'] is not None]
    # A baseline that could not be tested is still one that the run asked about.
    adjusted = holm([*(row['p'] for row in tested), *[math.nan] * (len(baselines) - len(tested))])
    for row, p in zip(tested, adjusted.tolist(), strict=False):
        row['p_adjusted'] = p
    rank, more = _rank(first, [row for row in candidates if row['kind'] == 'random'])
    verdicts = [_verdict(row, first) for row in baselines if row['difference'] is not None]
    verdicts += [*_seeds(baselines, first), *more]
    return {'candidates': candidates, 'rank': rank, 'verdicts': verdicts, 'test': TEST}


def format_table(result: Mapping[str, Any]) -> str:
    """The comparison as text, best mean first, from what ``evaluate`` returns."""
    rows = sorted(result['candidates'], key=lambda row: -math.inf if row['mean'] is None else row['mean'], reverse=True)
    width = max(12, *(len(row['name']) for row in rows)) + 2
    header = (
        f'{"block":{width}}{"accuracy %":>15}{"min to max":>18}{"seeds":>7}{"to found":>10}{"95 % interval":>20}'
        f'{"p":>7}{"parameters":>13}{"MACs":>11}{"time":>7}'
    )
    lines = [header, '-' * len(header)]
    for row in rows:
        lines.append(
            f'{row["name"]:{width}}{_plus_minus(row["mean"], row["spread"]):>15}'
            f'{_known("{0:.2f} to {1:.2f}", row["min"], row["max"]):>18}{len(row["accuracies"]):7}'
            f'{_known("{0:+.2f}", row["difference"]):>10}{_interval(row["interval"]) or "-":>20}'
            f'{_p(row["p_adjusted"]):>7}{_known("{0:,}", row["parameters"]):>13}'
            f'{_known("{0:,.1f} M", row["macs"], scale=1e6):>11}{_known("{0:.2f}", row["time_ratio"]):>7}'
        )
    images = result.get('images')
    of = f' of {images:,} images (one image is {100 / images:.2g} points)' if images else ''
    lines += [
        '',
        f'accuracy: after the last epoch, on the validation split{of},',
        'mean ± standard deviation over the seeds; to found: mean difference seed by seed, with its 95 % interval;',
        'p: of a paired t-test, adjusted for the number of baselines (Holm); the intervals are not adjusted;',
        'time: of a forward pass, without attention = 1.',
        '',
        *result['verdicts'],
    ]
    named = [row for row in rows if row['kind'] != 'baseline' or row['genotype'] != row['name']]
    lines += ['', *(f'{row["name"]}: {row["genotype"]}' for row in named)]
    lines += [f'failed: {key}: {text}' for key, text in result.get('errors', {}).items()]
    return '\n'.join(lines)


# ---- statistics ----


def _statistics(values: Sequence[float]) -> dict[str, float | None]:
    if not values:
        return {'mean': None, 'spread': None, 'min': None, 'max': None}
    spread = stdev(values) if len(values) > 1 else None
    return {'mean': fmean(values), 'spread': spread, 'min': min(values), 'max': max(values)}


def _differences(row: Mapping[str, Any], first: Mapping[str, Any]) -> list[float]:
    """The accuracy of a block minus that of the found one, for each seed that both have."""
    its, found = row['accuracies'], first['accuracies']
    return [its[seed] - found[seed] for seed in its if seed in found]


def _verdict(row: Mapping[str, Any], first: Mapping[str, Any]) -> str:
    """A sentence on the found block and one baseline."""
    seeds = len(_differences(row, first))
    means = f'found {_by(-row["difference"])} {row["name"]}'
    if row['p_adjusted'] is not None:
        low, high = row['interval']
        shown = 'a difference beyond chance' if row['p_adjusted'] <= LEVEL else 'no difference is shown'
        return f'{means} (95 % interval {_interval([-high, -low])}, p {_p(row["p_adjusted"], " ")}): {shown}.'
    if seeds == 1:
        return f'{means} on one seed, which cannot tell a difference from chance.'
    if row['difference'] == 0:
        return f'{means} on each of {seeds} seeds.'
    return f'{means} on each of {seeds} seeds: equal differences show no spread to judge them by, nothing is decided.'


def _seeds(baselines: Sequence[Mapping[str, Any]], first: Mapping[str, Any]) -> Iterator[str]:
    """What so many seeds can show at all, if they left a baseline undecided."""
    seeds = len(first['accuracies'])
    compared = [row for row in baselines if row['difference'] is not None]
    if all(row['p_adjusted'] is not None and row['p_adjusted'] <= LEVEL for row in compared):
        return
    count = len(baselines)
    more = MORE_SEEDS if seeds < MORE_SEEDS else 2 * seeds
    few = {1: 'One seed decides nothing. ', 2: 'Two seeds decide hardly anything. '}.get(seeds, '')
    now = f'{shown_from(seeds, count):.1f} times with these {seeds} seeds, ' if seeds > 1 else ''
    of = f'the largest difference of {count} baselines' if count > 1 else 'one baseline'
    yield (
        f'{few}To be shown, a difference must exceed its standard deviation over the seeds {now}'
        f'{shown_from(more, count):.1f} times with {more} ({of}).'
    )


def _by(ahead: float) -> str:
    if ahead == 0:
        return 'is level with'
    return f'is {abs(ahead):.2f} points {"above" if ahead > 0 else "below"}'


def _rank(found: Mapping[str, Any], randoms: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any] | None, list[str]]:
    """The place of the found block among the random ones by mean, 1 for the best, and sentences about it.

    If the found block were itself drawn at random, every place would be equally likely, so p is that of an exact
    permutation test. This holds only among blocks with the same seeds, so others are left out.
    """
    trained = [row for row in randoms if row['accuracies'].keys() == found['accuracies'].keys()]
    if found['mean'] is None or not trained:
        return None, []
    of = len(trained) + 1
    place = 1 + sum(row['mean'] > found['mean'] for row in trained)
    p = (1 + sum(row['mean'] >= found['mean'] for row in trained)) / of  # a tie is no merit
    blocks = 'block' if len(trained) == 1 else 'blocks'
    text = (
        f'found has place {place} among {of} with {len(trained)} random {blocks} of its space. A block drawn at random '
        f'would do as well with probability {p:.2f}'
    )
    least = math.ceil(1 / LEVEL) - 1
    if p <= LEVEL:
        text += ': the search is better than drawing at random.'
    elif len(trained) < least:
        text += f': nothing is shown, for which it would take at least {least} random blocks.'
    else:
        text += ': no advantage over drawing at random is shown.'
    text += f' It {_by(found["mean"] - fmean(row["mean"] for row in trained))} their mean.'
    if left := len(randoms) - len(trained):
        text += f' {left} random {"block is" if left == 1 else "blocks are"} left out, with other seeds.'
    return {'place': place, 'of': of, 'p': p}, [text]


# ---- text ----


def _known(form: str, *values: float | None, scale: float = 1) -> str:
    """The values in a format, '-' where one is unknown."""
    return '-' if None in values else form.format(*(value / scale if scale != 1 else value for value in values))  # type: ignore[operator]


def _plus_minus(value: float | None, error: float | None) -> str:
    if value is None:
        return '-'
    return f'{value:.2f}' + (f' ± {error:.2f}' if error is not None else '')


def _p(value: float | None, equals: str = '') -> str:
    if value is None:
        return '-'
    return f'<{equals}0.001' if value < 0.001 else f'{"=" if equals else ""}{equals}{value:.3f}'


def _interval(ends: Sequence[float] | None) -> str:
    return '' if ends is None else '{:+.2f} to {:+.2f}'.format(*ends)
