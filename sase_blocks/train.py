"""Training of any timm model on image data: one readable loop on accelerate (extra ``train``).

The same command runs on one CPU, one GPU, or under ``torchrun`` / ``accelerate launch`` on many machines. Everything
random is a function of the seed and of the place in the run, so the checkpoint at the end of an epoch is all that a
resumed run needs to arrive at the weights of an uninterrupted one.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import math
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.data import resolve_data_config
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from .blocks import compile_blocks
from .checkpoint import read_checkpoint, save_checkpoint
from .convert import load_checkpoint
from .data import (
    MODEL,
    EpochSampler,
    Samples,
    TransformedSamples,
    create_transforms,
    derive_seed,
    find_broken,
    open_data,
)

LOOK_EVERY = 20  # steps between looks at the loss; a look waits for the GPU
LINE_EVERY = 30.0  # seconds between progress lines where there is no terminal


def _setting(default: Any, help: str, **more: Any) -> Any:
    """A field of TrainConfig with the text that the command line shows for it."""
    return field(default=default, metadata={'help': help, **more})


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run; each is also an option of ``sase-blocks train``, where its help text shows."""

    data: str = field(metadata={'help': 'folder with train/CLASS/* and val/CLASS/* (or validation/, test/) in it'})
    model: str = _setting('resnet50_sase', 'any timm model by name')
    out: str = _setting('runs/train', 'folder for checkpoints, metrics.jsonl and the TensorBoard log')
    resume: bool = _setting(False, 'continue the run in --out; start it where it has no checkpoint yet', free=True)

    model_args: dict[str, Any] = field(default_factory=dict, metadata={'help': 'arguments of the model'})
    pretrained: bool = _setting(False, "start from timm's pretrained weights (may download)")
    checkpoint: str | None = _setting(None, 'start from the weights in this file (.pt, .pth, .safetensors)')
    img_size: int | None = _setting(None, "image height and width in px (default: the model's)")

    dataset: str = _setting('', "a data set by timm's name for it, such as torch/cifar10; --data is then its root")
    train_split: str = _setting('train', 'training split of a --dataset')
    val_split: str = _setting('validation', 'validation split of a --dataset')
    num_classes: int | None = _setting(None, 'number of classes, where a --dataset does not tell')
    download: bool = _setting(False, 'let a --dataset download itself', free=True)
    check: bool = _setting(True, 'decode every image once before training', free=True)
    skip_broken: bool = _setting(False, 'leave broken images out, with a warning')
    hflip: float = _setting(0.5, 'probability of a horizontal flip; 0 for text and digits')
    auto_augment: str | None = _setting(None, "a policy of timm for images above 64 px, such as 'rand-m9-mstd0.5'")

    epochs: int = _setting(100, 'passes over the training images')
    batch_size: int = _setting(128, 'images a step, over all processes together')
    opt: str = _setting('sgd', 'optimizer', choices=('sgd', 'adamw'))
    lr: float = _setting(0.1, 'highest learning rate')
    warmup: float = _setting(0.05, 'part of all steps in which the learning rate rises; it then falls as a cosine to 0')
    momentum: float = _setting(0.9, 'momentum of SGD')
    weight_decay: float = _setting(1e-4, 'weight decay, of all parameters but the one-dimensional')
    label_smoothing: float = _setting(0.0, 'label smoothing')
    clip_grad: float | None = _setting(None, 'largest norm of the gradient')
    ema_decay: float | None = _setting(None, 'keep and evaluate an average of the weights with this decay, e.g. 0.9999')

    seed: int = _setting(0, 'seed of everything random')
    mixed_precision: str = _setting('no', 'arithmetic below fp32', choices=('no', 'bf16', 'fp16'))
    channels_last: bool = _setting(False, 'channels_last memory format; often faster on GPUs and in bf16')
    compile: bool = _setting(False, 'compile the attention blocks of the model')
    deterministic: bool = _setting(False, 'only algorithms that give the same result every time; slower on GPUs')
    cpu: bool = _setting(False, 'train on the CPU though there is a GPU', free=True)
    workers: int = _setting(4, 'processes that load images, for each training process', free=True)
    tensorboard: bool = _setting(True, 'write a TensorBoard log', free=True)

    def __post_init__(self) -> None:
        def demand(good: bool, name: str, expected: str) -> None:
            if not good:
                raise ValueError(f'{name} must be {expected}, got {getattr(self, name)!r}')

        for name in ('epochs', 'batch_size'):
            demand(getattr(self, name) >= 1, name, 'at least 1')
        for name in ('seed', 'workers', 'weight_decay'):
            demand(getattr(self, name) >= 0, name, 'at least 0')
        for name in ('img_size', 'num_classes'):
            demand(getattr(self, name) is None or getattr(self, name) >= 1, name, 'at least 1')
        for name in ('warmup', 'label_smoothing', 'momentum'):
            demand(0 <= getattr(self, name) < 1, name, 'at least 0 and below 1')
        demand(self.lr > 0, 'lr', 'above 0')
        demand(0 <= self.hflip <= 1, 'hflip', 'a probability')
        demand(self.clip_grad is None or self.clip_grad > 0, 'clip_grad', 'above 0')
        demand(self.ema_decay is None or 0 < self.ema_decay < 1, 'ema_decay', 'between 0 and 1')
        demand(self.check or not self.skip_broken, 'skip_broken', 'used with the check of the images')
        for setting in fields(self):
            choices = setting.metadata.get('choices')
            demand(not choices or getattr(self, setting.name) in choices, setting.name, f'one of {choices}')


