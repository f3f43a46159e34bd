"""Pictures of a TrioNet search: the found networks against their cost, and one network's architecture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sase_blocks.models import Architecture
from sase_blocks.models.architecture import Block

from .style import FAINT, GREY, INK, STYLE, load_matplotlib

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ['draw_architecture', 'plot_front']

# Each operator has the same colour and marker in every picture.
OPERATOR_COLORS = {'conv': '#4d4d4d', 'local': '#e69f00', 'axial': '#0072b2'}
OPERATOR_MARKS = {'conv': 's', 'local': 'D', 'axial': '^'}
COSTS = {
    'macs': ('multiply-accumulates per image (M)', 1e6),
    'parameters': ('parameters (M)', 1e6),
    'milliseconds': ('milliseconds per image, sum of measured parts', 1.0),
}


def plot_front(result: Mapping[str, Any], title: str | None = None) -> Figure:
    """Draw the Pareto front of a search: held-out accuracy with the supernet's weights against cost.

    A ring marks the found network, an operator's marker the pure ones (one operator wherever the space allows), a
    dashed line the limit. The title says how many networks may be as good as the found one ('tied' of the result).

    Args:
        result: the return value of ``search.trionet.search``, or the content of ``architecture.json``.
        title: a text above the number of networks, such as data, seed and epochs; default: none.

    Returns:
        The figure; ``save_figure(figure, path)`` writes it.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: not the result of a search.
    """
    figure_class, style = load_matplotlib()
    try:
        objective = result['objective']
        label, scale = COSTS[objective]
        limit = result['limits'][objective]
        front = sorted((entry['cost'][objective] / scale, entry['score']) for entry in result['front'])
        pure = {
            name: (entry['cost'][objective] / scale, entry['score'], entry['architecture'])
            for name, entry in result['pure'].items()
        }
        found = result['cost'][objective] / scale, result['score']
        evaluations, tied = result['evaluations'], result.get('tied')
    except (KeyError, TypeError) as error:
        raise ValueError(f'not the result of a search: {type(error).__name__} {error}') from None
    with style(STYLE):
        figure = figure_class(figsize=(6.4, 4.0), layout='constrained')
        axis = figure.subplots()
        costs, scores = zip(*front, strict=True)
        axis.step(costs, scores, where='post', color=FAINT, linewidth=1.4, zorder=1)
        axis.plot(costs, scores, 'o', color=INK, markersize=4, label='Pareto front', zorder=2)
        axis.plot(
            *found, 'o', markersize=11, markerfacecolor='none', markeredgecolor=INK, markeredgewidth=1.4, label='found'
        )
        for name, (cost, score, text) in pure.items():
            label_of = f'only {name}' if set(Architecture.parse(text).operators) == {name} else f'{name}, else conv'
            axis.plot(
                cost, score, OPERATOR_MARKS[name], color=OPERATOR_COLORS[name], markersize=7, label=label_of, zorder=3
            )
        if limit is not None:
            axis.axvline(limit / scale, color=GREY, linestyle='--', linewidth=1)
            axis.annotate(
                'limit', (limit / scale, 1), xycoords=('data', 'axes fraction'), xytext=(-4, -4),
                textcoords='offset points', ha='right', va='top', color=GREY,
            )  # fmt: skip
        axis.set_xlabel(label)
        axis.set_ylabel('held-out accuracy, weights of the supernet (%)')
        text = f'{evaluations} networks of the space'
        if tied is not None:
            text += ': nothing was decided' if tied == evaluations - 1 else f', {tied} may be as good as the found one'
        axis.set_title(f'{title}\n{text}' if title else text, loc='left')
        # A legend beside the axes covers no network.
        axis.legend(loc='upper left', bbox_to_anchor=(1.0, 1.0), borderaxespad=0.4)
    return figure


def draw_architecture(architecture: Architecture | str, *, title: str | None = None) -> Figure:
    """Draw a network of TrioNet's blocks: one box per block, as wide as its operator, in its operator's colour.

    A box is as high as its feature map, so the stages step down; its text is the kernel or window size.

    Args:
        architecture: the network, or its text.
        title: text above the drawing.

    Returns:
        The figure; ``save_figure(figure, path)`` writes it.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the text is not an architecture.
    """
    figure_class, style = load_matplotlib()
    from matplotlib.patches import FancyBboxPatch, Patch

    network = Architecture.parse(architecture) if isinstance(architecture, str) else architecture
    places = list(network.places())
    widest = max(block.width for _, _, block, *_ in places)
    largest = max(size for *_, size in places)
    gap, stage_gap, least = 0.10, 0.34, 0.34
    with style({**STYLE, 'axes.grid': False}):
        x = 0.0
        boxes: list[tuple[float, float, float, Block]] = []
        stages: list[tuple[float, float, int]] = []
        for i, j, block, _, _, size in places:
            if j == 0:
                x += stage_gap if i else 0.0
                stages.append((x, x, size))
            width = least + 0.66 * block.width / widest
            height = 0.5 + 1.3 * size / largest
            boxes.append((x, width, height, block))
            x += width + gap
            stages[-1] = (stages[-1][0], x - gap, stages[-1][2])
        figure = figure_class(figsize=(max(4.2, 1.0 + 0.98 * x), 3.1), layout='constrained')
        axis = figure.subplots()
        axis.set_axis_off()
        for left, width, height, block in boxes:
            axis.add_patch(
                FancyBboxPatch(
                    (left, -height / 2), width, height, boxstyle='round,pad=0,rounding_size=0.06', linewidth=0,
                    facecolor=OPERATOR_COLORS[block.operator],
                )
            )  # fmt: skip
            window = f'{block.kernel_size} x {block.kernel_size}' if block.kernel_size else ''
            color = INK if block.operator == 'local' else 'white'
            axis.text(
                left + width / 2,
                0,
                f'{window}\n{block.width}'.strip(),
                ha='center',
                va='center',
                color=color,
                fontsize=8,
            )
        for number, ((left, right, size), stage) in enumerate(zip(stages, network.stages, strict=True), start=1):
            axis.plot([left, right], [-1.12, -1.12], color=FAINT, linewidth=1.2)
            after = size if number == 1 else -(-size // 2)
            axis.text(
                (left + right) / 2, -1.2, f'stage {number}\n{stage.width} channels\n{after} x {after}',
                ha='center', va='top', color=GREY, fontsize=8,
            )  # fmt: skip
        names = [name for name in OPERATOR_COLORS if name in network.operators]
        axis.legend(
            handles=[Patch(color=OPERATOR_COLORS[name], label=name) for name in names],
            loc='lower center', bbox_to_anchor=(0.5, 1.0), ncols=len(names), borderaxespad=0.0,
        )  # fmt: skip
        axis.set_xlim(-0.1, x)
        axis.set_ylim(-1.95, 1.0)
        if title:
            figure.suptitle(title, fontsize=10, color=INK)
    return figure
