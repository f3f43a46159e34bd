"""The space of a TrioNet search: its points and size, the sampling laws, and the cost of networks."""

import dataclasses
import functools
import itertools
import json
import math
import re
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import mostly_slow
from torch import nn

from sase_blocks.models import Architecture, TrioNet
from sase_blocks.models.architecture import Block
from sase_blocks.profiling import count_macs
from sase_blocks.search.trionet import cost as cost_module
from sase_blocks.search.trionet.cost import Latency, bound, count_number, macs, parameters
from sase_blocks.search.trionet.meta_device import meta_device
from sase_blocks.search.trionet.space import LAWS, SPACES, TrioSpace, draw, hierarchical, uniform
from sase_blocks.selfattention import AxialSelfAttention, LocalSelfAttention

# Two expansions of 8 channels are one width, 4. If the stem's 16 channels stay 16, the shortcut has no layers.
COINCIDING = TrioSpace(
    (7, 16),
    16,
    1,
    2,
    ((1, 2), (1,)),
    ((8, 16), (16, 24)),
    (0.25, 0.5),
    kernels=(1, 3),
    windows=(3,),
    attention_stages=(2,),
)
DISTINCT = TrioSpace((8,), 8, 4, 1, ((1, 2), (1, 2)), ((8,), (16,)), (0.25, 0.5), windows=(3,), attention_stages=(1, 2))
TINY = {'coinciding': COINCIDING, 'distinct': DISTINCT}


@functools.lru_cache
def points(name):
    """All genomes of a tiny space, as architectures."""
    space = TINY[name]
    return [
        space.architecture(dict(zip(space.genes, values, strict=True)))
        for values in itertools.product(*space.genes.values())
    ]


def pure(space, operator='conv', at=0):
    """The genome with the first or last value of each gene, and one operator wherever the space allows it."""
    genome = {}
    for gene, values in space.genes.items():
        genome[gene] = ([v for v in values if v.startswith(operator)] or list(values))[at]
    return genome


# ---- the space ----


@pytest.mark.parametrize(('name', 'genomes', 'size'), [('coinciding', 2048, 832), ('distinct', 5184, 1764)])
def test_size_is_the_number_of_networks(name, genomes, size):
    everything = points(name)
    assert len(everything) == genomes
    assert len(set(everything)) == len({str(point) for point in everything}) == TINY[name].size == size
    for point in set(everything):
        TINY[name].check(point)


def test_spaces_that_ship():
    assert TrioSpace.parse('cifar') is SPACES['cifar']
    assert 8e8 < SPACES['cifar'].size < 9e8
    assert 6e20 < SPACES['imagenet'].size < 7e20
    for space in SPACES.values():
        for operator in ('conv', 'local', 'axial'):
            for at in (0, -1):
                space.check(space.architecture(pure(space, operator, at)))
    # The largest has ResNet-50's widths and depths, and bottlenecks of a quarter.
    largest = SPACES['imagenet'].architecture(pure(SPACES['imagenet'], 'conv', -1))
    assert [(s.width, len(s.blocks), s.blocks[0].width) for s in largest.stages] == [
        (256, 3, 64), (512, 4, 128), (1024, 6, 256), (2048, 3, 512)
    ]  # fmt: skip


