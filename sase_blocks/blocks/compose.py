"""Compositions: a squeeze and an excitation make a gate on x, along the channels, along the positions, or both.

``ChannelAttention(C, 'avg', 'mlp')`` is Squeeze-and-Excitation (arXiv 1709.01507, eq. 2 to 4). Known blocks have a name
in ``BLOCKS``. Every other pair of ``ops.EXTENDED_SETS`` also works, without a name. A primitive's options stand in its
name, ``'mlp(reduction=4)'``, or are keyword arguments, ``reduction=4``, that go to the one primitive that has them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sase_blocks.checks import check_channels
from sase_blocks.ops import (
    EXTENDED_CHANNEL_EXCITE,
    SETS,
    ChannelExcite,
    ChannelSqueeze,
    SpatialExcite,
    SpatialSqueeze,
    primitive_names,
    resolve_primitive,
)
from sase_blocks.ops.eager import times_sum
from sase_blocks.ops.options import parse_name

from .base import AttentionModule, fade, fade_sum, fade_value
from .graph import CHANNEL, MAP, SPATIAL, Edge, Graph

for _function in ('fade', 'fade_sum', 'fade_value', 'times_sum'):
    torch.fx.wrap(_function)  # must be wrapped in each module that calls it


def _names(
    kind: str, squeeze: str | tuple[str, ...], excite: str, options: dict[str, Any]
) -> tuple[tuple[str, ...], str]:
    """The canonical names of the squeezes and of the excitation of a kind, with the options."""
    squeezes = (squeeze,) if isinstance(squeeze, str) else tuple(squeeze)
    if not squeezes:
        raise ValueError('squeeze must name at least one statistic, got none')
    choices = [*((f'{kind}_squeeze', name) for name in squeezes), (f'{kind}_excite', excite)]
    *names, excite = primitive_names(choices, **options)
    return tuple(names), excite


def _gate(logits: str, gated: bool) -> str:
    return logits if gated else f'sigmoid({logits})'


class ChannelGate(AttentionModule):
    """y = x * act(sum of excite(squeeze(x)) over the squeezes), with ``add`` x plus it. See ``ChannelAttention``."""

    def __init__(
        self,
        channels: int,
        squeeze: Sequence[ChannelSqueeze],
        excite: ChannelExcite,
        act: nn.Module,
        add: bool = False,
    ) -> None:
        super().__init__(channels)
        self.squeeze = nn.ModuleList(squeeze)
        self.excite = excite
        self.act = act
        self.add = add

    def current_channels(self) -> int:
        return self.excite.current_channels()

    def gate(self, x: Tensor) -> Tensor:
        return self.act(self.values(x) if len(self.squeeze) > 1 else self.excite(self.squeeze[0](x)))

    def values(self, x: Tensor) -> Tensor:
        """The sum over several squeezes."""
        return torch.stack([self.excite(squeeze(x)) for squeeze in self.squeeze]).sum(0)

    def attend(self, x: Tensor) -> Tensor:
        return x + self.gate(x).to(x.dtype) if self.add else x * self.gate(x).to(x.dtype)

    def faded_gate(self, x: Tensor, alpha: Tensor | None) -> Tensor:
        return fade_value(self.gate(x), alpha) if self.add else fade(self.gate(x), alpha)

    def faded(self, x: Tensor, alpha: Tensor | None) -> Tensor:
        gate = self.faded_gate(x, alpha).to(x.dtype)
        return x + gate if self.add else x * gate


class ChannelAttention(ChannelGate):
    """y = x * gate, or x + value, one number per channel. Shape: (B, C, H, W) -> (B, C, H, W).

    Args:
        channels: C, at least 1.
        squeeze: a name from ``ops.EXTENDED_CHANNEL_SQUEEZE`` or the SASE paper's key. With several names, each
            statistic passes through the same excitation and the results are added, as in CBAM.
        excite: a name from ``ops.EXTENDED_CHANNEL_EXCITE`` or the paper's key. One without a gate (``mlp``) gets a
            sigmoid. Both names may have options, ``'mlp(reduction=4)'``.
        add: y = x + excite(squeeze(x)) without a gate, as in GCNet.
        feat_size: (H, W) for the spectrum of ``dct``; the others ignore it.
        device, dtype: of the parameters.
        **options: of the primitives, such as ``reduction=4`` of ``mlp``.

    Raises:
        ValueError: bad channels, names or options, or a gated excitation whose values would be added or summed; in
            ``forward`` another rank or number of channels.
        TypeError: an option that none of the primitives has, or that several have.
    """

    def __init__(
        self,
        channels: int,
        squeeze: str | tuple[str, ...] = 'avg',
        excite: str = 'mlp',
        add: bool = False,
        feat_size: int | tuple[int, int] | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        check_channels(channels, type(self).__name__)
        args: dict[str, Any] = {'feat_size': feat_size, 'device': device, 'dtype': dtype}
        names, excite = _names('channel', squeeze, excite, options)
        squeezes = [resolve_primitive('channel_squeeze', name)(channels, **args) for name in names]
        excitation = resolve_primitive('channel_excite', excite)(channels, **args)
        if excitation.gated and (add or len(names) > 1):
            raise ValueError(
                f'excite={excite!r} ends in a gate, whose values cannot be {"added to x" if add else "summed"}; choose '
                f'one of {", ".join(n for n, cls in EXTENDED_CHANNEL_EXCITE.items() if not cls.gated)}'
            )
        act = nn.Identity() if excitation.gated or add else nn.Sigmoid()
        super().__init__(channels, squeezes, excitation, act, add)
        self._names = (names, excite)

    def graph(self) -> Graph:
        squeezes, excite = self._names
        nodes = {'x': MAP}
        edges = []
        for i, name in enumerate(squeezes):
            q = 'q' if len(squeezes) == 1 else f'q{i + 1}'
            nodes[q] = CHANNEL
            edges += [Edge('x', q, name, 'channel_squeeze'), Edge(q, 'c', excite, 'channel_excite')]
        formula = ' + '.join(f'{excite}({name}(x))' for name in squeezes)
        formula = f'y = x + {formula}' if self.add else f'y = x * {_gate(formula, self.excite.gated)}'
        return Graph({**nodes, 'c': CHANNEL, 'y': MAP}, (*edges, Edge('c', 'y'), Edge('x', 'y')), formula)

    def extra_repr(self) -> str:
        squeezes, excite = self._names
        channels = self.current_channels() or self.channels
        return f'{channels}, {squeezes[0] if len(squeezes) == 1 else squeezes!r}, {excite!r}' + (
            ', add=True' if self.add else ''
        )


class SpatialGate(AttentionModule):
    """y = x * act(excite(the maps of the squeezes, stacked)). See ``SpatialAttention``."""

    def __init__(self, channels: int, squeeze: Sequence[SpatialSqueeze], excite: SpatialExcite, act: nn.Module) -> None:
        super().__init__(channels)
        self.squeeze = nn.ModuleList(squeeze)
        self.excite = excite
        self.act = act

    def gate(self, x: Tensor) -> Tensor:
        return self.act(self.excite(self.maps(x) if len(self.squeeze) > 1 else self.squeeze[0](x)))

    def maps(self, x: Tensor) -> Tensor:
        """The maps of several squeezes, stacked."""
        return torch.cat([squeeze(x) for squeeze in self.squeeze], 1)


class SpatialAttention(SpatialGate):
    """y = x * gate, one gate per position. Shape: (B, C, H, W) -> (B, C, H, W).

    Args:
        channels: C, at least 1.
        squeeze: a name from ``ops.EXTENDED_SPATIAL_SQUEEZE`` or the SASE paper's key. Several statistics are stacked as
            input maps of the excitation, which must be ``conv_norm``, as in CBAM.
        excite: a name from ``ops.EXTENDED_SPATIAL_EXCITE`` or the paper's key. One without a gate gets a sigmoid. Both
            names may have options, ``'conv_norm(kernel_size=3)'``.
        feat_size: (H, W), required by ``l2_norm`` and ``affine``, which have parameters per position.
        device, dtype: of the parameters.
        **options: of the primitives, such as ``kernel_size=3`` of ``conv_norm``.

    Raises:
        ValueError: bad channels, names or options, several statistics for an excitation that reads one, or feat_size
            missing; in ``forward`` another rank or number of channels.
        TypeError: an option that none of the primitives has, or that several have.
    """

    def __init__(
        self,
        channels: int,
        squeeze: str | tuple[str, ...] = 'avg_max',
        excite: str = 'conv7x7',
        feat_size: int | tuple[int, int] | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        check_channels(channels, type(self).__name__)
        args: dict[str, Any] = {'feat_size': feat_size, 'device': device, 'dtype': dtype}
        names, excite = _names('spatial', squeeze, excite, options)
        squeezes = [resolve_primitive('spatial_squeeze', name)(channels, **args) for name in names]
        if len(names) > 1:
            if parse_name(excite)[0] != 'conv_norm':
                raise ValueError(f"several spatial statistics need excite='conv_norm', got {excite!r} for {names}")
            args['maps'] = len(names)
        excitation = resolve_primitive('spatial_excite', excite)(channels, **args)
        super().__init__(channels, squeezes, excitation, nn.Identity() if excitation.gated else nn.Sigmoid())
        self._names = (names, excite)

    def graph(self) -> Graph:
        squeezes, excite = self._names
        nodes = {'x': MAP}
        edges = []
        for i, name in enumerate(squeezes):
            s = 's' if len(squeezes) == 1 else f's{i + 1}'
            nodes[s] = SPATIAL
            edges += [Edge('x', s, name, 'spatial_squeeze'), Edge(s, 'a', excite, 'spatial_excite')]
        formula = ', '.join(f'{name}(x)' for name in squeezes)
        formula = f'y = x * {_gate(f"{excite}({formula})", self.excite.gated)}'
        return Graph({**nodes, 'a': SPATIAL, 'y': MAP}, (*edges, Edge('a', 'y'), Edge('x', 'y')), formula)

    def extra_repr(self) -> str:
        squeezes, excite = self._names
        channels = self.current_channels() or self.channels
        return f'{channels}, {squeezes[0] if len(squeezes) == 1 else squeezes!r}, {excite!r}'


class ParallelGate(AttentionModule):
    """y = x * (c + s), or if ``joint``, x * (1 + sigmoid(c + s)), of two branches. See ``ParallelAttention``."""

    def __init__(
        self,
        channels: int,
        channel_squeeze: ChannelSqueeze,
        channel_excite: ChannelExcite,
        spatial_squeeze: SpatialSqueeze,
        spatial_excite: SpatialExcite,
        channel_act: nn.Module,
        spatial_act: nn.Module,
        joint: bool,
    ) -> None:
        super().__init__(channels)
        self.channel_squeeze = channel_squeeze
        self.channel_excite = channel_excite
        self.spatial_squeeze = spatial_squeeze
        self.spatial_excite = spatial_excite
        self.joint = joint
        self.channel_act = channel_act
        self.spatial_act = spatial_act

    def current_channels(self) -> int:
        return self.channel_excite.current_channels()

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The values c (B, C, 1, 1) and s (B, 1, H, W) of the branches, gates unless ``joint``."""
        c = self.channel_act(self.channel_excite(self.channel_squeeze(x)))
        s = self.spatial_act(self.spatial_excite(self.spatial_squeeze(x)))
        return c, s

    def gate(self, x: Tensor) -> Tensor:
        c, s = self.gates(x)
        return 1 + torch.sigmoid(c + s) if self.joint else c + s

    def attend(self, x: Tensor) -> Tensor:
        c, s = self.gates(x)
        return x * (1 + torch.sigmoid(c + s)).to(x.dtype) if self.joint else times_sum(x, c, s)

    def faded(self, x: Tensor, alpha: Tensor | None) -> Tensor:
        c, s = self.gates(x)
        if self.joint:
            return x * fade(1 + torch.sigmoid(c + s), alpha).to(x.dtype)
        c, s = fade_sum(c, s, alpha)
        return times_sum(x, c, s)


