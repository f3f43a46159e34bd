"""The SASE search from Python, and its block in other networks: python examples/search_block.py

This searches on scikit-learn's handwritten digits, two minutes on two cores (extras "search" and "demo"), or with
`--data DIR` on your images in train/CLASS/*. The found block goes into our ResNets by `genotype=FILE`, and into plain
timm networks by `insert`. `--tiny` is only a trial.

A short search on 1,797 images finds a block, not the best one. To separate findings from noise (several seeds, random
labels, training from scratch), use `sase-blocks search sase --seeds 0,1,2,3 --null --evaluate 5`.
"""

import argparse

import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from sase_blocks import insert
from sase_blocks.search.sase import SearchConfig, search

BACKBONES = ('mobilenetv3_small_050', 'convnext_atto', 'regnety_002')  # with pretrained=True, timm's ImageNet weights


def digits(limit: int | None) -> tuple[Tensor, Tensor, list[str]]:
    """Input for ``search`` instead of a folder: images (N, 1, 16, 16) in uint8, labels (N,), class names."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    # 12 x 12 and a margin, so that random crops keep most of a digit.
    images = F.interpolate(torch.from_numpy(bunch.images).float()[:, None], size=12, mode='bilinear')
    images = F.pad(images * (255 / 16), (2, 2, 2, 2)).round().to(torch.uint8)
    return images[:limit], torch.from_numpy(bunch.target)[:limit], [str(name) for name in bunch.target_names]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', help='folder with train/CLASS/* in it (default: the digits)')
    parser.add_argument('--img-size', type=int, default=16, help='px; for photographs 32 or more')
    parser.add_argument('--epochs', type=int, default=10)
    parser.add_argument('--out', default='runs/search_block', help='folder; an interrupted search in it continues')
    parser.add_argument('--tiny', action='store_true', help='200 images, one epoch, a small space')
    args = parser.parse_args()

    # 1. The settings are the paper's, except for those that a short search on small images needs.
    images = None if args.data else digits(200 if args.tiny else None)
    config = SearchConfig(
        data=args.data or 'digits',
        out=args.out,
        resume=True,
        # A subset of the 7 operations on each of six edges.
        space='channel_squeeze=avg,avg_std; channel_excite=conv3,affine; gate_excite=affine; '
        'gated_squeeze=avg,p_norm; spatial_squeeze=avg_std; spatial_excite=conv3x3,affine'
        if args.tiny
        else 'paper',
        model='resnet20_cifar',  # the search network: any timm model that insertion knows
        model_args={'layers': [1, 1, 1], **({} if args.data else {'in_chans': 1})},
        img_size=args.img_size,
        hflip=0.5 if args.data else 0.0,  # a mirrored digit is no digit
        epochs=1 if args.tiny else args.epochs,
        batch_size=32 if args.tiny else 64,
        lr=0.05,
        arch_lr=0.01,  # the paper's 3e-4 is for its 100 epochs
        hessian_every=0,
        tensorboard=False,
    )

    # 2. The search prints a line per epoch and writes genotype.json and pictures of the block to args.out.
    result = search(config, images)
    print(f'\nfound on {len(result["data"]["classes"])} classes: {result["genotype"]}')
    print('edge              operation    probability  margin to the next')
    for edge, state in result['edges'][0].items():  # the only block; with per_stage=True one entry per stage
        print(f'{edge:18}{state["leader"]:13}{state["probability"]:11.2f}{state["margin"]:20.2f}')
    print(result['verdict'])
    for warning in result['warnings']:
        print('warning:', warning)

    # 3. In our networks: any model takes the file as genotype=... `sase-blocks train --genotype FILE` does the same.
    file = f'{args.out}/genotype.json'
    small = timm.create_model('resnet20_cifar', genotype=file, num_classes=len(result['data']['classes']))
    large = timm.create_model('resnet50_sase', genotype=file)
    for name, model, size in (('resnet20_cifar', small, 32), ('resnet50_sase', large, 64)):
        outputs = model.eval()(torch.randn(2, 3, size, size))
        count = sum(p.numel() for p in model.parameters())
        print(f'{name} with the found block: {tuple(outputs.shape)}, {count:,} parameters')

    # 4. In other networks, by the text. Their outputs are the same as before, and training continues from there.
    for name in BACKBONES:
        model = timm.create_model(name, num_classes=10).eval()
        x = torch.randn(2, 3, 64, 64)
        before = model(x)
        report = insert(model, result['genotype'], start='identity', input_size=64)
        same = torch.equal(model(x), before)
        print(f'{name}: {len(report.places)} blocks inserted, {report.added_parameters:,} parameters; equal: {same}')


if __name__ == '__main__':
    main()
