"""``sase-blocks info``: size, shapes and formulas of a model or block."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Sequence
from typing import Any

import timm
import torch
from torch import Tensor, nn

from sase_blocks.blocks import (
    BLOCKS,
    SASE_GENOTYPE,
    AttentionBlock,
    AttentionModule,
    Genotype,
    block_graph,
    create_block,
    list_blocks,
)
from sase_blocks.data import image_config
from sase_blocks.insertion import InsertReport
from sase_blocks.networks import NetworkConfig, build_network
from sase_blocks.ops.options import describe_options
from sase_blocks.reading import one_line, printable, quoted

from .network import take_network

__all__ = ['draw_genotype', 'show_info']


def show_info(name: str, channels: int | None, **options: Any) -> None:
    given = take_network(options)
    img_size, args = given.get('img_size'), given.get('model_args', {})
    if img_size is not None and img_size < 1:
        raise ValueError(f'--img-size must be at least 1, got {img_size}')
    plain = name.partition('(')[0].strip()  # without options
    is_block = plain in BLOCKS or ',' in name or name.lstrip().startswith('{')
    if not is_block and ':' not in name and not timm.is_model(name):
        near = difflib.get_close_matches(plain, [*list_blocks(), *timm.list_models()], n=3)
        raise ValueError(
            f'there is no model or block {quoted(name)}{"; did you mean " + " or ".join(near) + "?" if near else ""} '
            f'(`sase-blocks list TEXT` searches)'
        )
    if channels is not None and not is_block:
        raise ValueError(f'--channels is for a block, but {quoted(name)} is a model; leave it out')
    inserted: InsertReport | None = None
    if is_block:
        if others := given.keys() - {'img_size', 'model_args'}:
            raise ValueError(f'--{sorted(others)[0]} is for a model, but {quoted(name)} is a block; leave it out')
        size, channels = img_size or 56, 256 if channels is None else channels
        with torch.device('meta'):  # computes only shapes
            module = create_block(name, channels, feat_size=size, **args)
        shape = (1, channels, size, size)
    else:
        config = NetworkConfig(model=name, **given)
        with contextlib.nullcontext() if config.insert else torch.device('meta'):  # `insert` tries each block
            module, inserted = build_network(config)
        module.to('meta')
        shape = (1, *image_config(module, img_size)['input_size'])
    macs, shapes = _measure(module, shape)
    parameters = sum(p.numel() for p in module.parameters())
    attention = {id(p) for m in module.modules() if isinstance(m, AttentionModule) for p in m.parameters()}
    inside = sum(p.numel() for p in module.parameters() if id(p) in attention)
    print(printable(name))
    print(f'  parameters  {parameters:,}' + (f' ({inside:,} in attention blocks)' if inside and not is_block else ''))
    print(f'  MACs        {macs:,} for one input of {_by(shape[1:])}')
    width = max(len(child) for child in shapes)
    print('\noutput shapes')
    for child, out in shapes.items():
        print(f'  {child:<{width}}  {_by(out[1:])}')
    if inserted:
        print(f'\n{inserted}')
    genotypes: dict[Genotype, list[str]] = {}
    formulas: dict[str, list[str]] = {}
    for path, block in module.named_modules():
        if isinstance(block, AttentionBlock):
            genotypes.setdefault(block.genotype, []).append(path)
        elif isinstance(block, AttentionModule) and not is_block:
            formulas.setdefault(block_graph(block).formula, []).append(path)
    if is_block:
        print(f'\nformula {block_graph(module).formula}')
    if plain in BLOCKS and (listed := describe_options(BLOCKS[plain])):
        print(f'options {listed} by default')
    for formula, paths in formulas.items():
        print(f'\nattention {formula}{_where(paths)}')
    for found, paths in genotypes.items():
        known = ' (the genotype of sase)' if found == SASE_GENOTYPE else ''
        print(f'\ngenotype {found}{known}{"" if is_block else _where(paths)}\n\n{draw_genotype(found)}')


def _where(paths: Sequence[str]) -> str:
    return f' in {paths[0]}' if len(paths) == 1 else f' in {len(paths)} blocks, {paths[0]} to {paths[-1]}'


def _by(shape: Sequence[int]) -> str:
    return ' x '.join(str(n) for n in shape)


def _measure(module: nn.Module, shape: tuple[int, ...]) -> tuple[int, dict[str, tuple[int, ...]]]:
    """MACs of one forward pass, and the output shapes of the module and its children."""
    from torch.utils.flop_counter import FlopCounterMode

    shapes: dict[str, tuple[int, ...]] = {}

    def note(child: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                shapes[child] = tuple(output.shape)

        return hook

    hooks = [child.register_forward_hook(note(path)) for path, child in module.named_children()]
    hooks.append(module.register_forward_hook(note('output')))
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            module.eval()(torch.empty(shape, device='meta'))
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f'{type(module).__name__} does not take an input of {_by(shape[1:])}: {one_line(error, 300)}'
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    return counter.get_total_flops() // 2, shapes


def draw_genotype(genotype: Genotype) -> str:
    """The graph of a block as text, with its six operations on the edges."""
    e = [f'[{name}]' for name in genotype.to_dict().values()]
    n0, n12, n34, n5 = len(e[0]), max(len(e[1]), len(e[2])), max(len(e[3]), len(e[4])), len(e[5])
    q = n0 + 9  # the column of q
    d = q + n12 + 9  # the column of d
    s = d + n34 + 11  # the column of s
    end = s + n5 + 10  # the column where c and a meet

    def row(*parts: tuple[int, str], fill: str = ' ') -> str:
        line = ''
        for column, text in parts:
            gap = column - len(line)
            line += (fill if line.endswith('-') else ' ') * gap + text
        return line

    rows = [
        row((0, f'x --{e[0]}-'), (q - 2, '> q --' + e[1] + '-'), (d - 2, '> c -'), (end, '+'), fill='-'),
        row((0, '|'), (q, "'---" + e[2] + '-'), (d - 2, '> d'), (end, '|'), fill='-'),
        row((0, '|'), (d, '|'), (end, '+--> y = x * (1 + (c + a) / 2)')),
        row((0, '+-'), (d - 2, '> d*x --' + e[3] + '-'), (s - 4, '+'), (end, '|'), fill='-'),
        row((0, '|'), (s - 4, '+-> s --' + e[5] + '-'), (end - 4, '> a +'), fill='-'),
        row((0, '+-'), (d + 6, e[4] + '-'), (s - 4, '+'), fill='-'),
    ]
    return '\n'.join('  ' + line.rstrip() for line in rows)
