"""Our models inside Hugging Face transformers, on random data: python examples/transformers_backbone.py

There are three ways, all through timm's registry, so `import sase_blocks` must come first:

1. ``TimmBackbone`` returns the stages' feature maps for transformers' detectors and segmenters.
2. A model on that backbone is UPerNet here. DETR, Mask2Former and others take the same ``backbone_config``.
3. ``AutoModelForImageClassification`` is saved and loaded with the genotype in its config.json.

A backbone's configuration cannot hold a genotype, so register a name for it. pip install "sase-blocks[ecosystem]"
"""

import tempfile

import torch
from transformers import (
    AutoModelForImageClassification,
    TimmBackbone,
    TimmBackboneConfig,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

from sase_blocks import register_resnet


def main() -> None:
    torch.manual_seed(0)
    images = torch.randn(2, 3, 64, 64)

    register_resnet('resnet50_mine', 'avg_std,conv5,affine,p_norm,avg_max,conv7x7', attn_stages=(3, 4))
    # Without use_pretrained_backbone=False, transformers 4 would ask timm for weights.
    config = TimmBackboneConfig(backbone='resnet50_mine', out_indices=[1, 2, 3, 4], use_pretrained_backbone=False)
    backbone = TimmBackbone(config).eval()
    with torch.no_grad():
        maps = backbone(images).feature_maps
    print(f'TimmBackbone, stages {backbone.out_features}: {[tuple(m.shape[1:]) for m in maps]}')

    model = UperNetForSemanticSegmentation(
        UperNetConfig(backbone_config=config, hidden_size=64, num_labels=4, use_auxiliary_head=False)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    labels = (images[:, 0] > 0).long() + 2 * (images[:, 1] > 0).long()
    losses = []
    for _ in range(4):
        loss = model(images, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f'UPerNet: loss {losses[0]:.3f} -> {losses[-1]:.3f}')
    same_after_saving('UPerNet', model, UperNetForSemanticSegmentation, images)

    arguments = {'genotype': 'avg,conv3,affine,avg,avg,conv7x7', 'attn_stages': [3, 4]}
    classifier = TimmWrapperForImageClassification(
        TimmWrapperConfig(architecture='resnet50_sase', model_args=arguments, num_labels=5)
    )
    same_after_saving('classifier', classifier, AutoModelForImageClassification, images)


def same_after_saving(name: str, model: torch.nn.Module, kind: type, images: torch.Tensor) -> None:
    """Save, load by the class ``kind``, and compare."""
    with tempfile.TemporaryDirectory() as folder:
        model.eval().save_pretrained(folder)
        loaded = kind.from_pretrained(folder).eval()
    with torch.no_grad():
        print(f'{name}, saved and loaded: equal {model(images).logits.equal(loaded(images).logits)}')


if __name__ == '__main__':
    main()
