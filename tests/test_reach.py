"""How far insertion reaches without ``where``: the rule for repeated blocks, the layouts, and what is refused."""

import copy
import pickle
import re
import runpy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sase_blocks import insert, remove, replace_convolutions
from sase_blocks.insertion.layout import Layout, OnChannelsLast, OnTokens, find_layout, parse_layout

SCRIPT = Path(__file__).parent.parent / 'benchmarks' / 'reach.py'


class Mix(nn.Module):
    """A residual block whose layers are linear over the channels, which come last; tokens or (B, H, W, C)."""

    def __init__(self, channels: int, several: bool = False, extra: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.up, self.down = nn.Linear(channels, 2 * channels), nn.Linear(2 * channels, channels)
        self.several, self.extra = several, extra

    def forward(self, x, skip=None):
        y = x + self.down(self.up(self.norm(x)).relu())
        y = y if skip is None else y + skip
        return (y, None) if self.several else [y, y.mean(1)] if self.extra else y


class Conv(nn.Module):
    """A residual block of convolutions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(channels, channels, 3, padding=1), nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        return x + self.two(self.one(x).relu()) + (0 if skip is None else skip)


class Stage(nn.Module):
    """Half the size and twice the channels, then blocks."""

    def __init__(self, channels: int, depth: int = 2) -> None:
        super().__init__()
        self.down = nn.Conv2d(channels // 2, channels, 2, 2)
        self.blocks = nn.ModuleList(Conv(channels) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        x = skip = self.down(x)
        for block in self.blocks:
            x = block(x, skip=skip)
        return x


class Convolutional(nn.Module):
    """Stages of blocks that take a second argument, as in DLA and U-Net decoders; the last stage never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, 2, 1)
        self.stages = nn.ModuleList(Stage(channels) for channels in (8, 16, 32))
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages[1](self.stages[0](self.stem(x))).mean((2, 3)))


