"""The demo: real images, four networks, a few minutes on a laptop (extra ``demo``).

It trains the CIFAR ResNet-20 without attention, with SE, CBAM and SASE on scikit-learn's handwritten digits, and draws
learning curves and SASE's attention. It shows that the blocks train. A data set of this size and a single seed cannot
tell which block is better.
"""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import models  # noqa: F401  # registers resnet20_cifar with timm
from .profiling import count_macs, milliseconds_per_image
from .runs import check_writable, say, write_text
from .train import hits
from .viz import plot_attention_maps, plot_learning_curves

__all__ = ['run_demo', 'run_search_demo', 'run_trionet_demo']

NETWORKS = ('none', 'se', 'cbam', 'sase')
IMAGE_SIZE = 32
TEST_IMAGES = 360
BATCH_SIZE = 32
TIMING_BATCH = 32
DEMO_SPACE = {
    'image_sizes': [16],
    'stem': 16,
    'reduction': 1,
    'heads': 2,
    'depths': [[1], [1, 2], [1, 2, 3]],
    'widths': [[32], [48, 64], [96, 128]],
    'expansions': [0.25, 0.5],
    'kernels': [3, 5],
    'windows': [3, 5],
    'attention_stages': [3],
}
NOTE = (
    'One seed and {images} test images: one image is {step:.2f} points, and the standard error of an accuracy is about '
    '{error:.1f} points.\nThis shows that the blocks train; it does not show which block is better.'
)


