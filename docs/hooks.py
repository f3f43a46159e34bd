"""MkDocs hooks (mkdocs.yml) that add the site's pages from outside docs/.

README, CONTRIBUTING, CHANGELOG, benchmarks/README and the examples stay where GitHub shows them, and become pages with
rewritten links. The gallery draws, counts and times each block on the machine that builds the site. Nothing generated
is written to the repository.
"""

from __future__ import annotations

import inspect
import io
import platform
import posixpath
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

import sase_blocks
from sase_blocks.blocks import BLOCKS, block_graph
from sase_blocks.copying import copy_blocks

ROOT = Path(__file__).parent.parent

# Files of the repository that become pages under another name.
PAGES = {
    'README.md': 'index.md',
    'CONTRIBUTING.md': 'contributing.md',
    'CHANGELOG.md': 'changelog.md',
    'benchmarks/README.md': 'benchmarks.md',
    **{f'examples/{path.name}': f'examples/{path.stem}.md' for path in sorted((ROOT / 'examples').glob('*.py'))},
}
PICTURES = {
    str(path.relative_to(ROOT)): f'images/{path.parent.name}.png'
    for path in sorted((ROOT / 'benchmarks' / 'results').glob('compare_*/comparison.png'))
}
COPIED = ('sase', 'cbam')  # the blocks whose copied files are pages
CHANNELS = (64, 256, 1024)
SIZE = 56  # height and width of the map for MACs and time
BATCH = 8
GALLERY = """# Gallery

The graph and cost of every block in `list_blocks()`. [Blocks](blocks.md) describes the blocks, and
[Primitives](primitives.md) the operations. MACs count convolutions and matrix products for one map of 56 x 56. Squeezes
are neither, but also take time.

| block | parameters, C = 256 | MACs, C = 256 | time / SE |
|---|---:|---:|---:|
{rows}

Time is a forward pass of {batch} maps of 256 x 56 x 56 relative to SE, eager, on one thread of {machine}, torch
{torch}, measured when this page was built. For compiled blocks, see [Benchmarks](benchmarks.md).

{sections}"""


def on_config(config: Any) -> Any:
    """Add the examples to the navigation, and make `mkdocs serve` watch the pages' sources."""
    examples = [page for page in PAGES.values() if page.startswith('examples/')]
    config.nav.insert(2, {'Examples': [{f'{Path(page).stem}.py': page} for page in examples]})
    config.watch += [str(ROOT / source) for source in PAGES]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages from outside docs/, copied blocks, and the drawings of the blocks."""
    from mkdocs.structure.files import File

    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding='utf-8')
        content = example_page(source, text) if source.endswith('.py') else text
        files.append(File.generated(config, page, content=content))
    for source, picture in PICTURES.items():
        files.append(File.generated(config, picture, abs_src_path=str(ROOT / source)))
    files.append(File.generated(config, 'gallery.md', content=gallery(times())))
    for name in COPIED:
        content = example_page(f'{name}.py', copy_blocks([name], f'{name}.py'))
        files.append(File.generated(config, f'copied_{name}.md', content=content))
    for name in BLOCKS:
        files.append(File.generated(config, f'images/blocks/{name}.svg', content=drawing(name)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Fill in the generated parts, and turn the repository's links into the site's."""
    if page.file.src_uri == 'reference.md':
        markdown = markdown.replace('<!-- public names -->', public_names())
    return site_links(markdown, page.file.src_uri)


def example_page(source: str, code: str) -> str:
    """A program as a page, in a fence longer than any inside it."""
    fence = '`' * (1 + max(map(len, re.findall('`{3,}', code)), default=2))
    return f'---\nhide: [toc]\n---\n# {Path(source).name}\n\n{fence}python title="{source}"\n{code.rstrip()}\n{fence}\n'


