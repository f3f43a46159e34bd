"""The search network: any network with a mixed block in every attention place, and the logits that weigh them.

The paper's setting is ``resnet20_cifar`` with one set of logits for all blocks. Not in the paper: a set for each stage.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sase_blocks.blocks import Genotype
from sase_blocks.insertion import insert

from .mixed import MixedBlock
from .space import SearchSpace

LOGITS_STD = 1e-3  # of the paper: logits start at 1e-3 * N(0, 1)


class SearchNetwork(nn.Module):
    """A network whose attention is a mixture, and the logits of the mixture.

    Shape: as the network's; (B, in_chans, H, W) -> (B, classes) for a classifier.

    Args:
        model: a network that ``insert`` knows or a timm model with an attention slot; changed in place.
        per_stage: one set of logits for each stage instead of one for all blocks.
        fair, form: see ``MixedBlock``.
        where, input_size: see ``insert``.
        seed: of the initial logits.

    Attributes:
        model: the network; its parameters are the weights of the search.
        logits: (sets, sum of ``space.sizes``), not a parameter of ``model``.
        blocks: the mixed blocks by name.

    Raises:
        ValueError: as ``insert``; ``per_stage`` without stages in the names of the places.
    """

    def __init__(
        self,
        model: nn.Module,
        space: SearchSpace,
        *,
        per_stage: bool = False,
        fair: bool = True,
        form: str = 'shared',
        where: Any = None,
        input_size: Any = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.space = space

        def build(channels: int, feat_size: Any = None) -> MixedBlock:
            return MixedBlock(channels, space, feat_size, fair=fair, form=form)

        insert(model, build, where, 'paper', input_size=input_size)
        _wake_residual_branches(model)
        self.model = model
        self.blocks = {name: module for name, module in model.named_modules() if isinstance(module, MixedBlock)}
        self.set_of = _stage_of(list(self.blocks)) if per_stage else dict.fromkeys(self.blocks, 0)
        sets = max(self.set_of.values()) + 1
        start = torch.randn(sets, sum(space.sizes), generator=torch.Generator().manual_seed(seed))
        self.logits = nn.Parameter(LOGITS_STD * start)

    def weights(self) -> dict[str, nn.Parameter]:
        """The weights by name: every trainable parameter but the logits."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def forward(self, x: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """The output of the mixture; ``weights`` by name replace the network's own."""
        probabilities = self.space.probabilities(self.logits)
        for name, block in self.blocks.items():
            block.probabilities = tuple(p[self.set_of[name]] for p in probabilities)
        try:
            if weights is None:
                return self.model(x)
            return torch.func.functional_call(self.model, dict(weights), (x,))
        finally:
            for block in self.blocks.values():
                block.probabilities = None  # a deepcopy fails for tensors that are no leaves

    def genotypes(self) -> list[Genotype]:
        """The leading genotype of each set of logits."""
        return [self.space.genotype(row) for row in self.logits.detach()]

    @contextmanager
    def observed(self, observer: Any) -> Iterator[None]:
        """Within this context ``observer(block name, edge, outputs)`` sees what is mixed; see ``mixed.Observer``."""
        for name, block in self.blocks.items():
            block.observer = partial(observer, name)
        try:
            yield
        finally:
            for block in self.blocks.values():
                block.observer = None

    @contextmanager
    def learning(self, *, weights: bool) -> Iterator[None]:
        """Within this context only the weights, or only the logits, have gradients.

        This saves memory and time for the others' gradients, most in compiled blocks.
        """
        still = [self.logits] if weights else list(self.weights().values())
        for parameter in still:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in still:
                parameter.requires_grad_(True)

    @contextmanager
    def statistics_kept(self) -> Iterator[None]:
        """Restore the batch-norm statistics at the end of this context, for forwards in train mode."""
        # One launch for each dtype instead of hundreds.
        groups: dict[torch.dtype, list[Tensor]] = {}
        for buffer in self.model.buffers():
            groups.setdefault(buffer.dtype, []).append(buffer)
        kept = [(buffers, [torch.empty_like(buffer) for buffer in buffers]) for buffers in groups.values()]
        for buffers, copies in kept:
            torch._foreach_copy_(copies, buffers)
        try:
            yield
        finally:
            for buffers, copies in kept:
                torch._foreach_copy_(buffers, copies)


def _wake_residual_branches(model: nn.Module) -> None:
    """Set to one the norms that timm starts at zero, the last of each residual branch: attention would see zeros."""
    for module in model.modules():
        weight = getattr(module, 'weight', None)
        norm = isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm))
        if norm and isinstance(weight, nn.Parameter) and not weight.detach().any():
            nn.init.ones_(weight)


def _stage_of(names: list[str]) -> dict[str, int]:
    """The stage of each place, from 0, by the part of the name before the number of the block in its stage."""
    stages: dict[str, int] = {}
    found = {}
    for name in names:
        match = re.match(r'(.+?)\.\d+\.', name)
        if match is None:
            raise ValueError(f'per_stage needs places in stages (layer1.0., stages.1.2., ...), got {name}')
        found[name] = stages.setdefault(match[1], len(stages))
    return found