class Digits(NamedTuple):
    """Images (N, 1, 32, 32), normalised to mean 0 and standard deviation 1, and their classes (N,)."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def run_demo(out: str | Path = 'demo_out', epochs: int = 2, seed: int = 0, limit: int | None = None) -> dict[str, Any]:
    """Train four networks on handwritten digits. Prints a table, writes two pictures and ``results.json`` to ``out``.

    The networks are ``resnet20_cifar`` with no attention, ``'se'``, ``'cbam'`` and ``'sase'``. All start from the same
    seed and see the same batches in the same order. The data are scikit-learn's 1,797 digits, enlarged from 8 x 8 to
    32 x 32. The same 360 of them are always the test images. Runs on the CPU.

    Args:
        out: Folder for ``learning_curves.png``, ``attention_maps.png`` and ``results.json``; created if missing.
        epochs: Passes over the training images, at least 1.
        seed: Seed of the initial weights and of the batch order.
        limit: Maximum number of training images and of test images, at least 16; default: all.

    Returns:
        The content of ``results.json``: each network's figures, machine, versions, seed and command.

    Raises:
        ImportError: scikit-learn, matplotlib or tqdm is not installed.
        ValueError: ``epochs`` is less than 1 or ``limit`` less than 16.
        OSError: ``out`` cannot be created or written; raised before any work.
    """
    if epochs < 1:
        raise ValueError(f'epochs must be at least 1, got {epochs}')
    if not 0 <= seed < 2**64:
        raise ValueError(f'seed must be at least 0 and below 2**64, got {seed}')
    if limit is not None and limit < 16:
        raise ValueError(f'limit must be at least 16 images, got {limit}')
    try:
        import matplotlib
        import sklearn
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError(f'the demo needs {error.name}: pip install "sase-blocks[demo]"') from error
    out = Path(out)
    check_writable(out)

    digits = load_digits(limit)
    steps = epochs * -(-len(digits.train_labels) // BATCH_SIZE)
    networks: dict[str, nn.Module] = {}
    history: dict[str, list[dict[str, float]]] = {}
    with tqdm(total=len(NETWORKS) * steps, unit='step', dynamic_ncols=True, mininterval=0.5) as bar:
        for name in NETWORKS:
            bar.set_description(f'{_label(name):12}')
            torch.manual_seed(seed)
            networks[name] = timm.create_model(
                'resnet20_cifar', num_classes=10, in_chans=1, genotype=None if name == 'none' else name
            )
            history[name] = train(networks[name], digits, epochs, seed, bar)

    results = {
        'networks': _figures(networks, history, digits),
        'history': history,
        'epochs': epochs,
        'seed': seed,
        'train_images': len(digits.train_labels),
        'test_images': len(digits.test_labels),
        'command': f'from sase_blocks.demo import run_demo; run_demo({str(out)!r}, {epochs=}, {seed=}, {limit=})',
        'machine': {'platform': platform.platform(), 'processor': _processor(), 'threads': torch.get_num_threads()},
        'versions': {
            'python': platform.python_version(),
            **{module.__name__: module.__version__ for module in (torch, timm, sklearn, matplotlib)},
        },
    }
    (out / 'results.json').write_text(json.dumps(results, indent=2) + '\n')
    plot_learning_curves(history).savefig(out / 'learning_curves.png')
    shown = [digits.test_labels.tolist().index(digit) for digit in digits.test_labels.unique()[:8]]
    titles = [f'digit {label}' for label in digits.test_labels[shown].tolist()]
    plot_attention_maps(networks['sase'], digits.test_images[shown], titles=titles).savefig(out / 'attention_maps.png')
    print(format_table(results))
    say(f'\nWritten: {out}/learning_curves.png, {out}/attention_maps.png, {out}/results.json')
    return results


def run_search_demo(out: str | Path = 'runs/search', seed: int = 0, epochs: int = 10) -> dict[str, Any]:
    """Search for a SASE block on handwritten digits with a small network, first order, about two minutes on 2 cores.

    The network is ``resnet20_cifar`` with one block per stage. The search uses all digits, at 16 x 16. They are too few
    to tell how good the result is.

    Args:
        out: the run's folder, for ``genotype.json``, ``genotype.png``, ``logits.png`` and the checkpoint. An
            interrupted demo in it continues.
        seed: random seed.
        epochs: passes over half of the images.

    Returns:
        The result of ``search.sase.search``.

    Raises:
        ImportError: scikit-learn or accelerate is not installed.
        ValueError, OSError: as ``search.sase.search``.
    """
    from .search.sase.config import SearchConfig
    from .search.sase.searching import search

    images, labels, classes = _small_digits()
    config = SearchConfig(
        data='scikit-learn digits',
        out=str(out),
        resume=True,
        model_args={'in_chans': 1, 'layers': [1, 1, 1]},
        img_size=16,
        hflip=0.0,
        epochs=epochs,
        batch_size=64,
        lr=0.05,
        arch_lr=0.01,  # few steps, so each is large
        hessian_every=0,
        seed=seed,
        cpu=True,
        tensorboard=False,
    )
    result = search(config, (images, labels, classes))
    say(f'found: {result["genotype"]}\n{result["verdict"]}\nwritten: {out}/genotype.json, genotype.png, logits.png')
    return result


def run_trionet_demo(
    out: str | Path = 'runs/trionet',
    seed: int = 0,
    epochs: int = 10,
    evaluations: int = 40,
    limit: int | None = None,
) -> dict[str, Any]:
    """Search for a network of convolutions and attention on handwritten digits, in a few minutes on 2 cores.

    It uses a small space for 16 x 16 images: a supernet, an evolution under a limit of 4 M multiply-accumulates,
    extraction, and one test on 360 images that nothing else used. The data are too few to tell which operator is
    better.

    Args:
        out: the run's folder, see ``search.trionet.search``. An interrupted demo in it continues.
        seed: random seed.
        epochs: passes of the supernet over its images.
        evaluations: networks to score, more than 2.
        limit: number of training images; default: all 1,437.

    Returns:
        The result of ``search.trionet.search``.

    Raises:
        ImportError: scikit-learn, accelerate or Optuna is not installed.
        ValueError, OSError: as ``search.trionet.search``.
    """
    from .search.trionet import TrioConfig, search

    images, labels, classes = _small_digits()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    test, train = order[:TEST_IMAGES], order[TEST_IMAGES:][:limit]
    out = Path(out)
    check_writable(out)
    space = out / 'space.json'
    write_text(space, json.dumps(DEMO_SPACE) + '\n')
    config = TrioConfig(
        data='scikit-learn digits',
        out=str(out),
        resume=True,
        space=str(space),
        max_macs='4M',
        hflip=0.0,
        fraction=0.8,
        epochs=epochs,
        batch_size=32,
        opt='adamw',
        lr=0.004,
        weight_decay=0.05,
        networks=1,
        ema_decay=None,
        evaluations=evaluations,
        population=min(20, evaluations - 1),
        calibration=256,
        seed=seed,
        cpu=True,
        workers=0,
        tensorboard=False,
    )
    result = search(config, (images[train], labels[train], classes), (images[test], labels[test]))
    say(f'written: {out}/architecture.json, network.pt, front.png, architecture.png')
    return result


def _small_digits() -> tuple[Tensor, Tensor, list[str]]:
    """All digits, 12 x 12 in uint8 images (N, 1, 16, 16), their labels, and the class names."""
    try:
        from sklearn.datasets import load_digits as load
    except ImportError as error:
        raise ImportError(f'the demo needs {error.name}: pip install "sase-blocks[demo]"') from error
    bunch = load()
    # A margin, so that random crops keep most of a digit.
    images = F.pad(F.interpolate(torch.from_numpy(bunch.images).float()[:, None], size=12, mode='bilinear'), (2,) * 4)
    images = (images * (255 / 16)).round().to(torch.uint8)
    return images, torch.from_numpy(bunch.target), [str(digit) for digit in range(10)]


def load_digits(limit: int | None = None) -> Digits:
    """scikit-learn's handwritten digits, 32 x 32, in a fixed stratified split.

    Args:
        limit: Maximum number of training images and of test images; default: 1,437 and 360.
    """
    from sklearn.datasets import load_digits as load
    from sklearn.model_selection import train_test_split

    bunch = load()
    images = F.interpolate(torch.from_numpy(bunch.images).float()[:, None], size=IMAGE_SIZE, mode='bilinear')
    labels = torch.from_numpy(bunch.target)
    # The split does not depend on a run's seed, so that runs with several seeds have the same test images.
    train, test = train_test_split(range(len(labels)), test_size=TEST_IMAGES, random_state=0, stratify=labels)
    images = (images - images[train].mean()) / images[train].std()
    images = images.contiguous(memory_format=torch.channels_last)
    train, test = train[:limit], test[:limit]
    return Digits(images[train], labels[train], images[test], labels[test])


def train(model: nn.Module, digits: Digits, epochs: int, seed: int, bar: Any) -> list[dict[str, float]]:
    """Train ``model`` in place with AdamW on a one-cycle learning rate.

    Returns the log: a row per step with ``'epoch'`` and ``'train_loss'``, and twice per epoch ``'acc1'``, the test
    accuracy in per cent. The accuracy is only for the curves and selects nothing.
    """
    order = torch.Generator().manual_seed(seed)
    count = len(digits.train_labels)
    steps = -(-count // BATCH_SIZE)
    model.to(memory_format=torch.channels_last)  # about twice as fast on a CPU
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=epochs * steps)
    log = []
    for epoch in range(epochs):
        for step, batch in enumerate(torch.randperm(count, generator=order).split(BATCH_SIZE), start=1):
            model.train()
            loss = F.cross_entropy(model(digits.train_images[batch]), digits.train_labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            row = {'epoch': epoch + step / steps, 'train_loss': loss.item()}
            if step in (steps // 2, steps):
                row['acc1'] = accuracy(model, digits.test_images, digits.test_labels)
            log.append(row)
            bar.set_postfix_str(f'loss {loss.item():.3f}', refresh=False)
            bar.update()
    return log


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Accuracy of ``model`` in per cent; leaves it in eval mode."""
    model.eval()
    logits = torch.cat([model(batch) for batch in images.split(TIMING_BATCH)])
    return 100 * hits(logits, labels).double().mean().item()


