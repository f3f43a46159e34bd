"""Time a step of the SASE search, and count what its attention keeps for the backward pass.

A step is one update of the logits and one of the weights, on the paper's network (ResNet-20, 32 x 32 images, its 7
operations per edge). Order 1 is the first order. Order 2 compares the exact second order with the authors' unrolled
step, which uses a finite difference.

    python benchmarks/search.py --quick                            # a minute: batch 16, plain and shared
    python benchmarks/search.py --authors DIR                      # the authors' code too
    python benchmarks/search.py --authors DIR --compile --order 1  # compiled: some minutes before the first figure
    python benchmarks/search.py --device cuda --batch 128 --compile --json search.json

DIR is a checkout of https://github.com/pusheng0902/SASE. Their code requires CUDA, so on a CPU this script patches
``.cuda()`` to do nothing. The forms take turns, and each figure is the median over the rounds. On a CPU the clock is
the process's CPU time with one thread. On a GPU it is the time between two device events around a step.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import shlex
import statistics
import sys
import time
import types
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sase_blocks  # noqa: F401  (registers the models with timm)
from sase_blocks.search.sase.bilevel import VirtualStep, logits_gradient
from sase_blocks.search.sase.network import SearchNetwork
from sase_blocks.search.sase.space import SearchSpace

LR, MOMENTUM, DECAY, CLIP = 0.025, 0.9, 5e-4, 5.0
LOGITS_LR, LOGITS_DECAY = 3e-4, 1e-3
ORDERS = ('1', '2')
STAGES = ((16, 32), (32, 16), (64, 8))  # channels and size of the paper's three stages

Batch = tuple[Tensor, Tensor]


# ---------------------------------------------------------------------------------------------------- what is timed


class Ours:
    """Our search network in one form."""

    def __init__(self, form: str, compiled: bool, options: argparse.Namespace) -> None:
        torch.manual_seed(options.seed)
        model = timm.create_model('resnet20_cifar')
        space = SearchSpace.parse('paper')
        self.network = SearchNetwork(model, space, fair=options.fair, form=form).to(options.device).train()
        self.memory_format = torch.channels_last if options.channels_last else torch.contiguous_format
        self.network.to(memory_format=self.memory_format)
        self.attention: list[nn.Module] = list(self.network.blocks.values())
        if compiled:
            from sase_blocks.search.sase.compiling import compile_mixed_blocks

            compile_mixed_blocks(self.network)
        self.named = self.network.weights()
        self.weights = list(self.named.values())
        self.optimizer = torch.optim.SGD(self.weights, LR, MOMENTUM, weight_decay=DECAY, fused=True)
        self.logits_optimizer = torch.optim.Adam(
            [self.network.logits], LOGITS_LR, (0.5, 0.999), weight_decay=LOGITS_DECAY
        )

    def step(self, order: str, training: Batch, held_out: Batch) -> None:
        network = self.network
        training, held_out = ((x.to(memory_format=self.memory_format), y) for x, y in (training, held_out))
        states = ((name, self.optimizer.state[w]) for name, w in self.named.items())
        buffers = {name: state['momentum_buffer'] for name, state in states if 'momentum_buffer' in state}
        virtual = VirtualStep(LR, MOMENTUM, DECAY, buffers)
        network.logits.grad = logits_gradient(network, F.cross_entropy, order, held_out, training, virtual).gradient
        self.logits_optimizer.step()
        with network.learning(weights=True):
            loss = F.cross_entropy(network(training[0]), training[1])
            grads = torch.autograd.grad(loss, self.weights)
        for weight, grad in zip(self.weights, grads, strict=True):
            weight.grad = grad
        torch.nn.utils.clip_grad_norm_(self.weights, CLIP)
        self.optimizer.step()

    def kept(self, x: Tensor) -> int:
        """Bytes that the attention keeps in one forward of the network."""
        return kept_in(self.attention, lambda: self.network(x))


class Authors:
    """The authors' search network, their ``Architect`` and the body of their training loop."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        if not torch.cuda.is_available():
            torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign,assignment]
            torch.nn.Module.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign,assignment]
        sys.path.insert(0, str(folder))
        torch.manual_seed(options.seed)
        warnings.filterwarnings('ignore', category=UserWarning)  # their code is for an older torch
        network, architect = (importlib.import_module(name) for name in ('model_search_attention', 'architect'))
        self.network = network.Network(10).to(options.device).train()
        self.attention = [m for m in self.network.modules() if type(m).__name__ == 'Attention']
        settings = types.SimpleNamespace(
            momentum=MOMENTUM, weight_decay=DECAY, arch_learning_rate=LOGITS_LR, arch_weight_decay=LOGITS_DECAY
        )
        self.architect = architect.Architect(self.network, settings)
        self.optimizer = torch.optim.SGD(self.network.parameters(), LR, MOMENTUM, weight_decay=DECAY)

    def step(self, order: str, training: Batch, held_out: Batch) -> None:
        self.architect.step(*training, *held_out, LR, self.optimizer, order == '2')
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.network(training[0]), training[1])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), CLIP)
        self.optimizer.step()

    def kept(self, x: Tensor) -> int:
        return kept_in(self.attention, lambda: self.network(x))


