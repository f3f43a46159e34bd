"""Does a supernet rank networks like standalone training, and does the search find one? Four supernets on CIFAR-10.

    python benchmarks/trionet_search.py --data cifar10 --protocol full                 on a GPU
    python benchmarks/trionet_search.py --data cifar10 --protocol reduced --cpu        on a CPU: a subset, few epochs

This trains supernets with and without Hierarchical Sampling, with and without Multi-head Sharing, with the same seed
and steps. It also trains a dozen standalone networks (the pure ones, then random ones), and Kendall's tau compares
their accuracy with each supernet's score. Then it trains each search's result and the pure networks at the same limit.

DIR holds train/CLASS/*.png (or jpg) and test/CLASS/*. The same command runs only what is missing, and --ray runs
scoring and trainings on many machines. --out gets the runs, --results what is worth keeping.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from sase_search import subset

from sase_blocks.data import derive_seed, open_split
from sase_blocks.jobs import Ray, job_folder, run_jobs
from sase_blocks.models import Architecture
from sase_blocks.runs import write_text
from sase_blocks.search.data import split_data
from sase_blocks.search.trionet import TrioConfig, TrioSpace, draw, hierarchical, load_supernet, search
from sase_blocks.search.trionet.cost import macs
from sase_blocks.search.trionet.score import accuracy, recalibrate, resize
from sase_blocks.train import TrainConfig, train

VARIANTS = {
    'both': {'sampling': 'hierarchical', 'sharing': 'heads'},
    'uniform sampling': {'sampling': 'uniform', 'sharing': 'heads'},
    'plain sharing': {'sampling': 'hierarchical', 'sharing': 'plain'},
    'neither': {'sampling': 'uniform', 'sharing': 'plain'},
}
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
DRAWS = 401  # random stream, see derive_seed


@dataclass(frozen=True)
class Protocol:
    """One size of the experiment."""

    per_class: int | None  # training images of each class; None for all
    test_per_class: int | None
    space: dict[str, Any] | None  # None for 'cifar'
    max_macs: str
    epochs: int
    batch_size: int
    evaluations: int
    population: int
    networks: int
    alone_epochs: int
    alone_batch_size: int
    seeds: tuple[int, ...]
    lr: float = 0.004
    alone_lr: float = 0.004
    drawn: int = 2  # random networks per step, besides the largest and the smallest
    variants: tuple[str, ...] = tuple(VARIANTS)


SMALL = {
    'image_sizes': [16], 'stem': 16, 'reduction': 1, 'heads': 4, 'depths': [[1], [1, 2], [1, 2]],
    'widths': [[32], [48, 64], [96, 128]], 'expansions': [0.25, 0.5], 'kernels': [3, 5], 'windows': [3, 5],
    'attention_stages': [2, 3],
}  # fmt: skip
PROTOCOLS = {
    'full': Protocol(None, None, None, '30M', 200, 256, 400, 50, 24, 100, 128, (0, 1, 2)),
    'reduced': Protocol(100, 50, SMALL, '3M', 12, 32, 30, 10, 12, 12, 32, (0,), drawn=1, variants=tuple(VARIANTS)[:3]),
    'tiny': Protocol(4, 2, SMALL, '3M', 1, 8, 4, 3, 4, 1, 8, (0,), variants=('both',)),  # only a trial
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', required=True, metavar='DIR', help='CIFAR-10 as class folders')
    parser.add_argument('--protocol', choices=tuple(PROTOCOLS), default='reduced')
    parser.add_argument('--out', default='runs/trionet_search', metavar='DIR', help='folder of the runs')
    parser.add_argument('--results', metavar='DIR', help='folder of the results to keep (default: results in --out)')
    parser.add_argument('--cpu', action='store_true', help='use the CPU even if there is a GPU')
    parser.add_argument('--workers', type=int, default=1, help='processes that load images (default: 1)')
    parser.add_argument('--ray', metavar='ADDRESS', help='run on a Ray cluster: auto, HOST:PORT or local')
    options = parser.parse_args(argv)
    ray = Ray(options.ray, 0 if options.cpu else None) if options.ray else None
    protocol = PROTOCOLS[options.protocol]
    out = Path(options.out)
    results = Path(options.results) if options.results else out / 'results'
    results.mkdir(parents=True, exist_ok=True)
    data = subset(Path(options.data), out / 'data', protocol)
    place = out / 'space.json'
    if protocol.space is not None:
        write_text(place, json.dumps(protocol.space) + '\n')
    space = TrioSpace.parse('cifar' if protocol.space is None else str(place))

    found: dict[str, dict[str, Any]] = {}
    for name in protocol.variants:
        print(f'== supernet: {name}', flush=True)
        config = TrioConfig(
            data=str(data), out=str(out / name.replace(' ', '_')), resume=True, max_macs=protocol.max_macs,
            space='cifar' if protocol.space is None else str(place), fraction=0.8, epochs=protocol.epochs,
            batch_size=protocol.batch_size, networks=protocol.drawn, opt='adamw', lr=protocol.lr, weight_decay=0.05,
            evaluations=protocol.evaluations, population=protocol.population, calibration=1024,
            cpu=options.cpu, workers=options.workers, tensorboard=False, **VARIANTS[name],
        )  # fmt: skip
        found[name] = search(config, ray=ray)
    networks = choose(space, found, protocol)
    scores = {name: score(config_of(out, name), data, networks, options.cpu) for name in protocol.variants}
    alone = train_alone(networks, data, out, protocol, options, ray)
    report(results, options, protocol, found, networks, scores, alone)


def config_of(out: Path, name: str) -> Path:
    return out / name.replace(' ', '_')


def choose(space: TrioSpace, found: Mapping[str, Mapping[str, Any]], protocol: Protocol) -> dict[str, str]:
    """The standalone networks by name: pure ones under the limit, random ones, and the searches' results."""
    chosen = {f'only {name}': entry['architecture'] for name, entry in next(iter(found.values()))['pure'].items()}
    rng = np.random.default_rng(derive_seed(0, DRAWS))
    while len(chosen) < protocol.networks:
        text = str(space.architecture(draw(space, rng, hierarchical)))
        if text not in chosen.values():
            chosen[f'random {len(chosen)}'] = text
    return chosen | {f'found, {name}': result['architecture'] for name, result in found.items()}


