"""The pictures of a search show its numbers, name what wins, and keep their names apart."""

import sys

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from sase_blocks.ops import EXTENDED_SETS
from sase_blocks.viz import plot_logits

EDGES = {
    'channel_squeeze': ['avg', 'avg_max', 'l2_norm'],
    'channel_excite': ['conv3', 'mlp'],
    'gate_excite': ['affine'],
    'gated_squeeze': ['avg', 'p_norm'],
    'spatial_squeeze': list(EXTENDED_SETS['spatial_squeeze'])[:9],
    'spatial_excite': ['conv3x3', 'conv5x5', 'conv7x7', 'affine', 'norm', 'conv3x3_x2', 'identity'],
}
TOTAL = sum(map(len, EDGES.values()))
NAMES = {name for operations in EDGES.values() for name in operations}


def history(times=5, sets=1, scale=1.0):
    goal = np.random.default_rng(0).standard_normal((sets, TOTAL))
    return scale * goal * np.linspace(0, 1, times)[:, None, None]


def panels(figure):
    return [axis for axis in figure.axes if axis.get_visible()]


def names(axis):
    """The names of operations beside a panel, from the top down."""
    texts = [text for text in axis.texts if text.get_text() in NAMES]
    return [text.get_text() for text in sorted(texts, key=lambda text: -text.xyann[1])]


def boxes(figure, texts):
    renderer = FigureCanvasAgg(figure).get_renderer()
    # Without the arrow from a name to its curve.
    return [matplotlib.text.Text.get_window_extent(text, renderer) for text in texts]


@pytest.mark.parametrize('sets', [1, 3])
def test_logits(sets):
    logits = history(sets=sets)
    before = dict(matplotlib.rcParams)
    figure = plot_logits(logits, EDGES)
    assert dict(matplotlib.rcParams) == before
    axes = panels(figure)
    assert len(axes) == 6 * sets
    titles = [axis.get_title(loc='left') for axis in axes]
    assert titles[:2] == [f'{"stage 1: " * (sets > 1)}channel {what}' for what in ('squeeze', 'excite')]
    starts = np.cumsum([0, *map(len, EDGES.values())])
    for number, axis in enumerate(axes):
        one, edge = divmod(number, 6)
        operations = list(EDGES.values())[edge]
        part = np.exp(logits[:, one, starts[edge] : starts[edge + 1]])
        expected = part / part.sum(-1, keepdims=True)
        uniform, *curves = axis.lines
        assert uniform.get_ydata()[0] == pytest.approx(1 / len(operations))
        drawn = {tuple(np.round(curve.get_ydata(), 12)): curve for curve in curves}
        assert set(drawn) == {tuple(np.round(column, 12)) for column in expected.T}
        assert all(curve.get_xdata().tolist() == [0, 1, 2, 3, 4] for curve in curves)
        order = np.argsort(-expected[-1])
        shown = [operations[i] for i in order][: 7 if len(operations) <= 7 else 5]
        assert names(axis) == shown
        widest = max(curves, key=lambda curve: curve.get_linewidth())
        assert widest.get_ydata()[-1] == pytest.approx(expected[-1].max())
        if len(operations) > 1:
            margin = -np.diff(np.sort(expected[-1])[::-1][:2])[0]
            entropy = -(expected[-1] * np.log(expected[-1])).sum() / np.log(len(operations))
            assert f'margin {margin:.2f}, entropy {entropy:.2f}' in [text.get_text() for text in axis.texts]


@pytest.mark.slow
@pytest.mark.parametrize('scale', [0.0, 0.02, 1.0, 8.0])
def test_names_stand_apart_and_inside(scale):
    figure = plot_logits(history(scale=scale), EDGES)
    FigureCanvasAgg(figure).draw()
    for axis in panels(figure):
        texts = [text for text in axis.texts if text.get_text() in NAMES]
        found = boxes(figure, texts)
        frame = axis.get_window_extent()
        for i, box in enumerate(found):
            assert not any(box.overlaps(other) for other in found[i + 1 :]), texts[i].get_text()
            assert frame.y0 - 2 < box.y0
            assert box.y1 < frame.y1 + 12
            assert 0 < box.x0 < box.x1 < figure.bbox.width


def test_what_was_not_decided_is_not_emphasised():
    decided = {'channel_squeeze': True, 'channel_excite': False, 'gate_excite': None}
    figure = plot_logits(history(), EDGES, decided=[decided])
    squeeze, excite, *others = panels(figure)
    for axis, emphasised in ((squeeze, True), (excite, False), *((other, True) for other in others)):
        assert (max(line.get_linewidth() for line in axis.lines) > 2) == emphasised
        assert any(text.get_fontweight() == 'bold' for text in axis.texts) == emphasised
        assert any('not decided' in text.get_text() for text in axis.texts) != emphasised
    assert figure.get_suptitle() == ''
    nothing = plot_logits(history(sets=2), EDGES, decided=[dict.fromkeys(EDGES, False)] * 2)
    assert nothing.get_suptitle().startswith('nothing was decided')


def test_one_set_without_an_axis_for_it_and_times_of_ones_own():
    figure = plot_logits(history()[:, 0], EDGES, epochs=[0, 0.5, 1, 1.5, 2])
    assert panels(figure)[0].lines[1].get_xdata().tolist() == [0, 0.5, 1, 1.5, 2]
    # Before the first epoch: points.
    first = plot_logits(history()[:1], EDGES)
    assert all(line.get_marker() == 'o' for line in panels(first)[0].lines[1:])


@pytest.mark.parametrize(
    ('logits', 'options', 'says'),
    [
        (
            np.zeros((4, 1, TOTAL + 1)),
            {},
            rf'must be \(times, sets, {TOTAL}\) for these edges, got \(4, 1',
        ),
        (np.zeros(TOTAL), {}, 'must be'),
        (np.zeros((0, 1, TOTAL)), {}, 'must be'),
        (np.full((2, 1, TOTAL), np.nan), {}, 'not finite'),
        (np.zeros((2, 1, TOTAL)), {'epochs': [0, 1, 2]}, 'has 2 times, but epochs has 3'),
        (np.zeros((2, 1, TOTAL)), {'decided': [{}, {}]}, 'has 1 sets, but decided has 2'),
    ],
)
def test_logits_refused(logits, options, says):
    with pytest.raises(ValueError, match=says):
        plot_logits(logits, EDGES, **options)


def test_matplotlib_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    with pytest.raises(ImportError, match=r'pip install "sase-blocks\[viz\]"'):
        plot_logits([], {})