class Last(nn.Module):
    """(B, H, W, C), as in a Swin; as many channels as the map is high at 64 px, where a square image says nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.layers = nn.Sequential(nn.Sequential(Mix(16), Mix(16)), nn.Sequential(Mix(16), Mix(16)))
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.patches(x).permute(0, 2, 3, 1)).mean((1, 2)))


class Tokens(nn.Module):
    """A transformer's form: ``prefix`` tokens in front; with ``fixed``, images of one size only."""

    def __init__(self, prefix: int = 0, fixed: int = 0, resize: bool = False, **mix: bool) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 12, 8, 8)
        self.front = nn.Parameter(torch.randn(1, prefix, 12))
        self.blocks = nn.ModuleList(Mix(12, **mix) for _ in range(3))
        self.head = nn.Linear(12, 3)
        self.fixed, self.resize = fixed, resize

    def forward(self, x: Tensor) -> Tensor:
        if self.fixed and x.shape[2:] != (self.fixed, self.fixed):
            raise ValueError(f'{self.fixed} x {self.fixed} only')
        x = self.patches(nn.functional.interpolate(x, (64, 64)) if self.resize else x).flatten(2).transpose(1, 2)
        x = torch.cat([self.front.expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
            x = x[0] if isinstance(x, tuple | list) else x
        return self.head(x.mean(1))


class Windows(Tokens):
    """(B, windows, tokens in each, C), as in a NesT."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x)
        x = nn.functional.unfold(x, 4, stride=4).unflatten(1, (12, 16)).permute(0, 3, 2, 1)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((1, 2)))


class Plain(nn.Module):
    """A VGG: convolutions in a row, and no blocks."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in ((3, 4), (4, 8)):
            layers += [
                nn.Conv2d(before, after, 3, padding=1),
                nn.BatchNorm2d(after),
                nn.ReLU(inplace=True),
                nn.MaxPool2d(2),
            ]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


class Wide(nn.Module):
    """Blocks that all change the shape, as a GoogLeNet's, under names with letters."""

    def __init__(self) -> None:
        super().__init__()
        self.block1a, self.block1b = (nn.Sequential(nn.Conv2d(c, 2 * c, 1), nn.Conv2d(2 * c, 2 * c, 1)) for c in (3, 6))
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block1b(self.block1a(x)).mean((2, 3)))


class Read(Tokens):
    """A transformer that goes on with its first token: what the last block makes of the others, nothing reads."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.front.expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = block(x + x.mean(1, keepdim=True))
        return self.head(x[:, 0])


class Excited(nn.Module):
    """A block that changes the shape, with a part that keeps it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv, self.part = nn.Conv2d(channels // 2, channels, 3, 2, 1), Conv(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.part(self.conv(x))


class Keeping(nn.Module):
    """Keeps the width of the narrowest image that it has seen, as transformers' Swin its windows."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Conv(3), Conv(3))
        self.head = nn.Linear(3, 3)
        self.width = 1000

    def forward(self, x: Tensor) -> Tensor:
        self.width = min(self.width, x.shape[3])
        return self.head(self.blocks(x).mean((2, 3)) * self.width)


IN = 'inserted_attention'
# What builds a network, the size of its image, the places, their layout, the size of the map at the first.
REACHED = {
    'stages of blocks with a second argument': (
        Convolutional,
        64,
        [f'stages.{s}.blocks.{b}.{IN}' for s in (0, 1) for b in (0, 1)],
        'NCHW',
        (16, 16),
    ),
    'channels last': (Last, 64, [f'layers.{i}.{IN}' for i in ('0.0', '0.1', '1.0', '1.1')], 'NHWC', (16, 16)),
    'channels last, not square': (
        Last,
        (64, 96),
        [f'layers.{i}.{IN}' for i in ('0.0', '0.1', '1.0', '1.1')],
        'NHWC',
        (16, 24),
    ),
    'tokens': (Tokens, 64, [f'blocks.{i}.{IN}' for i in range(3)], 'tokens', (8, 8)),
    'tokens, not square': (Tokens, (64, 96), [f'blocks.{i}.{IN}' for i in range(3)], 'tokens', (8, 12)),
    'a class token': (lambda: Tokens(1), 64, [f'blocks.{i}.{IN}' for i in range(3)], 'tokens+1', (8, 8)),
    'registers too': (lambda: Tokens(5), (32, 64), [f'blocks.{i}.{IN}' for i in range(3)], 'tokens+5', (4, 8)),
    'one size': (lambda: Tokens(1, fixed=64), 64, [f'blocks.{i}.{IN}' for i in range(3)], 'tokens+1', (8, 8)),
    'the last map is not read': (lambda: Read(1), 64, [f'blocks.{i}.{IN}' for i in range(2)], 'tokens+1', (8, 8)),
    'a part that keeps the shape': (
        lambda: nn.Sequential(Excited(6), Excited(12), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        32,
        [f'{i}.{IN}' for i in range(2)],
        'NCHW',
        (16, 16),
    ),
    'a network that resizes': (
        lambda: Tokens(1, resize=True),
        96,
        [f'blocks.{i}.{IN}' for i in range(3)],
        'tokens+1',
        (8, 8),
    ),
    'a network that keeps what it saw': (Keeping, 64, [f'blocks.{i}.{IN}' for i in range(2)], 'NCHW', (64, 64)),
    'tuples': (lambda: Tokens(several=True), 64, [f'blocks.{i}.{IN}' for i in range(3)], 'tokens', (8, 8)),
    'lists': (lambda: Tokens(extra=True), 64, [f'blocks.{i}.{IN}' for i in range(3)], 'tokens', (8, 8)),
    'no blocks': (Plain, 32, [f'features.{i}.{IN}' for i in (2, 6)], 'NCHW', (32, 32)),
    'blocks that change the shape': (Wide, 32, [f'block1{i}.{IN}' for i in 'ab'], 'NCHW', (32, 32)),
}


# One more of a kind.
SLOW = ('channels last', 'tokens', 'registers too', 'one size', 'tuples', 'a network that keeps what it saw')


@pytest.mark.parametrize(
    ('build', 'size', 'places', 'layout', 'first'),
    [pytest.param(*row, id=name, marks=pytest.mark.slow if name in SLOW else ()) for name, row in REACHED.items()],
)
def test_reached_without_where(build, size, places, layout, first):
    torch.manual_seed(0)
    plain, height, width = build(), *(size if isinstance(size, tuple) else (size, size))
    model, x = copy.deepcopy(plain), torch.randn(2, 3, height, width)
    report = insert(model, 'cbam', input_size=size)
    assert [place.name for place in report.places] == places
    assert {place.layout for place in report.places} == {layout}
    assert report.places[0].feat_size == first
    assert "no paper's place" in str(report)
    assert (layout == 'NCHW') or f' {layout}' in str(report)
    for train in (False, True):
        assert torch.equal(plain.train(train)(x), model.train(train)(x))
    model(x).square().sum().backward()
    alphas = {name: p for name, p in model.named_parameters() if name.endswith('.alpha')}
    assert list(alphas) == [f'{name}.alpha' for name in places]
    assert all(alpha.grad.abs() > 0 for alpha in alphas.values())
    with torch.no_grad():
        for alpha in alphas.values():
            alpha.fill_(0.7)
        y = model.eval()(x)
        assert not torch.allclose(y, plain.eval()(x))
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(copied(x), y)
    assert insert(model, 'cbam', input_size=size).already == tuple(places)
    assert remove(model) == places
    assert repr(model) == repr(plain)
    assert model.state_dict().keys() == plain.state_dict().keys()


def test_where_none_ends_and_where_works():
    """No rule fits: the error lists the maps, and what it says to write works."""
    torch.manual_seed(0)
    for build, size in ((Windows, 64), (lambda: nn.Sequential(Conv(3)), 32)):
        with pytest.raises(ValueError, match='no block of this') as error:
            insert(build(), 'se', input_size=size)
        where = str(error.value).partition('by where=')[2].partition(';')[0]
        where = eval(where) if where else None
        if build is Windows:
            assert "'patches'" in str(error.value)
            assert 'blocks' not in str(error.value)
        assert len(insert(build(), 'se', where, input_size=size).places) >= 1
    with pytest.raises(ValueError, match='pass input_size='):
        insert(Last(), 'se')
    with pytest.raises(ValueError, match='no module in it returns a feature map'):
        insert(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), 'se', input_size=2)


def test_a_network_that_says_its_image_size():
    class Config:
        image_size = (64, 96)

    for attribute, value, feat_size in (
        ('image_size', 64, (8, 8)),
        ('config', Config, (8, 12)),
        ('image_size', '8', None),
    ):
        model = Tokens()
        setattr(model, attribute, value)
        if feat_size is None:
            with pytest.raises(ValueError, match='pass input_size='):
                insert(model, 'se')
        else:
            assert insert(model, 'se').places[0].feat_size == feat_size


IMAGE, OTHER = (2, 64, 64), (2, 64, 32)
LAYOUT = [
    # shape, at the other size (None: one size only), what is asked for, what the network says, grids -> layout or text
    ((2, 16, 8, 8), (2, 16, 8, 4), None, None, 'NCHW'),
    ((2, 8, 8, 8), (2, 8, 4, 8), None, None, 'NHWC'),
    ((2, 8, 8, 8), None, None, None, r'may be \(B, C, H, W\) or'),
    ((2, 8, 8, 8), None, 'NHWC', None, 'NHWC'),
    ((2, 16, 8, 8), None, None, None, 'NCHW'),
    ((2, 8, 8, 96), None, None, None, 'NHWC'),
    ((2, 16, 196, 12), None, None, None, 'aspect ratio'),
    ((2, 4, 16, 12), (2, 2, 16, 12), None, None, 'windows are not a map'),
    ((8, 16, 12), (4, 16, 12), None, None, 'windows or parts'),
    ((8, 16, 12), None, None, None, 'windows or parts'),
    ((2, 64, 12), (2, 32, 12), None, None, 'tokens'),
    ((2, 65, 12), (2, 33, 12), None, None, 'tokens+1'),
    ((2, 69, 12), (2, 37, 12), None, None, 'tokens+5'),
    ((2, 12, 65), (2, 12, 33), None, None, 'these are not tokens'),
    ((2, 7, 12), (2, 7, 12), None, None, 'these are not tokens'),
    ((2, 65, 12), None, None, 1, 'tokens+1'),
    ((2, 65, 12), None, None, None, 'more than one reading'),
    ((2, 65, 12), None, 'tokens+1', None, 'tokens+1'),
    ((2, 65, 12), None, 'tokens+40', None, 'no reading'),
    ((2, 65, 12), None, 'NCHW', None, r'needs a feature map of shape \(B, C, H, W\)'),
    ((2, 65, 12, 4), None, 'tokens', None, r'needs a feature map of shape \(B, N, C\)'),
    ((2, 12), (2, 12), None, None, 'needs a feature map'),
    ((2, 1, 12), None, None, 0, 'no reading'),
]


@pytest.mark.parametrize(('shape', 'other', 'asked', 'says', 'expected'), LAYOUT)
def test_the_layout_of_a_shape(shape, other, asked, says, expected):
    there = None if other is None else (other, OTHER)
    found = find_layout(shape, IMAGE, there, parse_layout(asked), says)
    if isinstance(found, Layout):
        assert str(found) == expected
        assert found.size(shape) == (8, 8)
    else:
        assert re.search(expected, found), found


def test_layouts_turn_the_map_and_nothing_else():
    torch.manual_seed(0)
    block = nn.Conv2d(6, 6, 3, padding=1)
    x = torch.randn(2, 6, 4, 8)
    y = block(x)
    torch.testing.assert_close(OnChannelsLast(block)(x.permute(0, 2, 3, 1)), y.permute(0, 2, 3, 1))
    front, tokens = torch.randn(2, 3, 6), x.flatten(2).transpose(1, 2)
    on_tokens = OnTokens(block, 3, (4, 8))
    out = on_tokens(torch.cat([front, tokens], 1))
    assert torch.equal(out[:, :3], front)
    torch.testing.assert_close(out[:, 3:], y.flatten(2).transpose(1, 2))
    # Another size in the same proportions, and a number that is none.
    assert on_tokens(torch.randn(2, 3 + 8 * 16, 6)).shape == (2, 131, 6)
    with pytest.raises(ValueError, match='30 tokens do not fit a map with the aspect ratio 4 x 8'):
        on_tokens(torch.randn(2, 33, 6))
    assert on_tokens(torch.randn(2, 3 + 32, 6).double().float()).is_contiguous()


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore:.torch.jit.*is deprecated')
def test_layouts_go_through_the_compilers():
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.tokens = Turn(), Turn()

        def forward(self, x: Tensor) -> Tensor:
            return self.tokens(self.last(x.permute(0, 2, 3, 1)).flatten(1, 2))

    class Turn(nn.Linear):
        def __init__(self) -> None:
            super().__init__(6, 6)

    torch.manual_seed(0)
    model, x = Both().eval(), torch.randn(2, 6, 4, 8)
    for name, layout in (('last', 'NHWC'), ('tokens', 'tokens+0')):
        insert(model, 'se', name, 'paper', example=x, layout=layout)
    y = model(x)
    assert model.tokens.inserted_attention.prefix == 0
    torch.testing.assert_close(torch.jit.script(model)(x), y)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), y)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), y)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, backend='eager', fullgraph=True)(x), y)


@pytest.mark.parametrize(
    ('arguments', 'error', 'text'),
    [
        ({'layout': 'NCWH'}, ValueError, "layout must be 'NCHW', 'NHWC', 'tokens'.*got 'NCWH'"),
        ({'layout': 3}, ValueError, 'got 3'),
        ({'layout': 'NCHW'}, ValueError, 'no module in it returns|no block of this|feature map'),
        ({'where': 'blocks.0', 'layout': 'tokens', 'input_size': None}, ValueError, 'pass input_size'),
        ({'where': 'blocks.0', 'layout': 'tokens+3'}, ValueError, 'no reading as tokens'),
        ({'reduction': 8, 'feat_size': 3}, TypeError, 'feat_size=3 is not an option of the block'),
        ({'where': 'blocks.0', 'width': 8}, TypeError, "'width'"),
        ({'block': lambda channels: nn.Identity(), 'where': 'blocks.0', 'width': 8}, TypeError, "'width'"),
    ],
)
def test_refused(arguments, error, text):
    model = Tokens(1)
    keys = list(model.state_dict())
    with pytest.raises(error, match=text):
        insert(model, **{'block': 'se', 'input_size': 64, **arguments})
    assert list(model.state_dict()) == keys


def test_options_go_to_the_block():
    class Own(nn.Conv2d):
        def __init__(self, channels: int, kernel_size: int = 1) -> None:
            super().__init__(channels, channels, kernel_size, padding=kernel_size // 2)

    model = Convolutional()
    report = insert(model, Own, kernel_size=3, input_size=64)
    assert model.get_submodule(report.places[0].name).block.kernel_size == (3, 3)
    assert 'kernel_size=3' in report.block
    with pytest.raises(ValueError, match='already'):
        insert(model, Own, kernel_size=5, input_size=64)


def test_a_stage_that_never_runs_is_left_out_unless_it_is_asked_for():
    from torchvision.models import resnet

    class Cut(nn.Module):
        """A PSPNet's encoder: known blocks, of which the forward runs the first two stages."""

        def __init__(self) -> None:
            super().__init__()
            self.encoder = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1])

        def forward(self, x: Tensor) -> Tensor:
            e = self.encoder
            return e.layer2(e.layer1(e.conv1(x)))

    report = insert(Cut(), 'se', input_size=32)
    assert [place.name for place in report.places] == [f'encoder.layer{i}.0.bn2.{IN}' for i in (1, 2)]
    assert report.left_out == ('encoder.layer3.0.bn2', 'encoder.layer4.0.bn2')
    assert 'left out' in str(report)
    assert not report.by_rule
    with pytest.raises(ValueError, match='was not run by the forward'):
        insert(Cut(), 'se', 'encoder.layer4.0', input_size=32)


