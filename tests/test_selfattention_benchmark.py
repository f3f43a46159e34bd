"""benchmarks/self_attention.py: its table and JSON on a tiny shape, known counts, and its refusals. No times."""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest
import torch


@pytest.fixture
def bench(monkeypatch):
    """The script as a module; its main sets torch to one thread, which is undone here."""
    threads = torch.get_num_threads()
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / 'benchmarks'))
    yield importlib.import_module('self_attention')
    for name in ('self_attention', 'blocks', 'meter'):
        sys.modules.pop(name, None)
    torch.set_num_threads(threads)


TINY = ['--device', 'cpu', '--batch', '1', '--rounds', '2', '--sizes', '7', '--kernels', '3']


@pytest.mark.slow
def test_table_and_json(bench, tmp_path, capsys):
    file = tmp_path / 'new' / 'attention.json'
    assert bench.main([*TINY, '--json', str(file)]) == 0
    printed, result = capsys.readouterr().out, json.loads(file.read_text())
    rows = result['rows']
    assert {row['failure'] for row in rows} == {None}
    attention = [row for row in rows if row['group'] == 'attention']
    assert [row['name'] for row in attention][:4] == ['unfold', 'shifts', 'blocks', 'recompute']
    assert [set(bench.functions(device)) & {'triton'} for device in ('cpu', 'cuda')] == [set(), {'triton'}]
    q, table = 4 * 512 * 7 * 7, 4 * 2 * 32 * 3
    assert {row['fewest_forward_bytes'] for row in attention} == {4 * q + table}
    assert {row['fewest_forward_backward_bytes'] for row in attention} == {12 * q + 3 * table}
    assert 'fewest bytes: forward 0.40 MB, forward + backward 1.21 MB' in printed
    assert {'local', 'timm HaloAttn', 'timm BottleneckAttn', 'axial, maps'} < {row['name'] for row in rows}
    assert 'attention: 1 x 512 x 7 x 7, 8 heads, k = 3, fp32' in printed
    for row in rows:
        assert row['forward_backward_ms'] > 0
        assert (row['kept_of_unfold'] == 1) == (row['name'] == 'unfold')
        if row['group'] == 'attention' and row['name'] in bench.LOCAL_ROUTES:
            assert row['error'] < 1e-4
    recompute = next(row for row in rows if row['name'] == 'recompute')
    assert recompute['kept'] == pytest.approx(3, rel=0.01)


def test_a_wrong_route_is_an_error(bench, monkeypatch):
    wrong = {**bench.functions('cpu'), 'shifts': lambda *a: 1.01 * bench.unfold_attention(*a)}
    monkeypatch.setattr(bench, 'functions', lambda device: wrong)
    assert bench.main([*TINY, '--groups', 'attention']) == 1


def test_peak_bytes(bench):
    x = torch.randn(1000)
    assert bench.highest(lambda: ((x + 1) * 2) * 3, 'cpu') == 8000  # each sum lives until its product is there
    assert bench.highest(lambda: x.reshape(10, 100).t(), 'cpu') == 0
    assert bench.highest(lambda: [x + 1, x + 2, x + 3], 'cpu') == 12000


@pytest.mark.parametrize(
    ('arguments', 'text'), [(['--kernels', '4'], r'odd, got \[4\]'), (['--batch', '0'], 'at least 1')]
)
def test_wrong_options(bench, arguments, text, capsys):
    with pytest.raises(SystemExit):
        bench.parse(['--device', 'cpu', *arguments])
    assert re.search(text, capsys.readouterr().err)
