"""`sase-blocks train`: settings from a file and from the run to resume, the file of a run, and its pictures."""

import json
import math
import sys
from dataclasses import asdict, fields
from pathlib import Path

import pytest
from test_data import make_images
from test_train import assert_same

from sase_blocks import cli
from sase_blocks.checkpoint import read_checkpoint
from sase_blocks.reading import format_toml, parse_toml
from sase_blocks.runs import settings_of_run
from sase_blocks.train import TrainConfig

pytestmark = pytest.mark.usefixtures('one_thread')

SETTINGS = {
    'data': 'data', 'model': 'test_resnet', 'model_args': {'drop_rate': 0.1}, 'img_size': 32, 'insert': 'se',
    'stages': [2, 3], 'start': 'paper', 'insert_lr': 0.2, 'lr': 1e-05, 'epochs': 1, 'batch_size': 4, 'workers': 0,
    'cpu': True, 'tensorboard': False, 'seed': 3,
}  # fmt: skip
OPTIONS = [
    '--data', 'data', '--model', 'test_resnet', '--model-args', 'drop_rate=0.1', '--img-size', '32', '--insert', 'se',
    '--stages', '2', '3', '--start', 'paper', '--insert-lr', '0.2', '--lr', '1e-5', '--epochs', '1', '--seed', '3',
    '--batch-size', '4', '--workers', '0', '--cpu', '--no-tensorboard',
]  # fmt: skip


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_images(tmp_path / 'data', train=4, val=2, classes=('cat', 'dog'))
    return tmp_path


