"""The candidates of a comparison: a block in any text form, or another model, each maybe with settings of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import timm
import torch

from sase_blocks.blocks import BLOCKS, Genotype, split_stages
from sase_blocks.networks import build_network, check_model_name, is_code
from sase_blocks.ops.options import split_names
from sase_blocks.reading import parse_json, quoted, shorten
from sase_blocks.settings import require
from sase_blocks.train import TrainConfig

NONE = 'none'  # no attention
MODEL = 'model:'  # prefix of another model, which stays as it is
INSERTION = ('where', 'stages', 'start', 'layout', 'insert_lr')  # settings of TrainConfig that need an inserted block
OWN = (*INSERTION, 'model_args')  # what a candidate may set for itself


@dataclass(frozen=True)
class Candidate:
    """A row of a comparison.

    Attributes:
        name: its own name.
        block: 'none', a name of ``list_blocks()``, maybe with options, a genotype as text, several with semicolons
            between them (one for each stage), ``'FILE.py:CLASS'``, a class in a file, or ``'model:NAME'``, another timm
            model as it is.
        settings: settings of ``TrainConfig`` that only this candidate has, of ``OWN``.
        kind: for the reader of the results.
        tested: whether its difference to the reference is tested.
    """

    name: str
    block: str
    settings: dict[str, Any] = field(default_factory=dict)
    kind: str = 'block'
    tested: bool = True


@dataclass(frozen=True)
class Rule:
    """How a block gets into the model.

    Attributes:
        how: 'genotype': as the model's argument ``genotype=``. 'insert': by ``insert``, after the model is built. None:
            as genotype if the model takes one, which only models of this package do, else by ``insert``. A class in a
            file is always inserted, into a model that takes a genotype with the paper's start, which a genotype has.
        insertion: settings of ``INSERTION`` for all inserted blocks.

    Raises:
        ValueError: another ``how``.
    """

    how: str | None = None
    insertion: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.how not in (None, 'genotype', 'insert'):
            raise ValueError(f"how must be 'genotype', 'insert' or None, got {self.how!r}")


def parse_candidate(text: str) -> Candidate:
    """The candidate in a text ``[LABEL=]BLOCK[@SETTING=VALUE...]``.

    BLOCK is as in ``Candidate``, or a search's .json file, which is read now. SETTING is one of ``OWN``, and VALUE is
    JSON or plain text. Without LABEL the name is the text itself.

    Raises:
        ValueError: a wrong form, an unknown setting or a wrong file.

    Examples:
        >>> parse_candidate('paper=se(reduction=4)@start=paper@stages=[3,4]')
        Candidate(name='paper', block='se(reduction=4)', settings={'start': 'paper', 'stages': [3, 4]}, ...)
    """
    head, *given = split_names(text, '@')
    label, *rest = split_names(head, '=')
    block = '='.join(rest) if rest else label
    if not label or not block:
        raise ValueError(f'expected BLOCK or LABEL=BLOCK, maybe with @SETTING=VALUE, got {quoted(text)}')
    settings: dict[str, Any] = {}
    for part in given:
        key, equals, value = part.partition('=')
        key = key.strip().replace('-', '_')
        if not equals or key not in OWN or key in settings:
            raise ValueError(f'{shorten(text)}: expected @SETTING=VALUE with one of {", ".join(OWN)}, each once')
        try:
            settings[key] = parse_json(value, 'a value')
        except ValueError:
            settings[key] = value.strip()
    if not block.startswith(MODEL):
        block = '; '.join(split_stages(block))
    return Candidate(label if rest else text.strip(), block, settings)


def split_blocks(items: Sequence[str]) -> list[str]:
    """Split the arguments of an option at commas, except those of a genotype.

    A part that is no block, file or model begins a genotype of six parts. An argument with a semicolon is one
    genotype for each stage.
    """
    out: list[str] = []
    for item in items:
        parts = [item] if len(split_names(item, ';')) > 1 else list(filter(None, split_names(item)))
        while parts:
            count = 6 if not _is_block(parts[0]) or _is_genotype(parts[:6]) else 1
            out.append(','.join(parts[:count]))
            del parts[:count]
    return out


def _is_block(text: str) -> bool:
    block = split_names(split_names(text, '@')[0], '=')[-1]
    known = block.partition('(')[0] in (NONE, *BLOCKS)
    return known or block.endswith('.json') or block.startswith(MODEL) or is_code(block)


def _is_genotype(parts: Sequence[str]) -> bool:
    try:
        Genotype.of(parts)
    except ValueError:
        return False
    return True


def configure(candidate: Candidate, budget: TrainConfig, rule: Rule) -> TrainConfig:
    """The settings of a candidate's training.

    Raises:
        ValueError: a setting that does not fit the candidate, or an unknown model.
    """
    settings, block = dict(candidate.settings), candidate.block
    model = block.removeprefix(MODEL) if block.startswith(MODEL) else budget.model
    check_model_name(model)
    try:
        config = replace(budget, model=model, **{key: settings.pop(key) for key in ('model_args',) if key in settings})
        ours = takes_genotype(config)
        if block.startswith(MODEL):
            how = 'model'
        elif is_code(block):
            how = 'insert'
            settings = {'start': 'paper', **settings} if ours and rule.how is None else settings
        else:
            how = rule.how or ('genotype' if ours else 'insert')
        if how == 'insert' and ours:  # without the model's own attention
            config = replace(config, model_args={**config.model_args, 'genotype': NONE})
        if how == 'insert' and block != NONE:
            require(config, not (config.compile and is_code(block)), 'compile', 'off for a class in a file')
            return replace(config, insert=block, **{**rule.insertion, **settings})
        wrong = {**settings, **(rule.insertion if how == 'genotype' else {})}
        if wrong:
            option = next(iter(wrong))
            if how == 'genotype':
                raise ValueError(
                    f'{model} takes blocks as genotype=, and {option} is a setting of insertion; leave it out, or '
                    f'insert the blocks (--as insert)'
                )
            raise ValueError(f'{option} is a setting of an inserted block, and here nothing is inserted')
        if how == 'genotype':
            config = replace(config, model_args={**config.model_args, 'genotype': block})
        return replace(config, compile=False) if block == NONE else config
    except (TypeError, ValueError) as error:
        raise ValueError(f'{shorten(candidate.name)} of the comparison: {error}') from error


def takes_genotype(config: TrainConfig) -> bool:
    """Whether the model of these settings takes the argument ``genotype=``."""
    if not timm.is_model(config.model) or not timm.model_entrypoint(config.model).__module__.startswith('sase_blocks.'):
        return False
    try:
        with torch.device('meta'):
            build_network(replace(config, model_args={**config.model_args, 'genotype': NONE}))
    except ValueError:
        return False
    return True


def check_candidates(
    candidates: Sequence[Candidate], budget: TrainConfig, rule: Rule | None = None
) -> dict[str, TrainConfig]:
    """The settings of each candidate's training, by name. Builds each network once, without weights.

    Raises:
        ValueError: equal names, a wrong setting, or a block that the model cannot be built with.
    """
    if budget.insert is not None or 'genotype' in budget.model_args:
        raise ValueError('the block is what a comparison varies: leave genotype and insert out of the settings')
    names = [candidate.name for candidate in candidates]
    configs, rule = {}, rule or Rule()
    for candidate in candidates:
        if names.count(name := candidate.name) > 1:
            raise ValueError(
                f'two blocks of the comparison have the name {quoted(name)}; LABEL=BLOCK gives another one'
            )
        configs[name] = config = configure(candidate, budget, rule)
        try:
            # The meta device computes nothing, but an insertion runs a forward.
            with torch.device('cpu' if config.insert else 'meta'):
                build_network(config, weights=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f'{shorten(name)} of the comparison: {error}') from error
    return configs
