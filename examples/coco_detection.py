"""Faster R-CNN and Mask R-CNN (torchvision) on an FPN over any of our ResNets, trained on a COCO-format folder.

    python examples/coco_detection.py --data coco/train2017 --annotations coco/annotations/instances_train2017.json \\
        --val-data coco/val2017 --val-annotations coco/annotations/instances_val2017.json \\
        --checkpoint pnorm_imgnet_r50.pth --mask --epochs 12 --batch-size 16 --out runs/mask_sase

The schedule is detection's usual one of 12 epochs, as in the SASE paper's COCO runs: SGD at 0.02 for 16 images per step
(scaled with --batch-size), a linear warm-up, a tenth after 2/3 and 11/12 of the steps, shorter side 800 px.

With --checkpoint (a file of the SASE authors, of `sase-blocks train`, or a plain ResNet's), the stem and the first
stage are frozen. So is every batch norm in the file, because two images per GPU are too few to update its statistics.
Without it everything is trained. Runs in one process, on a GPU if there is one. pip install "sase-blocks[ecosystem]"
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from timm.layers import freeze_batch_norm_2d
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.transforms.functional import to_tensor

from sase_blocks import load_checkpoint
from sase_blocks.checkpoint import read_checkpoint, save_checkpoint
from sase_blocks.networks import build_model

Target = dict[str, Tensor]


class CocoFolder(Dataset[tuple[Tensor, Target]]):
    """Images of a folder with their objects from a COCO annotation file: (3, H, W) in 0..1, and torchvision's target.

    Training skips crowds and boxes below one pixel. Labels number the file's categories from 1.

    Raises:
        FileNotFoundError, ValueError: no such file, no COCO annotations in it, or a missing image.
    """

    def __init__(self, folder: str, annotations: str, *, masks: bool, only_with_objects: bool) -> None:
        self.folder, self.masks = Path(folder), masks
        self.coco = open_coco(annotations)
        self.category_ids = sorted(self.coco.getCatIds())
        self.objects = {i: self._objects(i) for i in sorted(self.coco.imgs)}
        self.image_ids = [i for i, objects in self.objects.items() if objects or not only_with_objects]
        if not self.image_ids:
            raise ValueError(f'{annotations} has no image{" with an object" if only_with_objects else ""}')
        if masks and not all(o.get('segmentation') for objects in self.objects.values() for o in objects):
            raise ValueError(f'{annotations} has objects without a segmentation, which Mask R-CNN (--mask) needs')
        for i in self.image_ids:
            if not (self.folder / self.coco.imgs[i]['file_name']).is_file():
                raise FileNotFoundError(f'{annotations} names {self.coco.imgs[i]["file_name"]}, not in {self.folder}')

    def _objects(self, image_id: int) -> list[dict[str, Any]]:
        found = []
        width, height = self.coco.imgs[image_id]['width'], self.coco.imgs[image_id]['height']
        for annotation in self.coco.imgToAnns[image_id]:
            x, y, w, h = annotation['bbox']
            box = [max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)]
            if not annotation.get('iscrowd') and box[2] - box[0] >= 1 and box[3] - box[1] >= 1:
                found.append({**annotation, 'box': box})
        return found

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        image_id = self.image_ids[index]
        with Image.open(self.folder / self.coco.imgs[image_id]['file_name']) as file:
            image = to_tensor(file.convert('RGB'))
        objects = self.objects[image_id]
        target = {
            'image_id': torch.tensor(image_id),
            'boxes': torch.tensor([o['box'] for o in objects], dtype=torch.float32).reshape(-1, 4),
            'labels': torch.tensor([1 + self.category_ids.index(o['category_id']) for o in objects], dtype=torch.int64),
        }
        if self.masks:
            masks = [torch.from_numpy(self.coco.annToMask(o)) for o in objects]
            target['masks'] = torch.stack(masks) if masks else torch.zeros((0, *image.shape[1:]), dtype=torch.uint8)
        return image, target


def open_coco(path: str) -> COCO:
    """pycocotools' index of an annotation file, without its prints. Fills in fields that many tools leave out."""
    try:
        content = json.loads(Path(path).read_text())
    except ValueError as error:
        raise ValueError(f'{path} is no JSON file: {error}') from error
    missing = [k for k in ('images', 'annotations', 'categories') if not isinstance(content, dict) or k not in content]
    if missing:
        raise ValueError(f'{path} is no COCO annotation file: it has no {", ".join(missing)}')
    known = {category['id'] for category in content['categories']}
    for annotation in content['annotations']:
        if len(annotation.get('bbox', ())) != 4 or annotation.get('category_id') not in known:
            raise ValueError(f'{path}: object {annotation.get("id")} has no bbox of four numbers or no known category')
        annotation.setdefault('iscrowd', 0)
        annotation.setdefault('area', annotation['bbox'][2] * annotation['bbox'][3])
    coco = COCO()
    coco.dataset = {'info': {}, **content}
    with contextlib.redirect_stdout(None):
        coco.createIndex()
    return coco


