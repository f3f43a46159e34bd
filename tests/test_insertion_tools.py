"""No inserted attention is lost in silence: other people's tools, before and after insertion, on each kind of place.

A new tool is one row of TOOLS, a new network one row of NETWORKS. alpha stands at 0.7, so that an attention that does
not run shows in the outputs.
"""

import copy
import io
import pickle
import re
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import pytest
import timm
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from timm.models import byobnet, convnext, densenet, levit, repvit, resnet
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint
from torchvision.models import mobilenetv2 as tv_mobilenetv2
from torchvision.models import resnet as tv_resnet

from sase_blocks import check, create_block, export_onnx, fuse, insert, remove
from sase_blocks.blocks import BLOCKS
from sase_blocks.viz import capture_gates

pytestmark = [
    # Each is of a tool that its library has deprecated and people still use.
    pytest.mark.filterwarnings('ignore:.torch.jit.*is deprecated'),
    pytest.mark.filterwarnings("ignore:The TorchScript type system doesn't support instance-level annotations"),
    pytest.mark.filterwarnings('ignore:.torch.nn.utils.weight_norm'),
    pytest.mark.filterwarnings('ignore:torch.ao.quantization is deprecated'),
    pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning'),
]


class Conv(nn.Module):
    """A convolution, a norm and an activation, as Ultralytics has them: ``fuse_all`` takes the norm away."""

    def __init__(self, inputs: int, outputs: int, kernel_size: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel_size, padding=kernel_size // 2, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))

    def forward_fuse(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x))


class Split(nn.Module):
    """Has a second forward for exporters, as Ultralytics' C2f does."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.half = channels // 2
        self.cv1, self.m, self.cv2 = Conv(channels, channels), Conv(self.half, self.half, 3), Conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.cv1(x).chunk(2, 1)
        return self.cv2(torch.cat([a, self.m(b)], 1))

    def forward_split(self, x: Tensor) -> Tensor:
        a, b = self.cv1(x).split((self.half, self.half), 1)
        return self.cv2(torch.cat([a, self.m(b)], 1))


class Up(nn.Module):
    """A decoder's block: its second argument is the skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = Conv(24, 8, 3)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.conv(torch.cat([nn.functional.interpolate(x, scale_factor=2.0), skip], 1))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.pool, self.deep, self.up = Conv(3, 8, 3), nn.MaxPool2d(2), Conv(8, 16, 3), Up()

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down(x)
        return self.up(self.deep(self.pool(skip)), skip=skip)


def tv_mobilenetv2_small() -> nn.Module:
    return tv_mobilenetv2.MobileNetV2(5, 0.25, [[1, 16, 1, 1], [2, 16, 2, 2]])


def timm_resnet() -> nn.Module:
    narrow = {'stem_width': 8, 'channels': (8, 16, 16, 32), 'zero_init_last': False}
    return resnet.ResNet(resnet.BasicBlock, (1, 1, 1, 1), num_classes=5, **narrow)


def levit_small() -> nn.Module:
    sizes = {'embed_dim': (32, 40, 48), 'key_dim': 8, 'depth': (1, 1, 1), 'num_heads': (2, 2, 2)}
    return levit.Levit(img_size=64, num_classes=5, **sizes)


def repvgg() -> nn.Module:
    blocks = byobnet._rep_vgg_bcfg(d=(1, 1, 1, 1), wf=(0.25, 0.25, 0.125, 0.0625))
    return byobnet.ByobNet(byobnet.ByoModelCfg(blocks=blocks, stem_type='rep', stem_chs=16), num_classes=5)


class Network(NamedTuple):
    build: Callable[[], nn.Module]
    where: Any = None
    size: int = 32
    not_for: tuple[str, ...] = ()  # tools that the plain network does not take


