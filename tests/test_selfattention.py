"""sase_blocks/selfattention: equal to loops over the formulas, route by route; counts; what every layer is asked.

The loops here are written from the papers' formulas and share nothing with the library.
"""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import mostly_slow
from torch import Tensor, nn

from sase_blocks.selfattention import (
    AXIAL_ROUTES,
    BORDERS,
    LOCAL_ROUTES,
    POSITIONS,
    AxialSelfAttention,
    AxisAttention,
    LocalSelfAttention,
    axial_attention,
    local_attention,
)
from sase_blocks.selfattention.axial_routes import resize_offsets
from sase_blocks.selfattention.windows import add_windows, block_side, join_blocks, key_windows, query_blocks

F64 = torch.float64
ROUTES = tuple(route for route in LOCAL_ROUTES if route != 'triton')  # which is for CUDA: test_selfattention_triton.py


def near(actual, expected, tolerance=1e-10):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# -------------------------------------------------------------------------------------------------- the formulas


def local_loops(q: Tensor, k: Tensor, v: Tensor, table: Tensor, border: str) -> Tensor:
    """q, k, v (B, heads, d, H, W); table (1 or 3, 2, d / 2, K): sums over the window, pixel by pixel."""
    _, _, d, height, width = q.shape
    halo, y = table.shape[3] // 2, torch.zeros_like(q)
    window = list(itertools.product(range(-halo, halo + 1), repeat=2))
    for b, h, i, j in itertools.product(*map(range, (q.shape[0], q.shape[1], height, width))):
        logits, values = [], []
        for di, dj in window:
            inside = 0 <= i + di < height and 0 <= j + dj < width
            if border == 'mask' and not inside:
                continue
            key, value = (x[b, h, :, i + di, j + dj] if inside else torch.zeros(d, dtype=q.dtype) for x in (k, v))
            r = [torch.cat([term[0, :, di + halo], term[1, :, dj + halo]]) for term in table]
            logit = q[b, h, :, i, j] @ (key + r[0])
            if len(r) == 3:
                logit, value = logit + key @ r[1], value + r[2]
            logits.append(logit)
            values.append(value)
        y[b, h, :, i, j] = torch.stack(logits).softmax(0) @ torch.stack(values)
    return y


def batch_norm(x: Tensor, norm: nn.Module, training: bool) -> Tensor:
    """Over all axes but the second, written out."""
    axes, shape = [a for a in range(x.dim()) if a != 1], [1, -1] + [1] * (x.dim() - 2)
    mean, var = norm.running_mean.reshape(shape), norm.running_var.reshape(shape)
    if training:
        mean = x.mean(axes, keepdim=True)
        var = ((x - mean) ** 2).mean(axes, keepdim=True)
    return (x - mean) / (var + norm.eps).sqrt() * norm.weight.reshape(shape) + norm.bias.reshape(shape)


