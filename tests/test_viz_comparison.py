"""The picture of a comparison shows its numbers, marks what is decided, and keeps its names apart."""

import sys

import matplotlib
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from test_comparing import row

from sase_blocks.comparing import judge
from sase_blocks.viz import network_color, plot_comparison, save_figure

NONE = row('none', 80.0, 81.0, 82.0, time_ratio=1.0, kept_ratio=1.0)


def compared(*rows, reference='none'):
    return {'reference': reference, 'model': 'resnet18', 'seeds': [0, 1, 2], **judge(rows, reference)}


def dots(axis):
    """Position of each dot, and whether it is filled."""
    found = [line for line in axis.lines if len(line.get_xdata()) == 1]
    return {
        (line.get_xdata()[0], line.get_ydata()[0]): to_hex(line.get_markerfacecolor()) != '#ffffff' for line in found
    }


def boxes(figure, texts):
    renderer = FigureCanvasAgg(figure).get_renderer()
    # Without the line from a name to its dot.
    return [matplotlib.text.Text.get_window_extent(text, renderer) for text in texts]


def test_dots_and_intervals():
    se = row('se', 83.0, 84.1, 85.0, time_ratio=1.2, kept_ratio=1.4)
    eca = row('eca', 80.0, 82.0, 81.0, time_ratio=1.1, kept_ratio=1.3)
    result = compared(NONE, se, eca)
    before = dict(matplotlib.rcParams)
    figure = plot_comparison(result)
    assert dict(matplotlib.rcParams) == before
    rows = {one['name']: one for one in result['candidates']}
    assert rows['se']['p_adjusted'] < 0.05 < rows['eca']['p_adjusted']
    for axis, cost in zip(figure.axes, ('time_ratio', 'kept_ratio'), strict=True):
        expected = {(rows[name][cost], rows[name]['difference']): name == 'se' for name in ('se', 'eca')}
        assert dots(axis) == {(1.0, 0): True, **expected}
        drawn = {line.get_xdata()[0]: list(line.get_ydata()) for line in axis.lines if line.get_linestyle() == '-'}
        assert {x: y for x, y in drawn.items() if len(y) == 2} == {
            rows[name][cost]: pytest.approx(rows[name]['interval']) for name in ('se', 'eca')
        }
        (dashed,) = (line for line in axis.lines if line.get_linestyle() == '--')
        assert set(dashed.get_ydata()) == {0}
        colors = {line.get_ydata()[0]: to_hex(line.get_color()) for line in axis.lines if len(line.get_xdata()) == 1}
        assert colors[rows['se']['difference']] == network_color('se')
    assert figure.axes[0].get_ylabel() == 'accuracy relative to no attention (points)'
    assert figure.get_suptitle().startswith('resnet18, 3 seeds\n')
    assert [text.get_text() for text in figure.axes[1].texts] == ['se', 'eca']


@pytest.mark.parametrize('count', [1, 6, 16, 17])
def test_names_stand_apart_and_inside(count):
    """Even if all blocks are equal. Too many have no names."""
    rows = [row(f'a_rather_long_name_of_block_{i}', 81.0, 82.5, 83.0) for i in range(count)]
    figure = plot_comparison(compared(NONE, *rows))
    FigureCanvasAgg(figure).draw()
    texts = figure.axes[1].texts
    assert len(texts) == (count if count <= 16 else 0)
    found = boxes(figure, texts)
    for i, box in enumerate(found):
        assert not any(box.overlaps(other) for other in found[i + 1 :]), i
        assert 0 <= box.x0 < box.x1 <= figure.bbox.width + 1
        assert 0 <= box.y0 < box.y1 <= figure.bbox.height + 1


def test_random_blocks_and_one_seed(tmp_path):
    found = row('found', 90.0, kind='found')
    random = row('random 0', 85.0, kind='random', time_ratio=2.0, interval=None)
    unmeasured = row('se', 88.0, time_ratio=None, kept_ratio=None)
    figure = plot_comparison(compared(found, random, unmeasured, row('cbam'), reference='found'))
    assert dots(figure.axes[0]) == {(1.25, 0): True, (2.0, -5.0): False}
    assert [text.get_text() for text in figure.axes[1].texts] == []
    assert save_figure(figure, tmp_path / 'comparison.png').stat().st_size > 1000


def test_nothing_to_draw():
    with pytest.raises(ValueError, match='no block of the comparison has been trained with a seed that the reference'):
        plot_comparison(compared(NONE, row('se')))


def test_matplotlib_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    with pytest.raises(ImportError, match=r'pip install "sase-blocks\[viz\]"'):
        plot_comparison({})
