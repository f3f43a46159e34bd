"""Blocks as pictures: laid out without crossings or overlaps, with every operation and its set, saved whole."""

import itertools
import sys

import matplotlib
import pytest
from conftest import mostly_slow
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from torch import nn

from sase_blocks.blocks import SASE, AttentionBlock, Edge, Genotype, Graph, block_graph, create_block, list_blocks
from sase_blocks.ops import EXTENDED_SETS, SETS
from sase_blocks.ops.options import parse_name
from sase_blocks.viz import draw_block, save_figure
from sase_blocks.viz.layout import Box, lay_out

OPTIONS = 'bam(reduction=8, dilation=2)'
EXTENDED = 'style,norm,affine,p_norm,avg,conv3x3_x2'


def graph(*edges):
    """From pairs, or triples with a label; the nodes in the order in which they are met."""
    nodes = dict.fromkeys(['x', *(name for edge in edges for name in edge[:2] if name not in 'xy'), 'y'], 'C x H x W')
    return Graph(nodes, tuple(Edge(*edge) for edge in edges), 'y = f(x)')


def texts(figure):
    return [text for text in figure.findobj(Text) if text.get_text().strip()]


def words(figure):
    return [text.get_text() for text in texts(figure)]


CHAIN = (('x', 'q', 'avg'), ('q', 'c', 'mlp'), ('c', 'y'))
GRAPHS = {
    'one edge': ([('x', 'y')], 0),
    'chain': ([*CHAIN], 0),
    'skip': ([*CHAIN, ('x', 'y')], 0),
    'diamond': ([('x', 'a', '1'), ('x', 'b', '2'), ('a', 'y'), ('b', 'y')], 0),
    'crossed as given': ([('x', 'a'), ('x', 'b'), ('b', 'c'), ('a', 'd'), ('c', 'e'), ('d', 'y'), ('e', 'y')], 0),
    'depth first crosses': (
        [('x', 'a'), ('x', 'b'), ('x', 'c'), ('a', 'd'), ('c', 'd'), ('b', 'e'), ('d', 'y'), ('e', 'y')],
        0,
    ),
    'must cross once': (
        [('x', 'a'), ('x', 'b'), ('a', 'c'), ('a', 'd'), ('b', 'c'), ('b', 'd'), ('c', 'y'), ('d', 'y')],
        1,
    ),
    'twelve nodes': (
        [*((a, b, 'op') for a, b in itertools.pairwise('xabcdefghijy')), ('a', 'j'), ('x', 'e')],
        0,
    ),
}


@pytest.mark.parametrize('name', GRAPHS)
def test_layout(name):
    edges, crossings = GRAPHS[name]
    g = graph(*edges)
    nodes = {name: Box(20, 10, 18) for name in g.nodes}
    operations = [Box(40, 8, 30) if edge.label else Box(0, 0, 0) for edge in g.edges]
    layout = lay_out(nodes, [(edge.source, edge.target) for edge in g.edges], operations)
    assert layout.crossings == crossings
    for edge, place in zip(g.edges, layout.edges, strict=True):
        source, target = layout.nodes[edge.source], layout.nodes[edge.target]
        assert source.right < place.left <= place.x <= place.right < target.left
    # What stands in the same layer has its room; a line that passes by needs some, too.
    parts = [(place, place.left, place.right, nodes[name]) for name, place in layout.nodes.items()]
    parts += [(place, place.left, place.right, box) for place, box in zip(layout.edges, operations, strict=True)]
    for (a, a_left, a_right, a_box), (b, b_left, b_right, b_box) in itertools.combinations(parts, 2):
        if min(a_right, b_right) < max(a_left, b_left):
            continue
        (high, high_box), (low, low_box) = sorted([(a, a_box), (b, b_box)], key=lambda part: part[0].y)
        assert low.y - low_box.above - high.y - high_box.below > 8
    assert all(layout.top <= place.y <= layout.bottom for place in [*layout.nodes.values(), *layout.edges])
    assert all(place.left >= 0 and place.right <= layout.width for place in [*layout.nodes.values(), *layout.edges])


def test_a_chain_is_a_straight_line():
    g = graph(*CHAIN, ('x', 'y'))
    layout = lay_out(
        {name: Box(20, 10, 18) for name in g.nodes}, [(e.source, e.target) for e in g.edges], [Box(40, 60, 8)] * 4
    )
    heights = [layout.nodes[name].y for name in g.nodes] + [place.y for place in layout.edges[:3]]
    assert max(heights) - min(heights) < 1


def test_a_loop_is_refused():
    with pytest.raises(ValueError, match='form a loop: x -> a, a -> b, b -> a'):
        draw_block(graph(('x', 'a'), ('a', 'b'), ('b', 'a'), ('b', 'y')))


ALL = [
    *((name, False) for name in list_blocks()),
    *((name, True) for name in ('sase', 'cbam', 'bam', OPTIONS)),
    *((name, True) for name in (EXTENDED, str(Genotype.random(0)), str(Genotype.random(1)))),
]


