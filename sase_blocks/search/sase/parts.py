"""The outputs of an edge's operations as parts that are computed, weighted and kept, or computed again. Ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

__all__ = ['Gradients', 'Part', 'Recomputed', 'alone', 'stacked', 'weighted_sum']


Gradients = list[Tensor | None]  # None for what is not needed


class Recomputed(torch.autograd.Function):
    """``function(*tensors)``, one tensor, that keeps its inputs alone; differentiable twice.

    The first derivative is autograd's, unless the function has its own: ``keep(*tensors)`` gives the result and a tuple
    of tensors to keep beside the inputs, ``vjp(grad, tensors, kept, needed)`` the gradients, None for those that are
    not needed, or None for autograd's.
    Not ``torch.utils.checkpoint``: that would call modules again, which have other weights by then where
    ``torch.func.functional_call`` put tensors in the place of parameters.
    """

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        output, kept = function.keep(*tensors) if hasattr(function, 'keep') else (function(*tensors), ())
        ctx.function, ctx.inputs = function, len(tensors)
        ctx.save_for_backward(*tensors, *kept)
        device = output.device.type
        ctx.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        twice, needed = torch.is_grad_enabled(), ctx.needs_input_grad[1:]
        tensors, kept = ctx.saved_tensors[: ctx.inputs], ctx.saved_tensors[ctx.inputs :]
        if not twice and hasattr(ctx.function, 'vjp'):
            with torch.autocast(ctx.autocast[0], enabled=False):
                grads = ctx.function.vjp(grad, tensors, kept, needed)
            if grads is not None:
                return None, *grads
        with torch.enable_grad(), torch.autocast(*ctx.autocast):
            # Aliases: an input may be a function of another one, through which its gradient must not go as well.
            inputs = [
                t.view_as(t) if twice else t.detach().requires_grad_(need)
                for t, need in zip(tensors, needed, strict=True)
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
        after: a linear map of the stack, or of a weighted sum over it, that comes last.
    """

    def __init__(
        self,
        positions: Sequence[int],
        function: Callable[..., Tensor],
        tensors: Sequence[Tensor],
        again: bool,
        after: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.positions = list(positions)
        self.function = function
        self.tensors = list(tensors)
        self.again = again and not torch.compiler.is_compiling()
        self.after = after or _itself

    @classmethod
    def of(cls, outputs: Mapping[int, Tensor], after: Callable[[Tensor], Tensor] | None = None) -> Part:
        """Outputs that are there already, by the operation's position."""
        return cls(list(outputs), _stack, list(outputs.values()), False, after)

    @classmethod
    def of_stack(cls, positions: Sequence[int], stack: Tensor) -> Part:
        """The same, as one tensor (operations, B, ...)."""
        return cls(positions, _itself, [stack], False)

    def stack(self) -> Tensor:
        """(operations, B, ...)."""
        return self.after(self._call(self.function, self.tensors))

    def weighted(self, weights: Tensor) -> Tensor:
        """The sum of the outputs times their weights, one for each of ``positions``."""
        return self.after(self._call(Weighted(self.function), [weights, *self.tensors]))

    def _call(self, function: Callable[..., Tensor], tensors: Sequence[Tensor]) -> Tensor:
        return Recomputed.apply(function, *tensors) if self.again else function(*tensors)


def _itself(stack: Tensor) -> Tensor:
    return stack


def _stack(*outputs: Tensor) -> Tensor:
    return torch.stack(outputs)


@dataclass  # not frozen, for dynamo of torch 2.8 does not take those
class Weighted:
    """The sum over the stack that a function gives, times weights: called with (weights, *tensors)."""

    function: Callable[..., Tensor]

    def __call__(self, weights: Tensor, *tensors: Tensor) -> Tensor:
        if torch.compiler.is_compiling():  # sums of products fuse with what they are of, and a product needs its stack
            maps = self.function.each(*tensors) if hasattr(self.function, 'each') else self.function(*tensors).unbind(0)
            return reduce(torch.add, [w.to(m.dtype) * m for w, m in zip(weights.unbind(0), maps, strict=True)])
        return self._sum(weights, self.function(*tensors))

    def _sum(self, weights: Tensor, stack: Tensor) -> Tensor:
        # One product. (tensordot, and a sum of products, are several times as many operations on small tensors.)
        return (weights.to(stack.dtype) @ stack.flatten(1)).view(stack.shape[1:])

    def keep(self, weights: Tensor, *tensors: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The sum, and what the function keeps for ``vjp``."""
        if not hasattr(self.function, 'keep'):
            return self(weights, *tensors), ()
        stack, kept = self.function.keep(*tensors)
        return self._sum(weights, stack), kept

    def vjp(
        self, grad: Tensor, tensors: Sequence[Tensor], kept: Sequence[Tensor], needed: Sequence[bool]
    ) -> Gradients | None:
        """The gradients of weights and tensors, where the function has its own ``weighted_vjp``."""
        if not hasattr(self.function, 'weighted_vjp'):
            return None
        # Under autocast the product is in half precision.
        return self.function.weighted_vjp(grad.to(tensors[1].dtype), tensors[0], tensors[1:], kept, needed)


def alone(outputs: Sequence[Tensor]) -> list[Part]:
    """The outputs of all operations of an edge, each computed by itself."""
    return [Part.of(dict(enumerate(outputs)))]


def stacked(parts: Sequence[Part]) -> Tensor:
    """The outputs of all operations of an edge in their order: (operations, B, ...)."""
    by_position: dict[int, Tensor] = {}
    for part in parts:
        by_position.update(zip(part.positions, part.stack().unbind(0), strict=True))
    return torch.stack([by_position[i] for i in range(len(by_position))])


def weighted_sum(parts: Sequence[Part], weights: Tensor) -> Tensor:
    """The sum of the outputs of all operations of an edge times their weights; no stack of them all is made."""
    each = weights.unbind(0)  # not an index by a list, which would wait for a GPU
    shares = [torch.stack([each[i] for i in part.positions]) for part in parts]
    return reduce(torch.add, [part.weighted(share) for part, share in zip(parts, shares, strict=True)])
