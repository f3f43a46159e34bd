"""Insertion: an identity to the bit in every known family, no key renamed, and refusals that change nothing."""

import copy
import pickle
import runpy
import warnings
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from conftest import mostly_slow
from timm.models import convnext, densenet, mobilenetv3, regnet, res2net, resnet, sknet
from timm.models._efficientnet_builder import decode_arch_def
from torch import Tensor, nn
from torchvision.models import convnext as tv_convnext
from torchvision.models import efficientnet as tv_efficientnet
from torchvision.models import mobilenetv3 as tv_mobilenetv3
from torchvision.models import regnet as tv_regnet
from torchvision.models import resnet as tv_resnet

from sase_blocks import SASE, AttentionBlock, Genotype, compile_blocks, create_block, load_checkpoint
from sase_blocks.blocks import BLOCKS
from sase_blocks.insertion import IdentityStart, insert, remove
from sase_blocks.insertion.layout import OnChannelsLast, OnTokens

# TorchScript is deprecated in torch, not yet in timm, whose tests ask for it.
pytestmark = [
    pytest.mark.filterwarnings('ignore:.torch.jit.*is deprecated'),
    pytest.mark.filterwarnings("ignore:The TorchScript type system doesn't support instance-level annotations"),
]


def timm_mobilenetv3_small() -> nn.Module:
    rows = decode_arch_def([['ds_r1_k3_s2_e1_c8_se0.25_nre'], ['ir_r2_k5_s2_e2_c16']])
    return mobilenetv3.MobileNetV3(rows, num_classes=5, stem_size=8, num_features=32)


def tv_mobilenetv3_small() -> nn.Module:
    setting = [(8, 3, 8, 8, True, 'RE', 1, 1), (8, 5, 16, 16, False, 'HS', 2, 1), (16, 5, 32, 16, True, 'HS', 1, 1)]
    setting = [tv_mobilenetv3.InvertedResidualConfig(*row, 1.0) for row in setting]
    return tv_mobilenetv3.MobileNetV3(setting, last_channel=32, num_classes=5, dropout=0.0)


def tv_efficientnet_small(**kwargs) -> nn.Module:
    rows = [(tv_efficientnet.MBConvConfig, 1, 1, 8, 1), (tv_efficientnet.FusedMBConvConfig, 2, 8, 8, 1)]
    rows += [(tv_efficientnet.MBConvConfig, 2, 8, 16, 2)]
    setting = [cls(e, 3, 2 if o == 16 else 1, 8, o, n) for cls, e, _, o, n in rows]
    return tv_efficientnet.EfficientNet(setting, dropout=0.0, stochastic_depth_prob=0.0, last_channel=32, **kwargs)


def tv_convnext_small(**kwargs) -> nn.Module:
    setting = [tv_convnext.CNBlockConfig(8, 16, 1), tv_convnext.CNBlockConfig(16, None, 2)]
    return tv_convnext.ConvNeXt(setting, stochastic_depth_prob=0.0, layer_scale=0.1, **kwargs)


def tv_regnet_small(**kwargs) -> nn.Module:
    params = tv_regnet.BlockParams.from_init_params(depth=3, w_0=8, w_a=8.0, w_m=1.8, group_width=8)
    return tv_regnet.RegNet(params, stem_width=8, **kwargs)


def timm_regnet_small(**kwargs) -> nn.Module:
    cfg = regnet.RegNetCfg(depth=4, w0=8, wa=20.0, wm=1.8, group_size=8, **kwargs)
    return regnet.RegNet(cfg, num_classes=5, zero_init_last=False)


NARROW = {'num_classes': 5, 'stem_width': 8, 'channels': (8, 16, 16, 32), 'zero_init_last': False}

