"""The mixed block of the SASE search (arXiv 2411.08333): on each edge the softmax-weighted sum of its operations.

::

    q = mixed channel squeeze(x)       c, d = two mixed channel excitations(q)
    s = ReLU(norm(mix(mixed spatial squeeze(d * x), mixed spatial squeeze(x))))
    a = mixed spatial excitation(s)    y = x * (1 + (c + a) / 2)

The norm has no affine parameters during the search, as in the authors' code. With ``fair=False`` this is the authors'
mixture. Not in the paper: ``fair=True``. The outputs of squeezes differ by factors of 10,000 and one of the fourteen
excitations has no sigmoid, so in the authors' mixture scale decides. Fair mixing normalises each squeeze's output to
mean 0 and variance 1 over the batch (one number each, without affine parameters) and gives each excitation without a
sigmoid one. A found block has no such norms.

Two forms give the same result. 'plain' calls each operation and is the definition. In 'shared' the operations share
common work (``squeezes.py``, ``excitations.py``). Both work on contiguous maps. A channels_last map, which convolutions
prefer, is copied, and the result is copied back.
"""

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from sase_blocks.blocks import AttentionModule
from sase_blocks.blocks.graph import CHANNEL, MAP, SPATIAL, Edge, Graph
from sase_blocks.checks import check_feat_size, check_features
from sase_blocks.ops import resolve_primitive
from sase_blocks.ops.primitive import mix

from .excitations import excited
from .space import EDGES, SearchSpace
from .squeezes import SharedSqueezes
from .statistics import recomputed

FORMS = ('plain', 'shared')

# Called with the edge's number and the stack (operations, B, ...) that is mixed.
Observer = Callable[[int, Tensor], None]


