"""Time attention blocks, forward and forward + backward, in multiples of one copy of their input.

A block reads and writes x a few times and computes little. So its cost is given in copies: `x.clone()`, one read and
one write of x, takes turns with every block, and each figure is the block's median over the rounds divided by the
clone's median. Drift on a shared machine affects both.

    python benchmarks/blocks.py --quick                              # a minute: eager, two shapes, a small batch
    python benchmarks/blocks.py                                      # every shape, eager and compiled, fp32, NCHW
    python benchmarks/blocks.py --dtype fp32 bf16 --layout nchw channels_last --blocks blocks timm primitives
    python benchmarks/blocks.py --blocks sase avg_max,mlp,affine,p_norm,avg,conv3x3_x2 channel/avg,mlp --shapes 64x14x14
    python benchmarks/blocks.py --device cuda --dtype bf16 --layout channels_last nchw --minutes 9 --out gpu

benchmarks/README.md explains each figure. Needs torch and timm. Without sase_blocks it still times timm's blocks.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.metadata
import importlib.util
import itertools
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from meter import (
    Clock,
    CountBytes,
    CpuClock,
    CudaClock,
    copy_bandwidth,
    cpu_name,
    inductor_bytes,
    interleaved,
    peak_bytes,
    progress,
    relative_error,
    spread,
)
from torch import Tensor, nn

from sase_blocks.profiling import kept_bytes, storages_of

RESNET50 = ('256x56x56', '512x28x28', '1024x14x14', '2048x7x7')  # the attention's places in a ResNet-50 at 224 x 224
TIMM = ('se', 'eca', 'cbam', 'gc')
DTYPES = {'fp32': torch.float32, 'bf16': torch.bfloat16, 'fp16': torch.float16}
LAYOUTS = {'nchw': torch.contiguous_format, 'channels_last': torch.channels_last}
MODES = ('eager', 'compiled')
GROUPS = ('blocks', 'timm', 'primitives')
# Compiled against eager, ||a - b|| / ||b||. A wrong kernel exceeds this by far, and rounding stays far below.
TOLERANCE = {'fp32': 1e-3, 'bf16': 5e-2, 'fp16': 1e-2}


@dataclass(frozen=True)
class Candidate:
    """A module to time: `build(channels, (H, W))` builds it, `reads` says what it reads of a (B, C, H, W) x."""

    name: str
    build: Callable[[int, tuple[int, int]], nn.Module]
    reads: str = 'map'  # 'map': x; 'channel': (B, C, 1, 1); 'spatial': (B, 1, H, W)


@dataclass(frozen=True)
class Case:
    """One setting in which every candidate is timed."""

    shape: tuple[int, int, int]
    batch: int
    dtype: str
    layout: str

    def __str__(self) -> str:
        channels, height, width = self.shape
        return f'{self.batch} x {channels} x {height} x {width} {self.dtype} {self.layout}'


@dataclass
class Row:
    """One candidate in one case and mode. Ratios are to one clone of x; a traversal is one read or one write of x."""

    block: str
    mode: str
    shape: str
    batch: int
    dtype: str
    layout: str
    clone_ms: float
    forward_ms: float | None = None
    forward_clones: float | None = None
    forward_backward_ms: float | None = None
    forward_backward_clones: float | None = None
    spread: float | None = None  # interquartile range over the median, of the noisier of the two times
    forward_traversals_at_copy_speed: float | None = None  # the time, in traversals at the measured copy bandwidth
    forward_backward_traversals_at_copy_speed: float | None = None
    forward_traversals_counted: float | None = None
    kept_for_backward_x: float | None = None
    peak_x: float | None = None
    error_against_eager: float | None = None
    failure: str | None = None


# ---------------------------------------------------------------------------------------------------- what is timed


def candidates(names: list[str]) -> list[Candidate]:
    """Turn names and groups into candidates, in order and without repeats; ValueError lists the known ones."""
    known: dict[str, Candidate] = {
        f'timm/{name}': Candidate(f'timm/{name}', partial(build_timm, name)) for name in TIMM
    }
    groups: dict[str, list[str]] = {'timm': list(known), 'blocks': [], 'primitives': []}
    ours = importlib.util.find_spec('sase_blocks') is not None
    if ours:
        from sase_blocks import list_blocks, ops

        for name in list_blocks():
            known[name] = Candidate(name, partial(build_block, name))
            groups['blocks'].append(name)
        for set_name, reads in (
            ('channel_squeeze', 'map'),
            ('channel_excite', 'channel'),
            ('spatial_squeeze', 'map'),
            ('spatial_excite', 'spatial'),
        ):
            for name, primitive in getattr(ops, set_name.upper()).items():
                known[f'{set_name}/{name}'] = Candidate(
                    f'{set_name}/{name}', partial(build_primitive, primitive), reads
                )
                groups['primitives'].append(f'{set_name}/{name}')
    chosen: dict[str, Candidate] = {}
    for name in names:
        if name in groups:
            chosen.update((member, known[member]) for member in groups[name])
        elif name in known:
            chosen[name] = known[name]
        elif ours and name.startswith(('channel/', 'spatial/')):
            chosen[name] = Candidate(name, partial(build_composition, name))
        elif ours and (',' in name or name.endswith(')')):
            chosen[name] = Candidate(name, partial(build_block, name))
        elif not ours and name.partition('/')[0] != 'timm':
            raise ValueError(f'{name!r} needs sase_blocks, which is not installed; here: timm, {", ".join(known)}')
        else:
            raise ValueError(
                f'unknown block {name!r}; expected a group ({", ".join(GROUPS)}), a name ({", ".join(known)}), '
                "'channel/SQUEEZE,EXCITE', 'spatial/SQUEEZE,EXCITE' or a genotype of six names with commas between"
            )
    for candidate in chosen.values():  # a wrong name in a genotype fails now instead of an hour later
        candidate.build(8, (8, 8))
    return list(chosen.values())


def build_timm(name: str, channels: int, feat_size: tuple[int, int]) -> nn.Module:
    """One of timm's blocks, as a timm ResNet builds it."""
    from timm.layers import create_attn

    return create_attn(name, channels)


