"""``sase-blocks search``: the demo, campaigns, and one line for each mistake."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import timm
from test_data import make_images, swap, truncate
from test_search_run import SPACE

from sase_blocks import runs
from sase_blocks.blocks import SASE_GENOTYPE
from sase_blocks.cli import main
from sase_blocks.comparing import comparison
from sase_blocks.demo import run_search_demo
from sase_blocks.search.sase import campaign as function
from sase_blocks.train import ADVICE

campaign = sys.modules[function.__module__]  # which the function hides

pytestmark = pytest.mark.usefixtures('one_thread')

SMALL = f'--space|{SPACE}|--model-args|layers=[1,1,1]|channels=[8,16,16]|--img-size|12|--batch-size|4'.split('|')
SMALL += ['--epochs', '1', '--hessian-every', '0', '--cpu', '--no-tensorboard', '--workers', '0']


def check_demo(out, epochs):
    result = json.loads((out / 'genotype.json').read_text())
    assert result['epoch'] == epochs
    assert (out / 'genotype.png').stat().st_size > 10_000
    assert (out / 'logits.png').stat().st_size > 10_000
    model = timm.create_model('resnet50_sase', genotype=str(out / 'genotype.json'), num_classes=2)
    assert str(model.layer4[0].se.genotype) == result['genotype']


@pytest.mark.slow
def test_demo(tmp_path, capsys):
    result = run_search_demo(tmp_path / 'demo', epochs=1)
    check_demo(tmp_path / 'demo', 1)
    assert f'found: {result["genotype"]}' in capsys.readouterr().out


@pytest.mark.slow
def test_demo_as_a_user_runs_it(tmp_path, capsys):
    assert main(['search', 'sase', '--demo', '--out', str(tmp_path / 'demo')]) == 0
    check_demo(tmp_path / 'demo', 10)
    rows = [json.loads(line) for line in (tmp_path / 'demo' / 'metrics.jsonl').read_text().splitlines()]
    assert rows[-1]['held_out_acc1'] > 80  # 10 would be chance


@pytest.mark.slow
def test_a_campaign(tmp_path, capsys, monkeypatch):
    """Two seeds, random labels, from scratch. Run again, it repeats nothing. It checks every image once."""
    checked, real = [], runs.inspect_images
    monkeypatch.setattr(runs, 'inspect_images', lambda samples: checked.append(samples.split) or real(samples))
    data, out = make_images(tmp_path / 'images', train=8, val=2, classes=('cat', 'dog')), tmp_path / 'run'
    command = ['search', 'sase', '--data', str(data), '--out', str(out), *SMALL, '--seeds', '0,1', '--null']
    command += ['--evaluate', '1', '--baselines', 'none,se', '--random', '1', '--resume']
    assert main(command) == 0
    assert checked == ['train', 'val']
    said = capsys.readouterr().out
    assert {p.name for p in out.iterdir()} >= {
        'seed-0', 'seed-1', 'null-0', 'null-1', 'agreement.json', 'genotype.json', 'evaluation', 'evaluation.png',
    }  # fmt: skip
    evaluation = json.loads((out / 'evaluation' / 'evaluation.json').read_text())
    names = [row['name'] for row in evaluation['candidates']]
    assert names[0] == 'found'
    assert {'none', 'se', 'random 0'} <= set(names)
    genotype = json.loads((out / 'genotype.json').read_text())['genotype']
    assert re.search(f'^found: {re.escape(genotype)}$', said, re.MULTILINE)
    before = {path: path.stat().st_mtime_ns for path in out.glob('*/last.pt')}
    assert main(command) == 0
    assert {path: path.stat().st_mtime_ns for path in out.glob('*/last.pt')} == before
    swap(data / 'train' / 'dog')
    for more in ([], ['--seeds', '0,1,2'], ['--evaluate', '2']):
        assert main([*command, *more]) == 2
        assert 'images' in capsys.readouterr().err


@pytest.mark.parametrize(
    ('arguments', 'says'),
    [
        ([], '--data DIR is missing'),
        (['--data', 'nowhere'], 'there is no data folder nowhere'),
        (['--data', '.', '--seeds', '0,x'], "--seeds takes comma-separated numbers, such as 0,1,2, got '0,x'"),
        (['--data', '.', '--seeds', ''], 'seeds is empty: give at least one'),
        (['--data', '.', '--evaluate', '-1'], '--evaluate must be at least 0, got -1'),
        (['--data', '.', '--random', '3'], '--random is for the evaluation and needs --evaluate N'),
        (['--data', '.', '--evaluate-epochs', '3'], '--evaluate-epochs is for the evaluation'),
        (['--data', '.', '--evaluate-lr', '0.1'], '--evaluate-lr is for the evaluation'),
        (['--data', '.', '--baselines', 'se'], '--baselines is for the evaluation'),
        (['--data', '.', '--ray', 'auto'], '--ray is for several runs at once'),
        (['--data', '.', '--train-split', 'extra'], "train_split must be left at 'train' without a dataset"),
        (['--demo'], '--demo has its own settings, and accepts only --out and --seed: leave out --cpu'),
        (
            ['--demo', '--ray', 'auto'],
            '--demo has its own settings, and accepts only --out and --seed: leave out --ray',
        ),
        (['--data', '.', '--space', 'gate_excite='], 'gate_excite: no operation is left'),
        (['--data', '.', '--order', '2', '--compile'], 'compile must be off for order 2'),
        (['--data', '.', '--epochs', '0'], 'epochs must be at least 1'),
    ],
    ids=lambda value: ' '.join(value) if isinstance(value, list) else '',
)
def test_mistakes_are_one_line(arguments, says, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(['search', 'sase', '--cpu', '--no-tensorboard', *arguments]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count('\n') == 1
    assert not list(Path(tmp_path).rglob('last.pt'))


def in_the_way(path):
    path.parent.mkdir()
    path.touch()


@pytest.mark.parametrize(
    ('harm', 'arguments', 'says'),
    [
        (None, ['--baselines', 'se', 'sasse'], "sasse of the comparison: .*Did you mean 'sase'"),
        (None, ['--baselines', 'nowhere.json'], r'nowhere\.json cannot be read'),
        (None, ['--baselines', 'se', 'se'], "two blocks of the comparison have the name 'se'"),
        (None, ['--seeds', '0,1', '--baselines', f'seed-0={SASE_GENOTYPE}'], "have the name 'seed-0'"),
        (None, ['--random', '64'], 'the space holds 63 genotypes besides the found one, 64 random ones were asked for'),
        (None, ['--random', str(64**3), '--per-stage'], 'the space holds 262143 genotypes'),
        (None, ['--model', 'resnet18', '--model-args', 'layers=[1,1,1,1]', '--per-stage'], 'found of .* 4 genotypes'),
        (None, ['--evaluate-lr', '-1'], 'lr must be above 0'),
        (None, ['--evaluate-epochs', '0'], 'epochs must be at least 1'),
        (None, ['--ray-gpus', '1'], '--ray-gpus needs --ray ADDRESS'),
        (None, ['--ray', ''], "ray: expected 'auto', 'local' or HOST:PORT, got ''"),
        (lambda root: shutil.rmtree(root / 'val'), [], 'has no folder val'),
        (lambda root: shutil.rmtree(root / 'val' / 'dog'), [], 'the classes of train and val differ'),
        (lambda root: truncate(root / 'val' / 'dog' / '1.png'), [], r'broken image .*val.dog.1\.png'),
        (lambda root: in_the_way(root.parent / 'run' / 'evaluation'), [], 'cannot be written'),
        (lambda root: in_the_way(root.parent / 'run' / 'last.pt'), [], 'holds a run already'),
    ],
)  # fmt: skip
def test_an_evaluation_is_checked_before_the_search(tmp_path, capsys, monkeypatch, harm, arguments, says):
    data = make_images(tmp_path / 'images', train=6, val=2, classes=('cat', 'dog'))
    if harm:
        harm(data)
    monkeypatch.setattr(campaign, 'search', lambda *_: pytest.fail('the search began'))
    command = [
        'search',
        'sase',
        '--data',
        str(data),
        '--out',
        str(tmp_path / 'run'),
        *SMALL,
        '--evaluate',
        '1',
        *arguments,
    ]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert re.search(says, error), error
    assert [line[:19] for line in error.splitlines() if not line.startswith('checking')] == ['sase-blocks: error:']
    assert not list(tmp_path.rglob('genotype.json'))


@pytest.mark.parametrize(
    ('error', 'says'),
    [
        (RuntimeError('no\nkernel'), 'RuntimeError: no kernel'),
        (
            FloatingPointError(f'the loss is nan at step 3; x. {ADVICE}'),
            'FloatingPointError: the loss is nan at step 3; x. Try a lower --evaluate-lr.',
        ),
    ],
    ids=['an error', 'divergence'],
)
def test_all_trainings_failed(tmp_path, capsys, monkeypatch, error, says):
    def fail(config, data):
        raise error

    monkeypatch.setattr(comparison, 'train', fail)
    data = make_images(tmp_path / 'images', train=8, val=2, classes=('cat', 'dog'))
    found = {'genotype': str(SASE_GENOTYPE), 'verdict': 'decided'}
    monkeypatch.setattr(campaign, 'search', lambda *_: found)
    monkeypatch.setattr(comparison, 'measure', lambda *_: {'parameters': 1, 'time_ratio': 1.0})
    command = ['search', 'sase', '--data', str(data), '--out', str(tmp_path / 'run'), *SMALL, '--evaluate', '1']
    assert main([*command, '--baselines', 'none']) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == f'sase-blocks: error: all 2 trainings failed; the first one, found, seed 0: {says}'


@pytest.mark.parametrize('missing', ['scipy', 'accelerate'])
def test_missing_library_of_an_evaluation_is_told_first(tmp_path, capsys, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    data = make_images(tmp_path / 'images', train=8, val=2, classes=('cat', 'dog'))
    monkeypatch.setattr(campaign, 'search', lambda *_: pytest.fail('the search began'))
    command = ['search', 'sase', '--data', str(data), '--out', str(tmp_path / 'run'), *SMALL, '--evaluate', '1']
    assert main(command) == 2
    assert 'pip install "sase-blocks[search]"' in capsys.readouterr().err


def test_help_shows_the_defaults(capsys):
    assert main(['search', 'sase', '--help']) == 0
    said = ' '.join(capsys.readouterr().out.split())
    assert '--arch-lr' in said
    assert "'paper', 'extended'" in said
