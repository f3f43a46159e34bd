"""Batch norm for statistics maps: torch's, except where torch has nothing to normalise by or would overflow."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn

from .primitive import narrow


@torch.fx.wrap
def batch_norm(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor,
    bias: Tensor,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """``F.batch_norm`` in the dtype of ``weight``; a single value per channel is normalised by the running statistics."""
    x = narrow(x, weight)
    use_batch = training and x.numel() > x.shape[1]
    return F.batch_norm(x, running_mean, running_var, weight, bias, use_batch, momentum, eps)


@register_notrace_module  # timm's FX tools keep it whole, as they keep torch's, so that train() and eval() still work
class BatchNorm2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` that also takes one value per channel (batch 1 on a 1 x 1 map) in training mode.

    torch raises there, since the batch's variance is undefined; here that batch is normalised as in eval mode and
    leaves the running statistics alone. The input is brought to the parameters' dtype: fp32 under autocast.
    """

    def forward(self, input: Tensor) -> Tensor:
        if self.training:
            self.num_batches_tracked.add_(1)
        return batch_norm(
            input,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training,
            self.momentum,
            self.eps,
        )
