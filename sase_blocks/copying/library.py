"""The library's source: what each module defines and imports, and the text of each statement with its comments."""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = __name__.partition('.')[0]


@dataclass(frozen=True)
class Source:
    """A module of the library: its lines, what it defines, and what it imports under which name."""

    module: str
    lines: list[str]
    defs: dict[str, ast.stmt]
    imports: dict[str, tuple[str, str | None]]  # name -> module, name there; None for the module itself


@functools.cache
def source(module: str) -> Source:
    """The source of a module of the library."""
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    text = Path(spec.origin).read_text(encoding='utf-8')
    package = module if spec.origin.endswith('__init__.py') else module.rpartition('.')[0]
    defs: dict[str, ast.stmt] = {}
    imports: dict[str, tuple[str, str | None]] = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            defs[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            defs |= {name.id: node for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
        elif isinstance(node, ast.Import):
            imports |= {alias.asname or alias.name: (alias.name, None) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = package.split('.')
            base = '.'.join(parts[: len(parts) - node.level + 1]) if node.level else ''
            origin = '.'.join(filter(None, [base, node.module]))
            imports |= {alias.asname or alias.name: (origin, alias.name) for alias in node.names}
    return Source(module, text.splitlines(), defs, imports)


def find(module: str, name: str) -> tuple[str, str | None] | None:
    """Where a global name of a module comes from: a module and the name there (None: itself). None for a builtin."""
    while module.startswith(PACKAGE):
        here = source(module)
        if name in here.defs:
            return module, name
        if name not in here.imports:
            return None
        module, there = here.imports[name]
        if there is None:
            return module, None
        name = there
    return module, name


def segment(src: Source, node: ast.stmt, after: int | None = None) -> str:
    """The text of a statement with the comments above it, dedented, without remarks for mypy.

    Args:
        after: the comments begin after this line; None: without a blank line between.
    """
    first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, 'decorator_list', ()))])
    start = first if after is None else after + 1
    while after is None and re.match(r'\s*#(?! ?---)', src.lines[start - 2]):
        start -= 1
    text = textwrap.dedent('\n'.join(src.lines[start - 1 : node.end_lineno])).strip('\n')
    return re.sub(r'  # type: ignore\[[^]]*\]', '', text)


def body(src: Source, function: ast.FunctionDef) -> Iterator[str]:
    """The statements of a function after its docstring, each with the comments above it."""
    nodes = function.body
    # A comment above the first statement is below the line that ends the signature.
    end = nodes[0].lineno - 1
    while re.match(r'\s*#', src.lines[end - 1]):
        end -= 1
    if ast.get_docstring(function) is not None:
        end, nodes = nodes[0].end_lineno or 0, nodes[1:]
    for node in nodes:
        yield segment(src, node, end)
        end = node.end_lineno or 0


def reads(text: str) -> list[str]:
    """The global names that a piece of code reads, in order of appearance."""
    (tree,) = ast.parse(text).body
    scopes: list[ast.AST] = [tree]
    if isinstance(tree, ast.ClassDef):
        scopes = [*tree.decorator_list, *tree.bases, *tree.body]
    found = []
    for scope in scopes:
        names = [part for part in ast.walk(scope) if isinstance(part, ast.Name)]
        bound = {name.id for name in names if not isinstance(name.ctx, ast.Load)}
        bound |= {part.arg for part in ast.walk(scope) if isinstance(part, ast.arg)}
        found += sorted((name for name in names if name.id not in bound), key=lambda n: (n.lineno, n.col_offset))
    return list(dict.fromkeys(name.id for name in found))


def own_attributes(text: str) -> list[str]:
    """The attributes of ``self`` and ``super()`` that a text reads."""
    found = [part for part in ast.walk(ast.parse(text)) if isinstance(part, ast.Attribute)]
    return [
        part.attr for part in found if isinstance(part.ctx, ast.Load) and ast.unparse(part.value) in ('self', 'super()')
    ]
