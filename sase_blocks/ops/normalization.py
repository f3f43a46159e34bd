"""Batch and group norm for small maps: torch's, except where torch lacks values to normalise or would overflow."""

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn

from sase_blocks.numerics import narrow, widen


@torch.fx.wrap
def batch_norm(
    x: Tensor, mean: Tensor | None, var: Tensor | None, w: Tensor, b: Tensor, train: bool, momentum: float, eps: float
) -> Tensor:
    """``F.batch_norm`` in fp32 (or fp64) whatever the parameters' dtype, with the result in the dtype of ``w``.

    A covariance of large activations does not fit fp16, but its normalised form does. A single value per channel has no
    variance, so the running statistics normalise it. Without running statistics (test-time adaptation and
    ``torch.func.replace_all_batch_norm_modules_`` remove them), both modes use the batch, as in torch. A single value
    per channel is then its own mean, and becomes the bias.
    """
    x, weight, bias = widen(x), widen(w), widen(b)
    if mean is None or var is None:
        if x.numel() > x.shape[1]:
            return narrow(F.batch_norm(x, None, None, weight, bias, True, momentum, eps), w)
        return narrow(0 * weight.reshape(x.shape) * x + bias.reshape(x.shape), w)
    wide_mean, wide_var = widen(mean), widen(var)
    if x.numel() <= x.shape[1]:
        train = False
    y = F.batch_norm(x, wide_mean, wide_var, weight, bias, train, momentum, eps)
    if train and mean.dtype != wide_mean.dtype:  # half statistics, of which only a copy was updated
        mean.copy_(wide_mean)
        var.copy_(narrow(wide_var, var))
    return narrow(y, w)


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
