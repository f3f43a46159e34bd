"""Output of a TrioNet search: ``architecture.json``, the network with its weights, and pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sase_blocks.comparing.significance import not_worse
from sase_blocks.models import Architecture
from sase_blocks.reading import table
from sase_blocks.runs import environment
from sase_blocks.search.evolution import Candidate, best, front

from .cost import Costs
from .space import TrioSpace

RESULT = 'architecture.json'  # in the run's folder; timm.create_model('trionet', architecture=PATH) reads it


def describe_result(
    space: TrioSpace,
    candidates: Sequence[Candidate],
    pure: Mapping[str, str],
    costs: Costs,
    *,
    config: Mapping[str, Any],
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """The result as plain data, from all scored networks, the settings, and facts about the data.

    Args:
        pure: maps each operator to the text of the network that uses it wherever the space allows.
        costs: the costs, their limits, and the cost axis of the front.

    Returns:
        'architecture' (text), 'score' (held-out accuracy in percent, with the supernet's weights), 'cost'; 'tied', the
        number of other networks that may be as good by their scores (``significance.not_worse``), and 'verdict', a
        sentence about it (neither is in the paper); 'front' and 'pure', lists of networks; 'space', 'limits',
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


def draw_result(result: Mapping[str, Any], out: Path, title: str | None = None) -> None:
    """Write ``front.png``, with a title, and ``architecture.png`` to ``out``. Raises ImportError without matplotlib."""
    from sase_blocks.viz import draw_architecture, plot_front, save_figure

    verdict = 'nothing was decided' if result['tied'] == result['evaluations'] - 1 else None
    save_figure(plot_front(result, title), out / 'front.png')
    save_figure(draw_architecture(result['architecture'], title=verdict), out / 'architecture.png')


def format_result(result: Mapping[str, Any]) -> str:
    """The networks of a result as a table: the found one, the pure ones, and the front."""
    pure = [(f'all {name}', entry) for name, entry in result['pure'].items()]
    front = [('front', entry) for entry in result['front'] if entry['architecture'] != result['architecture']]
    rows = [
        {
            'network': name,
            'held-out %': f'{entry["score"]:.2f}',
            'MACs': f'{entry["cost"]["macs"] / 1e6:.2f} M',
            'parameters': f'{entry["cost"]["parameters"]:,}',
        }
        for name, entry in [('found', result), *pure, *front]
    ]
    named = [f'{name}: {entry["architecture"]}' for name, entry in pure]
    found = ['', f'found: {result["architecture"]}', result['verdict']]
    return '\n'.join([*table(rows, left=['network']), *found, *named])
