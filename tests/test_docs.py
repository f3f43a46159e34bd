"""The Python in the README, the docs and the docstrings runs as it stands."""

import doctest
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]
# Pages without Python of their own, and the one whose Python needs other libraries.
NO_PYTHON = {'evidence.md', 'reference.md', 'scaling.md', 'training.md'}
SLOW = ('README.md', 'export.md', 'insertion.md', 'models.md', 'network_search.md', 'pictures.md', 'search.md')
MARKS = dict.fromkeys(SLOW, pytest.mark.slow)
MARKS['ecosystem.md'] = pytest.mark.ecosystem
# tests/test_yolo.py runs this one, in a folder with the files that it names.
ELSEWHERE = {'detectors.md'}
RUN = [pytest.param(page, marks=MARKS.get(page.name, ()), id=page.name) for page in PAGES if page.name not in ELSEWHERE]
DOCTESTS = [
    'sase_blocks.blocks.attention',
    'sase_blocks.blocks.genotype',
    'sase_blocks.blocks.named',
    'sase_blocks.models.architecture',
    'sase_blocks.ops.options',
    'sase_blocks.search.sase.space',
    'sase_blocks.search.trionet.space',
    'sase_blocks.search.trionet.supernet',
]


@pytest.mark.parametrize('page', RUN)
def test_python_of_a_page_runs_from_top_to_bottom(page):
    snippets = re.findall(r'```python\n(.*?)```', page.read_text(), re.DOTALL)
    namespace: dict = {}
    for snippet in snippets:
        exec(compile(snippet, page.name, 'exec'), namespace)
    assert bool(snippets) == (page.name not in NO_PYTHON)


@pytest.mark.parametrize('name', DOCTESTS)
def test_docstrings(name):
    module = importlib.import_module(name)
    import torch

    result = doctest.testmod(module, extraglobs={'torch': torch})
    assert result.failed == 0
    assert result.attempted > 0


@pytest.mark.parametrize('page', PAGES, ids=lambda p: p.name)
def test_links_of_a_page_lead_somewhere(page):
    for target in re.findall(r'\]\((?!https?://)([^)#]+)\)', page.read_text()):
        assert (page.parent / target).exists(), target


def test_the_tables_of_primitives_are_complete():
    from sase_blocks.ops import EXTENDED_SETS, SETS

    text = (ROOT / 'docs' / 'primitives.md').read_text()
    for set_name, table in SETS.items():
        part = text.split(f'## `{set_name.upper()}`')[1].split('\n## ')[0]
        rows = re.findall(r'^\| `(\w+)` \| (\S.*?) \|', part, re.MULTILINE)
        assert rows == [(name, cls.paper_key) for name, cls in table.items()], set_name
    part = text.split('## Beyond the paper')[1].split('\n## ')[0]
    beyond = re.findall(r'^\| `(\w+)` \| `(\w+)` \|', part, re.MULTILINE)
    assert beyond == [(s, name) for s, table in EXTENDED_SETS.items() for name in table if name not in SETS[s]]


def test_the_tables_of_options_are_the_signatures():
    from sase_blocks.blocks import BLOCKS
    from sase_blocks.ops import EXTENDED_SETS
    from sase_blocks.ops.options import options_of

    def rows(page, columns):
        part = (ROOT / 'docs' / page).read_text().split('\n## Options\n')[1].split('\n## ')[0]
        return re.findall(r'^\|' + r' `(.+?)` \|' * columns + r' \S.* \|$', part, re.MULTILINE)

    blocks = [(name, option, repr(value)) for name in BLOCKS for option, value in options_of(BLOCKS[name]).items()]
    assert rows('blocks.md', 3) == blocks
    assert rows('primitives.md', 4) == [
        (set_name, name, option, repr(value))
        for set_name, table in EXTENDED_SETS.items()
        for name, cls in table.items()
        for option, value in options_of(cls).items()
    ]


def test_the_table_of_blocks_is_the_library():
    from sase_blocks.blocks import block_graph, create_block, list_blocks

    rows = re.findall(r'^\| `(\w+)` \| \S.* \| `(.+)` \| ([\d,]+) \|$', (ROOT / 'docs' / 'blocks.md').read_text(), re.M)
    expected = []
    for name in list_blocks():
        parameters = sum(p.numel() for p in create_block(name, 256).parameters())
        expected.append((name, block_graph(name).formula, f'{parameters:,}'))
    assert rows == expected