NETWORKS = {
    'slot': Network(timm_resnet),
    'behind a norm': Network(lambda: tv_resnet.ResNet(tv_resnet.BasicBlock, [1, 1, 1, 1], num_classes=5)),
    'before drop_path': Network(
        lambda: convnext.ConvNeXt(num_classes=5, depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), ls_init_value=0.1)
    ),
    'behind a block': Network(
        lambda: timm.create_model('test_efficientnet', num_classes=5), not_for=('SyncBatchNorm', 'fuse_modules')
    ),
    'in a Sequential': Network(lambda: tv_mobilenetv2.MobileNetV2(5, 0.25, [[1, 16, 1, 1], [2, 16, 2, 2]])),
    'behind a convolution': Network(
        lambda: densenet.DenseNet(block_config=(2, 1), growth_rate=8, num_classes=5), not_for=('SyncBatchNorm',)
    ),
    'behind a block of two inputs': Network(UNet, '[du]*p', not_for=('script',)),
    'behind a block of two forwards': Network(lambda: nn.Sequential(Conv(3, 8, 3), Split(8), Conv(8, 8)), '?'),
    'inside a block of two forwards': Network(lambda: nn.Sequential(Conv(3, 8, 3), Split(8), Conv(8, 8)), '*.bn'),
    'levit': Network(levit_small, 'stem.conv?', 64, not_for=('fuse_modules',)),
    'repvit': Network(
        lambda: repvit.RepVit(embed_dim=(16, 24), depth=(2, 2), mlp_ratio=2, num_classes=5, distillation=False),
        lambda name, m: name.endswith(('token_mixer', 'mixer.conv2')),
        not_for=('fuse_modules', 'script'),
    ),
    'inside a branch': Network(repvgg, 'stages.*.conv_1x1', not_for=('SyncBatchNorm', 'fuse_modules')),
    'repvgg': Network(
        repvgg, lambda name, m: type(m).__name__ == 'RepVggBlock', not_for=('SyncBatchNorm', 'fuse_modules')
    ),
}


def every(model: nn.Module, kind: type[nn.Module] = nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, kind) and not isinstance(m, nn.ModuleList)]


# ---- the tools: (model, images) -> model ----


def checkpointing(model: nn.Module, x: Tensor) -> nn.Module:
    for module in every(model):
        module.forward = partial(checkpoint, module.forward, use_reentrant=False)
    return model


def accelerate_hooks(model: nn.Module, x: Tensor) -> nn.Module:
    for module in every(model):
        add_hook_to_module(module, ModelHook())
    return model


def second_forward(model: nn.Module, x: Tensor) -> nn.Module:
    for module in every(model, Split):
        module.forward = module.forward_split
    return model


def forward_fuse(model: nn.Module, x: Tensor) -> nn.Module:
    """As Ultralytics' ``fuse()`` does it."""
    for module in every(model, Conv):
        module.conv = torch.nn.utils.fuse_conv_bn_eval(module.conv, module.bn)
        delattr(module, 'bn')
        module.forward = module.forward_fuse
    return model


def freezing(model: nn.Module, x: Tensor) -> nn.Module:
    timm.utils.freeze(model)
    return model


def unfreezing(model: nn.Module, x: Tensor) -> nn.Module:
    timm.utils.freeze(model)
    timm.utils.unfreeze(model)
    return model.eval()


def weight_norm(model: nn.Module, x: Tensor) -> nn.Module:
    for module in every(model, nn.Conv2d):
        torch.nn.utils.weight_norm(module)
    return model


def weight_norm_and_back(model: nn.Module, x: Tensor) -> nn.Module:
    for module in every(weight_norm(model, x), nn.Conv2d):
        torch.nn.utils.remove_weight_norm(module)
    return model


def parametrization(model: nn.Module, x: Tensor) -> nn.Module:
    for module in every(model, nn.Conv2d):
        parametrizations.weight_norm(module)
    return model


def parametrization_and_back(model: nn.Module, x: Tensor) -> nn.Module:
    for module in every(parametrization(model, x), nn.Conv2d):
        parametrize.remove_parametrizations(module, 'weight')
    return model


def saving(model: nn.Module, x: Tensor) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def fuse_modules(model: nn.Module, x: Tensor) -> nn.Module:
    pairs = [[name.replace('bn', 'conv'), name] for name, _ in model.named_modules() if name.endswith(('bn', 'bn2'))]
    return torch.ao.quantization.fuse_modules(model, pairs) if pairs else model


def fx_fuse(model: nn.Module, x: Tensor) -> nn.Module:
    from torch.fx.experimental.optimization import fuse

    return fuse(model)


def our_fuse(model: nn.Module, x: Tensor) -> nn.Module:
    fuse(model)
    return model


