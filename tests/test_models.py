"""The timm entries: what is registered, what the arguments do, how they start. timm's own tests: `make test-timm`."""

import json
from functools import partial

import pytest
import timm
import torch
from conftest import mostly_slow
from timm.optim import create_optimizer_v2

import sase_blocks
from sase_blocks import (
    AttentionBlock,
    AxialSelfAttention,
    ChannelAttention,
    Genotype,
    LocalSelfAttention,
    SpatialAttention,
    list_blocks,
    no_weight_decay,
    ops,
    register_resnet,
)
from sase_blocks.blocks import BLOCKS, AttentionModule
from sase_blocks.models import resnet
from sase_blocks.models.base import StagedNetwork
from sase_blocks.train import TrainConfig, make_optimizer

OURS = [f'resnet{d}_{n}' for d in (50, 101) for n in (*list_blocks(), 'channel', 'spatial')] + ['resnet20_cifar']
GENOTYPE = 'second_order,conv3,affine,l2_norm,avg_std,affine'


def blocks(model):
    return [m for m in model.modules() if isinstance(m, AttentionModule)]


def params(model):
    return sum(p.numel() for p in model.parameters())


def test_registered_without_weights():
    assert set(OURS) <= set(timm.list_models())
    assert not set(OURS) & set(timm.list_models(pretrained=True))


@pytest.mark.parametrize(
    ('name', 'expected'),
    [('resnet50_sase', 28_102_568), pytest.param('resnet101_sase', 49_358_144, marks=pytest.mark.slow)],
)
def test_parameters_of_the_paper(name, expected):
    model = timm.create_model(name, device='meta')
    assert params(model) == expected
    assert len(blocks(model)) == (16 if '50' in name else 33)


