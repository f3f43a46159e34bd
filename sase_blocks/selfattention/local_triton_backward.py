"""The backward of local self-attention in Triton, from q, k, v, y and one number per query, as in FlashAttention.

Two kernels recompute the weights. One, by tiles of queries, gives the gradients of q and of the tables on q and v; the
other, by tiles of keys, those of k, v and the table on k. Each value is written by exactly one program, so the result
is deterministic; each program writes its part of the tables' gradients, and torch sums the parts.

``local_triton_forward`` defines own, others and offsets; it needs Triton, as does this file.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .local_triton_forward import (
    CHANNELS_BACKWARD,
    constants,
    from_tables,
    load_row,
    narrow,
    on_device,
    other_terms,
    own_terms,
    pick,
    place,
    product,
    programs,
    put,
    tile_offsets,
    window,
)


@triton.jit
def through_softmax(weights, gradient, sums, K: tl.constexpr):
    """The gradient of the logits. For a single key it is 0; the difference would be rounding error."""
    if K == 1:
        result = weights * 0.0
    else:
        result = weights * (gradient - sums)
    return result


@triton.jit
def store_table_gradient(
    part, x, rows, columns, row_offset, column_offset, DIM: tl.constexpr, D: tl.constexpr, K: tl.constexpr
):
    """The transpose of ``own_terms`` with respect to the table: this program's part."""
    channel = tl.arange(0, D)
    first = (channel < DIM // 2)[None, :]
    for o in range(K):
        row = tl.sum(tl.where(row_offset == o, rows, 0.0), 1)
        column = tl.sum(tl.where(column_offset == o, columns, 0.0), 1)
        both = tl.sum(tl.where(first, row[:, None], column[:, None]) * x, 0)
        tl.store(part + channel * K + o, both, mask=channel < DIM)


@triton.jit(do_not_specialize=['height', 'width'])
def query_kernel(
    q, k, v, relative, y, dy, lse, delta, dq, parts, heads, height, width,
    q_b, q_h, q_c, q_y, q_x, k_b, k_h, k_c, k_y, k_x, v_b, v_h, v_c, v_y, v_x, y_b, y_h, y_c, y_y, y_x,
    dy_b, dy_h, dy_c, dy_y, dy_x, dq_b, dq_h, dq_c, dq_y, dq_x,
    TERMS: tl.constexpr, MASK: tl.constexpr, DIM: tl.constexpr, D: tl.constexpr, K: tl.constexpr,
    WIDE: tl.constexpr, HALF: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    """For one tile of queries: the gradient of q, its part of the gradients of the tables on q and v, and dy . y."""
    dtype: tl.constexpr = dq.dtype.element_ty
    halo: tl.constexpr = K // 2
    image, head, top, left = place(heads, height, width, SIDE)
    q += image * q_b + head * q_h
    k += image * k_b + head * k_h
    v += image * v_b + head * v_h
    y += image * y_b + head * y_h
    dy += image * dy_b + head * dy_h
    dq += image * dq_b + head * dq_h
    plane = (image * heads + head) * height * width
    parts += tl.program_id(0).to(tl.int64) * (TERMS * DIM * K)

    own, other = tl.arange(0, SIDE * SIDE)[:, None], tl.arange(0, WIDE)[None, :]
    row_offset, column_offset = other - own // SIDE, other - own % SIDE
    offset, exists = tile_offsets(top, left, height, width, q_c, q_y, q_x, DIM, D, SIDE)
    queries = tl.load(q + offset, mask=exists, other=0.0)
    offset, exists = tile_offsets(top, left, height, width, y_c, y_y, y_x, DIM, D, SIDE)
    results = tl.load(y + offset, mask=exists, other=0.0).to(tl.float32)
    offset, exists = tile_offsets(top, left, height, width, dy_c, dy_y, dy_x, DIM, D, SIDE)
    upstream = tl.load(dy + offset, mask=exists, other=0.0)
    # The softmax gradient needs the sum over the keys of weight * its gradient, which is dy . y.
    sums = tl.sum(results * upstream.to(tl.float32), 1)
    flat = tl.arange(0, SIDE * SIDE)
    row, column = top + flat // SIDE, left + flat % SIDE
    inside = (row < height) & (column < width)
    tl.store(delta + plane + row * width + column, sums, mask=inside)
    # Outside the map inf, which makes the weights 0.
    total = tl.load(lse + plane + row * width + column, mask=inside, other=float('inf'))[:, None]

    rows, columns = own_terms(queries.to(tl.float32), relative, row_offset, column_offset, DIM, D, K)
    rows += window(row_offset, K)
    columns += window(column_offset, K)
    first, last = 0, tl.minimum(SIDE, height - top) + K - 1
    if MASK:
        key_column = left - halo + other
        columns = tl.where((key_column >= 0) & (key_column < width), columns, float('-inf'))
        first, last = tl.maximum(0, halo - top), tl.minimum(last, height - top + halo)
    if TERMS == 3:
        side = tl.arange(0, SIDE)[:, None]
        table = relative + 2 * DIM * K
        value_rows, value_columns = own_terms(upstream.to(tl.float32), table, row_offset, column_offset, DIM, D, K)
        row_weights = tl.zeros((SIDE * SIDE, WIDE), tl.float32)
        column_weights = tl.zeros((SIDE * SIDE, WIDE), tl.float32)

    result = tl.zeros((SIDE * SIDE, D), tl.float32)
    row_sums = tl.zeros((SIDE * SIDE, WIDE), tl.float32)
    column_sums = tl.zeros((SIDE * SIDE, WIDE), tl.float32)
    for u in range(first, last):
        keys = load_row(k, top - halo + u, left - halo, height, width, k_c, k_y, k_x, DIM, D, WIDE)
        values = load_row(v, top - halo + u, left - halo, height, width, v_c, v_y, v_x, DIM, D, WIDE)
        logits = product(queries, tl.trans(keys)) + columns + pick(rows, u)
        gradient = product(upstream, tl.trans(values))
        if TERMS == 3:
            logits += other_terms(keys, relative + DIM * K, u - side, other - side, DIM, D, K, HALF, SIDE)
            gradient += value_columns + pick(value_rows, u)
        weights = tl.exp(logits - total)
        gradient = through_softmax(weights, gradient, sums[:, None], K)
        result += product(narrow(gradient, dtype), keys)
        row_sums += put(gradient, u)
        column_sums += gradient
        if TERMS == 3:
            row_weights += put(weights, u)
            column_weights += weights
    result += from_tables(row_sums, column_sums, relative, row_offset, column_offset, DIM, D, K)
    offset, exists = tile_offsets(top, left, height, width, dq_c, dq_y, dq_x, DIM, D, SIDE)
    tl.store(dq + offset, narrow(result, dtype), mask=exists)
    store_table_gradient(parts, queries.to(tl.float32), row_sums, column_sums, row_offset, column_offset, DIM, D, K)
    if TERMS == 3:
        store_table_gradient(
            parts + 2 * DIM * K, upstream.to(tl.float32), row_weights, column_weights,
            row_offset, column_offset, DIM, D, K,
        )  # fmt: skip


@triton.jit(do_not_specialize=['height', 'width'])
def key_kernel(
    q, k, v, relative, dy, lse, delta, dk, dv, parts, heads, height, width,
    q_b, q_h, q_c, q_y, q_x, k_b, k_h, k_c, k_y, k_x, v_b, v_h, v_c, v_y, v_x, dy_b, dy_h, dy_c, dy_y, dy_x,
    dk_b, dk_h, dk_c, dk_y, dk_x, dv_b, dv_h, dv_c, dv_y, dv_x,
    TERMS: tl.constexpr, DIM: tl.constexpr, D: tl.constexpr, K: tl.constexpr,
    WIDE: tl.constexpr, HALF: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    """For one tile of keys: the gradients of k and v, and its part of the gradient of the table on k.

    The others are queries, so offsets are reversed and every matrix is the transpose of the one in ``query_kernel``.
    The border does not matter: keys and queries outside the map get no weight here.
    """
    dtype: tl.constexpr = dk.dtype.element_ty
    halo: tl.constexpr = K // 2
    image, head, top, left = place(heads, height, width, SIDE)
    q += image * q_b + head * q_h
    k += image * k_b + head * k_h
    v += image * v_b + head * v_h
    dy += image * dy_b + head * dy_h
    dk += image * dk_b + head * dk_h
    dv += image * dv_b + head * dv_h
    plane = (image * heads + head) * height * width

    own, other = tl.arange(0, SIDE * SIDE)[:, None], tl.arange(0, WIDE)[None, :]
    row_offset, column_offset = own // SIDE - other + K - 1, own % SIDE - other + K - 1
    offset, exists = tile_offsets(top, left, height, width, k_c, k_y, k_x, DIM, D, SIDE)
    keys = tl.load(k + offset, mask=exists, other=0.0)
    offset, exists = tile_offsets(top, left, height, width, v_c, v_y, v_x, DIM, D, SIDE)
    values = tl.load(v + offset, mask=exists, other=0.0)
    rows, columns = window(row_offset, K), window(column_offset, K)
    columns = tl.where((top + own // SIDE < height) & (left + own % SIDE < width), columns, float('-inf'))
    side = tl.arange(0, SIDE)[:, None]
    if TERMS == 3:
        key_rows, key_columns = own_terms(keys.to(tl.float32), relative + DIM * K, row_offset, column_offset, DIM, D, K)
        rows += key_rows
        columns += key_columns
        row_sums = tl.zeros((SIDE * SIDE, WIDE), tl.float32)
        column_sums = tl.zeros((SIDE * SIDE, WIDE), tl.float32)

    key_result = tl.zeros((SIDE * SIDE, D), tl.float32)
    value_result = tl.zeros((SIDE * SIDE, D), tl.float32)
    query_column = left - halo + tl.arange(0, WIDE)
    for u in range(tl.maximum(0, halo - top), tl.minimum(SIDE + K - 1, height - top + halo)):
        query_row = top - halo + u
        queries = load_row(q, query_row, left - halo, height, width, q_c, q_y, q_x, DIM, D, WIDE)
        upstream = load_row(dy, query_row, left - halo, height, width, dy_c, dy_y, dy_x, DIM, D, WIDE)
        inside = (query_column >= 0) & (query_column < width)
        flat = plane + query_row * width + query_column
        # Outside the map inf, which makes the weights 0. (Uses where: Triton 3.2 can prefetch only with other=0.)
        total = tl.where(inside, tl.load(lse + flat, mask=inside, other=0.0), float('inf'))[None, :]
        sums = tl.load(delta + flat, mask=inside, other=0.0)[None, :]
        row, column = side - u + K - 1, side - other + K - 1
        logits = product(keys, tl.trans(queries)) + columns + pick(rows, u)
        logits += other_terms(queries, relative, row, column, DIM, D, K, HALF, SIDE)
        gradient = product(values, tl.trans(upstream))
        if TERMS == 3:
            gradient += other_terms(upstream, relative + 2 * DIM * K, row, column, DIM, D, K, HALF, SIDE)
        weights = tl.exp(logits - total)
        gradient = through_softmax(weights, gradient, sums, K)
        value_result += product(weights.to(dtype), upstream)
        key_result += product(narrow(gradient, dtype), queries)
        if TERMS == 3:
            row_sums += put(gradient, u)
            column_sums += gradient
    if TERMS == 3:
        table = relative + DIM * K
        key_result += from_tables(row_sums, column_sums, table, row_offset, column_offset, DIM, D, K)
        parts += tl.program_id(0).to(tl.int64) * (TERMS * DIM * K) + DIM * K
        store_table_gradient(parts, keys.to(tl.float32), row_sums, column_sums, row_offset, column_offset, DIM, D, K)
    offset, exists = tile_offsets(top, left, height, width, dk_c, dk_y, dk_x, DIM, D, SIDE)
    tl.store(dk + offset, narrow(key_result, dtype), mask=exists)
    offset, exists = tile_offsets(top, left, height, width, dv_c, dv_y, dv_x, DIM, D, SIDE)
    tl.store(dv + offset, narrow(value_result, dtype), mask=exists)


def backward(
    q: Tensor, k: Tensor, v: Tensor, relative: Tensor, y: Tensor, lse: Tensor, dy: Tensor, mask: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v and the tables."""
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    if q.numel() == 0:
        return dq, dk, dv, torch.zeros_like(relative)
    delta = torch.empty_like(lse)
    count = programs(q)
    parts = torch.empty(count, *relative.shape, dtype=torch.float32, device=q.device)
    table = relative.contiguous()
    size = q.shape[1], q.shape[3], q.shape[4]
    options = constants(q.shape[2], relative.shape[3], relative.shape[0], mask, CHANNELS_BACKWARD)
    with on_device(q):
        query_kernel[(count,)](
            q, k, v, table, y, dy, lse, delta, dq, parts, *size,
            *q.stride(), *k.stride(), *v.stride(), *y.stride(), *dy.stride(), *dq.stride(), **options,
        )  # fmt: skip
        del options['MASK']
        key_kernel[(count,)](
            q, k, v, table, dy, lse, delta, dk, dv, parts, *size,
            *q.stride(), *k.stride(), *v.stride(), *dy.stride(), *dk.stride(), *dv.stride(), **options,
        )  # fmt: skip
    return dq, dk, dv, parts.sum(0).to(relative.dtype)
