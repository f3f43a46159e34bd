"""Is the found block better than others? All of them trained from scratch under one budget and several seeds.

The paper reports the accuracy of one run of the mixture; nothing in it says how far a found block is above a random one
of its space, or above the spread over seeds. This comparison is ours. It takes the accuracy after the last epoch,
never the best epoch's, and chooses nothing by it. Trainings with the same seed see the same batches and augmentation,
so blocks are compared seed by seed (``search/significance.py``).
"""

from __future__ import annotations

import contextlib
import json
import math
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import timm
import torch

from sase_blocks import models  # noqa: F401  # registers our models with timm
from sase_blocks.blocks import Genotype
from sase_blocks.data import Samples, derive_seed, image_config, name_data
from sase_blocks.insertion.measure import count_macs, milliseconds_per_image
from sase_blocks.jobs import Ray, check_jobs, job_folder, run_jobs
from sase_blocks.reading import quoted, shorten
from sase_blocks.runs import check_writable, environment, is_main, launched, write_text
from sase_blocks.search.significance import LEVEL, holm, load_stats, paired_test, shown_from
from sase_blocks.train import ADVICE, TrainConfig, build_model, check_model_name, checked_samples, open_samples, train

from .space import SearchSpace

__all__ = ['BASELINES', 'check_evaluation', 'evaluate', 'format_table', 'random_genotypes']

BASELINES = ('none', 'se', 'eca', 'cbam', 'sase')
RANDOM = 103  # the stream of random numbers (data.derive_seed) for random genotypes
MORE_SEEDS = 5  # of which a verdict says what they would show, or of twice as many as there are
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
        failed; the settings. What is unknown, a spread over one seed for example, is None.

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
    with launched(budget, 'an evaluation', 'search') as accelerator:
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


