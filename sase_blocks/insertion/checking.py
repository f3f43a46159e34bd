"""``check``: does every attention that was inserted still run?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.fx import GraphModule

from .insertion import example_of, try_forward
from .surgery import RECORD, Mark, has_inserted, inserted_in, is_hooked


@dataclass(frozen=True)
class CheckReport:
    """What ``check`` saw; printed, one line.

    Args:
        network: class of the model.
        calls: for the name of each inserted attention, how often one forward ran it; None if no forward was run.
        note: why no forward was run, or ''.
    """

    network: str
    calls: dict[str, int | None]
    note: str = ''

    def __str__(self) -> str:
        what = 'are in place' if self.note else 'run'
        return f'{self.network}: all {len(self.calls)} inserted places {what}' + (f'; {self.note}' if self.note else '')


def check(model: nn.Module, x: Any = None) -> CheckReport:
    """Run one forward, and raise unless every inserted attention ran in it.

    For use after anything that rebuilds or rewires a network: conversion of its norms, fusion, reparametrisation,
    pruning, another library's trainer or exporter. The forward is in eval mode without gradients and leaves no trace.
    Nothing is repaired.

    Args:
        model: the network that ``insert`` was called with, a copy of it, or a module around it. A graph made of it
            (FX, TorchScript, ``torch.export``) has no modules to look at: check the network before.
        x: an input, a tuple of positional arguments, or the size of an image as ``insert`` takes it: an int, (H, W) or
            (C, H, W). Default: what the model says of itself; where nothing is known, no forward is run, and only
            what can be seen without one is checked.

    Returns:
        The report: the places and how often each ran.

    Raises:
        TypeError: not a module.
        ValueError: nothing was inserted, the model is an FX graph, or the forward fails for the ``x`` that was given.
        RuntimeError: places that are gone, lost their hook or did not run, with their names.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f'model must be an nn.Module, got {type(model).__name__}')
    graphs = [name for name, module in model.named_modules() if isinstance(module, GraphModule)]
    if graphs:
        raise ValueError(
            f'{graphs[0] or type(model).__name__} is a graph of FX, in which attention is operations and no modules: '
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
            f'{", ".join(names[:4])}{more}. Take all out with remove(model), and insert after the tool that did this, '
            f'or choose other places with where='
        )
    return CheckReport(type(model).__name__, calls, note)


def _what_became(model: nn.Module, holder: str) -> str:
    """Why an attention may be gone: what stands now where its holder stood."""
    try:
        return f'it is gone: {holder!r} is a {type(model.get_submodule(holder)).__name__} now'
    except AttributeError:
        return f'it is gone, together with {holder!r}'


def check_inserted(model: nn.Module, x: Any = None) -> None:
    """``check`` for a tool of ours, whose network may hold nothing inserted."""
    if has_inserted(model):
        check(model, x)
