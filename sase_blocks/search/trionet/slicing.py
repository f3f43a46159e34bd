"""The part of a supernet's weights that a smaller block uses: prefixes, centres, Multi-head Sharing (arXiv 2111.07547).

The public part of the paper only names Multi-head Sharing; this is our interpretation. The number of heads is fixed.
With ``'heads'``, a narrower attention takes the first channels inside every head, so a weight has the same head and the
same role (q, k or v, and in local attention's q and k the half for rows or columns) in every network. ``'plain'`` is
naive slicing: the first rows of a projection that packs q, k and v one after the other, head after head. At half the
width, axial attention then keeps head and role for 3.1 % of its rows.

Our attentions store channels as ``c * heads + head``, so under ``'heads'`` everything but the roles is a prefix.
Kernels and windows use their centre.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from sase_blocks.selfattention import LocalSelfAttention

SHARINGS = ('heads', 'plain')

# Channels of each role in one head, by projection: for axial attention ((g / 2,), (g / 2,), (g,)) for q, k and v.
Roles = tuple[tuple[int, ...], ...]


@lru_cache(maxsize=4096)
def packed_rows(full: Roles, narrow: Roles, heads: int, sharing: str) -> Tensor:
    """Index of the full packed projection's row for each row of a narrower one. -> (rows,) of int64.

    Both in our order: q, k and v one after the other, each with ``c * heads + head``.

    Args:
        full, narrow: channels of each role in one head.
        heads: number of heads.
        sharing: 'heads' or 'plain'.
    """
    # Cached for later calls, so never an inference tensor, whatever the mode of the first call.
    with torch.inference_mode(False), torch.device('cpu'):
        if sharing == 'heads':
            parts = torch.arange(sum(map(sum, full)) * heads).split([n * heads for n in chain(*full)])
            return torch.cat([part[: n * heads] for part, n in zip(parts, chain(*narrow), strict=True)])
        # Position of each of our rows if heads are packed one after another: the same in both.
        place = torch.argsort(_head_major([sum(part) for part in narrow], heads))
        return _head_major([sum(part) for part in full], heads)[place]


def _head_major(parts: Sequence[int], heads: int) -> Tensor:
    """Our row for each position of a projection packed head after head: (sum(parts) * heads,)."""
    rows = torch.arange(sum(parts) * heads).split([channels * heads for channels in parts])
    return torch.cat([part.reshape(-1, heads).T.flatten() for part in rows])


def output_channels(channels: int, heads: int, sharing: str) -> slice | Tensor:
    """The channels of the layer after an attention (a norm, a 1x1 convolution) for its ``channels`` outputs."""
    if sharing == 'heads':
        return slice(channels)
    return torch.argsort(_head_major([channels // heads], heads))


def take(tensor: Tensor, dim: int, which: slice | Tensor) -> Tensor:
    """Select along one dimension; a view for a slice from 0."""
    if isinstance(which, slice):
        return tensor.narrow(dim, 0, which.stop)
    # Without non_blocking each call would wait for the GPU.
    return tensor.index_select(dim, which.to(tensor.device, non_blocking=True))


def prefix(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """The first entries along every dimension, as a view."""
    return tensor[tuple(map(slice, shape))]


def centre(tensor: Tensor, dim: int, size: int) -> Tensor:
    """The centre entries along one dimension, as a view."""
    return tensor.narrow(dim, (tensor.shape[dim] - size) // 2, size)


def operator_tensors(full: Any, narrow: Any, sharing: str) -> dict[str, Tensor]:
    """The parameters of the operator ``narrow`` by name, sliced from ``full``, an operator of the same kind."""
    if isinstance(narrow, nn.Conv2d):
        weight = prefix(full.weight, narrow.weight.shape[:2])
        return {'weight': centre(centre(weight, 2, narrow.weight.shape[2]), 3, narrow.weight.shape[3])}
    n = narrow.channels
    if isinstance(narrow, LocalSelfAttention):
        many, few = (layer.channels // layer.heads // 2 for layer in (full, narrow))
        roles = ((many, many), (many, many), (2 * many,)), ((few, few), (few, few), (2 * few,))
        packed = torch.cat([layer.weight[:, :n] for layer in (full.query, full.key, full.value)])
        weights = take(packed, 0, packed_rows(*roles, narrow.heads, sharing)).split(n)
        found = {f'{name}.weight': part for name, part in zip(('query', 'key', 'value'), weights, strict=True)}
        table = prefix(full.relative, narrow.relative.shape[:3])
        return {**found, 'relative': centre(table, 3, narrow.kernel_size)}
    # The second pass reads the first one's output.
    columns = {'height': slice(n), 'width': output_channels(n, narrow.heads, sharing)}
    return {
        f'{axis}.{name}': tensor
        for axis, inputs in columns.items()
        for name, tensor in _axis(getattr(full, axis), getattr(narrow, axis), inputs, sharing).items()
    }


def _axis(full: Any, narrow: Any, columns: slice | Tensor, sharing: str) -> dict[str, Tensor]:
    many, few = (layer.channels // layer.heads for layer in (full, narrow))
    roles = ((many // 2,), (many // 2,), (many,)), ((few // 2,), (few // 2,), (few,))
    rows = packed_rows(*roles, narrow.heads, sharing)
    outputs = output_channels(narrow.channels, narrow.heads, sharing)
    # The heads share the table: one head, the same roles.
    table = take(full.relative, 0, packed_rows(*roles, 1, sharing))
    found = {
        'project.weight': take(take(full.project.weight, 1, columns), 0, rows),
        'relative': centre(table, 1, narrow.relative.shape[1]),
    }
    for name, which in (
        ('norm', rows),
        ('logit_norm', slice(3 * narrow.heads)),
        ('value_norm', outputs),
        ('position_norm', outputs),
    ):
        norm: Any = full.get_submodule(name)
        found[f'{name}.weight'], found[f'{name}.bias'] = take(norm.weight, 0, which), take(norm.bias, 0, which)
    return found
