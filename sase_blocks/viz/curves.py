"""Learning curves of one or more networks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from .style import FIXED_COLORS, SPARE_COLORS, STYLE, load_matplotlib, network_color

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ['plot_learning_curves']


CHARACTERS = 95  # of a row of the legend
LINES = ('-', '--', ':', '-.')


def plot_learning_curves(history: Mapping[str, Sequence[Mapping[str, float]]], title: str | None = None) -> Figure:
    """Draw the training loss and held-out accuracy of one or more networks over the epochs.

    Args:
        history: Maps each network's name to the rows of its log, in time order. A row has ``'epoch'`` (the time, in
            epochs) and ``'train_loss'``, ``'acc1'`` (per cent) or both, and may have more keys. The ``'history'`` that
            ``train`` returns and the lines of its ``metrics.jsonl`` are such rows. Names in ``list_blocks()`` and
            ``'none'`` have the same colour in every picture.
        title: A text above the figure, such as data and seed; default: none.

    Returns:
        The figure; keep it with ``figure.savefig(path)``.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: ``history`` is empty, or a network has no row with one of the two values.
    """
    figure_class, style = load_matplotlib()
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    curves = {name: {key: _curve(name, rows, key) for key in ('train_loss', 'acc1')} for name, rows in history.items()}
    if not curves:
        raise ValueError('history is empty: expected at least one network')
    strangers = [name for name in curves if name not in FIXED_COLORS]
    columns = min(len(curves), max(1, CHARACTERS // (max(map(len, [*curves, 'no attention'])) + 6)))
    with style(STYLE):
        height = 3.1 + 0.2 * -(-len(curves) // columns) + (0.25 if title else 0)
        figure = figure_class(figsize=(7.6, height), layout=ConstrainedLayoutEngine(w_pad=0.08))
        left, right = figure.subplots(1, 2)
        for name, curve in curves.items():
            number = strangers.index(name) if name in strangers else 0
            color, line = network_color(name, number), LINES[number // len(SPARE_COLORS) % len(LINES)]
            times, losses = curve['train_loss']
            left.plot(times, losses, color=color, alpha=0.25, linewidth=0.8)
            left.plot(times, _running_mean(losses), line, color=color, linewidth=1.8)
            label = 'no attention' if name == 'none' else name
            right.plot(*curve['acc1'], line, color=color, linewidth=1.8, marker='o', markersize=4, label=label)
        left.set(yscale='log', ylabel='training loss (cross-entropy)')
        left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        left.yaxis.set_major_formatter('{x:g}')
        left.yaxis.set_minor_formatter(NullFormatter())
        if any(_window(curve['train_loss'][0]) > 1 for curve in curves.values()):
            left.text(0.03, 0.05, 'thick: running mean\nthin: every value', transform=left.transAxes, fontsize=8)
        right.set(ylabel='accuracy on held-out images (%)')
        last = max(time for curve in curves.values() for times, _ in curve.values() for time in times)
        for axis in (left, right):
            axis.set(xlabel='epoch', xlim=(0, 1.02 * last))
            axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=2))
        figure.legend(loc='outside upper center', ncols=columns, title=title, title_fontsize=9)
    return figure


def _curve(name: str, rows: Sequence[Mapping[str, float]], key: str) -> tuple[list[float], list[float]]:
    """The times and values of one key of a log."""
    rows = [row for row in rows if key in row]
    if not rows or not all('epoch' in row for row in rows):
        raise ValueError(
            f"history[{name!r}] must hold rows with 'epoch' and {key!r}, such as {{'epoch': 1, {key!r}: 2.0}}"
        )
    return [row['epoch'] for row in rows], [row[key] for row in rows]


def _running_mean(values: Sequence[float]) -> list[float]:
    """Trailing mean over a fifteenth of all values; over fewer at the start."""
    window = _window(values)
    return [fmean(values[max(0, end - window) : end]) for end in range(1, len(values) + 1)]


def _window(values: Sequence[float]) -> int:
    return max(1, len(values) // 15)
