"""The six-edge block of SASE (arXiv 2411.08333), for any genotype, and the block that the paper found.

::

    x ---- channel_squeeze -> q -- channel_excite -> c ----------------------------------+
    |                         +--- gate_excite ----> d                                   |
    |-- gated_squeeze(d * x) -+                                                          |
    |                         +- mix -> norm -> ReLU -> s -- spatial_excite -> a --------+
    |-- spatial_squeeze(x) ---+                                                          |
    +------------------------------------------------------------ y = x * (1 + (c + a) / 2)

What differs from the authors' code: y is written as one product, the p-norm takes the gate out of its sum, and the
2-to-1 convolution is two weights that start at 1/2. All of it is plain torch: a compiler takes it to three
dependent passes over x. The authors' state dicts map onto this module one to one (``convert.py``).
"""

from typing import Any

import torch
from torch import Tensor, nn

from sase_blocks.ops import CHANNEL_EXCITE, CHANNEL_SQUEEZE, SPATIAL_EXCITE, SPATIAL_SQUEEZE, BatchNorm2d
from sase_blocks.ops.primitive import check_channels, check_feat_size, check_features, mix

from .genotype import SASE_GENOTYPE, Genotype

torch.fx.wrap('check_features')


class AttentionBlock(nn.Module):
    """The SASE graph with the six operations of ``genotype``.

    Shape: (B, C, H, W) -> (B, C, H, W), any H and W; dtype and memory format are kept.

    Args:
        channels: C, at least 1.
        genotype: the six operations, or their text form.
        feat_size: (H, W) or an int, needed by genotypes with per-position parameters (spatial ``l2_norm`` and
            ``affine``), which are interpolated for any other size.
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
        super().__init__()
        g = Genotype.parse(genotype) if isinstance(genotype, str) else genotype
        if not isinstance(g, Genotype):
            raise TypeError(f'genotype must be a Genotype or its text form, got {genotype!r}')
        self.channels = check_channels(channels, type(self).__name__)
        self.genotype = g
        self.feat_size = None if feat_size is None else check_feat_size(feat_size, type(self).__name__)
        args: dict[str, Any] = {'feat_size': self.feat_size, 'device': device, 'dtype': dtype}
        self.channel_squeeze = CHANNEL_SQUEEZE[g.channel_squeeze](channels, **args)
        self.channel_excite = CHANNEL_EXCITE[g.channel_excite](channels, **args)
        self.gate_excite = CHANNEL_EXCITE[g.gate_excite](channels, **args)
        self.gated_squeeze = SPATIAL_SQUEEZE[g.gated_squeeze](channels, **args)
        self.spatial_squeeze = SPATIAL_SQUEEZE[g.spatial_squeeze](channels, **args)
        self.mix_weight = nn.Parameter(torch.full((2,), 0.5, device=device, dtype=dtype))
        self.norm = BatchNorm2d(1, device=device, dtype=dtype)
        self.spatial_excite = SPATIAL_EXCITE[g.spatial_excite](channels, **args)

    def reset_parameters(self) -> None:
        """Draw the parameters anew."""
        nn.init.constant_(self.mix_weight, 0.5)
        for child in self.children():
            child.reset_parameters()  # type: ignore[operator]

    def zero_init_last(self) -> None:
        """Called by timm's ResNets, last thing in their ``init_weights``, which re-draw every Conv2d of the network.

        The name is timm's; here it brings back the block's own initialisation.
        """
        self.reset_parameters()

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The channel attention c (B, C, 1, 1) and the spatial attention a (B, 1, H, W) for x (B, C, H, W)."""
        check_features(x, self.channels)
        q = self.channel_squeeze(x)
        c = self.channel_excite(q)
        d = self.gate_excite(q)
        s = self.norm(mix(self.gated_squeeze(x, d), self.spatial_squeeze(x), self.mix_weight))
        a = self.spatial_excite(torch.relu(s))
        return c, a

    def forward(self, x: Tensor) -> Tensor:
        c, a = self.gates(x)
        # Halved and shifted while they are small: the sum is the first thing of the size of x.
        return x * ((1 + c / 2) + a / 2).to(x.dtype)

    def extra_repr(self) -> str:
        size = '' if self.feat_size is None else f', feat_size={self.feat_size}'
        return f"{self.channels}, '{self.genotype}'{size}"


class SASE(AttentionBlock):
    """The block that the paper's search found: ``avg_max,mlp,affine,p_norm,avg,conv3x3_x2``.

    In the paper it stands in every bottleneck of ResNet-50/101, after the third batch norm and before the shortcut
    is added; it fits timm's ``attn_layer=``. Shape: (B, C, H, W) -> (B, C, H, W).

    >>> SASE(64)(torch.randn(2, 64, 28, 28)).shape
    torch.Size([2, 64, 28, 28])
    """

    def __init__(
        self,
        channels: int,
        feat_size: int | tuple[int, int] | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(channels, SASE_GENOTYPE, feat_size, device=device, dtype=dtype)

    def extra_repr(self) -> str:
        return f'{self.channels}'
