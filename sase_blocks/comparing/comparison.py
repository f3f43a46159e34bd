"""Train candidates with one budget and several seeds, measure what they cost, and compare them.

Trainings with the same seed see the same batches and augmentation, so candidates are compared seed by seed. The
accuracy after the last epoch counts, never the best one, and nothing is chosen by it.
"""

from __future__ import annotations

import contextlib
import hashlib
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sase_blocks.blocks import compile_blocks
from sase_blocks.data import Samples, image_config, name_data
from sase_blocks.jobs import Ray, check_jobs, job_folder, run_jobs
from sase_blocks.networks import build_network, is_code
from sase_blocks.profiling import count_macs, kept_bytes, milliseconds_per_image, storages_of
from sase_blocks.reading import quoted
from sase_blocks.runs import check_writable, environment, is_main, open_accelerator
from sase_blocks.settings import data_title, fixed_settings, setting
from sase_blocks.train import ADVICE, TrainConfig, checked_samples, train

from .candidates import INSERTION, NONE, Candidate, Rule, check_candidates, configure
from .report import COSTS, judge
from .significance import load_stats


@dataclass(frozen=True)
class CompareConfig(TrainConfig):
    """The budget of a comparison: the settings that all trainings share."""

    out: str = setting('runs/compare', 'folder for the results and the trainings', place=True)


def compare(
    candidates: Sequence[Candidate],
    budget: TrainConfig,
    *,
    reference: str = NONE,
    seeds: Sequence[int] = (0, 1, 2),
    rule: Rule | None = None,
    difference: float = 0.5,
    data: tuple[Samples, Samples] | None = None,
    ray: Ray | None = None,
    advice: str = ADVICE,
    hours: float | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, Any]:
    """Train all candidates with all seeds, and compare each with the reference.

    Each training and each measurement of costs is a job of ``run_jobs``, so the same call continues a stopped one, and
    a call with further candidates or seeds runs only these.

    Args:
        candidates: see ``parse_candidate``.
        budget: the settings of all trainings except seed and block. Its ``out`` is the folder for everything.
        reference: the name of the candidate that the others are compared with.
        seeds: of the trainings, the same for all candidates.
        rule: how a block gets into the model.
        difference: in percent; the result says how many seeds would show it.
        data: the splits from ``open_comparison``. Default: opened here.
        ray: see ``run_jobs``.
        advice: what the error of a training that diverges says.
        hours: start no further training after this time. Only seeds that all candidates have been trained with then
            count.
        clock: returns seconds.

    Returns:
        A dict of JSON values:

        - 'candidates', a list of dicts with 'name', 'block', 'settings', 'kind', the costs of ``COSTS``, 'accuracies'
          (percent, after the last epoch) and 'epochs' (the validated epochs' accuracies) by seed, and the statistics of
          ``judge``; 'verdicts' and 'test', see there.
        - 'reference', 'model', 'data' (its name), 'budget', 'rule', 'seeds' (those that count), 'asked' (all), 'images'
          (validation images), 'errors' (failed jobs), 'versions', 'machine'.

    Raises:
        ImportError: the extra ``train`` or ``search`` is missing.
        ValueError, FileNotFoundError: a wrong candidate, setting or data set, before any work.
        OSError: ``budget.out`` cannot be written.
        RuntimeError: every training failed.
    """
    load_stats()
    began, rule, asked = clock(), rule or Rule(), list(dict.fromkeys(seeds))
    if not asked:
        raise ValueError('seeds is empty: a comparison needs at least one seed')
    for seed in asked:
        replace(budget, seed=seed)  # checks it
    if hours is not None and not hours > 0:
        raise ValueError(f'hours must be above 0, got {hours:g}')
    if not difference > 0:
        raise ValueError(f'difference must be above 0, got {difference:g}')
    names = [candidate.name for candidate in candidates]
    if reference not in names:
        raise ValueError(
            f'the reference {quoted(reference)} is not one of the blocks ({", ".join(map(quoted, names))}); add it, or '
            f'name one of them as the reference'
        )
    configs = check_candidates(candidates, budget, rule)
    samples = data or open_comparison(budget, ray)
    # What a training does follows from its candidate, so a later call with another rule is another comparison.
    shared = {'how': rule.how, **rule.insertion}
    held: list[dict[str, Any]] = [
        {'name': one.name, 'block': one.block, 'settings': {**shared, **one.settings}, **_code_of(one.block)}
        for one in candidates
    ]
    jobs: list[dict[str, Any]] = [{'key': f'cost of {one["name"]}', **one} for one in held]
    jobs += [
        {'key': _key(one['name'], seed), **one, 'seed': seed}
        for seed in asked  # outer loop, so that a stopped comparison has all candidates on some seeds
        for one in held
    ]
    base = configure(Candidate(NONE, NONE), budget, replace(rule, insertion={}))

    def work(job: dict[str, Any]) -> dict[str, Any]:
        config = configs[job['name']]
        return _train(config, budget.out, job, samples, advice) if 'seed' in job else measure(base, config, samples)

    results, errors = run_jobs(
        jobs,
        work,
        budget.out,
        settings={**_settings(budget), 'images': name_data(*samples)},
        describe=_describe,
        ray=ray,
        cpu=budget.cpu,
        stop=None if hours is None else lambda: clock() - began >= 3600 * hours,
    )
    ended = results.keys() | errors.keys()
    complete = [seed for seed in asked if all(_key(name, seed) in ended for name in names)]
    rows = []
    for one in candidates:
        trained = {str(seed): results[key] for seed in complete if (key := _key(one.name, seed)) in results}
        cost = results.get(f'cost of {one.name}', {})
        rows.append(
            {
                'name': one.name,
                'kind': one.kind,
                'block': one.block,
                'settings': one.settings,
                'accuracies': {seed: result['accuracy'] for seed, result in trained.items()},
                'epochs': {seed: result['history'] for seed, result in trained.items()},
                **{name: cost.get(name) for name in COSTS},
            }
        )
    if complete and not any(row['accuracies'] for row in rows):
        key, text = next(iter(errors.items()))
        raise RuntimeError(f'all {len(complete) * len(candidates)} trainings failed; the first one, {key}: {text}')
    return {
        'reference': reference,
        'model': budget.model,
        'data': data_title(budget.dataset or budget.data),
        'budget': _settings(budget),
        'rule': shared,
        'seeds': complete,
        'asked': asked,
        'images': len(samples[1]),
        **judge(rows, reference, {one.name for one in candidates if one.tested}, difference),
        'errors': errors,
        **environment(),
    }


