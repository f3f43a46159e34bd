"""Draw a network's gates over its images: spatial gates as maps, channel gates as bars."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from sase_blocks.blocks import AttentionBlock, AttentionModule
from sase_blocks.insertion.checking import check_inserted
from sase_blocks.insertion.surgery import CHILD, IdentityStart

from .style import CHANNEL_COLOR, GREY, INK, STYLE, load_matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ['capture_gates', 'plot_attention', 'plot_attention_maps']

ON_IMAGE: dict[str, Any] = {'fontsize': 8, 'color': 'white', 'bbox': {'color': INK, 'alpha': 0.6, 'linewidth': 0}}
LIGHTNESS = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # of red, green and blue, ITU-R BT.601

Gates = tuple[Tensor | None, Tensor | None]


@dataclass
class _Captured:
    """One block's gates, as in ``capture_gates``, and the shape (C, H, W) of its input."""

    channel: Tensor | None
    spatial: Tensor | None
    shape: tuple[int, int, int]


def capture_gates(model: nn.Module, images: Tensor) -> dict[str, Gates]:
    """Run a network once and return the gates of its attention blocks.

    The pass runs in eval mode without gradients; the network's mode is then restored.

    Args:
        model: A network with at least one attention block of this library, at any depth, or such a block itself.
        images: Batch of shape ``(B, C, H, W)`` as the network takes it, on the network's device.

    Returns:
        Maps the name of each attention block in ``model.named_modules()``, in execution order, to its channel gate
        ``(B, C', 1, 1)`` and its spatial gate ``(B, 1, H', W')``; ``None`` if the block does not have that gate. If a
        gate varies over both channels and positions, both are means: the channel gate over the positions, the spatial
        gate over the channels. Only an ``AttentionBlock`` computes the two separately. For a block that adds its
        values instead of multiplying (``gca``), the values are the gates. An identity start that is still near the
        identity weakens the effect of a gate, not the gate.

    Raises:
        TypeError: ``images`` is not a tensor.
        ValueError: ``images`` is not of shape ``(B, C, H, W)``, or ``model`` has no attention block or ran none.
        RuntimeError: an inserted attention is lost or does not run (see ``check``).
    """
    return {name: (block.channel, block.spatial) for name, block in _capture(model, images).items()}


def _capture(model: nn.Module, images: Tensor) -> dict[str, _Captured]:
    if not isinstance(images, Tensor):
        raise TypeError(f'images must be a torch.Tensor of shape (B, C, H, W), got {type(images).__name__}')
    if images.ndim != 4:
        raise ValueError(f'images must be of shape (B, C, H, W), got {tuple(images.shape)}; add the missing dimensions')
    attention = {name: module for name, module in model.named_modules() if isinstance(module, AttentionModule)}
    if not attention:
        raise ValueError(
            f'the model ({type(model).__name__}) holds no attention block of sase_blocks; build it with one, for '
            "example timm.create_model('resnet50_sase'), or insert blocks with sase_blocks.insert"
        )
    check_inserted(model, images[:1])
    captured: dict[str, _Captured] = {}
    with ExitStack() as stack:
        stack.enter_context(_eval_mode(model))
        stack.enter_context(torch.no_grad())
        for name, module in attention.items():
            stack.callback(module.register_forward_hook(_recorder(captured, name), with_kwargs=True).remove)
        # Run compiled blocks eagerly for this pass: a hook would trigger recompilation.
        stack.enter_context(torch.compiler.set_stance('force_eager'))
        model(images)
    if not captured:
        raise ValueError(f'the model ({type(model).__name__}) has attention blocks but its forward ran none of them')
    return captured


def _capture_finite(model: nn.Module, images: Tensor) -> dict[str, _Captured]:
    captured = _capture(model, images)
    for name, block in captured.items():
        for gate in (block.channel, block.spatial):
            if gate is not None and not gate.isfinite().all():
                raise ValueError(f'cannot draw {name or type(model).__name__}: not all of its gates are finite numbers')
    return captured


