"""Pictures of a search: operation probabilities over the epochs, and the accuracy of the found block."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .style import CHANNEL_COLOR, FAINT, FIXED_COLORS, GREY, INK, SPATIAL_COLOR, STYLE, load_matplotlib

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ['plot_evaluation', 'plot_logits']

NAMED = 7  # up to this many operations of an edge are labelled; with more, the first five
# Table beside the accuracies: heading -> right end, as a fraction of its width.
COLUMNS = {'mean ± std.': 0.46, 'params': 0.76, 'time': 1.0}


def plot_logits(
    history: Any,
    edges: Mapping[str, Sequence[str]],
    epochs: Sequence[float] | None = None,
    decided: Sequence[Mapping[str, bool | None]] | None = None,
) -> Figure:
    """Draw the probability of each operation over the epochs of a search, one panel per edge and set of logits.

    The operation that leads at the end is highlighted: blue for channel attention, vermilion for spatial attention. A
    dashed line marks equal probabilities. With more than seven operations, only the first five are labelled.

    Args:
        history: logits (times, sets, operations of all edges), or (times, operations) for one set; the first time is
            before the first epoch. A search's ``alphas.npz`` contains such an array.
        edges: maps each edge to the names of its operations, in the order of the logits (``SearchSpace.to_dict()``).
        epochs: the times; default: 0, 1, 2, ...
        decided: for each set and edge, whether the search decided it ('decided' of a result's edges). The panel of an
            undecided edge says so and highlights nothing; if no edge was decided, the figure says so above the panels.

    Returns:
        The figure; keep it with ``save_figure(figure, path)``.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: an array of the wrong shape or with non-finite values, or a wrong number of times.
    """
    figure_class, style = load_matplotlib()
    from matplotlib.ticker import MaxNLocator

    logits = np.asarray(history, dtype=np.float64)
    logits = logits[:, None] if logits.ndim == 2 else logits
    total = sum(len(names) for names in edges.values())
    if logits.ndim != 3 or 0 in logits.shape or logits.shape[2] != total:
        raise ValueError(f'history must be (times, sets, {total}) for these edges, got {np.shape(history)}')
    if not np.isfinite(logits).all():
        raise ValueError('history has values that are not finite')
    times = np.arange(len(logits)) if epochs is None else np.asarray(epochs, dtype=np.float64)
    if len(times) != len(logits):
        raise ValueError(f'history has {len(logits)} times, but epochs has {len(times)}')
    if decided is not None and len(decided) != logits.shape[1]:
        raise ValueError(f'history has {logits.shape[1]} sets, but decided has {len(decided)}')
    marks = [{}] * logits.shape[1] if decided is None else decided

    sets, columns = logits.shape[1], 3
    rows_of_one = math.ceil(len(edges) / columns)
    parts = [
        _softmax(part) for part in np.split(logits, np.cumsum([len(names) for names in edges.values()])[:-1], axis=2)
    ]
    top = 1.12 * max(part.max() for part in parts)
    with style(STYLE):
        figure = figure_class(figsize=(8.6, 0.35 + 2.05 * rows_of_one * sets), layout='constrained')
        axes = figure.subplots(rows_of_one * sets, columns, sharex=True, sharey=True, squeeze=False)
        for axis in axes.flat[:]:
            axis.set_visible(False)
        for number in range(sets):
            for place, ((edge, names), part) in enumerate(zip(edges.items(), parts, strict=True)):
                row, column = number * rows_of_one + place // columns, place % columns
                axis = axes[row, column]
                axis.set_visible(True)
                _draw_edge(axis, times, part[:, number], names, top, _edge_color(edge), marks[number].get(edge))
                stage = f'stage {number + 1}: ' if sets > 1 else ''
                axis.set_title(f'{stage}{edge.replace("_", " ")}', loc='left', fontsize=9.5)
                if column == 0:
                    axis.set_ylabel('probability')
                if row == len(axes) - 1 or place + columns >= len(edges):
                    axis.tick_params(labelbottom=True)
                if row == len(axes) - 1:
                    axis.set_xlabel('epoch')
        first = axes[0, 0]
        first.set(ylim=(0, top), xlim=(times[0], max(times[-1], times[0] + 1e-9)))
        first.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        first.yaxis.set_major_locator(MaxNLocator(nbins=4))
        known = [mark for one in marks for mark in one.values() if mark is not None]
        if known and not any(known):
            figure.suptitle('nothing was decided: no operation leads by more than noise', fontsize=10, color=INK)
    return figure


def plot_evaluation(result: Mapping[str, Any]) -> Figure:
    """Draw the accuracies of the blocks trained from scratch, ranked by their mean.

    A dot is a seed, the vertical line the mean, the bar the standard deviation over the seeds. The found block is blue,
    random blocks of its space are grey, and a dashed line marks the found block's mean. The table on the right gives
    parameters, and forward time relative to the network without attention.

    Args:
        result: the return value of the search's ``evaluate``, or the content of ``evaluation.json``: 'candidates', each
            with name, kind, 'accuracies' (by seed, per cent), mean, spread, parameters and time_ratio.

    Returns:
        The figure; keep it with ``save_figure(figure, path)``.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: no candidate has an accuracy.
    """
    figure_class, style = load_matplotlib()

    rows = [row for row in result['candidates'] if row['mean'] is not None]
    if not rows:
        raise ValueError('no candidate of the evaluation has an accuracy')
    rows.sort(key=lambda row: row['mean'])
    with style(STYLE):
        figure = figure_class(figsize=(8.0, 1.0 + 0.31 * len(rows)), layout='constrained')
        axis, table = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1.25))
        for y, row in enumerate(rows):
            color = {'found': FIXED_COLORS['sase'], 'random': '#8c8c8c'}.get(row['kind'], INK)
            values = list(row['accuracies'].values())
            mean, spread = row['mean'], row['spread']
            if row['kind'] == 'found':
                axis.axvline(mean, color=color, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
            if spread:
                axis.plot([mean - spread, mean + spread], [y, y], color=color, alpha=0.25, linewidth=7, zorder=2)
            axis.plot(values, [y] * len(values), 'o', color=color, markersize=4, alpha=0.75, zorder=3)
            axis.plot([mean, mean], [y - 0.32, y + 0.32], color=color, linewidth=2, zorder=4)
            cells = (
                f'{mean:.2f}' + (f' ± {spread:.2f}' if spread is not None else ''),
                '-' if row['parameters'] is None else _short(row['parameters']),
                '-' if row['time_ratio'] is None else f'{row["time_ratio"]:.2f}',
            )
            for x, cell in zip(COLUMNS.values(), cells, strict=True):
                table.text(x, y, cell, ha='right', va='center', fontsize=8, color=color)
        for name, x in COLUMNS.items():
            table.text(x, len(rows) - 0.4, name, ha='right', va='bottom', fontsize=8, color=GREY)
        axis.set_yticks(range(len(rows)), ['no attention' if row['name'] == 'none' else row['name'] for row in rows])
        for label, row in zip(axis.get_yticklabels(), rows, strict=True):
            if row['kind'] == 'found':
                label.set(color=FIXED_COLORS['sase'], fontweight='bold')
            elif row['kind'] == 'random':
                label.set_color(GREY)
        axis.set(
            ylim=(-0.6, len(rows) - 0.4), xlabel='accuracy (%): a dot for each seed, their mean ± standard deviation'
        )
        axis.tick_params(axis='y', length=0)
        axis.grid(axis='y', visible=False)
        axis.spines['left'].set_visible(False)
        table.set(xlim=(0, 1))
        table.set_axis_off()
    return figure


def _softmax(logits: Any) -> Any:
    values = np.exp(logits - logits.max(-1, keepdims=True))
    return values / values.sum(-1, keepdims=True)


def _edge_color(edge: str) -> str:
    return CHANNEL_COLOR if edge in ('channel_squeeze', 'channel_excite', 'gate_excite') else SPATIAL_COLOR


def _draw_edge(
    axis: Any, times: Any, probabilities: Any, names: Sequence[str], top: float, color: str, decided: bool | None
) -> None:
    """One panel. probabilities: (times, operations)."""
    last = probabilities[-1]
    order = np.argsort(-last, kind='stable')
    winner = None if decided is False else order[0]
    marker = 'o' if len(times) == 1 else None
    axis.axhline(1 / len(names), color=GREY, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
    for number in order[::-1]:
        wins = number == winner
        axis.plot(
            times,
            probabilities[:, number],
            color=color if wins else '#a6a6a6',
            linewidth=2.2 if wins else 1.0,
            zorder=4 if wins else 2,
            marker=marker,
            solid_capstyle='round',
        )
    named = [int(number) for number in (order if len(names) <= NAMED else order[: NAMED - 2])]
    heights = _spread_out([float(last[number]) for number in named], top, gap=0.088 * top)
    for number, height in zip(named, heights, strict=True):
        wins = number == winner
        shade = color if wins else GREY
        # A line from the end of the curve to its label, which may have been moved.
        axis.annotate(
            names[number],
            (1, float(last[number]) / top),
            xytext=(1.06, height / top),
            xycoords='axes fraction',
            textcoords='axes fraction',
            ha='left',
            va='center',
            fontsize=7.5 if wins else 6.5,
            fontweight='bold' if wins else 'normal',
            color=shade,
            annotation_clip=False,
            arrowprops={
                'arrowstyle': '-',
                'relpos': (0, 0.5),
                'color': shade if wins else FAINT,
                'linewidth': 0.7,
                'shrinkA': 1,
                'shrinkB': 0,
            },
        )
    if len(names) > 1:
        entropy = float(-(last * np.log(np.maximum(last, 1e-300))).sum() / np.log(len(names)))
        margin = float(last[order[0]] - last[order[1]])
        text = f'margin {margin:.2f}, entropy {entropy:.2f}' + (', not decided' if decided is False else '')
        axis.text(0.03, 0.97, text, transform=axis.transAxes, va='top', fontsize=6.5, color=GREY)


def _spread_out(heights: Sequence[float], top: float, gap: float) -> list[float]:
    """Heights near the given ones (in descending order), at least ``gap`` apart, within 0 to ``top``."""
    placed = list(heights)
    for i in range(1, len(placed)):
        placed[i] = min(placed[i], placed[i - 1] - gap)
    # Push up again whatever ended below the lower end.
    floor = 0.35 * gap
    for i in reversed(range(len(placed))):
        placed[i] = max(placed[i], floor)
        floor = placed[i] + gap
    # Move halfway up again to centre each cluster.
    shift = min(
        max(0.0, (sum(heights) - sum(placed)) / max(len(placed), 1)),
        max(0.0, top - 0.35 * gap - placed[0]) if placed else 0.0,
    )
    return [height + shift for height in placed]


def _short(count: float) -> str:
    """A count of parameters: 272 k, 25.6 M."""
    return f'{count / 1e6:.1f} M' if count >= 1e6 else f'{count / 1e3:.0f} k'
