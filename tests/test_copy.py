"""Copied blocks: the same keys, values and gradients as the library's, in a process that cannot import it."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from copied_blocks import SHAPE, results
from test_contract import SMALLEST
from test_options import CASES, GENOTYPE

import sase_blocks
from sase_blocks import cli, create_block, list_blocks
from sase_blocks.copying import COPYRIGHT, LAYERS, check_copy, copy_blocks
from sase_blocks.copying import file as copied_file
from sase_blocks.ops import EXTENDED_SETS
from sase_blocks.ops.options import parse_name
from sase_blocks.selfattention.local_routes import TORCH_ROUTES

ROOT = Path(__file__).parent.parent
QUICK = ['sase', 'eca', 'cbam', 'avg_skew,conv3_x2,conv7,avg_std,avg_skew,conv1x5_5x1', 'LocalSelfAttention']


def genotypes() -> list[str]:
    """Genotypes that together have every primitive."""
    sets = [list(EXTENDED_SETS[name]) for name in ('channel_squeeze', *['channel_excite'] * 2)]
    sets += [list(EXTENDED_SETS[name]) for name in (*['spatial_squeeze'] * 2, 'spatial_excite')]
    return [','.join(names[(i + e) % len(names)] for e, names in enumerate(sets)) for i in range(max(map(len, sets)))]


def row(text: str, capture: bool = False, **arguments) -> dict:
    return {
        'id': f'{text} {arguments}',
        'text': text,
        'arguments': arguments,
        'dtypes': ['float32', 'bfloat16'],
        'capture': ['fx', 'script', 'export'] if capture else [],
        'smallest': SMALLEST.get(parse_name(text)[0] if ',' not in text else text, 2),
    }


def original(text: str, arguments: dict) -> torch.nn.Module:
    if text in LAYERS:
        return LAYERS[text](SHAPE[1], **arguments)
    return create_block(text, SHAPE[1], feat_size=SHAPE[2:], **arguments)


def header(code: str) -> str:
    return code.split('\n\n')[0]


def write_copies(folder: Path, rows: list[dict]) -> None:
    modules: dict[str, str] = {}
    for entry in rows:
        text = entry['text']
        entry['module'] = modules.setdefault(text, f'copy{len(modules)}')
        code = copy_blocks([text], f'{entry["module"]}.py')
        (folder / f'{entry["module"]}.py').write_text(code)
        entry['class'] = re.search(r"^__all__ = \['(\w+)'\]$", code, re.MULTILINE)[1]


def run_copies(folder: Path, rows: list[dict], python: str = sys.executable) -> dict[str, dict[str, torch.Tensor]]:
    """What the copies give in another process, by the rows' ids."""
    (folder / 'rows.json').write_text(json.dumps(rows))
    program = [python, '-W', 'ignore', Path(__file__).parent / 'copied_blocks.py', folder]
    run = subprocess.run(program, capture_output=True, text=True, check=False, cwd=folder)
    assert run.returncode == 0, run.stderr
    return torch.load(folder / 'results.pt')


def compare(folder: Path, rows: list[dict]) -> None:
    """Copies the blocks, runs them in another process, and compares what they give, bit for bit."""
    write_copies(folder, rows)
    found = run_copies(folder, rows)
    for entry in rows:
        expected = results(lambda entry=entry: original(entry['text'], entry['arguments']))
        copied = found[entry['id']]
        assert list(copied) == list(expected), entry['id']
        different = [key for key, value in expected.items() if not torch.equal(copied[key], value)]
        assert different == [], entry['id']


@pytest.fixture
def folder(tmp_path, one_thread):
    return tmp_path


def test_copies_give_the_same(folder):
    compare(folder, [row(text) for text in QUICK])


