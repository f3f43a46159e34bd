"""Batch norm over the images of all processes, on CPUs and GPUs, with second derivatives. Not in the paper.

torch's SyncBatchNorm needs a GPU and has no second derivative, which an exact second-order search needs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from sase_blocks.ops import BatchNorm2d


def gather_processes(x: Tensor) -> Tensor:
    """``x`` of all processes, (processes, *x.shape), by one sum, which torch can differentiate twice."""
    from torch.distributed.nn.functional import all_reduce  # not in every build of torch

    world, rank = dist.get_world_size(), dist.get_rank()
    rows = [x if i == rank else torch.zeros_like(x) for i in range(world)]
    return all_reduce(torch.stack(rows))


def synchronized_batch_norm(x: Tensor, norm: Any) -> Tensor:
    """Batch norm in train mode with the statistics of all processes, which must have equally many images."""
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    var, mean = torch.var_mean(wide, (0, 2, 3), correction=0)
    means, variances = gather_processes(torch.stack([mean, var])).unbind(1)
    mean = means.mean(0)
    var = variances.mean(0) + (means - mean).square().mean(0)
    y = (wide - mean.reshape(1, -1, 1, 1)) * torch.rsqrt(var + norm.eps).reshape(1, -1, 1, 1)
    if norm.weight is not None:
        y = y * norm.weight.reshape(1, -1, 1, 1) + norm.bias.reshape(1, -1, 1, 1)
    with torch.no_grad():
        norm.num_batches_tracked.add_(1)
        momentum = 1.0 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
        n = wide.numel() // wide.shape[1] * dist.get_world_size()
        norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), momentum)
        norm.running_var.lerp_((var * n / max(n - 1, 1)).to(norm.running_var.dtype), momentum)
    return y.to(x.dtype)


class SynchronizedBatchNorm2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` with the statistics of all processes in train mode."""

    def forward(self, input: Tensor) -> Tensor:
        return synchronized_batch_norm(input, self) if self.training else super().forward(input)


class SynchronizedBatchNormAct2d(BatchNormAct2d):
    """timm's batch norm and activation with the statistics of all processes in train mode."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        return self.act(self.drop(synchronized_batch_norm(x, self)))


_SYNCHRONIZED: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm2d: SynchronizedBatchNorm2d,
    BatchNorm2d: SynchronizedBatchNorm2d,
    BatchNormAct2d: SynchronizedBatchNormAct2d,
}


def synchronize_norms(model: nn.Module) -> int:
    """Give all batch norms of ``model`` the statistics of all processes, in place. -> their number.

    No name or tensor changes. Raises ValueError for a batch norm of another class.
    """
    count = 0
    for name, module in model.named_modules():
        if type(module) in _SYNCHRONIZED:
            module.__class__ = _SYNCHRONIZED[type(module)]
            count += 1
        elif isinstance(module, nn.modules.batchnorm._BatchNorm) and type(module) not in _SYNCHRONIZED.values():
            raise ValueError(f'{name} is a {type(module).__name__}, which cannot be synchronised over processes')
    return count
