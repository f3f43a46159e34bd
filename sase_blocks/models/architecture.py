"""The architecture of a TrioNet: all choices that define one network, as a value to read, print, store and compare.

From the abstract and the figure of TrioNet (arXiv 2111.07547): blocks of two 1x1 convolutions with one of three
operators between them. Not in the paper: the notation

    image 32; stem 16; heads 4; 64: conv3/16*2; 128: local5/32 + axial/32; 256: axial/64

The image size in px; the stem's width (``stem 64/4`` is ResNet's stem for large images, which reduces by 4); the heads
of all attentions; then the stages. A stage is its width and its blocks, ``OPERATOR[SIZE]/WIDTH[*COUNT]`` joined by plus
signs: the operator, its kernel or window size (none for axial attention), its width, and the number of repetitions.
The first block of every stage after the first has stride 2.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sase_blocks.reading import one_line, parse_json, quoted, read_text
from sase_blocks.selfattention import OPERATORS

__all__ = ['Architecture', 'Block', 'Stage']

REDUCTIONS = (1, 4)

_HEAD = re.compile(r'(?P<name>image|stem|heads)\s+(?P<number>\d+)(?:/(?P<reduction>\d+))?')
_STAGE = re.compile(r'(?P<width>\d+)\s*:(?P<blocks>.*)')
_BLOCK = re.compile(r'(?P<operator>[a-z]+)(?P<size>\d+)?/(?P<width>\d+)(?:\*(?P<count>\d+))?')


def _whole(owner: str, name: str, value: Any, least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f'{owner}: {name} must be an int of at least {least}, got {quoted(value)}')


@dataclass(frozen=True)
class Block:
    """One block.

    Args:
        operator: 'conv', 'local' or 'axial'.
        kernel_size: size of the convolution or the local window, odd; None for axial attention.
        width: channels of the operator.
    """

    operator: str
    kernel_size: int | None
    width: int

    def __post_init__(self) -> None:
        if self.operator not in OPERATORS:
            raise ValueError(f'there is no operator {quoted(self.operator)}; there are {", ".join(OPERATORS)}')
        _whole(str(self.operator), 'width', self.width)
        if self.operator == 'axial':
            if self.kernel_size is not None:
                raise ValueError(f'axial attention takes no size, got {self.kernel_size!r}')
        else:
            _whole(self.operator, 'its size', self.kernel_size)
            if self.kernel_size is not None and self.kernel_size % 2 == 0:
                raise ValueError(f'{self.operator}: its size must be odd, got {self.kernel_size}')

    def __str__(self) -> str:
        return f'{self.operator}{self.kernel_size or ""}/{self.width}'


@dataclass(frozen=True)
class Stage:
    """A stage: the width between its blocks, and the blocks."""

    width: int
    blocks: tuple[Block, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, 'blocks', tuple(self.blocks))

    def __str__(self) -> str:
        runs = [(block, len(list(same))) for block, same in itertools.groupby(self.blocks)]
        return f'{self.width}: ' + ' + '.join(f'{block}*{count}' if count > 1 else f'{block}' for block, count in runs)


@dataclass(frozen=True)
class Architecture:
    """One network.

    Args:
        image_size: height and width in px that it is built for; other sizes work, too.
        stem: width of the stem.
        reduction: 1 for a 3 x 3 stem at full resolution, 4 for ResNet's 7 x 7 with stride 2 and its max pool.
        heads: number of heads of all attentions.
        stages: one or more.

    Raises:
        ValueError: a wrong value; the width of an attention is not a multiple of 2 x heads.

    Examples:
        >>> a = Architecture.parse('image 32; stem 16; heads 4; 64: conv3/16*2; 128: axial/32')
        >>> a.stages[1].blocks
        (Block(operator='axial', kernel_size=None, width=32),)
        >>> Architecture.parse(str(a)) == Architecture.from_dict(a.to_dict()) == a
        True
    """

    image_size: int
    stem: int
    reduction: int
    heads: int
    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, 'stages', tuple(self.stages))
        for name in ('image_size', 'stem', 'heads'):
            _whole('architecture', name, getattr(self, name))
        if self.reduction not in REDUCTIONS:
            raise ValueError(f'architecture: the stem must reduce by 1 or 4, got {self.reduction!r}')
        if not self.stages:
            raise ValueError('architecture: there must be at least one stage')
        for number, stage in enumerate(self.stages, start=1):
            _whole(f'stage {number}', 'width', stage.width)
            if not stage.blocks:
                raise ValueError(f'stage {number} has no blocks')
            for block in stage.blocks:
                if block.operator != 'conv' and block.width % (2 * self.heads):
                    raise ValueError(
                        f'stage {number}: the width of {block} must be a multiple of 2 x heads = {2 * self.heads}'
                    )

    def __str__(self) -> str:
        stem = f'{self.stem}/{self.reduction}' if self.reduction > 1 else f'{self.stem}'
        return '; '.join([f'image {self.image_size}', f'stem {stem}', f'heads {self.heads}', *map(str, self.stages)])

    @property
    def operators(self) -> tuple[str, ...]:
        """The operator of every block."""
        return tuple(block.operator for stage in self.stages for block in stage.blocks)

    def places(self) -> Iterator[tuple[int, int, Block, int, int, int]]:
        """Every block with its position: (stage, number in it, block, channels in, stride, map height and width).

        The map is the block's input. Stages and blocks are counted from 0.
        """
        channels, size = self.stem, math.ceil(self.image_size / self.reduction)
        for i, stage in enumerate(self.stages):
            for j, block in enumerate(stage.blocks):
                stride = 2 if i > 0 and j == 0 else 1
                yield i, j, block, channels, stride, size
                channels, size = stage.width, math.ceil(size / stride)

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    def to_json(self) -> str:
        """The arguments as a JSON object."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Architecture:
        """Inverse of ``to_dict``. Raises ValueError for anything else."""
        try:
            stages = tuple(
                Stage(**{**stage, 'blocks': tuple(Block(**b) for b in stage['blocks'])}) for stage in value['stages']
            )
            return cls(**{**value, 'stages': stages})
        except (TypeError, KeyError) as error:
            raise ValueError(
                f'not an architecture: {quoted(value)} ({type(error).__name__}: {one_line(error)})'
            ) from None

    @classmethod
    def parse(cls, text: str) -> Architecture:
        """Parse the text form (see the module docstring) or JSON.

        Raises:
            ValueError: the text is invalid; the message gives the position.
        """
        if not isinstance(text, str):
            raise TypeError(f'an architecture is a text such as "{EXAMPLE}", got {text!r}')
        if text.lstrip().startswith('{'):
            return cls.from_dict(parse_json(text, 'an architecture'))
        head: dict[str, int] = {'reduction': 1}
        stages: list[Stage] = []
        for at, entry in _split(text, 0, ';'):
            if (match := _HEAD.fullmatch(entry)) and not stages:
                name = match['name']
                if name in head or (match['reduction'] and name != 'stem'):
                    raise _fail(text, at, f'{quoted(entry)} is given twice or has too many numbers')
                head[name] = int(match['number'])
                head['reduction'] = int(match['reduction'] or head['reduction'])
            elif match := _STAGE.fullmatch(entry):
                blocks = [b for place, term in _split(match['blocks'], at + match.start('blocks'), '+')
                          for b in _blocks(text, place, term)]  # fmt: skip
                stages.append(Stage(int(match['width']), tuple(blocks)))
            else:
                expected = (
                    'a stage, WIDTH: BLOCK + BLOCK' if stages else 'image, stem or heads with a number, or a stage'
                )
                raise _fail(text, at, f'{quoted(entry)} is not {expected}')
        missing = [name for name in ('image', 'stem', 'heads') if name not in head]
        if missing or not stages:
            raise ValueError(
                f'an architecture has image, stem, heads and stages, as in "{EXAMPLE}"; '
                f'{", ".join(missing) or "stages"} missing in {quoted(text)}'
            )
        return cls(head['image'], head['stem'], head['reduction'], head['heads'], tuple(stages))

    @classmethod
    def read(cls, path: str | Path) -> Architecture:
        """Read a file: an architecture as text or JSON, or the result of a search, which has one in 'architecture'.

        Raises:
            ValueError: no such file, or no architecture in it; the message names the file.
        """
        text = read_text(path, 'architecture')
        try:
            if text.startswith('{'):
                value = parse_json(text, 'an architecture')
                found = value.get('architecture', value)
                return cls.parse(found) if isinstance(found, str) else cls.from_dict(found)
            return cls.parse(text)
        except ValueError as error:
            raise ValueError(f'{path}: {error}') from None


EXAMPLE = 'image 32; stem 16; heads 4; 64: conv3/16*2; 128: local5/32 + axial/32'


def _split(text: str, at: int, by: str) -> Iterator[tuple[int, str]]:
    """The stripped parts of a text, each with its position."""
    for part in text.split(by):
        yield at + len(part) - len(part.lstrip()), part.strip()
        at += len(part) + 1


def _blocks(text: str, at: int, term: str) -> list[Block]:
    match = _BLOCK.fullmatch(term)
    if match is None:
        raise _fail(text, at, f'{quoted(term)} is not a block OPERATOR[SIZE]/WIDTH[*COUNT], such as local5/32*2')
    count = int(match['count'] or 1)
    try:
        if not 1 <= count <= 1000:
            raise ValueError('a count must be from 1 to 1000')
        return [Block(match['operator'], int(match['size']) if match['size'] else None, int(match['width']))] * count
    except ValueError as error:
        raise _fail(text, at, f'{quoted(term)}: {error}') from None


def _fail(text: str, at: int, what: str) -> ValueError:
    return ValueError(f'architecture: {what}, at character {at + 1} of {quoted(text)}')