def build_block(block: str, channels: int, feat_size: tuple[int, int]) -> nn.Module:
    """One of our blocks, by name, maybe with options, or by a genotype's text."""
    from sase_blocks import create_block

    return create_block(block, channels, feat_size=feat_size)


def build_composition(text: str, channels: int, feat_size: tuple[int, int]) -> nn.Module:
    """`channel/SQUEEZE,EXCITE` or `spatial/SQUEEZE,EXCITE`."""
    import sase_blocks
    from sase_blocks.ops.options import split_names

    kind, _, pair = text.partition('/')
    squeeze, excite = split_names(pair)
    cls = sase_blocks.ChannelAttention if kind == 'channel' else sase_blocks.SpatialAttention
    return cls(channels, squeeze, excite, feat_size=feat_size)


def build_primitive(primitive: Callable[..., nn.Module], channels: int, feat_size: tuple[int, int]) -> nn.Module:
    """A primitive alone."""
    return primitive(channels, feat_size=feat_size)


# ---------------------------------------------------------------------------------------------------- one case


class Subject:
    """One candidate in one mode, ready to call."""

    def __init__(self, candidate: Candidate, mode: str, case: Case, x: Tensor) -> None:
        channels, height, width = case.shape
        self.name, self.mode = candidate.name, mode
        torch.manual_seed(len(candidate.name))  # the same parameters in every mode
        module = candidate.build(channels, (height, width)).to(x.device, x.dtype)
        if case.layout == 'channels_last':
            module = module.to(memory_format=torch.channels_last)
        self.module = module.train()
        sizes = {'map': x.shape, 'channel': (case.batch, channels, 1, 1), 'spatial': (case.batch, 1, height, width)}
        self.x = x if candidate.reads == 'map' else torch.randn(sizes[candidate.reads], device=x.device, dtype=x.dtype)
        self.x_grad = self.x.detach().requires_grad_()
        self.inputs = [self.x_grad, *(p for p in module.parameters() if p.requires_grad)]
        # Two modules with shared parameters: switching one between train and eval would be timed, and recompile.
        self.inference = clone_module(module).eval()
        self.run, self.run_inference = self.module, self.inference
        if mode == 'compiled':
            self.run = torch.compile(self.module, fullgraph=True, dynamic=False)
            self.run_inference = torch.compile(self.inference, fullgraph=True, dynamic=False)
        self.grad = torch.randn_like(self.module(self.x_grad).detach())

    def forward(self) -> Tensor:
        with torch.no_grad():
            return self.run_inference(self.x)

    def forward_backward(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.run(self.x_grad), self.inputs, self.grad)

    def check(self) -> float | None:
        """Compiled against eager: the output and all gradients."""
        if self.mode == 'eager':
            return None
        eager = torch.autograd.grad(self.module(self.x_grad), self.inputs, self.grad)
        with torch.no_grad():
            reference = self.inference(self.x)
        return relative_error((self.forward(), *self.forward_backward()), (reference, *eager))


