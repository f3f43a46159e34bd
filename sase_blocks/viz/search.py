"""The picture of a search: operation probabilities over the epochs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .style import CHANNEL_COLOR, FAINT, GREY, INK, SPATIAL_COLOR, STYLE, load_matplotlib, spread_out

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ['plot_logits']

NAMED = 7  # up to this many operations of an edge are labelled; with more, the first five


def plot_logits(
    history: Any,
    edges: Mapping[str, Sequence[str]],
    epochs: Sequence[float] | None = None,
    decided: Sequence[Mapping[str, bool | None]] | None = None,
    title: str | None = None,
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
        title: a text above the panels, such as data, seed and epochs; default: none.

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
        above = [title] if title else []
        if known and not any(known):
            above.append('nothing was decided: no operation leads by more than noise')
        if above:
            figure.suptitle('\n'.join(above), fontsize=10, color=INK)
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
    heights = spread_out([float(last[number]) for number in named], top, gap=0.088 * top)
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
