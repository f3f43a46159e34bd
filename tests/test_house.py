"""The house rules that CONTRIBUTING.md states: who may import whom, what is loaded late, a complete map."""

import ast
import graphlib
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / 'sase_blocks'

# From the ground up: a room imports only rooms that come before it here. A room is a file or a folder of the package,
# and `__init__` is what `import sase_blocks` runs.
ROOMS = (
    'reading', 'checks', 'numerics', 'profiling', 'checkpoint', 'ops', 'blocks', 'selfattention', 'convert', 'models',
    'insertion', 'deploy', '__init__', 'mmengine', 'ultralytics', 'copying', 'images', 'data', 'settings', 'runs',
    'networks', 'jobs', 'viz', 'train', 'comparing', 'search', 'demo', 'cli', '__main__',
)  # fmt: skip

# What every installation has, by the name it is imported by: the three dependencies and what these bring along (tqdm
# with huggingface_hub, which timm requires, and filelock with torch).
REQUIRED = {'torch', 'einops', 'timm', 'torchvision', 'numpy', 'PIL', 'safetensors', 'tqdm', 'filelock', 'sase_blocks'}

# Triton's decorator takes the functions of a module, so a file of kernels imports it at its top. Such a file is itself
# imported where it is needed, like an optional library.
KERNELS = {'sase_blocks.selfattention.local_triton_forward', 'sase_blocks.selfattention.local_triton_backward'}

# Nobody knows what is in them, so everything ends there.
DRAWERS = {'utils', 'util', 'helpers', 'helper', 'common', 'misc'}


def room(path: Path) -> str:
    """The room that a file of the package is in."""
    return path.relative_to(PACKAGE).parts[0].removesuffix('.py')


def imports(source: str, path: Path) -> Iterator[tuple[str, bool, int]]:
    """Absolute name, whether it is imported together with the file, and the line, of all that a file imports."""

    def visit(node: ast.AST, early: bool) -> Iterator[tuple[str, bool, int]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, early, child.lineno) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                here = ['sase_blocks', *path.relative_to(PACKAGE).parts[:-1]]
                base = here[: len(here) - child.level + 1] if child.level else []
                module = '.'.join([*base, *([child.module] if child.module else [])])
                yield from ((f'{module}.{alias.name}', early, child.lineno) for alias in child.names)
            else:
                typing_only = isinstance(child, ast.If) and 'TYPE_CHECKING' in ast.unparse(child.test)
                function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
                yield from visit(child, early and not function and not typing_only)

    yield from visit(ast.parse(source), True)


def imported_room(name: str) -> str | None:
    """The room that an absolute name is in; None for another package's."""
    parts = name.split('.')
    if parts[0] != 'sase_blocks':
        return None
    return parts[1] if len(parts) > 1 and parts[1] in ROOMS else '__init__'


def faults(source: str, path: Path) -> list[str]:
    """What one file breaks of the rules."""
    found = []
    if path.stem in DRAWERS:
        found.append(f'{path.name}: a drawer; name the file after the one thing that is in it')
    own = '.'.join(['sase_blocks', *path.relative_to(PACKAGE).with_suffix('').parts])
    for name, early, line in imports(source, path):
        above = imported_room(name)
        if early and own not in KERNELS and any(name == k or name.startswith(f'{k}.') for k in KERNELS):
            found.append(f'{path.name}:{line}: {name} imports Triton and must be imported inside a function')
        if above is not None and ROOMS.index(above) > ROOMS.index(room(path)):
            found.append(f'{path.name}:{line}: {room(path)} imports {above}, which is above it')
        top = name.split('.')[0]
        kernel = own in KERNELS and top == 'triton'
        if above is None and early and not kernel and top not in REQUIRED and top not in sys.stdlib_module_names:
            found.append(
                f'{path.name}:{line}: {top} is optional and must be imported inside the function that needs it'
            )
    return found


def hidden(source: str, modules: set[str]) -> set[str]:
    """The modules of a package that its ``__init__`` hides behind something else by the same name.

    ``import package.module as x`` gives that other thing.
    """
    found = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.ImportFrom):
            of_modules = node.level == 1 and node.module is None
            found |= {alias.asname or alias.name for alias in node.names if not of_modules or alias.asname}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    return found & modules


@pytest.mark.parametrize('init', sorted(PACKAGE.rglob('__init__.py')), ids=lambda path: path.parent.name)
def test_no_package_hides_a_module_of_its_own(init):
    modules = {path.stem for path in init.parent.iterdir() if path.suffix == '.py' or path.is_dir()}
    assert hidden(init.read_text(encoding='utf-8'), modules) == set()


@pytest.mark.parametrize(
    ('source', 'expected'),
    [
        ('from .insert import insert, remove', {'insert'}),
        ('from .surgery import attach as insert', {'insert'}),
        ('def insert(): ...', {'insert'}),
        ('class insert: ...', {'insert'}),
        ('insert = 3', {'insert'}),
        ('from . import insert, remove', set()),
        ('from .insert import remove', set()),
    ],
)
def test_a_hidden_module_is_found(source, expected):
    assert hidden(source, {'insert', 'surgery'}) == expected