WRONG_FIELDS = [
    ('image_sizes', (), 'rising'), ('image_sizes', (32, 16), 'rising'), ('image_sizes', (0, 4), 'rising'),
    ('image_sizes', 32, 'rising'), ('image_sizes', (16, 16), 'rising'), ('image_sizes', (16.0,), 'rising'),
    ('stem', 0, 'int of at least 1'), ('stem', '16', 'int of at least 1'), ('stem', True, 'int of at least 1'),
    ('heads', -1, 'int of at least 1'), ('heads', None, 'int of at least 1'),
    ('reduction', 2, 'one of 1, 4'), ('reduction', [1], 'one of 1, 4'),
    ('depths', (), 'for each stage'), ('depths', ((1, 2), (2, 1)), 'rising'), ('depths', ((1, 2), ()), 'rising'),
    ('depths', ((0, 2), (1,)), 'at least 1'), ('depths', (1, 2), 'for each stage'), ('depths', 2, 'for each stage'),
    ('widths', ((8, 16),), 'as many stages as depths, which has 2'), ('widths', ((8, 16), (24, 16)), 'rising'),
    ('widths', 8, 'for each stage'), ('widths', ((8, 16), 16), 'for each stage'),
    ('expansions', (), 'above 0'), ('expansions', (0.0, 0.5), 'above 0'), ('expansions', (0.5, 0.25), 'rising'),
    ('expansions', (math.inf,), 'above 0'), ('expansions', (math.nan,), 'above 0'), ('expansions', ('1',), 'above 0'),
    ('kernels', (2, 4), 'odd'), ('kernels', (3, 1), 'rising'), ('windows', (3, 4), 'odd'), ('windows', (), 'rising'),
    ('attention_stages', (3,), 'stages from 1 to 2'), ('attention_stages', (0,), 'stages from 1 to 2'),
    ('attention_stages', (2, 1), 'rising'), ('attention_stages', 2, 'stages from 1 to 2'),
    ('operators', (), 'some of conv, local, axial'), ('operators', ('conv', 'pool'), 'some of conv, local, axial'),
    ('operators', ('conv', 'conv'), 'some of conv, local, axial'), ('operators', 'conv', 'some of conv, local, axial'),
]  # fmt: skip


@pytest.mark.parametrize(('field', 'value', 'says'), WRONG_FIELDS, ids=lambda value: str(value))
def test_inconsistent_fields_are_named(tmp_path, field, value, says):
    expected = rf'{field} of the space must be .*{says}.*, got '
    with pytest.raises(ValueError, match=f'^{expected}'):
        dataclasses.replace(COINCIDING, **{field: value})
    path = tmp_path / 'space.json'
    path.write_text(json.dumps({**COINCIDING.to_dict(), field: value}), encoding='utf-8')
    with pytest.raises(ValueError, match=rf'space\.json: {expected}'):
        TrioSpace.parse(str(path))


def test_a_space_without_convolutions():
    with pytest.raises(ValueError, match="attention_stages of the space must be all stages, as 'conv' is not"):
        dataclasses.replace(COINCIDING, operators=('local', 'axial'))
    space = dataclasses.replace(DISTINCT, operators=('axial', 'local'))
    drawn = {op for _ in range(9) for op in space.architecture(draw(space, np.random.default_rng(_))).operators}
    assert drawn == {'axial', 'local'}


@pytest.mark.parametrize('space', [*SPACES.values(), *TINY.values()], ids=[*SPACES, *TINY])
def test_json(tmp_path, space):
    path = tmp_path / 'space.json'
    path.write_text(json.dumps(space.to_dict()), encoding='utf-8')
    again = TrioSpace.parse(str(path))
    assert again == space
    assert hash(again) == hash(space)
    assert again.to_dict() == space.to_dict()
    assert list(again.genes.items()) == list(space.genes.items())


@pytest.mark.parametrize(
    ('text', 'content', 'says'),
    [
        ('imagnet', None, "there is no space 'imagnet': give imagenet, cifar or a .json file"),
        ('missing.json', None, r'the space .*missing\.json cannot be read: No such file'),
        ('a.json', '{"stem": ', r'a\.json: not a space: .* is no valid JSON \(Expecting value'),
        ('a.json', '[1]', r'a\.json: a space must be a JSON object of image_sizes, .*, got \[1\]'),
        ('a.json', '{"stem": 3, "hats": 1, "caps": 2}', r'a\.json: a space has no caps, hats; it has image_sizes, '),
        ('a.json', '{"stem": 3}', r"a\.json: not a space: missing .* 'image_sizes'"),
    ],
    ids=['name', 'missing', 'no JSON', 'no object', 'unknown', 'left out'],
)
def test_wrong_names_and_files(tmp_path, text, content, says):
    if content is not None:
        (tmp_path / text).write_text(content, encoding='utf-8')
    with pytest.raises(ValueError, match=says):
        TrioSpace.parse(str(tmp_path / text) if text.endswith('.json') else text)


