"""One SASE search (arXiv 2411.08333, section 4 of the authors' code; extra ``search``): the loop, and what it leaves.

A step is one update of the logits on held-out images and one of the weights. What differs from the authors' code:
fair mixing by default, an exact second order, a held-out half without augmentation, statistics of batch norm that the
logits' passes leave alone, a result on disk. Everything random is a function of the seed and of the step, so a run
that is killed at any moment and resumed arrives at the same bits.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sase_blocks.checkpoint import save_checkpoint
from sase_blocks.data import MODEL, Samples, derive_seed, image_config
from sase_blocks.runs import (
    LOSS_CHECK_STEPS,
    Progress,
    append_row,
    be_deterministic,
    check_finite,
    drop_broken,
    load_optimizer,
    open_accelerator,
    open_log,
    read_rows,
    resuming,
    run_lock,
    saved_run,
    whole_number,
    write_json,
    write_rows,
)
from sase_blocks.search.data import Arrays, check_same_data, find_samples, split_data
from sase_blocks.search.sync_batch_norm import synchronize_norms
from sase_blocks.train import build_model, check_model_name, hits
from sase_blocks.viz import missing_matplotlib

from .bilevel import VirtualStep, logits_gradient
from .compiling import compile_mixed_blocks, without_compilation
from .config import SearchConfig
from .diagnostics import dead_operations, describe_edges, hessian_eigenvalue, noise_leads, warnings_of
from .network import SearchNetwork
from .result import RESULT, describe_result, draw_result, write_logits
from .space import SearchSpace

__all__ = ['saved_search', 'search']

ADVICE = 'Try a lower --lr or --clip-grad.'
HESSIAN_IMAGES = 32  # of a held-out batch, for the look at the Hessian


def saved_search(config: SearchConfig) -> dict[str, Any] | None:
    """The checkpoint in ``config.out`` to resume from, None for a fresh start; raises as ``runs.saved_run``."""
    needed = ['config', 'data', 'step', 'network', 'optimizer', 'arch', 'sums', 'logits_history']
    return saved_run(config, Path(config.out) / 'last.pt', needed, 'sase-blocks search sase')


def search(config: SearchConfig, images: Arrays | Samples | None = None) -> dict[str, Any]:
    """Search an attention block.

    Writes into ``config.out``: after each epoch, and every ``save_minutes``, ``last.pt``, which is all that resuming
    needs; after each epoch ``metrics.jsonl``, ``alphas.npz``, ``genotype.json`` and ``tensorboard/``; at the end
    ``genotype.png`` and ``logits.png``.

    Args:
        config: the settings.
        images: in place of ``config.data``: uint8 images (N, C, H, W), labels (N,) and the names of the classes; or its
            training split, opened and checked for broken images already.

    Returns:
        What genotype.json holds, see ``describe_result``.

    Raises:
        ImportError: accelerate or tensorboard is missing.
        ValueError, FileNotFoundError: a wrong setting, wrong data, a run that cannot be resumed, or
            that another process writes (with ``config.resume`` this one waits for it); before any work.
        OSError: ``config.out`` cannot be written, before any work; a full disk, after which the last good checkpoint
            is still there.
        FloatingPointError: the loss is no longer finite.
    """
    deterministic = be_deterministic(config.deterministic)
    with open_accelerator(config, 'a search', 'search') as accelerator, run_lock(config, accelerator), deterministic:
        return _Search(config, accelerator, images).run()


class _Search:
    def __init__(self, config: SearchConfig, accelerator: Any, images: Arrays | Samples | None) -> None:
        self.config, self.accelerator = config, accelerator
        self.device = accelerator.device
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        self.out = Path(config.out)
        self.last, self.metrics = self.out / 'last.pt', self.out / 'metrics.jsonl'

        # What can be wrong is found out first, and what takes long to find out last.
        saved = saved_search(config)
        if config.batch_size % self.world:
            raise ValueError(f'batch_size {config.batch_size} cannot be cut among {self.world} processes')
        check_model_name(config.model)
        self.space = SearchSpace.parse(config.space)
        self.memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
        data = find_samples(config, accelerator) if images is None else images
        classes = data.classes if isinstance(data, Samples) else list(data[2])
        torch.manual_seed(config.seed)
        model = build_model(config.model, len(classes), **config.model_args)
        data_config = image_config(model, config.img_size)
        channels = data_config['input_size'][0]
        if isinstance(data, Samples):
            data = data.in_channels(channels)
        elif data[0].shape[1] != channels:
            raise ValueError(f'the images have {data[0].shape[1]} channels, the model takes {channels}')
        self.network = SearchNetwork(
            model,
            self.space,
            per_stage=config.per_stage,
            fair=not config.paper_mixing,
            form=config.form,
            input_size=data_config['input_size'],
            seed=derive_seed(config.seed, MODEL),
        )
        if isinstance(data, Samples) and data.fingerprint is None:
            (data,) = drop_broken(config.skip_broken, accelerator, data)
        self.data = split_data(
            data, config, data_config, device=self.device, memory_format=self.memory_format, null=config.null
        )
        if saved:
            check_same_data(self.last, saved['data'], self.data)
        self.steps = len(self.data.training) // config.batch_size  # a last partial batch is dropped
        self._prepare(saved)

    def _prepare(self, saved: dict[str, Any] | None) -> None:
        config, network = self.config, self.network
        network.to(self.device).to(memory_format=self.memory_format)
        if self.world > 1:
            synchronize_norms(network.model)
        self.named = network.weights()
        self.weights = list(self.named.values())
        self.optimizer = torch.optim.SGD(
            self.weights,
            config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            fused=self.device.type in ('cpu', 'cuda'),  # hundreds of small tensors: one pass instead of four
        )
        self.arch = torch.optim.Adam(
            [network.logits], config.arch_lr, betas=(0.5, 0.999), weight_decay=config.arch_weight_decay
        )
        self.step = 0
        self.sums = torch.zeros(4, dtype=torch.float64)  # of the epoch: training loss, held-out loss, right, gradient
        self.history: list[Tensor] = [network.logits.detach().cpu().clone()]
        self.rows: list[dict[str, Any]] = []
        if saved:
            with resuming(self.last):
                network.load_state_dict(saved['network'])
                load_optimizer(self.optimizer, saved['optimizer'])
                load_optimizer(self.arch, saved['arch'])
                self.step = whole_number(saved['step'], 'step', config.epochs * self.steps)
                self.sums = saved['sums'].reshape(self.sums.shape)
                self.history = [logits.reshape(network.logits.shape) for logits in saved['logits_history']]
            self.rows = read_rows(self.metrics, self.step // self.steps)
        self.resumed = saved is not None
        if config.compile:
            compile_mixed_blocks(network)

    # ---- one step ----

    def _mean(self, flat: Tensor) -> Tensor:
        return self.accelerator.reduce(flat, 'mean') if self.world > 1 else flat

    def _autocast(self) -> Any:
        return self.accelerator.autocast() if self.config.mixed_precision != 'no' else nullcontext()

    def _loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(outputs.float() if outputs.dtype == torch.bfloat16 else outputs, labels)

    def _train_step(
        self, training: tuple[Tensor, Tensor], held_out: tuple[Tensor, Tensor], lr: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One update of the logits and one of the weights. -> both losses, and how many held-out images were right."""
        config, network = self.config, self.network
        # Dropout and the like: a function of the step, whatever drew random numbers in between.
        torch.manual_seed(derive_seed(config.seed, MODEL, self.step, self.rank))
        held_loss = right = torch.zeros((), device=self.device)
        if self.step % config.arch_every == 0:
            look = VirtualStep(lr, config.momentum, config.weight_decay, self._momentum())
            found = logits_gradient(
                network,
                self._loss,
                config.order,
                held_out,
                training,
                look,
                mean=self._mean,
                autocast=self._autocast,
            )
            network.logits.grad = found.gradient
            self.arch.step()
            held_loss = found.loss
            right = hits(found.outputs, held_out[1]).sum()
        with network.learning(weights=True):
            with self._autocast():
                loss = self._loss(network(training[0]), training[1])
            grads = torch.autograd.grad(loss, self.weights, allow_unused=True)
        flat = self._mean(
            torch.cat(
                [(torch.zeros_like(w) if g is None else g).flatten() for w, g in zip(self.weights, grads, strict=True)]
            )
        )
        if config.clip_grad is not None:
            flat = flat * (config.clip_grad / (torch.linalg.vector_norm(flat) + 1e-6)).clamp(max=1.0)
        for weight, part in zip(self.weights, flat.split([w.numel() for w in self.weights]), strict=True):
            # In the weight's own memory format: the fused step goes through both as they lie.
            grad = part.view_as(weight)
            weight.grad = grad if weight.is_contiguous() else torch.empty_like(weight).copy_(grad)
        self.optimizer.step()
        return loss.detach(), held_loss.detach(), right

    def _momentum(self) -> dict[str, Tensor]:
        state = self.optimizer.state
        return {n: state[w]['momentum_buffer'] for n, w in self.named.items() if 'momentum_buffer' in state[w]}

    # ---- the run ----

    def run(self) -> dict[str, Any]:
        config, main = self.config, self.accelerator.is_main_process
        writer = None
        if main:
            write_rows(self.metrics, self.rows)
            writer = open_log(config, self.out, self.step)
        self.progress = Progress(config.epochs * self.steps, self.step, enabled=main)
        self._announce()
        result = self._result()
        for epoch in range(self.step // self.steps, config.epochs):
            result = self._epoch(epoch)
            if main and writer:
                for name, value in _scalars(self.rows[-1]):
                    writer.add_scalar(name, value, self.step)
                writer.flush()
            self.accelerator.wait_for_everyone()
        self.progress.close()
        if main:
            if writer:
                writer.close()
            write_json(self.out / RESULT, result)
            if missing_matplotlib() is None:
                draw_result(self.history, self.space, result['edges'], self.out)
        self.accelerator.wait_for_everyone()
        return result

    def _epoch(self, epoch: int) -> dict[str, Any]:
        config, network, network_steps = self.config, self.network, self.steps
        first = self.step - epoch * network_steps
        lr = config.min_lr + (config.lr - config.min_lr) * (1 + math.cos(math.pi * epoch / config.epochs)) / 2
        for group in self.optimizer.param_groups:
            group['lr'] = lr
        network.train()
        at = (epoch, config.batch_size, first, network_steps, self.rank, self.world)
        began = last_save = time.perf_counter()
        unseen: list[Tensor] = []
        held_out = (0.0, 0.0)
        pairs = zip(self.data.training.epoch(*at), self.data.held_out.epoch(*at), strict=True)
        for number, (training, held) in enumerate(pairs, start=first + 1):
            loss, held_loss, right = self._train_step(training, held, lr)
            self.step += 1
            unseen.append(torch.stack([loss.double(), held_loss.double(), right.double()]))
            if len(unseen) == LOSS_CHECK_STEPS or number == network_steps:
                seen = self._mean(torch.stack(unseen)).cpu()
                check_finite((seen[:, 0] + seen[:, 1]).tolist(), self.step - len(unseen) + 1, self.last, ADVICE)
                self.sums[:3] += seen.sum(0)
                unseen = []
                held_out = (float(seen[-1, 0]), float(seen[-1, 1]))
                self.progress.update(self.step, f'epoch {epoch + 1}/{config.epochs}', held_out[0])
                if number < network_steps and time.perf_counter() - last_save > 60 * config.save_minutes:
                    self._save()
                    last_save = time.perf_counter()
        seconds = (time.perf_counter() - began) / max(network_steps - first, 1)
        row = self._row(epoch, lr, seconds, held)
        self.rows.append(row)
        row['warnings'] = warnings_of(self.rows, len(self.data.classes))
        self.history.append(network.logits.detach().cpu().clone())
        self.sums = torch.zeros_like(self.sums)
        if self.accelerator.is_main_process:
            # In this order: whatever a kill leaves undone is done again, the same, by the resumed epoch.
            append_row(self.metrics, row)
            write_logits(self.history, self.space, self.out)
            write_json(self.out / RESULT, self._result())
        self._save()
        self._report(row)
        return self._result()

    def _row(self, epoch: int, lr: float, seconds: float, held: tuple[Tensor, Tensor]) -> dict[str, Any]:
        """The line of metrics.jsonl. Held-out figures are means over the batches of the epoch, each met before the
        logits learned from it, in train mode."""
        config, network = self.config, self.network
        updates = sum(1 for s in range(epoch * self.steps, self.step) if s % config.arch_every == 0)
        looked = max(updates, 1)
        hessian = None
        if config.hessian_every and (epoch + 1) % config.hessian_every == 0:
            n = max(HESSIAN_IMAGES // self.world, 2)
            with without_compilation(network):
                hessian = hessian_eigenvalue(network, self._loss, held[0][:n], held[1][:n], self._mean)
        with without_compilation(network):
            dead = dead_operations(network, held[0])
        logits = network.logits.detach().cpu()
        noise = noise_leads(self.space, len(logits), self._updates(), config.arch_lr)
        edges = {
            (f'stage {number + 1}, ' if len(logits) > 1 else ''): describe_edges(self.space, row, noise)
            for number, row in enumerate(logits)
        }
        return {
            'epoch': epoch + 1,
            'step': self.step,
            'lr': lr,
            'train_loss': float(self.sums[0]) / self.steps,
            'held_out_loss': float(self.sums[1]) / looked,
            'held_out_acc1': 100 * float(self.sums[2]) * self.world / (looked * config.batch_size),
            'genotype': '; '.join(map(str, network.genotypes())),
            'edges': edges,
            'dead': dead,
            'blocks': len(network.blocks),
            'hessian': hessian,
            'seconds_per_step': seconds,
        }

    def _updates(self) -> int:
        """Of the logits so far."""
        return -(-self.step // self.config.arch_every)

    def _save(self) -> None:
        if self.accelerator.is_main_process:
            save_checkpoint(
                {
                    'config': asdict(self.config),
                    'data': self.data.facts,
                    'step': self.step,
                    'network': self.network.state_dict(),
                    'optimizer': self.optimizer.state_dict(),
                    'arch': self.arch.state_dict(),
                    'sums': self.sums,
                    'logits_history': self.history,
                },
                self.last,
            )

    def _result(self) -> dict[str, Any]:
        return describe_result(
            self.space,
            self.network.logits.detach().cpu(),
            config=asdict(self.config),
            facts=self.data.facts,
            epoch=self.step // self.steps,
            updates=self._updates(),
            warnings=self.rows[-1]['warnings'] if self.rows else [],
        )

    # ---- what is said ----

    def _announce(self) -> None:
        config, say = self.config, self.progress.line
        weights = sum(w.numel() for w in self.weights)
        sets, blocks = self.network.logits.shape[0], len(self.network.blocks)
        mixing = "the paper's" if config.paper_mixing else 'fair'
        say(
            f'{config.model}: {blocks} mixed blocks, {weights:,} weights; space {self.space}: '
            f'{self.space.genotypes:,} genotypes, {sets} set{"s"[: sets > 1]} of logits; {mixing} mixing'
        )
        null = ', each with the label of another image' if config.null else ''
        say(
            f'{self.data}{null}; {config.epochs} epochs of {self.steps} steps of '
            f'{config.batch_size}; order {config.order}; {self.world} process(es) on {self.device.type}; '
            f'writing to {self.out}'
        )
        if config.order == '2' and not self.resumed:
            shape = next(self.data.training.epoch(0, self.world, 0, 1, self.rank, self.world))[0].shape
            size = second_order_bytes(self.network, self._loss, tuple(shape[1:]), config.batch_size // self.world)
            say(f'the exact second order keeps about {size / 2**20:,.0f} MiB for its gradients on each process')
        if (missing := missing_matplotlib()) is not None:
            say(f'no pictures will be drawn: {missing}')
        if self.resumed:
            say(f'resuming at step {self.step} of {config.epochs * self.steps}')

    def _report(self, row: dict[str, Any]) -> None:
        margins = [state['margin'] for edges in row['edges'].values() for state in edges.values()]
        entropies = [state['entropy'] for edges in row['edges'].values() for state in edges.values()]
        decided = [state['decided'] for edges in row['edges'].values() for state in edges.values()]
        hessian = '' if row['hessian'] is None else f', Hessian {row["hessian"]:.3g}'
        self.progress.line(
            f'epoch {row["epoch"]}/{self.config.epochs}: training loss {row["train_loss"]:.4f}, held-out loss '
            f'{row["held_out_loss"]:.4f}, accuracy {row["held_out_acc1"]:.2f} %{hessian}, margin '
            f'{min(margins):.4f} to {max(margins):.4f}, entropy {min(entropies):.3f} to {max(entropies):.3f}, '
            f'{decided.count(True)} of {len(decided) - decided.count(None)} edges decided, '
            f'{row["seconds_per_step"]:.3f} s a step, {self.progress.left()} left\n  {row["genotype"]}'
        )
        before = set(self.rows[-2]['warnings']) if len(self.rows) > 1 else set()
        for text in row['warnings']:
            if text not in before:
                self.progress.line(f'  warning: {text}')


def _scalars(row: dict[str, Any]) -> list[tuple[str, float]]:
    """A row of metrics.jsonl as names and numbers for TensorBoard."""
    out = [(name, float(value)) for name, value in row.items() if isinstance(value, (int, float)) and name != 'epoch']
    for stage, edges in row['edges'].items():
        for edge, state in edges.items():
            for name in ('margin', 'entropy'):
                out.append((f'{name}/{stage.replace(", ", "/").replace(" ", "")}{edge}', state[name]))
    return out


def second_order_bytes(
    network: SearchNetwork,
    loss: Callable[[Tensor, Tensor], Tensor],
    shape: tuple[int, ...],
    batch_size: int,
) -> int:
    """What one exact second-order gradient keeps at its peak, in bytes, from two small batches: it grows linearly."""

    class Kept:
        """A saved tensor; its storage counts while anything holds it."""

        alive: dict[int, int] = {}  # noqa: RUF012
        now = peak = 0

        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor
            self.key, size = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
            self.size = size
            Kept.alive[self.key] = Kept.alive.get(self.key, 0) + 1
            if Kept.alive[self.key] == 1:
                Kept.now += size
                Kept.peak = max(Kept.peak, Kept.now)

        def __del__(self) -> None:
            Kept.alive[self.key] -= 1
            if Kept.alive[self.key] == 0:
                Kept.now -= self.size

    def peak(n: int) -> int:
        Kept.alive, Kept.now, Kept.peak = {}, 0, 0
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(n, *shape, generator=generator).to(network.logits.device)
        batch = (images, torch.zeros(n, dtype=torch.int64, device=images.device))
        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
            logits_gradient(network, loss, '2', batch, batch, VirtualStep(0.01))
        return Kept.peak

    was = network.training
    network.train()
    small, large = peak(2), peak(4)
    network.train(was)
    return max(small + (large - small) * (batch_size - 2) // 2, 0)
