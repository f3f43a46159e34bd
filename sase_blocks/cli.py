"""The command line, ``sase-blocks`` or ``python -m sase_blocks``: list, info, demo, train.

A user's mistake ends with exit code 2 and one line on stderr, an interruption with 130; ``--traceback`` shows where an
error came from.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import MISSING, Field, fields
from typing import Any

import timm
import torch
from torch import Tensor, nn

from . import __version__
from .blocks import BLOCKS, SASE_GENOTYPE, AttentionBlock, Genotype, create_block, list_blocks
from .ops import SETS

PROG = 'sase-blocks'

EXAMPLES = {
    'main': """
examples:
  sase-blocks list                          blocks, primitives and models
  sase-blocks info resnet50_sase            its size, and its genotype as a drawing
  sase-blocks demo                          train four networks on real images, in a few minutes
  sase-blocks train --data DIR --model resnet50_sase --epochs 100
""",
    'list': """
examples:
  sase-blocks list
  sase-blocks list norm                     whatever has "norm" in its name or its key in the paper
  sase-blocks list resnet50                 all models of timm with "resnet50" in their name
""",
    'info': """
examples:
  sase-blocks info resnet50_sase --img-size 288
  sase-blocks info resnet20_cifar --genotype se --attn-stages 2 3
  sase-blocks info sase --channels 256 --img-size 56
  sase-blocks info avg,conv3,affine,p_norm,avg,conv7x7

MACs are counted over convolutions and matrix products; squeezes are none of these and cost time all the same.
""",
    'demo': """
examples:
  sase-blocks demo
  sase-blocks demo --epochs 10 --out my_demo
""",
    'train': """
examples:
  sase-blocks train --data cifar --model resnet20_cifar --genotype sase --epochs 20
  sase-blocks train --data imagenet --model resnet50_sase --label-smoothing 0.1 --clip-grad 5 \\
      --mixed-precision bf16 --channels-last --compile --workers 12 --out runs/sase50
  sase-blocks train --data imagenet --model resnet50_sase --out runs/sase50 ... --resume
  sase-blocks train --data . --dataset torch/cifar10 --download --model resnet20_cifar
  sase-blocks train --data DIR --model vit_tiny_patch16_224 --model-args drop_path_rate=0.1 --opt adamw --lr 1e-3
  torchrun --nproc-per-node 8 -m sase_blocks train --data imagenet ...