def compiling(model: nn.Module, x: Tensor) -> nn.Module:
    torch._dynamo.reset()
    return torch.compile(model, backend='eager', fullgraph=True)


# The rows of other networks that `make test` has.
TOOLS_OF = {
    'before drop_path': ('accelerate',),
    'behind a block': ('freeze', 'FX'),
    'behind a convolution': ('weight_norm and back', 'parametrization'),
    'behind a block of two inputs': ('checkpoint', 'forward_fuse'),
    'inside a block of two forwards': ('forward_fuse', 'fuse_modules', 'FX fuse'),
    'behind a block of two forwards': ('second forward', 'forward_fuse'),
    'inside a branch': ('reparameterize_model',),
    'repvgg': ('reparameterize_model',),
}


class Tool(NamedTuple):
    use: Callable[[nn.Module, Tensor], nn.Module]
    slow: bool = False
    graph: bool = False  # makes a new thing of the network, which takes no attention any more


TOOLS = {
    'checkpoint': Tool(checkpointing),
    'accelerate': Tool(accelerate_hooks),
    'second forward': Tool(second_forward),
    'forward_fuse': Tool(forward_fuse),
    'freeze': Tool(freezing),
    'unfreeze': Tool(unfreezing, slow=True),
    'SyncBatchNorm': Tool(lambda model, x: nn.SyncBatchNorm.convert_sync_batchnorm(model)),
    'timm SyncBatchNorm': Tool(lambda model, x: timm.layers.convert_sync_batchnorm(model), slow=True),
    'reparameterize_model': Tool(lambda model, x: timm.utils.reparameterize_model(model)),
    'fuse': Tool(our_fuse),
    'weight_norm': Tool(weight_norm, slow=True),
    'weight_norm and back': Tool(weight_norm_and_back),
    'parametrization': Tool(parametrization),
    'parametrization and back': Tool(parametrization_and_back, slow=True),
    'deepcopy': Tool(lambda model, x: copy.deepcopy(model)),
    'pickle': Tool(lambda model, x: pickle.loads(pickle.dumps(model))),
    'save': Tool(saving, slow=True),
    'fuse_modules': Tool(fuse_modules),
    'FX fuse': Tool(fx_fuse, graph=True),
    'FX': Tool(lambda model, x: torch.fx.symbolic_trace(model), graph=True),
    'trace': Tool(lambda model, x: torch.jit.trace(model, x, check_trace=False), slow=True, graph=True),
    'script': Tool(lambda model, x: torch.jit.script(model), slow=True, graph=True),
    'compile': Tool(compiling, slow=True, graph=True),
    'export': Tool(lambda model, x: torch.export.export(model, (x,)).module(), slow=True, graph=True),
    'strict export': Tool(
        lambda model, x: torch.export.export(model, (x,), strict=True).module(), slow=True, graph=True
    ),
}


def images(size: int) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


@cache
def _built(name: str) -> tuple[nn.Module, nn.Module]:
    """A network as training leaves it, without and with attention that acts."""
    torch.manual_seed(0)
    model = NETWORKS[name].build().eval()
    with torch.no_grad():
        for norm in every(model, nn.BatchNorm2d):
            for tensor, low, high in ((norm.weight, 0.5, 1.5), (norm.bias, -0.3, 0.3), (norm.running_var, 0.5, 2.0)):
                nn.init.uniform_(tensor, low, high)
        other = copy.deepcopy(model)
        put_in(other, name)
    return model, other


def put_in(model: nn.Module, name: str) -> int:
    """Attention that acts, the same at every call; how many places."""
    report = insert(model, 'se', NETWORKS[name].where, input_size=NETWORKS[name].size)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in report.parameters:
            parameter.copy_(0.7 if parameter.shape == (1,) else torch.randn(parameter.shape, generator=generator))
    return len(report.places)


