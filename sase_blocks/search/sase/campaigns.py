"""Several searches and their verdicts: over seeds, on random labels, and from scratch against other blocks.

One command does it all. The same command again runs only what is missing (``jobs.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sase_blocks.comparing import check_candidates, check_errors, format_comparison, open_comparison
from sase_blocks.comparing.significance import load_stats
from sase_blocks.data import Samples, name_data
from sase_blocks.jobs import Ray, job_folder, run_jobs
from sase_blocks.networks import build_model
from sase_blocks.runs import check_writable, drop_broken, is_main, open_accelerator, open_samples, say, write_json
from sase_blocks.search.data import Arrays
from sase_blocks.settings import fixed_settings, shared_settings
from sase_blocks.train import TrainConfig
from sase_blocks.viz import missing_matplotlib, plot_comparison, save_figure

from .agreement import compare_searches, format_agreement
from .config import SearchConfig
from .evaluation import BASELINES, evaluate, list_candidates
from .result import RESULT, read_result
from .searching import saved_search, search
from .space import SearchSpace


def campaign(
    config: SearchConfig,
    *,
    seeds: Sequence[int] | None = None,
    null: bool = False,
    budget: TrainConfig | None = None,
    evaluations: int = 0,
    baselines: Sequence[str] = BASELINES,
    randoms: int = 0,
    ray: Ray | None = None,
    images: Arrays | None = None,
) -> dict[str, Any]:
    """Search with each seed, on random labels if asked, compare the results, and train the found block from scratch.

    A single search writes to ``config.out``, several write to ``seed-S`` and ``null-S`` in it. ``config.out`` then
    holds ``genotype.json`` (of several searches the consensus), ``agreement.json`` and ``evaluation/``.

    Args:
        config: of each search. Its seed is the only one unless ``seeds`` is given.
        null: also search on random labels, once per seed, and report which operations win there, too.
        budget: the from-scratch training. Default: ``evaluation_budget(config)``.
        evaluations: from-scratch trainings of each candidate, with seeds 0, 1, ...; 0 for no comparison.
        baselines, randoms: see ``evaluate``.
        ray: the machines for several searches, and for trainings. Default: one after another in this process. A single
            search always runs in this process.
        images: see ``search``.

    Returns:
        'genotype' (text), 'verdict' (a sentence on what was decided), 'searches' and 'null' (results by seed),
        'agreement' (None for a single search) and 'evaluation' (None without one).

    Raises:
        ValueError, OSError, ImportError, FloatingPointError: as ``search``, ``run_jobs`` and ``evaluate``.
        RuntimeError: a search or a training failed; raised after the others are done, with the first one and its error.
    """
    seeds = [config.seed] if seeds is None else list(dict.fromkeys(seeds))
    if not seeds:
        raise ValueError('seeds is empty: give at least one')
    configs = [replace(config, seed=seed) for seed in seeds]  # which checks each seed
    out, single = Path(config.out), len(seeds) == 1 and not null
    if ray is not None and single and not evaluations:
        raise ValueError(
            '--ray is for several runs at once: ask for more --seeds, for --null or --evaluate, or leave it'
        )
    if is_main():
        check_writable(out)
    if single:
        saved_search(configs[0])
    space, data = SearchSpace.parse(config.space), None
    if evaluations:
        load_stats()  # before the searches
        budget = budget or evaluation_budget(config)
        stand_in = _stand_in(config, space)
        candidates = [*baselines, *_name_found(dict.fromkeys(map(str, seeds), stand_in))]
        check_candidates(list_candidates(stand_in, candidates, randoms, space), budget)
        data = open_comparison(budget, ray)
    given: Arrays | Samples | None = images or (data[0] if data else None)
    if given is None and not single:  # decode the images once for all searches of this process
        with open_accelerator(config, 'a search', 'search') as accelerator:
            (given,) = drop_broken(config.skip_broken, accelerator, *open_samples(config, accelerator, both=False))
    agreement = None
    if single:
        result = search(configs[0], given)
        searches, nulls = {str(seeds[0]): result}, {}
    else:
        searches, nulls = _searches(config, seeds, null, ray, given)
        result = agreement = compare_searches(list(searches.values()), list(nulls.values()))
        if is_main():
            write_json(out / 'agreement.json', agreement)
            first = next(iter(searches.values()))
            consensus = {
                **{name: first[name] for name in ('space', 'settings', 'data', 'versions', 'machine')},
                **{name: agreement[name] for name in ('genotype', 'genotypes', 'verdict')},
                'seeds': seeds,
                'searches': {seed: one['genotype'] for seed, one in searches.items()},
            }
            write_json(out / RESULT, consensus)
            say(format_agreement(agreement))
    evaluation = None
    if evaluations:
        assert budget is not None
        evaluation = evaluate(
            result['genotype'],
            budget,
            baselines=[*baselines, *_name_found({seed: one['genotype'] for seed, one in searches.items()})],
            randoms=randoms,
            space=space,
            seeds=range(evaluations),
            ray=ray,
            data=data,
        )
        if is_main():
            say(format_comparison(evaluation))
            if missing_matplotlib() is None:  # which the searches have said
                save_figure(plot_comparison(evaluation), out / 'evaluation.png')
        check_errors(evaluation)
    return {
        'genotype': result['genotype'],
        'verdict': result['verdict'],
        'searches': searches,
        'null': nulls,
        'agreement': agreement,
        'evaluation': evaluation,
    }


def evaluation_budget(config: SearchConfig, epochs: int | None = None, lr: float = 0.1) -> TrainConfig:
    """From-scratch training with the settings of a search, except for the learning rate and, if given, the epochs."""
    shared = shared_settings(config, TrainConfig, leave_out=('out', 'epochs', 'lr', 'resume', 'compile'))
    out = str(Path(config.out) / 'evaluation')
    return TrainConfig(**shared, out=out, epochs=config.epochs if epochs is None else epochs, lr=lr)


def _searches(
    config: SearchConfig, seeds: Sequence[int], null: bool, ray: Ray | None, images: Arrays | Samples | None
) -> list[dict[str, dict[str, Any]]]:
    """The results by seed, and those on random labels."""
    out = Path(config.out)
    jobs: list[dict[str, Any]] = [{'key': f'seed-{seed}', 'seed': seed, 'null': False} for seed in seeds]
    jobs += [{'key': f'null-{seed}', 'seed': seed, 'null': True} for seed in seeds if null]

    def work(job: dict[str, Any]) -> dict[str, Any]:
        folder = str(job_folder(out, job['key']))
        one = replace(config, seed=job['seed'], null=job['null'], out=folder, resume=True)
        return {'genotype': search(one, images)['genotype']}

    settings = {name: value for name, value in fixed_settings(config).items() if name not in ('seed', 'null')}
    if isinstance(images, Samples):
        settings['images'] = name_data(images)

    def describe(job: dict[str, Any], result: dict[str, Any]) -> str:
        return str(result['genotype'])

    run_jobs(jobs, work, out, settings=settings, describe=describe, ray=ray, cpu=config.cpu).check('searches')
    return [
        {str(job['seed']): read_result(job_folder(out, job['key'])) for job in jobs if job['null'] == random}
        for random in (False, True)
    ]


def _name_found(genotypes: dict[str, str]) -> list[str]:
    """The results of several searches, by seed, as baselines of the evaluation."""
    return sorted({f'seed-{seed}={genotype}' for seed, genotype in genotypes.items()}) if len(genotypes) > 1 else []


def _stand_in(config: SearchConfig, space: SearchSpace) -> str:
    """The first block of the space in the form of a search's result: one genotype, or one for each stage."""
    genotype = str(space.genotype(torch.zeros(sum(space.sizes))))
    if not config.per_stage:
        return genotype
    with torch.device('meta'):
        info: Any = build_model(config.model, None, **config.model_args).feature_info
    return '; '.join([genotype] * (len(info) - 1))
