"""Operations on whole maps with gradients of their own, for eager mode.

A compiler fuses the steps of a formula. Without one, each step reads and writes the whole map, and autograd keeps what
it needs of each. Here, the backward pass is a formula of fewer steps, and only the inputs are kept. TorchScript,
compilers, exporters and forward-mode differentiation get the plain formula.
"""

from typing import Any

import torch
from torch import Tensor

from sase_blocks.numerics import widen


def with_gradients(gradients: Any) -> Any:
    """Decorator: in eager mode, ``gradients(*tensors, *results after the first, *grads)`` are those of the function.

    Both work out of place, so that ``vmap`` and gradients of gradients apply to them. ``gradients`` does not get the
    function's lists, but returns something for each of its arguments.
    """

    def decorate(plain: Any) -> Any:
        class Function(torch.autograd.Function):
            generate_vmap_rule = True
            forward = staticmethod(plain)

            @staticmethod
            def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
                tensors = [t for t in inputs if not isinstance(t, list)]
                ctx.save_for_backward(*tensors, *(output[1:] if isinstance(output, tuple) else ()))

            @staticmethod
            def backward(ctx: Any, *grads: Tensor) -> Any:
                return gradients(*ctx.saved_tensors, *grads)

        def function(*inputs: Any) -> Any:
            traced = torch.jit.is_tracing() or torch.compiler.is_compiling()
            forward_mode = torch.autograd.forward_ad._current_level >= 0
            return plain(*inputs) if traced or forward_mode else Function.apply(*inputs)

        function.__name__, function.__qualname__, function.__doc__ = plain.__name__, plain.__qualname__, plain.__doc__
        vars(function).update(__script_if_tracing_wrapper=True, __original_fn=plain)  # TorchScript compiles the latter
        return function

    return decorate


def _mean_max_gradients(x: Tensor, top: Tensor, of_mean: Tensor, of_top: Tensor) -> tuple[Tensor, None]:
    of_mean = of_mean * (top.numel() / max(1, x.numel()))
    cpu = x.device.type == 'cpu'  # where operations on bools are slow
    there = x.clone().eq_(top) if cpu else x == top
    of_top = of_top / there.sum_to_size(top.shape)
    return torch.addcmul(of_mean, there, of_top) if cpu else torch.where(there, of_mean + of_top, of_mean), None


@torch.fx.wrap
@with_gradients(_mean_max_gradients)
def mean_max(x: Tensor, dims: list[int]) -> tuple[Tensor, Tensor]:
    """Mean and maximum over ``dims``, which stay at size 1. Equal maxima share the gradient."""
    return x.mean(dims, keepdim=True), x.amax(dims, keepdim=True)


def _fourth_powers_gradients(x: Tensor, gate: Tensor | None, grad: Tensor) -> tuple[Tensor, Tensor | None]:
    cpu, dtype = x.device.type == 'cpu', x.dtype
    x = widen(x) if cpu or dtype == torch.float16 else x
    grad = (4 * grad).to(x.dtype)
    cube = x.pow(3) * grad
    if gate is None:
        return cube.to(dtype), None
    of_gate = (cube * x).sum((2, 3)) if cpu else (x.pow(4).flatten(2) @ grad.flatten(1)[:, :, None])[:, :, 0]
    return (cube * (widen(gate) ** 4).to(x.dtype)).to(dtype), of_gate[:, :, None, None] * widen(gate) ** 3


@torch.fx.wrap
@with_gradients(_fourth_powers_gradients)
def fourth_powers(x: Tensor, gate: Tensor | None) -> Tensor:
    """Sum over C of (gate * x)^4, in fp32 for half inputs. gate: (B, C, 1, 1) -> (B, 1, H, W).

    The fourth power fits bf16's range, so only its sum needs fp32. fp16 needs fp32 throughout.
    """
    y = widen(x) if x.device.type == 'cpu' or x.dtype == torch.float16 else x
    if torch.is_grad_enabled():  # by autograd, whose gradients of general powers are longer
        fourth = y.square().square()
        return widen(fourth if gate is None else fourth * widen(gate).square().square()).sum(1, keepdim=True)
    y = y if gate is None else y * gate.to(y.dtype)
    if x.device.type == 'cpu':  # where general powers are slow
        return y.square().square_().sum(1, keepdim=True)
    return torch.linalg.vector_norm(y, 4, [1], keepdim=True, dtype=torch.promote_types(y.dtype, torch.float32)) ** 4


def _times_sum_gradients(x: Tensor, a: Tensor, b: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    product = grad * x
    return times_sum(grad, a, b), product.sum_to_size(a.shape), product.sum_to_size(b.shape)


@torch.fx.wrap
@with_gradients(_times_sum_gradients)
def times_sum(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """x * (a + b), for two smaller ones that broadcast to x."""
    if x.stride(1) < x.stride(3):  # a sum in channels_last
        return x * (a.movedim(1, 3) + b.movedim(1, 3)).movedim(3, 1).to(x.dtype)
    return x * (a + b).to(x.dtype)
