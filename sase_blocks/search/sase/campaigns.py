"""Several searches and what they are worth: over seeds, on random labels, and from scratch against other blocks.

One command does it all, and run again it does what is missing (``jobs.py``).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch

from sase_blocks.data import Samples, name_data
from sase_blocks.jobs import Ray, job_folder, run_jobs
from sase_blocks.runs import check_writable, drop_broken, is_main, open_accelerator, say, write_text
from sase_blocks.search.data import Arrays, find_samples
from sase_blocks.search.significance import load_stats
from sase_blocks.train import TrainConfig, build_model
from sase_blocks.viz import missing_matplotlib, plot_evaluation, save_figure

from .agreement import compare_searches, format_agreement
from .comparison import format_table
from .config import SearchConfig
from .evaluate import BASELINES, check_evaluation, evaluate
from .result import read_result, write_result
from .searching import saved_search, search
from .space import SearchSpace

__all__ = ['campaign', 'evaluation_budget']


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

    A single search writes into ``config.out``, several ones into ``seed-S`` and ``null-S`` in it. In ``config.out``
    there are then ``genotype.json`` (of several searches their majority), ``agreement.json``, ``evaluation.json``.

    Args:
        config: of each search; its seed is the only one unless ``seeds`` is given.
        seeds: of the searches.
        null: search on random labels as well, once a seed, and name the operations that win there, too.
        budget: the from-scratch training; default: ``evaluation_budget(config)``.
        evaluations: from-scratch trainings of each candidate, with the seeds 0, 1, ...; 0 for no comparison.
        baselines, randoms: see ``evaluate``.
        ray: the machines on which several searches, and trainings, run. Default: one after another in this process. A
            single search always runs in this process.
        images: see ``search``.

    Returns:
        'genotype' (text), 'verdict' (a sentence: what of it was decided), 'searches' and 'null' (results by seed),
        'agreement' (None for a single search) and 'evaluation' (None without one).

    Raises:
        ValueError, OSError, ImportError, FloatingPointError: as ``search``, ``run_jobs`` and ``evaluate``.
        RuntimeError: a search or a training has failed, after the others are done; the text names it and its error.
    """
    seeds = [config.seed] if seeds is None else list(dict.fromkeys(seeds))
    if not seeds:
        raise ValueError('seeds is empty: give at least one')
    configs = {seed: replace(config, seed=seed) for seed in seeds}  # which checks each seed
    out, single = Path(config.out), len(seeds) == 1 and not null
    if ray is not None and single and not evaluations:
        raise ValueError(
            '--ray is for several runs at once: ask for more --seeds, for --null or --evaluate, or leave it'
        )
    if is_main():
        check_writable(out)
    if single:
        saved_search(configs[seeds[0]])
    data = None
    if evaluations:
        load_stats()  # before the searches
        budget = budget or evaluation_budget(config)
        space = SearchSpace.parse(config.space)
        # The first block of the space stands in for what the searches are to find.
        found = _stand_in(config, space)
        candidates = [*baselines, *(_named(dict.fromkeys(seeds, found)) if len(seeds) > 1 else [])]
        data = check_evaluation(found, budget, baselines=candidates, randoms=randoms, space=space, ray=ray)
    given: Arrays | Samples | None = images
    if images is None and (data or not single):
        given = data[0] if data else _checked(config)
    if single:
        searches = {seeds[0]: search(configs[seeds[0]], given)}
        nulls: dict[int, dict[str, Any]] = {}
        agreement = None
        genotype, verdict = (searches[seeds[0]][name] for name in ('genotype', 'verdict'))
    else:
        searches, nulls = _searches(config, seeds, null, ray, given)
        agreement = compare_searches(list(searches.values()), list(nulls.values()) or None)
        genotype, verdict = agreement['genotype'], agreement['verdict']
        if is_main():
            write_text(out / 'agreement.json', json.dumps(agreement, indent=2) + '\n')
            chosen = {'genotype': genotype, 'genotypes': agreement['genotypes'], 'verdict': verdict}
            write_result({**_common(searches), **chosen}, out)
            say(format_agreement(agreement))
    evaluation = None
    if evaluations:
        assert budget is not None
        each = {seed: result['genotype'] for seed, result in searches.items()}
        evaluation = evaluate(
            genotype,
            budget,
            baselines=[*baselines, *(_named(each) if len(searches) > 1 else [])],
            randoms=randoms,
            space=SearchSpace.parse(config.space),
            seeds=range(evaluations),
            ray=ray,
            data=data,
        )
        if is_main():
            say(format_table(evaluation))
            if missing_matplotlib() is None:  # which the searches have said
                save_figure(plot_evaluation(evaluation), out / 'evaluation.png')
        if evaluation['errors']:
            key, text = next(iter(evaluation['errors'].items()))
            raise RuntimeError(
                f'{len(evaluation["errors"])} jobs of the evaluation failed; the first one, {key}: {text}'
            )
    return {
        'genotype': genotype,
        'verdict': verdict,
        'searches': {str(seed): result for seed, result in searches.items()},
        'null': {str(seed): result for seed, result in nulls.items()},
        'agreement': agreement,
        'evaluation': evaluation,
    }


