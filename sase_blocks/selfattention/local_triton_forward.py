"""The forward kernel of local self-attention in Triton, and the functions that it shares with the backward kernels.

It computes the formula of ``local_routes`` (Ramachandran et al. 2019, with the terms of Wang et al. 2020 if there are
three tables) as FlashAttention does (Dao et al. 2022): an online softmax over the keys, keeping one number per query,
the log of its sum, for the backward. It differs in the neighbourhood and the tables, and makes no copy of q, k or v:
the kernels take any strides.

A program computes one head of one image for a square tile of queries. It loops over the key rows of their window, and
reads from each the columns that the tile sees:

    own      SIDE * SIDE positions, the queries of the tile (in the backward of k and v: its keys)
    others   WIDE positions, those columns of one row on the other side, padded to a power of two
    offset   index into the window, 0 to K - 1, for the row or column of a pair; other numbers are outside

Table terms of the own side are numbers per (own, row of others) and (own, column of others), computed once per tile.
Those of the other side are computed for each row of others.

This file needs Triton, whose decorator takes module-level functions, so it is imported only to run a kernel.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# 8 x 8 own positions: 64 rows for the tensor cores, 16 per warp; with k = 7 a tile reads 3.1 keys per query.
SIDE = 8
# A product in Triton is at least 16 wide on each side, so others and channels are padded.
LEAST = 16
# A tile of 64 rows occupies at least four warps. Eight if the matrices of four would not fit into a thread's 255
# registers; four suffice up to this many channels times terms, forward and backward.
CHANNELS_FORWARD, CHANNELS_BACKWARD = 64, 32


def constants(d: int, size: int, terms: int, mask: bool, channels_of_four: int) -> dict[str, Any]:
    """The compile-time constants of the kernels."""
    channels = max(LEAST, triton.next_power_of_2(d))
    wide = max(LEAST, triton.next_power_of_2(SIDE + size - 1))
    return {
        'TERMS': terms,
        'MASK': mask,
        'DIM': d,
        'D': channels,
        'K': size,
        'WIDE': wide,
        'HALF': max(LEAST // 2, triton.next_power_of_2(size)),
        'SIDE': SIDE,
        'enable_fp_fusion': True,  # the default so far; Triton 3.9 warns if it is missing
        'num_warps': 4 if wide == LEAST and channels * terms <= channels_of_four else 8,
    }


def programs(q: Tensor) -> int:
    """One program per tile, head and image."""
    return q.shape[0] * q.shape[1] * triton.cdiv(q.shape[3], SIDE) * triton.cdiv(q.shape[4], SIDE)


@contextlib.contextmanager
def on_device(x: Tensor) -> Iterator[None]:
    """Triton launches on the current device."""
    with torch.cuda.device(x.device) if x.device.type == 'cuda' else contextlib.nullcontext():
        yield


# ------------------------------------------------------------------------------------------------- parts of kernels


@triton.jit
def window(offset, K: tl.constexpr):
    """0 in the window, -inf outside."""
    return tl.where((offset >= 0) & (offset < K), 0.0, float('-inf'))


# Whether Triton was imported with TRITON_INTERPRET=1: kernels run in Python, on a CPU.
INTERPRETED = tl.constexpr(not isinstance(window, triton.JITFunction))


@triton.jit
def product(a, b):
    """In fp32: half matrices on the tensor cores, fp32 ones without tf32."""
    if INTERPRETED:  # the interpreter multiplies the bits of bf16 as integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision='ieee')


@triton.jit
def place(heads, height, width, SIDE: tl.constexpr):
    """Image, head, first row and first column of this program's tile. Heads are adjacent: in channels_last they share
    memory reads."""
    program = tl.program_id(0)
    columns = tl.cdiv(width, SIDE)
    tiles = tl.cdiv(height, SIDE) * columns
    tile = program // heads % tiles
    image = program // heads // tiles
    return image.to(tl.int64), (program % heads).to(tl.int64), tile // columns * SIDE, tile % columns * SIDE


@triton.jit
def tile_offsets(
    top, left, height, width, c_step, y_step, x_step, DIM: tl.constexpr, D: tl.constexpr, SIDE: tl.constexpr
):
    """Addresses of a tile's elements, (SIDE * SIDE, D), and the mask of those that exist."""
    own = tl.arange(0, SIDE * SIDE)
    channel = tl.arange(0, D)
    y, x = top + own // SIDE, left + own % SIDE
    exists = (y < height) & (x < width)
    offset = (y * y_step + x * x_step)[:, None] + (channel * c_step)[None, :]
    return offset, exists[:, None] & (channel < DIM)[None, :]


