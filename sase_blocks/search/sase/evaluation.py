"""Is the found block better than others? Trains all from scratch with one budget and several seeds, and compares them.

Not in the paper, which reports the accuracy of one run of the mixture. It does not say how far a found block is above a
random one of its space, or above the spread over seeds. The accuracy after the last epoch counts, never the best one,
and nothing is chosen by it. Trainings with the same seed see the same batches and augmentation, so blocks are compared
seed by seed (``search/significance.py``).
"""

from __future__ import annotations

import contextlib
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import timm
import torch

from sase_blocks.blocks import Genotype
from sase_blocks.data import Samples, derive_seed, image_config, name_data
from sase_blocks.jobs import Ray, check_jobs, job_folder, run_jobs
from sase_blocks.networks import build_network, check_model_name
from sase_blocks.ops.options import split_names
from sase_blocks.profiling import count_macs, milliseconds_per_image
from sase_blocks.reading import quoted, shorten, table
from sase_blocks.runs import check_writable, environment, fixed_settings, is_main, open_accelerator, write_json
from sase_blocks.search.significance import LEVEL, holm, load_stats, paired_test, shown_from
from sase_blocks.train import ADVICE, TrainConfig, checked_samples, train

from .space import SearchSpace

BASELINES = ('none', 'se', 'eca', 'cbam', 'sase')
RANDOM = 103  # stream of random numbers, see derive_seed: random genotypes
COSTS = ('parameters', 'macs', 'ms_per_image', 'time_ratio', 'device')
MORE_SEEDS = 5  # a verdict says what so many seeds would show, or twice as many as there are
TEST = (
    'difference: block minus found, mean over the seeds that both have; interval: 95 %, of each difference alone; '
    'p: two-sided paired t-test; p_adjusted: by Holm over the baselines'
)


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
) -> dict[str, Any]:
    """Train the found block, the baselines and random genotypes from scratch, and compare them.

    Each training and each measurement of costs is a job of ``run_jobs``, so the same call continues a stopped one. A
    finished evaluation takes further baselines, random genotypes and seeds.

    Args:
        found: the genotype as text, or one for each stage with semicolons between them.
        budget: the settings of all trainings except seed and genotype. Its model must take ``genotype=``, its ``out``
            is the folder for everything, and its validation split, which is reported, should be new to the search.
        baselines: blocks of ``list_blocks()``, maybe with options, 'none', or genotypes; ``'LABEL=GENOTYPE'`` names
            one.
        randoms: number of random genotypes, all different and different from the found one.
        space: of the random genotypes. Default: the paper's.
        seeds: of the trainings, the same for all candidates.
        random_seed: of the random genotypes. More of them begin with the same ones.
        data: the splits from ``open_evaluation``. Default: opened here.
        ray: see ``run_jobs``.

    Returns:
        The content of ``evaluation.json`` in ``budget.out``. Unknown values, such as a spread over one seed, are None.
        'candidates' is a list of dicts:

        - 'name', 'kind' ('found', 'baseline', 'random'), 'genotype', 'accuracies' by seed (percent, after the last
          epoch), 'mean', 'spread' (sample standard deviation), 'min', 'max'.
        - 'difference' (this block's accuracy minus the found block's, mean over the common seeds), 'interval' (its 95 %
          interval, [low, high]), for baselines 'p' and 'p_adjusted', see ``compare``.
        - 'parameters', 'macs', 'ms_per_image', 'time_ratio' (to the network without attention, measured in turns).

        'verdicts' are sentences, and 'test' describes their test. 'rank' is the rank of the found block among the
        random ones: 'place', 'of', and 'p', the probability that a random block has that place or a better one.
        'errors' come from failed jobs. The rest are settings.

    Raises:
        ImportError: the extra ``train`` or ``search`` is missing.
        ValueError, FileNotFoundError: a wrong genotype, setting or data set, before any work.
        OSError: ``budget.out`` cannot be written.
        RuntimeError: every training failed.
    """
    load_stats()
    candidates = list_candidates(found, budget, baselines, randoms, space, random_seed)
    seeds = list(dict.fromkeys(seeds))
    if not seeds:
        raise ValueError('seeds is empty: an evaluation needs at least one seed')
    samples = data or open_evaluation(budget, ray)
    jobs: list[dict[str, Any]] = [
        {'key': f'{c["name"]}, seed {seed}', 'name': c['name'], 'genotype': c['genotype'], 'seed': seed}
        for seed in seeds  # outer loop, so that a stopped evaluation has all candidates on some seeds
        for c in candidates
    ]
    jobs += [{'key': f'cost of {c["name"]}', 'name': c['name'], 'genotype': c['genotype']} for c in candidates]

    def work(job: dict[str, Any]) -> dict[str, Any]:
        return _train(budget, job, samples) if 'seed' in job else _measure(budget, job['genotype'], samples)

    def describe(job: dict[str, Any], result: dict[str, Any]) -> str:
        if 'seed' in job:
            return f'accuracy {result["accuracy"]:.2f} %'
        return f'{result["parameters"]:,} parameters, {result["time_ratio"]:.2f} times the time of no attention'

    settings = _settings(budget, samples)
    results, errors = run_jobs(jobs, work, budget.out, settings=settings, describe=describe, ray=ray, cpu=budget.cpu)
    rows = []
    for one in candidates:
        keys = {str(seed): f'{one["name"]}, seed {seed}' for seed in seeds}
        accuracies = {seed: results[key]['accuracy'] for seed, key in keys.items() if key in results}
        cost = results.get(f'cost of {one["name"]}', {})
        rows.append({**one, 'accuracies': accuracies, **{name: cost.get(name) for name in COSTS}})
    if not any(row['accuracies'] for row in rows):
        key, text = next(iter(errors.items()))
        raise RuntimeError(f'all {len(seeds) * len(candidates)} trainings failed; the first one, {key}: {text}')
    result = {
        'found': candidates[0]['genotype'],
        'model': budget.model,
        'budget': _settings(budget),
        'space': str(space or 'paper') if randoms else None,
        'seeds': seeds,
        'random_seed': random_seed,
        'images': len(samples[1]),
        **compare(rows),
        'errors': errors,
        'versions': environment()['versions'],
    }
    if is_main():
        write_json(Path(budget.out) / 'evaluation.json', result)
    return result


