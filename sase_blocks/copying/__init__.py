"""Copy blocks out of the library into one file that needs only torch.

The file is put together from the library's own source, with its comments and docstrings. Names are followed from the
wanted block to all that it uses. A block or a primitive becomes one flat class: what it inherits stands in it, and what
it does not use is left out (drawing, pruning, the fade of ``insert``, lookup by name). An instance on the meta device
says which primitives a composition has. Everything else is copied as it stands.
"""

from __future__ import annotations

import difflib
import keyword
import re
import shlex
from collections.abc import Sequence

from sase_blocks.blocks import BLOCKS, block_name
from sase_blocks.ops.options import parse_name, split_names
from sase_blocks.reading import quoted

from .file import COPYRIGHT, LAYERS, PROG, Copy, digest

__all__ = ['COPYRIGHT', 'LAYERS', 'check_copy', 'copy_blocks']


def copy_blocks(names: Sequence[str], file: str = 'FILE') -> str:
    """The text of a Python file with the blocks, which needs only torch.

    Args:
        names: what ``create_block`` takes as text, ``LocalSelfAttention``, ``AxialSelfAttention`` or ``TrioBlock``.
            ``'Mine=se(reduction=4)'`` names the class. Options become the defaults of the class.
        file: the file's name, for the command in its header.

    Raises:
        ValueError: an unknown block or option, or a class name that is no identifier or is used twice.
    """
    if not names:
        raise ValueError(f'name at least one block to copy: {", ".join([*BLOCKS, *LAYERS])}')
    copy = Copy()
    wanted: dict[str, str] = {}
    for text in names:
        name, block = _read(text)
        if name in wanted:
            raise ValueError(f'two blocks would be the class {name}; name one of them, NAME={quoted(text)}')
        wanted[name] = block
        copy.origins[name] = (LAYERS[block].__module__ if name == block else '', name)
    canonical = [text if name == _class_name(text) else f'{name}={text}' for name, text in wanted.items()]
    papers = [paper for name, block in wanted.items() for paper in copy.export(name, block)]
    return copy.text(list(wanted), list(dict.fromkeys(papers)), canonical, file)


def check_copy(text: str) -> tuple[str, str]:
    """Compare a copied file with what the installed version would copy now.

    Args:
        text: of the file.

    Returns:
        'unchanged', 'changed by hand' or 'out of date', and the difference as a unified diff: from the installed
        version's copy to the file if it was changed by hand, or from the file to it if it is out of date.

    Raises:
        ValueError: the text is no copied file.
    """
    header = re.match(r'# Copied from sase-blocks (\S+) by\n((?:#     .*\n)+)', text)
    found = re.search(r'^# sha256 of the rest: ([0-9a-f]{64})$', text, re.MULTILINE)
    if header is None or found is None:
        raise ValueError("it does not start with the header of a file that 'sase-blocks copy' wrote")
    try:
        words = shlex.split(header[2].replace('#     ', '').replace('\\\n', ' '))
    except ValueError:
        words = []
    if words[:2] != [PROG, 'copy'] or words[-2:-1] != ['-o']:
        raise ValueError(f'its header has no command of the form {PROG} copy NAME -o FILE: {quoted(header[2])}')
    fresh = copy_blocks(words[2:-2], words[-1])
    if fresh == text:
        return 'unchanged', ''
    if found[1] != digest(text):
        return 'changed by hand', _diff(fresh, text, 'installed', words[-1])
    return 'out of date', _diff(text, fresh, words[-1], 'installed')


def _diff(old: str, new: str, old_name: str, new_name: str) -> str:
    lines = difflib.unified_diff(old.splitlines(), new.splitlines(), old_name, new_name, lineterm='')
    return '\n'.join(lines)


def _read(text: str) -> tuple[str, str]:
    """The name of the class and the canonical text of the block."""
    given = re.match(r'\s*([^\s=(,]+)\s*=(.*)', text, re.DOTALL)
    name, text = (given[1], given[2].strip()) if given else ('', text.strip())
    if name and (not name.isidentifier() or not name.isascii() or keyword.iskeyword(name)):
        raise ValueError(f'{quoted(name)} cannot be the name of a class')
    if text in LAYERS:
        return name or text, text
    if len(split_names(text)) == 1 and parse_name(text)[0] in LAYERS:
        raise ValueError(
            f'{parse_name(text)[0]} is copied with its own defaults; leave out the options in {quoted(text)}'
        )
    try:
        text = block_name(text)
    except ValueError as error:
        if not str(error).startswith('unknown attention block'):
            raise
        raise ValueError(f'{error}; or {", ".join(LAYERS)}') from None
    return name or _class_name(text), text


def _class_name(text: str) -> str:
    """The name of a block's class: its own, the block's name in capitals, or for a genotype ``Attention``."""
    name = parse_name(text)[0] if len(split_names(text)) == 1 else ''
    build = {**BLOCKS, **LAYERS}.get(name)
    if isinstance(build, type):
        return build.__name__
    first, *rest = name.split('_')
    return first.upper() + ''.join(map(str.capitalize, rest)) or 'Attention'