def check_model_name(name: str) -> None:
    """Raise a ValueError that suggests the nearest names unless timm knows the model ``name``."""
    if ':' not in name and not timm.is_model(name):  # 'hf-hub:...' and 'local-dir:...' are for timm to judge
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f'; did you mean {" or ".join(near)}?' if near else ''
        raise ValueError(f'there is no model {name!r}{hint}')


def build_model(name: str, num_classes: int | None = None, **model_args: Any) -> nn.Module:
    """``timm.create_model``, where wrong names and arguments are a ValueError of one line."""
    check_model_name(name)
    if num_classes is not None:
        model_args['num_classes'] = num_classes
    try:
        model: nn.Module = timm.create_model(name, **model_args)
    except (TypeError, AttributeError, AssertionError) as error:
        raise ValueError(f'{name} cannot be built with {model_args}: {error}') from error
    return model


def train(config: TrainConfig) -> dict[str, Any]:
    """Train a model and keep its checkpoints.

    Writes into ``config.out``: ``last.pt`` (everything needed to resume) and ``best.pt`` (weights of the best epoch so
    far) after each epoch, ``metrics.jsonl`` (one line an epoch) and ``tensorboard/``.

    Args:
        config: the settings.

    Returns:
        Of the last and the best epoch: 'epochs', 'acc1' (percent), 'loss', 'best_acc1', 'best_epoch'; 'history', the
        lines of metrics.jsonl; 'checkpoint', the path of last.pt.

    Raises:
        ImportError: accelerate or tensorboard is missing (extra ``train``).
        ValueError, FileNotFoundError: a wrong setting, wrong data, a run that cannot be resumed; before any work.
        OSError: ``config.out`` cannot be written, before any work; a full disk, after which the last good checkpoint
            is still there.
        FloatingPointError: the loss is no longer finite.
    """
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
        from accelerate.utils import DataLoaderConfiguration

        if config.tensorboard:
            import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f'training needs accelerate and tensorboard ({error}): pip install "sase-blocks[train]"'
        ) from error
    accelerator = Accelerator(
        cpu=config.cpu,
        mixed_precision=config.mixed_precision,
        # A batch is cut among the processes, so that their number does not change the run.
        dataloader_config=DataLoaderConfiguration(split_batches=True, non_blocking=True),
    )
    try:
        return _train(config, accelerator)
    finally:
        accelerator.end_training()
        AcceleratorState._reset_state(reset_partial_state=True)  # or a second call would get this call's settings


