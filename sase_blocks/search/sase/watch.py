"""How a search is going: who leads each edge, by how much, and what should make one doubt it.

The logits are few, so their Hessian is taken exactly, one product a logit. A largest eigenvalue that grows warns of a
result that does not survive discretisation (arXiv 1909.09656); here, where no operation is a skip, what fails more
often is that one operation's scale decides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .network import SearchNetwork
from .space import SearchSpace

__all__ = ['dead_operations', 'describe_edges', 'hessian_eigenvalue', 'warnings_of']

DOMINANT = 0.9  # a probability above it: the edge has decided
SLOPE = 0.75  # of 1909.09656: an eigenvalue that has grown by more than 1 / 0.75 within five epochs
WINDOW = 5


def describe_edges(space: SearchSpace, logits: Tensor) -> dict[str, dict[str, Any]]:
    """Of each edge, from one set of logits (sum of sizes,): leader, probability, margin to the next, entropy.

    Entropy is in parts of ln(operations): 1 where all are equal, 0 where one has everything (and for a single one).
    """
    out: dict[str, dict[str, Any]] = {}
    for (edge, names), p in zip(space, space.probabilities(logits.double()), strict=True):
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
