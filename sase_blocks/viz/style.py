"""Shared by all pictures: lazy loading of matplotlib, its settings, and one colour for one meaning."""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sase_blocks.reading import quoted

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette, safe for the common kinds of colour blindness, without its yellow (unreadable on white).
# The networks of the documentation have fixed colours, so one colour means one network in every picture.
FIXED_COLORS = {'none': '#4d4d4d', 'se': '#e69f00', 'cbam': '#009e73', 'sase': '#0072b2'}
SPARE_COLORS = ('#d55e00', '#cc79a7', '#56b4e9', '#000000')
CHANNEL_COLOR, SPATIAL_COLOR = '#0072b2', '#d55e00'  # attention along the channels, and over the positions
INK, GREY, FAINT = '#222222', '#6e6e6e', '#d4d4d4'
STYLE: dict[str, Any] = {
    'font.size': 9,
    'axes.titlesize': 10,
    'axes.spines.top': False,
    'axes.spines.right': False,
    'axes.grid': True,
    'axes.axisbelow': True,
    'grid.color': '#e4e4e4',
    'grid.linewidth': 0.7,
    'legend.frameon': False,
    'figure.dpi': 160,
}


# Picture formats, each with the date field to leave out.
DATES: dict[str, dict[str, None]] = {'.png': {}, '.svg': {'Date': None}, '.pdf': {'CreationDate': None}}


def network_color(name: str, index: int = 0) -> str:
    """Colour of a network in every picture of this package.

    Args:
        name: A block name of ``list_blocks()`` or ``'none'``; a name without a fixed colour gets a spare one.
        index: Position among the drawn networks; chooses the spare colour.

    Returns:
        A hexadecimal RGB colour.
    """
    return FIXED_COLORS.get(name, SPARE_COLORS[index % len(SPARE_COLORS)])


def load_matplotlib() -> tuple[type[Figure], Any]:
    """The figure class and the style context. Raises an ImportError that names the extra."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('drawing needs matplotlib: pip install "sase-blocks[viz]"') from error
    return Figure, rc_context


def missing_matplotlib() -> str | None:
    """The text of the error that ``load_matplotlib`` would raise; None if matplotlib is installed."""
    try:
        load_matplotlib()
    except ImportError as error:
        return str(error)
    return None


def check_picture(path: str | os.PathLike[str]) -> None:
    """Raise early the errors that ``save_figure`` would raise for this path or a missing matplotlib."""
    path = Path(path)
    if path.suffix.lower() not in DATES:
        raise ValueError(f'a picture must be .png, .svg or .pdf, got {quoted(str(path))}')
    load_matplotlib()
    if path.is_dir():
        raise IsADirectoryError(f'the picture {path} cannot be written: it is a folder')
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise type(error)(f'the picture {path} cannot be written: {error.strerror or error}') from error


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """Write a figure as PNG, SVG or PDF, by the suffix of ``path``; equal figures give equal files.

    Raises:
        ValueError: another suffix.
        OSError: the file cannot be written; an existing file is left unchanged.
    """
    path = Path(path)
    check_picture(path)
    suffix = path.suffix.lower()
    _, style = load_matplotlib()
    buffer = io.BytesIO()
    with style({'svg.hashsalt': 'sase_blocks'}):
        figure.savefig(buffer, format=suffix[1:], metadata=DATES[suffix])
    temporary = path.with_name(f'{path.name}.{os.getpid()}.tmp')  # several workers of a search write the same pictures
    try:
        temporary.write_bytes(buffer.getvalue())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def spread_out(heights: Sequence[float], top: float, gap: float) -> list[float]:
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
