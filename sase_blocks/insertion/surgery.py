"""The surgery itself: put an attention module after (or before) another module, and take it out again.

No existing name changes, in the module tree or in the state dict. There are three ways:

- fill a free slot (timm's ``block.se``);
- add a child to the end of a plain ``nn.Sequential``;
- in any other case, add a child and a forward hook (or a forward pre-hook) that calls it.

A hook runs whatever ``forward`` is: wrapped in checkpointing, replaced on the object, or in the class. The hooks are
functions of this file that find the attention in the module that calls them, so copies, pickles, TorchScript, FX,
compilers and exporters keep them. A hook is lost if its module is replaced. So a hook on torch's module registration
moves the attention if a norm or a layer replaces another one (``convert_sync_batchnorm``, frozen batch norms, layers
that fuse). ``check`` finds attention that is lost in other ways.
"""

# No `from __future__ import annotations`: TorchScript compiles the functions of this file.
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import FrozenBatchNormAct2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.utils.parametrize import is_parametrized
from torchvision.ops import FrozenBatchNorm2d

from sase_blocks.blocks import SequentialAttention
from sase_blocks.convert import INSERTED

from .layout import takes_alpha

CHILD = 'inserted_attention'  # the new child's name, except in a slot, which keeps its name
RECORD = '_inserted_attention_record'  # on the network passed to insert
SLOT, APPEND, BEFORE, AFTER = 'slot', 'append', 'before', 'after'
NORMS = (_BatchNorm, FrozenBatchNorm2d, FrozenBatchNormAct2d)
LAYERS = (_ConvNd, nn.Linear)
FUSED = 'torch.ao.nn.intrinsic'


class IdentityStart(nn.Module):
    """y = x + alpha (block(x) - x) with one alpha that starts at 0: exactly x for any block.

    A block of this library, y = x * gate, applies alpha in its gate, y = x * (1 + alpha (gate - 1)), which is the same
    without another pass over x. In a sequence such as cbam, each block does. Any other block costs one interpolation.

    The first training step updates alpha. From the second step on, the block's own parameters get gradients. Shape:
    (B, C, H, W) -> (B, C, H, W).

    Args:
        block: any module that keeps the shape of its input. Its outputs must be finite, because 0 * inf is NaN.
    """

    __constants__ = ('in_gate',)  # TorchScript compiles only one of the two calls

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.in_gate = takes_alpha(block)
        self.alpha = nn.Parameter(torch.zeros(1))  # not 0-d, because FSDP accepts no scalars

    def zero_init_last(self) -> None:
        """Restore the state of the insertion. timm calls this at the end of ``init_weights``."""
        nn.init.zeros_(self.alpha)
        if not hasattr(self.block, 'zero_init_last') and hasattr(self.block, 'reset_parameters'):
            self.block.reset_parameters()  # type: ignore[operator]

    def forward(self, x: Tensor) -> Tensor:
        if self.in_gate:
            return self.block(x, self.alpha)
        else:  # lerp is one pass, and at weight 0 it is bit-identical to x. The casts are for mixed precision.
            return torch.lerp(x, self.block(x).to(x.dtype), self.alpha.to(x.dtype))


def _run_after_first(holder: Any, result: Any) -> Any:
    if type(result) in (tuple, list):  # of several tensors, the first is the map
        return type(result)((holder.inserted_attention(result[0]), *result[1:]))
    return holder.inserted_attention(result)


# TorchScript requires these arguments and types of a hook.
def run_after(self: Any, input: tuple[Tensor], result: Tensor) -> Tensor:
    if torch.jit.is_scripting():
        return self.inserted_attention(result)
    else:  # TorchScript skips an else, but compiles code after an if
        return _run_after_first(self, result)


def run_before(self: Any, input: tuple[Tensor]) -> tuple[Tensor]:
    return (self.inserted_attention(input[0]), *input[1:])


@dataclass(eq=False)
class Mark:
    """Facts about an inserted attention, stored on it and in the network's record.

    Args:
        block, start: the arguments of ``insert``.
        how: one of the four ways of this file.
        path: the attention's name at the insertion.
        removed: whether it was removed on purpose.
    """

    block: str
    start: str
    how: str
    path: str
    removed: bool = False


def inserted_in(holder: nn.Module) -> tuple[str, Mark] | None:
    """The name and mark of a module's inserted attention; None if it has none."""
    for name, child in holder.named_children():
        if (mark := child.__dict__.get(INSERTED)) is not None:
            return name, mark
    return None


def has_inserted(model: nn.Module) -> bool:
    """Whether anything was inserted into a network, even if it is lost now."""
    return any(RECORD in module.__dict__ or INSERTED in module.__dict__ for module in model.modules())


