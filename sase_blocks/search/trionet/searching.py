"""One TrioNet search (arXiv 2111.07547; extra ``search``): supernet, evolution under a limit, extraction, a test.

The steps are the paper's by its abstract; how each is done is ours, see the modules. The same command run again goes
on where it stopped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data import resolve_data_config
from torch import Tensor

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
from sase_blocks.runs import be_deterministic, check_writable, drop_broken, open_accelerator, run_lock, say
from sase_blocks.search.data import Arrays, SearchData, check_arrays, check_same_data, find_samples, split_data
from sase_blocks.search.evolution import Candidate, Problem, evolve, load_optuna
from sase_blocks.search.significance import load_stats
from sase_blocks.train import TrainConfig, open_samples, train
from sase_blocks.viz import missing_matplotlib

from .config import TrioConfig
from .cost import Latency, Limits, bound, macs, parameters
from .result import describe_result, draw_result, format_result, write_network, write_result
from .sampling import draw
from .score import accuracy
from .space import TrioSpace
from .training import SupernetTraining, saved_supernet

__all__ = ['search']

PURE = 302  # stream of random numbers, see derive_seed
PURE_DRAWS = 500
NAMES = {'macs': 'max_macs', 'parameters': 'max_params', 'milliseconds': 'max_ms'}


def search(
    config: TrioConfig,
    images: Arrays | None = None,
    test: tuple[Tensor, Tensor] | None = None,
    *,
    ray: Ray | None = None,
) -> dict[str, Any]:
    """Search a network for a data set and a budget.

    Writes into ``config.out``: ``supernet.pt``, ``metrics.jsonl`` and ``tensorboard/`` while the supernet is trained;
    the study of the evolution; in the end ``architecture.json``, ``network.pt``, which is the found network with the
    supernet's weights, ``front.png`` and ``architecture.png``, and a run in ``finetuned/`` if asked for.

    Args:
        config: the settings.
        images: in place of ``config.data``: uint8 images (N, C, H, W), labels (N,) and the names of the classes.
        test: with ``images``: test images and labels of that kind; None for no test.
        ray: the machines on which networks are scored, once this process has trained the supernet. Default: by this
            process, or by all processes of its launch.

    Returns:
        What architecture.json holds, see ``describe_result``, with 'test_accuracy' and, if asked for, 'finetuned'
        (percent; None without test images).

    Raises:
        ImportError: accelerate, tensorboard, Optuna or SciPy is missing.
        ValueError, FileNotFoundError: a wrong setting, a limit that no network or every network keeps, wrong data, a
            run that cannot be resumed, a folder that another process writes (with ``config.resume`` this one waits for
            it); before any work.
        OSError: ``config.out`` cannot be written.
        FloatingPointError: a loss is no longer finite; the text names the step, the network and the last checkpoint.
        RuntimeError: three networks in a row could not be scored.
    """
    if config.finetune and images is not None:
        raise ValueError('finetune reads class folders or a data set of timm; for images in memory write a loop')
    with open_accelerator(config, 'a search', 'search') as accelerator, be_deterministic(config.deterministic):
        result, splits = _search(config, accelerator, images, test, ray)
        main = accelerator.is_main_process
        accelerator.wait_for_everyone()
    if config.finetune:
        trained = train(_finetuning(config, result['architecture']), splits)
        result['finetuned'] = trained['acc1']
    if main:
        write_result(result, Path(config.out))
        if missing_matplotlib() is None:
            draw_result(result, Path(config.out))
    return result


def _search(
    config: TrioConfig, accelerator: Any, images: Arrays | None, test: Any, ray: Ray | None
) -> tuple[dict[str, Any], tuple[Samples, Samples] | None]:
    """The result, and the training and the test split, checked, where the images are files."""
    out, main = Path(config.out), accelerator.is_main_process
    tell = say if main else (lambda text: None)

    # What can be wrong is found out first, and what takes long to find out last.
    load_stats()
    check_writable(out)
    saved_supernet(config)  # and again below, when no other run writes it
    if config.batch_size % accelerator.num_processes:
        raise ValueError(f'batch_size {config.batch_size} cannot be cut among {accelerator.num_processes} processes')
    if config.algorithm == 'nsga2' and config.population >= config.evaluations:
        raise ValueError(f'population {config.population} must be below evaluations, got {config.evaluations}')
    if config.finetune:
        _finetuning(config, '')  # whose settings are checked
    space = TrioSpace.parse(config.space)
    data = find_samples(config, accelerator) if images is None else images
    classes = list(data[2]) if isinstance(data, tuple) else data.classes
    tests = _find_test(config, accelerator, test) if images is None else test
    if isinstance(data, Samples):
        in_chans = config.in_chans
        (data,) = drop_broken(config.skip_broken, accelerator, data.in_channels(in_chans))
    else:
        in_chans = data[0].shape[1]
    if images is not None and test is not None:
        check_arrays(*test)
    if isinstance(tests, Samples):
        (tests,) = drop_broken(config.skip_broken, accelerator, tests.in_channels(in_chans))
    costs = _Costs(config.limits, len(classes), in_chans, accelerator.device)
    _check_limits(space, costs)
    load_optuna()
    if ray is not None:
        tell(ray.describe())
    parts = _split(config, accelerator, data, space, in_chans)
    if (missing := missing_matplotlib()) is not None:
        tell(f'no pictures will be drawn: {missing}')
    with run_lock(config, accelerator):
        saved = saved_supernet(config)
        if saved:
            check_same_data(out / 'supernet.pt', saved['data'], parts)
        training = SupernetTraining(config, accelerator, parts, in_chans, saved)
        weights = sum(p.numel() for p in training.supernet.parameters())
        tell(f'{space.size:.3g} networks of {weights:,} shared weights; {parts}')
        tell(
            f'supernet: {config.epochs} epochs of {training.steps} steps of {config.batch_size}, {config.networks + 2} '
            f'networks each, {config.sampling} sampling, {config.sharing} sharing; {accelerator.num_processes} '
            f'process(es) on {accelerator.device.type}; writing to {out}'
        )
        training.run().eval()

        pure = pure_networks(space, costs, config.seed)
        score = _Score(config, data, in_chans, training)

        def drive(each: Each) -> list[Candidate]:
            return evolve(
                Problem(
                    genes=space.genes,
                    decode=lambda genome: str(space.architecture(genome)),
                    fits=lambda text: costs.fit(Architecture.parse(text)),
                    cost=lambda text: costs.objective(Architecture.parse(text)),
                    score=score,
                    draw=lambda rng: draw(space, rng, config.law),
                ),
                _candidates_file(config),
                evaluations=config.evaluations,
                algorithm=config.algorithm,
                population=config.population,
                seeds=list(pure.values()),
                settings=_settings(config, space, training, costs.limits),
                seed=config.seed,
                each=each if ray is None else ray.each,
                say=tell,
            )

        candidates = share(score, drive, config.cpu)
    result = describe_result(
        space,
        candidates,
        {name: str(space.architecture(genome)) for name, genome in pure.items()},
        limits=costs.limits,
        objective=costs.name,
        config=asdict(config),
        facts=parts.facts,
        in_chans=in_chans,
    )
    tell(format_result(result))
    if main:
        found = training.calibrated(Architecture.parse(result['architecture']))
        write_network(found.extract(), result['architecture'], out)
        result['test_accuracy'] = None
        if tests is not None:
            # Once, and after everything is decided.
            part = _test_part(config, found.architecture, tests, training)
            batches = training.resized(part, found.architecture)
            result['test_accuracy'] = accuracy(found, batches, training.autocast())
            tell(
                f'test accuracy with the weights of the supernet: {result["test_accuracy"]:.2f} % of {len(part)} images'
            )
        write_result(result, out)
    splits = (data, tests) if isinstance(data, Samples) and isinstance(tests, Samples) else None
    return result, splits


class _Costs:
    """The costs of networks on this data, the limits on them, and the one that the evolution weighs."""

    def __init__(self, limits: Limits, classes: int, in_chans: int, device: torch.device) -> None:
        self.limits = limits
        given = {name: getattr(limits, name) for name in NAMES if getattr(limits, name) is not None}
        self.name = next(iter(given), 'macs')
        latency = Latency(device)
        self.measures = {
            'macs': cache(lambda network: macs(network, classes, in_chans)),
            'parameters': cache(lambda network: parameters(network, classes, in_chans)),
            'milliseconds': cache(latency),
        }
        self.given = given

    def fit(self, network: Architecture) -> bool:
        return all(self.measures[name](network) <= most for name, most in self.given.items())

    def objective(self, network: Architecture) -> float:
        return float(self.measures[self.name](network))


def _check_limits(space: TrioSpace, costs: _Costs) -> None:
    """Raise a ValueError for a limit below the cheapest network of the space or above the dearest one."""
    for name, most in costs.given.items():
        measure = costs.measures[name]
        if name == 'milliseconds':  # all parts of a space would take long to measure
            ends = [_end(space, measure, extent, pick) for extent, pick in (('smallest', min), ('largest', max))]
        else:
            ends = [bound(space, measure, pick)[1] for pick in (min, max)]
        cheapest, dearest = (float(measure(network)) for network in ends)
        if not cheapest <= most <= dearest:
            text, low, high = (_format(name, value) for value in (most, cheapest, dearest))
            where = 'below the cheapest' if most < cheapest else 'above the dearest'
            raise ValueError(
                f'{NAMES[name]} is {text}, {where} network of the space, which go from {low} ({ends[0]}) to {high} '
                f'({ends[1]}); choose a limit between them' + ('' if most < cheapest else ', or none')
            )


def _end(
    space: TrioSpace, measure: Callable[[Architecture], float], extent: str, pick: Callable[..., Any]
) -> Architecture:
    """All sizes at one end of the space, with the operators that cost least or most there."""
    rng = np.random.default_rng(0)
    pure = [draw(space, rng, partial(_always, only), extent) for only in np.eye(len(space.operators))]
    genome = pure[0]
    for gene in genome:
        options = [{**genome, gene: other[gene]} for other in pure]
        genome = pick(options, key=lambda one: measure(space.architecture(one)))
    return space.architecture(genome)


def _always(chances: np.ndarray, rng: np.random.Generator, count: int) -> np.ndarray:
    """A law that draws nothing."""
    return chances


def _format(name: str, value: float) -> str:
    return f'{value:.3g} ms' if name == 'milliseconds' else f'{value / 1e6:.4g}M'


def pure_networks(space: TrioSpace, costs: _Costs, seed: int = 0) -> dict[str, dict[str, str]]:
    """For each operator the genome of a network that has no other one wherever the space allows it.

    Of a few hundred draws the dearest within the limits; an operator of which none fits is left out.
    """
    found: dict[str, dict[str, str]] = {}
    for number, operator in enumerate(space.operators):
        rng = np.random.default_rng(derive_seed(seed, PURE, number))
        only = np.eye(len(space.operators))[number]
        best: tuple[float, dict[str, str]] | None = None
        for at in range(PURE_DRAWS):
            extent = {0: 'largest', 1: 'smallest'}.get(at)
            genome = draw(space, rng, partial(_always, only), extent)
            network = space.architecture(genome)
            if costs.fit(network) and (best is None or costs.objective(network) > best[0]):
                best = costs.objective(network), genome
        if best is not None and best[1] not in found.values():
            found[operator] = best[1]
    return found


def _candidates_file(config: TrioConfig) -> Path:
    """Limits and algorithm may vary over one supernet: each has a file of its own."""
    limits = [f'{name}={getattr(config, name)}' for name in NAMES.values() if getattr(config, name) is not None]
    name = '_'.join([config.algorithm, *limits, f'population={config.population}'])
    return Path(config.out) / 'candidates' / f'{name}.jsonl'


def _settings(config: TrioConfig, space: TrioSpace, training: SupernetTraining, limits: Limits) -> dict[str, Any]:
    """What the scores depend on."""
    names = {f.name for f in fields(config) if not f.metadata.get('free') and not f.metadata.get('place')}
    return {
        **{name: value for name, value in asdict(config).items() if name in names - {'space'}},
        'calibration': config.calibration,
        'space': space.to_dict(),
        'limits': asdict(limits),
        'data': training.data.facts['fingerprint'],
        'supernet': _fingerprint(training.found.state_dict()),
    }


def _fingerprint(state: Mapping[str, torch.Tensor]) -> str:
    """A short hash of trained weights: the same bits, the same text, on every machine."""
    digest = hashlib.sha256()
    for tensor in state.values():
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


class _Score:
    """The score of a network by its text; a machine of a cluster gets it without the supernet, and loads that once."""

    def __init__(
        self, config: TrioConfig, data: Samples | Arrays, in_chans: int, training: SupernetTraining | None
    ) -> None:
        self.config, self.data, self.in_chans, self.training = config, data, in_chans, training
        self.launch: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), 'training': None, 'config': replace(self.config, resume=True)}

    def __call__(self, text: str) -> float:
        with be_deterministic(self.config.deterministic):
            if self.training is None:
                self.training = self._load()
            return self.training.score(Architecture.parse(text))

    def _load(self) -> SupernetTraining:
        config, space = self.config, TrioSpace.parse(self.config.space)
        self.launch = open_accelerator(config, 'a search', 'search')  # held, or it would end with its last reference
        accelerator = self.launch.__enter__()
        parts = _split(config, accelerator, self.data, space, self.in_chans)
        training = SupernetTraining(config, accelerator, parts, self.in_chans, saved_supernet(config))
        training.found.eval()
        return training


def _split(config: TrioConfig, accelerator: Any, data: Samples | Arrays, space: TrioSpace, in_chans: int) -> SearchData:
    """``split_data`` of images that are checked already."""
    data_config = _data_config(space.image_sizes[-1], in_chans)
    memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
    device = accelerator.device
    return split_data(data, config, data_config, device=device, memory_format=memory_format, trains_on_both=False)


def _data_config(size: int, in_chans: int) -> dict[str, Any]:
    """timm's: how images are brought to a network of this size."""
    return config_for(resolve_data_config({'img_size': size}, pretrained_cfg=default_cfgs['trionet']), in_chans)


