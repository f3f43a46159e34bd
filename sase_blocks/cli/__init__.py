"""The command line, ``sase-blocks`` or ``python -m sase_blocks``.

The commands: list, info, copy, draw, attend, predict, export, demo, train, compare, search, run.

An error exits with code 2 and prints one line to stderr; an interruption exits with 130. ``copy --check`` has codes of
its own. ``--traceback`` shows where an error came from. An error that looks like a bug of this package says so.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Collection, Sequence
from functools import partial
from typing import Any, NoReturn

import timm
import torch

from sase_blocks import __version__
from sase_blocks.blocks import BLOCKS
from sase_blocks.ops import EXTENDED_SETS
from sase_blocks.ops.options import describe_options
from sase_blocks.reading import one_line, printable, quoted, shorten
from sase_blocks.runs import say

from .compare import add_compare
from .model_args import is_ours
from .options import add_model_options, add_network_options, add_settings, numbers
from .search_sase import add_sase
from .search_trionet import add_trionet

__all__ = ['main']

PROG = 'sase-blocks'
CHECKPOINT = 'weights (.pt, .pth, .safetensors); one of `train` needs no other option about the network'

EXAMPLES = {
    'main': """
examples:
  sase-blocks list                          blocks, primitives and models
  sase-blocks info resnet50_sase            its size, and its genotype as a drawing
  sase-blocks copy sase -o sase.py          a block as one file that needs only torch
  sase-blocks draw sase -o sase.png         a block as a picture
  sase-blocks attend --checkpoint runs/train/best.pt cat.jpg -o maps
  sase-blocks predict --checkpoint runs/train/best.pt DIR/val -o predictions.csv
  sase-blocks export --checkpoint runs/train/best.pt -o model.onnx
  sase-blocks demo                          train four networks on real images, in a few minutes
  sase-blocks train --data DIR --model resnet50_sase --epochs 100
  sase-blocks compare --data DIR --blocks none,se,sase    which block is worth it on your images
  sase-blocks search sase --demo            find a block on real images, in two minutes
  sase-blocks search sase --data DIR        find one on yours
  sase-blocks search trionet --data DIR --max-macs 300M   find a network within a budget
""",
    'list': """
examples:
  sase-blocks list
  sase-blocks list norm                     everything with "norm" in its name or its key in the paper
  sase-blocks list resnet50                 all models of timm with "resnet50" in their name
""",
    'info': """
examples:
  sase-blocks info resnet50_sase --img-size 288
  sase-blocks info resnet20_cifar --genotype se --attn-stages 2 3
  sase-blocks info sase --channels 256 --img-size 56
  sase-blocks info 'cbam(reduction=8, kernel_size=3)'
  sase-blocks info avg,conv3,affine,p_norm,avg,conv7x7
  sase-blocks info resnet18 --insert 'se(reduction=8)' --stages 3 4       its places, parameters and MACs

Without --img-size, a block is measured at 56 x 56. MACs count convolutions and matrix products. Squeezes are neither,
but cost time too.
""",
    'copy': """
examples:
  sase-blocks copy sase -o sase.py
  sase-blocks copy 'cbam(reduction=8)' eca -o attention.py        two blocks, and what they share once
  sase-blocks copy Mine=avg,conv3,affine,p_norm,avg,conv7x7 -o mine.py       a genotype, as the class Mine
  sase-blocks copy LocalSelfAttention AxialSelfAttention TrioBlock -o selfattention.py
  sase-blocks copy --check sase.py          exit code 0: unchanged, 3: out of date, 4: changed by hand

A copy has the state-dict keys, initial values and results of the library's block. MIT licence: keep its header.
""",
    'draw': """
examples:
  sase-blocks draw sase -o sase.png
  sase-blocks draw cbam -o cbam.svg --no-sets
  sase-blocks draw avg,conv3,affine,p_norm,avg,conv7x7 -o mine.pdf
  sase-blocks draw runs/trionet/architecture.json -o network.png
  sase-blocks draw 'image 32; stem 16; heads 4; 64: conv3/16*2; 128: local5/32 + axial/32' -o network.png

Each list in the picture is a set of operations; the chosen one is filled.
""",
    'attend': """
