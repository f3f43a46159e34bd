"""Settings of a TrioNet search. The paper's (arXiv 2111.07547) are not public; these follow common practice."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property, partial

from sase_blocks.runs import require, require_choices, require_seed, require_used, setting

from .cost import Limits, count_number
from .sampling import LAWS, Law, hierarchical
from .slicing import SHARINGS
from .space import TrioSpace

__all__ = ['ALGORITHMS', 'TrioConfig']

ALGORITHMS = ('nsga2', 'random')


@dataclass(frozen=True)
class TrioConfig:
    """Settings of a search; each is also an option of ``sase-blocks search trionet``, whose help describes it."""

    data: str = field(metadata={'help': 'folder with train/CLASS/* in it, or the root of --dataset', 'place': True})
    out: str = setting('runs/trionet', 'folder for checkpoints, metrics, the study and the result', place=True)
    resume: bool = setting(
        False, 'resume the run in --out, waiting for a live one to finish; start a new run if there is none', free=True
    )

    space: str = setting('imagenet', "'imagenet', 'cifar' or a JSON file of a space")
    max_macs: str | None = setting(None, 'maximum multiply-accumulates per image, such as 300M', free=True)
    max_params: str | None = setting(None, 'maximum number of parameters, such as 5M', free=True)
    max_ms: float | None = setting(
        None, 'maximum milliseconds per image on this device, as a sum of measured parts', free=True
    )

    dataset: str = setting('', "timm's name of a data set, such as torch/cifar10; --data is then its root")
    train_split: str = setting('train', 'training split of a --dataset')
    val_split: str = setting('validation', 'test split of a --dataset, used once, at the end', free=True)
    num_classes: int | None = setting(None, 'number of classes, if the --dataset does not define it')
    download: bool = setting(False, 'let a --dataset download itself', free=True)
    skip_broken: bool = setting(False, 'leave broken images out, with a warning')
    in_chans: int = setting(3, 'channels of the loaded images: 1 for grey, 3 for colour', choices=(1, 3))
    hflip: float = setting(0.5, 'probability of a horizontal flip; 0 for text and digits')
    fraction: float = setting(0.9, 'fraction of every class that trains the supernet; the rest scores networks')

    epochs: int = setting(100, 'passes of the supernet over its fraction of the training images')
    batch_size: int = setting(128, 'images a step, over all processes together')
    opt: str = setting('sgd', 'optimizer', choices=('sgd', 'adamw'))
    lr: float = setting(0.1, 'highest learning rate')
    warmup: float = setting(0.05, 'fraction of all steps for warm-up; then cosine decay to 0')
    momentum: float = setting(0.9, 'momentum of SGD')
    weight_decay: float = setting(1e-4, 'weight decay of all parameters except one-dimensional ones')
    label_smoothing: float = setting(0.1, 'label smoothing, for the largest network')
    drop_rate: float = setting(0.1, 'dropout before the classifier of the largest network')
    clip_grad: float | None = setting(5.0, 'maximum gradient norm')
    ema_decay: float | None = setting(0.999, 'search on an average of the weights with this decay')
    networks: int = setting(2, 'random networks per step, besides the largest and the smallest')
    sampling: str = setting('hierarchical', 'how the operators of a network are drawn', choices=tuple(LAWS))
    concentration: float = setting(1.0, 'concentration of hierarchical sampling; lower values draw purer networks')
    sharing: str = setting('heads', 'which rows narrower attentions share', choices=SHARINGS)

    algorithm: str = setting('nsga2', 'search algorithm', choices=ALGORITHMS, free=True)
    evaluations: int = setting(500, 'networks that the search scores', free=True)
    population: int = setting(50, 'networks per generation', free=True)
    calibration: int = setting(
        2048, "training images for a network's batch-norm statistics before it is scored", free=True
    )
    finetune: int = setting(0, 'epochs of further training of the found network', free=True)
    finetune_lr: float = setting(0.01, 'highest learning rate of that training', free=True)

    seed: int = setting(0, 'random seed')
    mixed_precision: str = setting('no', 'arithmetic below fp32', choices=('no', 'bf16'))
    channels_last: bool = setting(False, 'channels_last memory format')
    deterministic: bool = setting(False, 'use only deterministic algorithms; slower on GPUs')
    cpu: bool = setting(False, 'search on the CPU even if there is a GPU', free=True)
    workers: int = setting(4, 'loader processes per training process, for images above 64 px', free=True)
    save_minutes: float = setting(10.0, 'minutes between checkpoints within an epoch', free=True)
    tensorboard: bool = setting(True, 'write a TensorBoard log', free=True)

    def __post_init__(self) -> None:
        for name in ('epochs', 'batch_size', 'evaluations', 'calibration'):
            require(self, getattr(self, name) >= 1, name, 'at least 1')
        require(self, self.population >= 2, 'population', 'at least 2')
        for name in ('workers', 'weight_decay', 'networks', 'finetune'):
            require(self, getattr(self, name) >= 0, name, 'at least 0')
        for name in ('lr', 'finetune_lr', 'save_minutes', 'concentration'):
            require(self, getattr(self, name) > 0, name, 'above 0')
        for name in ('warmup', 'label_smoothing', 'drop_rate', 'momentum'):
            require(self, 0 <= getattr(self, name) < 1, name, 'at least 0 and below 1')
        require(self, 0 < self.fraction < 1, 'fraction', 'between 0 and 1')
        require(self, 0 <= self.hflip <= 1, 'hflip', 'a probability')
        require(self, self.clip_grad is None or self.clip_grad > 0, 'clip_grad', 'above 0')
        require(self, self.ema_decay is None or 0 < self.ema_decay < 1, 'ema_decay', 'between 0 and 1')
        for name in ('train_split', 'val_split', 'download'):
            require_used(self, bool(self.dataset), name, 'without a dataset')
        require_used(self, self.opt == 'sgd', 'momentum', 'for adamw')
        require_used(self, self.sampling == 'hierarchical', 'concentration', 'without hierarchical sampling')
        require_used(self, self.finetune > 0, 'finetune_lr', 'without finetune')
        require(self, self.max_ms is None or self.max_ms > 0, 'max_ms', 'above 0')
        require_seed(self)
        require_choices(self)
        for name in ('max_macs', 'max_params'):
            try:
                count_number(getattr(self, name))
            except ValueError as error:
                raise ValueError(f'{name}: {error}') from None
        TrioSpace.parse(self.space)

    @cached_property
    def limits(self) -> Limits:
        """The cost limits as numbers."""
        return Limits(count_number(self.max_macs), count_number(self.max_params), self.max_ms)

    @property
    def law(self) -> Law:
        """The sampling law for a network's operators."""
        if self.sampling == 'hierarchical':
            return partial(hierarchical, concentration=self.concentration)
        return LAWS[self.sampling]