# name -> what builds it, the number of places, the first of them, the stage of each.
NETWORKS = {
    'timm resnet, basic': (
        lambda: resnet.ResNet(resnet.BasicBlock, (1, 2, 1, 1), **NARROW),
        'layer1.0.se',
        [1, 2, 2, 3, 4],
    ),
    'timm resnet, bottleneck': (
        lambda: resnet.ResNet(resnet.Bottleneck, (1, 1, 1, 1), **NARROW),
        'layer1.0.se',
        [1, 2, 3, 4],
    ),
    'timm se-resnet': (
        lambda: resnet.ResNet(resnet.BasicBlock, (1, 1, 1, 1), block_args={'attn_layer': 'se'}, **NARROW),
        'layer1.0.se.inserted_attention',
        [1, 2, 3, 4],
    ),
    'ours': (
        lambda: timm.create_model('resnet20_cifar', genotype='cbam', layers=(1, 1, 1), zero_init_last=False),
        'layer1.0.se.inserted_attention',
        [1, 2, 3],
    ),
    'res2net': (
        lambda: resnet.ResNet(res2net.Bottle2neck, (1, 1, 1, 1), base_width=26, block_args={'scale': 4}, **NARROW),
        'layer1.0.se',
        [1, 2, 3, 4],
    ),
    'sknet': (
        lambda: resnet.ResNet(sknet.SelectiveKernelBasic, (1, 1, 1, 1), **NARROW),
        'layer1.0.se',
        [1, 2, 3, 4],
    ),
    'torchvision resnet': (
        lambda: tv_resnet.ResNet(tv_resnet.BasicBlock, [1, 1, 1, 1], num_classes=5),
        'layer1.0.bn2.inserted_attention',
        [1, 2, 3, 4],
    ),
    'torchvision wide resnext': (
        lambda: tv_resnet.ResNet(tv_resnet.Bottleneck, [1, 1, 1, 1], num_classes=5, groups=2, width_per_group=8),
        'layer1.0.bn3.inserted_attention',
        [1, 2, 3, 4],
    ),
    'timm convnext': (
        lambda: convnext.ConvNeXt(num_classes=5, depths=(1, 1, 2, 1), dims=(8, 16, 16, 24), ls_init_value=0.1),
        'stages.0.blocks.0.drop_path.inserted_attention',
        [1, 2, 3, 3, 4],
    ),
    'torchvision convnext': (
        lambda: tv_convnext_small(num_classes=5),
        'features.1.0.stochastic_depth.inserted_attention',
        [1, 2, 2],
    ),
    'timm efficientnet': (
        lambda: timm.create_model('test_efficientnet', num_classes=5),
        'blocks.1.0.inserted_attention',
        [2, 3, 4, 5],
    ),
    'torchvision efficientnet': (
        lambda: tv_efficientnet_small(num_classes=5),
        'features.1.0.block.inserted_attention',
        [1, 1, 2, 2],
    ),
    'timm mobilenetv3': (
        timm_mobilenetv3_small,
        'blocks.0.0.inserted_attention',
        [1, 2, 2],
    ),
    'torchvision mobilenetv3': (
        tv_mobilenetv3_small,
        'features.1.block.inserted_attention',
        [1, 2, 2],
    ),
    'torchvision mobilenetv2': (
        lambda: torchvision.models.MobileNetV2(5, 0.25, [[1, 16, 1, 1], [2, 16, 2, 2], [2, 64, 1, 1]]),
        'features.1.conv.inserted_attention',
        [1, 2, 2, 3],
    ),
    'timm regnet': (timm_regnet_small, 's1.b1.drop_path.inserted_attention', [1, 2, 3, 4]),
    'timm regnet, pre-activation': (
        partial(timm_regnet_small, preact=True),
        's1.b1.drop_path.inserted_attention',
        [1, 2, 3, 4],
    ),
    'torchvision regnet': (
        lambda: tv_regnet_small(num_classes=5),
        'trunk_output.block1.block1-0.f.inserted_attention',
        [1, 2, 3],
    ),
    'timm densenet': (
        lambda: densenet.DenseNet(block_config=(2, 1), growth_rate=8, num_classes=5),
        'features.denseblock1.denselayer1.conv2.inserted_attention',
        [1, 1, 2],
    ),
    'torchvision densenet': (
        lambda: torchvision.models.DenseNet(8, (2, 1), num_classes=5),
        'features.denseblock1.denselayer1.conv2.inserted_attention',
        [1, 1, 2],
    ),
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return NETWORKS[name][0]()


# In `make test` one of a kind: of block, of library, and of what stands before and behind.
QUICK = ('torchvision resnet',)
every_network = pytest.mark.parametrize('name', mostly_slow(NETWORKS, *QUICK))


def images(batch: int = 2, size: int = 64) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def tiny() -> nn.Module:
    """timm's ResNet with four basic blocks, the quickest network of all."""
    return build('timm resnet, basic')


def snapshot(model: nn.Module) -> list:
    """All that a refusal must not change."""
    return [
        [(n, id(m), type(m), m.training, set(m.__dict__), len(m._forward_hooks)) for n, m in model.named_modules()],
        [
            (n, id(t), t.dtype, t.requires_grad, t.clone())
            for n, t in [*model.named_parameters(), *model.named_buffers()]
        ],
        torch.get_rng_state(),
    ]


def same(a, b) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def step(model: nn.Module, x: Tensor) -> Tensor:
    """A forward and a backward in train mode."""
    model.train()
    y = model(x)
    (y * torch.linspace(-1, 1, y.numel()).reshape_as(y).to(y)).sum().backward()
    return y


@every_network
def test_a_known_network(name):
    """Everything that section "insertion" promises, for the papers' place of each family."""
    _, first, stages = NETWORKS[name]
    plain, x = build(name), images()
    model = copy.deepcopy(plain)
    report = insert(model, 'se', input_size=64)
    assert report.places[0].name == first
    holder = model.get_submodule(first.rpartition('.')[0])  # counters of MACs look at layers without children
    assert isinstance(holder, nn.Conv2d) == ('densenet' in name)
    assert [k for k in plain.state_dict() if k not in model.state_dict()] == []
    assert all(isinstance(model.get_submodule(place.name), IdentityStart) for place in report.places)

    # The same bits: outputs in eval and train mode, the gradients, and what batch norm remembers.
    with torch.no_grad():
        assert torch.equal(plain.eval()(x), model.eval()(x))
    torch.manual_seed(1)
    expected = step(plain, x)
    torch.manual_seed(1)
    assert torch.equal(step(model, x), expected)
    assert all(torch.equal(model.get_parameter(n).grad, p.grad) for n, p in plain.named_parameters())
    assert all(torch.equal(model.get_buffer(n), b) for n, b in plain.named_buffers())
    # It is run: the first gradient is alpha's.
    alphas = [p for n, p in model.named_parameters() if n.endswith('.alpha')]
    assert len(alphas) == len(report.places)
    assert all(alpha.grad.abs() > 0 for alpha in alphas)

    # Batch norm may be exchanged afterwards: no attention is lost.
    model.eval()
    with torch.no_grad():
        for alpha in alphas:
            alpha.fill_(1.0)
        y = model(x)
        assert not torch.equal(y, plain.eval()(x))
        synced = timm.layers.convert_sync_batchnorm(copy.deepcopy(model))
        torch.testing.assert_close(synced(x), y)

    # Copies and compilers.
    with torch.no_grad():
        clone, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        assert torch.equal(clone(x), y)
        assert torch.equal(pickled(x), y)
        torch.testing.assert_close(torch.jit.script(copy.deepcopy(model))(x), y)
        torch.testing.assert_close(torch.fx.symbolic_trace(clone)(x), y)

    # Once more: nothing; stage by stage: the stages; and out again.
    again = insert(model, 'se')
    assert (again.places, list(again.already)) == ((), [place.name for place in report.places])
    names = [place.name for place in report.places]
    assert remove(model) == names
    assert remove(model) == []
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert repr(model) == repr(plain)
    assert [(n, type(m), m.__dict__.keys()) for n, m in model.named_modules()] == [
        (n, type(m), m.__dict__.keys()) for n, m in plain.named_modules()
    ]
    for stage in sorted(set(stages)):
        found = [place.name for place in insert(model, 'simam', stages=stage).places]
        assert found == [n for n, s in zip(names, stages, strict=True) if s == stage]


@pytest.mark.slow
def test_compile_and_export():
    """One network with all five ways of surgery."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, 4),
        resnet.BasicBlock(8, 8),
        tv_resnet.BasicBlock(8, 8),
        convnext.ConvNeXtBlock(8, ls_init_value=0.1),
        densenet.DenseLayer(8, 8, 2),
        tv_regnet.ResBottleneckBlock(8, 8, 1, nn.BatchNorm2d, nn.ReLU),
    ).eval()
    report, x = insert(model, 'sase', start='paper', input_size=64), images()
    assert len(report.places) == 5
    with torch.no_grad():
        y = model(x)
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(model, backend='eager', fullgraph=True)(x), y)
        shape = {0: torch.export.Dim('batch', min=1, max=8)}
        exported = torch.export.export(model, (x,), dynamic_shapes=(shape,)).module()
        torch.testing.assert_close(exported(images(3)), model(images(3)))


@pytest.mark.parametrize('block', [*BLOCKS, 'second_order,conv3_x3,mlp,l2_norm,second_order,affine'])
def test_every_block_starts_as_the_identity(block):
    torch.manual_seed(0)
    plain, x = nn.Sequential(nn.Conv2d(3, 64, 3, 4), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 4, 1)), images(8)
    model = copy.deepcopy(plain)
    report = insert(model, block, '1', input_size=64)
    with torch.no_grad():
        assert torch.equal(plain.eval()(x), model.eval()(x))
    assert torch.equal(step(model, x), step(plain, x))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    optimizer.step()
    optimizer.zero_grad()
    step(model, x)
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    # HW (w^2 v / (v + eps) + b^2) under a root: the gradient of the L2 norm's b at its start, 0, is 0.
    # Shuffle attention starts with the weight 0 after its norm.
    late = ('norm_weight', 'norm_bias') if block == 'shuffle' else ('squeeze.bias',)
    assert [n for n in without if not n.endswith(late)] == [], report


def test_alpha_is_in_the_gate():
    """y = x * (1 + alpha (gate - 1)) is x + alpha (block(x) - x), for each of cbam's two; others as they were."""
    x = torch.randn(2, 64, 9, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for block in [*map(partial(create_block, channels=64), BLOCKS), OwnAttention(64), OwnForward(64)]:
        block = block.double().eval()
        parts = list(block) if isinstance(block, nn.Sequential) else [block]
        start = IdentityStart(block).double()
        assert start.in_gate == (not isinstance(block, OwnAttention | OwnForward))
        for alpha in (0.0, 0.7, 1.0):
            start.alpha.data.fill_(alpha)
            expected = x
            for part in parts:
                expected = expected + alpha * (part(expected) - expected)
            y = start(x)
            torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
            assert alpha or torch.equal(y, x)
            assert alpha != 1 or torch.equal(y, block(x))
            assert alpha != 0.7 or torch.equal(torch.fx.symbolic_trace(start)(x), y)
        assert torch.equal(torch.fx.symbolic_trace(block)(x), block(x))
        for wrapped, turned in (
            (OnChannelsLast, x.permute(0, 2, 3, 1)),
            (partial(OnTokens, prefix=0, grid=(9, 7)), x.flatten(2).mT),
        ):
            other = IdentityStart(wrapped(block)).double()
            other.alpha.data.fill_(0.7)
            start.alpha.data.fill_(0.7)
            y = start(x)
            torch.testing.assert_close(other(turned), y.permute(0, 2, 3, 1) if turned.ndim == 4 else y.flatten(2).mT)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
def test_alpha_in_half_precision(dtype):
    """x to the bit at 0, and in between no more than one rounding of the gate beside that of the product."""
    x = torch.randn(8, 64, 9, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    for name in ('se', 'eca', 'cbam', 'sase', 'coord', 'gca'):
        start = IdentityStart(create_block(name, 64)).to(dtype).eval()
        for alpha in (0.0, 0.02, 0.3, 0.7, 1.0):
            start.alpha.data.fill_(alpha)
            exact = copy.deepcopy(start).double()(x.double())
            y = start(x)
            assert y.dtype == dtype
            assert alpha or torch.equal(y, x)
            alone = start.block(x).double() - copy.deepcopy(start.block).double()(x.double())
            assert (y - exact).norm() / exact.norm() < 2 * torch.finfo(dtype).eps + alone.norm() / exact.norm()


@pytest.mark.parametrize('block', ['sase', 'cbam'])
def test_the_papers_start_is_the_registered_model(block):
    model = timm.create_model('resnet20_cifar')
    report = insert(model, block, start='paper')
    assert model.state_dict().keys() == timm.create_model('resnet20_cifar', genotype=block).state_dict().keys()
    assert report.places[-1].feat_size == (8, 8)


def test_a_block_that_is_the_identity_by_itself_stands_alone():
    """alpha would have no gradient and give none: both would stay at their start for ever."""
    model = tiny()
    insert(model, 'gct')
    assert type(model.layer1[0].se) is type(create_block('gct', 8))


class OwnAttention(nn.Module):
    def __init__(self, channels: int, scale: float = 0.5) -> None:
        super().__init__()
        self.scale = scale
        self.conv = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.conv(x)) * self.scale


class OwnForward(type(create_block('se', 8))):  # type: ignore[misc]
    """A block of this library with a forward that knows of no alpha."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Sized(OwnAttention):
    def __init__(self, channels: int, feat_size: tuple[int, int]) -> None:
        super().__init__(channels)
        self.weight = nn.Parameter(torch.ones(feat_size))


@pytest.mark.parametrize(
    ('block', 'label'),
    [
        (SASE, 'SASE'),
        (Genotype.parse('avg,conv3,affine,avg,avg,conv7x7'), 'avg,conv3,affine,avg,avg,conv7x7'),
        (partial(AttentionBlock, genotype='avg,conv3,affine,avg,avg,conv7x7'), 'AttentionBlock(genotype='),
        (OwnAttention, 'OwnAttention'),
        (partial(OwnAttention, scale=2.0), 'OwnAttention(scale=2.0)'),
        (lambda channels: torchvision.ops.SqueezeExcitation(channels, 4), '<lambda>'),
        (timm.layers.EcaModule, 'EcaModule'),
        (Sized, 'Sized'),
    ],
    ids=lambda v: None if callable(v) else str(v),
)
def test_a_block_may_be_any_callable_of_channels(block, label):
    plain, x = tiny().eval(), images()
    model = copy.deepcopy(plain)
    report = insert(model, block, input_size=64)
    assert label in report.block
    assert len(report.places) == 5
    assert torch.equal(model(x), plain(x))
    assert len(insert(model, block, input_size=64).already) == 5
    if block is Sized:
        assert model.layer1[0].se.block.weight.shape == (16, 16)


def test_options_of_a_block():
    """As keyword arguments and in the name they are the same block."""
    model = tiny()
    report = insert(model, 'cbam', kernel_size=3, reduction=8)
    assert report.block == 'cbam(reduction=8, kernel_size=3)'
    assert str(report).startswith("cbam(reduction=8, kernel_size=3) (start='identity') in ResNet: 5 places")
    assert model.layer1[0].se.block[1].excite.conv.kernel_size == (3, 3)
    for block in ('cbam( kernel_size=3,reduction = 8 )', 'cbam(kernel_size=3, reduction=8)'):
        assert len(insert(model, block).already) == 5
    genotype = 'avg,mlp(reduction=2),affine,avg,avg,conv7x7'
    assert insert(tiny(), genotype.replace('(reduction=2)', ''), reduction=2).block == genotype
    assert insert(tiny(), 'se', reduction=16).block == 'se'


class Net(nn.Module):
    """A network that nobody knows: a Sequential, a block with names of its own, a shared module."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2))
        self.mix = nn.Conv2d(8, 8, 1)
        self.again = self.mix
        self.norm = nn.GroupNorm(2, 8)
        self.act = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.unused = nn.Conv2d(8, 8, 1)
        self.last = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.again(self.mix(self.stem(x)))))
        x = self.last(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.head(self.pool(x).flatten(1))


WHERE = [
    ('tiny', 'layer3.*', ['layer3.0.se']),
    ('tiny', '*.bn2', [f'layer{i}.se' for i in ('1.0', '2.0', '2.1', '3.0', '4.0')]),
    ('tiny', 'layer[34].0.bn1', ['layer3.0.bn1.inserted_attention', 'layer4.0.bn1.inserted_attention']),
    ('tiny', 'layer2', ['layer2.inserted_attention']),
    (
        'tiny',
        lambda name, module: isinstance(module, resnet.BasicBlock) and 'layer2' in name,
        ['layer2.0.se', 'layer2.1.se'],
    ),
    ('torchvision resnet', 'layer?.0.bn2', [f'layer{i}.0.bn2.inserted_attention' for i in (1, 2, 3, 4)]),
    ('torchvision resnet', 'layer1.0.bn1', ['layer1.0.bn1.inserted_attention']),
    ('timm mobilenetv3', 'blocks.1.1.bn3', ['blocks.1.1.drop_path.inserted_attention']),
    ('net', 'stem', ['stem.inserted_attention']),
    ('net', 'stem.2', ['stem.2.inserted_attention']),
    ('net', 'norm', ['norm.inserted_attention']),
    ('net', 'mix', ['mix.inserted_attention']),
    ('net', 'again', ['again.inserted_attention']),
    (
        'net',
        lambda name, module: isinstance(module, nn.Conv2d) and name != 'unused',
        ['stem.0.inserted_attention', 'mix.inserted_attention'],
    ),
]


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    return Net() if name == 'net' else tiny() if name == 'tiny' else build(name)


@pytest.mark.parametrize('input_size', mostly_slow([None, 32], 32))
@pytest.mark.parametrize(('name', 'where', 'expected'), WHERE, ids=lambda v: None if callable(v) else str(v)[:40])
def test_where(name, where, expected, input_size):
    plain, x = network(name), images(size=32)
    model = copy.deepcopy(plain)
    report = insert(model, 'sase', where, input_size=input_size)
    assert [place.name for place in report.places] == expected
    assert torch.equal(step(plain, x), step(model, x))
    assert all(model.get_submodule(name).alpha.grad.abs() > 0 for name in expected)
    assert insert(model, 'sase', where, input_size=input_size).already == tuple(expected)
    remove(model)
    assert repr(model) == repr(plain)


def test_a_shared_module_gets_it_once_and_stays_shared():
    model = Net()
    report = insert(model, 'sase', lambda name, module: name in ('mix', 'again'))
    assert len(report.places) == 1
    assert model.mix is model.again
    assert copy.deepcopy(model).mix.inserted_attention.alpha.numel() == 1
    assert sum('alpha' in name for name, _ in model.named_parameters()) == 1


def test_a_module_of_an_inserted_attention_is_no_place():
    model, where = Net(), lambda name, module: isinstance(module, nn.Conv2d) and name != 'unused'
    report = insert(model, OwnAttention, where)
    assert [place.name for place in report.places] == ['stem.0.inserted_attention', 'mix.inserted_attention']
    assert insert(model, OwnAttention, where).already == tuple(place.name for place in report.places)
    with pytest.raises(ValueError, match='matches no module'):
        insert(model, 'se', '*.block.conv')


def test_channels_and_size_come_from_a_forward_where_the_module_does_not_tell():
    model = Net()
    report = insert(model, 'sase', 'act', input_size=(3, 24, 16))
    assert (report.places[0].channels, report.places[0].feat_size) == (8, (12, 8))
    other = Net()
    assert insert(other, 'sase', 'act', example=torch.randn(1, 3, 8, 8)).places[0].feat_size == (4, 4)
    assert report.model_macs > report.added_macs > 0


def test_a_backbone_is_known_wherever_it_stands():
    """The table is of blocks. Frozen batch norm, as detectors have it, is a norm, too."""
    frozen = torchvision.ops.FrozenBatchNorm2d
    body = tv_resnet.ResNet(tv_resnet.BasicBlock, [1, 1, 1, 1], norm_layer=frozen)
    detector = nn.Sequential()
    detector.body = torchvision.models._utils.IntermediateLayerGetter(body, {'layer3': 'a', 'layer4': 'b'})
    x = images()
    before = detector(x)['b']
    report = insert(detector, 'se', stages=(3, 4), example=x)
    assert [place.name for place in report.places] == [f'body.layer{i}.0.bn2.inserted_attention' for i in (3, 4)]
    assert torch.equal(detector(x)['b'], before)

    features = timm.create_model('test_efficientnet', features_only=True)
    assert len(insert(features, 'se').places) == 4


def dies(model: nn.Module) -> nn.Module:
    model.layer1[0].conv1 = nn.Conv2d(3, 8, 1)
    return model


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyConv2d(8, 1), nn.BatchNorm2d(8))