def create_detector(
    name: str,
    num_classes: int,
    *,
    mask: bool = False,
    checkpoint: str | None = None,
    model_args: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> FasterRCNN:
    """A detector for ``num_classes`` (including the background) on all stages of a timm ResNet.

    Args:
        name: a model with stages layer1, layer2, ...: resnet50_sase, resnet101_se, resnet20_cifar, resnet50, ...
        checkpoint: backbone weights; freezes the stem, the first stage and the batch norms in the file.
        model_args: the model's arguments, such as ``{'attn_stages': [3, 4]}``.
        **kwargs: arguments of torchvision's detector, such as ``min_size``.
    """
    body = build_model(name, num_classes=0, **(model_args or {}))
    stages = [entry for entry in body.feature_info if entry['module'].startswith('layer')]
    if not stages:
        raise ValueError(f'{name} has no stages layer1, layer2, ...: take a ResNet')
    if checkpoint is not None:
        report = load_checkpoint(body, checkpoint, keep_head=True)
        print(report)
        for path, module in list(body.named_modules()):
            if isinstance(module, nn.BatchNorm2d) and f'{path}.running_mean' in report.loaded:
                body.set_submodule(path, freeze_batch_norm_2d(module))
        for path in ('conv1', 'layer1'):
            body.get_submodule(path).requires_grad_(False)
    backbone = BackboneWithFPN(
        body,
        {entry['module']: str(i) for i, entry in enumerate(stages)},
        [entry['num_chs'] for entry in stages],
        out_channels=256,
    )
    # One anchor size per level, 8 times its stride, as in the FPN paper: 32, 64, ... for a ResNet-50.
    strides = [entry['reduction'] for entry in stages]
    sizes = tuple((8 * stride,) for stride in [*strides, 2 * strides[-1]])
    anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))
    mean, std = body.pretrained_cfg['mean'], body.pretrained_cfg['std']
    kind = MaskRCNN if mask else FasterRCNN
    return kind(backbone, num_classes, rpn_anchor_generator=anchors, image_mean=mean, image_std=std, **kwargs)


def flipped(image: Tensor, target: Target) -> tuple[Tensor, Target]:
    """Mirror image and objects left to right."""
    width = image.shape[-1]
    target = {**target, 'boxes': target['boxes'] * torch.tensor([-1, 1, -1, 1]) + torch.tensor([width, 0, width, 0])}
    target['boxes'] = target['boxes'][:, [2, 1, 0, 3]]
    if 'masks' in target:
        target['masks'] = target['masks'].flip(-1)
    return image.flip(-1), target


def learning_rate(step: int, steps: int, warmup: int) -> float:
    """The learning rate's factor: a linear warm-up, a tenth after 2/3, a hundredth after 11/12 of the steps."""
    return min(1.0, (step + 1) / warmup) * 0.1 ** ((step >= steps * 2 / 3) + (step >= steps * 11 / 12))


