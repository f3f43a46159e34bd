"""Is the found block better than others? Trains all from scratch with one budget and several seeds, and compares them.

Not in the paper, which reports the accuracy of one run of the mixture. It does not say how far a found block is above a
random one of its space, or above the spread over seeds. ``comparing/`` trains, measures and compares.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from sase_blocks.blocks import Genotype
from sase_blocks.comparing import Candidate, Rule, compare, parse_candidate, takes_genotype
from sase_blocks.comparing.report import ahead_by
from sase_blocks.comparing.significance import LEVEL
from sase_blocks.data import Samples, derive_seed
from sase_blocks.jobs import Ray
from sase_blocks.runs import is_main, write_json
from sase_blocks.train import TrainConfig

from .space import SearchSpace

BASELINES = ('none', 'se', 'eca', 'cbam', 'sase')
RANDOM = 103  # stream of random numbers, see derive_seed: random genotypes


def evaluate(
    found: str,
    budget: TrainConfig,
    *,
    baselines: Sequence[str] = BASELINES,
    randoms: int = 0,
    space: SearchSpace | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    random_seed: int = 0,
    data: tuple[Samples, Samples] | None = None,
    ray: Ray | None = None,
) -> dict[str, Any]:
    """Compare the found block with baselines and random genotypes, all trained from scratch.

    A finished evaluation takes further baselines, random genotypes and seeds.

    Args:
        found: the genotype as text, or one for each stage with semicolons between them.
        budget, seeds, data, ray: see ``compare``. The validation split of the budget, which is reported, should be new
            to the search.
        baselines: see ``parse_candidate``.
        randoms: number of random genotypes, all different and different from the found one.
        space: of the random genotypes. Default: the paper's.
        random_seed: of the random genotypes. More of them begin with the same ones.

    Returns:
        The content of ``evaluation.json`` in ``budget.out``: the result of ``compare`` with the found block as the
        reference, and 'found' (text), 'space', 'random_seed', and 'rank', the rank of the found block among the random
        ones: 'place', 'of', and 'p', the probability that a random block has that place or a better one. 'kind' of a
        candidate is 'found', 'baseline' or 'random', and only baselines are tested.

    Raises:
        ImportError, ValueError, FileNotFoundError, OSError, RuntimeError: the errors of ``compare``.
    """
    if budget.pretrained or budget.checkpoint:
        raise ValueError('an evaluation trains from scratch: leave pretrained and checkpoint out of the budget')
    candidates = list_candidates(found, baselines, randoms, space, random_seed)
    # From scratch, an inserted block starts like one that the model is built with.
    rule = Rule(insertion={} if takes_genotype(budget) else {'start': 'paper'})
    shared: dict[str, Any] = {'seeds': seeds, 'data': data, 'ray': ray, 'advice': 'Try a lower --evaluate-lr.'}
    result = compare(candidates, budget, reference='found', rule=rule, **shared)
    rank, ranked = rank_found(result['candidates'])
    result |= {
        'found': candidates[0].block,
        'space': str(space or 'paper') if randoms else None,
        'random_seed': random_seed,
        'rank': rank,
        'verdicts': [*result['verdicts'], *ranked],
        'summary': ' '.join([result['summary'], *ranked]),
    }
    if is_main():
        write_json(Path(budget.out) / 'evaluation.json', result)
    return result


def list_candidates(
    found: str,
    baselines: Sequence[str] = BASELINES,
    randoms: int = 0,
    space: SearchSpace | None = None,
    random_seed: int = 0,
) -> list[Candidate]:
    """The candidates of ``evaluate``, the found block first.

    Raises ValueError for a wrong argument or a block that the budget's model cannot be built with.
    """
    if randoms < 0:
        raise ValueError(f'randoms must be at least 0, got {randoms}')
    stages = Genotype.parse_stages(found)
    found = '; '.join(map(str, stages))
    listed = [Candidate('found', found, kind='found')]
    listed += [replace(parse_candidate(entry), kind='baseline') for entry in baselines]
    paper = SearchSpace.parse('paper')
    texts = random_genotypes(space or paper, randoms, random_seed, sets=len(stages), without=[found])
    listed += [Candidate(f'random {i}', text, kind='random', tested=False) for i, text in enumerate(texts)]
    return listed


def random_genotypes(
    space: SearchSpace, count: int, seed: int = 0, *, sets: int = 1, without: Sequence[str] = ()
) -> list[str]:
    """Different random genotypes of a space, as text. The first ones are the same for every ``count``.

    Args:
        sets: number of genotypes in each text, for a network with one for each stage.
        without: texts to leave out.

    Raises:
        ValueError: the space does not hold so many.
    """
    taken = [Genotype.parse_stages(text) for text in set(without)]
    left = space.genotypes**sets - sum(len(stages) == sets and all(one in space for one in stages) for stages in taken)
    if count > left:
        raise ValueError(f'the space holds {left} genotypes besides the found one, {count} random ones were asked for')
    drawn: list[str] = []
    number = 0
    while len(drawn) < count:
        text = '; '.join(str(space.random(derive_seed(seed, RANDOM, number, part))) for part in range(sets))
        if text not in drawn and text not in without:
            drawn.append(text)
        number += 1
    return drawn


def rank_found(candidates: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any] | None, list[str]]:
    """The rank of the found block among the random ones by mean, and a sentence about it.

    If the found block were itself random, every place would be equally likely, so p is from an exact permutation
    test. This holds only among blocks with the same seeds, so it leaves out others.
    """
    found = next(row for row in candidates if row['kind'] == 'found')
    randoms = [row for row in candidates if row['kind'] == 'random']
    trained = [row for row in randoms if row['accuracies'].keys() == found['accuracies'].keys()]
    if found['mean'] is None or not trained:
        return None, []
    count, of = len(trained), len(trained) + 1
    place = 1 + sum(row['mean'] > found['mean'] for row in trained)
    p = (1 + sum(row['mean'] >= found['mean'] for row in trained)) / of  # a tie is no merit
    least = math.ceil(1 / LEVEL) - 1
    shown = 'no advantage over drawing at random is shown'
    if p <= LEVEL:
        shown = 'the search is better than drawing at random'
    elif count < least:
        shown = f'nothing is shown, for which it would take at least {least} random blocks'
    ahead = found['mean'] - fmean(row['mean'] for row in trained)
    text = (
        f'found has place {place} among {of} with {count} random block{"s"[: count > 1]} of its space. A block drawn '
        f'at random would do as well with probability {p:.2f}: {shown}. It {ahead_by(ahead)} their mean.'
    )
    if left := len(randoms) - count:
        text += f' {left} random {"block is" if left == 1 else "blocks are"} left out, with other seeds.'
    return {'place': place, 'of': of, 'p': p}, [text]
