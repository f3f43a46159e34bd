"""Pictures of a TrioNet search: their content, and wrong input."""

import re

import pytest

from sase_blocks.models import Architecture
from sase_blocks.search.evolution import Candidate
from sase_blocks.search.trionet.cost import Costs
from sase_blocks.search.trionet.result import describe_result, draw_result, format_result
from sase_blocks.search.trionet.space import TrioSpace
from sase_blocks.viz import draw_architecture, plot_front, save_figure
from sase_blocks.viz.trionet import OPERATOR_COLORS

CONV = 'image 32; stem 16; heads 4; 64: conv3/16; 128: conv3/32'
MIXED = 'image 32; stem 16; heads 4; 64: conv3/16*2; 128: local5/32 + axial/16; 256: axial/64'


def entry(text, score, macs):
    return {'architecture': text, 'score': score, 'cost': {'macs': macs, 'parameters': 2 * macs}}


def result(**changes):
    return {
        **entry(MIXED, 70.0, 5_000_000),
        'front': [entry(CONV, 60.0, 2_000_000), entry(MIXED, 70.0, 5_000_000)],
        'pure': {'conv': entry(CONV, 60.0, 2_000_000), 'axial': entry(MIXED, 55.0, 4_000_000)},
        'limits': {'macs': 6_000_000, 'parameters': None, 'milliseconds': None},
        'objective': 'macs',
        'evaluations': 40,
        **changes,
    }


def test_a_front():
    (axis,) = plot_front(result()).axes
    labels = [text.get_text() for text in axis.get_legend().get_texts()]
    assert labels == ['Pareto front', 'found', 'only conv', 'axial, else conv']
    lines = {line.get_label(): line for line in axis.get_lines()}
    assert lines['Pareto front'].get_xydata().tolist() == [[2, 60], [5, 70]]
    assert lines['found'].get_xydata().tolist() == [[5, 70]]
    assert lines['axial, else conv'].get_xydata().tolist() == [[4, 55]]
    assert lines['axial, else conv'].get_color() == OPERATOR_COLORS['axial']
    assert 'limit' in [text.get_text() for text in axis.texts]
    assert '40 networks' in axis.get_title(loc='left')


def test_a_front_without_a_limit_against_parameters():
    (axis,) = plot_front(
        result(objective='parameters', limits={'macs': None, 'parameters': None, 'milliseconds': None})
    ).axes
    assert not axis.texts
    assert 'parameters' in axis.get_xlabel()
    lines = {line.get_label(): line for line in axis.get_lines()}
    assert lines['Pareto front'].get_xydata().tolist() == [[4, 60], [10, 70]]


@pytest.mark.parametrize(
    ('scores', 'images', 'tied', 'verdict', 'title'),
    [
        ([70.0, 70.0, 70.0], 1000, 2, '^nothing was decided: on 1,000 held-out images no network', ': nothing'),
        ([71.0, 70.0, 69.0], 100, 2, '^nothing was decided: .* drawn at random from the 3 scored', ': nothing'),
        ([71.0, 70.0, 40.0], 1000, 1, '^1 of the 2 other networks may be as good', ', 1 may be as good as the found'),
        ([90.0, 70.0, 40.0], 1000, 0, '^the found network scores better than each of the 2', ', 0 may be as good'),
        ([70.0], 1000, 0, '^nothing was decided: only one network was scored', ': nothing was decided'),
    ],
)
def test_a_result_says_what_was_decided(scores, images, tied, verdict, title, tmp_path, monkeypatch):
    texts = [f'image 8; stem 4; heads 1; 8: conv3/{width}' for width in (4, 8, 12)]
    candidates = [Candidate(text, score, n, {}, n) for n, (text, score) in enumerate(zip(texts, scores, strict=False))]
    found = describe_result(
        TrioSpace.parse('cifar'), candidates, {'conv': texts[0]}, Costs(2),
        config={'seed': 0}, facts={'classes': ['a', 'b'], 'held_out': images},
    )  # fmt: skip
    assert (found['architecture'], found['tied']) == (texts[0], tied)
    assert re.search(verdict, found['verdict'])
    assert found['verdict'] in format_result(found)
    said = {}

    def save(figure, path):
        said[path.name] = [text.get_text() for text in figure.findobj(lambda part: hasattr(part, 'get_text'))]
        return path

    monkeypatch.setattr('sase_blocks.viz.save_figure', save)
    draw_result(found, tmp_path)
    assert any(title in text for text in said['front.png'])
    assert ('nothing was decided' in said['architecture.png']) == found['verdict'].startswith('nothing')


@pytest.mark.parametrize('missing', ['front', 'pure', 'objective', 'limits', 'cost', 'evaluations'])
def test_not_a_result(missing):
    wrong = {name: value for name, value in result().items() if name != missing}
    with pytest.raises(ValueError, match=f'not the result of a search: KeyError .{missing}'):
        plot_front(wrong)
    with pytest.raises(ValueError, match='not the result of a search'):
        plot_front(result(objective='beauty'))


@pytest.mark.parametrize('text', [CONV, MIXED, 'image 224; stem 64/4; heads 8; 256: local7/64'])
def test_an_architecture(text, tmp_path):
    network = Architecture.parse(text)
    figure = draw_architecture(text)
    (axis,) = figure.axes
    blocks = [block for stage in network.stages for block in stage.blocks]
    boxes = axis.patches
    assert len(boxes) == len(blocks)
    for box, block in zip(boxes, blocks, strict=True):
        from matplotlib.colors import to_hex

        assert to_hex(box.get_facecolor()) == OPERATOR_COLORS[block.operator]
    widths = [box.get_width() for box in boxes]
    for a, first in zip(widths, blocks, strict=True):
        for b, second in zip(widths, blocks, strict=True):
            assert (a > b) == (first.width > second.width)
    heights = [box.get_height() for box in boxes]
    assert heights == sorted(heights, reverse=True)
    said = [text.get_text() for text in axis.texts]
    for block in blocks:
        size = f'{block.kernel_size} x {block.kernel_size}\n' if block.kernel_size else ''
        assert f'{size}{block.width}' in said
    for number, stage in enumerate(network.stages, start=1):
        assert any(words.startswith(f'stage {number}\n{stage.width} channels') for words in said)
    assert [t.get_text() for t in axis.get_legend().get_texts()] == [
        name for name in OPERATOR_COLORS if name in network.operators
    ]
    assert (
        save_figure(figure, tmp_path / 'a.png').read_bytes()
        == save_figure(draw_architecture(network), tmp_path / 'b.png').read_bytes()
    )


def test_map_sizes_are_those_of_the_network():
    (axis,) = draw_architecture('image 33; stem 8; heads 2; 16: conv3/8; 16: conv3/8; 16: axial/8').axes
    sizes = [text.get_text().splitlines()[-1] for text in axis.texts if text.get_text().startswith('stage')]
    assert sizes == ['33 x 33', '17 x 17', '9 x 9']


def test_a_wrong_text():
    with pytest.raises(ValueError, match=r'architecture: .*is not'):
        draw_architecture('sase')
