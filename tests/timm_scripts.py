"""Run timm's own train.py, validate.py, benchmark.py and onnx_export.py on our models, as a user of timm would.

The scripts stand at the root of timm's repository and are in no distribution of the package index, so the tag of the
*installed* version is cloned from GitHub, once, into `.timm-tests/` (git-ignored); `--repo` names a clone that is there
already. train.py imports sase_blocks by its own option `--device-modules`, the others by `sase-blocks run`.

    python tests/timm_scripts.py                          # clones where needed
    python tests/timm_scripts.py --repo ~/pytorch-image-models
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

CACHE = Path(__file__).resolve().parent.parent / '.timm-tests'
URL = 'https://github.com/huggingface/pytorch-image-models'
SCRIPTS = ('train.py', 'validate.py', 'benchmark.py', 'onnx_export.py')


def fetch_repository(timm_version: str, cache: Path = CACHE) -> Path:
    """Return a clone of timm's repository at the tag of ``timm_version``, cloning it where it is missing."""
    folder = cache / f'pytorch-image-models-{timm_version}'
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            clone = ['git', 'clone', '--quiet', '--depth', '1', '--branch', f'v{timm_version}', URL, f'{scratch}/clone']
            if subprocess.run(clone, check=False).returncode:
                sys.exit(f'timm_scripts: could not clone {URL} at v{timm_version}; --repo names a clone of your own')
            Path(scratch, 'clone').rename(folder)  # atomic, so an interrupted clone leaves nothing behind
    return folder


def draw_data(root: Path) -> None:
    """Class folders of 32 px noise, one class dark and one light: root/train, root/validation."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for split, count in (('train', 8), ('validation', 4)):
        for label, base in (('dark', 0), ('light', 120)):
            folder = root / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = base + rng.integers(0, 100, (32, 32, 3))
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f'{i}.png')


def commands(repo: Path, work: Path) -> list[tuple[list[str], str]]:
    """Each command of the run, and what its output must contain."""
    python, launch = [sys.executable], [sys.executable, '-m', 'sase_blocks', 'run']
    small = ['--data-dir', f'{work}/data', '--model', 'resnet20_cifar', '--model-kwargs', 'genotype=sase']
    small += ['--num-classes', '2', '--img-size', '32', '-b', '4', '-j', '0', '--device', 'cpu']
    train = ['--device-modules', 'sase_blocks', '--epochs', '1', '--warmup-epochs', '0', '--lr', '0.01']
    train += ['--output', str(work), '--experiment', 'run']
    quick = ['--num-warm-iter', '1', '--num-bench-iter', '10', '-b', '1', '--img-size', '64', '--device', 'cpu']
    onnx = ['--checkpoint', f'{work}/resnet50_sase.pth', '--img-size', '64', '--dynamo', '--opset', '18']
    return [
        ([*python, f'{repo}/train.py', *small, *train], 'Best metric'),
        ([*launch, f'{repo}/validate.py', *small, '--checkpoint', f'{work}/run/last.pth.tar'], 'Acc@1'),
        ([*launch, f'{repo}/benchmark.py', '--model', 'resnet50_sase', '--bench', 'inference', *quick], '28.1'),
        (
            [*launch, f'{repo}/onnx_export.py', f'{work}/x.onnx', '--model', 'resnet50_sase', *onnx, '--check-forward'],
            '',
        ),
    ]


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return 0 if every script ran and printed what it should."""
    parser = argparse.ArgumentParser(description="Run timm's scripts on the models of sase_blocks.")
    parser.add_argument('--repo', type=Path, help=f"a clone of timm's repository (default: one in {CACHE.name}/)")
    repo = parser.parse_args(argv).repo or fetch_repository(version('timm'))
    if missing := [name for name in SCRIPTS if not (repo / name).is_file()]:
        sys.exit(f"timm_scripts: {repo} is no clone of timm's repository, it has no {', '.join(missing)}")
    repo = repo.resolve()
    with tempfile.TemporaryDirectory() as folder:
        import timm
        import torch

        import sase_blocks  # noqa: F401

        work = Path(folder)
        draw_data(work / 'data')
        torch.save(timm.create_model('resnet50_sase').state_dict(), work / 'resnet50_sase.pth')
        for command, expected in commands(repo, work):
            script = next(Path(part).name for part in command if part.endswith('.py'))
            done = subprocess.run(command, cwd=work, env=os.environ, capture_output=True, text=True, check=False)
            output = done.stdout + done.stderr
            if done.returncode or expected not in output:
                sys.exit(f'timm_scripts: {script} ended with {done.returncode}, expected {expected!r} in\n{output}')
            print(f'{script}: ran', flush=True)
    return 0


if __name__ == '__main__':
    sys.exit(main())
