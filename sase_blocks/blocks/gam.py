"""Global attention mechanism, GAM (arXiv 2112.05561): CBAM's two gates without pooling, so each element has its own.

The authors published no code. The paper gives the layers, BAM's reduction, and a sigmoid after each part. Batch norms
and ReLUs are as in BAM (arXiv 1807.06514), and as in the code that goes round under this name. That code has no sigmoid
after the channel part. The paper's variant with grouped convolutions is not here. The convolutions are large, 98 C^2
/ r weights: 6.4 million for r = 16 and 1,024 channels.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor

from sase_blocks.checks import check_kernel_size, check_reduction
from sase_blocks.ops import BatchNorm2d, Conv2d

from .base import AttentionModule
from .graph import MAP, Edge, Graph


class GlobalAttention(AttentionModule):
    """Global attention mechanism, GAM (arXiv 2112.05561, eq. 1 and 2): y = z * sigmoid(s(z)), z = x * sigmoid(c(x)).

    c is an MLP on the channels of each position, C -> C // r -> C, with a ReLU between and biases. s is two
    convolutions of the same widths without biases, each with batch norm, and a ReLU between.

    Args:
        channels: C, at least 1.
        reduction: r, from 1 to C (to 16 for fewer channels).
        kernel_size: of the two convolutions, odd.
        feat_size: ignored; all blocks accept it.
        device, dtype: of the parameters.

    Raises:
        ValueError: bad channels, reduction or kernel_size; in ``forward`` another rank or number of channels.
    """

    per_channel: ClassVar[dict[str, int]] = {'fc1': 1, 'fc2': 0, 'conv1': 1, 'conv2': 0, 'norm2': 0}

    def __init__(
        self,
        channels: int,
        feat_size: Any = None,
        *,
        reduction: int = 16,
        kernel_size: int = 7,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(channels)
        name, kwargs = type(self).__name__, {'device': device, 'dtype': dtype}
        hidden = max(1, channels // check_reduction(reduction, channels, name))
        k = check_kernel_size(kernel_size, name)
        self.fc1 = Conv2d(channels, hidden, 1, **kwargs)
        self.fc2 = Conv2d(hidden, channels, 1, **kwargs)
        self.conv1 = Conv2d(channels, hidden, k, padding=k // 2, bias=False, **kwargs)
        self.norm1 = BatchNorm2d(hidden, **kwargs)
        self.conv2 = Conv2d(hidden, channels, k, padding=k // 2, bias=False, **kwargs)
        self.norm2 = BatchNorm2d(channels, **kwargs)

    def current_channels(self) -> int:
        return self.fc2.weight.shape[0]

    def gate(self, x: Tensor) -> Tensor:
        c = torch.sigmoid(self.fc2(torch.relu(self.fc1(x))))
        s = torch.relu(self.norm1(self.conv1(x * c)))
        return c * torch.sigmoid(self.norm2(self.conv2(s)))

    def graph(self) -> Graph:
        k = self.conv1.kernel_size[0]
        nodes = {'x': MAP, 'c': MAP, 'z': MAP, 's': MAP, 'y': MAP}
        edges = (
            Edge('x', 'c', 'mlp'),
            Edge('c', 'z', 'sigmoid'),
            Edge('x', 'z'),
            Edge('z', 's', f'conv{k}x{k}, norm, relu, conv{k}x{k}, norm'),
            Edge('s', 'y', 'sigmoid'),
            Edge('z', 'y'),
        )
        return Graph(nodes, edges, 'y = z * sigmoid(convs(z)), z = x * sigmoid(mlp(x))')
