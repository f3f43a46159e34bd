"""The genotype as a value: forms, round trips, errors; and that any of the 117,649 can be built, run and exported."""

import copy
import dataclasses
import itertools
import json
import pickle

import pytest
import torch

from sase_blocks import SASE, AttentionBlock, Genotype, create_block, insert, list_blocks
from sase_blocks.blocks import SASE_GENOTYPE, block_graph, resolve_block, split_stages
from sase_blocks.models.slots import block_builder
from sase_blocks.ops import EXTENDED_SETS, SETS

SAMPLE = [Genotype.random(seed) for seed in range(200)]


def test_forms_round_trip():
    for g in SAMPLE:
        assert Genotype.parse(str(g)) == g
        assert Genotype.parse(g.to_json()) == Genotype.from_json(g.to_json()) == g
        assert Genotype.from_paper(g.to_paper()) == g
        assert Genotype.parse(','.join(g.to_paper())) == g
        assert eval(repr(g), {'Genotype': Genotype}) == g
        assert pickle.loads(pickle.dumps(g)) == copy.copy(g) == g
        assert len({g, Genotype.parse(str(g))}) == 1


def test_options_are_part_of_it():
    """In their canonical text, in every form."""
    text = 'avg,mlp(reduction=4),conv_eca(gamma=1, beta=2),dilated(dilation=2),avg,conv_norm'
    g = Genotype.parse(
        'GAP, 2conv_1x1( reduction=4 ),conv_eca(beta=2,gamma=1), dilated(dilation=2,reduction=16),avg,conv_norm()'
    )
    assert str(g) == text
    assert g.channel_excite == 'mlp(reduction=4)'
    for form in (text, g.to_json(), json.dumps(text.replace(', ', '; ').split(',')).replace('; ', ', ')):
        assert Genotype.parse(form) == g
        assert split_stages(f'{form};se(reduction=4) ; {form}') == [form, 'se(reduction=4)', form]
    assert eval(repr(g), {'Genotype': Genotype}) == pickle.loads(pickle.dumps(g)) == g
    assert SASE_GENOTYPE.with_options(reduction=4).channel_excite == 'mlp(reduction=4)'
    assert SASE_GENOTYPE.with_options(reduction=16) == SASE_GENOTYPE.with_options() == SASE_GENOTYPE
    with pytest.raises(ValueError, match=r"no operation for channel_excite='mlp\(reduction=4\)'; "):
        SASE_GENOTYPE.with_options(reduction=4).to_paper()
    only = dict(zip(EXTENDED_SETS, (['avg'], ['mlp', 'mlp(reduction=4)'], ['max'], ['norm']), strict=True))
    assert {str(Genotype.random(seed, only)).split(',')[1] for seed in range(20)} == {'mlp', 'mlp(reduction=4)'}


def test_it_is_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SASE_GENOTYPE.channel_squeeze = 'avg'


def test_the_space_has_117649_blocks():
    size = 1
    for set_name in Genotype.SET_OF.values():
        size *= len(SETS[set_name])
    assert size == 117_649
    assert len(set(SAMPLE)) > 195


def test_the_extended_space():
    draws = [Genotype.random(seed, EXTENDED_SETS) for seed in range(300)]
    for edge, set_name in Genotype.SET_OF.items():
        assert {getattr(g, edge) for g in draws} == set(EXTENDED_SETS[set_name])
    g = Genotype.parse('dct,norm,affine,project,avg,conv_norm')
    assert Genotype.parse(str(g)) == Genotype.from_json(g.to_json()) == g
    with pytest.raises(ValueError, match="no operation for channel_squeeze='dct', channel_excite='norm'"):
        g.to_paper()
    only = dict(zip(EXTENDED_SETS, (['avg'], ['fc'], ['max'], ['norm']), strict=True))
    assert str(Genotype.random(sets=only)) == 'avg,fc,fc,max,max,norm'


def test_random_is_seeded_and_reaches_every_operation():
    assert Genotype.random(3) == Genotype.random(3)
    for edge, set_name in Genotype.SET_OF.items():
        assert {getattr(g, edge) for g in SAMPLE} == set(SETS[set_name])