def open_evaluation(budget: TrainConfig, ray: Ray | None = None) -> tuple[Samples, Samples]:
    """The two splits of an evaluation without broken images, for ``data`` of ``evaluate``.

    Raises the errors of ``evaluate`` about the budget and its folder.
    """
    if budget.pretrained or budget.checkpoint:
        raise ValueError('an evaluation trains from scratch: leave pretrained and checkpoint out of the budget')
    if is_main():
        check_writable(Path(budget.out), make=False)
    with open_accelerator(budget, 'an evaluation', 'search') as accelerator:
        samples = checked_samples(budget, accelerator)
    if is_main():
        check_jobs(budget.out, _settings(budget, samples), ray)
    return samples


def list_candidates(
    found: str,
    budget: TrainConfig,
    baselines: Sequence[str] = BASELINES,
    randoms: int = 0,
    space: SearchSpace | None = None,
    random_seed: int = 0,
) -> list[dict[str, str]]:
    """The name, kind and genotype of each candidate of ``evaluate``, the found block first.

    Raises ValueError for a wrong argument or a block that the budget's model cannot be built with.
    """
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
    stages = Genotype.parse_stages(found)
    found = '; '.join(map(str, stages))
    listed = [{'name': 'found', 'kind': 'found', 'genotype': found}]
    for entry in baselines:
        label, *genotype = split_names(entry, '=')  # not at the = of an option
        listed.append({'name': label, 'kind': 'baseline', 'genotype': '='.join(genotype) if genotype else label})
    paper = SearchSpace.parse('paper')
    texts = random_genotypes(space or paper, randoms, random_seed, sets=len(stages), without=[found])
    listed += [{'name': f'random {i}', 'kind': 'random', 'genotype': text} for i, text in enumerate(texts)]
    names = [candidate['name'] for candidate in listed]
    for candidate in listed:
        if names.count(name := candidate['name']) > 1:
            raise ValueError(
                f'two blocks of the evaluation have the name {quoted(name)}; LABEL=GENOTYPE gives another one'
            )
        try:
            with torch.device('meta'):  # computes nothing
                build_network(_with_genotype(budget, candidate['genotype']), weights=False)
        except ValueError as error:
            raise ValueError(f'{shorten(name)} of the evaluation: {error}') from error
    return listed