DIR holds train/CLASS/*.jpg and val/CLASS/*.jpg (or validation/ or test/). All images are decoded once before
training, which takes about 2 ms for an ImageNet-sized JPEG and core; --no-check saves that, and a broken image then
ends the run with its name when it is met.
The batch size counts images over all processes, so the same command gives the same run on any number of them, but
for batch norm's statistics and dropout, which each process has of its own.
""",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code: 0, 2 for a user's mistake, 130 for Ctrl-C."""
    try:
        # argparse itself exits with 2 for unknown options.
        args = vars(_parser().parse_args(argv))
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else 2
    run, show = args.pop('run'), args.pop('traceback')
    try:
        run(**args)
    except KeyboardInterrupt:
        hint = '; --resume continues after the last finished epoch' if run is _train else ''
        print(f'\n{PROG}: interrupted{hint}', file=sys.stderr)
        return 130
    except BrokenPipeError:  # `sase-blocks list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, TypeError, OSError, ImportError, FloatingPointError) as error:
        if show:
            raise
        # Under torchrun every process gets here, and the first to leave ends the others: each must tell.
        rank = os.environ.get('RANK', '0')
        who = PROG if rank == '0' else f'{PROG} (rank {rank})'
        print(f'{who}: error: {" ".join(str(error).split())}', file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument('--traceback', action='store_true', help='show the traceback of an error')
    parser = argparse.ArgumentParser(
        prog=PROG,
        description='Squeeze and excitation blocks for timm: look at them, try them, train with them.',
        epilog=EXAMPLES['main'],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('--version', action='version', version=f'{PROG} {__version__}')
    commands = parser.add_subparsers(title='commands', required=True, metavar='COMMAND')

    def command(name: str, run: Any, help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=help,
            description=help[0].upper() + help[1:] + '.',
            epilog=EXAMPLES[name],
            parents=[common],
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(run=run)
        return sub

    sub = command('list', _list, 'list blocks, primitives and models')
    sub.add_argument('filter', nargs='?', default='', help='show only names with this text in them')

    sub = command('info', _info, 'show the size of a model or block, and its genotype as a drawing')
    sub.add_argument('name', help='a model of timm, a block, or the text of a genotype')
    sub.add_argument('--img-size', type=int, help="height and width in px (default: the model's; 56 for a block)")
    sub.add_argument('--channels', type=int, default=256, help='channels of the input of a block (default: 256)')
    _add_model_options(sub)

    sub = command('demo', _demo, 'train ResNet-20 with four kinds of attention on real images, and draw the results')
    sub.add_argument('--out', default='demo_out', help='folder for the pictures (default: demo_out)')
    sub.add_argument('--epochs', type=int, default=argparse.SUPPRESS, help='passes over the images (default: 2)')
    sub.add_argument('--seed', type=int, default=0, help='seed of everything random (default: 0)')

    sub = command('train', _train, 'train any model of timm on your images')
    _add_train_options(sub)
    _add_model_options(sub)
    return parser


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        '--model-args', nargs='+', default=[], metavar='KEY=VALUE', help='arguments of the model; values read as JSON'
    )
    parser.add_argument(
        '--genotype', help="attention of our models: a block's name, a genotype as text or JSON, or none"
    )
    parser.add_argument(
        '--attn-stages', type=int, nargs='+', metavar='N', help='stages of our models with attention (default: all)'
    )


def _add_train_options(parser: argparse.ArgumentParser) -> None:
    """One option for each setting of TrainConfig, with its default and its text."""
    from .train import TrainConfig

    kinds = {'int': int, 'float': float, 'str': str}
    for setting in fields(TrainConfig):
        if setting.name == 'model_args':
            continue
        option, kind = setting.name.replace('_', '-'), str(setting.type).split(' |')[0]
        text = setting.metadata['help'].replace('%', '%%')
        if kind == 'bool':
            if setting.default:
                parser.add_argument(f'--no-{option}', dest=setting.name, action='store_false', help=f'do not {text}')
            else:
                parser.add_argument(f'--{option}', action='store_true', help=text)
            continue
        parser.add_argument(
            f'--{option}',
            type=kinds[kind],
            required=setting.default is MISSING,
            default=None if setting.default is MISSING else setting.default,
            choices=setting.metadata.get('choices'),
            metavar=None if setting.metadata.get('choices') else _metavar(setting),
            help=text if setting.default in (MISSING, None, '') else f'{text} (default: {setting.default})',
        )


def _metavar(setting: Field[Any]) -> str:
    named = {'data': 'DIR', 'out': 'DIR', 'model': 'NAME', 'dataset': 'NAME', 'checkpoint': 'FILE'}
    return named.get(
        setting.name, 'X' if 'float' in str(setting.type) else 'N' if 'int' in str(setting.type) else 'TEXT'
    )


def _model_args(pairs: Sequence[str], genotype: str | None, attn_stages: Sequence[int] | None) -> dict[str, Any]:
    args: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition('=')
        if not equals or not key.isidentifier():
            raise ValueError(f'--model-args takes KEY=VALUE, got {pair!r}')
        try:
            args[key] = json.loads(value)
        except json.JSONDecodeError:  # plain text, such as avg
            args[key] = {'True': True, 'False': False, 'None': None}.get(value, value)
    if genotype is not None:
        args['genotype'] = genotype
    if attn_stages is not None:
        args['attn_stages'] = list(attn_stages)
    return args


def _list(filter: str) -> None:
    def wanted(*names: str) -> bool:
        return any(filter.lower() in name.lower() for name in names)

    shown = []
    blocks = [f'  {name}' for name in list_blocks() if wanted(name)]
    if blocks:
        shown.append('blocks\n' + '\n'.join(blocks))
    for set_name, table in SETS.items():
        rows = [(name, str(cls.paper_key or '')) for name, cls in table.items()]
        rows = [row for row in rows if wanted(*row)]
        if rows:
            lines = [f'  {name:<14}{key}'.rstrip() for name, key in rows]
            shown.append(f'{set_name.replace("_", " ")} (name, key in the paper)\n' + '\n'.join(lines))
    models = [name for name in timm.list_models() if wanted(name) and (filter or _is_ours(name))]
    if models:
        title = 'models of timm' if filter else 'models (and every other one of timm)'
        shown.append(f'{title}\n' + '\n'.join(f'  {name}' for name in models))
    if not shown:
        raise ValueError(f'no block, primitive or model has {filter!r} in its name')
    print('\n\n'.join(shown))


def _is_ours(name: str) -> bool:
    return bool(timm.model_entrypoint(name).__module__.startswith('sase_blocks.'))


def _info(
    name: str,
    img_size: int | None,
    channels: int,
    model_args: Sequence[str],
    genotype: str | None,
    attn_stages: Sequence[int] | None,
) -> None:
    if img_size is not None and img_size < 1:
        raise ValueError(f'--img-size must be at least 1, got {img_size}')
    args = _model_args(model_args, genotype, attn_stages)
    is_block = name in BLOCKS or ',' in name or name.lstrip().startswith('{')
    if not is_block and ':' not in name and not timm.is_model(name):
        near = difflib.get_close_matches(name, [*list_blocks(), *timm.list_models()], n=3)
        raise ValueError(
            f'there is no model or block {name!r}{"; did you mean " + " or ".join(near) + "?" if near else ""} '
            f'(`{PROG} list TEXT` searches)'
        )
    # On the meta device nothing is computed or stored, only shapes.
    with torch.device('meta'):
        if is_block:
            size = img_size or 56
            module = create_block(name, channels, feat_size=size, **args)
            shape = (1, channels, size, size)
        else:
            from .train import build_model

            module = build_model(name, **args)
            cfg = getattr(module, 'pretrained_cfg', None) or {}
            depth, height, width = cfg.get('input_size', (3, 224, 224))
            shape = (1, args.get('in_chans', depth), img_size or height, img_size or width)
    macs, shapes = _measure(module, shape)
    parameters = sum(p.numel() for p in module.parameters())
    attention = {id(p) for m in module.modules() if isinstance(m, AttentionBlock) for p in m.parameters()}
    inside = sum(p.numel() for p in module.parameters() if id(p) in attention)
    print(f'{name}')
    print(f'  parameters  {parameters:,}' + (f' ({inside:,} in attention blocks)' if inside and not is_block else ''))
    print(f'  MACs        {macs:,} for one input of {_by(shape[1:])}')
    width = max(len(child) for child in shapes)
    print('\noutput shapes')
    for child, out in shapes.items():
        print(f'  {child:<{width}}  {_by(out[1:])}')
    genotypes: dict[Genotype, list[str]] = {}
    for path, block in module.named_modules():
        if isinstance(block, AttentionBlock):
            genotypes.setdefault(block.genotype, []).append(path)
    for found, paths in genotypes.items():
        where = '' if is_block else f' in {len(paths)} blocks, {paths[0]} to {paths[-1]}'
        known = ' (the genotype of sase)' if found == SASE_GENOTYPE else ''
        print(f'\ngenotype {found}{known}{where}\n\n{draw_genotype(found)}')


def _by(shape: Sequence[int]) -> str:
    return ' x '.join(str(n) for n in shape)


def _measure(module: nn.Module, shape: tuple[int, ...]) -> tuple[int, dict[str, tuple[int, ...]]]:
    """MACs of one forward pass, and the output shapes of the module's children and of itself."""
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
        raise ValueError(f'{type(module).__name__} does not take an input of {_by(shape[1:])}: {error}') from error
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


def _demo(**options: Any) -> None:
    from .demo import run_demo

    run_demo(**options)


def _train(model_args: Sequence[str], genotype: str | None, attn_stages: Sequence[int] | None, **settings: Any) -> None:
    from .train import TrainConfig, train

    result = train(TrainConfig(model_args=_model_args(model_args, genotype, attn_stages), **settings))
    if os.environ.get('RANK', '0') == '0':
        print(
            f'finished: accuracy {result["acc1"]:.2f} % after epoch {result["epochs"]}, '
            f'best {result["best_acc1"]:.2f} % after epoch {result["best_epoch"]}; '
            f'weights in {result["checkpoint"]} and best.pt beside it'
        )
