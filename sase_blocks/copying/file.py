"""The copied file: what stands in it, in which order, and its header."""

from __future__ import annotations

import ast
import hashlib
import inspect
import re
import shlex
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from sase_blocks import __version__
from sase_blocks.blocks import (
    BLOCKS,
    AttentionBlock,
    ChannelAttention,
    ParallelAttention,
    SpatialAttention,
    resolve_block,
)
from sase_blocks.blocks.attention import SixEdges
from sase_blocks.blocks.compose import ChannelGate, ParallelGate, SpatialGate
from sase_blocks.ops import SETS
from sase_blocks.ops.options import parse_name, split_names
from sase_blocks.selfattention import AxialSelfAttention, LocalSelfAttention, TrioBlock

from .code import DEVICE_AND_DTYPE, WIDTH, Parameter, break_call, call, define, docstring, parameters
from .flat import Flat, flat, members_of, write_flat
from .library import PACKAGE, Source, find, reads, segment, source

PROG = 'sase-blocks'
COPYRIGHT = 'Copyright (c) 2026 The sase-blocks authors'
LAYERS: dict[str, type[nn.Module]] = {cls.__name__: cls for cls in (LocalSelfAttention, AxialSelfAttention, TrioBlock)}
# What stands in a copy in place of what needs Triton.
INSTEAD = {'local_attention': 'torch_attention', 'LOCAL_ROUTES': 'TORCH_ROUTES'}
# Methods that only the library and timm call.
LEFT_OUT = ('extra_repr', 'multiply_adds', 'no_weight_decay')
# The first version of torch with what a copy uses, where that is later than 2.1 (for channel_shuffle, its gradient).
FIRST_TORCH = {
    'torch.compiler.is_compiling(': (2, 3),
    'torch.is_autocast_enabled(': (2, 4),
    'torch.channel_shuffle(': (2, 5),
    'bool(torch.compiler.is_exporting())': (2, 7),
}
# TorchScript of 2.1 does not know this type.
SCRIPTED_FROM = {'Tensor | None': (2, 2)}
# A paper, as docstrings name it.
PAPER = r'arXiv \d{4}\.\d{4,5}|doi 10\.[^\s,;)]+|[A-Z]\w+ et al\., [A-Z]+ \d{4}'


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
        text = re.sub(rf'\b({"|".join(INSTEAD)})\b', lambda match: INSTEAD[match[0]], text)
        if self.pieces.setdefault(name, text) != text:
            raise ValueError(f'{name} is also the name of a part of another block; choose another')

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
            text = write_flat(cls, there, doc=brief(cls.doc)).text
            self.add(there, text, [src.module for src, _ in cls.classes])
        else:
            self.add(there, plain(src, node, brief), [module])

    def export(self, name: str, block: str) -> list[str]:
        """Add a block as a class of this name. Returns its papers."""
        if block in LAYERS:
            src = source(LAYERS[block].__module__)
            text = plain(src, src.defs[block])
            self.add(name, re.sub(rf'^class {block}\b', f'class {name}', text, flags=re.MULTILINE), [src.module])
            return papers_of('', src.module)
        module = resolve_block(block)(64, feat_size=8, device='meta')
        if len(split_names(block)) > 1:
            doc = f'The block of SASE (arXiv 2411.08333), y = x * (1 + (c + a) / 2), with the genotype\n\n{block}.'
            self.compose(name, module, doc, [])
            return papers_of(doc)
        named, values = parse_name(block)
        doc = inspect.cleandoc(BLOCKS[named].__doc__ or '')
        if isinstance(module, (*CORES, nn.Sequential)):
            options = options_of_block(named, values)
            missing = {option.name for option in options} - set(self.compose(name, module, doc, options))
            assert not missing, f'{named}: no primitive has an option of the name {missing}'
            return papers_of(doc)
        cls = flat_of(module)
        if not isinstance(BLOCKS[named], type):  # the function's first line, and the arguments of the class
            doc = '\n\n'.join([doc, *cls.doc.split('\n\n')[1:]])
        defaults = {**constants_of(named), **values}
        written = write_flat(cls, name, doc=doc, defaults=defaults, channels=channels_of(cls, module))
        self.add(name, written.text, written.modules)
        return papers_of(doc, type(module).__module__)

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
        taken = {argument for part in parts for argument in re.findall(r'(\w+)=', part)}
        params = [Parameter('channels', 'int'), *(o for o in options if o.name in taken), *DEVICE_AND_DTYPE]
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
        scripted = max([needs, *(version for text, version in SCRIPTED_FROM.items() if text in code)])
        torchscript = f' (TorchScript: {scripted[0]}.{scripted[1]})' if scripted > needs else ''
        command = shlex.join([PROG, 'copy', *names, '-o', file])
        sources = f'Papers: {", ".join(papers)}. ' if papers else ''
        if len(command) > WIDTH - 6:  # one name a line
            command = ' \\\n'.join([f'{PROG} copy', *map(shlex.quote, names), f'-o {shlex.quote(file)}'])
        header = [
            f'Copied from sase-blocks {__version__} by',
            textwrap.indent(command, '    '),
            f'It needs only torch {needs[0]}.{needs[1]}{torchscript} and Python 3.10, or later. '
            f'{PROG} copy --check FILE compares it.',
            *(['It leaves out the Triton route of local self-attention.'] if 'torch_attention' in code else []),
            *textwrap.wrap(f'{sources}MIT License. {COPYRIGHT}.', WIDTH - 2, break_on_hyphens=False),
        ]
        top = '\n'.join(f'# {line}' for line in '\n'.join(header).splitlines())
        parts = f'{top}\n\n{self.import_lines()}\n\n{code}\n'
        return f'{top}\n# sha256 of the rest: {digest(parts)}\n\n{self.import_lines()}\n\n{code}\n'

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


def papers_of(doc: str, module: str = __name__) -> list[str]:
    """The papers that a docstring names, or else that of its module."""
    return re.findall(PAPER, doc) or re.findall(PAPER, inspect.getdoc(sys.modules[module]) or '')


def brief(doc: str) -> str:
    """The first paragraph of a docstring, for what only supports the copied blocks."""
    return doc.partition('\n\n')[0]


def plain(src: Source, node: ast.stmt, shorten: Callable[[str], str] = str) -> str:
    """The text of a function, a constant or a class that is not flat, without what only the library calls.

    Args:
        shorten: applied to its docstring.
    """
    text = segment(src, node)
    doc = ast.get_docstring(node) if isinstance(node, ast.FunctionDef | ast.ClassDef) else None
    doc = doc and shorten(doc)
    if isinstance(node, ast.FunctionDef) and doc:
        lines = slice(node.body[0].lineno - 1, node.body[0].end_lineno)
        long = textwrap.dedent('\n'.join(src.lines[lines]))
        return text.replace(textwrap.indent(long, '    '), textwrap.indent(docstring(doc), '    '), 1)
    if not isinstance(node, ast.ClassDef):
        return text
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


def digest(text: str) -> str:
    """The hash of a file's text without the line that states it."""
    return hashlib.sha256(
        re.sub(r'^# sha256 of the rest: .*\n', '', text, count=1, flags=re.MULTILINE).encode()
    ).hexdigest()
