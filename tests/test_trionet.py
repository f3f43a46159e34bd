"""TrioNet's block and networks: counts, notation, sizes, training. Tests of the operators: test_selfattention.py."""

import copy
import itertools

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import mostly_slow
from torch import nn

from sase_blocks.insertion import replace_convolutions
from sase_blocks.models.resnet_operators import NAMES, parse_operators, set_operators
from sase_blocks.profiling import count_macs
from sase_blocks.selfattention import OPERATORS, AxialSelfAttention, LocalSelfAttention, TrioBlock, build_operator

pytestmark = pytest.mark.usefixtures('one_thread')

LAYERS = (3, 4, 6, 3)
SMALL = {'num_classes': 10, 'img_size': 64}


# ---- the notation ----


def runs(text):
    """The operators of each stage as [(name, size, count), ...]."""
    return [
        [(name, size, len(list(group))) for (name, size), group in itertools.groupby(stage)]
        for stage in parse_operators(text, LAYERS)
    ]


@pytest.mark.parametrize(
    ('text', 'expected'),
    [
        ('axial', [[('axial', None, n)] for n in LAYERS]),
        ('local3', [[('local', 3, n)] for n in LAYERS]),
        (
            'conv,conv5,local*3+axial*3,axial',
            [[('conv', None, 3)], [('conv', 5, 4)], [('local', None, 3), ('axial', None, 3)], [('axial', None, 3)]],
        ),
        (
            ' conv*3 , conv+local*2+local , local7 * 6'.replace(' * ', '*') + ', conv+axial+local3',
            [
                [('conv', None, 3)],
                [('conv', None, 1), ('local', None, 3)],
                [('local', 7, 6)],
                [('conv', None, 1), ('axial', None, 1), ('local', 3, 1)],
            ],
        ),
    ],
    ids=['one', 'one with a size', 'stages', 'sums'],
)
def test_notation(text, expected):
    assert runs(text) == expected


@pytest.mark.parametrize(
    ('text', 'says'),
    [
        ('conv,conv', 'operators has 2 entries, expected one for all blocks or one for each of the 4 stages'),
        ('conv,conv,lcal*3+axial*3,axial', r"'lcal\*3' is not an operator; .*, at character 11 of"),
        ('conv,conv,local*3+axal*3,axial', r"'axal\*3' is not an operator; .*, at character 19 of"),
        ('conv,conv,local*3+axial*2,axial', r"'local\*3\+axial\*2' names 5 blocks, but the stage has 6, at"),
        ('conv,conv4,local,axial', "'conv4': a size must be odd, at character 6"),
        ('conv,conv,local,axial3', "'axial3': axial takes no size, at character 17"),
        ('', "'' is not an operator"),
        ('conv,,conv,conv', "'' is not an operator; .*, at character 6"),
        ('local*2', 'operators has 1 entries'),
    ],
)
def test_wrong_notation(text, says):
    with pytest.raises(ValueError, match=says):
        parse_operators(text, LAYERS)


def test_notation_that_is_no_text():
    with pytest.raises(TypeError, match=r'operators must be a text such as .*got 5'):
        parse_operators(5, LAYERS)


# ---- the networks ----

PUBLISHED = [  # millions of parameters and 10^9 multiply-adds of Axial-DeepLab's authors: 224 x 224, 1,000 classes
    ('axial_resnet26', {}, 5.945, 1.81),
    ('axial_resnet50', {}, 11.586, 2.84),
    ('axial_resnet50', {'scale': 0.75}, 25.179, 5.96),
    ('axial_resnet50', {'scale': 1.0}, 43.973, 10.19),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ('name', 'args', 'parameters', 'macs'),
    PUBLISHED,
)
def test_axial_networks_have_the_published_counts(name, args, parameters, macs):
    with torch.device('meta'):
        model = timm.create_model(name, **args)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 3) == parameters
    assert round(count_macs(model, (3, 224, 224)) / 1e9, 2) == macs


@pytest.mark.parametrize(
    ('name', 'parameters'),
    [('resnet26_sasa', 10_331_264), ('resnet38_sasa', 14_173_384), ('resnet50_sasa', 18_015_504)],
)
def test_local_networks_have_full_projections(name, parameters):
    """The paper's 10.3, 14.1 and 18.0 M, which only full projections give."""
    with torch.device('meta'):
        model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_all_convolution_is_timms_resnet():
    ours = timm.create_model('resnet50_trionet', operators='conv', num_classes=10).eval()
    theirs = timm.create_model('resnet50', num_classes=10).eval()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(ours(x), theirs(x))


