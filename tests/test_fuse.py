"""fuse: equal outputs in every network, nothing folded that another place reads, and refusals that change nothing."""

import copy
import pickle
import warnings
from collections.abc import Callable
from functools import partial

import pytest
import timm
import torch
import torchvision
from conftest import mostly_slow
from timm.layers import BatchNormAct2d, Conv2dSame, FrozenBatchNormAct2d
from timm.models import mobilenetv3
from timm.models._efficientnet_builder import decode_arch_def
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from sase_blocks import create_block
from sase_blocks.blocks import BLOCKS, SequentialAttention
from sase_blocks.deploy import export_onnx, fuse
from sase_blocks.deploy.fusion import ANY_NORM
from sase_blocks.insertion import IdentityStart, check, insert, remove
from sase_blocks.ops import BatchNorm2d

# TorchScript is deprecated in torch, not yet in timm, whose tests ask for it.
pytestmark = [
    pytest.mark.filterwarnings('ignore:.torch.jit.*is deprecated'),
    pytest.mark.filterwarnings("ignore:The TorchScript type system doesn't support instance-level annotations"),
]

GENOTYPE = 'second_order,conv3_x3,mlp,l2_norm,second_order,affine'
every_block = pytest.mark.parametrize('name', BLOCKS)


def trained(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in eval mode, every norm with parameters and statistics as training might leave them."""
    g = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, ANY_NORM):
            rows = [(module.weight, 0.3, 0.7), (module.bias, -0.3, 0.3)]
            rows += [(module.running_mean, -0.3, 0.3), (module.running_var, 0.5, 2.0)]
            for tensor, low, high in rows:
                if tensor is not None:
                    tensor.data.copy_(torch.empty(tensor.shape, dtype=torch.float64).uniform_(low, high, generator=g))
    return model.eval()


def network(name: str | None, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    return trained(timm.create_model('resnet20_cifar', genotype=name, layers=(1, 1, 1), channels=(8, 16, 32), **kwargs))


def images(batch: int = 2, height: int = 32, width: int = 40, channels: int = 3) -> Tensor:
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(1))


def norms(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, ANY_NORM)]


def assert_equal_after_fuse(model: nn.Module, x: Tensor) -> None:
    """In both precisions: the same outputs; what is not reported as left is gone; the second call does nothing."""
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        fused, before = copy.deepcopy(model).to(dtype), norms(model)
        expected = fused(x.to(dtype))
        report = fuse(fused)
        scale = expected.abs().max().item()
        torch.testing.assert_close(fused(x.to(dtype)), expected, rtol=0, atol=tolerance * max(1, scale))
        assert norms(fused) == [name for name, _ in report.left]
        assert sorted(before) == sorted(name for name, _ in (*report.folded, *report.left))
        state = {key: value.clone() for key, value in fused.state_dict().items()}
        assert {parameter.dtype for parameter in fused.parameters()} <= {dtype}
    again = fuse(fused)
    assert again.folded == ()
    assert again.left == report.left
    assert all(torch.equal(state[key], value) for key, value in fused.state_dict().items())


# ---- fuse ----


@pytest.mark.parametrize('name', mostly_slow((*BLOCKS, GENOTYPE), 'cbam'))
def test_every_block_in_a_network_gives_the_same(name):
    model = network(name)
    assert_equal_after_fuse(model, images())
    # What is left is behind no layer: the norm of SRM's statistics, of NAM's x and of the rows of a covariance.
    left = {'srm': {'excite.norm'}, 'gsop': {'squeeze.0.norm'}, 'nam': {'norm'}}
    left[GENOTYPE] = {'channel_squeeze.norm', 'spatial_squeeze.norm'}
    assert {path.partition('.se.')[2] for path, _ in fuse(model).left} == left.get(name, set())
    assert torch.equal(torch.jit.script(copy.deepcopy(model))(images()), model(images()))
    assert torch.equal(torch.fx.symbolic_trace(model)(images()), model(images()))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(images()), model(images()))


@pytest.mark.parametrize('name', ['sase', 'bam', 'ge'])
def test_a_block_alone_gives_the_same(name):
    torch.manual_seed(0)
    assert_equal_after_fuse(trained(create_block(name, 32)), images(channels=32, height=9, width=7))


def small_mobilenetv3() -> nn.Module:
    rows = decode_arch_def([['ds_r1_k3_s2_e1_c8_se0.25_nre'], ['ir_r2_k5_s2_e2_c16']])
    return mobilenetv3.MobileNetV3(rows, num_classes=5, stem_size=8, num_features=32)


def inserted(block: str = 'sase', start: str = 'identity', **kwargs) -> nn.Module:
    """Class-swapped modules of torchvision, with identity wrappers that are no identity any more."""
    model = torchvision.models.resnet18(num_classes=5)
    insert(model, block, start=start, **kwargs)
    for name, parameter in model.named_parameters():
        if name.endswith('alpha'):
            nn.init.constant_(parameter, 0.3)
    return model


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    'resnet50_sase': (partial(timm.create_model, 'resnet50_sase', layers=(1, 1, 1, 1), num_classes=5), 0),
    'resnet20_cifar': (partial(timm.create_model, 'resnet20_cifar', genotype='sase'), 0),
    'inserted': (inserted, 0),
    'inserted behind batch norms': (partial(inserted, where='layer*.0.bn1', start='paper'), 0),
    'inserted behind convolutions': (
        partial(inserted, 'coord', where='layer3.*.conv1', start='paper', input_size=64),
        2,
    ),
    'mobilenetv3': (small_mobilenetv3, 0),
    'same padding': (partial(timm.create_model, 'tf_mobilenetv3_small_minimal_100', num_classes=5), 0),
    'pre-activation': (partial(timm.create_model, 'resnetv2_50', layers=(1, 1, 1, 1), num_classes=5), 5),
    'features_only': (lambda: Last(timm.create_model('resnet18', features_only=True)), 0),
}


class Last(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)[-1]


@pytest.mark.parametrize('name', mostly_slow(NETWORKS, 'inserted behind convolutions'))
def test_networks_give_the_same(name):
    build, left = NETWORKS[name]
    torch.manual_seed(0)
    model = trained(build())
    assert_equal_after_fuse(model, images(1, 64, 64))
    assert len(fuse(model).left) == left


@pytest.mark.slow
@pytest.mark.parametrize('name', ['resnet50_sase', 'mobilenetv3_small_100', 'tf_efficientnet_b0', 'regnety_002'])
def test_large_networks_give_the_same(name):
    torch.manual_seed(0)
    model = trained(timm.create_model(name, num_classes=10))
    assert_equal_after_fuse(model, images(2, 96, 96))
    assert fuse(model).left == ()


class Twice(nn.Module):
    """A layer and its norm, called twice: both calls are seen."""

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm = modules

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) + self.norm(self.conv(x.flip(2)))


class Data(nn.Module):
    """Control flow that depends on data, around a block that has none."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) if x.sum() < 1e9 else x


class Named(nn.Module):
    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)


