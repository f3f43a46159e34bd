"""Is the found block better than others? All of them trained from scratch under one budget and several seeds.

The paper reports the accuracy of one run of the mixture; nothing in it says how far a found block is above a random one
of its space, or above the spread over seeds. This comparison is ours. It takes the accuracy after the last epoch,
never the best epoch's, and chooses nothing by it. ``comparison.py`` compares the results.
"""

from __future__ import annotations

import contextlib
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import timm
import torch

from sase_blocks import models  # noqa: F401  # registers our models with timm
from sase_blocks.blocks import Genotype
from sase_blocks.data import Samples, derive_seed, image_config, name_data
from sase_blocks.jobs import Ray, check_jobs, job_folder, run_jobs
from sase_blocks.profiling import count_macs, milliseconds_per_image
from sase_blocks.reading import quoted, shorten
from sase_blocks.runs import check_writable, environment, is_main, open_accelerator, write_text
from sase_blocks.search.significance import load_stats
from sase_blocks.train import ADVICE, TrainConfig, build_model, check_model_name, checked_samples, open_samples, train

from .comparison import compare, format_table
from .space import SearchSpace

__all__ = ['BASELINES', 'check_evaluation', 'evaluate', 'format_table', 'random_genotypes']

BASELINES = ('none', 'se', 'eca', 'cbam', 'sase')
RANDOM = 103  # the stream of random numbers (data.derive_seed) for random genotypes


