"""All GPU tests and benchmarks in one go: the tests marked gpu, then the benchmarks. Up to ten minutes.

    python benchmarks/gpu.py                               # `make gpu`: all steps but the compiled ones, into gpu_out/
    python benchmarks/gpu.py --compile                     # `make gpu-compile`: the compiled ones, which take long
    python benchmarks/gpu.py --only search-1 search-2      # some steps
    python benchmarks/gpu.py --device cpu --quick          # a trial with small sizes on a CPU

Any Python with torch, timm, einops, accelerate, pytest and onnxruntime will do. You need not install the package, and
without Optuna the TrioNet search is skipped. If a step fails or exceeds its time limit, the others still run. --out
gets each step's figures and output (STEP.log) and summary.json (summary-compiled.json), which is rewritten after each
step. Exits with 1 unless all steps pass.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Step:
    """One program. ``file``: what it writes, in the output folder; {out} in an argument stands for that folder."""

    name: str
    arguments: tuple[str, ...]
    file: str
    limit: float  # seconds


def gpu_tests(quick: bool, device: str) -> Step:
    # Only this file, because a module that misses a library would end the whole collection. Warnings are not errors
    # here, because the versions may differ from those of `make test`.
    arguments = ['-m', 'pytest', '-m', 'gpu', '-q', '-p', 'no:cacheprovider', '-W', 'default']
    arguments += ['tests/test_gpu.py', '--junitxml={out}/tests.xml']
    if quick:
        arguments += ['-k', 'local_routes or axial or sandwich']
    elif device == 'cuda' and importlib.util.find_spec('xdist'):
        arguments += ['-n', '4']  # most of the time goes into compiling kernels on the CPU
    return Step('tests', tuple(arguments), 'tests.xml', 240)


def benchmark(name: str, script: str, options: str, limit: float) -> Step:
    """A script of this folder that writes its figures to --json."""
    return Step(
        name, (f'benchmarks/{script}', *options.split(), '--json', f'{{out}}/{name}.json'), f'{name}.json', limit
    )


def of_blocks(name: str, options: str, limit: float) -> Step:
    arguments = f'benchmarks/blocks.py {options} --layout channels_last --no-figure'.split()
    return Step(name, (*arguments, '--out', f'{{out}}/{name}'), f'{name}.json', limit)


def steps_of(device: str, quick: bool, compiled: bool) -> list[Step]:
    """The steps in order. The limits of a plain run add up to ten minutes."""
    on, both = f'--device {device}', '--dtype fp32 bf16'
    one, tiny = '--quick --rounds 1', '--blocks sase timm/se --shapes 8x6x5 --batch 2 --rounds 4'
    attention, search = f'{one} --batch 1', one
    if compiled:
        blocks = tiny
        if not quick:
            attention, search = f'{both} --sizes 28 --kernels 3 7', '--batch 128 --warmup 3 --rounds 21'
            blocks = f'{both} --shapes 256x56x56 1024x14x14 --minutes 8'
        return [
            benchmark('search-compiled', 'search.py', f'{on} --order 1 --compile {search}', 1800),
            benchmark('self_attention-compiled', 'self_attention.py', f'{on} --compile {attention}', 900),
            of_blocks('blocks-compiled', f'{on} --mode compiled {blocks}', 600),
        ]
    layers, blocks, supernet = attention, tiny, '--batch 4 --rounds 1 --networks 0'
    if not quick:
        # A layer has separate kernels for every size and window, and compiling them takes longer than timing them.
        attention, layers = f'{both} --rounds 11', f'{both} --rounds 11 --sizes 28 --kernels 7'
        search, blocks = '--batch 128 --warmup 3 --rounds 21', f'{both} --minutes 0.7'
        supernet = '--space imagenet --batch 128 --networks 2'
    return [
        gpu_tests(quick, device),
        benchmark('self_attention', 'self_attention.py', f'{on} --groups attention {attention}', 140),
        benchmark('self_attention-layers', 'self_attention.py', f'{on} --groups layers {layers}', 30),
        benchmark('search-1', 'search.py', f'{on} --order 1 {search}', 40),
        benchmark('search-2', 'search.py', f'{on} --order 2 {search}', 40),
        of_blocks('blocks', f'{on} --mode eager {blocks}', 70),
        benchmark('supernet', 'supernet.py', f'{on} {supernet}', 40),
    ]


def run_step(step: Step, out: Path, device: str, factor: float = 1.0) -> dict[str, Any]:
    """Run a program to its end or its time limit, and copy its output to the terminal and its log as it comes."""
    file, log = out / step.file, out / f'{step.name}.log'
    file.unlink(missing_ok=True)  # an old one would pass as this run's result
    command = [sys.executable, *(text.format(out=out) for text in step.arguments)]
    paths = [str(ROOT), *filter(None, [os.environ.get('PYTHONPATH')])]
    environment = {
        **os.environ,
        'PYTHONPATH': os.pathsep.join(paths),
        'PYTHONUNBUFFERED': '1',
        'SASE_BLOCKS_TEST_DEVICE': device,
    }
    print(f'\n== {step.name}: {shlex.join(command)}', flush=True)
    late = threading.Event()
    began = time.perf_counter()
    program = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        encoding='utf-8', errors='replace', start_new_session=True,
    )  # fmt: skip
    with log.open('w', encoding='utf-8') as kept, program as process:

        def stop() -> None:
            late.set()
            kill(process)

        timer = threading.Timer(factor * step.limit, stop)
        timer.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                print(line, end='', flush=True)
                kept.write(line)
            code = process.wait()
        finally:
            timer.cancel()
            kill(process)  # leftover children, or all of it after an interrupt
    passed = code == 0 and file.exists()
    return {
        'name': step.name,
        'outcome': 'passed' if passed else 'timed out' if late.is_set() else 'failed',
        'exit_code': code,
        'seconds': round(time.perf_counter() - began, 1),
        'file': str(file if file.exists() else log),
        'log': str(log),
        'command': shlex.join(command),
    }


def kill(process: subprocess.Popen[str]) -> None:
    """Kill a process and its children, which are a separate session."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def line_of(result: dict[str, Any]) -> str:
    return f'{result["outcome"]:10}{result["name"]:26}{result["seconds"]:7.1f} s  {result["file"]}'


