"""The confusion matrix of a classifier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from sase_blocks.reading import printable

from .style import STYLE, load_matplotlib

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ['plot_confusion']

NUMBERED = 20  # so many classes leave room for a number in each cell
NAMED = 60  # and so many for the names
LONGEST = 18  # characters of a name


def plot_confusion(confusion: Tensor | Sequence[Sequence[int]], classes: Sequence[str], title: str = '') -> Figure:
    """Draw how often images of each class were taken for each class.

    A row is a true class. Its colours are shares of the row, so classes of different sizes compare, and its numbers are
    images. Up to 20 classes have numbers, and up to 60 have names.

    Args:
        confusion: number of images by true class (rows) and predicted class (columns), (classes, classes).
        classes: their names.
        title: a text above, for example data, epoch and seed.

    Returns:
        The figure; keep it with ``save_figure(figure, path)``.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: ``confusion`` is not square with one row per class, or holds no image.
    """
    figure_class, style = load_matplotlib()
    import numpy as np

    counts = np.asarray(confusion)
    if counts.shape != (len(classes), len(classes)) or not counts.sum():
        raise ValueError(
            f'confusion must have a row and a column for each of {len(classes)} classes, and an image, got shape '
            f'{counts.shape} with {counts.sum()} images'
        )
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    names = [_shorten(printable(name)) for name in classes]
    count = len(names)
    named = count <= NAMED
    # Inches; a name needs 0.13 in height in a font of 6.
    side = max(2.0, 0.38 * count) if count <= NUMBERED else 0.14 * count if named else 6.0
    size = 8 if count <= NUMBERED else 6
    margin = 0.01 * size * max(map(len, names)) if named else 0.4
    with style({**STYLE, 'axes.grid': False}):
        figure = figure_class(figsize=(side + margin + 1.6, side + margin + 1.1), layout='constrained')
        axis = figure.subplots()
        image = axis.imshow(shares, cmap='Blues', vmin=0, vmax=1, interpolation='nearest')
        if named:
            axis.set_xticks(range(count), labels=names, fontsize=size, rotation=90)
            axis.set_yticks(range(count), labels=names, fontsize=size)
        if count <= NUMBERED:
            for (row, column), share in np.ndenumerate(shares):
                if counts[row, column]:
                    color = 'white' if share > 0.5 else 'black'
                    text = str(counts[row, column])
                    axis.text(column, row, text, ha='center', va='center', color=color, fontsize=9 - len(text) / 2)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
        axis.set(xlabel='predicted class', ylabel='true class')
        axis.set_title(title, fontsize=9, loc='left')
        bar = figure.colorbar(image, ax=axis, shrink=0.8, aspect=30)
        bar.set_label('share of the true class')
        bar.outline.set_visible(False)
    return figure


def _shorten(name: str) -> str:
    """A name, cut in the middle to at most ``LONGEST`` characters."""
    return name if len(name) <= LONGEST else f'{name[: LONGEST // 2]}\N{HORIZONTAL ELLIPSIS}{name[1 - LONGEST // 2 :]}'
