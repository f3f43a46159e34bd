"""Every example runs, warns of nothing, and prints what it promises."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.parametrize(
    ('name', 'expected'),
    [
        ('quickstart.py', ['SASE(64): (2, 64, 28, 28) -> (2, 64, 28, 28)', 'resnet50_sase: (2, 10)', 'loss ']),
        ('own_backbone.py', ['small CNN: 3 SASE blocks', 'torchvision resnet18: 8 SASE blocks']),
    ],
)
def test_example_runs(name, expected):
    code = f"import runpy; runpy.run_path('examples/{name}', run_name='__main__')"
    run = subprocess.run(
        [sys.executable, '-W', 'error', '-c', code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert [text for text in expected if text not in run.stdout] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ('name', 'files', 'expected'),
    [
        (
            'search_block.py',
            ['genotype.json', 'genotype.png', 'logits.png'],
            [
                'found on 10 classes: ',
                'resnet20_cifar with the found block: (2, 10)',
                'resnet50_sase with the found block: (2, 1000)',
                'mobilenetv3_small_050: 11 blocks inserted',
                'convnext_atto: 12 blocks inserted',
                'regnety_002: 13 blocks inserted',
            ],
        ),
        (
            'search_network.py',
            [f'{stem}-{limit}' for stem in ('architecture', 'network') for limit in ('1.5M', '0.8M')],
            [
                'the space holds 82,944 networks',
                '  1.5M  found  ',
                '  0.8M  found  ',
                '  0.8M  all conv  ',
                'classifier with its weights: (2, 1, 16, 16) -> (2, 10)',
                'strides [1, 1, 2, 4]',
                'a network by hand with ',
            ],
        ),
    ],
    ids=['block', 'network'],
)
def test_search_example_runs(name, files, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr('sys.argv', [name, '--tiny', '--out', str(tmp_path)])
    runpy.run_path(str(ROOT / 'examples' / name), run_name='__main__')
    printed = capsys.readouterr().out
    assert [text for text in expected if text not in printed] == []
    assert 'equal: True' in printed
    assert 'equal: False' not in printed
    # A slow run says more often where it is: 'epoch 1/1: step 3/9, ...'.
    assert len(re.findall(r'epoch 1/1: (?!step)', printed)) == 1, 'one supernet serves all limits'
    written = [path.name for path in tmp_path.iterdir()]
    assert [file for file in files if not any(one.startswith(file) for one in written)] == []


def test_every_example_is_tested():
    tests = ''.join(path.read_text() for path in (ROOT / 'tests').glob('test_*.py'))
    # By file name where it is run, without .py where its functions are.
    untested = [
        path.name
        for path in (ROOT / 'examples').glob('*.py')
        if f"'{path.name}'" not in tests and f"'{path.stem}'" not in tests
    ]
    assert untested == []
