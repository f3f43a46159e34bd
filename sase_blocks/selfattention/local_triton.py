"""The route ``triton`` of local self-attention: its conditions, its autograd function, and its check.

One fused pass forward and two backward (``local_triton_forward``, ``local_triton_backward``), for eager mode on CUDA.
They read q, k and v in place, in NCHW or channels_last, and write neither values per query-key pair nor copies of
windows to memory. The backward keeps q, k, v, y, the tables and one fp32 number per query and head. Half inputs are
multiplied on the tensor cores and accumulated in fp32; the weights and the gradients of the logits are rounded to the
input dtype before their second product, as in FlashAttention. All else, including the table terms, runs in fp32, and
fp32 inputs are never rounded to tf32.

The kernels were written without a GPU: they were tested in Triton's interpreter and compiled for sm_80 and sm_90, and
have not run on a GPU. So the route is checked before use: the first time that None would choose it, for each device,
dtype, d, k, number of terms and border, the kernels are compared with ``blocks`` in float64 on a small input. If they
differ or fail, a warning says so and the other routes are used.
"""

import functools
import importlib
import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from .local_blocks import blocks, gradients_of_blocks

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Wider heads would need other tile shapes: 64 positions by 32 keys, and by 64 channels, fill the registers.
LARGEST_WINDOW, LARGEST_HEAD = 25, 64
# Heads, height and width of the check's input: four tiles, three of which extend beyond the map.
CHECKED = (2, 11, 9)
# ||a - b|| / ||b||. In fp32 the agreement of the routes; in half several roundings of the result, far below the error
# of a wrong index or a missing term.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class Fused(torch.autograd.Function):
    """Keeps q, k, v, the tables, y and the log of the sums; second derivatives go through ``blocks``."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, relative: Tensor, mask: bool) -> tuple[Tensor, Tensor]:
        from .local_triton_forward import forward

        return forward(q, k, v, relative, mask)

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        q, k, v, relative, ctx.mask = inputs
        ctx.save_for_backward(q, k, v, relative, *output)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx, grad, _):  # type: ignore[no-untyped-def]
        from .local_triton_backward import backward

        q, k, v, relative, y, lse = ctx.saved_tensors
        if torch.is_grad_enabled():
            return (*gradients_of_blocks((q, k, v, relative), grad, ctx.needs_input_grad, ctx.mask), None)
        return (*backward(q, k, v, relative, y, lse, grad, ctx.mask), None)


@functools.cache
def kernels() -> Any:
    """The forward kernel's module, or a string that says why Triton does not work here."""
    try:
        return importlib.import_module('.local_triton_forward', __package__)
    except Exception as error:  # missing (macOS, Windows, CPU wheels), or an unsupported driver
        return f'{type(error).__name__}: {error}'


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device; (0, 0) for AMD, for which nothing was compiled."""
    return (0, 0) if torch.version.hip is not None else torch.cuda.get_device_capability(device)


def refusal(q: Tensor, k: Tensor, v: Tensor, relative: Tensor) -> str | None:
    """The reason why the kernels cannot run on these arguments, or None."""
    inputs = (q, k, v, relative)
    dtypes, devices = {x.dtype for x in (q, k, v)}, {x.device for x in inputs}
    if len(devices) > 1 or len(dtypes) > 1 or q.dtype not in DTYPES or relative.dtype not in DTYPES:
        return 'it takes maps of one dtype, float32, float16 or bfloat16, on one device'
    if q.device.type == 'cuda' and capability(q.device) < (8, 0):
        return 'it needs an NVIDIA GPU of compute capability 8.0 or newer'
    if q.device.type != 'cuda' and q.device.type != 'cpu':
        return 'it runs on CUDA'
    if relative.shape[3] > LARGEST_WINDOW or q.shape[2] > LARGEST_HEAD:
        return f'it takes windows up to {LARGEST_WINDOW} and up to {LARGEST_HEAD} channels per head'
    if any(sum((n - 1) * s for n, s in zip(x.shape[2:], x.stride()[2:], strict=True)) >= 2**31 for x in (q, k, v)):
        return 'one image spans 2**31 elements or more'
    if any(type(x) not in (Tensor, nn.Parameter) for x in inputs) or torch._C._are_functorch_transforms_active():
        return 'it takes plain tensors, not subclasses, and not inside a torch.func transform'
    found = kernels()
    if isinstance(found, str):
        return f'Triton cannot be imported ({found})'
    if q.device.type == 'cpu' and not found.INTERPRETED:
        return "it runs on CUDA, and on a CPU only in Triton's interpreter (TRITON_INTERPRET=1)"
    return None


def fused_attention(q: Tensor, k: Tensor, v: Tensor, relative: Tensor, mask: bool) -> Tensor:
    """The route ``triton``, or a ValueError if it cannot run."""
    reason = refusal(q, k, v, relative)
    if reason is not None:
        raise ValueError(
            f"the route 'triton' cannot run: {reason}; got {q.dtype}, {k.dtype}, {v.dtype} on {q.device}, tables "
            f'{relative.dtype} on {relative.device}, d = {q.shape[2]}, k = {relative.shape[3]}'
        )
    y: Tensor = Fused.apply(q, k, v, relative, mask)[0]
    return y


# ------------------------------------------------------------------------------------------------------- the check


_passed: dict[tuple[Any, ...], bool] = {}


def trusted(q: Tensor, k: Tensor, v: Tensor, relative: Tensor, mask: bool) -> bool:
    """Whether None may choose the route: it runs, and passed its check against ``blocks``, done once per kind."""
    if refusal(q, k, v, relative) is not None:
        return False
    near = q.stride(4) == 1  # NCHW or channels_last: Triton compiles another kernel
    kind = (q.device, q.dtype, relative.dtype, q.shape[2], relative.shape[3], relative.shape[0], mask, near)
    if kind not in _passed:
        if q.device.type == 'cuda' and torch.cuda.is_current_stream_capturing():
            return False  # nothing may be read back while a CUDA graph is captured
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(q.device.type, enabled=False):
            fault = difference(*kind)
        _passed[kind] = fault is None
        if fault is not None:
            warnings.warn(
                f'the Triton route of local self-attention is not used for {q.dtype}, d = {q.shape[2]}, '
                f'k = {relative.shape[3]}, {relative.shape[0]} terms on {q.device}: it failed its check '
                f'against the route blocks: {fault}',
                RuntimeWarning,
                stacklevel=2,
            )
    return _passed[kind]


def difference(
    device: torch.device, dtype: torch.dtype, table_dtype: torch.dtype, d: int, size: int, terms: int, mask: bool,
    near: bool,
) -> str | None:  # fmt: skip
    """The error in the kernels' result or gradients on a small input, or None.

    The reference is computed on the CPU.
    """
    generator = torch.Generator('cpu').manual_seed(0)  # leaves the global state unchanged

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device='cpu', dtype=torch.float64)

    heads, height, width = CHECKED
    if near:
        maps = [draw(1, d, heads, height, width).div(d**0.25).transpose(1, 2) for _ in range(4)]
    else:
        maps = [draw(1, height, width, d, heads).div(d**0.25).permute(0, 4, 3, 1, 2) for _ in range(4)]
    q, k, v, dy = (x.to(device, dtype) for x in maps)
    relative = draw(terms, 2, d // 2, size).div(d**0.25).to(device, table_dtype)
    try:
        from .local_triton_backward import backward
        from .local_triton_forward import forward

        y, lse = forward(q, k, v, relative, mask)
        found = [y, *backward(q, k, v, relative, y, lse, dy, mask)]
        found = [x.detach().cpu().double() for x in found]
    except Exception as error:  # from the compiler, the driver or the launch
        return f'{type(error).__name__}: {error}'.splitlines()[0]
    q, k, v, relative = inputs = [x.cpu().double().requires_grad_() for x in (q, k, v, relative)]
    result = blocks(q, k, v, relative, mask, 4)
    expected = [result.detach(), *torch.autograd.grad(result, inputs, dy.cpu().double())]
    names = 'the result', *(f'the gradient of {x}' for x in ('q', 'k', 'v', 'the tables'))
    for name, a, b in zip(names, found, expected, strict=True):
        # For k = 1 there is one weight, and the gradients through it are 0.
        distance = float((a - b).norm() / b.norm().clamp_min(0.1 * math.sqrt(b.numel())))
        if not distance <= TOLERANCE[dtype]:  # false for NaN
            return f'{name} differs by {distance:.1e} of its norm, where {TOLERANCE[dtype]:.0e} is allowed'
    return None
