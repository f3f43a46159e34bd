"""The excitations of the mixed edges. Those that convolve the same tensor run as one convolution. Not in the paper.

Kernels are padded to the largest, and a 1 x k followed by a k x 1 becomes a k x k. On rows of up to 64 values it is a
product with band matrices, which for one channel is several times as fast as a convolution (forward, backward, and most
of all twice backward). The perceptron, the affine ones, all that is not in the paper's sets, and any subclass run on
their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sase_blocks.numerics import narrow
from sase_blocks.ops import (
    ChannelConv,
    ChannelConv3,
    ChannelConv3Double,
    ChannelConv3Triple,
    ChannelConv5,
    ChannelConv7,
    SpatialConv3,
    SpatialConv3Double,
    SpatialConv3Separable,
    SpatialConv5,
    SpatialConv5Separable,
    SpatialConv7,
)

BAND_WIDTH = 64  # longer rows use a convolution, because the zeros of their band matrices cost too much

SEPARABLE: tuple[type, ...] = (SpatialConv3Separable, SpatialConv5Separable)  # 1 x k, then k x 1
CONVOLUTIONS: tuple[type, ...] = (
    ChannelConv3,
    ChannelConv5,
    ChannelConv7,
    ChannelConv3Double,
    ChannelConv3Triple,
    SpatialConv3,
    SpatialConv5,
    SpatialConv7,
    SpatialConv3Double,
    *SEPARABLE,
)


def excited(q: Tensor, *edges: Sequence[Any], fair: bool) -> list[list[Tensor]]:
    """The outputs of one or more edges' excitations of the same q, each in the shape of q.

    q: (B, C, 1, 1) for channel excitations, (B, 1, H, W) for spatial ones. fair: a sigmoid after those without one.
    """
    shared = [op for ops in edges for op in ops if type(op) in CONVOLUTIONS]
    gates: Iterator[Tensor] = iter(())
    if len(shared) > 1:
        gates = iter(torch.sigmoid(torch.stack(convolved(q, shared)).view(-1, *q.shape)).unbind(0))
    together = CONVOLUTIONS if len(shared) > 1 else ()
    return [[next(gates) if type(op) in together else _gate(op, q, fair) for op in ops] for ops in edges]


def _gate(op: Any, q: Tensor, fair: bool) -> Tensor:
    return torch.sigmoid(op(q)) if fair and not op.gated else op(q)


def convolved(q: Tensor, ops: Sequence[Any]) -> list[Tensor]:
    """The outputs of ``CONVOLUTIONS``, all of one set, of q before their sigmoid: (B, H, W) each.

    Each layer is one convolution. A further layer takes the first maps of the layer before, so the deepest operations
    come first. A ReLU follows each layer but an operation's last.
    """
    kernels = [[conv.weight.view(-1, conv.weight.shape[-1]) for conv in op.convs] for op in ops]  # (kh, kw) each
    for i, op in enumerate(ops):
        if type(op) in SEPARABLE:
            row, column = kernels[i]
            kernels[i] = [column * row]
    z = q.flatten(1)[None, :, None] if isinstance(ops[0], ChannelConv) else q.transpose(0, 1)  # (1, B, H, W)
    found: dict[int, Tensor] = {}
    left = sorted(range(len(ops)), key=lambda i: (-len(kernels[i]), kernels[i][0].shape))
    for depth in range(len(kernels[left[0]])):
        # All kernels of the first layer are for one map, those of another layer for one each.
        out = correlate(z, stacked_kernels([kernels[i][depth] for i in left]).unsqueeze(min(depth, 1)))
        deeper = [i for i in left if len(kernels[i]) > depth + 1]
        further, last = out.split([len(deeper), len(left) - len(deeper)], 2)
        found.update(zip(left[len(deeper) :], last.unbind(2), strict=True))
        further = torch.relu(further)
        z, left = narrow(further, further).permute(2, 0, 1, 3), deeper
    return [found[i] for i in range(len(ops))]


def stacked_kernels(kernels: Sequence[Tensor]) -> Tensor:
    """Kernels (kh, kw) of odd sizes, zero-padded on all sides to the largest: (N, kh, kw)."""
    height, width = (max(k.shape[dim] for k in kernels) for dim in range(2))
    padded = []
    for (h, w), alike in groupby(kernels, key=lambda k: k.shape):
        around = ((width - w) // 2, (width - w) // 2, (height - h) // 2, (height - h) // 2)
        padded.append(F.pad(torch.stack(list(alike)), around))
    return torch.cat(padded)


def correlate(z: Tensor, weight: Tensor) -> Tensor:
    """Convolutions with same padding of G single maps, with N kernels each.

    z: (G, B, H, W); weight: (G, N, kh, kw), odd sizes -> (B, H, G * N, W).
    """
    g, b, h, w = z.shape
    n, kh, kw = weight.shape[1:]
    if w > BAND_WIDTH:
        out = F.conv2d(z.transpose(0, 1), weight.reshape(g * n, 1, kh, kw), padding=(kh // 2, kw // 2), groups=g)
        return out.transpose(1, 2)
    # The kh rows around each row, times matrices that map a row of this window to a row of the result.
    padded = F.pad(z, (0, 0, kh // 2, kh // 2))
    windows = torch.stack([padded[:, :, i : i + h] for i in range(kh)], 3).view(g, b * h, kh * w)
    band = (weight.reshape(-1, kw) @ selection(kw, w, weight)).view(g, n, kh, w, w)
    band = band.permute(0, 2, 3, 1, 4).reshape(g, kh * w, n * w)
    return torch.bmm(windows, band).view(g, b, h, n, w).permute(1, 2, 0, 3, 4).flatten(2, 3)


_selections: dict[tuple[Any, ...], Tensor] = {}


def selection(kernel: int, length: int, like: Tensor) -> Tensor:
    """The tap of a kernel that maps input i to output j with same padding, one-hot: (kernel, length * length)."""
    key = (kernel, length, like.device, like.dtype)
    if not torch.compiler.is_compiling() and key in _selections:
        return _selections[key]
    with torch.inference_mode(False), torch.no_grad():
        i = torch.arange(length, device=like.device)
        tap = torch.arange(kernel, device=like.device)[:, None, None]
        hot = (i[:, None] - i + kernel // 2 == tap).to(like.dtype).reshape(kernel, length * length)
    if not torch.compiler.is_compiling() and type(hot) is Tensor:  # no fake tensors
        _selections[key] = hot
    return hot
