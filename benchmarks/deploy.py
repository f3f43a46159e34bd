"""Deployment of a network: time, deviation and size in torch and onnxruntime, with folded batch norms and in int8.

    python benchmarks/deploy.py                                         # some minutes: two networks
    python benchmarks/deploy.py --models resnet50_sase --batch 8        # any timm model, at its own image size
    python benchmarks/deploy.py --models digits:se digits:sase          # ResNet-20 with a block, trained here on digits
    python benchmarks/deploy.py --models resnet50_sase --checkpoint F   # with your own weights

Each network runs on one CPU thread, with and without `fuse`, in torch and in onnxruntime, and quantised to int8 by
onnxruntime (8-bit activations, 7-bit weights: see docs/export.md). They take turns, and times are medians.

`digits:NAME` is resnet20_cifar with the block NAME, trained for two epochs on scikit-learn's digits. Its top-1
agreement and accuracy are over 360 test images. Without --checkpoint, any other model has random weights. Its batch
norms have the statistics of crops of scikit-learn's two photographs, and its images are other crops of them. Deviations
are then typical for its depth and width, and top-1 agreement means little.

Needs the extras export and demo.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import shlex
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn

import sase_blocks  # registers the models with timm
from sase_blocks.deploy import export_onnx, fuse
from sase_blocks.train import hits

CALIBRATION = 128  # images
HEADER = ('network', 'way', 'ms', 'ratio', 'max deviation', 'mean', 'top-1 agrees', 'accuracy', 'MB')


class Subject(NamedTuple):
    """A network in eval mode, with images (N, C, H, W) for calibration and comparison, and their classes if any."""

    name: str
    model: nn.Module
    calibration: Tensor
    images: Tensor
    labels: Tensor | None


def digits(block: str, epochs: int, limit: int | None = None) -> Subject:
    """resnet20_cifar with a block, trained on handwritten digits."""
    from tqdm import tqdm

    from sase_blocks.demo import load_digits

    data = load_digits(limit)
    torch.manual_seed(0)
    model = timm.create_model('resnet20_cifar', in_chans=1, genotype=block).to(memory_format=torch.channels_last)
    order, count = torch.Generator().manual_seed(0), len(data.train_labels)
    batches = [batch for _ in range(epochs) for batch in torch.randperm(count, generator=order).split(32)]
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=len(batches))
    for batch in tqdm(batches, desc=f'training digits:{block}', unit='step', mininterval=5):
        loss = torch.nn.functional.cross_entropy(model(data.train_images[batch]), data.train_labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    calibration, images = data.train_images[:CALIBRATION].contiguous(), data.test_images.contiguous()
    return Subject(f'digits:{block}', model.eval(), calibration, images, data.test_labels)


def crops(count: int, size: int, seed: int) -> Tensor:
    """Random crops of the two photographs that come with scikit-learn, normalised. -> (count, 3, size, size)."""
    from sklearn.datasets import load_sample_images

    photos = [torch.from_numpy(photo.copy()).permute(2, 0, 1).float() / 255 for photo in load_sample_images().images]
    g = torch.Generator().manual_seed(seed)
    found = []
    for i in range(count):
        photo = photos[i % len(photos)]
        side = int(torch.randint(min(size, photo.shape[1]) // 2, photo.shape[1] + 1, (), generator=g))
        y, x = (int(torch.randint(0, n - side + 1, (), generator=g)) for n in photo.shape[1:])
        crop = photo[None, :, y : y + side, x : x + side]
        found.append(torch.nn.functional.interpolate(crop, size=(size, size), mode='bilinear', antialias=True))
    images = torch.cat(found)
    return (images - images.mean()) / images.std()


def timm_model(name: str, size: int | None, checkpoint: str | None, count: int) -> Subject:
    """Any timm model, with given weights, or with random ones and the statistics of photographs."""
    torch.manual_seed(0)
    model = timm.create_model(name)
    size = size or model.pretrained_cfg['input_size'][-1]
    calibration, images = crops(CALIBRATION, size, seed=1), crops(count, size, seed=2)
    if checkpoint is not None:
        sase_blocks.load_checkpoint(model, checkpoint)
        return Subject(name, model.eval(), calibration, images, None)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.0)  # the last of a branch starts at 0, which would hide the attention
        norm.momentum = None  # an average over all batches
    with torch.no_grad():
        for batch in calibration.split(16):
            model.train()(batch)
    return Subject(name, model.eval(), calibration, images, None)


def quantise(file: Path, out: Path, calibration: Tensor) -> None:
    """The recipe of docs/export.md: static, per channel, correct on every x86 CPU."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Batches(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches = iter(calibration.split(16))

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.batches, None)
            return None if batch is None else {'input': batch.numpy()}

    quantize_static(
        file,
        out,
        Batches(),
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        reduce_range=True,  # 7-bit weights: without VNNI, 8 bits overflow the 16-bit sums of pairs
        # onnxruntime's int8 softmax of a single value is 0, which EMA has below 64 channels.
        nodes_to_exclude=[node.name for node in onnx.load(file).graph.node if node.op_type == 'Softmax'],
    )


