"""The second-order squeezes of a mixed edge: what they make of their N x N covariance, keeping nothing of it. Ours.

A batch norm with one channel a row, a kernel a row and a sum over the row turn the covariance R = f Z^T Z of N columns,
P centred values each, into N numbers. The norm is affine, so it can come behind the sums, which are, with the row i,

    sum_j W_ij R_ij = f z_i . (Z W^T)_i,    sum_j R_ij = f z_i . (sum_j z_j),    sum_j R_ij^2 = f^2 z_i . (Z Z^T Z)_i

For P < N, as in the spatial squeeze of the first stages, all of this is products smaller than R.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sase_blocks.ops.normalization import BatchNorm2d
from sase_blocks.ops.primitive import contract_rows

__all__ = ['second_order']


def second_order(op: Any, values: Tensor, gate: Tensor | None = None) -> Tensor:
    """What a second-order squeeze gives for its averages (B, P, N), times a gate (B, P, 1): (B, outputs)."""
    norm = op.norm
    ours = type(norm) is BatchNorm2d and norm.training and norm.track_running_stats and norm.momentum is not None
    if ours and values.shape[2] > 1 and not torch.compiler.is_compiling():
        with torch.autocast(values.device.type, enabled=False):
            sums = RowSums.apply(values, gate, op.row_weight.to(values.dtype))
        q = _normed(norm, op.row_weight, *sums)
    else:  # another norm (one over several processes), eval mode, a compiler's graph
        z = _centred(values if gate is None else values * gate)
        with torch.autocast(values.device.type, enabled=False):
            rows = _covariance(z)
        q = contract_rows(norm(rows.unsqueeze(3)).squeeze(3), op.row_weight)
    return op.fc(torch.relu(q))


def _normed(norm: BatchNorm2d, row_weight: Tensor, contracted: Tensor, mean: Tensor, second: Tensor) -> Tensor:
    """The contraction of the normed covariance from its sums; moves the running statistics. -> (B, N)."""
    var = torch.addcmul(second, mean, mean, value=-1).clamp_min(0)
    n = contracted.numel()
    with torch.no_grad():
        norm.num_batches_tracked.add_(1)  # type: ignore[union-attr]
        for running, new in ((norm.running_mean, mean), (norm.running_var, var * (n / (n - 1)))):
            running.lerp_(new.to(running.dtype), norm.momentum)  # type: ignore[union-attr,arg-type]
    scale = norm.weight.to(mean.dtype) * torch.rsqrt(var + norm.eps)
    shift = torch.addcmul(norm.bias.to(mean.dtype), scale, mean, value=-1) * row_weight.to(mean.dtype).sum(1)
    return torch.addcmul(shift, contracted, scale).to(row_weight.dtype)


class RowSums(torch.autograd.Function):
    """``row_sums`` that keeps its inputs alone; a second derivative goes through ``row_sums``."""

    @staticmethod
    def forward(values: Tensor, gate: Tensor | None, kernel: Tensor) -> tuple[Tensor, ...]:
        return row_sums(values, gate, kernel)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        if torch.is_grad_enabled():
            tensors = [None if t is None else t.view_as(t) for t in ctx.saved_tensors]
            wanted = [t for t, need in zip(tensors, ctx.needs_input_grad, strict=True) if need and t is not None]
            sums = row_sums(*tensors)  # type: ignore[arg-type]
            found = iter(torch.autograd.grad(sums, wanted, grads, create_graph=True, allow_unused=True))
            return tuple(next(found) if need else None for need in ctx.needs_input_grad)
        with torch.autocast(grads[0].device.type, enabled=False):
            return _backward(*ctx.saved_tensors, *grads)


def row_sums(values: Tensor, gate: Tensor | None, kernel: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of the covariance's rows: the sum with the kernel for each image (B, N), over all images the mean and that of
    the squares (N).

    values: (B, P, N); gate: (B, P, 1); kernel: (N, N).
    """
    z = _centred(values if gate is None else values * gate)
    n = z.shape[0] * z.shape[2]
    if not _few_values(values):
        rows = _covariance(z)
        return (rows * kernel).sum(2), rows.sum((0, 2)) * (1 / n), (rows * rows).sum((0, 2)) * (1 / n)
    f = _factor(z)
    contracted = (z * F.linear(z, kernel)).sum(1) * f
    mean = (z * z.sum(2, keepdim=True)).sum((0, 1)) * (f / n)
    second = (z * torch.bmm(torch.bmm(z, z.transpose(1, 2)), z)).sum((0, 1)) * (f * f / n)
    return contracted, mean, second


def _backward(
    values: Tensor, gate: Tensor | None, kernel: Tensor, g: Tensor, g_mean: Tensor, g_second: Tensor
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The gradients of ``row_sums``, in as little fresh memory as they need."""
    z = _centred(values if gate is None else values * gate)
    f, n = _factor(z), z.shape[0] * z.shape[2]
    g_total, g_squares = g_mean * (1 / n), g_second * (2 / n)
    if not _few_values(values):
        rows = _covariance(z)
        g_kernel = torch.bmm(g.t().unsqueeze(1), rows.transpose(0, 1)).squeeze(1)
        to_rows = rows.mul_(g_squares.unsqueeze(1)).add_(g_total.unsqueeze(1))
        to_rows += g.unsqueeze(2) * kernel
        grad = torch.bmm(z, to_rows)
        grad = torch.baddbmm(grad, z, to_rows.transpose(1, 2), beta=f, alpha=f)
    else:
        along, g = F.linear(z, kernel), (g * f).unsqueeze(1)
        scaled = z * g
        g_kernel = scaled.flatten(0, 1).t() @ z.flatten(0, 1)
        grad = along.mul_(g).add_(scaled @ kernel)
        weights = g_squares * (f * f)
        torch.mul(z, weights, out=scaled)
        grad.baddbmm_(torch.bmm(scaled, z.transpose(1, 2)), z)
        grad.add_(torch.bmm(torch.bmm(z, z.transpose(1, 2)), z).mul_(weights))
        g_total *= f
        grad.add_(z.sum(2, keepdim=True) * g_total).add_((z @ g_total).unsqueeze(2))
    # All of it is linear in z, and so centred as z is: the way back through the centring changes nothing.
    if gate is None:
        return grad, None, g_kernel
    return grad * gate, (grad * values).sum(2, keepdim=True), g_kernel


def _few_values(values: Tensor) -> bool:
    return values.shape[1] < values.shape[2]


def _centred(values: Tensor) -> Tensor:
    """Sums are scaled behind, with the sign: the gradients of means and of differences are maps otherwise."""
    return values + values.sum(1, keepdim=True) * (-1 / values.shape[1])


def _factor(z: Tensor) -> float:
    return 1 / max(z.shape[2] - 1, 1)


def _covariance(z: Tensor) -> Tensor:
    """(B, P, N) -> (B, N, N), divided by N - 1. In fp32 the product needs no scaling, and keeps one factor."""
    return torch.baddbmm(z.new_zeros(()), z.transpose(1, 2), z, beta=0, alpha=_factor(z))