BOTH = ('insert, tool', 'tool, insert')
LEAF_NORMS = ('behind a norm', 'inside a block of two forwards')
# Where something else happens than that the attention runs: the error of insert, or of the tool.
REFUSED = {
    **{('fuse_modules', BOTH[0], network): 'without the attention inserted there' for network in LEAF_NORMS},
    ('forward_fuse', BOTH[1], LEAF_NORMS[1]): 'matches no module',
    ('reparameterize_model', BOTH[1], 'inside a branch'): 'matches no module',
}
# Or it is lost, and check says so. FX's own fuse folds norms by the letter of its graph, in which hooks are not seen.
LOST = {
    (
        'forward_fuse',
        LEAF_NORMS[1],
    ): "RuntimeError: 5 of 5 .* do not run: '0.bn.inserted_attention' .*together with '0.bn'",
    ('reparameterize_model', 'inside a branch'): "RuntimeError: 4 of 4 .*together with 'stages.0.0.conv_1x1'",
    **{('FX fuse', network): 'is an FX graph' for network in (*LEAF_NORMS, 'repvit')},
}

ROWS = [
    pytest.param(
        tool,
        network,
        id=f'{tool}-{network}',
        marks=[pytest.mark.slow]
        if TOOLS[tool].slow or not (network == LEAF_NORMS[0] or tool in TOOLS_OF.get(network, ()))
        else [],
    )
    for network in NETWORKS
    for tool in TOOLS
    if tool not in NETWORKS[network].not_for
]


@pytest.mark.parametrize(('tool', 'network'), ROWS)
@torch.no_grad()
def test_no_attention_is_lost(tool, network):
    use, _, graph = TOOLS[tool]
    x = images(NETWORKS[network].size)
    plain, model = _built(network)
    without, expected = plain(x), model(x)
    acts = (expected - without).abs().max()

    def same(y: Tensor, z: Tensor) -> bool:
        return bool((y - z).abs().max() < 0.01 * acts)

    assert acts > 1e-4
    assert same(use(copy.deepcopy(plain), x)(x), without), 'the tool changes the plain network: no row for it'

    if refused := REFUSED.get((tool, BOTH[0], network)):
        with pytest.raises(RuntimeError, match=refused):
            use(copy.deepcopy(model), x)
    else:
        changed = use(copy.deepcopy(model), x)
        if lost := LOST.get((tool, network)):
            assert not same(changed(x), expected), 'not lost any more'
            with pytest.raises((RuntimeError, ValueError)) as error:
                check(changed, x)
            assert re.search(lost, f'{error.typename}: {error.value}')
        else:
            assert same(changed(x), expected)
        if not graph:
            if not lost:
                assert len(check(changed, x).calls) == len(check(model).calls)
            remove(changed)
            assert same(changed(x), without)

    # The other order. A graph may refuse; what it takes must run.
    changed = use(copy.deepcopy(plain), x)
    refused = REFUSED.get(
        (tool, BOTH[1], network), 'TorchScript|compiled|GraphModule|known|no module|not run|none of' if graph else ''
    )
    try:
        put_in(changed, network)
    except ValueError as error:
        reason = str(error)
    else:
        reason = ''
        assert same(changed(x), expected)
    if reason or (tool, BOTH[1], network) in REFUSED:
        assert refused and re.search(refused, reason), reason  # noqa: PT018


# ---- check itself ----


def lose_hook(model: nn.Module) -> None:
    model.layer2[0].bn2._forward_hooks.clear()


def go_around(model: nn.Module) -> None:
    model.layer2[0].forward = lambda x: model.layer2[0].downsample(x)


def replace_holder(model: nn.Module) -> None:
    model.layer2[0].bn2 = nn.GroupNorm(4, 128)


def delete_stage(model: nn.Module) -> None:
    model.layer4 = nn.AdaptiveAvgPool2d(1)
    model.fc = nn.Flatten()


LOSSES = {
    'a hook that is gone': (lose_hook, "layer2.0.bn2.inserted_attention' .the BatchNorm2d that holds it has lost"),
    'a forward that goes around it': (go_around, "layer2.0.bn2.inserted_attention' .the forward did not run it"),
    'another module in its place': (replace_holder, "it is gone: 'layer2.0.bn2' is a GroupNorm now"),
    'a part that is gone': (delete_stage, "it is gone, together with 'layer4.0.bn2'"),
}