def clone_module(module: nn.Module) -> nn.Module:
    """A copy of the modules that shares parameters and buffers with the original."""
    import copy

    shared = {id(tensor): tensor for tensor in itertools.chain(module.parameters(), module.buffers())}
    return copy.deepcopy(module, shared)


def measure(
    case: Case, chosen: list[Candidate], options: argparse.Namespace, clock: Clock, copy_rate: float
) -> list[Row]:
    """Time every candidate in every mode in one case."""
    if 'compiled' in options.mode:
        torch._dynamo.reset()  # after eight graphs of one function, dynamo silently stays eager
    torch.manual_seed(options.seed)
    channels, height, width = case.shape
    x = torch.randn(case.batch, channels, height, width, device=options.device, dtype=DTYPES[case.dtype])
    x = x.contiguous(memory_format=LAYOUTS[case.layout])
    x_bytes = x.numel() * x.element_size()
    calls: dict[str, Callable[[], object]] = {'clone': x.clone, 'clone again': x.clone}
    subjects: list[tuple[Row, Subject]] = []
    rows: list[Row] = []
    for candidate, mode in itertools.product(chosen, options.mode):
        shape = 'x'.join(map(str, case.shape))
        row = Row(candidate.name, mode, shape, case.batch, case.dtype, case.layout, clone_ms=0.0)
        rows.append(row)
        progress(f'{case}: {candidate.name} {mode}')
        try:
            subject = Subject(candidate, mode, case, x)
            if mode == 'compiled':
                with inductor_bytes() as counted:
                    subject.forward()
                    total = counted()
                row.forward_traversals_counted = None if total is None else total / x_bytes
                row.error_against_eager = subject.check()
            else:
                with torch.no_grad(), CountBytes() as count:
                    subject.inference(subject.x)
                row.forward_traversals_counted = count.bytes / x_bytes
            subject.forward_backward()
            excluded = storages_of(subject.module)
            row.kept_for_backward_x = kept_bytes(partial(subject.run, subject.x_grad), excluded) / x_bytes
            if options.device == 'cuda':
                row.peak_x = peak_bytes(subject.forward_backward) / x_bytes
        except Exception as error:  # a block that cannot run (out of memory) must not end the whole run
            row.failure = f'{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ""}'
            continue
        subjects.append((row, subject))
        calls[f'{row.block} {row.mode} forward'] = subject.forward
        calls[f'{row.block} {row.mode} forward_backward'] = subject.forward_backward
    progress(f'{case}: {options.rounds} rounds')
    seconds = interleaved(calls, clock, options.rounds, warmup=1 if options.device == 'cpu' else 3)
    clone = statistics.median(seconds['clone'])
    again = Row(
        'clone, again', 'eager', rows[0].shape if rows else '', case.batch, case.dtype, case.layout, 1e3 * clone
    )
    again.forward_ms = 1e3 * statistics.median(seconds['clone again'])
    again.forward_clones, again.spread = again.forward_ms / 1e3 / clone, spread(seconds['clone again'])
    again.forward_traversals_at_copy_speed = again.forward_ms / 1e3 * copy_rate / x_bytes
    again.forward_traversals_counted = 2.0
    for row, _ in subjects:
        times = {part: seconds[f'{row.block} {row.mode} {part}'] for part in ('forward', 'forward_backward')}
        row.spread = max(map(spread, times.values()))
        for part, values in times.items():
            median = statistics.median(values)
            setattr(row, f'{part}_ms', 1e3 * median)
            setattr(row, f'{part}_clones', median / clone)
            setattr(row, f'{part}_traversals_at_copy_speed', median * copy_rate / x_bytes)
    for row in rows:
        row.clone_ms = 1e3 * clone
    del subjects, calls
    gc.collect()
    if options.device == 'cuda':
        torch.cuda.empty_cache()
    return [again, *rows]


