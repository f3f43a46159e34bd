"""Draw a block: its data flow, the shapes, and the operation chosen from each set."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from sase_blocks.blocks import BLOCKS, Genotype, block_graph
from sase_blocks.blocks.graph import CHANNEL, SPATIAL, Edge, Graph
from sase_blocks.ops import EXTENDED_SETS, SETS

from .layout import Box, Layout, lay_out
from .style import CHANNEL_COLOR, FAINT, GREY, INK, SPATIAL_COLOR, STYLE, load_matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ['draw_block']

# All lengths are points: the axes and the fonts share one unit.
NODE, SMALL, CHOICE, OTHER = 10.0, 6.5, 8.0, 6.5  # font sizes: node, shape and caption, operation, rest of the set
RADIUS = 10.5  # of a node
ROW, CHOICE_ROW = 8.6, 13.0  # heights in the list of a set
LONG = 8  # operations in a list; a longer one begins with the chosen operation
LINE = 1.25  # distance of lines of text, in font sizes
MARGIN = 9.0


def draw_block(block: str | Genotype | nn.Module | Graph, *, sets: bool = True, title: str | None = None) -> Figure:
    """Draw a block as a graph from left to right: nodes with their shapes, edges with their operations.

    An operation chosen from a set is drawn in the list of that set: the paper's four sets if they contain all choices
    of the block, else the extended ones.

    Args:
        block: a name of ``list_blocks()``, maybe with options, a ``Genotype`` or its text, a block itself, or a
            ``Graph``.
        sets: show the sets; otherwise the picture is smaller and shows only the chosen operations.
        title: text above the drawing; default: the name of a named block, the class of a module.

    Returns:
        The figure, as large as the drawing needs; keep it with ``figure.savefig(path)``.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError, TypeError: an unknown name, a bad genotype, or not a block.
    """
    figure_class, style = load_matplotlib()
    graph = block if isinstance(block, Graph) else block_graph(block)
    if title is None:
        title = block if isinstance(block, str) and _plain(block) in BLOCKS else ''
        title = type(block).__name__ if isinstance(block, nn.Module) else title
    chosen = [(edge.set_name, edge.label) for edge in graph.edges if edge.set_name is not None]
    tables = SETS if all(_plain(label) in SETS[name] for name, label in chosen) else EXTENDED_SETS
    with style(STYLE):
        nodes = {name: _Node(name, shape) for name, shape in graph.nodes.items()}
        operations = [_operation(edge, tables if sets else {}) for edge in graph.edges]
        layout = lay_out(
            {name: node.box for name, node in nodes.items()},
            [(edge.source, edge.target) for edge in graph.edges],
            [operation.box for operation in operations],
        )
        head = [(title, 11.0, 'bold')] if title else []
        wide = max(layout.width, 250.0)
        head += [(line, 9.0, 'normal') for line in _wrap(graph.formula.replace('*', '\N{MIDDLE DOT}'), wide, 9.0)]
        top = layout.top - MARGIN - sum(1.5 * size for _, size, _ in head)
        note = 'Each list is a set of operations; the filled row is the one chosen.' if chosen and sets else ''
        bottom = layout.bottom + (16.0 if note else 0.0)
        width = max([layout.width, *(_width(text, size, weight=weight) for text, size, weight in head)])
        size = width + 2 * MARGIN, bottom - top + 2 * MARGIN
        figure = figure_class(figsize=(size[0] / 72, size[1] / 72))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(-MARGIN, width + MARGIN), ylim=(bottom + MARGIN, top - MARGIN))
        axes.set_axis_off()
        y = top
        for text, font, weight in head:
            axes.text(0, y, text, size=font, weight=weight, color=INK, va='top', parse_math=False)
            y += 1.5 * font
        if note:
            axes.text(0, bottom, note, size=SMALL, color=GREY, va='bottom')
        _draw_lines(axes, graph, layout, nodes)
        for place, operation in zip(layout.edges, operations, strict=True):
            operation.draw(axes, place.x, place.y)
        for name, node in nodes.items():
            node.draw(axes, layout.nodes[name].x, layout.nodes[name].y)
    return figure


def _draw_lines(axes: Axes, graph: Graph, layout: Layout, nodes: Mapping[str, _Node]) -> None:
    from matplotlib.patches import PathPatch, Polygon
    from matplotlib.path import Path

    for edge, place in zip(graph.edges, layout.edges, strict=True):
        source, target = layout.nodes[edge.source], layout.nodes[edge.target]
        tip = target.x - nodes[edge.target].half
        points: list[tuple[float, float]] = [(source.x + nodes[edge.source].half, source.y)]
        codes = [Path.MOVETO]
        for here, there in (
            ((source.right, source.y), (place.left, place.y)),
            ((place.right, place.y), (target.left - 5, target.y)),
        ):
            middle = (here[0] + there[0]) / 2
            points += [here, (middle, here[1]), (middle, there[1]), there]
            codes += [Path.LINETO, Path.CURVE4, Path.CURVE4, Path.CURVE4]
        points.append((tip - 4, target.y))
        codes.append(Path.LINETO)
        line = Path(points, codes)
        axes.add_patch(PathPatch(line, fill=False, edgecolor=GREY, linewidth=1.1, capstyle='butt', zorder=1))
        head = [(tip, target.y), (tip - 5.5, target.y - 2.7), (tip - 5.5, target.y + 2.7)]
        axes.add_patch(Polygon(head, closed=True, facecolor=GREY, linewidth=0, zorder=2))


class _Node:
    """A name in a rounded box, coloured by kind, with its shape below."""

    def __init__(self, name: str, shape: str) -> None:
        self.name = name.replace(' * ', '\N{MIDDLE DOT}')
        self.shape = shape.replace(' x ', '\N{THIN SPACE}\N{MULTIPLICATION SIGN}\N{THIN SPACE}')
        self.color = {CHANNEL: CHANNEL_COLOR, SPATIAL: SPATIAL_COLOR}.get(shape)
        self.half = max(RADIUS, _width(self.name, NODE, style='italic') / 2 + 5)
        self.box = Box(max(2 * self.half, _width(self.shape, SMALL)), RADIUS, RADIUS + 2 + 1.2 * SMALL)

    def draw(self, axes: Axes, x: float, y: float) -> None:
        box = (x - self.half, y - RADIUS, 2 * self.half, 2 * RADIUS)
        _rounded(axes, box, RADIUS, 'white', None)
        _rounded(axes, box, RADIUS, f'{self.color}22' if self.color else 'white', self.color or INK)
        centred: dict[str, Any] = {'ha': 'center', 'parse_math': False, 'zorder': 4}
        axes.text(x, y, self.name, size=NODE, style='italic', color=INK, va='center_baseline', **centred)
        axes.text(x, y + RADIUS + 2, self.shape, size=SMALL, color=GREY, va='top', **centred)


class _Operation:
    """A plain line."""

    box = Box(0.0, 0.0, 0.0)

    def draw(self, axes: Axes, x: float, y: float) -> None:
        pass


class _Label(_Operation):
    """An operation without alternatives, or whose set is not shown."""

    def __init__(self, label: str, color: str | None) -> None:
        self.lines = _balanced(label, 17)
        self.color = color
        half = (LINE * CHOICE * len(self.lines) + 5) / 2
        self.box = Box(max(_width(line, CHOICE) for line in self.lines) + 10, half, half)

    def draw(self, axes: Axes, x: float, y: float) -> None:
        fill, text = (self.color, 'white') if self.color else ('white', INK)
        box = (x - self.box.width / 2, y - self.box.above, self.box.width, 2 * self.box.above)
        _rounded(axes, box, 3, fill, self.color or FAINT)
        for i, line in enumerate(self.lines):
            middle = y + LINE * CHOICE * (i - (len(self.lines) - 1) / 2)
            axes.text(
                x, middle, line, size=CHOICE, color=text, ha='center', va='center_baseline', parse_math=False, zorder=4
            )


class _Choice(_Operation):
    """A set as a list, the chosen operation filled; the line runs into and out of its row.

    The list keeps the set's order, but a long one starts with the chosen operation.
    """

    def __init__(self, label: str, set_name: str, members: list[str], color: str) -> None:
        self.caption, self.color = set_name.replace('_', ' '), color
        self.names = members if len(members) <= LONG else sorted(members, key=lambda name: name != label)
        self.chosen = self.names.index(label)
        self.width = max(_width(label, CHOICE, weight='bold'), *(_width(name, OTHER) for name in self.names)) + 9
        self.above = self.chosen * ROW + CHOICE_ROW / 2 + 2
        self.below = (len(self.names) - 1 - self.chosen) * ROW + CHOICE_ROW / 2 + 2
        width = max(self.width, _width(self.caption, SMALL))
        self.box = Box(width, self.above + 1.4 * SMALL, self.below)

    def draw(self, axes: Axes, x: float, y: float) -> None:
        left, top = x - self.width / 2, y - self.above
        axes.text(x, top - 2, self.caption, size=SMALL, color=self.color, ha='center', va='baseline', zorder=4)
        _rounded(axes, (left, top, self.width, self.above + self.below), 3, 'white', self.color, linewidth=0.8)
        row = (left + 1.5, y - CHOICE_ROW / 2 + 0.5, self.width - 3, CHOICE_ROW - 1)
        _rounded(axes, row, 2.5, self.color, None)
        for i, name in enumerate(self.names):
            away = i - self.chosen
            look: dict[str, Any] = {'size': OTHER, 'color': GREY}
            if not away:
                look = {'size': CHOICE, 'color': 'white', 'weight': 'bold'}
            middle = y + away * ROW + (away > 0) * (CHOICE_ROW - ROW) / 2 - (away < 0) * (CHOICE_ROW - ROW) / 2
            axes.text(x, middle, name, ha='center', va='center_baseline', parse_math=False, zorder=4, **look)


def _operation(edge: Edge, tables: Mapping[str, Mapping[str, Any]]) -> _Operation:
    if not edge.label:
        return _Operation()
    if edge.set_name is None:
        return _Label(edge.label, None)
    color = CHANNEL_COLOR if edge.set_name.startswith('channel') else SPATIAL_COLOR
    members = [edge.label if _plain(edge.label) == name else name for name in tables.get(edge.set_name, ())]
    return _Choice(edge.label, edge.set_name, members, color) if edge.label in members else _Label(edge.label, color)


def _plain(name: str) -> str:
    """A name without its options."""
    return name.partition('(')[0].strip()


def _rounded(
    axes: Axes,
    box: tuple[float, float, float, float],
    radius: float,
    fill: str,
    edge: str | None,
    linewidth: float = 1.0,
) -> None:
    """A box (left, top, width, height) with round corners, above the lines."""
    from matplotlib.patches import FancyBboxPatch

    left, top, width, height = box
    shape = FancyBboxPatch((left, top), width, height, boxstyle=f'round,pad=0,rounding_size={radius}', zorder=3)
    shape.set(facecolor=fill, edgecolor=edge or 'none', linewidth=linewidth if edge else 0)
    axes.add_patch(shape)


def _width(text: str, size: float, **font: Any) -> float:
    """Width of a text in points, as it will be drawn."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    width, _, _ = text_to_path.get_text_width_height_descent(text, FontProperties(size=size, **font), ismath=False)
    return 1.03 * float(width)  # hinting widens small glyphs on a screen


def _balanced(text: str, width: int) -> list[str]:
    """Wrap the text into as few lines of about ``width`` characters as possible, each as short as possible."""
    wrapped = [textwrap.wrap(text, w, break_long_words=False) for w in range(1, width + 1)]
    return next(lines for lines in wrapped if len(lines) == len(wrapped[-1]))


def _wrap(text: str, width: float, size: float) -> list[str]:
    """Wrap the text into lines of at most about ``width`` points."""
    return textwrap.wrap(text, max(20, int(len(text) * width / max(_width(text, size), 1.0))))