def train(model: FasterRCNN, data: CocoFolder, args: argparse.Namespace, device: torch.device) -> None:
    """Train all epochs, from the checkpoint on with --resume. Random draws depend only on the seed and the epoch."""
    last = Path(args.out) / 'last.pt'
    free = {'resume', 'workers', 'data', 'annotations', 'val_data', 'val_annotations', 'out'}
    settings = {k: v for k, v in vars(args).items() if k not in free}
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], lr=args.lr, momentum=0.9, weight_decay=1e-4
    )
    start = 0
    if last.is_file():
        if not args.resume:
            raise ValueError(f'{args.out} holds a run already: --resume continues it, or choose another --out')
        saved = read_checkpoint(last, device)
        other = [f'{k} was {saved["settings"].get(k)!r}' for k, v in settings.items() if saved['settings'].get(k) != v]
        if other:
            raise ValueError(f'{last} is from a run with other settings: {", ".join(other)}')
        model.load_state_dict(saved['model'])
        optimizer.load_state_dict(saved['optimizer'])
        start = saved['epoch']
        print(f'{last}: continuing after epoch {start}')

    Path(args.out).mkdir(parents=True, exist_ok=True)
    order = torch.Generator()
    loader = DataLoader(
        data, args.batch_size, shuffle=True, generator=order, num_workers=args.workers, collate_fn=tuple_of_lists
    )
    steps, step = args.epochs * len(loader), start * len(loader)
    for epoch in range(start, args.epochs):
        order.manual_seed(args.seed + epoch)
        torch.manual_seed(args.seed + epoch)
        model.train()
        total = 0.0
        for i, (images, targets) in enumerate(loader):
            pairs = [flipped(*pair) if torch.rand(()) < 0.5 else pair for pair in zip(images, targets, strict=True)]
            for group in optimizer.param_groups:
                group['lr'] = args.lr * learning_rate(step, steps, args.warmup)
            with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
                losses = model(
                    [image.to(device) for image, _ in pairs],
                    [{k: v.to(device) for k, v in target.items()} for _, target in pairs],
                )
            loss = torch.stack(list(losses.values())).sum()
            if not math.isfinite(loss.item()):
                raise ValueError(
                    f'the loss is {loss.item()} in epoch {epoch + 1}, step {i + 1}: a lower --lr, a longer --warmup '
                    'or --clip-grad helps, and a pretrained backbone (--checkpoint) most'
                )
            optimizer.zero_grad()
            loss.backward()
            if args.clip_grad:
                nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
            optimizer.step()
            total, step = total + loss.item(), step + 1
            if i % 50 == 49:
                print(f'epoch {epoch + 1}, step {i + 1} of {len(loader)}: loss {loss.item():.3f}', flush=True)
        print(f'epoch {epoch + 1} of {args.epochs}: loss {total / len(loader):.3f}', flush=True)
        state = {'model': model.state_dict(), 'optimizer': optimizer.state_dict()}
        save_checkpoint({**state, 'epoch': epoch + 1, 'settings': settings}, last)


def tuple_of_lists(samples: list[tuple[Tensor, Target]]) -> tuple[list[Tensor], list[Target]]:
    """A batch, not stacked, because images differ in size."""
    images, targets = zip(*samples, strict=True)
    return list(images), list(targets)


