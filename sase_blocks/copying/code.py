"""Lines of code as ruff formats them: signatures, methods, calls, docstrings."""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

WIDTH = 120


@dataclass(frozen=True)
class Parameter:
    """A parameter of a function. Annotation and default are code; an empty text: there is none."""

    name: str
    annotation: str = ''
    default: str = ''
    keyword: bool = False

    def __str__(self) -> str:
        text = f'{self.name}: {self.annotation}' if self.annotation else self.name
        return f'{text} = {self.default}' if self.default else text


DEVICE_AND_DTYPE = (Parameter('device', 'Any', 'None', True), Parameter('dtype', 'Any', 'None', True))


def parameters(function: ast.FunctionDef) -> list[Parameter]:
    """The parameters of a method; ``self`` and ``**kwargs`` are left out."""

    def one(arg: ast.arg, default: ast.expr | None, keyword: bool = False) -> Parameter:
        annotation = ast.unparse(arg.annotation) if arg.annotation else ''
        return Parameter(arg.arg, annotation, ast.unparse(default) if default else '', keyword)

    plain = function.args.args
    defaults = [None] * (len(plain) - len(function.args.defaults)) + list(function.args.defaults)
    keywords = zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True)
    found = [*map(one, plain, defaults), *(one(arg, default, True) for arg, default in keywords)]
    return [p for p in found if p.name != 'self']


def fit(before: str, items: Sequence[str], after: str, indent: int) -> str:
    """A call or signature in one line, its items in a line of their own, or each in one, as ruff formats it."""
    line = f'{before}{", ".join(items)}{after}'
    if indent + len(line) <= WIDTH:
        return line
    inner = ', '.join(items)
    if indent + 4 + len(inner) <= WIDTH:
        return f'{before}\n    {inner}\n{after}'
    return '\n'.join([before, *(f'    {item},' for item in items), after])


def define(
    like: ast.FunctionDef, name: str, statements: Sequence[str], params: Sequence[Parameter] | None = None
) -> str:
    """A method with other statements than ``like``, and maybe another name and other parameters."""
    params = parameters(like) if params is None else params
    items = ['self', *(str(p) for p in params if not p.keyword)]
    if any(p.keyword for p in params):
        items += ['*', *(str(p) for p in params if p.keyword)]
    returns = ast.unparse(like.returns) if like.returns else 'None'
    decorators = [f'@{ast.unparse(decorator)}' for decorator in like.decorator_list]
    lines = [*decorators, fit(f'def {name}(', items, f') -> {returns}:', 4)]
    return '\n'.join([*lines, *(textwrap.indent(text, '    ') for text in statements)])


def call(name: str, arguments: Sequence[str]) -> str:
    """A call in one line."""
    return f'{name}({", ".join(arguments)})'


def put(statement: str, given: Mapping[str, str]) -> str:
    """A statement of one line of a constructor with expressions in place of names."""
    found = [n for n in ast.walk(ast.parse(statement)) if isinstance(n, ast.Name) and n.id in given]
    if not found:
        return statement
    for name in sorted(found, key=lambda name: -name.col_offset):
        statement = statement[: name.col_offset] + given[name.id] + statement[name.end_col_offset :]
    return break_call(statement)


def break_call(statement: str) -> str:
    """A statement that ends in a call, in a constructor, over as many lines as it needs."""
    if len(statement) + 8 <= WIDTH:
        return statement
    node = ast.parse(statement).body[0]
    assert isinstance(node, ast.Assign | ast.Expr)
    assert isinstance(node.value, ast.Call)
    inside: list[Any] = [*node.value.args, *node.value.keywords]
    before = statement[: inside[0].col_offset]
    return fit(before, [statement[part.col_offset : part.end_col_offset] for part in inside], ')', 8)


def docstring(text: str, dropped: Iterable[str] = ()) -> str:
    """A docstring without examples and without the entries of parameters that are not copied."""
    text = re.sub(r'\n*Examples:\n(?:(?: .*)?\n?)*', '', text).rstrip()
    for name in dropped:
        text = re.sub(rf'\n    {name}: .*(?:\n        .*)*', '', text)
        text = re.sub(rf'(\n    (?:\w+, )*?){name}, (?=\w)', r'\1', text)
    text = re.sub(r'\n\nArgs:(?=\n\n|$)', '', text)
    return f'"""{text}"""' if '\n' not in text else f'"""{text}\n"""'
