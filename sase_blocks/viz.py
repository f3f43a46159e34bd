"""Pictures of attention: the gates a network computes, laid over its images, and learning curves (extra ``viz``).

Figures are made with matplotlib's object-oriented interface, so nothing here needs a display, touches pyplot's global
state or changes the reader's settings: ``plot_attention_maps(model, images).savefig('maps.png')``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .blocks import AttentionModule

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ['capture_gates', 'network_color', 'plot_attention_maps', 'plot_learning_curves']

Gates = tuple[Tensor | None, Tensor | None]

# Okabe and Ito's palette, which the common kinds of colour blindness tell apart, without its yellow (unreadable on
# white). The networks of the documentation have a fixed colour, so that one colour means one network in every picture.
_FIXED_COLORS = {'none': '#4d4d4d', 'se': '#e69f00', 'cbam': '#009e73', 'sase': '#0072b2'}
_SPARE_COLORS = ('#d55e00', '#cc79a7', '#56b4e9', '#000000')
_STYLE: dict[str, Any] = {
    'font.size': 9,
    'axes.titlesize': 10,
    'axes.spines.top': False,
    'axes.spines.right': False,
    'axes.grid': True,
    'axes.axisbelow': True,
    'grid.color': '#e4e4e4',
    'grid.linewidth': 0.7,
    'legend.frameon': False,
    'savefig.dpi': 160,
    'figure.dpi': 160,
}


def network_color(name: str, index: int = 0) -> str:
    """Colour of a network in every picture of this package.

    Args:
        name: A block name of ``list_blocks()`` or ``'none'``; any other name gets a spare colour.
        index: Position of a network of another name among those drawn; chooses the spare colour.

    Returns:
        A hexadecimal RGB colour.
    """
    return _FIXED_COLORS.get(name, _SPARE_COLORS[index % len(_SPARE_COLORS)])


def capture_gates(model: nn.Module, images: Tensor) -> dict[str, Gates]:
    """Run a network once and return the gates of its attention modules.

    The network is put in eval mode without gradients for that one pass and given back as it was.

    Args:
        model: A network holding at least one ``AttentionBlock`` (``SASE`` among them), ``ChannelAttention`` or
            ``SpatialAttention``; the network itself may be one.
        images: Batch of shape ``(B, C, H, W)`` as the network takes it, on the network's device.

    Returns:
        For each attention module, in the order in which the network ran them, its name in ``model.named_modules()``
        and the pair of its channel gate ``(B, C', 1, 1)`` and its spatial gate ``(B, 1, H', W')``; ``None`` stands for
        a gate the module does not have.

    Raises:
        TypeError: ``images`` is not a tensor.
        ValueError: ``images`` is not of shape ``(B, C, H, W)``, or ``model`` holds no attention module or ran none.
    """
    if not isinstance(images, Tensor):
        raise TypeError(f'images must be a torch.Tensor of shape (B, C, H, W), got {type(images).__name__}')
    if images.ndim != 4:
        raise ValueError(f'images must be of shape (B, C, H, W), got {tuple(images.shape)}; add the missing dimensions')
    attention = {name: module for name, module in model.named_modules() if isinstance(module, AttentionModule)}
    if not attention:
        raise ValueError(
            f'the model ({type(model).__name__}) holds no attention module of sase_blocks; build it with one, for '
            "example timm.create_model('resnet50_sase')"
        )
    gates: dict[str, Gates] = {}
    with ExitStack() as stack:
        stack.enter_context(_eval_mode(model))
        stack.enter_context(torch.no_grad())
        for name, module in attention.items():
            stack.callback(module.register_forward_hook(_recorder(gates, name), with_kwargs=True).remove)
        # A compiled block runs eagerly for this one pass: a hook in its graph would compile it anew.
        stack.enter_context(torch.compiler.set_stance('force_eager'))
        model(images)
    if not gates:
        raise ValueError(f'the model ({type(model).__name__}) holds attention modules but its forward ran none of them')
    return gates


def _recorder(gates: dict[str, Gates], name: str) -> Any:
    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        module_gates: Any = module.gates
        gates[name] = module_gates(*args, **kwargs)

    return record


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
    """Draw the spatial attention of some blocks over images: one column an image, below it one row a block.

    Each row of maps has its own colour scale, which runs from the smallest to the largest gate in that row, or
    0.05 to either side of gates that are all equal.

    Args:
        model: A network holding blocks with a spatial gate.
        images: Batch of shape ``(B, C, H, W)`` as the network takes it; every image is a column. Each is drawn
            stretched to the full range from black to white; three channels as RGB, any other number as their mean.
        blocks: Names of the blocks to draw, as in ``model.named_modules()``; default: the last block at each
            resolution, which is the last one of each stage.
        titles: A text above each image, such as its class; default: none.
        alpha: Opacity of the maps over the image, from 0 to 1.

    Returns:
        The figure; keep it with ``figure.savefig(path)``.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError, ValueError: as ``capture_gates``; a name in ``blocks`` is unknown or has no spatial gate; no block of
            the model has a spatial gate; ``titles`` is not one text an image.
    """
    figure_class, style = _matplotlib()
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    maps = {name: a.float().cpu() for name, (_, a) in capture_gates(model, images).items() if a is not None}
    if not maps:
        raise ValueError(f'no attention module of the model ({type(model).__name__}) has a spatial gate to draw')
    if blocks is None:
        blocks = list({a.shape[-2:]: name for name, a in maps.items()}.values())
    unknown = [name for name in blocks if name not in maps]
    if unknown or not blocks:
        raise ValueError(f'blocks must name modules with a spatial gate, got {list(blocks)}; there are {list(maps)}')
    if titles is not None and len(titles) != len(images):
        raise ValueError(f'titles must hold one text an image: got {len(titles)} for {len(images)} images')

    pictures = [_as_picture(image) for image in images.detach().float().cpu()]
    height, width = images.shape[-2:]
    cell = 0.95  # inches, the width of an image
    placed: dict[str, Any] = {'extent': (0, width, height, 0), 'interpolation': 'nearest'}
    with style(_STYLE):
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
            low, high = float(a.min()), float(a.max())
            if high - low < 1e-6:  # a constant map, as at the start of training, stands in the middle of its scale
                low, high = low - 0.05, high + 0.05
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
        figure.supxlabel('colour: spatial gate, between 0 and 1; each row has its own scale', fontsize=9)
    return figure


def _as_picture(image: Tensor) -> Any:
    """(C, H, W) to an array of (H, W, 3), or (H, W) for any other number of channels than 3, in 0..1."""
    picture = image.permute(1, 2, 0) if image.shape[0] == 3 else image.mean(0)
    low, high = picture.min(), picture.max()
    return ((picture - low) / (high - low).clamp_min(1e-12)).numpy()


def plot_learning_curves(history: Mapping[str, Sequence[Mapping[str, float]]]) -> Figure:
    """Draw the training loss and the accuracy on held-out images of one or more networks over the epochs.

    Args:
        history: For each network, by name, the rows of its log in the order of time. A row holds ``'epoch'`` (the time,
            in epochs) and ``'train_loss'`` or ``'acc1'`` (per cent) or both, and may hold more: the ``'history'`` that
            ``train`` returns and the lines of its ``metrics.jsonl`` are such rows. Names of ``list_blocks()`` and
            ``'none'`` have the colour they have in every picture.

    Returns:
        The figure; keep it with ``figure.savefig(path)``.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: ``history`` is empty, or a network has no row with one of the two figures.
    """
    figure_class, style = _matplotlib()
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    curves = {name: {key: _curve(name, rows, key) for key in ('train_loss', 'acc1')} for name, rows in history.items()}
    if not curves:
        raise ValueError('history is empty: expected at least one network')
    strangers = [name for name in curves if name not in _FIXED_COLORS]
    with style(_STYLE):
        figure = figure_class(figsize=(7.6, 3.3), layout=ConstrainedLayoutEngine(w_pad=0.08))
        left, right = figure.subplots(1, 2)
        for name, curve in curves.items():
            color = network_color(name, strangers.index(name) if name in strangers else 0)
            times, losses = curve['train_loss']
            left.plot(times, losses, color=color, alpha=0.25, linewidth=0.8)
            left.plot(times, _running_mean(losses), color=color, linewidth=1.8)
            label = 'no attention' if name == 'none' else name
            right.plot(*curve['acc1'], color=color, linewidth=1.8, marker='o', markersize=4, label=label)
        left.set(yscale='log', ylabel='training loss (cross-entropy)')
        left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        left.yaxis.set_major_formatter('{x:g}')
        left.yaxis.set_minor_formatter(NullFormatter())
        left.text(0.03, 0.05, 'thick: running mean\nthin: every value', transform=left.transAxes, fontsize=8)
        right.set(ylabel='accuracy on held-out images (%)')
        last = max(time for curve in curves.values() for times, _ in curve.values() for time in times)
        for axis in (left, right):
            axis.set(xlabel='epoch', xlim=(0, 1.02 * last))
            axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=2))
        figure.legend(loc='outside upper center', ncols=len(curves))
    return figure


def _curve(name: str, rows: Sequence[Mapping[str, float]], key: str) -> tuple[list[float], list[float]]:
    """The times and the values of one figure of a log."""
    rows = [row for row in rows if key in row]
    if not rows or not all('epoch' in row for row in rows):
        raise ValueError(
            f"history[{name!r}] must hold rows with 'epoch' and {key!r}, such as {{'epoch': 1, {key!r}: 2.0}}"
        )
    return [row['epoch'] for row in rows], [row[key] for row in rows]


def _running_mean(values: Sequence[float]) -> list[float]:
    """Mean of each value and those before it, over a fifteenth of all values; fewer at the start."""
    window = max(1, len(values) // 15)
    return [fmean(values[max(0, end - window) : end]) for end in range(1, len(values) + 1)]


def _matplotlib() -> tuple[type[Figure], Any]:
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('drawing needs matplotlib: pip install "sase-blocks[viz]"') from error
    return Figure, rc_context