def random_genotypes(
    space: SearchSpace, count: int, seed: int = 0, *, sets: int = 1, without: Sequence[str] = ()
) -> list[str]:
    """Different random genotypes of a space, as text. The first ones are the same for every ``count``.

    Args:
        sets: number of genotypes in each text, for a network with one for each stage.
        without: texts to leave out.

    Raises:
        ValueError: the space does not hold so many.
    """
    taken = [Genotype.parse_stages(text) for text in set(without)]
    left = space.genotypes**sets - sum(len(stages) == sets and all(one in space for one in stages) for stages in taken)
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


# ---- jobs ----


def _with_genotype(budget: TrainConfig, genotype: str) -> TrainConfig:
    return replace(budget, model_args={**budget.model_args, 'genotype': genotype})


def _settings(budget: TrainConfig, samples: tuple[Samples, Samples] | None = None) -> dict[str, Any]:
    """The settings that the trainings share, with the names of the data if given."""
    settings = {name: value for name, value in fixed_settings(budget).items() if name != 'seed'}
    return {**settings, 'images': name_data(*samples)} if samples else settings


def _train(budget: TrainConfig, job: Mapping[str, Any], samples: tuple[Samples, Samples]) -> dict[str, Any]:
    folder = job_folder(budget.out, job['key'])
    folder.mkdir(parents=True, exist_ok=True)
    config = replace(_with_genotype(budget, job['genotype']), seed=job['seed'], out=str(folder), resume=True)
    # Its output would hide the evaluation's.
    with (folder / 'log.txt').open('a', encoding='utf-8') as log, contextlib.redirect_stdout(log):
        try:
            result = train(config, samples)
        except FloatingPointError as error:  # its advice is about options of another command
            raise FloatingPointError(str(error).replace(ADVICE, 'Try a lower --evaluate-lr.')) from error
    return {'accuracy': result['acc1'], 'loss': result['loss'], 'epochs': result['epochs']}


def _measure(budget: TrainConfig, genotype: str, samples: tuple[Samples, Samples]) -> dict[str, Any]:
    """The ``COSTS`` of a candidate. Its time is measured in turns with the network without attention."""
    if not is_main():
        return {}
    device = torch.device('cuda' if torch.cuda.is_available() and not budget.cpu else 'cpu')
    networks = {
        config.model_args['genotype']: build_network(config, len(samples[0].classes))[0]
        for config in (_with_genotype(budget, 'none'), _with_genotype(budget, genotype))
    }
    for network in networks.values():
        network.to(device).eval()
    shape = image_config(networks[genotype], budget.img_size)['input_size']
    batch = 32 if max(shape) <= 64 else 8
    images = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0)).to(device)
    milliseconds = milliseconds_per_image(networks, images)
    return {
        'parameters': sum(parameter.numel() for parameter in networks[genotype].parameters()),
        'macs': count_macs(networks[genotype], shape),
        'ms_per_image': milliseconds[genotype],
        'time_ratio': milliseconds[genotype] / milliseconds['none'],
        'device': torch.cuda.get_device_name(device) if device.type == 'cuda' else platform.machine(),
    }


