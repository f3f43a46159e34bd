"""Captured gates are the gates that act on the features, the network stays as it was, and pictures show the numbers."""

import itertools
import os
import sys

import matplotlib
import numpy as np
import pytest
import timm
import torch
import torchvision
from matplotlib.colors import to_hex
from PIL import Image
from torch import nn

from sase_blocks import SASE, AttentionBlock, ChannelAttention, SpatialAttention, compile_blocks, create_block
from sase_blocks.blocks import list_blocks
from sase_blocks.insertion import insert
from sase_blocks.viz import (
    attention,
    capture_gates,
    network_color,
    plot_attention,
    plot_attention_maps,
    plot_learning_curves,
    read_images,
)

GENOTYPE = 'avg,conv3,affine,avg,avg,conv7x7'


def network(*blocks):
    """Convolutions from 3 to 8 channels, each block after one; blocks are named '1', '3', ..."""
    torch.manual_seed(0)
    layers = []
    for block in blocks:
        layers += [nn.Conv2d(8 if layers else 3, 8, 3, padding=1), block]
    return nn.Sequential(*layers, nn.BatchNorm2d(8))


def images(count=2, channels=3, height=8, width=8):
    return torch.randn(count, channels, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ('make', 'expected'),
    [
        (lambda: network(SASE(8)), {'1': (True, True)}),
        (lambda: network(AttentionBlock(8, GENOTYPE), SASE(8)), {'1': (True, True), '3': (True, True)}),
        (lambda: network(ChannelAttention(8)), {'1': (True, False)}),
        (lambda: network(SpatialAttention(8)), {'1': (False, True)}),
        (lambda: network(create_block('cbam', 8)), {'1.0': (True, False), '1.1': (False, True)}),
        (lambda: SASE(3), {'': (True, True)}),
        (
            lambda: timm.create_model('resnet20_cifar', genotype='se', attn_stages=(3,)),
            {f'layer3.{i}.se': (True, False) for i in range(3)},
        ),
    ],
)
def test_capture_finds_the_gates(make, expected):
    gates = capture_gates(make(), images())
    assert {name: (c is not None, a is not None) for name, (c, a) in gates.items()} == expected
    assert list(gates) == list(expected)
    for c, a in gates.values():
        assert c is None or (c.shape[0] == 2 and c.shape[2:] == (1, 1) and not c.requires_grad)
        assert a is None or (a.shape[:2] == (2, 1) and a.shape[2] == a.shape[3] and not a.requires_grad)


# What the gate of each block has: one value a channel, one a position, or both.
KINDS = {
    (True, False): ['se', 'ese', 'eca', 'ecam', 'ceca', 'gc', 'gca', 'srm', 'gct', 'fca', 'gsop', 'sk', 'grn', 'dual'],
    (False, True): ['a2', 'criss_cross'],
    (True, True): [
        *('sase', 'bam', 'scse', 'ge', 'ge_theta', 'ge_plus', 'sge', 'ema', 'simam', 'triplet'),
        *('coord', 'scoord', 'ela', 'strip', 'cbam', 'lcbam'),
        *('shuffle', 'gam', 'scsa', 'nam', 'caa', 'mlca'),
        *('lka', 'lska', 'msca', 'lsk', 'polarized'),
    ],
}


def test_every_block_has_a_kind():
    assert sorted(name for names in KINDS.values() for name in names) == sorted(list_blocks())


