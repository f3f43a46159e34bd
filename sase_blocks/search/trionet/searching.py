"""One TrioNet search (arXiv 2111.07547; extra ``search``): supernet, evolution under a limit, extraction, a test.

The steps are the paper's by its abstract. The other modules have the details.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from timm.data import resolve_data_config
from torch import Tensor

from sase_blocks.checkpoint import save_checkpoint
from sase_blocks.comparing.significance import load_stats
from sase_blocks.data import (
    Batches,
    Samples,
    SmallImages,
    TransformedSamples,
    config_for,
    create_transforms,
    derive_seed,
)
from sase_blocks.jobs import Each, Ray, share
from sase_blocks.models import Architecture
from sase_blocks.models.trionet import default_cfgs
from sase_blocks.runs import (
    be_deterministic,
    check_writable,
    drop_broken,
    is_main,
    open_accelerator,
    open_samples,
    run_lock,
    say,
    write_json,
)
from sase_blocks.search.data import Arrays, check_arrays, describe_data, split_data
from sase_blocks.search.evolution import Candidate, Problem, evolve, load_optuna
from sase_blocks.settings import fixed_settings, shared_settings
from sase_blocks.train import TrainConfig, train
from sase_blocks.viz import missing_matplotlib

from .config import TrioConfig
from .cost import SETTINGS, Costs
from .result import RESULT, describe_result, draw_result, format_result
from .score import accuracy
from .space import Law, TrioSpace, draw
from .training import SupernetTraining, saved_supernet

PURE = 302  # stream of random numbers, see derive_seed
PURE_DRAWS = 500


def search(
    config: TrioConfig,
    images: Arrays | None = None,
    test: tuple[Tensor, Tensor] | None = None,
    *,
    ray: Ray | None = None,
) -> dict[str, Any]:
    """Search a network for a data set and a budget.

    Writes to ``config.out``: ``supernet.pt``, ``metrics.jsonl`` and ``tensorboard/`` while the supernet trains;
    ``candidates/`` while networks are scored; at the end ``architecture.json``, ``network.pt`` (the found network with
    the supernet's weights), ``front.png`` and ``architecture.png``, and a run in ``finetuned/`` if asked for.

    Args:
        images: in place of ``config.data``: uint8 images (N, C, H, W), labels (N,) and the names of the classes.
        test: with ``images``: test images and labels of the same form; None for no test.
        ray: the machines that score networks, after this process has trained the supernet. Default: this process, or
            all processes of its launch.

    Returns:
        The content of architecture.json, see ``describe_result``, with 'test_accuracy' and, if asked for, 'finetuned'
        (percent; None without test images).

    Raises:
        ImportError, ValueError, OSError, FloatingPointError: as ``train.train``; also, before any work, Optuna or SciPy
            is missing, or no network or every network meets a limit.
        RuntimeError: three networks in a row could not be scored.
    """
    if config.finetune and images is not None:
        raise ValueError('finetune reads class folders or a data set of timm; for images in memory write a loop')
    with open_accelerator(config, 'a search', 'search') as accelerator, be_deterministic(config.deterministic):
        result, splits = _search(config, accelerator, images, test, ray)
        accelerator.wait_for_everyone()
    if config.finetune:
        result['finetuned'] = train(_finetuning(config, result['architecture']), splits)['acc1']
    if is_main():
        write_json(Path(config.out) / RESULT, result)
        if missing_matplotlib() is None:
            draw_result(result, Path(config.out), config.title)
    return result


def _search(
    config: TrioConfig, accelerator: Any, images: Arrays | None, test: Any, ray: Ray | None
) -> tuple[dict[str, Any], tuple[Samples, Samples] | None]:
    """The result, and the training and the test split, if the images are files."""
    out = Path(config.out)
    tell = say if accelerator.is_main_process else (lambda text: None)

    # Cheap checks first, slow ones last.
    load_stats()
    load_optuna()
    check_writable(out)
    saved_supernet(config)  # and again below, when no other run writes it
    if config.finetune:
        _finetuning(config, '')  # checks its settings
    space = TrioSpace.parse(config.space)
    if ray is not None:
        tell(ray.describe())
    data: Samples | Arrays
    if images is None:
        data, test = _open_images(config, accelerator, test)
        classes, in_chans = data.classes, config.in_chans
    else:
        data, classes, in_chans = images, list(images[2]), images[0].shape[1]
        if test is not None:
            check_arrays(*test)
    costs = Costs(len(classes), in_chans, accelerator.device, **config.limits)
    costs.check(space)
    if (missing := missing_matplotlib()) is not None:
        tell(f'no pictures will be drawn: {missing}')
    with run_lock(config, accelerator):
        training = _open_training(config, accelerator, data)
        weights = sum(p.numel() for p in training.supernet.parameters())
        tell(f'{space.size:.3g} networks of {weights:,} shared weights; {describe_data(training.data.facts)}')
        tell(
            f'supernet: {config.epochs} epochs of {training.steps} steps of {config.batch_size}, {config.networks + 2} '
            f'networks each, {config.sampling} sampling, {config.sharing} sharing; {accelerator.num_processes} '
            f'process(es) on {accelerator.device.type}; writing to {out}'
        )
        training.run().eval()

        pure = pure_networks(space, costs, config.seed)
        score = _Score(config, data, training)

        def drive(each: Each) -> list[Candidate]:
            return evolve(
                Problem(
                    genes=space.genes,
                    decode=lambda genome: str(space.architecture(genome)),
                    fits=lambda text: costs.fit(Architecture.parse(text)),
                    cost=lambda text: costs(Architecture.parse(text)),
                    score=score,
                    draw=lambda rng: draw(space, rng, config.law),
                ),
                _candidates_file(config),
                evaluations=config.evaluations,
                algorithm=config.algorithm,
                population=config.population,
                seeds=list(pure.values()),
                settings=_settings(config, training),
                seed=config.seed,
                each=each,
            )

        candidates = share(score, drive, cpu=config.cpu, ray=ray)
    texts = {name: str(space.architecture(genome)) for name, genome in pure.items()}
    result = describe_result(space, candidates, texts, costs, config=asdict(config), facts=training.data.facts)
    tell(format_result(result))
    if accelerator.is_main_process:
        found = training.calibrated(Architecture.parse(result['architecture']))
        saved = {'arch': 'trionet', 'architecture': result['architecture'], 'state_dict': found.extract().state_dict()}
        save_checkpoint(saved, out / 'network.pt')
        result['test_accuracy'] = None
        if test is not None:
            # Once, when everything is decided.
            part = _test_part(found.architecture, test, training)
            percent = accuracy(found, training.resized(part, found.architecture), accelerator.autocast())
            result['test_accuracy'] = percent
            tell(f'test accuracy with the weights of the supernet: {percent:.2f} % of {len(part)} images')
        write_json(out / RESULT, result)
    return result, (data, test) if isinstance(data, Samples) and isinstance(test, Samples) else None


def _open_images(config: TrioConfig, accelerator: Any, test: Any) -> tuple[Samples, Samples | None]:
    """The training split, and the test split unless class folders have none, without broken images."""
    if test is not None:
        raise ValueError('test goes with images; the test split of config.data is found there')
    try:
        splits = open_samples(config, accelerator, both=True)
    except FileNotFoundError as error:
        if config.finetune:  # which needs it
            raise
        splits = open_samples(config, accelerator, both=False)
        if accelerator.is_main_process:
            say(f'there will be no test: {error}')
    splits = [samples.in_channels(config.in_chans) for samples in splits]
    data, *tests = drop_broken(config.skip_broken, accelerator, *splits)
    return data, tests[0] if tests else None


def pure_networks(space: TrioSpace, costs: Costs, seed: int = 0) -> dict[str, dict[str, str]]:
    """For each operator, the genome of a network with no other operator wherever the space allows that.

    It is the most expensive of a few hundred draws within the limits. An operator without one is left out.
    """

    def only(number: int) -> Law:
        return lambda rng, count: np.eye(count)[number]

    found: dict[str, dict[str, str]] = {}
    extents = ['largest', 'smallest', *[None] * (PURE_DRAWS - 2)]
    for number, operator in enumerate(space.operators):
        rng = np.random.default_rng(derive_seed(seed, PURE, number))
        drawn = [draw(space, rng, only(number), extent) for extent in extents]
        fitting = [genome for genome in drawn if costs.fit(space.architecture(genome))]
        if fitting:
            best = max(fitting, key=lambda genome: costs(space.architecture(genome)))  # the first of equal ones
            if best not in found.values():
                found[operator] = best
    return found


def _candidates_file(config: TrioConfig) -> Path:
    """A file for each algorithm and each set of limits, which may all use one supernet."""
    limits = [f'{name}={getattr(config, name)}' for name in SETTINGS.values() if getattr(config, name) is not None]
    name = '_'.join([config.algorithm, *limits, f'population={config.population}'])
    return Path(config.out) / 'candidates' / f'{name}.jsonl'


def _settings(config: TrioConfig, training: SupernetTraining) -> dict[str, Any]:
    """The settings and data that the scores depend on."""
    digest = hashlib.sha256()
    for tensor in training.found.state_dict().values():
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return {
        **fixed_settings(config),
        'calibration': config.calibration,
        'space': training.space.to_dict(),
        'limits': config.limits,
        'data': training.data.facts['fingerprint'],
        'supernet': digest.hexdigest()[:16],  # of the trained weights, the same on every machine
    }


class _Score:
    """The score of a network by its text. It goes to a Ray worker without the supernet, which loads that once."""

    def __init__(self, config: TrioConfig, data: Samples | Arrays, training: SupernetTraining | None) -> None:
        self.config, self.data, self.training = config, data, training

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), 'training': None, 'config': replace(self.config, resume=True)}

    def __call__(self, text: str) -> float:
        with be_deterministic(self.config.deterministic):
            if self.training is None:
                self.launch = open_accelerator(self.config, 'a search', 'search')  # kept, or it would end here
                accelerator = self.launch.__enter__()
                self.training = _open_training(self.config, accelerator, self.data)
                self.training.found.eval()
            return self.training.score(Architecture.parse(text))


def _open_training(config: TrioConfig, accelerator: Any, data: Samples | Arrays) -> SupernetTraining:
    """The training of the supernet, where a checkpoint has left it. The images are checked already."""
    in_chans = config.in_chans if isinstance(data, Samples) else data[0].shape[1]
    data_config = _data_config(TrioSpace.parse(config.space).image_sizes[-1], in_chans)
    parts = split_data(data, config, data_config, device=accelerator.device, trains_on_both=False)
    return SupernetTraining(config, accelerator, parts, in_chans, saved_supernet(config))


def _data_config(size: int, in_chans: int) -> dict[str, Any]:
    """timm's settings of the transforms for a network of this size."""
    return config_for(resolve_data_config({'img_size': size}, pretrained_cfg=default_cfgs['trionet']), in_chans)


def _test_part(network: Architecture, tests: Samples | tuple[Tensor, Tensor], training: SupernetTraining) -> Batches:
    """The test images as batches."""
    config, device = training.config, training.accelerator.device
    if isinstance(tests, Samples):
        transform = create_transforms(_data_config(network.image_size, training.in_chans))[1]
        return Batches(TransformedSamples(tests, transform, config.seed, 2), workers=config.workers, device=device)
    seen = training.data.training.images
    assert isinstance(seen, SmallImages)
    mean, std = ((statistic / 255).flatten().tolist() for statistic in (seen.mean, seen.std))
    return Batches(SmallImages(*tests, mean, std, config.seed, 2, device=device), device=device)


def _finetuning(config: TrioConfig, architecture: str) -> TrainConfig:
    """Further training of the found network on all training images, tested once, at the end."""
    return TrainConfig(
        **shared_settings(config, TrainConfig, leave_out=('out', 'epochs', 'lr', 'resume', 'ema_decay')),
        # Another limit finds another network, which gets its own folder.
        out=str(Path(config.out) / 'finetuned' / hashlib.sha256(architecture.encode()).hexdigest()[:8]),
        model='trionet',
        model_args={'architecture': architecture, 'in_chans': config.in_chans},
        checkpoint=str(Path(config.out) / 'network.pt'),
        epochs=config.finetune,
        lr=config.finetune_lr,
        eval_every=0,
        resume=True,
    )