@pytest.mark.parametrize(
    ('block', 'sets'),
    mostly_slow(ALL, ('sase', False), ('gsop', False), ('triplet', False), ('coord', False), *ALL[-3:]),
)
def test_every_block_is_drawn_whole_and_without_overlaps(block, sets):
    figure = draw_block(block, sets=sets)
    renderer = FigureCanvasAgg(figure).get_renderer()
    found = [(text.get_text(), text.get_window_extent(renderer)) for text in texts(figure)]
    for text, box in found:
        assert box.x0 >= 0 <= box.y0, text
        assert box.x1 <= figure.bbox.x1, text
        assert box.y1 <= figure.bbox.y1, text
    for (a, box_a), (b, box_b) in itertools.combinations(found, 2):
        across = min(box_a.x1, box_b.x1) - max(box_a.x0, box_b.x0)
        down = min(box_a.y1, box_b.y1) - max(box_a.y0, box_b.y0)
        assert across <= 0.5 or down <= 0.5, f'{a!r} and {b!r} overlap'
    assert figure.get_size_inches()[0] < 9.6  # the smallest letters stay readable at the width of a page


@pytest.mark.parametrize(
    'block', mostly_slow(['sase', 'se', 'cbam', EXTENDED, OPTIONS, 'triplet', str(Genotype.random(3))], 'cbam', OPTIONS)
)
def test_the_picture_shows_every_node_and_operation_and_the_sets_they_are_from(block):
    g = block_graph(block)
    figure = draw_block(block)
    shown = words(figure)
    for name, shape in g.nodes.items():
        assert name.replace(' * ', '·') in shown
        assert shape.replace(' x ', '\u2009\N{MULTIPLICATION SIGN}\u2009') in shown
    chosen = [edge.label for edge in g.edges if edge.set_name]
    filled = [text.get_text() for text in texts(figure) if text.get_color() == 'white']
    assert sorted(filled) == sorted(chosen)
    in_paper = all(parse_name(edge.label)[0] in SETS[edge.set_name] for edge in g.edges if edge.set_name)
    tables = SETS if in_paper else EXTENDED_SETS
    listed = [
        edge.label if name == parse_name(edge.label)[0] else name
        for edge in g.edges
        if edge.set_name
        for name in tables[edge.set_name]
    ]
    plain = {edge.label for edge in g.edges if not edge.set_name}
    for name in {name for table in EXTENDED_SETS.values() for name in table} - plain:
        assert shown.count(name) == listed.count(name)
    assert shown.count('channel excite') == sum(edge.set_name == 'channel_excite' for edge in g.edges)
    small = draw_block(block, sets=False)
    without = words(small)
    filled = [text.get_text() for text in texts(small) if text.get_color() == 'white']
    assert ' '.join(filled) == ' '.join(chosen)  # a name with several options takes several lines
    assert not {'channel excite', *listed} - set(chosen) & set(without)


def test_a_long_list_begins_with_the_chosen_operation():
    figure = draw_block(EXTENDED)
    heights = {text.get_text(): text.get_position()[1] for text in texts(figure) if text.get_text() in ('style', 'avg')}
    assert heights['style'] < heights['avg']  # y points down


@pytest.mark.parametrize(
    ('block', 'arguments', 'title'),
    [
        ('sase', {}, 'sase'),
        ('sase', {'title': 'The block'}, 'The block'),
        (Genotype.random(0), {}, None),
        (str(Genotype.random(0)), {}, None),
        (Genotype.random(0).to_json(), {}, None),
        (SASE(8), {}, 'SASE'),
        (AttentionBlock(8, Genotype.random(0), 4), {}, 'AttentionBlock'),
        (create_block('cbam', 8), {}, 'SequentialAttention'),
        (graph(*CHAIN), {}, None),
        (graph(*CHAIN), {'title': 'mine'}, 'mine'),
    ],
)
def test_what_can_be_drawn_and_its_title(block, arguments, title):
    before = dict(matplotlib.rcParams)
    figure = draw_block(block, **arguments)
    assert dict(matplotlib.rcParams) == before
    bold = [t.get_text() for t in texts(figure) if t.get_weight() == 'bold' and t.get_color() != 'white']
    assert bold == ([] if title is None else [title])
    expected = block.formula if isinstance(block, Graph) else block_graph(block).formula
    assert expected.replace('*', '·') in ' '.join(words(figure))


@pytest.mark.parametrize(
    ('block', 'error', 'text'),
    [
        ('sasse', ValueError, "Did you mean 'sase'"),
        ('avg,mlp', ValueError, 'six choices'),
        (nn.Conv2d(3, 8, 1), TypeError, 'got Conv2d'),
        (nn.Sequential(SASE(8), nn.ReLU()), TypeError, 'got Sequential'),
        (3, TypeError, 'got 3'),
    ],
)
def test_what_cannot_be_drawn(block, error, text):
    with pytest.raises(error, match=text):
        draw_block(block)


@pytest.mark.parametrize('suffix', mostly_slow(['.png', '.svg', '.pdf', '.PNG'], '.svg'))
def test_saved_twice_is_the_same_file(tmp_path, suffix):
    files = [save_figure(draw_block('se'), tmp_path / f'{i}{suffix}') for i in range(2)]
    first, second = (file.read_bytes() for file in files)
    assert first == second
    assert first.startswith({'.png': b'\x89PNG', '.svg': b'<?xml', '.pdf': b'%PDF'}[suffix.lower()])


@pytest.mark.parametrize(
    ('name', 'error', 'text'),
    [
        ('se.jpg', ValueError, r"\.png, \.svg or \.pdf, got '.*se\.jpg'"),
        ('se', ValueError, r'\.png, \.svg or \.pdf'),
        ('nowhere/se.png', FileNotFoundError, 'nowhere'),
    ],
)
def test_not_saved(tmp_path, name, error, text):
    with pytest.raises(error, match=text):
        save_figure(draw_block('se', sets=False), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_matplotlib_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    with pytest.raises(ImportError, match=r'pip install "sase-blocks\[viz\]"'):
        draw_block('se')
