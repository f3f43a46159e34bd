"""Copy blocks out of the library into one file that needs only torch.

The file is put together from the library's own source, with its comments and docstrings. Names are followed from the
wanted block to all that it uses. A block or a primitive becomes one flat class: what it inherits stands in it, and what
it does not use is left out (drawing, pruning, the fade of ``insert``, lookup by name). An instance on the meta device
says which primitives a composition has. Everything else is copied as it stands.
"""

from __future__ import annotations

import ast
import difflib
import functools
import hashlib
import importlib.util
import inspect
import keyword
import re
import shlex
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from sase_blocks import __version__
from sase_blocks.blocks import (
    BLOCKS,
    AttentionBlock,
    AttentionModule,
    ChannelAttention,
    ParallelAttention,
    SpatialAttention,
    block_name,
    resolve_block,
)
from sase_blocks.blocks.attention import SixEdges
from sase_blocks.blocks.compose import ChannelGate, ParallelGate, SpatialGate
from sase_blocks.ops import SETS
from sase_blocks.ops.options import parse_name, split_names
from sase_blocks.ops.primitive import Primitive
from sase_blocks.reading import quoted
from sase_blocks.selfattention import AxialSelfAttention, LocalSelfAttention, TrioBlock

PACKAGE = __name__.partition('.')[0]
COPYRIGHT = 'Copyright (c) 2026 The sase-blocks authors'
WIDTH = 120
LAYERS: dict[str, type[nn.Module]] = {cls.__name__: cls for cls in (LocalSelfAttention, AxialSelfAttention, TrioBlock)}
# What stands in a copy in place of what needs Triton.
INSTEAD = {'local_attention': 'torch_attention', 'LOCAL_ROUTES': 'TORCH_ROUTES'}
# Methods that only the library and timm call.
LEFT_OUT = ('extra_repr', 'multiply_adds', 'no_weight_decay')
# The first version of torch with what a copy uses, where that is later than 2.1.
FIRST_TORCH = {'torch.is_autocast_enabled(': (2, 4), 'bool(torch.compiler.is_exporting())': (2, 7)}


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
    docs = [copy.export(name, block) for name, block in wanted.items()]
    papers = list(dict.fromkeys(paper for doc in docs for paper in re.findall(r'arXiv \d{4}\.\d{4,5}', doc)))
    return copy.text(list(wanted), papers, names, file)


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
    installed = f'sase-blocks {__version__}'
    if found[1] != _digest(text):
        return 'changed by hand', _diff(fresh, text, installed, words[-1])
    return 'out of date', _diff(text, fresh, words[-1], installed)


PROG = 'sase-blocks'


def _digest(text: str) -> str:
    """The hash of a file's text without the line that states it."""
    return hashlib.sha256(
        re.sub(r'^# sha256 of the rest: .*\n', '', text, count=1, flags=re.MULTILINE).encode()
    ).hexdigest()


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
    build = BLOCKS.get(name)
    if isinstance(build, type):
        return build.__name__
    first, *rest = name.split('_')
    return first.upper() + ''.join(map(str.capitalize, rest)) or 'Attention'


# ------------------------------------------------------------------------------------------------- the library's source


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


# ------------------------------------------------------------------------------------------------------- lines of code


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


# -------------------------------------------------------------------------------------------------------- flat classes


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
    dropped = {p.name for p in parameters(own)} - {p.name for p in params}
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


# ------------------------------------------------------------------------------------------------------------ the file

# What builds a composition from ready-made primitives.
CORES: dict[type[nn.Module], Any] = {
    ChannelAttention: ChannelGate,
    SpatialAttention: SpatialGate,
    ParallelAttention: ParallelGate,
    AttentionBlock: SixEdges,
}

# A primitive, its name with options, and other arguments of its constructor.
Part = tuple[nn.Module, str, dict[str, object]]