def test_replaced_convolutions_stay_shared_and_reach_the_optimizer():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = self.two = nn.Conv2d(8, 8, 3, padding=1)
            self.other = nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.other(self.two(self.one(x)))

    for where, names in (('*o*', ['one', 'two', 'other']), ('two', ['one', 'two'])):
        model = Twice()
        old = model.one.weight
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        model(torch.randn(1, 8, 8, 8)).sum().backward()
        optimizer.step()
        assert replace_convolutions(model, 'local', where, heads=2, optimizer=optimizer) == names
        assert model.one is model.two
        held = {id(p) for group in optimizer.param_groups for p in group['params']}
        assert held == {id(p) for p in model.parameters()}
        assert old not in optimizer.state
        model(torch.randn(1, 8, 8, 8)).sum().backward()
        optimizer.step()


@pytest.fixture(scope='module')
def reach():
    return runpy.run_path(str(SCRIPT))


def test_the_benchmark_finds_what_is_wrong(reach, tmp_path):
    case = reach['Case']
    right = reach['check'](case(Last, [64]))
    assert (right['wrong'], right['places'], right['layouts']) == ('', 4, ['NHWC'])
    assert 'no block of this' in reach['check'](case(Windows, [64]))['wrong']
    rows = {
        'timm/a': {**right, 'version': '1', 'torch': '2'},
        'timm/b': {**right, 'wrong': 'x | y', 'version': '1', 'torch': '2'},
    }
    assert '| timm 1, torch 2 | 2 | 1 | 0 | 1 | 1 |' in reach['tables'](rows)[0]


# A sample of the table: of each way, of each layout. The whole is benchmarks/reach.py.
SAMPLE = [
    'timm/test_vit',
    'timm/test_byobnet',
    'timm/test_mambaout',
    'timm/pvt_v2_b0',
    'timm/dla46_c',
    'timm/rexnet_100',
    'torchvision/swin_t',
    'torchvision/squeezenet1_1',
    'torchvision/mnasnet0_5',
    'torchvision/vgg11',
]


@pytest.mark.slow
@pytest.mark.parametrize('name', SAMPLE)
def test_a_sample_of_the_reach(reach, name):
    ((_, case),) = reach['cases'](name)
    assert reach['check'](case)['wrong'] == ''


@pytest.mark.ecosystem
@pytest.mark.parametrize('name', ['smp/Unet(mit_b0)', 'smp/PSPNet(resnet18)', 'transformers/ViT', 'transformers/Swin'])
def test_a_sample_of_other_libraries(reach, name):
    found = [case for full, case in reach['cases']('*') if full == name]
    assert len(found) == 1, 'the library is not installed: pip install sase-blocks[ecosystem]'
    assert reach['check'](found[0])['wrong'] == ''
