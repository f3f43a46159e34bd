"""``sase-blocks attend``: draw a model's attention over images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sase_blocks.checkpoint import read_checkpoint
from sase_blocks.networks import NetworkConfig
from sase_blocks.reading import printable
from sase_blocks.runs import check_writable, say
from sase_blocks.settings import run_title
from sase_blocks.viz import missing_matplotlib, plot_attention, read_images, save_figure

from .network import open_network, take_network

__all__ = ['attend']


def attend(images: Sequence[str], out: str, checkpoint: str | None, **options: Any) -> None:
    given = take_network(options)
    if (missing := missing_matplotlib()) is not None:
        raise ImportError(missing)
    check_writable(Path(out), make=False)
    opened = open_network(given, checkpoint)
    network = opened.model
    batch, pictures = read_images(images, network, opened.img_size)  # read all before writing anything
    say(opened.note)
    about = _about(opened.config, checkpoint)
    for i, (image, path) in enumerate(zip(images, _names_for(images, Path(out)), strict=True)):
        found = _prediction(network, batch[i : i + 1], opened.classes)
        title = printable(Path(image).name) + (f'\n{found}' if found else '')
        figure = plot_attention(network, batch[i : i + 1], titles=[title], pictures=pictures[i : i + 1], title=about)
        path.parent.mkdir(parents=True, exist_ok=True)
        written = printable(str(save_figure(figure, path)))
        say(f'{printable(image)}: {found + ", " if found else ""}written: {written}')


def _about(config: NetworkConfig, checkpoint: str | None) -> str:
    """The network, its checkpoint, and the checkpoint's data, seed and epoch, if it is one of ``train``."""
    name = config.model + (f' with {config.insert}' if config.insert else '')
    if checkpoint is None:
        return name if config.pretrained else f'{name}, untrained'
    state = read_checkpoint(checkpoint)
    run, epoch = state.get('config'), state.get('epoch')
    if not isinstance(run, dict) or not {'data', 'dataset', 'seed'} <= set(run) or not isinstance(epoch, int):
        return f'{name}, {printable(Path(checkpoint).name)}'
    return f'{name}, {run_title(run["dataset"] or run["data"], run["seed"], epoch)}'


def _names_for(images: Sequence[str], folder: Path) -> Iterator[Path]:
    """A unique picture name for each image, different from every image's name."""
    taken = {Path(image).resolve() for image in images}
    for image in images:
        stem, count = f'{Path(image).stem}_attention', 1
        path = folder / f'{stem}.png'
        while path.resolve() in taken:
            count += 1
            path = folder / f'{stem}_{count}.png'
        taken.add(path.resolve())
        yield path


def _prediction(network: nn.Module, batch: Tensor, classes: Sequence[str]) -> str:
    """The most probable class of a single-image batch; empty for a network without a classifier."""
    with torch.no_grad():
        logits = network(batch)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or not getattr(network, 'num_classes', logits.shape[1]):
        return ''
    probability, index = logits[0].float().softmax(0).max(0)
    name = printable(classes[int(index)]) if int(index) < len(classes) else f'class {int(index)}'
    return f'{name}, {probability:.2f}'
