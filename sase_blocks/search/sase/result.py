"""What a search leaves: ``genotype.json``, the logits over time, and pictures of both."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sase_blocks.blocks import Genotype
from sase_blocks.reading import one_line, parse_json, read_text
from sase_blocks.runs import environment, write_text

from .diagnostics import describe_edges, noise_leads, verdict_of
from .space import SearchSpace

__all__ = ['describe_result', 'draw_result', 'read_logits', 'read_result', 'write_logits', 'write_result']


def describe_result(
    space: SearchSpace,
    logits: Tensor,
    *,
    config: dict[str, Any],
    facts: dict[str, Any],
    epoch: int,
    updates: int,
    **more: Any,
) -> dict[str, Any]:
    """The result as plain data.

    Args:
        space: of the search.
        logits: (sets, sum of sizes).
        config: the settings.
        facts: of the data: classes, counts, fingerprint.
        epoch: how many were run.
        updates: of the logits.
        **more: further entries.

    Returns:
        'genotype' (text; of several sets with semicolons between them, as the models' ``genotype=`` takes it),
        'genotypes' (a list of texts), 'verdict' (a sentence: what of it was decided), 'edges' (leader, probability,
        margin, entropy, decided of each, a list by set; see ``describe_edges``), 'logits', 'space', 'seed', 'epoch',
        'settings', 'data', 'versions', 'machine'.
    """
    found = [str(space.genotype(row)) for row in logits]
    noise = noise_leads(space, len(logits), updates, config['arch_lr'])
    edges = [describe_edges(space, row, noise) for row in logits]
    return {
        'genotype': '; '.join(found),
        'genotypes': found,
        'verdict': verdict_of(edges),
        'edges': edges,
        'logits': logits.tolist(),
        'space': space.to_dict(),
        'seed': config['seed'],
        'epoch': epoch,
        'settings': config,
        'data': {key: value for key, value in facts.items() if key != 'held_out_indices'},
        **environment(),
        **more,
    }


def write_result(result: dict[str, Any], out: Path) -> Path:
    """``genotype.json`` in ``out``, atomically; ``timm.create_model('resnet50_sase', genotype=PATH)`` reads it."""
    path = out / 'genotype.json'
    write_text(path, json.dumps(result, indent=2) + '\n')
    return path


def read_result(path: str | Path) -> dict[str, Any]:
    """A genotype.json, or that of a run folder.

    Raises:
        ValueError: no such file, or not a search's result.
    """
    path = Path(path)
    path = path / 'genotype.json' if path.is_dir() else path
    try:
        result = parse_json(read_text(path, 'result'), 'a result')
        for text in result['genotypes']:
            Genotype.parse(text)
        SearchSpace.of(result['space'])
        return dict(result)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f'{path} is not the result of a search: {one_line(error, 300)}') from None


def write_logits(history: list[Tensor], space: SearchSpace, out: Path) -> Path:
    """``alphas.npz`` in ``out``: 'logits' (epochs + 1, sets, sum of sizes) and 'labels' ('EDGE.NAME' of each)."""
    path, temporary = out / 'alphas.npz', out / 'alphas.npz.tmp'
    with temporary.open('wb') as file:
        np.savez(file, logits=torch.stack(history).double().cpu().numpy(), labels=np.array(space.labels))
    temporary.replace(path)
    return path


def read_logits(path: str | Path) -> tuple[np.ndarray, list[str]]:
    """(epochs + 1, sets, sum of sizes) and the label of each logit from an alphas.npz."""
    with np.load(path, allow_pickle=False) as file:
        return file['logits'], file['labels'].tolist()


def draw_result(
    history: list[Tensor], space: SearchSpace, edges: Sequence[Mapping[str, Mapping[str, Any]]], out: Path
) -> list[Path]:
    """``logits.png`` and, for each set, ``genotype.png`` or ``genotype-STAGE.png``; what was not decided is marked.

    Args:
        history: the logits over time, each (sets, sum of sizes).
        space: of the search.
        edges: of ``describe_result``.
        out: the folder.

    Raises:
        ImportError: matplotlib is missing (extra ``viz``).
    """
    from sase_blocks.viz import draw_block, plot_logits, save_figure

    array = torch.stack(history).double().cpu().numpy()
    decided = [{edge: state['decided'] for edge, state in one.items()} for one in edges]
    written = [save_figure(plot_logits(array, space.to_dict(), decided=decided), out / 'logits.png')]
    found = [space.genotype(row) for row in history[-1]]
    for stage, (genotype, marks) in enumerate(zip(found, decided, strict=True), start=1):
        name = 'genotype.png' if len(found) == 1 else f'genotype-{stage}.png'
        open_edges = [edge for edge, mark in marks.items() if mark is False]
        title = f'not decided: {", ".join(open_edges)}' if open_edges else None
        title = title if True in marks.values() or title is None else 'nothing was decided'
        written.append(save_figure(draw_block(genotype, title=title), out / name))
    return [Path(path) for path in written]
