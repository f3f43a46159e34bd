"""The cost of several processes in a SASE search: reductions and bytes per step, seconds measured and predicted.

    python benchmarks/scaling.py                       two processes (gloo) on this machine's CPU
    python benchmarks/scaling.py --order 2 --steps 5
    python benchmarks/scaling.py --processes 8 --device cuda   NCCL, on a machine with 8 GPUs

One process computes the joint batch, then its share with the batch norms that K processes need. Then K processes
compute one share each and reduce. The model is

    seconds(K) = seconds of a share alone + reductions * latency + bytes / bandwidth

with latency and bandwidth measured by reductions of 4 KiB and 8 MiB. Each process uses one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from sase_blocks import models  # noqa: F401  # registers resnet20_cifar
from sase_blocks.search.sase.bilevel import ORDERS, VirtualStep, logits_gradient
from sase_blocks.search.sase.network import SearchNetwork
from sase_blocks.search.sase.space import SearchSpace
from sase_blocks.search.sync_batch_norm import synchronize_norms


def work(rank: int, world: int, store: str, options: argparse.Namespace, batch: int, grouped: bool, out: str) -> None:
    """Steps of the search with ``batch`` images in this process. The first process writes its measurements.

    ``grouped``: in a process group (of one or more), with the synchronised batch norms and their arithmetic.
    """
    torch.set_num_threads(1)
    device = torch.device('cuda', rank) if options.device == 'cuda' else torch.device('cpu')
    counted = {'reductions': 0, 'bytes': 0}
    if grouped:
        backend = 'nccl' if options.device == 'cuda' else 'gloo'
        dist.init_process_group(backend, f'file://{store}', rank=rank, world_size=world)
        real = dist.all_reduce

        def all_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            counted['reductions'] += 1
            counted['bytes'] += tensor.numel() * tensor.element_size()
            return real(tensor, *args, **kwargs)

        dist.all_reduce = all_reduce
    torch.manual_seed(0)
    network = SearchNetwork(timm.create_model('resnet20_cifar'), SearchSpace.parse('paper')).to(device).train()
    if grouped:
        synchronize_norms(network.model)
    weights = list(network.weights().values())
    x, y = torch.randn(batch, 3, 32, 32, device=device), torch.arange(batch, device=device) % 10

    def mean(flat: Tensor) -> Tensor:
        if grouped:
            dist.all_reduce(flat := flat.clone())
        return flat / world

    def step() -> None:
        logits_gradient(network, F.cross_entropy, options.order, (x, y), (x, y), VirtualStep(0.025), mean=mean)
        grads = torch.autograd.grad(F.cross_entropy(network(x), y), weights)
        mean(torch.cat([grad.flatten() for grad in grads]))

    step()
    counted.update(reductions=0, bytes=0)
    seconds = [timed(step, device) for _ in range(options.steps)]
    found: dict[str, float] = {
        'seconds': statistics.median(seconds),
        'reductions': counted['reductions'] / options.steps,
        'bytes': counted['bytes'] / options.steps,
    }
    if world > 1:
        small, large = torch.zeros(1 << 10, device=device), torch.zeros(1 << 21, device=device)
        for tensor in (small, large):
            real(tensor)
        found['latency'] = statistics.median(timed(lambda: real(small), device) for _ in range(200))
        found['bandwidth'] = 2**23 / statistics.median(timed(lambda: real(large), device) for _ in range(20))
    if rank == 0:
        Path(out).write_text(json.dumps(found))
    if grouped:
        dist.destroy_process_group()


def timed(function: Callable[[], Any], device: torch.device) -> float:
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    function()
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def measure(
    world: int, options: argparse.Namespace, batch: int, copies: int = 1, grouped: bool = True
) -> dict[str, float]:
    """Run ``copies`` groups of ``world`` processes side by side, and return the first one's figures."""
    context = torch.multiprocessing.get_context('spawn')
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(
                target=work, args=(r, world, f'{folder}/store-{copy}', options, batch, grouped, f'{folder}/out-{copy}')
            )
            for copy in range(copies)
            for r in range(world)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            raise SystemExit('a process failed, see above')
        return dict(json.loads(Path(f'{folder}/out-0').read_text()))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--processes', type=int, default=2, metavar='K')
    parser.add_argument('--order', choices=ORDERS, default='1')
    parser.add_argument('--batch', type=int, default=64, help='images per step over all processes (default: 64)')
    parser.add_argument('--steps', type=int, default=10)
    parser.add_argument('--device', choices=('cpu', 'cuda'), default='cpu')
    parser.add_argument('--json', metavar='FILE', help='also write the figures to FILE')
    options = parser.parse_args(argv)
    os.environ.setdefault('GLOO_SOCKET_IFNAME', 'lo')
    k = options.processes
    if k < 2 or options.batch % k:
        parser.error(f'--batch {options.batch} must be a multiple of --processes {k}, at least 2')
    whole = measure(1, options, options.batch, grouped=False)
    # As many at a time as the group has processes, so that they share the machine's caches and memory the same way.
    share = measure(1, options, options.batch // k, copies=k if options.device == 'cpu' else 1)
    group = measure(k, options, options.batch // k)
    predicted = share['seconds'] + group['reductions'] * group['latency'] + group['bytes'] / group['bandwidth']
    figures = {
        'machine': platform.platform(),
        'cores': os.cpu_count(),
        'torch': torch.__version__,
        'order': options.order,
        'batch': options.batch,
        'processes': k,
        'seconds, one process, whole batch': whole['seconds'],
        'seconds, one process, its share': share['seconds'],
        'seconds, the group': group['seconds'],
        'seconds, predicted': predicted,
        'reductions a step': group['reductions'],
        'bytes reduced a step': group['bytes'],
        'latency of a reduction': group['latency'],
        'bytes a second': group['bandwidth'],
        'speed-up': whole['seconds'] / group['seconds'],
    }
    for name, value in figures.items():
        print(f'{name:36}{value:,.4g}' if isinstance(value, float) else f'{name:36}{value}')
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=1) + '\n')


if __name__ == '__main__':
    main()