@triton.jit
def load_row(
    x, row, left, height, width, c_step, y_step, x_step, DIM: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr
):
    """(WIDE, D) of one row of others; zeros outside the map."""
    channel = tl.arange(0, D)
    column = left + tl.arange(0, WIDE)
    row += tl.zeros((WIDE,), tl.int32)  # Triton's interpreter needs masks of vectors only
    exists = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    offset = (row * y_step + column * x_step)[:, None] + (channel * c_step)[None, :]
    return tl.load(x + offset, mask=exists[:, None] & (channel < DIM)[None, :], other=0.0)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """Cast to the dtype of the maps; values beyond fp16 saturate, NaN stays."""
    if dtype == tl.float16:
        x = tl.where(x > 65504.0, 65504.0, tl.where(x < -65504.0, -65504.0, x))
    return x.to(dtype)


@triton.jit
def entry(table, o, DIM: tl.constexpr, D: tl.constexpr, K: tl.constexpr):
    """(D,): one offset's entries, of the row table and then of the column table."""
    channel = tl.arange(0, D)
    return tl.load(table + channel * K + o, mask=channel < DIM, other=0.0).to(tl.float32)


@triton.jit
def own_terms(x, table, row_offset, column_offset, DIM: tl.constexpr, D: tl.constexpr, K: tl.constexpr):
    """Dot products of the own side (own, D) with the row and the column table, at each (own, WIDE) they apply to."""
    first = (tl.arange(0, D) < DIM // 2)[None, :]
    rows = tl.zeros(row_offset.shape, tl.float32)
    columns = tl.zeros(column_offset.shape, tl.float32)
    for o in range(K):
        part = x * entry(table, o, DIM, D, K)[None, :]
        row = tl.sum(tl.where(first, part, 0.0), 1)
        column = tl.sum(tl.where(first, 0.0, part), 1)
        rows += tl.where(row_offset == o, row[:, None], 0.0)
        columns += tl.where(column_offset == o, column[:, None], 0.0)
    return rows, columns


@triton.jit
def other_terms(
    x, table, row_offset, column_offset, DIM: tl.constexpr, D: tl.constexpr, K: tl.constexpr,
    HALF: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    """(own, WIDE): dot products of one row of others (WIDE, D) with the tables; any finite number outside the window.

    row_offset: (SIDE, 1), of the own rows and this row; column_offset: (SIDE, WIDE). One product gives all offsets,
    the row table's in the first half. The tile has few rows and columns, so entries are selected per row and column,
    and only the sum is broadcast over the tile.
    """
    channel, entries = tl.arange(0, D)[None, :], tl.arange(0, 2 * HALF)[:, None]
    exists = (channel < DIM) & (entries % HALF < K) & ((channel < DIM // 2) == (entries < HALF))
    tables = tl.load(table + channel * K + entries % HALF, mask=exists, other=0.0).to(tl.float32)
    found = product(tables, tl.trans(x.to(tl.float32)))[None, :, :]
    entries = tl.arange(0, 2 * HALF)[None, :, None]
    rows = tl.sum(tl.where(entries == row_offset[:, None, :], found, 0.0), 1)
    columns = tl.sum(tl.where(entries == column_offset[:, None, :] + HALF, found, 0.0), 1)
    return tl.reshape(rows[:, None, :] + columns[None, :, :], (SIDE * SIDE, x.shape[0]))


@triton.jit
def pick(x, column):
    """Column ``column`` of a matrix, as (own, 1)."""
    here = tl.arange(0, x.shape[1])[None, :] == column
    return tl.sum(tl.where(here, x, 0.0), 1)[:, None]


@triton.jit
def put(x, column):
    """A matrix of zeros with the row sums of ``x`` in column ``column``."""
    here = tl.arange(0, x.shape[1])[None, :] == column
    return tl.where(here, tl.sum(x, 1)[:, None], 0.0)


@triton.jit
def from_tables(rows, columns, table, row_offset, column_offset, DIM: tl.constexpr, D: tl.constexpr, K: tl.constexpr):
    """(own, D): the transpose of ``own_terms`` with respect to the own side."""
    first = (tl.arange(0, D) < DIM // 2)[None, :]
    total = tl.zeros((rows.shape[0], D), tl.float32)
    for o in range(K):
        row = tl.sum(tl.where(row_offset == o, rows, 0.0), 1)
        column = tl.sum(tl.where(column_offset == o, columns, 0.0), 1)
        total += tl.where(first, row[:, None], column[:, None]) * entry(table, o, DIM, D, K)[None, :]
    return total


# ------------------------------------------------------------------------------------------------------- the kernel


@triton.jit(do_not_specialize=['height', 'width'])
def forward_kernel(
    q, k, v, relative, y, lse, heads, height, width,
    q_b, q_h, q_c, q_y, q_x, k_b, k_h, k_c, k_y, k_x, v_b, v_h, v_c, v_y, v_x, y_b, y_h, y_c, y_y, y_x,
    TERMS: tl.constexpr, MASK: tl.constexpr, DIM: tl.constexpr, D: tl.constexpr, K: tl.constexpr,
    WIDE: tl.constexpr, HALF: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    """y and the log of the sum of exponentials, for one tile of queries."""
    dtype: tl.constexpr = y.dtype.element_ty
    halo: tl.constexpr = K // 2
    image, head, top, left = place(heads, height, width, SIDE)
    q += image * q_b + head * q_h
    k += image * k_b + head * k_h
    v += image * v_b + head * v_h
    y += image * y_b + head * y_h
    lse += (image * heads + head) * height * width

    own, other = tl.arange(0, SIDE * SIDE)[:, None], tl.arange(0, WIDE)[None, :]
    row_offset, column_offset = other - own // SIDE, other - own % SIDE
    offset, exists = tile_offsets(top, left, height, width, q_c, q_y, q_x, DIM, D, SIDE)
    queries = tl.load(q + offset, mask=exists, other=0.0)
    rows, columns = own_terms(queries.to(tl.float32), relative, row_offset, column_offset, DIM, D, K)
    rows += window(row_offset, K)
    columns += window(column_offset, K)
    # The key rows that a query in the map sees.
    first, last = 0, tl.minimum(SIDE, height - top) + K - 1
    if MASK:
        key_column = left - halo + other
        columns = tl.where((key_column >= 0) & (key_column < width), columns, float('-inf'))
        first, last = tl.maximum(0, halo - top), tl.minimum(last, height - top + halo)
    if TERMS == 3:
        side = tl.arange(0, SIDE)[:, None]
        row_weights = tl.zeros((SIDE * SIDE, WIDE), tl.float32)
        column_weights = tl.zeros((SIDE * SIDE, WIDE), tl.float32)

    # Finite, so that excluded keys, at -inf, have weight 0 from the start.
    largest = tl.full((SIDE * SIDE,), -1e30, tl.float32)
    total = tl.zeros((SIDE * SIDE,), tl.float32)
    result = tl.zeros((SIDE * SIDE, D), tl.float32)
    for u in range(first, last):
        keys = load_row(k, top - halo + u, left - halo, height, width, k_c, k_y, k_x, DIM, D, WIDE)
        values = load_row(v, top - halo + u, left - halo, height, width, v_c, v_y, v_x, DIM, D, WIDE)
        logits = product(queries, tl.trans(keys)) + columns + pick(rows, u)
        if TERMS == 3:
            logits += other_terms(keys, relative + DIM * K, u - side, other - side, DIM, D, K, HALF, SIDE)
        larger = tl.maximum(largest, tl.max(logits, 1))
        weights = tl.exp(logits - larger[:, None])
        scale = tl.exp(largest - larger)
        largest = larger
        total = total * scale + tl.sum(weights, 1)
        result = result * scale[:, None] + product(weights.to(dtype), values)
        if TERMS == 3:
            row_weights = row_weights * scale[:, None] + put(weights, u)
            column_weights = column_weights * scale[:, None] + weights
    if TERMS == 3:
        table = relative + 2 * DIM * K
        result += from_tables(row_weights, column_weights, table, row_offset, column_offset, DIM, D, K)
    total = tl.maximum(total, 1.0)  # it is at least 1, except for queries outside the map
    offset, exists = tile_offsets(top, left, height, width, y_c, y_y, y_x, DIM, D, SIDE)
    tl.store(y + offset, narrow(result / total[:, None], dtype), mask=exists)
    own = tl.arange(0, SIDE * SIDE)
    row, column = top + own // SIDE, left + own % SIDE
    tl.store(lse + row * width + column, largest + tl.log(total), mask=(row < height) & (column < width))


def forward(q: Tensor, k: Tensor, v: Tensor, relative: Tensor, mask: bool) -> tuple[Tensor, Tensor]:
    """y and the log of the sum of exponentials, (B, heads, H, W) in fp32."""
    y = torch.empty_like(q)
    lse = torch.empty(q.shape[0], q.shape[1], q.shape[3], q.shape[4], dtype=torch.float32, device=q.device)
    if q.numel() == 0:
        return y, lse
    with on_device(q):
        forward_kernel[(programs(q),)](
            q, k, v, relative.contiguous(), y, lse, q.shape[1], q.shape[3], q.shape[4],
            *q.stride(), *k.stride(), *v.stride(), *y.stride(),
            **constants(q.shape[2], relative.shape[3], relative.shape[0], mask, CHANNELS_FORWARD),
        )  # fmt: skip
    return y, lse
