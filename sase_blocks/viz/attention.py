"""Draw a network's gates over its images: spatial gates as maps, channel gates as bars."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sase_blocks.blocks import AttentionBlock, AttentionModule
from sase_blocks.insertion.checking import check_inserted
from sase_blocks.insertion.surgery import CHILD, IdentityStart

from .style import CHANNEL_COLOR, GREY, STYLE, load_matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ['capture_gates', 'plot_attention', 'plot_attention_maps']

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
    alpha: float = 0.6,
) -> Figure:
    """Draw the spatial attention of some blocks over images: one column per image, one row per block below it.

    Each row of maps has its own colour scale, from the smallest to the largest gate in that row, or 0.05 to either
    side if all gates are equal.

    Args:
        model: A network with blocks that have a spatial gate.
        images: Batch of shape ``(B, C, H, W)`` as the network takes it; every image is a column. Each image is
            stretched to the full range from black to white. Three channels are drawn as RGB, others as their mean.
        blocks: Names of the blocks to draw, as in ``model.named_modules()``; default: the last block at each
            resolution, which is the last one of each stage.
        titles: A text above each image, such as its class; default: none.
        alpha: Opacity of the maps over the image, from 0 to 1.

    Returns:
        The figure; keep it with ``figure.savefig(path)``.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError, ValueError: as ``capture_gates``; a name in ``blocks`` is unknown or has no spatial gate; no block of
            the model has a spatial gate; ``titles`` does not have one text per image.
    """
    figure_class, style = load_matplotlib()
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.layout_engine import ConstrainedLayoutEngine

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
    height, width = images.shape[-2:]
    cell = 0.95  # inches, the width of an image
    placed: dict[str, Any] = {'extent': (0, width, height, 0), 'interpolation': 'nearest'}
    with style(STYLE):
        figure = figure_class(
            figsize=(cell * len(pictures) + 1.6, (cell * height / width + 0.06) * (1 + len(blocks)) + 0.6),
            layout=ConstrainedLayoutEngine(w_pad=0.03, h_pad=0.03, wspace=0, hspace=0),
        )
        axes = figure.subplots(1 + len(blocks), len(pictures), squeeze=False)
        for axis in axes.flat:
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        beside: dict[str, Any] = {'rotation': 0, 'ha': 'right', 'va': 'center', 'linespacing': 1.3}
        axes[0, 0].set_ylabel('image', **beside)
        for column, picture in enumerate(pictures):
            axes[0, column].imshow(picture, cmap='gray', vmin=0, vmax=1, **placed)
            if titles is not None:
                axes[0, column].set_title(titles[column], fontsize=9)
        for row, name in enumerate(blocks, start=1):
            a = maps[name]
            low, high = _scale(a)
            norm = Normalize(low, high)
            for column, picture in enumerate(pictures):
                # The image is darkened under its map: a white stroke would wash the colours out.
                axes[row, column].imshow(0.7 * picture, cmap='gray', vmin=0, vmax=1, **placed)
                # Nearest, not smoothed: the reader sees how coarse the map is.
                axes[row, column].imshow(a[column, 0].numpy(), cmap='viridis', norm=norm, alpha=alpha, **placed)
            axes[row, 0].set_ylabel(f'{name}\n{a.shape[-2]} x {a.shape[-1]}', **beside)
            bar = figure.colorbar(ScalarMappable(norm, 'viridis'), ax=list(axes[row]), aspect=10, pad=0.01, shrink=0.9)
            bar.set_ticks([low, high], labels=[f'{low:.3f}', f'{high:.3f}'])
            bar.ax.tick_params(length=0)
            bar.outline.set_visible(False)
        figure.supxlabel('colour: spatial gate; each row has its own scale', fontsize=9)
    return figure


def plot_attention(
    model: nn.Module,
    images: Tensor,
    blocks: Sequence[str] | None = None,
    titles: Sequence[str] | None = None,
    pictures: Tensor | None = None,
    alpha: float = 0.6,
) -> Figure:
    """Draw the gates of some blocks for images: the spatial gate over the image, the channel gates as bars below it.

    Two rows per image, one column per block. The bars are sorted from the largest gate to the smallest. All images
    share a block's colour scale and bar axis.

    Args:
        model: A network with attention blocks. A sequence of blocks, such as ``cbam``, is drawn as one block.
        images: Batch of shape ``(B, C, H, W)`` as the network takes it.
        blocks: Names of the blocks to draw, as in ``model.named_modules()``; default: the last block at each
            resolution, which is the last one of each stage.
        titles: A text above each image, such as its class; default: none.
        pictures: Images to draw instead, ``(B, 3, H, W)`` or ``(B, 1, H, W)`` from 0 to 1; default: each image,
            stretched to the full range from black to white.
        alpha: Opacity of the maps over the image, from 0 to 1.

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
    size = (cell + gap) * (1 + len(shown)), 0.4 + (row + heading) * len(images) - heading + 0.25
    with style(STYLE):
        figure = figure_class(figsize=size)

        def place(column: int, top: float, height: float) -> Axes:
            left = gap / 2 + column * (cell + gap)
            box = (left / size[0], 1 - (top + height) / size[1], cell / size[0], height / size[1])
            return figure.add_axes(box)

        for i, picture in enumerate(drawn):
            top = 0.4 + i * (row + heading)
            axis = place(0, top, tall)
            _show(axis, picture)
            if titles is not None:
                axis.set_title('\n'.join(map(_shorten, titles[i].splitlines())), fontsize=8)
            for column, (name, block) in enumerate(shown.items(), start=1):
                first = place(column, top, tall if with_maps else short)
                if with_maps:
                    scale = place(column, top + tall + 0.05, 0.05)
                    _draw_map(first, scale, picture, block.spatial, i, alpha)
                if with_bars:
                    _draw_bars(place(column, top + tall + 0.34, short) if with_maps else first, block.channel, i)
                if not i:
                    shape = ' \N{MULTIPLICATION SIGN} '.join(map(str, block.shape))
                    first.set_title(f'{_heading(model, name)}\n{shape}', fontsize=8)
        notes = ['colour: spatial gate, each block on its own scale'] if with_maps else []
        notes += ['bars: channel gates, largest first'] if with_bars else []
        figure.text(0.5, 0.07 / size[1], '; '.join(notes), ha='center', va='bottom', fontsize=8, color=GREY)
    return figure