class ConvNorm(Named):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


def shared() -> nn.Module:
    pair = [nn.Conv2d(3, 3, 1), BatchNorm2d(3)]
    return nn.Sequential(nn.Sequential(*pair), nn.ReLU(), nn.Sequential(*pair))


FOLDED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    'conv1d': (lambda: nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4)), (2, 3, 9)),
    'conv2d, bias': (lambda: nn.Sequential(nn.Conv2d(3, 4, 3, bias=True), nn.BatchNorm2d(4)), (2, 3, 9, 8)),
    'conv2d, groups': (lambda: nn.Sequential(nn.Conv2d(4, 8, 3, groups=4, bias=False), BatchNorm2d(8)), (2, 4, 9, 8)),
    'conv3d': (lambda: nn.Sequential(nn.Conv3d(3, 4, 3, stride=2), nn.BatchNorm3d(4)), (2, 3, 9, 8, 7)),
    'reflected': (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode='reflect'), BatchNorm2d(4)), (2, 3, 9, 8),
    ),
    'same': (lambda: nn.Sequential(Conv2dSame(3, 4, 3, stride=2), nn.BatchNorm2d(4)), (2, 3, 9, 8)),
    'transposed': (lambda: nn.Sequential(nn.ConvTranspose2d(3, 4, 3, stride=2), nn.BatchNorm2d(4)), (2, 3, 5, 4)),
    'linear': (lambda: nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.ReLU()), (5, 6)),
    'not affine': (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False)), (2, 3, 9, 8)),
    'with an activation': (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), BatchNormAct2d(4, act_layer=nn.SiLU)), (2, 3, 9, 8),
    ),
    'frozen': (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), FrozenBatchNorm2d(4)), (2, 3, 9, 8)),
    'frozen with an activation': (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), FrozenBatchNormAct2d(4)), (2, 3, 9, 8)),
    'for DDP': (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.SyncBatchNorm(4)), (2, 3, 9, 8)),
    'called twice': (lambda: Twice(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), (2, 3, 9, 8)),
    'shared': (shared, (2, 3, 9, 8)),
    'data-dependent': (lambda: Data(ConvNorm(conv=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4))), (2, 3, 9, 8)),
}  # fmt: skip


