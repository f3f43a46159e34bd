"""The TrioNet search from Python, and uses of the found network: python examples/search_network.py

This searches for a network of convolutions and attention under two limits on scikit-learn's handwritten digits, three
minutes on two cores (extras "search" and "demo"), or with `--data DIR` on your images in train/CLASS/* and val/CLASS/*.
One supernet serves both limits. The found network then serves as a classifier, as a feature backbone, and as a source
of blocks for a hand-written network. `--tiny` is only a trial.

1,797 images and a short search say nothing about which operator is better.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sase_blocks import TrioBlock
from sase_blocks.models import Architecture
from sase_blocks.search.trionet import TrioConfig, TrioSpace, search

TEST_IMAGES = 360


def digits(limit: int | None) -> tuple[Tensor, Tensor, list[str]]:
    """Input for ``search`` instead of a folder: images (N, 1, 16, 16) in uint8, labels (N,), class names."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    # 12 x 12 and a margin, so that random crops keep most of a digit.
    images = F.interpolate(torch.from_numpy(bunch.images).float()[:, None], size=12, mode='bilinear')
    images = F.pad(images * (255 / 16), (2, 2, 2, 2)).round().to(torch.uint8)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:limit]
    return images[order], torch.from_numpy(bunch.target)[order], [str(name) for name in bunch.target_names]


def write_space(out: Path, image_size: int) -> TrioSpace:
    """Write our own space to a file in ``out``: the choices of each stage. The first stage has only convolutions."""
    space = TrioSpace(
        image_sizes=(image_size,),
        stem=16,
        reduction=1,
        heads=2,
        depths=((1,), (1, 2), (1, 2)),
        widths=((32,), (48, 64), (96, 128)),
        expansions=(0.125, 0.25),
        kernels=(3, 5),
        windows=(3,),
        attention_stages=(2, 3),
    )
    out.mkdir(parents=True, exist_ok=True)
    (out / 'space.json').write_text(json.dumps(space.to_dict(), indent=2) + '\n')
    return space


class HandMade(nn.Module):
    """A hand-written network around the blocks of the found network's last stage."""

    def __init__(self, found: Architecture, num_classes: int) -> None:
        super().__init__()
        stage = found.stages[-1]
        self.patches = nn.Conv2d(3, stage.width, 4, stride=4)
        self.blocks = nn.Sequential(
            *(
                TrioBlock(
                    stage.width,
                    block.operator,  # 'conv', 'local' or 'axial'
                    width=block.width,
                    kernel_size=block.kernel_size,
                    heads=found.heads,
                    size=8,  # of the map; axial attention also accepts others
                )
                for block in stage.blocks
            )
        )
        self.head = nn.Linear(stage.width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.patches(x)).mean((2, 3)))


def use(architecture: Path, weights: Path, num_classes: int, in_chans: int) -> None:
    """The found network as a classifier, as a backbone, and its blocks elsewhere."""
    found = Architecture.read(architecture)
    shape = {'architecture': str(architecture), 'in_chans': in_chans}
    x = torch.randn(2, in_chans, found.image_size, found.image_size)

    model = timm.create_model('trionet', **shape, num_classes=num_classes, checkpoint_path=str(weights)).eval()
    print(f'classifier with its weights: {tuple(x.shape)} -> {tuple(model(x).shape)}')

    # features_only renames modules, which a pretrained file allows and checkpoint_path does not.
    overlay = {'file': str(weights), 'input_size': tuple(x.shape[1:])}
    backbone = timm.create_model(
        'trionet', **shape, features_only=True, pretrained=True, pretrained_cfg_overlay=overlay
    ).eval()
    features = backbone(x)
    print('features:', [tuple(feature.shape[1:]) for feature in features], 'strides', backbone.feature_info.reduction())
    same = torch.equal(features[-1], model.forward_features(x))
    print(f'the last of them and the features of the classifier: equal: {same}')

    mine = HandMade(found, num_classes)
    operators = ' + '.join(str(block) for block in found.stages[-1].blocks)
    print(f'a network by hand with {operators}: {tuple(mine(torch.randn(2, 3, 32, 32)).shape)}')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', help='folder with train/CLASS/* and val/CLASS/* in it (default: the digits)')
    parser.add_argument('--img-size', type=int, default=16, help='px; for photographs 32 or more, and larger limits')
    parser.add_argument('--max-macs', nargs='+', default=['1.5M', '0.8M'], help='the limits, with one search for each')
    parser.add_argument('--epochs', type=int, default=10, help='epochs of the supernet')
    parser.add_argument('--out', type=Path, default=Path('runs/search_network'), help='folder; a run in it continues')
    parser.add_argument('--tiny', action='store_true', help='260 images, one epoch, few networks')
    args = parser.parse_args()

    # 1. The space, and the data: images for the search, and others for one test of each found network.
    space = write_space(args.out, args.img_size)
    print(f'the space holds {space.size:,} networks')
    images = test = None
    if not args.data:
        x, y, classes = digits(260 if args.tiny else None)
        held = 60 if args.tiny else TEST_IMAGES
        images, test = (x[held:], y[held:], classes), (x[:held], y[:held])

    # 2. A search for each limit. The first trains the supernet. The others load it from args.out and only search.
    found: dict[str, dict[str, Any]] = {}
    for limit in args.max_macs:
        config = TrioConfig(
            data=args.data or 'digits',
            out=str(args.out),
            resume=True,
            space=str(args.out / 'space.json'),
            max_macs=limit,
            hflip=0.5 if args.data else 0.0,  # a mirrored digit is no digit
            fraction=0.8,  # of the images to train the supernet; the rest to score networks
            epochs=1 if args.tiny else args.epochs,
            batch_size=32 if args.tiny else 64,
            opt='adamw',  # better than SGD in few steps
            lr=0.006,
            weight_decay=0.05,
            networks=1,
            ema_decay=None,
            evaluations=4 if args.tiny else 24,
            population=2 if args.tiny else 8,
            calibration=64 if args.tiny else 256,
            workers=0,
            tensorboard=False,
        )
        found[limit] = search(config, images, test)
        # The next search writes files with the same names.
        for name in ('architecture.json', 'network.pt', 'front.png', 'architecture.png'):
            file = args.out / name
            if file.exists():
                file.replace(args.out / f'{file.stem}-{limit}{file.suffix}')

    # 3. The networks found under each limit, and those with one operator wherever the space allows it.
    print(f'\n{"limit":>6}  {"network":12}{"MACs":>8}{"parameters":>12}{"held-out %":>12}{"test %":>9}')
    for limit, result in found.items():
        rows = {'found': result, **{f'all {operator}': entry for operator, entry in result['pure'].items()}}
        for name, entry in rows.items():
            cost = entry['cost']
            tested = f'{entry["test_accuracy"]:9.2f}' if 'test_accuracy' in entry else ''
            macs = f'{cost["macs"] / 1e6:.2f}M'
            print(f'{limit:>6}  {name:12}{macs:>8}{cost["parameters"]:12,}{entry["score"]:12.2f}{tested}')

    # 4. Use the network found under the first limit.
    limit = args.max_macs[0]
    print(f'\nthe network under {limit}: {found[limit]["architecture"]}')
    use(
        args.out / f'architecture-{limit}.json',
        args.out / f'network-{limit}.pt',
        num_classes=len(found[limit]['data']['classes']),
        in_chans=3 if args.data else 1,
    )


if __name__ == '__main__':
    main()