def _heading(model: nn.Module, name: str, length: int = 24) -> str:
    """The most specific end of a block's name, without the parts that ``insert`` adds."""
    if isinstance(model.get_submodule(name.rpartition('.')[0]), IdentityStart):
        name = name.rpartition('.')[0]
    name = name.removesuffix(f'.{CHILD}') or type(model).__name__
    return name if len(name) <= length else f'\N{HORIZONTAL ELLIPSIS}{name[1 - length :]}'


def _shorten(line: str, length: int = 24) -> str:
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


def _show(axis: Axes, picture: Any, brightness: float = 1.0) -> None:
    height, width = picture.shape[:2]
    axis.imshow(
        brightness * picture, cmap='gray', vmin=0, vmax=1, extent=(0, width, height, 0), interpolation='nearest'
    )
    axis.set(xticks=[], yticks=[], anchor='N')
    axis.spines[:].set_visible(False)


def _draw_map(axis: Axes, scale: Axes, picture: Any, gates: Tensor | None, i: int, alpha: float) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    # The image is darkened under its map: a white stroke would wash the colours out.
    _show(axis, picture, 0.7)
    if gates is None:
        axis.text(0.5, 0.5, 'no spatial gate', transform=axis.transAxes, color='white', ha='center', fontsize=8)
        scale.set_axis_off()
        return
    low, high = _scale(gates)
    norm = Normalize(low, high)
    height, width = picture.shape[:2]
    # Nearest, not smoothed: the reader sees how coarse the map is.
    a = gates[i, 0].float().cpu().numpy()
    axis.imshow(a, cmap='viridis', norm=norm, alpha=alpha, extent=(0, width, height, 0), interpolation='nearest')
    bar = axis.figure.colorbar(ScalarMappable(norm, 'viridis'), cax=scale, orientation='horizontal')
    bar.set_ticks([low, high], labels=[_number(low), _number(high)])
    for label, align in zip(scale.get_xticklabels(), ('left', 'right'), strict=True):
        label.set(ha=align, fontsize=7)
    scale.tick_params(length=0, pad=2)
    bar.outline.set_visible(False)


def _scale(gates: Tensor) -> tuple[float, float]:
    """Smallest and largest gate; widened if all gates are equal, as at the start of training."""
    low, high = float(gates.min()), float(gates.max())
    return (low, high) if high - low >= 1e-6 else (low - 0.05, high + 0.05)


def _number(value: float) -> str:
    return f'{value:.3f}' if abs(value) < 1000 else f'{value:.2g}'


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
    text = f'{_number(float(values[-1]))} to {_number(float(values[0]))}'
    if count > 3 and values[0] > values[-1]:
        text += f'\nlargest: {", ".join(str(c) for c in order[:3].tolist())}'
    axis.set_xlabel(text, fontsize=7, color=GREY, labelpad=2)


def _as_picture(image: Tensor, *, stretch: bool = True) -> Any:
    """(C, H, W) to an array of (H, W, 3), or (H, W) if C is not 3, in 0..1."""
    picture = image.permute(1, 2, 0) if image.shape[0] == 3 else image.mean(0)
    if stretch:
        low, high = picture.min(), picture.max()
        picture = (picture - low) / (high - low).clamp_min(1e-12)
    return picture.clamp(0, 1).numpy()
