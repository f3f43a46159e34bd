"""One training step of the supernet: the sandwich rule with in-place distillation (as in BigNAS, arXiv 2003.11142).

The largest network learns from the labels, and its outputs teach the smallest one and some random ones. Not in the
paper: the largest and the smallest draw their operators, too, so that no operator is favoured. The networks of a step
depend only on (seed, step), so all processes train the same ones, and a resumed run those that it would have trained.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sase_blocks.data import derive_seed
from sase_blocks.models import Architecture

from .sampling import Law, draw
from .score import resize
from .space import TrioSpace
from .supernet import SuperNet

__all__ = ['networks_of', 'sandwich_step']

NETWORKS = 301  # stream of random numbers, see derive_seed


def networks_of(space: TrioSpace, law: Law, seed: int, step: int, more: int) -> list[Architecture]:
    """The largest network, the smallest one and ``more`` others, for one step."""
    rng = np.random.default_rng(derive_seed(seed, NETWORKS, step))
    extents = ['largest', 'smallest', *[None] * more]
    return [space.architecture(draw(space, rng, law, extent)) for extent in extents]


def sandwich_step(
    supernet: SuperNet,
    networks: list[Architecture],
    images: Tensor,
    labels: Tensor,
    *,
    label_smoothing: float = 0.0,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> Tensor:
    """Accumulate the gradients of these networks in the supernet's parameters. -> their losses, (networks,).

    The first network learns from the labels and teaches the others.
    """
    losses, teacher = [], torch.empty(0)
    for number, architecture in enumerate(networks):
        network = supernet.activate(architecture, dropout=number == 0)
        with autocast():
            outputs = network(resize(images, architecture.image_size))
        outputs = outputs.float() if outputs.dtype in (torch.bfloat16, torch.float16) else outputs
        if number == 0:
            loss = F.cross_entropy(outputs, labels, label_smoothing=label_smoothing)
            teacher = outputs.detach().softmax(1)
        else:
            loss = F.cross_entropy(outputs, teacher)
        loss.backward()
        losses.append(loss.detach())
    return torch.stack(losses)