def quantised() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 2))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})


def int8() -> nn.Module:
    model = tiny()
    model.fc.weight = nn.Parameter(model.fc.weight.char(), requires_grad=False)
    return model


def compiled_in_place() -> nn.Module:
    model = tiny()
    model.layer1.compile(backend='eager')
    return model


def inserted(block: str, start: str = 'identity') -> nn.Module:
    model = tiny()
    insert(model, block, start=start, stages=1)
    return model


def traced() -> nn.Module:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = torch.fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 8, 1)))

        def forward(self, x: Tensor) -> Tensor:
            return self.part(x)

    return Holder()


def own_sequential() -> nn.Module:
    class Twice(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + x

    return nn.Sequential(Twice(nn.Conv2d(3, 3, 1)))


class Changes(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 2 * channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class NotFinite(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x / 0


ONE = create_block('se', 8)
SIZE_BOUND = 'avg,mlp,affine,l2_norm,avg,conv7x7'

REFUSED = {
    'no module': (dict, {}, TypeError, 'model must be an nn.Module, got dict'),
    'unknown block': (tiny, {'block': 'sse'}, ValueError, "unknown attention block 'sse'"),
    'bad genotype': (tiny, {'block': 'avg,mlp'}, ValueError, 'six choices'),
    'unknown option': (tiny, {'block': 'se', 'rd': 4}, TypeError, "se has no option 'rd'; it has reduction"),
    'unknown option in the name': (tiny, {'block': 'se(rd=4)'}, ValueError, "se has no option 'rd'; it has reduction"),
    'wrong value of an option': (
        tiny,
        {'block': 'se', 'reduction': 33},
        ValueError,
        r"^se\(reduction=33\) for \d+ channels at 'layer1.0.se': ChannelMLP of .* needs reduction to be at most",
    ),
    'another option there': (
        lambda: inserted('se(reduction=4)'),
        {'block': 'se', 'reduction': 2},
        ValueError,
        r"'layer1.0.se' already holds se\(reduction=4\) with start='identity'",
    ),
    'block is a number': (tiny, {'block': 3}, TypeError, 'a callable of channels, got 3'),
    'block is one module': (tiny, {'block': ONE}, TypeError, 'every place needs its own'),
    'block gives no module': (tiny, {'block': lambda c: None}, TypeError, 'expected an nn.Module, got None'),
    'block gives one module': (tiny, {'block': lambda c: ONE, 'stages': 2, 'where': '*.conv1'}, ValueError, 'channels'),
    'block gives it twice': (Net, {'block': lambda c: ONE, 'where': '[mn]*'}, ValueError, 'the same module twice'),
    'block needs another argument': (tiny, {'block': lambda c, d: ONE}, TypeError, "at 'layer1.0.se': .*missing 1"),
    'block changes the shape': (tiny, {'block': Changes}, ValueError, r'changes the shape: \(1, 8, .* became \(1, 16,'),
    'block is not finite': (tiny, {'block': NotFinite}, ValueError, 'non-finite'),
    'block is lazy': (tiny, {'block': lambda c: nn.LazyConv2d(c, 1)}, ValueError, 'lazy'),
    'block needs a size': (
        lambda: build('torchvision resnet'),
        {'block': SIZE_BOUND},
        ValueError,
        "at 'layer1.0.bn2.inserted_attention': .*feat_size.*pass input_size",
    ),
    'start': (tiny, {'start': 'zero'}, ValueError, "start must be 'identity' or 'paper', got 'zero'"),
    'where is a number': (tiny, {'where': 3}, TypeError, 'where must be a pattern'),
    'where matches nothing, near': (
        tiny,
        {'where': 'layer1.0.bn3'},
        ValueError,
        "matches no module; near are 'layer1.0.bn2'",
    ),
    'where matches nothing, pattern': (tiny, {'where': '*.norm3'}, ValueError, 'matches no module'),
    'where matches nothing at all': (Net, {'where': 'qqq'}, ValueError, "there are 'stem'"),
    'where is true for none': (tiny, {'where': lambda n, m: False}, ValueError, 'is true for no module'),
    'where matches inside': (tiny, {'where': '*'}, ValueError, "matches 'layer1' and modules inside it"),
    'unknown network': (Net, {}, ValueError, 'name the modules that attention should follow'),
    'stage 5': (tiny, {'stages': 5}, ValueError, 'stages takes stage numbers from 1 to 4, got 5'),
    'stage of an unknown network': (Net, {'where': 'mix', 'stages': 1}, ValueError, 'stages of this Net are not known'),
    'stage of the stem': (tiny, {'where': 'bn1', 'stages': 1}, ValueError, "'bn1' is in no known stage"),
    'stage without a match': (tiny, {'where': 'layer2.*', 'stages': 1}, ValueError, 'no module .* is in stages=1'),
    'no channels': (Net, {'where': 'head'}, ValueError, r"the number of output channels of 'head' \(Linear\)"),
    'no channels, no size': (Net, {'where': 'act'}, ValueError, 'pass input_size'),
    'no map': (Net, {'where': 'head', 'input_size': 8}, ValueError, r'returns \(1, 3\), but attention needs'),
    'not run': (Net, {'where': 'unused', 'input_size': 8}, ValueError, 'was not run'),
    'a container': (own_sequential, {'where': '0', 'input_size': 8}, ValueError, 'runs its children'),
    'copied in its own way': (traced, {'where': 'part', 'input_size': 8}, ValueError, 'copied in its own way'),
    'input size': (tiny, {'input_size': (3, 0, 8)}, ValueError, r'input_size must be .* got'),
    'input size and example': (tiny, {'input_size': 8, 'example': images()}, ValueError, 'not both'),
    'forward fails': (
        lambda: dies(tiny()),
        {'input_size': 64},
        ValueError,
        r'the forward of ResNet fails for .*\(1, 3, 64, 64\)',
    ),
    'optimizer': (tiny, {'optimizer': 'adam'}, TypeError, 'optimizer must be a torch.optim.Optimizer, got str'),
    'LBFGS': (
        tiny,
        {'optimizer': lambda model: torch.optim.LBFGS(model.parameters())},
        ValueError,
        'LBFGS takes only one parameter group: insert first',
    ),
    'SparseAdam': (
        tiny,
        {'optimizer': lambda model: torch.optim.SparseAdam(model.parameters())},
        ValueError,
        'SparseAdam takes only sparse gradients',
    ),
    'another optimizer': (
        tiny,
        {'optimizer': torch.optim.SGD(nn.Linear(1, 1).parameters())},
        ValueError,
        'has no parameter of this ResNet',
    ),
    'another block there': (
        lambda: inserted('se'),
        {},
        ValueError,
        "'layer1.0.se' already holds se with start='identity'",
    ),
    'another start there': (lambda: inserted('sase', 'paper'), {}, ValueError, r'remove\(model\) first'),
    'lazy': (lazy, {'where': '1'}, ValueError, '0.weight is lazy'),
    'meta': (lambda: tiny().to('meta'), {}, ValueError, 'conv1.weight is on the meta device'),
    'quantised': (quantised, {'where': '1'}, ValueError, 'quantised'),
    'int8': (int8, {}, ValueError, r'fc.weight is quantised \(torch.int8\)'),
    'compiled': (lambda: torch.compile(tiny(), backend='eager'), {}, ValueError, 'before torch.compile'),
    'a compiled part': (
        lambda: nn.Sequential(torch.compile(tiny(), backend='eager')),
        {},
        ValueError,
        '^0 is compiled: insert into the network before torch.compile',
    ),
    'compiled in place': (compiled_in_place, {}, ValueError, 'layer1.0 is compiled'),
    'scripted': (
        lambda: torch.jit.script(nn.Sequential(nn.Conv2d(3, 8, 1))),
        {'where': '0'},
        ValueError,
        'is a TorchScript module: insert into the network before torch.jit.script',
    ),
    'DataParallel': (
        lambda: nn.DataParallel(tiny()),
        {},
        ValueError,
        'DataParallel: .* or give model.module',
    ),
}


if hasattr(torch.optim, 'Muon'):  # torch 2.9 and later
    REFUSED['Muon'] = (
        tiny,
        {'optimizer': lambda model: torch.optim.Muon([model.fc.weight])},
        ValueError,
        'Muon takes only matrices: insert without optimizer=',
    )


@pytest.mark.filterwarnings('ignore::UserWarning:torch.nn.modules.lazy')
@pytest.mark.parametrize(('make', 'arguments', 'error', 'text'), REFUSED.values(), ids=REFUSED)
def test_refused_and_unchanged(make, arguments, error, text):
    model = make()
    before = (
        snapshot(model)
        if isinstance(model, nn.Module) and not any(p.is_meta for p in model.parameters()) and 'Lazy' not in str(model)
        else None
    )
    optimizer = arguments.get('optimizer')
    if callable(optimizer):
        optimizer = optimizer(model)
        arguments = {**arguments, 'optimizer': optimizer}
    groups = len(optimizer.param_groups) if isinstance(optimizer, torch.optim.Optimizer) else 0
    with pytest.raises(error, match=text):
        insert(model, **{'block': 'sase', **arguments})
    if before is not None:
        state = snapshot(model)
        assert same(before[:2], state[:2])
    if groups:
        assert len(optimizer.param_groups) == groups


def test_ddp_is_refused(tmp_path):
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(tiny())
        with pytest.raises(ValueError, match='in DistributedDataParallel: insert into the network before wrapping it'):
            insert(model, 'sase')
        assert remove(model) == []
    finally:
        torch.distributed.destroy_process_group()


def test_a_failure_in_the_middle_of_the_surgery_is_undone(monkeypatch):
    model = tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = snapshot(model)

    def fail(*args):
        raise RuntimeError('no more memory')

    monkeypatch.setattr(optimizer, 'add_param_group', fail)
    with pytest.raises(RuntimeError, match='no more memory'):
        insert(model, 'sase', optimizer=optimizer)
    assert same(before[:2], snapshot(model)[:2])
    assert len(optimizer.param_groups) == 1


class Counting(nn.Module):
    """Counts its calls in a buffer and draws a number in eval mode too: the worst that a forward may do."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer('calls', torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x + torch.rand(())


def test_the_forward_leaves_no_trace():
    shared = Counting()
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), shared, shared, nn.Dropout(0.5)).train()
    model[1].eval()
    before = snapshot(model)
    insert(model, 'simam', '4', input_size=8, start='paper')  # simam draws no parameters
    remove(model)
    assert same(before, snapshot(model))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize('start', ['identity', 'paper'])
def test_it_follows_the_network(dtype, start):
    model = tiny().to(dtype).to(memory_format=torch.channels_last).eval().requires_grad_(False)
    plain, x = copy.deepcopy(model), images().to(dtype)
    model.layer3.train()
    report = insert(model, 'sase', start=start, input_size=64)
    attention = [model.get_submodule(place.name) for place in report.places]
    assert {p.dtype for a in attention for p in a.parameters()} == {dtype}
    assert all(p.requires_grad for p in report.parameters)
    assert not any(p.requires_grad for _, p in plain.named_parameters())
    assert [a.training for a in attention] == [False, False, False, True, False]
    weights = [p for p in report.parameters if p.ndim == 4 and p.shape[1:] != (1, 1, 1) and p[0, 0].numel() > 1]
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)
    assert sorted({k for k, v in model.named_parameters() if v.requires_grad}) == sorted(
        k for k in report.keys if 'running' not in k and 'tracked' not in k
    )
    if start == 'identity':
        assert torch.equal(model.eval()(x), plain(x))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
def test_autocast(dtype):
    plain, x = tiny().eval(), images()
    model = copy.deepcopy(plain)
    insert(model, 'sase')
    with torch.autocast('cpu', dtype=dtype):
        assert torch.equal(model(x), plain(x))
        step(model, x)
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_it_survives_timms_initialisation():
    plain, model = tiny(), tiny()
    insert(model, 'sase')
    own = {n: p.clone() for n, p in model.named_parameters() if 'spatial_excite' in n}
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    torch.manual_seed(0)
    model.init_weights(zero_init_last=True)
    assert all(not model.layer1[0].se.alpha.any() for _ in own)
    bound = max(p.abs().max() for p in own.values())
    assert all(p.abs().max() <= 2 * bound for n, p in model.named_parameters() if n in own), (
        'ours, not He initialisation'
    )
    x = images()
    state = {n: p for n, p in model.state_dict().items() if n in plain.state_dict()}
    plain.load_state_dict(state)
    assert torch.equal(plain.eval()(x), model.eval()(x))


@pytest.mark.parametrize('named', [False, True])
def test_the_optimizer_is_extended(named):
    model, x = tiny(), images()
    decay = [(n, p) for n, p in model.named_parameters() if p.ndim > 1]
    rest = [(n, p) for n, p in model.named_parameters() if p.ndim <= 1]
    groups = [{'params': rest, 'weight_decay': 0.0, 'lr': 0.01}, {'params': decay, 'lr': 0.02}]
    if not named:
        groups = [{**g, 'params': [p for _, p in g['params']]} for g in groups]
    optimizer = torch.optim.AdamW(groups, lr=0.5, weight_decay=0.1, betas=(0.8, 0.9))
    step(model, x)
    optimizer.step()
    report = insert(model, 'sase', optimizer=optimizer)
    matrices, vectors = optimizer.param_groups[2:]
    assert {id(p) for p in matrices['params'] + vectors['params']} == {id(p) for p in report.parameters}
    assert all(p.ndim > 1 for p in matrices['params'])
    assert all(p.ndim <= 1 for p in vectors['params'])
    assert (matrices['lr'], matrices['weight_decay'], matrices['betas']) == (0.02, 0.1, (0.8, 0.9))
    assert (vectors['lr'], vectors['weight_decay']) == (0.02, 0.0)
    assert ('param_names' in vectors) is named
    step(model, x)
    optimizer.step()
    assert all(a.any() for n, a in model.named_parameters() if n.endswith('alpha'))
    # Twice: no group and no parameter twice.
    assert insert(model, 'sase', optimizer=optimizer).parameters == ()
    assert len(optimizer.param_groups) == 4


class OwnAttention(nn.Module):
    """Somebody's block, which keeps to timm's convention, with a pattern as timm takes it."""

    def __init__(self, channels):
        super().__init__()
        self.gain, self.kernel = nn.Parameter(torch.ones(channels, 1, 1)), nn.Parameter(torch.ones(channels, 1, 1))

    def no_weight_decay(self):
        return {'ga*'}

    def forward(self, x):
        return x * self.gain * self.kernel


@pytest.mark.parametrize('start', ['identity', 'paper'])
@pytest.mark.parametrize(
    ('block', 'without'),
    [
        (
            'avg,affine,affine,l2_norm,avg,affine',
            {'gated_squeeze.weight', 'gated_squeeze.bias', 'spatial_excite.weight', 'spatial_excite.bias'},
        ),
        ('second_order,mlp,conv3,second_order,p_norm,conv3x3', set()),
        (OwnAttention, {'gain'}),
    ],
    ids=['per position', 'kernels', 'not ours'],
)
def test_the_optimizer_decays_what_the_block_lets_it(block, without, start):
    model = tiny()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    report = insert(model, block, start=start, optimizer=optimizer, input_size=64)
    exempt = {id(p) for group in optimizer.param_groups[1:] if group['weight_decay'] == 0 for p in group['params']}
    new = {id(p) for p in report.parameters}
    matrices = {name: id(p) in exempt for name, p in model.named_parameters() if id(p) in new and p.ndim > 1}
    assert len(matrices) > 0
    assert {name for name, kept in matrices.items() if kept} == {
        name for name in matrices if name.endswith(tuple(without) or '?')
    }
    assert sum(matrices.values()) == len(without) * len(report.places)


@pytest.mark.parametrize('start', ['identity', 'paper'])
@pytest.mark.parametrize(
    'name',
    mostly_slow(
        ('timm resnet, basic', 'torchvision resnet', 'timm convnext', 'timm se-resnet', 'ours'), 'torchvision resnet'
    ),
)
def test_a_plain_checkpoint_still_loads(name, start, tmp_path):
    plain, model = build(name), build(name)
    torch.save({'state_dict': plain.state_dict()}, tmp_path / 'plain.pt')
    report = insert(model, 'sase', start=start, input_size=64)
    own = {k: v.clone() for k, v in model.state_dict().items() if k in report.keys}
    with torch.no_grad():
        for n, p in model.named_parameters():
            if n not in own:
                p.zero_()

    keys = report.compare(tmp_path / 'plain.pt')
    assert keys.attention == list(report.keys)
    assert keys.missing == keys.unexpected == []
    assert sorted(keys.fits) == sorted(plain.state_dict())
    assert f'{len(own)} missing, inserted attention: ' in str(keys)

    loaded = load_checkpoint(model, tmp_path / 'plain.pt')
    assert sorted(loaded.added) == sorted(own)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in {**plain.state_dict(), **own}.items())

    # Its own checkpoint, then; and one that lost a part is refused.
    state = {k: v.clone() for k, v in model.state_dict().items()}
    assert load_checkpoint(model, state).added == []
    lost = report.keys[0]
    with pytest.raises(ValueError, match=f'1 keys missing: {lost}'):
        load_checkpoint(model, {k: v for k, v in state.items() if k != lost})
    assert report.compare({**plain.state_dict(), 'extra': torch.zeros(1)}).unexpected == ['extra']


def test_an_own_attention_is_known_to_load_checkpoint():
    model = tiny()
    report = insert(model, OwnAttention)
    assert sorted(load_checkpoint(model, tiny().state_dict()).added) == sorted(report.keys)


def test_our_tools_find_what_was_inserted():
    from sase_blocks.viz import capture_gates

    model = tiny().eval()
    report = insert(model, 'sase')
    names = [f'{place.name}.block' for place in report.places]
    assert list(capture_gates(model, images())) == names
    assert compile_blocks(model, backend='eager') == names
    # Blocks that are compiled do not stand in the way of more.
    insert(model, 'sase', 'layer1.0.bn1')


def test_the_report_is_a_table():
    report = insert(tiny(), 'sase', input_size=64, stages=(1, 2))
    lines = str(report).splitlines()
    assert lines[0] == "sase (start='identity') in ResNet: 3 places"
    assert lines[3].split() == [
        'layer1.0.se',
        '8',
        '16',
        'x',
        '16',
        str(report.places[0].parameters),
        *lines[3].split()[-2:],
    ]
    assert lines[-2].startswith('added')
    assert f'{report.added_parameters:,}' in lines[-2]
    assert report.added_parameters == sum(p.numel() for p in report.parameters)
    assert report.model_parameters == sum(p.numel() for p in tiny().parameters())
    assert len({len(line) for line in lines[1:]}) == 1
    text = str(insert(build('torchvision resnet'), 'se'))
    assert 'pass input_size=' in text
    model = tiny()
    insert(model, 'se')
    assert '5 places had it already' in str(insert(model, 'se'))


def test_macs_are_what_the_flop_counter_says():
    from torch.utils.flop_counter import FlopCounterMode

    model, x = tiny().eval(), images(1)
    report = insert(model, 'sase', input_size=64)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    assert report.model_macs + report.added_macs == counter.get_total_flops() // 2


@pytest.mark.slow
def test_the_example(tmp_path, monkeypatch, capsys):
    path = Path(__file__).parent.parent / 'examples' / 'finetune_pretrained.py'
    monkeypatch.setattr('sys.argv', ['finetune_pretrained.py', '--quick', '--out', str(tmp_path / 'figure.png')])
    runpy.run_path(str(path), run_name='__main__')
    printed = capsys.readouterr().out
    assert all(f'\n{way}  ' in printed for way in ('no insertion', "SASE, start='identity'", "SASE, start='paper'"))
    assert (tmp_path / 'figure.png').stat().st_size > 10_000
