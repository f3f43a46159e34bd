"""The command line: exit codes, one line for a user's mistake, and what list and info print."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from test_data import make_images

from sase_blocks import __version__, cli
from sase_blocks.blocks import SASE_GENOTYPE, Genotype, list_blocks
from sase_blocks.checkpoint import read_checkpoint, save_checkpoint
from sase_blocks.cli.info import draw_genotype
from sase_blocks.insertion import insert
from sase_blocks.networks import NetworkConfig, build_network
from sase_blocks.ops import EXTENDED_SETS, SETS

ROOT = Path(__file__).parents[1]


def run(capsys, *argv):
    code = cli.main(argv)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize(
    ('argv', 'says'),
    [
        (['info', 'resnet50_sasse'], "no model or block 'resnet50_sasse'; did you mean resnet50_sase"),
        (['info', 'sasee'], 'did you mean sase'),
        (['info', 'zzzzzzzzz'], "no model or block 'zzzzzzzzz' ("),
        (['info', 'avg,mlp,affine,avg,avg'], 'six choices'),
        (['info', 'avg,mlp,affine,avg,avg,conv3x4'], "did you mean 'conv3x3'"),
        (['info', 'resnet50_sase', '--channels', '64'], "--channels is for a block, but 'resnet50_sase' is a model"),
        (['draw', 'image 32; stem 16', '-o', 'x.png', '--no-sets'], '--no-sets is for a block'),
        (
            ['attend', 'cat.jpg', '-o', 'maps', '--start', 'paper'],
            "start must be left at 'identity' without insert, got 'paper'",
        ),
        (
            ['search', 'trionet', '--demo', '--max-macs', '40M'],
            '--demo has its own settings, and accepts only --out and --seed: leave out --max-macs',
        ),
        (['search', 'sase', '--demo', '--evaluate', '3'], 'leave out --evaluate'),
        (['search', 'sase', '--demo', '--no-tensorboard'], 'leave out --no-tensorboard'),
        (['info', 'sase', '--insert', 'se'], "--insert is for a model, but 'sase' is a block"),
        (['info', 'resnet18', '--where', 'layer1*'], 'where must be left at None without insert'),
        (['info', 'resnet18', '--insert', 'se', '--stages', '7'], '7'),
        (
            ['attend', 'cat.jpg', '-o', 'maps', '--checkpoint', 'run.pt', '--insert', 'se'],
            'leave out --insert (--model',
        ),
        (['attend', 'cat.jpg', '-o', 'maps', '--checkpoint', 'run.pt', '--genotype', 'se'], 'leave out --model-args'),
        (
            ['attend', 'cat.jpg', '-o', 'm', '--checkpoint', 'run.pt', '--model', 'resnet18', '--pretrained'],
            '--pretrained and --checkpoint are both weights',
        ),
        (['info', 'sase', '--channels', '0'], 'channels to be an int of at least 1'),
        (['info', 'sase', '--img-size', '0'], '--img-size must be at least 1'),
        (['info', 'resnet18', '--genotype', 'sase'], 'resnet18 cannot be built with'),
        (['info', 'resnet50_sase', '--genotype', 'sasee'], "Did you mean 'sase'"),
        (['info', 'resnet50_sase', '--attn-stages', '7'], '7'),
        (['info', 'resnet18', '--model-args', 'no_equals_sign'], "--model-args takes KEY=VALUE, got 'no_equals_sign'"),
        (['list', 'zzzzzzzzz'], "no block, primitive or model has 'zzzzzzzzz' in its name"),
        (['draw', 'sasse', '-o', 'x.png'], "unknown attention block 'sasse'. Did you mean 'sase'?"),
        (['draw', 'avg,mlp', '-o', 'x.png'], 'six choices'),
        (['draw', 'image 32; stem 16; hads 4', '-o', 'x.png'], "'hads 4' is not image, stem or heads"),
        (['draw', 'nowhere.json', '-o', 'x.png'], 'the architecture file nowhere.json cannot be read'),
        (['draw', 'se', '-o', 'x.jpg'], "a picture must be .png, .svg or .pdf, got 'x.jpg'"),
        (['draw', 'se', '-o', 'nowhere/x.png'], 'nowhere'),
        (['attend', 'cat.jpg', '-o', 'maps'], 'pass --model NAME'),
        (['attend', 'cat.jpg', '-o', 'maps', '--model', 'resnet20_cifer'], 'did you mean resnet20_cifar'),
        (['attend', 'cat.jpg', '-o', 'maps', '--model', 'resnet20_cifar', '--img-size', '0'], 'at least 1, got 0'),
        (['attend', 'cat.jpg', '-o', 'maps', '--model', 'resnet20_cifar'], 'there is no image cat.jpg'),
        (['attend', 'cat.jpg', '-o', 'maps', '--model', 'resnet10t', '--insert', 'sasse'], "Did you mean 'sase'?"),
        (['attend', 'cat.jpg', '-o', 'maps', '--checkpoint', 'no.pt'], 'there is no checkpoint no.pt'),
        (['run', 'nothing.py', '--help'], 'there is no script nothing.py'),
        (['demo', '--epochs', '0'], 'epochs must be at least 1'),
        (['train', '--data', '/nowhere/at/all'], 'there is no data folder /nowhere/at/all; expected ROOT/train/CLASS'),
        (['train', '--data', '.', '--model', 'resnet50_sasse'], 'did you mean resnet50_sase'),
        (['train', '--data', '.', '--epochs', '0'], 'epochs must be at least 1, got 0'),
        (['train', '--data', '.', '--no-check', '--skip-broken'], 'skip_broken'),
    ],
)
def test_mistake_is_one_line_and_exit_code_2(capsys, tmp_path, monkeypatch, argv, says):
    monkeypatch.chdir(tmp_path)
    if 'run.pt' in argv:
        trained_run(tmp_path)
        (tmp_path / 'best.pt').rename('run.pt')
    code, _, err = run(capsys, *argv)
    assert code == 2
    assert err.startswith('sase-blocks: error: ')
    assert err.count('\n') == 1
    assert says in err


class Hostile:
    """Unpickled in the ordinary way, it makes a folder of this name in the working directory."""

    def __reduce__(self):
        return os.mkdir, ('was_run',)


DEEP = '[' * 100_000
TRAIN = [
    '--model', 'resnet20_cifar', '--img-size', '12', '--epochs', '1', '--batch-size', '4', '--cpu', '--no-tensorboard',
    '--workers', '0',
]  # fmt: skip
FILES = {
    'deep.json': DEEP, 'empty.json': '', 'object.json': '{}', 'null.json': 'null', 'binary.json': b'\xff\xfe',
    'long.json': '{"' + 'x' * 100_000 + '": 1}',
    'red\x1b[31m.json': '{}', 'text.pt': 'a text', 'empty.pt': '', 'in_the_way': '',
    'no_name/config.json': '{}', 'broken/config.json': '{', 'weights/config.json': '{"architecture": "resnet18"}',
}  # fmt: skip


@pytest.fixture
def bad_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, content in FILES.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    torch.save({'state_dict': Hostile()}, 'hostile.pt')
    torch.save({'state_dict': Hostile()}, 'weights/pytorch_model.bin')
    torch.save([1], 'list.pt')
    os.mkfifo('pipe.pt')
    Path('folder.png').mkdir()
    photos(tmp_path, 'cat.png')
    make_images(tmp_path / 'data', train=4, val=2, classes=('cat', 'dog'))


def bad_commands():
    """Command lines with what the one line says; whatever they name is among ``bad_files``."""
    for name in ('deep', 'empty', 'object', 'null', 'binary', 'long', 'nowhere'):
        file = f'{name}.json'
        yield ['info', 'resnet20_cifar', '--genotype', file], file
        yield ['draw', file, '-o', 'x.png'], file
        yield ['search', 'sase', '--data', 'data', '--space', file], file
        yield ['search', 'trionet', '--data', 'data', '--space', file], file
    for space in ('', '{}', '[]', 'null', DEEP):
        yield ['search', 'sase', '--data', 'data', '--space', space], 'search space'
    for name, says in [
        ('se(rd=4)', "se has no option 'rd'; it has reduction"),
        ('se(reduction=4', "( has no partner in 'se(reduction=4'"),
        ('se(reduction=id)', 'the value of reduction is not a literal'),
        ('cbam(reduction=8, kernel_size=2)', 'SpatialConvNorm needs an odd kernel_size'),
        ('avg,mlp(rd=4),affine,avg,avg,conv7x7', "genotype, channel_excite: mlp has no option 'rd'"),
        ('avg,mlp_half,affine,avg,avg,conv7x7', "'mlp_half' is now 'mlp(reduction=2)'"),
    ]:
        yield ['info', name], says
    for command in (
        'info resnet20_cifar --genotype',
        'draw -o x.png',
        'attend cat.png -o maps --model resnet18 --insert',
    ):
        yield [*command.split(), 'se(rd=4)'], "se has no option 'rd'; it has reduction"
    yield ['train', '--data', 'data', *TRAIN, '--genotype', 'se(rd=4)'], "se has no option 'rd'; it has reduction"
    yield (
        ['search', 'sase', '--data', 'data', '--space', 'gate_excite=mlp(rd=4)'],
        "gate_excite: mlp has no option 'rd'",
    )
    yield ['search', 'sase', '--data', 'data', '--space', 'gate_excite=mlp(reduction=4'], '( has no partner in'
    yield ['search', 'sase', '--data', 'data', '--space', 'gate_excite=mlp,mlp( reduction=16 )'], 'mlp is in it twice'
    for text in (DEEP, '{"a":' * 400 + '1' + '}' * 400):
        yield ['info', text], ' characters)'
        yield ['draw', text, '-o', 'x.png'], 'nested too deeply'
        yield ['info', 'resnet20_cifar', '--genotype', text], 'nested too deeply'
        yield ['info', 'resnet20_cifar', '--model-args', f'layers={text}'], 'nested too deeply'
    yield ['info', 'resnet20_cifar', '--model-args', 'layers=[1,1'], "'[1,1' is no valid JSON"
    yield ['info', 'resnet20_cifar', '--genotype', 'x' * 100_000], '(100,002 characters)'
    for file in ('hostile.pt', 'text.pt', 'empty.pt', 'list.pt'):
        yield ['info', 'resnet18', '--model-args', f'checkpoint_path={file}'], file
        yield ['train', '--data', 'data', *TRAIN, '--checkpoint', file], file
        yield ['attend', 'cat.png', '-o', 'maps', '--model', 'resnet20_cifar', '--checkpoint', file], file
    yield ['attend', 'cat.png', '-o', 'maps', '--model', 'resnet20_cifar', '--checkpoint', 'pipe.pt'], 'device or pipe'
    for folder in ('no_name', 'broken', 'weights', 'nowhere'):
        yield ['info', f'local-dir:{folder}', '--model-args', 'pretrained=true'], folder
    # Where it is to be written comes before what is to be done.
    yield ['draw', 'nowhere.json', '-o', 'x.xyz'], "got 'x.xyz'"
    yield ['draw', 'nowhere.json', '-o', 'nowhere/x.png'], 'the picture nowhere/x.png cannot be written: No such file'
    yield ['draw', 'nowhere.json', '-o', 'folder.png'], 'it is a folder'
    yield (
        ['attend', 'nowhere.jpg', '-o', 'in_the_way', '--model', 'resnet20_cifar'],
        'the output folder in_the_way cannot',
    )
    yield ['attend', 'nowhere.jpg', '-o', 'in_the_way/x', '--model', 'resnet20_cifar'], 'in_the_way/x cannot be written'
    yield (
        ['train', '--data', 'nowhere', '--out', 'in_the_way', *TRAIN],
        'the output folder in_the_way cannot be written',
    )
    for seed in ('-1', str(2**64)):
        for command in ('train --data data', 'demo', 'search sase --data data', 'search trionet --data data'):
            yield [*command.split(), '--seed', seed], f'seed must be at least 0 and below 2**64, got {seed}'
        yield ['search', 'sase', '--data', 'data', '--seeds', f'0,{seed}'], f'below 2**64, got {seed}'
    # Control characters are shown as such.
    yield ['info', 'resnet20_cifar', '--genotype', 'red\x1b[31m.json'], r'red\x1b[31m.json'
    yield ['attend', '\x1b[31m.jpg', '-o', 'maps', '--model', 'resnet20_cifar'], r'there is no image \x1b[31m.jpg'
    yield ['train', '--data', 'da\x1b[31m\udcff', *TRAIN], r'there is no data folder da\x1b[31m\udcff'
    yield ['run', '\x1b[31m.py'], r'there is no script \x1b[31m.py'
    yield ['train', '--data', 'data', '\x1b[31m'], r'unrecognized arguments: \x1b[31m'
    yield ['info', 'se', '--channels', '9' * 5000], 'invalid int value'


def test_wrong_input_of_every_kind(capsys, bad_files):
    """One short line, before any work, and no file is run."""
    for argv, says in bad_commands():
        code, out, err = run(capsys, *argv)
        what = f'{[text[:50] for text in argv]}: {err[:1000]}'
        assert (code, out) == (2, ''), what
        *usage, line = err.splitlines()
        assert not usage or usage[0].startswith('usage: '), what
        assert says in line, what
        assert len(line) < 800, what
        assert all(c.isprintable() or c == '\n' for c in err), what
        assert 'this looks like a bug' not in line, what
        assert 'weights_only=False' not in line, what
        assert not {'was_run', 'maps', 'x.png'} & set(os.listdir()), what
        assert not list(Path('runs').rglob('*.pt')), what


@pytest.mark.parametrize('argv', [['draw', 'nowhere.json', '-o', 'x.png'], ['attend', 'nowhere.jpg', '-o', 'maps']])
def test_a_missing_library_is_told_first(capsys, tmp_path, monkeypatch, argv):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    code, _, err = run(capsys, *argv)
    assert (code, err) == (2, 'sase-blocks: error: drawing needs matplotlib: pip install "sase-blocks[viz]"\n')


@pytest.mark.parametrize(
    ('error', 'says'),
    [
        (RuntimeError('all 6 tasks failed;\n the first one: no'), 'all 6 tasks failed; the first one: no'),
        (RuntimeError('x' * 100_000), 'xxx'),
        (EOFError(), 'EOFError: EOFError (this looks like a bug in sase-blocks: --traceback shows where'),
        (KeyError('mean'), "KeyError: 'mean' (this looks like a bug in sase-blocks"),
        (RecursionError('maximum'), 'RecursionError: maximum (this looks like a bug'),
        (AssertionError(), 'AssertionError: AssertionError (this'),
        (AssertionError('Unknown AA policy xyz'), 'error: Unknown AA policy xyz\n'),
        (MemoryError(), 'there is not enough memory; lower --img-size (MemoryError)'),
        (
            torch.OutOfMemoryError('CUDA out of memory. Tried'),
            'not enough memory; lower --img-size (CUDA out of memory.',
        ),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you"), 'there is not enough memory'),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_no_error_is_a_traceback(capsys, monkeypatch, error, says):
    def fail(**_):
        raise error

    monkeypatch.setattr(cli, '_info', fail)
    code, _, err = run(capsys, 'info', 'se')
    assert (code, err.count('\n'), len(err) < 1200) == (2, 1, True)
    assert says in err
    with pytest.raises(type(error)):
        cli.main(['info', 'se', '--traceback'])


@pytest.mark.parametrize(
    ('argv', 'says'),
    [
        ([], 'COMMAND'),
        (['paint'], 'invalid choice'),
        (['info'], 'name'),
        (['info', 'sase', '--channels', 'many'], 'invalid int value'),
        (['train', '--data', '.', '--opt', 'lion'], 'invalid choice'),
        (['train'], '--data'),
        (['draw', 'se'], '-o/--out'),
        (['attend', '--model', 'resnet20_cifar', '-o', 'maps'], 'IMAGE'),
        (['attend', 'cat.jpg', '-o', 'maps', '--start', 'zero'], 'invalid choice'),
        (['run'], 'SCRIPT'),
    ],
)
def test_wrong_options_exit_with_2(capsys, argv, says):
    code, _, err = run(capsys, *argv)
    assert code == 2
    assert says in err
    assert err.splitlines()[-1].startswith('sase-blocks')


@pytest.mark.parametrize('command', [[], ['list'], ['info'], ['draw'], ['attend'], ['demo'], ['train'], ['run']])
def test_help_has_examples(capsys, command):
    code, out, _ = run(capsys, *command, '--help')
    assert code == 0
    assert 'examples:\n  sase-blocks' in out


def test_version(capsys):
    assert run(capsys, '--version')[:2] == (0, f'sase-blocks {__version__}\n')


def test_traceback_on_request_and_interruption(capsys, monkeypatch):
    with pytest.raises(ValueError, match='six choices'):
        cli.main(['info', 'avg,avg', '--traceback'])

    def interrupted(**_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, '_train', interrupted)
    code, _, err = run(capsys, 'train', '--data', '.')
    assert code == 130
    assert err.strip() == 'sase-blocks: interrupted; --resume continues after the last checkpoint'


def as_a_program(command, folder):
    command = command.replace('sase-blocks', f'"{sys.executable}" -m sase_blocks')
    environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
    return subprocess.run(command, shell=True, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_as_a_program(tmp_path):
    """Exit code and the single line, from outside."""
    done = as_a_program('sase-blocks info nothing', tmp_path)
    assert (done.returncode, done.stdout) == (2, '')
    assert done.stderr.startswith("sase-blocks: error: there is no model or block 'nothing'")
    assert done.stderr.count('\n') == 1


@pytest.mark.slow
def test_a_reader_that_goes_away_is_no_error(tmp_path):
    done = as_a_program('sase-blocks list norm | head -n 1', tmp_path)
    assert (done.stdout, done.stderr) == ('channel squeeze (name, key in the paper, options)\n', '')


def test_list_shows_everything_of_ours(capsys):
    code, out, _ = run(capsys, 'list')
    assert code == 0
    words = out.split()
    for table in EXTENDED_SETS.values():
        assert set(table) <= set(words)
    for table in SETS.values():
        assert all(str(cls.paper_key) in out for cls in table.values())
    assert {*list_blocks(), 'resnet50_sase', 'resnet20_cifar'} <= set(words)
    assert 'arXiv 1709.01507' in out
    assert re.search(r'^  cbam .*\n +reduction=16, kernel_size=7$', out, re.MULTILINE)
    assert re.search(r'^  mlp +2conv_1x1 +reduction=16$', out, re.MULTILINE)
    assert 'vit_tiny_patch16_224' not in words
    code, out, _ = run(capsys, 'list', 'GAP+std')
    assert (code, out.count('avg_std'), 'avg_max' in out) == (0, 2, False)
    assert 'vit_tiny_patch16_224' in run(capsys, 'list', 'vit_tiny')[1]


@pytest.mark.parametrize(
    ('argv', 'lines'),
    [
        (
            ['resnet50_sase'],
            ['parameters 28,102,568 (', 'layer1 256 x 56 x 56', 'layer4 2048 x 7 x 7', 'in 16 blocks, layer1.0.se to'],
        ),
        pytest.param(
            ['resnet50'],
            ['parameters 25,557,032', 'MACs 4,089,184,256 for one input of 3 x 224 x 224'],
            marks=pytest.mark.slow,
        ),
        pytest.param(['resnet50_sase', '--img-size', '288'], ['layer4 2048 x 9 x 9'], marks=pytest.mark.slow),
        (['resnet20_cifar'], ['parameters 272,474', 'layer3 64 x 8 x 8', 'output 10']),
        (['resnet20_cifar', '--model-args', 'num_classes=7', 'in_chans=1'], ['output 7', 'one input of 1 x 32 x 32']),
        pytest.param(
            ['resnet50_sase', '--attn-stages', '3', '4'],
            ['in 9 blocks, layer3.0.se to layer4.2.se'],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ['resnet50_sase', '--genotype', 'avg,conv3,affine,avg,avg,affine'],
            ['[conv3]', 'in 16 blocks'],
            marks=pytest.mark.slow,
        ),
        (['sase', '--channels', '64', '--img-size', '9'], ['output 64 x 9 x 9', '(the genotype of sase)']),
        pytest.param(
            ['resnet50_cbam'],
            ['in attention blocks', 'sigmoid(mlp(avg(x)) + mlp(max(x))) in 16 blocks, layer1.0.se.0 to'],
            marks=pytest.mark.slow,
        ),
        (['resnet20_cifar', '--genotype', 'ge', '--attn-stages', '3'], ['in 3 blocks, layer3.0.se to layer3.2.se']),
        (['avg,conv3,affine,l2_norm,avg,conv5x5', '--channels', '8'], ['output 8 x 56 x 56', '[l2_norm]']),
        (
            ['cbam(kernel_size=3, reduction=8)', '--channels', '64'],
            ['sigmoid(mlp(reduction=8)(avg(x)) + mlp(red', 'options reduction=16, kernel_size=7 by default'],
        ),
        (['se', '--channels', '64', '--model-args', 'reduction=4'], ['parameters 2,048']),
        (
            ['avg,mlp(reduction=4),affine,avg,avg,conv5x5', '--channels', '8'],
            ['--[mlp(reduction=4)]--', 'output 8 x 56 x 56'],
        ),
        (
            ['resnet20_cifar', '--genotype', 'ge(extent=2);se(reduction=4) ; eca'],
            ['nearest(g)', 'mlp(reduction=4)(avg(x))'],
        ),
        (
            ['test_resnet', '--insert', 'se(reduction=8)', '--stages', '3', '--img-size', '64', '--start', 'paper'],
            [
                "se(reduction=8) (start='paper') in ResNet: 1 places",
                'layer3.0.se 192 4 x 4 9,216 9.22 k',
                'for one input of 3 x 64 x 64',
                'attention y = x * sigmoid(mlp(reduction=8)(avg(x))) in layer3.0.se',
            ],
        ),
    ],
)
def test_info(capsys, argv, lines):
    code, out, err = run(capsys, 'info', *argv)
    assert (code, err) == (0, '')
    text = [' '.join(line.split()) for line in out.splitlines()]
    for line in lines:
        assert any(line in found for found in text), out


@pytest.mark.parametrize('name', list_blocks())
def test_info_of_every_block(capsys, name):
    code, out, err = run(capsys, 'info', name, '--channels', '64', '--img-size', '9')
    assert (code, err) == (0, '')
    assert 'output  64 x 9 x 9' in ' '.join(out.split()).replace('output ', 'output  ')
    assert '\nformula y = ' in out


@pytest.mark.parametrize(
    'genotype', [SASE_GENOTYPE, *(Genotype.random(seed) for seed in range(4))], ids=lambda g: str(g)
)
def test_drawing_is_aligned_and_holds_the_six_operations(genotype):
    """Vertical strokes meet: below and above each | there is a stroke, a corner or a node."""
    lines = draw_genotype(genotype).splitlines()
    for name in genotype.to_dict().values():
        assert any(f'[{name}]' in line for line in lines)
    assert draw_genotype(genotype).count('[') == 6
    width = max(map(len, lines))
    lines = [line.ljust(width) for line in lines]
    for above, line, below in zip(lines, lines[1:], lines[2:], strict=False):
        for column, character in enumerate(line):
            if character == '|':
                assert above[column] in "|+xcdq'", f'{column}\n' + '\n'.join(lines)
                assert below[column] in "|+d'", f'{column}\n' + '\n'.join(lines)
    for label in ('> q', '> c', '> d*x', '> s', '> a', 'y = x * (1 + (c + a) / 2)'):
        assert sum(label in line for line in lines) == 1


def test_train_prints_the_result(capsys, tmp_path):
    root = make_images(tmp_path / 'data', train=4, val=2, classes=('cat', 'dog'))
    options = [
        '--model',
        'resnet20_cifar',
        '--genotype',
        'se',
        '--attn-stages',
        '1',
        '3',
        '--model-args',
        'drop_rate=0.1',
    ]
    options += ['--img-size', '12', '--epochs', '1', '--batch-size', '4', '--workers', '0', '--cpu', '--no-tensorboard']
    code, out, err = run(capsys, 'train', '--data', str(root), '--out', str(tmp_path / 'run'), *options)
    assert (code, [line for line in err.splitlines() if 'error' in line]) == (0, [])
    assert 'finished: accuracy' in out
    assert (tmp_path / 'run' / 'best.pt').is_file()
    code, _, err = run(capsys, 'train', '--data', str(root), '--out', str(tmp_path / 'run'), *options)
    assert (code, 'holds a run already' in err) == (2, True)


@pytest.mark.parametrize(
    ('argv', 'start'),
    [
        (['sase', '-o', 'a.png'], b'\x89PNG'),
        (['cbam', '-o', 'a.svg', '--no-sets'], b'<?xml'),
        (['avg,conv3,affine,p_norm,avg,conv7x7', '--out', 'a.pdf'], b'%PDF'),
        (['image 32; stem 16; heads 4; 64: conv3/16*2; 128: axial/32', '-o', 'a.png'], b'\x89PNG'),
    ],
)
def test_draw(capsys, tmp_path, monkeypatch, argv, start):
    monkeypatch.chdir(tmp_path)
    assert run(capsys, 'draw', *argv) == (0, f'written: {argv[2]}\n', '')
    (file,) = tmp_path.iterdir()
    assert file.read_bytes().startswith(start)


def photos(folder, *names):
    folder.mkdir(exist_ok=True)
    noise = np.random.default_rng(0)
    for name in names:
        Image.fromarray(noise.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(folder / name)
    return [str(folder / name) for name in names]


def trained_run(folder):
    """A checkpoint as `sase-blocks train` writes it."""
    model = timm.create_model('resnet20_cifar', genotype='se', num_classes=2)
    config = {'model': 'resnet20_cifar', 'model_args': {'genotype': 'se'}, 'img_size': 16}
    data = {'classes': ['cat', 'dog'], 'train': 4, 'val': 2}
    save_checkpoint({'state_dict': model.state_dict(), 'config': config, 'data': data}, folder / 'best.pt')


def trained_insertion(folder):
    config = {'model': 'test_resnet', 'model_args': {}, 'img_size': 32, 'insert': 'coord', 'stages': [3, 4]}
    model, _ = build_network(NetworkConfig(**config), 2)
    data = {'classes': ['cat', 'dog']}
    save_checkpoint({'state_dict': model.state_dict(), 'config': config, 'data': data}, folder / 'best.pt')


def inserted(folder):
    model = timm.create_model('resnet10t', num_classes=3)
    insert(model, 'coord')
    save_checkpoint(model.state_dict(), folder / 'tuned.pt')


@pytest.mark.parametrize(
    ('prepare', 'argv', 'says'),
    [
        (None, ['--model', 'resnet20_cifar', '--genotype', 'cbam'], 'note: without --checkpoint'),
        pytest.param(
            None,
            ['--model', 'resnet20_cifar', '--genotype', 'se', '--model-args', 'num_classes=0', 'in_chans=1'],
            'note',
            marks=pytest.mark.slow,
        ),
        (trained_run, ['--checkpoint', 'best.pt'], 'best.pt: 146 tensors loaded'),
        pytest.param(
            trained_run,
            ['--checkpoint', 'best.pt', '--model', 'resnet20_cifar', '--img-size', '24'],
            'tensors loaded',
            marks=pytest.mark.slow,
        ),
        (trained_insertion, ['--checkpoint', 'best.pt'], 'best.pt: '),
        pytest.param(
            inserted,
            ['--model', 'resnet10t', '--insert', 'coord', '--checkpoint', 'tuned.pt', '--model-args', 'num_classes=3'],
            'tensors loaded',
            marks=pytest.mark.slow,
        ),
    ],
)
def test_attend(capsys, tmp_path, monkeypatch, prepare, argv, says):
    monkeypatch.chdir(tmp_path)
    if prepare:
        prepare(tmp_path)
    paths = photos(tmp_path / 'a', 'cat.png', 'cat.jpg') + photos(tmp_path / 'b', 'cat.png')
    code, out, err = run(capsys, 'attend', *paths, '-o', 'new/maps', *argv)
    assert (code, err) == (0, '')
    assert says in out
    written = ['cat_attention.png', 'cat_attention_2.png', 'cat_attention_3.png']
    assert sorted(file.name for file in (tmp_path / 'new' / 'maps').iterdir()) == sorted(written)
    lines = out.splitlines()[-3:]
    for line, path, name in zip(lines, paths, written, strict=True):
        assert line.startswith(f'{path}: ')
        assert line.endswith(f'written: new/maps/{name}')
        with Image.open(tmp_path / 'new' / 'maps' / name) as picture:
            assert picture.width > 400
        if prepare in (trained_run, trained_insertion):
            assert ': cat, 0.' in line or ': dog, 0.' in line
        elif 'num_classes=0' in argv:
            assert 'class' not in line
        else:
            assert ': class ' in line


@pytest.mark.slow
def test_attend_overwrites_no_image(capsys, tmp_path):
    """Not even one that has the name of a picture."""
    paths = photos(tmp_path, 'cat.png', 'cat_attention.png')
    before = [Path(path).read_bytes() for path in paths]
    code, out, _ = run(capsys, 'attend', *paths, '-o', str(tmp_path), '--model', 'resnet20_cifar', '--genotype', 'se')
    assert (code, 'cat_attention_2.png' in out, 'cat_attention_attention.png' in out) == (0, True, True)
    assert [Path(path).read_bytes() for path in paths] == before


def test_attend_on_names_that_are_not_utf8(capsys, tmp_path):
    """Of the image and of the class."""
    trained_run(tmp_path)
    saved = read_checkpoint(tmp_path / 'best.pt')
    save_checkpoint({**saved, 'data': {'classes': ['c\udce4t', 'd\x1bg']}}, tmp_path / 'best.pt')
    paths = photos(tmp_path, 'a\udcff\n.png')
    code, out, _ = run(capsys, 'attend', *paths, '-o', str(tmp_path / 'maps'), '--checkpoint', f'{tmp_path}/best.pt')
    assert (code, len(list((tmp_path / 'maps').iterdir()))) == (0, 1)
    line = out.splitlines()[-1]
    assert line.isprintable()
    assert r'a\udcff\n.png: ' in line
    assert r'c\udce4t, 0.' in line or r'd\x1bg, 0.' in line


def broken(folder):
    (folder / 'dog.jpg').write_bytes(Path(photos(folder, 'whole.jpg')[0]).read_bytes()[:400])


@pytest.mark.parametrize(
    ('prepare', 'argv', 'says'),
    [
        (lambda folder: (folder / 'dog.jpg').write_text('a text'), ['--genotype', 'se'], 'dog.jpg is not an image'),
        (broken, ['--genotype', 'se'], 'dog.jpg is a broken image'),
        (lambda folder: (folder / 'dog.jpg').mkdir(), ['--genotype', 'se'], 'dog.jpg is a folder'),
        (lambda folder: None, ['--genotype', 'se'], 'there is no image'),
        (lambda folder: photos(folder, 'dog.jpg'), [], 'holds no attention block'),
        (lambda folder: photos(folder, 'dog.jpg'), ['--genotype', 'se', '--model-args', 'in_chans=5'], '5 channels'),
    ],
)
def test_attend_writes_nothing_unless_all_images_are_good(capsys, tmp_path, prepare, argv, says):
    prepare(tmp_path)
    paths = [*photos(tmp_path, 'cat.png'), str(tmp_path / 'dog.jpg')]
    code, out, err = run(capsys, 'attend', *paths, '-o', str(tmp_path / 'maps'), '--model', 'resnet20_cifar', *argv)
    assert (code, err.count('\n'), says in err) == (2, 1, True), err
    assert 'written' not in out
    assert not (tmp_path / 'maps').exists()


SCRIPT = """
import os, sys
import neighbour
import timm
print(__name__, __file__ == sys.argv[0], sys.argv[1:], timm.is_model('resnet50_sase'), sys.path[0] == neighbour.FOLDER)
if 'fail' in sys.argv:
    raise ValueError('made by the script')
