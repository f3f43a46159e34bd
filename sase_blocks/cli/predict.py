"""``sase-blocks predict``: the most probable classes of images, and the accuracy where folders name their classes."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from sase_blocks.data import Batches, Samples, TransformedSamples, create_transforms, image_config, inspect_images
from sase_blocks.images import TRAIN_FOLDERS, VAL_FOLDERS, ImageFiles, find_images, images_below, subfolders
from sase_blocks.reading import printable, quoted, some, table
from sase_blocks.runs import check_writable, report_broken, say, write_json, write_text
from sase_blocks.train import confusion_matrix, hits
from sase_blocks.viz import check_picture, plot_confusion, save_figure

from .network import open_network, take_network

__all__ = ['predict']

SHOWN = 20  # classes in the table on the screen


def predict(
    images: Sequence[str],
    checkpoint: str | None,
    out: str | None,
    confusion: str | None,
    top: int,
    batch_size: int,
    workers: int,
    cpu: bool,
    skip_broken: bool,
    **options: Any,
) -> None:
    given = take_network(options)
    for name, number, least in (('top', top, 1), ('batch-size', batch_size, 1), ('workers', workers, 0)):
        if number < least:
            raise ValueError(f'--{name} must be at least {least}, got {number}')
    if out is not None:
        _check_table(Path(out))
    if confusion is not None:
        check_picture(confusion)
    opened = open_network(given, checkpoint)
    outputs = getattr(opened.model, 'num_classes', None)
    if not outputs:
        raise ValueError(f'{opened.config.model} has no classifier, so it predicts no classes')
    files: list[tuple[str, int]] = []
    classes = opened.classes
    for place in images:
        found, classes = _find(place, classes, outputs)
        files += found
    if confusion is not None and all(label < 0 for _, label in files):
        raise ValueError('--confusion needs images in folders with the names of classes')
    data_config = image_config(opened.model, opened.img_size)
    listed = Samples(ImageFiles('', [(file, 0) for file, _ in files]), [''], range(len(files)), 'images')
    samples = _without_broken(listed.in_channels(data_config['input_size'][0]), skip_broken)
    say(opened.note)
    names = classes or [f'class {i}' for i in range(outputs)]
    labels = torch.tensor([files[index][1] for index in samples.indices])

    device = torch.device('cuda' if torch.cuda.is_available() and not cpu else 'cpu')
    transformed = TransformedSamples(samples, create_transforms(data_config)[1], seed=0)
    batches = Batches(transformed, shuffle=False, workers=workers, device=device)
    rows: list[dict[str, Any]] = []
    right: list[Tensor] = []
    for positions, logits in _run(opened.model.to(device), batches, batch_size):
        values, indices = logits.softmax(1).sort(dim=1, descending=True, stable=True)
        expected = labels[positions]
        right.append(torch.stack([expected, indices[:, 0], hits(logits, expected), hits(logits, expected, 5)], 1))
        for position, value, index in zip(positions, values[:, :top].tolist(), indices[:, :top].tolist(), strict=True):
            if value[0] != value[0]:
                raise FloatingPointError(f'the network gives no finite values for {samples.name(position)}')
            predictions = [{'class': names[i], 'probability': p} for p, i in zip(value, index, strict=True)]
            label = names[int(labels[position])] if labels[position] >= 0 else None
            rows.append({'image': samples.name(position), 'label': label, 'predictions': predictions})
            if out is None:
                shown = (f'{printable(one["class"])} {one["probability"]:.3f}' for one in predictions)
                say(f'{samples.name(position)}: {", ".join(shown)}')
    summary = _summarise(torch.cat(right), names)
    if summary:
        say(_describe(summary, names))
    if out is not None:
        about = {'model': opened.config.model, 'checkpoint': checkpoint, 'input_size': list(data_config['input_size'])}
        _write(Path(out), {**about, 'classes': names, 'summary': summary, 'images': rows}, top)
        say(f'written: {out}')
    if confusion is not None and summary:
        title = f'{opened.config.model}, {summary["images"]} images, accuracy {summary["acc1"]:.2f} %'
        say(f'written: {save_figure(plot_confusion(summary["confusion"], names, title), confusion)}')


def _check_table(out: Path) -> None:
    if out.suffix.lower() not in ('.csv', '.json'):
        raise ValueError(f'predictions are written as .csv or .json, got {quoted(str(out))}')
    if out.is_dir():
        raise IsADirectoryError(f'the file {out} cannot be written: it is a folder')
    check_writable(out.parent, make=False)
    if not out.parent.is_dir():
        raise FileNotFoundError(f'the file {out} cannot be written: there is no folder {out.parent}')


# ---- the images ----


def _find(place: str, classes: list[str], outputs: int) -> tuple[list[tuple[str, int]], list[str]]:
    """The images of a file or folder, each with its label, -1 without one. -> them, and the names of the classes."""
    path = Path(place)
    if not path.exists():
        raise FileNotFoundError(f'there is no image or folder {place}')
    if not path.is_dir():
        return [(place, -1)], classes
    folders = subfolders(path)
    # Without names, as many folders as outputs are the classes, in timm's order.
    named = classes or (folders if len(folders) == outputs else [])
    splits = [name for name in folders if name in (*TRAIN_FOLDERS, *VAL_FOLDERS) and name not in named]
    if splits:
        raise ValueError(f'{place} holds the splits {some(splits)}; pass one of them, such as {path / splits[-1]}')
    if not set(folders) & set(named):
        if folders and named:
            say(f'note: no folder in {place} is a class of the network ({some(named)}), so there is no accuracy')
        files = images_below(path)
        if not files:
            raise ValueError(f'{place} holds no images')
        return [(file, -1) for file in files], classes
    if strangers := [name for name in folders if name not in named]:
        raise ValueError(f'{place} has folders that are no class of the network: {some(strangers)}; {some(named)} are')
    found, own = find_images(path)
    return [(file, named.index(own[label])) for file, label in found.samples], named


def _without_broken(samples: Samples, skip: bool) -> Samples:
    """Decode all images once. Raise a ValueError that names a broken one, or leave them out."""
    broken, _ = inspect_images(samples)
    if skip and len(broken) == len(samples):
        raise ValueError(f'every image is broken, the first one: {next(iter(broken.values()))}')
    report_broken(list(broken.values()), skip)
    return samples.part([position for position in range(len(samples)) if position not in broken])


@torch.no_grad()
def _run(network: nn.Module, batches: Batches, batch_size: int) -> Iterator[tuple[list[int], Tensor]]:
    """The positions and the logits (B, classes), in float32 on the CPU, of each batch."""
    start = 0
    with tqdm(total=len(batches), unit='img', disable=None) as bar:
        for images, _ in batches.once(batch_size):
            logits = network(images)
            if not isinstance(logits, Tensor) or logits.ndim != 2:
                raise ValueError(f'{type(network).__name__} does not return logits of shape (B, classes)')
            yield list(range(start, start + len(images))), logits.float().cpu()
            start += len(images)
            bar.update(len(images))


# ---- the results ----


def _summarise(right: Tensor, classes: Sequence[str]) -> dict[str, Any] | None:
    """Accuracies in percent and the confusion matrix of rows of label, prediction, top-1 and top-5 hit.

    None if no image has a label.
    """
    right = right[right[:, 0] >= 0]
    if not len(right):
        return None
    confusion = confusion_matrix(right[:, 0], right[:, 1], len(classes))
    top1, top5 = (100 * right[:, 2:].double().mean(0)).tolist()
    by_class = {
        name: {'images': int(row.sum()), 'acc1': 100 * row[i].item() / int(row.sum())}
        for i, (name, row) in enumerate(zip(classes, confusion, strict=True))
        if row.sum()
    }
    more = {'acc5': top5} if len(classes) > 5 else {}
    return {'images': len(right), 'acc1': top1, **more, 'by_class': by_class, 'confusion': confusion.tolist()}


def _describe(summary: Mapping[str, Any], classes: Sequence[str]) -> str:
    """The summary for the screen."""
    rows = []
    for name, one in sorted(summary['by_class'].items(), key=lambda item: item[1]['acc1']):
        own = classes.index(name)
        others = [(count, other) for other, count in enumerate(summary['confusion'][own]) if other != own and count]
        count, other = max(others, key=lambda pair: pair[0], default=(0, own))
        taken = f'{printable(classes[other])} ({count})' if count else '-'
        numbers = {'images': str(one['images']), 'accuracy': f'{one["acc1"]:.2f} %'}
        rows.append({'class': printable(name), **numbers, 'most often taken for': taken})
    top5 = f', top 5 {summary["acc5"]:.2f} %' if 'acc5' in summary else ''
    more = f'\n... {len(rows) - SHOWN} more classes, with higher accuracies' if len(rows) > SHOWN else ''
    lines = table(rows[:SHOWN], left=('class', 'most often taken for'))
    return f'accuracy {summary["acc1"]:.2f} %{top5} of {summary["images"]} images\n' + '\n'.join(lines) + more


def _write(out: Path, result: Mapping[str, Any], top: int) -> None:
    if out.suffix.lower() == '.json':
        write_json(out, result)
        return
    text = io.StringIO()
    writer = csv.writer(text, lineterminator='\n')
    top = min(top, len(result['classes']))
    writer.writerow(['image', 'label', *(f'{what}_{i + 1}' for i in range(top) for what in ('class', 'probability'))])
    for row in result['images']:
        found = [value for one in row['predictions'] for value in (printable(one['class']), one['probability'])]
        writer.writerow([row['image'], '' if row['label'] is None else printable(row['label']), *found])
    write_text(out, text.getvalue())
