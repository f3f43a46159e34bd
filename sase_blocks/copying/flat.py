"""Flat classes: a block or a primitive with all that it inherits in the library, and without what it does not use."""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from sase_blocks.blocks import AttentionModule
from sase_blocks.ops import Primitive

from .code import Parameter, call, define, docstring, parameters, put
from .library import PACKAGE, Source, body, find, own_attributes, reads, segment, source


@dataclass(frozen=True)
class Member:
    """Something in the body of a class: a method, or a constant."""

    name: str
    node: ast.FunctionDef | ast.Assign | ast.AnnAssign
    src: Source

    @property
    def text(self) -> str:
        return segment(self.src, self.node)


def members_of(src: Source, cls: ast.ClassDef) -> Iterator[Member]:
    """What a class defines, without abstract methods."""
    for node in cls.body:
        if isinstance(node, ast.FunctionDef):
            if 'abstractmethod' not in map(ast.unparse, node.decorator_list):
                yield Member(node.name, node, src)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            yield Member(ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target), node, src)


@dataclass(frozen=True)
class Flat:
    """A block or primitive with the classes of the library that it derives from, itself first, its root last."""

    classes: tuple[tuple[Source, ast.ClassDef], ...]

    @property
    def is_block(self) -> bool:
        return self.classes[-1][1].name == AttentionModule.__name__

    @property
    def doc(self) -> str:
        return ast.get_docstring(self.classes[0][1]) or ''

    def member(self, name: str, start: int = 0) -> tuple[int, Member] | None:
        """The member of a name, and the number of the class that defines it, from number ``start`` on."""
        for i, (src, cls) in enumerate(self.classes[start:], start):
            for member in members_of(src, cls):
                if member.name == name:
                    return i, member
        return None

    def method(self, name: str) -> ast.FunctionDef:
        found = self.member(name)
        assert found is not None
        assert isinstance(found[1].node, ast.FunctionDef)
        return found[1].node

    def lines(self, name: str, start: int = 0) -> list[str]:
        """The statements of a method, with those of the inherited method in place of ``super()``'s call."""
        found = self.member(name, start)
        if found is None:
            return []
        number, member = found
        if not isinstance(member.node, ast.FunctionDef):
            return [member.text]
        lines: list[str] = []
        for text in body(member.src, member.node):
            inherited = self.lines(name, number + 1) if text.startswith(f'super().{name}(') else []
            lines += inherited or [text]
        return lines


def flat(module: str, name: str) -> Flat | None:
    """A class of the library as a flat one, or None if it is neither a block nor a primitive."""
    classes: list[tuple[Source, ast.ClassDef]] = []
    origin: tuple[str, str | None] | None = (module, name)
    while origin is not None and origin[0].startswith(PACKAGE) and origin[1] is not None:
        src = source(origin[0])
        node = src.defs[origin[1]]
        if not isinstance(node, ast.ClassDef):
            break
        classes.append((src, node))
        if node.name in (AttentionModule.__name__, Primitive.__name__):
            return Flat(tuple(classes))
        base = next((base.id for base in node.bases if isinstance(base, ast.Name)), None)
        origin = find(src.module, base) if base else None
    return None


@dataclass
class Written:
    """A class of the copy: its text, the modules in which its names have a meaning, the parameters it is built with."""

    text: str
    modules: tuple[str, ...]
    parameters: list[str]


def forward_of(cls: Flat, channels: str | None) -> tuple[str, list[str]]:
    """The method that forward is made of, and its statements.

    A block checks its input and then does what ``attend`` says. A primitive leaves the check to the block, and forward
    that does nothing but call another method is that method.
    """
    if cls.is_block and cls.method('forward') in cls.classes[-1][1].body:
        return 'attend', [call('check_features', ['x', channels or 'self.current_channels()']), *cls.lines('attend')]
    lines = [line for line in cls.lines('forward') if cls.is_block or not line.startswith('check_features(')]
    only = re.fullmatch(r'return self\.(\w+)\(\w+\)', lines[0]) if len(lines) == 1 and not cls.is_block else None
    return (only[1], cls.lines(only[1])) if only else ('forward', lines)


