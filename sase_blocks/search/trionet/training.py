"""Training of a supernet (arXiv 2111.07547) on accelerate: the step, its log, and its checkpoint.

A step follows the sandwich rule with in-place distillation (as in BigNAS, arXiv 2003.11142): the largest network learns
from the labels, and its outputs teach the smallest one and some random ones. Not in the paper: the largest and the
smallest also draw their operators, so that no operator is favoured.

The networks of a step use different parts of the weights, so the sum of their gradients is averaged over the processes
once, at the end of the step. All randomness, including the choice of networks, depends only on the seed and the step.
So all processes train the same networks, and a killed and resumed run gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor

from sase_blocks.checkpoint import read_checkpoint
from sase_blocks.data import MODEL, Batches, derive_seed
from sase_blocks.jobs import check_settings
from sase_blocks.models import Architecture
from sase_blocks.runs import RunLog, resuming, saved_run
from sase_blocks.search.data import SearchData
from sase_blocks.search.loop import TrainingLoop
from sase_blocks.train import make_optimizer

from .config import TrioConfig
from .score import accuracy, recalibrate, resize
from .space import Law, TrioSpace, draw
from .supernet import SubNetwork, SuperNet

ADVICE = 'Try a lower --lr, a longer --warmup or a lower --clip-grad.'
NETWORKS, SHOWN = 301, 303  # streams of random numbers: the networks of a step, and of the progress lines


def saved_supernet(config: TrioConfig) -> dict[str, Any] | None:
    """The checkpoint of the supernet in ``config.out`` to resume from; None for a new run.

    Raises ValueError as ``runs.saved_run``, and for another space.
    """
    last = Path(config.out) / 'supernet.pt'
    needed = ['config', 'supernet', 'space', 'data', 'in_chans', 'step', 'average', 'optimizer', 'sums']
    saved = saved_run(config, last, needed, 'sase-blocks search trionet')
    if saved is not None:
        with resuming(last):
            before = dict(saved['space'])
        check_settings(before, TrioSpace.parse(config.space).to_dict(), f'the space of {last}')
    return saved


def load_supernet(path: str | Path) -> SuperNet:
    """A supernet in eval mode on the CPU, from supernet.pt or a run's folder; the average of its weights if it has one.

    Raises ValueError or OSError for anything else.
    """
    path = Path(path) / 'supernet.pt' if Path(path).is_dir() else path
    saved = read_checkpoint(path)
    if not {'supernet', 'average', 'space', 'config', 'data', 'in_chans'} <= set(saved):
        raise ValueError(f'{path} is not the checkpoint of a supernet')
    settings = (saved['config'][name] for name in ('sharing', 'drop_rate'))
    classes, space = len(saved['data']['classes']), TrioSpace.from_dict(saved['space'])
    supernet = SuperNet(space, classes, saved['in_chans'], *settings)
    supernet.load_state_dict(saved['average'] or saved['supernet'])
    return supernet.eval()


def networks_of(space: TrioSpace, law: Law, seed: int, step: int, more: int) -> list[Architecture]:
    """The largest network, the smallest one and ``more`` others, for one step."""
    rng = np.random.default_rng(derive_seed(seed, NETWORKS, step))
    extents = ['largest', 'smallest', *[None] * more]
    return [space.architecture(draw(space, rng, law, extent)) for extent in extents]


def sandwich_step(
    supernet: SuperNet,
    networks: list[Architecture],
    images: Tensor,
    labels: Tensor,
    *,
    label_smoothing: float = 0.0,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> Tensor:
    """Add the gradients of these networks to the supernet's parameters. -> their losses, (networks,).

    The first network learns from the labels and teaches the others.
    """
    losses, teacher = [], torch.empty(0)
    for number, architecture in enumerate(networks):
        network = supernet.activate(architecture, dropout=number == 0)
        with autocast():
            outputs = network(resize(images, architecture.image_size))
        outputs = outputs.float() if outputs.dtype in (torch.bfloat16, torch.float16) else outputs
        if number == 0:
            loss = F.cross_entropy(outputs, labels, label_smoothing=label_smoothing)
            teacher = outputs.detach().softmax(1)
        else:
            loss = F.cross_entropy(outputs, teacher)
        loss.backward()
        losses.append(loss.detach())
    return torch.stack(losses)


class SupernetTraining(TrainingLoop):
    """Trains a supernet, and scores its networks; ``saved`` is the checkpoint from ``saved_supernet``."""

    def __init__(
        self, config: TrioConfig, accelerator: Any, data: SearchData, in_chans: int, saved: dict[str, Any] | None
    ) -> None:
        self.in_chans = in_chans
        self.space, self.law = TrioSpace.parse(config.space), config.law
        torch.manual_seed(derive_seed(config.seed, MODEL))
        self.supernet = SuperNet(self.space, len(data.facts['classes']), in_chans, config.sharing, config.drop_rate)
        # channels_last applies only to the images: each forward slices the weights again.
        self.supernet.to(accelerator.device)
        self.optimizer = make_optimizer(config, self.supernet)
        self.average = ModelEmaV3(self.supernet, decay=config.ema_decay, use_warmup=True) if config.ema_decay else None
        # The supernet that the search uses.
        self.found: SuperNet = self.average.module if self.average else self.supernet
        trained = {
            'supernet': self.supernet,
            'optimizer': self.optimizer,
            'average': self.average and self.average.module,
        }
        last = Path(config.out) / 'supernet.pt'
        super().__init__(config, accelerator, data, last, trained, 2 + config.networks)
        total = config.epochs * self.steps
        warmup = round(config.warmup * total)
        self.scheduler = CosineLRScheduler(
            self.optimizer, total, warmup_t=warmup, warmup_lr_init=config.lr / max(warmup, 1), t_in_epochs=False
        )
        if saved:
            self.load_state(saved)

    def state(self) -> dict[str, Any]:
        return {**super().state(), 'space': self.space.to_dict(), 'in_chans': self.in_chans}

    def run(self) -> SuperNet:
        """Train to the end. -> ``found``."""
        total = self.config.epochs * self.steps
        if self.step < total:
            self.log = RunLog(self.config, self.accelerator, self.steps, self.step)
            if self.step:
                self.log.line(f'resuming the supernet at step {self.step} of {total}')
            self.train()
        return self.found

    def batches(self, *place: int) -> Iterator[tuple[Tensor, Tensor]]:
        return self.data.training.epoch(*place)

    def advice(self, step: int, number: int) -> str:
        return f'The network is "{self._networks(step)[number]}". {ADVICE}'

    def _networks(self, step: int) -> list[Architecture]:
        return networks_of(self.space, self.law, self.config.seed, step, self.config.networks)

    def train_step(self, images: Tensor, labels: Tensor) -> Tensor:
        config = self.config
        self.scheduler.step_update(self.step)
        losses = sandwich_step(
            self.supernet,
            self._networks(self.step),
            images,
            labels,
            label_smoothing=config.label_smoothing,
            autocast=self.accelerator.autocast,
        )
        # Weights that no network of this step used have no gradient, on any process, and do not change.
        used = [p for p in self.supernet.parameters() if p.grad is not None]
        if self.world > 1:
            flat = self.mean(torch.cat([p.grad.flatten() for p in used if p.grad is not None]))
            for parameter, part in zip(used, flat.split([p.numel() for p in used]), strict=True):
                parameter.grad = part.view_as(parameter)
        if config.clip_grad is not None:
            torch.nn.utils.clip_grad_norm_(used, config.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average:
            self.average.update(self.supernet, self.step)
        return losses

    def end_epoch(self, epoch: int, seconds: float) -> None:
        largest, smallest, *others = (self.sums / self.steps).tolist()
        row = {
            'epoch': epoch + 1,
            'step': self.step,
            'lr': self.optimizer.param_groups[0]['lr'],
            'largest_loss': largest,
            'smallest_loss': smallest,
            **({'random_loss': sum(others) / len(others)} if others else {}),
            **{f'{extent}_accuracy': self._accuracy(extent) for extent in ('largest', 'smallest')},
            'seconds_per_step': seconds,
        }
        self.log.add(row)
        self.log.line(
            f'epoch {epoch + 1}/{self.config.epochs}: loss of the largest network {largest:.4f}, of the smallest '
            f'{smallest:.4f}; held-out accuracy {row["largest_accuracy"]:.2f} % and {row["smallest_accuracy"]:.2f} %, '
            f'{seconds:.3f} s a step, {self.log.left()} left'
        )

    # ---- scores ----

    def _accuracy(self, extent: str) -> float:
        """Held-out accuracy, in percent, of the largest or smallest network, with the same operators each time."""
        rng = np.random.default_rng(derive_seed(self.config.seed, SHOWN))
        return self.score(self.space.architecture(draw(self.space, rng, self.law, extent)))

    def score(self, architecture: Architecture) -> float:
        """Held-out accuracy of a network, in percent."""
        network = self.calibrated(architecture)
        return accuracy(network, self.resized(self.data.held_out, architecture), self.accelerator.autocast())

    def calibrated(self, architecture: Architecture) -> SubNetwork:
        """A network with its own statistics."""
        network = self.found.activate(architecture)
        images = (x for x, _ in self.resized(self.data.training, architecture, self.config.calibration))
        recalibrate(network, images, self.accelerator.autocast())
        return network.eval()

    def resized(
        self, part: Batches, architecture: Architecture, most: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The first images of a part, in the network's size, and their labels."""
        for images, labels in part.once(self.config.batch_size, most):
            yield resize(images, architecture.image_size), labels
