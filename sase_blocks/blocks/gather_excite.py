"""Gather-Excite (arXiv 1810.12348): a wide neighbourhood gates each position."""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sase_blocks.checks import check_reduction
from sase_blocks.ops import BatchNorm2d, Conv2d
from sase_blocks.ops.primitive import turn_positive_

from .base import AttentionModule
from .graph import MAP, Edge, Graph


def neighbourhood_matrix(size: int, extent: int, like: Tensor) -> Tensor:
    """Averages over 2e - 1 positions at every e-th, interpolated to the nearest, as a matrix (size, size).

    For export, this merges pooling and interpolation, because the size of the small map between them may be 1, and an
    exported network would be fixed to sizes where it is, or is not. It costs more traffic than the two steps.
    """
    i = torch.arange(size, device=like.device)[:, None]
    j = torch.arange(size, device=like.device)[None, :]
    centre = i * ((size - 1) // extent + 1) // size * extent
    window = ((j > centre - extent) & (j < centre + extent)).to(like.dtype)
    return window / window.sum(1, keepdim=True)


def is_exporting() -> bool:
    """Whether torch.export captures the graph; False before torch 2.7, which cannot tell."""
    return hasattr(torch.compiler, 'is_exporting') and torch.compiler.is_exporting()


class GatherExcite(AttentionModule):
    """Gather-Excite (arXiv 1810.12348, section 3): y = x * sigmoid(interpolate(excite(gather(x)))).

    Args:
        channels: C, at least 1.
        extent: e, a power of 2 from 2 on; gather gives one value per e x e positions. The global extent is not
            supported, because its parametric form needs a kernel of the size of the map.
        parameters: False: average pooling over (2e - 1) x (2e - 1) positions, GE-theta-minus. True: log2(e) depthwise
            3x3 convolutions of stride 2 with batch norm, ReLU between them, GE-theta.
        mlp: 1x1 convolutions C -> max(1, C // reduction) -> C with ReLU before the interpolation; with ``parameters``
            this is GE-theta-plus.
        reduction: of the MLP, from 1 to C (to 16 for fewer channels).
        feat_size: ignored; all blocks accept it.
        device, dtype: of the parameters.

    Raises:
        ValueError: bad channels or reduction, or extent not a power of 2; in ``forward`` another rank or number of
            channels.
    """

    per_channel: ClassVar[dict[str, int]] = {'gather': 0, 'excite.0': 1, 'excite.2': 0}

    def __init__(
        self,
        channels: int,
        feat_size: Any = None,
        *,
        extent: int = 8,
        parameters: bool = False,
        mlp: bool = False,
        reduction: int = 16,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(channels)
        if isinstance(extent, bool) or not isinstance(extent, int) or extent < 2 or extent & (extent - 1):
            raise ValueError(f'{type(self).__name__} needs extent to be a power of 2 from 2 on, got {extent!r}')
        kwargs: dict[str, Any] = {'device': device, 'dtype': dtype}
        self.extent = extent
        gather: list[nn.Module] = []
        for i in range(extent.bit_length() - 1 if parameters else 0):
            gather += [nn.ReLU()] if i else []
            gather += [Conv2d(channels, channels, 3, 2, 1, groups=channels, bias=False, **kwargs)]
            gather += [BatchNorm2d(channels, **kwargs)]
        self.parametric = parameters
        if not parameters:
            gather = [nn.AvgPool2d(2 * extent - 1, extent, extent - 1, count_include_pad=False)]
        self.gather = nn.Sequential(*gather)
        hidden = max(1, channels // check_reduction(reduction, channels, type(self).__name__))
        self.excite = (
            nn.Sequential(Conv2d(channels, hidden, 1, **kwargs), nn.ReLU(), Conv2d(hidden, channels, 1, **kwargs))
            if mlp
            else nn.Identity()
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for module in self.modules():
            if isinstance(module, (Conv2d, BatchNorm2d)):
                module.reset_parameters()
        if isinstance(self.excite, nn.Sequential):
            turn_positive_(self.excite[0].weight)  # type: ignore[arg-type]

    def gate(self, x: Tensor) -> Tensor:
        size = (x.shape[2], x.shape[3])
        if not torch.jit.is_scripting():  # noqa: SIM102 - TorchScript skips code only under such a line
            if not self.parametric and is_exporting():
                rows = neighbourhood_matrix(size[0], self.extent, x)
                columns = neighbourhood_matrix(size[1], self.extent, x)
                # The excitation acts on each position separately, so the order does not matter.
                return torch.sigmoid(self.excite(rows @ x @ columns.transpose(0, 1)))
        g = F.interpolate(self.excite(self.gather(x)), size=size, mode='nearest')
        return torch.sigmoid(g)

    def graph(self) -> Graph:
        small = f'C x H/{self.extent} x W/{self.extent}'
        with_mlp = isinstance(self.excite, nn.Sequential)
        gather = 'depthwise convs' if self.parametric else f'avg over {2 * self.extent - 1} x {2 * self.extent - 1}'
        nodes = {'x': MAP, 'g': small, 'a': MAP, 'y': MAP}
        edges = (
            Edge('x', 'g', gather),
            Edge('g', 'a', f'{"mlp, " if with_mlp else ""}nearest'),
            Edge('a', 'y'),
            Edge('x', 'y'),
        )
        return Graph(nodes, edges, f'y = x * sigmoid(nearest({"mlp(g)" if with_mlp else "g"})), g = gather(x)')

    def extra_repr(self) -> str:
        return f'{self.current_channels() or self.channels}, extent={self.extent}'