def _find_test(config: TrioConfig, accelerator: Any, test: Any) -> Samples | None:
    """The test split; None where class folders have none, unless a fine-tuning needs it."""
    if test is not None:
        raise ValueError('test goes with images; the test split of config.data is found there')
    try:
        with accelerator.main_process_first():  # it may download
            return open_samples(config)[1]
    except FileNotFoundError as error:
        if config.finetune:
            raise
        if accelerator.is_main_process:
            say(f'there will be no test: {error}')
        return None


def _test_part(
    config: TrioConfig, network: Architecture, tests: Samples | tuple[Tensor, Tensor], training: SupernetTraining
) -> Batches:
    """The test images as batches."""
    device = training.accelerator.device
    if isinstance(tests, Samples):
        transform = create_transforms(_data_config(network.image_size, training.in_chans))[1]
        return Batches(TransformedSamples(tests, transform, config.seed, 2), workers=config.workers, device=device)
    seen = training.data.training.images
    assert isinstance(seen, SmallImages)
    mean, std = ((statistic / 255).flatten().tolist() for statistic in (seen.mean, seen.std))
    return Batches(SmallImages(*tests, mean, std, config.seed, 2, device=device), device=device)


def _finetuning(config: TrioConfig, architecture: str) -> TrainConfig:
    """Further training of the found network on all training images, tested once, at the end."""
    common = {f.name for f in fields(TrainConfig)} & {f.name for f in fields(TrioConfig)}
    apart = {'out', 'epochs', 'lr', 'resume', 'ema_decay', 'label_smoothing'}
    return TrainConfig(
        **{name: getattr(config, name) for name in common - apart},
        # Another limit finds another network: each has a folder of its own.
        out=str(Path(config.out) / 'finetuned' / hashlib.sha256(architecture.encode()).hexdigest()[:8]),
        model='trionet',
        model_args={'architecture': architecture, 'in_chans': config.in_chans},
        checkpoint=str(Path(config.out) / 'network.pt'),
        epochs=config.finetune,
        lr=config.finetune_lr,
        label_smoothing=config.label_smoothing,
        eval_every=0,
        resume=True,
    )
