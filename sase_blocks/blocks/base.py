"""The interface of all blocks: channels in the constructor, a gate for x, and y = x * gate."""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from sase_blocks.checks import check_features, check_int
from sase_blocks.ops import GroupNorm
from sase_blocks.ops.primitive import children_without_decay

from .graph import Graph

torch.fx.wrap('check_features')  # must be wrapped in each module that calls it


# Kept whole in a symbolic trace, where a missing alpha is a proxy.
@torch.fx.wrap
def fade(gate: Tensor, alpha: Tensor | None) -> Tensor:
    """1 + alpha (gate - 1), exactly 1 for alpha = 0 and exactly the gate for alpha = 1 or None."""
    if alpha is None:
        return gate
    return torch.lerp(torch.ones_like(alpha, dtype=gate.dtype), gate, alpha.to(gate.dtype))


@torch.fx.wrap
def fade_sum(a: Tensor, b: Tensor, alpha: Tensor | None) -> tuple[Tensor, Tensor]:
    """Two whose sum is ``fade(a + b, alpha)``, for two that broadcast. Applies alpha while they are small."""
    if alpha is None:
        return a, b
    alpha = alpha.to(a.dtype)
    return torch.lerp(torch.ones_like(alpha), a, alpha), alpha * b


@torch.fx.wrap
def fade_product(a: Tensor, b: Tensor, alpha: Tensor | None) -> Tensor:
    """``fade(a * b, alpha)`` for two that broadcast. Applies alpha while they are small."""
    if alpha is None:
        return a * b
    alpha = alpha.to(a.dtype)
    return torch.addcmul(1 - alpha, alpha * a, b)


@torch.fx.wrap
def fade_value(value: Tensor, alpha: Tensor | None) -> Tensor:
    """alpha * value, for a block that adds a value to x."""
    return value if alpha is None else alpha.to(value.dtype) * value


@torch.fx.wrap
def fade_map(x: Tensor, y: Tensor, alpha: Tensor | None) -> Tensor:
    """x + alpha (y - x) for a block that is no gate, exactly x for alpha = 0 and exactly y for alpha = 1 or None."""
    return y if alpha is None else torch.lerp(x, y, alpha.to(x.dtype))


class AttentionModule(nn.Module, ABC):
    """Base of the blocks. Shape: (B, C, H, W) -> (B, C, H, W), any H and W. Keeps dtype and memory format.

    A subclass is ``Block(channels, ..., feat_size=None, *, device=None, dtype=None)`` and defines ``gate``. The
    options of a named block are its other keyword-only arguments.

    Raises:
        ValueError: bad channels; in ``forward`` another rank or number of channels.
        TypeError: in ``forward``, a non-floating input.
    """

    # For ``keep_channels``: the block's own parameters and layers with an entry per channel, and that entry's axis, or
    # ``ops.primitive.BOTH``.
    per_channel: ClassVar[dict[str, int]] = {}

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = check_int(channels, 'channels', type(self).__name__)

    def current_channels(self) -> int:
        """The channels in the parameters, fewer after pruning. 0: any number, or the parts check it."""
        return 0

    def channel_multiple(self) -> int:
        """For ``keep_channels``: the number that must divide the channels, because they are in groups."""
        return max([norm.num_groups for norm in self.children() if isinstance(norm, GroupNorm)], default=1)

    def keep_rest(self, keep: Tensor) -> None:
        """For ``keep_channels``: keep these indices in what ``per_channel`` cannot describe."""

    def reset_parameters(self) -> None:
        """Reinitialise the parameters."""
        for child in self.children():
            for module in child if isinstance(child, nn.ModuleList) else [child]:
                if hasattr(module, 'reset_parameters'):
                    module.reset_parameters()  # type: ignore[operator]

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of the parameters, besides vectors, that get no weight decay, by timm's convention."""
        return children_without_decay(self)

    def zero_init_last(self) -> None:
        """Reinitialise the block. timm's ResNets call this at the end of their ``init_weights``.

        The name is timm's. The block's own initialisation does not depend on it, because no network recognises the
        block's layers (``ops.Conv2d``, ``ops.Linear``).
        """
        self.reset_parameters()

    def reparameterize(self) -> None:
        """For inference: fold what only the block can fold, in place, with the same outputs.

        ``fuse`` calls it. ``fuse`` itself folds batch norms directly after a convolution or a linear layer. The name is
        timm's, whose ``reparameterize_model`` also calls it.
        """

    @abstractmethod
    def gate(self, x: Tensor) -> Tensor:
        """The attention for a checked x, in a shape that broadcasts to it."""

    def attend(self, x: Tensor) -> Tensor:
        """y for a checked x. A block that is no gate overrides it, and ``faded``."""
        return x * self.gate(x).to(x.dtype)

    def faded_gate(self, x: Tensor, alpha: Tensor | None) -> Tensor:
        """1 + alpha (gate - 1), for ``insert``. Needs no extra pass for a sum or a product of small gates."""
        return fade(self.gate(x), alpha)

    def faded(self, x: Tensor, alpha: Tensor | None) -> Tensor:
        """x + alpha (y - x) for a checked x, y for None. In a symbolic trace, a missing alpha is a proxy."""
        return x * self.faded_gate(x, alpha).to(x.dtype)

    @abstractmethod
    def graph(self) -> Graph:
        """The block as plain data, for drawing."""

    def forward(self, x: Tensor, alpha: Tensor | None = None) -> Tensor:
        """y = x * gate, or with ``insert``'s alpha of shape (1,), y = x * (1 + alpha (gate - 1))."""
        check_features(x, self.current_channels())
        return self.attend(x) if alpha is None else self.faded(x, alpha)

    def extra_repr(self) -> str:
        return f'{self.current_channels() or self.channels}'