if 'broken' in sys.argv:
    os.open('nowhere', os.O_RDONLY)
sys.exit({'seven': 7, 'text': 'a last word', 'none': None}.get(sys.argv[-1], 0))
"""


@pytest.fixture
def script(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, 'neighbour', raising=False)
    (tmp_path / 'script.py').write_text(SCRIPT)
    (tmp_path / 'neighbour.py').write_text('import os\nFOLDER = os.path.dirname(os.path.realpath(__file__))\n')
    return str(tmp_path / 'script.py')


@pytest.mark.parametrize(
    ('arguments', 'expected', 'says'),
    [
        (['none'], None, ''),
        (['text'], 'a last word', ''),  # Python prints it and exits with 1
        (['--help'], 0, ''),
        (['-o', 'x', '--', '--traceback', '--model', 'resnet50_sase'], 0, ''),
        (['fail'], 1, 'ValueError: made by the script'),
        (['broken'], 1, "No such file or directory: 'nowhere'"),
    ],
)
def test_run_is_as_python_runs_a_script(capsys, script, arguments, expected, says):
    with pytest.raises(SystemExit) as exit_:
        cli.main(['run', script, *arguments])
    out, err = capsys.readouterr()
    assert out == f'__main__ True {arguments} True True\n'
    assert (exit_.value.code, says in err) == (expected, True)
    assert 'runpy' not in err
    assert 'sase-blocks: error' not in err


@pytest.mark.slow
def test_run_as_a_program(script):
    done = subprocess.run(
        [sys.executable, '-m', 'sase_blocks', 'run', script, 'seven'],
        env={**os.environ, 'PYTHONPATH': str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (7, "__main__ True ['seven'] True True\n"), done.stderr


def test_run_leaves_the_process_as_it_was(capsys, tmp_path):
    (tmp_path / 'script.py').write_text('import sys\nprint(sys.argv[1], sys.path[0])\n')
    before = sys.argv[:], sys.path[:], sys.modules['__main__']
    assert run(capsys, 'run', str(tmp_path / 'script.py'), '-x') == (0, f'-x {tmp_path.resolve()}\n', '')
    assert (sys.argv, sys.path, sys.modules['__main__']) == before
