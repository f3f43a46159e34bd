"""Train any timm model on image data: one readable loop on accelerate (extra ``train``).

The same command runs on one CPU, one GPU, or under ``torchrun`` / ``accelerate launch`` on many machines. All
randomness depends only on the seed and the step, so a run resumed from the checkpoint at the end of an epoch reaches
the same weights as an uninterrupted one.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from .blocks import compile_blocks
from .checkpoint import save_checkpoint
from .convert import classifier_prefixes
from .data import (
    MODEL,
    Batches,
    Samples,
    TransformedSamples,
    create_transforms,
    derive_seed,
    image_config,
    listing,
    same_data,
)
from .insertion import InsertReport
from .insertion.checking import check_inserted
from .networks import NetworkConfig, build_network, check_model_name, load_weights
from .ops import no_weight_decay
from .runs import (
    RunLog,
    be_deterministic,
    check_finite,
    drop_broken,
    load_optimizer,
    open_accelerator,
    open_samples,
    resuming,
    run_lock,
    saved_run,
    whole_number,
    write_settings,
)
from .settings import RunConfig, require, require_used, setting

ADVICE = 'Try a lower --lr, a longer --warmup or --clip-grad.'


@dataclass(frozen=True)
class TrainConfig(NetworkConfig, RunConfig):
    """Settings of a training run; each is also an option of ``sase-blocks train``, whose help describes it."""

    data: str = field(
        metadata={'place': True, 'help': 'folder with train/CLASS/* and val/CLASS/* (or validation/, test/) in it'}
    )
    checkpoint: str | None = setting(None, 'start from the weights in this file (.pt, .pth, .safetensors)', place=True)

    val_split: str = setting('validation', 'validation split of a --dataset')
    check: bool = setting(True, 'decode every image once before training', free=True)
    auto_augment: str | None = setting(None, "timm's policy for images above 64 px, such as 'rand-m9-mstd0.5'")

    opt: str = setting('sgd', 'optimizer', choices=('sgd', 'adamw'))
    warmup: float = setting(
        0.05, 'fraction of all steps for warm-up; then cosine decay to 0', expected='at least 0 and below 1'
    )
    insert_lr: float | None = setting(
        None, 'highest learning rate of the inserted blocks (default: that of --lr)', expected='above 0'
    )
    freeze_epochs: int = setting(
        0, 'train only the inserted blocks and the classifier in the first N epochs', expected='at least 0'
    )
    label_smoothing: float = setting(0.0, 'label smoothing', expected='at least 0 and below 1')
    ema_decay: float | None = setting(
        None,
        'keep and evaluate an average of the weights whose decay rises as 1 - step^(-2/3) to this, e.g. 0.9999',
        expected='between 0 and 1',
    )

    eval_every: int = setting(1, 'validate every N epochs; 0: only after the last', expected='at least 0')
    mixed_precision: str = setting('no', 'arithmetic below fp32', choices=('no', 'bf16', 'fp16'))
    compile: bool = setting(False, 'compile the attention blocks of the model')

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, self.check or not self.skip_broken, 'skip_broken', 'used with the check of the images')
        require_used(self, self.opt == 'sgd', 'momentum', 'for adamw')
        require_used(self, self.insert is not None, 'insert_lr', 'without insert')
        require_used(self, self.pretrained or self.checkpoint is not None, 'freeze_epochs', 'for an untrained model')
        require(self, self.freeze_epochs <= self.epochs, 'freeze_epochs', f'at most epochs, {self.epochs}')
        require(self, 'num_classes' not in self.model_args, 'model_args', 'without num_classes, which the data says')


def train(config: TrainConfig, data: tuple[Samples, Samples] | None = None) -> dict[str, Any]:
    """Train a model and keep its checkpoints.

    Writes to ``config.out``: ``last.pt`` (everything needed to resume) and ``best.pt`` (weights of the best epoch so
    far) after each epoch, ``config.toml`` (the settings), ``metrics.jsonl`` (one line per epoch) and ``tensorboard/``.

    Args:
        config: the settings.
        data: result of ``checked_samples`` for these settings, if already computed; default: computed here.

    Returns:
        For the last and the best epoch: 'epochs', 'acc1' (percent), 'loss', 'best_acc1', 'best_epoch'; 'history', the
        lines of metrics.jsonl; 'classes', their names; 'confusion', the ``confusion_matrix`` of the last epoch (None if
        an older version finished the run); 'checkpoint', the path of last.pt.

    Raises:
        ImportError: accelerate or tensorboard is missing (extra ``train``).
        ValueError, FileNotFoundError: a wrong setting, wrong data, a run that cannot be resumed or that another process
            writes (with ``config.resume`` this one waits for it); before any work.
        OSError: ``config.out`` cannot be written, before any work; or the disk is full, which keeps the last good
            checkpoint.
        RuntimeError: an inserted attention does not run (see ``check``), before any work.
        FloatingPointError: the loss is no longer finite.
    """
    deterministic = be_deterministic(config.deterministic)
    with open_accelerator(config, 'training') as accelerator, run_lock(config, accelerator), deterministic:
        return _train(config, accelerator, data)


def _train(config: TrainConfig, accelerator: Any, data: tuple[Samples, Samples] | None) -> dict[str, Any]:
    main, device = accelerator.is_main_process, accelerator.device
    out = Path(config.out)
    last, best_path = out / 'last.pt', out / 'best.pt'

    # Cheap checks first, slow ones last.
    needed = ['config', 'data', 'epoch', 'best', 'scores', 'state_dict', 'optimizer', 'scaler']
    needed += ['state_dict_ema'] if config.ema_decay else []
    # The cosine of the learning rate ends with the last epoch, so more epochs are another run from its first step on.
    longer = f'the learning rate depends on them, so train on from these weights with --checkpoint {last} --out ANOTHER'
    saved = saved_run(config, last, needed, 'sase-blocks train', {'epochs': longer})
    check_model_name(config.model)
    train_samples, val_samples = data or open_samples(config, accelerator, both=True)
    classes = train_samples.classes
    torch.manual_seed(config.seed)
    model, inserted = build_network(config, len(classes), weights=not saved)  # or resuming might download
    data_config = image_config(model, config.img_size)
    channels = data_config['input_size'][0]
    train_samples, val_samples = train_samples.in_channels(channels), val_samples.in_channels(channels)
    report = load_weights(model, config, config.checkpoint) if config.checkpoint and not saved else None
    if config.check and data is None:
        train_samples, val_samples = drop_broken(config.skip_broken, accelerator, train_samples, val_samples)
    steps_per_epoch = len(train_samples) // config.batch_size  # a last partial batch is dropped
    if steps_per_epoch == 0:
        raise ValueError(f'{len(train_samples)} training images are fewer than one batch of {config.batch_size}')
    facts = {
        'classes': classes,
        'train': len(train_samples),
        'val': len(val_samples),
        # Compare names and sizes instead of contents if either run has not read all images.
        'listing': f'{listing(train_samples)}+{listing(val_samples)}',
        'fingerprint': f'{train_samples.fingerprint}+{val_samples.fingerprint}' if config.check else None,
    }
    if saved:
        with resuming(last):
            same, before = same_data(saved['data'], facts), _describe(saved['data'])
    if saved and not same:
        raise ValueError(f'{last} was trained on other data: {before}, this is {_describe(facts)}')

    model.to(device).to(memory_format=config.memory_format)
    check_inserted(model, data_config['input_size'])
    optimizer = make_optimizer(config, model, inserted.parameters if inserted else (), config.insert_lr)
    frozen, statistics = _outside_of(model, inserted) if config.freeze_epochs else ([], [])
    steps = config.epochs * steps_per_epoch
    warmup = round(config.warmup * steps)
    # The learning rate depends only on the step, so it has no state to save.
    scheduler = CosineLRScheduler(
        optimizer, steps, warmup_t=warmup, warmup_lr_init=config.lr / max(warmup, 1), t_in_epochs=False
    )
    # Without the warm-up the average of a short run would stay at its initial weights. The decay depends only on the
    # step, so it has no state to save, either.
    ema = ModelEmaV3(model, decay=config.ema_decay, use_warmup=True) if config.ema_decay else None
    if config.compile:
        compile_blocks(model)
    train_transform, val_transform = create_transforms(
        data_config, hflip=config.hflip, auto_augment=config.auto_augment
    )
    loading: dict[str, Any] = {'workers': config.workers, 'device': device, 'memory_format': config.memory_format}
    train_batches = Batches(TransformedSamples(train_samples, train_transform, config.seed), **loading)
    val_batches = Batches(TransformedSamples(val_samples, val_transform, config.seed), shuffle=False, **loading)
    process = {'rank': accelerator.process_index, 'world': accelerator.num_processes}

    start, best, scores = 0, {'acc1': -1.0, 'epoch': 0}, {}
    confusion: Tensor | None = None
    with resuming(last):
        if saved:
            start = whole_number(saved['epoch'], 'epoch', config.epochs)
            epoch = whole_number(saved['best']['epoch'], 'epoch of the best', start)
            best = {'acc1': float(saved['best']['acc1']), 'epoch': epoch}
            scores = {name: float(value) for name, value in dict(saved['scores']).items()}
            if start == config.epochs:  # only the result is left to report
                scores['acc1'], scores['val_loss']
                if saved.get('confusion') is not None:  # older versions kept none
                    confusion = saved['confusion'].reshape(len(classes), len(classes))
            model.load_state_dict(saved['state_dict'])
            load_optimizer(optimizer, saved['optimizer'])
            if ema:
                ema.module.load_state_dict(saved['state_dict_ema'])
    optimizer = accelerator.prepare(optimizer)
    with resuming(last):
        if saved and accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(saved['scaler'])

    if main:
        write_settings(config, 'sase-blocks train')
    log = RunLog(config, accelerator, steps_per_epoch, start * steps_per_epoch)
    parameters = sum(p.numel() for p in model.parameters())
    shape = ' x '.join(str(n) for n in data_config['input_size'])
    log.line(f'{config.model}: {parameters / 1e6:.3f} M parameters; {_describe(facts)}, as {shape}')
    log.line(
        f'{config.epochs} epochs of {steps_per_epoch} steps of {config.batch_size} images; {accelerator.num_processes} '
        f'process(es) on {device.type}, mixed precision {config.mixed_precision}; writing to {out}'
    )
    if inserted:
        log.line(str(inserted))
    if report:
        log.line(str(report))
    if config.freeze_epochs:
        trained = parameters - sum(p.numel() for p in frozen)
        log.line(
            f'epochs 1 to {config.freeze_epochs} train only the classifier'
            f'{" and the inserted blocks" if inserted else ""}: {trained:,} parameters'
        )
    if saved:
        log.line(f'resuming after epoch {start} of {config.epochs}')

    parallel: Any = None
    for epoch in range(start, config.epochs):
        if parallel is None or epoch == config.freeze_epochs:
            for parameter in frozen:
                parameter.requires_grad_(epoch >= config.freeze_epochs)
            # DistributedDataParallel expects gradients of the parameters that were trainable when it was made.
            parallel = accelerator.prepare_model(model)
        began, loss_sum = time.perf_counter(), 0.0
        parallel.train()
        if epoch < config.freeze_epochs:
            for module in statistics:
                module.eval()
        for images, labels in train_batches.epoch(epoch, config.batch_size, 0, steps_per_epoch, **process):
            # Dropout etc. also depend only on the step, whatever drew random numbers in between.
            torch.manual_seed(derive_seed(config.seed, MODEL, log.step, accelerator.process_index))
            scheduler.step_update(log.step)
            logits = parallel(images)
            loss = F.cross_entropy(logits, labels, label_smoothing=config.label_smoothing)
            accelerator.backward(loss)
            if config.clip_grad is not None:
                accelerator.clip_grad_norm_(parallel.parameters(), config.clip_grad)
            optimizer.step()
            optimizer.zero_grad()
            if ema:
                ema.update(model, log.step)
            if (read := log.count(loss.detach())) is not None:
                losses = read.tolist()
                check_finite(losses, log.step - len(losses) + 1, last, ADVICE)
                loss_sum += sum(losses)
        seconds = time.perf_counter() - began

        row: dict[str, Any] = {
            'epoch': epoch + 1,
            'step': log.step,
            'lr': optimizer.param_groups[0]['lr'],
            **({'insert_lr': optimizer.param_groups[-1]['lr']} if config.insert_lr else {}),
            'train_loss': loss_sum / steps_per_epoch,
            'images_per_second': steps_per_epoch * config.batch_size / seconds,
        }
        improved = False
        if epoch + 1 == config.epochs or (config.eval_every and (epoch + 1) % config.eval_every == 0):
            evaluated = ema.module if ema else model
            if accelerator.num_processes > 1:  # use the main process's batch-norm statistics, which are saved
                for buffer in [*model.buffers(), *evaluated.buffers()]:
                    torch.distributed.broadcast(buffer, 0)
            batches = val_batches.once(config.batch_size, **process)
            scores, confusion = evaluate(evaluated, batches, len(val_batches), accelerator)
            check_finite([scores['val_loss']], log.step, last, ADVICE)
            row |= scores
            improved = scores['acc1'] > best['acc1']
            if improved:
                best = {'acc1': scores['acc1'], 'epoch': epoch + 1}
        # In this order, the resumed epoch redoes whatever a kill leaves undone, with the same result.
        log.add(row)
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
            if improved:
                save_checkpoint(weights, best_path)
            scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
            resumed = {'optimizer': optimizer.state_dict(), 'scaler': scaler}
            save_checkpoint({**weights, **resumed, 'confusion': confusion}, last)
        accelerator.wait_for_everyone()
        seen = (
            f'validation loss {row["val_loss"]:.4f}, accuracy {row["acc1"]:.2f} % (best {best["acc1"]:.2f} %), '
            if 'acc1' in row
            else ''
        )
        log.line(
            f'epoch {epoch + 1}/{config.epochs}: training loss {row["train_loss"]:.4f}, {seen}'
            f'{row["images_per_second"]:.0f} images/s, {log.left()} left'
        )
    log.close()
    return {
        'epochs': config.epochs,
        'acc1': scores['acc1'],
        'loss': scores['val_loss'],
        'best_acc1': best['acc1'],
        'best_epoch': best['epoch'],
        'history': log.rows,
        'classes': classes,
        'confusion': confusion,
        'checkpoint': str(last),
    }


def make_optimizer(
    config: Any, model: nn.Module, inserted: Sequence[nn.Parameter] = (), insert_lr: float | None = None
) -> torch.optim.Optimizer:
    """The optimiser of a configuration; no weight decay for vectors and parameters in ``no_weight_decay``.

    Args:
        inserted: parameters of inserted attention, for ``insert_lr``.
        insert_lr: their learning rate. They get groups of their own, the last ones, with timm's ``lr_scale``, so a
            scheduler of timm scales the warm-up and the decay of ``config.lr`` for them.

    Raises:
        ValueError: ``insert_lr`` without ``inserted``.
    """
    groups = param_groups_weight_decay(model, config.weight_decay, no_weight_decay_list=no_weight_decay(model))
    if insert_lr is not None:
        if not inserted:
            raise ValueError(f'insert_lr is {insert_lr:g}, but the inserted block has no parameters; leave it out')
        own, new = {id(p) for p in inserted}, []
        for scale in ({}, {'lr_scale': insert_lr / config.lr}):
            for group in groups:
                members = [p for p in group['params'] if (id(p) in own) == bool(scale)]
                new += [{**group, 'params': members, **scale}] if members else []
        groups = new
    return create_optimizer_v2(
        groups,
        opt={'sgd': 'momentum'}.get(config.opt, config.opt),  # timm's sgd uses Nesterov momentum
        lr=config.lr,
        momentum=config.momentum,
    )


def _outside_of(model: nn.Module, inserted: InsertReport | None) -> tuple[list[nn.Parameter], list[nn.Module]]:
    """The trainable parameters, and the modules with running statistics, outside of inserted attention and classifier.

    Raises ValueError if these are all parameters.
    """
    places = inserted.places if inserted else ()
    inside = (*(f'{place.name}.' for place in places), *classifier_prefixes(model))
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    frozen = [p for name, p in trainable if not name.startswith(inside)]
    if len(frozen) == len(trainable):
        raise ValueError(
            f'freeze_epochs would freeze all of {type(model).__name__}: nothing is inserted, and its classifier has '
            f'no parameters'
        )
    statistics = [
        module
        for name, module in model.named_modules()
        if module._buffers.get('running_var') is not None and not f'{name}.'.startswith(inside)
    ]
    return frozen, statistics


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], count: int, accelerator: Any
) -> tuple[dict[str, float], Tensor]:
    """Mean loss and top-1 (with more than five classes also top-5) accuracy in percent of the first ``count`` images.

    Args:
        batches: images and labels, of several processes each its share.

    Returns:
        'val_loss', 'acc1', 'acc5', and the ``confusion_matrix`` on the CPU.
    """
    model.eval()
    loss_sum = torch.zeros((), dtype=torch.float64, device=accelerator.device)
    right: list[Tensor] = []
    for images, labels in batches:
        with accelerator.autocast():
            logits = model(images)
        logits = logits.float()
        losses = F.cross_entropy(logits, labels, reduction='none')
        first = logits.sort(dim=1, descending=True, stable=True).indices[:, 0]
        rows = torch.stack([hits(logits, labels), hits(logits, labels, 5), labels, first], 1)
        losses, rows = accelerator.gather((losses, rows))
        left = count - sum(map(len, right))  # fewer than a full last batch holds
        loss_sum += losses[:left].double().sum()
        right.append(rows[:left])
    seen = torch.cat(right).cpu()
    top1, top5 = (100 * seen[:, :2].double().mean(0)).tolist()
    scores = {'val_loss': loss_sum.item() / sum(map(len, right)), 'acc1': top1}
    if logits.shape[1] > 5:
        scores['acc5'] = top5
    return scores, confusion_matrix(seen[:, 2], seen[:, 3], logits.shape[1])


def hits(logits: Tensor, labels: Tensor, k: int = 1) -> Tensor:
    """Whether each image is correct: its label is among the k classes with the largest logits.

    Of equal logits the first class counts, as in ``argmax``, so constant logits score chance. An image with a NaN logit
    is wrong.

    Args:
        logits: (N, classes).
        labels: (N,).
        k: number of classes that count; at least 1; all if there are fewer.

    Returns:
        (N,) of bool.
    """
    first = logits.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return (first == labels[:, None]).any(1) & ~logits.isnan().any(1)


def confusion_matrix(labels: Tensor, predicted: Tensor, classes: int) -> Tensor:
    """Number of images by label (rows) and predicted class (columns), (classes, classes) of int64.

    Args:
        labels, predicted: (N,) of integers below ``classes``.
    """
    return torch.bincount(labels * classes + predicted, minlength=classes**2).reshape(classes, classes)


def checked_samples(config: TrainConfig, accelerator: Any) -> tuple[Samples, Samples]:
    """Both splits of a training, without broken images if ``config`` says so; the argument ``data`` of ``train``.

    Raises the errors of ``open_samples``, and ValueError for a broken image.
    """
    train_samples, val_samples = open_samples(config, accelerator, both=True)
    if config.check:
        train_samples, val_samples = drop_broken(config.skip_broken, accelerator, train_samples, val_samples)
    return train_samples, val_samples


def _describe(facts: Mapping[str, Any]) -> str:
    counts = f'{facts["train"]} training and {facts["val"]} validation images of {len(facts["classes"])} classes'
    return f'{counts} (data {facts.get("fingerprint") or facts.get("listing") or "without a fingerprint"})'
