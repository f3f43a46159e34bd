"""benchmarks/gpu.py: a step that fails does not stop the others, and what each came to. No times, no GPU."""

import contextlib
import importlib.util
import json
import re
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope='module')
def gpu():
    spec = importlib.util.spec_from_file_location('benchmark_gpu', ROOT / 'benchmarks' / 'gpu.py')
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # a dataclass looks its module up there
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


WRITE = 'import pathlib, sys; pathlib.Path(sys.argv[1]).write_text("new"); print("said")'
# A program that starts another one and waits for it: both have to go.
HANG = (
    'import pathlib, subprocess, sys; '
    'child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1e6)"]); '
    'pathlib.Path(sys.argv[1] + ".child").write_text(str(child.pid)); child.wait()'
)
FOR_EVER = 1e6
STEPS = {  # name: program, limit in seconds, outcome, exit code
    'good': (WRITE, FOR_EVER, 'passed', 0),
    'wrong': ('import sys; print("why"); sys.exit(3)', FOR_EVER, 'failed', 3),
    'raises': (WRITE + '; 1 / 0', FOR_EVER, 'failed', 1),
    'writes nothing': ('pass', FOR_EVER, 'failed', 0),
    'hangs': (HANG, 1, 'timed out', -9),
    'good again': (WRITE, FOR_EVER, 'passed', 0),
}


def steps(gpu, names=tuple(STEPS)):
    return [
        gpu.Step(name, ('-S', '-c', STEPS[name][0], f'{{out}}/{name}.json'), f'{name}.json', STEPS[name][1])
        for name in names
    ]


def test_what_each_step_comes_to(gpu, tmp_path, capsys, monkeypatch):
    out = tmp_path / 'new' / 'out'
    out.mkdir(parents=True)
    number = out / 'hangs.json.child'

    class Timer(threading.Timer):
        """The limit is over once the program has started the other one, however long that takes."""

        def run(self):
            while not self.finished.wait(0.02):
                if self.interval < FOR_EVER and number.exists() and number.read_text():
                    self.function()
                    return

    monkeypatch.setattr(gpu, 'threading', SimpleNamespace(Event=threading.Event, Timer=Timer))
    (out / 'writes nothing.json').write_text('of an earlier run')
    assert gpu.run(steps(gpu), out, 'cpu') == 1
    summary = json.loads((out / 'summary.json').read_text())
    found = {step['name']: (step['outcome'], step['exit_code']) for step in summary['steps']}
    assert found == {name: row[2:] for name, row in STEPS.items()}
    printed = capsys.readouterr().out.splitlines()
    last = printed[-1 - len(STEPS) : -1]
    for line, (name, row) in zip(last, STEPS.items(), strict=True):
        kept = out / (f'{name}.json' if name in ('good', 'raises', 'good again') else f'{name}.log')
        assert re.fullmatch(rf'{row[2]} +{name} +[\d.]+ s  {re.escape(str(kept))}', line)
    assert printed.count('said') == 3
    assert (out / 'wrong.log').read_text() == 'why\n'
    assert 'ZeroDivisionError' in (out / 'raises.log').read_text()
    child = Path(f'/proc/{number.read_text()}/stat')
    # Was it killed, too? It ends once its turn comes, and is gone when its new parent has taken notice.
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        while child.read_text().split()[2] not in 'ZX':
            time.sleep(0.02)


def test_all_passed(gpu, tmp_path):
    assert gpu.run(steps(gpu, ['good', 'good again']), tmp_path, 'cpu') == 0
    assert (tmp_path / 'good.json').read_text() == 'new'
    assert gpu.run(steps(gpu, ['hangs']), tmp_path, 'cpu', 0.1) == 1


@pytest.mark.parametrize('device', ['cuda', 'cpu'])
@pytest.mark.parametrize('quick', [False, True])
@pytest.mark.parametrize('compiled', [False, True])
def test_the_steps_are_possible(gpu, device, quick, compiled):
    """Scripts that are there, with options that they have, and files that do not meet."""
    found = gpu.steps_of(device, quick, compiled)
    assert len({step.name for step in found}) == len({step.file for step in found}) == len(found)
    for step in found:
        assert any(text.startswith('{out}/') or '={out}/' in text for text in step.arguments)
        if step.arguments[0] != '-m':
            text = (ROOT / step.arguments[0]).read_text(encoding='utf-8')
            assert [o for o in step.arguments if o.startswith('--') and f"'{o}'" not in text] == []
    if not compiled and not quick:
        assert sum(step.limit for step in found) <= 600


WRONG = [
    (['--device', 'cpu', '--only', 'blocks', 'block'], r'no step block; there are tests, .*supernet'),
    (['--device', 'cpu', '--limit-factor', '0'], r'--limit-factor must be above 0, got 0\.0'),
    ([], 'no CUDA device here; --device cpu --quick runs without'),
]


@pytest.mark.parametrize(('arguments', 'text'), WRONG)
def test_wrong_arguments(gpu, arguments, text, tmp_path, capsys, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(SystemExit, match='2'):
        gpu.main([*arguments, '--out', str(tmp_path / 'out')])
    assert re.search(text, ' '.join(capsys.readouterr().err.split()))
    assert not (tmp_path / 'out').exists()


def test_only_and_limits_reach_the_run(gpu, tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(gpu, 'run', lambda *arguments: seen.setdefault('arguments', arguments) and 0)
    gpu.main(['--device', 'cpu', '--only', 'search-2', 'tests', '--limit-factor', '3', '--out', str(tmp_path)])
    chosen, out, device, factor, _ = seen['arguments']
    assert [step.name for step in chosen] == ['tests', 'search-2']
    assert (out, device, factor) == (tmp_path, 'cpu', 3.0)