@pytest.mark.parametrize(('kind', 'name'), [(kind, name) for kind, names in KINDS.items() for name in names])
def test_gates_of_every_block(kind, name):
    torch.manual_seed(0)
    block = create_block(name, 64, feat_size=(12, 10))
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 64, 12, 10)
    gates = list(capture_gates(block, x).values())
    assert (any(c is not None for c, _ in gates), any(a is not None for _, a in gates)) == kind
    for c, a in gates:
        assert c is None or (c.shape == (2, 64, 1, 1) and c.std() > 0)
        assert a is None or (a.shape == (2, 1, 12, 10) and a.std() > 0)
    if name not in ('sase', 'cbam', 'lcbam', 'gca', 'shuffle', 'sk', 'grn', 'a2', 'criss_cross', 'dual'):
        # y / x is the gate; what is drawn is its mean over the rest.
        with torch.no_grad():
            gate = block.eval()(x) / x
        ((c, a),) = gates
        torch.testing.assert_close(c, gate.mean((2, 3), keepdim=True), rtol=1e-3, atol=1e-5)
        assert a is None or torch.allclose(a, gate.mean(1, keepdim=True), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ('make', 'block', 'start', 'expected', 'heading'),
    [
        pytest.param(
            *(lambda: timm.create_model('resnet10t'), 'sase', 'identity', 'layer4.0.se.block', 'layer4.0.se'),
            marks=pytest.mark.slow,
        ),
        (lambda: timm.create_model('resnet10t'), 'cbam', 'identity', 'layer4.0.se.block.1', 'layer4.0.se'),
        pytest.param(
            *(lambda: timm.create_model('resnet10t'), 'se', 'paper', 'layer4.0.se', 'layer4.0.se'),
            marks=pytest.mark.slow,
        ),
        (torchvision.models.resnet18, 'coord', 'identity', 'layer4.1.bn2.inserted_attention.block', 'layer4.1.bn2'),
        pytest.param(torchvision.models.mobilenet_v3_small, 'simam', 'paper', None, None, marks=pytest.mark.slow),
    ],
)
def test_gates_of_inserted_blocks(make, block, start, expected, heading):
    model = make()
    report = insert(model, block, start=start, input_size=64)
    gates = capture_gates(model, images(height=64, width=64))
    assert len(gates) == len(report.places) * (2 if block == 'cbam' else 1)
    assert expected is None or expected in gates
    figure = plot_attention(model, images(1, height=64, width=64))
    assert heading is None or any(axis.get_title().startswith(f'{heading}\n') for axis in figure.axes)


@pytest.mark.parametrize('compiled', [False, True])
def test_captured_gates_are_those_that_act(compiled):
    model = network(SASE(8), SASE(8)).eval()
    outputs = {}
    for name in ('1', '3'):
        model.get_submodule(name).register_forward_hook(lambda m, x, y, name=name: outputs.update({name: (x[0], y)}))
    if compiled:
        compile_blocks(model, backend='eager')
    gates = capture_gates(model, images())
    for name, (x, y) in outputs.items():
        c, a = gates[name]
        torch.testing.assert_close(x * (1 + (c + a) / 2), y)


@pytest.mark.parametrize('batch', [images(), images(channels=4)], ids=['good', 'refused by the network'])
def test_capture_leaves_the_network_as_it_was(batch):
    model = network(SASE(8)).train()
    model[0].eval()
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    if batch.shape[1] == 3:
        capture_gates(model, batch)
    else:
        with pytest.raises(RuntimeError):
            capture_gates(model, batch)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_hooks_with_kwargs for module in model.modules())
    assert torch.is_grad_enabled()


class Unused(nn.Module):
    """Holds a block that its forward does not run."""

    def __init__(self):
        super().__init__()
        self.block = SASE(3)

    def forward(self, x):
        return x


@pytest.mark.parametrize('function', [capture_gates, plot_attention_maps, plot_attention])
@pytest.mark.parametrize(
    ('model', 'batch', 'error', 'text'),
    [
        (nn.Conv2d(3, 8, 3), images(), ValueError, r'\(Conv2d\) holds no attention block.*resnet50_sase.*insert'),
        (Unused(), images(), ValueError, 'ran none of them'),
        (SASE(3), images()[0], ValueError, r'\(B, C, H, W\), got \(3, 8, 8\)'),
        (SASE(3), np.zeros((2, 3, 8, 8)), TypeError, 'torch.Tensor.*got ndarray'),
    ],
)
def test_refused(function, model, batch, error, text):
    with pytest.raises(error, match=text):
        function(model, batch)


@pytest.mark.parametrize(
    ('model', 'arguments', 'text'),
    [
        (network(ChannelAttention(8)), {}, 'has a spatial gate to draw'),
        (network(SASE(8)), {'blocks': ['2']}, r"got \['2'\]; there are \['1'\]"),
        (network(SASE(8)), {'blocks': []}, r'got \[\]; there are'),
        (network(SASE(8)), {'titles': ['one']}, 'got 1 for 2 images'),
    ],
)
def test_maps_refused(model, arguments, text):
    with pytest.raises(ValueError, match=text):
        plot_attention_maps(model, images(), **arguments)