@pytest.mark.parametrize('name', FOLDED)
def test_what_is_folded(name):
    build, shape = FOLDED[name]
    torch.manual_seed(0)
    model = trained(build())
    assert_equal_after_fuse(model, torch.randn(shape))
    model(torch.randn(shape))
    assert fuse(model).left == ()


class TwoReaders(Named):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norm(y) + y


class TwoLayers(Named):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) + self.norm(self.other(x))


class TwoNorms(Named):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) + self.other(self.conv(x))


class ReadWeight(Named):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) + self.conv.weight.sum()


class ReadNorm(Named):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) * self.norm.weight.mean()


class PartsOfASequential(Named):
    """Runs a part of a Sequential and reads in the middle of it; with control flow that no graph shows."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers[0](x)
        return self.layers[1](y) + y if x.sum() < 1e9 else y


class AlsoOutside(Named):
    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) + self.again(x) if x.sum() < 1e9 else x


class Unused(Named):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


class OwnNorm(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


def hooked() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    model[0].register_forward_hook(lambda module, args, y: y * 2)
    return model


def also_outside() -> nn.Module:
    block = ConvNorm(conv=nn.Conv2d(3, 3, 1), norm=nn.BatchNorm2d(3))
    return AlsoOutside(block=block, again=block.conv)


def with_weight_norm(how: Callable[[nn.Module], nn.Module]) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return nn.Sequential(how(nn.Conv2d(3, 3, 1)), nn.BatchNorm2d(3))


def pair(**kwargs) -> dict[str, nn.Module]:
    return {'conv': nn.Conv2d(3, 3, 1), 'norm': nn.BatchNorm2d(3, **kwargs)}


LEFT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    'two readers': (lambda: TwoReaders(**pair()), 'the result of conv has another reader'),
    'two layers': (lambda: TwoLayers(**pair(), other=nn.Conv2d(3, 3, 1)), 'not the result of one convolution'),
    'two norms': (lambda: TwoNorms(**pair(), other=nn.BatchNorm2d(3)), 'the result of conv has another reader'),
    'weight read': (lambda: ReadWeight(**pair()), 'conv is used in another place'),
    'norm read': (lambda: ReadNorm(**pair()), 'used in another place'),
    'used outside': (also_outside, 'conv is used in another place'),
    'parts of a Sequential': (lambda: PartsOfASequential(layers=nn.Sequential(*pair().values())), 'in no FX graph'),
    'never called': (lambda: Unused(**pair()), 'in no FX graph'),
    'no statistics': (lambda: ConvNorm(**pair(track_running_stats=False)), 'no running statistics'),
    'hooks': (hooked, '0 has hooks'),
    'weight norm': (partial(with_weight_norm, nn.utils.weight_norm), '0 has hooks'),
    'parametrised': (partial(with_weight_norm, nn.utils.parametrizations.weight_norm), 'not the result of one'),
    'own layer': (lambda: nn.Sequential(Standardised(3, 3, 1), nn.BatchNorm2d(3)), 'not the result of one'),
    'own norm': (lambda: nn.Sequential(nn.Conv2d(3, 3, 1), OwnNorm(3)), 'OwnNorm is not a plain batch norm'),
    'grouped': (lambda: nn.Sequential(nn.ConvTranspose2d(3, 3, 1, groups=3), nn.BatchNorm2d(3)), 'with groups'),
    'other axis': (lambda: nn.Sequential(nn.Linear(8, 5), nn.BatchNorm2d(3)), '0 returns 5 values'),
    'first': (lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)), 'not the result of one'),
    'behind ReLU': (lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.BatchNorm2d(3)), 'not the result of one'),
}


@pytest.mark.parametrize('name', LEFT)
def test_what_is_left_and_why(name):
    build, reason = LEFT[name]
    torch.manual_seed(0)
    model, x = trained(build()), images(2, 6, 8)
    expected = model(x)
    report = fuse(model)
    assert report.folded == ()
    assert all(reason in why for _, why in report.left)
    assert reason in str(report)
    assert torch.equal(model(x), expected)


def test_what_a_fused_network_keeps():
    """dtype, memory format, whether weights are trained, modes, names of what stays; timm's own call does the same."""
    model = network('sase').to(memory_format=torch.channels_last).half()
    model.conv1.weight.requires_grad_(False)
    wide = copy.deepcopy(model).float()
    report = fuse(model)
    assert ('bn1', 'conv1') in report.folded
    assert ('layer1.0.se.norm', 'layer1.0.se') in report.folded
    assert str(report) == 'CifarResNet: 12 batch norms folded, 0 left'
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    assert model.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert (model.conv1.weight.requires_grad, model.conv1.bias.requires_grad) == (False, False)
    assert model.layer1[0].conv1.bias.requires_grad
    assert not any(module.training for module in model.modules())
    assert 'layer1.0.se.mix_weight' in model.state_dict()
    torch.testing.assert_close(model(images().half()).float(), wide(images()), rtol=0.02, atol=0.02)
    other = network('sase')
    expected = other(images())
    timm.utils.reparameterize_model(other, inplace=True)
    assert 'layer1.0.se.norm' not in norms(other)
    torch.testing.assert_close(other(images()), expected)


