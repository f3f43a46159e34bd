"""Attention of each position to the k x k positions around it: one formula, four ways to compute it.

The formula of Stand-Alone Self-Attention (Ramachandran et al. 2019), per head, for the query at (i, j) and the keys at
(a, b) of its window, with r the concatenation of a row and a column table:

    logit = q_ij . (k_ab + r_q(a - i, b - j)) [+ k_ab . r_k(a - i, b - j)]
    y_ij = sum_ab softmax(logit) (v_ab [+ r_v(a - i, b - j)])

The terms in brackets make it position-sensitive, as in Axial-DeepLab (Wang et al. 2020). There is no 1 / sqrt(d).
No route makes k * k copies of k and v, or sums the two tables into k x k vectors.

| route | what it does | takes part in |
|---|---|---|
| shifts | one shifted copy of the map after another; few products, many passes | everything |
| blocks | blocks of queries with a halo of keys: product, softmax, product | everything |
| recompute | the same in chunks; keeps only q, k, v and recomputes the weights in the backward | eager |
| triton | one fused pass over the maps, two backward; see ``local_triton`` (not run on a GPU yet) | eager, on CUDA |

In blocks, the table terms are products, too: the dot products of a query with the row and the column table, times ones
at each key's row and column. The same products mask keys outside the window or the map. Layouts are the fast ones for
batched products on a CPU: queries (N, Q, d), keys (N, d, K).
"""

import contextlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sase_blocks.numerics import narrow, widen

from .routes import autocast_active, captured, chunks, exported
from .windows import (
    SIDE,
    add_windows,
    block_side,
    join_blocks,
    key_windows,
    outside,
    query_blocks,
    window_offsets,
)

BORDERS = ('zero', 'mask')
LOCAL_ROUTES = ('shifts', 'blocks', 'recompute', 'triton')


