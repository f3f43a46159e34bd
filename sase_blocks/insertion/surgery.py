"""The surgery itself: how one attention module is put behind (or before) a module, and how it is taken out again.

No existing name changes, in the module tree or in the state dict, whichever of the four ways is used:

- a free slot (timm's ``block.se``) is filled;
- a plain ``nn.Sequential`` gets one more child, at its end;
- the block of torchvision's ResNets, which has nothing between its last norm and its addition, gets a forward that has;
- for anything else, the class of the module is swapped for a subclass whose forward calls the attention, too.

A subclass copies, pickles, scripts, traces, compiles and exports like the class it is made from; a forward hook would
not (TorchScript leaves it out, and a copied hook goes on calling the original's attention).
"""

# No `from __future__ import annotations`: TorchScript compiles the functions of this file.
from collections.abc import Callable
from functools import cache, update_wrapper
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sase_blocks.convert import INSERTED

CHILD = 'inserted_attention'  # the name of the new child; in a slot it is the slot's
SLOT, APPEND, BEFORE, AFTER, BASIC_BLOCK, BOTTLENECK = 'slot', 'append', 'before', 'after', 'basic_block', 'bottleneck'


class IdentityStart(nn.Module):
    """y = x + alpha (block(x) - x) with one alpha that starts at 0: exactly x, whatever the block.

    The first step of training moves alpha, from the second on the block's own parameters have a gradient. Shape:
    (B, C, H, W) -> (B, C, H, W).

    Args:
        block: any module that keeps the shape of its input. What it gives must be finite: 0 times infinity is not 0.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.alpha = nn.Parameter(torch.zeros(1))  # not 0-d: FSDP takes no scalars

    def zero_init_last(self) -> None:
        """timm's hook at the end of ``init_weights``, which re-draws every Conv2d: begin as at the insertion."""
        nn.init.zeros_(self.alpha)
        if not hasattr(self.block, 'zero_init_last') and hasattr(self.block, 'reset_parameters'):
            self.block.reset_parameters()  # type: ignore[operator]

    def forward(self, x: Tensor) -> Tensor:
        # lerp is one pass, and at weight 0 it is x to the bit. The casts are for autocast and mixed precision.
        return torch.lerp(x, self.block(x).to(x.dtype), self.alpha.to(x.dtype))


def _after(self: Any, x: Tensor) -> Tensor:
    return self.inserted_attention(self._plain_forward(x))


def _before(self: Any, x: Tensor) -> Tensor:
    return self._plain_forward(self.inserted_attention(x))


def _basic_block(self: Any, x: Tensor) -> Tensor:
    out = self.relu(self.bn1(self.conv1(x)))
    out = self.inserted_attention(self.bn2(self.conv2(out)))
    return self.relu(out + (x if self.downsample is None else self.downsample(x)))


def _bottleneck(self: Any, x: Tensor) -> Tensor:
    out = self.relu(self.bn1(self.conv1(x)))
    out = self.relu(self.bn2(self.conv2(out)))
    out = self.inserted_attention(self.bn3(self.conv3(out)))
    return self.relu(out + (x if self.downsample is None else self.downsample(x)))


FORWARDS: dict[str, Callable[..., Tensor]] = {
    AFTER: _after,
    BEFORE: _before,
    BASIC_BLOCK: _basic_block,
    BOTTLENECK: _bottleneck,
}


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module had before an attention was inserted, which is its class if none was."""
    return getattr(type(module), '_plain_class', type(module))


@cache  # one class for each plain class: TorchScript and compilers count classes
def _class_with_attention(plain: Any, how: str) -> type[nn.Module]:
    # The module's name stays: FX takes a class for a leaf, or not, by where it says that it comes from.
    body = {
        '__module__': plain.__module__,
        '__doc__': f'{plain.__name__} with an inserted attention.',
        '_plain_class': plain,
        '_how': how,
        '_plain_forward': _renamed(plain.forward, '_plain_forward'),
        'forward': FORWARDS[how],
        '__reduce_ex__': _reduce_ex,
    }
    return type(f'{plain.__name__}WithAttention', (plain,), body)


def _renamed(function: Any, name: str) -> Any:
    """The same function by another name: TorchScript compiles a method by the name of its function."""
    if not isinstance(function, FunctionType):
        return function
    copy = FunctionType(function.__code__, function.__globals__, name, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return update_wrapper(copy, function, assigned=('__module__', '__doc__', '__annotations__'))


def _reduce_ex(self: Any, protocol: Any) -> tuple[Any, ...]:
    """For pickle and copy, which would look for the class by its name: the plain class, and what was done to it."""
    reduced: Any = object.__reduce_ex__(self, max(2, int(protocol)))
    _, _, *state = reduced
    return (_rebuild, (type(self)._plain_class, type(self)._how), *state)


def _rebuild(plain: Any, how: str) -> nn.Module:
    cls = _class_with_attention(plain, how)
    return cls.__new__(cls)


def why_not(module: nn.Module) -> str | None:
    """Why the class of a module cannot be swapped, or None if it can."""
    cls = type(module)
    if isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        return 'it is a container that runs over its children in its own way; name a module inside it'
    own = (cls.__reduce_ex__, cls.__reduce__) != (object.__reduce_ex__, object.__reduce__)
    if own or hasattr(cls, '__deepcopy__') or cls.__new__ is not object.__new__:
        return 'it is made and copied in a way of its own (a traced, scripted or parametrised module)'
    if hasattr(module, CHILD):
        return f'it has an attribute {CHILD!r} of its own'
    return None


class Mark(NamedTuple):
    """What is written on the module that holds an inserted attention."""

    child: str
    block: str
    start: str


def mark_of(module: nn.Module) -> Mark | None:
    """The mark of a module that holds an inserted attention."""
    mark = module.__dict__.get(INSERTED)
    return None if mark is None else Mark(*mark)


def is_plain_sequential(module: nn.Module) -> bool:
    """Whether a module runs its children one after the other, and no more."""
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def attach(holder: nn.Module, how: str, attention: nn.Module, slot: str, block: str, start: str) -> None:
    """Put ``attention`` into ``holder``, in place. ``detach`` undoes it."""
    child = slot if how == SLOT else CHILD
    if how in FORWARDS:
        plain: Any = type(holder)
        holder.__class__ = _class_with_attention(plain, how)
    setattr(holder, child, attention)
    setattr(holder, INSERTED, (child, block, start))


def detach(holder: nn.Module) -> None:
    """Take an inserted attention out again; nothing of it stays."""
    mark = mark_of(holder)
    if mark is None:
        return
    delattr(holder, INSERTED)
    delattr(holder, mark.child)
    if plain_class(holder) is not type(holder):
        holder.__class__ = plain_class(holder)
    elif mark.child != CHILD:
        setattr(holder, mark.child, None)