def test_an_inserted_attention_is_still_one():
    model = trained(inserted(where='layer1.*.bn1', start='paper'))
    keys = [key for key in model.state_dict() if 'inserted' in key and 'norm' not in key]
    fuse(model)
    assert [key for key in model.state_dict() if 'inserted' in key and 'norm' not in key] == keys
    assert remove(model) == ['layer1.0.bn1.inserted_attention', 'layer1.1.bn1.inserted_attention']
    assert type(model.layer1[0].bn1) is nn.Identity


@pytest.mark.slow
def test_alpha_is_folded():
    """At 0 the attention goes away and at 1 the wrapper, in each way of holding one; between them alpha stays."""
    for alpha, what in ((0.0, 'alpha was 0, block removed'), (0.7, None), (1.0, 'alpha was 1, now dropped')):
        for where in (None, 'layer1', 'layer2.0.conv1'):  # a slot, a Sequential, a hook
            model = network(None)
            places = [place.name for place in insert(model, 'cbam', where).places]
            for name in places:
                model.get_submodule(name).alpha.data.fill_(alpha)
            model = trained(model).double()
            x = images().double()
            expected = model(x)
            report = fuse(model)
            torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)
            assert [name for name, _ in report.alphas] == ([] if what is None else places)
            assert what is None or what in str(report)
            assert any(isinstance(m, IdentityStart) for m in model.modules()) == (what is None)
            assert any(isinstance(m, SequentialAttention) for m in model.modules()) == (alpha != 0)
            assert fuse(model).alphas == ()
            assert torch.equal(copy.deepcopy(model)(x), model(x))
            assert alpha == 0 or len(check(model, x).calls) == len(places)
            assert remove(model) == (places if alpha else [])


