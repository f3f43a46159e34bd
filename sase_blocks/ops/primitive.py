"""The constructor that all primitives share, and arithmetic that several share.

A primitive of any set has the signature ``Op(channels, feat_size=None, *, device=None, dtype=None)``, so that a set is
a plain dict and a genotype is six names. Other keyword-only arguments are its options (``options.py``).
"""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sase_blocks.checks import check_channels, check_optional_size
from sase_blocks.numerics import widen

BOTH = -1  # both axes of a weight in ``per_channel``: a layer from the channels to the channels


class Primitive(nn.Module, ABC):
    """Base of all primitives: stores and checks the constructor's arguments. Abstract, like the base of each set.

    Args:
        channels: channels C of the feature map, at least 1.
        feat_size: (H, W) of per-position parameters, or an int for a square. Required by classes with
            ``needs_feat_size`` and ignored by others. ``forward`` accepts any other size.
        device, dtype: of the parameters.

    Raises:
        ValueError: channels or feat_size below 1, or a required feat_size is missing.
    """

    paper_key: ClassVar[str | None] = None  # the SASE authors' name for this operation
    needs_feat_size: ClassVar[bool] = False
    # For ``keep_channels``: the parameters and layers with an entry per channel, and that entry's axis, or BOTH.
    per_channel: ClassVar[dict[str, int]] = {}

    def __init__(
        self,
        channels: int,
        feat_size: int | tuple[int, int] | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.channels = check_channels(channels, type(self).__name__)
        self.feat_size = check_optional_size(feat_size, type(self).__name__, self.needs_feat_size)

    def reset_parameters(self) -> None:
        """Reinitialise the parameters."""

    def current_channels(self) -> int:
        """The channels in the parameters, fewer after pruning than at construction. 0: any number."""
        return 0

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of the parameters with more than one dimension that get no weight decay, by timm's convention.

        These are per-position parameters and biases. Those per channel are 1-d and get none either.
        """
        return set()

    @abstractmethod
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """See the base class of each set."""

    def extra_repr(self) -> str:
        channels = f'{self.current_channels() or self.channels}'
        return f'{channels}, feat_size={self.feat_size}' if self.needs_feat_size else channels


def no_weight_decay(model: nn.Module) -> set[str]:
    """Names of the parameters of ``model`` that get no weight decay although they have more than one dimension.

    The network and its modules list them in a method ``no_weight_decay()``, by timm's convention. timm's optimisers ask
    only the network, which does not know about inserted attention. Our models pass the names on. For any other model,
    pass them to timm:

        groups = timm.optim.param_groups_weight_decay(model, 0.05, no_weight_decay_list=no_weight_decay(model))
        optimizer = timm.optim.create_optimizer_v2(groups, opt='adamw', lr=1e-3)

    Args:
        model: any module.

    Returns:
        Names as in ``model.named_parameters()``, or timm's patterns for them.
    """
    own = getattr(model, 'no_weight_decay', None)
    return children_without_decay(model) | (set(own()) if callable(own) else set())


def children_without_decay(model: nn.Module) -> set[str]:
    """``no_weight_decay`` of all modules in ``model``, for the same method of ``model`` itself."""
    return {f'{name}.{part}' for name, child in model.named_children() for part in no_weight_decay(child)}


def mix(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """Mix two maps into one, like a 2-to-1 1x1 convolution without bias. ``weight``: (2,)."""
    return weight[0] * a + weight[1] * b


def scaled_gram(z: Tensor) -> Tensor:
    """z @ z^T for (B, N, P), on values of at most 1, because autocast would run the product in fp16 and overflow.

    The gradient treats the scale as a constant. It stays exact, because the product does not depend on the scale.
    """
    n = z.shape[2]
    scale = z.detach().abs().amax((1, 2), keepdim=True).clamp_min(1e-15)
    unit = z / scale
    return (unit @ (unit / n).transpose(1, 2)) * (scale * scale * n)


def contract_rows(rows: Tensor, weight: Tensor) -> Tensor:
    """Apply a separate kernel to each row of (B, N, N): sum_j weight[i, j] rows[b, i, j]. -> (B, N).

    This is the authors' grouped (N, 1) convolution as a product, because a grouped convolution of this shape is slow.
    """
    return (rows * weight).sum(2)


@torch.fx.wrap
def project(x: Tensor, weight: Tensor) -> Tensor:
    """The weighted sum of the channels, (B, C, H, W) -> (B, 1, H, W), in fp32 for half inputs. weight: (C,).

    Equals a 1x1 convolution to one map, but as a reduction, which a compiler fuses with its neighbours.
    """
    return (widen(x) * widen(weight).reshape(1, -1, 1, 1)).sum(1, keepdim=True)


def pooling_matrix(n_in: int, n_out: int, like: Tensor) -> Tensor:
    """Adaptive average pooling of ``n_in`` values to ``n_out`` as a matrix (n_out, n_in).

    The windows are torch's: from floor(i n_in / n_out) to ceil((i + 1) n_in / n_out). As a product, the pooling exports
    to ONNX with dynamic sizes. ``F.adaptive_avg_pool2d`` gives wrong numbers there at any size but the traced one.
    """
    i = torch.arange(n_out, device=like.device)[:, None]
    j = torch.arange(n_in, device=like.device)[None, :]
    window = (j >= i * n_in // n_out) & (j < ((i + 1) * n_in + n_out - 1) // n_out)
    weight = window.to(like.dtype)
    return weight / weight.sum(1, keepdim=True)


@torch.fx.wrap
def adaptive_avg_pool(x: Tensor, height: int, width: int) -> Tensor:
    """(B, C, H, W) -> (B, C, height, width), like ``F.adaptive_avg_pool2d``."""
    rows, columns = pooling_matrix(x.shape[2], height, x), pooling_matrix(x.shape[3], width, x)
    return rows @ x @ columns.transpose(0, 1)


def round_width(width: float, least: float = 0.0) -> int:
    """The multiple of 8 nearest to ``width``, from 8 on, and not below ``least * width``, as in timm's models."""
    rounded = max(8, int(width + 4) // 8 * 8)
    return rounded + 8 if rounded < least * width else rounded


@torch.no_grad()
def turn_positive_(weight: Tensor) -> Tensor:
    """Flip, in place, each output row (first axis) that sums to less than 0.

    Our addition. The one- and two-weight layers here feed a ReLU. With random signs, up to 42 % of the authors' mixers
    and 26 % of their triple convolutions start dead. Rows keep the distribution of their magnitudes.
    """
    sums = weight.sum(dim=tuple(range(1, weight.dim())), keepdim=True)
    return weight.mul_(torch.where(sums < 0, -1.0, 1.0).to(weight.dtype))
