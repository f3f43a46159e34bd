"""The supernet of TrioNet: which weights a network shares, equality with the extracted network, and gradients."""

import copy
import functools
import itertools
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import mostly_slow
from timm.utils import ModelEmaV3
from torch import nn
from torch.func import functional_call

from sase_blocks.models import Architecture, TrioNet
from sase_blocks.search.trionet.meta_device import meta_device
from sase_blocks.search.trionet.slicing import SHARINGS, packed_rows
from sase_blocks.search.trionet.space import TrioSpace, draw
from sase_blocks.search.trionet.supernet import SuperNet
from sase_blocks.selfattention import TrioBlock

pytestmark = pytest.mark.usefixtures('one_thread')

OPERATORS = ('conv', 'local', 'axial')
HEADS = 2
SPACE = TrioSpace(
    (10, 16),
    8,
    1,
    HEADS,
    ((1, 2), (1, 2)),
    ((8, 16), (16, 24)),
    (0.5, 1.0),
    kernels=(3, 5),
    windows=(3, 5),
    attention_stages=(1, 2),
)
LARGEST = 'image 16; stem 8; heads 2; 16: {0}/16*2; 24: {0}/24*2'
NARROW = 'image 16; stem 8; heads 2; 8: {0}/8*2; 16: {0}/8'


def pure(text, operator):
    return Architecture.parse(text.format({'conv': 'conv5', 'local': 'local5', 'axial': 'axial'}[operator]))


def supernet(sharing='heads', seed=0, **kwargs):
    """A supernet with random norm weights, because gradients would not pass zeros."""
    torch.manual_seed(seed)
    net = SuperNet(SPACE, 5, sharing=sharing, **kwargs)
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return net


def drawn(count, seed=0):
    """Random points that have every operator, at both image sizes."""
    rng = np.random.default_rng(seed)
    found = [SPACE.architecture(draw(SPACE, rng)) for _ in range(count)]
    assert {op for point in found for op in point.operators} == set(OPERATORS)
    return found


def images(size=16, batch=3, dtype=torch.float32, seed=0):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed)).to(dtype)


# ---- which rows of a packed projection are used ----


