"""Attention in Ultralytics YOLO, by insertion or as rows of a model YAML: python examples/yolo.py

Trains on drawn squares, checks that the attention still runs, and compares the ONNX file with torch. For your own data:
python examples/yolo.py --model yolo11n.pt --data coco8.yaml --imgsz 640 --epochs 10
pip install "sase-blocks[ecosystem]"
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from PIL import Image
from ultralytics import YOLO
from ultralytics.nn.tasks import yaml_model_load
from ultralytics.utils import YAML

import sase_blocks
from sase_blocks.ultralytics import keep_attention


def draw_squares(folder: Path, count: int = 4, size: int = 64) -> Path:
    """Write a data set of one class in Ultralytics' format, with outlines, and return its YAML."""
    rng = np.random.default_rng(0)
    for part in ('train', 'val'):
        for kind in ('images', 'labels'):
            (folder / kind / part).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = rng.integers(0, 60, (size, size, 3), dtype=np.uint8)
            x, y = rng.integers(0, size // 2, 2)
            pixels[y : y + size // 2, x : x + size // 2] = 220
            Image.fromarray(pixels).save(folder / 'images' / part / f'{i}.png')
            left, top, right, bottom = x / size, y / size, x / size + 0.5, y / size + 0.5
            outline = f'0 {left} {top} {right} {top} {right} {bottom} {left} {bottom}\n'
            (folder / 'labels' / part / f'{i}.txt').write_text(outline)
    YAML.save(
        folder / 'squares.yaml',
        {'path': str(folder), 'train': 'images/train', 'val': 'images/val', 'names': ['square']},
    )
    return folder / 'squares.yaml'


def add_rows(model: str, block: str, folder: Path) -> Path:
    """Write a model YAML with a block after each map that the head reads, and return it.

    The rows stand right before the head. So no other row changes its number.
    """
    config = yaml_model_load(model)
    *rows, (sources, repeats, head, arguments) = config['head']
    first = len(config['backbone']) + len(rows)
    rows += [[source, 1, block, []] for source in sources]
    config['head'] = [*rows, [[first + i for i in range(len(sources))], repeats, head, arguments]]
    YAML.save(folder / f'attention-{Path(model).stem}.yaml', config)
    return folder / f'attention-{Path(model).stem}.yaml'


def compare(model: YOLO, onnx_file: str, size: int) -> float:
    """The largest difference between the ONNX file's outputs and torch's, relative to the largest output."""
    x = torch.rand(1, 3, size, size)
    with torch.no_grad():
        expected = model.model.eval()(x)[0]
    expected = expected[0] if isinstance(expected, tuple) else expected
    found = onnxruntime.InferenceSession(onnx_file).run(None, {'images': x.numpy()})[0]
    return float((expected - torch.from_numpy(found)).abs().max() / expected.abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', default='yolo11n.yaml', help='any model of Ultralytics: .yaml, or .pt with weights')
    parser.add_argument('--block', default='cbam', help="a block or genotype, 'cbam(reduction=8)'")
    parser.add_argument('--rows', action='store_true', help='as rows of the model YAML, instead of by insertion')
    parser.add_argument('--data', help='a data YAML; default: drawn squares')
    parser.add_argument('--imgsz', type=int, default=64)
    parser.add_argument('--epochs', type=int, default=2)
    parser.add_argument('--out', type=Path, help='default: a temporary folder')
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        out = args.out or Path(temporary)
        out.mkdir(parents=True, exist_ok=True)
        data = args.data or str(draw_squares(out))

        if args.rows:
            model = YOLO(add_rows(args.model, args.block, out))
        else:
            model = YOLO(args.model)
            print(sase_blocks.insert(model.model, args.block, input_size=args.imgsz))
        # nbs is the batch size that Ultralytics accumulates gradients to.
        options = {'batch': 4, 'nbs': 4, 'optimizer': 'SGD', 'warmup_epochs': 0, 'plots': False, 'workers': 0}
        model.train(
            trainer=keep_attention(model), data=data, imgsz=args.imgsz, epochs=args.epochs, project=str(out), **options
        )

        trained = YOLO(model.trainer.best)
        if args.rows:
            print(f'{sum(type(row).__name__ == "AttentionRow" for row in trained.model.model)} rows of attention')
        else:
            print(sase_blocks.check(trained.model, args.imgsz))
        onnx_file = YOLO(model.trainer.best).export(format='onnx', imgsz=args.imgsz, opset=18, simplify=False)
        print(f'ONNX differs from torch by at most {compare(trained, onnx_file, args.imgsz):.0e} of the largest output')


if __name__ == '__main__':
    main()
