"""Carry inserted attention over to a network that another library built anew."""

from __future__ import annotations

import copy
from collections.abc import Mapping

from torch import nn

from sase_blocks.convert import INSERTED

from .surgery import RECORD, attach, inserted_in


def inserted_attention(model: nn.Module) -> dict[str, nn.Module]:
    """Each inserted attention by its name in the network."""
    return {name: module for name, module in model.named_modules() if name and INSERTED in module.__dict__}


def carry_over(attention: Mapping[str, nn.Module], model: nn.Module) -> list[str]:
    """Insert copies of attention, with their weights, under the same names into another network, in place.

    Modules that hold attention already keep theirs. The copies require gradients, even if the originals do not.

    Args:
        attention: ``inserted_attention`` of a network with the same module names.
        model: the new network.

    Returns:
        The names of the copies.

    Raises:
        ValueError: the network has no module of such a name. It is unchanged.
    """
    modules = dict(model.named_modules())
    holders = {name: name.rpartition('.')[0] for name in attention}
    missing = [holder for holder in holders.values() if holder not in modules]
    if missing:
        raise ValueError(
            f'{len(missing)} of {len(holders)} modules with inserted attention are not in this '
            f'{type(model).__name__}, such as {missing[0]!r}: it is another network'
        )
    new = [name for name, holder in holders.items() if inserted_in(modules[holder]) is None]
    for name in new:
        holder = modules[holders[name]]
        child = copy.deepcopy(attention[name]).requires_grad_(True).train(holder.training)
        mark = child.__dict__[INSERTED]
        mark.path = name
        attach(holder, child, mark, name.rpartition('.')[2])
        model.__dict__[RECORD] = [*model.__dict__.get(RECORD, ()), mark]
    return new