def axis_loops(layer: AxisAttention, x: Tensor) -> Tensor:
    """The layer from its parameters; the maps of logits are filled pair by pair, and normalised as maps."""
    if layer.axis == 'height':
        x = x.transpose(2, 3)
    b, _, lines, length = x.shape
    c, heads = layer.channels, layer.heads
    g = c // heads
    projected = torch.einsum('oc,bcnl->bonl', layer.project.weight[:, :, 0, 0], x)
    projected = batch_norm(projected, layer.norm, layer.training)
    q, k, v = projected.split([c // 2, c // 2, c], 1)
    table, middle = layer.relative, layer.size - 1
    if length > layer.size:
        table = F.interpolate(table[None], 2 * length - 1, mode='linear', align_corners=True)[0]
        middle = length - 1
    r_q, r_k, r_v = table.split([g // 2, g // 2, g])
    maps = []
    for n, line, part, h in itertools.product(range(b), range(lines), range(3), range(heads)):
        qh, kh = q[n, h::heads, line], k[n, h::heads, line]
        for i, j in itertools.product(range(length), repeat=2):
            if part == 0:
                maps.append(qh[:, i] @ kh[:, j])
            elif part == 1:
                maps.append(qh[:, i] @ r_q[:, i - j + middle])
            else:
                maps.append(kh[:, j] @ r_k[:, j - i + middle])
    maps = torch.stack(maps).reshape(b * lines, 3 * heads, length, length)
    maps = batch_norm(maps, layer.logit_norm, layer.training).reshape(b, lines, 3, heads, length, length)
    weights = maps.sum(2).softmax(4)
    values, positions = (torch.zeros(b, c, lines, length, dtype=x.dtype) for _ in range(2))
    for n, line, h, i in itertools.product(range(b), range(lines), range(heads), range(length)):
        for j in range(length):
            weight = weights[n, line, h, i, j]
            values[n, h::heads, line, i] += weight * v[n, h::heads, line, j]
            positions[n, h::heads, line, i] += weight * r_v[:, i - j + middle]
    y = batch_norm(values, layer.value_norm, layer.training)
    y = y + batch_norm(positions, layer.position_norm, layer.training)
    return y.transpose(2, 3) if layer.axis == 'height' else y


def unfold_attention(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    """The usual formulation, which copies k and v for every position of the window; zero border, term on q alone."""
    b, h, d = q.shape[:3]
    size = table.shape[3]
    r = torch.cat([table[0, 0][:, :, None].expand(-1, -1, size), table[0, 1][:, None].expand(-1, size, -1)])
    copies = [F.unfold(x.flatten(1, 2), size, padding=size // 2).reshape(b, h, d, size**2, -1) for x in (k, v)]
    logits = (q.reshape(b, h, d, 1, -1) * (copies[0] + r.reshape(d, -1, 1))).sum(2)
    return (logits.softmax(2).unsqueeze(2) * copies[1]).sum(3).reshape(q.shape)


def local_arguments(terms, heads, d, height, width, size, batch=2, dtype=F64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(batch, heads, d, height, width, generator=generator, dtype=dtype) for _ in range(3)]
    tables = torch.randn(terms, 2, d // 2, size, generator=generator, dtype=dtype)
    return [x.requires_grad_() for x in (*maps, tables)]


def with_gradients(function, arguments) -> list[Tensor]:
    y = function(*arguments)
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(y.shape, generator=generator, dtype=F64).to(y.dtype)
    return [y, *torch.autograd.grad(y, arguments, grad)]


def moved(layer: nn.Module) -> nn.Module:
    """With every parameter and statistic off its start."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, x in itertools.chain(layer.named_parameters(), layer.named_buffers()):
            if x.is_floating_point():
                x += 0.3 * torch.rand(x.shape, generator=generator, dtype=F64).to(x.dtype)
                assert name.endswith('var') is False or x.min() > 0
    return layer


@pytest.mark.parametrize('border', BORDERS)
@pytest.mark.parametrize('terms', [1, 3])
@pytest.mark.parametrize(
    ('height', 'width', 'size', 'heads', 'd'),
    mostly_slow([(3, 5, 3, 2, 4), (9, 2, 5, 1, 2), (1, 1, 7, 1, 2), (8, 4, 3, 1, 2)], (3, 5, 3, 2, 4), (1, 1, 7, 1, 2)),
)
def test_local_equals_loops(height, width, size, heads, d, terms, border):
    arguments = local_arguments(terms, heads, d, height, width, size)
    expected = with_gradients(lambda *a: local_loops(*a, border), arguments)
    for route in (*ROUTES, None):
        near(with_gradients(lambda *a, route=route: local_attention(*a, border, route), arguments), expected)


@pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])
@pytest.mark.parametrize(
    ('channels', 'size', 'axis', 'height', 'width'),
    [(8, 5, 'height', 5, 3), (8, 5, 'width', 5, 3), (4, 3, 'height', 5, 2), (16, 4, 'width', 1, 2)],
    ids=['height as built', 'width shorter', 'height longer', 'few positions, many channels'],
)
def test_axis_equals_loops(channels, size, axis, height, width, training):
    layer = moved(AxisAttention(6, channels, 2, size, axis, dtype=F64)).train(training)
    x = torch.randn(2, 6, height, width, dtype=F64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    inputs = [x, *layer.parameters()]
    expected = with_gradients(lambda *a: axis_loops(layer, x), inputs)
    for route in (*AXIAL_ROUTES, None):
        layer.route = route
        near(with_gradients(lambda *a: layer(x), inputs), expected)


def test_axial_is_height_then_width_then_the_pool():
    layer = moved(AxialSelfAttention(8, 2, (5, 4), dtype=F64)).train()
    x = torch.randn(2, 8, 5, 3, dtype=F64)
    full = axis_loops(layer.width, axis_loops(layer.height, x))
    near(layer(x), full)
    layer.stride = 2
    rows = torch.stack([full[:, :, 0:2].mean(2), full[:, :, 2:4].mean(2), full[:, :, 4]], 2)
    near(layer(x), torch.stack([rows[..., 0:2].mean(3), rows[..., 2]], 3))


def test_layer_projects_and_pools():
    """Full C x C projections, channel c * heads + head, and the pool at full resolution."""
    layer = LocalSelfAttention(8, 2, 3, dtype=F64)
    x = torch.randn(2, 8, 4, 6, dtype=F64)
    q, k, v = (torch.einsum('oc,bchw->bohw', p.weight[:, :, 0, 0], x) for p in (layer.query, layer.key, layer.value))
    heads = [local_loops(*(t[:, None, h::2] for t in (q, k, v)), layer.relative, 'zero')[:, 0] for h in (0, 1)]
    full = torch.stack(heads, 2).flatten(1, 2)
    near(layer(x), full)
    layer.stride = 2
    near(layer(x), (full[:, :, ::2, ::2] + full[:, :, 1::2, ::2] + full[:, :, ::2, 1::2] + full[:, :, 1::2, 1::2]) / 4)


@pytest.mark.parametrize('size', [1, 3, 5, 7, 9])
@pytest.mark.parametrize(('height', 'width'), [(15, 13), (4, 33), (7, 7)])
def test_local_routes_agree_in_fp32(height, width, size):
    arguments = local_arguments(1, 2, 8, height, width, size, dtype=torch.float32)
    expected = with_gradients(unfold_attention, arguments)
    for route in ROUTES:
        found = with_gradients(lambda *a, route=route: local_attention(*a, route=route), arguments)
        for a, e in zip(found, expected, strict=True):
            scale = e.abs().max().clamp(min=1)  # for k = 1 most gradients are 0
            near(a / scale, e / scale, 1e-5)


@pytest.mark.parametrize(('channels', 'length'), [(16, 14), (64, 3)])
def test_axial_routes_agree_in_fp32(channels, length):
    g = channels // 4
    make = torch.Generator().manual_seed(0)
    shapes = [(2, 5, 4, length, g // 2)] * 2 + [(2, 5, 4, length, g), (2 * g, 2 * length - 1), (3, 4)]
    arguments = [torch.randn(s, generator=make).div(math.sqrt(g)).requires_grad_() for s in shapes]
    runs = [with_gradients(lambda *a, r=r: torch.cat(axial_attention(*a, r)), arguments) for r in (*AXIAL_ROUTES, None)]
    for run in runs[1:]:
        near(run, runs[0], 1e-5)


def test_chunks_do_not_change_the_result(monkeypatch):
    """A limit of one number: every head and every line by itself."""
    from sase_blocks.selfattention import axial_routes, local_blocks, routes

    def smallest(first, second, numbers, x):
        return routes.chunks(first, second, 2**40, x)

    arguments = local_arguments(3, 4, 4, 9, 8, 5)
    layer = moved(AxialSelfAttention(8, 2, 5, dtype=F64)).train()
    x = torch.randn(3, 8, 5, 6, dtype=F64, requires_grad=True)
    runs = []
    for _ in range(2):
        runs.append(with_gradients(lambda *a: local_attention(*a, route='recompute'), arguments))
        runs[-1] += with_gradients(lambda *a: layer(x), [x, *layer.parameters()])
        monkeypatch.setattr(axial_routes, 'chunks', smallest)
        monkeypatch.setattr(local_blocks, 'chunks', smallest)
    near(runs[1], runs[0])


def test_windows_and_their_transpose():
    for height, width, side, size in [(7, 7, 7, 3), (10, 3, 4, 5), (16, 9, 8, 9)]:
        x = torch.randn(2, 3, 2, height, width, dtype=F64)
        near(join_blocks(query_blocks(x, side), 2, 3, height, width, side), x)
        windows = key_windows(x, side, size)
        other = torch.randn_like(windows)
        back = add_windows(other, 2, 3, height, width, side, size)
        near((windows * other).sum(), (x * back).sum())
    assert [block_side(n, n) for n in (4, 7, 8, 14, 28, 32, 56, 1)] == [4, 7, 8, 7, 7, 8, 7, 4]


@pytest.mark.parametrize(
    ('name', 'position'),
    mostly_slow([('local', 'sasa'), ('local', 'position_sensitive'), ('axial', '')], ('local', 'sasa')),
)
def test_second_derivatives(name, position):
    if name == 'local':
        terms = 1 if position == 'sasa' else 3
        arguments = local_arguments(terms, 1, 2, 3, 2, 5, batch=1)
        assert torch.autograd.gradgradcheck(lambda *a: local_attention(*a, route='recompute'), arguments)
    else:
        shapes = [(1, 2, 1, 3, 1)] * 2 + [(1, 2, 1, 3, 2), (4, 5), (3, 1)]
        arguments = [torch.randn(s, dtype=F64, requires_grad=True) for s in shapes]
        assert torch.autograd.gradgradcheck(lambda *a: torch.cat(axial_attention(*a, 'recompute')), arguments)


# ------------------------------------------------------------------------------------------------ tables and norms


def test_tables_of_another_length():
    table = torch.randn(6, 13, dtype=F64)
    assert torch.equal(resize_offsets(table, 7), table)
    assert torch.equal(resize_offsets(table, 4), table[:, 3:10])
    assert torch.equal(resize_offsets(table, 1), table[:, 6:7])
    for length in (8, 11, 56):
        expected = F.interpolate(table[None], 2 * length - 1, mode='linear', align_corners=True)[0]
        near(resize_offsets(table, length), expected)
    with pytest.raises(ValueError, match=r'length 1 .* cannot be interpolated to 3'):
        AxisAttention(8, 8, 2, 1, 'height')(torch.randn(1, 8, 3, 1))


def test_statistics_of_the_logits_are_those_of_the_maps():
    """As a plain batch norm over the maps: SyncBatchNorm in its place, the running statistics, and update_bn."""
    for channels, length in [(8, 6), (32, 3)]:
        layer = moved(AxisAttention(8, channels, 2, length, 'width', dtype=F64)).train()
        plain = copy.deepcopy(layer)
        plain.logit_norm = nn.BatchNorm2d(6, dtype=F64)
        plain.logit_norm.load_state_dict(layer.logit_norm.state_dict())
        x = torch.randn(3, 8, 4, length, dtype=F64)
        near(layer(x), plain(x))
        near(layer.state_dict(), plain.state_dict())
        near(layer.eval()(x), plain.eval()(x))
        batches = [torch.randn(2, 8, 4, length, dtype=F64) for _ in range(3)]
        for module in (layer, plain):
            torch.optim.swa_utils.update_bn(batches, module)
        near(layer.state_dict(), plain.state_dict())
        sync = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(layer))
        assert isinstance(sync.logit_norm, nn.SyncBatchNorm)
        near(sync.state_dict(), layer.state_dict())


def test_a_single_logit_keeps_the_statistics():
    layer = AxisAttention(8, 8, 2, 4, 'height').train()
    assert layer(torch.randn(1, 8, 1, 1)).isfinite().all()
    assert not layer.logit_norm.running_mean.any()


def test_statistics_far_from_zero():
    """A mean of thirty deviations: the variance comes from moments and still agrees with float64."""
    layer = moved(AxisAttention(8, 16, 2, 8, 'width')).train()
    with torch.no_grad():
        layer.norm.bias += 30 * layer.norm.weight
    wide = copy.deepcopy(layer).double()
    x = torch.randn(4, 8, 5, 8)
    near(layer(x).double(), wide(x.double()), 2e-2)
    near(layer.logit_norm.running_var.double(), wide.logit_norm.running_var, 1e-2)


def test_initialisation():
    torch.manual_seed(0)
    axis = AxisAttention(512, 256, 8, 56)
    assert axis.project.weight.std().item() == pytest.approx(1 / math.sqrt(512), rel=0.01)
    assert axis.relative.std().item() == pytest.approx(1 / math.sqrt(32), rel=0.03)
    local = LocalSelfAttention(512, 8, 7, 'position_sensitive')
    x = torch.randn(1, 512, 8, 8)
    with torch.no_grad():
        q, k, v = (p(x).reshape(64, 8, -1) for p in (local.query, local.key, local.value))
    assert torch.einsum('chp,chp->hp', q, k.roll(1, 2)).std().item() == pytest.approx(1, rel=0.2)
    assert v.std().item() == pytest.approx(1, rel=0.1)
    for layer in (axis, local):  # drawn anew with a network whose init_weights calls this
        for parameter in layer.parameters():
            nn.init.constant_(parameter, 7)
        layer.zero_init_last()
        assert max(p.abs().max() for p in layer.parameters()) < 6


# --------------------------------------------------------------------------------------------- counts and memory


class Bottleneck(nn.Module):
    def __init__(self, channels, width, out, operator, stride):
        super().__init__()
        self.down, self.down_norm = nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width)
        self.operator = operator
        self.up, self.up_norm = nn.Conv2d(width, out, 1, bias=False), nn.BatchNorm2d(out)
        shortcut = stride > 1 or channels != out
        self.shortcut = nn.Conv2d(channels, out, 1, stride, bias=False) if shortcut else nn.Identity()
        self.shortcut_norm = nn.BatchNorm2d(out) if shortcut else nn.Identity()

    def forward(self, x):
        y = self.up_norm(self.up(self.operator(self.down_norm(self.down(x)))))
        return y + self.shortcut_norm(self.shortcut(x))


def resnet(operator, depths, widths, expansion, stem) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(3, stem, 7, 2, 3, bias=False), nn.BatchNorm2d(stem), nn.MaxPool2d(3, 2, 1)]
    channels, size = stem, 56
    for stage, (depth, width) in enumerate(zip(depths, widths, strict=True)):
        for block in range(depth):
            stride = 2 if stage and not block else 1
            layers.append(Bottleneck(channels, width, width * expansion, operator(width, size, stride), stride))
            channels, size = width * expansion, size // stride
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1000))


def count(net: nn.Module) -> tuple[int, int]:
    """Parameters, and multiply-adds of one 224 x 224 image: convolutions, linear layers, and what operators state."""
    total = []

    def visit(module):
        if hasattr(module, 'multiply_adds'):
            module.register_forward_hook(lambda m, i, o: total.append(m.multiply_adds(*i[0].shape[2:])))
            return
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(lambda m, i, o: total.append(o[0].numel() * m.weight[0].numel()))
        for child in module.children():
            visit(child)

    visit(net)
    net(torch.empty(1, 3, 224, 224, device='meta'))
    return sum(p.numel() for p in net.parameters()), sum(total)


@pytest.mark.parametrize(
    ('depths', 'scale', 'params', 'macs'),
    [
        ([1, 2, 4, 1], 0.5, 5.945, 1.81),
        pytest.param([3, 4, 6, 3], 0.5, 11.586, 2.84, marks=pytest.mark.slow),
        pytest.param([3, 4, 6, 3], 0.75, 25.179, 5.96, marks=pytest.mark.slow),
        pytest.param([3, 4, 6, 3], 1, 43.973, 10.19, marks=pytest.mark.slow),
    ],
)
def test_axial_resnets_have_the_published_counts(depths, scale, params, macs):
    widths = [int(scale * planes) for planes in (128, 256, 512, 1024)]
    with torch.device('meta'):
        net = resnet(lambda w, size, s: AxialSelfAttention(w, 8, size, s), depths, widths, 2, int(64 * scale))
    found = count(net)
    assert (round(found[0] / 1e6, 3), round(found[1] / 1e9, 2)) == (params, macs)


@pytest.mark.parametrize(
    ('depths', 'params'),
    [
        pytest.param([1, 2, 4, 1], 10.3, id='26'),
        pytest.param([2, 3, 5, 2], 14.1, id='38', marks=pytest.mark.slow),
        pytest.param([3, 4, 6, 3], 18.0, id='50', marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize('position', POSITIONS)
def test_stand_alone_resnets_have_the_published_counts(depths, params, position):
    """Published with one digit, cut off and not rounded: 10.33, 14.17 and 18.02 here."""
    with torch.device('meta'):
        net = resnet(
            lambda w, size, s: nn.Sequential(LocalSelfAttention(w, 8, 7, position, stride=s), nn.BatchNorm2d(w)),
            depths, (64, 128, 256, 512), 4, 64,
        )  # fmt: skip
    assert math.floor(count(net)[0] / 1e5) / 10 == params


def test_multiply_adds_are_the_formulas():
    w, n, k = 32, 14, 7
    assert LocalSelfAttention(w).multiply_adds(n, n) == 3 * w**2 * n**2 + 2 * k**2 * w * n**2 + k * w * n**2
    assert AxialSelfAttention(w).multiply_adds(n, n) == 4 * w**2 * n**2 + 7 * w * n**3


def kept(function, arguments) -> int:
    """Bytes that autograd keeps between forward and backward, the arguments' own among them."""
    storages: dict[int, int] = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: storages.update({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()}) or x, lambda x: x
    ):
        y = function(*arguments)
    del y
    return sum(storages.values())


@pytest.mark.parametrize('size', [3, 5, 7])
def test_local_keeps_a_quarter_of_unfold(size):
    arguments = local_arguments(1, 8, 16, 28, 28, size, batch=1, dtype=torch.float32)
    ours, theirs = kept(local_attention, arguments), kept(unfold_attention, arguments)
    assert 4 * ours <= theirs
    assert ours == sum(x.numel() for x in arguments) * 4  # q, k, v and the table, whatever the window


def test_kept_memory_grows_with_the_map():
    for make in (lambda: LocalSelfAttention(16, 4, 7), lambda: AxialSelfAttention(16, 4, 14)):
        layer = make().train()
        small, large = (kept(layer, [torch.randn(1, 16, n, n)]) for n in (28, 56))
        assert 3.5 * small < large < 4.5 * small
