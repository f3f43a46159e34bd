"""What a comparison shows: statistics over the seeds, verdicts in words, a table, and files."""

from __future__ import annotations

import csv
import io
import json
import math
import textwrap
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from sase_blocks.reading import table
from sase_blocks.runs import write_text
from sase_blocks.viz import missing_matplotlib, plot_comparison, save_figure

from .significance import LEVEL, POWER, holm, paired_test, seeds_needed, shown_from

# Of a candidate's network: of a forward pass in eval mode, of a step (forward and backward in training mode), and what
# autograd keeps in between. Ratios are to the network without attention, measured in turns.
COSTS = (
    'parameters',
    'macs',
    'ms_per_image',
    'time_ratio',
    'step_ms_per_image',
    'step_ratio',
    'kept_bytes_per_image',
    'kept_ratio',
    'device',
)
MORE_SEEDS = 5  # a verdict says what so many seeds would show, or twice as many as there are
FEW_SEEDS = 5  # a spread over fewer is a rough estimate
EPOCHS = 8  # columns of the table by epoch
TEST = (
    'difference: block minus reference, mean over the seeds that both have; intervals: 95 %, each alone; '
    'p: two-sided paired t-test; p_adjusted: by Holm over the tested blocks'
)


def judge(
    rows: Sequence[Mapping[str, Any]],
    reference: str,
    tested: Collection[str] | None = None,
    difference: float = 0.5,
) -> dict[str, Any]:
    """Compare candidates that have a 'name' and 'accuracies' by seed with one of them, the reference.

    A paired t-test over the common seeds compares each tested candidate with the reference, and Holm's method adjusts
    the p values for their number. If no candidate differs from the reference, at most one comparison in 20 says that
    one does. The intervals are for each value alone, not adjusted.

    Args:
        tested: names of the tested candidates. Default: all but the reference.
        difference: in percent; a verdict says how many seeds would show it.

    Returns:
        'candidates', the rows with 'mean', 'mean_interval', 'spread' (sample standard deviation), 'min' and 'max' of
        the accuracies, 'difference' (to the reference, mean over the common seeds), 'interval' (its 95 % interval,
        [low, high]), 'p' and 'p_adjusted' (of tested ones), 'seeds_needed' (seeds that show ``difference`` with
        probability ``POWER`` at the observed spread; of tested ones), and 'curve', the mean accuracy by epoch. Unknown
        values, such as a spread over one seed, are None. 'verdicts' are sentences, 'summary' is a paragraph on what is
        decided and what is not, and 'test' describes the test.

    Raises:
        ImportError: SciPy is missing (extra ``search``).
    """
    first = next(row for row in rows if row['name'] == reference)
    others = [row['name'] for row in rows if row is not first and (tested is None or row['name'] in tested)]
    candidates = []
    for row in rows:
        accuracies, values = row['accuracies'], list(row['accuracies'].values())
        common = [] if row is first else [seed for seed in accuracies if seed in first['accuracies']]
        differences = [accuracies[seed] - first['accuracies'][seed] for seed in common]
        p, *interval = map(float, paired_test(differences))
        _, *around = map(float, paired_test(values))
        known, counts = not math.isnan(p), row['name'] in others
        statistics = {
            'mean': fmean(values) if values else None,
            'mean_interval': None if math.isnan(around[0]) else around,
            'spread': stdev(values) if len(values) > 1 else None,
            'min': min(values, default=None),
            'max': max(values, default=None),
            'difference': fmean(differences) if differences else None,
            'interval': interval if known else None,
            'p': p if known and counts else None,
            'p_adjusted': None,
            'seeds_needed': seeds_needed(difference, stdev(differences), len(others)) if known and counts else None,
            'curve': _mean_curve(row.get('epochs', {})),
        }
        candidates.append({**row, **statistics})
    compared = [row for row in candidates if row['name'] in others]
    # A candidate that could not be tested is NaN, and still counts as a comparison.
    for row, p in zip(compared, holm([row['p'] for row in compared]).tolist(), strict=True):
        row['p_adjusted'] = None if math.isnan(p) else p
    compared, comparisons = [row for row in compared if row['difference'] is not None], len(compared)
    verdicts = {row['name']: _verdict(row, first) for row in compared}
    about_seeds = _what_seeds_show(compared, comparisons, len(first['accuracies']), difference)
    untested = [verdicts[row['name']] for row in compared if row['p_adjusted'] is None]
    return {
        'candidates': candidates,
        'verdicts': [*verdicts.values(), *about_seeds],
        'summary': ' '.join([*_what_is_decided(compared, reference), *untested, *about_seeds]),
        'test': TEST,
    }


