"""The outputs of the operations of a mixed edge, in as few tensors as they were computed in."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

__all__ = ['Outputs', 'stacked', 'weighted_sum']

# The outputs of the operations at the positions in the key, as one tensor (operations, B, ...).
Outputs = dict[tuple[int, ...], Tensor]


def stacked(outputs: Outputs) -> Tensor:
    """The outputs of all operations of an edge in their order: (operations, B, ...)."""
    each = {i: y for positions, ys in outputs.items() for i, y in zip(positions, ys.unbind(0), strict=True)}
    return torch.stack([each[i] for i in range(len(each))])


def weighted_sum(outputs: Outputs, weights: Tensor) -> Tensor:
    """The sum of the outputs of all operations of an edge times their weights; no stack of them all is made."""
    each = weights.unbind(0)  # not an index by a list, which would wait for a GPU
    if torch.compiler.is_compiling():  # sums of products fuse with what they are of, and a product needs its stack
        pairs = [pair for positions, ys in outputs.items() for pair in zip(positions, ys.unbind(0), strict=True)]
        return reduce(torch.add, [each[i].to(y.dtype) * y for i, y in pairs])
    sums = []
    for positions, ys in outputs.items():
        # One product: tensordot, or a sum of products, is several times as many operations on small tensors.
        share = torch.stack([each[i] for i in positions]).to(ys.dtype)
        sums.append((share @ ys.flatten(1)).view(ys.shape[1:]))
    return reduce(torch.add, sums)
