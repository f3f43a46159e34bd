"""Fold a trained network's batch norms into the layers before them, and remove finished identity starts.

``fuse`` uses the network's FX graph. If FX cannot trace it (data-dependent control flow), ``fuse`` traces each child
instead, and so on down. It then skips only plain Sequentials, because a parent may run a part of them. A norm is folded
only if one graph contains it and all readers of its input.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

from timm.layers import BatchNormAct2d, Conv2dSame, FrozenBatchNormAct2d, SyncBatchNormAct
from timm.layers import Linear as TimmLinear
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torchvision.ops import FrozenBatchNorm2d

from sase_blocks.blocks import AttentionModule
from sase_blocks.checks import check_features
from sase_blocks.convert import INSERTED
from sase_blocks.insertion.checking import check_inserted
from sase_blocks.insertion.refusal import check_changeable
from sase_blocks.insertion.surgery import RECORD, IdentityStart, detach, hand_on, run_after
from sase_blocks.numerics import narrow
from sase_blocks.ops import BatchNorm2d, Conv2d, Linear

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
WITH_ACTIVATION = (BatchNormAct2d, SyncBatchNormAct, FrozenBatchNormAct2d)
# By exact class, because a subclass may use its weight or its result in other ways.
LAYERS: set[type[nn.Module]] = {
    nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED, nn.Linear, Conv2dSame, TimmLinear, Conv2d, Linear,
}  # fmt: skip
NORMS: set[type[nn.Module]] = {
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, BatchNorm2d, FrozenBatchNorm2d, *WITH_ACTIVATION,
}  # fmt: skip
ANY_NORM = (_BatchNorm, FrozenBatchNorm2d, FrozenBatchNormAct2d)


@dataclass(frozen=True)
class FuseReport:
    """The result of ``fuse``. Prints as a short table.

    Args:
        network: class of the model.
        folded: name of each folded batch norm, and of its new layer or block.
        left: name of each remaining batch norm, and the reason.
        alphas: name of each inserted attention whose alpha is 0 or 1, and its outcome.
    """

    network: str
    folded: tuple[tuple[str, str], ...]
    left: tuple[tuple[str, str], ...]
    alphas: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        lines = [f'{self.network}: {len(self.folded)} batch norms folded, {len(self.left)} left']
        told = (*self.alphas, *self.left)
        for reason in dict.fromkeys(reason for _, reason in told):
            names = [name for name, other in told if other == reason]
            more = f', ... ({len(names) - 3} more)' if len(names) > 3 else ''
            lines.append(f'  {reason}: {", ".join(names[:3])}{more}')
        return '\n'.join(lines)


def fuse(model: nn.Module) -> FuseReport:
    """Fold batch norms for inference, in place. The outputs stay equal up to rounding, and each saves a kernel.

    This folds batch norms (torch's, timm's with an activation, which stays, frozen ones, ours) directly after a
    convolution or a linear layer whose result nothing else reads, and the mixer of SASE's block
    (``AttentionModule.reparameterize``). The sums are in float64. A linear layer's result is assumed to be (B,
    features). An inserted block with alpha = 1 loses its alpha, one with alpha = 0 is removed, and any other alpha
    stays in the gate. A folded layer has a bias, and the norm's parameters are gone. So load checkpoints and insert
    attention before, and compile, quantise and export afterwards. A second call folds nothing.

    Args:
        model: the network, in eval mode.

    Raises:
        TypeError: not a module.
        ValueError: train mode, or a network that cannot be changed (compiled, scripted, quantised, lazy, on the meta
            device, wrapped in DDP or FSDP). The model is unchanged.
        RuntimeError: an inserted attention is lost or does not run (see ``check``). The model is unchanged.
    """
    check_changeable(model, 'fuse')
    norms = {name: module for name, module in model.named_modules() if isinstance(module, ANY_NORM)}
    busy = [name for name, module in {'': model, **norms}.items() if module.training]
    if busy:
        raise ValueError(
            f'{busy[0] or type(model).__name__} is in train mode, where batch norm uses batch statistics: call '
            f'model.eval() first'
        )
    check_inserted(model)
    alphas = _fold_alphas(model)
    norms = {name: module for name, module in model.named_modules() if isinstance(module, ANY_NORM)}
    for module in list(model.modules()):
        if isinstance(module, AttentionModule):
            module.reparameterize()
    still = set(model.modules())
    folded = [(name, name.rpartition('.')[0]) for name, norm in norms.items() if norm not in still]
    left = []
    calls = _Calls(model)
    places = [(parent, child, held) for parent in still for child, held in parent._modules.items()]
    for name, norm in norms.items():
        if norm not in still:
            continue
        layer, reason = calls.layer_of(norm)
        if layer is None:
            left.append((name, reason))
            continue
        _fold(layer, norm)
        rest = _without_norm(norm)
        for parent, child, held in places:
            if held is norm:
                setattr(parent, child, rest)
        folded.append((name, calls.paths[layer][0]))
    return FuseReport(type(model).__name__, tuple(folded), tuple(left), alphas)


def _fold_alphas(model: nn.Module) -> tuple[tuple[str, str], ...]:
    """Remove identity starts with alpha 0 or 1, except those with hooks, which may read anything."""
    found = [(name, m) for name, m in model.named_modules() if isinstance(m, IdentityStart) and m is not model]
    done = []
    for name, start in found:
        alpha = start.alpha.item()
        if alpha not in (0.0, 1.0) or start._forward_hooks or start._forward_pre_hooks:
            continue
        for parent in list(model.modules()):
            for child in [child for child, held in parent._modules.items() if held is start]:
                if alpha == 1:
                    start.block.__dict__.update({k: v for k, v in start.__dict__.items() if k == INSERTED})
                    setattr(parent, child, start.block)
                elif INSERTED in start.__dict__:
                    detach(parent)
                else:
                    setattr(parent, child, nn.Identity().train(start.training))
        done.append((name, f'alpha was {alpha:g}, {"now dropped" if alpha == 1 else "block removed"}'))
    for module in model.modules():
        if all(mark.removed for mark in module.__dict__.get(RECORD, ())):
            module.__dict__.pop(RECORD, None)
    return tuple(done)


def _fold(layer: Any, norm: Any) -> None:
    """Scale a layer's weight by a norm's scale, and set its bias to the rest."""
    weight = layer.weight
    tensors = (weight, layer.bias, norm.running_mean, norm.running_var, norm.weight, norm.bias)
    wide: list[Any] = [None if t is None else t.detach().double() for t in tensors]
    w, b, mean, var, scale, shift = wide
    w, b = fuse_conv_bn_weights(w, b, mean, var, norm.eps, scale, shift, isinstance(layer, TRANSPOSED))
    layer.weight = nn.Parameter(w.detach().to(weight.dtype), weight.requires_grad)
    layer.bias = nn.Parameter(b.detach().to(weight.dtype), weight.requires_grad)


def _without_norm(norm: nn.Module) -> nn.Module:
    """The replacement of a norm: its activation or an identity, with any attention inserted after the norm."""
    rest = getattr(norm, 'act', None) if isinstance(norm, WITH_ACTIVATION) else None
    rest = nn.Identity().train(norm.training) if rest is None else rest
    hand_on(norm, rest)
    return rest


class _Tracer(fx.Tracer):
    """Traces down to the layers and the norms, and records other modules that it kept whole."""

    def __init__(self) -> None:
        super().__init__()
        self.closed: list[nn.Module] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        leaf = type(m) in LAYERS or isinstance(m, ANY_NORM)
        leaf = leaf or super().is_leaf_module(m, module_qualified_name)
        if leaf:
            self.closed += m.children()
        return leaf


class _Calls:
    """The calls of layers and norms in a network's graphs, and the other facts needed to fold them."""

    def __init__(self, model: nn.Module) -> None:
        self.nodes: dict[nn.Module, list[fx.Node]] = {}
        self.module: dict[fx.Node, nn.Module] = {}
        self.read: set[nn.Module] = set()  # modules whose parameters are read without a call
        self.paths: dict[nn.Module, list[str]] = {}  # a shared module has several
        for path, module in model.named_modules(remove_duplicate=False):
            self.paths.setdefault(module, []).append(path)
        self.roots: dict[nn.Module, list[str]] = {}  # for each called module, the root paths of its graphs
        seen: set[nn.Module] = set()
        loose: set[nn.Module] = set()  # Sequentials whose parent has no graph and may run a part of them
        todo = [model]
        while todo:
            root = todo.pop()
            if root in seen or type(root) in LAYERS:
                continue
            seen.add(root)
            tracer = _Tracer()
            try:
                graph = None if isinstance(root, ANY_NORM) or root in loose else tracer.trace(root)
            except Exception:  # code may raise anything when it meets a proxy
                graph = None
            if graph is None:
                todo += root.children()
                loose |= {child for child in root.children() if type(child) is nn.Sequential}
            else:
                todo += tracer.closed
                for node in graph.nodes:
                    self._add(root, node)

    def _add(self, root: nn.Module, node: fx.Node) -> None:
        if node.op == 'call_module':
            module = root.get_submodule(str(node.target))
            self.module[node] = module
            self.nodes.setdefault(module, []).append(node)
            self.roots.setdefault(module, []).extend(self.paths[root])
        elif node.op == 'get_attr':
            self.read.add(root.get_submodule(str(node.target).rpartition('.')[0]))

    def layer_of(self, norm: Any) -> tuple[nn.Module | None, str]:
        """The layer to fold a norm into, or None and the reason."""
        if not _is_plain(norm, NORMS):
            return None, f'{type(norm).__name__} is not a plain batch norm'
        if norm.running_mean is None or norm.running_var is None:
            return None, 'it keeps no running statistics'
        calls = self.nodes.get(norm, [])
        if not calls:
            return None, 'it is in no FX graph: the code around it cannot be traced, or is not run'
        layers = {self._source(node) for node in calls}
        layer: Any = layers.pop()
        if layers or layer is None:
            return None, 'its input is not the result of one convolution or linear layer'
        path = self.paths[layer][0]
        if any(self._reader(node) not in calls for node in self.nodes[layer]):
            return None, f'the result of {path} has another reader'
        if {layer, norm} & self.read or not (self._inside(layer) and self._inside(norm)):
            return None, f'it or {path} is used in another place'
        width = layer.out_features if isinstance(layer, nn.Linear | Linear) else layer.out_channels
        if width != len(norm.running_mean):
            return None, f'{path} returns {width} values, but it normalises {len(norm.running_mean)}'
        if isinstance(layer, TRANSPOSED) and layer.groups > 1:
            return None, f'{path} is a transposed convolution with groups'
        if not _is_plain(layer, LAYERS) or type(layer.weight) is not nn.Parameter:
            return None, f'{path} has hooks, or a weight that is computed'
        return layer, ''

    def _inside(self, module: nn.Module) -> bool:
        """Whether every path of a module is inside a graph that contains its calls."""
        roots = self.roots[module]
        return all(any(r in ('', path) or path.startswith(f'{r}.') for r in roots) for path in self.paths[module])

    def _source(self, call: fx.Node) -> nn.Module | None:
        """The layer whose result a norm's call reads."""
        node = call.args[0] if len(call.args) == 1 and not call.kwargs else None
        while isinstance(node, fx.Node) and _passes_on(node):
            node = node.args[0]
        module = self.module.get(node) if isinstance(node, fx.Node) else None
        return module if type(module) in LAYERS else None

    def _reader(self, node: fx.Node) -> fx.Node | None:
        """The only reader of a result; None if there are several."""
        while True:
            readers = [user for user in node.users if user.target is not check_features]
            if len(readers) != 1:
                return None
            if not _passes_on(readers[0]) or readers[0].args[0] is not node:
                return readers[0]
            node = readers[0]


def _is_plain(module: nn.Module, classes: set[type[nn.Module]]) -> bool:
    """Whether a module has one of these classes and no hooks, which may change or read anything.

    Attention after a norm is allowed, because it moves to the norm's replacement.
    """
    after = [hook for hook in module._forward_hooks.values() if hook is not run_after or classes is LAYERS]
    return type(module) in classes and not after and not module._forward_pre_hooks


def _passes_on(node: fx.Node) -> bool:
    """Whether a node returns its first argument unchanged, or with more axes after the second."""
    if node.target is operator.getitem:
        index: Any = node.args[1]
        axes = isinstance(index, tuple) and index[:2] == (slice(None), slice(None))
        return axes and all(axis is None for axis in index[2:])
    return node.target is narrow