def _mean_curve(epochs: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The mean over the seeds of the accuracies by epoch."""
    curves = list(epochs.values())
    common = [epoch for epoch in (curves[0] if curves else ()) if all(epoch in curve for curve in curves)]
    return {epoch: fmean(curve[epoch] for curve in curves) for epoch in common}


def _is_shown(row: Mapping[str, Any]) -> bool:
    return row['p_adjusted'] is not None and row['p_adjusted'] <= LEVEL


def _what_is_decided(compared: Sequence[Mapping[str, Any]], reference: str) -> list[str]:
    """Two sentences, on what is decided and on what is not."""

    def listed(shown: bool) -> str:
        rows = [row for row in compared if row['p_adjusted'] is not None and _is_shown(row) == shown]
        return ', '.join(f'{row["name"]} ({row["difference"]:+.2f})' for row in rows)

    return [
        f'{text}: {names}.'
        for text, names in (
            (f'Differ from {reference} beyond chance', listed(True)),
            ('Undecided, no difference is shown', listed(False)),
        )
        if names
    ]


def _verdict(row: Mapping[str, Any], first: Mapping[str, Any]) -> str:
    """A sentence on a candidate and the reference."""
    seeds = len(row['accuracies'].keys() & first['accuracies'].keys())
    means = f'{row["name"]} {ahead_by(row["difference"])} {first["name"]}'
    if row['p_adjusted'] is not None:
        low, high = row['interval']
        shown = 'a difference beyond chance' if _is_shown(row) else 'no difference is shown'
        p = '< 0.001' if row['p_adjusted'] < 0.001 else f'= {row["p_adjusted"]:.3f}'
        return f'{means} (95 % interval {low:+.2f} to {high:+.2f}, p {p}): {shown}.'
    if seeds == 1:
        return f'{means} on one seed, which cannot tell a difference from chance.'
    if row['difference'] == 0:
        return f'{means} on each of {seeds} seeds.'
    return f'{means} on each of {seeds} seeds: equal differences show no spread to judge them by, nothing is decided.'


def ahead_by(difference: float) -> str:
    """A difference in words, such as 'is 1.20 points above'."""
    if difference == 0:
        return 'is level with'
    return f'is {abs(difference):.2f} points {"above" if difference > 0 else "below"}'


def _what_seeds_show(
    compared: Sequence[Mapping[str, Any]], comparisons: int, seeds: int, difference: float
) -> list[str]:
    """Sentences on what these and more seeds can show, if they left a comparison undecided."""
    undecided = [row for row in compared if not _is_shown(row)]
    if not undecided:
        return []
    more = MORE_SEEDS if seeds < MORE_SEEDS else 2 * seeds
    few = {1: 'One seed decides nothing. ', 2: 'Two seeds decide hardly anything. '}.get(seeds, '')
    now = f'{shown_from(seeds, comparisons):.1f} times with these {seeds} seeds, ' if seeds > 1 else ''
    of = f'the largest difference of {comparisons} comparisons' if comparisons > 1 else 'one comparison'
    said = [
        f'{few}To be shown, a difference must exceed its standard deviation over the seeds {now}'
        f'{shown_from(more, comparisons):.1f} times with {more} ({of}).'
    ]
    needs = [
        f'{row["name"]} {row["seeds_needed"]:,} seeds'
        + (f' ({row["seeds_needed"] - seeds:,} more)' if row['seeds_needed'] > seeds else ' (there are enough)')
        for row in undecided
        if row['seeds_needed'] is not None
    ]
    if needs:
        said.append(
            f'To show a difference of {difference:g} points with probability {100 * POWER:.0f} % at the observed spread'
            f'{", a rough estimate from few seeds" if seeds < FEW_SEEDS else ""}: {", ".join(needs)}.'
        )
    return said


# ---- text and files ----


def format_comparison(result: Mapping[str, Any]) -> str:
    """The result of ``compare`` as text: a table with the best mean first, accuracies by epoch, verdicts."""

    def known(form: str, *values: Any) -> str:
        return '-' if None in values else form.format(*values)

    def between(interval: Sequence[float] | None, sign: str = '') -> str:
        return known(f'{{:{sign}.2f}} to {{:{sign}.2f}}', *(interval or (None, None)))

    rows = sorted(result['candidates'], key=lambda row: -math.inf if row['mean'] is None else row['mean'], reverse=True)
    cells = [
        {
            'block': row['name'],
            'accuracy %': known('{:.2f}', row['mean']) + ('' if row['spread'] is None else f' ± {row["spread"]:.2f}'),
            'of the mean': between(row['mean_interval']),
            'seeds': str(len(row['accuracies'])),
            f'to {result["reference"]}': known('{:+.2f}', row['difference']),
            '95 % interval': between(row['interval'], '+'),
            'p': '<0.001' if (row['p_adjusted'] or 1) < 0.001 else known('{:.3f}', row['p_adjusted']),
            'parameters': known('{:,}', row['parameters']),
            'MACs': known('{:,.1f} M', row['macs'] and row['macs'] / 1e6),
            'ms': known('{:.2f}', row.get('ms_per_image')),
            'time': known('{:.2f}', row['time_ratio']),
            'step': known('{:.2f}', row.get('step_ratio')),
            'kept': known('{:.2f}', row.get('kept_ratio')),
        }
        for row in rows
    ]
    curves = [row for row in rows if len(row.get('curve') or ()) > 1]
    shown = _some_epochs([list(row['curve']) for row in curves])
    by_epoch = [
        {'accuracy % after epoch': row['name'], **{e: known('{:.2f}', row['curve'].get(e)) for e in shown}}
        for row in curves
    ]
    images = result.get('images')
    of = f' of {images:,} images (one image is {100 / images:.2g} points)' if images else ''
    several = any(row['spread'] is not None for row in rows)
    named = [row for row in rows if row.get('block', '') not in row['name']]
    return '\n'.join(
        [
            *table(cells, left=['block']),
            '',
            *([*table(by_epoch, left=['accuracy % after epoch']), ''] if by_epoch else []),
            f'accuracy: after the last epoch, on the validation split{of}{"," if several else ";"}',
            *(['mean ± standard deviation over the seeds; of the mean: its 95 % interval;'] if several else []),
            f'to {result["reference"]}: mean difference seed by seed, with its 95 % interval; the intervals are not '
            f'adjusted;',
            'p: of a paired t-test, adjusted for the number of comparisons (Holm); ms: of a forward pass, per image;',
            'relative to no attention, measured in turns: time, of a forward pass; step, of a training step; kept, the',
            'memory for its backward pass.',
            '',
            *textwrap.wrap(result['summary'], 118, break_long_words=False, break_on_hyphens=False),
            *_unfinished(result),
            '',
            *(f'{row["name"]}: {row["block"]}' for row in named),
            *(f'failed: {key}: {text}' for key, text in result.get('errors', {}).items()),
        ]
    ).rstrip()


def _unfinished(result: Mapping[str, Any]) -> list[str]:
    asked, complete = result.get('asked', ()), result.get('seeds', ())
    if len(complete) == len(asked):
        return []
    return [
        '',
        f'Stopped when its time was up: {len(complete)} of {len(asked)} seeds are complete, and only these count. The '
        f'same command goes on.',
    ]


def _some_epochs(curves: Sequence[Sequence[str]]) -> list[str]:
    """At most ``EPOCHS`` of the epochs, evenly spaced, with the last one."""
    epochs = sorted({epoch for curve in curves for epoch in curve}, key=int)
    step = max(1, math.ceil(len(epochs) / EPOCHS))
    return epochs[::-1][::step][::-1]


def write_results(result: Mapping[str, Any], out: str | Path) -> list[Path]:
    """Write the result of ``compare``. -> the files.

    ``comparison.json`` has all of it, ``comparison.csv`` a line for each candidate, ``epochs.csv`` one for each
    candidate, seed and validated epoch, ``comparison.txt`` the text, and ``comparison.png`` is the picture, if
    matplotlib is installed and a candidate is trained.
    """
    out, rows = Path(out), result['candidates']
    lines = []
    for row in rows:
        line = {key: value for key, value in row.items() if not isinstance(value, (dict, list))}
        for key in ('mean_interval', 'interval'):
            line |= dict(zip((f'{key}_low', f'{key}_high'), row[key] or (None, None), strict=True))
        lines.append(line | {f'accuracy, seed {seed}': row['accuracies'].get(str(seed)) for seed in result['seeds']})
    by_epoch = [
        {'name': row['name'], 'seed': seed, 'epoch': epoch, 'accuracy': accuracy}
        for row in rows
        for seed, curve in row['epochs'].items()
        for epoch, accuracy in curve.items()
    ]
    texts = {
        'comparison.json': json.dumps(result, indent=2) + '\n',
        'comparison.csv': _csv(lines),
        'epochs.csv': _csv(by_epoch),
        'comparison.txt': format_comparison(result) + '\n',
    }
    for name, text in texts.items():
        write_text(out / name, text)
    written = [out / name for name in texts]
    if missing_matplotlib() is None and any(row['difference'] is not None for row in rows):
        written.append(save_figure(plot_comparison(result), out / 'comparison.png'))
    return written


def check_errors(result: Mapping[str, Any]) -> None:
    """Raise RuntimeError with the first failed job of a comparison and its error, if there is one."""
    if errors := result['errors']:
        key, text = next(iter(errors.items()))
        raise RuntimeError(f'{len(errors)} jobs of the comparison failed; the first one, {key}: {text}')


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, list(rows[0]), lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue()
