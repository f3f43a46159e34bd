"""The state of a search: which operation leads each edge, by how much, and warnings.

There are few logits, so their Hessian is exact, with one product per logit. A growing largest eigenvalue warns of a
result that does not survive discretisation (arXiv 1909.09656). In this space no operation is a skip connection, and it
is more common that the scale of one operation decides.

An argmax always names a winner. Our addition: whether an edge was decided, see ``noise_leads``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import NormalDist, fmean
from typing import Any

import torch
from torch import Tensor

from sase_blocks.comparing.significance import LEVEL

from .network import LOGITS_STD, SearchNetwork
from .space import SearchSpace

DOMINANT = 0.9  # warn of a probability above it
SLOPE = 0.75  # of arXiv 1909.09656: warn if the eigenvalue grows by more than 1 / 0.75 within WINDOW epochs
WINDOW = 5
NOTHING_TO_DECIDE = 'there was nothing to decide: each edge has one operation'


def noise_leads(space: SearchSpace, sets: int, updates: int, lr: float) -> dict[str, float]:
    """How far noise alone can put one logit of each edge ahead of the next.

    Adam moves a logit by about its learning rate per update, however small the gradient is. With gradients of noise
    this is a random walk: after T updates its standard deviation is lr * sqrt(T). The gradients of an edge's n logits
    sum to zero, so the difference of two has sqrt(2 n / (n - 1)) times that. The logits' random start adds to it.

    A lead below the bound is no finding: at most one search in 20 whose gradients are noise has a larger one on any
    edge of any set. A larger lead shows that the gradients had a direction. Random labels (``null``) also give them
    one, where an operation wins because of how it is built.

    Args:
        sets: number of sets of logits.
        updates: number of updates of the logits so far.
        lr: Adam's learning rate.
    """
    choices = sets * sum(size > 1 for size in space.sizes)
    quantile = NormalDist().inv_cdf(1 - LEVEL / (2 * max(choices, 1)))  # Bonferroni over the edges
    walks = [lr**2 * updates * size / max(size - 1, 1) for size in space.sizes]
    return {
        edge: quantile * math.sqrt(2 * (walk + LOGITS_STD**2)) for (edge, _), walk in zip(space, walks, strict=True)
    }


def decided_edges(sets: Sequence[Mapping[str, Mapping[str, Any]]]) -> tuple[list[str], int]:
    """The names of the decided edges over all sets, and the number of edges with a choice."""
    named = {
        (f'stage {number}, {edge}' if len(sets) > 1 else edge): state['decided']
        for number, edges in enumerate(sets, start=1)
        for edge, state in edges.items()
        if state['decided'] is not None
    }
    return [name for name, decided in named.items() if decided], len(named)


def verdict_of(sets: Sequence[Mapping[str, Mapping[str, Any]]]) -> str:
    """A sentence on which edges were decided, from ``describe_edges`` of each set of logits."""
    decided, choices = decided_edges(sets)
    if not choices:
        return NOTHING_TO_DECIDE
    if not decided:
        return (
            'nothing was decided: on no edge does the first operation lead by more than noise moves the logits; take '
            'the genotype as drawn at random'
        )
    if len(decided) == choices:
        return f'all {choices} edges were decided: each lead is larger than noise makes it'
    return f'decided: {len(decided)} of {choices} edges ({"; ".join(decided)}); on the others the lead may be noise'


def describe_edges(
    space: SearchSpace, logits: Tensor, noise: Mapping[str, float] | None = None
) -> dict[str, dict[str, Any]]:
    """Leader, its probability, its margin to the next, and entropy of each edge. logits: (sum of sizes,).

    Entropy is a fraction of ln(operations): 1 if all are equal, 0 if one has everything, or for a single operation.
    With ``noise``, the ``noise_leads`` of the search, also 'decided': whether the leader's logit is further ahead of
    the next than noise can put it. None for a single operation.
    """
    out: dict[str, dict[str, Any]] = {}
    logits = logits.double()
    for (edge, names), part, p in zip(space, logits.split(space.sizes), space.probabilities(logits), strict=True):
        first, *others = p.argsort(descending=True, stable=True).tolist()
        state: dict[str, Any] = {'leader': names[first], 'probability': float(p[first])}
        state |= {'margin': float(p[first]), 'entropy': 0.0}
        if others:
            state['margin'] -= float(p[others[0]])
            state['entropy'] = float(-(p * p.clamp_min(1e-300).log()).sum()) / math.log(len(names))
        if noise is not None:
            state['decided'] = float(part[first] - part[others[0]]) > noise[edge] if others else None
        out[edge] = state
    return out


@torch.no_grad()
def dead_operations(network: SearchNetwork, images: Tensor) -> dict[str, list[str]]:
    """Operations whose output is constant over images, channels and positions: 'EDGE.NAME' -> names of blocks.

    Does not change batch-norm statistics.
    """
    edges = list(network.space)
    found: list[tuple[str, int, Tensor]] = []

    def look(block: str, edge: int, outputs: Tensor) -> None:
        found.append((block, edge, outputs.float().flatten(1).std(1, correction=0)))

    with network.statistics_kept(), network.observed(look):
        network(images)
    dead: dict[str, list[str]] = {}
    for block, number, spread in found:
        edge, names = edges[number]
        for name, value in zip(names, spread.tolist(), strict=True):
            if value < 1e-6:
                dead.setdefault(f'{edge}.{name}', []).append(block)
    return dead


def hessian_eigenvalue(
    network: SearchNetwork,
    loss: Callable[[Tensor, Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    mean: Callable[[Tensor], Tensor] = lambda flat: flat,
) -> float:
    """The eigenvalue of largest magnitude of the held-out loss's Hessian with respect to all logits."""
    logits = network.logits
    with network.statistics_kept():
        value = loss(network(images), labels)
        (gradient,) = torch.autograd.grad(value, logits, create_graph=True)
        rows = [torch.autograd.grad(one, logits, retain_graph=True)[0].flatten() for one in gradient.flatten()]
    hessian = mean(torch.stack(rows).double()).cpu()
    values = torch.linalg.eigvalsh((hessian + hessian.T) / 2)
    return float(values[values.abs().argmax()])


def warnings_of(rows: Sequence[dict[str, Any]], classes: int) -> list[str]:
    """Warnings about the last of the rows of metrics.jsonl so far."""
    row, out, chance = rows[-1], [], math.log(classes)
    if row['epoch'] > 1 and abs(row['train_loss'] - chance) < 0.02 * chance:
        out.append(f'the training loss {row["train_loss"]:.4f} is stuck at ln({classes}): nothing is being learned')
    for name, edges in row['edges'].items():
        for edge, state in edges.items():
            if state['probability'] > DOMINANT and state['entropy'] > 0:
                out.append(f'{name}{edge}: {state["leader"]} dominates with {100 * state["probability"]:.0f} %')
    for operation, blocks in row['dead'].items():
        out.append(f'{operation} is constant in {len(blocks)} of {row["blocks"]} blocks')
    values = [r['hessian'] for r in rows if r.get('hessian') is not None]
    if len(values) >= 2 * WINDOW:
        now, before = fmean(values[-WINDOW:]), fmean(values[-2 * WINDOW : -WINDOW])
        if before > 0 and before / now < SLOPE and now > before:
            out.append(f'the largest Hessian eigenvalue grew from {before:.3g} to {now:.3g} within {WINDOW} epochs')
    return out