def head_and_role(row, channels, operator):
    """Of a row of q, k and v one behind the other, channel ``c * heads + head`` in each."""
    heads = 8
    kinds = {
        'axial': (('q', channels // 2), ('k', channels // 2), ('v', channels)),
        'local': tuple((n, channels) for n in 'qkv'),
    }
    for name, size in kinds[operator]:
        if row < size:
            half = 'rows' if row // heads < size // heads // 2 else 'columns'
            return row % heads, name, half if operator == 'local' and name != 'v' else ''
        row -= size
    raise IndexError(row)


def roles(channels, operator):
    g = channels // 8
    half = (g // 2, g // 2)
    return (half, half, (g,)) if operator == 'local' else ((g // 2,), (g // 2,), (g,))


@pytest.mark.parametrize(
    ('operator', 'full', 'narrow', 'plain'),
    [
        ('axial', 128, 64, 4 / 128),
        ('axial', 256, 128, 8 / 256),
        ('local', 128, 64, 4 / 192),
        ('local', 256, 128, 8 / 384),
        ('axial', 128, 128, 1.0),
        ('local', 128, 128, 1.0),
    ],
)
def test_share_of_rows_that_keep_head_and_role(operator, full, narrow, plain):
    for sharing, expected in (('heads', 1.0), ('plain', plain)):
        rows = packed_rows(roles(full, operator), roles(narrow, operator), 8, sharing).tolist()
        assert len(set(rows)) == len(rows) == narrow * (2 if operator == 'axial' else 3)
        kept = [head_and_role(a, narrow, operator) == head_and_role(b, full, operator) for a, b in enumerate(rows)]
        assert sum(kept) / len(rows) == expected


def test_plain_takes_the_first_rows_of_the_packed_projection():
    """As a set: q of all heads and no v; three quarters would be q, k and half of v."""
    rows = packed_rows(roles(128, 'axial'), roles(64, 'axial'), 8, 'plain')
    assert sorted(rows.tolist()) == list(range(128))
    assert packed_rows(roles(128, 'axial'), roles(128, 'axial'), 8, 'plain').tolist() == list(range(256))


def test_rows_that_were_first_asked_for_without_gradients():
    packed_rows.cache_clear()
    net, point = supernet('plain'), pure(NARROW, 'axial')
    with torch.inference_mode(), torch.device('meta'):
        packed_rows(((4,), (4,), (8,)), ((2,), (2,), (4,)), HEADS, 'plain')
        packed_rows(((6,), (6,), (12,)), ((2,), (2,), (4,)), HEADS, 'plain')
    net.activate(point)(images()).sum().backward()
    assert net.stages[0][0].operators['axial'].height.project.weight.grad.any()


# ---- a block against packed implementations written out ----


def norm(x, module, index):
    """A batch norm with statistics 0 and 1."""
    weight, bias = module.weight[index], module.bias[index]
    return x / np.sqrt(1 + 1e-5) * weight.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)


def attend_axis(q, k, v, table, scale, axis):
    """q, k: (B, heads, g / 2, H, W), v: (B, heads, g, H, W), table: (2 g, 2 L - 1), scale: (3, heads) -> two like v."""
    if axis == 'width':
        q, k, v = (x.transpose(3, 4) for x in (q, k, v))
    half, length = q.shape[2], q.shape[3]
    offset = torch.arange(length)[:, None] - torch.arange(length)[None, :] + length - 1
    table_q, table_k, table_v = table[:half], table[half : 2 * half], table[2 * half :]
    logits = (
        scale[0].view(-1, 1, 1, 1) * torch.einsum('bhciw,bhcjw->bhwij', q, k)
        + scale[1].view(-1, 1, 1, 1) * torch.einsum('bhciw,cij->bhwij', q, table_q[:, offset])
        + scale[2].view(-1, 1, 1, 1) * torch.einsum('bhcjw,cji->bhwij', k, table_k[:, offset])
    )
    weights = logits.softmax(-1)
    values = torch.einsum('bhwij,bhcjw->bhciw', weights, v)
    positions = torch.einsum('bhwij,cij->bhciw', weights, table_v[:, offset])
    return (values, positions) if axis == 'height' else (values.transpose(3, 4), positions.transpose(3, 4))


def attend_window(q, k, v, table):
    """q, k, v: (B, heads, d, H, W), table: (2, d / 2, size) -> like v. Zero outside the map."""
    size, (h, w) = table.shape[2], q.shape[3:]
    pad = size // 2
    k, v = F.pad(k, (pad,) * 4), F.pad(v, (pad,) * 4)
    logits, values = [], []
    for a, b in itertools.product(range(size), repeat=2):
        position = torch.cat([table[0, :, a], table[1, :, b]]).view(1, 1, -1, 1, 1)
        logits.append((q * (k[..., a : a + h, b : b + w] + position)).sum(2))
        values.append(v[..., a : a + h, b : b + w])
    weights = torch.stack(logits).softmax(0)
    return (weights.unsqueeze(3) * torch.stack(values)).sum(0)


class Packed:
    """How a projection is stored: our row for each place, and the places of a narrower one.

    ``'plain'``: head after head in each of q, k and v; a narrower one has the first places. ``'heads'``: our order; a
    narrower one drops the last channels of each role in each head.
    """

    def __init__(self, sharing):
        self.sharing = sharing

    def rows(self, parts, narrow):
        """Parts: channels a head of each role, which are dropped from each; merged ones lie together when packed."""
        ours, start = [], 0
        flat = [n for part in parts for n in part]
        few = [n for part in narrow for n in part]
        if self.sharing == 'heads':
            for many, keep in zip(flat, few, strict=True):
                ours += [start + c * HEADS + head for c in range(many) for head in range(HEADS) if c < keep]
                start += many * HEADS
            return ours
        for part in parts:
            many = sum(part)
            ours += [start + c * HEADS + head for head in range(HEADS) for c in range(many)]
            start += many * HEADS
        return ours[: sum(few) * HEADS]

    def split(self, y, sizes):
        """A narrow projection's maps as (B, heads, channels a head, H, W) for each of q, k and v."""
        parts = y.split([n * HEADS for n in sizes], 1)
        return [self.heads(part, n) for part, n in zip(parts, sizes, strict=True)]

    def heads(self, y, n):
        if self.sharing == 'plain':
            return y.unflatten(1, (HEADS, n))
        return y.unflatten(1, (n, HEADS)).transpose(1, 2)

    def join(self, y):
        return y.flatten(1, 2) if self.sharing == 'plain' else y.transpose(1, 2).flatten(1, 2)


def reference_axis(full, y, n, packed, table_length, axis):
    g, few = full.channels // HEADS, n // HEADS
    rows = packed.rows(((g // 2,), (g // 2,), (g,)), ((few // 2,), (few // 2,), (few,)))
    y = norm(F.conv2d(y, full.project.weight[rows][:, :n]), full.norm, rows)
    q, k, v = packed.split(y, (few // 2, few // 2, few))
    # One table for all heads. Plain slicing takes its first rows, otherwise the first rows of each role.
    table = full.relative[: 2 * few]
    if packed.sharing == 'heads':
        table = torch.cat([full.relative[: few // 2], full.relative[g // 2 :][: few // 2], full.relative[g:][:few]])
    cut = (table.shape[1] - table_length) // 2
    table = table[:, cut : cut + table_length]
    scale = full.logit_norm.weight.reshape(3, HEADS) / np.sqrt(1 + 1e-5)
    values, positions = attend_axis(q, k, v, table, scale, axis)
    return norm(packed.join(values), full.value_norm, slice(n)) + norm(
        packed.join(positions), full.position_norm, slice(n)
    )


def reference_local(full, y, n, packed, size):
    d, few = full.channels // HEADS, n // HEADS
    rows = packed.rows((((d // 2,) * 2), ((d // 2,) * 2), (d,)), (((few // 2,) * 2), ((few // 2,) * 2), (few,)))
    weight = torch.cat([layer.weight for layer in (full.query, full.key, full.value)])[rows][:, :n]
    q, k, v = packed.split(F.conv2d(y, weight), (few, few, few))
    cut = (full.kernel_size - size) // 2
    return packed.join(attend_window(q, k, v, full.relative[0, :, : few // 2, cut : cut + size]))


def reference_block(shared, x, operator, out, n, size, side, sharing):
    """A block of stride 1 with a narrower operator, from the shared weights."""
    packed = Packed(sharing)
    y = norm(F.conv2d(x, shared.conv1.weight[:n, : x.shape[1]]), shared.norm1, slice(n)).relu()
    if operator == 'axial':
        full = shared.operators['axial']
        y = reference_axis(full.height, y, n, packed, 2 * side - 1, 'height')
        y = reference_axis(full.width, y, n, packed, 2 * side - 1, 'width')
    elif operator == 'local':
        y = norm(reference_local(shared.operators['local'], y, n, packed, size), shared.norms['local'], slice(n))
    else:
        weight = shared.operators['conv'].weight
        cut = (weight.shape[2] - size) // 2
        weight = weight[:n, :n, cut : cut + size, cut : cut + size]
        y = norm(F.conv2d(y, weight, padding=size // 2), shared.norms['conv'], slice(n))
    y = norm(F.conv2d(y.relu(), shared.conv3.weight[:out, :n]), shared.norm3, slice(out))
    shortcut = F.conv2d(x, shared.shortcut[0].weight[:out, : x.shape[1]])
    return (y + norm(shortcut, shared.shortcut[1], slice(out))).relu()


@pytest.mark.parametrize('side', [16, 10])
@pytest.mark.parametrize(('out', 'n'), [(16, 16), (16, 8), (24, 12), (24, 24)])
@pytest.mark.parametrize(('operator', 'size'), [('conv', 3), ('conv', 5), ('local', 3), ('local', 5), ('axial', None)])
@pytest.mark.parametrize('sharing', SHARINGS)
def test_blocks_are_those_of_a_packed_implementation(sharing, operator, size, out, n, side):
    """Also with several channels less per head, and after a narrower stage."""
    space = TrioSpace((16,), 16, 1, HEADS, ((1,),), ((16, 24),), (0.5, 1.0), (3, 5), (3, 5), (1,))
    net = SuperNet(space, 3).double()
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    (shared,) = net.stages[0]
    block = TrioBlock(8, operator, out, n, 1, size, HEADS, side, dtype=torch.float64).eval()
    x = torch.randn(2, 8, side, side - 2, dtype=torch.float64)
    if operator == 'axial':  # the table for the width has the layout of the height
        x = torch.randn(2, 8, side, side, dtype=torch.float64)
    with torch.no_grad():
        found = functional_call(block, dict(shared.tensors(block, sharing)), (x,))
        expected = reference_block(shared, x, operator, out, n, size, side, sharing)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


# ---- which elements a network has ----


def numbered(net):
    """A copy whose weights are their own numbers, all different, and the gradients of ``net`` in this order."""
    tagged, count = copy.deepcopy(net).double(), 0
    for parameter in tagged.parameters():
        parameter.data = torch.arange(count, count + parameter.numel(), dtype=torch.float64).reshape(parameter.shape)
        count += parameter.numel()
    return tagged


def flat_gradients(net):
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in net.parameters()])


@pytest.mark.parametrize('sharing', SHARINGS)
def test_every_weight_of_a_network_is_another_one_of_the_supernet(sharing):
    tagged = numbered(supernet(sharing))
    for point in drawn(4, 2):
        places = torch.cat([p.detach().flatten() for p in tagged.activate(point).extract().parameters()])
        assert len(places.unique()) == len(places)


@pytest.mark.parametrize('sharing', SHARINGS)
def test_prefixes_and_centres(sharing):
    """The parts that both rules treat alike."""
    net = supernet(sharing)
    point = Architecture.parse('image 10; stem 8; heads 2; 8: conv3/4 + conv5/8; 16: local3/8 + axial/16')
    found = net.activate(point).extract()
    (a, b), (c, d) = net.stages
    (a_, b_), (c_, d_) = found.stages
    for part, whole in (
        (found.conv1.weight, net.conv1.weight),
        (found.fc.weight, net.fc.weight[:, :16]),
        (found.fc.bias, net.fc.bias),
        (a_.conv1.weight, a.conv1.weight[:4, :8]),
        (a_.norm1.weight, a.norm1.weight[:4]),
        (a_.middle.weight, a.operators['conv'].weight[:4, :4, 1:4, 1:4]),
        (a_.norm2.bias, a.norms['conv'].bias[:4]),
        (a_.conv3.weight, a.conv3.weight[:8, :4]),
        (a_.norm3.weight, a.norm3.weight[:8]),
        (b_.conv1.weight, b.conv1.weight[:8, :8]),
        (b_.middle.weight, b.operators['conv'].weight[:8, :8]),
        (c_.conv1.weight, c.conv1.weight[:8, :8]),
        (c_.shortcut[0].weight, c.shortcut[0].weight[:16, :8]),
        (c_.shortcut[1].bias, c.shortcut[1].bias[:16]),
        (c_.middle.relative, c.operators['local'].relative[:, :, :2, 1:4]),
        (d_.middle.height.logit_norm.weight, d.operators['axial'].height.logit_norm.weight),
        (d_.norm3.bias, d.norm3.bias[:16]),
    ):
        assert torch.equal(part, whole)
    # A table of 15 columns has 8 positions. The narrower map has 5.
    assert d.operators['axial'].width.relative.shape[1] == 15
    for axis in ('height', 'width'):
        whole, part = d.operators['axial'].get_submodule(axis).relative, d_.middle.get_submodule(axis).relative
        assert torch.equal(
            part, (whole[:16] if sharing == 'plain' else whole[[*range(4), *range(6, 10), *range(12, 20)]])[:, 3:12]
        )


# ---- gradients ----


@pytest.mark.parametrize('sharing', mostly_slow(SHARINGS, 'heads'))
def test_gradients_are_those_of_the_extracted_network(sharing):
    net = supernet(sharing).double().train()
    tagged = numbered(net)
    x, labels = images(dtype=torch.float64), torch.arange(3)
    for point in drawn(3, 7):
        network, part = net.activate(point).extract().train(), net.activate(point)
        net.zero_grad()
        F.cross_entropy(part(x), labels).backward()
        F.cross_entropy(network(x), labels).backward()
        found = flat_gradients(net)
        places = torch.cat([p.detach().flatten() for p in tagged.activate(point).extract().parameters()]).long()
        expected = torch.zeros_like(found)
        expected[places] = torch.cat([p.grad.flatten() for p in network.parameters()])
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)  # zeros if it has no weights
        assert expected.abs().max() > 1e-3


@pytest.mark.parametrize('operator', OPERATORS)
@pytest.mark.parametrize('sharing', SHARINGS)
def test_who_gets_gradients(sharing, operator):
    """Shared parts get gradients from every operator, private ones only from their own, unused ones from none."""
    net = supernet(sharing).train()
    net.activate(pure(NARROW, operator))(images()).square().sum().backward()
    for i, stage in enumerate(net.stages):
        for j, block in enumerate(stage):
            for name, parameter in block.named_parameters():
                owner = name.split('.')[1] if name.startswith(('operators.', 'norms.')) else operator
                # The second stage has one block; the first block of the first one keeps the stem's 8 channels.
                unused = (i, j) == (1, 1) or ((i, j) == (0, 0) and name.startswith('shortcut.'))
                if unused or owner != operator:
                    assert parameter.grad is None, (i, j, name)
                elif not name.endswith('logit_norm.bias'):
                    # The first rows of q, k and v together: at half the width no v, at a third no k.
                    ends = ('value.weight', 'key.weight')[: i + 1]
                    never = sharing == 'plain' and operator == 'local' and name.endswith(ends)
                    assert parameter.grad.any() != never, (i, j, name)
    block = net.stages[0][0]
    assert not block.conv1.weight.grad[8:].any()
    assert not block.conv3.weight.grad[8:].any()
    assert not block.conv3.weight.grad[:, 8:].any()
    assert all(net.get_parameter(name).grad.any() for name in ('conv1.weight', 'bn1.bias', 'fc.weight', 'fc.bias'))


def test_three_operators_add_up_in_the_shared_parts():
    net, alone = supernet().double().train(), []
    for operator in OPERATORS:
        net.zero_grad()
        net.activate(pure(NARROW, operator))(images(dtype=torch.float64)).square().sum().backward()
        alone.append(flat_gradients(net))
    net.zero_grad()
    for operator in OPERATORS:
        net.activate(pure(NARROW, operator))(images(dtype=torch.float64)).square().sum().backward()
    torch.testing.assert_close(flat_gradients(net), sum(alone), rtol=1e-10, atol=1e-10)


# ---- a network in the supernet and alone ----


def forms(net):
    """Inputs for which both must agree: another size, one image, another memory format."""
    dtype = net.conv1.weight.dtype
    yield images(dtype=dtype)
    yield images(21, 1, dtype)
    yield images(16, 2, dtype)[:, :, :, :9]
    yield images(16, 2, dtype).to(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ('sharing', 'weights'),
    mostly_slow(
        [
            ('heads', 'fp32'),
            ('plain', 'fp32'),
            ('heads', 'bf16'),
            ('plain', 'bf16'),
            ('heads', 'channels_last'),
            ('plain', 'autocast'),
        ],
        *(('plain', 'fp32'), ('heads', 'channels_last')),
    ),
)
def test_outputs_are_the_same_bits(sharing, weights):
    net = supernet(sharing)
    if weights == 'channels_last':
        net = net.to(memory_format=torch.channels_last)
    if weights == 'bf16':
        net = net.bfloat16()
    autocast = functools.partial(torch.autocast, 'cpu', torch.bfloat16, enabled=weights == 'autocast')
    for point in drawn(3, 7) if weights == 'fp32' else drawn(2, 12):
        part = net.activate(point).eval()
        with torch.no_grad(), autocast():
            assert torch.equal(
                part(images(dtype=net.conv1.weight.dtype)),
                net.activate(point).extract().eval()(images(dtype=net.conv1.weight.dtype)),
            )
            part.train()
            for seed in range(2):
                part(images(dtype=net.conv1.weight.dtype, batch=4, seed=seed))
            assert part.extract().training
            part.eval()
            network = part.extract()
            assert not network.training
            for x in forms(net):
                assert torch.equal(part(x), network(x))
        # It keeps the statistics, which differ from the initial ones.
        for name, buffer in part.network.named_buffers():
            assert torch.equal(network.get_buffer(name), buffer)
        assert part.network.bn1.num_batches_tracked == 2
        assert network.bn1.running_mean.any()
        assert {p.dtype for p in network.parameters()} == {net.conv1.weight.dtype}


def test_extracted_networks_are_ordinary_ones():
    net = supernet()
    for point in drawn(4, 3):
        network = net.activate(point).extract()
        assert type(network) is TrioNet
        alone = TrioNet(point, 5)
        assert {n: t.shape for n, t in network.state_dict().items()} == {
            n: t.shape for n, t in alone.state_dict().items()
        }
        before = [p.detach().clone() for p in net.parameters()]
        with torch.no_grad():
            for parameter in network.parameters():
                assert parameter.requires_grad
                parameter.zero_()
        assert all(map(torch.equal, net.parameters(), before))


def test_activating_adds_no_weights():
    net = supernet()
    keys, identities = list(net.state_dict()), [id(p) for p in net.parameters()]
    parts = [net.activate(point) for point in drawn(4)]
    for part in parts:
        part(images(10))
        assert all(parameter.is_meta for parameter in part.parameters())
        assert not any(buffer.is_meta for buffer in part.buffers())
    assert list(net.state_dict()) == keys
    assert [id(p) for p in net.parameters()] == identities


def test_whole_weights_are_used_where_they_lie():
    net = supernet()
    storages = {p.untyped_storage().data_ptr() for p in net.parameters()}
    part = net.activate(pure(LARGEST, 'conv'))
    tensors = net.tensors(part.network)
    assert set(tensors) == {name for name, _ in part.network.named_parameters()}
    assert {t.untyped_storage().data_ptr() for t in tensors.values()} <= storages


def test_it_follows_the_supernet():
    net = supernet().train()
    part, x = net.activate(pure(NARROW, 'axial')), images()
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1)
    before = part.eval()(x).detach()
    F.cross_entropy(net.activate(pure(LARGEST, 'axial'))(x), torch.arange(3)).backward()
    optimiser.step()
    after = part(x)
    assert not torch.allclose(after, before, atol=1e-4)
    assert torch.equal(after, net.activate(part.architecture).extract().eval()(x))


def test_statistics_are_each_networks_own():
    net = supernet().train()
    point = pure(NARROW, 'axial')
    first, second = net.activate(point), net.activate(point)
    start = {name: buffer.clone() for name, buffer in second.network.named_buffers()}
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    first(images())
    assert all(torch.equal(buffer, start[name]) for name, buffer in second.network.named_buffers())
    assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())
    changed = [name for name, buffer in first.network.named_buffers() if not torch.equal(buffer, start[name])]
    assert len(changed) == len(start)
    fresh = dict(TrioNet(point, 5).named_buffers())
    assert all(torch.equal(buffer, fresh[name]) for name, buffer in start.items())


def test_modes_and_dropout():
    net = supernet(drop_rate=0.5)
    point = pure(NARROW, 'conv')
    assert net.train().activate(point).network.training
    assert not net.eval().activate(point).network.training
    assert net.activate(point).network.drop_rate == 0
    part = net.train().activate(point, dropout=True)
    assert part.network.drop_rate == 0.5
    x = torch.ones(1, 16, 2, 2)
    assert set(part.network.forward_head(x, pre_logits=True).unique().tolist()) == {0.0, 2.0}
    assert part.extract().drop_rate == 0


def test_copies_are_independent():
    net = supernet().eval()
    point, x = pure(NARROW, 'axial'), images()
    y = net.activate(point)(x)
    ema = ModelEmaV3(net, decay=0.0)
    other = supernet(seed=1).eval()
    other.load_state_dict(net.state_dict())
    copies = [copy.deepcopy(net), pickle.loads(pickle.dumps(net)), ema.module, other]
    for each in copies:
        assert torch.equal(each.activate(point)(x), y)
        assert (each.space, each.sharing, each.num_classes) == (net.space, net.sharing, net.num_classes)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1.1)
    for each in copies:
        assert torch.equal(each.activate(point)(x), y)
    ema.update(net)
    assert torch.equal(ema.module.activate(point)(x), net.activate(point)(x))


def test_it_starts_as_networks_do():
    """Except for the zeros of the last norms. Attentions keep their own initialisation."""
    net = SuperNet(TrioSpace((8,), 64, 1, 4, ((1,),), ((256,),), (0.25,), windows=(3,), attention_stages=(1,)), 3)
    alone = {op: TrioNet(net.space.architecture(genome(net.space, op)), 3, zero_init_last=False) for op in OPERATORS}
    for operator, network in alone.items():
        for name, parameter in (
            net.activate(net.space.architecture(genome(net.space, operator))).extract().named_parameters()
        ):
            if not name.startswith('fc'):
                expected = network.get_parameter(name)
                std, error = expected.std().item(), 5 / expected.numel() ** 0.5  # five standard errors of two samples
                assert parameter.std().item() == pytest.approx(std, rel=error, abs=1e-6), name
                assert parameter.mean().item() == pytest.approx(expected.mean().item(), abs=1.5 * error * std + 1e-6), (
                    name
                )


def genome(space, operator):
    return {
        name: ([v for v in values if v.startswith(operator)] or list(values))[0] for name, values in space.genes.items()
    }


def test_channels_and_a_large_stem():
    space = TrioSpace((30,), 8, 4, 2, ((1,), (1,)), ((8,), (16,)), (0.5,), attention_stages=(2,))
    net = SuperNet(space, 4, in_chans=2).eval()
    for operator in OPERATORS:
        point = space.architecture(genome(space, operator))
        x = torch.randn(2, 2, 30, 30)
        y = net.activate(point)(x)
        assert y.shape == (2, 4)
        assert torch.equal(y, net.activate(point).extract().eval()(x))


@pytest.mark.parametrize(
    ('text', 'says'),
    [
        ('image 16; stem 8; heads 2; 8: conv3/8; 16: conv7/8', 'stage 2: size of conv7/8 is 7, not one of 3, 5'),
        ('image 16; stem 16; heads 2; 8: conv3/8; 16: conv3/8', 'stem is 16, not one of 8'),
        ('image 16; stem 8; heads 2; 8: conv3/8*3; 16: conv3/8', 'stage 1: depth is 3, not one of 1, 2'),
    ],
)
def test_foreign_architectures(text, says):
    with pytest.raises(ValueError, match=f'the architecture is not in this space: {says}'):
        supernet().activate(Architecture.parse(text))


def test_unknown_sharing():
    with pytest.raises(ValueError, match="'tails'"):
        SuperNet(SPACE, 5, sharing='tails')


# ---- the meta device ----


def test_modules_on_the_meta_device_have_no_memory_and_draw_nothing():
    state = torch.get_rng_state()
    with meta_device() as meta:
        network = TrioNet(pure(LARGEST, 'axial'), 5, device=meta)
        nn.init.trunc_normal_(nn.Linear(3, 3, device=meta).weight)
        assert not torch.zeros(3).normal_().any()
        assert not torch.zeros(3).uniform_().any()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(tensor.is_meta for tensor in (*network.parameters(), *network.buffers()))
    alone = TrioNet(pure(LARGEST, 'axial'), 5)
    assert {n: t.shape for n, t in network.state_dict().items()} == {n: t.shape for n, t in alone.state_dict().items()}
    assert torch.zeros(3).normal_().any()  # outside, it draws again


def test_activating_draws_nothing():
    net = supernet()
    state = torch.get_rng_state()
    net.activate(pure(NARROW, 'local')).eval()(images())
    assert torch.equal(torch.get_rng_state(), state)