def parts_of(module: Any) -> tuple[dict[str, list[Part]], dict[str, bool]]:
    """The primitives of a composition by the parameters of its core, and what is settled in its code."""
    acts = [name for name in ('act', 'channel_act', 'spatial_act') if hasattr(module, name)]
    facts = {f'self.{name}': isinstance(getattr(module, name), nn.Identity) for name in acts}
    facts |= {f'self.{name}': getattr(module, name) for name in ('add', 'joint') if hasattr(module, name)}
    if isinstance(module, ChannelAttention | SpatialAttention):
        squeezes, excite = module._names
        several = len(squeezes) > 1
        maps: dict[str, object] = {'maps': len(squeezes)} if several and isinstance(module, SpatialAttention) else {}
        parts: list[Part] = [(part, name, {}) for part, name in zip(module.squeeze, squeezes, strict=True)]
        return {'squeeze': parts, 'excite': [(module.excite, excite, maps)]}, facts | {'len(self.squeeze) > 1': several}
    names = (
        dict(zip(SETS, module._names, strict=True))
        if isinstance(module, ParallelAttention)
        else module.genotype.to_dict()
    )
    return {edge: [(getattr(module, edge), name, {})] for edge, name in names.items()}, facts


def flat_of(module: nn.Module) -> Flat:
    """The flat class of a block or primitive."""
    cls = flat(type(module).__module__, type(module).__name__)
    assert cls is not None, type(module)
    return cls


def channels_of(cls: Flat, module: nn.Module) -> str:
    """The number of channels in the parameters of a block or primitive, as an expression."""
    lines = cls.lines('current_channels')
    text = lines[0].removeprefix('return ') if len(lines) == 1 else 'self.current_channels()'
    part = re.fullmatch(r'self\.(\w+)\.current_channels\(\)', text)
    if part is None:
        return text
    child = module.get_submodule(part[1])
    return re.sub(r'\bself\b', f'self.{part[1]}', channels_of(flat_of(child), child))


