"""The training loop of a search, which continues from its checkpoint at any step."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sase_blocks.checkpoint import save_checkpoint
from sase_blocks.data import MODEL, derive_seed, same_data
from sase_blocks.runs import RunLog, check_finite, load_optimizer, resuming, whole_number

from .data import SearchData, describe_data


class TrainingLoop(ABC):
    """Epochs of training steps, with a checkpoint after each epoch and every ``config.save_minutes``.

    A run that is killed at any moment and resumed gives the same bits, if what a subclass does depends only on the seed
    and the step.

    Args:
        config, accelerator, data: of the run. The last partial batch of an epoch is dropped.
        last: the checkpoint.
        parts: models and optimizers by their name in the checkpoint, or None.
        losses: number of losses whose sums over the epoch are in the checkpoint.
    """

    log: RunLog

    def __init__(
        self, config: Any, accelerator: Any, data: SearchData, last: Path, parts: Mapping[str, Any], losses: int
    ) -> None:
        self.config, self.accelerator, self.data, self.last, self.parts = config, accelerator, data, last, parts
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        self.steps = len(data.training) // config.batch_size  # of an epoch
        self.step = 0  # of the run
        self.sums = torch.zeros(losses, dtype=torch.float64)

    @abstractmethod
    def batches(self, *place: int) -> Iterator[Any]:
        """The batches of an epoch, for the arguments of ``Batches.epoch``."""

    @abstractmethod
    def train_step(self, *batch: Any) -> Tensor:
        """Update the weights. -> losses, on the device."""

    @abstractmethod
    def end_epoch(self, epoch: int, seconds: float) -> None:
        """Log an epoch whose steps took so many seconds each."""

    @abstractmethod
    def advice(self, step: int, number: int) -> str:
        """What to do if a loss of a step is not finite."""

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean over all processes."""
        found: Tensor = self.accelerator.reduce(tensor, 'mean')
        return found

    def state(self) -> dict[str, Any]:
        """The content of the checkpoint."""
        parts = {name: part and part.state_dict() for name, part in self.parts.items()}
        return {'config': asdict(self.config), 'data': self.data.facts, 'step': self.step, 'sums': self.sums, **parts}

    def load_state(self, saved: Mapping[str, Any]) -> None:
        """Continue from the content of a checkpoint. Raises ValueError if it does not fit or is of other data."""
        with resuming(self.last):
            same, before = same_data(saved['data'], self.data.facts), describe_data(saved['data'])
        if not same:
            now = describe_data(self.data.facts)
            raise ValueError(f'{self.last.parent} holds a search on other data: {before}, this is {now}')
        with resuming(self.last):
            for name, part in self.parts.items():
                if isinstance(part, torch.optim.Optimizer):
                    load_optimizer(part, saved[name])
                elif part:
                    part.load_state_dict(saved[name])
            self.step = whole_number(saved['step'], 'step', self.config.epochs * self.steps)
            self.sums = saved['sums'].reshape(self.sums.shape)

    def save(self) -> None:
        """Write the checkpoint."""
        if self.accelerator.is_main_process:
            save_checkpoint(self.state(), self.last)

    def train(self) -> None:
        """Run the steps that are left."""
        config, steps = self.config, self.steps
        for epoch in range(self.step // steps, config.epochs):
            first, began = self.step - epoch * steps, time.perf_counter()
            last_save = began
            for batch in self.batches(epoch, config.batch_size, first, steps, self.rank, self.world):
                # Dropout depends only on the step, whatever drew random numbers in between.
                torch.manual_seed(derive_seed(config.seed, MODEL, self.step, self.rank))
                losses = self.log.count(self.train_step(*batch).double())
                self.step += 1
                if losses is None:
                    continue
                for late, number in (~losses.isfinite()).nonzero().tolist():
                    step = self.step - len(losses) + late
                    check_finite([float(losses[late, number])], step + 1, self.last, self.advice(step, number))
                self.sums[: losses.shape[1]] += losses.sum(0)
                if self.step % steps and time.perf_counter() - last_save > 60 * config.save_minutes:
                    self.save()
                    last_save = time.perf_counter()
            self.end_epoch(epoch, (time.perf_counter() - began) / max(steps - first, 1))
            # In this order, the resumed epoch redoes whatever a kill leaves undone, with the same result.
            self.sums = torch.zeros_like(self.sums)
            self.save()
            self.accelerator.wait_for_everyone()
        self.log.close()