GOOD = 'avg_max,mlp,affine,p_norm,avg,conv3x3_x2'
WRONG = [
    ('avg,mlp,affine,avg,avg', r'six choices .*got 5'),
    ('avg', r'six choices .*got 1'),
    ('', r'six choices .*got 1'),
    (
        'avg_mx,mlp,affine,p_norm,avg,conv3x3_x2',
        r"channel_squeeze: 'avg_mx'.*did you mean 'avg_max'.*Valid names: avg, l2_norm",
    ),
    ('avg_max,mlp,affine,p_norm,avg,2conv_3x4', r"spatial_excite: '2conv_3x4'.*did you mean '2conv_3x3'"),
    ('avg_max,mlp,conv3x3,p_norm,avg,conv3x3', r"gate_excite: 'conv3x3' is not a channel excite"),
    ('{"channel_squeeze": "avg"}', r'keys channel_squeeze, channel_excite, gate_excite'),
    ('{"channel_squeeze": ', r'no valid JSON'),
    ('[1, 2, 3, 4, 5, 6]', r'channel_squeeze: 1 is not'),
    ('avg,mlp(reduction=4,affine,avg,avg,conv7x7', r'\( has no partner in'),
    (
        'avg,mlp(reduction),affine,avg,avg,conv7x7',
        'channel_excite: expected .* each value needs the name of its option',
    ),
    ('avg,mlp(rd=4),affine,avg,avg,conv7x7', "channel_excite: mlp has no option 'rd'; it has reduction"),
    ('avg,ml(reduction=4),affine,avg,avg,conv7x7', r"'ml\(reduction=4\)' is not a channel excite; did you mean 'mlp'"),
    ('["avg", "mlp(4)", "affine", "avg", "avg", "conv7x7"]', 'channel_excite: expected .* each value needs the name'),
]


@pytest.mark.parametrize(('text', 'error'), WRONG)
def test_wrong_text(text, error):
    with pytest.raises(ValueError, match=error):
        Genotype.parse(text)


def test_wrong_arguments():
    with pytest.raises(ValueError, match='six choices'):
        Genotype.from_paper(['GAP'] * 5)
    with pytest.raises(TypeError, match='genotype must be'):
        AttentionBlock(8, 3)
    with pytest.raises(TypeError):
        Genotype('avg')


OTHER = 'avg,conv3,affine,avg,avg,conv7x7'
STAGES = [
    (GOOD, [GOOD]),
    (f'{GOOD}; {OTHER};{GOOD} ', [GOOD, OTHER, GOOD]),
    (f'{Genotype.parse(GOOD).to_json()};{", ".join(Genotype.parse(OTHER).to_paper())}', [GOOD, OTHER]),
]


@pytest.mark.parametrize(('text', 'expected'), STAGES)
def test_a_genotype_for_each_stage(text, expected, tmp_path):
    """In a text, and in a file of a search."""
    file = tmp_path / 'genotype.json'
    file.write_text(json.dumps({'genotypes': expected}))
    for given in (text, str(file)):
        assert [str(one) for one in Genotype.parse_stages(given)] == split_stages(str(file)) == expected
        builders = block_builder(given)
        builders = builders if isinstance(builders, tuple) else (builders,)
        assert [str(build(8, feat_size=4).genotype) for build in builders] == expected


@pytest.mark.parametrize(
    'take',
    [
        Genotype.parse,
        resolve_block,
        block_graph,
        lambda text: create_block(text, 8),
        lambda text: AttentionBlock(8, text),
        lambda text: insert(torch.nn.Sequential(), text, input_size=8),
        lambda text: block_builder(['se', text]),
    ],
    ids=['parse', 'resolve_block', 'block_graph', 'create_block', 'AttentionBlock', 'insert', 'block_builder'],
)
def test_one_genotype_is_expected(take):
    with pytest.raises(ValueError, match=r'3 genotypes, one for each stage|one genotype, got 3, one'):
        take('; '.join([GOOD] * 3))


