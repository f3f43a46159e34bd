"""Every example runs, warns of nothing, and prints what it promises."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


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


def test_every_example_is_tested():
    tests = ''.join(path.read_text() for path in (ROOT / 'tests').glob('test_*.py'))
    # By file name where it is run, without .py where its functions are.
    untested = [
        path.name
        for path in (ROOT / 'examples').glob('*.py')
        if f"'{path.name}'" not in tests and f"'{path.stem}'" not in tests
    ]
    assert untested == []
