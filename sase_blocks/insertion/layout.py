"""The layout of a map in a tensor, detected from forwards at two sizes, and converted for the attention and back.

Not in the papers. ``NCHW``: (B, C, H, W); ``NHWC``: (B, H, W, C); ``tokens``: (B, P + H W, C), with P class,
distillation or register tokens in front, which stay as they are. Axes whose size follows the image are the map's, and
the other is the channel axis. Windows change another axis, so they are not a map. With a fixed image size, exactly one
reading must have the image's aspect ratio.
"""

# No `from __future__ import annotations`: TorchScript compiles the functions of this file.
import inspect
import math
import re
from functools import lru_cache
from typing import NamedTuple, Optional

import torch
from torch import Tensor, nn

from sase_blocks.blocks import AttentionModule, SequentialAttention

LAYOUTS = ('NCHW', 'NHWC', 'tokens')
MOST_PREFIX = 16  # more than any known network: a class token and eight registers

Image = tuple[int, int, int]  # B, H, W


class Layout(NamedTuple):
    """One of ``LAYOUTS``, for tokens with the number of prefix tokens and the map's (H, W)."""

    kind: str
    prefix: int = 0
    grid: tuple[int, int] = (1, 1)

    def __str__(self) -> str:
        return f'{self.kind}+{self.prefix}' if self.prefix else self.kind

    def channels(self, shape: tuple[int, ...]) -> int:
        return shape[1] if self.kind == 'NCHW' else shape[-1]

    def size(self, shape: tuple[int, ...]) -> tuple[int, int]:
        if self.kind == 'tokens':
            return self.grid
        return (shape[2], shape[3]) if self.kind == 'NCHW' else (shape[1], shape[2])

    def around(self, block: nn.Module) -> nn.Module:
        """The block, wrapped for tensors of this layout."""
        if self.kind == 'NHWC':
            return OnChannelsLast(block)
        return OnTokens(block, self.prefix, self.grid) if self.kind == 'tokens' else block


def takes_alpha(block: nn.Module) -> bool:
    """Whether a block applies an identity start's alpha in its gate, like ours. Sets ``in_gate`` of a sequence."""
    if isinstance(block, _Turned):
        return block.in_gate
    if isinstance(block, SequentialAttention):
        block.in_gate = all(map(takes_alpha, block))
        return block.in_gate
    return isinstance(block, AttentionModule) and 'alpha' in inspect.signature(block.forward).parameters


class _Turned(nn.Module):
    """A block between two layout conversions. timm's initialisation finds the block's own."""

    __constants__ = ('in_gate',)  # TorchScript compiles only one of the two calls

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.in_gate = takes_alpha(block)

    def run(self, x: Tensor, alpha: Optional[Tensor]) -> Tensor:  # noqa: UP045
        if self.in_gate:
            return self.block(x, alpha)
        else:
            return self.block(x)

    def reset_parameters(self) -> None:
        if not hasattr(self.block, 'zero_init_last') and hasattr(self.block, 'reset_parameters'):
            self.block.reset_parameters()  # type: ignore[operator]


class OnChannelsLast(_Turned):
    """Applies a (B, C, H, W) block to (B, H, W, C)."""

    def forward(self, x: Tensor, alpha: Optional[Tensor] = None) -> Tensor:  # noqa: UP045
        y = self.run(x.permute(0, 3, 1, 2), alpha).permute(0, 2, 3, 1)
        return y.contiguous() if alpha is None else y  # with alpha it has x's memory layout


class OnTokens(_Turned):
    """Applies a (B, C, H, W) block to (B, P + H W, C). The first P tokens stay as they are.

    Tokens do not tell the width of their map. It is assumed to have the aspect ratio of ``grid``, from the image at the
    insertion. If the number of tokens does not fit, ``forward`` raises ValueError.

    Args:
        block: keeps the shape of its input.
        prefix: P.
        grid: (H, W) at the insertion.
    """

    def __init__(self, block: nn.Module, prefix: int, grid: tuple[int, int]) -> None:
        super().__init__(block)
        self.prefix = prefix
        self.height, self.width = grid

    def extra_repr(self) -> str:
        return f'prefix={self.prefix}, grid={(self.height, self.width)}'

    def forward(self, x: Tensor, alpha: Optional[Tensor] = None) -> Tensor:  # noqa: UP045
        y = self.run(tokens_to_map(x, self.prefix, self.height, self.width), alpha)
        return map_to_tokens(x, y, self.prefix, alpha is not None)


