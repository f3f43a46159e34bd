"""``sase-blocks compare``: which block is worth it on your images?"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

from sase_blocks.runs import is_main, say

from .model_args import model_arguments
from .options import add_model_options, add_ray_options, add_settings, numbers, ray_of

__all__ = ['add_compare']

EXAMPLES = """
examples:
  sase-blocks compare --data DIR --model resnet18 --pretrained --blocks none,se,eca,cbam,coord,sase --seeds 0,1,2,3,4
  sase-blocks compare --data DIR --model resnet20_cifar --blocks 'none,se(reduction=4),mine=runs/search/genotype.json'
  sase-blocks compare --data DIR --model resnet18 --checkpoint weights.pth --blocks none,sase,sase@start=paper
  sase-blocks compare --data DIR --model resnet50 --blocks none,model:resnet50d,se --reference none
  sase-blocks compare --data DIR ... --seeds 0,1,2,3,4,5,6,7     the same command with more seeds, or more blocks
  sase-blocks compare --data DIR ... --budget-hours 8            for tonight; the same command goes on tomorrow
  sase-blocks compare --data DIR ... --ray auto                  the trainings on many GPUs and machines

All blocks have the same budget, seeds and batches, and are compared seed by seed. A block is a name, maybe with
options, a genotype as text, a search's genotype.json, FILE.py:CLASS, whose code then runs, or model:NAME, another model
as it is. LABEL=BLOCK gives it a name, and BLOCK@SETTING=VALUE a setting of its own: start, where, stages, layout,
insert_lr or model_args.
"""


def add_compare(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the command's parser; ``command(name, run, help, epilog)`` makes one."""
    from sase_blocks.comparing import CompareConfig

    sub = command('compare', _compare, 'train blocks with one budget and several seeds, and compare them', EXAMPLES)
    add_settings(sub, CompareConfig, leave_out=('seed', 'resume', 'insert'))
    add_model_options(sub, attention=False)
    asked = sub.add_argument_group('comparison')
    asked.add_argument(
        '--blocks', nargs='+', required=True, metavar='BLOCK', help='the blocks, separated by commas or spaces'
    )
    asked.add_argument('--seeds', default='0,1,2', metavar='N,N,...', help='seeds of the trainings (default: 0,1,2)')
    asked.add_argument(
        '--reference', default='none', metavar='NAME', help='compare the other blocks with this one (default: none)'
    )
    asked.add_argument(
        '--as',
        dest='how',
        choices=('genotype', 'insert'),
        help="pass blocks as the model's genotype=, or insert them (default: genotype for models that take it)",
    )
    asked.add_argument(
        '--difference',
        type=float,
        default=0.5,
        metavar='X',
        help='say how many seeds would show this difference, in percentage points (default: 0.5)',
    )
    asked.add_argument(
        '--budget-hours',
        type=float,
        metavar='X',
        help='start no training after this time; only seeds that are complete for all blocks then count',
    )
    add_ray_options(sub, 'trainings')


def _compare(
    model_args: Sequence[str],
    blocks: Sequence[str],
    seeds: str,
    reference: str,
    how: str | None,
    difference: float,
    budget_hours: float | None,
    ray: str | None,
    ray_gpus: float | None,
    ray_retries: int,
    **settings: Any,
) -> None:
    from sase_blocks.comparing import (
        INSERTION,
        CompareConfig,
        Rule,
        check_errors,
        compare,
        format_comparison,
        parse_candidate,
        split_blocks,
        write_results,
    )

    defaults = {entry.name: entry.default for entry in fields(CompareConfig)}
    inserting = {name: value for name in INSERTION if (value := settings.pop(name)) != defaults[name]}
    budget = CompareConfig(model_args=model_arguments(model_args, None, None), **settings)
    result = compare(
        [parse_candidate(text) for text in split_blocks(blocks)],
        budget,
        reference=reference,
        seeds=numbers(seeds),
        rule=Rule(how, inserting),
        difference=difference,
        ray=ray_of(ray, ray_gpus, ray_retries, budget.cpu),
        hours=budget_hours,
    )
    if is_main():
        files = write_results(result, budget.out)
        say(f'{format_comparison(result)}\n\nwritten: {", ".join(map(str, files))}')
    check_errors(result)
