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
    norm, dtype = op.norm, op.row_weight.dtype
    ours = type(norm) is BatchNorm2d and norm.training and norm.track_running_stats and norm.momentum is not None
    if ours and values.shape[2] > 1 and not torch.compiler.is_compiling():
        weights = [w.to(values.dtype) for w in (op.row_weight, norm.weight, norm.bias)]
        with torch.autocast(values.device.type, enabled=False):
            q, mean, var = NormedRows.apply(values, gate, *weights, norm.eps)
        _move_statistics(norm, mean, var, q.numel())
        q = q.to(dtype)
    else:  # another norm (one over several processes), eval mode, a compiler's graph
        z = _centred(values if gate is None else values * gate)
        with torch.autocast(values.device.type, enabled=False):
            rows = _covariance(z)
        q = contract_rows(norm(rows.unsqueeze(3)).squeeze(3), op.row_weight)
    return op.fc(torch.relu(q))


def _move_statistics(norm: BatchNorm2d, mean: Tensor, var: Tensor, n: int) -> None:
    with torch.no_grad():
        norm.num_batches_tracked.add_(1)  # type: ignore[union-attr]
        for running, new in ((norm.running_mean, mean), (norm.running_var, var * (n / (n - 1)))):
            running.lerp_(new.to(running.dtype), norm.momentum)  # type: ignore[union-attr,arg-type]


class NormedRows(torch.autograd.Function):
    """The contraction of the normed covariance (B, N), and mean and variance of the norm, which have no gradient.

    Keeps its inputs and the sums; a second derivative goes through ``row_sums``.
    """

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, gate: Tensor | None, kernel: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, ...]:
        sums = row_sums(values, gate, kernel)
        q, mean, var = _normed(sums, kernel, weight, bias, eps)
        ctx.eps = eps
        ctx.save_for_backward(values, gate, kernel, weight, bias, *sums)
        ctx.mark_non_differentiable(mean, var)
        return q, mean, var

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Any:
        *inputs, contracted, mean, second = ctx.saved_tensors
        if torch.is_grad_enabled():
            tensors: list[Any] = [None if t is None else t.view_as(t) for t in inputs]
            wanted = [t for t, need in zip(tensors, ctx.needs_input_grad[:-1], strict=True) if need and t is not None]
            values, gate, kernel, weight, bias = tensors
            q = _normed(row_sums(values, gate, kernel), kernel, weight, bias, ctx.eps)[0]
            found = iter(torch.autograd.grad(q, wanted, grad, create_graph=True, allow_unused=True))
            return tuple(next(found) if need else None for need in ctx.needs_input_grad)
        values, gate, kernel, weight, bias = inputs
        with torch.autocast(grad.device.type, enabled=False):
            total, rate = kernel.sum(1), torch.rsqrt((second - mean * mean).clamp_min_(0) + ctx.eps)
            scale = weight * rate
            whole = grad.sum(0)
            of_bias = total * whole
            of_scale = (grad * contracted).sum(0) - mean * of_bias
            of_weight = of_scale * rate
            of_var = of_weight * scale * rate * -0.5
            of_mean = -scale * of_bias - 2 * mean * of_var
            of_total = (bias - scale * mean) * whole
            sums = _backward(values, gate, kernel, grad * scale, of_mean, of_var)
        return sums[0], sums[1], sums[2].add_(of_total.unsqueeze(1)), of_weight, of_bias, None


def _normed(
    sums: tuple[Tensor, Tensor, Tensor], kernel: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """From ``row_sums`` the contraction of the normed covariance (B, N), the mean and the variance of the norm (N)."""
    contracted, mean, second = sums
    var = (second - mean * mean).clamp_min(0)
    scale = weight * torch.rsqrt(var + eps)
    return contracted * scale + (bias - scale * mean) * kernel.sum(1), mean, var


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
        rows, g = _covariance(z), g.unsqueeze(2)
        step = rows * g
        g_kernel = step.sum(0)
        to_rows = rows.mul_(g_squares.unsqueeze(1)).add_(g_total.unsqueeze(1))
        to_rows += torch.mul(g, kernel, out=step)
        # Both factors of the covariance at once: a product with a transposed matrix takes twice as long.
        both = torch.add(to_rows, to_rows.transpose(1, 2), out=step)
        zero = z.new_zeros(())
        if z.is_contiguous():
            grad = torch.baddbmm(zero, z, both, beta=0, alpha=f)
        else:
            grad = torch.baddbmm(zero, both, z.transpose(1, 2), beta=0, alpha=f).transpose(1, 2)
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
    return 2 * values.shape[1] < values.shape[2]


def _centred(values: Tensor) -> Tensor:
    """Sums are scaled behind, with the sign: the gradients of means and of differences are maps otherwise."""
    return values + values.sum(1, keepdim=True) * (-1 / values.shape[1])


def _factor(z: Tensor) -> float:
    return 1 / max(z.shape[2] - 1, 1)


def _covariance(z: Tensor) -> Tensor:
    """(B, P, N) -> (B, N, N), divided by N - 1. In fp32 the product needs no scaling, and keeps one factor."""
    return torch.baddbmm(z.new_zeros(()), z.transpose(1, 2), z, beta=0, alpha=_factor(z))
