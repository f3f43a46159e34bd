"""The demo: real images, four networks, a few minutes on a laptop (extra ``demo``).

It compares the CIFAR ResNet-20 without attention, with SE, CBAM and SASE on scikit-learn's handwritten digits, and
draws learning curves and SASE's attention. It shows that the blocks train. A data set of this size and a single seed
cannot tell which block is better.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from . import models  # noqa: F401  # registers resnet20_cifar with timm
from .comparing import Candidate, CompareConfig, check_errors, compare, format_comparison, write_results
from .data import Samples, create_transforms, image_config
from .jobs import job_folder
from .networks import load_model
from .runs import check_writable, import_extra, read_rows, say, write_text
from .viz import plot_attention_maps, plot_learning_curves, save_figure

__all__ = ['run_demo', 'run_search_demo', 'run_trionet_demo']

NETWORKS = ('none', 'se', 'cbam', 'sase')
IMAGE_SIZE = 32
TEST_IMAGES = 360
BATCH_SIZE = 32
NOTE = 'This shows that the blocks train; it does not show which block is better.'
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


class Digits(NamedTuple):
    """Images (N, 1, 32, 32), normalised to mean 0 and standard deviation 1, and their classes (N,)."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


@dataclass(frozen=True)
class _Pictures:
    """Grey images (N, H, W) of uint8 and their labels (N,), as a source of ``Samples``."""

    data: Any
    targets: Any

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.data[index]), int(self.targets[index])


def run_demo(
    out: str | Path = 'demo_out', epochs: int = 6, seeds: Sequence[int] = (0,), limit: int | None = None
) -> dict[str, Any]:
    """Compare four networks on handwritten digits. Prints a table, and writes it and two pictures to ``out``.

    The networks are ``resnet20_cifar`` with no attention, ``'se'``, ``'cbam'`` and ``'sase'``, with the same seeds and
    batches. The data are scikit-learn's 1,797 digits, enlarged from 8 x 8 to 12 x 12 in images of 16 x 16. The same 360
    of them are always the test images. Runs on the CPU.

    Args:
        out: Folder for ``learning_curves.png``, ``attention_maps.png`` and the files of ``write_results``; created if
            missing. An interrupted demo in it continues.
        epochs: Passes over the training images, at least 1.
        seeds: Seeds of the trainings. The pictures show the first one.
        limit: Maximum number of training images and of test images, at least 32; default: all.

    Returns:
        The result of ``comparing.compare``.

    Raises:
        ImportError: scikit-learn, matplotlib, SciPy or accelerate is not installed.
        ValueError: a wrong argument, or another demo in ``out``.
        OSError: ``out`` cannot be created or written; raised before any work.
    """
    if limit is not None and limit < BATCH_SIZE:
        raise ValueError(f'limit must be at least {BATCH_SIZE} images, got {limit}')
    budget = CompareConfig(
        data='scikit-learn digits',
        out=str(out),
        model='resnet20_cifar',
        model_args={'in_chans': 1},
        img_size=16,
        hflip=0.0,
        epochs=epochs,
        batch_size=BATCH_SIZE,
        opt='adamw',
        lr=0.005,
        weight_decay=0.05,
        warmup=0.3,
        channels_last=True,  # about twice as fast on a CPU
        cpu=True,
        workers=0,
        tensorboard=False,
    )
    try:
        import accelerate  # noqa: F401
        import matplotlib  # noqa: F401
        import scipy  # noqa: F401
        import sklearn  # noqa: F401
    except ImportError as error:
        raise ImportError(f'the demo needs {error.name}: pip install "sase-blocks[demo]"') from error
    images, labels, classes = _small_digits()
    train, test = (part[:limit] for part in _split(labels))
    source = _Pictures(images[:, 0].numpy(), labels.numpy())
    data = Samples(source, classes, train, 'train'), Samples(source, classes, test, 'test')
    out = Path(out)
    check_writable(out)
    result = compare([Candidate(name, name) for name in NETWORKS], budget, seeds=seeds, data=data)
    check_errors(result)
    folders = {name: job_folder(out, f'{name}, seed {seeds[0]}') for name in NETWORKS}
    curves = {name: read_rows(folder / 'metrics.jsonl', epochs) for name, folder in folders.items()}
    about = f'handwritten digits, seed {seeds[0]}'
    save_figure(plot_learning_curves(curves, about), out / 'learning_curves.png')
    shown = [labels[test].tolist().index(digit) for digit in labels[test].unique()[:8]]
    titles = [f'digit {label}' for label in labels[test][shown].tolist()]
    sase = load_model(folders['sase'] / 'last.pt').model
    _, transform = create_transforms(image_config(sase, budget.img_size), hflip=budget.hflip)
    batch = torch.stack([transform(data[1].in_channels(1).load(position)[0]) for position in shown])
    save_figure(
        plot_attention_maps(sase, batch, titles=titles, title=f'{about}, after epoch {epochs}'),
        out / 'attention_maps.png',
    )
    write_results(result, out)
    say(
        f'{format_comparison(result)}\n\n{NOTE}\nwritten: {out}/learning_curves.png, attention_maps.png, comparison.png'
    )
    return result


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
    bunch = import_extra('sklearn.datasets', 'the demo needs scikit-learn', 'demo').load_digits()
    # A margin, so that random crops keep most of a digit.
    images = torch.from_numpy(bunch.images).float()[:, None]
    images = F.pad(F.interpolate(images, size=12, mode='bilinear'), (2,) * 4)
    images = (images * (255 / 16)).round().to(torch.uint8)
    return images, torch.from_numpy(bunch.target), [str(digit) for digit in range(10)]


def _split(labels: Tensor) -> tuple[list[int], list[int]]:
    """Training and test images, stratified. The split does not depend on a run's seed."""
    from sklearn.model_selection import train_test_split

    train, test = train_test_split(range(len(labels)), test_size=TEST_IMAGES, random_state=0, stratify=labels)
    return train, test


def load_digits(limit: int | None = None) -> Digits:
    """scikit-learn's handwritten digits, 32 x 32, in a fixed stratified split.

    Args:
        limit: Maximum number of training images and of test images; default: 1,437 and 360.
    """
    from sklearn.datasets import load_digits as load

    bunch = load()
    images = F.interpolate(torch.from_numpy(bunch.images).float()[:, None], size=IMAGE_SIZE, mode='bilinear')
    labels = torch.from_numpy(bunch.target)
    train, test = _split(labels)
    images = (images - images[train].mean()) / images[train].std()
    images = images.contiguous(memory_format=torch.channels_last)
    train, test = train[:limit], test[:limit]
    return Digits(images[train], labels[train], images[test], labels[test])
