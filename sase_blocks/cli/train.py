"""``sase-blocks train``: settings from options, a file and the run to resume; then the training and its pictures."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from sase_blocks.networks import is_code
from sase_blocks.reading import parse_file, parse_toml, quoted, shorten
from sase_blocks.runs import is_main, say, settings_of_run
from sase_blocks.settings import data_title
from sase_blocks.train import TrainConfig, train
from sase_blocks.viz import missing_matplotlib, plot_confusion, plot_learning_curves, save_figure

from .model_args import model_arguments

__all__ = ['run_train']

# What a value of a file must be, by the type of its setting.
KINDS: dict[str, tuple[tuple[type[Any], ...], str]] = {
    'bool': ((bool,), 'true or false'),
    'int': ((int,), 'a whole number'),
    'float': ((int, float), 'a number'),
    'str': ((str,), 'a text'),
    'list[int]': ((list, int), 'a list of whole numbers'),
    'dict[str, Any]': ((dict,), 'a table'),
}
WORDS = {'None': None, 'True': True, 'False': False}  # as in --model-args; TOML has no null


def run_train(config: str | None, **options: Any) -> None:
    arguments = model_arguments(options.pop('model_args'), options.pop('genotype'), options.pop('attn_stages'))
    given = _read(config) if config is not None else {}
    arguments = {**given.get('model_args', {}), **arguments}
    given |= options
    if arguments:
        given['model_args'] = arguments
    missing = ''
    if given.get('resume'):
        # The run's settings. A given one that differs is an error of `train`.
        out = given.get('out', next(entry.default for entry in fields(TrainConfig) if entry.name == 'out'))
        saved = settings_of_run(TrainConfig, out)
        if is_code(saved.get('insert') or '') and 'insert' not in given:
            raise ValueError(
                f'the run in {out} inserts {saved["insert"]}, code that no checkpoint runs by itself: if you trust '
                f'that file, name it, --insert {saved["insert"]}'
            )
        given = {**saved, 'model_args': _words(saved.get('model_args', {})), **given}
        missing = f', and there is no run to resume in {out}'
    if 'data' not in given:
        raise ValueError(f'--data DIR is missing{missing}: pass a folder with train/CLASS/* and val/CLASS/* in it')
    settings = TrainConfig(**given)
    result = train(settings)
    if is_main():
        pictures = _draw(settings, result)
        say(
            f'finished: accuracy {result["acc1"]:.2f} % after epoch {result["epochs"]}, '
            f'best {result["best_acc1"]:.2f} % after epoch {result["best_epoch"]}; '
            f'weights in {result["checkpoint"]} and in best.pt in the same folder{pictures}'
        )


def _read(file: str) -> dict[str, Any]:
    """The settings of a TOML file."""
    values = parse_file(file, 'settings', parse_toml)
    kinds = {entry.name: str(entry.type).split(' |')[0] for entry in fields(TrainConfig)}
    known = {**kinds, 'genotype': 'str', 'attn_stages': 'list[int]'}
    for name, value in values.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ', `sase-blocks train --help` lists all (with _ for -)'
            raise ValueError(f'{file}: there is no setting {quoted(name)}{hint}')
        types, expected = KINDS[known[name]]
        items = value if isinstance(value, list) and known[name] == 'list[int]' else [value]
        if not all(isinstance(item, types) and isinstance(item, bool) <= (bool in types) for item in items):
            raise ValueError(f'{file}: {name} must be {expected}, got {quoted(value)}')
    shorthand = {name: values.pop(name) for name in ('genotype', 'attn_stages') if name in values}
    if shorthand or 'model_args' in values:
        values['model_args'] = {**_words(values.get('model_args', {})), **shorthand}
    return values


def _words(value: Any) -> Any:
    """A value of ``model_args`` with the texts of ``WORDS`` replaced."""
    if isinstance(value, dict):
        return {key: _words(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_words(item) for item in value]
    return WORDS.get(value, value) if isinstance(value, str) else value


def _draw(config: TrainConfig, result: Mapping[str, Any]) -> str:
    """Draw the learning curves and the confusion matrix. -> the end of a message about it."""
    if missing_matplotlib() is not None:
        return '; for curves.png and confusion.png, pip install "sase-blocks[viz]" and run it again with --resume'
    block = config.insert or ''
    block = Path(block).name if is_code(block) else block
    what = config.model + (f' with {shorten(block, 60)}' if block else '')
    figures = {'curves.png': plot_learning_curves({f'{what}, seed {config.seed}': result['history']})}
    if result['confusion'] is not None:
        data = data_title(config.dataset or config.data)
        title = (
            f'{what}, seed {config.seed}, after epoch {result["epochs"]}\n'
            f'validation images of {data}, accuracy {result["acc1"]:.2f} %'
        )
        figures['confusion.png'] = plot_confusion(result['confusion'], result['classes'], title)
    for name, figure in figures.items():
        save_figure(figure, Path(config.out) / name)
    return f', pictures in {" and ".join(figures)}'