def test_genes():
    assert COINCIDING.genes == {
        'image': ('7', '16'),
        'stage 1 depth': ('1', '2'),
        'stage 1 width': ('8', '16'),
        'stage 1 block 1': ('conv1/0.25', 'conv1/0.5', 'conv3/0.25', 'conv3/0.5'),
        'stage 1 block 2': ('conv1/0.25', 'conv1/0.5', 'conv3/0.25', 'conv3/0.5'),
        'stage 2 depth': ('1',),
        'stage 2 width': ('16', '24'),
        'stage 2 block 1': (
            'conv1/0.25', 'conv1/0.5', 'conv3/0.25', 'conv3/0.5',
            'local3/0.25', 'local3/0.5', 'axial/0.25', 'axial/0.5',
        ),
    }  # fmt: skip
    genome = pure(COINCIDING, 'local', -1)
    assert str(COINCIDING.architecture(genome)) == 'image 16; stem 16; heads 2; 16: conv3/8*2; 24: local3/12'


def test_genes_of_blocks_left_out_do_not_matter():
    space = COINCIDING
    for genome in (pure(space), pure(space, 'axial', -1)):
        shallow = {**genome, 'stage 1 depth': '1'}
        deep = {**genome, 'stage 1 depth': '2'}
        others = space.genes['stage 1 block 2']
        assert len({space.architecture({**shallow, 'stage 1 block 2': value}) for value in others}) == 1
        assert len({space.architecture({**deep, 'stage 1 block 2': value}) for value in others}) > 1
    # So does the same width under two names.
    a, b = ({**pure(space), 'stage 1 block 1': value} for value in ('conv1/0.25', 'conv1/0.5'))
    assert space.architecture(a) == space.architecture(b)