# ------------------------------------------------------------------------------------------------------- results


def table(rows: list[Row], copy_rate: float) -> str:
    """The rows of one case as text."""
    first = rows[0]
    width = max(len(row.block) for row in rows)
    head = (
        f'{first.batch} x {first.shape} {first.dtype} {first.layout}: '
        f'one clone of x is {first.clone_ms:.3g} ms; a large copy moves {copy_rate / 1e9:.4g} GB/s'
    )
    titles = ('forward', 'fwd+bwd', 'forward', 'fwd+bwd', 'spread', 'forward', 'fwd+bwd', 'forward', 'kept', 'peak')
    units = ('clones', 'clones', 'ms', 'ms', '%', 'at copy', 'at copy', 'counted', 'x', 'x')
    lines = [head, f'{"":{width}} {"":8} ' + ' '.join(f'{title:>8}' for title in titles)]
    lines.append(f'{"":{width}} {"":8} ' + ' '.join(f'{unit:>8}' for unit in units))
    for row in rows:
        if row.failure:
            lines.append(f'{row.block:{width}} {row.mode:8} failed: {row.failure}')
            continue
        cells = (
            number(row.forward_clones),
            number(row.forward_backward_clones),
            number(row.forward_ms),
            number(row.forward_backward_ms),
            number(None if row.spread is None else 100 * row.spread),
            number(row.forward_traversals_at_copy_speed),
            number(row.forward_backward_traversals_at_copy_speed),
            number(row.forward_traversals_counted),
            number(row.kept_for_backward_x),
            number(row.peak_x),
        )
        wrong = row.error_against_eager is not None and not row.error_against_eager < TOLERANCE[row.dtype]
        note = f'  WRONG: compiled is {row.error_against_eager:.1e} from eager' if wrong else ''
        lines.append(f'{row.block:{width}} {row.mode:8} ' + ' '.join(f'{cell:>8}' for cell in cells) + note)
    return '\n'.join(lines)


def number(value: float | None) -> str:
    """Three digits, or a dash for None and NaN."""
    if value is None or value != value:
        return '-'
    return f'{value:.0f}' if value >= 100 else f'{value:.3g}'