def _train(config: TrainConfig, accelerator: Any) -> dict[str, Any]:
    main, device = accelerator.is_main_process, accelerator.device
    out = Path(config.out)
    last, best_path, metrics = out / 'last.pt', out / 'best.pt', out / 'metrics.jsonl'

    # What can be wrong is found out first, and what takes long to find out last.
    _check_writable(out)
    saved = _saved_run(config, last)
    if config.batch_size % accelerator.num_processes:
        raise ValueError(f'batch_size {config.batch_size} cannot be cut among {accelerator.num_processes} processes')
    check_model_name(config.model)
    train_samples, val_samples = _open_samples(config, accelerator)
    classes = train_samples.classes
    torch.manual_seed(config.seed)
    model = build_model(config.model, len(classes), pretrained=config.pretrained, **_model_args(config))
    report = load_checkpoint(model, config.checkpoint, keep_head=True) if config.checkpoint and not saved else None
    if config.check:
        train_samples, val_samples = _leave_out_broken(config, accelerator, train_samples, val_samples)
    steps_per_epoch = len(train_samples) // config.batch_size  # a last partial batch is dropped
    if steps_per_epoch == 0:
        raise ValueError(f'{len(train_samples)} training images are fewer than one batch of {config.batch_size}')
    facts = {'classes': classes, 'train': len(train_samples), 'val': len(val_samples)}
    if saved and saved['data'] != facts:
        raise ValueError(f'{last} was trained on other data: {_describe(saved["data"])}, this is {_describe(facts)}')
    if config.deterministic:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False

    memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
    model.to(device).to(memory_format=memory_format)
    optimizer = create_optimizer_v2(
        model,
        opt={'sgd': 'momentum'}.get(config.opt, config.opt),  # what timm calls sgd is Nesterov's
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
    )
    steps = config.epochs * steps_per_epoch
    warmup = round(config.warmup * steps)
    # The learning rate is a function of the step, so there is no state of it to save.
    scheduler = CosineLRScheduler(
        optimizer, steps, warmup_t=warmup, warmup_lr_init=config.lr / max(warmup, 1), t_in_epochs=False
    )
    ema = ModelEmaV3(model, decay=config.ema_decay) if config.ema_decay else None
    if config.compile:
        compile_blocks(model)

    size = {} if config.img_size is None else {'img_size': config.img_size}
    data_config = resolve_data_config(size, model=model)
    train_transform, val_transform = create_transforms(
        data_config, hflip=config.hflip, auto_augment=config.auto_augment
    )
    sampler = EpochSampler(len(train_samples), config.seed, shuffle=True)
    workers = min(config.workers, os.cpu_count() or 1)
    loading: dict[str, Any] = {
        'batch_size': config.batch_size,
        'num_workers': workers,
        'persistent_workers': workers > 0,
        'pin_memory': device.type == 'cuda',
    }
    train_loader = DataLoader(
        TransformedSamples(train_samples, train_transform, config.seed), sampler=sampler, drop_last=True, **loading
    )
    val_loader = DataLoader(
        TransformedSamples(val_samples, val_transform, config.seed),
        sampler=EpochSampler(len(val_samples), config.seed, shuffle=False),
        **loading,
    )

    start, best, scores = 0, {'acc1': -1.0, 'epoch': 0}, {}
    if saved:
        start, best, scores = saved['epoch'], saved['best'], saved['scores']
        model.load_state_dict(saved['state_dict'])
        optimizer.load_state_dict(saved['optimizer'])
        if ema:
            ema.module.load_state_dict(saved['state_dict_ema'])
    parallel, optimizer, train_loader, val_loader = accelerator.prepare(model, optimizer, train_loader, val_loader)
    if saved and accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(saved['scaler'])

    history = _rows_until(metrics, start)
    writer = None
    if main:
        # What a killed run wrote after its last checkpoint is written again, so it goes.
        temporary = out / 'metrics.jsonl.tmp'
        temporary.write_text(''.join(json.dumps(row) + '\n' for row in history), encoding='utf-8')
        temporary.replace(metrics)
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(str(out / 'tensorboard'), purge_step=start * steps_per_epoch)
    progress = Progress(steps, start * steps_per_epoch, enabled=main)
    parameters = sum(p.numel() for p in model.parameters())
    shape = ' x '.join(str(n) for n in data_config['input_size'])
    progress.line(f'{config.model}: {parameters / 1e6:.3f} M parameters; {_describe(facts)}, as {shape}')
    progress.line(
        f'{config.epochs} epochs of {steps_per_epoch} steps of {config.batch_size} images; {accelerator.num_processes} '
        f'process(es) on {device.type}, mixed precision {config.mixed_precision}; writing to {out}'
    )
    if report:
        progress.line(str(report))
    if saved:
        progress.line(f'resuming after epoch {start} of {config.epochs}')

    step = start * steps_per_epoch
    for epoch in range(start, config.epochs):
        began, loss_sum = time.perf_counter(), 0.0
        sampler.epoch = epoch
        parallel.train()
        unseen: list[Tensor] = []  # losses since the last look
        for images, labels in _named_errors(train_loader):
            # Dropout and the like: a function of the step, too, whatever drew random numbers in between.
            torch.manual_seed(derive_seed(config.seed, MODEL, step, accelerator.process_index))
            scheduler.step_update(step)
            logits = parallel(images.contiguous(memory_format=memory_format))
            loss = F.cross_entropy(logits, labels, label_smoothing=config.label_smoothing)
            accelerator.backward(loss)
            if config.clip_grad is not None:
                accelerator.clip_grad_norm_(parallel.parameters(), config.clip_grad)
            optimizer.step()
            optimizer.zero_grad()
            if ema:
                ema.update(model)
            unseen.append(loss.detach())
            step += 1
            if len(unseen) == LOOK_EVERY or step % steps_per_epoch == 0:
                losses = accelerator.reduce(torch.stack(unseen), 'mean').tolist()
                _check_finite(losses, step - len(losses) + 1, last)
                loss_sum += sum(losses)
                progress.update(step, f'epoch {epoch + 1}/{config.epochs}', losses[-1])
                unseen = []
        seconds = time.perf_counter() - began

        evaluated = ema.module if ema else model
        if accelerator.num_processes > 1:  # batch-norm statistics: the main process's, which are the ones saved
            for buffer in [*model.buffers(), *evaluated.buffers()]:
                torch.distributed.broadcast(buffer, 0)
        scores = evaluate(evaluated, val_loader, accelerator, memory_format)
        _check_finite([scores['val_loss']], step, last)
        row = {
            'epoch': epoch + 1,
            'step': step,
            'lr': optimizer.param_groups[0]['lr'],
            'train_loss': loss_sum / steps_per_epoch,
            **scores,
            'images_per_second': steps_per_epoch * config.batch_size / seconds,
        }
        history.append(row)
        improved = scores['acc1'] > best['acc1']
        if improved:
            best = {'acc1': scores['acc1'], 'epoch': epoch + 1}
        if main:
            weights = {
                'arch': config.model,
                'epoch': epoch + 1,
                'state_dict': model.state_dict(),
                **({'state_dict_ema': ema.module.state_dict()} if ema else {}),
                'best': best,
                'scores': scores,
                'config': asdict(config),
                'data': facts,
            }
            # In this order: whatever a kill leaves undone is done again, the same, by the resumed epoch.
            with metrics.open('a', encoding='utf-8') as file:
                file.write(json.dumps(row) + '\n')
            if improved:
                save_checkpoint(weights, best_path)
            scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
            save_checkpoint({**weights, 'optimizer': optimizer.state_dict(), 'scaler': scaler}, last)
            if writer:
                for name, value in row.items():
                    writer.add_scalar(name, value, step)
                writer.flush()
        accelerator.wait_for_everyone()
        progress.line(
            f'epoch {epoch + 1}/{config.epochs}: training loss {row["train_loss"]:.4f}, validation loss '
            f'{scores["val_loss"]:.4f}, accuracy {scores["acc1"]:.2f} % (best {best["acc1"]:.2f} %), '
            f'{row["images_per_second"]:.0f} images/s, {progress.left()} left'
        )
    progress.close()
    if writer:
        writer.close()
    return {
        'epochs': config.epochs,
        'acc1': scores['acc1'],
        'loss': scores['val_loss'],
        'best_acc1': best['acc1'],
        'best_epoch': best['epoch'],
        'history': history,
        'checkpoint': str(last),
    }


