"""Time self-attention, forward and forward + backward, and count its kept and peak memory.

There are two groups. Each takes turns with the unfold formulation (k x k copies of k and v, as in the public code of
stand-alone self-attention), and all figures are medians and ratios to it:

    attention   from q, k and v to the result: every route of `local_attention` on the device, and NATTEN if it is
                installed (it has no relative term, so it computes less)
    layers      from x, with the projections: LocalSelfAttention, timm's HaloAttn and BottleneckAttn, and
                AxialSelfAttention by its routes and with a batch norm over maps, as in the authors' code

    python benchmarks/self_attention.py --quick                  # a minute: 28 x 28, k = 7
    python benchmarks/self_attention.py --json attention.json    # 56, 28, 14 with k = 3, 5, 7
    python benchmarks/self_attention.py --sizes 28 --kernels 7 --compile
    python benchmarks/self_attention.py --device cuda --dtype bf16 fp32 --batch 64 --json gpu.json

Attention alone must read q, k and v and write the result, and backward must read these four and one gradient and write
three. This script counts these fewest bytes, and on a GPU it compares each time with a copy of as many bytes.

benchmarks/README.md explains the columns. Exits with 1 if a route differs from unfold.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import platform
import shlex
import statistics
import sys
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from blocks import DTYPES
from meter import (
    Clock,
    CpuClock,
    CudaClock,
    copy_bandwidth,
    cpu_name,
    interleaved,
    peak_bytes,
    progress,
    spread,
)
from timm.layers.bottleneck_attn import BottleneckAttn
from timm.layers.halo_attn import HaloAttn
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sase_blocks.profiling import kept_bytes
from sase_blocks.selfattention import (
    AXIAL_ROUTES,
    LOCAL_ROUTES,
    AxialSelfAttention,
    LocalSelfAttention,
    local_attention,
)

HEADS = 8
WIDTHS = {56: 64, 28: 128, 14: 256, 7: 512}  # of a ResNet's 3 x 3 convolutions, at 224 x 224
# Against unfold, ||a - b|| / ||b||, of the result and of every gradient.
TOLERANCE = {'fp32': 1e-4, 'bf16': 5e-2, 'fp16': 1e-2}


@dataclass
class Row:
    """One candidate in one setting. Ratios are to the same group's unfold: above 1 is faster, below 1 less memory."""

    group: str
    name: str
    size: int
    kernel: int
    channels: int
    batch: int
    dtype: str
    forward_ms: float | None = None
    forward_backward_ms: float | None = None
    spread: float | None = None  # interquartile range over the median, of the noisier of the two
    forward_times_faster: float | None = None
    forward_backward_times_faster: float | None = None
    kept: float | None = None  # between forward and backward, in sizes of x (or of q)
    kept_of_unfold: float | None = None
    peak: float | None = None  # of forward + backward, above the memory before, in sizes of x (or of q)
    peak_of_unfold: float | None = None
    fewest_forward_bytes: int | None = None  # of attention: q, k, v and y, each once
    fewest_forward_backward_bytes: int | None = None
    forward_of_copy: float | None = None  # the time of a copy that moves the fewest bytes over this time, on CUDA
    forward_backward_of_copy: float | None = None
    error: float | None = None  # against unfold
    failure: str | None = None


# ---------------------------------------------------------------------------------------------------- what is timed


