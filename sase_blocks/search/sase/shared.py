"""The operations of a mixed edge in one pass; PLACEHOLDER that calls each by itself."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

__all__ = ['SharedExcites', 'SharedSqueezes']


class SharedSqueezes:
    """The squeezes of x."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def channel(self, ops: Sequence[Any]) -> list[Tensor]:
        return [op(self.x) for op in ops]

    def spatial(self, ops: Sequence[Any], gate: Tensor | None) -> list[Tensor]:
        return [op(self.x, gate) for op in ops]


class SharedExcites:
    """The excitations of q."""

    def __init__(self, q: Tensor, ops: Sequence[Any]) -> None:
        self.outputs = [op(q) for op in ops]