def evaluate(
    found: str,
    budget: TrainConfig,
    *,
    baselines: Sequence[str] = BASELINES,
    randoms: int = 0,
    space: SearchSpace | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    random_seed: int = 0,
    data: tuple[Samples, Samples] | None = None,
    ray: Ray | None = None,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Train the found block, the baselines and random genotypes from scratch, and compare them.

    Each training and each measurement of costs is a job of ``run_jobs``: a call that was stopped continues. More
    baselines, random genotypes or seeds may be added to a finished evaluation.

    Args:
        found: the genotype, as text; several with semicolons between them are one for each stage.
        budget: the settings of all trainings but the seed and the genotype; its model is one with a ``genotype=``
            argument, its ``out`` the folder for everything. Its validation split is what is reported, so let it be one
            that the search has not seen.
        baselines: blocks of ``list_blocks()``, 'none', or genotypes; ``'LABEL=GENOTYPE'`` gives one a name.
        randoms: how many random genotypes, all different and none the found one.
        space: of the random genotypes; the paper's by default.
        seeds: of the trainings, the same for all.
        random_seed: of the draw of the random genotypes; more of them begin with the same ones.
        data: what ``check_evaluation`` returned; by default it is called here.
        ray, say: see ``run_jobs``.

    Returns:
        What ``evaluation.json`` in ``budget.out`` holds: 'candidates', a list of dicts with name, kind ('found',
        'baseline', 'random'), genotype, 'accuracies' by seed (per cent, after the last epoch), 'mean', 'spread' (sample
        standard deviation), 'min', 'max', 'difference' (mean over the common seeds of this block's accuracy minus the
        found block's), 'interval' (its 95 % interval, [low, high]), 'p' and 'p_adjusted' (of baselines, see
        ``compare``), 'parameters', 'macs', 'ms_per_image', 'time_ratio' (to no attention, measured in turns);
        'verdicts', sentences; 'test', how they came about; 'rank', of the found block among the random ones: 'place',
        'of', and 'p', how often a block drawn at random would have that place or a better one; 'errors' of jobs that
        failed; the settings. Unknown values, such as a spread over one seed, are None.

    Raises:
        ImportError: the extra ``train`` or ``search`` is missing.
        ValueError, FileNotFoundError: a wrong genotype, setting, or data; before any work.
        OSError: ``budget.out`` cannot be written.
        RuntimeError: every training has failed.
    """
    load_stats()
    candidates = _candidates(found, budget, baselines, randoms, space, random_seed)
    seeds = list(dict.fromkeys(seeds))
    if not seeds:
        raise ValueError('seeds is empty: an evaluation needs at least one seed')
    out = Path(budget.out)
    samples = data or check_evaluation(
        found, budget, baselines=baselines, randoms=randoms, space=space, random_seed=random_seed, ray=ray
    )
    trainings: list[dict[str, Any]] = [
        {'key': f'{c["name"]}, seed {seed}', 'name': c['name'], 'genotype': c['genotype'], 'seed': seed}
        for seed in seeds  # so that a stopped evaluation has compared all of them on some seeds
        for c in candidates
    ]
    costs = [{'key': f'cost of {c["name"]}', 'name': c['name'], 'genotype': c['genotype']} for c in candidates]

    def work(job: dict[str, Any]) -> dict[str, Any]:
        return _train_one(budget, job, samples) if 'seed' in job else _measure_one(budget, job, samples)

    def describe(job: dict[str, Any], result: dict[str, Any]) -> str:
        if 'seed' in job:
            return f'accuracy {result["accuracy"]:.2f} %'
        return f'{result["parameters"]:,} parameters, {result["time_ratio"]:.2f} times the time of no attention'

    outcome = run_jobs(
        [*trainings, *costs],
        work,
        out,
        settings={**_settings(budget), 'images': name_data(*samples)},
        describe=describe,
        ray=ray,
        say=say,
        cpu=budget.cpu,
    )
    if not any(job['key'] in outcome.results for job in trainings):
        key, text = next(iter(outcome.errors.items()))
        raise RuntimeError(f'all {len(trainings)} trainings failed; the first one, {key}: {text}')
    rows: list[dict[str, Any]] = []
    images: list[int] = []
    for candidate in candidates:
        accuracies: dict[str, float] = {}
        for job in trainings:
            if job['name'] == candidate['name'] and (done := outcome.results.get(job['key'])):
                accuracies[str(job['seed'])] = done['accuracy']
                images.append(done['images'])
        cost = outcome.results.get(f'cost of {candidate["name"]}') or {}
        cost = {name: cost.get(name) for name in ('parameters', 'macs', 'ms_per_image', 'time_ratio', 'device')}
        rows.append({**candidate, 'accuracies': accuracies, **cost})
    result = {
        'found': candidates[0]['genotype'],
        'model': budget.model,
        'budget': _settings(budget),
        'space': str(space or 'paper') if randoms else None,
        'seeds': seeds,
        'random_seed': random_seed,
        'images': images[0] if images else None,
        **compare(rows),
        'errors': outcome.errors,
        'versions': environment()['versions'],
    }
    if is_main():
        write_text(out / 'evaluation.json', json.dumps(result, indent=2) + '\n')
    return result


def check_evaluation(
    found: str,
    budget: TrainConfig,
    *,
    baselines: Sequence[str] = BASELINES,
    randoms: int = 0,
    space: SearchSpace | None = None,
    random_seed: int = 0,
    ray: Ray | None = None,
) -> tuple[Samples, Samples]:
    """Raise now what ``evaluate`` would raise before its first training, a broken image included.

    Args:
        found, budget, baselines, randoms, space, random_seed, ray: see ``evaluate``. Any genotype of the space
            stands in for one that is yet to be found.

    Returns:
        The two splits without broken images, for the argument ``data`` of ``evaluate``: they are decoded once and not
        again for each training.
    """
    _candidates(found, budget, baselines, randoms, space, random_seed)
    if budget.pretrained or budget.checkpoint:
        raise ValueError('an evaluation trains from scratch: leave pretrained and checkpoint out of the budget')
    if is_main():
        open_samples(budget)
        check_writable(Path(budget.out))
    with open_accelerator(budget, 'an evaluation', 'search') as accelerator:
        samples = checked_samples(budget, accelerator)
    if is_main():
        check_jobs(budget.out, {**_settings(budget), 'images': name_data(*samples)}, ray)
    return samples


def random_genotypes(
    space: SearchSpace, count: int, seed: int = 0, *, sets: int = 1, without: Sequence[str] = ()
) -> list[str]:
    """Different random genotypes of a space, as text; the first ones are the same for every ``count``.

    Args:
        count: how many.
        seed: of the draw.
        sets: genotypes in each, with semicolons between them, where a network has one for each stage.
        without: genotypes, or such joined ones, that are left out.

    Raises:
        ValueError: the space does not hold so many.
    """
    left = space.genotypes**sets - len({text for text in without if _is_in(text, space, sets)})
    if count > left:
        raise ValueError(f'the space holds {left} genotypes besides the found one, {count} random ones were asked for')
    drawn: list[str] = []
    number = 0
    while len(drawn) < count:
        text = '; '.join(str(space.random(derive_seed(seed, RANDOM, number, part))) for part in range(sets))
        if text not in drawn and text not in without:
            drawn.append(text)
        number += 1
    return drawn


# ---- candidates ----


def _candidates(
    found: str,
    budget: TrainConfig,
    baselines: Sequence[str],
    randoms: int,
    space: SearchSpace | None,
    random_seed: int,
) -> list[dict[str, str]]:
    if randoms < 0:
        raise ValueError(f'randoms must be at least 0, got {randoms}')
    check_model_name(budget.model)
    if not timm.model_entrypoint(budget.model).__module__.startswith('sase_blocks.'):
        raise ValueError(
            f'{budget.model} takes no genotype=, so its block cannot be exchanged in training; evaluate in '
            f'resnet20_cifar, resnet50_sase or resnet101_sase, or train it after `insert` with a loop of your own'
        )
    if 'genotype' in budget.model_args:
        raise ValueError('the genotype is what an evaluation varies: leave it out of model_args')
    found = '; '.join(map(str, Genotype.parse_stages(found)))
    listed = [{'name': 'found', 'kind': 'found', 'genotype': found}]
    for entry in baselines:
        label, equals, genotype = entry.partition('=')
        listed.append({'name': label, 'kind': 'baseline', 'genotype': genotype if equals else label})
    sets = found.count(';') + 1
    texts = random_genotypes(space or SearchSpace.parse('paper'), randoms, random_seed, sets=sets, without=[found])
    listed += [{'name': f'random {i}', 'kind': 'random', 'genotype': text} for i, text in enumerate(texts)]
    names = [candidate['name'] for candidate in listed]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f'two blocks of the evaluation have the name {quoted(name)}; LABEL=GENOTYPE gives another one'
            )
    for candidate in listed:
        try:
            with torch.device('meta'):  # nothing is computed
                build_model(budget.model, None, **_model_args(budget, candidate['genotype']))
        except ValueError as error:
            raise ValueError(f'{shorten(candidate["name"])} of the evaluation: {error}') from error
    return listed


def _is_in(text: str, space: SearchSpace, sets: int) -> bool:
    parts = [genotype.to_dict() for genotype in Genotype.parse_stages(text)]
    return len(parts) == sets and all(part[edge] in names for part in parts for edge, names in space)


def _model_args(budget: TrainConfig, genotype: str) -> dict[str, Any]:
    args = {**budget.model_args, 'genotype': genotype}
    if budget.img_size is not None:
        args.setdefault('img_size', budget.img_size)
    return args


def _settings(budget: TrainConfig) -> dict[str, Any]:
    """What the trainings have in common, without where things lie and what makes no difference."""
    apart = {entry.name for entry in fields(budget) if entry.metadata.get('free') or entry.metadata.get('place')}
    return {e.name: getattr(budget, e.name) for e in fields(budget) if e.name not in {*apart, 'seed'}}


# ---- jobs ----


def _train_one(budget: TrainConfig, job: Mapping[str, Any], samples: tuple[Samples, Samples]) -> dict[str, Any]:
    folder = job_folder(budget.out, job['key'])
    config = replace(
        budget,
        model_args={**budget.model_args, 'genotype': job['genotype']},
        seed=job['seed'],
        out=str(folder),
        resume=True,
    )
    # Its lines would drown those of the evaluation.
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / 'log.txt').open('a', encoding='utf-8') as log, contextlib.redirect_stdout(log):
        try:
            result = train(config, samples)
        except FloatingPointError as error:  # its advice is about options of another command
            raise FloatingPointError(str(error).replace(ADVICE, 'Try a lower --evaluate-lr.')) from error
    return {
        'accuracy': result['acc1'],
        'loss': result['loss'],
        'epochs': result['epochs'],
        'images': len(samples[1]),
    }


def _measure_one(budget: TrainConfig, job: Mapping[str, Any], samples: tuple[Samples, Samples]) -> dict[str, Any]:
    """Costs of one candidate, its time in turns with the network without attention."""
    if not is_main():
        return {}
    classes = len(samples[0].classes)
    device = torch.device('cuda' if torch.cuda.is_available() and not budget.cpu else 'cpu')
    networks = {
        genotype: build_model(budget.model, classes, **_model_args(budget, genotype)).to(device).eval()
        for genotype in ('none', job['genotype'])
    }
    model = networks[job['genotype']]
    shape = image_config(model, budget.img_size)['input_size']
    batch = 32 if max(shape) <= 64 else 8
    images = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0)).to(device)
    milliseconds = milliseconds_per_image(networks, images)
    return {
        'parameters': sum(parameter.numel() for parameter in model.parameters()),
        'macs': count_macs(model, shape),
        'ms_per_image': milliseconds[job['genotype']],
        'time_ratio': milliseconds[job['genotype']] / milliseconds['none'],
        'device': torch.cuda.get_device_name(device) if device.type == 'cuda' else platform.machine(),
    }
