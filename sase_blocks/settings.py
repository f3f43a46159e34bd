"""Settings of networks and runs: dataclasses whose fields are checked, and are also options of the command line."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, cast

import torch

from .reading import printable, quoted


def setting(default: Any, help: str, **more: Any) -> Any:
    """A field of a ``RunConfig`` with its help text.

    More: ``choices``, or ``expected``, a key of ``EXPECTED``; ``free=True`` if a resumed run may change it;
    ``place=True`` for a path, which may also change, because its content is compared instead.
    """
    return field(default=default, metadata={'help': help, **more})


def require(config: Any, good: bool, name: str, expected: str) -> None:
    """Raise a ValueError that names the setting and its value unless ``good``."""
    if not good:
        raise ValueError(f'{name} must be {expected}, got {quoted(getattr(config, name))}')


def require_used(config: Any, used: bool, name: str, when: str) -> None:
    """``require`` the default for a setting that would be ignored."""
    default = next(entry.default for entry in fields(config) if entry.name == name)
    require(config, used or getattr(config, name) == default, name, f'left at {default!r} {when}')


EXPECTED: dict[str, Callable[[Any], bool]] = {
    'at least 0': lambda value: value >= 0,
    'at least 1': lambda value: value >= 1,
    'at least 2': lambda value: value >= 2,
    'above 0': lambda value: value > 0,
    'between 0 and 1': lambda value: 0 < value < 1,
    'at least 0 and below 1': lambda value: 0 <= value < 1,
    'at least 0 and below 2**64': lambda value: 0 <= value < 2**64,  # the seeds of torch's generators
    'a probability': lambda value: 0 <= value <= 1,
}


class Settings:
    """Base of the dataclasses whose fields are settings (``setting``), and are also options of the command line."""

    def __post_init__(self) -> None:
        for entry in fields(cast(Any, self)):
            value, choices = getattr(self, entry.name), entry.metadata.get('choices')
            require(self, not choices or value in choices, entry.name, f'one of {choices}')
            if value is not None and (expected := entry.metadata.get('expected')):
                require(self, EXPECTED[expected](value), entry.name, expected)


def data_title(data: str) -> str:
    """The name of a data set, or of its folder, for pictures."""
    return printable(Path(data).resolve().name or data)


def run_title(data: str, seed: int, epochs: int) -> str:
    """Data, seed and epochs of a run, for pictures."""
    return f'{data_title(data)}, seed {seed}, {epochs} epoch{"s"[: epochs != 1]}'


@dataclass(frozen=True)
class RunConfig(Settings):
    """Settings of every run; each is also an option. A subclass adds its own and may change default and help."""

    data: str = field(metadata={'place': True, 'help': 'folder with train/CLASS/* in it, or the root of --dataset'})
    out: str = setting('runs/train', 'folder for checkpoints, metrics.jsonl and the TensorBoard log', place=True)
    resume: bool = setting(
        False, 'resume the run in --out, waiting for a live one to finish; start a new run if there is none', free=True
    )

    dataset: str = setting('', "timm's name of a data set, such as torch/cifar10; --data is then its root")
    train_split: str = setting('train', 'training split of a --dataset')
    num_classes: int | None = setting(
        None, 'number of classes, if the --dataset does not define it', expected='at least 1'
    )
    download: bool = setting(False, 'let a --dataset download itself', free=True)
    skip_broken: bool = setting(False, 'leave broken images out, with a warning')
    hflip: float = setting(0.5, 'probability of a horizontal flip; 0 for text and digits', expected='a probability')

    epochs: int = setting(100, 'passes over the training images', expected='at least 1')
    batch_size: int = setting(128, 'images per step, over all processes together', expected='at least 1')
    lr: float = setting(0.1, 'highest learning rate', expected='above 0')
    momentum: float = setting(0.9, 'momentum of SGD', expected='at least 0 and below 1')
    weight_decay: float = setting(
        1e-4, 'weight decay, except for vectors and parameters that blocks exclude', expected='at least 0'
    )
    clip_grad: float | None = setting(None, 'maximum gradient norm', expected='above 0')

    seed: int = setting(0, 'random seed', expected='at least 0 and below 2**64')
    mixed_precision: str = setting('no', 'arithmetic below fp32', choices=('no', 'bf16'))
    channels_last: bool = setting(False, 'channels_last memory format; often faster on GPUs and in bf16')
    deterministic: bool = setting(False, 'use only deterministic algorithms; slower on GPUs')
    cpu: bool = setting(False, 'use the CPU even if there is a GPU', free=True)
    workers: int = setting(4, 'loader processes for each process', free=True, expected='at least 0')
    tensorboard: bool = setting(True, 'write a TensorBoard log', free=True)

    @property
    def title(self) -> str:
        """Data, seed and epochs, for pictures."""
        return run_title(self.dataset or self.data, self.seed, self.epochs)

    def __post_init__(self) -> None:
        super().__post_init__()
        for entry in fields(self):
            if entry.name in ('train_split', 'val_split', 'download'):
                require_used(self, bool(self.dataset), entry.name, 'without a dataset')

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format


def fixed_settings(config: Any) -> dict[str, Any]:
    """The settings that a resumed run must keep, by name: all without ``free`` and ``place``."""
    return {e.name: getattr(config, e.name) for e in fields(config) if not e.metadata.keys() & {'free', 'place'}}


def shared_settings(config: Any, kind: type[Any], leave_out: Collection[str]) -> dict[str, Any]:
    """The settings that the configuration class ``kind`` also has, as arguments for it."""
    names = {entry.name for entry in fields(kind)} - set(leave_out)
    return {entry.name: getattr(config, entry.name) for entry in fields(config) if entry.name in names}