examples:
  sase-blocks attend --checkpoint runs/train/best.pt cat.jpg dog.jpg -o maps      with what was inserted
  sase-blocks attend --model resnet50_sase --checkpoint weights.pth photos/*.jpg -o maps
  sase-blocks attend --model resnet20_cifar --genotype cbam --checkpoint best.pt cat.jpg -o maps
  sase-blocks attend --model convnext_tiny --insert se --checkpoint tuned.pth cat.jpg -o maps

One picture per image: the last block at each resolution, its spatial gate over the image and its channel gates as
bars. The images are transformed as in the validation of `train`.
""",
    'predict': """
examples:
  sase-blocks predict --checkpoint runs/train/best.pt cat.jpg dog.jpg
  sase-blocks predict --checkpoint runs/train/best.pt DIR/val -o predictions.csv --confusion confusion.png
  sase-blocks predict --checkpoint runs/train/best.pt photos -o predictions.json --top 3
  sase-blocks predict --model resnet18 --pretrained cat.jpg

If a folder holds folders with the names of classes, like DIR/val in training, there is also a summary: the accuracy,
the accuracy of each class, and which class it is most often taken for. The images are transformed as in the validation
of `train`.
""",
    'export': """
examples:
  sase-blocks export --checkpoint runs/train/best.pt -o model.onnx
  sase-blocks export --checkpoint runs/train/best.pt -o model.pt2 --dynamic batch
  sase-blocks export --model resnet18 --pretrained --insert se --start paper -o model.onnx
  sase-blocks export --model resnet50_sase --checkpoint weights.pth -o model.onnx

The file also holds the class names, the image size and the normalisation, as JSON in its metadata. Before it is
written, its outputs are compared with torch at the exported size and at another one.
""",
    'demo': """
examples:
  sase-blocks demo
  sase-blocks demo --seeds 0,1,2,3,4 --out my_demo
""",
    'train': """
examples:
  sase-blocks train --data cifar --model resnet20_cifar --genotype sase --epochs 20
  sase-blocks train --data DIR --model resnet18 --pretrained --insert se --lr 0.01 --insert-lr 0.1 --freeze-epochs 2
  sase-blocks train --data imagenet --model resnet50_sase --label-smoothing 0.1 --clip-grad 5 \\
      --mixed-precision bf16 --channels-last --compile --workers 12 --out runs/sase50
  sase-blocks train --resume --out runs/sase50                 after a stop, with the settings of the run
  sase-blocks train --config runs/sase50/config.toml --out runs/again --seed 1
  sase-blocks train --data . --dataset torch/cifar10 --download --model resnet20_cifar
  sase-blocks train --data DIR --model vit_tiny_patch16_224 --model-args drop_path_rate=0.1 --opt adamw --lr 1e-3
  torchrun --nproc-per-node 8 -m sase_blocks train --data imagenet ...

DIR holds train/CLASS/*.jpg and val/CLASS/*.jpg (or validation/ or test/). All images are decoded once before
training, which takes about 2 ms per ImageNet-sized JPEG and core. --no-check skips that; the run then stops at the
first broken image and names it.
The batch size counts images over all processes, so the same command gives the same run on any number of processes,
except for batch norm's statistics and dropout, which are separate for each process.
""",
    'run': """
examples:
  sase-blocks run train.py DATA --model resnet50_sase       any script of timm, or your own
  sase-blocks run validate.py DATA --model resnet50_cbam --checkpoint best.pth
  torchrun --nproc-per-node 8 -m sase_blocks run train.py DATA --model resnet50_sase

All arguments after SCRIPT go to the script, --help too. It runs as with `python SCRIPT`, but with the models of
sase_blocks in timm's registry.
""",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code: 0, 2 for an error, 130 for Ctrl-C."""
    try:
        # argparse itself exits with 2 for unknown options.
        args = vars(_parser().parse_args(argv))
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else 2
    run, show = args.pop('run'), args.pop('traceback')
    names = {*args, *args.pop('settings', ())}
    try:
        return run(**args) or 0
    except KeyboardInterrupt:
        hint = '; --resume continues after the last checkpoint' if 'resume' in names else ''
        print(f'\n{PROG}: interrupted{hint}', file=sys.stderr)
        return 130
    except BrokenPipeError:  # `sase-blocks list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if show:
            raise
        # Under torchrun every process gets here, and the first to exit ends the others: each must print its error.
        rank = os.environ.get('RANK', '0')
        who = PROG if rank == '0' else f'{PROG} (rank {rank})'
        print(printable(f'{who}: error: {_explain(error, names)}'), file=sys.stderr)
        return 2


# Errors that a wrong argument, file, machine or network can cause. torch raises RuntimeError for everything.
EXPECTED = (ValueError, TypeError, OSError, ImportError, FloatingPointError, RuntimeError)


def _explain(error: Exception, names: Collection[str]) -> str:
    """An error in one line. ``names`` are the options of the command."""
    text = one_line(error)
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in text:
        smaller = [f'--{name.replace("_", "-")}' for name in ('batch_size', 'img_size') if name in names]
        return (
            f'there is not enough memory{"; lower " + " or ".join(smaller) if smaller else ""} ({shorten(text, 200)})'
        )
    # Libraries check arguments by assertions with a message.
    expected = isinstance(error, EXPECTED) and not isinstance(error, (RecursionError, NotImplementedError))
    if expected or (isinstance(error, AssertionError) and str(error)):
        return text
    return (
        f'{type(error).__name__}: {text} (this looks like a bug in {PROG}: --traceback shows where, please report it)'
    )


class _Parser(argparse.ArgumentParser):
    """argparse's parser, with file names in errors shown as in all others."""

    def error(self, message: str) -> NoReturn:
        super().error(printable(shorten(message, 300)))


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument('--traceback', action='store_true', help='show the traceback of an error')
    parser = _Parser(
        prog=PROG,
        description='Squeeze and excitation blocks for timm: inspect them, try them, train with them.',
        epilog=EXAMPLES['main'],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('--version', action='version', version=f'{PROG} {__version__}')
    from sase_blocks.train import TrainConfig

    commands = parser.add_subparsers(title='commands', required=True, metavar='COMMAND')

    def command(
        name: str, run: Any, help: str, epilog: str | None = None, parent: Any = commands
    ) -> argparse.ArgumentParser:
        sub: argparse.ArgumentParser = parent.add_parser(
            name,
            help=help,
            description=help[0].upper() + help[1:] + '.',
            epilog=EXAMPLES[name] if epilog is None else epilog,
            parents=[common],
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(run=run)
        return sub

    sub = command('list', _list, 'list blocks, primitives and models')
    sub.add_argument('filter', nargs='?', default='', help='show only names that contain this text')

    sub = command('info', _info, 'show the size of a model or block, and its genotype as a drawing')
    sub.add_argument('name', help='a timm model, a block, maybe with options, or a genotype as text')
    sub.add_argument('--channels', type=int, help='channels of the input of a block (default: 256)')
    add_network_options(sub, leave_out=('model', 'pretrained'))

    sub = command('copy', _copy, 'copy blocks into one Python file that needs only torch')
    sub.add_argument('blocks', nargs='*', metavar='NAME', help='a block, a genotype as text, or CLASS=NAME')
    sub.add_argument('-o', '--out', metavar='FILE', help='the .py file')
    sub.add_argument('--overwrite', action='store_true', help='replace the file if it exists')
    sub.add_argument('--check', metavar='FILE', help='compare a copied file with the installed version, with a diff')

    sub = command('draw', _draw, "draw a block as a graph of its operations, or a network of TrioNet's blocks")
    sub.add_argument(
        'name', help='a block, maybe with options, a genotype or architecture as text, or architecture.json'
    )
    sub.add_argument('-o', '--out', required=True, metavar='FILE', help='the picture: .png, .svg or .pdf')
    sub.add_argument('--no-sets', dest='sets', action='store_false', help='do not list the alternatives')

    sub = command('attend', _attend, "draw a model's attention over images")
    sub.add_argument('images', nargs='+', metavar='IMAGE', help='image files')
    sub.add_argument('-o', '--out', required=True, metavar='DIR', help='folder for the pictures')
    sub.add_argument('--checkpoint', metavar='FILE', help=CHECKPOINT)
    add_network_options(sub)

    sub = command('predict', _predict, 'predict the classes of images, and measure the accuracy on class folders')
    sub.add_argument('images', nargs='+', metavar='IMAGE|DIR', help='image files and folders')
    sub.add_argument('--checkpoint', metavar='FILE', help=CHECKPOINT)
    sub.add_argument('-o', '--out', metavar='FILE', help='write the predictions to this .csv or .json file')
    sub.add_argument('--confusion', metavar='FILE', help='draw the confusion matrix: .png, .svg or .pdf')
    sub.add_argument('--top', type=int, default=5, metavar='N', help='predicted classes per image (default: 5)')
    sub.add_argument('--batch-size', type=int, default=64, metavar='N', help='images per batch (default: 64)')
    sub.add_argument('--workers', type=int, default=4, metavar='N', help='loader processes (default: 4)')
    sub.add_argument('--cpu', action='store_true', help='use the CPU even if there is a GPU')
    sub.add_argument('--skip-broken', action='store_true', help='leave broken images out, with a warning')
    add_network_options(sub)

    sub = command('export', _export, 'export a network as ONNX or torch.export, with batch norms folded, and check it')
    sub.add_argument('-o', '--out', required=True, metavar='FILE', help='.onnx, or .pt2 for torch.export')
    sub.add_argument('--checkpoint', metavar='FILE', help=CHECKPOINT)
    sub.add_argument(
        '--dynamic',
        choices=('all', 'batch', 'none'),
        default='all',
        help='what may change: batch, height and width; the batch; nothing (default: all)',
    )
    sub.add_argument('--opset', type=int, metavar='N', help="ONNX operator set, at least 18 (default: the exporter's)")
    sub.add_argument('--no-fuse', dest='fused', action='store_false', help='do not fold batch norms')
    sub.add_argument('--no-check', dest='check', action='store_false', help='do not compare the outputs with torch')
    add_network_options(sub)

    sub = command('demo', _demo, 'train ResNet-20 with four kinds of attention on real images, and draw the results')
    sub.add_argument('--out', default='demo_out', help='folder for the pictures (default: demo_out)')
    sub.add_argument('--epochs', type=int, default=argparse.SUPPRESS, help='passes over the images (default: 6)')
    sub.add_argument('--seeds', default='0', metavar='N,N,...', help='seeds of the trainings (default: 0)')

    sub = command('train', _train, 'train any timm model on your images')
    sub.add_argument('--config', metavar='FILE', help='.toml file with any of these settings; options replace them')
    add_settings(sub, TrainConfig, given_only=True)
    add_model_options(sub)

    add_compare(command)

    sub = commands.add_parser('search', help='search for an architecture on your images')
    searches = sub.add_subparsers(title='searches', required=True, metavar='SEARCH')
    add_sase(partial(command, parent=searches))
    add_trionet(partial(command, parent=searches))

    sub = command('run', _run, 'run a Python script with the models of sase_blocks registered')
    sub.add_argument('script', metavar='SCRIPT', help='the script')
    sub.add_argument('arguments', nargs=argparse.REMAINDER, metavar='ARGS', help="the script's own options")
    return parser


def _list(filter: str) -> None:
    def wanted(*names: str) -> bool:
        return any(filter.lower() in name.lower() for name in names)

    shown = []
    blocks = []
    for name, build in BLOCKS.items():
        if wanted(name):
            about = (build.__doc__ or '').strip().splitlines()[0].replace('``', '')
            blocks.append(f'  {name:<14}{about}')
            if options := describe_options(build):
                blocks.append(f'{"":<16}{options}')
    if blocks:
        shown.append('blocks (with the defaults of their options)\n' + '\n'.join(blocks))
    for set_name, table in EXTENDED_SETS.items():
        rows = [(name, str(cls.paper_key or ''), describe_options(cls)) for name, cls in table.items()]
        rows = [row for row in rows if wanted(*row[:2])]
        if rows:
            lines = [f'  {name:<15} {key:<19} {options}'.rstrip() for name, key, options in rows]
            shown.append(f'{set_name.replace("_", " ")} (name, key in the paper, options)\n' + '\n'.join(lines))
    models = [name for name in timm.list_models() if wanted(name) and (filter or is_ours(name))]
    if models:
        title = 'timm models' if filter else "models (in addition to timm's)"
        shown.append(f'{title}\n' + '\n'.join(f'  {name}' for name in models))
    if not shown:
        raise ValueError(f'no block, primitive or model has {quoted(filter)} in its name')
    print('\n\n'.join(shown))


def _info(**options: Any) -> None:
    from .info import show_info

    show_info(**options)


def _copy(**options: Any) -> int:
    from .copy import run_copy

    return run_copy(**options)


def _draw(name: str, out: str, sets: bool) -> None:
    from sase_blocks.models.trionet import read_architecture
    from sase_blocks.viz import check_picture, draw_architecture, draw_block, save_figure

    check_picture(out)
    network = name.endswith('.json') or name.lstrip().startswith(('image ', 'stem ', 'heads '))
    if network and not sets:
        raise ValueError('--no-sets is for a block, but this is a network; leave it out')
    figure = draw_architecture(read_architecture(name)) if network else draw_block(name, sets=sets)
    say(f'written: {save_figure(figure, out)}')


def _attend(**options: Any) -> None:
    from .attend import attend

    attend(**options)


def _predict(**options: Any) -> None:
    from .predict import predict

    predict(**options)


def _export(**options: Any) -> None:
    from .export import export

    export(**options)


def _demo(seeds: str, **options: Any) -> None:
    from sase_blocks.demo import run_demo

    run_demo(seeds=numbers(seeds), **options)


def _train(**options: Any) -> None:
    from .train import run_train

    run_train(**options)


def _run(script: str, arguments: Sequence[str]) -> None:
    from .script import run_script

    run_script(script, arguments)
