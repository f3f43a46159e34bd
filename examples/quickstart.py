"""The library in one minute, on random data: python examples/quickstart.py"""

import timm
import torch

import sase_blocks  # registers the models with timm
from sase_blocks import SASE, Genotype, compile_blocks, create_block, list_blocks, register_resnet


def main() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 64, 28, 28)

    # 1. A block takes features (B, C, H, W) and returns features of the same shape.
    block = SASE(channels=64)
    y = block(x)
    channel_gate, spatial_gate = block.gates(x)
    print(f'SASE(64): {tuple(x.shape)} -> {tuple(y.shape)}')
    print(f'  gates: channels {tuple(channel_gate.shape)}, positions {tuple(spatial_gate.shape)}')

    # 2. Other blocks by name, or any of the 117,649 combinations by its six operations.
    print('blocks by name:', ', '.join(list_blocks()))
    genotype = Genotype.parse('avg_std,conv5,affine,p_norm,avg_max,conv7x7')
    print(f'{genotype}: {tuple(create_block(genotype, 64)(x).shape)}')

    # 3. Whole networks are timm models, so everything in timm works with them.
    model = timm.create_model('resnet50_sase', num_classes=10)
    images = torch.randn(2, 3, 96, 96)
    print(f'resnet50_sase: {tuple(model(images).shape)}')
    backbone = timm.create_model('resnet50_sase', features_only=True, attn_stages=(3, 4))
    print('features, attention in stages 3 and 4:', [tuple(feature.shape[1:]) for feature in backbone(images)])

    # 4. A network with your own block under your own name.
    register_resnet('resnet50_mine', genotype)
    print(f'resnet50_mine: {sum(p.numel() for p in timm.create_model("resnet50_mine").parameters()):,} parameters')

    # 5. Training is as usual. On a GPU call compile_blocks(model) first, so that the blocks read x far less often.
    small = timm.create_model('resnet20_cifar', num_classes=10, genotype='sase')
    if torch.cuda.is_available():
        compile_blocks(small.cuda())
    device = next(small.parameters()).device
    loss = torch.nn.functional.cross_entropy(
        small(torch.randn(8, 3, 32, 32, device=device)), torch.randint(10, (8,), device=device)
    )
    loss.backward()
    print(f'sase-blocks {sase_blocks.__version__}: one step of training, loss {loss.item():.2f}')


if __name__ == '__main__':
    main()
