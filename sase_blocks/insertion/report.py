"""The result of an insertion, which prints as a table, and how a checkpoint's keys match."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from sase_blocks.checkpoint import read_checkpoint
from sase_blocks.convert import extract_state_dict


@dataclass(frozen=True)
class InsertedPlace:
    """One attention: ``model.get_submodule(name)``."""

    name: str
    channels: int
    feat_size: tuple[int, int] | None  # (H, W); None if no forward was run
    parameters: int
    macs: int | None  # multiply-accumulates of one forward of one image; None if no forward was run
    layout: str = 'NCHW'  # or 'NHWC', 'tokens', 'tokens+1' (one prefix token)


@dataclass(frozen=True)
class CheckpointKeys:
    """How a checkpoint's keys match those of the network with inserted attention."""

    fits: list[str] = field(repr=False)
    attention: list[str]  # missing keys of the inserted attention, which a plain checkpoint does not have
    missing: list[str]  # other missing keys
    unexpected: list[str]

    def __str__(self) -> str:
        lines = [f'{len(self.fits)} keys fit']
        for what, keys in (
            ('missing, inserted attention', self.attention),
            ('missing', self.missing),
            ('unexpected', self.unexpected),
        ):
            more = f': {", ".join(keys[:3])}' + (f', ... ({len(keys) - 3} more)' if len(keys) > 3 else '')
            lines.append(f'{len(keys)} {what}{more if keys else ""}')
        return '\n'.join(lines)


@dataclass(frozen=True)
class InsertReport:
    """The result of ``insert``. Prints as a table.

    Args:
        network: class of the model.
        block, start: the inserted block, and how it starts.
        places: one entry per new attention.
        already: names of attention from an earlier call, which was left alone.
        keys: the new keys of the state dict.
        model_keys: all keys of the state dict, including the new ones.
        model_parameters, model_macs: of the network before the insertion; MACs None if no forward was run.
        parameters: the new parameters, for an optimiser's parameter group.
        note: why something is unknown, or ''.
        left_out: names of blocks without attention, because the forward does not run them or nothing reads their map.
        by_rule: whether the network is unknown and its places come from our rule for repeated blocks, which is in no
            paper.
    """

    network: str
    block: str
    start: str
    places: tuple[InsertedPlace, ...]
    already: tuple[str, ...]
    keys: tuple[str, ...] = field(repr=False)
    model_keys: tuple[str, ...] = field(repr=False)
    model_parameters: int
    model_macs: int | None
    parameters: tuple[nn.Parameter, ...] = field(repr=False, compare=False)
    note: str = ''
    left_out: tuple[str, ...] = ()
    by_rule: bool = False

    @property
    def added_parameters(self) -> int:
        """The number of new parameters."""
        return sum(place.parameters for place in self.places)

    @property
    def added_macs(self) -> int | None:
        """New multiply-accumulates of convolutions and matrix products for one image; None if no forward was run."""
        counts = [place.macs for place in self.places if place.macs is not None]
        return sum(counts) if len(counts) == len(self.places) else None

    def compare(self, checkpoint: str | Path | Mapping[str, Any]) -> CheckpointKeys:
        """The matching, missing and unexpected keys of a checkpoint (a file or a state dict). Loads nothing.

        ``load_checkpoint(model, checkpoint)`` loads it, and treats a file without attention keys as a plain one.
        """
        raw = checkpoint if isinstance(checkpoint, Mapping) else read_checkpoint(checkpoint)
        given = extract_state_dict(raw, self.model_keys).state
        new = set(self.keys)
        missing = [key for key in self.model_keys if key not in given]
        return CheckpointKeys(
            fits=[key for key in self.model_keys if key in given],
            attention=[key for key in missing if key in new],
            missing=[key for key in missing if key not in new],
            unexpected=sorted(set(given) - set(self.model_keys)),
        )

    def __str__(self) -> str:
        lines = [f'{self.block} (start={self.start!r}) in {self.network}: {len(self.places)} places']
        if self.places:
            rows = [('place', 'channels', 'feature size', 'parameters', 'MACs')]
            for place in self.places:
                size = '-' if place.feat_size is None else '{} x {}'.format(*place.feat_size)
                size += '' if place.layout == 'NCHW' else f' {place.layout}'
                rows.append((place.name, str(place.channels), size, f'{place.parameters:,}', _count(place.macs)))
            rows.append(('added', '', '', f'{self.added_parameters:,}', _count(self.added_macs)))
            rows.append(('network before', '', '', f'{self.model_parameters:,}', _count(self.model_macs)))
            widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
            table = []
            for first, *others in rows:
                cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
                table.append('  '.join([first.ljust(widths[0]), *cells]))
            rule = '-' * len(table[0])
            lines += [table[0], rule, *table[1:-2], rule, *table[-2:]]
        if self.by_rule:
            lines.append("after each repeated block: our rule for an unknown network, no paper's place")
        if self.left_out:
            more = f', ... ({len(self.left_out) - 3} more)' if len(self.left_out) > 3 else ''
            lines.append(
                f'left out, because they do not run or nothing reads their map: {", ".join(self.left_out[:3])}{more}'
            )
        if self.already:
            lines.append(f'{len(self.already)} places had it already and were left alone')
        if self.note:
            lines.append(self.note)
        return '\n'.join(lines)


def _count(macs: int | None) -> str:
    """A number with about three digits, and its unit."""
    if macs is None:
        return '-'
    for unit, size in (('G', 1e9), ('M', 1e6), ('k', 1e3)):
        if macs >= size:
            return f'{macs / size:.3g} {unit}' if macs < 999.5 * size else f'{macs / size:,.0f} {unit}'
    return str(macs)