@pytest.mark.parametrize('path', sorted(PACKAGE.rglob('*.py')), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_file_keeps_the_rules(path):
    assert room(path) in ROOMS, f'{room(path)} is no room yet: give it a place in ROOMS and in CONTRIBUTING.md'
    assert faults(path.read_text(encoding='utf-8'), path) == []


@pytest.mark.parametrize(
    ('file', 'source', 'expected'),
    [
        ('ops/avg.py', 'from sase_blocks.blocks import SASE', 'ops imports blocks'),
        ('ops/avg.py', 'from ..blocks import SASE', 'ops imports blocks'),
        ('ops/avg.py', 'from .. import models', 'ops imports models'),
        ('ops/avg.py', 'import sase_blocks.models.resnet', 'ops imports models'),
        ('ops/avg.py', 'from sase_blocks import SASE', 'ops imports __init__'),
        ('blocks/sase.py', 'def f():\n    from ..train import train', 'blocks imports train'),
        ('models/resnet.py', 'if True:\n    from ..cli import main', 'models imports cli'),
        ('viz.py', 'import matplotlib.pyplot as plt', 'matplotlib is optional'),
        ('train.py', 'from accelerate import Accelerator', 'accelerate is optional'),
        ('train.py', 'try:\n    import tensorboard\nexcept ImportError:\n    pass', 'tensorboard is optional'),
        ('selfattention/local.py', 'import triton', 'triton is optional'),
        ('selfattention/local.py', 'from .local_triton_forward import forward', 'imports Triton'),
        ('selfattention/local.py', 'from . import local_triton_backward', 'imports Triton'),
        ('ops/utils.py', '', 'a drawer'),
        ('cli.py', 'from .train import train', None),
        ('selfattention/local_triton_forward.py', 'import triton', None),
        ('selfattention/local_triton.py', 'def f():\n    from .local_triton_forward import forward', None),
        ('ops/avg.py', 'from .primitive import Primitive', None),
        ('viz.py', 'def plot():\n    import matplotlib', None),
        ('viz.py', 'if TYPE_CHECKING:\n    from matplotlib.axes import Axes', None),
    ],
)
def test_the_rules_catch(file, source, expected):
    found = faults(source, PACKAGE / file)
    assert found == [] if expected is None else len(found) == 1 and expected in found[0]


def graph_of(sources: dict[Path, str]) -> dict[str, set[str]]:
    """Each module and the modules of the package that it imports, early or late."""
    names = {path: '.'.join(['sase_blocks', *path.relative_to(PACKAGE).with_suffix('').parts]) for path in sources}
    names = {path: name.removesuffix('.__init__') for path, name in names.items()}
    known = set(names.values())
    graph = {}
    for path, source in sources.items():
        found = set()
        for name, _, _ in imports(source, path):
            while name and name not in known:
                name = name.rpartition('.')[0]
            found |= {name} - {'', names[path]}
        graph[names[path]] = found
    return graph


def test_no_import_makes_a_circle():
    circle = {PACKAGE / 'ops/a.py': 'def f():\n    from .b import g', PACKAGE / 'ops/b.py': 'from . import a'}
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter(graph_of(circle)).prepare()
    files = {path: path.read_text(encoding='utf-8') for path in PACKAGE.rglob('*.py')}
    graphlib.TopologicalSorter(graph_of(files)).prepare()


def test_what_stays_whole_in_a_trace_is_decorated_where_it_is_defined():
    """A statement ``torch.fx.wrap('f')`` works only in its module, and is not part of a copied block."""
    named, decorated = set(), set()
    for path in PACKAGE.rglob('*.py'):
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            if isinstance(node, ast.Expr) and ast.unparse(node).startswith("torch.fx.wrap('"):
                named.add(node.value.args[0].value)
            elif isinstance(node, ast.For) and 'torch.fx.wrap(' in ast.unparse(node.body):
                named |= {constant.value for constant in node.iter.elts}
            elif isinstance(node, ast.FunctionDef) and 'torch.fx.wrap' in map(ast.unparse, node.decorator_list):
                decorated.add(node.name)
    assert len(named) > 5
    assert named <= decorated, f'decorate with @torch.fx.wrap where defined: {named - decorated}'


def test_the_map_names_every_room():
    text = (PACKAGE.parent / 'CONTRIBUTING.md').read_text(encoding='utf-8')
    missing = [name for name in ROOMS if not name.startswith('__') and f'`{name}' not in text]
    assert missing == []


@pytest.mark.parametrize('folder', ['benchmarks', 'examples'])
def test_scripts_import_what_exists(folder):
    """Also within their functions, which the tests do not all run."""
    missing = []
    for path in (PACKAGE.parent / folder).glob('*.py'):
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            if not isinstance(node, ast.ImportFrom) or (node.module or '').partition('.')[0] != PACKAGE.name:
                continue
            if node.module.rpartition('.')[2] in ('ultralytics', 'mmengine'):  # they import what they are named after
                continue
            module = importlib.import_module(node.module)
            for alias in node.names:
                room = hasattr(module, '__path__') and importlib.util.find_spec(f'{node.module}.{alias.name}')
                if not room and not hasattr(module, alias.name):
                    missing.append(f'{path.name}: {node.module}.{alias.name}')
    assert missing == []


@pytest.mark.slow
def test_import_stays_light():
    """What `import sase_blocks` loads beyond timm: the package itself, nothing of the extras."""
    late = ('matplotlib', 'accelerate', 'sklearn', 'tensorboard', 'onnx', 'triton', 'torch._dynamo', 'torch._inductor')
    late += ('tqdm', 'transformers', 'pandas', 'ray', 'optuna')
    code = (
        'import sys, timm\n'
        'before = set(sys.modules)\n'
        'import sase_blocks\n'
        f'print([name for name in {late} if name in sys.modules and name not in before])'
    )
    run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout.strip()) == (0, '[]'), run.stderr
