"""Convolutions of one channel that read the same small tensor, as one. Ours.

Kernels are padded to the largest, and a 1 x k behind a k x 1 is a k x k. On rows of up to 64 values it runs as a
product with band matrices, in which a convolution of one channel is several times faster (forward, backward, and most
of all twice backward).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

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
from sase_blocks.ops.primitive import (
    saturate,
)

from .parts import Part

__all__ = ['excited']

KEPT = 256  # positions of a map up to which what is on the way to an excitation is little, and is kept
BAND_WIDTH = 64  # rows up to this length are multiplied by band matrices; on longer ones their zeros cost too much

_selections: dict[tuple[Any, ...], Tensor] = {}
_placements: dict[tuple[Any, ...], Tensor] = {}


def selection(kernel: int, length: int, like: Tensor) -> Tensor:
    """Which tap of a kernel takes input i to output j with same padding, one-hot: (kernel, length * length)."""
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


def correlate(z: Tensor, weight: Tensor) -> Tensor:
    """Convolutions of single maps with same padding: G maps, N kernels for each.

    z: (G, B, H, W); weight: (G, N, kh, kw), odd sizes -> (G, N, B, H, W).
    """
    g, b, h, w = z.shape
    n, kh, kw = weight.shape[1:]
    if w > BAND_WIDTH:
        out = F.conv2d(z.transpose(0, 1), weight.reshape(g * n, 1, kh, kw), padding=(kh // 2, kw // 2), groups=g)
        return out.unflatten(1, (g, n)).permute(1, 2, 0, 3, 4)
    if kh > 1:
        padded = F.pad(z, (0, 0, kh // 2, kh // 2))
        z = torch.stack([padded[:, :, i : i + h] for i in range(kh)], 3)  # (G, B, H, kh, W)
    rows = z.reshape(g, b * h, kh * w)
    band = (weight.reshape(g * n * kh, kw) @ selection(kw, w, weight)).reshape(g, n, kh, w, w)
    band = band.permute(0, 2, 3, 1, 4).reshape(g, kh * w, n * w)
    return torch.bmm(rows, band).reshape(g, b, h, n, w).permute(0, 3, 1, 2, 4)


CONVOLUTIONS: frozenset[type] = frozenset(
    {
        ChannelConv3,
        ChannelConv5,
        ChannelConv7,
        ChannelConv3Double,
        ChannelConv3Triple,
        SpatialConv3,
        SpatialConv5,
        SpatialConv7,
        SpatialConv3Double,
        SpatialConv3Separable,
        SpatialConv5Separable,
    }
)


def kernels(op: Any) -> list[Tensor]:
    """The kernels (kh, kw) of an operation, those with a ReLU between them apart, those without composed."""
    weights = [conv.weight.view(-1, conv.weight.shape[-1]) for conv in op.convs]
    if type(op) in (SpatialConv3Separable, SpatialConv5Separable):
        row, column = weights
        return [column * row]  # (k, 1) times (1, k)
    return weights


def placement(sizes: tuple[tuple[int, int], ...], like: Tensor) -> Tensor:
    """Where the taps of kernels of these sizes, one after the other, are in kernels of the largest size, one-hot.

    -> (taps, kernels * kh * kw).
    """
    key = (sizes, like.device, like.dtype)
    if key not in _placements:
        height, width = max(h for h, _ in sizes), max(w for _, w in sizes)
        targets = []
        for number, (h, w) in enumerate(sizes):
            top, left = (height - h) // 2, (width - w) // 2
            targets += [((number * height) + top + i) * width + left + j for i in range(h) for j in range(w)]
        with torch.inference_mode(False), torch.no_grad():
            _placements[key] = torch.eye(len(sizes) * height * width, device=like.device, dtype=like.dtype)[targets]
    return _placements[key]


def stacked_kernels(parts: Sequence[Tensor]) -> Tensor:
    """Kernels of odd sizes, padded around to the largest: (N, kh, kw)."""
    sizes = tuple((k.shape[0], k.shape[1]) for k in parts)
    height, width = max(h for h, _ in sizes), max(w for _, w in sizes)
    if len(set(sizes)) == 1:
        return torch.stack(tuple(parts))
    if torch.compiler.is_compiling() or type(parts[0]) is not Tensor:  # no fake tensors among the placements
        around = [((width - w) // 2, (width - w) // 2, (height - h) // 2, (height - h) // 2) for h, w in sizes]
        return torch.stack([F.pad(k, p) for k, p in zip(parts, around, strict=True)])
    taps = torch.cat([k.flatten() for k in parts])
    return (taps @ placement(sizes, taps)).view(len(parts), height, width)


def excited(q: Tensor, *edges: Sequence[Any], fair: bool) -> list[list[Part]]:
    """What the excitations of one or more edges give for the same q; each output is shaped as q.

    q: (B, C, 1, 1) for channel excitations, (B, 1, H, W) for spatial ones. fair: a sigmoid behind those that are no
    gates already.
    """
    ops = [op for edge in edges for op in edge]
    convolved = [op for op in ops if type(op) in CONVOLUTIONS]
    shared = len(convolved) > 1
    found: list[Part | None] = [None] * len(edges)
    if shared:
        of_op = [kernels(op) for op in convolved]
        # The deepest first: each further layer is for the first few of what the one before it gave.
        order = sorted(range(len(convolved)), key=lambda i: -len(of_op[i]))
        layers = [
            stacked_kernels([of_op[i][depth] for i in order if len(of_op[i]) > depth])
            for depth in range(len(of_op[order[0]]))
        ]
        channel = isinstance(convolved[0], ChannelConv)
        function = partial(_convolved, tuple(order), channel)
        positions = [[i for i, op in enumerate(edge) if type(op) in CONVOLUTIONS] for edge in edges]
        if len(edges) == 1 and not channel:
            found = [Part(positions[0], function, [q, *layers], again=q.shape[2] * q.shape[3] > KEPT)]
        else:
            shares = function(q, *layers).split([len(chosen) for chosen in positions])
            found = [Part.of_stack(*pair) for pair in zip(positions, shares, strict=True)]
    parts = []
    for edge, part in zip(edges, found, strict=True):
        rest = {i: op(q) for i, op in enumerate(edge) if not (shared and type(op) in CONVOLUTIONS)}
        if fair:
            rest = {i: output if edge[i].gated else torch.sigmoid(output) for i, output in rest.items()}
        parts.append([p for p in (part, Part.of(rest)) if p is not None and p.positions])
    return parts


def _convolved(order: Sequence[int], channel: bool, q: Tensor, *layers: Tensor) -> Tensor:
    """The gates of convolutions of q with one kernel or more. -> (operations, *q.shape).

    order: which operation each kernel of the first layer is of; further layers are of the first ones.
    """
    z = q.flatten(1)[None, :, None] if channel else q.transpose(0, 1)  # (1, B, H, W)
    out = correlate(z, layers[0][None])[0]  # (operations, B, H, W)
    finished: list[Tensor] = []  # from the last to the first
    for depth, layer in enumerate(layers):
        if depth > 0:
            out = correlate(saturate(torch.relu(out)), layer[:, None])[:, 0]
        deeper = len(layers[depth + 1]) if depth + 1 < len(layers) else 0
        finished[:0] = out[deeper:].unbind(0)
        out = out[:deeper]
    gates = torch.sigmoid(torch.stack([finished[order.index(i)] for i in range(len(order))]))
    return gates.permute(0, 1, 3, 2).unsqueeze(4) if channel else gates.unsqueeze(2)
