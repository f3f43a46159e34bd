"""The settings of a SASE search; defaults are the paper's (arXiv 2411.08333, and the authors' code)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from sase_blocks.runs import require, require_choices, require_seed, require_used, setting

from .bilevel import ORDERS
from .mixed import FORMS
from .space import SearchSpace

__all__ = ['SearchConfig']


@dataclass(frozen=True)
class SearchConfig:
    """Settings of one search; each is also an option of ``sase-blocks search sase``, where its help text shows."""

    data: str = field(metadata={'help': 'folder with train/CLASS/* in it, or the root of --dataset', 'place': True})
    out: str = setting('runs/search', 'folder for checkpoints, metrics and the result', place=True)
    resume: bool = setting(
        False, 'continue what is in --out, after a run that still writes there; or start it', free=True
    )

    model: str = setting('resnet20_cifar', 'any timm model that insertion knows')
    model_args: dict[str, Any] = field(default_factory=dict, metadata={'help': 'arguments of the model'})
    img_size: int | None = setting(None, "image height and width in px (default: the model's)")
    space: str = setting('paper', "'paper', 'extended', 'EDGE=NAME,NAME; ...' or a JSON file of lists by edge")
    per_stage: bool = setting(False, 'search one block for each stage instead of one for all (not in the paper)')
    paper_mixing: bool = setting(
        False, "mix the operations as the paper does, where their scale decides (ours: 'fair')"
    )
    order: str = setting('1', 'of the gradient; 2 is exact, 2-fd a finite difference to compare with', choices=ORDERS)

    dataset: str = setting('', "a data set by timm's name for it, such as torch/cifar10; --data is then its root")
    train_split: str = setting('train', 'training split of a --dataset')
    num_classes: int | None = setting(None, 'number of classes, where a --dataset does not tell')
    download: bool = setting(False, 'let a --dataset download itself', free=True)
    skip_broken: bool = setting(False, 'leave broken images out, with a warning')
    hflip: float = setting(0.5, 'probability of a horizontal flip; 0 for text and digits')
    fraction: float = setting(0.5, 'part of every class that trains the weights; the rest is held out for the logits')
    null: bool = setting(False, 'give every image the label of another one')

    epochs: int = setting(100, 'passes over the half that trains the weights')
    batch_size: int = setting(128, 'images of each half a step, over all processes together')
    lr: float = setting(0.025, 'learning rate of the weights at the start')
    min_lr: float = setting(1e-4, 'learning rate of the weights at the end of the cosine')
    momentum: float = setting(0.9, 'momentum of SGD')
    weight_decay: float = setting(5e-4, 'weight decay of the weights')
    clip_grad: float | None = setting(5.0, "largest norm of the weights' gradient")
    arch_lr: float = setting(3e-4, 'learning rate of Adam for the logits')
    arch_weight_decay: float = setting(1e-3, 'weight decay of the logits')
    arch_every: int = setting(1, 'steps of the weights for each step of the logits')

    seed: int = setting(0, 'seed of everything random')
    mixed_precision: str = setting('no', 'arithmetic below fp32', choices=('no', 'bf16'))
    channels_last: bool = setting(False, 'channels_last memory format')
    compile: bool = setting(False, 'compile the mixed blocks; first order only')
    form: str = setting('shared', 'how an edge is computed: in one pass, or each operation alone', choices=FORMS)
    deterministic: bool = setting(False, 'only algorithms that give the same result every time; slower on GPUs')
    cpu: bool = setting(False, 'search on the CPU though there is a GPU', free=True)
    workers: int = setting(4, 'processes that load images above 64 px, for each process', free=True)
    save_minutes: float = setting(10.0, 'minutes between checkpoints within an epoch', free=True)
    hessian_every: int = setting(1, "epochs between looks at the logits' Hessian; 0 for none")
    tensorboard: bool = setting(True, 'write a TensorBoard log', free=True)

    def __post_init__(self) -> None:
        for name in ('epochs', 'batch_size', 'arch_every'):
            require(self, getattr(self, name) >= 1, name, 'at least 1')
        for name in ('workers', 'weight_decay', 'arch_weight_decay', 'min_lr', 'hessian_every'):
            require(self, getattr(self, name) >= 0, name, 'at least 0')
        for name in ('lr', 'arch_lr', 'save_minutes'):
            require(self, getattr(self, name) > 0, name, 'above 0')
        require(self, self.min_lr <= self.lr, 'min_lr', f'at most lr ({self.lr})')
        require(self, 0 <= self.momentum < 1, 'momentum', 'at least 0 and below 1')
        require(self, 0 < self.fraction < 1, 'fraction', 'between 0 and 1')
        require(self, 0 <= self.hflip <= 1, 'hflip', 'a probability')
        require(self, self.clip_grad is None or self.clip_grad > 0, 'clip_grad', 'above 0')
        require(self, self.img_size is None or self.img_size >= 1, 'img_size', 'at least 1')
        for name in ('train_split', 'download'):
            require_used(self, bool(self.dataset), name, 'without a dataset')
        require(self, 'num_classes' not in self.model_args, 'model_args', 'without num_classes, which the data says')
        require_seed(self)
        require_choices(self)
        require(self, not self.compile or self.order == '1', 'compile', 'off for order 2, which differentiates twice')
        SearchSpace.parse(self.space)
