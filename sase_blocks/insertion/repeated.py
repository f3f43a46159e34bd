"""Where attention goes in a network that the table of families does not know: after each of its repeated blocks.

Not in the papers. A block is a module that returns a map and contains two or more weight matrices or kernels. Blocks of
one class form a group if their parents' names differ only in numbers (``stages.0.blocks.3``, ``stages.1.blocks.0``). A
group is repeated if more than half of its blocks keep the shape of their input, as residual blocks do and stages do
not. Of nested groups the outermost counts. If blocks that change the shape each have one part that keeps it, such as a
squeeze-and-excitation, the blocks count instead of the parts. Blocks of another class in the same rows join them, such
as the wide blocks of an Inception. If no group keeps the shape, those that change it count. If these have fewer layers
than the plain rows of convolutions, as in a VGG, attention follows each convolution there, after its norm and
activation.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

from .surgery import inserted_in, is_plain_sequential, why_not
from .survey import Map, Survey


class _Candidate(NamedTuple):
    name: str
    module: nn.Module
    of: Map
    keeps: bool  # keeps the shape of its input
    several: bool  # returns several maps, of which the first gets the attention
    layers: int  # number of modules in it with their own weight matrix or kernel


_Group = list[_Candidate]


def repeated_blocks(model: nn.Module, survey: Survey) -> tuple[list[tuple[str, nn.Module]], list[str]]:
    """The blocks by the rule in network order, none if there are none or no forward was run.

    Also the names of blocks whose map nothing reads: the last blocks of transformers whose head reads only a class
    token.
    """
    if survey.trace is None:
        return [], []
    candidates = list(_candidates(model, survey))
    blocks = [c for c in candidates if c.layers > 1 and _can_hold(c.module)]
    parents = {_parent(c.name) for c in blocks}
    # A plain Sequential of blocks is a stage.
    groups = list(_groups([c for c in blocks if not (is_plain_sequential(c.module) and c.name in parents)]).values())
    keeping = [group for group in groups if 2 * sum(c.keeps for c in group) > len(group) > 1]
    one_map = [group for group in keeping if not any(c.several for c in group)]
    # A part that each block has once, such as a squeeze-and-excitation, represents the block.
    changing = [group for group in groups if len(group) > 1 and group not in keeping]
    whole = [outer for outer in changing if all(max(_inside(group, outer)) < 2 for group in one_map)]  # not stages
    one_map = [next((o for o in whole if sum(_inside(group, o)) == len(group)), group) for group in one_map]
    chosen: list[_Candidate] = []
    for wanted in (one_map, keeping, changing):
        if chosen := _outermost(wanted):
            break
    plain = _plain_layers([c for c in candidates if is_plain_sequential(model.get_submodule(_parent(c.name)))])
    if not keeping and len(plain) > sum(c.layers for c in chosen):  # a VGG, maybe with other parts
        found = plain
    else:
        rows = {_row(c.name) for c in chosen}
        beside = [group for group in groups if len(group) > 1 and _row(group[0].name) in rows]
        found = _outermost([chosen, *beside])
    order = {name: index for index, (name, _) in enumerate(model.named_modules())}
    found.sort(key=lambda c: order[c.name])
    last = {(_parent(c.name), _kind(c.module)): c for c in found}.values()  # of each row
    unread = [c.name for c in last if not survey.is_read(c.module, c.of.layout)]
    return [(c.name, c.module) for c in found if c.name not in unread], unread


def known_maps(model: nn.Module, survey: Survey) -> list[tuple[str, str]]:
    """The modules that return maps, most repeated first, with the ``where=`` that chooses them."""
    by_class: dict[type[nn.Module], _Group] = {}
    for c in _candidates(model, survey):
        if _can_hold(c.module):
            by_class.setdefault(type(c.module), []).append(c)
    found = []
    for cls, group in sorted(by_class.items(), key=lambda item: -len(item[1])):
        channels, (height, width), _ = group[0].of
        what = f'{len(group)} {cls.__name__} ({channels} channels, {height} x {width})'
        all_of_them = len(group) > 1 and sum(type(m) is cls for m in model.modules()) == len(group)
        pattern = f'lambda name, module: type(module).__name__ == {cls.__name__!r}'
        found.append((what, pattern if all_of_them else repr(group[0].name)))
    return found


def _candidates(model: nn.Module, survey: Survey) -> Iterator[_Candidate]:
    """Every module, except the network and inserted ones, that returns a map in each of its calls."""
    trace = survey.trace
    if trace is None:
        return
    inserted = [f'{name}.{at[0]}'.lstrip('.') for name, m in model.named_modules() if (at := inserted_in(m))]
    for name, module in model.named_modules():
        if not name or any(name == i or name.startswith(f'{i}.') for i in inserted) or not trace.of(module):
            continue
        found = survey.map_of(module)
        if not isinstance(found, str):
            keeps = trace.inputs[id(module)] == trace.shapes[id(module)]
            # Only other tensors that look like the first, which excludes attention weights and the like.
            first = trace.of(module)[0]
            several = any(len(s) == len(first) and s[0] == first[0] for s in trace.others[id(module)])
            yield _Candidate(name, module, found, keeps, several, sum(1 for _ in _layers(module)))


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    if any(p is not None and p.ndim > 1 for p in module._parameters.values()):
        yield module
    at = inserted_in(module)
    for name, child in module.named_children():
        if at is None or name != at[0]:
            yield from _layers(child)


def _can_hold(module: nn.Module) -> bool:
    return is_plain_sequential(module) or why_not(module) is None or inserted_in(module) is not None


def _row(name: str) -> str:
    """The name of a module's parent without its numbers."""
    return re.sub(r'\d+', '#', _parent(name))