def evaluation_budget(config: SearchConfig, epochs: int | None = None, lr: float = 0.1) -> TrainConfig:
    """From-scratch training on the data of a search, with its model, batch size and length unless told otherwise."""
    common = {f.name for f in fields(TrainConfig)} & {f.name for f in fields(SearchConfig)}
    shared = {
        name: getattr(config, name)
        for name in common - {'out', 'epochs', 'lr', 'resume', 'weight_decay', 'clip_grad', 'compile'}
    }
    return TrainConfig(
        **shared,
        out=str(Path(config.out) / 'evaluation'),
        epochs=config.epochs if epochs is None else epochs,
        lr=lr,
        weight_decay=config.weight_decay,
        clip_grad=config.clip_grad,
    )


def _searches(
    config: SearchConfig, seeds: Sequence[int], null: bool, ray: Ray | None, images: Arrays | Samples | None
) -> tuple[dict[int, dict[str, Any]], dict[int, dict[str, Any]]]:
    out = Path(config.out)
    jobs: list[dict[str, Any]] = [
        {'key': f'{"null" if random else "seed"}-{seed}', 'seed': seed, 'null': random}
        for random in ([False, True] if null else [False])
        for seed in seeds
    ]

    def work(job: dict[str, Any]) -> dict[str, Any]:
        folder = str(job_folder(out, job['key']))
        one = replace(config, seed=job['seed'], null=job['null'], out=folder, resume=True)
        return {'genotype': search(one, images)['genotype']}

    run_jobs(
        jobs,
        work,
        out,
        settings={**_settings(config), **({'images': name_data(images)} if isinstance(images, Samples) else {})},
        describe=lambda job, result: str(result['genotype']),
        ray=ray,
        cpu=config.cpu,
    ).check('searches')
    results = {job['key']: read_result(job_folder(out, job['key'])) for job in jobs}
    return (
        {seed: results[f'seed-{seed}'] for seed in seeds},
        {seed: results[f'null-{seed}'] for seed in seeds} if null else {},
    )


def _settings(config: SearchConfig) -> dict[str, Any]:
    """What all searches of one command have in common."""
    own = {'seed', 'null'}
    different = {f.name for f in fields(config) if f.metadata.get('free') or f.metadata.get('place')}
    return {name: value for name, value in asdict(config).items() if name not in own | different}


def _common(results: dict[int, dict[str, Any]]) -> dict[str, Any]:
    first = next(iter(results.values()))
    return {
        **{name: first[name] for name in ('space', 'settings', 'data', 'versions', 'machine')},
        'seeds': list(results),
        'searches': {str(seed): result['genotype'] for seed, result in results.items()},
    }


def _named(genotypes: dict[int, str]) -> list[str]:
    """What the search of each seed found, as baselines of the evaluation."""
    return sorted({f'seed-{seed}={genotype}' for seed, genotype in genotypes.items()})


def _stand_in(config: SearchConfig, space: SearchSpace) -> str:
    """A result that a search might have, in its form: one genotype, or one for each stage."""
    genotype = str(space.genotype(torch.zeros(sum(space.sizes))))
    if not config.per_stage:
        return genotype
    with torch.device('meta'):
        info: Any = build_model(config.model, None, **config.model_args).feature_info
    return '; '.join([genotype] * (len(info) - 1))


def _checked(config: SearchConfig) -> Samples:
    """The training split without broken images, decoded once for all searches of this process."""
    with open_accelerator(config, 'a search', 'search') as accelerator:
        return drop_broken(config.skip_broken, accelerator, find_samples(config, accelerator))[0]