def score(folder: Path, data: Path, networks: Mapping[str, str], cpu: bool) -> dict[str, float]:
    """Held-out accuracy of each network with one supernet's weights."""
    device = torch.device('cuda' if torch.cuda.is_available() and not cpu else 'cpu')
    supernet = load_supernet(folder).to(device)
    size = supernet.space.image_sizes[-1]
    facts = {'input_size': (3, size, size), 'mean': MEAN, 'std': STD, 'interpolation': 'bilinear', 'crop_pct': 1.0}
    config = TrioConfig(str(data), fraction=0.8, batch_size=64)
    parts = split_data(open_split(data), config, facts, device=device)
    values = {}
    for name, text in networks.items():
        architecture = Architecture.parse(text)
        network = supernet.activate(architecture)
        recalibrate(network, (resize(x, architecture.image_size) for x, _ in parts.training.once(64, 1024)))
        batches = ((resize(x, architecture.image_size), y) for x, y in parts.held_out.once(64))
        values[name] = accuracy(network, batches)
    return values


def train_alone(
    networks: Mapping[str, str],
    data: Path,
    out: Path,
    protocol: Protocol,
    options: argparse.Namespace,
    ray: Ray | None = None,
) -> dict[str, list[float]]:
    """Test accuracy after the last epoch of each network trained from scratch, with each seed."""
    texts = sorted(set(networks.values()))
    jobs = [{'key': f'{seed}: {text}', 'architecture': text, 'seed': seed} for seed in protocol.seeds for text in texts]

    def work(job: dict[str, Any]) -> dict[str, Any]:
        folder = job_folder(out / 'alone', job['key'])
        config = TrainConfig(
            data=str(data), out=str(folder), resume=True, model='trionet',
            model_args={'architecture': job['architecture'], 'zero_init_last': False}, epochs=protocol.alone_epochs,
            batch_size=protocol.alone_batch_size, opt='adamw', lr=protocol.alone_lr, weight_decay=0.05,
            label_smoothing=0.1, clip_grad=5.0, seed=job['seed'], eval_every=0, cpu=options.cpu,
            workers=options.workers, tensorboard=False,
        )  # fmt: skip
        with (folder / 'log.txt').open('a', encoding='utf-8') as log, contextlib.redirect_stdout(log):
            return {'accuracy': train(config)['acc1']}

    print(f'== {len(jobs)} networks alone', flush=True)
    outcome = run_jobs(
        jobs,
        work,
        out / 'alone',
        settings=asdict(protocol),
        describe=lambda job, result: f'accuracy {result["accuracy"]:.2f} %',
        ray=ray,
        cpu=options.cpu,
    )
    return {
        name: [r['accuracy'] for s in protocol.seeds if (r := outcome.results.get(f'{s}: {text}'))]
        for name, text in networks.items()
    }