def compare(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Statistics of candidates with name, kind and 'accuracies' by seed: the keys candidates, verdicts, test and rank.

    The found block is compared with each baseline by a paired t-test over the seeds that both have, and the p values
    are adjusted by Holm for the number of baselines: if no baseline differs from the found block, at most one
    evaluation in 20 says that one does. The intervals are those of each difference alone, not adjusted.

    Raises:
        ImportError: SciPy is missing (extra ``search``).
    """
    candidates = [{**row, **_statistics(list(row['accuracies'].values()))} for row in rows]
    first = next(row for row in candidates if row['kind'] == 'found')
    for row in candidates:
        row |= {'difference': None, 'interval': None, 'p': None, 'p_adjusted': None}
        differences = _differences(row, first)
        if row is first or not differences:
            continue
        row['difference'] = fmean(differences)
        p, low, high = (float(value) for value in paired_test(differences))
        if not math.isnan(p):
            row['interval'] = [low, high]
            row['p'] = p if row['kind'] == 'baseline' else None
    baselines = [row for row in candidates if row['kind'] == 'baseline']
    tested = [row for row in baselines if row['p'] is not None]
    # A baseline that could not be tested is still one that the run asked about.
    adjusted = holm([*(row['p'] for row in tested), *[math.nan] * (len(baselines) - len(tested))])
    for row, p in zip(tested, adjusted.tolist(), strict=False):
        row['p_adjusted'] = p
    rank, more = _rank(first, [row for row in candidates if row['kind'] == 'random'])
    verdicts = [_verdict(row, first) for row in baselines if row['difference'] is not None]
    verdicts += [*_seeds(baselines, first), *more]
    return {'candidates': candidates, 'rank': rank, 'verdicts': verdicts, 'test': TEST}


def format_table(result: Mapping[str, Any]) -> str:
    """The comparison as text, best mean first, from what ``evaluate`` returns."""
    rows = sorted(result['candidates'], key=lambda row: -math.inf if row['mean'] is None else row['mean'], reverse=True)
    width = max(12, *(len(row['name']) for row in rows)) + 2
    header = (
        f'{"block":{width}}{"accuracy %":>15}{"min to max":>18}{"seeds":>7}{"to found":>10}{"95 % interval":>20}'
        f'{"p":>7}{"parameters":>13}{"MACs":>11}{"time":>7}'
    )
    lines = [header, '-' * len(header)]
    for row in rows:
        lines.append(
            f'{row["name"]:{width}}{_plus_minus(row["mean"], row["spread"]):>15}'
            f'{_known("{0:.2f} to {1:.2f}", row["min"], row["max"]):>18}{len(row["accuracies"]):7}'
            f'{_known("{0:+.2f}", row["difference"]):>10}{_interval(row["interval"]) or "-":>20}'
            f'{_p(row["p_adjusted"]):>7}{_known("{0:,}", row["parameters"]):>13}'
            f'{_known("{0:,.1f} M", row["macs"], scale=1e6):>11}{_known("{0:.2f}", row["time_ratio"]):>7}'
        )
    images = result.get('images')
    of = f' of {images:,} images (one image is {100 / images:.2g} points)' if images else ''
    lines += [
        '',
        f'accuracy: after the last epoch, on the validation split{of},',
        'mean ± standard deviation over the seeds; to found: mean difference seed by seed, with its 95 % interval;',
        'p: of a paired t-test, adjusted for the number of baselines (Holm); the intervals are not adjusted;',
        'time: of a forward pass, without attention = 1.',
        '',
        *result['verdicts'],
    ]
    named = [row for row in rows if row['kind'] != 'baseline' or row['genotype'] != row['name']]
    lines += ['', *(f'{row["name"]}: {row["genotype"]}' for row in named)]
    lines += [f'failed: {key}: {text}' for key, text in result.get('errors', {}).items()]
    return '\n'.join(lines)


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
    found = '; '.join(str(Genotype.parse(text)) for text in found.split(';'))
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
    parts = [Genotype.parse(part).to_dict() for part in text.split(';')]
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


# ---- statistics ----


def _statistics(values: Sequence[float]) -> dict[str, float | None]:
    if not values:
        return {'mean': None, 'spread': None, 'min': None, 'max': None}
    spread = stdev(values) if len(values) > 1 else None
    return {'mean': fmean(values), 'spread': spread, 'min': min(values), 'max': max(values)}


def _differences(row: Mapping[str, Any], first: Mapping[str, Any]) -> list[float]:
    """The accuracy of a block minus that of the found one, for each seed that both have."""
    its, found = row['accuracies'], first['accuracies']
    return [its[seed] - found[seed] for seed in its if seed in found]


def _verdict(row: Mapping[str, Any], first: Mapping[str, Any]) -> str:
    """A sentence on the found block and one baseline."""
    seeds = len(_differences(row, first))
    means = f'found {_by(-row["difference"])} {row["name"]}'
    if row['p_adjusted'] is not None:
        low, high = row['interval']
        shown = 'a difference beyond chance' if row['p_adjusted'] <= LEVEL else 'no difference is shown'
        return f'{means} (95 % interval {_interval([-high, -low])}, p {_p(row["p_adjusted"], " ")}): {shown}.'
    if seeds == 1:
        return f'{means} on one seed, which cannot tell a difference from chance.'
    if row['difference'] == 0:
        return f'{means} on each of {seeds} seeds.'
    return f'{means} on each of {seeds} seeds: equal differences show no spread to judge them by, nothing is decided.'


def _seeds(baselines: Sequence[Mapping[str, Any]], first: Mapping[str, Any]) -> Iterator[str]:
    """What so many seeds can show at all, if they left a baseline undecided."""
    seeds = len(first['accuracies'])
    compared = [row for row in baselines if row['difference'] is not None]
    if all(row['p_adjusted'] is not None and row['p_adjusted'] <= LEVEL for row in compared):
        return
    count = len(baselines)
    more = MORE_SEEDS if seeds < MORE_SEEDS else 2 * seeds
    few = {1: 'One seed decides nothing. ', 2: 'Two seeds decide hardly anything. '}.get(seeds, '')
    now = f'{shown_from(seeds, count):.1f} times with these {seeds} seeds, ' if seeds > 1 else ''
    of = f'the largest difference of {count} baselines' if count > 1 else 'one baseline'
    yield (
        f'{few}To be shown, a difference must exceed its standard deviation over the seeds {now}'
        f'{shown_from(more, count):.1f} times with {more} ({of}).'
    )


def _by(ahead: float) -> str:
    if ahead == 0:
        return 'is level with'
    return f'is {abs(ahead):.2f} points {"above" if ahead > 0 else "below"}'


def _rank(found: Mapping[str, Any], randoms: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any] | None, list[str]]:
    """The place of the found block among the random ones by mean, 1 for the best, and sentences about it.

    If the found block were itself drawn at random, every place would be equally likely, whatever the accuracies: the
    exact p value of a permutation test. That holds among blocks with the same seeds only, so others are left out.
    """
    trained = [row for row in randoms if row['accuracies'].keys() == found['accuracies'].keys()]
    if found['mean'] is None or not trained:
        return None, []
    of = len(trained) + 1
    place = 1 + sum(row['mean'] > found['mean'] for row in trained)
    p = (1 + sum(row['mean'] >= found['mean'] for row in trained)) / of  # a tie is no merit
    blocks = 'block' if len(trained) == 1 else 'blocks'
    text = (
        f'found has place {place} among {of} with {len(trained)} random {blocks} of its space. A block drawn at random '
        f'would do as well with probability {p:.2f}'
    )
    least = math.ceil(1 / LEVEL) - 1
    if p <= LEVEL:
        text += ': the search is better than drawing at random.'
    elif len(trained) < least:
        text += f': nothing is shown, for which it would take at least {least} random blocks.'
    else:
        text += ': no advantage over drawing at random is shown.'
    text += f' It {_by(found["mean"] - fmean(row["mean"] for row in trained))} their mean.'
    if left := len(randoms) - len(trained):
        text += f' {left} random {"block is" if left == 1 else "blocks are"} left out, with other seeds.'
    return {'place': place, 'of': of, 'p': p}, [text]


# ---- text ----


def _known(form: str, *values: float | None, scale: float = 1) -> str:
    """The values in a format, '-' where one is unknown."""
    return '-' if None in values else form.format(*(value / scale if scale != 1 else value for value in values))  # type: ignore[operator]


def _plus_minus(value: float | None, error: float | None) -> str:
    if value is None:
        return '-'
    return f'{value:.2f}' + (f' ± {error:.2f}' if error is not None else '')


def _p(value: float | None, equals: str = '') -> str:
    if value is None:
        return '-'
    return f'<{equals}0.001' if value < 0.001 else f'{"=" if equals else ""}{equals}{value:.3f}'


def _interval(ends: Sequence[float] | None) -> str:
    return '' if ends is None else '{:+.2f} to {:+.2f}'.format(*ends)
