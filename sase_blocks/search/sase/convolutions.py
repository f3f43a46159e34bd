"""Convolutions of one channel that read the same small tensor, as one. Ours.

Kernels are padded to the largest, and a 1 x k behind a k x 1 is a k x k. On rows of up to 64 values it runs as a
product with band matrices, in which a convolution of one channel is several times faster (forward, backward, and most
of all twice backward). The first derivative is written out, a second one goes through autograd.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sase_blocks.numerics import saturate
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

from .parts import Gradients, Part, Recomputed

__all__ = ['excited']

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

    z: (G, B, H, W); weight: (G, N, kh, kw), odd sizes -> (B, H, G * N, W).
    """
    g, w = z.shape[0], z.shape[3]
    n, kh, kw = weight.shape[1:]
    if w > BAND_WIDTH:
        out = F.conv2d(z.transpose(0, 1), weight.reshape(g * n, 1, kh, kw), padding=(kh // 2, kw // 2), groups=g)
        return out.transpose(1, 2)
    return of_maps(torch.bmm(row_windows(z, kh), bands(weight, w)), z.shape)


def of_maps(rows: Tensor, shape: Sequence[int]) -> Tensor:
    """(G, B * H, N * W) -> (B, H, G * N, W)."""
    g, b, h, w = shape
    return rows.view(g, b, h, -1, w).permute(1, 2, 0, 3, 4).flatten(2, 3)


def to_maps(out: Tensor, maps: int) -> Tensor:
    """(B, H, G * N, W) -> (G, B * H, N * W)."""
    b, h = out.shape[:2]
    return out.unflatten(2, (maps, -1)).permute(2, 0, 1, 3, 4).reshape(maps, b * h, -1)


def row_windows(z: Tensor, kh: int) -> Tensor:
    """For each row of maps (G, B, H, W) the kh rows around it: (G, B * H, kh * W)."""
    g, b, h, w = z.shape
    if kh > 1:
        padded = F.pad(z, (0, 0, kh // 2, kh // 2))
        if torch.is_grad_enabled():
            z = torch.stack([padded[:, :, i : i + h] for i in range(kh)], 3)
        else:  # one copy; its derivative would be slower than that of the slices
            z = padded.unfold(2, kh, 1).transpose(3, 4)
    return z.reshape(g, b * h, kh * w)


def from_row_windows(grad: Tensor, shape: Sequence[int], kh: int) -> Tensor:
    """The gradient of ``row_windows`` for maps of this shape."""
    g, b, h, w = shape
    rows = grad.view(g, b, h, kh, w)
    total = rows[:, :, :, kh // 2].clone(memory_format=torch.contiguous_format)
    for i in range(kh):
        shift = i - kh // 2  # the i-th of row r is row r + shift
        n = h - abs(shift)
        if shift and n > 0:
            total.narrow(2, max(shift, 0), n).add_(rows[:, :, :, i].narrow(2, max(-shift, 0), n))
    return total


def bands(weight: Tensor, w: int) -> Tensor:
    """The matrices that windows of rows of length w are multiplied by: (G, N, kh, kw) -> (G, kh * W, N * W)."""
    g, n, kh, kw = weight.shape
    band = (weight.reshape(g * n * kh, kw) @ selection(kw, w, weight)).reshape(g, n, kh, w, w)
    return band.permute(0, 2, 3, 1, 4).reshape(g, kh * w, n * w)


def from_bands(grad: Tensor, shape: Sequence[int], w: int) -> Tensor:
    """The gradient of ``bands`` for a weight of this shape."""
    g, n, kh, kw = shape
    by_tap = grad.view(g, kh, w, n, w).permute(0, 3, 1, 2, 4).reshape(g * n * kh, w * w)
    return (by_tap @ selection(kw, w, grad).t()).view(shape)


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
    SpatialConv3Separable,
    SpatialConv5Separable,
)
SEPARABLE: tuple[type, ...] = (SpatialConv3Separable, SpatialConv5Separable)  # 1 x k, then k x 1


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
    """Kernels (kh, kw) of odd sizes, padded around to the largest: (N, kh, kw)."""
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
        function = Convolved(
            tuple(len(op.convs) for op in convolved),
            tuple(type(op) in SEPARABLE for op in convolved),
            isinstance(convolved[0], ChannelConv),
        )
        tensors = [q, *(conv.weight for op in convolved for conv in op.convs)]
        positions = [[i for i, op in enumerate(edge) if type(op) in CONVOLUTIONS] for edge in edges]
        if len(edges) == 1 and not function.channel:
            found = [Part(positions[0], function, tensors, again=True)]
        else:
            gates = function(*tensors) if torch.compiler.is_compiling() else Recomputed.apply(function, *tensors)
            shares = gates.split([len(chosen) for chosen in positions])
            found = [Part.of_stack(*pair) for pair in zip(positions, shares, strict=True)]
    parts = []
    for edge, part in zip(edges, found, strict=True):
        rest = {i: op(q) for i, op in enumerate(edge) if not (shared and type(op) in CONVOLUTIONS)}
        if fair:
            rest = {i: output if edge[i].gated else torch.sigmoid(output) for i, output in rest.items()}
        parts.append([p for p in (part, Part.of(rest)) if p is not None and p.positions])
    return parts


@dataclass
class Convolved:
    """The gates of operations that convolve q: called with q and the weights of all their convolutions, in order.

    q: as of ``excited`` -> (operations, *q.shape). ``convolutions``: of each operation; there is a ReLU between them,
    but none between the two of a ``separable`` one. Each layer is one convolution: the first of q, each further one of
    the first maps of what the one before it gave, for which the deepest operations come first.
    """

    convolutions: tuple[int, ...]
    separable: tuple[bool, ...]
    channel: bool

    # The layers of each operation, and the operations as the layers have them.
    depths: tuple[int, ...] = field(init=False)
    order: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        depths = tuple(1 if composed else n for n, composed in zip(self.convolutions, self.separable, strict=True))
        self.depths = depths
        self.order = tuple(sorted(range(len(depths)), key=lambda i: -depths[i]))

    def __call__(self, q: Tensor, *weights: Tensor) -> Tensor:
        return self._stacked(self._gates(self._maps(q), self._layers(weights))[0], q)

    def _of_operations(self, weights: Sequence[Tensor]) -> list[list[Tensor]]:
        """The weights of each operation as kernels (kh, kw)."""
        kernels = [w.view(-1, w.shape[-1]) for w in weights]
        ends = accumulate(self.convolutions)
        return [kernels[end - n : end] for n, end in zip(self.convolutions, ends, strict=True)]

    def _layers(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """The kernels of each layer, padded to the largest: (operations that are this deep, kh, kw)."""
        kernels = self._of_operations(weights)
        for i, composed in enumerate(self.separable):
            if composed:
                row, column = kernels[i]
                kernels[i] = [column * row]
        depths = range(max(self.depths))
        return [stacked_kernels([kernels[i][d] for i in self.order if self.depths[i] > d]) for d in depths]

    def _of_weights(self, of_layers: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
        """The gradients of the weights for those of the layers."""
        kernels = self._of_operations(weights)
        found: list[list[Tensor]] = [[] for _ in kernels]
        for depth, of_layer in enumerate(of_layers):
            for i, of_kernel in zip(self.order, of_layer.unbind(0), strict=False):  # the deepest come first
                if not self.separable[i]:
                    found[i].append(_inner(of_kernel, *kernels[i][depth].shape))
                else:
                    row, column = kernels[i]
                    of_kernel = _inner(of_kernel, len(column), row.shape[1])
                    found[i] += [(of_kernel * column).sum(0), (of_kernel * row).sum(1)]
        flat = [w for own in found for w in own]
        # No views into a padded kernel: fused optimisers read gradients as they lie.
        return [of_weight.contiguous().view(w.shape) for of_weight, w in zip(flat, weights, strict=True)]

    def _gates(self, z: Tensor, layers: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The gates (B, H, operations, W), those of the last layer first, and the maps that further layers convolve."""
        finished: list[Tensor] = []
        maps: list[Tensor] = []
        for depth, layer in enumerate(layers):
            out = correlate(z, _of_maps(depth, layer))
            deeper = _deeper(layers, depth)
            finished.insert(0, out[:, :, deeper:])
            if deeper:
                z = saturate(torch.relu(out[:, :, :deeper])).permute(2, 0, 1, 3)
                maps.append(z)
        return torch.sigmoid(torch.cat(finished, 2)), maps

    def _stacked(self, gates: Tensor, q: Tensor) -> Tensor:
        each = gates.unbind(2)
        return torch.stack([each[self.order.index(i)] for i in range(len(each))]).view(-1, *q.shape)

    def _maps(self, q: Tensor) -> Tensor:
        return q.flatten(1)[None, :, None] if self.channel else q.transpose(0, 1)  # (1, B, H, W)

    def keep(self, q: Tensor, *weights: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The result, and for ``vjp`` the gates (B, H, operations, W), the maps convolved again, and the layers."""
        z = self._maps(q)
        one_dtype = all(w.dtype == q.dtype for w in weights) and q.dtype.itemsize >= 4
        if z.shape[3] > BAND_WIDTH or not one_dtype or torch.is_autocast_enabled(q.device.type):
            return self(q, *weights), ()
        layers = self._layers(weights)
        gates, maps = self._gates(z, layers)
        return self._stacked(gates, q), (gates, *maps, *layers)

    def vjp(
        self, grad: Tensor, tensors: Sequence[Tensor], kept: Sequence[Tensor], needed: Sequence[bool]
    ) -> Gradients | None:
        """The gradients of the tensors for that of the result; None where they go through autograd."""
        if not kept:
            return None
        b, h, _, w = kept[0].shape
        grads = grad.view(-1, b, h, w).unbind(0)
        return self._backward(torch.stack([grads[i] for i in self.order], 2), tensors, kept, needed)

    def weighted_vjp(
        self, grad: Tensor, weights: Tensor, tensors: Sequence[Tensor], kept: Sequence[Tensor], needed: Sequence[bool]
    ) -> Gradients | None:
        """The gradients of weights and tensors for that of the weighted sum of the gates; see ``vjp``."""
        if not kept:
            return None
        b, h, _, w = kept[0].shape
        grad = grad.view(b, h, 1, w)
        each = weights.unbind(0)
        ordered = torch.stack([each[i] for i in self.order]).unsqueeze(1)
        of_weights = None
        if needed[0]:
            found = (kept[0] * grad).sum((0, 1, 3)).unbind(0)
            of_weights = torch.stack([found[self.order.index(i)] for i in range(len(found))])
        return [of_weights, *self._backward(grad * ordered, tensors, kept, needed[1:])]

    def _backward(
        self, grad: Tensor, tensors: Sequence[Tensor], kept: Sequence[Tensor], needed: Sequence[bool]
    ) -> Gradients:
        """The gradients of the tensors. grad: of the gates, in their order."""
        q, *weights = tensors
        gates = kept[0]
        maps, layers = kept[1 : max(self.depths)], kept[max(self.depths) :]
        w = gates.shape[3]
        grad = torch.ops.aten.sigmoid_backward(grad, gates)
        counts = [len(layer) - _deeper(layers, depth) for depth, layer in enumerate(layers)]
        parts = list(reversed(grad.split(counts[::-1], 2)))
        of_layers: list[Tensor] = []
        behind: Tensor | None = None
        for depth in reversed(range(len(layers))):
            weight = _of_maps(depth, layers[depth])
            z = maps[depth - 1] if depth else self._maps(q)
            of_out = to_maps(parts[depth] if behind is None else torch.cat([behind, parts[depth]], 2), len(weight))
            if any(needed[1:]):
                of_band = torch.bmm(row_windows(z, weight.shape[2]).transpose(1, 2), of_out)
                of_layers.insert(0, from_bands(of_band, weight.shape, w).view(layers[depth].shape))
            of_windows = torch.bmm(of_out, bands(weight, w).transpose(1, 2))
            of_z = from_row_windows(of_windows, z.shape, weight.shape[2])
            if depth:
                behind = torch.ops.aten.threshold_backward(of_z, z, 0).permute(1, 2, 0, 3)
        return [of_z.view(q.shape), *(self._of_weights(of_layers, weights) if of_layers else [None] * len(weights))]


def _inner(x: Tensor, height: int, width: int) -> Tensor:
    """The middle of the last two dimensions, (height, width)."""
    top, left = (x.shape[-2] - height) // 2, (x.shape[-1] - width) // 2
    return x[..., top : top + height, left : left + width]


def _of_maps(depth: int, layer: Tensor) -> Tensor:
    """All kernels of the first layer are for one map, those of another layer for one each: (G, N, kh, kw)."""
    return layer.unsqueeze(min(depth, 1))


def _deeper(layers: Sequence[Tensor], depth: int) -> int:
    """How many of a layer's convolutions another one follows."""
    return len(layers[depth + 1]) if depth + 1 < len(layers) else 0
