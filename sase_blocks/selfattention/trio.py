"""TrioNet's block (arXiv 2111.07547): two 1x1 convolutions and, between them, one of three operators.

From the paper's abstract and figure, its only public parts: the 1x1 convolutions are the same for every operator
between them. Not in the paper: each operator ends in a batch norm, so that all three give the second 1x1 convolution
the same kind of signal (axial attention has its own inside); strides follow the operators' papers: a strided
convolution, but attention at full resolution followed by a 2 x 2 average pool.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sase_blocks.checks import check_channels, check_features
from sase_blocks.ops import BatchNorm2d

from .axial import AxialSelfAttention
from .local import LocalSelfAttention
from .routes import check_choice

__all__ = ['OPERATORS', 'TrioBlock', 'build_operator']

torch.fx.wrap('check_features')  # FX wraps a function in the module that calls it


def _conv(channels: int, stride: int, kernel_size: int | None, heads: int, size: Any, **kwargs: Any) -> nn.Module:
    k = 3 if kernel_size is None else kernel_size
    if k < 1 or k % 2 == 0:
        raise ValueError(f'a convolution needs an odd kernel_size of at least 1, got {k}')
    return nn.Conv2d(channels, channels, k, stride, k // 2, bias=False, **kwargs)


def _local(channels: int, stride: int, kernel_size: int | None, heads: int, size: Any, **kwargs: Any) -> nn.Module:
    return LocalSelfAttention(channels, heads, 7 if kernel_size is None else kernel_size, stride=stride, **kwargs)


def _axial(channels: int, stride: int, kernel_size: int | None, heads: int, size: Any, **kwargs: Any) -> nn.Module:
    if kernel_size is not None:
        raise ValueError(f'axial attention takes no window, got kernel_size={kernel_size}')
    return AxialSelfAttention(channels, heads, size, stride, **kwargs)


# Builder of each operator: (channels, stride, kernel_size or None, heads, size) -> a module without a norm after it.
OPERATORS: dict[str, Callable[..., nn.Module]] = {'conv': _conv, 'local': _local, 'axial': _axial}


def build_operator(
    operator: str,
    channels: int,
    stride: int = 1,
    kernel_size: int | None = None,
    heads: int = 8,
    size: int | tuple[int, int] = 56,
    **kwargs: Any,
) -> tuple[nn.Module, bool]:
    """One of TrioNet's operators, and whether it needs a batch norm after it.

    Shape of the module: (B, channels, H, W) -> (B, channels, H', W'), H' = ceil(H / stride).

    Args:
        operator: 'conv', 'local' or 'axial'.
        channels: input and output channels; for the attentions a multiple of 2 x heads.
        stride: 1 or 2.
        kernel_size: size of the convolution (default 3) or the local window (default 7); axial attention takes none.
        heads: number of heads of the attentions.
        size: (H, W) for axial attention's tables.
        **kwargs: ``device``, ``dtype``.

    Raises:
        ValueError: an unknown operator, channels that the heads do not divide, an even kernel_size.
    """
    check_choice('operator', operator, tuple(OPERATORS))
    return OPERATORS[operator](channels, stride, kernel_size, heads, size, **kwargs), operator != 'axial'


class TrioBlock(nn.Module):
    """1x1 convolution, one of the three operators, 1x1 convolution, and a shortcut around them.

    Shape: (B, channels, H, W) -> (B, out_channels, H', W'), H' = ceil(H / stride), any H and W from 1 on. Batch norm
    after each part, ReLU between them and at the end.

    Args:
        channels: C_in.
        operator: 'conv', 'local' or 'axial'.
        out_channels: C_out; default: ``channels``.
        width: channels of the operator; default: C_out / 4. For the attentions a multiple of 2 x heads.
        stride: 1 or 2.
        kernel_size: see ``build_operator``.
        heads: number of heads of the attentions.
        size: (H, W), or an int, the map size for axial attention's tables; other sizes work, too.
        act_layer: class of the activations.
        norm_layer: class of the norms.
        device, dtype: of the parameters.

    Raises:
        ValueError: channels below 1, or see ``build_operator``; in ``forward`` another rank or number of channels.
        TypeError: in ``forward``, a non-floating input.

    Examples:
        >>> TrioBlock(256, 'axial', size=28)(torch.randn(2, 256, 28, 28)).shape
        torch.Size([2, 256, 28, 28])
    """

    def __init__(
        self,
        channels: int,
        operator: str = 'conv',
        out_channels: int | None = None,
        width: int | None = None,
        stride: int = 1,
        kernel_size: int | None = None,
        heads: int = 8,
        size: int | tuple[int, int] = 56,
        *,
        act_layer: Callable[..., nn.Module] = nn.ReLU,
        norm_layer: Callable[..., nn.Module] = BatchNorm2d,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        self.channels = check_channels(channels, name)
        out = check_channels(channels if out_channels is None else out_channels, name)
        middle = check_channels(max(1, out // 4) if width is None else width, name)
        self.operator = operator
        self.conv1 = nn.Conv2d(channels, middle, 1, bias=False, **dd)
        self.norm1 = norm_layer(middle, **dd)
        self.act1 = act_layer(inplace=True)
        self.middle, needs_norm = build_operator(operator, middle, stride, kernel_size, heads, size, **dd)
        self.norm2 = norm_layer(middle, **dd) if needs_norm else nn.Identity()
        self.act2 = act_layer(inplace=True)
        self.conv3 = nn.Conv2d(middle, out, 1, bias=False, **dd)
        self.norm3 = norm_layer(out, **dd)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or out != channels:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False, **dd), norm_layer(out, **dd))
        self.act3 = act_layer(inplace=True)

    def zero_init_last(self) -> None:
        """Set the last norm's weight to zero; called by networks whose blocks start as the identity."""
        nn.init.zeros_(self.norm3.weight)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        check_features(x, self.channels)
        y = self.act1(self.norm1(self.conv1(x)))
        y = self.act2(self.norm2(self.middle(y)))
        y = self.norm3(self.conv3(y))
        return self.act3(y + self.shortcut(x))
