"""A network as settings describe it: any timm model, its arguments and the attention inserted into it.

Every command and ``load_model`` build it here, so a checkpoint of ``train`` is enough to build its network again.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from .checkpoint import read_checkpoint
from .convert import LoadReport, load_checkpoint
from .data import image_config
from .insertion import InsertReport, insert
from .ops.options import parse_name
from .reading import one_line, quoted, shorten, some
from .settings import Settings, require_used, setting

__all__ = [
    'NetworkConfig',
    'TrainedNetwork',
    'build_model',
    'build_network',
    'check_model_name',
    'is_code',
    'load_model',
    'load_weights',
    'trained_network',
]


@dataclass(frozen=True)
class NetworkConfig(Settings):
    """The settings of a network. ``insert`` to ``layout`` are the arguments of ``sase_blocks.insert``."""

    model: str = setting('resnet50_sase', 'name of any timm model')
    model_args: dict[str, Any] = field(default_factory=dict, metadata={'help': 'model arguments'})
    pretrained: bool = setting(False, "start from timm's pretrained weights (may download)")
    img_size: int | None = setting(None, "image height and width in px (default: the model's)", expected='at least 1')

    insert: str | None = setting(
        None,
        "insert this block into the model: its name, maybe with options such as 'se(reduction=8)', a genotype, or "
        'FILE.py:CLASS, a class in a file of yours, whose code then runs',
    )
    where: str | None = setting(
        None, "insert after the modules with such names, for example 'layer*.bn2' (default: the papers' places)"
    )
    stages: list[int] | tuple[int, ...] | int | None = field(
        default=None, metadata={'help': 'insert only into these stages, counted from 1 (default: all)'}
    )
    start: str = setting(
        'identity',
        "start of an inserted block: 'identity' keeps the model's outputs, 'paper' is the paper's initialisation",
        choices=('identity', 'paper'),
    )
    layout: str | None = setting(
        None, 'layout of the maps for --insert: NCHW, NHWC, tokens or tokens+N (default: detected)'
    )

    def __post_init__(self) -> None:
        if isinstance(self.stages, int | tuple):  # as `insert` takes them; files and options have a list
            stages = [self.stages] if isinstance(self.stages, int) else list(self.stages)
            object.__setattr__(self, 'stages', stages)
        super().__post_init__()
        for name in ('where', 'stages', 'start', 'layout'):
            require_used(self, self.insert is not None, name, 'without insert')


def check_model_name(name: str) -> None:
    """Raise a ValueError that suggests the nearest names unless timm knows the model ``name``."""
    if ':' not in name and not timm.is_model(name):  # timm checks 'hf-hub:...' and 'local-dir:...' itself
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f'; did you mean {" or ".join(near)}?' if near else ''
        raise ValueError(f'there is no model {quoted(name)}{hint}')


def build_model(name: str, num_classes: int | None = None, **model_args: Any) -> nn.Module:
    """``timm.create_model``, with a one-line ValueError for wrong names and arguments."""
    check_model_name(name)
    if num_classes is not None:
        model_args['num_classes'] = num_classes
    try:
        model: nn.Module = timm.create_model(name, **model_args)
    except (ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a file of weights fails as RuntimeError, EOFError, KeyError, UnpicklingError, ...
        reason = one_line(error)
        if not isinstance(error, (ValueError, TypeError, OSError)):
            # torch's message about a rejected weights file goes on to recommend running the file's code.
            reason = f'{type(error).__name__}: {shorten(reason.split(". ")[0], 300)}'
        kind = OSError if isinstance(error, OSError) else ValueError
        text = f'{name} cannot be built with {quoted(model_args)}: {reason}'
        # Weights files in timm's arguments; the text above may be shortened.
        places = [model_args, model_args.get('pretrained_cfg'), model_args.get('pretrained_cfg_overlay')]
        files = [p[key] for p in places if isinstance(p, Mapping) for key in ('checkpoint_path', 'file') if p.get(key)]
        more = [f'; the file is {file}' for file in files if str(file) not in text]
        raise kind(text + ''.join(more)) from error
    return model


def build_network(
    config: NetworkConfig, num_classes: int | None = None, *, weights: bool = True
) -> tuple[nn.Module, InsertReport | None]:
    """The network of a configuration, with its attention inserted.

    Args:
        config: the settings, for example a ``TrainConfig``.
        num_classes: of the classifier; default: the model's.
        weights: load timm's pretrained weights if the configuration says so.

    Returns:
        The network on the CPU in train mode, and the report of the insertion; None if nothing is inserted.

    Raises:
        ValueError, TypeError, OSError: the errors of ``build_model`` and ``insert``.
    """
    args = {'pretrained': config.pretrained, **_model_args(config)}
    if num_classes is not None:
        args['num_classes'] = num_classes
    if not weights:
        args['pretrained'] = False
    model = build_model(config.model, **args)
    if config.insert is None:
        return model, None
    # In the size of the images, on which the attention may depend.
    size = image_config(model, config.img_size)['input_size']
    stages = tuple(config.stages) if isinstance(config.stages, list) else config.stages
    block = load_class(config.insert) if is_code(config.insert) else config.insert
    report = insert(model, block, config.where, config.start, stages=stages, input_size=size, layout=config.layout)
    return model, report


def is_code(block: str) -> bool:
    """Whether a block's text names a class in a file, ``'FILE.py:CLASS'``, maybe with options."""
    return '.py:' in block.partition('(')[0]