def site_links(markdown: str, page: str) -> str:
    """Turn links between files of the repository, as on GitHub, into links between the site's pages.

    A link to a file without a page keeps only its text. Code is unchanged.
    """
    source = next((source for source, name in PAGES.items() if name == page), f'docs/{page}')

    def replace(match: re.Match[str]) -> str:
        mark, text, target = match['mark'], match['text'], match['target']
        if target is None or re.match(r'[a-z]+:|#', target):
            return match[0]
        path, _, anchor = target.partition('#')
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        path = (PAGES | PICTURES).get(path, path.removeprefix('docs/') if path.startswith('docs/') else '')
        if not path:
            return text
        path = posixpath.relpath(path, posixpath.dirname(page) or '.')
        return f'{mark}[{text}]({path}{"#" + anchor if anchor else ""})'

    code = r'^(?P<fence>`{3,}).*?^(?P=fence)|`[^`\n]+`'
    link = r'(?P<mark>!?)\[(?P<text>[^\]\n]*(?:\n[^\]\n]+)?)\]\((?P<target>[^)\s]+)\)'
    return re.sub(f'{code}|{link}', replace, markdown, flags=re.MULTILINE | re.DOTALL)


def public_names() -> str:
    """mkdocstrings' directives for all names that the package exports."""
    return '\n\n'.join(f'::: {public_path(name)}' for name in sase_blocks.__all__)


def public_path(name: str) -> str:
    """The full path of an exported name, because a function may have its module's name."""
    thing = getattr(sase_blocks, name)
    return f'{thing.__module__}.{thing.__qualname__}'


def drawing(name: str) -> str:
    """The graph of a block as SVG."""
    import matplotlib as mpl

    mpl.use('Agg')
    import matplotlib.pyplot as plt

    from sase_blocks.viz import draw_block

    # A fixed salt and no date, so that the same block gives the same file.
    with mpl.rc_context({'svg.hashsalt': name}):
        figure = draw_block(name)
        buffer = io.StringIO()
        figure.savefig(buffer, format='svg', bbox_inches='tight', metadata={'Date': None})
        plt.close(figure)
    return buffer.getvalue()


def cost(name: str, channels: int) -> tuple[int, int]:
    """Parameters, and MACs of convolutions and matrix products for one map of 56 x 56."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device('meta'):
        block = sase_blocks.create_block(name, channels, feat_size=SIZE).eval()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            block(torch.empty(1, channels, SIZE, SIZE))
    return sum(p.numel() for p in block.parameters()), counter.get_total_flops() // 2


@lru_cache
def times(channels: int = 256) -> dict[str, float]:
    """Seconds of each block's forward pass, eager, in eval mode, on one thread of this machine."""
    from torch.utils.benchmark import Timer

    x = torch.randn(BATCH, channels, SIZE, SIZE)
    seconds = {}
    for name in BLOCKS:
        block = sase_blocks.create_block(name, channels, feat_size=SIZE).eval()
        with torch.no_grad():
            timer = Timer('block(x)', globals={'block': block, 'x': x}, num_threads=1)
            seconds[name] = timer.blocked_autorange(min_run_time=0.5).median
    return seconds


def machine() -> str:
    """The processor, as far as the system reports it."""
    cpuinfo = Path('/proc/cpuinfo')
    names = re.findall(r'model name\s*: (.*)', cpuinfo.read_text()) if cpuinfo.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def gallery(seconds: dict[str, float]) -> str:
    """The gallery page: a table of all blocks' costs and a section for each.

    Args:
        seconds: each block's time.
    """
    rows, sections = [], []
    for name in BLOCKS:
        costs = {channels: cost(name, channels) for channels in CHANNELS}
        relative = f'{seconds[name] / seconds["se"]:.2f}'
        parameters, macs = costs[256]
        rows.append(f'| [`{name}`](#{name}) | {parameters:,} | {macs:,} | {relative} |')
        sections.append(
            f'## `{name}` {{ #{name} }}\n\n{paper(name)}\n\n'
            f'```text\n{block_graph(name).formula}\n```\n\n'
            f'![{name}: what flows where](images/blocks/{name}.svg)\n\n'
            '| C | parameters | MACs |\n|---:|---:|---:|\n'
            + ''.join(f'| {channels:,} | {p:,} | {m:,} |\n' for channels, (p, m) in costs.items())
        )
    return GALLERY.format(
        rows='\n'.join(rows),
        batch=BATCH,
        machine=machine(),
        torch=torch.__version__,
        sections='\n'.join(sections),
    )


def paper(name: str) -> str:
    """The first paragraph of a block's docstring, with its arXiv number as a link."""
    text = inspect.cleandoc(BLOCKS[name].__doc__ or '').split('\n\n')[0].replace('\n', ' ')
    return re.sub(r'arXiv (\d{4}\.\d{4,5})', r'[arXiv \1](https://arxiv.org/abs/\1)', text)