# torch.fx.wrap keeps both whole in a symbolic trace, because they depend on the number of tokens.
@torch.fx.wrap
def tokens_to_map(x: Tensor, prefix: int, height: int, width: int) -> Tensor:
    """(B, P + N, C) to (B, C, H, W), with the aspect ratio of ``height`` x ``width``."""
    number = x.shape[1] - prefix
    if number != height * width:
        times = max(1, int(math.sqrt(number / (height * width)) * math.gcd(height, width) + 0.5))
        h, w = times * height // math.gcd(height, width), times * width // math.gcd(height, width)
        if h * w != number:
            raise ValueError(
                f'{number} tokens do not fit a map with the aspect ratio {height} x {width} of the insertion: insert '
                f'for images of this shape, with input_size=(H, W)'
            )
        height, width = h, w
    return x[:, prefix:].transpose(1, 2).reshape(x.shape[0], x.shape[2], height, width)


@torch.fx.wrap
def map_to_tokens(x: Tensor, y: Tensor, prefix: int, as_x: bool) -> Tensor:
    """The tokens ``x``, all but the first ``prefix`` replaced by the map ``y``; in x's memory layout if ``as_x``."""
    y = y.flatten(2).transpose(1, 2)
    if prefix > 0:
        y = torch.cat([x[:, :prefix], y.to(x.dtype)], dim=1)
    if not as_x:
        return y.contiguous()
    return y if y.stride() == x.stride() else torch.empty_like(x).copy_(y)


def parse_layout(layout: Optional[str]) -> tuple[Optional[str], Optional[int]]:  # noqa: UP045
    """The kind and the number of prefix tokens in ``layout=``; None if it does not say."""
    if layout is None:
        return None, None
    match = re.fullmatch(r'(NCHW|NHWC|tokens)|tokens\+(\d+)', layout) if isinstance(layout, str) else None
    if match is None:
        raise ValueError(
            f"layout must be 'NCHW', 'NHWC', 'tokens', 'tokens+1' (one class token in front) or None, got {layout!r}"
        )
    return ('tokens', int(match[2])) if match[1] is None else (match[1], None)


def find_layout(
    shape: tuple[int, ...],
    image: Optional[Image],  # noqa: UP045
    other: Optional[tuple[tuple[int, ...], Image]],  # noqa: UP045
    asked: tuple[Optional[str], Optional[int]] = (None, None),  # noqa: UP045
    prefix: Optional[int] = None,  # noqa: UP045
    grids: frozenset[tuple[int, int]] = frozenset(),
) -> Layout | str:
    """The layout of a module's output, or a text that says why it is unknown.

    Args:
        shape, image: of its output, and of the images (B, H, W); None if there are none.
        other: the same at another size; None if the network accepts only one.
        asked: the result of ``parse_layout``.
        prefix: the network's own number of prefix tokens.
        grids: map sizes of the network's convolutions, which include the patch embedding's.
    """
    kind = asked[0]
    if kind in ('NCHW', 'NHWC') and len(shape) == 4:
        return Layout(kind)
    if len(shape) not in {'NCHW': (), 'NHWC': (), 'tokens': (3,), None: (3, 4)}[kind]:
        form = {'NHWC': '(B, H, W, C)', 'tokens': '(B, N, C)'}.get(kind or '', '(B, C, H, W)')
        return f'returns {shape}, but attention needs a feature map of shape {form} there'
    if image is None:
        return f'returns {shape}, and the input is not an image to compare it with; pass layout='
    seen_batches = {shape[0]} if other is None else {shape[0], other[0][0]}
    if len(seen_batches) > 1 or (other is None and shape[0] != image[0]):
        return f'returns {shape} for {image[0]} images: windows or parts of images are not a map'
    if other is not None and len(other[0]) != len(shape):
        return f'returns {shape} at one image size, and {other[0]} at another'
    return (
        _four(shape, image, other, grids) if len(shape) == 4 else _three(shape, image, other, asked[1], prefix, grids)
    )