def test_resnet20_cifar_is_the_papers_network():
    """0.27 M: stem, 9 basic blocks, two 1x1 projections with batch norm, the classifier."""
    plain = timm.create_model('resnet20_cifar')
    widths = [(16, 16), (16, 32), (32, 64)]
    expected = 3 * 16 * 9 + 2 * 16 + 64 * 10 + 10
    for i, (cin, c) in enumerate(widths):
        expected += cin * c * 9 + c * c * 9 * 5 + 6 * 2 * c + (cin * c + 2 * c if i else 0)
    assert params(plain) == expected == 272_474
    assert not blocks(plain)
    assert plain(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    assert len(blocks(timm.create_model('resnet20_cifar', genotype='sase'))) == 9
    features = timm.create_model('resnet20_cifar', features_only=True)
    assert [(f.shape[1], f.shape[2]) for f in features(torch.randn(1, 3, 32, 32))] == [
        (16, 32),
        (16, 32),
        (32, 16),
        (64, 8),
    ]


ARGUMENTS = [
    ('resnet50_sase', {'genotype': 'se'}, 16, ChannelAttention),
    ('resnet50_sase', {'genotype': 'none'}, 0, None),
    ('resnet50_sase', {'genotype': GENOTYPE, 'img_size': 64}, 16, AttentionBlock),
    ('resnet50_sase', {'genotype': Genotype.random(1).to_json()}, 16, AttentionBlock),
    ('resnet50_sase', {'attn_stages': (3, 4)}, 9, AttentionBlock),
    ('resnet50_sase', {'attn_stages': [2]}, 4, AttentionBlock),
    ('resnet50_sase', {'attn_stages': ()}, 0, None),
    ('resnet50_channel', {'squeeze': 'avg_std', 'excite': 'conv5'}, 16, ChannelAttention),
    ('resnet50_channel', {'squeeze': 'GAP+std', 'excite': 'conv1D_5'}, 16, ChannelAttention),
    ('resnet101_spatial', {'squeeze': 'l2_norm', 'excite': 'affine'}, 33, SpatialAttention),
    ('resnet20_cifar', {'genotype': GENOTYPE, 'attn_stages': (3,)}, 3, AttentionBlock),
    ('resnet20_cifar', {'genotype': 'se(reduction=4)'}, 9, ChannelAttention),
    ('resnet20_cifar', {'genotype': ['se(reduction=4)', 'eca(kernel_size=5)', 'se']}, 9, ChannelAttention),
    ('resnet50_channel', {'squeeze': 'avg', 'excite': 'mlp(reduction=4)'}, 16, ChannelAttention),
]


@pytest.mark.parametrize(('name', 'kwargs', 'count', 'kind'), ARGUMENTS, ids=str)
def test_arguments(name, kwargs, count, kind):
    model = timm.create_model(name, device='meta', **kwargs)
    assert len(blocks(model)) == count
    assert kind is None or all(isinstance(b, kind) for b in blocks(model))
    json.dumps(kwargs)  # plain enough to be written into a configuration


@pytest.mark.parametrize(
    ('name', 'img_size', 'stride', 'sizes'),
    [
        ('resnet50_sase', 224, 32, [56, 28, 14, 7]),
        ('resnet50_sase', (100, 64), 32, [(25, 16), (13, 8), (7, 4), (4, 2)]),
        ('resnet50_sase', 224, 8, [56, 28, 28, 28]),
        ('resnet20_cifar', 32, None, [32, 16, 8]),
    ],
)
def test_feature_sizes_of_per_position_parameters(name, img_size, stride, sizes):
    kwargs = {} if stride is None else {'output_stride': stride}
    model = timm.create_model(name, genotype=GENOTYPE, img_size=img_size, device='meta', **kwargs)
    for i, size in enumerate(sizes, start=1):
        block = getattr(model, f'layer{i}')[0].se
        assert block.feat_size == (size if isinstance(size, tuple) else (size, size))


WRONG = [
    ('resnet50_sase', {'genotype': 'sasee'}, ValueError, 'unknown attention block'),
    ('resnet50_sase', {'genotype': 'avg,mlp'}, ValueError, 'six choices'),
    ('resnet50_sase', {'attn_stages': (0, 1)}, ValueError, r'from 1 to 4, got \(0, 1\)'),
    ('resnet50_sase', {'attn_stages': (5,)}, ValueError, r'from 1 to 4'),
    ('resnet50_sase', {'attn_stages': 'all'}, ValueError, r"from 1 to 4, got 'all'"),
    ('resnet20_cifar', {'genotype': 'sase', 'attn_stages': (4,)}, ValueError, r'from 1 to 3'),
    ('resnet50_sase', {'img_size': 0}, ValueError, 'img_size'),
    ('resnet50_sase', {'block_args': {'attn_layer': 'se'}}, ValueError, 'attn_layer'),
    ('resnet50_sase', {'no_such_argument': 1}, TypeError, 'no_such_argument'),
    ('resnet50_channel', {'squeeze': 'gap'}, ValueError, "'gap' is not a channel squeeze"),
    ('resnet50_spatial', {'excite': 'mlp'}, ValueError, "'mlp' is not a spatial excite"),
    ('resnet50_sase', {'pretrained': True}, RuntimeError, 'No pretrained weights'),
]


@pytest.mark.parametrize(('name', 'kwargs', 'error', 'text'), WRONG, ids=str)
def test_wrong_arguments(name, kwargs, error, text):
    with pytest.raises(error, match=text):
        timm.create_model(name, **kwargs)


def test_register_resnet():
    register_resnet('resnet50_of_this_test', GENOTYPE, attn_stages=(4,))
    model = timm.create_model('resnet50_of_this_test', num_classes=7, device='meta')
    assert [str(b.genotype) for b in blocks(model)] == [GENOTYPE] * 3
    assert len(blocks(timm.create_model('resnet50_of_this_test', attn_stages=(1, 4), device='meta'))) == 6
    for args, kwargs, text in [
        (('resnet50_of_this_test', 'sase'), {}, 'already has'),
        (('resnet50', 'sase'), {}, 'already has'),
        (('my-net', 'sase'), {}, 'identifier'),
        (('resnet34_mine', 'sase'), {'depth': 34}, '50, 101'),
        (('resnet50_other', 'sasee'), {}, 'unknown attention block'),
        (('resnet50_other', 'none'), {}, 'plain ResNet'),
        (('class', 'sase'), {}, "identifier such as resnet50_mine, got 'class'"),
        ((50, 'sase'), {}, 'identifier such as resnet50_mine, got 50'),
        # An entry point becomes a name of its module, whose own names it must not take.
        (('ResNet', 'se'), {}, "'ResNet' is used by the code of .*; choose another name, such as resnet50_mine"),
        (('default_cfgs', 'se'), {}, "'default_cfgs' is used by"),
        (('_register', 'se'), {'depth': 101}, "'_register' is used by .* such as resnet101_mine"),
        (('__name__', 'se'), {}, "'__name__' is used by"),
        (('setattr', 'se'), {}, "'setattr' is used by"),
    ]:
        names = dict(vars(resnet))
        with pytest.raises(ValueError, match=text):
            register_resnet(*args, **kwargs)
        assert vars(resnet) == names
    assert len(blocks(timm.create_model('resnet50_sase', device='meta'))) == 16


ABSTRACT = [
    (ops.Primitive, 'forward'),
    (ops.ChannelSqueeze, 'squeeze'),
    (ops.ChannelExcite, 'excite'),
    (ops.SpatialSqueeze, 'squeeze'),
    (ops.SpatialExcite, 'excite'),
    (ops.channel_squeeze.MixedChannelSqueeze, 'squeeze'),
    (ops.spatial_squeeze.MixedSpatialSqueeze, 'squeeze'),
    (AttentionModule, 'gate'),
    (StagedNetwork, 'forward_features'),
]


@pytest.mark.parametrize(('base', 'method'), ABSTRACT, ids=lambda value: getattr(value, '__name__', value))
def test_a_base_cannot_be_built(base, method):
    with pytest.raises(TypeError, match=rf'abstract class {base.__name__} .*\b{method}\b'):
        base(8)


def one_step(model, size):
    torch.manual_seed(0)
    model.train()(torch.randn(4, 3, size, size)).square().sum().backward()
    return {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize(
    'genotype',
    [
        'sase',
        *(pytest.param(text, marks=pytest.mark.slow) for text in (GENOTYPE, 'se', 'cbam')),
        pytest.param('p_norm,conv3_x3,mlp,p_norm,second_order,conv3x3', marks=pytest.mark.slow),
    ],
)
def test_no_gradient_is_non_finite_at_step_0(genotype):
    """timm starts the last batch norm of a block at zero, so the attention's first input is exactly zero."""
    grads = one_step(timm.create_model('resnet50_sase', genotype=genotype, img_size=64, num_classes=10), 64)
    assert [n for n, g in grads.items() if g is None or not g.isfinite().all()] == []


@pytest.mark.parametrize('half', mostly_slow([torch.bfloat16, torch.float16], torch.bfloat16), ids=str)
def test_autocast_step_0(half):
    model = timm.create_model('resnet20_cifar', genotype='sase')
    with torch.autocast('cpu', dtype=half):
        loss = model(torch.randn(4, 3, 32, 32)).float().square().mean()
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_timms_initialisation_leaves_ours_alone():
    """Both through our entry points and as attn_layer= of any timm ResNet; mixers start at 1/2, ReLUs are fed."""
    block_args = {'attn_layer': sase_blocks.SASE}
    for model in (
        timm.create_model('resnet50_sase'),
        timm.create_model('resnet26', block_args=block_args),
        timm.create_model('resnet20_cifar', block_args=block_args),
    ):
        assert len(blocks(model)) >= 8
        for block in blocks(model):
            assert torch.equal(block.mix_weight, torch.full((2,), 0.5))
            assert (block.channel_excite.fc1.weight.sum(1) >= 0).all()
            first = block.spatial_excite.convs[0].weight
            assert first.sum() >= 0
            assert first.abs().max() <= 1 / 3  # torch's own bound; timm's normal of deviation 0.47 exceeds it


# Every primitive, every block and the self-attentions, from the tables.
LAYERS = {
    **{f'{kind}/{name}': cls for kind, table in ops.EXTENDED_SETS.items() for name, cls in table.items()},
    **BLOCKS,
    'local': lambda channels, feat_size: LocalSelfAttention(channels, position='position_sensitive'),
    'axial': lambda channels, feat_size: AxialSelfAttention(channels, size=feat_size),
}


# Whose `weight` is a kernel: the layers, and the two weights of each channel that SRM calls a fully connected layer.
KERNELS = (torch.nn.Conv1d, ops.Conv2d, ops.Linear, ops.ChannelStyle)


@pytest.mark.parametrize('build', LAYERS.values(), ids=LAYERS)
def test_weight_decay_is_for_kernels(build):
    """A parameter of more than one dimension is a kernel, which decays, or named: what it is per channel is 1-d."""
    layer = build(32, feat_size=(7, 6))
    named = no_weight_decay(layer)
    for name, parameter in layer.named_parameters():
        path, _, leaf = name.rpartition('.')
        owner = layer.get_submodule(path)
        kernel = leaf == 'row_weight' or (leaf == 'weight' and isinstance(owner, KERNELS))
        assert (name in named) == (parameter.ndim > 1 and not kernel), name
    assert named <= {name for name, _ in layer.named_parameters()}
    if hasattr(layer, 'no_weight_decay'):
        assert layer.no_weight_decay() == named  # what timm calls on a network, each says for itself
    else:
        assert isinstance(layer, torch.nn.Sequential)


PER_POSITION = 'avg,affine,affine,l2_norm,avg,affine'
DECAYED = [
    ('resnet20_cifar', {'genotype': PER_POSITION}, 4 * 9),
    ('resnet20_cifar', {'genotype': 'sase'}, 0),
    ('resnet50_sase', {'genotype': PER_POSITION, 'img_size': 64, 'attn_stages': (4,)}, 4 * 3),
    ('resnet26_sasa', {}, 8),
    ('axial_resnet26', {}, 16),
    ('trionet', {'architecture': 'image 32; stem 16; heads 4; 64: local3/16 + axial/16'}, 3),
]


@pytest.mark.parametrize(('name', 'kwargs', 'count'), DECAYED)
def test_timms_optimizers_ask_our_models(name, kwargs, count):
    model = timm.create_model(name, device='meta', **kwargs)
    assert model.no_weight_decay() == no_weight_decay(model)
    config = TrainConfig('data', opt='adamw', lr=0.1, weight_decay=0.05)
    for optimizer in (
        create_optimizer_v2(model, opt='adamw', lr=0.1, weight_decay=0.05),
        make_optimizer(config, model),
    ):
        names = {id(p): n for n, p in model.named_parameters()}
        exempt, decayed = optimizer.param_groups
        assert (exempt['weight_decay'], decayed['weight_decay']) == (0.0, 0.05)
        assert {names[id(p)] for p in exempt['params'] if p.ndim > 1} == model.no_weight_decay()
        assert len(model.no_weight_decay()) == count
        assert len(exempt['params']) + len(decayed['params']) == len(names)


def test_what_takes_no_weight_decay_in_other_networks():
    build = partial(AttentionBlock, genotype=PER_POSITION, feat_size=8)
    model = timm.create_model('resnet10t', block_args={'attn_layer': build}, device='meta')
    named = no_weight_decay(model)
    assert len(named) == 4 * 4
    optimizer = make_optimizer(TrainConfig('data'), model)
    assert sum(p.ndim == 2 for p in optimizer.param_groups[0]['params']) == len(named)
    swin = timm.create_model('swin_tiny_patch4_window7_224', device='meta')
    assert no_weight_decay(swin) == swin.no_weight_decay()
    assert no_weight_decay(torch.nn.Sequential(swin)) == {f'0.{name}' for name in swin.no_weight_decay()}
    assert no_weight_decay(torch.nn.Linear(2, 2)) == set()


@pytest.mark.slow
def test_it_trains():
    """One batch is learned by heart, from timm's zero-initialised start."""
    torch.manual_seed(0)
    model = timm.create_model('resnet20_cifar', genotype='sase')
    x, y = torch.randn(10, 3, 16, 16), torch.arange(10)
    optimiser = torch.optim.Adam(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(16):
        loss = torch.nn.functional.cross_entropy(model(x), y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 < 1.5 < losses[0]
