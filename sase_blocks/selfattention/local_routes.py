"""Attention of each position to the k x k positions around it: one formula, four ways to compute it.

``torch_attention`` states the formula of Stand-Alone Self-Attention (Ramachandran et al. 2019). The terms in brackets
make it position-sensitive, as in Axial-DeepLab (Wang et al. 2020). There is no 1 / sqrt(d).
No route makes k * k copies of k and v, or sums the two tables into k x k vectors.

| route | what it does | takes part in |
|---|---|---|
| shifts | one shifted copy of the map after another; few products, many passes | everything |
| blocks | blocks of queries with a halo of keys, see ``local_blocks``: product, softmax, product | everything |
| recompute | the same in chunks; keeps only q, k, v and recomputes the weights in the backward | eager |
| triton | one fused pass over the maps, two backward; see ``local_triton`` (not run on a GPU yet) | eager, on CUDA |
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sase_blocks.numerics import narrow, widen

from .local_blocks import blocks, recomputed_blocks
from .routes import autocast_active, captured, exported
from .windows import SIDE, block_side

BORDERS = ('zero', 'mask')
TORCH_ROUTES = ('shifts', 'blocks', 'recompute')
LOCAL_ROUTES = (*TORCH_ROUTES, 'triton')


def shifts(q: Tensor, k: Tensor, v: Tensor, relative: Tensor, mask: bool) -> Tensor:
    """The route of that name, for arguments in fp32 or fp64. Shapes as in ``local_attention``."""
    height, width = q.shape[3], q.shape[4]
    size, half = relative.shape[3], q.shape[2] // 2
    halo = size // 2
    k, v = F.pad(k, (halo, halo, halo, halo)), F.pad(v, (halo, halo, halo, halo))
    q_row = torch.einsum('bhcyx,ck->kbhyx', q[:, :, :half], relative[0, 0])
    q_column = torch.einsum('bhcyx,ck->kbhyx', q[:, :, half:], relative[0, 1])
    if mask:
        position = torch.arange(size, device=q.device).unsqueeze(1) - halo
        row = position + torch.arange(height, device=q.device)
        column = position + torch.arange(width, device=q.device)
        q_row = q_row + ((row < 0) | (row >= height)).to(q.dtype).reshape(size, 1, 1, height, 1) * -1e30
        q_column = q_column + ((column < 0) | (column >= width)).to(q.dtype).reshape(size, 1, 1, 1, width) * -1e30
    sensitive = relative.shape[0] == 3
    k_row, k_column = q_row, q_column  # TorchScript needs them defined
    if sensitive:
        k_row = torch.einsum('bhcyx,ck->kbhyx', k[:, :, :half], relative[1, 0])
        k_column = torch.einsum('bhcyx,ck->kbhyx', k[:, :, half:], relative[1, 1])
    logits = []
    for a in range(size):
        for b in range(size):
            logit = (q * k[:, :, :, a : a + height, b : b + width]).sum(2) + q_row[a] + q_column[b]
            if sensitive:
                logit = logit + k_row[a, :, :, a : a + height, b : b + width]
                logit = logit + k_column[b, :, :, a : a + height, b : b + width]
            logits.append(logit)
    weights = torch.softmax(torch.stack(logits), 0)
    y = torch.zeros_like(q)
    for a in range(size):
        for b in range(size):
            y = y + weights[a * size + b].unsqueeze(2) * v[:, :, :, a : a + height, b : b + width]
    if sensitive:
        weights = weights.reshape(size, size, weights.shape[1], weights.shape[2], height, width)
        row = torch.einsum('kbhyx,ck->bhcyx', weights.sum(1), relative[2, 0])
        column = torch.einsum('kbhyx,ck->bhcyx', weights.sum(0), relative[2, 1])
        y = y + torch.cat([row, column], 2)
    return y


def run_local_route(q: Tensor, k: Tensor, v: Tensor, relative: Tensor, mask: bool, route: str, side: int) -> Tensor:
    """``torch_attention`` after its checks, outside autocast."""
    if route == 'auto' and relative.shape[3] <= 3:
        route = 'shifts'
    if not torch.jit.is_scripting():  # noqa: SIM102 - TorchScript skips code only under such a line
        if route == 'recompute':
            return recomputed_blocks(q, k, v, relative, mask, side)
    dtype, q, k, v, relative = q, widen(q), widen(k), widen(v), widen(relative)
    if route == 'shifts':
        return narrow(shifts(q, k, v, relative, mask), dtype)
    return narrow(blocks(q, k, v, relative, mask, side), dtype)


def torch_route(q: Tensor, k: Tensor, v: Tensor, relative: Tensor) -> str:
    """The fastest of torch's routes on a CPU in eager mode.

    Measured at 14, 28 and 56 with 8, 16 and 32 channels per head and k = 3, 5 and 7: shifts is fastest for small
    windows in the forward; with the backward, from 16 channels per head on, recompute is as fast and keeps less; below
    that, copying dominates the windows of keys. Nothing was measured on a GPU.
    """
    backward = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, relative))
    small = relative.shape[3] <= 3
    return 'shifts' if small and not (backward and q.shape[2] >= 16) else 'recompute'


def eager_route(q: Tensor, k: Tensor, v: Tensor, relative: Tensor, mask: bool) -> str:
    """On CUDA triton, if its kernels run and have passed their check. Else ``torch_route``."""
    if q.device.type == 'cuda':
        from .local_triton import trusted

        if trusted(q, k, v, relative, mask):
            return 'triton'
    return torch_route(q, k, v, relative)


def fused(q: Tensor, k: Tensor, v: Tensor, relative: Tensor, mask: bool) -> Tensor:
    """The route ``triton``, or a ValueError with the reason."""
    from .local_triton import fused_attention

    return fused_attention(q, k, v, relative, mask)


def check_local(q: Tensor, k: Tensor, v: Tensor, relative: Tensor, border: str) -> None:
    """Validate the arguments of ``local_attention`` besides the route."""
    if q.dim() != 5 or q.shape != k.shape or q.shape != v.shape:
        raise ValueError(f'q, k and v must have one shape (B, heads, d, H, W), got {q.shape}, {k.shape}, {v.shape}')
    if q.shape[3] < 1 or q.shape[4] < 1:
        raise ValueError(f'attention over an empty map: H and W must be at least 1, got {q.shape[3]} x {q.shape[4]}')
    size = relative.shape
    terms = len(size) == 4 and (size[0] == 1 or size[0] == 3) and size[1] == 2
    if not terms or 2 * size[2] != q.shape[2] or size[3] % 2 == 0:
        raise ValueError(f'relative must be (1 or 3, 2, d / 2, k), k odd, got {size} for q of shape {q.shape}')
    if border != 'zero' and border != 'mask':
        raise ValueError(f'border must be one of zero, mask, got {border}')


@torch.fx.wrap
def torch_attention(
    q: Tensor, k: Tensor, v: Tensor, relative: Tensor, border: str = 'zero', route: str | None = None
) -> Tensor:
    """The formula without Triton. Per head, for the query at (i, j) and the keys at (a, b) of its k x k window:

        logit = q_ij . (k_ab + r_q(a - i, b - j)) [+ k_ab . r_k(a - i, b - j)]
        y_ij = sum_ab softmax(logit) (v_ab [+ r_v(a - i, b - j)])

    The relative positions r are the concatenation of a row and a column table. q, k, v and the result are (B, heads, d,
    H, W), the tables (1 or 3, 2, d / 2, k). border and route: ``'zero'`` or ``'mask'``, and one of ``TORCH_ROUTES``.
    """
    forced = 'auto' if route is None else route
    check_local(q, k, v, relative, border)
    if forced != 'auto' and forced != 'shifts' and forced != 'blocks' and forced != 'recompute':
        raise ValueError(f'route must be one of shifts, blocks, recompute, got {forced}')
    if torch.jit.is_scripting():
        if forced == 'recompute':
            raise ValueError(
                "the route 'recompute' is an autograd function, which TorchScript cannot run; use 'blocks'"
            )
        side = block_side(q.shape[3], q.shape[4])
        return run_local_route(q, k, v, relative, border == 'mask', forced, side)
    else:
        graph = captured()
        if forced == 'auto' and graph and exported():
            forced = 'shifts'  # the numbers of blocks, which may be 1, would fix the exported sizes
        if forced == 'recompute' and graph:
            raise ValueError("the route 'recompute' is an autograd function and cannot be captured; use 'blocks'")
        if forced == 'auto' and not graph:
            forced = torch_route(q, k, v, relative)
        side = SIDE if graph else block_side(q.shape[3], q.shape[4])
        if autocast_active(q.device):
            with torch.autocast(q.device.type, enabled=False):
                return run_local_route(q, k, v, relative, border == 'mask', forced, side)
        return run_local_route(q, k, v, relative, border == 'mask', forced, side)


@torch.fx.wrap
def local_attention(
    q: Tensor, k: Tensor, v: Tensor, relative: Tensor, border: str = 'zero', route: str | None = None
) -> Tensor:
    """Attention of every position to the k x k positions around it, with relative positions.

    Products and the softmax run in fp32 for half inputs, under autocast too (triton multiplies half inputs directly and
    accumulates in fp32); the result has the dtype of q.

    Args:
        q, k, v: (B, heads, d, H, W), d even, any strides.
        relative: the tables (terms, 2, d / 2, k), shared by the heads. The terms are only the query's, or the query's,
            the key's and the value's. In each, [0] is for rows and the first half of d, [1] for columns and the second
            half. Entry k // 2 is offset 0; larger indices are further down or right.
        border: ``'zero'``: positions outside the map count, with k = v = 0 plus their relative terms, as with the
            paper's zero padding. ``'mask'``: they do not count.
        route: one of ``LOCAL_ROUTES``; None chooses: on CUDA triton, if its kernels run and agree with blocks in a
            check at the first use (``local_triton``); else recompute, or shifts for k up to 3 where it is faster
            (``eager_route``); under a compiler or TorchScript, blocks, and shifts for k up to 3; for an export shifts,
            since the number of blocks, which may be 1, would fix its sizes. recompute and triton have no forward-mode
            derivative.

    Returns:
        (B, heads, d, H, W).

    Raises:
        ValueError: mismatched shapes, an empty map, an unknown border or route, or ``'recompute'`` or ``'triton'``
            where it does not run.
    """
    forced = 'auto' if route is None else route
    if forced != 'auto' and forced != 'shifts' and forced != 'blocks' and forced != 'recompute' and forced != 'triton':
        raise ValueError(f'route must be one of shifts, blocks, recompute, triton, got {route}')
    if torch.jit.is_scripting():
        if forced == 'triton':
            raise ValueError("the route 'triton' is an autograd function, which TorchScript cannot run; use 'blocks'")
    else:
        graph = captured()
        if forced == 'triton' and graph:
            raise ValueError("the route 'triton' is an autograd function and cannot be captured; use 'blocks'")
        if forced == 'triton' or (forced == 'auto' and not graph and q.device.type == 'cuda'):
            check_local(q, k, v, relative, border)
            if forced == 'triton' or eager_route(q, k, v, relative, border == 'mask') == 'triton':
                if autocast_active(q.device):
                    with torch.autocast(q.device.type, enabled=False):
                        return fused(q, k, v, relative, border == 'mask')
                return fused(q, k, v, relative, border == 'mask')
    return torch_attention(q, k, v, relative, border, route)