def open_comparison(budget: TrainConfig, ray: Ray | None = None) -> tuple[Samples, Samples]:
    """The two splits of a comparison without broken images, for ``data`` of ``compare``.

    Raises the errors of ``compare`` about the budget and its folder.
    """
    if is_main():
        check_writable(Path(budget.out), make=False)
    with open_accelerator(budget, 'a comparison', 'search') as accelerator:
        samples = checked_samples(budget, accelerator)
    if is_main():
        check_jobs(budget.out, {**_settings(budget), 'images': name_data(*samples)}, ray)
    return samples


# ---- jobs ----


def _key(name: str, seed: int) -> str:
    return f'{name}, seed {seed}'


def _code_of(block: str) -> dict[str, str]:
    """A hash of the code of a class in a file, so that a changed one is another block."""
    if not is_code(block):
        return {}
    return {'code': hashlib.sha256(Path(f'{block.partition(".py:")[0]}.py').read_bytes()).hexdigest()[:16]}


def _settings(budget: TrainConfig) -> dict[str, Any]:
    """The settings that the trainings share."""
    return {name: value for name, value in fixed_settings(budget).items() if name not in ('seed', 'insert', *INSERTION)}


def _describe(job: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    if 'seed' in job:
        return f'accuracy {result["accuracy"]:.2f} %'
    return f'{result["parameters"]:,} parameters, {result["time_ratio"]:.2f} times the time of no attention'


def _train(
    config: TrainConfig, out: str, job: Mapping[str, Any], samples: tuple[Samples, Samples], advice: str
) -> dict[str, Any]:
    folder = job_folder(out, job['key'])
    folder.mkdir(parents=True, exist_ok=True)
    config = replace(config, seed=job['seed'], out=str(folder), resume=True)
    # Its output would hide the comparison's.
    with (folder / 'log.txt').open('a', encoding='utf-8') as log, contextlib.redirect_stdout(log):
        try:
            result = train(config, samples)
        except FloatingPointError as error:
            raise FloatingPointError(str(error).replace(ADVICE, advice)) from error
    history = {str(row['epoch']): row['acc1'] for row in result['history'] if 'acc1' in row}
    return {'accuracy': result['acc1'], 'loss': result['loss'], 'history': history}


def measure(base: TrainConfig, config: TrainConfig, samples: tuple[Samples, Samples]) -> dict[str, Any]:
    """The ``COSTS`` of a candidate, each measured in turns with the network without attention."""
    if not is_main():
        return {}
    device = torch.device('cuda' if torch.cuda.is_available() and not config.cpu else 'cpu')
    types = {'bf16': torch.bfloat16, 'fp16': torch.float16}
    networks, found = {}, {}
    for name, one in {'base': base, 'own': config}.items() if config != base else [('base', base)]:
        network, _ = build_network(one, len(samples[0].classes), weights=False)
        shape = image_config(network, one.img_size)['input_size']
        found = {
            'parameters': sum(parameter.numel() for parameter in network.parameters()),
            'macs': count_macs(network, shape),
        }
        networks[name] = network.to(device).to(memory_format=config.memory_format)
        if one.compile:
            compile_blocks(network)
    batch = 32 if max(shape) <= 64 else 8
    images = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0)).to(device)
    images = images.contiguous(memory_format=config.memory_format)
    with torch.autocast(device.type, types.get(config.mixed_precision), config.mixed_precision in types):
        forward = milliseconds_per_image(networks, images)
        step = milliseconds_per_image(networks, images, rounds=7, training=True)
        kept = {}
        for name, network in networks.items():
            kept[name] = kept_bytes(partial(network.train(), images), storages_of(network)) // batch
    return {
        **found,
        'ms_per_image': forward[name],
        'time_ratio': forward[name] / forward['base'],
        'step_ms_per_image': step[name],
        'step_ratio': step[name] / step['base'],
        'kept_bytes_per_image': kept[name],
        'kept_ratio': kept[name] / kept['base'],
        'device': torch.cuda.get_device_name(device) if device.type == 'cuda' else platform.machine(),
    }
