"""Find the modules of a network that get attention, from ``where=`` and ``stages=``, each once."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from sase_blocks.convert import INSERTED
from sase_blocks.models.slots import check_stages

from .families import Family, family_of, numbered_blocks
from .repeated import known_maps, repeated_blocks
from .surgery import AFTER, APPEND, CHILD, SLOT, inserted_in, is_plain_sequential, why_not
from .survey import Survey

Where = str | Callable[[str, nn.Module], Any] | None


@dataclass
class Place:
    """A module that gets, or already has, an attention."""

    name: str  # of the holder, as in named_modules()
    holder: nn.Module
    how: str
    probe: nn.Module  # its output has the attention's shape
    channels: int | None  # if known without a forward
    slot: str = ''

    @property
    def path(self) -> str:
        """The attention's own name."""
        child = self.slot if self.how == SLOT else CHILD
        return f'{self.name}.{child}' if self.name else child


def find_places(model: nn.Module, where: Where, stages: Any, survey: Survey) -> tuple[list[Place], bool, list[str]]:
    """The chosen places in network order (at least one), whether our rule found them, and the blocks that it left out.

    Raises:
        TypeError: ``where`` is not a pattern, function or None.
        ValueError: an unknown network without ``where``, a pattern that matches nothing or nested modules, missing or
            unknown stages, or a module that cannot hold attention.
    """
    blocks = {name: (block, family, stage) for name, block, family, stage in numbered_blocks(model)}
    by_rule = False
    unread: list[str] = []
    if where is None:
        named = [(name, block) for name, (block, family, _) in blocks.items() if family.site(block) is not None]
        if not named:
            by_rule, (named, unread) = True, repeated_blocks(model, survey)
        if not named:
            raise ValueError(_no_place(model, survey))
    else:
        named = _matches(model, where)
    if stages is not None:
        named = _of_stages(model, where, stages, named, blocks)

    places: dict[int, Place] = {}
    for name, module in named:
        place = _place(model, name, module)
        first = places.setdefault(id(place.holder), place)
        if None not in (first.channels, place.channels) and first.channels != place.channels:
            raise ValueError(
                f'{first.name!r} and {place.name!r} are one shared module with {first.channels} and {place.channels} '
                f'channels, which one attention cannot follow; choose other places with where='
            )
    return list(places.values()), by_rule, unread


def _no_place(model: nn.Module, survey: Survey) -> str:
    """Why ``where=None`` finds nothing, and what to pass instead."""
    start = f'no block of this {type(model).__name__} is in the table of known ones, '
    name_them = "name the modules that attention should follow, where='layer*.norm' or where=lambda name, module: ..."
    if survey.trace is None:
        return f'{start}and a forward could not find any: {survey.why}; or {name_them}'
    maps = known_maps(model, survey)
    if not maps:
        return f'{start}and no module in it returns a feature map, (B, C, H, W), (B, H, W, C) or its tokens (B, N, C)'
    listed = '; '.join(f'{what} by where={where}' for what, where in maps[:4])
    return f'{start}and none is repeated: {name_them}; there are {listed}'


def _matches(model: nn.Module, where: Where) -> list[tuple[str, nn.Module]]:
    if not isinstance(where, str) and not callable(where):
        raise TypeError(
            f'where must be a pattern over module names, a function (name, module) -> bool or None, got {where!r}'
        )
    modules = [(n, m) for n, m in model.named_modules(remove_duplicate=False) if not _inside_inserted(model, n)]
    names = [name for name, _ in modules if name]
    if not isinstance(where, str):
        found = [(name, module) for name, module in modules if where(name, module)]
        if not found:
            raise ValueError(f'where={where!r} is true for no module; there are {_some(names)}')
        return found
    found = [(name, module) for name, module in modules if name and fnmatchcase(name, where)]
    if not found:
        literal = where.replace('*', '').replace('?', '')
        near = difflib.get_close_matches(where, names, n=3, cutoff=0.5) or [n for n in names if literal.strip('.') in n]
        near = near or difflib.get_close_matches(literal, names, n=3, cutoff=0.3)
        raise ValueError(
            f'where={where!r} matches no module; '
            + (f'near are {_some(near)}' if near else f'there are {_some(names)}')
        )
    # 'layer3.*' means the blocks of layer3, not their insides, although a * also matches dots.
    outer = [name for name, module in found if (family := family_of(module)) and family.site(module)]
    found = [(name, module) for name, module in found if not any(name.startswith(f'{o}.') for o in outer)]
    for name, _ in found:
        inner = [other for other, _ in found if other.startswith(f'{name}.')]
        if inner:
            raise ValueError(
                f'where={where!r} matches {name!r} and modules inside it ({_some(inner, 3)}): match one level, or pass '
                f'a function (name, module) -> bool'
            )
    return found


