"""Shared by the benchmarks: clocks, calls timed in turns, and counts that need no clock."""

from __future__ import annotations

import contextlib
import logging
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# ---------------------------------------------------------------------------------------------------------- clocks


class CpuClock:
    """CPU time of this thread, without other processes on the machine. For one torch thread only."""

    what = 'CPU time of one thread'

    def sample(self, call: Callable[[], object]) -> Callable[[], float]:
        start = time.thread_time()
        call()
        seconds = time.thread_time() - start
        return lambda: seconds

    def finish(self) -> None:
        """Nothing to wait for on a CPU."""


class CudaClock:
    """Time between two device events, after a write larger than the cache, so that x comes from memory.

    During that write the host runs ahead of the device, so the first kernel's launch is not measured. If a block's
    kernels are shorter than their launches, the gaps between them are.
    """

    what = 'time between device events, cold cache'

    def __init__(self) -> None:
        self.flush = torch.empty(256 * 2**20, dtype=torch.int8, device='cuda')

    def sample(self, call: Callable[[], object]) -> Callable[[], float]:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self.flush.zero_()
        start.record()
        call()
        end.record()
        return lambda: start.elapsed_time(end) / 1e3

    def finish(self) -> None:
        torch.cuda.synchronize()


Clock = CpuClock | CudaClock


def interleaved(
    calls: dict[str, Callable[[], object]], clock: Clock, rounds: int, warmup: int
) -> dict[str, list[float]]:
    """Seconds of every call in every round. A round makes each call once, in an order that rotates."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for index in range(-warmup, rounds):
        turn = index % len(names)
        samples = [(name, clock.sample(calls[name])) for name in names[turn:] + names[:turn]]
        clock.finish()
        if index >= 0:
            for name, read in samples:
                seconds[name].append(read())
    return seconds


def spread(seconds: list[float]) -> float:
    """Interquartile range over the median."""
    if len(seconds) < 4:
        return float('nan')
    low, middle, high = statistics.quantiles(seconds, n=4)
    return (high - low) / middle


def copy_bandwidth(clock: Clock, device: str, rounds: int = 11) -> float:
    """Bytes per second of a large copy, bytes read plus bytes written: the upper bound for all benchmarks."""
    source = torch.randn((2**30 if device == 'cuda' else 2**27) // 4, device=device)
    target = torch.empty_like(source)
    seconds = interleaved({'copy': lambda: target.copy_(source)}, clock, rounds, warmup=3)['copy']
    return 2 * source.numel() * source.element_size() / statistics.median(seconds)


# ------------------------------------------------------------------------------------------------ counts, no clock


# What these take, and what these write over, is not read.
ALLOCATES = ('empty', 'empty_like', 'empty_strided', 'empty_permuted', 'new_empty', 'new_empty_strided')
OVERWRITES = ('copy_', 'fill_', 'zero_')


class CountBytes(TorchDispatchMode):
    """Sum the bytes that each eager operator reads and writes: its arguments, each tensor once, and its results.

    Views and new empty tensors move none. An ``out=`` is written, not read.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix('aten::')
        aliases = [ret.alias_info for ret in func._schema.returns]
        view = any(info is not None and not info.is_write for info in aliases)
        if view or name == '_unsafe_view' or name in ALLOCATES:  # the second is a view, but not in its schema
            return result
        outs = {a.name for a in func._schema.arguments if a.kwarg_only and a.alias_info and a.alias_info.is_write}
        read = {key: value for key, value in (kwargs or {}).items() if key not in outs}
        taken = () if name.endswith('_like') else (args[1:] if name in OVERWRITES else args, read)
        tensors = {id(leaf): leaf for leaf in torch.utils._pytree.tree_leaves(taken) if isinstance(leaf, Tensor)}
        written = [leaf for leaf in torch.utils._pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        self.bytes += sum(distinct_bytes(tensor) for tensor in (*tensors.values(), *written))
        return result


def distinct_bytes(tensor: Tensor) -> int:
    """Bytes of the distinct elements, with an expanded dimension read once."""
    sizes = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or size == 0]
    return torch.Size(sizes).numel() * tensor.element_size()


@contextlib.contextmanager
def inductor_bytes() -> Iterator[Callable[[], int | None]]:
    """Bytes that inductor reports its kernels read and write, for code compiled inside; None if it reports nothing.

    torch counts only for a logger at INFO, and not for a graph from a cache.
    """
    try:
        from torch._functorch import config as functorch_config
        from torch._inductor import config as inductor_config
        from torch._inductor import metrics
        from torch._inductor.compile_fx import inductor_metrics_log as logger
    except ImportError:
        yield lambda: None
        return
    before = logger.level, logger.propagate, list(logger.handlers)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.handlers = [logging.NullHandler()]
    metrics.reset()
    try:
        with inductor_config.patch(fx_graph_cache=False), functorch_config.patch(enable_autograd_cache=False):
            yield lambda: metrics.num_bytes_accessed or None
    finally:
        logger.level, logger.propagate, logger.handlers = before[0], before[1], before[2]


def peak_bytes(call: Callable[[], object]) -> int:
    """Peak CUDA memory during the call, above the memory before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def relative_error(outputs: tuple[Tensor, ...], references: tuple[Tensor, ...]) -> float:
    """The largest ||a - b|| / ||b|| over the pairs."""
    pairs = [(a.detach().double(), b.detach().double()) for a, b in zip(outputs, references, strict=True)]
    return max(float((a - b).norm() / b.norm().clamp_min(1e-30)) for a, b in pairs)


def cpu_name() -> str:
    """The processor's name, as the system reports it."""
    with contextlib.suppress(OSError):
        for line in Path('/proc/cpuinfo').read_text().splitlines():
            if line.startswith('model name'):
                return line.partition(':')[2].strip()
    return platform.processor() or platform.machine()


def progress(text: str) -> None:
    """One line on a terminal that the next one overwrites; nothing in a log."""
    if sys.stderr.isatty():
        print(f'\r\033[K{text}', end='', file=sys.stderr, flush=True)
