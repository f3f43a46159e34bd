"""Names with options, such as ``mlp(reduction=4)``: the text form of primitives and blocks wherever a name is taken.

The options of a class or a builder are its keyword-only arguments besides ``device`` and ``dtype``. A value is an int,
a float, a bool, a string, None, or a tuple of these. No text is evaluated.
"""

from __future__ import annotations

import ast
import inspect
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sase_blocks.reading import quoted

LONGEST = 1000  # characters of a name with its options

_TOKEN = re.compile(r'"(?:\\.|[^"\\])*"|\'(?:\\.|[^\'\\])*\'|.', re.DOTALL)  # a quoted string, or one character
_CLOSING = {'(': ')', '[': ']', '{': '}'}


def split_names(text: str, separator: str = ',') -> list[str]:
    """Split at separators outside of brackets and quotes, and strip the parts.

    Raises:
        ValueError: a bracket or quote without its partner.

    Examples:
        >>> split_names('avg, mlp(reduction=4), conv_eca(gamma=3, beta=0)')
        ['avg', 'mlp(reduction=4)', 'conv_eca(gamma=3, beta=0)']
    """
    parts: list[str] = []
    open_brackets: list[str] = []
    start = 0
    for token in _TOKEN.finditer(text):
        character = token[0]
        if character == separator and not open_brackets:
            parts.append(text[start : token.start()].strip())
            start = token.end()
        elif character in _CLOSING:
            open_brackets.append(character)
        elif character in ('"', "'") or (
            character in _CLOSING.values() and (not open_brackets or _CLOSING[open_brackets.pop()] != character)
        ):
            raise ValueError(f'{character} has no partner in {quoted(text)}')
    if open_brackets:
        raise ValueError(f'{open_brackets[-1]} has no partner in {quoted(text)}')
    return [*parts, text[start:].strip()]


def parse_name(text: str) -> tuple[str, dict[str, Any]]:
    """The name and the options in ``'name'`` or ``'name(option=value, ...)'``, the inverse of ``format_name``.

    Raises:
        ValueError: any other text.

    Examples:
        >>> parse_name('cbam(reduction=8, kernel_size=3)')
        ('cbam', {'reduction': 8, 'kernel_size': 3})
    """
    name, bracket, rest = text.partition('(')
    if not bracket:
        return text.strip(), {}
    try:
        return name.strip(), _parse_call(f'f({rest.strip()}')
    except ValueError as error:
        raise ValueError(f'expected a name or name(option=value, ...), got {quoted(text)}: {error}') from None


def _parse_call(text: str) -> dict[str, Any]:
    """The keyword arguments of a call. Raises ValueError with the reason."""
    if len(text) > LONGEST:
        raise ValueError(f'it has more than {LONGEST} characters')
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('error')  # the parser warns about some wrong literals
            call = ast.parse(text, mode='eval').body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ValueError('it cannot be parsed') from None
    # No other brackets, operator, comment or line follow the call.
    end = (call.end_lineno, call.end_col_offset)
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or end != (1, len(text.encode())):
        raise ValueError('it cannot be parsed')
    options: dict[str, Any] = {}
    for keyword in (*(ast.keyword(None, value) for value in call.args), *call.keywords):
        if keyword.arg is None:
            raise ValueError('each value needs the name of its option')
        if keyword.arg in options:
            raise ValueError(f'{keyword.arg} is given twice')
        try:
            options[keyword.arg] = ast.literal_eval(keyword.value)
        except (ValueError, TypeError, RecursionError, MemoryError):
            raise ValueError(f'the value of {keyword.arg} is not a literal') from None
        check_value(keyword.arg, options[keyword.arg])
    return options


def check_value(option: str, value: Any) -> None:
    """Raise a ValueError unless the text of ``value`` reads back as the same value, here and from JSON."""
    for part in value if type(value) is tuple else (value,):
        if type(part) is tuple:
            check_value(option, part)
        elif not (
            part is None
            or type(part) in (bool, str)
            or (type(part) is int and abs(part) < 2**63)
            or (type(part) is float and math.isfinite(part))
        ):
            raise ValueError(
                f'{option} must be an int of at most 64 bits, a finite float, True, False, None, a string or a tuple '
                f'of these, got {quoted(part)}'
            )


def options_of(build: Callable[..., Any]) -> dict[str, Any]:
    """The options of a class or builder in the order of its signature, and their defaults."""
    parameters = inspect.signature(build).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in ('device', 'dtype')}


def describe_options(build: Callable[..., Any]) -> str:
    """The options of a class or builder and their defaults as text: ``'reduction=16, kernel_size=7'``."""
    return ', '.join(f'{option}={default!r}' for option, default in options_of(build).items())


def format_name(name: str, build: Callable[..., Any], options: Mapping[str, Any]) -> str:
    """The canonical text of a name with options: in the order of the signature, without those equal to the default.

    Raises:
        ValueError: an option that ``build`` does not have, or a value that is not a literal.
    """
    if not options:
        return name
    defaults, texts = options_of(build), []
    for option in options:
        if option not in defaults:
            raise ValueError(_no_option(option, {name: defaults}))
    for option, default in defaults.items():
        value = options.get(option, default)
        check_value(f'{name}: {option}', value)
        if isinstance(default, float) and type(value) is int:
            value = float(value)
        if repr(value) != repr(default):
            texts.append(f'{option}={value!r}')
    text = f'{name}({", ".join(texts)})' if texts else name
    if len(text) > LONGEST:
        raise ValueError(f'{quoted(text)} has more than {LONGEST} characters')
    return text


def add_options(names: Sequence[tuple[str, Callable[..., Any]]], options: Mapping[str, Any]) -> list[str]:
    """The names in their canonical text, with each of ``options`` added to the one name that has it.

    Args:
        names: names, maybe with options, and the class or builder of each.
        options: from keyword arguments.

    Raises:
        TypeError: an option that no name has, that several have, or that the name already gives.
        ValueError: as in ``format_name``.
    """
    parsed = [parse_name(text) for text, _ in names]
    own = [options_of(build) for _, build in names] if options else []
    for option, value in options.items():
        takers = [i for i, defaults in enumerate(own) if option in defaults]
        if not takers:
            raise TypeError(
                _no_option(option, {name: defaults for (name, _), defaults in zip(parsed, own, strict=True)})
            )
        name, given = parsed[takers[0]]
        if len(takers) > 1:
            raise TypeError(
                f'{", ".join(parsed[i][0] for i in takers)} each have an option {option}; write it with the name, '
                f"'{name}({option}={quoted(value)})'"
            )
        if option in given:
            raise TypeError(f'{option} is given twice, in {names[takers[0]][0]!r} and as {option}={quoted(value)}')
        given[option] = value
    return [format_name(name, build, given) for (name, given), (_, build) in zip(parsed, names, strict=True)]


def _no_option(option: str, owners: Mapping[str, Mapping[str, Any]]) -> str:
    """The message that none of the names in ``owners`` has an option."""
    if len(owners) == 1:
        ((name, own),) = owners.items()
        return f'{name} has no option {quoted(option)}; it has {"none" if not own else ", ".join(own)}'
    names = ', '.join(f'{name}({", ".join(own)})' if own else name for name, own in owners.items())
    return f'no option {quoted(option)} in {names}'
