"""``check``: does every inserted attention still run?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.fx import GraphModule

from .insertion import example_of, try_forward
from .surgery import RECORD, Mark, has_inserted, inserted_in, is_hooked


@dataclass(frozen=True)
class CheckReport:
    """The result of ``check``. Prints as one line.

    Args:
        network: class of the model.
        calls: how often one forward ran each inserted attention, by name; None if no forward was run.
        note: why no forward was run, or ''.
    """

    network: str
    calls: dict[str, int | None]
    note: str = ''

    def __str__(self) -> str:
        what = 'are in place' if self.note else 'run'
        return f'{self.network}: all {len(self.calls)} inserted places {what}' + (f'; {self.note}' if self.note else '')


def check(model: nn.Module, x: Any = None) -> CheckReport:
    """Run one forward, and raise an error unless every inserted attention ran in it.

    Call it after anything that rebuilds or rewires a network: conversion of its norms, fusion, reparametrisation,
    pruning, another library's trainer or exporter. The forward runs in eval mode without gradients and changes no
    state. ``check`` repairs nothing.

    Args:
        model: the network passed to ``insert``, a copy of it, or a module around it. A graph of it (FX, TorchScript,
            ``torch.export``) has no modules, so check the network before.
        x: an input, a tuple of positional arguments, or an image size as in ``insert``: an int, (H, W) or (C, H, W).
            Default: the model's own image size. If that is unknown, ``check`` runs no forward and checks only what it
            can see without one.

    Returns:
        The report: the places and how often each ran.

    Raises:
        TypeError: not a module.
        ValueError: nothing was inserted, the model is an FX graph, or the forward fails for the given ``x``.
        RuntimeError: places that are gone, lost their hook or did not run, with their names.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f'model must be an nn.Module, got {type(model).__name__}')
    graphs = [name for name, module in model.named_modules() if isinstance(module, GraphModule)]
    if graphs:
        raise ValueError(
            f'{graphs[0] or type(model).__name__} is an FX graph, where attention is operations and not modules: '
            f'check the network that it was made of, and compare their outputs'
        )
    if not has_inserted(model):
        raise ValueError(f'this {type(model).__name__} holds no inserted attention: insert(model, block) first')
    is_size = isinstance(x, int) or (isinstance(x, tuple | list) and all(isinstance(n, int) for n in x))
    args, given = example_of(model, x, None) if x is None or is_size else example_of(model, None, x)
    places: dict[str, tuple[nn.Module, Mark, nn.Module]] = {}
    for name, module in model.named_modules():
        if (at := inserted_in(module)) is not None:
            child, mark = at
            places[f'{name}.{child}'.lstrip('.')] = (module, mark, module.get_submodule(child))
    found = {id(mark) for _, mark, _ in places.values()}
    lost: dict[str, str] = {}
    for name, module in model.named_modules():
        for mark in module.__dict__.get(RECORD, ()):
            if not mark.removed and id(mark) not in found:
                lost[f'{name}.{mark.path}'.lstrip('.')] = _what_became(module, mark.path.rpartition('.')[0])
    for name, (holder, mark, _) in places.items():
        if not is_hooked(holder, mark.how):
            lost[name] = f'the {type(holder).__name__} that holds it has lost the hook that runs it'

    calls: dict[str, int | None] = dict.fromkeys(places)
    note = ''
    if not lost:
        trace, why = try_forward(model, args, given, [attention for _, _, attention in places.values()])
        if trace is None:
            note = f'whether they run is not known: {why}'.replace('input_size=', 'x')
        else:
            calls = {name: len(trace.shapes.get(id(attention), ())) for name, (_, _, attention) in places.items()}
            lost = {name: 'the forward did not run it' for name, count in calls.items() if not count}
    if lost:
        names = [f'{name!r} ({reason})' for name, reason in lost.items()]
        more = f', ... ({len(names) - 4} more)' if len(names) > 4 else ''
        raise RuntimeError(
            f'{len(lost)} of {len(set(calls) | set(lost))} inserted places of this {type(model).__name__} do not run: '
            f'{", ".join(names[:4])}{more}. Remove all with remove(model), and insert after the tool that caused this, '
            f'or choose other places with where='
        )
    return CheckReport(type(model).__name__, calls, note)


def _what_became(model: nn.Module, holder: str) -> str:
    """Why an attention may be gone: what replaced its holder."""
    try:
        return f'it is gone: {holder!r} is a {type(model.get_submodule(holder)).__name__} now'
    except AttributeError:
        return f'it is gone, together with {holder!r}'


def check_inserted(model: nn.Module, x: Any = None) -> None:
    """``check`` for our own tools, whose network may have no inserted attention."""
    if has_inserted(model):
        check(model, x)