def run(steps: list[Step], out: Path, device: str, factor: float = 1.0, summary_file: str = 'summary.json') -> int:
    """Run all steps, print a line per step at the end, and return the exit code."""
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    summary: dict[str, Any] = {'command': shlex.join(sys.argv), **machine(device), 'steps': []}
    for step in steps:
        summary['steps'].append(run_step(step, out, device, factor))
        (out / summary_file).write_text(json.dumps(summary, indent=1) + '\n', encoding='utf-8')
    print('\n' + '\n'.join(line_of(result) for result in summary['steps']))
    print(out / summary_file)
    return 0 if all(result['outcome'] == 'passed' for result in summary['steps']) else 1


def machine(device: str) -> dict[str, str]:
    import torch

    name = torch.cuda.get_device_name() if device == 'cuda' else platform.processor()
    return {'device': name, 'torch': str(torch.__version__), 'python': platform.python_version()}


def main(argv: list[str] | None = None) -> int:
    summary, _, details = (__doc__ or '').partition('\n\n')
    parser = argparse.ArgumentParser(
        prog='gpu.py', description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--out', type=Path, default=Path('gpu_out'), metavar='DIR', help='default: gpu_out')
    parser.add_argument('--device', choices=('cuda', 'cpu'), default='cuda')
    parser.add_argument('--quick', action='store_true', help='small sizes and fewer tests')
    parser.add_argument('--compile', action='store_true', help='the compiled steps instead of the others')
    parser.add_argument('--only', nargs='+', metavar='STEP', help='only these steps')
    parser.add_argument(
        '--limit-factor', type=float, default=1.0, metavar='F', help='multiply time limits, for a slower device'
    )
    options = parser.parse_args(argv)
    steps = steps_of(options.device, options.quick, options.compile)
    names = [step.name for step in steps]
    unknown = [name for name in options.only or [] if name not in names]
    if unknown:
        parser.error(f'--only: there is no step {", ".join(unknown)}; there are {", ".join(names)}')
    if not options.limit_factor > 0:
        parser.error(f'--limit-factor must be above 0, got {options.limit_factor}')
    if options.device == 'cuda':
        import torch

        if not torch.cuda.is_available():
            parser.error('torch finds no CUDA device here; --device cpu --quick runs without')
    chosen = [step for step in steps if not options.only or step.name in options.only]
    summary_file = 'summary-compiled.json' if options.compile else 'summary.json'
    return run(chosen, options.out, options.device, options.limit_factor, summary_file)


if __name__ == '__main__':
    sys.exit(main())
