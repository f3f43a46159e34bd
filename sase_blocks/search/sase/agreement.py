"""How far several searches agree, and what wins by construction.

One search, as in the paper, cannot tell a finding from the noise of its seed. Not in the paper: two controls. Several
seeds that agree more often than chance are one sign of a finding. An operation that also wins on random labels (a null
search) wins because of how it is built, not because of what it does for the task. An edge is decided if chance gives
such agreement on any edge in at most one of 20 comparisons (Holm over the edges), and its winner does not also win on
random labels.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from fractions import Fraction
from itertools import count
from typing import Any

import torch
from numpy.polynomial.polynomial import polypow
from torch import Tensor

from sase_blocks.comparing.significance import LEVEL, holm
from sase_blocks.reading import table

from .diagnostics import NOTHING_TO_DECIDE, decided_edges, describe_edges
from .space import SearchSpace


def compare_searches(
    results: Sequence[Mapping[str, Any]], null: Sequence[Mapping[str, Any]] | None = None
) -> dict[str, Any]:
    """What several searches of one space have in common, edge by edge.

    Args:
        results: one or more of ``read_result``; 'space' (edge -> names), 'logits' (a flat list for each set) and 'seed'
            count.
        null: results of searches on random labels in the same space.

    Returns:
        'seeds', 'null_seeds', 'space'; 'genotype', the consensus as text (one for each set, with semicolons between
        them), and 'genotypes', the same as a list; 'verdict', a sentence on what was decided; 'sets', a list with a
        dict by edge for each set:

        - 'votes': operation -> number of searches it leads, most first. 'winner': the operation with the most votes,
          among equal ones with the larger mean probability. 'agree': its votes.
        - 'chance': the probability of so many votes or more if each search drew its winner at random.
          'chance_adjusted': for the number of edges with a choice (Holm).
        - 'decided': whether the adjusted chance is at most 0.05 and another operation wins on random labels. None for
          an edge of one operation.
        - 'probability': operation -> mean over the searches. 'margin', 'entropy': means, see ``describe_edges``.
        - 'rank_correlation': Spearman's, between the logits of two searches, mean over all pairs; None for one search.
        - with ``null``: 'null_votes', 'null_winner', 'null_probability' (operation -> mean), and 'by_construction',
          whether the winner also wins on random labels.

    Raises:
        ValueError: no results, or results of different spaces or numbers of sets.
    """
    null = list(null or [])
    if not results:
        raise ValueError('there are no searches to compare')
    space, sets = SearchSpace.of(results[0]['space']), len(results[0]['logits'])
    for result in [*results, *null]:
        here = {'spaces': SearchSpace.of(result['space']), 'numbers of sets of logits': len(result['logits'])}
        for (what, found), expected in zip(here.items(), (space, sets), strict=True):
            if found != expected:
                first = f'seed {results[0]["seed"]} {expected}'
                raise ValueError(f'the searches have different {what}: {first}, seed {result["seed"]} {found}')
    described = []
    for number in range(sets):
        edges, others = (_compare_set(space, [r['logits'][number] for r in some]) for some in (results, null))
        for edge, other in others.items():
            state = edges[edge]
            state |= {f'null_{name}': other[name] for name in ('votes', 'winner', 'probability')}
            # An edge of one operation decides nothing.
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
    """The probability that ``agree`` searches or more have the same winner if each draws one of the operations."""
    if not 1 <= agree <= searches or operations < 1:
        raise ValueError(f'expected 1 <= agree <= searches and an operation, got {agree}, {searches}, {operations}')
    # Draws where every operation has fewer votes: searches! times a coefficient of (sum of x^k / k!)^operations.
    draws = polypow([Fraction(1, math.factorial(k)) for k in range(agree)], operations)
    below = draws[searches] if len(draws) > searches else 0
    return float(1 - below * math.factorial(searches) / Fraction(operations) ** searches)


def format_agreement(agreement: Mapping[str, Any]) -> str:
    """The result of ``compare_searches`` as text."""
    searches, nulls, sets = len(agreement['seeds']), len(agreement['null_seeds']), agreement['sets']
    lines = []
    for number, edges in enumerate(sets, start=1):
        rows = [
            {
                'edge': edge,
                'winner': state['winner'],
                'seeds': f'{state["agree"]} of {searches}',
                'by lot': f'{state["chance"]:.2f}' if state['chance'] >= 0.01 else f'{state["chance"]:.0e}',
                'prob.': f'{state["probability"][state["winner"]]:.2f}',
                'margin': f'{state["margin"]:.3f}',
                'entropy': f'{state["entropy"]:.2f}',
                'ranks': '-' if state['rank_correlation'] is None else f'{state["rank_correlation"]:.2f}',
                **({'on random labels': _null_verdict(state, nulls)} if nulls else {}),
            }
            for edge, state in edges.items()
        ]
        lines += [f'stage {number}'] if len(sets) > 1 else []
        lines += [*table(rows, left=['edge', 'winner', 'on random labels']), '']
    lines += [
        f'consensus: {agreement["genotype"]}',
        agreement['verdict'],
        'by lot: how often so many searches or more would agree if each drew its winner; ranks: mean correlation of',
        'the rankings of two searches; entropy: 1 where all operations are equal, 0 where one has everything.',
    ]
    if nulls:
        lines.append('wins there too: it leads also where nothing can be learned, so its lead shows nothing.')
    return '\n'.join(lines)


def _null_verdict(state: Mapping[str, Any], nulls: int) -> str:
    if len(state['probability']) == 1:
        return 'nothing to choose'
    votes = state['null_votes'].get(state['winner'], 0)
    if state['by_construction']:
        return f'wins there too ({votes} of {nulls})'
    other = state['null_winner']
    also = f', this one in {votes}' if votes else ''
    return f'{other} wins there ({state["null_votes"][other]} of {nulls}{also})'


def _verdict(sets: Sequence[Mapping[str, Mapping[str, Any]]], searches: int, nulls: int) -> str:
    """Which edges were decided, or how many searches could decide one."""
    decided, choices = decided_edges(sets)
    if not choices:
        return NOTHING_TO_DECIDE
    beyond = 'agree more than chance would'
    if nulls:
        beyond += ', and on an operation that does not win on random labels'
    if decided:
        return f'decided: {len(decided)} of {choices} edges ({"; ".join(decided)}); there the searches {beyond}'
    # Fewest votes decide the edge with the most operations, if all agree.
    most = max(len(state['probability']) for edges in sets for state in edges.values())
    enough = next(n for n in count(2) if choices * chance_of_agreement(n, n, most) <= LEVEL)
    few = f' ({searches} {"is" if searches == 1 else "are"} too few to show it for one edge alone, {enough} can)'
    return f'nothing was decided: on no edge do the searches {beyond}{few if searches < enough else ""}'


def _compare_set(space: SearchSpace, rows: Sequence[Sequence[float]]) -> dict[str, dict[str, Any]]:
    """``compare_searches`` for the logits of one set, one row for each search; empty without any."""
    out: dict[str, dict[str, Any]] = {}
    if not rows:
        return out
    logits = torch.tensor(rows, dtype=torch.float64)
    searches = [describe_edges(space, row) for row in logits]
    parts = logits.split(space.sizes, dim=1)
    for (edge, names), part, values in zip(space, parts, space.probabilities(logits), strict=True):
        mean = dict(zip(names, values.mean(0).tolist(), strict=True))
        leaders = Counter(search[edge]['leader'] for search in searches)
        leading = sorted(filter(leaders.get, names), key=lambda name: (-leaders[name], -mean[name]))
        votes = {name: leaders[name] for name in leading}
        winner, agree = leading[0], votes[leading[0]]
        out[edge] = {
            'winner': winner,
            'agree': agree,
            'votes': votes,
            'chance': chance_of_agreement(agree, len(searches), len(names)),
            'chance_adjusted': None,
            'decided': None,
            'probability': mean,
            **{name: sum(s[edge][name] for s in searches) / len(searches) for name in ('margin', 'entropy')},
            'rank_correlation': _rank_correlation(part),
        }
    return out


def _rank_correlation(logits: Tensor) -> float | None:
    """Spearman's correlation of two rows, mean over all pairs; None without a pair. logits: (searches, operations)."""
    if min(logits.shape) < 2:
        return None
    # Equal logits, which training does not leave, share their mean rank.
    ranks = (logits[:, :, None] > logits[:, None, :]).sum(2) + (logits[:, :, None] == logits[:, None, :]).sum(2) / 2
    rows, columns = torch.triu_indices(len(logits), len(logits), 1)
    return float(torch.corrcoef(ranks.double()).nan_to_num()[rows, columns].mean())  # NaN: a row of equal logits