@pytest.mark.parametrize(('lose', 'reason'), LOSSES.values(), ids=LOSSES)
def test_check_names_what_does_not_run(lose, reason, tmp_path):
    model = copy.deepcopy(_built('behind a norm')[1])
    assert check(model, 32).calls == dict.fromkeys((f'layer{i}.0.bn2.inserted_attention' for i in (1, 2, 3, 4)), 1)
    lose(model)
    around = nn.Sequential(pickle.loads(pickle.dumps(model)) if lose is not go_around else model)
    for lost in (model, around):  # a copy knows it too, and a module around it
        with pytest.raises(RuntimeError, match=f'^1 of 4 inserted places of .* do not run: .*{reason}.*remove.model'):
            check(lost, images(32))
    # What goes around a place is only seen by a forward, for which fuse has no image of a network that is not timm's.
    uses = [lambda model: capture_gates(model, images(32)), lambda model: export_onnx(model, tmp_path / 'x.onnx', 32)]
    for use in uses if lose is go_around else [*uses, fuse]:
        with pytest.raises(RuntimeError, match=f'do not run: .*{reason}'):
            use(model)
    assert not list(tmp_path.iterdir())
    remove(model)
    with pytest.raises(ValueError, match='holds no inserted attention'):
        check(model, 32)


def test_hooks_of_before_see_what_the_network_goes_on_with():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    seen: list[Tensor] = []
    model[0].register_forward_hook(lambda module, inputs, output: seen.append(output))
    insert(model, 'se', where='0', input_size=8)
    nn.init.constant_(model[0].inserted_attention.alpha, 0.7)
    assert torch.equal(model[0](images(8)), seen[-1])


def test_check_leaves_no_trace():
    model = copy.deepcopy(_built('behind a norm')[1]).train()
    model.layer1.eval()
    state, modes, random = (
        copy.deepcopy(model.state_dict()),
        [m.training for m in model.modules()],
        torch.get_rng_state(),
    )
    report = check(model, 32)
    assert str(report) == 'ResNet: all 4 inserted places run'
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert 'is not known: no forward was run; pass x' in str(check(model))
    remove(model.layer1)  # on purpose, of a part: no loss
    assert len(check(model, (32, 48)).calls) == 3


CHECK_REFUSES = {
    'no module': (dict, 8, TypeError, 'model must be an nn.Module, got dict'),
    'nothing inserted': (lambda: nn.ReLU(), 8, ValueError, r'this ReLU holds no inserted attention: insert\(model'),
    'a graph': (lambda: torch.fx.symbolic_trace(nn.ReLU()), 8, ValueError, 'is an FX graph'),
    'an input that it does not take': (
        lambda: copy.deepcopy(_built('behind a norm')[1]), torch.zeros(1, 2, 8, 8), ValueError, 'of ResNet fails',
    ),
    'a size': (lambda: copy.deepcopy(_built('behind a norm')[1]), (3, 0, 8), ValueError, 'input_size must be an int'),
}  # fmt: skip


@pytest.mark.parametrize(('build', 'x', 'error', 'text'), CHECK_REFUSES.values(), ids=CHECK_REFUSES)
def test_what_check_refuses(build, x, error, text):
    with pytest.raises(error, match=text):
        check(build(), x)


# ---- what tools do to the blocks ----


def without_statistics(block: nn.Module) -> nn.Module:
    """As test-time adaptation (TENT) leaves batch norms: what was counted stays, the statistics go."""
    for norm in every(block, nn.BatchNorm2d):
        norm.track_running_stats, norm.running_mean, norm.running_var = False, None, None
    return block


def all_replaced(block: nn.Module) -> nn.Module:
    return torch.func.replace_all_batch_norm_modules_(block)


@pytest.mark.parametrize('take_away', [without_statistics, all_replaced])
def test_blocks_run_on_norms_without_statistics(take_away):
    """They go by the batch in eval mode too: what they give there is what a block gives in train mode."""
    torch.manual_seed(0)
    x = torch.randn(4, 32, 6, 5)
    for name in [*BLOCKS, 'second_order,conv3_x3,mlp,l2_norm,second_order,affine']:
        block = create_block(name, 32, feat_size=6)
        if not every(block, nn.BatchNorm2d):
            continue
        other = take_away(copy.deepcopy(block))
        torch.testing.assert_close(other.eval()(x), block.train()(x), msg=name)
        assert not any('running' in key for key in other.state_dict()), name
        y = other.train()(x[:1, :, :1, :1].clone().requires_grad_())  # one value a channel
        y.sum().backward()
        assert y.isfinite().all(), name
        fuse(other.eval())
        torch.testing.assert_close(other(x), block(x), msg=name)