def onnx_runner(file: Path) -> Callable[[Tensor], Tensor]:
    """A function of a batch that runs an ONNX file on one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(file, options, providers=['CPUExecutionProvider'])
    return lambda x: torch.from_numpy(session.run(None, {'input': x.numpy()})[0])


@torch.no_grad()
def measure(subject: Subject, batch: int, rounds: int, folder: Path) -> list[dict[str, Any]]:
    """One row per way to run the network: time, deviation from plain torch, agreement, size."""
    fused = copy.deepcopy(subject.model)
    print(f'{subject.name}: {fuse(fused)}'.replace('\n', ' '), file=sys.stderr)
    size = tuple(subject.images.shape[1:])
    files = {name: folder / f'{name}.onnx' for name in ('onnxruntime', 'onnxruntime, fused', 'onnxruntime, int8')}
    # Checked on the images below, because a deep network with random weights makes noise infinite.
    export_onnx(subject.model, files['onnxruntime'], size, check=False)
    export_onnx(fused, files['onnxruntime, fused'], size, check=False)
    quantise(files['onnxruntime, fused'], files['onnxruntime, int8'], subject.calibration)

    ways: dict[str, Callable[[Tensor], Tensor]] = {'torch': subject.model, 'torch, fused': fused}
    ways |= {name: onnx_runner(file) for name, file in files.items()}
    x = subject.images[:batch].contiguous()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, run in ways.items():
            start = time.perf_counter()
            run(x)
            seconds[name].append(time.perf_counter() - start)
    milliseconds = {
        name: 1000 * statistics.median(values[1:]) for name, values in seconds.items()
    }  # the first warms up

    logits = {name: torch.cat([run(part) for part in subject.images.split(batch)]) for name, run in ways.items()}
    expected = logits['torch']
    spread = (expected - expected.mean(0)).std().item()
    rows = []
    for name, actual in logits.items():
        difference = (actual - expected).abs()
        weights = sum(t.numel() * t.element_size() for t in subject.model.state_dict().values())
        rows.append(
            {
                'network': subject.name,
                'way': name,
                'ms': milliseconds[name],
                'ratio': milliseconds[name] / milliseconds['torch'],
                'max_deviation': difference.max().item() / spread,
                'mean_deviation': difference.mean().item() / spread,
                'top1_agreement': (actual.argmax(1) == expected.argmax(1)).double().mean().item(),
                'accuracy': None if subject.labels is None else hits(actual, subject.labels).double().mean().item(),
                'bytes': files[name].stat().st_size if name in files else weights,
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table. Deviations are of logits, in standard deviations of a logit over the images."""
    lines = [f'| {" | ".join(HEADER)} |', '|---|---|' + '---:|' * (len(HEADER) - 2)]
    for row in rows:
        accuracy = '' if row['accuracy'] is None else f'{row["accuracy"]:.1%}'
        lines.append(
            f'| {row["network"]} | {row["way"]} | {row["ms"]:.1f} | {row["ratio"]:.2f} | {row["max_deviation"]:.1e} '
            f'| {row["mean_deviation"]:.1e} | {row["top1_agreement"]:.1%} | {accuracy} | {row["bytes"] / 1e6:.2f} |'
        )
    return '\n'.join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; 1 if folding or onnxruntime in float32 deviates by more than 1e-3."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--models', nargs='+', default=['digits:sase', 'resnet50_sase'], metavar='NAME')
    parser.add_argument('--size', type=int, help="image size of timm models (default: the model's own)")
    parser.add_argument('--checkpoint', help='weights for the timm models')
    parser.add_argument('--batch', type=int, default=1)
    parser.add_argument('--images', type=int, default=64, help='images to compare timm models on')
    parser.add_argument('--rounds', type=int, default=15)
    parser.add_argument('--epochs', type=int, default=2, help='epochs of training on the digits')
    parser.add_argument('--limit', type=int, help='use only this many digits')
    parser.add_argument('--out', type=Path, help='write all figures to this JSON file')
    options = parser.parse_args(argv)
    if min(options.batch, options.images, options.rounds, options.epochs) < 1:
        parser.error('--batch, --images, --rounds and --epochs must be at least 1')
    torch.set_num_threads(1)
    warnings.simplefilter('ignore')  # of the exporter and the quantiser
    rows = []
    for name in options.models:
        if name.startswith('digits:'):
            subject = digits(name.removeprefix('digits:'), options.epochs, options.limit)
        else:
            subject = timm_model(name, options.size, options.checkpoint, options.images)
        with tempfile.TemporaryDirectory() as folder:
            rows += measure(subject, options.batch, options.rounds, Path(folder))
    print(table(rows))
    result = {
        'rows': rows,
        'command': f'python benchmarks/deploy.py {shlex.join(argv)}'.rstrip(),
        'machine': platform.platform(),
        'versions': {'python': platform.python_version(), 'torch': torch.__version__, 'timm': timm.__version__},
    }
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + '\n')
    exact = [row for row in rows if 'int8' not in row['way']]
    return int(any(not row['max_deviation'] < 1e-3 for row in exact))


if __name__ == '__main__':
    sys.exit(main())