def test_an_alpha_with_hooks_stays():
    model = nn.Sequential(
        IdentityStart(create_block('se', 8)), IdentityStart(create_block('se', 8)), nn.Flatten()
    ).eval()
    model[0].register_forward_hook(lambda module, args, y: y * 2)
    expected = model(x := images(channels=8))
    assert [name for name, _ in fuse(model).alphas] == ['1']
    assert (type(model[0]), type(model[1])) == (IdentityStart, nn.Identity)
    assert torch.equal(model(x), expected)


def part_in_train_mode() -> nn.Module:
    model = network('se')
    model.layer2[0].bn1.train()
    return model


def compiled_in_place() -> nn.Module:
    model = network('se')
    model.layer1.compile(backend='eager')
    return model


def quantised() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return torch.ao.quantization.quantize_dynamic(network('se'), {nn.Linear})


def state(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers themselves."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


REFUSED: dict[str, tuple[Callable[[], nn.Module], type[Exception], str]] = {
    'no module': (lambda: 'resnet18', TypeError, 'an nn.Module, got str'),
    'train mode': (lambda: network('se').train(), ValueError, r'CifarResNet is in train mode.*model.eval\(\) first'),
    'a norm in train mode': (part_in_train_mode, ValueError, 'layer2.0.bn1 is in train mode'),
    'compiled': (lambda: torch.compile(network('se'), backend='eager'), ValueError, 'is compiled: {} the network bef'),
    'compiled in place': (compiled_in_place, ValueError, 'layer1 is compiled: {}'),
    'scripted': (lambda: torch.jit.script(network('se')), ValueError, 'is a TorchScript module: {}'),
    'quantised': (quantised, ValueError, 'fc is quantised or prepared for it: {}'),
    'lazy': (lambda: nn.Sequential(nn.LazyConv2d(4, 3)).eval(), ValueError, '0.weight is lazy and has no shape yet'),
    'meta': (lambda: network('se').to('meta'), ValueError, 'conv1.weight is on the meta device'),
    'DataParallel': (lambda: nn.DataParallel(network('se')), ValueError, 'is wrapped in DataParallel: {}'),
}


@pytest.mark.filterwarnings('ignore::UserWarning:torch.nn.modules.lazy')
@pytest.mark.parametrize(
    ('name', 'doing'),
    [(name, 'fuse') for name in REFUSED] + [(name, 'export') for name in REFUSED if 'train mode' not in name],
)
def test_refusals_change_nothing(name, doing, tmp_path):
    build, error, text = REFUSED[name]
    model = build()
    before = {} if isinstance(model, str) else {key: id(tensor) for key, tensor in state(model).items()}
    with pytest.raises(error, match=text.format(doing)):
        fuse(model) if doing == 'fuse' else export_onnx(model, tmp_path / 'model.onnx')
    assert list(tmp_path.iterdir()) == []
    if before:
        assert {key: id(tensor) for key, tensor in state(model).items()} == before


def test_ddp_is_refused(tmp_path):
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match='is wrapped in DistributedDataParallel: fuse the network before'):
            fuse(nn.parallel.DistributedDataParallel(network('se')))
    finally:
        torch.distributed.destroy_process_group()
