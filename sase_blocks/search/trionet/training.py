"""Training of a supernet (arXiv 2111.07547) on accelerate: the step, the loop around it, and its checkpoint.

A step follows the sandwich rule with in-place distillation (as in BigNAS, arXiv 2003.11142): the largest network learns
from the labels, and its outputs teach the smallest one and some random ones. Not in the paper: the largest and the
smallest draw their operators, too, so that no operator is favoured.

No wrapper averages gradients: the networks of a step use different parts of the weights, so the sum of their gradients
is averaged over the processes once, at the end of the step. All randomness, the choice of networks included, depends
only on the seed and the step. So all processes train the same networks, and a killed and resumed run gives the same
bits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor

from sase_blocks.checkpoint import read_checkpoint, save_checkpoint
from sase_blocks.data import MODEL, Batches, derive_seed
from sase_blocks.jobs import check_settings
from sase_blocks.models import Architecture
from sase_blocks.runs import (
    RunLog,
    check_finite,
    load_optimizer,
    resuming,
    saved_run,
    whole_number,
)
from sase_blocks.search.data import SearchData
from sase_blocks.train import make_optimizer

from .config import TrioConfig
from .score import accuracy, recalibrate, resize
from .space import Law, TrioSpace, draw
from .supernet import SubNetwork, SuperNet

__all__ = ['SupernetTraining', 'load_supernet', 'networks_of', 'sandwich_step', 'saved_supernet']

ADVICE = 'Try a lower --lr, a longer --warmup or a lower --clip-grad.'
NETWORKS, SHOWN = 301, 303  # streams of random numbers: the networks of a step, and of the progress lines


def saved_supernet(config: TrioConfig) -> dict[str, Any] | None:
    """The checkpoint of the supernet in ``config.out`` to resume from; None for a new run.

    Raises:
        ValueError: there is one, but no ``resume``, or it has other settings or another space; names the differences.
    """
    last = Path(config.out) / 'supernet.pt'
    needed = ['config', 'supernet', 'space', 'data', 'in_chans', 'step', 'average', 'optimizer', 'sums']
    saved = saved_run(config, last, needed, 'sase-blocks search trionet')
    if saved is not None:
        with resuming(last):
            before = dict(saved['space'])
        check_settings(before, TrioSpace.parse(config.space).to_dict(), f'the space of {last}')
    return saved


def load_supernet(path: str | Path, *, average: bool = True) -> SuperNet:
    """A supernet in eval mode on the CPU, from supernet.pt or a run's folder; the average of its weights if it has one.

    Raises:
        ValueError, OSError: no such file, or not a supernet.
    """
    path = Path(path)
    path = path / 'supernet.pt' if path.is_dir() else path
    saved = read_checkpoint(path)
    if not {'supernet', 'average', 'space', 'config', 'data', 'in_chans'} <= set(saved):
        raise ValueError(f'{path} is not the checkpoint of a supernet')
    config = saved['config']
    supernet = SuperNet(
        TrioSpace.from_dict(saved['space']),
        len(saved['data']['classes']),
        saved['in_chans'],
        config['sharing'],
        config['drop_rate'],
    )
    supernet.load_state_dict(saved['average'] if average and saved['average'] else saved['supernet'])
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


class SupernetTraining:
    """A supernet that trains, and scores its networks; ``saved`` is the checkpoint from ``saved_supernet``."""

    def __init__(
        self, config: TrioConfig, accelerator: Any, data: SearchData, in_chans: int, saved: dict[str, Any] | None
    ) -> None:
        self.config, self.accelerator, self.data, self.in_chans = config, accelerator, data, in_chans
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        self.last = Path(config.out) / 'supernet.pt'
        self.space, self.law = TrioSpace.parse(config.space), config.law
        torch.manual_seed(derive_seed(config.seed, MODEL))
        self.supernet = SuperNet(self.space, len(data.classes), in_chans, config.sharing, config.drop_rate)
        # channels_last applies only to the images: each forward slices the weights again.
        self.supernet.to(accelerator.device)
        self.optimizer = make_optimizer(config, self.supernet)
        self.steps = len(data.training) // config.batch_size  # a last partial batch is dropped
        total = config.epochs * self.steps
        warmup = round(config.warmup * total)
        self.scheduler = CosineLRScheduler(
            self.optimizer, total, warmup_t=warmup, warmup_lr_init=config.lr / max(warmup, 1), t_in_epochs=False
        )
        self.average = ModelEmaV3(self.supernet, decay=config.ema_decay, use_warmup=True) if config.ema_decay else None
        self.step = 0
        self.sums = torch.zeros(2 + config.networks, dtype=torch.float64)
        self.resumed = saved is not None
        if saved:
            with resuming(self.last):
                self.supernet.load_state_dict(saved['supernet'])
                load_optimizer(self.optimizer, saved['optimizer'])
                if self.average:
                    self.average.module.load_state_dict(saved['average'])
                self.step = whole_number(saved['step'], 'step', total)
                self.sums = saved['sums'].reshape(self.sums.shape)

    @property
    def found(self) -> SuperNet:
        """The supernet that the search uses: the average if there is one."""
        return self.average.module if self.average else self.supernet

    # ---- one step ----

    def _train_step(self, images: Tensor, labels: Tensor) -> Tensor:
        config = self.config
        # Dropout depends only on the step, whatever drew random numbers in between.
        torch.manual_seed(derive_seed(config.seed, MODEL, self.step, self.rank))
        self.scheduler.step_update(self.step)
        losses = sandwich_step(
            self.supernet,
            networks_of(self.space, self.law, config.seed, self.step, config.networks),
            images,
            labels,
            label_smoothing=config.label_smoothing,
            autocast=self.autocast,
        )
        # Weights that no network of this step used have no gradient, on any process, and do not change.
        used = [p for p in self.supernet.parameters() if p.grad is not None]
        if self.world > 1:
            flat = self.accelerator.reduce(torch.cat([p.grad.flatten() for p in used if p.grad is not None]), 'mean')
            for parameter, part in zip(used, flat.split([p.numel() for p in used]), strict=True):
                parameter.grad = part.view_as(parameter)
        if config.clip_grad is not None:
            torch.nn.utils.clip_grad_norm_(used, config.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average:
            self.average.update(self.supernet, self.step)
        return losses

    def autocast(self) -> Any:
        """accelerate's context for mixed precision."""
        return self.accelerator.autocast() if self.config.mixed_precision != 'no' else nullcontext()

    # ---- the run ----

    def run(self) -> SuperNet:
        """Train to the end. -> ``found``."""
        total = self.config.epochs * self.steps
        if self.step == total:
            return self.found
        self.log = RunLog(self.config, self.accelerator, self.steps, self.step)
        if self.resumed:
            self.log.line(f'resuming the supernet at step {self.step} of {total}')
        for epoch in range(self.step // self.steps, self.config.epochs):
            self._epoch(epoch)
            self.accelerator.wait_for_everyone()
        self.log.close()
        return self.found

    def _epoch(self, epoch: int) -> None:
        config = self.config
        first = self.step - epoch * self.steps
        self.supernet.train()
        began = last_save = time.perf_counter()
        batches = self.data.training.epoch(epoch, config.batch_size, first, self.steps, self.rank, self.world)
        for images, labels in batches:
            seen = self.log.count(self._train_step(images, labels).double())
            self.step += 1
            if seen is not None:
                self._check_losses(seen)
                self.sums += seen.sum(0)
                if self.step % self.steps and time.perf_counter() - last_save > 60 * config.save_minutes:
                    self._save()
                    last_save = time.perf_counter()
        seconds = (time.perf_counter() - began) / max(self.steps - first, 1)
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
        self.sums = torch.zeros_like(self.sums)
        self.log.add(row)
        self._save()
        self.log.line(
            f'epoch {epoch + 1}/{config.epochs}: loss of the largest network {largest:.4f}, of the smallest '
            f'{smallest:.4f}; held-out accuracy {row["largest_accuracy"]:.2f} % and {row["smallest_accuracy"]:.2f} %, '
            f'{seconds:.3f} s a step, {self.log.left()} left'
        )

    def _check_losses(self, losses: Tensor) -> None:
        """Stop at the first non-finite loss of the last steps; losses: (steps, networks)."""
        for bad, number in (~losses.isfinite()).nonzero().tolist():
            step = self.step - len(losses) + bad
            network = networks_of(self.space, self.law, self.config.seed, step, self.config.networks)[number]
            check_finite([float(losses[bad, number])], step + 1, self.last, f'The network is "{network}". {ADVICE}')

    def _accuracy(self, extent: str) -> float:
        """Held-out accuracy, in percent, of the largest or smallest network, with the same operators each time."""
        rng = np.random.default_rng(derive_seed(self.config.seed, SHOWN))
        return self.score(self.space.architecture(draw(self.space, rng, self.law, extent)))

    def score(self, architecture: Architecture) -> float:
        """Held-out accuracy of a network, in percent."""
        network = self.calibrated(architecture)
        return accuracy(network, self.resized(self.data.held_out, architecture), self.autocast())

    def calibrated(self, architecture: Architecture) -> SubNetwork:
        """A network with its own statistics."""
        network = self.found.activate(architecture)
        images = (x for x, _ in self.resized(self.data.training, architecture, self.config.calibration))
        recalibrate(network, images, self.autocast())
        return network.eval()

    def resized(
        self, part: Batches, architecture: Architecture, most: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The first images of a part, in the network's size, and their labels."""
        for images, labels in part.once(self.config.batch_size, most):
            yield resize(images, architecture.image_size), labels

    def _save(self) -> None:
        if self.accelerator.is_main_process:
            state = {
                'config': asdict(self.config),
                'space': self.space.to_dict(),
                'data': self.data.facts,
                'in_chans': self.in_chans,
                'step': self.step,
                'supernet': self.supernet.state_dict(),
                'average': self.average.module.state_dict() if self.average else None,
                'optimizer': self.optimizer.state_dict(),
                'sums': self.sums,
            }
            save_checkpoint(state, self.last)
