"""Output of a SASE search: ``genotype.json``, the logits over time, and pictures of both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sase_blocks.blocks import Genotype
from sase_blocks.reading import one_line, parse_json, read_text
from sase_blocks.runs import environment

from .diagnostics import describe_edges, noise_leads, verdict_of
from .space import SearchSpace

RESULT = 'genotype.json'  # in the run's folder; timm.create_model('resnet50_sase', genotype=PATH) reads it


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
    """The result as plain data, from the logits (sets, sum of sizes), the settings, and facts about the data.

    Args:
        epoch, updates: numbers of epochs, and of updates of the logits, so far.
        **more: further entries.

    Returns:
        'genotype' (text for the models' ``genotype=``, with semicolons between several sets), 'genotypes' (a list of
        texts), 'verdict' (a sentence on what of it was decided), 'edges' (see ``describe_edges``, a list by set),
        'logits', 'space', 'seed', 'epoch', 'settings', 'data', 'versions', 'machine'.
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


def read_result(path: str | Path) -> dict[str, Any]:
    """The result in a file, or in the folder of a run. Raises ValueError if there is none."""
    path = Path(path)
    path = path / RESULT if path.is_dir() else path
    try:
        result = parse_json(read_text(path, 'result'), 'a result')
        for text in result['genotypes']:
            Genotype.parse(text)
        SearchSpace.of(result['space'])
        return dict(result)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f'{path} is not the result of a search: {one_line(error, 300)}') from None


def write_logits(history: list[Tensor], space: SearchSpace, out: Path) -> None:
    """Write ``alphas.npz`` to ``out``: 'logits' (epochs + 1, sets, sum of sizes) and their 'labels' ('EDGE.NAME')."""
    path, temporary = out / 'alphas.npz', out / 'alphas.npz.tmp'
    with temporary.open('wb') as file:
        np.savez(file, logits=torch.stack(history).double().cpu().numpy(), labels=np.array(space.labels))
    temporary.replace(path)


def draw_result(
    history: list[Tensor],
    space: SearchSpace,
    edges: Sequence[Mapping[str, Mapping[str, Any]]],
    out: Path,
    title: str | None = None,
) -> None:
    """Write ``logits.png`` and, for each set, ``genotype.png`` or ``genotype-STAGE.png``, with undecided edges marked.

    Args:
        history: the logits over time, each (sets, sum of sizes).
        edges: of ``describe_result``.
        title: of ``logits.png``.

    Raises:
        ImportError: matplotlib is missing (extra ``viz``).
    """
    from sase_blocks.viz import draw_block, plot_logits, save_figure

    array = torch.stack(history).double().cpu().numpy()
    decided = [{edge: state['decided'] for edge, state in one.items()} for one in edges]
    save_figure(plot_logits(array, space.to_dict(), decided=decided, title=title), out / 'logits.png')
    for stage, (row, marks) in enumerate(zip(history[-1], decided, strict=True), start=1):
        undecided = [edge for edge, mark in marks.items() if mark is False]
        verdict = f'not decided: {", ".join(undecided)}' if True in marks.values() else 'nothing was decided'
        name = 'genotype.png' if len(decided) == 1 else f'genotype-{stage}.png'
        save_figure(draw_block(space.genotype(row), title=verdict if undecided else None), out / name)
