"""Read text that users give on the command line and in files (JSON, TOML), write TOML, and show text in messages.

Wrong text raises a ValueError of one line that quotes at most a line of the text.
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar('T')
QUOTED = 100  # characters of a value that a message shows
DEPTH = 20  # levels of nested JSON; nothing in this package needs more than five


def shorten(text: str, most: int = QUOTED) -> str:
    """A text, cut in the middle to at most ``most`` characters."""
    if len(text) <= most:
        return text
    more = f' ... ({len(text):,} characters) ... '
    kept = most - len(more)
    return text[: kept - kept // 3] + more + text[len(text) - kept // 3 :]


def quoted(value: Any) -> str:
    """``repr(value)`` for a message, at most ``QUOTED`` characters of it."""
    try:
        return shorten(repr(value))
    except RecursionError:
        return f'a deeply nested {type(value).__name__}'


def one_line(error: BaseException, most: int = 1000) -> str:
    """The message of an exception in one line of at most ``most`` characters; its class if it has no message."""
    lines = str(error).strip().splitlines()
    if 'Traceback (most recent call last):' in lines:  # of a loading process; the last line is the error
        lines = lines[-1:]
    # Leave out torch's own stack frames.
    lines = list(itertools.takewhile(lambda line: not line.startswith('Exception raised from '), lines))
    return shorten(' '.join(' '.join(lines).split()), most) or type(error).__name__


def printable(text: str, keep: str = '') -> str:
    """A text for a terminal, with escapes for bytes that are not UTF-8 and for control characters except ``keep``.

    The name of a file may contain both.
    """
    return ''.join(c if c.isprintable() or c in keep else ascii(c)[1:-1] for c in text)


def some(names: Sequence[str]) -> str:
    """The first five names for a message, and the number of the others; 'none' for an empty list."""
    return (', '.join(map(printable, names[:5])) + (f' and {len(names) - 5} more' if len(names) > 5 else '')) or 'none'


def table(rows: Sequence[Mapping[str, str]], left: Collection[str]) -> list[str]:
    """The lines of a table: the keys of the rows, a rule, the values. Columns in ``left`` are aligned to the left."""
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in rows[0]}
    lines = [
        '  '.join(f'{row[name]:{"<" if name in left else ">"}{width}}' for name, width in widths.items()).rstrip()
        for row in [dict(zip(widths, widths, strict=True)), *rows]
    ]
    return [lines[0], '-' * max(map(len, lines)), *lines[1:]]


def read_text(path: str | os.PathLike[str], what: str) -> str:
    """The text of a UTF-8 file, stripped; ``what`` names its kind.

    Raises:
        ValueError: no such file, no regular file, not UTF-8, or empty; the message names the file.
    """
    path, reason = Path(path), ''
    try:
        if path.exists() and not path.is_file():  # a pipe would never end
            reason = 'it is no regular file'
        else:
            text = path.read_text(encoding='utf-8').strip()
    except UnicodeDecodeError:
        reason = 'it is no UTF-8 text'
    except OSError as error:
        reason = error.strerror or str(error)
    if reason:
        raise ValueError(f'the {what} file {path} cannot be read: {reason}')
    if not text:
        raise ValueError(f'the {what} file {path} is empty')
    return text


def parse_file(path: str | os.PathLike[str], what: str, parse: Callable[[str], T]) -> T:
    """``parse`` the text of a file, see ``read_text``. A ValueError names the file."""
    text = read_text(path, what)
    try:
        return parse(text)
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from None


def parse_json(text: str, what: str) -> Any:
    """The value of a JSON text; ``what``, with its article, names the expected kind.

    Raises:
        ValueError: no valid JSON, or nested deeper than ``DEPTH`` levels.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(f'not {what}: {quoted(text)} is nested too deeply') from None
    except ValueError as error:
        raise ValueError(f'not {what}: {quoted(text)} is no valid JSON ({one_line(error, QUOTED)})') from None
    level: list[Any] = [value]
    for _ in range(DEPTH):
        inner = [one.values() if isinstance(one, dict) else one for one in level if isinstance(one, (dict, list))]
        level = [one for values in inner for one in values]
    if level:
        raise ValueError(f'not {what}: {quoted(text)} is nested too deeply')
    return value


def parse_toml(text: str) -> dict[str, Any]:
    """The values of a TOML text.

    Raises:
        ValueError: no valid TOML.
        ImportError: Python 3.10 without tomli.
    """
    name = 'tomllib' if sys.version_info >= (3, 11) else 'tomli'
    try:
        toml: Any = importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f'Python 3.10 needs tomli to read TOML ({error}): pip install "sase-blocks[train]"'
        ) from error
    try:
        values: dict[str, Any] = toml.loads(text)
        return values
    except RecursionError:
        raise ValueError('no valid TOML: nested too deeply') from None
    except ValueError as error:
        raise ValueError(f'no valid TOML ({one_line(error, QUOTED)})') from None


def format_toml(value: Any) -> str:
    """A value as TOML: None becomes the text "None", a nested dict an inline table.

    Raises ValueError for a text that is not Unicode (the name of a file may be such), or a value of another type.
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str) or value is None:
        text = str(value)
        if any('\ud800' <= c <= '\udfff' for c in text):
            raise ValueError(f'{quoted(text)} is no Unicode text')
        return json.dumps(text, ensure_ascii=False).replace('\x7f', '\\u007f')
    if isinstance(value, list | tuple):
        return f'[{", ".join(map(format_toml, value))}]'
    if isinstance(value, dict):
        return '{' + ', '.join(f'{format_toml(key)} = {format_toml(item)}' for key, item in value.items()) + '}'
    raise ValueError(f'{quoted(value)} has no form in TOML')
