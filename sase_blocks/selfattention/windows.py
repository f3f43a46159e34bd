"""Split a map into square blocks of queries, each with the window of keys that its queries see (a block and a halo).

Shapes: a map is (B, heads, d, H, W); there are N = B * heads * ceil(H / side) * ceil(W / side) blocks of side x side
queries, and for windows of k x k the keys of a block are reach x reach, reach = side + k - 1. Blocks that extend beyond
the map are padded with zeros, as is the halo.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# For captured graphs, whose maps may have any size; divides the map sizes of a 224 x 224 image.
SIDE = 7


def block_side(height: int, width: int) -> int:
    """7, 8 or 4, whichever wastes the fewest positions on this map; ties go to the first.

    Measured on a CPU at 14, 28 and 56 with k = 5 and 7: blocks of 4 and 7 are within 20 % of each other, blocks of 2
    and 14 are slower by half. Small blocks read a halo of many times their size, large ones compute unused products.
    """
    best, least = 7, 0
    for side in (7, 8, 4):
        rows, columns = (height + side - 1) // side * side, (width + side - 1) // side * side
        if least == 0 or rows * columns < least:
            best, least = side, rows * columns
    return best


def query_blocks(x: Tensor, side: int) -> Tensor:
    """(B, heads, d, H, W) -> (N, side * side, d)."""
    b, h, d, height, width = x.shape
    rows, columns = (height + side - 1) // side, (width + side - 1) // side
    # Zero padding widths cost no copy in eager mode, and need no branch that would fix an exported size.
    x = F.pad(x, (0, columns * side - width, 0, rows * side - height))
    x = x.reshape(b, h, d, rows, side, columns, side)
    return x.permute(0, 1, 3, 5, 4, 6, 2).reshape(b * h * rows * columns, side * side, d)


def key_windows(x: Tensor, side: int, kernel_size: int) -> Tensor:
    """(B, heads, d, H, W) -> (N, d, reach * reach); zeros outside the map."""
    b, h, d, height, width = x.shape
    rows, columns = (height + side - 1) // side, (width + side - 1) // side
    halo, reach = kernel_size // 2, side + kernel_size - 1
    x = F.pad(x, (halo, halo + columns * side - width, halo, halo + rows * side - height))
    x = x.unfold(3, reach, side).unfold(4, reach, side)  # (B, heads, d, rows, columns, reach, reach), a view
    return x.permute(0, 1, 3, 4, 2, 5, 6).reshape(b * h * rows * columns, d, reach * reach)


def join_blocks(x: Tensor, batch: int, heads: int, height: int, width: int, side: int) -> Tensor:
    """(N, side * side, d) -> (B, heads, d, H, W), the inverse of ``query_blocks``."""
    rows, columns = (height + side - 1) // side, (width + side - 1) // side
    d = x.shape[2]
    x = x.reshape(batch, heads, rows, columns, side, side, d).permute(0, 1, 6, 2, 4, 3, 5)
    return x.reshape(batch, heads, d, rows * side, columns * side)[:, :, :, :height, :width]


def add_windows(x: Tensor, batch: int, heads: int, height: int, width: int, side: int, kernel_size: int) -> Tensor:
    """(N, d, reach * reach) -> (B, heads, d, H, W): the transpose of ``key_windows``; overlapping windows add up.

    First over the rows, then over the columns of blocks. Not for captured graphs: it loops over the blocks.
    """
    rows, columns = (height + side - 1) // side, (width + side - 1) // side
    halo, reach, d = kernel_size // 2, side + kernel_size - 1, x.shape[1]
    x = x.reshape(batch * heads, rows, columns, d, reach, reach)
    wide = x.new_zeros(batch * heads, rows, d, reach, columns * side + reach - side)
    for j in range(columns):
        wide[..., j * side : j * side + reach] += x[:, :, j]
    full = x.new_zeros(batch * heads, d, rows * side + reach - side, columns * side + reach - side)
    for i in range(rows):
        full[:, :, i * side : i * side + reach] += wide[:, i]
    return full[:, :, halo : halo + height, halo : halo + width].reshape(batch, heads, d, height, width)


def window_offsets(side: int, kernel_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """For query row y and key row u of a block: the window row u - y, clipped, and whether it is inside the window.

    -> (side, reach) of int64, (side, reach) of bool. The same for columns.
    """
    reach = side + kernel_size - 1
    offset = torch.arange(reach, device=device).unsqueeze(0) - torch.arange(side, device=device).unsqueeze(1)
    return offset.clamp(0, kernel_size - 1), (offset >= 0) & (offset < kernel_size)


def outside(size: int, side: int, kernel_size: int, device: torch.device) -> Tensor:
    """(blocks, reach) of bool: which key rows of every row of blocks lie outside a map with ``size`` rows."""
    blocks = (size + side - 1) // side
    position = torch.arange(blocks, device=device).unsqueeze(1) * side - kernel_size // 2
    position = position + torch.arange(side + kernel_size - 1, device=device).unsqueeze(0)
    return (position < 0) | (position >= size)
