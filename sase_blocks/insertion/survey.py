"""The forwards that ``insert`` uses: one at the image size, one at another size, each run when first needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sase_blocks.profiling import Shape, Trace, on_copied_buffers, quietly, run

from .layout import Image, Layout, find_layout, parse_layout


class Map(NamedTuple):
    """The map that a module returns."""

    channels: int
    size: tuple[int, int]  # the largest, if it is run at several
    layout: Layout


class Survey:
    """The maps in a network, as far as known.

    Args:
        model: the network.
        args: the arguments of a forward; None if unknown.
        forward: runs it, and returns the trace, or None and the reason.
        layout: the caller's ``layout=``, see ``parse_layout``.
    """

    def __init__(
        self,
        model: nn.Module,
        args: tuple[Any, ...] | None,
        forward: Callable[[], tuple[Trace | None, str]],
        layout: str | None = None,
    ) -> None:
        self.model = model
        self.args = args or ()
        self.asked = parse_layout(layout)
        self._forward = forward

    @cached_property
    def _first(self) -> tuple[Trace | None, str]:
        return self._forward()

    @property
    def trace(self) -> Trace | None:
        """The forward's trace; None if there was none, with the reason in ``why``."""
        return self._first[0]

    @property
    def why(self) -> str:
        return self._first[1]

    @cached_property
    def other(self) -> tuple[Trace, Image] | None:
        """The trace of a forward at another size, and that size; None if the network accepts or uses only one size."""
        image = _image_of(self.args)
        if image is None or self.trace is None:
            return None
        _, height, width = image
        narrower = width // 2
        for size in ((height, narrower), (height, 2 * width), (2 * height, width)):
            if min(size) < min(32, height, width):
                continue
            args = tuple(_resized(arg, size) for arg in self.args)
            try:
                trace = run(self.model, args, self.model.modules())
            except Exception:  # networks fail in any way at an unsupported size
                continue
            if trace.shapes != self.trace.shapes:  # some networks resize their input
                return trace, (image[0], *size)
        return None

    @cached_property
    def _unrolls(self) -> bool:
        return any(type(module).__name__ == 'Unroll' for module in self.model.modules())

    @cached_property
    def _grids(self) -> frozenset[tuple[int, int]]:
        """Map sizes of all convolutions, and their halves, because tokens may be merged."""
        found: set[tuple[int, int]] = set()
        for module in self.model.modules():
            if self.trace is not None and isinstance(module, nn.Conv2d):
                found |= {(s[2], s[3]) for s in self.trace.of(module) if not isinstance(s, str) and len(s) == 4}
        for _ in range(5):
            found |= {((h + 1) // 2, (w + 1) // 2) for h, w in found}
        return frozenset(found)

    def is_read(self, module: nn.Module, layout: Layout) -> bool:
        """Whether the network's outputs depend on a module's map, not only on its prefix tokens.

        They do not for the last block of a transformer whose head reads only the class token.
        """
        if layout.prefix == 0:
            return True

        def without_map(module: nn.Module, inputs: Any, output: Any) -> Any:
            first = output[0] if type(output) in (tuple, list) else output
            first[:, layout.prefix :] *= -2.0

        handle = module.register_forward_hook(without_map)
        try:
            changed = self._outputs()
        finally:
            handle.remove()
        return len(changed) != len(self._plain_outputs) or not all(map(torch.equal, changed, self._plain_outputs))

    @cached_property
    def _plain_outputs(self) -> list[Tensor]:
        return self._outputs()

    def _outputs(self) -> list[Tensor]:
        with quietly(self.model):
            return list(_tensors(on_copied_buffers(self.model, self.args)))

    def map_of(self, module: nn.Module, channels: int | None = None) -> Map | str:
        """The map that a module returns, or a text that says why it returns none.

        Args:
            channels: the channels, if the module itself tells them; it then returns (B, C, H, W).
        """
        if self.trace is None:
            return self.why
        shapes = self.trace.shapes.get(id(module), [])
        if not shapes:
            return 'was not run by the forward of the network, so attention there would do nothing'
        found: dict[Layout, tuple[Shape, int]] = {}
        for call, shape in enumerate(shapes):
            if isinstance(shape, str):
                return f'returns {shape}, but attention needs a feature map of shape (B, C, H, W) there'
            layout = self._layout(module, call, shape, channels)
            if isinstance(layout, str):
                return layout
            found[layout] = max(found.get(layout, ((), 0)), (shape, call))
        kinds = {(layout.kind, layout.prefix) for layout in found}
        widths = {layout.channels(shape) for layout, (shape, _) in found.items()}
        widths |= {next(iter(found)).channels(shape) for shape in shapes if not isinstance(shape, str)}
        if len(widths) > 1:
            return f'runs more than once, with {sorted(widths)} channels: no single attention fits'
        if len(kinds) > 1:
            return f'runs more than once, as {" and ".join(sorted(map(str, found)))}: no single attention fits'
        layout, (shape, _) = max(found.items(), key=lambda item: item[1])
        if layout.kind == 'tokens' and self.asked[0] is None and self._unrolls:
            return f'returns {shape}, tokens in window order (Hiera), which are not a map'
        return Map(layout.channels(shape), layout.size(shape), layout)

    def _layout(self, module: nn.Module, call: int, shape: Shape, channels: int | None) -> Layout | str:
        if self.asked[0] is None and len(shape) == 4 and channels == shape[1]:
            return Layout('NCHW')
        other = None
        if self.asked[0] in (None, 'tokens') and len(shape) in (3, 4) and self.other is not None:
            there = self.other[0].shapes.get(id(module), [])
            if len(there) == len(self.trace.shapes[id(module)] if self.trace else ()):
                at_other = there[call]
                other = None if isinstance(at_other, str) else (at_other, self.other[1])
        prefix = getattr(self.model, 'num_prefix_tokens', None)
        return find_layout(shape, _image_of(self.args), other, self.asked, prefix, self._grids)


def _tensors(x: Any) -> Iterator[Tensor]:
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, Mapping):
        yield from (t for value in x.values() for t in _tensors(value))
    elif isinstance(x, list | tuple):
        yield from (t for value in x for t in _tensors(value))


def _image_of(args: tuple[Any, ...]) -> Image | None:
    """(B, H, W) of the first images among the arguments."""
    for arg in args:
        if isinstance(arg, Tensor) and arg.ndim == 4:
            return arg.shape[0], arg.shape[2], arg.shape[3]
        if isinstance(arg, list) and arg and all(isinstance(image, Tensor) and image.ndim == 3 for image in arg):
            return len(arg), arg[0].shape[1], arg[0].shape[2]
    return None


def _resized(arg: Any, size: tuple[int, int]) -> Any:
    """Resize images, and return other arguments unchanged."""
    if isinstance(arg, Tensor) and arg.ndim == 4:
        return nn.functional.interpolate(arg, size)
    if isinstance(arg, list) and arg and all(isinstance(image, Tensor) and image.ndim == 3 for image in arg):
        return [nn.functional.interpolate(image[None], size)[0] for image in arg]
    return arg