# ---- statistics ----


def compare(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Compare candidates that have a name, a kind and 'accuracies' by seed.

    A paired t-test over the common seeds compares the found block with each baseline, and Holm's method adjusts the p
    values for the number of baselines. If no baseline differs from the found block, at most one evaluation in 20 says
    that one does. The intervals are for each difference alone, not adjusted.

    Returns:
        'candidates', 'rank', 'verdicts' and 'test', see ``evaluate``.

    Raises:
        ImportError: SciPy is missing (extra ``search``).
    """
    first = next(row for row in rows if row['kind'] == 'found')
    candidates, reference = [], first['accuracies']
    for row in rows:
        accuracies, values = row['accuracies'], list(row['accuracies'].values())
        common = [] if row is first else [seed for seed in accuracies if seed in reference]
        differences = [accuracies[seed] - reference[seed] for seed in common]
        p, low, high = map(float, paired_test(differences))
        tested = not math.isnan(p)
        statistics = {
            'mean': fmean(values) if values else None,
            'spread': stdev(values) if len(values) > 1 else None,
            'min': min(values, default=None),
            'max': max(values, default=None),
            'difference': fmean(differences) if differences else None,
            'interval': [low, high] if tested else None,
            'p': p if tested and row['kind'] == 'baseline' else None,
            'p_adjusted': None,
        }
        candidates.append({**row, **statistics})
    found = candidates[rows.index(first)]
    baselines = [row for row in candidates if row['kind'] == 'baseline']
    # A baseline that could not be tested is NaN, and still counts as a comparison.
    for row, p in zip(baselines, holm([row['p'] for row in baselines]).tolist(), strict=True):
        row['p_adjusted'] = None if math.isnan(p) else p
    rank, ranked = _rank(found, [row for row in candidates if row['kind'] == 'random'])
    verdicts = [_verdict(row, found) for row in baselines if row['difference'] is not None]
    return {
        'candidates': candidates,
        'rank': rank,
        'verdicts': [*verdicts, *_what_seeds_show(baselines, found), *ranked],
        'test': TEST,
    }


def _verdict(row: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """A sentence on the found block and one baseline."""
    seeds = len(row['accuracies'].keys() & found['accuracies'].keys())
    means = f'found {_by(-row["difference"])} {row["name"]}'
    if row['p_adjusted'] is not None:
        low, high = row['interval']
        shown = 'a difference beyond chance' if row['p_adjusted'] <= LEVEL else 'no difference is shown'
        return f'{means} (95 % interval {-high:+.2f} to {-low:+.2f}, p {_p(row["p_adjusted"])}): {shown}.'
    if seeds == 1:
        return f'{means} on one seed, which cannot tell a difference from chance.'
    if row['difference'] == 0:
        return f'{means} on each of {seeds} seeds.'
    return f'{means} on each of {seeds} seeds: equal differences show no spread to judge them by, nothing is decided.'


def _what_seeds_show(baselines: Sequence[Mapping[str, Any]], found: Mapping[str, Any]) -> list[str]:
    """A sentence on what the seeds can show at all, if they left a baseline undecided."""
    compared = [row for row in baselines if row['difference'] is not None]
    if all(row['p_adjusted'] is not None and row['p_adjusted'] <= LEVEL for row in compared):
        return []
    seeds, count = len(found['accuracies']), len(baselines)
    more = MORE_SEEDS if seeds < MORE_SEEDS else 2 * seeds
    few = {1: 'One seed decides nothing. ', 2: 'Two seeds decide hardly anything. '}.get(seeds, '')
    now = f'{shown_from(seeds, count):.1f} times with these {seeds} seeds, ' if seeds > 1 else ''
    of = f'the largest difference of {count} baselines' if count > 1 else 'one baseline'
    return [
        f'{few}To be shown, a difference must exceed its standard deviation over the seeds {now}'
        f'{shown_from(more, count):.1f} times with {more} ({of}).'
    ]


def _rank(found: Mapping[str, Any], randoms: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any] | None, list[str]]:
    """The rank of the found block among the random ones by mean, and a sentence about it.

    If the found block were itself random, every place would be equally likely, so p is from an exact permutation
    test. This holds only among blocks with the same seeds, so it leaves out others.
    """
    trained = [row for row in randoms if row['accuracies'].keys() == found['accuracies'].keys()]
    if found['mean'] is None or not trained:
        return None, []
    count, of = len(trained), len(trained) + 1
    place = 1 + sum(row['mean'] > found['mean'] for row in trained)
    p = (1 + sum(row['mean'] >= found['mean'] for row in trained)) / of  # a tie is no merit
    least = math.ceil(1 / LEVEL) - 1
    shown = 'no advantage over drawing at random is shown'
    if p <= LEVEL:
        shown = 'the search is better than drawing at random'
    elif count < least:
        shown = f'nothing is shown, for which it would take at least {least} random blocks'
    ahead = found['mean'] - fmean(row['mean'] for row in trained)
    text = (
        f'found has place {place} among {of} with {count} random block{"s"[: count > 1]} of its space. A block drawn '
        f'at random would do as well with probability {p:.2f}: {shown}. It {_by(ahead)} their mean.'
    )
    if left := len(randoms) - count:
        text += f' {left} random {"block is" if left == 1 else "blocks are"} left out, with other seeds.'
    return {'place': place, 'of': of, 'p': p}, [text]


def _by(ahead: float) -> str:
    return 'is level with' if ahead == 0 else f'is {abs(ahead):.2f} points {"above" if ahead > 0 else "below"}'


def _p(value: float) -> str:
    return '< 0.001' if value < 0.001 else f'= {value:.3f}'


def format_evaluation(result: Mapping[str, Any]) -> str:
    """The result of ``evaluate`` as text, with a table that has the best mean first."""

    def known(form: str, *values: Any) -> str:
        return '-' if None in values else form.format(*values)

    rows = sorted(result['candidates'], key=lambda row: -math.inf if row['mean'] is None else row['mean'], reverse=True)
    cells = [
        {
            'block': row['name'],
            'accuracy %': known('{:.2f}', row['mean']) + ('' if row['spread'] is None else f' ± {row["spread"]:.2f}'),
            'min to max': known('{:.2f} to {:.2f}', row['min'], row['max']),
            'seeds': str(len(row['accuracies'])),
            'to found': known('{:+.2f}', row['difference']),
            '95 % interval': known('{:+.2f} to {:+.2f}', *(row['interval'] or [None])),
            'p': '-' if row['p_adjusted'] is None else _p(row['p_adjusted']).removeprefix('= ').replace(' ', ''),
            'parameters': known('{:,}', row['parameters']),
            'MACs': known('{:,.1f} M', row['macs'] and row['macs'] / 1e6),
            'time': known('{:.2f}', row['time_ratio']),
        }
        for row in rows
    ]
    images = result.get('images')
    of = f' of {images:,} images (one image is {100 / images:.2g} points)' if images else ''
    named = [row for row in rows if row['kind'] != 'baseline' or row['genotype'] != row['name']]
    return '\n'.join(
        [
            *table(cells, left=['block']),
            '',
            f'accuracy: after the last epoch, on the validation split{of},',
            'mean ± standard deviation over the seeds; to found: mean difference seed by seed, with its 95 % interval;',
            'p: of a paired t-test, adjusted for the number of baselines (Holm); the intervals are not adjusted;',
            'time: of a forward pass, without attention = 1.',
            '',
            *result['verdicts'],
            '',
            *(f'{row["name"]}: {row["genotype"]}' for row in named),
            *(f'failed: {key}: {text}' for key, text in result.get('errors', {}).items()),
        ]
    )
