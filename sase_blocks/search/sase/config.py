"""The settings of a SASE search. The defaults are from the paper (arXiv 2411.08333) and the authors' code."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from sase_blocks.settings import RunConfig, require, setting

from .bilevel import ORDERS
from .mixed import FORMS
from .space import SearchSpace


@dataclass(frozen=True)
class SearchConfig(RunConfig):
    """Settings of one search; each is also an option of ``sase-blocks search sase``, whose help describes it."""

    out: str = setting('runs/search', 'folder for checkpoints, metrics and the result', place=True)
    model: str = setting('resnet20_cifar', 'any timm model that insertion supports')
    model_args: dict[str, Any] = field(default_factory=dict, metadata={'help': 'model arguments'})
    img_size: int | None = setting(None, "image height and width in px (default: the model's)", expected='at least 1')
    space: str = setting('paper', "'paper', 'extended', 'EDGE=NAME,NAME; ...' or a JSON file of lists by edge")
    per_stage: bool = setting(False, 'search one block for each stage instead of one for all (not in the paper)')
    paper_mixing: bool = setting(
        False, "mix the operations as in the paper, where their scale decides (default: 'fair', our addition)"
    )
    order: str = setting('1', 'of the gradient; 2 is exact, 2-fd a finite difference to compare with', choices=ORDERS)

    fraction: float = setting(
        0.5, 'fraction of every class that trains the weights; the rest trains the logits', expected='between 0 and 1'
    )
    null: bool = setting(False, 'give every image the label of another one')

    epochs: int = setting(100, 'passes over the images that train the weights', expected='at least 1')
    batch_size: int = setting(128, 'images of each part per step, over all processes together', expected='at least 1')
    lr: float = setting(0.025, 'learning rate of the weights at the start', expected='above 0')
    min_lr: float = setting(1e-4, 'learning rate of the weights at the end of the cosine', expected='at least 0')
    weight_decay: float = setting(5e-4, 'weight decay of the weights', expected='at least 0')
    clip_grad: float | None = setting(5.0, "maximum norm of the weights' gradient", expected='above 0')
    arch_lr: float = setting(3e-4, 'learning rate of Adam for the logits', expected='above 0')
    arch_weight_decay: float = setting(1e-3, 'weight decay of the logits', expected='at least 0')
    arch_every: int = setting(1, 'steps of the weights for each step of the logits', expected='at least 1')

    compile: bool = setting(False, 'compile the mixed blocks; first order only')
    form: str = setting('shared', 'compute the operations of an edge together, or one by one', choices=FORMS)
    save_minutes: float = setting(10.0, 'minutes between checkpoints within an epoch', free=True, expected='above 0')
    hessian_every: int = setting(1, "measure the logits' Hessian every N epochs; 0: never", expected='at least 0')

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, self.min_lr <= self.lr, 'min_lr', f'at most lr ({self.lr})')
        require(self, 'num_classes' not in self.model_args, 'model_args', 'without num_classes, which the data says')
        require(self, not self.compile or self.order == '1', 'compile', 'off for order 2, which differentiates twice')
        SearchSpace.parse(self.space)