def figure(result: dict[str, Any], path: Path) -> None:
    """Draw the ratios by block, pass, dtype and layout. Small dots are shapes, large dots their median.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError('the figure needs matplotlib: pip install "sase-blocks[viz]"') from error
    matplotlib.use('Agg')
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    rows = [row for row in result['rows'] if row['forward_backward_clones'] is not None]
    settings = list(dict.fromkeys((row['dtype'], row['layout']) for row in rows))
    blocks = list(dict.fromkeys(row['block'] for row in rows))[::-1]
    modes = [mode for mode in MODES if any(row['mode'] == mode for row in rows)]
    colours = {'eager': '#4878a8', 'compiled': '#d1662b'}
    offsets = {mode: 0.16 * (1 - 2 * index) if len(modes) > 1 else 0.0 for index, mode in enumerate(modes)}
    parts = (('forward_clones', 'forward (inference)'), ('forward_backward_clones', 'forward + backward (training)'))
    height = 1.3 + len(settings) * (0.9 + 0.34 * len(blocks))
    plot, axes = plt.subplots(
        len(settings), 2, figsize=(11, height), squeeze=False, sharey=True, sharex='col', layout='constrained'
    )
    for line, (dtype, layout) in enumerate(settings):
        for column, (key, title) in enumerate(parts):
            axis = axes[line][column]
            highest = 2.0
            for position, mode in itertools.product(range(len(blocks)), modes):
                values = [
                    row[key]
                    for row in rows
                    if (row['dtype'], row['layout'], row['block'], row['mode'])
                    == (dtype, layout, blocks[position], mode)
                ]
                if not values:
                    continue
                y, middle = position + offsets[mode], statistics.median(values)
                highest = max(highest, *values)
                axis.plot([min(values), max(values)], [y, y], color=colours[mode], alpha=0.35, linewidth=4, zorder=1)
                axis.plot(values, [y] * len(values), '.', color=colours[mode], alpha=0.6, markersize=4, zorder=2)
                label = mode if position == len(blocks) - 1 else None
                axis.plot(middle, y, 'o', color=colours[mode], markersize=7, zorder=3, label=label)
                axis.annotate(
                    number(middle), (max(values), y), (6, 0), textcoords='offset points', va='center', fontsize=8,
                    color=colours[mode],
                )  # fmt: skip
            axis.axvline(1, color='black', linewidth=0.8, zorder=0)
            axis.set_xscale('log', base=2)
            axis.xaxis.set_major_locator(FixedLocator([2.0**power for power in range(-8, 12)]))
            axis.xaxis.set_minor_locator(NullLocator())
            axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f'{value:g}'))
            axis.set_yticks(range(len(blocks)), blocks)
            axis.set_ylim(-0.6, len(blocks) - 0.4)
            axis.margins(x=0.12)
            axis.grid(axis='x', color='0.9')
            axis.set_axisbelow(True)
            for side in ('top', 'right', 'left'):
                axis.spines[side].set_visible(False)
            axis.tick_params(axis='y', length=0)
            axis.set_title(f'{title}, {dtype} {layout}', fontsize=10, loc='left')
            axis.tick_params(labelbottom=True)
    for axis in axes[-1]:
        axis.set_xlabel('time, in clones of x (one read + one write)')
    plot.legend(*axes[0][0].get_legend_handles_labels(), loc='upper right', ncols=2, frameon=False, fontsize=10)
    machine, versions = result['machine'], result['versions']
    shapes = list(dict.fromkeys(row['shape'] for row in rows))
    plot.suptitle(
        f'Attention blocks, batch {rows[0]["batch"]}, on {machine["device_name"]}, torch {versions["torch"]}\n'
        f'small dots: {", ".join(shapes)}; large: their median',
        fontsize=10,
        x=0.01,
        ha='left',
    )
    plot.savefig(path, dpi=130)
    plt.close(plot)


def describe(options: argparse.Namespace, argv: list[str], clock: Clock, copy_rate: float) -> dict[str, Any]:
    """The machine, versions and command behind the figures."""

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    cuda = options.device == 'cuda'
    return {
        'command': shlex.join(['python', 'benchmarks/blocks.py', *argv]),
        'date': time.strftime('%Y-%m-%dT%H:%M:%S%z'),
        'seed': options.seed,
        'rounds': options.rounds,
        'clock': clock.what,
        'copy_bytes_a_second': copy_rate,
        'machine': {
            'device': options.device,
            'device_name': torch.cuda.get_device_name() if cuda else cpu_name(),
            'cores': os.cpu_count(),
            'torch_threads': torch.get_num_threads(),
            'platform': platform.platform(),
        },
        'versions': {
            'python': platform.python_version(),
            'cuda': torch.version.cuda if cuda else None,
            **{name: version(name) for name in ('torch', 'timm', 'sase-blocks', 'triton')},
        },
    }


# -------------------------------------------------------------------------------------------------- command line


def shape_of(text: str) -> tuple[int, int, int]:
    """`256x56x56` as numbers."""
    try:
        channels, height, width = map(int, text.split('x'))
    except ValueError:
        raise argparse.ArgumentTypeError(f'{text!r} is no shape; expected CxHxW such as 256x56x56') from None
    if min(channels, height, width) < 1:
        raise argparse.ArgumentTypeError(f'{text!r} has a size below 1')
    return channels, height, width


def parse(argv: list[str]) -> argparse.Namespace:
    """The options, with the device's defaults."""
    summary, _, details = (__doc__ or '').partition('\n\n')
    parser = argparse.ArgumentParser(
        prog='blocks.py', description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        '--blocks', nargs='+', metavar='NAME', help=f'names or groups ({", ".join(GROUPS)}); default: blocks timm'
    )
    parser.add_argument('--shapes', nargs='+', type=shape_of, metavar='CxHxW', help=f'default: {" ".join(RESNET50)}')
    parser.add_argument('--batch', type=int, help='images (default: 32 on a CPU, 256 on a GPU, 8 with --quick)')
    parser.add_argument('--dtype', nargs='+', choices=DTYPES, default=['fp32'])
    parser.add_argument('--layout', nargs='+', choices=LAYOUTS, default=['nchw'])
    parser.add_argument('--mode', nargs='+', choices=MODES, help='default: both, only eager with --quick')
    parser.add_argument('--device', choices=('cpu', 'cuda'), default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--rounds', type=int, help='samples per figure (default: 11 on a CPU, 41 on a GPU)')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--minutes', type=float, help='start no new case after this time, and list the rest')
    parser.add_argument('--quick', action='store_true', help='about a minute: eager, first and last shape, batch 8')
    parser.add_argument(
        '--out', type=Path, default=Path('runs/bench'), metavar='PREFIX', help='PREFIX.json, PREFIX.png'
    )
    parser.add_argument('--no-figure', action='store_true', help='write no PNG (and need no matplotlib)')
    options = parser.parse_args(argv)
    shapes = [shape_of(text) for text in RESNET50]
    gpu = options.device == 'cuda'
    options.blocks = options.blocks or ['blocks', 'timm']
    options.shapes = options.shapes or (shapes[::3] if options.quick else shapes)
    options.batch = options.batch if options.batch is not None else 8 if options.quick else 256 if gpu else 32
    options.mode = options.mode or (['eager'] if options.quick else list(MODES))
    options.rounds = options.rounds if options.rounds is not None else 41 if gpu else 5 if options.quick else 11
    if options.batch < 1 or options.rounds < 1:
        parser.error(f'--batch and --rounds must be at least 1, got {options.batch} and {options.rounds}')
    if gpu and not torch.cuda.is_available():
        parser.error('--device cuda: torch finds no CUDA device here; --device cpu runs without')
    if importlib.util.find_spec('sase_blocks') is None:
        print("sase_blocks is not installed: timing only timm's blocks (pip install -e .)", file=sys.stderr)
        options.blocks = [name for name in options.blocks if name not in ('blocks', 'primitives')] or ['timm']
    try:
        options.chosen = candidates(options.blocks)
    except ValueError as error:
        parser.error(str(error))
    if not options.no_figure and importlib.util.find_spec('matplotlib') is None:
        print('matplotlib is not installed: no figure (pip install "sase-blocks[viz]")', file=sys.stderr)
        options.no_figure = True
    return options


