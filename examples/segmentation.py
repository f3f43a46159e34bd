"""Semantic segmentation with segmentation_models_pytorch on a SASE backbone: python examples/segmentation.py

Every timm model is an encoder there under ``tu-NAME``, and so are ours after ``import sase_blocks``. The images are
drawn here: discs, squares and triangles on noise, one class each. pip install "sase-blocks[ecosystem]"
"""

import argparse

import segmentation_models_pytorch as smp
import torch
from torch import Tensor

import sase_blocks  # noqa: F401  registers the models with timm

CLASSES = ('background', 'disc', 'square', 'triangle')


def draw_images(count: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images (count, 3, size, size) and their classes (count, size, size), with one shape of each class per image."""
    images = 0.3 * torch.randn(count, 3, size, size, generator=generator)
    labels = torch.zeros(count, size, size, dtype=torch.long)
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing='ij')
    for image, label in zip(images, labels, strict=True):
        for shape in range(1, len(CLASSES)):
            radius = int(torch.randint(size // 8, size // 4, (), generator=generator))
            y, x = torch.randint(radius, size - radius, (2,), generator=generator).tolist()
            dy, dx = rows - y, columns - x
            inside = {
                1: dy**2 + dx**2 <= radius**2,
                2: torch.maximum(dy.abs(), dx.abs()) <= radius,
                3: (dy <= radius) & (2 * dx.abs() - dy <= radius),
            }[shape]
            label[inside] = shape
            # Bright, with a random tint independent of the shape.
            image[:, inside] += 1 + torch.rand(3, 1, generator=generator)
    return images, labels


def mean_iou(logits: Tensor, labels: Tensor) -> float:
    """Mean intersection over union over the classes: logits (B, K, H, W), labels (B, H, W)."""
    counts = smp.metrics.get_stats(logits.argmax(1), labels, mode='multiclass', num_classes=len(CLASSES))
    return float(smp.metrics.iou_score(*counts, reduction='macro'))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--arch', default='Unet', help='Unet, DeepLabV3Plus, FPN, ... (default: Unet)')
    parser.add_argument('--encoder', default='resnet50_sase', help='any timm model (default: resnet50_sase)')
    parser.add_argument('--steps', type=int, default=12, help='training steps (default: 12)')
    parser.add_argument('--batch-size', type=int, default=8, help='images per step (default: 8)')
    parser.add_argument('--size', type=int, default=64, help='height and width in px, a multiple of 32 (default: 64)')
    parser.add_argument('--seed', type=int, default=0, help='seed of weights and images (default: 0)')
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    # encoder_weights=None, because these models have no weights to download. Other arguments go to the encoder, such as
    # attn_stages=(3, 4) or genotype='se'.
    model = smp.create_model(args.arch, f'tu-{args.encoder}', encoder_weights=None, classes=len(CLASSES)).to(device)
    dice, cross_entropy = smp.losses.DiceLoss('multiclass'), torch.nn.CrossEntropyLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    losses = []
    for step in range(args.steps):
        images, labels = (t.to(device) for t in draw_images(args.batch_size, args.size, generator))
        logits = model(images)
        loss = cross_entropy(logits, labels) + dice(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        print(f'step {step + 1:3d}  loss {losses[-1]:.3f}', flush=True)

    model.eval()
    images, labels = (t.to(device) for t in draw_images(args.batch_size, args.size, generator))
    with torch.no_grad():
        iou = mean_iou(model(images), labels)
    print(f'{args.arch} on {args.encoder}: loss {losses[0]:.3f} -> {losses[-1]:.3f}, mean IoU {iou:.3f} on new images')


if __name__ == '__main__':
    main()
