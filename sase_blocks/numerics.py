"""Arithmetic that is safe in half precision: to fp32 and back, saturation, and a root with a finite gradient."""

import torch
from torch import Tensor


def widen(x: Tensor) -> Tensor:
    """fp16 and bf16 to fp32, where powers of activations fit. Other dtypes are unchanged."""
    return x.float() if x.dtype == torch.float16 or x.dtype == torch.bfloat16 else x


@torch.fx.wrap
def narrow(y: Tensor, like: Tensor) -> Tensor:
    """``y`` in the dtype of ``like``. Values beyond fp16 saturate, because a later inf - inf would be NaN."""
    y = y.clamp(-65504.0, 65504.0) if like.dtype == torch.float16 else y
    return y.to(like.dtype)


def safe_sqrt(y: Tensor) -> Tensor:
    """sqrt with a finite gradient at 0, for ``y`` whose own gradient vanishes there."""
    return torch.sqrt(y + 1e-30)  # a normal number in fp32 and bf16
