"""Cost of a network inside its supernet and extracted: one forward, one training step.

    python benchmarks/supernet.py                                     the cifar space, 64 images of 32 px
    python benchmarks/supernet.py --space imagenet --batch 8
    python benchmarks/supernet.py --space imagenet --batch 128 --device cuda --json supernet.json

Both take turns in every round, and each figure is the median over the rounds. 'activate' is the cost of building the
network, once for each. The networks are the largest, the smallest and random ones.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from sase_blocks.search.trionet import SuperNet, TrioSpace, draw
from sase_blocks.search.trionet.cost import macs


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--space', default='cifar', help="'cifar', 'imagenet' or a JSON file (default: cifar)")
    parser.add_argument('--batch', type=int, default=64, help='images (default: 64)')
    parser.add_argument('--rounds', type=int, default=9, help='rounds for the median (default: 9)')
    parser.add_argument('--networks', type=int, default=3, help='random networks (default: 3)')
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--json', type=Path, metavar='FILE', help='write all figures to FILE')
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    space = TrioSpace.parse(options.space)
    supernet = SuperNet(space, 1000).to(options.device)
    device = torch.cuda.get_device_name() if options.device == 'cuda' else f'{torch.get_num_threads()} thread(s)'
    print(f'{options.space}, batch {options.batch}, {device}, torch {torch.__version__}, {platform.platform()}, seed 0')
    print(
        f'{"network":12}{"MACs":>10}{"activate":>11}{"forward":>11}{"alone":>10}{"ratio":>7}{"step":>11}{"alone":>10}{"ratio":>7}'
    )
    rows: list[dict[str, Any]] = []
    for extent in ('largest', 'smallest', *[None] * options.networks):
        architecture = space.architecture(draw(space, rng, extent=extent))
        began = time.perf_counter()
        inside = supernet.activate(architecture)
        activate = time.perf_counter() - began
        alone = inside.extract()
        x = torch.randn(options.batch, 3, architecture.image_size, architecture.image_size, device=options.device)
        columns: list[str] = []
        row: dict[str, Any] = {'network': extent or 'random', 'architecture': str(architecture), 'activate': activate}
        for train in (False, True):
            inside.train(train)
            alone.train(train)
            a, b = medians([step_of(inside, x, train), step_of(alone, x, train)], options.rounds)
            row['step' if train else 'forward'] = {'inside': a, 'alone': b}
            columns += [f'{1e3 * a:9.1f}ms{1e3 * b:8.1f}ms{a / b:7.2f}']
        row['macs'] = macs(architecture)
        rows.append(row)
        million = row['macs'] / 1e6
        print(f'{extent or "random":12}{million:8.1f} M{1e3 * activate:9.1f}ms' + ''.join(columns), flush=True)
    if options.json:
        result = {
            'device': device, 'torch': torch.__version__, 'space': options.space, 'batch': options.batch,
            'unit': 'seconds', 'rows': rows,
        }  # fmt: skip
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + '\n', encoding='utf-8')


def step_of(network: nn.Module, x: torch.Tensor, train: bool) -> Callable[[], None]:
    def step() -> None:
        with torch.set_grad_enabled(train):
            y = network(x)
            if train:
                y.square().mean().backward()
        if x.is_cuda:
            torch.cuda.synchronize()

    return step


def medians(steps: Sequence[Callable[[], None]], rounds: int) -> list[float]:
    """Time each in turns. The first two rounds warm up."""
    seconds: list[list[float]] = [[] for _ in steps]
    for _ in range(rounds + 2):
        for kept, step in zip(seconds, steps, strict=True):
            began = time.perf_counter()
            step()
            kept.append(time.perf_counter() - began)
    return [statistics.median(kept[2:]) for kept in seconds]


if __name__ == '__main__':
    main()
