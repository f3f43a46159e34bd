"""The gradient of the held-out loss for the logits: DARTS' bilevel problem (arXiv 1806.09055, eq. 5 to 8).

With weights w, logits l and the virtual step w' = w - lr (momentum buffer + grad_w L_train(w, l) + decay w):

- first order: grad_l L_val(w, l).
- second order, exact: grad_l L_val(w', l) - lr grad^2_(l,w) L_train(w, l) . grad_w' L_val(w', l), by double backward.
- second order, finite difference: the same, the product by a central difference with step 0.01 / norm. In a ReLU
  network it is off by a factor (the kinks). It is here for comparison only.

With several processes, each gradient is the mean over all of them, by one reduction of one flat tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .network import SearchNetwork

ORDERS = ('1', '2', '2-fd')

Loss = Callable[[Tensor, Tensor], Tensor]
Batch = tuple[Tensor, Tensor]


class VirtualStep(NamedTuple):
    """The SGD step that the second order differentiates through."""

    lr: float
    momentum: float = 0.0
    weight_decay: float = 0.0
    buffers: Mapping[str, Tensor] = {}  # momentum buffers by the weight's name; none before the first step


class LogitsGradient(NamedTuple):
    """The gradient for the logits, and the held-out batch's loss and outputs at the same weights."""

    gradient: Tensor
    loss: Tensor
    outputs: Tensor


def logits_gradient(
    network: SearchNetwork,
    loss: Loss,
    order: str,
    held_out: Batch,
    training: Batch | None = None,
    step: VirtualStep | None = None,
    *,
    mean: Callable[[Tensor], Tensor] = lambda flat: flat,
    autocast: Callable[[], Any] | None = None,
) -> LogitsGradient:
    """The gradient of the held-out loss for the logits. Does not change batch-norm statistics.

    Args:
        network: in train mode.
        loss: of (outputs, labels).
        order: '1', '2' or '2-fd'.
        held_out: images and labels that train the logits.
        training, step: for the second orders, images and labels of the virtual step, and the step.
        mean: the mean of a flat tensor over all processes.
        autocast: makes the context of the forward passes. Products of gradients are outside of it, in fp32.

    Raises:
        ValueError: an unknown order, or a second order without ``training`` and ``step``.
    """
    if order not in ORDERS:
        raise ValueError(f'order must be one of {", ".join(ORDERS)}, got {order!r}')

    def forward(batch: Batch, weights: Mapping[str, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        with autocast() if autocast else torch.enable_grad():
            outputs = network(batch[0], weights)
            return loss(outputs, batch[1]), outputs

    logits = network.logits
    with network.statistics_kept():
        if order == '1':
            with network.learning(weights=False):
                value, outputs = forward(held_out)
                (gradient,) = torch.autograd.grad(value, logits)
            return LogitsGradient(mean(gradient.flatten()).view_as(logits), value.detach(), outputs.detach())

        if training is None or step is None:
            raise ValueError(f'order {order} needs a training batch and the virtual step')
        weights = network.weights()
        tensors = list(weights.values())
        grads = gradients(forward(training)[0], tensors, create_graph=order == '2')
        moved = {}
        for (name, w), g in zip(weights.items(), unflatten(mean(flatten(grads).detach()), tensors), strict=True):
            velocity = g + step.weight_decay * w.detach()
            if name in step.buffers:
                velocity = velocity + step.momentum * step.buffers[name]
            moved[name] = (w.detach() - step.lr * velocity).requires_grad_()
        value, outputs = forward(held_out, moved)
        *by_weight, direct = gradients(value, [*moved.values(), logits])
        flat = mean(flatten(by_weight))
        vector = unflatten(flat, tensors)
        if order == '2':
            # d/dl of <grad_w L_train, vector>, where the vector is a constant.
            product = sum(((g * v).sum() for g, v in zip(grads, vector, strict=True)), logits.new_zeros(()))
            (implicit,) = torch.autograd.grad(product, logits)
        else:
            r = 0.01 / torch.linalg.vector_norm(flat)
            sides: list[Tensor] = []
            for sign in (1, -1):
                shifted = {n: w.detach() + sign * r * v for (n, w), v in zip(weights.items(), vector, strict=True)}
                sides += torch.autograd.grad(forward(training, shifted)[0], logits)
            implicit = (sides[0] - sides[1]) / (2 * r)
    gradient = mean((direct - step.lr * implicit).flatten()).view_as(logits)
    return LogitsGradient(gradient, value.detach(), outputs.detach())


def gradients(value: Tensor, tensors: Sequence[Tensor], create_graph: bool = False) -> list[Tensor]:
    """Gradients, zeros for what the value does not depend on."""
    found = torch.autograd.grad(value, tensors, create_graph=create_graph, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(found, tensors, strict=True)]


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """All tensors in one flat one."""
    return torch.cat([t.flatten() for t in tensors])


def unflatten(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Inverse of ``flatten``."""
    return [part.view_as(t) for part, t in zip(flat.split([t.numel() for t in like]), like, strict=True)]
