"""The outputs of an edge's operations as parts that are computed, weighted and kept, or computed again. Ours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor

__all__ = ['Part', 'Recomputed', 'alone', 'stacked', 'weighted_sum']


class Recomputed(torch.autograd.Function):
    """``function(*tensors)``, one tensor, that keeps its inputs alone; differentiable twice.

    Not ``torch.utils.checkpoint``: that would call modules again, which have other weights by then where
    ``torch.func.functional_call`` put tensors in the place of parameters.
    """

    @staticmethod
    def forward(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        return function(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.function, *tensors = inputs
        ctx.save_for_backward(*tensors)
        device = output.device.type
        ctx.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        twice, needed = torch.is_grad_enabled(), ctx.needs_input_grad[1:]
        with torch.enable_grad(), torch.autocast(*ctx.autocast):
            # Aliases: an input may be a function of another one, through which its gradient must not go as well.
            inputs = [
                t.view_as(t) if twice else t.detach().requires_grad_(need)
                for t, need in zip(ctx.saved_tensors, needed, strict=True)
            ]
            output = ctx.function(*inputs)
        wanted = [t for t, need in zip(inputs, needed, strict=True) if need]
        found = iter(torch.autograd.grad(output, wanted, grad, create_graph=twice, allow_unused=True))
        return None, *(next(found) if need else None for need in needed)


class Part:
    """The outputs of some of an edge's operations, not computed yet.

    Args:
        positions: of the operations on the edge.
        function: of the tensors, gives the stack (operations, B, ...).
        again: compute it again for the backward pass instead of keeping what is on the way.
    """

    def __init__(
        self, positions: Sequence[int], function: Callable[..., Tensor], tensors: Sequence[Tensor], again: bool
    ) -> None:
        self.positions = list(positions)
        self.function = function
        self.tensors = list(tensors)
        self.again = again and not torch.compiler.is_compiling()

    @classmethod
    def of(cls, position: int, output: Tensor) -> Part:
        """One operation's output."""
        return cls([position], _one, [output], False)

    def gated(self, ops: Sequence[Any]) -> Part:
        """With a sigmoid behind the excitations of ``ops``, the whole edge, that are no gates already."""
        if all(ops[i].gated for i in self.positions):
            return self
        return Part(self.positions, partial(_sigmoid, self.function), self.tensors, self.again)

    def stack(self) -> Tensor:
        """(operations, B, ...)."""
        return self._call(self.function, self.tensors)

    def weighted(self, weights: Tensor) -> Tensor:
        """The sum of the outputs times the edge's weights. weights: one for each operation of the edge."""
        first, last = self.positions[0], self.positions[-1]
        if last - first + 1 == len(self.positions):
            chosen = weights[first : last + 1]
        else:
            chosen = torch.cat([weights[i : i + 1] for i in self.positions])
        return self._call(partial(_weighted, self.function), [chosen, *self.tensors])

    def _call(self, function: Callable[..., Tensor], tensors: Sequence[Tensor]) -> Tensor:
        return Recomputed.apply(function, *tensors) if self.again else function(*tensors)


def _one(output: Tensor) -> Tensor:
    return output.unsqueeze(0)


def _sigmoid(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    return torch.sigmoid(function(*tensors))


def _weighted(function: Callable[..., Tensor], weights: Tensor, *tensors: Tensor) -> Tensor:
    stack = function(*tensors)
    return torch.tensordot(weights.to(stack.dtype), stack, 1)


def alone(outputs: Sequence[Tensor]) -> list[Part]:
    """Each operation's output as a part of its own."""
    return [Part.of(i, output) for i, output in enumerate(outputs)]


def stacked(parts: Sequence[Part]) -> Tensor:
    """The outputs of all operations of an edge in their order: (operations, B, ...)."""
    by_position: dict[int, Tensor] = {}
    for part in parts:
        by_position.update(zip(part.positions, part.stack().unbind(0), strict=True))
    return torch.stack([by_position[i] for i in range(len(by_position))])


def weighted_sum(parts: Sequence[Part], weights: Tensor) -> Tensor:
    """The sum of the outputs of all operations of an edge times their weights; no stack of them is made."""
    return reduce(torch.add, [part.weighted(weights) for part in parts])
