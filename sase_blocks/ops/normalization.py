"""Batch and group norm for small maps: torch's, except where torch lacks values to normalise or would overflow."""

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn

from sase_blocks.numerics import narrow, widen


@torch.fx.wrap
def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """``F.batch_norm`` in fp32 (or fp64) whatever the parameters' dtype, with the result in the dtype of ``weight``.

    A covariance of large activations does not fit fp16, but its normalised form does. A single value per channel has no
    variance, so the running statistics normalise it. Without running statistics (test-time adaptation and
    ``torch.func.replace_all_batch_norm_modules_`` remove them), both modes use the batch, as in torch. A single value
    per channel is then its own mean, and becomes the bias.
    """
    x, w, b = widen(x), widen(weight), widen(bias)
    if running_mean is None or running_var is None:
        if x.numel() > x.shape[1]:
            return narrow(F.batch_norm(x, None, None, w, b, True, momentum, eps), weight)
        return narrow(0 * w.reshape(x.shape) * x + b.reshape(x.shape), weight)
    mean, var = widen(running_mean), widen(running_var)
    if training and x.numel() > x.shape[1]:
        y = F.batch_norm(x, mean, var, w, b, True, momentum, eps)
        if running_mean.dtype != mean.dtype:  # half parameters: only copies of the statistics were updated
            running_mean.copy_(mean)
            running_var.copy_(narrow(var, running_var))
    else:
        y = F.batch_norm(x, mean, var, w, b, False, momentum, eps)
    return narrow(y, weight)


class BatchNorm2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` that also accepts one value per channel (batch 1 on a 1 x 1 map) in training mode.

    torch raises an error there, because the batch's variance is undefined. This one normalises that batch as in eval
    mode and keeps the running statistics. The arithmetic is in fp32 for fp16 and bf16.
    """

    def forward(self, input: Tensor) -> Tensor:
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # a plain mean over all batches, as torch.optim.swa_utils.update_bn needs
                momentum = 1.0 / float(self.num_batches_tracked)
        mean, var = self.running_mean, self.running_var
        return batch_norm(input, mean, var, self.weight, self.bias, self.training, momentum, self.eps)


register_notrace_module(BatchNorm2d)  # timm's FX tools keep it whole like torch's, so train() and eval() still work


def scale_and_shift(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Scale and shift of a batch norm in eval mode, y = scale * x + shift, in float64. -> (C,), (C,)."""
    scale = norm.weight.detach().double() * torch.rsqrt(norm.running_var.double() + norm.eps)  # type: ignore[union-attr]
    return scale, norm.bias.detach().double() - scale * norm.running_mean.double()  # type: ignore[union-attr]


class ChannelShift(nn.Module):
    """y = x + bias, one number per channel: the rest of a batch norm whose scale is folded into the weights before it.

    Shape: (B, C, H, W) -> (B, C, H, W). bias: (C,).
    """

    def __init__(self, bias: Tensor) -> None:
        super().__init__()
        self.bias = nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias.reshape(1, -1, 1, 1)


class GroupNorm(nn.GroupNorm):
    """``nn.GroupNorm`` that also accepts one value per group, which becomes the bias. torch raises an error there."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)