def kept_in(modules: list[nn.Module], call: Callable[[], Tensor]) -> int:
    """Bytes of the distinct storages that autograd keeps inside ``modules``, with inputs, without parameters."""
    parameters = {p.untyped_storage().data_ptr() for module in modules for p in module.parameters()}
    storages: dict[int, int] = {}
    hooks: list[Any] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    def enter(module: nn.Module, args: Any) -> None:
        hooks.append(torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor))
        hooks[-1].__enter__()

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        hooks.pop().__exit__(None, None, None)

    handles = [m.register_forward_pre_hook(enter) for m in modules] + [m.register_forward_hook(leave) for m in modules]
    try:
        result = call()  # keep it alive while counting, or a new storage could reuse a freed address
        total = sum(storages.values())
        del result
    finally:
        for handle in handles:
            handle.remove()
    return total


# ---------------------------------------------------------------------------------------------------------- clocks


def seconds(call: Callable[[], None], device: str) -> float:
    """CPU seconds of the process, or seconds between two events on the device."""
    if device == 'cpu':
        start = time.process_time()
        call()
        return time.process_time() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of every step of every form in every round, and the bytes kept."""
    subjects: dict[str, Ours | Authors] = {}
    if options.authors:
        subjects['authors'] = Authors(options.authors, options)
    subjects['plain'] = Ours('plain', False, options)
    subjects['shared'] = Ours('shared', False, options)
    if options.compile:
        subjects['shared, compiled'] = Ours('shared', True, options)
    generator = torch.Generator().manual_seed(options.seed)

    def batch() -> Batch:
        images = torch.randn(options.batch, 3, 32, 32, generator=generator)
        labels = torch.randint(0, 10, (options.batch,), generator=generator)
        return images.to(options.device), labels.to(options.device)

    training, held_out = batch(), batch()
    rows = []
    for order in options.order:
        # Compiled code has no double backward.
        names = [name for name in subjects if order == '1' or 'compiled' not in name]
        samples: dict[str, list[float]] = {name: [] for name in names}
        first: dict[str, float] = {}
        for number in range(-options.warmup, options.rounds):
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                start = time.perf_counter()
                value = seconds(partial(subjects[name].step, order, training, held_out), options.device)
                first.setdefault(name, time.perf_counter() - start)
                if number >= 0:
                    samples[name].append(value)
                if sys.stderr.isatty():
                    print(f'\r\033[Korder {order}, {name}: {value:.3f} s', end='', file=sys.stderr, flush=True)
        if sys.stderr.isatty():
            print('\r\033[K', end='', file=sys.stderr)
        for name in names:
            middle = statistics.median(samples[name])
            rows.append({'order': order, 'form': name, 'seconds': middle, 'samples': samples[name]})
            rows[-1]['first_call_wall_seconds'] = first[name]
    kept = {name: subject.kept(training[0]) for name, subject in subjects.items() if 'compiled' not in name}
    return {'rows': rows, 'kept_bytes': kept, 'map_bytes': map_bytes(options.batch)}


def map_bytes(batch: int) -> int:
    """Bytes of the nine inputs of the attention."""
    return sum(3 * batch * channels * size * size * 4 for channels, size in STAGES)


def table(result: dict[str, Any]) -> str:
    """The figures as text, with ratios to the authors' code if it ran, and otherwise to the plain form."""
    kept, rows = result['kept_bytes'], result['rows']
    reference = 'authors' if 'authors' in kept else 'plain'
    lines = [f'{"order":6}{"form":20}{"s a step":>10}{"min..max":>16}{"times faster":>14}{"kept, MB":>10}{"part":>7}']
    for row in rows:
        base = next(r['seconds'] for r in rows if r['order'] == row['order'] and r['form'] == reference)
        held = kept.get(row['form'])
        memory = f'{held / 1e6:10.1f}{held / kept[reference]:7.2f}' if held else f'{"-":>10}{"-":>7}'
        extent = f'{min(row["samples"]):.3f}..{max(row["samples"]):.3f}'
        lines.append(
            f'{row["order"]:6}{row["form"]:20}{row["seconds"]:10.3f}{extent:>16}{base / row["seconds"]:14.2f}{memory}'
        )
    lines.append(
        f'(times faster than, and part of: {reference}; the attention reads {result["map_bytes"] / 1e6:.1f} MB)'
    )
    return '\n'.join(lines)