def run(capsys, *argv):
    code = cli.main(['train', *argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def settings_in(folder):
    return read_checkpoint(Path(folder, 'last.pt'))['config']


def test_a_file_holds_the_settings_and_options_replace_them(capsys, here):
    lines = [f'{name} = {format_toml(value)}' for name, value in SETTINGS.items()]
    Path('my.toml').write_text('\n'.join(['# mine', 'out = "a"', *lines]))
    assert run(capsys, '--config', 'my.toml')[0] == 0
    assert settings_in('a') == asdict(TrainConfig(**SETTINGS, out='a'))
    argv = ['--config', 'my.toml', '--out', 'b', '--seed', '0', '--stages', '4', '--model-args', 'drop_rate=0.2']
    assert run(capsys, *argv)[0] == 0
    changed = {**SETTINGS, 'seed': 0, 'stages': [4], 'model_args': {'drop_rate': 0.2}}
    assert settings_in('b') == asdict(TrainConfig(**changed, out='b'))


def test_the_file_of_a_run_repeats_it(capsys, here):
    assert run(capsys, *OPTIONS, '--out', 'a')[0] == 0
    text = Path('a/config.toml').read_text()
    assert text.startswith('# sase-blocks train --config config.toml --out ANOTHER_FOLDER repeats this run\n')
    assert {'out', 'resume', 'where'} & set(parse_toml(text)) == set()
    assert run(capsys, '--config', 'a/config.toml', '--out', 'b')[0] == 0
    first, second = (read_checkpoint(Path(name, 'last.pt')) for name in 'ab')
    assert {**first['config'], 'out': 'b'} == second['config']
    assert_same(dict(first['state_dict']), dict(second['state_dict']))
    assert Path('b/config.toml').read_text() == text
    code, _, err = run(capsys, '--config', 'a/config.toml', '--out', 'a')
    assert (code, 'a holds a run already' in err) == (2, True)


def test_the_folder_alone_resumes_a_run(capsys, here):
    assert run(capsys, *OPTIONS, '--out', 'a')[0] == 0
    before = read_checkpoint('a/last.pt')
    code, out, _ = run(capsys, '--resume', '--out', 'a')
    assert (code, 'resuming after epoch 1 of 1' in out) == (0, True)
    assert_same({**read_checkpoint('a/last.pt')}, before)
    # Free settings may change, others not, whether an option or a file gives them.
    assert run(capsys, '--resume', '--out', 'a', '--workers', '1', '--seed', '3')[0] == 0
    Path('other.toml').write_text('lr = 0.5')
    for argv, says in [
        (['--seed', '4'], 'seed was 3 and is 4; set them back or change --out'),
        (['--config', 'other.toml'], 'lr was 1e-05 and is 0.5'),
        (['--insert', 'eca'], "insert was 'se' and is 'eca'"),
        (['--model-args', 'drop_rate=0.5'], "model_args was {'drop_rate': 0.1} and is {'drop_rate': 0.5}"),
        (
            ['--epochs', '2'],
            'epochs was 1 and is 2; the learning rate depends on them, so train on from these weights ',
        ),
    ]:
        code, _, err = run(capsys, '--resume', '--out', 'a', *argv)
        assert (code, says in err) == (2, True), err
    # The advice for more epochs works as it stands.
    assert '--checkpoint a/last.pt --out ANOTHER' in err
    code, out, _ = run(capsys, *OPTIONS, '--epochs', '2', '--checkpoint', 'a/last.pt', '--out', 'ANOTHER')
    assert (code, 'a/last.pt: ' in out) == (0, True)


def test_a_run_that_ended_in_its_first_epoch_is_resumed_from_its_file(capsys, here):
    assert run(capsys, *OPTIONS, '--model-args', 'drop_rate=0.1', 'act_layer=null', '--out', 'a')[0] == 0
    expected = settings_in('a')
    assert expected['model_args'] == {'drop_rate': 0.1, 'act_layer': None}
    for name in ('last.pt', 'best.pt'):
        Path('a', name).unlink()
    assert run(capsys, '--resume', '--out', 'a')[0] == 0
    assert settings_in('a') == {**expected, 'resume': True}


@pytest.mark.parametrize('damage', [b'broken', b''])
def test_a_damaged_run_says_what_to_do(capsys, here, damage):
    Path('a').mkdir()
    Path('a/last.pt').write_bytes(damage)
    code, _, err = run(capsys, '--resume', '--out', 'a')
    assert (code, err.count('\n'), 'delete it to start over' in err) == (2, 1, True)
    Path('a/last.pt').unlink()
    Path('a/config.toml').write_bytes(damage)
    code, _, err = run(capsys, '--resume', '--out', 'a')
    assert (code, err.count('\n'), 'a/config.toml' in err) == (2, 1, True)


@pytest.mark.parametrize(
    ('text', 'says'),
    [
        ('epochs = ', 'my.toml: no valid TOML ('),
        ('[' * 5000, 'my.toml: no valid TOML'),
        ('', 'my.toml is empty'),
        ('epocs = 3', "my.toml: there is no setting 'epocs'; did you mean 'epochs'?"),
        ('batch-size = 3', "there is no setting 'batch-size'; did you mean 'batch_size'?"),
        ('zzz = 3', "there is no setting 'zzz', `sase-blocks train --help` lists all"),
        ('epochs = "3"', "my.toml: epochs must be a whole number, got '3'"),
        ('epochs = true', 'epochs must be a whole number, got True'),
        ('epochs = 1.5', 'epochs must be a whole number, got 1.5'),
        ('lr = "x"', "lr must be a number, got 'x'"),
        ('cpu = 1', 'cpu must be true or false, got 1'),
        ('model = 5', 'model must be a text, got 5'),
        ('stages = ["3"]', "stages must be a list of whole numbers, got ['3']"),
        ('model_args = "x"', "model_args must be a table, got 'x'"),
        ('genotype = 5', 'genotype must be a text, got 5'),
        ('data = "data"\nepochs = 0', 'epochs must be at least 1, got 0'),
        ('epochs = 3', '--data DIR is missing: pass a folder'),
        ('resume = true', '--data DIR is missing, and there is no run to resume in runs/train'),
        ('data = "nowhere"', 'there is no data folder nowhere'),
    ],
)
def test_wrong_files(capsys, here, text, says):
    Path('my.toml').write_text(text)
    code, _, err = run(capsys, '--config', 'my.toml')
    assert (code, err.count('\n'), len(err) < 800) == (2, 1, True), err
    assert says in err
    assert not list(here.rglob('*.pt'))


def test_genotype_in_a_file(capsys, here):
    lines = ['data = "data"', 'model = "resnet20_cifar"', 'genotype = "se"', 'attn_stages = [3]', 'epochs = 1']
    lines += ['batch_size = 4', 'workers = 0', 'cpu = true', 'tensorboard = false', 'out = "a"', 'img_size = 12']
    Path('my.toml').write_text('\n'.join([*lines, '[model_args]', 'drop_rate = 0.1', 'act_layer = "None"']))
    assert run(capsys, '--config', 'my.toml')[0] == 0
    expected = {'genotype': 'se', 'attn_stages': [3], 'drop_rate': 0.1, 'act_layer': None}
    assert settings_in('a')['model_args'] == expected


@pytest.mark.parametrize(
    'value',
    [True, 3, -1, 0.1, 1e-05, 1e30, '', 'a "b"\\ c\n\t\x7f\x00 é 漢', [], ['a', [0.5]], {'a b': {'c': [False]}}],
    ids=repr,
)
def test_toml_is_read_as_it_was_written(value):
    read = parse_toml(f'x = {format_toml(value)}')['x']
    assert (type(read), read) == (type(value), value)


def test_what_toml_cannot_hold(capsys, here):
    assert format_toml(None) == '"None"'
    for value in ('\udcff', object(), {1, 2}):
        with pytest.raises(ValueError, match=r'is no Unicode text|has no form in TOML'):
            format_toml(value)
    Path('data').rename('d\udcffta')
    assert run(capsys, *OPTIONS, '--data', 'd\udcffta', '--out', 'a')[0] == 0
    assert r"# data must be given as an option: 'd\udcffta' is no Unicode text" in Path('a/config.toml').read_text()
    assert run(capsys, '--config', 'a/config.toml', '--data', 'd\udcffta', '--out', 'b')[0] == 0


def test_every_setting_has_an_option_and_a_form_in_a_file(tmp_path):
    assert settings_of_run(TrainConfig, tmp_path) == {}
    from sase_blocks.cli.train import KINDS

    for entry in fields(TrainConfig):
        assert str(entry.type).split(' |')[0] in KINDS, entry.name
        assert entry.metadata['help']


def test_pictures_of_a_run(capsys, here, monkeypatch):
    code, out, _ = run(capsys, *OPTIONS, '--out', 'a')
    assert (code, out.endswith(', pictures in curves.png and confusion.png\n')) == (0, True)
    for name in ('curves.png', 'confusion.png'):
        assert Path('a', name).read_bytes().startswith(b'\x89PNG')
    saved = read_checkpoint('a/last.pt')
    assert saved['confusion'].sum() == 4
    accuracy = json.loads(Path('a/metrics.jsonl').read_text())['acc1']
    assert math.isclose(100 * saved['confusion'].trace() / 4, accuracy)
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    code, out, _ = run(capsys, *OPTIONS, '--out', 'b')
    assert (code, 'pip install "sase-blocks[viz]" and run it again with --resume' in out) == (0, True)
    monkeypatch.undo()
    monkeypatch.chdir(here)
    assert run(capsys, '--resume', '--out', 'b')[0] == 0
    assert Path('b/curves.png').is_file()