def report(
    results: Path,
    options: argparse.Namespace,
    protocol: Protocol,
    found: Mapping[str, Mapping[str, Any]],
    networks: Mapping[str, str],
    scores: Mapping[str, Mapping[str, float]],
    alone: Mapping[str, Sequence[float]],
) -> None:
    """Print the tables, and write the results worth keeping."""
    from scipy.stats import kendalltau  # extra search

    names = [name for name in networks if alone[name]]
    ranked = [name for name in names if not name.startswith('found')]
    lines = [f'{"network":24}{"MACs":>9}{"alone %":>9}' + ''.join(f'{variant:>18}' for variant in scores)]
    lines.append('-' * len(lines[0]))
    for name in names:
        million = macs(Architecture.parse(networks[name]), 10) / 1e6
        lines.append(
            f'{name:24}{million:7.2f} M{fmean(alone[name]):9.2f}'
            + ''.join(f'{values[name]:18.2f}' for values in scores.values())
        )
    taus = {}
    for variant, values in scores.items():
        tau, p = kendalltau([values[name] for name in ranked], [fmean(alone[name]) for name in ranked])
        taus[variant] = {'tau': float(tau), 'p': float(p), 'networks': len(ranked)}
    lines += [
        '',
        *(f"Kendall's tau, {v}: {t['tau']:.2f} (p = {t['p']:.2f}, {len(ranked)} networks)" for v, t in taus.items()),
    ]
    lines += [
        '',
        'alone: test accuracy after training from scratch; the other columns: held-out accuracy with the weights of',
        'the supernet. The found networks take no part in tau.',
        '',
        *(f'{name}: {networks[name]}' for name in names),
    ]
    command = f'python benchmarks/trionet_search.py --data cifar10 --protocol {options.protocol}'
    facts = {
        'command': command + (' --cpu' if options.cpu else ''),
        'protocol': {'name': options.protocol, **asdict(protocol)},
        'machine': {'platform': platform.platform(), 'cores': os.cpu_count(), 'cuda': torch.cuda.is_available()},
        'python': platform.python_version(),
        'torch': torch.__version__,
        'networks': dict(networks),
        'alone': {name: list(values) for name, values in alone.items()},
        'scores': {variant: dict(values) for variant, values in scores.items()},
        'kendall': taus,
        'found': {
            variant: {key: result[key] for key in ('architecture', 'score', 'test_accuracy', 'cost', 'evaluations')}
            for variant, result in found.items()
        },
    }
    write_text(results / 'results.json', json.dumps(facts, indent=1) + '\n')
    write_text(results / 'tables.txt', '\n'.join(lines) + '\n')
    print('\n'.join(lines))
    print(f'written: {results}')


if __name__ == '__main__':
    main()