# -------------------------------------------------------------------------------------------------- command line


def parse(argv: list[str]) -> argparse.Namespace:
    summary, _, details = (__doc__ or '').partition('\n\n')
    parser = argparse.ArgumentParser(
        prog='search.py', description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--authors', type=Path, metavar='DIR', help="a checkout of the authors' repository")
    parser.add_argument('--compile', action='store_true', help='also a compiled form, for order 1')
    parser.add_argument('--order', nargs='+', choices=ORDERS, default=list(ORDERS))
    parser.add_argument('--fair', action='store_true', help="fair mixing (default: the authors' mixture)")
    parser.add_argument('--channels-last', action='store_true', help='our network in channels_last')
    parser.add_argument('--batch', type=int, help='images (default: 64, 16 with --quick)')
    parser.add_argument('--rounds', type=int, help='samples per figure (default: 7, 3 with --quick)')
    parser.add_argument('--warmup', type=int, default=1, help='rounds before these (default: 1)')
    parser.add_argument('--device', choices=('cpu', 'cuda'), default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--quick', action='store_true', help='about a minute')
    parser.add_argument('--json', type=Path, metavar='FILE', help='write all figures to FILE')
    options = parser.parse_args(argv)
    options.batch = options.batch if options.batch is not None else 16 if options.quick else 64
    options.rounds = options.rounds if options.rounds is not None else 3 if options.quick else 7
    if options.batch < 2 or options.rounds < 1 or options.warmup < 1:
        parser.error(
            '--batch must be at least 2 and --rounds and --warmup at least 1, '
            f'got {options.batch}, {options.rounds} and {options.warmup}'
        )
    if options.device == 'cuda' and not torch.cuda.is_available():
        parser.error('--device cuda: torch finds no CUDA device here; --device cpu runs without')
    if options.authors:
        folders = (options.authors, options.authors / 'SASE_search')
        found = next((f.resolve() for f in folders if (f / 'architect.py').is_file()), None)
        if found is None:
            parser.error(f'--authors {options.authors}: neither it nor its folder SASE_search holds architect.py')
        options.authors = found
    return options


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    options = parse(argv)
    torch.set_num_threads(1)
    result = {
        'command': shlex.join(['python', 'benchmarks/search.py', *argv]),
        'device': torch.cuda.get_device_name() if options.device == 'cuda' else platform.processor(),
        'torch': torch.__version__,
        'batch': options.batch,
        'fair': options.fair,
        'channels_last': options.channels_last,
        **measure(options),
    }
    print(table(result))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + '\n', encoding='utf-8')
    return 0


if __name__ == '__main__':
    sys.exit(main())
