"""The second-order squeezes of the mixed edges, without the normed covariance. Not in the paper.

A batch norm with one channel per row, a kernel per row and a sum over the row turn the N x N covariance into N numbers.
The norm is affine, so it can follow the sums: of the row times the kernel, of the row, and of its squares.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sase_blocks.ops.normalization import BatchNorm2d
from sase_blocks.ops.primitive import contract_rows


def second_order(op: Any, values: Tensor, gate: Tensor | None = None) -> Tensor:
    """A second-order squeeze of averages (B, P, N), times a gate (B, P, 1) if given. -> (B, outputs)."""
    norm, dtype = op.norm, op.row_weight.dtype
    ours = type(norm) is BatchNorm2d and norm.training and norm.track_running_stats and norm.momentum is not None
    if ours and values.shape[2] > 1 and not torch.compiler.is_compiling():
        kernel, weight, bias = (w.to(values.dtype) for w in (op.row_weight, norm.weight, norm.bias))
        with torch.autocast(values.device.type, enabled=False):
            contracted, mean, square = row_sums(kernel, values, gate)
        var = (square - mean * mean).clamp_min(0)
        _move_statistics(norm, mean, var, values.shape[0] * values.shape[2])
        scale = weight * torch.rsqrt(var + norm.eps)
        q = (contracted * scale + (bias - scale * mean) * kernel.sum(1)).to(dtype)
    else:  # eval mode, a compiler's graph, another norm (SyncBatchNorm)
        with torch.autocast(values.device.type, enabled=False):
            rows = _covariance(_centred(values, gate))
        q = contract_rows(norm(rows.unsqueeze(3)).squeeze(3), op.row_weight)
    return op.fc(torch.relu(q))


def _centred(values: Tensor, gate: Tensor | None) -> Tensor:
    z = values if gate is None else values * gate
    return z + z.sum(1, keepdim=True) * (-1 / z.shape[1])  # the gradient of mean() would be as large as z


def _covariance(z: Tensor) -> Tensor:
    """(B, P, N) -> (B, N, N), divided by N - 1. In fp32 the product needs no scaling."""
    return torch.baddbmm(z.new_zeros(()), z.transpose(1, 2), z, beta=0, alpha=1 / max(z.shape[2] - 1, 1))


def row_sums(kernel: Tensor, values: Tensor, gate: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Of the covariance's rows: the product with the kernel, summed (B, N), the mean over all images, and that of the
    squares (N).

    kernel: (N, N); values: (B, P, N); gate: (B, P, 1).
    """
    z = _centred(values, gate)
    scale = 1 / (z.shape[0] * z.shape[2])
    if 2 * z.shape[1] < z.shape[2]:  # these products are smaller than the covariance
        f = 1 / max(z.shape[2] - 1, 1)
        contracted = (z * F.linear(z, kernel)).sum(1) * f
        mean = (z * z.sum(2, keepdim=True)).sum((0, 1)) * (f * scale)
        return contracted, mean, (z * torch.bmm(torch.bmm(z, z.transpose(1, 2)), z)).sum((0, 1)) * (f * f * scale)
    rows = _covariance(z)
    square = (rows * rows).sum((0, 2)) * scale
    return contract_rows(rows, kernel), rows.sum((0, 2)) * scale, square


def _move_statistics(norm: BatchNorm2d, mean: Tensor, var: Tensor, n: int) -> None:
    with torch.no_grad():
        norm.num_batches_tracked.add_(1)  # type: ignore[union-attr]
        for running, new in ((norm.running_mean, mean), (norm.running_var, var * (n / (n - 1)))):
            running.lerp_(new.to(running.dtype), norm.momentum)  # type: ignore[union-attr,arg-type]
