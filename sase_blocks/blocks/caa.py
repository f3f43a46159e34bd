"""Context anchor attention, PKINet (arXiv 2403.06258): a gate for each element from a wide cross of its neighbourhood.

In PKINet it reads the input of a block of convolutions and gates their result. Here it gates what it reads. The
authors' class has batch norms and SiLUs by default. Their network turns these off, and the formula does not have them.
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sase_blocks.checks import check_kernel_size
from sase_blocks.ops import Conv2d
from sase_blocks.ops.primitive import BOTH

from .base import AttentionModule
from .graph import MAP, Edge, Graph


class ContextAnchorAttention(AttentionModule):
    """Context anchor attention, PKINet (arXiv 2403.06258, section 3.2): y = x * sigmoid(a).

    a is the result of five layers: the mean over 7 x 7 positions (those beyond the border count as 0), a 1x1
    convolution, depthwise convolutions of 1 x k and k x 1, and a 1x1 convolution, all with biases.

    Args:
        channels: C, at least 1.
        kernel_size: k, odd. The paper's network has 11 in the first block of a stage and 2 more in each further block.
        feat_size: ignored; all blocks accept it.
        device, dtype: of the parameters.

    Raises:
        ValueError: bad channels or kernel_size; in ``forward`` another rank or number of channels.
    """

    per_channel: ClassVar[dict[str, int]] = {'conv1': BOTH, 'conv_w': 0, 'conv_h': 0, 'conv2': BOTH}

    def __init__(
        self, channels: int, feat_size: Any = None, *, kernel_size: int = 11, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__(channels)
        kwargs: dict[str, Any] = {'device': device, 'dtype': dtype}
        k = check_kernel_size(kernel_size, type(self).__name__)
        self.conv1 = Conv2d(channels, channels, 1, **kwargs)
        self.conv_w = Conv2d(channels, channels, (1, k), padding=(0, k // 2), groups=channels, **kwargs)
        self.conv_h = Conv2d(channels, channels, (k, 1), padding=(k // 2, 0), groups=channels, **kwargs)
        self.conv2 = Conv2d(channels, channels, 1, **kwargs)

    def current_channels(self) -> int:
        return self.conv1.weight.shape[1]

    def gate(self, x: Tensor) -> Tensor:
        pooled = F.avg_pool2d(x, 7, 1, 3)
        return torch.sigmoid(self.conv2(self.conv_h(self.conv_w(self.conv1(pooled)))))

    def graph(self) -> Graph:
        k = self.conv_h.kernel_size[0]
        nodes = {'x': MAP, 'p': MAP, 's': MAP, 'a': MAP, 'y': MAP}
        edges = (
            Edge('x', 'p', 'avg over 7 x 7'),
            Edge('p', 's', f'conv1x1, depthwise 1 x {k}, {k} x 1'),
            Edge('s', 'a', 'conv1x1'),
            Edge('a', 'y'),
            Edge('x', 'y'),
        )
        return Graph(nodes, edges, 'y = x * sigmoid(conv1x1(strips(conv1x1(avg(x)))))')
