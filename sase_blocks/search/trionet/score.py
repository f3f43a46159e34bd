"""Score a network of the supernet: recalibrate its batch norms, then measure its accuracy on held-out images.

The supernet's training gives no statistics that fit a network: every candidate measures its own on training images, for
1-d and 2-d norms and those inside axial attention. Without that, accuracies are at chance level.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from sase_blocks.train import hits


def resize(images: Tensor, size: int) -> Tensor:
    """(B, C, H, W) -> (B, C, size, size) by bilinear interpolation with antialiasing; unchanged if the size fits."""
    if images.shape[2:] == (size, size):
        return images
    return F.interpolate(images, (size, size), mode='bilinear', antialias=True)


@torch.no_grad()
def recalibrate(
    network: nn.Module, images: Iterable[Tensor], autocast: AbstractContextManager[Any] | None = None
) -> None:
    """Replace the statistics of all batch norms by the mean over these batches; keeps the network's mode."""
    with autocast or nullcontext():
        update_bn(images, network)


@torch.no_grad()
def accuracy(
    network: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    autocast: AbstractContextManager[Any] | None = None,
) -> float:
    """Top-1 accuracy in percent, in eval mode. Raises ValueError without images, FloatingPointError for NaN or inf."""
    network.eval()
    right, bad, count = torch.tensor(0), torch.tensor(0), 0
    with autocast or nullcontext():
        for images, labels in batches:
            outputs = network(images)
            right = right + hits(outputs, labels).sum()
            bad = bad + (~torch.isfinite(outputs).all(1)).sum()
            count += len(labels)
    if count == 0:
        raise ValueError('there are no images to measure the accuracy on')
    if bad:
        raise FloatingPointError(f'the outputs for {bad} of {count} images are not finite')
    return 100 * int(right) / count