def spread_tables(relative: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Each table entry at every (query row, key row) of a block that it applies to, and the mask for the others.

    relative: (terms, 2, d / 2, k) -> (terms, 2, d / 2, side, reach), and (side, reach) of 0 and -1e30.
    """
    offset, inside = window_offsets(side, relative.shape[3], relative.device)
    tables = relative[:, :, :, offset] * inside.to(relative.dtype)
    return tables, (~inside).to(relative.dtype) * -1e30


def one_hot_rows(side: int, like: Tensor) -> Tensor:
    """(2 * side, side * side): for every position of a square, a one at its row and a one at its column."""
    eye = torch.eye(side, dtype=like.dtype, device=like.device)
    rows = eye.unsqueeze(2).expand(side, side, side)
    columns = eye.unsqueeze(1).expand(side, side, side)
    return torch.cat([rows, columns]).reshape(2 * side, side * side)


def with_tables(x: Tensor, tables: Tensor) -> Tensor:
    """(N, Q, d) -> (N, side, side, 2 * reach): products of the halves of d with every row's and column's entries.

    tables: (2, d / 2, side, reach).
    """
    half, side = tables.shape[1], tables.shape[2]
    square = x.reshape(x.shape[0], side, side, 2 * half)
    row = torch.einsum('nyxc,cyu->nyxu', square[:, :, :, :half], tables[0])
    column = torch.einsum('nyxc,cxu->nyxu', square[:, :, :, half:], tables[1])
    return torch.cat([row, column], 3)


def from_tables(ends: Tensor, tables: Tensor) -> Tensor:
    """The transpose of ``with_tables``: (N, Q, 2 * reach) -> (N, Q, d)."""
    side, reach = tables.shape[2], tables.shape[3]
    square = ends.reshape(ends.shape[0], side, side, 2 * reach)
    row = torch.einsum('nyxu,cyu->nyxc', square[:, :, :, :reach], tables[0])
    column = torch.einsum('nyxu,cxu->nyxc', square[:, :, :, reach:], tables[1])
    return torch.cat([row, column], 3).reshape(ends.shape[0], side * side, 2 * tables.shape[1])


def add_tables_(total: Tensor, ends: Tensor, x: Tensor) -> None:
    """Add the gradient of the tables in ``with_tables(x, tables)`` to ``total``; ends: gradient of the result."""
    half, side, reach = total.shape[1], total.shape[2], total.shape[3]
    square = ends.reshape(ends.shape[0], side, side, 2 * reach)
    x = x.reshape(x.shape[0], side, side, 2 * half)
    total[0] += torch.einsum('nyxu,nyxc->cyu', square[:, :, :, :reach], x[:, :, :, :half])
    total[1] += torch.einsum('nyxu,nyxc->cxu', square[:, :, :, reach:], x[:, :, :, half:])


def keys_with_tables(k: Tensor, tables: Tensor) -> Tensor:
    """(N, d, K) -> (N, 2 * side, K): products of every key with the entries for each row and column of queries."""
    half, side, reach = tables.shape[1], tables.shape[2], tables.shape[3]
    window = k.reshape(k.shape[0], 2 * half, reach, reach)
    row = torch.einsum('ncuv,cyu->nyuv', window[:, :half], tables[0])
    column = torch.einsum('ncuv,cxv->nxuv', window[:, half:], tables[1])
    return torch.cat([row, column], 1).reshape(k.shape[0], 2 * side, reach * reach)


def attention_weights(
    q: Tensor, k: Tensor, tables: Tensor, far: Tensor, out_rows: Tensor, out_columns: Tensor
) -> Tensor:
    """(N, Q, K) for queries (N, Q, d) and keys (N, d, K).

    ``out_rows``, ``out_columns``: (rows, reach) and (columns, reach), -1e30 for keys that the border excludes.
    """
    side, reach = far.shape[0], far.shape[1]
    rows, columns = out_rows.shape[0], out_columns.shape[0]
    ends = with_tables(q, tables[0])
    ends = ends + torch.cat([far.unsqueeze(1).expand(side, side, reach), far.unsqueeze(0).expand(side, side, reach)], 2)
    border = [
        out_rows.unsqueeze(1).expand(rows, columns, reach),
        out_columns.unsqueeze(0).expand(rows, columns, reach),
    ]
    ends = ends.reshape(-1, rows, columns, side * side, 2 * reach) + torch.cat(border, 2).unsqueeze(2)
    logits = torch.matmul(ends.reshape(-1, side * side, 2 * reach), one_hot_rows(reach, k))
    logits.baddbmm_(q, k)
    if tables.shape[0] == 3:
        ones = one_hot_rows(side, q).transpose(0, 1).expand(q.shape[0], side * side, 2 * side)
        logits.baddbmm_(ones, keys_with_tables(k, tables[1]))
    return torch.softmax(logits, 2)


def excluded(height: int, width: int, side: int, relative: Tensor, mask: bool) -> tuple[Tensor, Tensor]:
    """The terms to add for rows and columns of keys outside the map: 0 or -1e30."""
    factor = -1e30 if mask else 0.0
    rows = outside(height, side, relative.shape[3], relative.device).to(relative.dtype) * factor
    columns = outside(width, side, relative.shape[3], relative.device).to(relative.dtype) * factor
    return rows, columns


def blocks(q: Tensor, k: Tensor, v: Tensor, relative: Tensor, mask: bool, side: int) -> Tensor:
    """The route of that name, for arguments in fp32 or fp64. Shapes as in ``local_attention``."""
    b, h, _, height, width = q.shape
    size = relative.shape[3]
    tables, far = spread_tables(relative, side)
    out_rows, out_columns = excluded(height, width, side, relative, mask)
    values = key_windows(v, side, size)
    weights = attention_weights(query_blocks(q, side), key_windows(k, side, size), tables, far, out_rows, out_columns)
    y = torch.bmm(weights, values.transpose(1, 2))
    if tables.shape[0] == 3:  # add the table terms of the values, by rows and by columns
        sums = torch.matmul(weights, one_hot_rows(far.shape[1], v).transpose(0, 1))
        y = y + from_tables(sums, tables[2])
    return join_blocks(y, b, h, height, width, side)


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


class Recompute(torch.autograd.Function):
    """``blocks`` that keeps only its inputs, in their own dtype; second derivatives go through ``blocks``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, relative: Tensor, mask: bool, side: int) -> Tensor:
        y = torch.empty_like(q)
        table = widen(relative)
        for i, j in chunks(q.shape[0], q.shape[1], numbers_per_head(q, relative, side), q):
            part = blocks(widen(q[i, j]), widen(k[i, j]), widen(v[i, j]), table, mask, side)
            y[i, j] = narrow(part, q)
        return y

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        q, k, v, relative, ctx.mask, ctx.side = inputs
        ctx.save_for_backward(q, k, v, relative)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        q, k, v, relative = saved = ctx.saved_tensors
        if torch.is_grad_enabled():
            return (*gradients_of_blocks(saved, grad, ctx.needs_input_grad, ctx.mask), None, None)
        if autocast_active(grad.device):
            with torch.autocast(grad.device.type, enabled=False):
                return (*gradients(q, k, v, relative, grad, ctx.mask, ctx.side), None, None)
        return (*gradients(q, k, v, relative, grad, ctx.mask, ctx.side), None, None)