def _parent(name: str) -> str:
    return name.rpartition('.')[0]


def _kind(module: nn.Module) -> Any:
    """The class of a module, or for a plain Sequential, the classes in it."""
    if not is_plain_sequential(module):
        return type(module)
    at = inserted_in(module)
    return tuple(_kind(child) for name, child in module.named_children() if at is None or name != at[0])


def _groups(candidates: _Group) -> dict[Any, _Group]:
    groups: dict[Any, _Group] = {}
    for c in candidates:
        groups.setdefault((_row(c.name), _kind(c.module)), []).append(c)
    return groups


def _inside(group: _Group, outer: _Group) -> list[int]:
    """How many members of one group are in each member of another."""
    return [sum(c.name.startswith(f'{o.name}.') for c in group) for o in outer]


def _outermost(groups: list[_Group]) -> list[_Candidate]:
    """The members of groups that are in no other member, each once."""
    members = {c.name: c for group in groups for c in group}
    return [c for c in members.values() if not any(name in members for name in _around(c.name))]


def _around(name: str) -> Iterator[str]:
    while name := _parent(name):
        yield name


def _is_leaf(module: nn.Module) -> bool:
    at = inserted_in(module)
    return len(module._modules) == (at is not None)


def _plain_layers(candidates: _Group) -> list[_Candidate]:
    """The ends of convolutions in plain Sequentials, each with its norm and activation."""
    by_name = {c.name: c for c in candidates}
    rows: dict[str, list[str]] = {}
    for c in candidates:
        rows.setdefault(_parent(c.name), []).append(c.name)
    found = []
    for names in rows.values():
        convs = [name for name in names if isinstance(by_name[name].module, nn.Conv2d)]
        ends = []
        for name in convs:
            end = name
            for following in names[names.index(name) + 1 :]:
                after = by_name[following]
                if after.layers > 0 or after.of != by_name[name].of or not _is_leaf(after.module):
                    break
                end = following
            ends.append(by_name[end])
        found += ends if len(convs) > 1 else []
    return found