def _inside_inserted(model: nn.Module, name: str) -> bool:
    parts = name.split('.')
    for depth in range(len(parts)):
        found = inserted_in(model.get_submodule('.'.join(parts[:depth])))
        if found is not None and parts[depth] == found[0]:
            return True
    return False


def _of_stages(
    model: nn.Module,
    where: Where,
    stages: Any,
    named: list[tuple[str, nn.Module]],
    blocks: dict[str, tuple[nn.Module, Family, int | None]],
) -> list[tuple[str, nn.Module]]:
    known = {name: stage for name, (_, _, stage) in blocks.items() if stage is not None}
    if not known:
        raise ValueError(
            f'the stages of this {type(model).__name__} are not known: choose its modules with where= only'
        )
    chosen = check_stages(stages, max(known.values()), 'stages')
    kept = []
    for name, module in named:
        stage = next((known[a] for a in _ancestors(name) if a in known), None)
        if stage is None:
            raise ValueError(f'{name!r} is in no known stage: leave out stages=, or do not match it')
        if stage in chosen:
            kept.append((name, module))
    if not kept:
        what = 'residual branch' if where is None else f'module that where={where!r} matches'
        raise ValueError(f'no {what} is in stages={stages!r} of this {type(model).__name__}')
    return kept


def _ancestors(name: str) -> Iterator[str]:
    """The name itself and those of the modules around it, from the inside out."""
    while name:
        yield name
        name = name.rpartition('.')[0]
    yield ''


def _place(model: nn.Module, name: str, module: nn.Module) -> Place:
    for around in list(_ancestors(name))[1:]:
        block = model.get_submodule(around)
        family = family_of(block)
        if family and family.norm and name == f'{around}.{family.norm}'.lstrip('.') and family.site(block):
            return _place(model, around, block)
    family = family_of(module)
    site = None if family is None else family.site(module)
    if family is None or site is None:
        return _behind(name, module, module, _channels_in_front(model, name, module))
    try:
        channels = family.channels(module)
    except AttributeError:  # someone replaced the layer, so a forward must find them
        channels = None
    at, how = site
    path = f'{name}.{at}' if name and at else name or at
    if how != SLOT:
        holder = module.get_submodule(at)
        if how == AFTER:
            return _behind(path, holder, holder, channels)
        return _checked(Place(path, holder, how, module, channels))
    inside = getattr(module, at)
    if inside is None or INSERTED in inside.__dict__:
        return Place(name, module, SLOT, module, channels, slot=at)
    # If the slot has another attention, as in an SE-ResNet, ours follows it.
    return _behind(path, inside, module, channels)


def _behind(name: str, holder: nn.Module, probe: nn.Module, channels: int | None) -> Place:
    if is_plain_sequential(holder) and hasattr(holder, 'fuse') and len(holder._modules) > 0:
        # The fuse() of timm's ConvNorm needs exactly two children, so put it after the last one.
        last = list(holder._modules)[-1]
        return _behind(f'{name}.{last}', holder.get_submodule(last), holder.get_submodule(last), channels)
    how = APPEND if is_plain_sequential(holder) else AFTER
    return _checked(Place(name, holder, how, probe, channels))


def _checked(place: Place) -> Place:
    if inserted_in(place.holder) is None:
        taken = place.how == APPEND and hasattr(place.holder, CHILD)
        reason = f'it already has an attribute {CHILD!r}' if taken else None
        reason = why_not(place.holder) if place.how not in (APPEND, SLOT) else reason
        if reason:
            kind = type(place.holder).__name__
            raise ValueError(f'{place.name!r} ({kind}) cannot hold attention: {reason}')
    return place


def _channels_in_front(model: nn.Module, name: str, module: nn.Module) -> int | None:
    """A module's output channels, from itself or from those before it in a Sequential; None if unknown."""
    parent_name, _, child = name.rpartition('.')
    parent = model.get_submodule(parent_name)
    in_front: list[Any] = [module]
    if name and is_plain_sequential(parent):
        names = list(parent._modules)
        in_front = list(parent._modules.values())[: names.index(child) + 1]
    return _channels_of(in_front)


def _channels_of(modules: list[nn.Module]) -> int | None:
    module: Any
    for module in reversed(modules):
        family = family_of(module)
        if family is not None:
            return family.channels(module)
        if is_plain_sequential(module) and len(module) > 0:
            found = _channels_of(list(module.children()))
        else:
            names = ('out_channels', 'num_features', 'num_channels')
            found = next((n for n in (getattr(module, a, None) for a in names) if isinstance(n, int)), None)
        if found is not None:
            return found
        # Looks only through modules that certainly keep the channels.
        keeps = type(module).__module__.rpartition('.')[2] in ('activation', 'dropout', 'pooling', 'drop')
        if not keeps and not isinstance(module, nn.Identity):
            return None
    return None


def _some(names: list[str], count: int = 8) -> str:
    return ', '.join(map(repr, names[:count])) + (f', ... ({len(names) - count} more)' if len(names) > count else '')