def unfold_attention(q: Tensor, k: Tensor, v: Tensor, relative: Tensor) -> Tensor:
    """The formulation with k x k copies of k and v. Shapes as in `local_attention`, relative term only on the query."""
    b, h, d, height, width = q.shape
    size = relative.shape[3]
    table = torch.cat([relative[0, 0][:, :, None].expand(-1, -1, size), relative[0, 1][:, None].expand(-1, size, -1)])
    keys, values = (
        F.unfold(x.reshape(b, h * d, height, width), size, padding=size // 2).reshape(b, h, d, size**2, -1)
        for x in (k, v)
    )
    logits = (q.reshape(b, h, d, 1, -1) * (keys + table.reshape(d, -1, 1))).sum(2)
    return (logits.softmax(2).unsqueeze(2) * values).sum(3).reshape(q.shape)


def natten_attention(q: Tensor, k: Tensor, v: Tensor, relative: Tensor) -> Tensor:
    """NATTEN's neighbourhood attention: windows that stay inside the map, and no relative term."""
    import natten

    maps = (x.permute(0, 3, 4, 1, 2).contiguous() for x in (q, k, v))
    y = natten.na2d(*maps, kernel_size=relative.shape[3], scale=1.0)
    return y.permute(0, 3, 4, 1, 2) + 0 * relative.sum()


class Unfold(LocalSelfAttention):
    """LocalSelfAttention in the unfold formulation."""

    def forward(self, x: Tensor) -> Tensor:
        shape = (x.shape[0], self.channels // self.heads, self.heads, x.shape[2], x.shape[3])
        q, k, v = (p(x).reshape(shape).transpose(1, 2) for p in (self.query, self.key, self.value))
        return unfold_attention(q, k, v, self.relative).transpose(1, 2).reshape(x.shape)


def axial_with_maps(channels: int, size: int) -> nn.Module:
    """AxialSelfAttention with a batch norm over the maps of the logits, directly as the formula."""
    layer = AxialSelfAttention(channels, HEADS, size)
    for axis in (layer.height, layer.width):
        axis.logit_norm = nn.BatchNorm2d(3 * HEADS)  # type: ignore[assignment]
    return layer


def halo(channels: int, size: int, kernel: int) -> nn.Module:
    """timm's, with blocks of 7 and this window's halo. All queries of a block see the whole block and its halo."""
    layer: nn.Module = HaloAttn(
        channels, num_heads=HEADS, dim_head=channels // HEADS, block_size=7, halo_size=kernel // 2
    )
    return layer


def bottleneck(channels: int, size: int) -> nn.Module:
    """timm's, in which every position attends to every other."""
    layer: nn.Module = BottleneckAttn(channels, feat_size=(size, size), num_heads=HEADS, dim_head=channels // HEADS)
    return layer


def functions(device: str) -> dict[str, Callable[..., Tensor]]:
    """The group `attention`; unfold first."""
    found: dict[str, Callable[..., Tensor]] = {'unfold': unfold_attention}
    routes = [route for route in LOCAL_ROUTES if route != 'triton' or device == 'cuda']
    found.update({route: partial(local_attention, route=route) for route in routes})
    if importlib.util.find_spec('natten') is not None:
        found['natten, no relative term'] = natten_attention
    return found


def layers(channels: int, size: int, kernel: int) -> dict[str, Callable[[], nn.Module]]:
    """The group `layers`; unfold first."""
    found: dict[str, Callable[[], nn.Module]] = {
        'unfold': partial(Unfold, channels, HEADS, kernel),
        'local': partial(LocalSelfAttention, channels, HEADS, kernel),
        'local, position_sensitive': partial(LocalSelfAttention, channels, HEADS, kernel, 'position_sensitive'),
        'timm HaloAttn': partial(halo, channels, size, kernel),
        'timm BottleneckAttn': partial(bottleneck, channels, size),
        'axial, maps': partial(axial_with_maps, channels, size),
    }
    for route in AXIAL_ROUTES:
        found[f'axial, {route}'] = partial(AxialSelfAttention, channels, HEADS, size, route=route)
    return found


# ----------------------------------------------------------------------------------------------------------- memory


class PeakBytes(TorchDispatchMode):
    """Peak bytes of the operators' results alive at once, on any device. Misses memory used inside an operator."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {
            id(x.untyped_storage()) for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for leaf in torch.utils._pytree.tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if id(storage) not in inputs and id(storage) not in self.known:
                    self.known.add(id(storage))
                    self.alive += storage.nbytes()
                    weakref.finalize(storage, self.gone, id(storage), storage.nbytes())
        self.peak = max(self.peak, self.alive)
        return result

    def gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.alive -= size


def highest(call: Callable[[], object], device: str) -> int:
    """The peak of a call: the allocator's on CUDA, the operators' results on a CPU."""
    if device == 'cuda':
        return peak_bytes(call)
    with PeakBytes() as count:
        result = call()
    del result
    return count.peak


# ---------------------------------------------------------------------------------------------------------- one case


class Subject:
    """A function with its inputs, forward only and with all gradients."""

    def __init__(self, run: Callable[..., Tensor], inputs: list[Tensor], leaves: list[Tensor], inference: Any = None):
        self.run, self.inputs, self.leaves = run, inputs, leaves
        self.run_inference = inference or run
        self.grad = torch.randn_like(run(*inputs).detach())

    def forward(self) -> Tensor:
        with torch.no_grad():
            return self.run_inference(*self.inputs)

    def forward_backward(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.run(*self.inputs), self.leaves, self.grad, allow_unused=True)


def function_subject(function: Callable[..., Tensor], arguments: list[Tensor], compiled: bool) -> Subject:
    if compiled:
        function = torch.compile(function, fullgraph=True, dynamic=False)
    return Subject(function, arguments, arguments)


def layer_subject(build: Callable[[], nn.Module], x: Tensor, compiled: bool) -> Subject:
    torch.manual_seed(0)
    layer = build().to(x.device, x.dtype).train()
    inference = copy.deepcopy(layer).eval()
    leaves = [x, *layer.parameters()]
    if compiled:
        return Subject(torch.compile(layer, fullgraph=True), [x], leaves, torch.compile(inference, fullgraph=True))
    return Subject(layer, [x], leaves, inference)


def error_of(subject: Subject, reference: Subject) -> float:
    """The largest ||a - b|| / ||b|| of the result and the gradients."""
    subject.grad = reference.grad
    pairs = zip(
        (subject.forward(), *subject.forward_backward()),
        (reference.forward(), *reference.forward_backward()),
        strict=True,
    )
    return max(float((a - b).double().norm() / b.double().norm().clamp_min(1e-30)) for a, b in pairs)


def measure(group: str, size: int, kernel: int, dtype: str, options: argparse.Namespace, clock: Clock) -> list[Row]:
    """Every candidate of a group in one setting, in turn."""
    channels = WIDTHS.get(size, 128)
    torch.manual_seed(0)
    kind = {'device': options.device, 'dtype': DTYPES[dtype]}
    subjects: dict[str, tuple[Row, Subject]] = {}
    rows = []
    if group == 'attention':
        d = channels // HEADS
        shape = (options.batch, d, HEADS, size, size)
        arguments = [torch.randn(shape, **kind).transpose(1, 2) / d**0.25 for _ in range(3)]
        arguments.append(torch.randn(1, 2, d // 2, kernel, **kind) / d**0.25)
        arguments = [x.detach().requires_grad_() for x in arguments]
        makers = {n: partial(function_subject, f, arguments) for n, f in functions(options.device).items()}
    else:
        x = torch.randn(options.batch, channels, size, size, **kind).requires_grad_()
        makers = {n: partial(layer_subject, build, x) for n, build in layers(channels, size, kernel).items()}
    unit = options.batch * channels * size * size * DTYPES[dtype].itemsize
    for name, make in makers.items():
        for compiled in (False, True) if options.compile else (False,):
            if compiled and name in ('recompute', 'triton', 'axial, recompute', 'unfold'):
                continue
            label = f'{name}, compiled' if compiled else name
            row = Row(group, label, size, kernel, channels, options.batch, dtype)
            if group == 'attention':
                table = arguments[3].numel() * DTYPES[dtype].itemsize  # read forward and backward; its gradient written
                row.fewest_forward_bytes = 4 * unit + table
                row.fewest_forward_backward_bytes = 12 * unit + 3 * table
            rows.append(row)
            progress(f'{group} {size} k={kernel} {dtype}: {label}')
            try:
                subject = make(compiled)
                if not compiled:
                    own = {x.untyped_storage()._cdata for x in subject.leaves[1:] if group == 'layers'}
                    row.kept = kept_bytes(lambda s=subject: s.run(*s.inputs), own) / unit  # type: ignore[misc]
                row.peak = highest(subject.forward_backward, options.device) / unit
                if group == 'attention' and name in LOCAL_ROUTES:
                    row.error = error_of(subject, subjects['unfold'][1])
                subjects[label] = row, subject
            except Exception as error:  # a candidate that does not run loses only its own row
                row.failure = f'{type(error).__name__}: {error}'.splitlines()[0]
    calls: dict[str, Callable[[], object]] = {}
    for name, (_, subject) in subjects.items():
        calls[f'{name}|forward'], calls[f'{name}|both'] = subject.forward, subject.forward_backward
    seconds = interleaved(calls, clock, options.rounds, warmup=1)
    for name, (row, _) in subjects.items():
        forward, both = seconds[f'{name}|forward'], seconds[f'{name}|both']
        row.forward_ms, row.forward_backward_ms = (1e3 * statistics.median(s) for s in (forward, both))
        row.spread = max(spread(forward), spread(both))
        if options.bandwidth is not None and row.fewest_forward_bytes and row.fewest_forward_backward_bytes:
            row.forward_of_copy = row.fewest_forward_bytes / options.bandwidth / (row.forward_ms / 1e3)
            whole = row.fewest_forward_backward_bytes / options.bandwidth
            row.forward_backward_of_copy = whole / (row.forward_backward_ms / 1e3)
    base = subjects['unfold'][0]
    for row, _ in subjects.values():
        row.forward_times_faster = base.forward_ms / row.forward_ms  # type: ignore[operator]
        row.forward_backward_times_faster = base.forward_backward_ms / row.forward_backward_ms  # type: ignore[operator]
        row.kept_of_unfold = None if row.kept is None else row.kept / base.kept  # type: ignore[operator]
        row.peak_of_unfold = None if row.peak is None else row.peak / base.peak  # type: ignore[operator]
    return rows


def table(rows: list[Row]) -> str:
    """The rows of one setting."""
    first = rows[0]
    lines = [
        f'{first.group}: {first.batch} x {first.channels} x {first.size} x {first.size}, {HEADS} heads, '
        f'k = {first.kernel}, {first.dtype}',
        f'{"":30s}{"forward ms":>11s}{"fwd+bwd ms":>11s}{"x faster":>9s}{"x faster":>9s}{"spread":>8s}'
        f'{"kept":>7s}{"part":>6s}{"peak":>7s}{"part":>6s}{"copy":>6s}{"copy":>6s}{"error":>9s}',
    ]
    if first.fewest_forward_bytes and first.fewest_forward_backward_bytes:
        fewest = first.fewest_forward_bytes / 1e6, first.fewest_forward_backward_bytes / 1e6
        lines.insert(1, f'fewest bytes: forward {fewest[0]:.2f} MB, forward + backward {fewest[1]:.2f} MB')
    for row in rows:
        if row.failure is not None:
            lines.append(f'{row.name:30s} failed: {row.failure}')
            continue
        cells = [
            (row.forward_ms, '11.2f'), (row.forward_backward_ms, '11.2f'), (row.forward_times_faster, '9.2f'),
            (row.forward_backward_times_faster, '9.2f'), (row.spread, '8.0%'), (row.kept, '7.1f'),
            (row.kept_of_unfold, '6.2f'), (row.peak, '7.1f'), (row.peak_of_unfold, '6.2f'),
            (row.forward_of_copy, '6.0%'), (row.forward_backward_of_copy, '6.0%'), (row.error, '9.0e'),
        ]  # fmt: skip
        text = ''.join(format('-', f'>{f.split(".")[0]}s') if x is None else format(x, f) for x, f in cells)
        lines.append(f'{row.name:30s}{text}')
    return '\n'.join(lines)


def parse(argv: list[str]) -> argparse.Namespace:
    """The options, with the device's defaults."""
    summary, _, details = (__doc__ or '').partition('\n\n')
    parser = argparse.ArgumentParser(
        prog='self_attention.py',
        description=summary,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('--sizes', nargs='+', type=int, help='map sizes (default: 56 28 14)')
    parser.add_argument('--kernels', nargs='+', type=int, help='window sizes (default: 3 5 7)')
    parser.add_argument('--groups', nargs='+', choices=('attention', 'layers'), default=['attention', 'layers'])
    parser.add_argument('--batch', type=int, help='images (default: 4 on a CPU, 64 on a GPU)')
    parser.add_argument('--dtype', nargs='+', choices=DTYPES, default=['fp32'])
    parser.add_argument('--device', choices=('cpu', 'cuda'), default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--rounds', type=int, help='samples per figure (default: 5 on a CPU, 21 on a GPU)')
    parser.add_argument('--compile', action='store_true', help='also compile each; takes minutes on a slow core')
    parser.add_argument('--quick', action='store_true', help='28 x 28 with k = 7 alone')
    parser.add_argument('--json', type=Path, metavar='FILE', help='all figures, machine, versions and command')
    options = parser.parse_args(argv)
    gpu = options.device == 'cuda'
    if gpu and not torch.cuda.is_available():
        parser.error('--device cuda: torch finds no CUDA device here; --device cpu runs without')
    options.sizes = options.sizes or ([28] if options.quick else [56, 28, 14])
    options.kernels = options.kernels or ([7] if options.quick else [3, 5, 7])
    options.batch = options.batch if options.batch is not None else 64 if gpu else 4
    options.rounds = options.rounds if options.rounds is not None else 21 if gpu else 5
    if min(*options.sizes, *options.kernels, options.batch, options.rounds) < 1:
        parser.error('sizes, kernels, --batch and --rounds must be at least 1')
    if any(kernel % 2 == 0 for kernel in options.kernels):
        parser.error(f'--kernels must be odd, got {options.kernels}')
    return options


def main(argv: list[str] | None = None) -> int:
    """Run the command line; 1 if a candidate failed or a route differs from unfold."""
    argv = sys.argv[1:] if argv is None else argv
    options = parse(argv)
    torch.set_num_threads(1)
    clock: Clock = CudaClock() if options.device == 'cuda' else CpuClock()
    options.bandwidth = copy_bandwidth(clock, 'cuda') if options.device == 'cuda' else None
    rows: list[Row] = []
    for dtype in options.dtype:
        for size in options.sizes:
            for kernel in options.kernels:
                for group in options.groups:
                    found = measure(group, size, kernel, dtype, options, clock)
                    progress('')
                    print(table(found), end='\n\n', flush=True)
                    rows += found
    if options.json is not None:
        result = {
            'command': shlex.join(['python', 'benchmarks/self_attention.py', *argv]),
            'clock': clock.what,
            'device': torch.cuda.get_device_name() if options.device == 'cuda' else cpu_name(),
            'copy_bytes_per_second': options.bandwidth,
            'versions': {'python': platform.python_version(), 'torch': torch.__version__, 'timm': timm.__version__},
            'natten': importlib.util.find_spec('natten') is not None,
            'rows': [asdict(row) for row in rows],
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + '\n')
    wrong = [row for row in rows if row.failure is not None or (row.error or 0) > TOLERANCE[row.dtype]]
    return 1 if wrong else 0


if __name__ == '__main__':
    sys.exit(main())
