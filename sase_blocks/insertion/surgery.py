"""The surgery itself: how one attention module is put behind (or before) a module, and how it is taken out again.

No existing name changes, in the module tree or in the state dict, whichever of the three ways is used:

- a free slot (timm's ``block.se``) is filled;
- a plain ``nn.Sequential`` gets one more child, at its end;
- anything else gets a child, and a forward hook (or a forward pre-hook) that calls it.

A hook runs whatever ``forward`` is: wrapped in checkpointing, exchanged on the object, or in the class. The hooks are
functions of this file that find the attention in the module that they are called with, so that copies, pickles,
TorchScript, FX, compilers and exporters take them along. What a hook does not outlive is an exchange of its module: a
hook on torch's registration of modules hands the attention on, where a norm or a layer follows another one
(``convert_sync_batchnorm``, frozen batch norms, layers that fuse). What is lost in another way, ``check`` finds.
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

CHILD = 'inserted_attention'  # the name of the new child; in a slot it is the slot's
RECORD = '_inserted_attention_record'  # on the network that insert was called with
SLOT, APPEND, BEFORE, AFTER = 'slot', 'append', 'before', 'after'
NORMS = (_BatchNorm, FrozenBatchNorm2d, FrozenBatchNormAct2d)
LAYERS = (_ConvNd, nn.Linear)
FUSED = 'torch.ao.nn.intrinsic'


class IdentityStart(nn.Module):
    """y = x + alpha (block(x) - x) with one alpha that starts at 0: exactly x, whatever the block.

    A block of this library, y = x * gate, does it in its gate, y = x * (1 + alpha (gate - 1)), which is the same and no
    pass over x more; of a sequence of them, such as cbam, each does. Any other block costs one interpolation.

    The first step of training moves alpha, from the second on the block's own parameters have a gradient. Shape:
    (B, C, H, W) -> (B, C, H, W).

    Args:
        block: any module that keeps the shape of its input. What it gives must be finite: 0 times infinity is not 0.
    """

    __constants__ = ('in_gate',)  # of the two calls TorchScript compiles one

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.in_gate = takes_alpha(block)
        self.alpha = nn.Parameter(torch.zeros(1))  # not 0-d: FSDP takes no scalars

    def zero_init_last(self) -> None:
        """timm's hook at the end of ``init_weights``, which re-draws every Conv2d: begin as at the insertion."""
        nn.init.zeros_(self.alpha)
        if not hasattr(self.block, 'zero_init_last') and hasattr(self.block, 'reset_parameters'):
            self.block.reset_parameters()  # type: ignore[operator]

    def forward(self, x: Tensor) -> Tensor:
        if self.in_gate:
            return self.block(x, self.alpha)
        else:  # lerp is one pass, and at weight 0 it is x to the bit. The casts are for autocast and mixed precision.
            return torch.lerp(x, self.block(x).to(x.dtype), self.alpha.to(x.dtype))


def _run_after_first(holder: Any, result: Any) -> Any:
    if type(result) in (tuple, list):  # a block of several tensors: the first is the map
        return type(result)((holder.inserted_attention(result[0]), *result[1:]))
    return holder.inserted_attention(result)


# TorchScript takes hooks with these arguments and these types.
def run_after(self: Any, input: tuple[Tensor], result: Tensor) -> Tensor:
    if torch.jit.is_scripting():
        return self.inserted_attention(result)
    else:  # TorchScript leaves an else out, and compiles what follows an if
        return _run_after_first(self, result)


def run_before(self: Any, input: tuple[Tensor]) -> tuple[Tensor]:
    return (self.inserted_attention(input[0]), *input[1:])


@dataclass(eq=False)
class Mark:
    """What is known of an inserted attention; the attention has it, and so has the record of the network.

    Args:
        block, start: what ``insert`` was asked for.
        how: one of the four ways of this file.
        path: the name of the attention when it was inserted.
        removed: whether it was taken out again on purpose.
    """

    block: str
    start: str
    how: str
    path: str
    removed: bool = False


