"""How far several searches agree, and what wins by construction.

One search, as in the paper, cannot tell a finding from the noise of its seed. Several seeds that agree more often than
chance would are one sign of a finding; an operation that also wins where the labels are random (a null search) wins for
how it is built and not for what it does for the task. Both controls are ours, and so is the rule for what was decided:
more agreement than chance gives on any edge in one of 20 comparisons (Holm over the edges), and not by construction.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from itertools import combinations, count
from typing import Any

import torch
from torch import Tensor

from sase_blocks.search.significance import LEVEL, holm

from .diagnostics import describe_edges
from .space import SearchSpace

__all__ = ['chance_of_agreement', 'compare_searches', 'format_agreement']


def compare_searches(
    results: Sequence[Mapping[str, Any]], null: Sequence[Mapping[str, Any]] | None = None
) -> dict[str, Any]:
    """What several searches of one space have in common, edge by edge.

    Args:
        results: at least one; of each 'space' (edge -> names), 'logits' (a list of sets, each a flat list) and 'seed',
            as ``read_result`` gives them.
        null: results of searches on random labels in the same space.

    Returns:
        'seeds'; 'space'; 'null_seeds'; 'genotype', the consensus as text (one for each set, with semicolons between
        them), 'genotypes', the same as a list; 'verdict', a sentence on what of it was decided; 'sets', a list by set
        of a dict by edge:

        - 'votes': operation -> how many searches it leads, most first; 'winner': the consensus, the operation with
          the most votes, of equal ones the one with the larger mean probability; 'agree': its votes.
        - 'chance': how often so many searches or more would agree if each drew its winner by lot; 'chance_adjusted':
          for the number of edges that have a choice (Holm).
        - 'decided': is the adjusted chance at most 0.05 and the winner another than on random labels? None for an edge
          of one operation.
        - 'probability': operation -> mean over the searches.
        - 'margin', 'entropy': means over the searches, as ``describe_edges`` defines them.
        - 'rank_correlation': Spearman's, between the logits of two searches, mean over all pairs; None for one search.
        - with ``null``: 'null_votes', 'null_winner', 'null_probability' (operation -> mean), and 'by_construction':
          does the winner win on random labels as well?

    Raises:
        ValueError: no results, or results of different spaces or numbers of sets.
    """
    null = list(null or [])
    if not results:
        raise ValueError('there are no searches to compare')
    space, sets = SearchSpace.of(results[0]['space']), len(results[0]['logits'])
    for result in [*results, *null]:
        if SearchSpace.of(result['space']) != space:
            raise ValueError(
                f'the searches have different spaces: seed {results[0]["seed"]} {space}, '
                f'seed {result["seed"]} {SearchSpace.of(result["space"])}'
            )
        if len(result['logits']) != sets:
            raise ValueError(
                f'the searches have different numbers of sets of logits: seed {results[0]["seed"]} {sets}, '
                f'seed {result["seed"]} {len(result["logits"])}'
            )
    described = []
    for number in range(sets):
        logits = torch.tensor([r['logits'][number] for r in results], dtype=torch.float64)
        edges = _edges(space, logits)
        if null:
            others = _edges(space, torch.tensor([r['logits'][number] for r in null], dtype=torch.float64))
            for edge, state in edges.items():
                other = others[edge]
                state |= {f'null_{name}': other[name] for name in ('votes', 'winner', 'probability')}
                # One operation alone wins anyhow.
                state['by_construction'] = other['winner'] == state['winner'] and len(state['probability']) > 1
        described.append(edges)
    open_edges = [state for edges in described for state in edges.values() if len(state['probability']) > 1]
    for state, adjusted in zip(open_edges, holm([state['chance'] for state in open_edges]).tolist(), strict=True):
        state['chance_adjusted'] = adjusted
        state['decided'] = adjusted <= LEVEL and not state.get('by_construction', False)
    genotypes = [','.join(state['winner'] for state in edges.values()) for edges in described]
    return {
        'seeds': [result['seed'] for result in results],
        'null_seeds': [result['seed'] for result in null],
        'space': space.to_dict(),
        'genotype': '; '.join(genotypes),
        'genotypes': genotypes,
        'verdict': _verdict(described, len(results), len(null)),
        'sets': described,
    }


def chance_of_agreement(agree: int, searches: int, operations: int) -> float:
    """How often at least ``agree`` of the searches have the same winner, if each draws one of the operations by lot."""
    if not 1 <= agree <= searches or operations < 1:
        raise ValueError(f'expected 1 <= agree <= searches and an operation, got {agree}, {searches}, {operations}')
    # The draws in which every operation has fewer votes: searches! times a coefficient of (sum of x^k / k!)^operations.
    one = [Fraction(1, math.factorial(k)) for k in range(agree)]
    power = [Fraction(1)]
    for _ in range(operations):
        size = min(len(power) + len(one) - 1, searches + 1)
        power = [
            sum((power[i] * one[n - i] for i in range(len(power)) if 0 <= n - i < len(one)), Fraction(0))
            for n in range(size)
        ]
    below = power[searches] if len(power) > searches else Fraction(0)
    return float(1 - below * math.factorial(searches) / Fraction(operations) ** searches)


def format_agreement(agreement: Mapping[str, Any]) -> str:
    """The comparison as text, from what ``compare_searches`` returns."""
    searches, nulls = len(agreement['seeds']), len(agreement['null_seeds'])
    sets = agreement['sets']
    lines = []
    for number, edges in enumerate(sets, start=1):
        if len(sets) > 1:
            lines += ['', f'stage {number}']
        width = max(len('winner'), *(len(state['winner']) for state in edges.values())) + 2
        header = f'{"edge":17}{"winner":{width}}{"seeds":>8}{"by lot":>8}{"prob.":>7}{"margin":>8}{"entropy":>9}'
        header += f'{"ranks":>7}' + ('  on random labels' if nulls else '')
        lines += [header, '-' * len(header)]
        for edge, state in edges.items():
            correlation = state['rank_correlation']
            line = (
                f'{edge:17}{state["winner"]:{width}}{state["agree"]:>3} of {searches}{_share(state["chance"]):>8}'
                f'{state["probability"][state["winner"]]:7.2f}{state["margin"]:8.3f}{state["entropy"]:9.2f}'
                f'{"-" if correlation is None else f"{correlation:.2f}":>7}'
            )
            lines.append(line + (f'  {_null_verdict(state, nulls)}' if nulls else ''))
    if len(sets) > 1:
        lines = lines[1:]
    lines += [
        '',
        f'consensus: {agreement["genotype"]}',
        agreement['verdict'],
        'by lot: how often so many searches or more would agree if each drew its winner; ranks: mean correlation of',
        'the rankings of two searches; entropy: 1 where all operations are equal, 0 where one has everything.',
    ]
    if nulls:
        lines.append('wins there too: it leads also where nothing can be learned, so its lead shows nothing.')
    return '\n'.join(lines)


def _verdict(sets: Sequence[Mapping[str, Mapping[str, Any]]], searches: int, nulls: int) -> str:
    """Which edges were decided, and if none could be, how many searches it takes."""
    named = {
        (f'stage {number}, {edge}' if len(sets) > 1 else edge): state
        for number, edges in enumerate(sets, start=1)
        for edge, state in edges.items()
        if state['decided'] is not None
    }
    if not named:
        return 'there was nothing to decide: each edge has one operation'
    decided = [name for name, state in named.items() if state['decided']]
    beyond = 'agree more than chance would'
    if nulls:
        beyond += ', and on an operation that does not win on random labels'
    if decided:
        return f'decided: {len(decided)} of {len(named)} edges ({"; ".join(decided)}); there the searches {beyond}'
    # The edge with the most operations, and all on one of them.
    most = max(len(state['probability']) for state in named.values())
    enough = next(n for n in count(2) if len(named) * chance_of_agreement(n, n, most) <= LEVEL)
    are = 'is' if searches == 1 else 'are'
    few = f' ({searches} {are} too few to show it for one edge alone, {enough} can)' if searches < enough else ''
    return f'nothing was decided: on no edge do the searches {beyond}{few}'


def _edges(space: SearchSpace, logits: Tensor) -> dict[str, dict[str, Any]]:
    """``compare_searches`` for one set. logits: (searches, sum of sizes)."""
    searches = [describe_edges(space, row) for row in logits]
    out: dict[str, dict[str, Any]] = {}
    for (edge, names), part, values in zip(
        space, logits.split(space.sizes, dim=1), space.probabilities(logits), strict=True
    ):
        mean = dict(zip(names, values.mean(0).tolist(), strict=True))
        leaders = [search[edge]['leader'] for search in searches]
        votes = {name: leaders.count(name) for name in names if name in leaders}
        votes = dict(sorted(votes.items(), key=lambda entry: (-entry[1], -mean[entry[0]])))
        winner, agree = next(iter(votes.items()))
        out[edge] = {
            'winner': winner,
            'agree': agree,
            'votes': votes,
            'chance': chance_of_agreement(agree, len(searches), len(names)),
            'chance_adjusted': None,
            'decided': None,
            'probability': mean,
            'margin': sum(search[edge]['margin'] for search in searches) / len(searches),
            'entropy': sum(search[edge]['entropy'] for search in searches) / len(searches),
            'rank_correlation': _rank_correlation(part),
        }
    return out


def _rank_correlation(logits: Tensor) -> float | None:
    """Spearman's correlation, the mean over all pairs of rows; None without a pair. logits: (searches, operations)."""
    if min(logits.shape) < 2:
        return None
    # Ties, which trained logits do not have, share their mean rank.
    less = (logits[:, :, None] > logits[:, None, :]).sum(2)
    equal = (logits[:, :, None] == logits[:, None, :]).sum(2)
    ranks = less + (equal - 1) / 2
    ranks = ranks - ranks.mean(1, keepdim=True)
    norms = ranks.norm(dim=1)
    pairs = [
        float(ranks[i] @ ranks[j] / (norms[i] * norms[j])) if norms[i] * norms[j] > 0 else 0.0
        for i, j in combinations(range(len(logits)), 2)
    ]
    return sum(pairs) / len(pairs)


def _share(value: float) -> str:
    return f'{value:.2f}' if value >= 0.01 else f'{value:.0e}'


def _null_verdict(state: Mapping[str, Any], nulls: int) -> str:
    if len(state['probability']) == 1:
        return 'nothing to choose'
    votes = state['null_votes'].get(state['winner'], 0)
    if state['by_construction']:
        return f'wins there too ({votes} of {nulls})'
    other = state['null_winner']
    also = f', this one in {votes}' if votes else ''
    return f'{other} wins there ({state["null_votes"][other]} of {nulls}{also})'