@torch.no_grad()
def evaluate(
    model: nn.Module, loader: Any, accelerator: Any, memory_format: torch.memory_format = torch.contiguous_format
) -> dict[str, float]:
    """Mean loss and top-1 (with more than five classes also top-5) accuracy in percent over a prepared loader."""
    model.eval()
    loss_sum = torch.zeros((), dtype=torch.float64, device=accelerator.device)
    ranks: list[Tensor] = []
    for images, labels in _named_errors(loader):
        with accelerator.autocast():
            logits = model(images.contiguous(memory_format=memory_format))
        logits = logits.float()
        losses = F.cross_entropy(logits, labels, reduction='none')
        rank = (logits > logits.gather(1, labels[:, None])).sum(1)  # classes that are ahead of the right one
        losses, rank = accelerator.gather_for_metrics((losses, rank))  # less what fills up the last batch
        loss_sum += losses.double().sum()
        ranks.append(rank)
    ahead = torch.cat(ranks)
    scores = {'val_loss': loss_sum.item() / len(ahead), 'acc1': 100 * (ahead < 1).double().mean().item()}
    if logits.shape[1] > 5:
        scores['acc5'] = 100 * (ahead < 5).double().mean().item()
    return scores


class Progress:
    """A bar over all steps with the time left on a terminal, and plain lines now and then elsewhere."""

    def __init__(self, total: int, done: int, *, enabled: bool) -> None:
        self.bar = tqdm(total=total, initial=done, unit='step', disable=None if enabled else True)
        self.enabled = enabled
        self.total, self.first, self.done = total, done, done
        self.began = self.last_line = time.perf_counter()

    def update(self, done: int, label: str, loss: float) -> None:
        self.bar.set_description(label, refresh=False)
        self.bar.set_postfix_str(f'loss {loss:.4f}', refresh=False)
        self.bar.update(done - self.done)
        self.done = done
        if self.bar.disable and time.perf_counter() - self.last_line > LINE_EVERY:
            self.line(f'{label}: step {done}/{self.total}, loss {loss:.4f}, {self.left()} left')

    def left(self) -> str:
        """Time left of the run as H:MM:SS."""
        rate = (time.perf_counter() - self.began) / max(self.done - self.first, 1)
        return str(tqdm.format_interval(rate * (self.total - self.done)))

    def line(self, text: str) -> None:
        if self.enabled:
            self.last_line = time.perf_counter()
            if self.bar.disable:
                print(text, flush=True)
            else:
                self.bar.write(text)

    def close(self) -> None:
        self.bar.close()