class Copy:
    """The parts of the file, each after those that it uses."""

    def __init__(self) -> None:
        self.pieces: dict[str, str] = {}
        self.origins: dict[str, tuple[str, str | None]] = {}
        self.imports: set[tuple[str, str, str | None]] = set()  # name, module, name there

    def add(self, name: str, text: str, modules: Iterable[str]) -> None:
        """Add a piece of code after what it reads; ``modules`` say what its names mean."""
        for read in reads(text):
            self.need(modules, read)
        self.pieces[name] = re.sub(rf'\b({"|".join(INSTEAD)})\b', lambda match: INSTEAD[match[0]], text)

    def need(self, modules: Iterable[str], name: str) -> None:
        """Add what a name means in the first of the modules that knows it."""
        origin = next((origin for module in modules if (origin := find(module, name)) is not None), None)
        if origin is None or self.origins.get(name) == origin:
            return
        if name in self.origins:
            raise ValueError(
                f'{name} is also the name of {".".join(map(str, origin))}, which is copied; choose another'
            )
        self.origins[name] = origin
        module, there = origin
        if there is None or not module.startswith(PACKAGE):
            self.imports.add((name, module, there))
            return
        there = INSTEAD.get(there, there)
        src = source(module)
        node = src.defs[there]
        cls = flat(module, there)
        if cls is not None:
            self.add(there, write_flat(cls, there).text, [src.module for src, _ in cls.classes])
        else:
            self.add(there, plain(src, node), [module])

    def export(self, name: str, block: str) -> str:
        """Add a block as a class of this name. Returns its docstring."""
        if block in LAYERS:
            src = source(LAYERS[block].__module__)
            text = plain(src, src.defs[block])
            self.add(name, re.sub(rf'^class {block}\b', f'class {name}', text, flags=re.MULTILINE), [src.module])
            return inspect.getdoc(LAYERS[block]) or ''
        module = resolve_block(block)(64, feat_size=8, device='meta')
        if len(split_names(block)) > 1:
            doc = f'The block of SASE (arXiv 2411.08333), y = x * (1 + (c + a) / 2), with the genotype\n\n{block}.'
            self.compose(name, module, doc, [])
            return doc
        named, values = parse_name(block)
        doc = inspect.cleandoc(BLOCKS[named].__doc__ or '')
        if isinstance(module, (*CORES, nn.Sequential)):
            self.compose(name, module, doc, options_of_block(named, values))
            return doc
        cls = flat_of(module)
        if not isinstance(BLOCKS[named], type):  # the function's first line, and the arguments of the class
            doc = '\n\n'.join([doc, *cls.doc.split('\n\n')[1:]])
        defaults = {**constants_of(named), **values}
        written = write_flat(cls, name, doc=doc, defaults=defaults, channels=channels_of(cls, module))
        self.add(name, written.text, written.modules)
        return doc

    def compose(self, name: str, module: nn.Module, doc: str, options: Sequence[Parameter]) -> list[str]:
        """Add a composition like ``module``. Returns the parameters that it is built with."""
        if isinstance(module, nn.Sequential):
            return self.chain(name, module, doc, options)
        groups, facts = parts_of(module)
        modules = [__name__, *(type(part).__module__ for parts in groups.values() for part, _, _ in parts)]
        given, taken = {}, set()
        for edge, parts in groups.items():
            calls = []
            for part, text, more in parts:
                values = {**parse_name(text)[1], **more}
                arguments = []
                for parameter in write_flat(flat_of(part), '').parameters:
                    if parameter in ('channels', 'feat_size'):
                        arguments.append(parameter)
                    elif parameter in ('device', 'dtype', *(option.name for option in options)):
                        arguments.append(f'{parameter}={parameter}')
                    elif parameter in values:
                        arguments.append(f'{parameter}={values[parameter]!r}')
                    else:
                        continue
                    taken.add(parameter)
                calls.append(call(type(part).__name__, arguments))
            given[edge] = f'[{", ".join(calls)}]' if edge == 'squeeze' else calls[0]
        given |= {fact.removeprefix('self.'): 'nn.Sigmoid()' for fact in facts if fact.endswith('act')}
        core = next(CORES[cls] for cls in type(module).__mro__ if cls in CORES)
        cls = flat(core.__module__, core.__name__)
        assert cls is not None
        size = [Parameter('feat_size', 'int | tuple[int, int] | None', 'None')] if 'feat_size' in taken else []
        params = [Parameter('channels', 'int'), *size, *(o for o in options if o.name in taken), *DEVICE_AND_DTYPE]
        channels = channels_of(cls, module)
        written = write_flat(cls, name, doc=doc, params=params, given=given, channels=channels, facts=facts)
        self.add(name, written.text, [*written.modules, *modules])
        return [p.name for p in params]

    def chain(self, name: str, blocks: nn.Sequential, doc: str, options: Sequence[Parameter]) -> list[str]:
        """Add compositions in sequence. Returns the parameters that the sequence is built with."""
        parts = []
        for block in blocks:
            kind = 'Channel' if isinstance(block, ChannelAttention) else 'Spatial'
            made = self.compose(f'{name}{kind}', block, f'The {kind.lower()} attention of {name}.', options)
            arguments = [n if n in ('channels', 'feat_size') else f'{n}={n}' for n in made]
            parts.append(call(f'{name}{kind}', arguments))
        params = [Parameter('channels', 'int'), *options, *DEVICE_AND_DTYPE]
        own = ast.parse('def __init__(self) -> None: ...').body[0]
        assert isinstance(own, ast.FunctionDef)
        init = define(own, '__init__', [break_call(call('super().__init__', parts))], params)
        text = textwrap.indent(f'{docstring(doc)}\n\n{init}', '    ')
        self.add(name, f'class {name}(nn.Sequential):\n{text}', [__name__])
        return [p.name for p in params]

    def text(self, exported: Sequence[str], papers: Sequence[str], names: Sequence[str], file: str) -> str:
        """The whole file."""
        listed = f'__all__ = {[*exported]!r}'
        if len(listed) > WIDTH:
            listed = '\n'.join(['__all__ = [', *(f'    {name!r},' for name in exported), ']'])
        code = '\n\n\n'.join([listed, *self.pieces.values()])
        needs = max([(2, 1), *(version for text, version in FIRST_TORCH.items() if text in code)])
        command = shlex.join([PROG, 'copy', *names, '-o', file])
        sources = f'Papers: {", ".join(papers)}. ' if papers else ''
        if len(command) > WIDTH - 6:  # one name a line
            command = ' \\\n'.join([f'{PROG} copy', *map(shlex.quote, names), f'-o {shlex.quote(file)}'])
        header = [
            f'Copied from sase-blocks {__version__} by',
            textwrap.indent(command, '    '),
            f'It needs only torch {needs[0]}.{needs[1]} and Python 3.10, or later. '
            f'{PROG} copy --check FILE compares it with the library.',
            *(['It leaves out the Triton route of local self-attention.'] if 'torch_attention' in code else []),
            *textwrap.wrap(f'{sources}MIT License. {COPYRIGHT}.', WIDTH - 2, break_on_hyphens=False),
        ]
        top = '\n'.join(f'# {line}' for line in '\n'.join(header).splitlines())
        parts = f'{top}\n\n{self.import_lines()}\n\n{code}\n'
        return f'{top}\n# sha256 of the rest: {_digest(parts)}\n\n{self.import_lines()}\n\n{code}\n'

    def import_lines(self) -> str:
        """The imports, in ruff's order."""
        sections = []
        for ours in (True, False):
            lines: list[str] = []
            members: dict[str, list[str]] = {}
            for name, module, there in sorted(self.imports, key=lambda entry: (entry[1], entry[0])):
                if (module.partition('.')[0] in sys.stdlib_module_names) != ours:
                    continue
                if there is None:
                    lines.append(f'import {module}' if name == module else f'import {module} as {name}')
                else:
                    members.setdefault(module, []).append(there if name == there else f'{there} as {name}')
            lines += [f'from {module} import {", ".join(found)}' for module, found in members.items()]
            sections += ['\n'.join(lines)] if lines else []
        return '\n\n'.join(sections)


