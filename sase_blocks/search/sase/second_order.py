"""The second-order squeezes of a mixed edge: what they make of their N x N covariance, without its normed copy. Ours.

A batch norm with one channel a row, a kernel a row and a sum over the row turn the covariance into N numbers. The norm
is affine, so it can come behind the sums: of the row with the kernel, of the row and of its squares.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sase_blocks.ops.normalization import BatchNorm2d
from sase_blocks.ops.primitive import contract_rows

__all__ = ['second_order']


def second_order(op: Any, values: Tensor) -> Tensor:
    """What a second-order squeeze gives for its averages (B, P, N): (B, outputs)."""
    norm, dtype = op.norm, op.row_weight.dtype
    z = values + values.sum(1, keepdim=True) * (-1 / values.shape[1])  # the gradient of a mean would be a map
    with torch.autocast(values.device.type, enabled=False):
        # In fp32 the product needs no scaling.
        rows = torch.baddbmm(z.new_zeros(()), z.transpose(1, 2), z, beta=0, alpha=1 / max(z.shape[2] - 1, 1))
    ours = type(norm) is BatchNorm2d and norm.training and norm.track_running_stats and norm.momentum is not None
    if ours and values.shape[2] > 1 and not torch.compiler.is_compiling():
        q = _normed_contraction(rows, op.row_weight.to(rows.dtype), norm).to(dtype)
    else:  # another norm (one over several processes), eval mode, a compiler's graph
        q = contract_rows(norm(rows.unsqueeze(3)).squeeze(3), op.row_weight)
    return op.fc(torch.relu(q))


def _normed_contraction(rows: Tensor, kernel: Tensor, norm: BatchNorm2d) -> Tensor:
    """``contract_rows`` of the normed covariance, (B, N); moves the statistics of the norm."""
    n = rows.shape[0] * rows.shape[2]
    mean = rows.sum((0, 2)) * (1 / n)
    var = ((rows * rows).sum((0, 2)) * (1 / n) - mean * mean).clamp_min(0)
    with torch.no_grad():
        norm.num_batches_tracked.add_(1)  # type: ignore[union-attr]
        for running, new in ((norm.running_mean, mean), (norm.running_var, var * (n / (n - 1)))):
            running.lerp_(new.to(running.dtype), norm.momentum)  # type: ignore[union-attr,arg-type]
    scale = norm.weight.to(rows.dtype) * torch.rsqrt(var + norm.eps)
    return contract_rows(rows, kernel) * scale + (norm.bias.to(rows.dtype) - scale * mean) * kernel.sum(1)
