"""Spatial squeezes: (B, C, H, W) -> (B, 1, H, W), one number per position, taken over C.

First come the seven of SASE (arXiv 2411.08333, the spatial squeeze set) in its order, with the same changes as the
channel squeezes (see there), then those of other published blocks (``EXTENDED_SETS``). With an optional ``gate``
(B, C, 1, 1), they squeeze ``gate * x``. The p-norm does not form this product, which saves one traversal of x in a
compiled backward pass.
"""

import math
from abc import abstractmethod
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sase_blocks.checks import check_features, check_int, check_reduction
from sase_blocks.numerics import narrow, safe_sqrt, widen

from .eager import fourth_powers
from .layers import Conv2d, Linear
from .normalization import BatchNorm2d
from .primitive import Primitive, adaptive_avg_pool, contract_rows, project, scaled_gram, turn_positive_
from .statistics import avg_max, avg_plus_max, avg_skew, avg_std, channel_mean

torch.fx.wrap('channel_mean')
torch.fx.wrap('fourth_powers')
torch.fx.wrap('narrow')
torch.fx.wrap('project')
torch.fx.wrap('check_features')  # must be wrapped in each module that calls it
torch.fx.wrap('avg_max')
torch.fx.wrap('avg_skew')
torch.fx.wrap('avg_std')


@torch.fx.wrap
def apply_gate(x: Tensor, gate: Tensor | None) -> Tensor:
    """gate * x, or x without a gate. For fp16 the product is fp32, because an ungated excitation would overflow it."""
    return x if gate is None else gate.float() * x.float() if x.dtype == torch.float16 else gate * x


@torch.fx.wrap
def resize_map(map: Tensor, x: Tensor) -> Tensor:
    """A per-position parameter (H, W) as (1, 1, H', W'), interpolated bilinearly to the size of ``x``.

    It is exact at the same size. A branch for that case would fix an exported network to its traced size.
    """
    return F.interpolate(map[None, None], size=(x.shape[2], x.shape[3]), mode='bilinear', align_corners=False)


@torch.fx.wrap
def spatial_l2_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """L2 norm over C of the map layer-normalised over (H, W) channel by channel. weight, bias: (1, 1, H, W)."""
    wide = widen(x)
    var, avg = torch.var_mean(wide, dim=(2, 3), correction=0, keepdim=True)
    normed = (wide - avg) * torch.rsqrt(var + eps) * widen(weight) + widen(bias)
    return narrow(safe_sqrt(normed.square().sum(1, keepdim=True)), x)


def spatial_p_norm(x: Tensor, gate: Tensor | None = None) -> Tensor:
    """4-norm over C of x, or of gate * x as (sum gate^4 x^4)^(1/4). gate: (B, C, 1, 1)."""
    return narrow((fourth_powers(x, gate) + 1e-30) ** 0.25, x)  # with a finite gradient at 0


@torch.fx.wrap
def spatial_covariance(x: Tensor, grid: int) -> Tensor:
    """Covariance, over the channels, of the positions of x pooled to grid x grid.

    (B, C, H, W) -> (B, grid^2, grid^2), in fp32 for half inputs, divided by grid^2 - 1 as by the authors.
    """
    z = widen(adaptive_avg_pool(x, grid, grid)).flatten(2).transpose(1, 2)  # (B, P, C)
    z = z - z.mean(2, keepdim=True)
    return scaled_gram(z) / (grid * grid - 1)


@torch.fx.wrap
def pool_to(s: Tensor, x: Tensor) -> Tensor:
    """``s`` (B, 1, h, w) average-pooled adaptively to the H and W of ``x``, in the dtype of ``x``."""
    return adaptive_avg_pool(s, x.shape[2], x.shape[3]).to(x.dtype)


class SpatialSqueeze(Primitive):
    """Base of the spatial squeezes. Shape: x (B, C, H, W), gate (B, C, 1, 1) or None -> (B, 1, H, W), any H and W.

    Raises in ``forward``: ValueError for another rank or number of channels, TypeError for a non-floating input.
    """

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        check_features(x, self.current_channels())
        return narrow(self.squeeze(apply_gate(x, gate)), x)

    @abstractmethod
    def squeeze(self, x: Tensor) -> Tensor:
        """The statistic of a checked and gated x."""


class SpatialAvg(SpatialSqueeze):
    """Mean over the channels ('GAP')."""

    paper_key = 'GAP'

    def squeeze(self, x: Tensor) -> Tensor:
        return channel_mean(x)