def _four(
    shape: tuple[int, ...],
    image: Image,
    other: Optional[tuple[tuple[int, ...], Image]],  # noqa: UP045
    grids: frozenset[tuple[int, int]],
) -> Layout | str:
    if other is not None:
        moved = [axis for axis in range(4) if shape[axis] != other[0][axis]]
        images = [axis for axis in (0, 1) if image[axis + 1] != other[1][axis + 1]]
        if moved == [axis + 2 for axis in images]:
            return Layout('NCHW')
        if moved == [axis + 1 for axis in images]:
            return Layout('NHWC')
        if moved:
            return (
                f'returns {shape} for images of {image[1:]} and {other[0]} for {other[1][1:]}, neither (B, C, H, W) '
                f'nor (B, H, W, C): windows are not a map'
            )
    sizes = {'NCHW': shape[2:], 'NHWC': shape[1:3]}
    if len(seen := [kind for kind, size in sizes.items() if size in grids]) == 1:
        return Layout(seen[0])
    if grids and not seen:
        return f"returns {shape}, which fits no convolution's map in the network; pass layout="
    off = {kind: _off(size, image[1:]) for kind, size in sizes.items()}
    best = min(off, key=lambda kind: off[kind])
    if off[best] > 2 * max(image[1:]):  # two pixels, which convolutions without padding may lose
        return f"returns {shape}, which has the images' aspect ratio in no reading; pass layout="
    if off['NCHW'] == off['NHWC']:
        return f"returns {shape}, which may be (B, C, H, W) or (B, H, W, C); pass layout='NCHW' or layout='NHWC'"
    return Layout(best)


def _off(size: tuple[int, ...], image: tuple[int, ...]) -> int:
    return abs(size[0] * image[1] - size[1] * image[0])


def _three(
    shape: tuple[int, ...],
    image: Image,
    other: Optional[tuple[tuple[int, ...], Image]],  # noqa: UP045
    asked: Optional[int],  # noqa: UP045
    prefix: Optional[int],  # noqa: UP045
    grids: frozenset[tuple[int, int]],
) -> Layout | str:
    found = _readings(shape[1], image[1], image[2])
    if other is not None:
        if shape[2] != other[0][2] or shape[1] == other[0][1]:
            return (
                f'returns {shape} for images of {image[1:]} and {other[0]} for {other[1][1:]}: these are not tokens '
                f'(B, N, C) of a map'
            )
        again = _readings(other[0][1], other[1][1], other[1][2])
        found = {stride: reading for stride, reading in found.items() if reading[0] == again.get(stride, (-1,))[0]}
    layouts = {Layout('tokens', p, (h, w)) for p, h, w in found.values() if asked in (None, p)}
    if other is None:  # a single token is a class token
        layouts = {layout for layout in layouts if layout.grid != (1, 1)}
    # Several are decided by a convolution's grid, then the network's own number of prefix tokens, then no prefix. With
    # only one image size, a reading that neither of the first two supports is a guess.
    seen = {layout for layout in layouts if layout.grid in grids}
    told = {layout for layout in layouts if layout.prefix == prefix}
    bare = {layout for layout in layouts if layout.prefix == 0}
    if other is not None or asked is not None:
        choices = [layouts, seen, seen & told, told, bare]
    else:
        choices = [seen, seen & told, seen & bare, told]
    sure = next((choice for choice in choices if len(choice) == 1), None)
    if sure is None:
        return (
            f'returns {shape}, which has {"more than one" if layouts else "no"} reading as tokens of a map of images '
            f"of {image[1:]}; pass the number of prefix tokens, as in layout='tokens+1'"
        )
    return sure.pop()


@lru_cache(maxsize=4096)
def _readings(number: int, height: int, width: int) -> dict[tuple[int, bool], tuple[int, int, int]]:
    """(P, H, W) for every stride, rounded down or up, whose map has at most ``MOST_PREFIX`` fewer positions."""
    found = {}
    for stride in range(1, max(height, width) + 1):
        for up in (False, True):
            h, w = (max(1, (n + (stride - 1) * up) // stride) for n in (height, width))
            if 0 <= number - h * w <= MOST_PREFIX:
                found[stride, up] = (number - h * w, h, w)
    return found