@torch.no_grad()
def evaluate(model: FasterRCNN, data: CocoFolder, args: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """COCO's mean average precision: {'bbox': ...}, and 'segm' for Mask R-CNN, each from 0 to 1."""
    model.eval()
    results = []
    for images, targets in DataLoader(data, args.batch_size, num_workers=args.workers, collate_fn=tuple_of_lists):
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            outputs = model([image.to(device) for image in images])
        for output, target in zip(outputs, targets, strict=True):
            output = {k: v.float().cpu() for k, v in output.items()}
            for i, (x1, y1, x2, y2) in enumerate(output['boxes'].tolist()):
                result = {
                    'image_id': int(target['image_id']),
                    'category_id': data.category_ids[int(output['labels'][i]) - 1],
                    'score': float(output['scores'][i]),
                    'bbox': [x1, y1, x2 - x1, y2 - y1],
                }
                if 'masks' in output:
                    mask = (output['masks'][i, 0] >= 0.5).numpy().astype(np.uint8)
                    result['segmentation'] = rle.encode(np.asfortranarray(mask))
                results.append(result)
    kinds = ['bbox', 'segm'] if isinstance(model, MaskRCNN) else ['bbox']
    if not results:  # pycocotools cannot read an empty list
        return dict.fromkeys(kinds, 0.0)
    precision = {}
    for kind in kinds:
        print(f'\n{kind}')
        with contextlib.redirect_stdout(None):
            evaluation = COCOeval(data.coco, data.coco.loadRes(results), kind)
            evaluation.params.imgIds = data.image_ids
            evaluation.evaluate()
            evaluation.accumulate()
        evaluation.summarize()
        precision[kind] = float(evaluation.stats[0])
    return precision


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option('--data', required=True, metavar='DIR', help='folder with the images')
    option('--annotations', required=True, metavar='FILE', help='their objects in COCO format')
    option('--val-data', metavar='DIR', help='images to evaluate on (default: the training images)')
    option('--val-annotations', metavar='FILE', help='their objects')
    option('--mask', action='store_true', help='Mask R-CNN; the annotations need segmentations')
    option('--model', default='resnet50_sase', help='a timm ResNet (default: resnet50_sase)')
    option('--model-args', type=json.loads, default={}, metavar='JSON', help='e.g. \'{"attn_stages": [3, 4]}\'')
    option(
        '--detector-args', type=json.loads, default={}, metavar='JSON', help="further arguments of torchvision's R-CNN"
    )
    option('--checkpoint', metavar='FILE', help='weights of the backbone')
    option('--out', default='runs/coco', metavar='DIR', help='folder of last.pt (default: runs/coco)')
    option('--resume', action='store_true', help='continue the run in --out')
    option('--epochs', type=int, default=12, help='(default: 12)')
    option('--batch-size', type=int, default=2, help='images per step (default: 2)')
    option('--lr', type=float, help='learning rate (default: 0.02 for 16 images per step, scaled with --batch-size)')
    option('--warmup', type=int, default=500, help='warm-up steps of the learning rate (default: 500)')
    option('--clip-grad', type=float, default=0.0, help='maximum gradient norm (default: 0, no limit)')
    option('--min-size', type=int, default=800, help='shorter side of an image in px (default: 800)')
    option('--max-size', type=int, default=1333, help='maximum longer side in px (default: 1333)')
    option('--bf16', action='store_true', help='mixed precision')
    option('--workers', type=int, default=4, help='processes that load images (default: 4)')
    option('--seed', type=int, default=0, help='(default: 0)')
    args = parser.parse_args(argv)
    for name in ('epochs', 'batch_size', 'warmup', 'min_size', 'max_size'):
        if getattr(args, name) < 1:
            parser.error(f'--{name.replace("_", "-")} must be at least 1, got {getattr(args, name)}')
    if bool(args.val_data) != bool(args.val_annotations):
        parser.error('--val-data and --val-annotations go together')
    if args.lr is None:
        args.lr = 0.02 * args.batch_size / 16
    return args


def run(args: argparse.Namespace) -> dict[str, float]:
    """Train and evaluate; returns COCO's mean average precision."""
    torch.manual_seed(args.seed)
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    data = CocoFolder(args.data, args.annotations, masks=args.mask, only_with_objects=True)
    val = CocoFolder(
        args.val_data or args.data, args.val_annotations or args.annotations, masks=False, only_with_objects=False
    )
    if val.category_ids != data.category_ids:
        raise ValueError(f'{args.val_annotations} has other categories than {args.annotations}')
    model = create_detector(
        args.model,
        1 + len(data.category_ids),
        mask=args.mask,
        checkpoint=args.checkpoint,
        model_args=args.model_args,
        min_size=args.min_size,
        max_size=args.max_size,
        **args.detector_args,
    ).to(device)
    kind = 'Mask' if args.mask else 'Faster'
    print(
        f'{kind} R-CNN on {args.model}: {len(data)} images, {len(data.category_ids)} categories, {device}', flush=True
    )
    train(model, data, args, device)
    precision = evaluate(model, val, args, device)
    where = 'the validation images' if args.val_data else 'the training images'
    print(f'mAP on {where}: ' + ', '.join(f'{k} {100 * v:.1f} %' for k, v in precision.items()))
    return precision


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        run(args)
    except (ValueError, OSError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main())