def test_what_stands_where():
    model = timm.create_model('resnet50_trionet', operators='conv5,conv,local*2+axial*4,axial', **SMALL)
    assert [type(block.conv2).__name__ for block in model.layer3] == ['LocalSelfAttention'] * 2 + [
        'AxialSelfAttention'
    ] * 4
    assert model.layer1[0].conv2.kernel_size == (5, 5)
    assert model.layer3[0].conv2.stride == 2
    assert isinstance(model.layer3[0].bn2, nn.BatchNorm2d)
    assert isinstance(model.layer4[0].bn2, nn.Identity)
    assert model.layer4[0].conv2.size == (4, 4)  # before its stride
    assert model.layer4[1].conv2.size == (2, 2)


@pytest.mark.parametrize(
    'name',
    [pytest.param(n, marks=pytest.mark.slow if '101' in n or n.endswith(('38_sasa', 'net50')) else ()) for n in NAMES],
)
def test_networks_run_at_any_size(name):
    model = timm.create_model(name, **SMALL).eval()
    with torch.no_grad():
        for size in ((64, 64), (33, 70), (96, 40)):
            assert model(torch.randn(1, 3, *size)).isfinite().all()


@pytest.mark.parametrize('name', ['resnet50_trionet', 'resnet26_sasa', 'axial_resnet26'])
def test_features_feed_dense_prediction(name):
    model = timm.create_model(name, features_only=True, out_indices=(1, 2, 3, 4), img_size=64).eval()
    with torch.no_grad():
        features = model(torch.randn(1, 3, 75, 64))
    assert [f.shape[1] for f in features] == model.feature_info.channels()
    assert [f.shape[2] for f in features] == [19, 10, 5, 3]


MIXED = 'conv,local3,local*3+axial*3,axial'


@pytest.mark.slow
@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
@pytest.mark.parametrize('operators', ['conv', 'local', 'axial', MIXED])
def test_a_step_of_training(operators, precision):
    model = timm.create_model('resnet50_trionet', operators=operators, layers=LAYERS, zero_init_last=False, **SMALL)
    x, y = torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 3])
    with torch.autocast('cpu', torch.bfloat16, enabled=precision == 'bf16'):
        loss = F.cross_entropy(model(x).float(), y)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.slow