def main(argv: list[str] | None = None) -> int:
    """Run the command line; 1 if a block failed or a compiled one differs from eager."""
    argv = sys.argv[1:] if argv is None else argv
    options = parse(argv)
    began = time.monotonic()
    torch.set_num_threads(1)
    clock: Clock = CudaClock() if options.device == 'cuda' else CpuClock()
    copy_rate = copy_bandwidth(clock, options.device)
    result = {**describe(options, argv, clock, copy_rate), 'rows': [], 'left_out': []}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    written = options.out.with_name(options.out.name + '.json')
    healthy = True
    cases = [
        Case(shape, options.batch, dtype, layout)
        for dtype, layout, shape in itertools.product(options.dtype, options.layout, options.shapes)
    ]
    for case in cases:
        if options.minutes is not None and time.monotonic() - began > 60 * options.minutes:
            result['left_out'].append(str(case))
            continue
        rows = measure(case, options.chosen, options, clock, copy_rate)
        progress('')
        print(table(rows, copy_rate), end='\n\n', flush=True)
        healthy &= all(
            row.failure is None and (row.error_against_eager is None or row.error_against_eager < TOLERANCE[row.dtype])
            for row in rows
        )
        result['rows'] += [asdict(row) for row in rows]
        written.write_text(json.dumps(result, indent=1) + '\n')  # after every case, for runs that are stopped
    if result['left_out']:
        written.write_text(json.dumps(result, indent=1) + '\n')
        print(f'left out after {options.minutes:g} minutes: {"; ".join(result["left_out"])}')
    print(f'wrote {written}')
    if not options.no_figure and any(row['forward_backward_clones'] is not None for row in result['rows']):
        figure(result, options.out.with_name(options.out.name + '.png'))
        print(f'wrote {options.out.with_name(options.out.name + ".png")}')
    return 0 if healthy else 1


if __name__ == '__main__':
    sys.exit(main())