def load_class(block: str) -> Callable[..., nn.Module]:
    """The class that a text ``'FILE.py:CLASS'`` or ``'FILE.py:CLASS(option=value)'`` names, with its options.

    Runs the code in the file, for example a copied block, or your own: a callable of channels that builds a module.

    Raises:
        ValueError: no such file or class, or the file's code raises an error.
    """
    file, _, call = block.partition('.py:')
    file, (name, options) = f'{file}.py', parse_name(call)
    if not Path(file).is_file():
        raise ValueError(f'there is no file {file} for the block {quoted(block)}')
    spec: Any = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f'{file} cannot be imported: {type(error).__name__}: {one_line(error, 300)}') from error
    found = getattr(module, name, None)
    if not callable(found):
        classes = [key for key, value in vars(module).items() if isinstance(value, type)]
        raise ValueError(f'{file} has no class {quoted(name)}; it has {some(classes)}')
    return partial(found, **options) if options else found


def _model_args(config: NetworkConfig) -> dict[str, Any]:
    """The model arguments of a configuration, with its image size for models that are built for one."""
    args = dict(config.model_args)
    if config.img_size is not None and timm.is_model(config.model):
        cfg = timm.get_pretrained_cfg(config.model)
        ours = timm.model_entrypoint(config.model).__module__.startswith('sase_blocks.')
        if ours or (cfg is not None and cfg.fixed_input_size):  # these are built for one image size
            args.setdefault('img_size', config.img_size)
    return args


@dataclass(frozen=True)
class TrainedNetwork:
    """A network with the weights of a checkpoint of ``sase-blocks train``.

    Attributes:
        model: the network, in eval mode on the CPU.
        config: the settings it was built with.
        classes: class names in the order of the outputs.
        report: what was loaded.
    """

    model: nn.Module
    config: NetworkConfig
    classes: list[str]
    report: LoadReport


def load_model(checkpoint: str | os.PathLike[str], insert: str | None = None) -> TrainedNetwork:
    """Build the network of a checkpoint of ``sase-blocks train`` with its inserted attention, and load its weights.

    Nothing else is needed, and nothing in the file is run. If the run kept an average of its weights
    (``--ema-decay``), this loads the average, because the run validated it.

    Args:
        checkpoint: ``best.pt`` or ``last.pt`` of a run.
        insert: ``'FILE.py:CLASS'``, if the run was trained with such a block. Its code then runs, so a checkpoint alone
            never decides that. The file may have moved.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a damaged file, a checkpoint of something else, weights that do not fit their settings, or a block
            in a file without ``insert``, or the other way round.
    """
    found = trained_network(checkpoint)
    if found is None:
        raise ValueError(
            f'{checkpoint} is not a checkpoint of `sase-blocks train`, so it does not say which network it is for: '
            f'build that one, and load the file with load_checkpoint'
        )
    config, classes = found
    saved = config.insert or ''
    if is_code(saved) and insert is None:
        raise ValueError(
            f'{checkpoint} was trained with {saved}, code that no checkpoint runs by itself: if you trust that file, '
            f'name it, --insert {saved}'
        )
    if insert is not None and (not is_code(saved) or insert.partition('.py:')[2] != saved.partition('.py:')[2]):
        raise ValueError(f'{checkpoint} was trained with insert={config.insert!r}, not {insert!r}; leave --insert out')
    config = replace(config, insert=insert or config.insert)
    with _naming(checkpoint):
        model, inserted = build_network(config, len(classes), weights=False)
    averaged = isinstance(read_checkpoint(checkpoint).get('state_dict_ema'), dict)
    report = load_checkpoint(model, Path(checkpoint), use_ema=averaged)
    if inserted and set(inserted.keys) & set(report.added):
        raise ValueError(f'{checkpoint} is damaged: it holds none of the inserted attention that its settings name')
    return TrainedNetwork(model.eval(), config, classes, report)


def load_weights(model: nn.Module, config: NetworkConfig, checkpoint: str) -> LoadReport:
    """``load_checkpoint`` into a network that may have other classes. The error names another insertion in the file."""
    try:
        return load_checkpoint(model, checkpoint, keep_head=True)
    except ValueError as error:
        saved = trained_network(checkpoint)
        if saved is None or saved[0].insert == config.insert:
            raise
        raise ValueError(
            f'{error}; it was trained with insert={saved[0].insert!r}, and here it is {config.insert!r}'
        ) from None


def trained_network(checkpoint: str | os.PathLike[str]) -> tuple[NetworkConfig, list[str]] | None:
    """The network and the classes of a checkpoint of `sase-blocks train`; None for any other checkpoint.

    Raises the errors of ``load_model`` about the file and its settings.
    """
    state = read_checkpoint(checkpoint)
    config, data = state.get('config'), state.get('data')
    if not isinstance(config, dict) or not {'model', 'model_args', 'img_size'} <= set(config):
        return None
    if not isinstance(data, dict) or not isinstance(data.get('classes'), list):
        return None
    known = {entry.name: config[entry.name] for entry in fields(NetworkConfig) if entry.name in config}
    with _naming(checkpoint):
        return NetworkConfig(**known), data['classes']


@contextlib.contextmanager
def _naming(checkpoint: str | os.PathLike[str]) -> Iterator[None]:
    """Within this context, errors about the settings of a checkpoint, which may have wrong types, name the file."""
    try:
        yield
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        raise ValueError(f'{checkpoint}: its network cannot be built: {one_line(error)}') from error
