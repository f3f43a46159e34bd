"""The network that a command's options describe: a checkpoint of ``train``, or a timm model with its arguments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import nn

from sase_blocks.convert import load_checkpoint
from sase_blocks.networks import NetworkConfig, build_network, is_code, load_model, trained_network

from .model_args import model_arguments

__all__ = ['OpenedNetwork', 'open_network', 'take_network']


@dataclass(frozen=True)
class OpenedNetwork:
    """A network in eval mode, its settings, the image size and class names if known, and what was loaded."""

    model: nn.Module
    config: NetworkConfig
    img_size: int | None
    classes: list[str]
    note: str


def take_network(options: dict[str, Any]) -> dict[str, Any]:
    """Take the options of ``add_network_options`` out of ``options``. -> those given, as settings of a network."""
    args = model_arguments(options.pop('model_args'), options.pop('genotype'), options.pop('attn_stages'))
    given = {entry.name: options.pop(entry.name) for entry in fields(NetworkConfig) if entry.name in options}
    return {**given, 'model_args': args} if args else given


def open_network(given: Mapping[str, Any], checkpoint: str | None) -> OpenedNetwork:
    """Build the network of ``take_network``'s settings with the weights of a checkpoint.

    A checkpoint of ``train`` says how its network is built. Then only an image size may be given with it.

    Raises:
        ValueError, OSError: a wrong option, network or checkpoint; options that a checkpoint of ``train`` overrides.
    """
    saved = trained_network(checkpoint) if checkpoint else None
    if checkpoint and saved and given.get('model', saved[0].model) == saved[0].model:
        config, classes = saved
        own = ('insert',) if is_code(config.insert or '') else ()  # whose code runs only if named
        extra = [f'--{name.replace("_", "-")}' for name in given if name not in ('model', 'img_size', *own)]
        if extra:
            raise ValueError(
                f'{checkpoint} is of `sase-blocks train` and says how its network is built (insert={config.insert!r}): '
                f'leave out {", ".join(extra)} (--model-args includes --genotype and --attn-stages)'
            )
        trained = load_model(checkpoint, given.get('insert'))
        size = given.get('img_size', config.img_size)
        return OpenedNetwork(trained.model, config, size, classes, str(trained.report))
    config = NetworkConfig(**given)
    if 'model' not in given:
        raise ValueError('pass --model NAME: only a checkpoint of `sase-blocks train` names its model')
    if checkpoint and config.pretrained:
        raise ValueError('--pretrained and --checkpoint are both weights; leave one out')
    model, inserted = build_network(config)
    note = str(inserted) + '\n' if inserted else ''
    classes = []
    if checkpoint:
        note += str(load_checkpoint(model, checkpoint))
    elif config.pretrained:
        note += "timm's pretrained weights"
        if subset := infer_imagenet_subset(model):
            names = ImageNetInfo(subset)
            classes = [names.index_to_description(i) for i in range(names.num_classes())]
    else:
        note += 'note: without --checkpoint the model has its initial weights'
    return OpenedNetwork(model.eval(), config, config.img_size, classes, note)