def _recorder(captured: dict[str, _Captured], name: str) -> Any:
    def record(module: AttentionModule, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        x: Tensor = args[0] if args else kwargs['x']
        gates = module.gates(x) if isinstance(module, AttentionBlock) else _marginals(module.gate(x), x)
        captured[name] = _Captured(*gates, (x.shape[1], x.shape[2], x.shape[3]))

    return record


def _marginals(gate: Tensor, x: Tensor) -> Gates:
    """Split a gate that broadcasts to x into a channel and a spatial gate; None where it is constant."""
    along_channels, over_positions = gate.shape[1] > 1, gate.shape[2:] != (1, 1)
    channel = gate.mean((2, 3), keepdim=True) if along_channels or not over_positions else None
    spatial = gate.expand(-1, -1, *x.shape[2:]).mean(1, keepdim=True) if over_positions else None
    return channel, spatial


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


def plot_attention_maps(
    model: nn.Module,
    images: Tensor,
    blocks: Sequence[str] | None = None,
    titles: Sequence[str] | None = None,
    alpha: float = 0.5,
    title: str | None = None,
) -> Figure:
    """Draw the spatial attention of some blocks over images: one column per image, one row per block below it.

    Each row of maps has its own colour scale, from the smallest to the largest gate in that row. A row of equal gates
    shows the images alone, and says 'constant' with their value.

    Args:
        model: A network with blocks that have a spatial gate.
        images: Batch of shape ``(B, C, H, W)`` as the network takes it; every image is a column. Each image is
            stretched to the full range from black to white. Three channels are drawn as RGB, others as their mean, and
            all as grey under a map.
        blocks: Names of the blocks to draw, as in ``model.named_modules()``; default: the last block at each
            resolution, which is the last one of each stage.
        titles: A text above each image, such as its class; default: none.
        alpha: Opacity of the maps over the image, from 0 to 1.
        title: A text above the figure, such as data, seed and epoch; default: none.

    Returns:
        The figure; keep it with ``figure.savefig(path)``.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError, ValueError: as ``capture_gates``; a name in ``blocks`` is unknown or has no spatial gate; no block of
            the model has a spatial gate; ``titles`` does not have one text per image.
    """
    figure_class, style = load_matplotlib()
    captured = _capture_finite(model, images)
    maps = {name: block.spatial.float().cpu() for name, block in captured.items() if block.spatial is not None}
    if not maps:
        raise ValueError(f'no attention module of the model ({type(model).__name__}) has a spatial gate to draw')
    if blocks is None:
        blocks = list({a.shape[-2:]: name for name, a in maps.items()}.values())
    unknown = [name for name in blocks if name not in maps]
    if unknown or not blocks:
        raise ValueError(f'blocks must name modules with a spatial gate, got {list(blocks)}; there are {list(maps)}')
    if titles is not None and len(titles) != len(images):
        raise ValueError(f'titles must hold one text per image, got {len(titles)} for {len(images)} images')

    pictures = [_as_picture(image) for image in images.detach().float().cpu()]
    labels = [f'{_heading(model, name)}\n{maps[name].shape[-2]} x {maps[name].shape[-1]}' for name in blocks]
    headings = ['' if titles is None else _fold(text, 15) for text in titles or [''] * len(pictures)]
    # Inches.
    cell, gap, line = 0.95, 0.08, 0.14
    tall = cell * images.shape[2] / images.shape[3]
    left = 0.1 + 0.075 * max(len(row) for label in ['image', *labels] for row in label.splitlines())
    above = 0.08 + (0.25 if title else 0) + line * max(len(text.splitlines()) for text in headings)
    size = (
        left + (cell + gap) * len(pictures) + 0.9,
        above + (tall + gap) * (1 + len(blocks)) + 0.3,
    )
    with style(STYLE):
        figure = figure_class(figsize=size)

        def place(column: float, row: int, width: float, height: float) -> Axes:
            x, y = left + column * (cell + gap), above + row * (tall + gap)
            return figure.add_axes((x / size[0], 1 - (y + height) / size[1], width / size[0], height / size[1]))

        beside: dict[str, Any] = {'rotation': 0, 'ha': 'right', 'va': 'center', 'linespacing': 1.3, 'fontsize': 8}
        for column, (picture, heading) in enumerate(zip(pictures, headings, strict=True)):
            axis = place(column, 0, cell, tall)
            _show(axis, picture)
            axis.set_title(heading, fontsize=8, pad=3)
            if not column:
                axis.set_ylabel('image', **beside)
        for row, (name, label) in enumerate(zip(blocks, labels, strict=True), start=1):
            for column, picture in enumerate(pictures):
                axis = place(column, row, cell, tall)
                _draw_map(axis, picture, maps[name][column, 0], _limits(maps[name]), alpha)
                if not column:
                    axis.set_ylabel(label, **beside)
            _draw_scale(place(len(pictures), row, 0.08, tall), _limits(maps[name]), 'vertical')
        if title:
            figure.text(0.5, 1 - 0.07 / size[1], title, ha='center', va='top', fontsize=9)
        note = 'colour: spatial gate; each row has its own scale'
        figure.text(0.5, 0.07 / size[1], note, ha='center', va='bottom', fontsize=8, color=GREY)
    return figure


def plot_attention(
    model: nn.Module,
    images: Tensor,
    blocks: Sequence[str] | None = None,
    titles: Sequence[str] | None = None,
    pictures: Tensor | None = None,
    alpha: float = 0.5,
    title: str | None = None,
) -> Figure:
    """Draw the gates of some blocks for images: the spatial gate over the image, the channel gates as bars below it.

    Two rows per image, one column per block. The bars are sorted from the largest gate to the smallest. All images
    share a block's colour scale and bar axis. Equal gates are 'constant', with their value, and have no colours.

    Args:
        model: A network with attention blocks. A sequence of blocks, such as ``cbam``, is drawn as one block.
        images: Batch of shape ``(B, C, H, W)`` as the network takes it.
        blocks: Names of the blocks to draw, as in ``model.named_modules()``; default: the last block at each
            resolution, which is the last one of each stage.
        titles: A text above each image, such as its class; default: none.
        pictures: Images to draw instead, ``(B, 3, H, W)`` or ``(B, 1, H, W)`` from 0 to 1; default: each image,
            stretched to the full range from black to white. They are grey under a map.
        alpha: Opacity of the maps over the image, from 0 to 1.
        title: A text above the figure, such as data, seed and epoch; default: none.

    Returns:
        The figure; keep it with ``figure.savefig(path)``.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError, ValueError: as ``capture_gates``; a name in ``blocks`` is unknown; the number of ``titles`` or
            ``pictures`` differs from the number of images.
    """
    figure_class, style = load_matplotlib()
    captured = _whole_blocks(model, _capture_finite(model, images))
    if blocks is None:
        blocks = list({block.shape[1:]: name for name, block in captured.items()}.values())
    unknown = [name for name in blocks if name not in captured]
    if unknown or not blocks:
        raise ValueError(
            f'blocks must name attention blocks of the model, got {list(blocks)}; there are {list(captured)}'
        )
    if titles is not None and len(titles) != len(images):
        raise ValueError(f'titles must hold one text per image, got {len(titles)} for {len(images)} images')
    if pictures is not None and (pictures.ndim != 4 or len(pictures) != len(images)):
        raise ValueError(f'pictures must be one (C, H, W) per image, got {tuple(pictures.shape)}, B = {len(images)}')
    if pictures is None:
        drawn = [_as_picture(image) for image in images.detach().float().cpu()]
    else:
        drawn = [_as_picture(picture, stretch=False) for picture in pictures.detach().float().cpu()]

    shown = {name: captured[name] for name in blocks}
    with_maps = any(block.spatial is not None for block in shown.values())
    with_bars = any(block.channel is not None for block in shown.values())
    # Inches. Positions are fixed so that columns with and without a scale below them line up.
    cell, gap = 1.4, 0.4
    tall = cell * images.shape[2] / images.shape[3]
    heading = 0.4 if titles is not None else 0.08
    short = 0.62 if with_maps else tall
    row = (tall + 0.34 if with_maps else 0) + (short + 0.34 if with_bars else 0)
    above = 0.65 if title else 0.4
    size = (cell + gap) * (1 + len(shown)), above + (row + heading) * len(images) - heading + 0.4
    with style(STYLE):
        figure = figure_class(figsize=size)

        def place(column: int, top: float, height: float) -> Axes:
            left = gap / 2 + column * (cell + gap)
            box = (left / size[0], 1 - (top + height) / size[1], cell / size[0], height / size[1])
            return figure.add_axes(box)

        for i, picture in enumerate(drawn):
            top = above + i * (row + heading)
            axis = place(0, top, tall)
            _show(axis, picture)
            if titles is not None:
                axis.set_title(_fold(titles[i], 24), fontsize=8)
            for column, (name, block) in enumerate(shown.items(), start=1):
                first = place(column, top, tall if with_maps else short)
                if with_maps:
                    scale = place(column, top + tall + 0.05, 0.05)
                    if block.spatial is None:
                        _show(first, _grey(picture))
                        first.text(0.5, 0.5, 'no spatial gate', transform=first.transAxes, ha='center', **ON_IMAGE)
                        scale.set_axis_off()
                    else:
                        limits = _limits(block.spatial)
                        _draw_map(first, picture, block.spatial[i, 0].float().cpu(), limits, alpha)
                        _draw_scale(scale, limits, 'horizontal')
                if with_bars:
                    _draw_bars(place(column, top + tall + 0.34, short) if with_maps else first, block.channel, i)
                if not i:
                    shape = ' \N{MULTIPLICATION SIGN} '.join(map(str, block.shape))
                    first.set_title(f'{_heading(model, name)}\n{shape}', fontsize=8)
        if title:
            figure.text(0.5, 1 - 0.07 / size[1], title, ha='center', va='top', fontsize=9)
        notes = ['colour: spatial gate, each block on its own scale'] if with_maps else []
        notes += ['bars: channel gates, largest first'] if with_bars else []
        separator = '; ' if len(shown) > 2 else '\n'  # a narrow figure has no room for both in one line
        figure.text(0.5, 0.07 / size[1], separator.join(notes), ha='center', va='bottom', fontsize=8, color=GREY)
    return figure


def _heading(model: nn.Module, name: str, length: int = 24) -> str:
    """The most specific end of a block's name, without the parts that ``insert`` adds."""
    if isinstance(model.get_submodule(name.rpartition('.')[0]), IdentityStart):
        name = name.rpartition('.')[0]
    name = name.removesuffix(f'.{CHILD}') or type(model).__name__
    return name if len(name) <= length else f'\N{HORIZONTAL ELLIPSIS}{name[1 - length :]}'


def _fold(text: str, length: int) -> str:
    """A text in lines of at most ``length`` characters, at most three; longer words, and what is left, are cut."""
    lines = [line for part in text.splitlines() for line in textwrap.wrap(part, length, break_long_words=False)]
    if len(lines) > 3:
        lines = [*lines[:2], ' '.join(lines[2:])]
    return '\n'.join(_shorten(line, length) for line in lines)


def _shorten(line: str, length: int) -> str:
    """Shorten a line that is longer than a picture is wide by cutting its middle."""
    return line if len(line) <= length else f'{line[: length // 2 - 1]}\N{HORIZONTAL ELLIPSIS}{line[-length // 2 :]}'


def _whole_blocks(model: nn.Module, captured: dict[str, _Captured]) -> dict[str, _Captured]:
    """Merge blocks that form a sequence of only attention blocks, such as cbam's two."""
    whole: dict[str, _Captured] = {}
    for name, block in captured.items():
        parent = name.rpartition('.')[0]
        siblings = model.get_submodule(parent)
        if name and isinstance(siblings, nn.Sequential) and all(isinstance(m, AttentionModule) for m in siblings):
            before = whole.get(parent, block)
            channel = before.channel if block.channel is None else block.channel
            spatial = before.spatial if block.spatial is None else block.spatial
            whole[parent] = _Captured(channel, spatial, block.shape)
        else:
            whole[name] = block
    return whole


def _show(axis: Axes, picture: Any) -> None:
    height, width = picture.shape[:2]
    axis.imshow(picture, cmap='gray', vmin=0, vmax=1, extent=(0, width, height, 0), interpolation='nearest')
    axis.set(xticks=[], yticks=[], anchor='N')
    axis.spines[:].set_visible(False)


def _grey(picture: Any) -> Any:
    """The lightness of a picture: the colours of a map over it then stand for the gate alone."""
    return picture if picture.ndim == 2 else picture @ LIGHTNESS


def _draw_map(axis: Axes, picture: Any, gate: Tensor, limits: tuple[float, float], alpha: float) -> None:
    _show(axis, _grey(picture))
    if limits[0] < limits[1]:
        height, width = picture.shape[:2]
        # Nearest, not smoothed: the reader sees how coarse the map is.
        place: dict[str, Any] = {'extent': (0, width, height, 0), 'interpolation': 'nearest'}
        axis.imshow(gate.numpy(), cmap='viridis', vmin=limits[0], vmax=limits[1], alpha=alpha, **place)


def _draw_scale(axis: Axes, limits: tuple[float, float], orientation: Literal['horizontal', 'vertical']) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    low, high = limits
    vertical = orientation == 'vertical'
    if low == high:
        axis.set_axis_off()
        text = ('constant\n' if vertical else 'constant ') + _numbers(low)[0]
        where = (0.0, 0.5) if vertical else (0.5, 0.0)
        aligned: dict[str, Any] = {'va': 'center'} if vertical else {'ha': 'center', 'va': 'top'}
        axis.text(*where, text, transform=axis.transAxes, fontsize=7, **aligned)
        return
    figure = axis.get_figure()
    assert figure is not None
    bar = figure.colorbar(ScalarMappable(Normalize(low, high), 'viridis'), cax=axis, orientation=orientation)
    bar.set_ticks([low, high], labels=_numbers(low, high))
    # The numbers stay within the bar, or those of two bars would overlap.
    labels = bar.ax.get_yticklabels() if vertical else bar.ax.get_xticklabels()
    for label, side in zip(labels, ('bottom', 'top') if vertical else ('left', 'right'), strict=True):
        label.set(fontsize=7, **{'va' if vertical else 'ha': side})
    axis.tick_params(length=0, pad=2)
    bar.outline.set_visible(False)


def _limits(gates: Tensor) -> tuple[float, float]:
    """The smallest and the largest gate; twice the same if they differ by rounding alone."""
    low, high = float(gates.min()), float(gates.max())
    return (low, high) if high - low > 1e-6 * max(1.0, abs(low), abs(high)) else (low, low)


def _numbers(*values: float) -> list[str]:
    """Values as text, with as many digits as tell them apart."""
    spread = max(values) - min(values)
    largest = max(map(abs, values))
    if largest >= 1e5 or 0 < largest < 1e-4:
        return [f'{value:.3g}' for value in values]
    digits = 1 - math.floor(math.log10(spread)) if spread > 0 else 0
    return [f'{value:.{max(digits, 3 if largest < 100 else 1)}f}' for value in values]


def _draw_bars(axis: Axes, gates: Tensor | None, i: int) -> None:
    if gates is None:
        axis.text(0.5, 0.5, 'no channel gate', transform=axis.transAxes, color=GREY, ha='center', fontsize=8)
        axis.set_axis_off()
        return
    values, order = gates[i, :, 0, 0].float().cpu().sort(descending=True)
    count = len(values)
    if count <= 32:
        axis.bar(range(count), values.numpy(), width=0.8, color=CHANNEL_COLOR)
    else:  # bars of less than a pixel
        axis.fill_between(range(count), values.numpy(), step='mid', color=CHANNEL_COLOR, linewidth=0)
    low, high = min(0.0, float(gates.min())), max(0.0, float(gates.max()))
    ticks = sorted({0.0, *(end for end in (low, high) if abs(end) > 0.2 * (high - low))})
    axis.set(xlim=(-0.5, count - 0.5), ylim=(low * 1.05, high * 1.05 or 1.0), xticks=[])
    axis.set_yticks(ticks, labels=[f'{tick:.2g}' for tick in ticks], fontsize=7)
    axis.tick_params(length=0, pad=2)
    axis.spines[:].set_visible(False)
    axis.axhline(0, color=GREY, linewidth=0.8)
    least, most = _limits(values)
    text = f'constant {_numbers(least)[0]}' if least == most else ' to '.join(_numbers(least, most))
    if count > 3 and least < most:
        text += f'\nlargest: {", ".join(str(c) for c in order[:3].tolist())}'
    axis.set_xlabel(text, fontsize=7, color=GREY, labelpad=2)


def _as_picture(image: Tensor, *, stretch: bool = True) -> Any:
    """(C, H, W) to an array of (H, W, 3), or (H, W) if C is not 3, in 0..1."""
    picture = image.permute(1, 2, 0) if image.shape[0] == 3 else image.mean(0)
    if stretch:
        low, high = picture.min(), picture.max()
        picture = (picture - low) / (high - low).clamp_min(1e-12)
    return picture.clamp(0, 1).numpy()