class ParallelAttention(ParallelGate):
    """A channel and a spatial branch side by side. Shape: (B, C, H, W) -> (B, C, H, W).

    Args:
        channels: C, at least 1.
        channel: names of a channel squeeze and a channel excitation, maybe with options.
        spatial: names of a spatial squeeze and a spatial excitation, maybe with options.
        joint: False: y = x * (gate_c + gate_s), a separate gate for each branch, as in scSE. True:
            y = x * (1 + sigmoid(c + s)), one gate of the summed values, as in BAM.
        feat_size: (H, W), for primitives with parameters per position.
        device, dtype: of the parameters.
        **options: of the primitives, such as ``reduction=4`` of ``mlp``.

    Raises:
        ValueError: bad channels, names or options, feat_size missing, or a gated excitation where ``joint`` sums
            values; in ``forward`` another rank or number of channels.
        TypeError: an option that none of the primitives has, or that several have.
    """

    def __init__(
        self,
        channels: int,
        channel: tuple[str, str],
        spatial: tuple[str, str],
        joint: bool = False,
        feat_size: int | tuple[int, int] | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        check_channels(channels, type(self).__name__)
        args: dict[str, Any] = {'feat_size': feat_size, 'device': device, 'dtype': dtype}
        names = primitive_names(list(zip(SETS, (*channel, *spatial), strict=True)), **options)
        squeeze_c, excite_c, squeeze_s, excite_s = (
            resolve_primitive(set_name, name)(channels, **args) for set_name, name in zip(SETS, names, strict=True)
        )
        if joint and (excite_c.gated or excite_s.gated):
            raise ValueError(
                f'joint=True sums values before the gate, but one of {names[1]!r}, {names[3]!r} ends in a gate'
            )
        act_c, act_s = (nn.Identity() if joint or part.gated else nn.Sigmoid() for part in (excite_c, excite_s))
        super().__init__(channels, squeeze_c, excite_c, squeeze_s, excite_s, act_c, act_s, joint)
        self._names = tuple(names)

    def graph(self) -> Graph:
        cs, ce, ss, se = self._names
        edges = (
            Edge('x', 'q', cs, 'channel_squeeze'),
            Edge('q', 'c', ce, 'channel_excite'),
            Edge('x', 's', ss, 'spatial_squeeze'),
            Edge('s', 'a', se, 'spatial_excite'),
            Edge('c', 'y'),
            Edge('a', 'y'),
            Edge('x', 'y'),
        )
        c, a = f'{ce}({cs}(x))', f'{se}({ss}(x))'
        gate = f'(1 + sigmoid({c} + {a}))'
        if not self.joint:
            gate = f'({_gate(c, self.channel_excite.gated)} + {_gate(a, self.spatial_excite.gated)})'
        nodes = {'x': MAP, 'q': CHANNEL, 's': SPATIAL, 'c': CHANNEL, 'a': SPATIAL, 'y': MAP}
        return Graph(nodes, edges, f'y = x * {gate}')

    def extra_repr(self) -> str:
        cs, ce, ss, se = self._names
        return f'{self.current_channels() or self.channels}, {(cs, ce)!r}, {(ss, se)!r}, joint={self.joint}'


class SequentialAttention(nn.Sequential):
    """Blocks in sequence, an ``nn.Sequential`` that can reinitialise. Shape: (B, C, H, W) -> (B, C, H, W)."""

    __constants__ = ('in_gate',)  # TorchScript compiles only one of the two loops
    in_gate = False  # whether the blocks take alpha, set by an identity start; appended modules may not take it

    def forward(self, x: Tensor, alpha: Tensor | None = None) -> Tensor:
        if self.in_gate:
            for block in self:
                x = block(x, alpha)
        else:
            for block in self:
                x = block(x)
        return x

    def reset_parameters(self) -> None:
        """Reinitialise the parameters of all blocks.

        timm's RepVGG reinitialises every batch norm in its blocks, also in the attention, and then calls this.
        """
        for block in self:
            block.reset_parameters()  # type: ignore[operator]
