"""The parts of the documentation's site that are generated: docs/hooks.py. The whole is built by `make docs`."""

import importlib.util
import re
from pathlib import Path

import pytest

import sase_blocks

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope='module')
def hooks():
    spec = importlib.util.spec_from_file_location('hooks', ROOT / 'docs' / 'hooks.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ('page', 'markdown', 'expected'),
    [
        ('index.md', '[a](docs/models.md)', '[a](models.md)'),
        ('index.md', '[a](docs/models.md#weights)', '[a](models.md#weights)'),
        ('index.md', '![a](docs/images/maps.png)', '![a](images/maps.png)'),
        ('index.md', '[the\nlog](CHANGELOG.md)', '[the\nlog](changelog.md)'),
        ('models.md', '[a](training.md), [b](../README.md)', '[a](training.md), [b](index.md)'),
        ('models.md', '[`quickstart.py`](../examples/quickstart.py)', '[`quickstart.py`](examples/quickstart.md)'),
        ('benchmarks.md', '[a](../docs/models.md)', '[a](models.md)'),
        ('examples/quickstart.md', '[a](../docs/models.md)', '[a](../models.md)'),
        # What is no page keeps its text.
        ('index.md', '[a](tests/test_contract.py) and [b](CITATION.cff)', 'a and b'),
        # Not ours to touch.
        (
            'index.md',
            '[a](https://example.org/docs/x.md), [b](#here)',
            '[a](https://example.org/docs/x.md), [b](#here)',
        ),
        ('index.md', '`blocks[i](x)`', '`blocks[i](x)`'),
        ('index.md', '```python\nblocks[i](x)\n```', '```python\nblocks[i](x)\n```'),
        ('index.md', '````\n```\n[a](docs/b.md)\n````', '````\n```\n[a](docs/b.md)\n````'),
    ],
)
def test_links_of_the_repository_become_links_of_the_site(hooks, page, markdown, expected):
    assert hooks.site_links(markdown, page) == expected


def test_a_program_with_a_fence_in_it_stays_one_listing(hooks):
    code = 'CARD = """\n```python\nblocks[i](x)\n```\n"""'
    page = hooks.example_page('examples/hub.py', code)
    assert page.endswith(f'````python title="examples/hub.py"\n{code}\n````\n')
    assert hooks.site_links(page, 'examples/hub.md') == page


@pytest.mark.slow
def test_the_gallery_shows_every_block(hooks):
    names = sase_blocks.list_blocks()
    text = hooks.gallery({name: float(i) for i, name in enumerate(names, start=1)})
    assert re.findall(r'^## `(\w+)`', text, re.MULTILINE) == names
    assert re.findall(r'\(images/blocks/(\w+)\.svg\)', text) == names
    rows = dict(re.findall(r'^\| \[`(\w+)`\].*\| ([\d.]+) \|$', text, re.MULTILINE))
    assert list(rows) == names
    assert rows['se'] == '1.00'
    assert rows[names[-1]] == f'{len(names) / (1 + names.index("se")):.2f}'
    assert '[arXiv 1709.01507](https://arxiv.org/abs/1709.01507)' in text


@pytest.mark.parametrize(
    ('name', 'channels', 'expected'), [('se', 256, (2 * 256 * 16, 2 * 256 * 16)), ('simam', 64, (0, 0))]
)
def test_cost(hooks, name, channels, expected):
    assert hooks.cost(name, channels) == expected


@pytest.mark.slow
def test_a_drawing_is_svg_and_the_same_every_time(hooks):
    svg = hooks.drawing('cbam')
    assert svg.lstrip().startswith('<?xml')
    assert '</svg>' in svg
    assert svg == hooks.drawing('cbam')


def test_every_page_and_every_public_name_has_its_place(hooks):
    nav = (ROOT / 'mkdocs.yml').read_text().split('\nnav:')[1]
    pages = {path.name for path in (ROOT / 'docs').glob('*.md')}
    pages |= {page for page in hooks.PAGES.values() if not page.startswith('examples/')} | {'gallery.md'}
    pages |= {f'copied_{name}.md' for name in hooks.COPIED}
    assert set(re.findall(r'(\S+\.md)$', nav, re.MULTILINE)) == pages
    directives = hooks.public_names().split('\n\n')
    assert [line.rsplit('.', 1)[1] for line in directives] == sase_blocks.__all__