def format_table(results: Mapping[str, Any]) -> str:
    """The demo's table as text, from the result of ``run_demo``."""
    header = f'{"network":14}{"test accuracy":>15}{"parameters":>12}{"MACs":>10}{"ms an image":>13}{"time ratio":>12}'
    lines = [header, '-' * len(header)]
    for name, row in results['networks'].items():
        lines.append(
            f'{_label(name):14}{row["test_accuracy"]:13.2f} %{row["parameters"]:12,}{row["macs"] / 1e6:8.1f} M'
            f'{row["ms_per_image"]:13.3f}{row["time_ratio"]:12.2f}'
        )
    share = statistics.fmean(row['test_accuracy'] for row in results['networks'].values()) / 100
    images = results['test_images']
    error = 100 * (share * (1 - share) / images) ** 0.5
    return '\n'.join([*lines, '', NOTE.format(images=images, step=100 / images, error=error)])


def _figures(
    networks: Mapping[str, nn.Module], history: Mapping[str, list[dict[str, float]]], digits: Digits
) -> dict[str, dict[str, float]]:
    milliseconds = milliseconds_per_image(networks, digits.test_images[:TIMING_BATCH])
    return {
        name: {
            'test_accuracy': history[name][-1]['acc1'],
            'parameters': sum(parameter.numel() for parameter in model.parameters()),
            'macs': count_macs(model, (1, IMAGE_SIZE, IMAGE_SIZE)),
            'ms_per_image': milliseconds[name],
            'time_ratio': milliseconds[name] / milliseconds['none'],
        }
        for name, model in networks.items()
    }


def _label(name: str) -> str:
    return 'no attention' if name == 'none' else name


def _processor() -> str:
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(':')[2].strip() for line in lines if line.startswith('model name')), platform.machine())
