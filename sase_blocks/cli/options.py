"""Command-line options from the fields of a configuration class."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Mapping
from dataclasses import MISSING, Field, fields
from typing import Any

from sase_blocks.jobs import Ray
from sase_blocks.networks import NetworkConfig
from sase_blocks.reading import quoted
from sase_blocks.settings import RunConfig

__all__ = [
    'add_model_options',
    'add_network_options',
    'add_ray_options',
    'add_settings',
    'check_demo',
    'numbers',
    'ray_of',
]


def add_settings(
    parser: argparse.ArgumentParser, config: type[Any], leave_out: Collection[str] = (), *, given_only: bool = False
) -> None:
    """Add an option for each setting of a configuration class, with its default and help text.

    With ``given_only`` no option is required, and the parsed arguments have only those on the command line. Then
    'settings' has the names of all.
    """
    if given_only:
        parser.set_defaults(settings=[entry.name for entry in fields(config) if entry.name not in leave_out])
    kinds = {'int': int, 'float': float, 'str': str, 'list[int]': int}
    shared = RunConfig.__annotations__.keys() - config.__annotations__.keys()  # listed last
    for setting in sorted(fields(config), key=lambda entry: entry.name in shared):
        if setting.name == 'model_args' or setting.name in leave_out:
            continue
        option, kind = setting.name.replace('_', '-'), str(setting.type).split(' |')[0]
        text = setting.metadata['help'].replace('%', '%%')
        default = None if setting.default is MISSING else setting.default
        unset: Any = argparse.SUPPRESS if given_only else default
        if kind == 'bool':
            if default:
                parser.add_argument(
                    f'--no-{option}', dest=setting.name, action='store_false', default=unset, help=f'do not {text}'
                )
            else:
                parser.add_argument(f'--{option}', action='store_true', default=unset, help=text)
            continue
        parser.add_argument(
            f'--{option}',
            type=kinds[kind],
            nargs='+' if kind == 'list[int]' else None,
            required=setting.default is MISSING and not given_only,
            default=unset,
            choices=setting.metadata.get('choices'),
            metavar=None if setting.metadata.get('choices') else _metavar(setting),
            help=text if default in (None, '') else f'{text} (default: {default})',
        )


def add_model_options(parser: argparse.ArgumentParser, *, attention: bool = True) -> None:
    """Add the options that ``model_args.model_arguments`` reads."""
    parser.add_argument(
        '--model-args', nargs='+', default=[], metavar='KEY=VALUE', help='model arguments; values are JSON'
    )
    if attention:
        parser.add_argument(
            '--genotype',
            help="attention of our models: a block's name, maybe with options such as 'se(reduction=8)', a genotype as "
            "text or JSON, a search's .json file, or none",
        )
        parser.add_argument(
            '--attn-stages', type=int, nargs='+', metavar='N', help='stages of our models with attention (default: all)'
        )


def add_network_options(parser: argparse.ArgumentParser, leave_out: Collection[str] = ()) -> None:
    """Add the options that ``network.take_network`` reads: the settings of ``NetworkConfig``."""
    add_settings(parser, NetworkConfig, leave_out, given_only=True)
    add_model_options(parser)


def check_demo(config: type[Any], given: Mapping[str, Any]) -> None:
    """Raise a ValueError for an option that ``--demo`` would ignore. It accepts only --out and --seed."""
    defaults = {entry.name: entry.default for entry in fields(config)}
    for name, value in given.items():
        default = defaults.get(name)
        if name not in ('out', 'seed') and value != default and (value or default is True):
            option = ('no-' if default is True else '') + name.replace('_', '-')
            raise ValueError(f'--demo has its own settings, and accepts only --out and --seed: leave out --{option}')


def numbers(text: str) -> list[int]:
    """The numbers of --seeds. Raises ValueError for anything else."""
    try:
        return [int(part) for part in text.split(',') if part.strip()]
    except ValueError:
        raise ValueError(f'--seeds takes comma-separated numbers, such as 0,1,2, got {quoted(text)}') from None


def add_ray_options(parser: argparse.ArgumentParser, what: str) -> None:
    """Add the options that ``ray_of`` reads; ``what`` runs on Ray."""
    group = parser.add_argument_group('many machines')
    group.add_argument(
        '--ray',
        metavar='ADDRESS',
        help=f"run {what} on a Ray cluster: 'auto' for this machine's, HOST:PORT, or 'local' to start one here",
    )
    group.add_argument('--ray-gpus', type=float, metavar='X', help='GPUs per run (default: 1 if there are any)')
    group.add_argument(
        '--ray-retries', type=int, default=3, metavar='N', help='retries after a machine fails (default: 3)'
    )


def ray_of(address: str | None, gpus: float | None, retries: int, cpu: bool) -> Ray | None:
    """The Ray cluster of the options; None without them."""
    if address is None:
        if gpus is not None:
            raise ValueError('--ray-gpus needs --ray ADDRESS; pass both, or neither')
        return None
    return Ray(address, 0 if cpu and gpus is None else gpus, retries)


def _metavar(setting: Field[Any]) -> str:
    named = {
        'data': 'DIR',
        'out': 'DIR',
        'model': 'NAME',
        'dataset': 'NAME',
        'checkpoint': 'FILE',
        'insert': 'BLOCK',
        'where': 'PATTERN',
    }
    return named.get(
        setting.name, 'X' if 'float' in str(setting.type) else 'N' if 'int' in str(setting.type) else 'TEXT'
    )