def is_hooked(holder: nn.Module, how: str) -> bool:
    """Whether a module has the hook that ``how`` needs, if any."""
    hooks = {AFTER: holder._forward_hooks, BEFORE: holder._forward_pre_hooks}.get(how)
    return hooks is None or any(hook in (run_after, run_before) for hook in hooks.values())


def why_not(module: nn.Module) -> str | None:
    """Why a module cannot hold attention with hooks, or None if it can."""
    cls = type(module)
    if isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        return 'it is a container that runs its children in its own way; name a module inside it'
    own = (cls.__reduce_ex__, cls.__reduce__) != (object.__reduce_ex__, object.__reduce__)
    if (own or hasattr(cls, '__deepcopy__')) and not is_parametrized(module):
        return 'it is built and copied in its own way (a traced or scripted module)'
    if hasattr(module, CHILD):
        return f'it already has an attribute {CHILD!r}'
    return None


def is_plain_sequential(module: nn.Module) -> bool:
    """Whether a module only runs its children in sequence."""
    return isinstance(module, nn.Sequential) and type(module).forward in (
        nn.Sequential.forward,
        SequentialAttention.forward,
    )


def attach(holder: nn.Module, attention: nn.Module, mark: Mark, slot: str = '') -> None:
    """Put ``attention`` into ``holder``, in place. ``detach`` undoes it."""
    attention.__dict__[INSERTED] = mark
    setattr(holder, slot if mark.how == SLOT else CHILD, attention)
    _hook(holder, mark.how)


def detach(holder: nn.Module) -> None:
    """Remove an inserted attention without a trace."""
    found = inserted_in(holder)
    if found is None:
        return
    child, mark = found
    mark.removed = True
    del holder.get_submodule(child).__dict__[INSERTED]
    delattr(holder, child)
    if child != CHILD:
        setattr(holder, child, None)
    for hooks in (holder._forward_hooks, holder._forward_pre_hooks):
        for key in [key for key, hook in hooks.items() if hook in (run_after, run_before)]:
            del hooks[key]


def _hook(holder: nn.Module, how: str) -> None:
    if how in (AFTER, BEFORE) and not is_hooked(holder, how):
        if how == AFTER:  # before other hooks, so that they see the attention's output
            holder.register_forward_hook(run_after, prepend=True)
        else:
            holder.register_forward_pre_hook(run_before)


def hand_on(old: nn.Module, new: nn.Module) -> None:
    """Move the attention after (or before) a module that is being replaced to its successor."""
    holder = old
    while CHILD not in holder._modules and is_plain_sequential(holder) and len(holder._modules) > 0:
        holder = holder.get_submodule(list(holder._modules)[-1])  # after the last of a sequence is after the sequence
    attention: Any = holder._modules.get(CHILD)
    mark = None if attention is None else attention.__dict__.get(INSERTED)
    if mark is not None and (holder is old or mark.how != BEFORE) and CHILD not in new._modules:
        if mark.how == APPEND:
            mark.how = AFTER
        attach(new, attention, mark)


def _keep(parent: nn.Module, name: str, new: nn.Module | None) -> None:
    """torch calls this before every ``parent.name = new``.

    A copy of a module with the same children (``convert_sync_batchnorm``) also gets the hook. The attention moves to a
    norm that replaces a norm, to a layer that replaces the layers fused into it, and to the identity that replaces a
    folded norm. For any other module it is unknown whether it already contains the attention, like a scripted one.

    Raises:
        RuntimeError: ``torch.ao``'s ``fuse_modules`` is about to fold away a norm whose attention would then run after
            the activation, or not at all.
    """
    if new is None:
        return
    if name == CHILD:
        mark = new.__dict__.get(INSERTED)
        if mark is not None and type(parent) is not nn.Module:  # FX makes bare modules only for the names
            _hook(parent, mark.how)
        return
    old = parent.__dict__.get('_modules', {}).get(name)
    if old is None or old is new:
        return
    folded = isinstance(new, nn.Identity) and isinstance(old, NORMS)
    fused = folded and CHILD in old._modules and any(type(m).__module__.startswith(FUSED) for m in parent.children())
    if fused or (CHILD not in new._modules and (is_hooked(new, AFTER) or is_hooked(new, BEFORE))):
        raise RuntimeError(
            f'{name!r} would become a {type(new).__name__} without the attention inserted there, because fuse_modules '
            f'keeps hooks but not children. Call remove(model) before it, and insert after it'
        )
    if folded or isinstance(new, (*NORMS, *LAYERS)):
        hand_on(old, new)


register_module_module_registration_hook(_keep)