def gradients_of_blocks(
    inputs: Sequence[Tensor], grad: Tensor, needed: Sequence[bool], mask: bool
) -> list[Tensor | None]:
    """The needed gradients of q, k, v and the tables, with a graph for second derivatives."""
    q, k, v, relative = (widen(x) for x in inputs)
    with torch.autocast(grad.device.type, enabled=False) if autocast_active(grad.device) else contextlib.nullcontext():
        y = narrow(blocks(q, k, v, relative, mask, block_side(q.shape[3], q.shape[4])), inputs[0])
        wanted = [x for x, wants in zip(inputs, needed, strict=False) if wants]
        found = iter(torch.autograd.grad(y, wanted, grad, create_graph=True))
    return [next(found) if wants else None for wants in needed[:4]]


def numbers_per_head(q: Tensor, relative: Tensor, side: int) -> int:
    """Number of weights that ``blocks`` computes for one head of one image."""
    height, width = q.shape[3], q.shape[4]
    count = ((height + side - 1) // side) * ((width + side - 1) // side)
    return count * side**2 * (side + relative.shape[3] - 1) ** 2


def gradients(
    q: Tensor, k: Tensor, v: Tensor, relative: Tensor, grad: Tensor, mask: bool, side: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the tables, chunk by chunk, from the inputs only."""
    height, width, kernel_size = q.shape[3], q.shape[4], relative.shape[3]
    table = widen(relative)
    tables, far = spread_tables(table, side)
    border = excluded(height, width, side, table, mask)
    reach = far.shape[1]
    ones = one_hot_rows(reach, table)
    gq, gk, gv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    g_tables = torch.zeros_like(tables)
    for i, j in chunks(q.shape[0], q.shape[1], numbers_per_head(q, relative, side), q):
        size = (len(range(*i.indices(q.shape[0]))), len(range(*j.indices(q.shape[1]))), height, width, side)
        qb, gb = query_blocks(widen(q[i, j]), side), query_blocks(widen(grad[i, j]), side)
        kb = key_windows(widen(k[i, j]), side, kernel_size)
        vb = key_windows(widen(v[i, j]), side, kernel_size)
        weights = attention_weights(qb, kb, tables, far, *border)
        gv[i, j] = narrow(add_windows(torch.bmm(gb.transpose(1, 2), weights), *size, kernel_size), v)
        g_weights = torch.bmm(gb, vb)
        if tables.shape[0] == 3:
            add_tables_(g_tables[2], torch.matmul(weights, ones.transpose(0, 1)), gb)
            g_weights += torch.matmul(with_tables(gb, tables[2]).flatten(1, 2), ones)
        g_logits = torch._softmax_backward_data(g_weights, weights, 2, weights.dtype)
        del weights, g_weights, vb
        ends = torch.matmul(g_logits, ones.transpose(0, 1))
        add_tables_(g_tables[0], ends, qb)
        g_queries = torch.bmm(g_logits, kb.transpose(1, 2)) + from_tables(ends, tables[0])
        gq[i, j] = narrow(join_blocks(g_queries, *size), q)
        g_keys = torch.bmm(qb.transpose(1, 2), g_logits)
        if tables.shape[0] == 3:
            half = tables.shape[2]
            window = kb.reshape(-1, 2 * half, reach, reach)
            ends = torch.matmul(one_hot_rows(side, qb), g_logits).reshape(-1, 2 * side, reach, reach)
            row, column = ends[:, :side], ends[:, side:]
            g_tables[1, 0] += torch.einsum('nyuv,ncuv->cyu', row, window[:, :half])
            g_tables[1, 1] += torch.einsum('nxuv,ncuv->cxv', column, window[:, half:])
            row = torch.einsum('nyuv,cyu->ncuv', row, tables[1, 0])
            column = torch.einsum('nxuv,cxv->ncuv', column, tables[1, 1])
            g_keys += torch.cat([row, column], 1).flatten(2)
        gk[i, j] = narrow(add_windows(g_keys, *size, kernel_size), k)
    offset, inside = window_offsets(side, kernel_size, q.device)
    g_relative = torch.zeros_like(table)
    g_relative.index_add_(3, offset.flatten(), (g_tables * inside).flatten(3))
    return gq, gk, gv, narrow(g_relative, relative)


def recomputed(q: Tensor, k: Tensor, v: Tensor, relative: Tensor, mask: bool, side: int) -> Tensor:
    """The route ``recompute``. (A function of its own: TorchScript reads every comment about types.)"""
    y: Tensor = Recompute.apply(q, k, v, relative, mask, side)
    return y


def fused(q: Tensor, k: Tensor, v: Tensor, relative: Tensor, mask: bool) -> Tensor:
    """The route ``triton``, or a ValueError with the reason."""
    from .local_triton import fused_attention

    return fused_attention(q, k, v, relative, mask)


def run_route(q: Tensor, k: Tensor, v: Tensor, relative: Tensor, mask: bool, route: str, side: int) -> Tensor:
    """``local_attention`` after its checks, outside autocast."""
    if route == 'auto' and relative.shape[3] <= 3:
        route = 'shifts'
    if not torch.jit.is_scripting():  # TorchScript skips code only under such a line
        if route == 'recompute':
            return recomputed(q, k, v, relative, mask, side)
        if route == 'triton':
            return fused(q, k, v, relative, mask)
    dtype, q, k, v, relative = q, widen(q), widen(k), widen(v), widen(relative)
    if route == 'shifts':
        return narrow(shifts(q, k, v, relative, mask), dtype)
    return narrow(blocks(q, k, v, relative, mask, side), dtype)


def eager_route(q: Tensor, k: Tensor, v: Tensor, relative: Tensor, mask: bool) -> str:
    """On CUDA triton, if its kernels run and have passed their check. Else the fastest route on a CPU.

    Measured at 14, 28 and 56 with 8, 16 and 32 channels per head and k = 3, 5 and 7: shifts is fastest for small
    windows in the forward; with the backward, from 16 channels per head on, recompute is as fast and keeps less; below
    that, copying dominates the windows of keys. Nothing was measured on a GPU.
    """
    if q.device.type == 'cuda':
        from .local_triton import trusted

        if trusted(q, k, v, relative, mask):
            return 'triton'
    backward = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, relative))
    small = relative.shape[3] <= 3
    return 'shifts' if small and not (backward and q.shape[2] >= 16) else 'recompute'


def check_local(q: Tensor, k: Tensor, v: Tensor, relative: Tensor, border: str, route: str) -> None:
    """Validate the arguments of ``local_attention``."""
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
    if route != 'auto' and route != 'shifts' and route != 'blocks' and route != 'recompute' and route != 'triton':
        raise ValueError(f'route must be one of shifts, blocks, recompute, triton, got {route}')


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
    check_local(q, k, v, relative, border, forced)
    if torch.jit.is_scripting():
        if forced == 'recompute' or forced == 'triton':
            raise ValueError(
                f"the route '{forced}' is an autograd function, which TorchScript cannot run; use 'blocks'"
            )
        side = block_side(q.shape[3], q.shape[4])
        return run_route(q, k, v, relative, border == 'mask', forced, side)
    else:
        graph = captured()
        if forced == 'auto' and graph and exported():
            forced = 'shifts'  # the numbers of blocks, which may be 1, would fix the exported sizes
        if (forced == 'recompute' or forced == 'triton') and graph:
            raise ValueError(f"the route '{forced}' is an autograd function and cannot be captured; use 'blocks'")
        if forced == 'auto' and not graph:
            forced = eager_route(q, k, v, relative, border == 'mask')
        side = SIDE if graph else block_side(q.shape[3], q.shape[4])
        if autocast_active(q.device):
            with torch.autocast(q.device.type, enabled=False):
                return run_route(q, k, v, relative, border == 'mask', forced, side)
        return run_route(q, k, v, relative, border == 'mask', forced, side)
