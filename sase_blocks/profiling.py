"""Run forwards of networks and blocks to find shapes, count multiply-accumulates, and measure times."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

Shape = tuple[int, ...]


class Trace:
    """The record of a forward: each probed module's input and output shapes, one per call, and the total MACs.

    Of several tensors in a tuple or a list, this is the first. ``others`` has the shapes of the rest.
    """

    def __init__(self) -> None:
        self.shapes: dict[int, list[Shape | str]] = {}
        self.inputs: dict[int, list[Shape | str]] = {}
        self.others: dict[int, list[Shape]] = {}
        self.macs = 0

    def of(self, module: nn.Module) -> list[Shape | str]:
        """The distinct output shapes of ``module`` (a text for an output that is not a tensor)."""
        return list(dict.fromkeys(self.shapes.get(id(module), [])))


def run(model: nn.Module, args: tuple[Any, ...], probes: Iterable[nn.Module]) -> Trace:
    """Run ``model(*args)`` once in eval mode without gradients. The model and the random state do not change.

    Buffers are copied for the run, so even a module that counts its calls in one stays unchanged.
    """
    found = Trace()

    def record(module: nn.Module, inputs: Any, named: dict[str, Any], output: Any) -> None:
        given, *others = output if type(output) in (tuple, list) and len(output) > 0 else (output,)
        taken = next((x[0] if type(x) is list and x else x for x in (*inputs, *named.values())), None)
        found.inputs.setdefault(id(module), []).append(_shape(taken))
        found.shapes.setdefault(id(module), []).append(_shape(given) if given is not None else _shape(output))
        found.others.setdefault(id(module), []).extend(tuple(x.shape) for x in others if isinstance(x, Tensor))

    handles = [probe.register_forward_hook(record, with_kwargs=True) for probe in dict.fromkeys(probes)]
    trained = [p for p in model.parameters() if p.requires_grad]
    try:
        for p in trained:  # the counter fails for a module called with a parameter
            p.requires_grad_(False)
        # Compiled code runs eagerly, because an existing graph has no probes.
        with quietly(model), torch.compiler.set_stance('force_eager'), _counting() as counter:
            on_copied_buffers(model, args)
        found.macs = counter.get_total_flops() // 2
    finally:
        for p in trained:
            p.requires_grad_(True)
        for handle in handles:
            handle.remove()
    return found


def on_copied_buffers(model: nn.Module, args: tuple[Any, ...]) -> Any:
    """The result of ``model(*args)``. Discards changes to its buffers."""
    # torch's handling of tied tensors loses the original buffer of a module that is used in two places.
    return functional_call(model, {name: b.clone() for name, b in model.named_buffers()}, args, tie_weights=False)


def _shape(x: Any) -> Shape | str:
    return tuple(x.shape) if isinstance(x, Tensor) else f'a {type(x).__name__}'


def run_block(block: nn.Module, channels: int, size: tuple[int, int]) -> tuple[Tensor, Any, int]:
    """Run a block on one random map (1, C, H, W) in eval mode. Returns the map, the output, and the MACs."""
    tensor = next((t for t in (*block.parameters(), *block.buffers()) if t.is_floating_point()), torch.empty(0))
    with quietly(block), _counting() as counter:
        x = torch.randn(1, channels, *size, generator=torch.Generator().manual_seed(0))
        x = x.to(device=tensor.device, dtype=tensor.dtype)
        y = block(x)
    return x, y, counter.get_total_flops() // 2


def count_macs(model: nn.Module, image_shape: tuple[int, int, int]) -> int:
    """Multiply-accumulates of the convolutions and matrix products of one forward pass of one image (C, H, W).

    It runs on a copy of the model on the meta device, so it computes nothing.
    """
    model = copy.deepcopy(model).to('meta').eval()
    with torch.no_grad(), _counting() as counter:
        model(torch.empty(1, *image_shape, device='meta'))
    return int(counter.get_total_flops() // 2)


def milliseconds_per_image(
    networks: Mapping[str, nn.Module], images: Tensor, rounds: int = 15, *, training: bool = False
) -> dict[str, float]:
    """Median time per image of a forward pass of the batch ``images`` in eval mode.

    The networks take turns, so that slow or fast moments of the machine affect all of them.

    Args:
        training: measure a forward and a backward pass in training mode instead.
    """
    seconds: dict[str, list[float]] = {name: [] for name in networks}
    for _ in range(rounds + 1):
        for name, model in networks.items():
            model.train(training)
            start = time.perf_counter()
            with torch.set_grad_enabled(training):
                outputs = model(images)
            if training:
                outputs.float().square().mean().backward()
            if images.is_cuda:
                torch.cuda.synchronize(images.device)
            seconds[name].append(time.perf_counter() - start)
            model.zero_grad()
    # The first round only warms up caches.
    return {name: 1000 * statistics.median(values[1:]) / len(images) for name, values in seconds.items()}


def kept_bytes(call: Callable[[], object], excluded: set[int]) -> int:
    """Bytes that autograd keeps between forward and backward: distinct storages, with x.

    Args:
        call: the forward.
        excluded: storages to leave out, such as ``storages_of`` the network.
    """
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in excluded:  # on the meta device, every address is 0
            storages[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()  # keep it alive while counting, or a new storage could reuse a freed one's place
    del result
    return sum(storages.values())


def storages_of(module: nn.Module) -> set[int]:
    """The storages of the parameters and buffers, for ``kept_bytes``."""
    return {tensor.untyped_storage()._cdata for tensor in (*module.parameters(), *module.buffers())}


@contextmanager
def quietly(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients. Afterwards, restores the modes of all modules and the random state.

    It also restores attributes that a forward sets, because a network may keep state for the last image size, like the
    windows of transformers' Swin.
    """
    before = [(module, dict(module.__dict__)) for module in model.modules()]
    devices = {p.device for p in model.parameters() if p.device.type != 'cpu'}
    kind = next((device.type for device in devices), 'cuda')
    with torch.no_grad(), torch.random.fork_rng(devices=list(devices), device_type=kind):
        # Not model.eval(), because a custom train() may do more than switch, for example merge weights.
        for module, _ in before:
            module.training = False
        try:
            yield
        finally:
            for module, attributes in before:
                module.__dict__.clear()
                module.__dict__.update(attributes)


def _counting() -> Any:
    from torch.utils.flop_counter import FlopCounterMode  # imported late, because it loads parts of the compiler

    return FlopCounterMode(display=False)
