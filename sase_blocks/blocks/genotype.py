"""A genotype: the six choices that make a SASE block (arXiv 2411.08333), as a value to read, store and compare."""

from __future__ import annotations

import json
import random as _random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from sase_blocks.ops import EXTENDED_SETS, SETS, primitive_name, primitive_names
from sase_blocks.ops.options import parse_name, split_names
from sase_blocks.reading import parse_json, quoted, read_text


def split_stages(text: str) -> list[str]:
    """The blocks in a text: one, or one for each stage with semicolons between them, or those in a .json file."""
    if text.endswith('.json'):
        return [str(genotype) for genotype in Genotype.read(text)]
    try:
        return split_names(text, ';')
    except ValueError:
        if text.lstrip().startswith(('{', '[')):  # JSON, whose parser knows more
            return [text.strip()]
        raise


@dataclass(frozen=True)
class Genotype:
    """Six named operations, one per edge of the block, in the paper's edge order.

    Each argument is a primitive's name or the paper's key, maybe with options, and is stored as the name in its
    canonical text: ``mlp(reduction=4)``. The paper chooses from ``ops.SETS``, with 7 operations per set, and their
    defaults. The larger ``ops.EXTENDED_SETS`` also work.

    Args:
        channel_squeeze: edge 0, x -> q, from the channel squeezes.
        channel_excite: edge 1, q -> c, the channel attention, from the channel excitations.
        gate_excite: edge 2, q -> d, the gate on the input of edge 3, from the channel excitations.
        gated_squeeze: edge 3, d * x -> s, from the spatial squeezes.
        spatial_squeeze: edge 4, x -> s, from the spatial squeezes.
        spatial_excite: edge 5, s -> a, the spatial attention, from the spatial excitations.

    Raises:
        ValueError: an unknown name or option. The message lists the valid ones and suggests the nearest name.

    Examples:
        >>> g = Genotype.parse('avg_max,mlp,affine,p_norm,avg,conv3x3_x2')
        >>> g.gated_squeeze
        'p_norm'
        >>> Genotype.parse(g.to_json()) == Genotype.parse(str(g)) == g
        True
        >>> str(g.with_options(reduction=4))
        'avg_max,mlp(reduction=4),affine,p_norm,avg,conv3x3_x2'
    """

    channel_squeeze: str
    channel_excite: str
    gate_excite: str
    gated_squeeze: str
    spatial_squeeze: str
    spatial_excite: str

    SET_OF: ClassVar[dict[str, str]] = {  # edge -> the set it chooses from
        'channel_squeeze': 'channel_squeeze',
        'channel_excite': 'channel_excite',
        'gate_excite': 'channel_excite',
        'gated_squeeze': 'spatial_squeeze',
        'spatial_squeeze': 'spatial_squeeze',
        'spatial_excite': 'spatial_excite',
    }

    def __post_init__(self) -> None:
        for edge, set_name in self.SET_OF.items():
            try:
                name = primitive_name(set_name, getattr(self, edge))
            except ValueError as error:
                raise ValueError(f'genotype, {edge}: {error}') from None
            object.__setattr__(self, edge, name)

    def __str__(self) -> str:
        return ','.join(astuple(self))

    def with_options(self, **options: Any) -> Genotype:
        """The genotype with each option given to the one operation that has it.

        Raises:
            TypeError: an option that no operation has, that several have, or that the genotype already gives.
            ValueError: a value that is no literal.
        """
        return Genotype(*primitive_names(list(zip(self.SET_OF.values(), astuple(self), strict=True)), **options))

    @classmethod
    def of(cls, names: Sequence[str]) -> Genotype:
        """From six names (or paper keys) in edge order. Raises ValueError for any other number."""
        if isinstance(names, str) or len(names) != len(cls.SET_OF):
            count = 1 if isinstance(names, str) else len(names)
            raise ValueError(f'a genotype has six choices ({", ".join(cls.SET_OF)}), got {count}: {quoted(names)}')
        return cls(*names)

    @classmethod
    def from_paper(cls, names: Sequence[str]) -> Genotype:
        """From six of the authors' keys in edge order, for example ``['GAP+GMP', '2conv_1x1', ...]``."""
        return cls.of(names)

    @classmethod
    def parse(cls, text: str) -> Genotype:
        """From the text form (six comma-separated names or paper keys, maybe with options) or from JSON.

        Raises:
            ValueError: not six names, an unknown name, JSON that is not an object of the six edges, or genotypes for
                several stages.
        """
        if text.lstrip().startswith(('{', '[')):
            return cls.from_json(text)
        if (stages := len(split_names(text, ';'))) > 1:
            raise ValueError(f'expected one genotype, got {stages}, one for each stage: {quoted(text)}')
        return cls.of(split_names(text))

    @classmethod
    def parse_stages(cls, text: str) -> list[Genotype]:
        """The genotypes in a text, see ``split_stages``. Raises ValueError as ``parse`` and ``read`` do."""
        return [cls.parse(part) for part in split_stages(text)]

    def to_json(self) -> str:
        """A JSON object, one key per edge."""
        return json.dumps(self.to_dict())

    def to_dict(self) -> dict[str, str]:
        """Edge -> name, in edge order."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @classmethod
    def from_json(cls, text: str) -> Genotype:
        """From ``to_json``'s text, or from a JSON list of six names. Raises ValueError for anything else."""
        return cls._of_json(parse_json(text, 'a genotype'))

    @classmethod
    def _of_json(cls, value: object) -> Genotype:
        if isinstance(value, list):
            return cls.of(value)
        if not isinstance(value, dict) or set(value) != set(cls.SET_OF):
            keys = ', '.join(cls.SET_OF)
            raise ValueError(f'a genotype in JSON is an object with the keys {keys}, got {quoted(value)}')
        return cls(**value)

    @classmethod
    def read(cls, path: str | Path) -> tuple[Genotype, ...]:
        """From a file with a genotype as JSON or a search's result: one genotype, or one per stage.

        Raises:
            ValueError: no such file, or no genotype in it. The message names the file.
        """
        text = read_text(path, 'genotype')
        try:
            value = parse_json(text, 'a genotype')
            if isinstance(value, dict) and isinstance(value.get('genotypes'), list) and value['genotypes']:
                return tuple(cls.parse(str(entry)) for entry in value['genotypes'])
            return (cls._of_json(value),)
        except ValueError as error:
            raise ValueError(f'{path}: {error}') from None

    def to_paper(self) -> tuple[str, ...]:
        """The authors' six keys in edge order. Raises ValueError if an operation is not one of the paper's."""
        keys = {
            edge: None if (found := parse_name(getattr(self, edge)))[1] else EXTENDED_SETS[s][found[0]].paper_key
            for edge, s in self.SET_OF.items()
        }
        strangers = [f'{edge}={getattr(self, edge)!r}' for edge, key in keys.items() if key is None]
        if strangers:
            raise ValueError(f'the paper has no operation for {", ".join(strangers)}; its sets are ops.SETS')
        return tuple(str(key) for key in keys.values())

    @classmethod
    def random(cls, seed: int | None = None, sets: Mapping[str, Collection[str]] = SETS) -> Genotype:
        """A uniformly random genotype, equal for equal seeds.

        Args:
            seed: random seed; None for a different genotype each time.
            sets: the names to choose from in each of the four sets, maybe with options. Default: the paper's 117,649
                genotypes; ``ops.EXTENDED_SETS`` is the larger space.
        """
        rng = _random.Random(seed)
        return cls(*(rng.choice(list(sets[s])) for s in cls.SET_OF.values()))


# The block found by the paper's second-order search on CIFAR-10, seed 2.
SASE_GENOTYPE = Genotype.from_paper(['GAP+GMP', '2conv_1x1', 'affine', 'p-norm', 'GAP', '2conv_3x3'])
