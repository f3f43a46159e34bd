"""``sase-blocks attend``: draw a model's attention over images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sase_blocks.checkpoint import read_checkpoint
from sase_blocks.convert import load_checkpoint
from sase_blocks.insertion import insert as insert_block
from sase_blocks.networks import build_model
from sase_blocks.reading import printable
from sase_blocks.runs import check_writable, say
from sase_blocks.viz import missing_matplotlib, plot_attention, read_images, save_figure

from .model_args import is_ours, model_arguments

__all__ = ['attend']


def attend(
    images: Sequence[str],
    out: str,
    model: str | None,
    checkpoint: str | None,
    insert: str | None,
    start: str | None,
    img_size: int | None,
    model_args: Sequence[str],
    genotype: str | None,
    attn_stages: Sequence[int] | None,
) -> None:
    if img_size is not None and img_size < 1:
        raise ValueError(f'--img-size must be at least 1, got {img_size}')
    if start is not None and insert is None:
        raise ValueError('--start needs --insert BLOCK; pass both, or neither')
    if (missing := missing_matplotlib()) is not None:
        raise ImportError(missing)
    check_writable(Path(out), make=False)
    args = model_arguments(model_args, genotype, attn_stages)
    saved = _training_run(read_checkpoint(checkpoint)) if checkpoint else None
    classes: list[str] = []
    if saved and model in (None, saved[0]['model']):
        config, classes = saved
        model, img_size = config['model'], img_size or config['img_size']
        args = {'num_classes': len(classes), **config['model_args'], **args}
        if is_ours(model) and config['img_size']:  # per-position parameters were built for it
            args.setdefault('img_size', config['img_size'])
    if model is None:
        raise ValueError('pass --model NAME: only a checkpoint of `sase-blocks train` names its model')
    network = build_model(model, **args).eval()
    if insert is not None:
        insert_block(network, insert, start=start or 'identity')
    report = load_checkpoint(network, checkpoint) if checkpoint else None
    batch, pictures = read_images(images, network, img_size)  # read all before writing anything
    say(str(report or 'note: without --checkpoint the model has its initial weights'))
    for i, (image, path) in enumerate(zip(images, _names_for(images, Path(out)), strict=True)):
        found = _prediction(network, batch[i : i + 1], classes)
        title = printable(Path(image).name) + (f'\n{found}' if found else '')
        figure = plot_attention(network, batch[i : i + 1], titles=[title], pictures=pictures[i : i + 1])
        path.parent.mkdir(parents=True, exist_ok=True)
        written = printable(str(save_figure(figure, path)))
        say(f'{printable(image)}: {found + ", " if found else ""}written: {written}')


def _training_run(checkpoint: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]] | None:
    """The settings and the classes in a checkpoint of `sase-blocks train`; None for any other checkpoint."""
    config, data = checkpoint.get('config'), checkpoint.get('data')
    if not isinstance(config, dict) or not {'model', 'model_args', 'img_size'} <= set(config):
        return None
    return (config, data['classes']) if isinstance(data, dict) and 'classes' in data else None


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
