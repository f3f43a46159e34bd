"""Local self-attention layer: Stand-Alone Self-Attention (arXiv 1906.05909), with two position encodings.

The paper gives the formula and the projections. Not in the paper: the initialisation, and ``'position_sensitive'``,
which applies the relative terms of Axial-DeepLab (arXiv 2003.07853) to a window.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from sase_blocks.checks import check_channels
from sase_blocks.ops import Conv2d

from .local_routes import BORDERS, LOCAL_ROUTES, local_attention
from .routes import check_choice, check_heads, check_map, check_stride, halve

torch.fx.wrap('check_map')  # FX wraps a function in the module that calls it
torch.fx.wrap('halve')
torch.fx.wrap('local_attention')

POSITIONS = ('sasa', 'position_sensitive')


class LocalSelfAttention(nn.Module):
    """Each position attends to the ``kernel_size`` x ``kernel_size`` positions around it. No bias, no 1 / sqrt(d).

    Shape: (B, C, H, W) -> (B, C, H, W), any H and W from 1 on; with stride 2, (B, C, ceil(H / 2), ceil(W / 2)).

    Three full 1 x 1 convolutions give q, k and v. Channel ``c * heads + head`` belongs to that head: the first channels
    are the first of every head, so a narrower layer is a prefix. Memory grows with H x W, never with k * k * C
    (``local_attention``).

    Args:
        channels: C, a multiple of 2 x heads: each head uses half of its channels for rows and half for columns.
        heads: number of heads.
        kernel_size: k, odd.
        position: ``'sasa'``: a relative term on the query, as in the paper. ``'position_sensitive'``: terms on query,
            key and value. The heads share the tables, each (C / heads / 2, k), one for rows and one for columns.
        border: ``'zero'``: positions outside the map count, with k = v = 0, as in the paper; ``'mask'``: they do not.
        stride: 2 adds a 2 x 2 average pool after the attention at full resolution; a last odd row or column is
            averaged with itself, as the strided convolutions of a ResNet round up.
        route: forces one of ``LOCAL_ROUTES``; None lets ``local_attention`` choose, by device and other conditions.
        device, dtype: of the parameters.

    Raises:
        ValueError: a bad argument; in ``forward`` another rank or number of channels, an empty map.
        TypeError: in ``forward``, a non-floating input.

    Examples:
        >>> LocalSelfAttention(64, heads=8, kernel_size=7)(torch.randn(2, 64, 28, 28)).shape
        torch.Size([2, 64, 28, 28])
    """

    def __init__(
        self,
        channels: int,
        heads: int = 8,
        kernel_size: int = 7,
        position: str = 'sasa',
        border: str = 'zero',
        stride: int = 1,
        route: str | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        self.channels = check_channels(channels, name)
        self.heads = check_heads(channels, heads, 2, 'half of a head for rows, half for columns', name)
        if isinstance(kernel_size, bool) or not isinstance(kernel_size, int) or kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f'{name} needs an odd kernel_size of at least 1, got {kernel_size!r}')
        check_choice('position', position, POSITIONS)
        check_choice('border', border, BORDERS)
        if route is not None:
            check_choice('route', route, LOCAL_ROUTES)
        self.kernel_size, self.position, self.border, self.route = kernel_size, position, border, route
        self.stride = check_stride(stride, name)
        args: dict[str, Any] = {'device': device, 'dtype': dtype}
        self.query = Conv2d(channels, channels, 1, bias=False, **args)
        self.key = Conv2d(channels, channels, 1, bias=False, **args)
        self.value = Conv2d(channels, channels, 1, bias=False, **args)
        terms = 3 if position == 'position_sensitive' else 1
        self.relative = nn.Parameter(torch.empty(terms, 2, channels // heads // 2, kernel_size, **args))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the parameters: for an input of variance 1, each term of the logits and v have variance 1.

        The paper gives no initialisation. Without 1 / sqrt(d), equal variances for q and k would saturate the softmax
        from the start, so the query's weights include that factor.
        """
        d = self.channels // self.heads
        nn.init.normal_(self.query.weight, 0.0, 1 / math.sqrt(self.channels * d))
        nn.init.normal_(self.key.weight, 0.0, 1 / math.sqrt(self.channels))
        nn.init.normal_(self.value.weight, 0.0, 1 / math.sqrt(self.channels))
        nn.init.normal_(self.relative[:1], 0.0, 1.0)
        nn.init.normal_(self.relative[1:], 0.0, 1 / math.sqrt(d))

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """No weight decay for the table of relative positions, as in timm's Swin."""
        return {'relative'}

    def zero_init_last(self) -> None:
        """Reset this layer; timm's ResNets call this in their ``init_weights``."""
        self.reset_parameters()

    def multiply_adds(self, height: int, width: int) -> int:
        """Multiply-adds per image at full resolution: projections, attention products and relative terms."""
        positions, k = height * width, self.kernel_size
        products = 3 * self.channels + 2 * k * k + self.relative.shape[0] * k
        return positions * self.channels * products

    def forward(self, x: Tensor) -> Tensor:
        check_map(x, self.channels)
        # (B, C, H, W) as (B, heads, d, H, W), a view
        shape = (x.shape[0], self.channels // self.heads, self.heads, x.shape[2], x.shape[3])
        q = self.query(x).reshape(shape).transpose(1, 2)
        k = self.key(x).reshape(shape).transpose(1, 2)
        v = self.value(x).reshape(shape).transpose(1, 2)
        y = local_attention(q, k, v, self.relative, self.border, self.route)
        y = y.transpose(1, 2).reshape(x.shape[0], self.channels, x.shape[2], x.shape[3])
        if self.stride == 2:
            y = halve(y)
        return y

    def extra_repr(self) -> str:
        text = (
            f"{self.channels}, heads={self.heads}, kernel_size={self.kernel_size}, '{self.position}', '{self.border}'"
        )
        return text + (f', stride={self.stride}' if self.stride > 1 else '')