def inserted_in(holder: nn.Module) -> tuple[str, Mark] | None:
    """The name of the child that is an inserted attention, and its mark; None if a module holds none."""
    for name, child in holder.named_children():
        if (mark := child.__dict__.get(INSERTED)) is not None:
            return name, mark
    return None


def has_inserted(model: nn.Module) -> bool:
    """Whether something was inserted into a network, though it may be lost now."""
    return any(RECORD in module.__dict__ or INSERTED in module.__dict__ for module in model.modules())


def is_hooked(holder: nn.Module, how: str) -> bool:
    """Whether a module has the hook of ``how``, if one belongs to it."""
    hooks = {AFTER: holder._forward_hooks, BEFORE: holder._forward_pre_hooks}.get(how)
    return hooks is None or any(hook in (run_after, run_before) for hook in hooks.values())


def why_not(module: nn.Module) -> str | None:
    """Why a module cannot hold an attention behind its hooks, or None if it can."""
    cls = type(module)
    if isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        return 'it is a container that runs over its children in its own way; name a module inside it'
    own = (cls.__reduce_ex__, cls.__reduce__) != (object.__reduce_ex__, object.__reduce__)
    if (own or hasattr(cls, '__deepcopy__')) and not is_parametrized(module):
        return 'it is made and copied in a way of its own (a traced or scripted module)'
    if hasattr(module, CHILD):
        return f'it has an attribute {CHILD!r} of its own'
    return None


def is_plain_sequential(module: nn.Module) -> bool:
    """Whether a module runs its children one after the other, and no more."""
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
    """Take an inserted attention out again; nothing of it stays."""
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
        if how == AFTER:  # before other hooks, which thus see what the network goes on with
            holder.register_forward_hook(run_after, prepend=True)
        else:
            holder.register_forward_pre_hook(run_before)


def hand_on(old: nn.Module, new: nn.Module) -> None:
    """Put what was inserted behind (or before) a module that is to be replaced behind (or before) its successor."""
    holder = old
    while CHILD not in holder._modules and is_plain_sequential(holder) and len(holder._modules) > 0:
        holder = holder.get_submodule(list(holder._modules)[-1])  # behind the last of a sequence is behind the sequence
    attention: Any = holder._modules.get(CHILD)
    mark = None if attention is None else attention.__dict__.get(INSERTED)
    if mark is not None and (holder is old or mark.how != BEFORE) and CHILD not in new._modules:
        if mark.how == APPEND:
            mark.how = AFTER
        attach(new, attention, mark)


def _keep(parent: nn.Module, name: str, new: nn.Module | None) -> None:
    """Called by torch for every ``parent.name = new``, before it happens.

    A copy of a module that took over its children (``convert_sync_batchnorm``) gets the hook, too. A norm that follows
    a norm, a layer that follows what fused into it, and the identity that follows a folded norm get the attention. Of
    any other module nobody can tell whether the attention is in it already, as in one that was scripted.

    Raises:
        RuntimeError: ``torch.ao``'s ``fuse_modules`` is about to fold a norm away whose attention would then run
            behind the activation, or not at all.
    """
    if new is None:
        return
    if name == CHILD:
        mark = new.__dict__.get(INSERTED)
        if mark is not None and type(parent) is not nn.Module:  # FX makes bare modules, for the names alone
            _hook(parent, mark.how)
        return
    old = parent.__dict__.get('_modules', {}).get(name)
    if old is None or old is new:
        return
    folded = isinstance(new, nn.Identity) and isinstance(old, NORMS)
    fused = folded and CHILD in old._modules and any(type(m).__module__.startswith(FUSED) for m in parent.children())
    if fused or (CHILD not in new._modules and (is_hooked(new, AFTER) or is_hooked(new, BEFORE))):
        raise RuntimeError(
            f'{name!r} would become a {type(new).__name__} without the attention that was inserted there: fuse_modules '
            f'takes hooks along and no children. Call remove(model) before it, and insert after it'
        )
    if folded or isinstance(new, (*NORMS, *LAYERS)):
        hand_on(old, new)


register_module_module_registration_hook(_keep)