CREATE_WRONG = [
    ('sasee', 8, {}, ValueError, r"unknown attention block 'sasee'.*Did you mean 'sase'"),
    (3, 8, {}, TypeError, 'expected a block name'),
    ('sase', 0, {}, ValueError, 'at least 1, got 0'),
    ('avg,mlp,affine,l2_norm,avg,conv3x3', 8, {}, ValueError, r'SpatialL2Norm .*feat_size=\(H, W\)'),
    ('avg,mlp,affine,avg,avg,affine', 8, {}, ValueError, r'SpatialAffine .*feat_size=\(H, W\)'),
    ('sase', 8, {'feat_size': (7,)}, ValueError, r'feat_size .*got \(7,\)'),
    ('sase', 8, {'feat_size': 0}, ValueError, r'feat_size .*got 0'),
    ('sase', 8, {'kernel_size': 4}, TypeError, "sase has no option 'kernel_size'; it has reduction"),
    ('ese', 8, {'reduction': 4}, TypeError, "ese has no option 'reduction'; it has none"),
    ('sase(rd=4)', 8, {}, ValueError, "sase has no option 'rd'; it has reduction"),
    ('se(reduction=4)', 8, {'reduction': 4}, TypeError, r"reduction is given twice, in 'se\(reduction=4\)'"),
    ('se(reduction=4', 8, {}, ValueError, r"\( has no partner in 'se\(reduction=4'"),
    ('se(4)', 8, {}, ValueError, 'each value needs the name of its option'),
    ('saze(reduction=4)', 8, {}, ValueError, r"unknown attention block 'saze\(reduction=4\)'.*Did you mean 'sase'"),
    ('avg,mlp,mlp,avg,avg,conv7x7', 8, {'reduction': 4}, TypeError, r"mlp, mlp each have .* 'mlp\(reduction=4\)'"),
    ('avg,mlp,conv3,avg,avg,conv7x7', 8, {'grid': 4}, TypeError, r"no option 'grid' in avg, mlp\(reduction\), conv3"),
    (
        'avg,mlp_half,conv3,avg,avg,conv7x7',
        8,
        {},
        ValueError,
        r"channel_excite: 'mlp_half' is now 'mlp\(reduction=2\)'",
    ),
]


@pytest.mark.parametrize(('block', 'channels', 'kwargs', 'error', 'text'), CREATE_WRONG)
def test_create_block_errors(block, channels, kwargs, error, text):
    with pytest.raises(error, match=text):
        create_block(block, channels, **kwargs)


@pytest.mark.parametrize('block', [*list_blocks(), GOOD, SASE_GENOTYPE, SASE_GENOTYPE.to_json()], ids=str)
def test_create_block(block):
    assert create_block(block, 8)(torch.randn(2, 8, 5, 4)).shape == (2, 8, 5, 4)


def test_a_block_refuses_other_inputs():
    block = SASE(8)
    for x, error, text in [
        (torch.randn(2, 4, 5, 5), ValueError, r'built for 8 channels, got 4'),
        (torch.randn(8, 5, 5), ValueError, r'3 dimensions'),
        (torch.ones(2, 8, 5, 5, dtype=torch.int32), TypeError, r'floating'),
    ]:
        with pytest.raises(error, match=text):
            block(x)


@pytest.mark.parametrize('part', [0, *(pytest.param(part, marks=pytest.mark.slow) for part in range(1, 8))])
def test_a_sample_of_the_space_runs_in_fp32_and_bf16(part):
    """Built, run and back-propagated at two sizes, the other one than it was built for among them."""
    for g in SAMPLE[part::8]:
        torch.manual_seed(0)
        block = AttentionBlock(16, g, feat_size=(6, 5))
        for dtype, size in itertools.product((torch.float32, torch.bfloat16), ((6, 5), (9, 7))):
            block = block.to(dtype)
            x = torch.randn(2, 16, *size).to(dtype).requires_grad_()
            y = block(x)
            y.sum().backward()
            assert y.shape == x.shape, g
            assert y.dtype == dtype, g
            assert y.isfinite().all(), g
            assert x.grad.isfinite().all(), g
            assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters()), g
            block.zero_grad()


# A second and a half for each genotype. Those of test_contract.py are in `make test`.
@pytest.mark.slow
@pytest.mark.parametrize('part', range(8))
def test_a_sample_of_the_space_exports(part):
    batch, height, width = (torch.export.Dim(n, min=1 if n == 'b' else 2, max=256) for n in 'bhw')
    for g in SAMPLE[part::8]:
        block = AttentionBlock(16, g, feat_size=(6, 5)).eval()
        program = torch.export.export(
            block, (torch.randn(2, 16, 6, 5),), dynamic_shapes=({0: batch, 2: height, 3: width},)
        )
        x = torch.randn(3, 16, 9, 7)
        torch.testing.assert_close(program.module()(x), block(x), rtol=1e-4, atol=1e-5, msg=str(g))
