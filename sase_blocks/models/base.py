"""Base class of our own networks: a stem, stages and a pooled linear classifier, with timm's interface."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import create_classifier
from timm.models import checkpoint_seq
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from sase_blocks.ops.primitive import children_without_decay

__all__ = ['StagedNetwork']


class StagedNetwork(nn.Module, ABC):
    """The part of timm's interface that does not depend on the kind of stages.

    A subclass builds ``conv1``, ``maxpool`` and its stages, calls ``add_head``, and defines ``forward_stem``, which
    ends before ``maxpool``, and ``forward_features``.

    Args:
        stage_names: attribute names of the stages.
        num_classes: number of classes; 0 for no classifier.
        in_chans: input channels.
        drop_rate: dropout before the classifier.
    """

    def __init__(self, stage_names: Sequence[str], num_classes: int, in_chans: int, drop_rate: float) -> None:
        super().__init__()
        self.stage_names = list(stage_names)
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.grad_checkpointing = False

    @torch.jit.ignore
    def add_head(self, info: list[dict[str, Any]], global_pool: str, **factory_kwargs: Any) -> None:
        """Add the classifier after the last stage; ``info`` describes the features of the stem and of each stage."""
        self.feature_info = info
        self.num_features = info[-1]['num_chs']
        self.global_pool, self.fc = create_classifier(
            self.num_features, self.num_classes, pool_type=global_pool, **factory_kwargs
        )
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()

    @torch.jit.ignore
    def init_weights(self, zero_init_last: bool = True) -> None:
        """He initialisation of all convolutions; by default the last batch norm of each block starts at zero.

        Attentions keep their own initialisation and are always reset.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')
        for module in self.modules():
            # A module with reset_parameters is reset here, not started at zero.
            if hasattr(module, 'zero_init_last') and (zero_init_last or hasattr(module, 'reset_parameters')):
                module.zero_init_last()  # type: ignore[operator]

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay, besides vectors; timm's optimisers read this."""
        return children_without_decay(self)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade time for memory in training."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self, name_only: bool = False) -> Any:
        """The classifier, or its name."""
        return 'fc' if name_only else self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by one for ``num_classes`` (0: none); keeps the pooling unless another is given."""
        weight: Any = self.conv1.weight  # type: ignore[union-attr]
        self.num_classes = num_classes
        self.global_pool, self.fc = create_classifier(
            self.num_features,
            num_classes,
            pool_type=self.global_pool.pool_type if global_pool is None else global_pool,
            device=weight.device,
            dtype=weight.dtype,
        )
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.global_pool.train(self.training)
        self.fc.train(self.training)

    @abstractmethod
    def forward_stem(self, x: Tensor) -> Tensor:
        """The features before ``maxpool``."""

    @abstractmethod
    def forward_features(self, x: Tensor) -> Tensor:
        """The features of the last stage."""

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
    ) -> Any:
        """Features of the stem and the stages, as in timm's models: (last, list), or only the list."""
        if output_fmt != 'NCHW':
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}")
        take, last = feature_take_indices(len(self.feature_info), indices)
        x = self.forward_stem(x)
        intermediates = [x] if 0 in take else []
        x = self.maxpool(x)  # type: ignore[operator]
        for i, name in enumerate(self.stage_names[:last] if stop_early else self.stage_names, start=1):
            stage = self.get_submodule(name)
            x = checkpoint_seq(stage, x) if self.grad_checkpointing and not torch.jit.is_scripting() else stage(x)
            if i in take:
                intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the stages that the chosen features do not need; returns the kept indices."""
        take, last = feature_take_indices(len(self.feature_info), indices)
        for name in self.stage_names[last:]:
            parent, _, child = name.rpartition('.')
            setattr(self.get_submodule(parent), child, nn.Sequential())
        if last < len(self.stage_names):
            self.num_features = self.head_hidden_size = self.feature_info[last]['num_chs']
        if prune_head or last < len(self.stage_names):
            self.reset_classifier(0, '')
        return take

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pooling, dropout and, unless ``pre_logits``, the classifier."""
        x = self.global_pool(x)
        if self.drop_rate:
            x = F.dropout(x, p=float(self.drop_rate), training=self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))
