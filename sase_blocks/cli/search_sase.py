"""``sase-blocks search sase``: find an attention block on your own data."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from sase_blocks.runs import is_main, say

from .model_args import model_arguments
from .options import add_model_options, add_ray_options, add_settings, check_demo, numbers, ray_of

__all__ = ['add_sase']

EXAMPLES = """
examples:
  sase-blocks search sase --demo                                two minutes on handwritten digits
  sase-blocks search sase --data DIR --out runs/search          the paper's settings, first order, fair mixing
  sase-blocks search sase --data DIR --order 2 --paper-mixing   the search as the paper describes it
  sase-blocks search sase --data DIR --out runs/search ... --resume
  sase-blocks search sase --data DIR --space 'channel_excite=mlp,mlp(reduction=4),affine; gate_excite=affine'
  sase-blocks search sase --data DIR --seeds 0,1,2,3 --null --evaluate 5 --random 19
  sase-blocks search sase --data DIR --seeds 0,1,2,3 --null --evaluate 5 --ray auto
  torchrun --nproc-per-node 8 -m sase_blocks search sase --data DIR ...

DIR holds train/CLASS/*.jpg. Only --evaluate also reads val/CLASS/*.jpg (or validation/ or test/). The result is
genotype.json in --out: timm.create_model('resnet50_sase', genotype='runs/search/genotype.json').
Seeds, null searches and evaluations are separate runs. The same command runs only the missing ones, and --ray runs them
in parallel on many GPUs and machines.
"""


def add_sase(
    command: Callable[..., argparse.ArgumentParser],
) -> None:
    """Add the command's parser; ``command(name, run, help, epilog, parent)`` makes one."""
    from sase_blocks.search.sase.config import SearchConfig
    from sase_blocks.search.sase.evaluation import BASELINES

    sub = command('sase', _search_sase, 'search for the six operations of a SASE block', EXAMPLES)
    add_settings(sub, SearchConfig, leave_out=('null', 'data'))
    sub.add_argument('--data', metavar='DIR', help='folder with train/CLASS/* in it, or the root of --dataset')
    add_model_options(sub, attention=False)
    sub.add_argument('--demo', action='store_true', help='a small search on handwritten digits, with its own settings')
    trust = sub.add_argument_group('trust')
    trust.add_argument('--seeds', metavar='N,N,...', help='search with each of these seeds and report where they agree')
    trust.add_argument('--null', action='store_true', help='also search on random labels, and report what wins there')
    trust.add_argument(
        '--evaluate', type=int, default=0, metavar='N', help='train the found block from scratch with N seeds'
    )
    trust.add_argument('--evaluate-epochs', type=int, metavar='N', help="its epochs (default: the search's)")
    trust.add_argument('--evaluate-lr', type=float, metavar='X', help='its learning rate (default: 0.1)')
    trust.add_argument(
        '--baselines',
        nargs='+',
        metavar='BLOCK',
        help=f'blocks or genotypes to compare with (default: {",".join(BASELINES)})',
    )
    trust.add_argument('--random', type=int, default=0, metavar='N', help='random genotypes to compare with')
    add_ray_options(sub, 'several searches, and trainings from scratch,')


def _search_sase(
    demo: bool,
    data: str | None,
    model_args: Sequence[str],
    seeds: str | None,
    null: bool,
    evaluate: int,
    evaluate_epochs: int | None,
    evaluate_lr: float | None,
    baselines: Sequence[str] | None,
    random: int,
    ray: str | None,
    ray_gpus: float | None,
    ray_retries: int,
    **settings: Any,
) -> None:
    from sase_blocks.comparing import split_blocks
    from sase_blocks.search.sase.campaigns import campaign, evaluation_budget
    from sase_blocks.search.sase.config import SearchConfig
    from sase_blocks.search.sase.evaluation import BASELINES

    evaluation: dict[str, Any] = {
        'random': random or None,
        'evaluate-epochs': evaluate_epochs,
        'evaluate-lr': evaluate_lr,
        'baselines': baselines,
    }
    if demo:
        runs = {'seeds': seeds, 'null': null, 'evaluate': evaluate, 'ray': ray, 'ray_gpus': ray_gpus}
        check_demo(SearchConfig, {'data': data, 'model_args': model_args, **runs, **evaluation, **settings})
        from sase_blocks.demo import run_search_demo

        run_search_demo(settings['out'], seed=settings['seed'])
        return
    if data is None:
        raise ValueError('--data DIR is missing: pass a folder with train/CLASS/* in it, or use --demo')
    for name, value in (('evaluate', evaluate), ('random', random)):
        if value < 0:
            raise ValueError(f'--{name} must be at least 0, got {value}')
    for name, given in evaluation.items():
        if given is not None and not evaluate:
            raise ValueError(f'--{name} is for the evaluation and needs --evaluate N; pass both, or neither')
    config = SearchConfig(data=data, model_args=model_arguments(model_args, None, None), **settings)
    budget = None
    if evaluate:
        budget = evaluation_budget(config, evaluate_epochs, **({} if evaluate_lr is None else {'lr': evaluate_lr}))
    result = campaign(
        config,
        seeds=None if seeds is None else numbers(seeds),
        null=null,
        budget=budget,
        evaluations=evaluate,
        baselines=BASELINES if baselines is None else split_blocks(baselines),
        randoms=random,
        ray=ray_of(ray, ray_gpus, ray_retries, config.cpu),
    )
    if is_main():
        say(f'found: {result["genotype"]}\n{result["verdict"]}\nwritten: {config.out}/genotype.json')
