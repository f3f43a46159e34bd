"""The supernet of TrioNet (arXiv 2111.07547): one set of weights for all networks of a space.

As in the paper's figure, a block's three operators share its two 1x1 convolutions, and each operator has its own
weights. All are as large as the space allows. A smaller network uses parts of them (``slicing.py``). Not in the paper:
the norms after the 1x1 convolutions are shared with them, and each operator has its own norm. Networks do not share
norm statistics, because each needs its own (``score.recalibrate``).

There are no elastic layers. A network of the space runs as an ordinary ``TrioNet`` whose parameters are replaced in
each forward by parts of the shared ones, so it costs no more than on its own, and ``extract`` gives the same bits.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from sase_blocks.models import Architecture, TrioNet
from sase_blocks.selfattention import TrioBlock, build_operator
from sase_blocks.selfattention.routes import check_choice

from .meta_device import meta_device
from .slicing import SHARINGS, operator_tensors, output_channels, prefix, take
from .space import TrioSpace


def _norm(channels: int) -> nn.Module:
    """Weight and bias of a batch norm, without statistics."""
    return nn.BatchNorm2d(channels, track_running_stats=False)


def _laid_out(tensor: Tensor) -> Tensor:
    """Give the tensor default strides: with others a convolution may use another kernel and give other bits."""
    tensor = tensor.contiguous()
    if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        return tensor.flatten().view(tensor.shape)  # contiguous in both formats, as 1x1 kernels are: either strides
    return tensor


class SharedBlock(nn.Module):
    """The weights of all blocks that may occupy one position."""

    def __init__(self, space: TrioSpace, stage: int, first: bool, channels: int, size: int) -> None:
        super().__init__()
        out = space.widths[stage - 1][-1]
        width = max(space.width(out, expansion) for expansion in space.expansions)
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.norm1 = _norm(width)
        self.operators, self.norms = nn.ModuleDict(), nn.ModuleDict()
        for name in space.stage_operators(stage):
            built, needs_norm = build_operator(name, width, 1, space.sizes(name)[-1], space.heads, size)
            self.operators[name] = built
            if needs_norm:
                self.norms[name] = _norm(width)
        self.conv3 = nn.Conv2d(width, out, 1, bias=False)
        self.norm3 = _norm(out)
        self.shortcut: nn.Module = nn.Identity()
        if first:  # later blocks have none; the first has one if the widths differ
            self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, bias=False), _norm(out))

    def tensors(self, block: TrioBlock, sharing: str) -> Iterator[tuple[str, Tensor]]:
        """The parameters of a block at this position by name, as parts of the shared ones."""
        width = block.conv1.out_channels
        middle: Any = block.middle
        operator = operator_tensors(self.operators[block.operator], middle, sharing)
        yield from ((f'middle.{name}', tensor) for name, tensor in operator.items())
        # The sharing decides which channels of the shared parts an attention's outputs go to.
        outputs: slice | Tensor = slice(width)
        if not isinstance(middle, nn.Conv2d):
            outputs = output_channels(width, middle.heads, sharing)
        if block.operator in self.norms:
            norm = self.norms[block.operator]
            yield 'norm2.weight', take(norm.weight, 0, outputs)  # type: ignore[arg-type]
            yield 'norm2.bias', take(norm.bias, 0, outputs)  # type: ignore[arg-type]
        yield 'conv3.weight', take(self.conv3.weight[: block.conv3.out_channels], 1, outputs)
        for name, parameter in block.named_parameters():
            if name.startswith(('conv1.', 'norm1.', 'norm3.', 'shortcut.')):
                yield name, prefix(self.get_parameter(name), parameter.shape)


class SuperNet(nn.Module):
    """All networks of a space, with shared weights.

    Args:
        sharing: 'heads' for Multi-head Sharing, or 'plain', see ``slicing.py``.
        drop_rate: dropout before the classifier of a network activated with ``dropout=True``.

    Raises:
        ValueError: an unknown sharing; in ``activate``, an architecture that is not in the space.

    Examples:
        >>> space = TrioSpace.parse('cifar')
        >>> supernet = SuperNet(space, num_classes=10)
        >>> genome = {name: values[0] for name, values in space.genes.items()}
        >>> supernet.activate(space.architecture(genome))(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self, space: TrioSpace, num_classes: int, in_chans: int = 3, sharing: str = 'heads', drop_rate: float = 0.0
    ) -> None:
        super().__init__()
        check_choice('sharing', sharing, SHARINGS)
        self.space, self.num_classes, self.in_chans = space, num_classes, in_chans
        self.sharing, self.drop_rate = sharing, drop_rate
        k = 7 if space.reduction == 4 else 3
        self.conv1 = nn.Conv2d(in_chans, space.stem, k, bias=False)
        self.bn1 = _norm(space.stem)
        channels, size = space.stem, -(-space.image_sizes[-1] // space.reduction)
        self.stages = nn.ModuleList()
        for stage, (depths, widths) in enumerate(zip(space.depths, space.widths, strict=True), start=1):
            blocks = nn.ModuleList()
            for number in range(depths[-1]):
                blocks.append(SharedBlock(space, stage, number == 0, channels, size))
                channels = widths[-1]
                size = -(-size // 2) if stage > 1 and number == 0 else size
            self.stages.append(blocks)
        self.fc = nn.Linear(channels, num_classes)
        # Blocks do not start as the identity: each step trains only some of the weights, so they would start slowly.
        # Attentions keep their own initialisation.
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')

    def tensors(self, network: TrioNet) -> dict[str, Tensor]:
        """The parameters of a network of the space by name, as views or, for packed projections, copies of the shared.

        Gradients reach the shared weights.
        """
        found: dict[str, Tensor] = {'conv1.weight': self.conv1.weight}
        found['bn1.weight'], found['bn1.bias'] = self.bn1.weight, self.bn1.bias  # type: ignore[assignment]
        for i, stage in enumerate(network.stages):
            shared: Any = self.stages[i]
            for j, block in enumerate(stage.children()):
                found |= {f'stages.{i}.{j}.{name}': t for name, t in shared[j].tensors(block, self.sharing)}
        found['fc.weight'] = self.fc.weight[:, : network.num_features]
        found['fc.bias'] = self.fc.bias
        return {name: _laid_out(tensor) for name, tensor in found.items()}

    def on_meta(self, architecture: Architecture, drop_rate: float = 0.0) -> TrioNet:
        """The network of an architecture on the meta device."""
        more: dict[str, Any] = {'drop_rate': drop_rate, 'dtype': self.conv1.weight.dtype}
        with meta_device() as meta:
            return TrioNet(architecture, self.num_classes, self.in_chans, device=meta, **more)

    def activate(self, architecture: Architecture, *, dropout: bool = False) -> 'SubNetwork':
        """The network of an architecture, with these weights."""
        self.space.check(architecture)
        return SubNetwork(self, architecture, dropout)


class SubNetwork(nn.Module):
    """One network of a supernet: its structure and its norms' statistics, without weights of its own.

    Shape: as ``TrioNet``. Each forward uses the supernet's present weights. To optimise or move parameters, use the
    supernet's, before activation.
    """

    def __init__(self, supernet: SuperNet, architecture: Architecture, dropout: bool = False) -> None:
        super().__init__()
        self.architecture = architecture
        self._supernet = [supernet]  # in a list: its parameters are not this module's
        # Its parameters are only shapes; the statistics get memory.
        self.network = supernet.on_meta(architecture, supernet.drop_rate if dropout else 0.0)
        device = supernet.conv1.weight.device
        for module in self.network.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = torch.empty_like(buffer, device=device)
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.reset_running_stats()
        self.train(supernet.training)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = functional_call(self.network, self._supernet[0].tensors(self.network), (x,))
        return y

    def extract(self) -> TrioNet:
        """An ordinary network with copies of its weights and statistics. In eval mode its outputs are the same bits."""
        supernet = self._supernet[0]
        network = supernet.on_meta(self.architecture)
        network.to_empty(device=supernet.conv1.weight.device)  # all of it is overwritten
        network.load_state_dict({**supernet.tensors(network), **dict(self.network.named_buffers())})
        return network.train(self.training)
