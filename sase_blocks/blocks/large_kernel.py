"""Blocks whose gate is a stack of large depthwise convolutions: LKA, LSKA, MSCA and LSK.

VAN (arXiv 2202.09741) has LKA, arXiv 2309.01439 its separable form, SegNeXt (arXiv 2209.08575) MSCA, and LSKNet (arXiv
2303.09030) LSK.

The gates have no sigmoid. The papers' networks put them between two 1x1 convolutions in a residual branch, here they
are alone. Difference from the authors' code: torch's initialisation of the layers.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor

from sase_blocks.checks import check_int, check_kernel_size, check_reduction
from sase_blocks.ops import Conv2d
from sase_blocks.ops.primitive import BOTH

from .base import AttentionModule
from .graph import MAP, SPATIAL, Edge, Graph


def _depthwise(channels: int, size: tuple[int, int], dilation: int = 1, **kwargs: Any) -> Conv2d:
    """A depthwise convolution of an odd size that keeps the map's size."""
    padding = (dilation * (size[0] // 2), dilation * (size[1] // 2))
    return Conv2d(channels, channels, size, padding=padding, dilation=dilation, groups=channels, **kwargs)


def _dilated_size(name: str, formula: str, size: int, kernel_size: int, dilation: int) -> int:
    """The size of the dilated convolution, or a ValueError if it is even."""
    if size % 2 == 0:
        raise ValueError(
            f'{name} needs an odd {formula}, which keeps the size of the map, got {size} from '
            f'kernel_size={kernel_size}, dilation={dilation}'
        )
    return size


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
        kernel_size, dilation = check_int(kernel_size, 'kernel_size', name), check_int(dilation, 'dilation', name)
        size = _dilated_size(name, 'ceil(kernel_size / dilation)', -(-kernel_size // dilation), kernel_size, dilation)
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


class LargeSeparableKernelAttention(AttentionModule):
    """Large separable kernel attention, LSKA (arXiv 2309.01439, section 3): y = x * conv1x1(dilated(depthwise(x))).

    LKA with each depthwise convolution as a row and a column: 1 x n and n x 1 with n = 2d - 1, then with n = K // d and
    dilation d. All have biases. The authors' kernels are K = 7 and 11 with d = 2, and 23, 35, 41 and 53 with d = 3.

    Args:
        channels: C, at least 1.
        kernel_size: K, as the paper counts it: 23 reaches as far as 21 in ``LargeKernelAttention``. K // d must be odd.
        dilation: d.
        feat_size: ignored; all blocks accept it.
        device, dtype: of the parameters.

    Raises:
        ValueError: bad channels or options; in ``forward`` another rank or number of channels.
    """

    per_channel: ClassVar[dict[str, int]] = {
        'conv0h': 0,
        'conv0v': 0,
        'conv_spatial_h': 0,
        'conv_spatial_v': 0,
        'conv1': BOTH,
    }

    def __init__(
        self,
        channels: int,
        feat_size: Any = None,
        *,
        kernel_size: int = 23,
        dilation: int = 3,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(channels)
        name, kwargs = type(self).__name__, {'device': device, 'dtype': dtype}
        kernel_size, dilation = check_int(kernel_size, 'kernel_size', name), check_int(dilation, 'dilation', name)
        size = _dilated_size(name, 'kernel_size // dilation', kernel_size // dilation, kernel_size, dilation)
        small = 2 * dilation - 1
        self.conv0h = _depthwise(channels, (1, small), **kwargs)
        self.conv0v = _depthwise(channels, (small, 1), **kwargs)
        self.conv_spatial_h = _depthwise(channels, (1, size), dilation, **kwargs)
        self.conv_spatial_v = _depthwise(channels, (size, 1), dilation, **kwargs)
        self.conv1 = Conv2d(channels, channels, 1, **kwargs)

    def current_channels(self) -> int:
        return self.conv1.weight.shape[0]

    def gate(self, x: Tensor) -> Tensor:
        return self.conv1(self.conv_spatial_v(self.conv_spatial_h(self.conv0v(self.conv0h(x)))))

    def graph(self) -> Graph:
        small, large = self.conv0h.kernel_size[1], self.conv_spatial_h.kernel_size[1]
        nodes = {'x': MAP, 'u': MAP, 'v': MAP, 'a': MAP, 'y': MAP}
        edges = (
            Edge('x', 'u', f'depthwise conv1x{small}, conv{small}x1'),
            Edge('u', 'v', f'depthwise conv1x{large}, conv{large}x1, dilation {self.conv_spatial_h.dilation[0]}'),
            Edge('v', 'a', 'conv1x1'),
            Edge('a', 'y'),
            Edge('x', 'y'),
        )
        return Graph(nodes, edges, 'y = x * conv1x1(dilated(depthwise(x))), separable')


class MultiScaleConvAttention(AttentionModule):
    """Multi-scale convolutional attention, SegNeXt (arXiv 2209.08575, eq. 1 and 2): y = x * conv1x1(sum of u_i).

    u_0 is a depthwise 5x5 convolution of x. u_1 to u_3 are depthwise convolutions of u_0 as rows and columns, 1 x k and
    k x 1 with k = 7, 11 and 21. All have biases.

    Args:
        channels: C, at least 1.
        feat_size: ignored; all blocks accept it.
        device, dtype: of the parameters.

    Raises:
        ValueError: bad channels; in ``forward`` another rank or number of channels.
    """

    per_channel: ClassVar[dict[str, int]] = {
        'conv0': 0,
        'conv0_1': 0,
        'conv0_2': 0,
        'conv1_1': 0,
        'conv1_2': 0,
        'conv2_1': 0,
        'conv2_2': 0,
        'conv3': BOTH,
    }

    def __init__(self, channels: int, feat_size: Any = None, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__(channels)
        kwargs: dict[str, Any] = {'device': device, 'dtype': dtype}
        self.conv0 = _depthwise(channels, (5, 5), **kwargs)
        self.conv0_1 = _depthwise(channels, (1, 7), **kwargs)
        self.conv0_2 = _depthwise(channels, (7, 1), **kwargs)
        self.conv1_1 = _depthwise(channels, (1, 11), **kwargs)
        self.conv1_2 = _depthwise(channels, (11, 1), **kwargs)
        self.conv2_1 = _depthwise(channels, (1, 21), **kwargs)
        self.conv2_2 = _depthwise(channels, (21, 1), **kwargs)
        self.conv3 = Conv2d(channels, channels, 1, **kwargs)

    def current_channels(self) -> int:
        return self.conv3.weight.shape[0]

    def gate(self, x: Tensor) -> Tensor:
        u = self.conv0(x)
        scales = self.conv0_2(self.conv0_1(u)) + self.conv1_2(self.conv1_1(u)) + self.conv2_2(self.conv2_1(u))
        return self.conv3(u + scales)

    def graph(self) -> Graph:
        scales = {f'u{i}': size for i, size in ((1, 7), (2, 11), (3, 21))}
        nodes = {'x': MAP, 'u0': MAP, **dict.fromkeys(scales, MAP), 'a': MAP, 'y': MAP}
        edges = [Edge('x', 'u0', 'depthwise conv5x5'), Edge('u0', 'a', 'conv1x1 of the sum')]
        for u, size in scales.items():
            edges += [Edge('u0', u, f'depthwise conv1x{size}, conv{size}x1'), Edge(u, 'a')]
        return Graph(nodes, (*edges, Edge('a', 'y'), Edge('x', 'y')), 'y = x * conv1x1(u0 + u1 + u2 + u3)')


class LargeSelectiveKernel(AttentionModule):
    """Large selective kernel, LSKNet (arXiv 2303.09030, sections 3.2 and 3.3): y = x * conv1x1(s_1 u_1 + s_2 u_2).

    u_1 and u_2 are 1x1 convolutions, to C // reduction channels, of the two depthwise steps of ``LargeKernelAttention``
    (5x5, then 7x7 with dilation 3). For each position, s_1 and s_2 are a sigmoid of a convolution of the mean and
    maximum over the channels of both. All have biases.

    Args:
        channels: C, at least 1.
        reduction: from 1 to C (to 16 for fewer channels).
        kernel_size: of the convolution that selects, odd.
        feat_size: ignored; all blocks accept it.
        device, dtype: of the parameters.

    Raises:
        ValueError: bad channels or options; in ``forward`` another rank or number of channels.
    """

    per_channel: ClassVar[dict[str, int]] = {'conv0': 0, 'conv_spatial': 0, 'conv1': 1, 'conv2': 1, 'conv': 0}

    def __init__(
        self,
        channels: int,
        feat_size: Any = None,
        *,
        reduction: int = 2,
        kernel_size: int = 7,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(channels)
        name, kwargs = type(self).__name__, {'device': device, 'dtype': dtype}
        hidden = max(1, channels // check_reduction(reduction, channels, name))
        k = check_kernel_size(kernel_size, name)
        self.conv0 = _depthwise(channels, (5, 5), **kwargs)
        self.conv_spatial = _depthwise(channels, (7, 7), 3, **kwargs)
        self.conv1 = Conv2d(channels, hidden, 1, **kwargs)
        self.conv2 = Conv2d(channels, hidden, 1, **kwargs)
        self.conv_squeeze = Conv2d(2, 2, k, padding=k // 2, **kwargs)
        self.conv = Conv2d(hidden, channels, 1, **kwargs)

    def current_channels(self) -> int:
        return self.conv.weight.shape[0]

    def gate(self, x: Tensor) -> Tensor:
        small = self.conv0(x)
        u1, u2 = self.conv1(small), self.conv2(self.conv_spatial(small))
        both = torch.cat([u1, u2], 1)
        s = torch.cat([both.mean(1, keepdim=True), both.amax(1, keepdim=True)], 1)
        s = torch.sigmoid(self.conv_squeeze(s))
        return self.conv(u1 * s[:, :1] + u2 * s[:, 1:])

    def graph(self) -> Graph:
        half, k = 'C/r x H x W', self.conv_squeeze.kernel_size[0]
        nodes = {'x': MAP, 'u': MAP, 'u1': half, 'u2': half, 's1, s2': SPATIAL, 'a': MAP, 'y': MAP}
        edges = (
            Edge('x', 'u', 'depthwise conv5x5'),
            Edge('u', 'u1', 'conv1x1'),
            Edge('u', 'u2', 'depthwise conv7x7, dilation 3, conv1x1'),
            Edge('u1', 's1, s2', f'mean and max, conv{k}x{k}, sigmoid'),
            Edge('u2', 's1, s2'),
            Edge('u1', 'a'),
            Edge('u2', 'a'),
            Edge('s1, s2', 'a', 'weighted sum, conv1x1'),
            Edge('a', 'y'),
            Edge('x', 'y'),
        )
        return Graph(nodes, edges, 'y = x * conv1x1(s1 * u1 + s2 * u2), s = sigmoid(conv(mean(u), max(u)))')