@pytest.mark.parametrize(
    ('model', 'batch', 'arguments', 'blocks'),
    [
        (network(SASE(8), SASE(8)), images(3), {}, ['3']),  # the last at a resolution
        pytest.param(
            *(network(SASE(8), SASE(8)), images(1), {'blocks': ['1', '3'], 'titles': ['a']}, ['1', '3']),
            marks=pytest.mark.slow,
        ),
        (network(SpatialAttention(8)), images(2, height=6, width=12), {}, ['1']),
        (SASE(1), images(2, channels=1), {}, ['']),
        pytest.param(
            timm.create_model('resnet20_cifar', genotype='sase', in_chans=4),
            images(2, channels=4, height=32, width=32),
            {},
            ['layer1.2.se', 'layer2.2.se', 'layer3.2.se'],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_maps_show_the_gates(model, batch, arguments, blocks):
    figure = plot_attention_maps(model, batch, **arguments)
    gates = capture_gates(model, batch)
    grid = [axis for axis in figure.axes if axis.images]  # the others are the colour bars
    rows = [grid[start : start + len(batch)] for start in range(0, len(grid), len(batch))]
    for column, axis in enumerate(rows[0]):
        (picture,) = axis.images
        shape = batch.shape[2:] + ((3,) if batch.shape[1] == 3 else ())
        assert picture.get_array().shape == shape
        assert (picture.get_array().min(), picture.get_array().max()) == (0, 1)
        assert axis.get_title() == arguments.get('titles', [''] * len(batch))[column]
    for name, row in zip(blocks, rows[1:], strict=True):
        a = gates[name][1]
        assert name in row[0].get_ylabel()
        for column, axis in enumerate(row):
            if a.max() - a.min() < 1e-6:  # a network at its start
                assert len(axis.images) == 1
                continue
            np.testing.assert_array_equal(axis.images[1].get_array(), a[column, 0].numpy())
            assert axis.images[1].get_clim() == pytest.approx((float(a.min()), float(a.max())))
    assert len(figure.axes) == len(grid) + len(blocks)
    width, height = figure.canvas.get_width_height()
    pixels = drawn(figure)
    assert pixels.shape[:2] == (height, width)
    assert pixels[..., :3].std() > 30


@pytest.mark.parametrize(
    ('model', 'batch', 'arguments', 'blocks'),
    [
        (network(SASE(8), SASE(8)), images(1), {}, {'3': ('3', '3')}),
        pytest.param(
            *(network(SASE(8), SASE(8)), images(2), {'blocks': ['1', '3']}, {'1': ('1', '1'), '3': ('3', '3')}),
            marks=pytest.mark.slow,
        ),
        (network(ChannelAttention(8)), images(2), {}, {'1': ('1', None)}),
        (network(SpatialAttention(8)), images(1, height=6, width=12), {}, {'1': (None, '1')}),
        (network(create_block('cbam', 8)), images(1), {}, {'1': ('1.0', '1.1')}),
        (
            network(create_block('coord', 8), ChannelAttention(8)),
            images(1),
            {'blocks': ['1', '3']},
            {'1': ('1', '1'), '3': ('3', None)},
        ),
        (create_block('cbam', 3), images(1), {}, {'': ('0', '1')}),
        (ChannelAttention(100), images(1, channels=100), {}, {'': ('', None)}),
        (
            SASE(1),
            images(2, channels=1),
            {'titles': ['one', 'a name of more than twenty-four letters\nsecond line']},
            {'': ('', '')},
        ),
        (
            timm.create_model('resnet20_cifar', genotype='sase', in_chans=4),
            images(1, channels=4, height=32, width=32),
            {},
            {f'layer{i}.2.se': (f'layer{i}.2.se', f'layer{i}.2.se') for i in (1, 2, 3)},
        ),
    ],
)
def test_attention_shows_the_gates(model, batch, arguments, blocks):
    before = dict(matplotlib.rcParams)
    figure = plot_attention(model, batch, **arguments)
    assert dict(matplotlib.rcParams) == before
    gates = capture_gates(model, batch)
    still = [a for _, a in gates.values() if a is not None and a.max() - a.min() < 1e-6]
    written = [text.get_text() for axis in figure.axes for text in axis.texts]
    assert all(f'constant {a[0, 0, 0, 0]:.3f}' in written for a in still)
    maps = [axis for axis in figure.axes if len(axis.images) == 2]
    bars = [axis for axis in figure.axes if axis.lines]  # the line at zero
    spatial = [gates[a][1] for _, a in blocks.values() if a is not None]
    expected_maps = [a[i, 0] for i in range(len(batch)) for a in spatial if a.max() - a.min() > 1e-6]
    for axis, a in zip(maps, expected_maps, strict=True):
        np.testing.assert_array_equal(axis.images[1].get_array(), a.numpy())
    expected_bars = [gates[c][0][i, :, 0, 0] for i in range(len(batch)) for c, _ in blocks.values() if c is not None]
    for axis, c in zip(bars, expected_bars, strict=True):
        values = c.sort(descending=True).values.numpy()
        if axis.patches:
            np.testing.assert_allclose([bar.get_height() for bar in axis.patches], values)
        else:
            assert axis.collections[0].get_paths()[0].vertices[:, 1].max() == pytest.approx(values[0])
        first, *second = axis.get_xlabel().splitlines()[0].removeprefix('constant ').split(' to ')
        assert float(first) == pytest.approx(values[-1], abs=1e-3)
        expected = [] if values[-1] == values[0] else [values[0]]
        assert [float(text) for text in second] == pytest.approx(expected, abs=1e-3)
    titles = [axis.get_title() for axis in figure.axes]
    for name in blocks:
        assert any(title.startswith(f'{name or type(model).__name__}\n') for title in titles)
    if 'titles' in arguments:
        assert ('one' in titles, 'a name of more than\ntwenty-four letters\nsecond line' in titles) == (True, True)
    assert drawn(figure)[..., :3].std() > 30


def test_attention_draws_the_given_pictures():
    pictures = torch.rand(2, 3, 8, 8)
    figure = plot_attention(network(SASE(8)), images(2), pictures=pictures)
    shown = [
        axis.images[0].get_array()
        for axis in figure.axes
        if len(axis.images) == 1 and axis.images[0].get_extent()[1] == 8
    ]
    np.testing.assert_allclose(shown[0], pictures[0].permute(1, 2, 0))
    np.testing.assert_allclose(shown[1], pictures[1].permute(1, 2, 0))


@pytest.mark.parametrize(
    ('values', 'texts'),
    [
        ((0.5,), ['0.500']),
        ((0.2, 0.8), ['0.200', '0.800']),
        ((0.4999, 0.5001), ['0.49990', '0.50010']),
        ((0.49999, 0.5), ['0.499990', '0.500000']),
        ((-1234.5, 1234.5), ['-1234.5', '1234.5']),
        ((0.0, 1e-6), ['0', '1e-06']),
        ((0.0, 3e7), ['0', '3e+07']),
    ],
)
def test_numbers_of_a_scale(values, texts):
    assert attention._numbers(*values) == texts


def moving(channels=8):
    """SASE whose gates differ between positions and channels."""
    block = SASE(channels)
    generator = torch.Generator().manual_seed(0)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    return block


def rows(*points):
    return [{'epoch': epoch, 'train_loss': loss, 'acc1': 50.0} for epoch, loss in points]


LONG = 'a rather long name of an image or a class, which continues'


@pytest.mark.parametrize(
    'draw',
    [
        lambda: plot_attention(network(moving(), SASE(8)), images(2), titles=[LONG, LONG], title='data, seed 0'),
        lambda: plot_attention(
            network(moving(), SASE(8), create_block('se', 8)), images(1), blocks=['1', '3', '5'], title='data, seed 0'
        ),
        lambda: plot_attention_maps(network(moving(), SASE(8)), images(3), titles=[LONG, 'b', LONG], title='seed 0'),
        lambda: plot_attention_maps(network(moving(), SASE(8)), images(2), blocks=['1', '3']),
        lambda: plot_learning_curves(
            {f'a block with a long name {i}': rows((1, 2.0), (2, 1.0)) for i in range(9)}, title='data, seed 0'
        ),
        lambda: plot_learning_curves({'none': rows((0.5, 2.0), (1, 1.0))}),
    ],
)
def test_texts_do_not_overlap(draw):
    figure = draw()
    drawn(figure)
    page = figure.bbox
    # Of the ticks, matplotlib keeps some that it does not draw.
    ticks = {id(text) for tick in figure.findobj(matplotlib.axis.Tick) for text in (tick.label1, tick.label2)}
    shown = {}
    for text in figure.findobj(matplotlib.text.Text):
        visible = text.get_visible() and text.get_text().strip() and id(text) not in ticks
        if visible and (text.axes is None or text.axes.axison or text in text.axes.texts):
            shown[text] = text.get_window_extent()
    assert len(shown) > 3
    for text, box in shown.items():
        inside = [box.x0 >= -1, box.y0 >= -1, box.x1 <= page.x1 + 1, box.y1 <= page.y1 + 1]
        assert all(inside), (text.get_text(), box)
    for (one, a), (two, b) in itertools.combinations(shown.items(), 2):
        apart = a.x1 <= b.x0 + 1 or b.x1 <= a.x0 + 1 or a.y1 <= b.y0 + 1 or b.y1 <= a.y0 + 1
        assert apart, (one.get_text(), two.get_text())


def not_finite():
    block = SASE(3)
    nn.init.constant_(block.mix_weight, float('nan'))
    return block


@pytest.mark.parametrize(
    ('model', 'arguments', 'text'),
    [
        (network(SASE(8)), {'blocks': ['2']}, r"got \['2'\]; there are \['1'\]"),
        (network(SASE(8)), {'blocks': []}, r'got \[\]; there are'),
        (network(SASE(8)), {'titles': ['one']}, 'got 1 for 2 images'),
        (network(SASE(8)), {'pictures': torch.zeros(1, 3, 8, 8)}, r'got \(1, 3, 8, 8\), B = 2'),
        (network(SASE(8)), {'pictures': torch.zeros(2, 8, 8)}, r'got \(2, 8, 8\)'),
        (not_finite(), {}, 'cannot draw SASE: not all of its gates are finite'),
    ],
)
def test_attention_refused(model, arguments, text):
    with pytest.raises(ValueError, match=text):
        plot_attention(model, images(), **arguments)


# Modes of more than 8 bits: a factor and a type.
DEEP = {'I;16': (257.0, np.uint16), 'twelve': (16.0, np.uint16), 'F': (1.0, np.float32), 'I': (257.0, np.int32)}


def write_image(path, mode='RGB', size=(40, 30)):
    array = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    if mode in DEEP:
        Image.fromarray((array[..., 0] * DEEP[mode][0]).astype(DEEP[mode][1])).save(path)
    else:
        Image.fromarray(array).convert(mode).save(path)
    return path


@pytest.mark.parametrize(
    ('mode', 'suffix', 'channels', 'img_size'),
    [
        ('RGB', 'png', 3, None),
        ('L', 'png', 3, 16),
        ('I;16', 'png', 1, None),
        ('I;16', 'tif', 3, None),
        ('RGBA', 'png', 3, None),
        ('P', 'gif', 1, None),
        ('RGB', 'jpg', 1, 48),
    ],
)
def test_images_are_read_as_the_network_takes_them(tmp_path, mode, suffix, channels, img_size):
    model = timm.create_model('resnet20_cifar', in_chans=channels)
    paths = [write_image(tmp_path / f'{i}.{suffix}', mode) for i in range(2)]
    batch, pictures = read_images(paths, model, img_size)
    side = img_size or 32
    assert batch.shape == pictures.shape == (2, channels, side, side)
    assert (pictures.min() >= 0, pictures.max() <= 1, pictures.std() > 0.05) == (True, True, True)
    assert 0.4 < pictures.mean() < 0.6
    cfg = model.pretrained_cfg
    mean, std = (np.array(cfg[name]) for name in ('mean', 'std'))
    if channels == 1:
        mean, std = mean.mean(keepdims=True), std.mean(keepdims=True)
    back = batch.numpy() * std[:, None, None] + mean[:, None, None]
    np.testing.assert_allclose(back, pictures, atol=1e-6)
    assert model(batch).shape == (2, 10)


def test_images_are_read_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    lying = np.zeros((32, 32), np.uint8)
    lying[:16] = 255  # the upper half, which is the right one of the picture
    Image.fromarray(lying).save(tmp_path / 'a.png', exif=exif)
    _, pictures = read_images([tmp_path / 'a.png'], timm.create_model('resnet20_cifar'), 32)
    assert (pictures[0, :, :, 18:].min() > 0.9, pictures[0, :, :, :14].max() < 0.1) == (True, True)


@pytest.mark.parametrize(
    ('name', 'in_chans', 'error', 'text'),
    [
        ('missing.png', 3, FileNotFoundError, 'there is no image .*missing.png'),
        ('folder', 3, ValueError, 'folder is a folder'),
        ('text.png', 3, ValueError, 'text.png is not an image that Pillow can read'),
        ('short.png', 3, ValueError, 'short.png is a broken image: '),
        ('pipe.png', 3, ValueError, 'pipe.png is not a regular file'),
        ('float.tif', 3, ValueError, 'float.tif is a broken image: 32-bit floating-point pixels have no known range'),
        ('integer.tif', 1, ValueError, 'integer.tif is a broken image: 32-bit integer pixels have no known range'),
        ('twelve.png', 1, ValueError, 'twelve.png is a 16-bit image of values up to 4080 .* below 4096'),
        ('bad\udcff\n.png', 1, ValueError, r'bad\\udcff\\n.png is not an image that Pillow can read'),
        ('good.png', 4, ValueError, 'takes images of 4 channels'),
        (None, 3, ValueError, 'there is no image to read'),
    ],
)
def test_images_refused(tmp_path, name, in_chans, error, text):
    good = write_image(tmp_path / 'good.png', size=(200, 200))
    (tmp_path / 'folder').mkdir()
    (tmp_path / 'text.png').write_text('no image')
    (tmp_path / 'bad\udcff\n.png').write_text('no image')
    os.mkfifo(tmp_path / 'pipe.png')
    for file, mode in (('float.tif', 'F'), ('integer.tif', 'I'), ('twelve.png', 'twelve')):
        write_image(tmp_path / file, mode)
    (tmp_path / 'short.png').write_bytes(good.read_bytes()[:9000])
    with pytest.raises(error, match=text):
        read_images([good, tmp_path / name] if name else [], timm.create_model('resnet20_cifar', in_chans=in_chans))


def drawn(figure):
    """The figure as an array of pixels (H, W, 4)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())


def test_learning_curves():
    # Rows as `train` logs them, and as the demo does: not each has an accuracy.
    history = {
        'sase': [{'epoch': e, 'train_loss': 2.0 / e, 'acc1': 90.0 + e, 'lr': 0.1} for e in (1, 2, 3)],
        'none': [{'epoch': 0.5, 'train_loss': 3.0}, {'epoch': 1.0, 'train_loss': 1.0, 'acc1': 70.0}],
        'mine': [{'epoch': 1, 'train_loss': 1.0, 'acc1': 80.0}],
        'other': [{'epoch': 1, 'train_loss': 1.0, 'acc1': 80.0}],
    }
    before = dict(matplotlib.rcParams)
    figure = plot_learning_curves(history)
    assert dict(matplotlib.rcParams) == before
    loss, accuracy = figure.axes
    assert [text.get_text() for text in figure.legends[0].texts] == ['sase', 'no attention', 'mine', 'other']
    lines = dict(zip(history, accuracy.lines, strict=True))
    assert lines['sase'].get_xydata().tolist() == [[1, 91], [2, 92], [3, 93]]
    assert lines['none'].get_xydata().tolist() == [[1, 70]]
    assert loss.lines[2].get_xydata().tolist() == [[0.5, 3], [1, 1]]
    colors = {name: to_hex(line.get_color()) for name, line in lines.items()}
    assert colors['sase'] == network_color('sase')
    assert len(set(colors.values())) == 4
    assert (to_hex(loss.lines[0].get_color()), to_hex(loss.lines[2].get_color())) == (colors['sase'], colors['none'])
    assert drawn(figure)[..., :3].std() > 10


@pytest.mark.parametrize(
    ('history', 'text'),
    [
        ({}, 'history is empty'),
        ({'sase': []}, r"history\['sase'\] must hold rows with 'epoch' and 'train_loss'"),
        ({'sase': [{'epoch': 1, 'train_loss': 1.0}]}, r"history\['sase'\] must hold rows with 'epoch' and 'acc1'"),
        ({'sase': [{'train_loss': 1.0, 'acc1': 50.0}]}, r"history\['sase'\] must hold rows with 'epoch'"),
    ],
)
def test_learning_curves_refused(history, text):
    with pytest.raises(ValueError, match=text):
        plot_learning_curves(history)


@pytest.mark.parametrize(
    'draw',
    [
        lambda: plot_attention_maps(SASE(3), images()),
        lambda: plot_attention(SASE(3), images()),
        lambda: plot_learning_curves({'sase': []}),
    ],
)
def test_matplotlib_missing(draw, monkeypatch):
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    with pytest.raises(ImportError, match=r'pip install "sase-blocks\[viz\]"'):
        draw()
