"""A test of the search on CIFAR-10: published against fair mixing, several seeds, random labels, from scratch.

    python benchmarks/sase_search.py --data cifar10 --protocol paper                  on a GPU: the paper's 100 epochs
    python benchmarks/sase_search.py --data cifar10 --protocol reduced --cpu          on a CPU: a subset, few epochs

DIR holds train/CLASS/*.png (or jpg) and test/CLASS/*. Every step is resumable: the same command runs only the missing
ones, and --ray runs many at once. --out gets the runs. --results, which is small enough to keep, gets the settings, the
results as JSON, the tables and the pictures.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from sase_blocks.comparing import format_comparison
from sase_blocks.jobs import Ray
from sase_blocks.runs import write_text
from sase_blocks.search.sase.agreement import format_agreement
from sase_blocks.search.sase.campaigns import campaign, evaluation_budget
from sase_blocks.search.sase.config import SearchConfig
from sase_blocks.search.sase.evaluation import evaluate

MIXINGS = {'fair': False, 'paper': True}


@dataclass(frozen=True)
class Protocol:
    """One size of the experiment."""

    per_class: int | None  # training images of each class; None for all
    test_per_class: int | None
    order: str
    epochs: int
    batch_size: int
    arch_lr: float
    seeds: tuple[int, ...]
    evaluation_epochs: int
    evaluation_batch_size: int
    evaluations: int
    randoms: int = 3
    hessian_every: int = 1


PROTOCOLS = {
    'paper': Protocol(None, None, '2', 100, 128, 3e-4, (0, 1, 2), 200, 128, 3),
    # The logits' learning rate is ten times the paper's, because they take less than a hundredth of its steps.
    'reduced': Protocol(100, 50, '1', 4, 25, 3e-3, (0, 1, 2), 12, 32, 2, hessian_every=4),
    'tiny': Protocol(4, 2, '1', 1, 10, 3e-3, (0, 1), 1, 10, 1, 1),  # only a trial
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', required=True, metavar='DIR', help='CIFAR-10 as class folders')
    parser.add_argument('--protocol', choices=tuple(PROTOCOLS), default='reduced')
    parser.add_argument('--out', default='runs/sase_search', metavar='DIR', help='folder of the runs')
    parser.add_argument('--results', metavar='DIR', help='folder of the results to keep (default: results in --out)')
    parser.add_argument('--ray', metavar='ADDRESS', help='run on a Ray cluster: auto, HOST:PORT or local')
    parser.add_argument('--cpu', action='store_true', help='use the CPU even if there is a GPU')
    parser.add_argument('--workers', type=int, default=1, help='processes that load images (default: 1)')
    options = parser.parse_args(argv)
    protocol = PROTOCOLS[options.protocol]
    ray = Ray(options.ray, 0 if options.cpu else None) if options.ray else None
    out = Path(options.out)
    results = Path(options.results) if options.results else out / 'results'
    results.mkdir(parents=True, exist_ok=True)
    data = subset(Path(options.data), out / 'data', protocol)

    common: dict[str, Any] = {'cpu': options.cpu, 'workers': options.workers, 'tensorboard': False, 'resume': True}
    found: dict[str, dict[str, Any]] = {}
    for mixing, paper_mixing in MIXINGS.items():
        config = SearchConfig(
            data=str(data),
            out=str(out / mixing),
            paper_mixing=paper_mixing,
            order=protocol.order,
            epochs=protocol.epochs,
            batch_size=protocol.batch_size,
            arch_lr=protocol.arch_lr,
            hessian_every=protocol.hessian_every,
            **common,
        )
        print(f'== search, {mixing} mixing', flush=True)
        found[mixing] = campaign(config, seeds=protocol.seeds, null=True, ray=ray)

    print('== from scratch', flush=True)
    config = SearchConfig(
        data=str(data), out=str(out), batch_size=protocol.evaluation_batch_size, epochs=protocol.epochs, **common
    )
    evaluation = evaluate(
        found['fair']['genotype'],
        evaluation_budget(config, protocol.evaluation_epochs),
        baselines=[f'paper-mixing={found["paper"]["genotype"]}', 'none', 'se', 'eca', 'cbam', 'sase'],
        randoms=protocol.randoms,
        seeds=range(protocol.evaluations),
        ray=ray,
    )
    if os.environ.get('RANK', '0') == '0':
        keep(results, options, protocol, found, evaluation, out)


def subset(source: Path, target: Path, protocol: Protocol) -> Path:
    """Links to the first images of each class by name, or the whole data set if the protocol uses all."""
    if protocol.per_class is None:
        return source
    for split, count in (('train', protocol.per_class), ('test', protocol.test_per_class)):
        classes = sorted(path for path in (source / split).iterdir() if path.is_dir())
        if not classes:
            sys.exit(f'{source / split} holds no class folders')
        for folder in classes:
            place = target / split / folder.name
            place.mkdir(parents=True, exist_ok=True)
            files = sorted(folder.iterdir())[:count]
            if count is not None and len(files) < count:
                sys.exit(f'{folder} holds {len(files)} images, the protocol needs {count} of each class')
            for file in files:
                if not (place / file.name).exists():
                    (place / file.name).symlink_to(file.resolve())
    return target


def keep(
    results: Path,
    options: argparse.Namespace,
    protocol: Protocol,
    found: dict[str, dict[str, Any]],
    evaluation: dict[str, Any],
    out: Path,
) -> None:
    """Write the results worth keeping."""
    from sase_blocks.viz import plot_comparison, save_figure

    text = []
    for mixing, result in found.items():
        text.append(f'{mixing} mixing\n\n{format_agreement(result["agreement"])}\n')
        for seed in protocol.seeds[:1]:
            shutil.copy(out / mixing / f'seed-{seed}' / 'logits.png', results / f'logits-{mixing}-seed-{seed}.png')
    text.append(f'from scratch\n\n{format_comparison(evaluation)}\n')
    command = shlex.join(['python', 'benchmarks/sase_search.py', '--data', 'cifar10', '--protocol', options.protocol])
    facts = {
        'command': command + (' --cpu' if options.cpu else ''),
        'protocol': {'name': options.protocol, **asdict(protocol)},
        'machine': {'platform': platform.platform(), 'cores': os.cpu_count(), 'cuda': torch.cuda.is_available()},
        'python': platform.python_version(),
        'torch': torch.__version__,
        'searches': {mixing: strip(result) for mixing, result in found.items()},
        'evaluation': evaluation,
    }
    write_text(results / 'results.json', json.dumps(facts, indent=1) + '\n')
    write_text(results / 'tables.txt', '\n'.join(text))
    save_figure(plot_comparison(evaluation), results / 'evaluation.png')
    print('\n'.join(text))
    print(f'written: {results}')


def strip(result: dict[str, Any]) -> dict[str, Any]:
    """Genotypes, logits and agreement of the searches, without their common settings."""
    kept = ('genotype', 'verdict', 'logits', 'edges', 'warnings', 'epoch')
    return {
        'genotype': result['genotype'],
        'agreement': result['agreement'],
        'searches': {seed: {name: one[name] for name in kept} for seed, one in result['searches'].items()},
        'null': {seed: {name: one[name] for name in kept} for seed, one in result['null'].items()},
    }


if __name__ == '__main__':
    main()
