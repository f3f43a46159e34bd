"""Axial self-attention layers: the position-sensitive form of Axial-DeepLab (arXiv 2003.07853).

Differences from the authors' code: an axis may have any length, not only that of its table; the batch norm of the
logits is computed as factors (``axial_routes.py``); channel order is ``c * heads + head``; the pool rounds up.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sase_blocks.checks import check_channels, check_feat_size
from sase_blocks.numerics import narrow, widen
from sase_blocks.ops import BatchNorm2d, Conv2d
from sase_blocks.ops.primitive import children_without_decay

from .axial_routes import AXIAL_ROUTES, axial_attention, logit_maps, logit_moments, long_axis, split_tables
from .routes import autocast_active, captured, check_choice, check_heads, check_map, check_stride, halve

torch.fx.wrap('axial_attention')  # FX wraps a function in the module that calls it
torch.fx.wrap('check_map')
torch.fx.wrap('halve')

AXES = ('height', 'width')


@torch.fx.wrap
def logit_scale(
    q: Tensor,
    k: Tensor,
    relative: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor,
    bias: Tensor,
    training: bool,
    momentum: float,
    eps: float,
    route: str | None,
) -> Tensor:
    """The factors (3, heads) by which a batch norm over the three parts of the logits multiplies them.

    q, k: (B, lines, heads, L, g / 2). Training mode uses this batch's moments and updates the running statistics. Eval
    mode uses the running statistics, as does a part with a single number, which has no variance.
    """
    heads = q.shape[2]
    variance = widen(running_var).reshape(3, heads)
    if training and q.shape[0] * q.shape[1] * q.shape[3] > 1:
        mean, variance = moments(q, k, relative, 'auto' if route is None else route)
        count = q.shape[0] * q.shape[1] * q.shape[3] * q.shape[3]
        unbiased = variance.detach() * (count / (count - 1))
        for running, new in ((running_mean, mean.detach()), (running_var, unbiased)):
            mixed = widen(running) + (new.reshape(3 * heads) - widen(running)) * momentum
            running.copy_(narrow(mixed, running))
    scale = widen(weight).reshape(3, heads) * torch.rsqrt(variance + eps)
    # The bias is equal for all keys, so the softmax ignores it. A factor of 0 makes its gradient 0, not None.
    return scale + 0 * widen(bias).reshape(3, heads)


def moments(q: Tensor, k: Tensor, relative: Tensor, route: str) -> tuple[Tensor, Tensor]:
    """``logit_moments`` of maps: (3, heads) each, in fp32 for half inputs, under autocast too.

    If the route is ``'recompute'``, given or chosen, intermediates are not kept.
    """
    if not torch.jit.is_scripting():
        if autocast_active(q.device):
            with torch.autocast(q.device.type, enabled=False):
                return moments(q, k, relative, route)
        if torch.is_grad_enabled() and not captured():  # noqa: SIM102 - an axis of a captured graph has any length
            if route == 'recompute' or (route == 'auto' and long_axis(q)):
                return checkpointed_moments(q, k, relative)
    r_q, r_k, _ = split_tables(widen(relative), q.shape[3])
    return logit_moments(widen(q).flatten(0, 1), widen(k).flatten(0, 1), r_q, r_k)


def checkpointed_moments(q: Tensor, k: Tensor, relative: Tensor) -> tuple[Tensor, Tensor]:
    """``moments``, recomputed in the backward."""
    mean, variance = checkpoint(moments, q, k, relative, 'einsum', use_reentrant=False, preserve_rng_state=False)
    return mean, variance


class LogitNorm(BatchNorm2d):
    """The batch norm over the three parts of every head's logits, as the factors that affect the softmax.

    Channels: the heads of q . k, then of q . R_q, then of k . R_k. ``forward`` is an ordinary batch norm.
    """

    def scale(self, q: Tensor, k: Tensor, relative: Tensor, route: str | None) -> Tensor:
        """The factors (3, heads) for these q and k; updates the running statistics in training mode."""
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.training:
            self.num_batches_tracked.add_(1)  # type: ignore[union-attr]
            if self.momentum is None:
                momentum = 1.0 / float(self.num_batches_tracked)  # type: ignore[arg-type]
        return logit_scale(
            q,
            k,
            relative,
            self.running_mean,  # type: ignore[arg-type]
            self.running_var,  # type: ignore[arg-type]
            self.weight,
            self.bias,
            self.training,
            momentum,
            self.eps,
            route,
        )


class AxisAttention(nn.Module):
    """Each position attends to all positions of its column (``'height'``) or row (``'width'``).

    Shape: (B, C_in, H, W) -> (B, C, H, W), any H and W from 1 on.

    A 1 x 1 convolution without bias and a batch norm give q, k (C / 2 channels each) and v (C channels), concatenated.
    A table of relative positions (2 C / heads, 2 size - 1), shared by the heads, has rows for q, k and v; an axis of
    another length uses its centre or interpolates it. Batch norms normalise the three parts of the logits and the two
    parts of the output. Channel ``c * heads + head`` of q, k and v belongs to that head.

    Args:
        channels_in: C_in.
        channels: C, a multiple of 2 x heads.
        heads: number of heads.
        size: axis length that the table is built for; at least 2 if a longer axis may occur.
        axis: ``'height'`` or ``'width'``.
        route: forces one of ``AXIAL_ROUTES``; None lets ``axial_attention`` choose.
        device, dtype: of the parameters.

    Raises:
        ValueError: a bad argument; in ``forward`` another rank or number of channels, an empty map, an axis that is
            longer than a table of size 1.
        TypeError: in ``forward``, a non-floating input.
    """

    def __init__(
        self,
        channels_in: int,
        channels: int,
        heads: int = 8,
        size: int = 56,
        axis: str = 'height',
        route: str | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        self.channels_in, self.channels = check_channels(channels_in, name), check_channels(channels, name)
        self.heads = check_heads(channels, heads, 2, 'q and k have half the channels of v', name)
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f'{name} needs size, the length of the axis, to be an int of at least 1, got {size!r}')
        check_choice('axis', axis, AXES)
        if route is not None:
            check_choice('route', route, AXIAL_ROUTES)
        self.size, self.axis, self.route = size, axis, route
        args: dict[str, Any] = {'device': device, 'dtype': dtype}
        self.project = Conv2d(channels_in, 2 * channels, 1, bias=False, **args)
        self.norm = BatchNorm2d(2 * channels, **args)
        self.relative = nn.Parameter(torch.empty(2 * channels // heads, 2 * size - 1, **args))
        self.logit_norm = LogitNorm(3 * heads, **args)
        self.value_norm = BatchNorm2d(channels, **args)
        self.position_norm = BatchNorm2d(channels, **args)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the parameters as the paper's authors do: N(0, 1 / C_in), and N(0, 1 / g) for the table."""
        nn.init.normal_(self.project.weight, 0.0, 1 / math.sqrt(self.channels_in))
        nn.init.normal_(self.relative, 0.0, math.sqrt(self.heads / self.channels))
        for norm in (self.norm, self.logit_norm, self.value_norm, self.position_norm):
            norm.reset_parameters()

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """No weight decay for the table of relative positions, as in timm's Swin."""
        return {'relative'}

    def zero_init_last(self) -> None:
        """Reset this layer; timm's ResNets call this in their ``init_weights``."""
        self.reset_parameters()

    def multiply_adds(self, height: int, width: int) -> int:
        """Multiply-adds per image: the projection and the five products of the attention."""
        length = height if self.axis == 'height' else width
        return height * width * self.channels * (4 * self.channels_in + 7 * length) // 2

    def forward(self, x: Tensor) -> Tensor:
        check_map(x, self.channels_in)
        y = self.project(x)
        y = self.norm(y).to(y.dtype)  # under autocast the norm returns the dtype of its weight
        b, h, w = y.shape[0], y.shape[2], y.shape[3]
        g = self.channels // self.heads
        y = y.reshape(b, 2 * g, self.heads, h, w)
        # (B, lines, heads, L, .), a view
        y = y.permute(0, 4, 2, 3, 1) if self.axis == 'height' else y.permute(0, 3, 2, 4, 1)
        q, k, v = y[..., : g // 2], y[..., g // 2 : g], y[..., g:]
        if not torch.jit.is_scripting():
            norm: nn.Module = self.logit_norm
            if not isinstance(norm, LogitNorm):
                return self.finish(*self.attend_maps(q, k, v), b, h, w)
        scale = self.logit_norm.scale(q, k, self.relative, self.route)
        values, positions = axial_attention(q, k, v, self.relative, scale, self.route)
        return self.finish(values, positions, b, h, w)

    def finish(self, values: Tensor, positions: Tensor, b: int, h: int, w: int) -> Tensor:
        """Reshape lines to a map, and add the two normalised parts."""
        if self.axis == 'height':
            values, positions = values.permute(0, 4, 2, 3, 1), positions.permute(0, 4, 2, 3, 1)
        else:
            values, positions = values.permute(0, 4, 2, 1, 3), positions.permute(0, 4, 2, 1, 3)
        shape = (b, self.channels, h, w)
        y = self.value_norm(values.reshape(shape)) + self.position_norm(positions.reshape(shape))
        return y.to(values.dtype)

    @torch.jit.unused
    def attend_maps(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The attention with a batch norm over the maps themselves, such as a SyncBatchNorm in its place."""
        if autocast_active(q.device):
            with torch.autocast(q.device.type, enabled=False):
                return self.attend_maps(q, k, v)
        r_q, r_k, r_v = split_tables(widen(self.relative), q.shape[3])
        ql, kl, vl = (widen(x).flatten(0, 1) for x in (q, k, v))
        maps = self.logit_norm(torch.cat(logit_maps(ql, kl, r_q, r_k), 1))
        weights = torch.softmax(widen(maps).unflatten(1, (3, self.heads)).sum(1), 3)
        values = torch.einsum('nhij,nhjc->nhic', weights, vl).reshape(v.shape)
        positions = torch.einsum('nhij,cij->nhic', weights, r_v).reshape(v.shape)
        return narrow(values, v), narrow(positions, v)

    def extra_repr(self) -> str:
        return f"{self.channels_in}, {self.channels}, heads={self.heads}, size={self.size}, '{self.axis}'"


class AxialSelfAttention(nn.Module):
    """Attention along the height, then along the width (Axial-DeepLab, Wang et al. 2020, position-sensitive).

    Shape: (B, C, H, W) -> (B, C, H, W), any H and W from 1 on; with stride 2, (B, C, ceil(H / 2), ceil(W / 2)).

    Args:
        channels: C, a multiple of 2 x heads.
        heads: number of heads.
        size: (H, W), or an int for both, that the tables are built for; other maps use their centre or interpolate
            them.
        stride: 2 adds a 2 x 2 average pool after the second pass; a last odd row or column is averaged with itself.
        route: forces one of ``AXIAL_ROUTES``; None lets ``axial_attention`` choose.
        device, dtype: of the parameters.

    Raises:
        ValueError: a bad argument; in ``forward`` another rank or number of channels, an empty map, an axis that is
            longer than a table of size 1.
        TypeError: in ``forward``, a non-floating input.

    Examples:
        >>> AxialSelfAttention(64, heads=8, size=28)(torch.randn(2, 64, 28, 28)).shape
        torch.Size([2, 64, 28, 28])
    """

    def __init__(
        self,
        channels: int,
        heads: int = 8,
        size: int | tuple[int, int] = 56,
        stride: int = 1,
        route: str | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        self.channels = check_channels(channels, name)
        self.heads = check_heads(channels, heads, 2, 'q and k have half the channels of v', name)
        self.size, self.stride = check_feat_size(size, name), check_stride(stride, name)
        args: dict[str, Any] = {'device': device, 'dtype': dtype}
        self.height = AxisAttention(channels, channels, heads, self.size[0], 'height', route, **args)
        self.width = AxisAttention(channels, channels, heads, self.size[1], 'width', route, **args)

    def reset_parameters(self) -> None:
        """Initialise the parameters of both passes."""
        self.height.reset_parameters()
        self.width.reset_parameters()

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The tables of both passes."""
        return children_without_decay(self)

    def multiply_adds(self, height: int, width: int) -> int:
        """Multiply-adds per image at full resolution, both passes."""
        return self.height.multiply_adds(height, width) + self.width.multiply_adds(height, width)

    def forward(self, x: Tensor) -> Tensor:
        check_map(x, self.channels)
        y = self.width(self.height(x))
        return halve(y) if self.stride == 2 else y

    def extra_repr(self) -> str:
        return f'{self.channels}, heads={self.heads}, size={self.size}, stride={self.stride}'