def constructor_of(cls: Flat, used: Iterable[str]) -> list[str]:
    """The statements of the constructor. Those of a primitive that store what nothing uses are left out."""
    lines = cls.lines('__init__')
    while not cls.is_block:
        read = {*used, *(name for line in lines for name in own_attributes(line))}
        stored = [re.match(r'self\.(\w+) = ', line) for line in lines]
        needed = [line for line, match in zip(lines, stored, strict=True) if match is None or match[1] in read]
        if needed == lines:
            break
        lines = needed
    return lines


def write_flat(
    cls: Flat,
    name: str,
    *,
    doc: str | None = None,
    defaults: Mapping[str, object] | None = None,
    params: Sequence[Parameter] | None = None,
    given: Mapping[str, str] | None = None,
    channels: str | None = None,
    facts: Mapping[str, bool] | None = None,
) -> Written:
    """A flat class of the copy.

    Args:
        doc: its docstring. Default: the library's.
        defaults: of its parameters, where they are not the library's.
        params: its parameters. Default: those of the library that it uses.
        given: expressions in place of the parameters of the library's constructor.
        channels: the number of channels in its parameters, an expression. Default: the library's.
        facts: see ``settle``.
    """
    facts = facts or {}
    method, forward = forward_of(cls, channels)
    forward = [settle(line, facts) for line in forward]
    kept: dict[str, tuple[int, Member]] = {}
    while True:
        used = {a for line in forward for a in own_attributes(line)}
        used |= {a for attribute in kept for line in cls.lines(attribute) for a in own_attributes(settle(line, facts))}
        settled = {fact for fact in facts if fact.removeprefix('self.') not in used}
        init = [line for line in constructor_of(cls, used) if line.partition(' = ')[0] not in settled]
        used |= {a for line in init for a in own_attributes(line)}
        found = {a: cls.member(a) for a in used - kept.keys() - {method, '__init__', 'forward'}}
        new = {a: member for a, member in found.items() if member is not None}
        if not new:
            break
        kept |= new
    constants, methods = [], []
    for attribute, (_, member) in sorted(kept.items(), key=lambda item: (item[1][0], item[1][1].node.lineno)):
        if not isinstance(member.node, ast.FunctionDef):
            constants.append(member.text)
        elif cls.lines(attribute) == list(body(member.src, member.node)):
            methods.append(settle(member.text, facts))
        else:
            methods.append(define(member.node, attribute, cls.lines(attribute)))
    own = cls.method('__init__')
    if params is None:
        loaded = [n for line in init for n in reads(line)]
        params = [p for p in parameters(own) if p.name != 'feat_size' or 'feat_size' in loaded]
        changed = defaults or {}
        params = [replace(p, default=repr(changed[p.name])) if p.name in changed else p for p in params]
    dropped = {'feat_size', *(p.name for p in parameters(own))} - {p.name for p in params}
    parts = [docstring(cls.doc if doc is None else doc, dropped)]
    parts += ['\n'.join(constants)] if constants else []
    if init == ['super().__init__()']:
        params = []
    else:
        parts.append(define(own, '__init__', [put(line, given or {}) for line in init], params))
    parts += [*methods, define(cls.method(method), 'forward', forward)]
    modules = tuple(dict.fromkeys(src.module for src, _ in cls.classes))
    text = f'class {name}(nn.Module):\n' + textwrap.indent('\n\n'.join(parts), '    ')
    return Written(text, modules, [p.name for p in params])


def settle(code: str, facts: Mapping[str, bool]) -> str:
    """Code in which some conditions are settled. What is stored for a condition alone is not needed then.

    Args:
        facts: conditions of expressions ``a if condition else b``, and layers that are the identity if True.
    """
    for node in ast.walk(ast.parse(code)) if facts else ():
        kept: ast.expr | None = None
        if isinstance(node, ast.IfExp) and ast.unparse(node.test) in facts:
            kept = node.body if facts[ast.unparse(node.test)] else node.orelse
        elif isinstance(node, ast.Call) and facts.get(ast.unparse(node.func), False):
            kept = node.args[0]
        if kept is not None:
            whole, part = ast.get_source_segment(code, node), ast.get_source_segment(code, kept)
            assert whole is not None
            assert part is not None
            return settle(code.replace(whole, part), facts)
    return code