class SpatialL2Norm(SpatialSqueeze):
    """L2 norm over C of the layer-normalised map ('L2-norm'), affine per position.

    Requires ``feat_size``. The H x W parameters are interpolated for maps of another size.
    """

    paper_key = 'L2-norm'
    needs_feat_size = True

    def __init__(self, channels: int, feat_size: Any = None, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__(channels, feat_size)
        self.weight = nn.Parameter(torch.empty(self.feat_size, device=device, dtype=dtype))  # type: ignore[arg-type]
        self.bias = nn.Parameter(torch.empty(self.feat_size, device=device, dtype=dtype))  # type: ignore[arg-type]
        self.eps = 1e-5
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {'weight', 'bias'}

    def squeeze(self, x: Tensor) -> Tensor:
        return spatial_l2_norm(x, resize_map(self.weight, x), resize_map(self.bias, x), self.eps)


class SpatialPNorm(SpatialSqueeze):
    """4-norm over the channels ('p-norm')."""

    paper_key = 'p-norm'

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        check_features(x, self.current_channels())
        return spatial_p_norm(x, gate)

    def squeeze(self, x: Tensor) -> Tensor:
        return spatial_p_norm(x)


class MixedSpatialSqueeze(SpatialSqueeze):
    """Base of the squeezes that mix two statistics with two weights, shared by all positions."""

    def __init__(self, channels: int, feat_size: Any = None, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__(channels, feat_size)
        self.weight = nn.Parameter(torch.empty(2, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, 0.5)


class SpatialAvgMax(MixedSpatialSqueeze):
    """Mean and maximum over C, mixed, then ReLU ('GAP+GMP')."""

    paper_key = 'GAP+GMP'

    def squeeze(self, x: Tensor) -> Tensor:
        return avg_max(x, self.weight, [1])


class SpatialAvgStd(MixedSpatialSqueeze):
    """Mean and unbiased standard deviation over C, mixed, then ReLU ('GAP+std')."""

    paper_key = 'GAP+std'

    def squeeze(self, x: Tensor) -> Tensor:
        return avg_std(x, self.weight, [1])


class SpatialAvgSkew(MixedSpatialSqueeze):
    """Mean and third central moment over C, mixed, then ReLU ('SkewPooling')."""

    paper_key = 'SkewPooling'

    def squeeze(self, x: Tensor) -> Tensor:
        return avg_skew(x, self.weight, [1])


class SpatialSecondOrder(SpatialSqueeze):
    """Covariance of a grid of positions, batch norm, row convolution, ReLU, 1x1 ('2nd-order pooling').

    Each of the covariance's grid^2 rows becomes one number. The numbers form a grid x grid map, pooled to H x W.
    """

    paper_key = '2nd-order pooling'

    def __init__(
        self, channels: int, feat_size: Any = None, *, grid: int = 8, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__(channels, feat_size)
        self.grid = check_int(grid, 'grid', type(self).__name__, least=2)
        p = self.grid * self.grid
        self.norm = BatchNorm2d(p, device=device, dtype=dtype)
        self.row_weight = nn.Parameter(torch.empty(p, p, device=device, dtype=dtype))
        self.fc = Linear(p, p, bias=False, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.norm.reset_parameters()
        nn.init.kaiming_uniform_(self.row_weight, a=math.sqrt(5))  # as in torch's convolutions
        self.fc.reset_parameters()

    def squeeze(self, x: Tensor) -> Tensor:
        rows = spatial_covariance(x, self.grid).unsqueeze(3)  # (B, grid^2, grid^2, 1)
        s = self.fc(torch.relu(contract_rows(self.norm(rows).squeeze(3), self.row_weight)))  # (B, grid^2)
        return pool_to(s.reshape(-1, 1, self.grid, self.grid), x)


# ---- beyond the paper's set ----


class SpatialMax(SpatialSqueeze):
    """Maximum over the channels, used with the mean in CBAM (arXiv 1807.06521, eq. 3)."""

    def squeeze(self, x: Tensor) -> Tensor:
        return x.amax(1, keepdim=True)


class SpatialAvgPlusMax(SpatialSqueeze):
    """(mean + maximum) / 2 without weights, as in timm's light CBAM."""

    def squeeze(self, x: Tensor) -> Tensor:
        return avg_plus_max(x, [1])


class SpatialProject(SpatialSqueeze):
    """A weighted sum of the channels: the 1x1 convolution to one map of scSE (arXiv 1803.02579, section 2.2)."""

    per_channel: ClassVar[dict[str, int]] = {'weight': 0}

    def __init__(self, channels: int, feat_size: Any = None, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__(channels, feat_size)
        self.weight = nn.Parameter(torch.empty(channels, device=device, dtype=dtype))
        self.reset_parameters()

    def current_channels(self) -> int:
        return self.weight.shape[0]

    def reset_parameters(self) -> None:
        bound = 1 / math.sqrt(self.weight.shape[0])  # as in torch's convolutions
        nn.init.uniform_(self.weight, -bound, bound)

    def squeeze(self, x: Tensor) -> Tensor:
        return project(x, self.weight)


class SpatialDilated(SpatialSqueeze):
    """The bottleneck of BAM (arXiv 1807.06514, eq. 4): 1x1 to C // reduction, two dilated 3x3, 1x1 to one map.

    A ReLU follows the first three, as in the authors' code but not in the paper's formula. Its batch norm is the
    excitation ``norm``.
    """

    per_channel: ClassVar[dict[str, int]] = {'convs.0': 1}

    def __init__(
        self,
        channels: int,
        feat_size: Any = None,
        *,
        reduction: int = 16,
        dilation: int = 4,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(channels, feat_size)
        name = type(self).__name__
        c = max(1, channels // check_reduction(reduction, channels, name))
        d = check_int(dilation, 'dilation', name)
        kwargs: dict[str, Any] = {'device': device, 'dtype': dtype}
        self.convs = nn.Sequential(
            Conv2d(channels, c, 1, **kwargs),
            nn.ReLU(),
            Conv2d(c, c, 3, padding=d, dilation=d, **kwargs),
            nn.ReLU(),
            Conv2d(c, c, 3, padding=d, dilation=d, **kwargs),
            nn.ReLU(),
            Conv2d(c, 1, 1, **kwargs),
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for layer in self.convs:
            if isinstance(layer, Conv2d):
                layer.reset_parameters()
                turn_positive_(layer.weight)

    def squeeze(self, x: Tensor) -> Tensor:
        return self.convs(x)
