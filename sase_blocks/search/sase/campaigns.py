"""Several searches and what they are worth: over seeds, on random labels, and from scratch against other blocks.

One command does it all; run again it continues, and run by several processes at once it shares the work (``tasks.py``).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from sase_blocks.runs import check_writable, is_main, write_text
from sase_blocks.search.halves import Arrays
from sase_blocks.search.significance import load_stats
from sase_blocks.search.tasks import run_tasks
from sase_blocks.train import TrainConfig

from .agreement import compare_searches, format_agreement
from .config import SearchConfig
from .evaluate import BASELINES, evaluate, format_table
from .result import read_result, write_result
from .run import search
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
    storage: str | None = None,
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
        storage: see ``run_tasks``; default: a SQLite file in ``config.out``. The study is called 'searches', in a
            database 'searches in OUT'.
        images: see ``search``.

    Returns:
        'genotype' (text), 'verdict' (a sentence: what of it was decided), 'searches' and 'null' (results by seed),
        'agreement' (None for a single search) and 'evaluation' (None without one).

    Raises:
        ValueError, OSError, ImportError, FloatingPointError: as ``search``, ``run_tasks`` and ``evaluate``.
    """
    seeds = [config.seed] if seeds is None else list(dict.fromkeys(seeds))
    if not seeds:
        raise ValueError('seeds is empty: give at least one')
    if evaluations:
        load_stats()  # before the searches
    out = Path(config.out)
    if len(seeds) == 1 and not null:
        searches = {seeds[0]: search(replace(config, seed=seeds[0]), images)}
        nulls: dict[int, dict[str, Any]] = {}
        agreement = None
        genotype, verdict = (searches[seeds[0]][name] for name in ('genotype', 'verdict'))
    else:
        searches, nulls = _searches(config, seeds, null, storage, images)
        agreement = compare_searches(list(searches.values()), list(nulls.values()) or None)
        genotype, verdict = agreement['genotype'], agreement['verdict']
        if is_main():
            write_text(out / 'agreement.json', json.dumps(agreement, indent=2) + '\n')
            found = {'genotype': genotype, 'genotypes': genotype.split('; '), 'verdict': verdict}
            write_result({**_common(searches), **found}, out)
            print(format_agreement(agreement), flush=True)
    evaluation = None
    if evaluations:
        by_seed = {f'seed-{seed}={result["genotype"]}' for seed, result in searches.items()}
        evaluation = evaluate(
            genotype,
            budget or evaluation_budget(config),
            baselines=[*baselines, *(sorted(by_seed) if len(searches) > 1 else [])],
            randoms=randoms,
            space=SearchSpace.parse(config.space),
            seeds=range(evaluations),
            storage=storage,
        )
        if is_main():
            print(format_table(evaluation), flush=True)
            _draw_evaluation(evaluation, out)
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
    config: SearchConfig, seeds: Sequence[int], null: bool, storage: str | None, images: Arrays | None
) -> tuple[dict[int, dict[str, Any]], dict[int, dict[str, Any]]]:
    out = Path(config.out)
    if is_main():
        check_writable(out)
    tasks: list[dict[str, Any]] = [
        {'key': f'{"null" if random else "seed"}-{seed}', 'seed': seed, 'null': random}
        for random in ([False, True] if null else [False])
        for seed in seeds
    ]

    def work(task: dict[str, Any]) -> dict[str, Any]:
        one = replace(config, seed=task['seed'], null=task['null'], out=str(out / task['key']), resume=True)
        return {'genotype': search(one, images)['genotype']}

    outcome = run_tasks(
        tasks,
        work,
        out / 'tasks.db' if storage is None else storage,
        f'searches in {config.out}' if '://' in str(storage) else 'searches',
        settings=_settings(config),
        describe=lambda task, result: str(result['genotype']),
        cpu=config.cpu,
    )
    if outcome.errors:
        key, text = next(iter(outcome.errors.items()))
        raise RuntimeError(f'{len(outcome.errors)} of {len(tasks)} searches failed; {key}: {text}')
    results = {task['key']: read_result(out / task['key']) for task in tasks}
    return (
        {seed: results[f'seed-{seed}'] for seed in seeds},
        {seed: results[f'null-{seed}'] for seed in seeds} if null else {},
    )


def _settings(config: SearchConfig) -> dict[str, Any]:
    """What all searches of one study have in common."""
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


def _draw_evaluation(evaluation: dict[str, Any], out: Path) -> None:
    try:
        from sase_blocks.viz import plot_evaluation, save_figure

        save_figure(plot_evaluation(evaluation), out / 'evaluation.png')
    except ImportError as error:
        print(f'no picture of the evaluation was drawn: {error}', flush=True)
