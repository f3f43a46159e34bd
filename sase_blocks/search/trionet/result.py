"""Output of a TrioNet search: ``architecture.json``, the network with its weights, and pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sase_blocks.checkpoint import save_checkpoint
from sase_blocks.models import Architecture, TrioNet
from sase_blocks.runs import environment, write_text
from sase_blocks.search.evolution import Candidate, best, front
from sase_blocks.search.significance import not_worse

from .cost import Costs
from .space import TrioSpace

__all__ = ['describe_result', 'draw_result', 'format_result', 'write_network', 'write_result']


def describe_result(
    space: TrioSpace,
    candidates: Sequence[Candidate],
    pure: Mapping[str, str],
    costs: Costs,
    *,
    config: Mapping[str, Any],
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """The result as plain data.

    Args:
        space: the search space.
        candidates: all scored networks.
        pure: maps each operator to the text of the network that uses it wherever the space allows.
        costs: the costs, their limits, and the cost axis of the front.
        config: the settings.
        facts: facts about the data.

    Returns:
        'architecture' (text), 'score' (held-out accuracy in percent, with the supernet's weights), 'cost'; 'tied', the
        number of other networks that may be as good by their scores (``significance.not_worse``), and 'verdict', a
        sentence about it (neither is in the paper); 'front' and 'pure', lists of such networks; 'space', 'limits',
        'objective', 'seed', 'settings', 'data', 'evaluations', 'versions', 'machine'.

    Raises:
        ImportError: SciPy is missing (extra ``search``).
    """

    def describe(candidate: Candidate) -> dict[str, Any]:
        network = Architecture.parse(candidate.text)
        cost = {name: costs.measures[name](network) for name in ('macs', 'parameters')}
        cost.setdefault(costs.objective, candidate.cost)
        return {'architecture': candidate.text, 'score': candidate.score, 'cost': cost}

    images = facts['held_out']
    tied = sum(not_worse([candidate.score for candidate in candidates], images)) - 1
    by_text = {candidate.text: candidate for candidate in candidates}
    return {
        **describe(best(candidates)),
        'tied': tied,
        'verdict': _verdict(tied, len(candidates) - 1, images),
        'front': [describe(candidate) for candidate in front(candidates)],
        'pure': {name: describe(by_text[text]) for name, text in pure.items() if text in by_text},
        'evaluations': len(candidates),
        'objective': costs.objective,
        'limits': costs.limits,
        'space': space.to_dict(),
        'seed': config['seed'],
        'settings': dict(config),
        'data': {key: value for key, value in facts.items() if key != 'held_out_indices'},
        **environment(),
    }


def _verdict(tied: int, others: int, images: int) -> str:
    if others == 0:
        return 'nothing was decided: only one network was scored, with nothing to compare it with'
    on = f'on {images:,} held-out images'
    if tied == others:
        return (
            f'nothing was decided: {on} no network scores worse than the found one by more than chance; treat it as '
            f'drawn at random from the {others + 1} scored networks'
        )
    if tied:
        return f'{tied} of the {others} other networks may be as good as the found one: {on} chance could swap them'
    return f'the found network scores better than each of the {others} others by more than chance {on}'


def write_result(result: Mapping[str, Any], out: Path) -> None:
    """Write ``architecture.json`` to ``out``; ``timm.create_model('trionet', architecture=PATH)`` reads it."""
    write_text(out / 'architecture.json', json.dumps(result, indent=2) + '\n')


def write_network(network: TrioNet, architecture: str, out: Path) -> None:
    """Write ``network.pt`` to ``out``, for the ``checkpoint_path`` of ``timm.create_model``."""
    saved = {'arch': 'trionet', 'architecture': architecture, 'state_dict': network.state_dict()}
    save_checkpoint(saved, out / 'network.pt')


def draw_result(result: Mapping[str, Any], out: Path) -> None:
    """Write ``front.png`` and ``architecture.png`` to ``out``.

    Raises:
        ImportError: matplotlib is missing (extra ``viz``).
    """
    from sase_blocks.viz import draw_architecture, plot_front, save_figure

    title = 'nothing was decided' if result['tied'] == result['evaluations'] - 1 else None
    save_figure(plot_front(result), out / 'front.png')
    save_figure(draw_architecture(result['architecture'], title=title), out / 'architecture.png')


def format_result(result: Mapping[str, Any]) -> str:
    """The networks of a result as a table: the found one, the pure ones, and the front."""
    rows = [('found', result), *((f'all {name}', entry) for name, entry in result['pure'].items())]
    rows += [('front', entry) for entry in result['front'] if entry['architecture'] != result['architecture']]
    header = f'{"network":12}{"held-out %":>11}{"MACs":>11}{"parameters":>13}'
    lines = [header, '-' * len(header)]
    for name, entry in rows:
        cost = entry['cost']
        lines.append(f'{name:12}{entry["score"]:11.2f}{cost["macs"] / 1e6:9.2f} M{cost["parameters"]:13,}')
    lines += ['', f'found: {result["architecture"]}', result['verdict']]
    lines += [f'all {name}: {entry["architecture"]}' for name, entry in result['pure'].items()]
    return '\n'.join(lines)