@pytest.mark.slow
def test_every_copied_block_gives_the_same(folder):
    names = [*list_blocks(), *LAYERS]
    rows = [row(text, capture=True) for text in names]
    rows += [
        row('TrioBlock', operator=name, out_channels=64, stride=2, width=16, heads=4)
        for name in ('conv', 'local', 'axial')
    ]
    rows += [row('LocalSelfAttention', position='position_sensitive', border='mask', kernel_size=3, stride=2)]
    rows += [row('LocalSelfAttention', route=route) for route in TORCH_ROUTES]
    rows += [row('AxialSelfAttention', size=(4, 9), stride=2, route='recompute')]
    compare(folder, rows)


@pytest.mark.slow
def test_every_copied_option_gives_the_same(folder):
    """As the default of the class, and as an argument."""
    texts = [text for kind, text, _ in CASES if kind == 'block' and text != GENOTYPE]
    by_argument = [(name, options) for text in texts for name, options in [parse_name(text)] if options]
    compare(folder, [*map(row, texts), *(row(name, **options) for name, options in by_argument)])


@pytest.mark.slow
def test_every_copied_primitive_gives_the_same(folder):
    rows = [row(text, capture=i % 4 == 0) for i, text in enumerate(genotypes())]
    compare(folder, [*rows, row(GENOTYPE)])


@pytest.mark.skipif(
    'OLD_TORCH_PYTHON' not in os.environ, reason='`make test-copies` names the Python of an older torch'
)
def test_copies_with_an_older_torch(folder):
    """What the headers say: the lowest torch, and the lowest for TorchScript."""
    python = str(Path(os.environ['OLD_TORCH_PYTHON']).absolute())  # the copies run in another folder
    version = subprocess.run(
        [python, '-c', 'import torch; print(torch.__version__)'], capture_output=True, text=True, check=True
    )
    here = tuple(int(n) for n in version.stdout.split('.')[:2])
    rows = [row(text) for text in [*list_blocks(), *LAYERS, *genotypes()]]
    write_copies(folder, rows)
    runnable = []
    for entry in rows:
        text = header((folder / f'{entry["module"]}.py').read_text())
        needed = [tuple(map(int, pair)) for pair in re.findall(r'(?:torch|TorchScript:) (\d+)\.(\d+)', text)]
        if here >= needed[0]:
            scriptable = here >= needed[-1]
            runnable.append(entry | {'dtypes': ['float64'], 'capture': ['fx', 'script'] if scriptable else ['fx']})
    assert len(runnable) > len(rows) / 2, version.stdout
    found = run_copies(folder, runnable, python)
    for entry in runnable:
        expected = results(lambda entry=entry: original(entry['text'], entry['arguments']), ['float64'])
        for key, value in expected.items():
            torch.testing.assert_close(found[entry['id']][key], value, rtol=1e-7, atol=1e-9, msg=f'{entry["id"]} {key}')


@pytest.mark.slow
def test_ruff_accepts_every_copy(tmp_path):
    ruff = shutil.which('ruff', path=str(Path(sys.executable).parent)) or shutil.which('ruff')
    if ruff is None:
        pytest.skip('needs ruff')
    names = [*list_blocks(), *LAYERS, *genotypes()]
    for i, name in enumerate(names):
        code = copy_blocks([name], f'copy{i}.py')
        assert not re.search(r'\b(alpha|Graph|ABC|per_channel|paper_key|keep_channels|primitive_name)\b', code), name
        assert 'all blocks accept' not in code.replace('device, dtype: ignored; all blocks accept', ''), name
        assert '\n# Papers: ' in code or 'in no paper' in code.lower(), name
        (tmp_path / f'copy{i}.py').write_text(code)
    several = [name for name in names if name != 'ge_plus']
    (tmp_path / 'all.py').write_text(copy_blocks([f'Class{i}={name}' for i, name in enumerate(several)], 'all.py'))
    config = ['--config', str(ROOT / 'pyproject.toml')]
    for command in (['check', *config], ['format', '--check', *config], ['check', '--isolated']):
        run = subprocess.run(
            [ruff, *command, '--no-cache', '.'], capture_output=True, text=True, check=False, cwd=tmp_path
        )
        assert run.returncode == 0, run.stdout + run.stderr


