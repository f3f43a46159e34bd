"""Blocks whose gate is a stack of large depthwise convolutions: LKA (VAN, arXiv 2202.09741).

The gate has no sigmoid. VAN puts its module between two 1x1 convolutions in a residual branch, here it is alone.
Difference from the authors' code: torch's initialisation of the layers.
"""

from typing import Any, ClassVar

from torch import Tensor

from sase_blocks.checks import check_int
from sase_blocks.ops import Conv2d
from sase_blocks.ops.primitive import BOTH

from .base import AttentionModule
from .graph import MAP, Edge, Graph


def _depthwise(channels: int, size: tuple[int, int], dilation: int = 1, **kwargs: Any) -> Conv2d:
    """A depthwise convolution of an odd size that keeps the map's size."""
    padding = (dilation * (size[0] // 2), dilation * (size[1] // 2))
    return Conv2d(channels, channels, size, padding=padding, dilation=dilation, groups=channels, **kwargs)


class LargeKernelAttention(AttentionModule):
    """Large kernel attention, VAN (arXiv 2202.09741, eq. 1 and 2): y = x * conv1x1(dilated(depthwise(x))).

    A K x K convolution becomes a depthwise one of size 2d - 1, a depthwise one of size ceil(K / d) with dilation d, and
    a 1x1 convolution, all with biases.

    Args:
        channels: C, at least 1.
        kernel_size: K. ceil(K / d) must be odd.
        dilation: d.
        feat_size: ignored; all blocks accept it.
        device, dtype: of the parameters.

    Raises:
        ValueError: bad channels or options; in ``forward`` another rank or number of channels.
    """

    per_channel: ClassVar[dict[str, int]] = {'conv0': 0, 'conv_spatial': 0, 'conv1': BOTH}

    def __init__(
        self,
        channels: int,
        feat_size: Any = None,
        *,
        kernel_size: int = 21,
        dilation: int = 3,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(channels)
        name, kwargs = type(self).__name__, {'device': device, 'dtype': dtype}
        size = -(-check_int(kernel_size, 'kernel_size', name) // check_int(dilation, 'dilation', name))
        if size % 2 == 0:
            raise ValueError(
                f'{name} needs an odd ceil(kernel_size / dilation), which keeps the size of the map, got {size} from '
                f'kernel_size={kernel_size}, dilation={dilation}'
            )
        small = 2 * dilation - 1
        self.conv0 = _depthwise(channels, (small, small), **kwargs)
        self.conv_spatial = _depthwise(channels, (size, size), dilation, **kwargs)
        self.conv1 = Conv2d(channels, channels, 1, **kwargs)

    def current_channels(self) -> int:
        return self.conv1.weight.shape[0]

    def gate(self, x: Tensor) -> Tensor:
        return self.conv1(self.conv_spatial(self.conv0(x)))

    def graph(self) -> Graph:
        small, (large, _) = self.conv0.kernel_size[0], self.conv_spatial.kernel_size
        nodes = {'x': MAP, 'u': MAP, 'v': MAP, 'a': MAP, 'y': MAP}
        edges = (
            Edge('x', 'u', f'depthwise conv{small}x{small}'),
            Edge('u', 'v', f'depthwise conv{large}x{large}, dilation {self.conv_spatial.dilation[0]}'),
            Edge('v', 'a', 'conv1x1'),
            Edge('a', 'y'),
            Edge('x', 'y'),
        )
        return Graph(nodes, edges, 'y = x * conv1x1(dilated(depthwise(x)))')