class MixedBlock(AttentionModule):
    """All blocks of a space at once. Shape: (B, C, H, W) -> (B, C, H, W), any H and W.

    Args:
        channels: C, at least 1.
        space: the operations of each edge.
        feat_size: (H, W) or an int; required if the space has operations with per-position parameters.
        fair: normalise and gate the operations before mixing (see above). False is the authors' mixture.
        form: 'shared' or 'plain'.
        device, dtype: of the parameters.

    Attributes:
        probabilities: one tensor per edge with one weight per operation, set by ``SearchNetwork`` before each
            forward. None means equal weights.

    Raises:
        ValueError: bad channels, feat_size or form.
    """

    def __init__(
        self,
        channels: int,
        space: SearchSpace,
        feat_size: int | tuple[int, int] | None = None,
        *,
        fair: bool = True,
        form: str = 'shared',
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(channels)
        if form not in FORMS:
            raise ValueError(f'form must be one of {", ".join(FORMS)}, got {form!r}')
        self.space = space
        self.feat_size = None if feat_size is None else check_feat_size(feat_size, type(self).__name__)
        self.fair = fair
        self.form = form
        args: dict[str, Any] = {'feat_size': self.feat_size, 'device': device, 'dtype': dtype}
        for edge, names in space:
            operations = {name: resolve_primitive(self._set_of(edge), name)(channels, **args) for name in names}
            # torch allows no dots in the names of modules, but an option may be a float.
            self.add_module(edge, nn.ModuleDict({name.replace('.', '_'): op for name, op in operations.items()}))
        self.mix_weight = nn.Parameter(torch.full((2,), 0.5, device=device, dtype=dtype))
        self.norm = nn.BatchNorm2d(1, affine=False, device=device, dtype=dtype)
        # Each operation is one channel of the norm.
        self.scales = nn.ModuleDict(
            {
                edge: nn.BatchNorm2d(len(names), affine=False, device=device, dtype=dtype)
                for edge, names in space
                if fair and self._set_of(edge).endswith('squeeze')
            }
        )
        self.probabilities: tuple[Tensor, ...] | None = None
        self.observer: Observer | None = None

    @staticmethod
    def _set_of(edge: str) -> str:
        return {'gate_excite': 'channel_excite', 'gated_squeeze': 'spatial_squeeze'}.get(edge, edge)

    def operations(self, edge: int) -> list[Any]:
        """The modules of an edge, in the order of the space."""
        return list(getattr(self, EDGES[edge]).values())

    def reset_parameters(self) -> None:
        nn.init.constant_(self.mix_weight, 0.5)
        for edge in range(len(EDGES)):
            for operation in self.operations(edge):
                operation.reset_parameters()

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The channel attention c (B, C, 1, 1) and the spatial attention a (B, 1, H, W) for x (B, C, H, W)."""
        ops = [self.operations(edge) for edge in range(len(EDGES))]
        if self.form == 'shared':
            squeezes = SharedSqueezes(x)
            q = self._mixed(0, squeezes.channel(ops[0]))
            of_c, of_d = excited(q, ops[1], ops[2], fair=self.fair)
            c, d = self._mixed(1, of_c), self._mixed(2, of_d)
            of_gated, of_plain = squeezes.spatial(ops[3], d, ops[4])
        else:
            q = self._mixed(0, [op(x) for op in ops[0]])
            c, d = self._mixed(1, self._excited(q, ops[1])), self._mixed(2, self._excited(q, ops[2]))
            of_gated, of_plain = [op(x, d) for op in ops[3]], [op(x) for op in ops[4]]
        s = torch.relu(self.norm(mix(self._mixed(3, of_gated), self._mixed(4, of_plain), self.mix_weight)))
        of_s = excited(s, ops[5], fair=self.fair)[0] if self.form == 'shared' else self._excited(s, ops[5])
        return c, self._mixed(5, of_s)

    def _excited(self, q: Tensor, ops: Sequence[Any]) -> list[Tensor]:
        """The outputs of excitations, with fair mixing each after a sigmoid."""
        outputs = [op(q) for op in ops]
        if self.fair:
            outputs = [y if op.gated else torch.sigmoid(y) for op, y in zip(ops, outputs, strict=True)]
        return outputs

    def _mixed(self, edge: int, outputs: Sequence[Tensor]) -> Tensor:
        """The weighted sum of the outputs of an edge's operations."""
        normed = EDGES[edge] in self.scales
        if torch.compiler.is_compiling() and not normed and self.probabilities is not None:
            # A sum of products fuses with its inputs. A matrix product would need them as one stack.
            weights = self.probabilities[edge].unbind(0)
            return reduce(torch.add, [w.to(y.dtype) * y for w, y in zip(weights, outputs, strict=True)])
        stack = torch.stack(tuple(outputs))  # (operations, B, ...)
        if normed:
            batch = stack.transpose(0, 1)
            stack = self.scales[EDGES[edge]](batch.flatten(2).unsqueeze(3)).reshape(batch.shape).transpose(0, 1)
        if self.observer is not None:
            self.observer(edge, stack)
        if self.probabilities is None:
            return stack.mean(0)
        return torch.tensordot(self.probabilities[edge].to(stack.dtype), stack, 1)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]  # without the alpha of insert: it is searched
        if x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
            # Sums over positions, and products with them, take about twice as long in channels_last.
            return _laid_out(self._attended(_laid_out(x, torch.contiguous_format)), torch.channels_last)
        return self._attended(x)

    def _attended(self, x: Tensor) -> Tensor:
        if self.form == 'plain':
            return super().forward(x)
        check_features(x, self.channels)
        return recomputed(_times_gate, x, *self.gates(x))  # keeps x and the gates' small tensors

    def gate(self, x: Tensor) -> Tensor:
        return _gate(*self.gates(x))

    def graph(self) -> Graph:
        nodes = {'x': MAP, 'q': CHANNEL, 'c': CHANNEL, 'd': CHANNEL, 'd * x': MAP, 's': SPATIAL, 'a': SPATIAL, 'y': MAP}
        ends = ('x q', 'q c', 'q d', 'd d*x', 'x d*x', 'd*x s', 'x s', 's a', 'c y', 'a y', 'x y')
        edges = tuple(Edge(*(end.replace('*', ' * ') for end in pair.split())) for pair in ends)
        return Graph(nodes, edges, 'y = x * (1 + (c + a) / 2)')

    def extra_repr(self) -> str:
        return f"{self.channels}, '{self.space}', fair={self.fair}, form='{self.form}'"


def _gate(c: Tensor, a: Tensor) -> Tensor:
    """1 + (c + a) / 2, where only the last sum is as large as the map. -> (B, C, H, W)."""
    return (1 + c / 2) + a / 2


def _times_gate(x: Tensor, c: Tensor, a: Tensor) -> Tensor:
    return x * _gate(c, a).to(x.dtype)


@torch.compiler.disable  # a compiler's own copies, and the formats that it then chooses, are slower
def _laid_out(x: Tensor, memory_format: torch.memory_format) -> Tensor:
    return _LaidOut.apply(x, memory_format)


class _LaidOut(torch.autograd.Function):
    """A map (B, C, H, W) from contiguous to channels_last or back, and its gradient the other way.

    torch would pass the gradient on in its own format, and a batch norm's backward is slow if the two formats differ.
    """

    @staticmethod
    def forward(x: Tensor, memory_format: torch.memory_format) -> Tensor:
        return x.contiguous(memory_format=memory_format)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        back = {torch.contiguous_format: torch.channels_last, torch.channels_last: torch.contiguous_format}
        ctx.back = back[inputs[1]]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad.contiguous(memory_format=ctx.back), None
