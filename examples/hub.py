"""Save to the Hugging Face Hub and load back: python examples/hub.py [--push USER/NAME]

1. A whole model, as in timm: a folder with weights, a config.json with the genotype and the stages, and a model card.
   ``timm.create_model('local-dir:FOLDER', pretrained=True)`` reads it, or 'hf-hub:USER/NAME' once it is pushed.
2. A single block, through huggingface_hub's PyTorchModelHubMixin.

Nothing is uploaded without --push. pip install "sase-blocks[ecosystem]"
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from sase_blocks import create_block  # importing the package registers the models with timm

CARD = """---
library_name: timm
pipeline_tag: image-classification
license: mit
tags: [image-classification, timm, sase-blocks]
---
# {title}

`{name}` with `{args}`. `import sase_blocks` registers the models, without it timm does not know the name:

```python
# pip install sase-blocks
import timm
import sase_blocks

model = timm.create_model('hf-hub:{title}', pretrained=True)
```
"""

BLOCK_CARD = """---
{{ card_data }}
---
An attention block of sase-blocks. To load it, `pip install sase-blocks`, `import sase_blocks`, and use the class
`HubBlock` of its examples/hub.py: `HubBlock.from_pretrained(...)`.
"""


def save_model(model: nn.Module, name: str, args: dict[str, Any], folder: Path, title: str) -> None:
    """Write a timm model's weights, configuration and card to a folder.

    Args:
        model: a model from ``timm.create_model(name, **args)``, trained or not.
        args: plain strings and numbers, because they are saved as JSON. Pass a genotype as its text, ``str(genotype)``.
        title: USER/NAME on the Hub.
    """
    timm.models.save_for_hf(model, folder, model_args=args, safe_serialization=True)
    (folder / 'README.md').write_text(CARD.format(title=title, name=name, args=args))


class HubBlock(nn.Module, PyTorchModelHubMixin, library_name='sase-blocks', model_card_template=BLOCK_CARD):
    """One block with ``save_pretrained``, ``from_pretrained`` and ``push_to_hub``; its arguments are in config.json."""

    def __init__(self, block: str, channels: int) -> None:
        super().__init__()
        self.block = create_block(block, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--push', metavar='USER/NAME', help='also upload the model, after `hf auth login`')
    title = parser.parse_args().push or 'USER/NAME'
    torch.manual_seed(0)

    with tempfile.TemporaryDirectory() as folder:
        name = 'resnet50_sase'
        args = {'genotype': 'avg_std,conv5,affine,p_norm,avg_max,conv7x7', 'attn_stages': [3, 4], 'num_classes': 10}
        model = timm.create_model(name, **args).eval()
        save_model(model, name, args, Path(folder), title)
        loaded = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
        x = torch.randn(2, 3, 64, 64)
        with torch.no_grad():
            print(f'{name} from {sorted(p.name for p in Path(folder).iterdir())}: equal {model(x).equal(loaded(x))}')
        if title != 'USER/NAME':
            from huggingface_hub import HfApi

            HfApi().create_repo(title, exist_ok=True)
            HfApi().upload_folder(repo_id=title, folder_path=folder)

    with tempfile.TemporaryDirectory() as folder:
        block = HubBlock('sase', 64).eval()
        block.save_pretrained(folder)
        again = HubBlock.from_pretrained(folder).eval()
        x = torch.randn(2, 64, 14, 14)
        with torch.no_grad():
            print(f'SASE block from {sorted(p.name for p in Path(folder).iterdir())}: equal {block(x).equal(again(x))}')


if __name__ == '__main__':
    main()