def _check_writable(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise OSError(f'the output folder {out} cannot be written: {error.strerror or error}') from error


def _saved_run(config: TrainConfig, last: Path) -> dict[str, Any] | None:
    """The checkpoint to resume from, None for a fresh start. Raises ValueError if it does not belong to ``config``."""
    if not last.exists():
        return None
    if not config.resume:
        raise ValueError(f'{last.parent} holds a run already: --resume continues it, another --out starts a new one')
    saved = read_checkpoint(last)
    if 'config' not in saved or 'optimizer' not in saved:
        raise ValueError(f'{last} is not a checkpoint of `sase-blocks train`, it cannot be resumed')
    differing = []
    for setting in fields(config):
        now = getattr(config, setting.name)
        before = saved['config'].get(setting.name, now)
        # Where things lie may change; what they hold is compared by classes and counts.
        if before != now and not setting.metadata.get('free') and setting.name not in ('data', 'out', 'checkpoint'):
            differing.append(f'{setting.name} was {before!r} and is {now!r}')
    if differing:
        raise ValueError(f'{last} was made with other settings: {"; ".join(differing)}; set them back or change --out')
    return saved


def _open_samples(config: TrainConfig, accelerator: Any) -> tuple[Samples, Samples]:
    with accelerator.main_process_first():  # it may download
        return open_data(
            config.data,
            config.dataset,
            train_split=config.train_split,
            val_split=config.val_split,
            download=config.download,
            num_classes=config.num_classes,
        )


def _leave_out_broken(config: TrainConfig, accelerator: Any, *splits: Samples) -> list[Samples]:
    """The main process looks at all images; every process then raises the same error, or leaves out the same ones."""
    from accelerate.utils import broadcast_object_list

    found = [find_broken(samples) if accelerator.is_main_process else {} for samples in splits]
    broadcast_object_list(found)
    broken = [text for positions in found for text in positions.values()]
    if broken and not config.skip_broken:
        more = f' (and {len(broken) - 1} more)' if len(broken) > 1 else ''
        raise ValueError(f'broken image {broken[0]}{more}; replace or remove it, or leave it out with --skip-broken')
    if broken and accelerator.is_main_process:
        shown = '\n'.join(f'  {text}' for text in broken[:10]) + ('\n  ...' if len(broken) > 10 else '')
        print(f'warning: {len(broken)} broken image{"s"[: len(broken) > 1]} left out:\n{shown}', flush=True)
    kept = [samples.without(positions) for samples, positions in zip(splits, found, strict=True)]
    for samples in kept:
        if len(samples) == 0:
            raise ValueError(f'every image of the {samples.split} split is broken, the first one: {broken[0]}')
    return kept


def _model_args(config: TrainConfig) -> dict[str, Any]:
    args = dict(config.model_args)
    if config.img_size is not None and timm.is_model(config.model):
        cfg = timm.get_pretrained_cfg(config.model)
        ours = timm.model_entrypoint(config.model).__module__.startswith('sase_blocks.')
        if ours or (cfg is not None and cfg.fixed_input_size):  # these are laid out for one image size
            args.setdefault('img_size', config.img_size)
    return args


def _describe(facts: Mapping[str, Any]) -> str:
    return f'{facts["train"]} training and {facts["val"]} validation images of {len(facts["classes"])} classes'


def _named_errors(loader: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches, where an error in a loading process is raised as that error and not as its printed traceback."""
    try:
        yield from loader
    except ValueError as error:
        if str(error).startswith('Caught ValueError'):
            raise ValueError(str(error).strip().splitlines()[-1].removeprefix('ValueError: ')) from None
        raise


def _check_finite(losses: list[float], first_step: int, last: Path) -> None:
    for step, loss in enumerate(losses, first_step):
        if not math.isfinite(loss):
            kept = f'the last good checkpoint is {last}' if last.exists() else 'no checkpoint was written yet'
            raise FloatingPointError(
                f'the loss is {loss} at step {step}; {kept}. Try a lower --lr, a longer --warmup or --clip-grad.'
            )


def _rows_until(metrics: Path, epoch: int) -> list[dict[str, Any]]:
    rows = []
    for line in metrics.read_text(encoding='utf-8').splitlines() if metrics.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):  # a line cut short
            rows.append(json.loads(line))
    return [row for row in rows if row['epoch'] <= epoch]