def test_a_copy_has_only_what_it_needs():
    for name, most in (('sase', 390), ('eca', 120), ('se', 130)):
        assert len(copy_blocks([name]).splitlines()) < most
    for name in ('sase', 'bam', 'coord', 'TrioBlock'):
        tree = ast.parse(copy_blocks([name]))
        imported = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        imported |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        assert {module.partition('.')[0] for module in imported} <= {
            'torch',
            'math',
            'typing',
            'contextlib',
            'collections',
        }
        names = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)} | {
            n.arg for n in ast.walk(tree) if isinstance(n, ast.arg)
        }
        assert not names & {'alpha', 'Graph', 'Edge', 'ABC', 'per_channel', 'paper_key'}


def test_several_blocks_share_what_they_have_in_common():
    code = copy_blocks(['se', 'Four=se(reduction=4)', 'cbam'], 'attention.py')
    assert "__all__ = ['SE', 'Four', 'CBAM']" in code
    assert code.count('class ChannelMLP(') == 1
    assert code.splitlines()[1] == "#     sase-blocks copy se 'Four=se(reduction=4)' cbam -o attention.py"
    namespace: dict = {}
    exec(code, namespace)
    assert namespace['SE'](32).excite.fc1.weight.shape == (2, 32)
    assert namespace['Four'](32).excite.fc1.weight.shape == (8, 32)
    assert namespace['Four'](32, reduction=2).excite.fc1.weight.shape == (16, 32)
    found = copy_blocks(['Mine=avg_max, 2conv_1x1, affine, p-norm, GAP, conv3x3'], 'mine.py')  # becomes canonical
    assert found.splitlines()[1] == '#     sase-blocks copy Mine=avg_max,mlp,affine,p_norm,avg,conv3x3 -o mine.py'
    many = [f'Class{i}=se(reduction={i + 1})' for i in range(9)]
    assert check_copy(copy_blocks(many, 'many.py')) == ('unchanged', '')


def test_a_copy_checks_its_input():
    namespace: dict = {}
    exec(copy_blocks(['se', 'sge']), namespace)
    for build, error in (
        (lambda: namespace['SE'](0), 'SE needs channels to be an int of at least 1, got 0'),
        (lambda: namespace['SE'](32, reduction=33), 'ChannelMLP of 32 channels needs reduction to be at most 32'),
        (lambda: namespace['SE'](8)(torch.zeros(1, 4, 2, 2)), 'built for 8 channels, got 4'),
        (lambda: namespace['SE'](8)(torch.zeros(8, 2, 2)), 'expected a feature map of shape'),
        (lambda: namespace['SpatialGroupEnhance'](8, groups=3), 'needs groups to divide its 8 channels'),
    ):
        with pytest.raises(ValueError, match=error):
            build()


HEADERS = {
    'eca': ['only torch 2.1 and'],
    'cbam': ['only torch 2.1 (TorchScript: 2.2) and'],
    'shuffle': ['only torch 2.5 and'],
    'AxialSelfAttention': ['only torch 2.4 and'],
    'TrioBlock': ['only torch 2.7 and', 'leaves out the Triton route'],
}


def test_the_header():
    lines = copy_blocks(['bam'], 'bam.py').splitlines()
    assert lines[0] == f'# Copied from sase-blocks {sase_blocks.__version__} by'
    assert lines[1] == '#     sase-blocks copy bam -o bam.py'
    assert '# It needs only torch 2.1 (TorchScript: 2.2) and Python 3.10, or later.' in lines[2]
    assert lines[3] == f'# Papers: arXiv 1807.06514. MIT License. {COPYRIGHT}.'
    assert COPYRIGHT in (ROOT / 'LICENSE').read_text()
    for name, words in HEADERS.items():
        assert all(text in header(copy_blocks([name])) for text in words), name


