"""One forward of a network, and of each new block, to learn shapes and to count multiply-accumulates."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

Shape = tuple[int, ...]


class Trace:
    """What a forward showed: the shapes that each probed module gave, one a call, and the MACs of all of it."""

    def __init__(self) -> None:
        self.shapes: dict[int, list[Shape | str]] = {}
        self.macs = 0
        self.square = False  # were the images as high as wide?

    def of(self, module: nn.Module) -> list[Shape | str]:
        """The shapes that ``module`` gave (a text where that is no tensor), without repetition."""
        return list(dict.fromkeys(self.shapes.get(id(module), [])))


def run(model: nn.Module, args: tuple[Any, ...], probes: Iterable[nn.Module]) -> Trace:
    """Run ``model(*args)`` once in eval mode without gradients; the model, and the random state, stay as they were.

    Buffers are copied for the run, so that even a module that counts its calls in one comes out unchanged.
    """
    found = Trace()

    def record(module: nn.Module, inputs: Any, output: Any) -> None:
        shape = tuple(output.shape) if isinstance(output, Tensor) else f'a {type(output).__name__}'
        found.shapes.setdefault(id(module), []).append(shape)

    handles = [probe.register_forward_hook(record) for probe in dict.fromkeys(probes)]
    try:
        with quietly(model), _counting() as counter:
            functional_call(model, {name: b.clone() for name, b in model.named_buffers()}, args)
        found.macs = counter.get_total_flops() // 2
    finally:
        for handle in handles:
            handle.remove()
    return found


def run_block(block: nn.Module, channels: int, size: tuple[int, int]) -> tuple[Tensor, Any, int]:
    """Run a block on one random map (1, C, H, W) in eval mode: the map, what the block gave, and its MACs."""
    tensor = next((t for t in (*block.parameters(), *block.buffers()) if t.is_floating_point()), torch.empty(0))
    with quietly(block), _counting() as counter:
        x = torch.randn(1, channels, *size, generator=torch.Generator().manual_seed(0))
        x = x.to(device=tensor.device, dtype=tensor.dtype)
        y = block(x)
    return x, y, counter.get_total_flops() // 2


@contextmanager
def quietly(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, and afterwards the modes of all modules and the random state of before."""
    training = {module: module.training for module in model.modules()}
    devices = {p.device for p in model.parameters() if p.device.type != 'cpu'}
    kind = next((device.type for device in devices), 'cuda')
    with torch.no_grad(), torch.random.fork_rng(devices=list(devices), device_type=kind):
        # Not model.eval(): a train() of somebody's own may do more than switch, merge weights for example.
        for module in training:
            module.training = False
        try:
            yield
        finally:
            for module, mode in training.items():
                module.training = mode


def _counting() -> Any:
    from torch.utils.flop_counter import FlopCounterMode  # imported late: it loads the compiler's parts

    return FlopCounterMode(display=False)
