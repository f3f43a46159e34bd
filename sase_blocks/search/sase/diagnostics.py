"""How a search is going: who leads each edge, by how much, and what should make one doubt it.

The logits are few, so their Hessian is taken exactly, one product a logit. A largest eigenvalue that grows warns of a
result that does not survive discretisation (arXiv 1909.09656); here, where no operation is a skip, what fails more
often is that one operation's scale decides.

An argmax always names a winner. Our addition: whether an edge was decided, see ``noise_leads``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from sase_blocks.search.significance import LEVEL

from .network import LOGITS_STD, SearchNetwork
from .space import SearchSpace

__all__ = ['dead_operations', 'describe_edges', 'hessian_eigenvalue', 'noise_leads', 'verdict_of', 'warnings_of']

DOMINANT = 0.9  # a probability above it: the edge has decided
SLOPE = 0.75  # of 1909.09656: an eigenvalue that has grown by more than 1 / 0.75 within five epochs
WINDOW = 5


def noise_leads(space: SearchSpace, sets: int, updates: int, lr: float) -> dict[str, float]:
    """For each edge, the lead of one logit over the next one that noise alone gives.

    Adam moves a logit by about its learning rate an update, however small the gradient is. Gradients that are noise
    make that a random walk: after T updates its standard deviation is lr * sqrt(T), and, as the gradients of an edge's
    n logits sum to zero, that of the difference of two is sqrt(2 n / (n - 1)) times as much. The logits' random start
    comes on top. A lead below the bound is no finding. At most one search in 20 whose gradients are noise has a larger
    one on any edge of any set. A larger lead shows that the gradients had a direction; random labels (``null``) give
    them one, too, where an operation wins for how it is built.

    Args:
        space: of the search.
        sets: of logits.
        updates: of the logits so far.
        lr: of Adam.
    """
    choices = sets * sum(size > 1 for size in space.sizes)
    quantile = NormalDist().inv_cdf(1 - LEVEL / (2 * max(choices, 1)))  # Bonferroni over the edges
    leads = {}
    for (edge, _), size in zip(space, space.sizes, strict=True):
        walk = lr**2 * updates * size / max(size - 1, 1)
        leads[edge] = quantile * math.sqrt(2 * (walk + LOGITS_STD**2))
    return leads


def verdict_of(edges: Sequence[Mapping[str, Mapping[str, Any]]]) -> str:
    """A sentence on which edges were decided, from ``describe_edges`` of each set of logits."""
    named = {
        (f'stage {number}, {edge}' if len(edges) > 1 else edge): state['decided']
        for number, one in enumerate(edges, start=1)
        for edge, state in one.items()
        if state['decided'] is not None  # one operation alone: there was nothing to decide
    }
    if not named:
        return 'there was nothing to decide: each edge has one operation'
    decided = [name for name, state in named.items() if state]
    if not decided:
        return (
            'nothing was decided: on no edge does the first operation lead by more than noise moves the logits; take '
            'the genotype as drawn at random'
        )
    if len(decided) == len(named):
        return f'all {len(named)} edges were decided: each lead is larger than noise makes it'
    return f'decided: {len(decided)} of {len(named)} edges ({"; ".join(decided)}); on the others the lead may be noise'


def describe_edges(
    space: SearchSpace, logits: Tensor, noise: Mapping[str, float] | None = None
) -> dict[str, dict[str, Any]]:
    """Of each edge, from one set of logits (sum of sizes,): leader, probability, margin to the next, entropy.

    Entropy is in parts of ln(operations): 1 where all are equal, 0 where one has everything (and for a single one).
    With ``noise``, the ``noise_leads`` of the search, also 'decided': is the leader's logit further ahead of the next
    one than noise brings it? None for a single operation.
    """
    out: dict[str, dict[str, Any]] = {}
    logits = logits.double()
    for (edge, names), part, p in zip(space, logits.split(space.sizes), space.probabilities(logits), strict=True):
        order = p.argsort(descending=True, stable=True)
        first = float(p[order[0]])
        second = float(p[order[1]]) if len(names) > 1 else 0.0
        entropy = float(-(p * p.clamp_min(1e-300).log()).sum()) / math.log(len(names)) if len(names) > 1 else 0.0
        out[edge] = {
            'leader': names[int(order[0])],
            'probability': first,
            'margin': first - second,
            'entropy': entropy,
        }
        if noise is not None:
            lead = float(part[order[0]] - part[order[1]]) if len(names) > 1 else None
            out[edge]['decided'] = None if lead is None else lead > noise[edge]
    return out


@torch.no_grad()
def dead_operations(network: SearchNetwork, images: Tensor) -> dict[str, list[str]]:
    """The operations whose output does not vary over images, channels and positions, and the blocks it happens in.

    -> 'EDGE.NAME' -> names of blocks. Batch-norm statistics are left as they are.
    """
    space = network.space
    names = {number: names for number, (_, names) in enumerate(space)}
    edges = [edge for edge, _ in space]
    found: list[tuple[str, int, Tensor]] = []

    def look(block: str, edge: int, outputs: Tensor) -> None:
        found.append((block, edge, outputs.float().flatten(1).std(1, correction=0)))

    with network.statistics_kept(), network.observed(look):
        network(images)
    dead: dict[str, list[str]] = {}
    for block, edge, spread in found:
        for number, value in enumerate(spread.tolist()):
            if value < 1e-6:
                dead.setdefault(f'{edges[edge]}.{names[edge][number]}', []).append(block)
    return dead


def hessian_eigenvalue(
    network: SearchNetwork,
    loss: Callable[[Tensor, Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    mean: Callable[[Tensor], Tensor] = lambda flat: flat,
) -> float:
    """The largest eigenvalue, in size, of the held-out loss's Hessian for the logits (the product of all sets)."""
    logits = network.logits
    with network.statistics_kept():
        value = loss(network(images), labels)
        (gradient,) = torch.autograd.grad(value, logits, create_graph=True)
        rows = []
        flat = gradient.flatten()
        for i in range(flat.numel()):
            (row,) = torch.autograd.grad(flat[i], logits, retain_graph=True)
            rows.append(row.flatten())
    hessian = mean(torch.stack(rows).double().flatten()).reshape(len(rows), -1).cpu()
    values = torch.linalg.eigvalsh((hessian + hessian.T) / 2)
    return float(values[values.abs().argmax()])


def warnings_of(rows: Sequence[dict[str, Any]], classes: int) -> list[str]:
    """What the rows of metrics.jsonl so far should make one doubt, about the last of them."""
    row = rows[-1]
    out = []
    chance = math.log(classes)
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
        now, before = sum(values[-WINDOW:]) / WINDOW, sum(values[-2 * WINDOW : -WINDOW]) / WINDOW
        if before > 0 and before / now < SLOPE and now > before:
            out.append(f'the largest Hessian eigenvalue grew from {before:.3g} to {now:.3g} within {WINDOW} epochs')
    return out
