"""The routes ``blocks`` and ``recompute`` of local self-attention: blocks of queries, each with a halo of keys.

The table terms are products, too: the dot products of a query with the row and the column table, times ones at each
key's row and column. The same products mask keys outside the window or the map. Layouts are the fast ones for batched
products on a CPU: queries (N, Q, d), keys (N, d, K).
"""

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor

from sase_blocks.numerics import narrow, widen

from .routes import autocast_active, chunks
from .windows import add_windows, block_side, join_blocks, key_windows, outside, query_blocks, window_offsets


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


class RecomputedBlocks(torch.autograd.Function):
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
                return (*block_gradients(q, k, v, relative, grad, ctx.mask, ctx.side), None, None)
        return (*block_gradients(q, k, v, relative, grad, ctx.mask, ctx.side), None, None)


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


def block_gradients(
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


def recomputed_blocks(q: Tensor, k: Tensor, v: Tensor, relative: Tensor, mask: bool, side: int) -> Tensor:
    """The route ``recompute``. (A function of its own: TorchScript reads every comment about types.)"""
    y: Tensor = RecomputedBlocks.apply(q, k, v, relative, mask, side)
    return y