WRONG = [
    (['ecaa'], "unknown attention block 'ecaa'. Did you mean 'eca'?"),
    (['avg,mlp'], 'six choices'),
    (['se(kernel_size=3)'], "se has no option 'kernel_size'; it has reduction"),
    (['TrioBlock(heads=4)'], 'TrioBlock is copied with its own defaults'),
    (['2nd=se'], "'2nd' cannot be the name of a class"),
    (['class=se'], "'class' cannot be the name of a class"),
    (['se', 'se(reduction=4)'], "two blocks would be the class SE; name one of them, NAME='se(reduction=4)'"),
    (
        ['ChannelMLP=eca', 'se'],
        'ChannelMLP is also the name of sase_blocks.ops.channel_excite.ChannelMLP, which is copied',
    ),
    (['CBAMChannel=eca', 'cbam'], 'CBAMChannel is also the name of a part of another block; choose another'),
    (['nn=se'], 'nn is also the name of torch.nn, which is copied'),
    ([], 'pass the blocks to copy and -o FILE'),
]


def test_wrong_names_are_one_line(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for names, error in WRONG:
        assert cli.main(['copy', *names, '-o', 'x.py']) == 2, names
        said = capsys.readouterr().err
        assert error in said
        assert said.count('\n') == 1
        assert 'bug' not in said
    assert list(tmp_path.iterdir()) == []


def test_files(capsys, tmp_path, monkeypatch):
    """The command line: what is written, refused, unchanged, changed by hand, and out of date."""
    monkeypatch.chdir(tmp_path)

    def run(code, says, *argv):
        assert cli.main(['copy', *argv]) == code
        captured = capsys.readouterr()
        assert says in captured.out + captured.err
        return captured.out

    run(2, 'there is no folder nowhere', 'eca', '-o', 'nowhere/eca.py')
    run(2, "must be a .py file with the name of a module, got 'eca.txt'", 'eca', '-o', 'eca.txt')
    run(2, "got 'e-c-a.py'", 'eca', '-o', 'e-c-a.py')
    run(2, 'pass the blocks to copy and -o FILE', 'eca')
    run(2, 'takes no block and no other option', 'eca', '--check', 'eca.py')
    run(0, 'written: eca.py, ', 'eca', '-o', 'eca.py')
    run(2, 'eca.py exists; pass --overwrite to replace it', 'eca', '-o', 'eca.py')
    run(0, 'written: eca.py, ', 'eca', '-o', 'eca.py', '--overwrite')
    assert run(0, 'eca.py: unchanged', '--check', 'eca.py').count('\n') == 1
    file = tmp_path / 'eca.py'
    text = file.read_text()
    file.write_bytes(text.replace('\n', '\r\n').encode())  # as git writes it on Windows
    run(0, 'unchanged', '--check', 'eca.py')

    file.write_text(text.replace('return x * self', 'return x + self'))
    diff = run(4, 'eca.py: changed by hand', '--check', 'eca.py')
    assert '\n-        return x * self.gate' in diff
    assert '\n+        return x + self.gate' in diff
    monkeypatch.setattr(copied_file, '__version__', '99.0')  # another version, so both
    run(4, 'eca.py: changed by hand', '--check', 'eca.py')
    file.write_text(text)
    diff = run(3, 'eca.py: out of date; to update it', '--check', 'eca.py')
    assert '\n+# Copied from sase-blocks 99.0 by' in diff
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)

    for changed, says in (
        (text.replace('# Copied from', '# From'), 'it does not start with the header'),
        (re.sub('# sha256.*\n', '', text), 'it does not start with the header'),
        (text.replace('copy eca -o', 'draw eca -o'), 'its header has no command of the form'),
        (text.replace('copy eca -o', "copy 'eca -o"), 'its header has no command of the form'),
        (text.replace('copy eca -o', 'copy ecaa -o'), "unknown attention block 'ecaa'"),
        ('x = 1\n', 'it does not start with the header'),
        ('', 'it does not start with the header'),
    ):
        file.write_text(changed)
        run(2, f'eca.py: {says}' if 'ecaa' not in says else says, '--check', 'eca.py')
    file.write_bytes(b'\xff\xfe')
    run(2, 'it is no UTF-8 text', '--check', 'eca.py')
    run(2, 'nothing.py', '--check', 'nothing.py')