def plain(src: Source, node: ast.stmt) -> str:
    """The text of a function, a constant or a class that is not flat, without what only the library calls."""
    text = segment(src, node)
    if not isinstance(node, ast.ClassDef):
        return text
    doc = ast.get_docstring(node)
    members = [member for member in members_of(src, node) if member.name not in LEFT_OUT]
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    head = textwrap.dedent('\n'.join(src.lines[first - 1 : node.lineno]))
    parts = [docstring(doc)] if doc else []
    constants = [m.text for m in members if not isinstance(m.node, ast.FunctionDef)]
    parts += ['\n'.join(constants)] if constants else []
    parts += [m.text for m in members if isinstance(m.node, ast.FunctionDef)]
    return head + '\n' + textwrap.indent('\n\n'.join(parts), '    ')


def options_of_block(name: str, values: Mapping[str, object]) -> list[Parameter]:
    """The options of a named block as parameters, with these values as defaults."""
    build: Any = BLOCKS[name]
    node = source(build.__module__).defs[build.__name__]
    if isinstance(node, ast.ClassDef):
        node = next(part for part in node.body if isinstance(part, ast.FunctionDef) and part.name == '__init__')
    assert isinstance(node, ast.FunctionDef)
    options = [p for p in parameters(node) if p.keyword and p.name not in ('device', 'dtype')]
    return [replace(p, default=repr(values[p.name])) if p.name in values else p for p in options]


def constants_of(name: str) -> dict[str, object]:
    """The arguments that a named block gives to its class besides its options: those of a call in its function."""
    build: Any = BLOCKS[name]
    node = source(build.__module__).defs[build.__name__]
    if isinstance(node, ast.ClassDef):
        return {}
    (made,) = [part.value for part in ast.walk(node) if isinstance(part, ast.Return)]
    assert isinstance(made, ast.Call)
    return {k.arg: k.value.value for k in made.keywords if k.arg and isinstance(k.value, ast.Constant)}
