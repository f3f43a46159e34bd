"""The command line: exit codes, one line for a user's mistake, and what list and info print."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_data import make_images

from sase_blocks import __version__, cli
from sase_blocks.blocks import SASE_GENOTYPE, Genotype
from sase_blocks.ops import SETS

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
        (['info', 'sase', '--channels', '0'], 'channels to be an int of at least 1'),
        (['info', 'sase', '--img-size', '0'], '--img-size must be at least 1'),
        (['info', 'resnet18', '--genotype', 'sase'], 'resnet18 cannot be built with'),
        (['info', 'resnet50_sase', '--genotype', 'sasee'], "Did you mean 'sase'"),
        (['info', 'resnet50_sase', '--attn-stages', '7'], '7'),
        (['info', 'resnet18', '--model-args', 'no_equals_sign'], "--model-args takes KEY=VALUE, got 'no_equals_sign'"),
        (['list', 'zzzzzzzzz'], "no block, primitive or model has 'zzzzzzzzz' in its name"),
        (['demo', '--epochs', '0'], 'epochs must be at least 1'),
        (['train', '--data', '/nowhere/at/all'], 'there is no data folder /nowhere/at/all; expected ROOT/train/CLASS'),
        (['train', '--data', '.', '--model', 'resnet50_sasse'], 'did you mean resnet50_sase'),
        (['train', '--data', '.', '--epochs', '0'], 'epochs must be at least 1, got 0'),
        (['train', '--data', '.', '--no-check', '--skip-broken'], 'skip_broken'),
    ],
)
def test_mistake_is_one_line_and_exit_code_2(capsys, tmp_path, monkeypatch, argv, says):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, *argv)
    assert code == 2
    assert err.startswith('sase-blocks: error: ')
    assert err.count('\n') == 1
    assert says in err


@pytest.mark.parametrize(
    ('argv', 'says'),
    [
        ([], 'COMMAND'),
        (['paint'], 'invalid choice'),
        (['info'], 'name'),
        (['info', 'sase', '--channels', 'many'], 'invalid int value'),
        (['train', '--data', '.', '--opt', 'lion'], 'invalid choice'),
        (['train'], '--data'),
    ],
)
def test_wrong_options_exit_with_2(capsys, argv, says):
    code, _, err = run(capsys, *argv)
    assert code == 2
    assert says in err
    assert err.splitlines()[-1].startswith('sase-blocks')


@pytest.mark.parametrize('command', [[], ['list'], ['info'], ['demo'], ['train']])
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
    assert err.strip() == 'sase-blocks: interrupted; --resume continues after the last finished epoch'


def test_as_a_program(tmp_path):
    """Exit code and the single line, from outside; and a reader that goes away is no error."""
    command = f'"{sys.executable}" -m sase_blocks list norm | head -n 1; "{sys.executable}" -m sase_blocks info nothing'
    done = subprocess.run(
        command, shell=True, cwd=tmp_path, env={**os.environ, 'PYTHONPATH': str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stdout == 'channel squeeze (name, key in the paper)\n'
    assert done.stderr.startswith("sase-blocks: error: there is no model or block 'nothing'")
    assert done.stderr.count('\n') == 1


def test_list_shows_everything_of_ours(capsys):
    code, out, _ = run(capsys, 'list')
    assert code == 0
    words = out.split()
    for table in SETS.values():
        assert set(table) <= set(words)
        assert all(str(cls.paper_key) in out for cls in table.values())
    assert {'sase', 'se', 'cbam', 'resnet50_sase', 'resnet20_cifar'} <= set(words)
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
        (['resnet50'], ['parameters 25,557,032', 'MACs 4,089,184,256 for one input of 3 x 224 x 224']),
        (['resnet50_sase', '--img-size', '288'], ['layer4 2048 x 9 x 9']),
        (['resnet20_cifar'], ['parameters 272,474', 'layer3 64 x 8 x 8', 'output 10']),
        (['resnet20_cifar', '--model-args', 'num_classes=7', 'in_chans=1'], ['output 7', 'one input of 1 x 32 x 32']),
        (['resnet50_sase', '--attn-stages', '3', '4'], ['in 9 blocks, layer3.0.se to layer4.2.se']),
        (['resnet50_sase', '--genotype', 'avg,conv3,affine,avg,avg,affine'], ['[conv3]', 'in 16 blocks']),
        (['sase', '--channels', '64', '--img-size', '9'], ['output 64 x 9 x 9', '(the genotype of sase)']),
        (['avg,conv3,affine,l2_norm,avg,conv5x5', '--channels', '8'], ['output 8 x 56 x 56', '[l2_norm]']),
    ],
)
def test_info(capsys, argv, lines):
    code, out, err = run(capsys, 'info', *argv)
    assert (code, err) == (0, '')
    text = [' '.join(line.split()) for line in out.splitlines()]
    for line in lines:
        assert any(line in found for found in text), out


@pytest.mark.parametrize(
    'genotype', [SASE_GENOTYPE, *(Genotype.random(seed) for seed in range(4))], ids=lambda g: str(g)
)
def test_drawing_is_aligned_and_holds_the_six_operations(genotype):
    """Vertical strokes meet: below and above each | there is a stroke, a corner or a node."""
    lines = cli.draw_genotype(genotype).splitlines()
    for name in genotype.to_dict().values():
        assert any(f'[{name}]' in line for line in lines)
    assert cli.draw_genotype(genotype).count('[') == 6
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
