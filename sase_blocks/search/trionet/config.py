"""Settings of a TrioNet search. The paper's (arXiv 2111.07547) are not public. These follow common practice."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from sase_blocks.search.evolution import ALGORITHMS
from sase_blocks.settings import RunConfig, require, require_used, setting

from .cost import SETTINGS, count_number
from .slicing import SHARINGS
from .space import LAWS, Law, TrioSpace, hierarchical


@dataclass(frozen=True)
class TrioConfig(RunConfig):
    """Settings of a search; each is also an option of ``sase-blocks search trionet``, whose help describes it."""

    out: str = setting('runs/trionet', 'folder for checkpoints, metrics, candidates and the result', place=True)
    space: str = setting('imagenet', "'imagenet', 'cifar' or a JSON file of a space")
    max_macs: str | None = setting(None, 'maximum multiply-accumulates per image, such as 300M', free=True)
    max_params: str | None = setting(None, 'maximum number of parameters, such as 5M', free=True)
    max_ms: float | None = setting(
        None,
        'maximum milliseconds per image on this device, as a sum of measured parts',
        free=True,
        expected='above 0',
    )

    val_split: str = setting('validation', 'test split of a --dataset, used once, at the end', free=True)
    in_chans: int = setting(3, 'channels of the loaded images: 1 for grey, 3 for colour', choices=(1, 3))
    fraction: float = setting(
        0.9, 'fraction of every class that trains the supernet; the rest scores networks', expected='between 0 and 1'
    )

    epochs: int = setting(100, 'passes of the supernet over its fraction of the training images', expected='at least 1')
    opt: str = setting('sgd', 'optimizer', choices=('sgd', 'adamw'))
    warmup: float = setting(
        0.05, 'fraction of all steps for warm-up; then cosine decay to 0', expected='at least 0 and below 1'
    )
    label_smoothing: float = setting(0.1, 'label smoothing, for the largest network', expected='at least 0 and below 1')
    drop_rate: float = setting(
        0.1, 'dropout before the classifier of the largest network', expected='at least 0 and below 1'
    )
    clip_grad: float | None = setting(5.0, 'maximum gradient norm', expected='above 0')
    ema_decay: float | None = setting(
        0.999, 'search on an average of the weights with this decay', expected='between 0 and 1'
    )
    networks: int = setting(2, 'random networks per step, besides the largest and the smallest', expected='at least 0')
    sampling: str = setting('hierarchical', 'how the operators of a network are drawn', choices=tuple(LAWS))
    concentration: float = setting(
        1.0, 'concentration of hierarchical sampling; lower values draw purer networks', expected='above 0'
    )
    sharing: str = setting('heads', 'which rows narrower attentions share', choices=SHARINGS)

    algorithm: str = setting('nsga2', 'search algorithm', choices=ALGORITHMS, free=True)
    evaluations: int = setting(500, 'networks that the search scores', free=True, expected='at least 1')
    population: int = setting(50, 'networks per generation', free=True, expected='at least 2')
    calibration: int = setting(
        2048,
        "training images for a network's batch-norm statistics before it is scored",
        free=True,
        expected='at least 1',
    )
    finetune: int = setting(0, 'epochs of further training of the found network', free=True, expected='at least 0')
    finetune_lr: float = setting(0.01, 'highest learning rate of that training', free=True, expected='above 0')
    save_minutes: float = setting(10.0, 'minutes between checkpoints within an epoch', free=True, expected='above 0')

    def __post_init__(self) -> None:
        super().__post_init__()
        require_used(self, self.opt == 'sgd', 'momentum', 'for adamw')
        require_used(self, self.sampling == 'hierarchical', 'concentration', 'without hierarchical sampling')
        require_used(self, self.finetune > 0, 'finetune_lr', 'without finetune')
        small = self.algorithm != 'nsga2' or self.population < self.evaluations
        require(self, small, 'population', f'below evaluations ({self.evaluations})')
        for name in ('max_macs', 'max_params'):
            try:
                count_number(getattr(self, name))
            except ValueError as error:
                raise ValueError(f'{name}: {error}') from None
        TrioSpace.parse(self.space)

    @property
    def limits(self) -> dict[str, float | None]:
        """The limits of ``Costs`` as numbers."""
        counts = {name: count_number(getattr(self, SETTINGS[name])) for name in ('macs', 'parameters')}
        return {**counts, 'milliseconds': self.max_ms}

    @property
    def law(self) -> Law:
        """The sampling law for a network's operators."""
        if self.sampling == 'hierarchical':
            return partial(hierarchical, concentration=self.concentration)
        return LAWS[self.sampling]
