"""The six-edge block of SASE (arXiv 2411.08333), for any genotype, and the block that the paper found.

::

    x ---- channel_squeeze -> q -- channel_excite -> c ----------------------------------+
    |                         +--- gate_excite ----> d                                   |
    |-- gated_squeeze(d * x) -+                                                          |
    |                         +- mix -> norm -> ReLU -> s -- spatial_excite -> a --------+
    |-- spatial_squeeze(x) ---+                                                          |
    +------------------------------------------------------------ y = x * (1 + (c + a) / 2)

Differences from the authors' code: y is one product, the p-norm moves the gate out of its sum, and the 2-to-1
convolution is two weights that start at 1/2. All of it is plain torch, and a compiler reduces it to three dependent
passes over x. The authors' state dicts map one to one onto this module (``convert.py``).
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sase_blocks.checks import check_channels, check_feat_size
from sase_blocks.ops import (
    BatchNorm2d,
    ChannelExcite,
    ChannelSqueeze,
    SpatialExcite,
    SpatialSqueeze,
    resolve_primitive,
)
from sase_blocks.ops.eager import times_sum
from sase_blocks.ops.normalization import ChannelShift, scale_and_shift
from sase_blocks.ops.primitive import mix

from .base import AttentionModule, fade_sum
from .genotype import SASE_GENOTYPE, Genotype
from .graph import CHANNEL, MAP, SPATIAL, Edge, Graph

for _function in ('fade_sum', 'times_sum'):
    torch.fx.wrap(_function)  # must be wrapped in each module that calls it


class SixEdges(AttentionModule):
    """The SASE graph of six operations, in the order of their edges. See ``AttentionBlock``."""

    def __init__(
        self,
        channels: int,
        channel_squeeze: ChannelSqueeze,
        channel_excite: ChannelExcite,
        gate_excite: ChannelExcite,
        gated_squeeze: SpatialSqueeze,
        spatial_squeeze: SpatialSqueeze,
        spatial_excite: SpatialExcite,
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(channels)
        self.channel_squeeze = channel_squeeze
        self.channel_excite = channel_excite
        self.gate_excite = gate_excite
        self.gated_squeeze = gated_squeeze
        self.spatial_squeeze = spatial_squeeze
        self.mix_weight = nn.Parameter(torch.full((2,), 0.5, device=device, dtype=dtype))
        self.norm = BatchNorm2d(1, device=device, dtype=dtype)
        self.spatial_excite = spatial_excite

    def current_channels(self) -> int:
        return self.channel_excite.current_channels()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.mix_weight, 0.5)
        super().reset_parameters()

    @torch.no_grad()
    def reparameterize(self) -> None:
        """For inference: fold the mixer's batch norm into the two weights and a bias, in place."""
        if not isinstance(self.norm, ChannelShift) and self.norm.running_var is not None:
            scale, shift = scale_and_shift(self.norm)
            self.mix_weight.copy_(self.mix_weight * scale)
            shift = shift.to(self.mix_weight.dtype)
            self.norm = ChannelShift(shift).train(self.training)  # type: ignore[assignment]

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The channel attention c (B, C, 1, 1) and the spatial attention a (B, 1, H, W) for x (B, C, H, W)."""
        q = self.channel_squeeze(x)
        c = self.channel_excite(q)
        d = self.gate_excite(q)
        s = self.norm(mix(self.gated_squeeze(x, d), self.spatial_squeeze(x), self.mix_weight))
        a = self.spatial_excite(torch.relu(s))
        return c, a

    # The gate has the size of x, so these halve and shift the small c and a.

    def gate(self, x: Tensor) -> Tensor:
        c, a = self.gates(x)
        return (1 + c / 2) + a / 2

    def attend(self, x: Tensor) -> Tensor:
        c, a = self.gates(x)
        return times_sum(x, 1 + c / 2, a / 2)

    def faded(self, x: Tensor, alpha: Tensor | None) -> Tensor:
        c, a = self.gates(x)
        c, a = fade_sum(1 + c / 2, a / 2, alpha)
        return times_sum(x, c, a)


class AttentionBlock(SixEdges):
    """The SASE graph with the six operations of ``genotype``.

    Shape: (B, C, H, W) -> (B, C, H, W), any H and W. Keeps dtype and memory format.

    Args:
        channels: C, at least 1.
        genotype: the six operations, or their text form.
        feat_size: (H, W) or an int, required by genotypes with per-position parameters (spatial ``l2_norm`` and
            ``affine``), which are interpolated for other sizes.
        device, dtype: of the parameters.

    Raises:
        ValueError: bad channels, genotype or feat_size; in ``forward`` another rank or number of channels.
        TypeError: in ``forward``, a non-floating input.
    """

    def __init__(
        self,
        channels: int,
        genotype: Genotype | str,
        feat_size: int | tuple[int, int] | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        name = type(self).__name__
        check_channels(channels, name)
        g = Genotype.parse(genotype) if isinstance(genotype, str) else genotype
        if not isinstance(g, Genotype):
            raise TypeError(f'genotype must be a Genotype or its text form, got {genotype!r}')
        feat_size = None if feat_size is None else check_feat_size(feat_size, name)
        args: dict[str, Any] = {'device': device, 'dtype': dtype}
        edges = zip(g.SET_OF.values(), g.to_dict().values(), strict=True)
        parts = [resolve_primitive(kind, edge)(channels, feat_size=feat_size, **args) for kind, edge in edges]
        super().__init__(channels, *parts, **args)
        self.genotype = g
        self.feat_size = feat_size

    def graph(self) -> Graph:
        g = self.genotype
        nodes = {'x': MAP, 'q': CHANNEL, 'c': CHANNEL, 'd': CHANNEL, 'd * x': MAP, 's': SPATIAL, 'a': SPATIAL, 'y': MAP}
        edges = (
            Edge('x', 'q', g.channel_squeeze, 'channel_squeeze'),
            Edge('q', 'c', g.channel_excite, 'channel_excite'),
            Edge('q', 'd', g.gate_excite, 'channel_excite'),
            Edge('d', 'd * x'),
            Edge('x', 'd * x'),
            Edge('d * x', 's', g.gated_squeeze, 'spatial_squeeze'),
            Edge('x', 's', g.spatial_squeeze, 'spatial_squeeze'),
            Edge('s', 'a', g.spatial_excite, 'spatial_excite'),
            Edge('c', 'y'),
            Edge('a', 'y'),
            Edge('x', 'y'),
        )
        return Graph(nodes, edges, 'y = x * (1 + (c + a) / 2)')

    def extra_repr(self) -> str:
        size = '' if self.feat_size is None else f', feat_size={self.feat_size}'
        return f"{self.current_channels() or self.channels}, '{self.genotype}'{size}"


class SASE(AttentionBlock):
    """The block that SASE's search found (arXiv 2411.08333): ``avg_max,mlp,affine,p_norm,avg,conv3x3_x2``.

    y = x * (1 + (c + a) / 2) for a channel attention c and a spatial attention a. In the paper, it is in every
    bottleneck of ResNet-50/101, after the third batch norm and before the shortcut is added. It fits timm's
    ``attn_layer=``. Shape: (B, C, H, W) -> (B, C, H, W).

    Args:
        channels: C, at least 1.
        feat_size: ignored; all blocks accept it.
        reduction: of ``mlp``, from 1 to C (to 16 for fewer channels).
        device, dtype: of the parameters.

    Raises:
        ValueError: bad channels or reduction; in ``forward`` another rank or number of channels.

    Examples:
        >>> SASE(64)(torch.randn(2, 64, 28, 28)).shape
        torch.Size([2, 64, 28, 28])
    """

    def __init__(
        self,
        channels: int,
        feat_size: int | tuple[int, int] | None = None,
        *,
        reduction: int = 16,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        genotype = replace(SASE_GENOTYPE, channel_excite=f'mlp(reduction={reduction!r})')
        super().__init__(channels, genotype, feat_size, device=device, dtype=dtype)

    def extra_repr(self) -> str:
        channels = self.current_channels() or self.channels
        return f'{channels}' if self.genotype == SASE_GENOTYPE else f'{channels}, {self.genotype.channel_excite!r}'
