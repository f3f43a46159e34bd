"""SASE in your own network, two ways, on random data: python examples/own_backbone.py

1. Your own CNN calls the block where it needs attention.
2. For torchvision's ResNet, replace its block's class with one that calls the attention. State-dict keys keep their
   names, which wrapping the last batch norm in a Sequential would change.

Put it after the last normalisation of a residual branch, before the shortcut is added.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import ResNet, resnet18
from torchvision.models.resnet import BasicBlock

from sase_blocks import SASE, create_block


class SmallCNN(nn.Module):
    """Three convolutions, each followed by attention: (B, 3, H, W) -> (B, num_classes)."""

    def __init__(self, num_classes: int = 10, block: str = 'sase') -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, channels in ((3, 16), (16, 32), (32, 64)):
            layers += [
                nn.Conv2d(before, channels, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(channels),
                create_block(block, channels),  # any name of list_blocks(), or a genotype
                nn.ReLU(),
            ]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


class AttentionBasicBlock(BasicBlock):
    """torchvision's BasicBlock with ``self.attention`` before the shortcut is added."""

    attention: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.attention(self.bn2(self.conv2(out)))
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


def add_attention(model: ResNet) -> ResNet:
    """Give every BasicBlock of a torchvision ResNet a SASE block, in place."""
    for block in model.modules():
        if isinstance(block, BasicBlock):
            block.__class__ = AttentionBasicBlock
            block.attention = SASE(block.bn2.num_features)
    return model


def train_a_little(name: str, model: nn.Module, steps: int = 5) -> None:
    """A few steps on one random batch, to show that gradients flow and the loss falls."""
    images, labels = torch.randn(16, 3, 32, 32), torch.randint(10, (16,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    losses = []
    for _ in range(steps):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    blocks = sum(isinstance(module, SASE) for module in model.modules())
    print(f'{name}: {blocks} SASE blocks, loss {losses[0]:.2f} -> {losses[-1]:.2f} in {steps} steps')


def main() -> None:
    torch.manual_seed(0)
    train_a_little('small CNN', SmallCNN())

    plain = resnet18(num_classes=10)  # weights=... would load pretrained ones here
    weights = plain.state_dict()
    model = add_attention(plain)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all('.attention.' in name for name in missing)
    train_a_little('torchvision resnet18', model)


if __name__ == '__main__':
    main()