@pytest.mark.parametrize(
    ('change', 'says'),
    [
        ({'image': '8'}, "gene 'image' must be one of 7, 16, got '8'"),
        ({'stage 2 width': None}, "gene 'stage 2 width' must be one of 16, 24, got None"),
        ({'stage 1 block 2': 'axial/0.5'}, "gene 'stage 1 block 2' must be one of conv1/0.25, "),
    ],
    ids=str,
)
def test_wrong_genes(change, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        COINCIDING.architecture({**pure(COINCIDING), **change})


def test_expansions_of_many_digits():
    """A third of 36 is 1.5 units, which round up; 0.333333 of it would round down."""
    space = TrioSpace((8,), 8, 1, 4, ((1,),), ((36,),), (1 / 3, 0.33333334, 1))
    assert len(set(space.genes['stage 1 block 1'])) == 3
    architecture = space.architecture(pure(space))
    assert architecture.stages[0].blocks == (Block('conv', 3, 16),)
    space.check(architecture)


@pytest.mark.parametrize(
    ('width', 'expansion', 'expected'),
    [(8, 0.25, 4), (16, 0.375, 8), (20, 0.25, 4), (24, 0.25, 8), (2, 0.1, 4), (10, 2, 20)],
)
def test_widths_are_rounded_to_heads(width, expansion, expected):
    assert COINCIDING.width(width, expansion) == expected


POINT = 'image 16; stem 16; heads 2; 16: conv3/8*2; 24: local3/12'


@pytest.mark.parametrize(
    ('old', 'new', 'says'),
    [
        ('stem 16', 'stem 8', 'stem is 8, not one of 16'),
        ('stem 16', 'stem 16/4', 'reduction is 4, not one of 1'),
        ('heads 2', 'heads 1', 'heads is 1, not one of 2'),
        ('; 24: local3/12', '', 'number of stages is 1, not one of 2'),
        ('image 16', 'image 32', 'image size is 32, not one of 7, 16'),
        ('*2', '*3', 'stage 1: depth is 3, not one of 1, 2'),
        ('24:', '32:', 'stage 2: width is 32, not one of 16, 24'),
        ('conv3/8*2', 'conv3/8 + axial/8', 'stage 1: operator is axial, not one of conv'),
        ('conv3/8*2', 'conv3/8 + conv5/8', 'stage 1: size of conv5/8 is 5, not one of 1, 3'),
        ('local3', 'local1', 'stage 2: size of local1/12 is 1, not one of 3'),
        ('conv3/8*2', 'conv3/6', 'stage 1: width of conv3/6 is 6, not one of 4, 8'),
        ('local3/12', 'conv3/16', 'stage 2: width of conv3/16 is 16, not one of 8, 12'),
    ],
)  # fmt: skip
def test_what_is_foreign_is_named(old, new, says):
    COINCIDING.check(Architecture.parse(POINT))
    assert old in POINT
    with pytest.raises(ValueError, match=re.escape(f'the architecture is not in this space: {says}')):
        COINCIDING.check(Architecture.parse(POINT.replace(old, new)))


# ---- sampling ----


def blocks_only(count):
    """A space in which a network is ``count`` operators."""
    return TrioSpace((8,), 8, 1, 1, ((count,),), ((8,),), windows=(3,), attention_stages=(1,))


def chi_squared(observed, chances, draws):
    """The probability of a deviation at least as large."""
    assert set(observed) <= set(chances)
    assert sum(chances.values()) == pytest.approx(1)
    statistic = sum((observed[key] - draws * p) ** 2 / (draws * p) for key, p in chances.items())
    return torch.special.gammaincc(torch.tensor((len(chances) - 1) / 2), torch.tensor(statistic / 2)).item()


@pytest.mark.parametrize('count', mostly_slow((4, 6), 4))
@pytest.mark.parametrize('name', LAWS)
def test_compositions(name, count):
    """Each law has its own distribution of compositions, and the same test separates them."""
    space, rng = blocks_only(count), np.random.default_rng(count)
    draws = 2500 if name == 'hierarchical' else 1000  # concentrations of 0.7 and 1.5 fail
    observed = Counter()
    for _ in range(draws):
        blocks = [value for gene, value in draw(space, rng, LAWS[name]).items() if ' block ' in gene]
        observed[tuple(sum(value.startswith(op) for value in blocks) for op in ('conv', 'local', 'axial'))] += 1
    every = [c for c in itertools.product(range(count + 1), repeat=3) if sum(c) == count]
    assert len(every) == math.comb(count + 2, 2)
    chances = {
        'hierarchical': dict.fromkeys(every, 1 / math.comb(count + 2, 2)),
        'uniform': {c: math.factorial(count) / math.prod(map(math.factorial, c)) / 3**count for c in every},
    }
    for law, expected in chances.items():
        probability = chi_squared(observed, expected, draws)
        assert probability > 1e-4 if law == name else probability < 1e-9


@pytest.mark.parametrize('concentration', [0.1, 1.0, 10.0])
def test_concentration(concentration):
    """How often three blocks have one operator."""
    space, rng, draws = blocks_only(3), np.random.default_rng(5), 800
    law = functools.partial(hierarchical, concentration=concentration)
    observed = Counter(len(set(space.architecture(draw(space, rng, law)).operators)) == 1 for _ in range(draws))
    a = concentration
    chance = (a + 1) * (a + 2) / ((3 * a + 1) * (3 * a + 2))
    assert chi_squared(observed, {True: chance, False: 1 - chance}, draws) > 1e-4


def test_everything_else_is_drawn_uniformly():
    rng, draws = np.random.default_rng(1), 1000
    genomes = [draw(COINCIDING, rng) for _ in range(draws)]
    for gene, values in COINCIDING.genes.items():
        if ' block ' in gene:
            conv = [value for value in values if value.startswith('conv')]
            chances = {value: 1 / len(conv) for value in conv}
        else:
            chances = {value: 1 / len(values) for value in values}
        observed = Counter(genome[gene] for genome in genomes if genome[gene] in chances)
        if len(chances) > 1:
            assert chi_squared(observed, chances, observed.total()) > 1e-4, gene


@pytest.mark.parametrize(
    ('extent', 'sizes'),
    [
        ('largest', 'image 16; stem 16; heads 2; 16: conv3/8*2; 24: {}/12'),
        ('smallest', 'image 7; stem 16; heads 2; 8: conv1/4; 16: {}/4'),
    ],
)
@pytest.mark.parametrize('law', LAWS)
def test_extents_fix_the_sizes_alone(extent, sizes, law):
    rng = np.random.default_rng(2)
    found = {str(COINCIDING.architecture(draw(COINCIDING, rng, LAWS[law], extent))) for _ in range(40)}
    conv = 'conv3' if extent == 'largest' else 'conv1'
    assert found == {sizes.format(operator) for operator in (conv, 'local3', 'axial')}


def test_seeds():
    first, second, other = (
        [draw(SPACES['cifar'], rng) for _ in range(3)] for rng in map(np.random.default_rng, (3, 3, 4))
    )
    assert first == second != other


def test_a_law_of_ones_own():
    def no_local(rng, count):
        assert count == 3
        return [0.5, 0, 0.5]

    rng = np.random.default_rng(0)
    operators = [op for _ in range(40) for op in DISTINCT.architecture(draw(DISTINCT, rng, no_local)).operators]
    assert set(operators) == {'conv', 'axial'}
    assert set(DISTINCT.architecture(draw(DISTINCT, rng, lambda rng, n: np.eye(n)[1])).operators) == {'local'}
    assert uniform(rng, 4).tolist() == [0.25] * 4


@pytest.mark.parametrize(
    'chances',
    [[0.5, 0.5], [0.5, 0.6, -0.1], [0.5, 0.4, 0.2], [[1.0, 0.0, 0.0]], [0.5, 0.5, math.nan], [0, 0, 0]],
    ids=str,
)
def test_wrong_laws(chances):
    with pytest.raises(ValueError, match='a law must return 3 probabilities, got'):
        draw(DISTINCT, np.random.default_rng(0), lambda rng, count: np.array(chances))


def test_wrong_extents():
    with pytest.raises(ValueError, match="extent must be 'largest', 'smallest' or None, got 'large'"):
        draw(DISTINCT, np.random.default_rng(0), extent='large')


# ---- cost ----


class Silent(nn.Module):
    """Replaces an attention: only its output shape, no MACs. Stores the size of its input."""

    def __init__(self, stride):
        super().__init__()
        self.stride, self.side = stride, None

    def forward(self, x):
        self.side = x.shape[2]
        return x[:, :, :: self.stride, :: self.stride]


def counted(architecture, num_classes, in_chans):
    """(MACs, parameters) of the network itself: convolutions by torch's counter, attentions by the paper's formulas."""
    with meta_device() as meta:
        network = TrioNet(architecture, num_classes, in_chans, device=meta)
    total, attentions = sum(p.numel() for p in network.parameters()), []
    for block in network.modules():
        middle = getattr(block, 'middle', None)
        if isinstance(middle, (LocalSelfAttention, AxialSelfAttention)):
            block.middle = Silent(middle.stride)
            attentions.append((block.middle, middle))
    size = architecture.image_size
    network.eval()(torch.empty(1, in_chans, size, size, device='meta'))
    count = 0
    for silent, attention in attentions:
        w, side = attention.channels, silent.side
        if isinstance(attention, AxialSelfAttention):
            count += 4 * w**2 * side**2 + 7 * w * side**3
        else:
            k = attention.kernel_size
            count += 3 * w**2 * side**2 + 2 * k**2 * w * side**2 + k * w * side**2
    return count + count_macs(network, (in_chans, size, size)), total


@pytest.mark.parametrize(
    ('name', 'count'),
    mostly_slow([('coinciding', 6), ('distinct', 3), ('cifar', 2), ('imagenet', 1)], ('cifar', 2)),
)
def test_costs_are_those_of_the_network(name, count):
    space, rng = {**TINY, **SPACES}[name], np.random.default_rng(7)
    pures = [space.architecture(pure(space, operator, -1)) for operator in ('conv', 'local', 'axial')]
    drawn = [space.architecture(draw(space, rng)) for _ in range(count)]
    seen = Counter()
    for number, architecture in enumerate(drawn if name in SPACES else pures + drawn):
        num_classes, in_chans = ((10, 3), (1000, 1), (0, 4))[number % 3]
        found = macs(architecture, num_classes, in_chans), parameters(architecture, num_classes, in_chans)
        assert found == counted(architecture, num_classes, in_chans)
        seen.update(architecture.operators)
    assert set(seen) == {'conv', 'local', 'axial'}


def test_default_costs_are_those_of_imagenet():
    point = Architecture.parse(POINT)
    assert macs(point) == macs(point, 1000, 3) == macs(point, 10, 3) + 990 * 24
    assert parameters(point) == parameters(point, 1000, 3) == parameters(point, 10, 3) + 990 * 25


@pytest.mark.parametrize('pick', [min, max])
@pytest.mark.parametrize('measure', [macs, parameters])
@pytest.mark.parametrize('name', TINY)
@pytest.mark.parametrize('num_classes', [0, 100])
def test_bounds_are_exact(name, measure, pick, num_classes):
    def cost(architecture):
        return measure(architecture, num_classes)

    everything = {point: cost(point) for point in set(points(name))}
    value, architecture = bound(TINY[name], cost, pick)
    assert value == pick(everything.values()) == everything[architecture]
    by_default = bound(TINY[name], cost)[0]
    assert by_default == min(everything.values())


def test_bounds_of_large_spaces_hold():
    space, rng = SPACES['cifar'], np.random.default_rng(8)
    least, most = bound(space, macs)[0], bound(space, macs, max)[0]
    assert least < most
    assert all(
        least <= macs(space.architecture(draw(space, rng, extent=e))) <= most for e in (None, 'largest', 'smallest')
    )


@pytest.mark.parametrize(
    ('text', 'expected'),
    [
        (None, None), ('300M', 300_000_000), ('300m', 300_000_000), ('1.2G', 1_200_000_000), ('25k', 25_000),
        (' 25 K ', 25_000), ('5e6', 5_000_000), ('250000', 250_000), ('1', 1), ('2B', 2_000_000_000), ('1T', 10**12),
        (7, 7), (3e8, 300_000_000), ('0.001k', 1),
    ],
)  # fmt: skip
def test_counts(text, expected):
    assert count_number(text) == expected
    assert expected is None or isinstance(count_number(text), int)


@pytest.mark.parametrize(
    'text', ['', 'M', 'many', '-3M', '0', '0.2', 'inf', 'nan', 'infM', '3MM', '3 000', 'True', True]
)
def test_wrong_counts(text):
    with pytest.raises(ValueError, match=re.escape(f'such as 300M, 1.2G or 250000, got {text!r}')):
        count_number(text)


def test_latency_is_a_sum_over_parts(monkeypatch):
    """Each part is measured once, with its layers and input size in the network."""
    measured = []

    def weigh(networks, images, rounds):
        (module,) = networks.values()
        size = sum(p.numel() for p in module.parameters())
        measured.append((size, tuple(images.shape), images.device.type, rounds))
        return {name: size + images[0].numel() / 7 for name in networks}

    monkeypatch.setattr(cost_module, 'milliseconds_per_image', weigh)
    latency = Latency('cpu', rounds=2)
    seen = set()
    for text in (
        'image 9; stem 4; heads 1; 8: conv3/4*3 + local3/2; 8: axial/4; 12: conv1/4',
        'image 9; stem 4; heads 1; 8: conv3/4 + local3/2; 12: axial/4',
        'image 18; stem 4/4; heads 1; 8: conv3/4*2',
    ):
        point = Architecture.parse(text)
        network = TrioNet(point, 0)
        parts = [(network.conv1, 3, point.image_size)]
        parts += [(network.stages[i][j], channels, size) for i, j, _, channels, _, size in point.places()]
        sizes = [(sum(p.numel() for p in module.parameters()), channels, size) for module, channels, size in parts]
        expected = sum(size + channels * side**2 / 7 for size, channels, side in sizes)
        assert latency(point) == pytest.approx(expected)
        seen |= {(size, (1, channels, side, side), 'cpu', 2) for size, channels, side in sizes}
        assert set(measured) == seen
        assert len(measured) == len(seen)
        latency(point)
        assert len(measured) == len(seen)


def test_latency_is_measured():
    assert Latency(rounds=1)(Architecture.parse('image 8; stem 4; heads 1; 8: conv3/4 + local3/2 + axial/2')) > 0
