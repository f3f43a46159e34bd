"""One SASE search (arXiv 2411.08333, section 4 of the authors' code; extra ``search``): the loop and its output.

A step is one update of the logits on held-out images and one of the weights. Differences from the authors' code: fair
mixing by default, an exact second order, no augmentation of held-out images, batch-norm statistics that the logits'
passes do not change, a result on disk. All randomness depends only on the seed and the step, so a run that is killed at
any moment and resumed gives the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sase_blocks.data import MODEL, Samples, derive_seed, image_config
from sase_blocks.networks import build_model, check_model_name
from sase_blocks.runs import (
    RunLog,
    be_deterministic,
    drop_broken,
    open_accelerator,
    open_samples,
    resuming,
    run_lock,
    saved_run,
    write_json,
)
from sase_blocks.search.data import Arrays, describe_data, split_data
from sase_blocks.search.loop import TrainingLoop
from sase_blocks.search.sync_batch_norm import synchronize_norms
from sase_blocks.train import hits
from sase_blocks.viz import missing_matplotlib

from .bilevel import Batch, VirtualStep, flatten, gradients, logits_gradient, unflatten
from .compiling import compile_mixed_blocks
from .config import SearchConfig
from .diagnostics import dead_operations, describe_edges, hessian_eigenvalue, noise_leads, warnings_of
from .network import SearchNetwork
from .result import RESULT, describe_result, draw_result, write_logits
from .space import SearchSpace

HESSIAN_IMAGES = 32  # of a held-out batch


def saved_search(config: SearchConfig) -> dict[str, Any] | None:
    """The checkpoint in ``config.out`` to resume from, None for a new run. Raises as ``runs.saved_run``."""
    needed = ['config', 'data', 'step', 'network', 'optimizer', 'arch', 'sums', 'logits_history']
    return saved_run(config, Path(config.out) / 'last.pt', needed, 'sase-blocks search sase')


def search(config: SearchConfig, images: Arrays | Samples | None = None) -> dict[str, Any]:
    """Search an attention block.

    Writes to ``config.out``: ``last.pt`` (everything needed to resume) after each epoch and every ``save_minutes``;
    ``metrics.jsonl``, ``alphas.npz``, ``genotype.json`` and ``tensorboard/`` after each epoch; ``genotype.png`` and
    ``logits.png`` at the end.

    Args:
        images: in place of ``config.data``: uint8 images (N, C, H, W), labels (N,) and the names of the classes; or its
            training split, opened and checked for broken images.

    Returns:
        The content of genotype.json, see ``describe_result``.

    Raises:
        ImportError, ValueError, OSError, FloatingPointError: as ``train.train``.
    """
    deterministic = be_deterministic(config.deterministic)
    with open_accelerator(config, 'a search', 'search') as accelerator, run_lock(config, accelerator), deterministic:
        return _Search(config, accelerator, images).run()


class _Search(TrainingLoop):
    def __init__(self, config: SearchConfig, accelerator: Any, images: Arrays | Samples | None) -> None:
        # Cheap checks first, slow ones last.
        saved = saved_search(config)
        check_model_name(config.model)
        self.space = SearchSpace.parse(config.space)
        data = images or open_samples(config, accelerator, both=False)[0]
        classes = data.classes if isinstance(data, Samples) else list(data[2])
        torch.manual_seed(config.seed)
        model = build_model(config.model, len(classes), **config.model_args)
        data_config = image_config(model, config.img_size)
        channels = data_config['input_size'][0]
        if isinstance(data, Samples):
            data = data.in_channels(channels)
        elif data[0].shape[1] != channels:
            raise ValueError(f'the images have {data[0].shape[1]} channels, the model takes {channels}')
        network = self.network = SearchNetwork(
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
        device = accelerator.device
        parts = split_data(data, config, data_config, device=device, null=config.null)

        network.to(device).to(memory_format=config.memory_format).train()
        if accelerator.num_processes > 1:
            synchronize_norms(network.model)
        self.named = network.weights()
        self.weights = list(self.named.values())
        self.optimizer = torch.optim.SGD(
            self.weights,
            config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            fused=device.type in ('cpu', 'cuda'),  # hundreds of small tensors: one pass instead of four
        )
        self.arch = torch.optim.Adam(
            [network.logits], config.arch_lr, betas=(0.5, 0.999), weight_decay=config.arch_weight_decay
        )
        self.history: list[Tensor] = [network.logits.detach().cpu().clone()]
        trained = {'network': network, 'optimizer': self.optimizer, 'arch': self.arch}
        self.out = Path(config.out)
        # The sums of the training loss, the held-out loss, the correct held-out images, and one that is unused.
        super().__init__(config, accelerator, parts, self.out / 'last.pt', trained, 4)
        if saved:
            self.load_state(saved)
        if config.compile:
            compile_mixed_blocks(network)

    def state(self) -> dict[str, Any]:
        return {**super().state(), 'logits_history': self.history}

    def load_state(self, saved: Mapping[str, Any]) -> None:
        super().load_state(saved)
        with resuming(self.last):
            self.history = [logits.reshape(self.network.logits.shape) for logits in saved['logits_history']]

    # ---- one step ----

    def batches(self, *place: int) -> Iterator[tuple[Batch, Batch]]:
        return zip(self.data.training.epoch(*place), self.data.held_out.epoch(*place), strict=True)

    def advice(self, step: int, number: int) -> str:
        return 'Try a lower --lr or --clip-grad.'

    def _loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(outputs.float() if outputs.dtype == torch.bfloat16 else outputs, labels)

    def train_step(self, training: Batch, held_out: Batch) -> Tensor:
        """Update the logits and the weights. -> both losses, and the number of correct held-out images."""
        config, network = self.config, self.network
        turn = math.cos(math.pi * (self.step // self.steps) / config.epochs)
        (group,) = self.optimizer.param_groups
        group['lr'] = config.min_lr + (config.lr - config.min_lr) * (1 + turn) / 2
        self.held_out = held_out
        held_loss = right = torch.zeros((), device=self.accelerator.device)
        if self.step % config.arch_every == 0:
            state = self.optimizer.state
            momentum = {n: state[w]['momentum_buffer'] for n, w in self.named.items() if 'momentum_buffer' in state[w]}
            look = VirtualStep(group['lr'], config.momentum, config.weight_decay, momentum)
            found = logits_gradient(
                network,
                self._loss,
                config.order,
                held_out,
                training,
                look,
                mean=self.mean,
                autocast=self.accelerator.autocast,
            )
            network.logits.grad = found.gradient
            self.arch.step()
            held_loss = found.loss
            right = hits(found.outputs, held_out[1]).sum()
        with network.learning(weights=True):
            with self.accelerator.autocast():
                loss = self._loss(network(training[0]), training[1])
            flat = self.mean(flatten(gradients(loss, self.weights)))
        if config.clip_grad is not None:
            flat = flat * (config.clip_grad / (torch.linalg.vector_norm(flat) + 1e-6)).clamp(max=1.0)
        for weight, grad in zip(self.weights, unflatten(flat, self.weights), strict=True):
            # The fused step needs the weight's own memory format.
            weight.grad = grad if weight.is_contiguous() else torch.empty_like(weight).copy_(grad)
        self.optimizer.step()
        return torch.stack([value.detach().double() for value in (loss, held_loss, right)])

    # ---- the run ----

    def run(self) -> dict[str, Any]:
        self.log = RunLog(self.config, self.accelerator, self.steps, self.step)
        self._announce()
        self.train()
        result = self._write_result()
        if self.accelerator.is_main_process and missing_matplotlib() is None:
            draw_result(self.history, self.space, result['edges'], self.out, self.config.title)
        self.accelerator.wait_for_everyone()
        return result

    def end_epoch(self, epoch: int, seconds: float) -> None:
        row = self._row(epoch, seconds)
        self.history.append(self.network.logits.detach().cpu().clone())
        self.log.add(row, _scalars(row))
        self._write_result()
        self._report(row)

    def _updates(self, step: int) -> int:
        """The number of updates of the logits before a step."""
        return -(-step // self.config.arch_every)

    def _row(self, epoch: int, seconds: float) -> dict[str, Any]:
        """The line of metrics.jsonl.

        Held-out figures are means over the epoch's batches in train mode, each before the logits learned from it.
        """
        config, network, (images, labels) = self.config, self.network, self.held_out
        updates = max(self._updates(self.step) - self._updates(epoch * self.steps), 1)
        hessian = None
        with torch.compiler.set_stance('force_eager'):  # double backward and observers do not pass compiled code
            if config.hessian_every and (epoch + 1) % config.hessian_every == 0:
                n = max(HESSIAN_IMAGES // self.world, 2)
                hessian = hessian_eigenvalue(network, self._loss, images[:n], labels[:n], self.mean)
            dead = dead_operations(network, images)
        logits = network.logits.detach().cpu()
        noise = noise_leads(self.space, len(logits), self._updates(self.step), config.arch_lr)
        row = {
            'epoch': epoch + 1,
            'step': self.step,
            'lr': self.optimizer.param_groups[0]['lr'],
            'train_loss': float(self.sums[0]) / self.steps,
            'held_out_loss': float(self.sums[1]) / updates,
            'held_out_acc1': 100 * float(self.sums[2]) * self.world / (updates * config.batch_size),
            'genotype': '; '.join(map(str, network.genotypes())),
            'edges': {
                (f'stage {number}, ' if len(logits) > 1 else ''): describe_edges(self.space, one, noise)
                for number, one in enumerate(logits, start=1)
            },
            'dead': dead,
            'blocks': len(network.blocks),
            'hessian': hessian,
            'seconds_per_step': seconds,
        }
        return {**row, 'warnings': warnings_of([*self.log.rows, row], len(self.data.facts['classes']))}

    def _write_result(self) -> dict[str, Any]:
        result = describe_result(
            self.space,
            self.network.logits.detach().cpu(),
            config=asdict(self.config),
            facts=self.data.facts,
            epoch=self.step // self.steps,
            updates=self._updates(self.step),
            warnings=self.log.rows[-1]['warnings'] if self.log.rows else [],
        )
        if self.accelerator.is_main_process:
            write_logits(self.history, self.space, self.out)
            write_json(self.out / RESULT, result)
        return result

    # ---- messages ----

    def _announce(self) -> None:
        config, say = self.config, self.log.line
        sets, blocks = self.network.logits.shape[0], len(self.network.blocks)
        mixing = "the paper's" if config.paper_mixing else 'fair'
        say(
            f'{config.model}: {blocks} mixed blocks, {sum(w.numel() for w in self.weights):,} weights; space '
            f'{self.space}: {self.space.genotypes:,} genotypes, {sets} set{"s"[: sets > 1]} of logits; {mixing} mixing'
        )
        null = ', each with the label of another image' if config.null else ''
        say(
            f'{describe_data(self.data.facts)}{null}; {config.epochs} epochs of {self.steps} steps of '
            f'{config.batch_size}; order {config.order}; {self.world} process(es) on {self.accelerator.device.type}; '
            f'writing to {self.out}'
        )
        if (missing := missing_matplotlib()) is not None:
            say(f'no pictures will be drawn: {missing}')
        if self.step:
            say(f'resuming at step {self.step} of {config.epochs * self.steps}')

    def _report(self, row: dict[str, Any]) -> None:
        states = [state for edges in row['edges'].values() for state in edges.values()]
        margins, entropies, decided = ([state[key] for state in states] for key in ('margin', 'entropy', 'decided'))
        hessian = '' if row['hessian'] is None else f', Hessian {row["hessian"]:.3g}'
        self.log.line(
            f'epoch {row["epoch"]}/{self.config.epochs}: training loss {row["train_loss"]:.4f}, held-out loss '
            f'{row["held_out_loss"]:.4f}, accuracy {row["held_out_acc1"]:.2f} %{hessian}, margin '
            f'{min(margins):.4f} to {max(margins):.4f}, entropy {min(entropies):.3f} to {max(entropies):.3f}, '
            f'{decided.count(True)} of {len(decided) - decided.count(None)} edges decided, '
            f'{row["seconds_per_step"]:.3f} s a step, {self.log.left()} left\n  {row["genotype"]}'
        )
        before = self.log.rows[-2]['warnings'] if len(self.log.rows) > 1 else []
        for text in row['warnings']:
            if text not in before:
                self.log.line(f'  warning: {text}')


def _scalars(row: dict[str, Any]) -> dict[str, float]:
    """The numbers of a row of metrics.jsonl for TensorBoard."""
    out = {name: float(value) for name, value in row.items() if isinstance(value, (int, float))}
    for stage, edges in row['edges'].items():
        for edge, state in edges.items():
            for name in ('margin', 'entropy'):
                out[f'{name}/{stage.replace(", ", "/").replace(" ", "")}{edge}'] = state[name]
    return out
