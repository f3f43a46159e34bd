"""The picture of a comparison: what each block gains, against what it costs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .style import FAINT, FIXED_COLORS, GREY, SPARE_COLORS, STYLE, load_matplotlib, network_color, spread_out

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ['plot_comparison']

COSTS = {'time_ratio': 'time of a forward pass', 'kept_ratio': 'memory for the backward pass'}
MARKERS = 'osD^v'
CAPTION = 'dot: mean difference, filled if beyond chance; line: its 95 % interval'
ALONE = 'dot: difference on one seed, or equal on all seeds, which decides nothing'
LONGEST = 24  # characters of a name
NAMED = 16  # so many names fit beside the panels


def plot_comparison(result: Mapping[str, Any]) -> Figure:
    """Draw the accuracy of each block relative to the reference, against its cost.

    A dot is a difference of means, its line the 95 % interval of the difference. A filled dot is a difference beyond
    chance. The reference is the dashed line. Random blocks of a search are grey and without names.

    Args:
        result: the result of ``comparing.compare`` or of the search's ``evaluate``.

    Returns:
        The figure; keep it with ``save_figure(figure, path)``.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: no candidate has a difference.
    """
    figure_class, style = load_matplotlib()
    reference = result['reference']
    rows = [row for row in result['candidates'] if row['difference'] is not None]
    if not rows:
        raise ValueError('no block of the comparison has been trained with a seed that the reference has')
    named = [row for row in rows if row['kind'] != 'random']
    strangers = [row['name'] for row in named if row['name'] not in FIXED_COLORS]
    with style(STYLE):
        figure = figure_class(figsize=(8.0, max(3.4, 0.9 + 0.2 * len(named))), layout='constrained')
        axes = figure.subplots(1, len(COSTS), sharey=True)
        for axis, (cost, label) in zip(axes, COSTS.items(), strict=True):
            axis.axhline(0, color=GREY, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
            for row in sorted(rows, key=lambda row: row['kind'] != 'random'):
                color, marker = _mark(row, strangers)
                x, y = row.get(cost), row['difference']
                if x is None:
                    continue
                if row['interval'] is not None and row['kind'] != 'random':
                    axis.plot([x, x], row['interval'], color=color, linewidth=1.6, alpha=0.55, zorder=2)
                decided = row['p_adjusted'] is not None and row['p_adjusted'] <= 0.05
                axis.plot(x, y, marker, color=color, markerfacecolor=color if decided else 'white', zorder=3)
            for row in result['candidates']:
                if row['name'] == reference and row.get(cost) is not None:
                    axis.plot(row[cost], 0, 'o', color=GREY, markersize=5, zorder=3)
            axis.set(xlabel=f'{label}, no attention = 1')
        axes[0].set(ylabel=f'accuracy relative to {_name(reference)} (points)')
        if len(named) <= NAMED:
            _add_names(axes[-1], named, strangers)
        known = any(row['interval'] is not None for row in named)
        seeds = len(result.get('seeds', ()))
        epochs = result.get('budget', {}).get('epochs')
        facts = [
            str(result.get('model', '')),
            str(result.get('data', '')),
            f'{epochs} epoch{"s"[: epochs != 1]}' if epochs else '',
            f'{seeds} seed{"s"[: seeds != 1]}' if seeds else '',
        ]
        figure.suptitle(', '.join(filter(None, facts)) + f'\n{CAPTION if known else ALONE}', fontsize=9)
    return figure


def _name(name: str) -> str:
    return 'no attention' if name == 'none' else name if len(name) <= LONGEST else name[: LONGEST - 3] + '...'


def _mark(row: Mapping[str, Any], strangers: list[str]) -> tuple[str, str]:
    """Colour and marker, different for each named block."""
    if row['kind'] == 'random':
        return FAINT, 'o'
    if row['name'] not in strangers:
        return network_color(row['name']), 'o'
    number = strangers.index(row['name'])
    return network_color('', number), MARKERS[(1 + number // len(SPARE_COLORS)) % len(MARKERS)]


def _add_names(axis: Any, rows: list[Mapping[str, Any]], strangers: list[str]) -> None:
    """The names beside a panel, with lines to their dots."""
    rows = sorted((row for row in rows if row.get('kept_ratio') is not None), key=lambda row: -row['difference'])
    low, high = axis.get_ylim()
    heights = [(row['difference'] - low) / (high - low) for row in rows]
    for row, height in zip(rows, spread_out(heights, 1.0, gap=0.062), strict=True):
        color, _ = _mark(row, strangers)
        axis.annotate(
            _name(row['name']),
            (row['kept_ratio'], row['difference']),
            xytext=(1.04, height),
            textcoords='axes fraction',
            ha='left',
            va='center',
            fontsize=8,
            color=color,
            annotation_clip=False,
            arrowprops={'arrowstyle': '-', 'relpos': (0, 0.5), 'color': color, 'linewidth': 0.5, 'alpha': 0.6},
        )