@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
@pytest.mark.parametrize('name', ['resnet50_trionet', 'resnet26_sasa', 'axial_resnet26'])
def test_an_epoch_of_digits(name, precision):
    from sase_blocks.demo import load_digits

    digits = load_digits(320)
    model = timm.create_model(name, in_chans=1, num_classes=10, img_size=32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for images, labels in zip(digits.train_images.split(32), digits.train_labels.split(32), strict=True):
        with torch.autocast('cpu', torch.bfloat16, enabled=precision == 'bf16'):
            loss = F.cross_entropy(model(images).float(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(loss == loss and loss < 20 for loss in losses)  # NaN is unequal to itself
    assert min(losses[-3:]) < losses[0]


@pytest.mark.parametrize(
    ('arguments', 'says'),
    [
        ({'heads': 7}, 'multiple of 2 x heads = 14'),
        ({'img_size': 0}, 'img_size'),
        ({'operators': 'global'}, "'global' is not an operator"),
        ({'operators': 'local', 'cardinality': 2}, 'plain 3x3 convolution'),
    ],
)
def test_wrong_arguments(arguments, says):
    with pytest.raises(ValueError, match=says):
        timm.create_model('resnet50_trionet', **arguments)


def test_blocks_without_a_middle_are_refused():
    with pytest.raises(ValueError, match=r'operators need bottlenecks .* got BasicBlock'):
        set_operators(timm.create_model('resnet34'), 'local')


# ---- the block ----


@pytest.mark.parametrize('operator', OPERATORS)
@pytest.mark.parametrize(
    ('args', 'size', 'out'),
    [
        ({}, (7, 9), (64, 7, 9)),
        ({'stride': 2}, (7, 9), (64, 4, 5)),
        ({'out_channels': 128, 'width': 32, 'heads': 4}, (8, 8), (128, 8, 8)),
        ({'size': 5}, (1, 1), (64, 1, 1)),
    ],
    ids=['plain', 'stride', 'wider', 'one position'],
)
def test_block_shapes(operator, args, size, out):
    block = TrioBlock(64, operator, **args).eval()
    x = torch.randn(2, 64, *size)
    assert block(x).shape == (2, *out)
    clone = copy.deepcopy(block)
    clone.load_state_dict(block.state_dict())
    assert torch.equal(clone(x), block(x))
    fast = block.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(fast, clone(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('operator', OPERATORS)
def test_all_operators_hand_on_the_same_kind_of_signal(operator):
    """Before the activation of the shared 1x1: mean near 0, variance near that of one or two batch norms."""
    block = TrioBlock(256, operator, size=14).train()
    seen = []
    block.norm2.register_forward_hook(lambda module, args, output: seen.append(output.clone()))
    block(torch.randn(8, 256, 14, 14))
    assert seen[0].mean().abs() < 0.1
    assert 0.8 < seen[0].var() < 2.5


@pytest.mark.parametrize(
    'operator', [pytest.param(name, marks=() if name == 'conv' else pytest.mark.slow) for name in OPERATORS]
)
def test_block_exports_with_any_size(operator):
    block = TrioBlock(32, operator, heads=2, size=8).eval()
    shapes = (dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC),)
    exported = torch.export.export(block, (torch.randn(2, 32, 8, 10),), dynamic_shapes=shapes).module()
    for x in (torch.randn(3, 32, 12, 6), torch.randn(2, 32, 5, 9)):
        torch.testing.assert_close(exported(x), block(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ('build', 'error', 'says'),
    [
        (lambda: TrioBlock(0), ValueError, 'at least 1, got 0'),
        (lambda: TrioBlock(64, 'global'), ValueError, "operator must be one of conv, local, axial, got 'global'"),
        (lambda: TrioBlock(64, 'local', heads=3), ValueError, 'multiple of 2 x heads = 6'),
        (lambda: TrioBlock(64, 'local', kernel_size=4), ValueError, 'odd kernel_size of at least 1, got 4'),
        (lambda: TrioBlock(64, 'conv', kernel_size=4), ValueError, 'odd kernel_size of at least 1, got 4'),
        (lambda: TrioBlock(64, 'axial', kernel_size=3), ValueError, 'no window, got kernel_size=3'),
        (lambda: TrioBlock(64, 'axial', stride=3), ValueError, 'got 3'),
        (lambda: TrioBlock(64)(torch.randn(1, 32, 8, 8)), ValueError, 'built for 64 channels, got 32'),
        (lambda: TrioBlock(64)(torch.ones(1, 64, 8, 8).long()), TypeError, 'floating-point'),
    ],
    ids=['channels', 'operator', 'heads', 'window', 'kernel', 'axial window', 'stride', 'input', 'dtype'],
)
def test_wrong_blocks(build, error, says):
    with pytest.raises(error, match=says):
        build()


def test_operators_and_their_norms():
    kinds = {name: build_operator(name, 64) for name in OPERATORS}
    assert {name: type(module) for name, (module, _) in kinds.items()} == {
        'conv': nn.Conv2d,
        'local': LocalSelfAttention,
        'axial': AxialSelfAttention,
    }
    assert {name: needs for name, (_, needs) in kinds.items()} == {'conv': True, 'local': True, 'axial': False}


# ---- in other networks ----


@pytest.mark.parametrize('operator', mostly_slow(('local', 'axial', 'conv'), 'local'))
def test_replacing_the_convolutions_of_stages(operator):
    model = timm.create_model('resnet50', num_classes=10).eval()
    model.layer4[1].train()
    keys = set(model.state_dict())
    size = 5 if operator == 'conv' else None
    names = replace_convolutions(model, operator, stages=(3, 4), kernel_size=size, input_size=64)
    assert names == [f'layer3.{i}.conv2' for i in range(6)] + [f'layer4.{i}.conv2' for i in range(3)]
    assert keys - set(model.state_dict()) <= {f'{name}.weight' for name in names}
    assert [model.get_submodule(name).training for name in names] == [False] * 7 + [True, False]
    model.eval()
    with torch.no_grad():
        assert model(torch.randn(2, 3, 64, 64)).isfinite().all()
        assert model(torch.randn(1, 3, 45, 70)).isfinite().all()
    if operator == 'axial':
        assert model.layer3[0].conv2.size == (8, 8)
        assert model.layer3[1].conv2.size == (4, 4)


def test_replacing_by_name_in_any_network():
    torchvision = pytest.importorskip('torchvision')
    model = torchvision.models.resnet18(num_classes=5).double()
    assert replace_convolutions(model, 'local', 'layer4.*.conv2', kernel_size=3) == ['layer4.0.conv2', 'layer4.1.conv2']
    assert model(torch.randn(2, 3, 64, 64).double()).shape == (2, 5)
    plain = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, 2, 1))
    assert replace_convolutions(plain, 'axial', lambda name, module: name == '2', heads=2, input_size=(3, 8, 8)) == [
        '2'
    ]
    assert plain(torch.randn(1, 3, 9, 9)).shape == (1, 16, 5, 5)


OTHERS = [  # network, operator, where, how many, the first
    ('resnet26d', 'axial', None, 8, 'layer1.0.conv2'),  # average pools in its shortcuts, three convolutions in its stem
    ('resnetblur18', 'local', None, 13, 'layer1.0.conv1'),  # blurs and pools after the convolution
    ('skresnet18', 'axial', None, 8, 'layer1.0.conv2.conv'),
    ('res2net50_26w_4s', 'local', None, 48, 'layer1.0.convs.0'),  # several per block, each for part of its channels
    ('hrnet_w18_small', 'local', None, 41, 'layer1.0.conv2'),
    ('resnetv2_50', 'axial', 'stages.3.*.conv2', 3, 'stages.3.blocks.0.conv2'),  # norms before the convolution
    ('gcresnet33ts', 'local', 'stages.2.*.conv2_kxk.conv', 3, 'stages.2.0.conv2_kxk.conv'),
    ('cspdarknet53', 'axial', 'stages.4.blocks.*.conv2.conv', 4, 'stages.4.blocks.0.conv2.conv'),
    ('dla34', 'local', lambda name, module: name.endswith('tree2.conv2'), 6, 'level2.tree2.conv2'),
]


@pytest.mark.parametrize(
    ('name', 'operator', 'where', 'count', 'first'),
    [pytest.param(*o, id=o[0], marks=() if o[0] == 'dla34' else pytest.mark.slow) for o in OTHERS],
)
def test_replacing_in_other_networks(name, operator, where, count, first):
    """It runs at the size of its tables and at another, and every new parameter gets a gradient."""
    model = timm.create_model(name, num_classes=2)
    names = replace_convolutions(model, operator, where, kernel_size=None, heads=1, input_size=64)
    assert (len(names), names[0]) == (count, first)
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    for new in names:
        for parameter, value in model.get_submodule(new).named_parameters():
            assert value.grad is not None, f'{new}.{parameter}'
            assert value.grad.isfinite().all(), f'{new}.{parameter}'
    with torch.no_grad():
        assert model.eval()(torch.randn(1, 3, 96, 64)).isfinite().all()


def test_replacing_inside_a_segmentation_network():
    segmentation = pytest.importorskip('torchvision').models.segmentation
    model = segmentation.fcn_resnet50(weights=None, weights_backbone=None, num_classes=2).eval()
    assert len(replace_convolutions(model, 'local', stages=(1, 2), kernel_size=3)) == 7
    with torch.no_grad():
        assert model(torch.randn(1, 3, 33, 40))['out'].shape == (1, 2, 33, 40)
    with pytest.raises(ValueError, match=r'backbone.layer4.1.conv2 cannot be replaced: it is dilated by \(4, 4\)'):
        replace_convolutions(model, 'local', 'backbone.layer4.1.conv2')


@pytest.mark.parametrize(
    ('name', 'says'),
    [
        ('dla34', r"this DLA has .*, but \d+ elsewhere can be: .* 'level"),
        ('regnetx_002', r'this RegNet has .*; of stem.conv: it has 1 groups, 3 channels in and 32 out'),
        ('vit_tiny_patch16_224', r'no residual block of this VisionTransformer has a 3 x 3 convolution'),
    ],
)
def test_nothing_to_replace(name, says):
    with pytest.raises(ValueError, match=says):
        replace_convolutions(timm.create_model(name, num_classes=2), 'local')


@pytest.mark.parametrize(
    ('change', 'error', 'says'),
    [
        ({'operator': 'global'}, ValueError, 'operator must be one of'),
        ({'where': 'layer9.*'}, ValueError, "where='layer9.\\*' matches no module"),
        ({'where': 5}, TypeError, 'where must be a pattern'),
        ({'where': 'layer1.0.conv1'}, ValueError, 'layer1.0.conv1 cannot be replaced: .*64 channels in'),
        ({'where': 'layer1.0.bn1'}, ValueError, 'it is a BatchNorm2d'),
        ({'stages': 7}, ValueError, 'stages takes stage numbers from 1 to 4, got 7'),
        ({'heads': 5}, ValueError, 'multiple of 2 x heads = 10'),
        ({'kernel_size': 2}, ValueError, 'odd kernel_size'),
    ],
    ids=['operator', 'nothing', 'where', 'channels', 'norm', 'stages', 'heads', 'kernel'],
)
def test_wrong_replacements_change_nothing(change, error, says):
    model = timm.create_model('resnet50', num_classes=3, layers=(1, 1, 1, 1))
    if change.get('where') == 'layer1.0.conv1':
        model.layer1[0].conv1 = nn.Conv2d(64, 32, 1)
    before = {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(error, match=says):
        replace_convolutions(model, **{'operator': 'local', **change})
    assert {name: id(module) for name, module in model.named_modules()} == before


def test_axial_attention_needs_a_size():
    model = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1))
    with pytest.raises(ValueError, match='input_size='):
        replace_convolutions(model, 'axial', '0')
