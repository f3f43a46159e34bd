"""Blocks in Ultralytics YOLO: as rows of a model YAML, and inserted attention that training keeps.

``import sase_blocks.ultralytics`` makes every block a row: ``- [-1, 1, CBAM, []]``. Ultralytics is under AGPL-3.0; this
file calls it by name and contains nothing of it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .blocks import BLOCKS, block_name, create_block
from .insertion import check, remove
from .insertion.carrying import carry_over, inserted_attention
from .ops.options import options_of, split_names

__all__ = ['AttentionRow', 'keep_attention']

# Other repositories give a row its number of channels. No option is usually that large.
LARGE = 64


class AttentionRow(nn.Module):
    """The module of one row of a model YAML: a block with the channels of the row that it reads.

    Loading a ``.pt`` that holds one imports this module. So a new process can also train it. Shape: (B, C, H, W) ->
    (B, C, H, W).

    Args:
        block: as in ``create_block``.
        channels: C, or those of all rows.
        row: the index into ``channels``, if these are of all rows.
    """

    def __init__(self, block: str, channels: int | Sequence[int], row: int | None = None) -> None:
        super().__init__()
        self.block = create_block(block, channels if isinstance(channels, int) else channels[row or 0])

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


def keep_attention(model: Any, trainer: type | None = None) -> type:
    """A trainer class that keeps inserted attention: ``model.train(trainer=keep_attention(model), data=...)``.

    Ultralytics' trainers build the network anew from its YAML, and drop what was inserted. This one inserts it again,
    with its weights, from the weights to start or resume from, otherwise from ``model``. It runs ``check``.

    Args:
        model: an Ultralytics ``YOLO`` (or ``RTDETR``) of any task, with attention inserted in ``model.model`` or with
            rows of blocks.
        trainer: the trainer class to extend; default: Ultralytics' for the task.

    Returns:
        The trainer class.

    Raises:
        TypeError: ``model`` is no such object.
        ValueError: it has no attention. In training: the new network has other modules.
        RuntimeError: in training, inserted attention that does not run.
    """
    network = getattr(model, 'model', None)
    if not isinstance(network, nn.Module) or not hasattr(model, 'task_map'):
        raise TypeError(f'expected a YOLO of Ultralytics that holds a PyTorch network, got {type(model).__name__}')
    attention = inserted_attention(network)
    if not attention and not any(isinstance(module, AttentionRow) for module in network.modules()):
        raise ValueError('this YOLO has no attention to keep: call insert(model.model, block, input_size=640) first')
    return _trainer(trainer or model.task_map[model.task]['trainer'], attention)


def _trainer(base: Any, attention: Mapping[str, nn.Module]) -> type:
    class KeepAttention(base):
        def get_model(self, cfg: Any = None, weights: Any = None, verbose: bool = True) -> nn.Module:
            found = inserted_attention(weights) if isinstance(weights, nn.Module) else {}
            if found:  # Ultralytics looks into the last layers of a head, where attention may be
                weights = copy.deepcopy(weights)
                remove(weights)
            network = base.get_model(self, cfg=cfg, weights=weights, verbose=verbose)
            if found or attention:
                carry_over(found or attention, network)
                try:
                    _log(str(check(network, 4 * max(32, int(max(network.stride))))))
                except ValueError as error:
                    hint = 'In the head, attention fits one number of classes: choose other places with where='
                    raise ValueError(f'{error}. {hint}') from error
            return network

    return KeepAttention


def _log(text: str) -> None:
    from ultralytics.utils import LOGGER

    LOGGER.info(f'sase_blocks: {text}')


def _block_of(name: str, arguments: Sequence[Any]) -> str:
    """The text of the block that a row names. Raises ValueError."""
    head, bracket, options = name.partition('(')
    block = head.lower()
    if len(split_names(name)) > 1 or name.endswith('.json'):
        if arguments:
            raise ValueError(f'a genotype has its options in its text, and takes no arguments, got {arguments!r}')
        return block_name(name)
    if block not in BLOCKS:
        try:
            return block_name(block)
        except ValueError as error:
            raise ValueError(f'Ultralytics has no layer {name!r}, and {error}') from None
    if bracket:
        if arguments:
            raise ValueError(f'give the options in the name or as arguments, not both, got {arguments!r}')
        return block_name(f'{block}({options}')
    defaults = list(options_of(BLOCKS[block]).items())
    if len(arguments) > len(defaults):
        has = ', '.join(option for option, _ in defaults) or 'none'
        raise ValueError(f'{block} takes at most {len(defaults)} arguments, its options ({has}), got {arguments!r}')
    texts = []
    for (option, default), value in zip(defaults, arguments, strict=False):
        if isinstance(value, str) and '=' in value:
            texts.append(value)
            continue
        large = isinstance(value, int | float) and value >= LARGE
        if large and not (isinstance(default, int | float) and default >= LARGE):
            raise ValueError(
                f'{value!r} would be the {option} of {block}, but looks like a number of channels, which is known from '
                f'the row before: leave it out, or write {option}={value!r}'
            )
        texts.append(f'{option}={tuple(value) if isinstance(value, list) else value}')
    return block_name(f'{block}({", ".join(texts)})' if texts else block)


def _read_rows(d: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """A model YAML whose rows of blocks are rows of ``AttentionRow``."""
    read, number = dict(d), 0
    for part in ('backbone', 'head'):
        rows = []
        for row in d.get(part, ()):
            source, repeats, name, arguments = row
            # Ultralytics' own layers keep their names.
            if isinstance(name, str) and name not in known and not name.startswith(('nn.', 'torchvision.ops.')):
                try:
                    block = _block_of(name, arguments)
                    if not isinstance(source, int):
                        raise ValueError(f'a block reads one row, got {source!r}')
                except ValueError as error:
                    raise ValueError(f'row {number} of the model YAML, {row}: {error}') from error
                # Ultralytics replaces names of its variables: c2 is the width of the row before, ch those of all rows.
                channels = ['c2'] if source == -1 else ['ch', source]
                row = [source, repeats, AttentionRow.__name__, [block, *channels]]
            rows.append(row)
            number += 1
        read[part] = rows
    return read


def _register() -> None:
    """Let Ultralytics find the blocks when it reads a model YAML."""
    try:
        from ultralytics.nn import tasks
    except ImportError as error:
        raise ImportError('sase_blocks.ultralytics needs it: pip install "sase-blocks[ecosystem]"') from error
    parse_model = tasks.parse_model

    def parse_with_blocks(d: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        return parse_model(_read_rows(d, vars(tasks)), *args, **kwargs)

    tasks.AttentionRow = AttentionRow
    tasks.parse_model = parse_with_blocks


_register()
