"""What a found block is worth: trainings from scratch compared, searches compared, and what wins by construction."""

import itertools
import json
import math
import re
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
from test_data import make_images

from sase_blocks.blocks import Genotype
from sase_blocks.checkpoint import read_checkpoint
from sase_blocks.search.sase import SearchSpace
from sase_blocks.search.sase import evaluate as module
from sase_blocks.search.sase.agreement import chance_of_agreement, compare_searches, format_agreement
from sase_blocks.search.sase.evaluate import compare, evaluate, format_table, random_genotypes
from sase_blocks.train import TrainConfig

pytestmark = pytest.mark.usefixtures('one_thread')

FOUND = 'avg_max,conv3,affine,p_norm,avg,conv3x3'
OTHER = 'avg,mlp,affine,avg,avg,conv5x5'
SMALL = {'model_args': {'attn_stages': [3]}, 'img_size': 12, 'batch_size': 4, 'workers': 0}


@pytest.fixture(scope='session')
def images(tmp_path_factory):
    return str(make_images(tmp_path_factory.mktemp('images'), train=7, val=3, classes=('cat', 'dog')))


@pytest.fixture
def budget(images, tmp_path):
    return TrainConfig(
        data=images, out=str(tmp_path / 'out'), model='resnet20_cifar', epochs=2, cpu=True, tensorboard=False, **SMALL
    )


@pytest.fixture
def trained(monkeypatch):
    """In place of ``train`` one that takes no time: accuracies by genotype and seed, a number or an error."""
    accuracies = {}

    def train(config, data):
        trained.configs.append(config)
        accuracy = accuracies.get(config.model_args['genotype'], 50.0)
        accuracy = accuracy(config.seed) if callable(accuracy) else accuracy
        if isinstance(accuracy, Exception):
            raise accuracy
        print('a line of the training')
        return {'acc1': accuracy, 'loss': 1.0, 'best_acc1': 99.0, 'best_epoch': 1, 'epochs': config.epochs}

    trained = type('Trained', (), {'accuracies': accuracies, 'configs': []})
    monkeypatch.setattr(module, 'train', train)
    monkeypatch.setattr(module, 'milliseconds_per_image', lambda networks, images: dict.fromkeys(networks, 2.0))
    return trained


# ---- trainings from scratch ----


def test_evaluation(budget, tmp_path):
    said = []
    result = evaluate(FOUND, budget, baselines=['none', f'mine={OTHER}'], randoms=1, seeds=[3], say=said.append)
    out = Path(budget.out)
    assert json.loads((out / 'evaluation.json').read_text()) == result
    rows = {row['name']: row for row in result['candidates']}
    assert [(name, row['kind']) for name, row in rows.items()] == [
        ('found', 'found'), ('none', 'baseline'), ('mine', 'baseline'), ('random 0', 'random'),
    ]  # fmt: skip
    assert (rows['found']['genotype'], rows['mine']['genotype']) == (FOUND, OTHER)
    assert (result['found'], result['seeds'], result['images'], result['model']) == (FOUND, [3], 6, 'resnet20_cifar')
    for row in rows.values():
        folder = out / f'{row["name"].replace(" ", "_")}_seed_3'
        saved = read_checkpoint(folder / 'last.pt')
        assert (saved['config']['seed'], saved['config']['model_args']['genotype']) == (3, row['genotype'])
        assert saved['config']['model_args']['attn_stages'] == [3]
        assert saved['epoch'] == 2
        assert row['accuracies'] == {'3': saved['scores']['acc1']}
        assert 'training loss' in (folder / 'log.txt').read_text()
        assert row['parameters'] == sum(
            value.numel() for key, value in saved['state_dict'].items()
            if not re.search(r'running_|num_batches', key)
        )  # fmt: skip
        assert row['ms_per_image'] > 0
        assert row['spread'] is row['difference_error'] is None
    assert rows['none']['time_ratio'] == 1
    assert rows['none']['parameters'] < rows['found']['parameters']
    assert rows['none']['macs'] < rows['found']['macs'] < 1.05 * rows['none']['macs']
    assert len(said) == 8
    assert said[0].startswith('1/8 found, seed 3: accuracy ')
    assert result['budget']['epochs'] == 2
    assert not {'data', 'out', 'cpu', 'seed', 'resume'} & set(result['budget'])


def test_last_epoch_counts_and_more_may_be_added(budget, trained):
    trained.accuracies.update({FOUND: lambda seed: 70.0 + seed, OTHER: 60.0})
    first = evaluate(FOUND, budget, baselines=['none'], randoms=2, seeds=[0, 1], say=[].append)
    assert first['candidates'][0]['accuracies'] == {'0': 70.0, '1': 71.0}
    assert [config.seed for config in trained.configs] == [0] * 4 + [1] * 4
    assert len({config.out for config in trained.configs}) == 8
    assert all(config.resume for config in trained.configs)
    trained.configs.clear()
    again = evaluate(FOUND, budget, baselines=['none'], randoms=2, seeds=[0, 1], say=[].append)
    assert (again, trained.configs) == (first, [])
    more = evaluate(FOUND, budget, baselines=['none', f'b={OTHER}'], randoms=3, seeds=[0, 1, 2], say=[].append)
    assert len(trained.configs) == 6 * 3 - 8
    assert more['candidates'][2]['accuracies'] == {'0': 60.0, '1': 60.0, '2': 60.0}
    old = [row['genotype'] for row in first['candidates'] if row['kind'] == 'random']
    assert [row['genotype'] for row in more['candidates'] if row['kind'] == 'random'][:2] == old


def test_one_block_for_each_stage(budget, trained):
    found = f'{FOUND};{OTHER} ; {FOUND}'
    result = evaluate(found, budget, baselines=['none'], randoms=1, seeds=[0], say=[].append)
    assert result['found'] == f'{FOUND}; {OTHER}; {FOUND}'
    parts = result['candidates'][2]['genotype'].split(';')
    assert len(parts) == 3
    assert len({str(Genotype.parse(part)) for part in parts}) == 3


def test_a_candidate_that_fails(budget, trained):
    trained.accuracies[OTHER] = lambda seed: FloatingPointError('the loss is nan') if seed else 60.0
    trained.accuracies['none'] = ValueError('no')
    result = evaluate(FOUND, budget, baselines=['none', f'b={OTHER}'], seeds=[0, 1], say=[].append)
    none, mine = result['candidates'][1:]
    assert (none['accuracies'], none['mean'], none['difference']) == ({}, None, None)
    assert (mine['accuracies'], mine['mean'], mine['spread']) == ({'0': 60.0}, 60.0, None)
    assert result['errors'] == {
        'none, seed 0': 'ValueError: no',
        'none, seed 1': 'ValueError: no',
        'b, seed 1': 'FloatingPointError: the loss is nan',
    }
    text = format_table(result)
    assert 'failed: b, seed 1: FloatingPointError: the loss is nan' in text
    assert re.search(r'^none +- +- +0 +- +[\d,]+ +[\d.]+ M +1\.00$', text, re.MULTILINE)
    trained.accuracies.update(dict.fromkeys([FOUND, OTHER], ValueError('no')))
    with pytest.raises(RuntimeError, match='all 1 trainings failed; the first one, found, seed 0: ValueError: no'):
        evaluate(FOUND, replace(budget, out=f'{budget.out}2'), baselines=[], seeds=[0], say=[].append)


@pytest.mark.parametrize(
    ('found', 'changes', 'options', 'says'),
    [
        ('avg,mlp', {}, {}, 'a genotype has six choices'),
        ('se', {}, {}, 'a genotype has six choices'),
        (f'{FOUND}; {FOUND}', {}, {}, 'found of the evaluation: .*2 genotypes, one for each stage'),
        (FOUND, {}, {'baselines': ['sase', 'sasse']}, 'sasse of the evaluation: .*sasse'),
        (FOUND, {}, {'baselines': ['se', 'se']}, "two blocks of the evaluation have the name 'se'; LABEL=GENOTYPE"),
        (FOUND, {}, {'baselines': [f'found={OTHER}']}, "have the name 'found'"),
        (FOUND, {}, {'seeds': []}, 'needs at least one seed'),
        (FOUND, {}, {'randoms': -1}, 'randoms must be at least 0, got -1'),
        (FOUND, {'model': 'resnet18', 'model_args': {}}, {}, 'resnet18 takes no genotype=.*evaluate in resnet20_cifar'),
        (FOUND, {'model': 'resnet2_cifar'}, {}, "no model 'resnet2_cifar'"),
        (FOUND, {'model_args': {'genotype': 'se'}}, {}, 'leave it out of model_args'),
        (FOUND, {'model_args': {'attn_stages': [9]}}, {}, 'attn_stages'),
        (FOUND, {'pretrained': True}, {}, 'trains from scratch'),
        (FOUND, {'checkpoint': 'last.pt'}, {}, 'trains from scratch'),
        (FOUND, {'data': '/nowhere/at/all'}, {}, 'there is no data folder'),
    ],
)
def test_wrong_evaluation_is_refused_before_any_work(budget, found, changes, options, says):
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        evaluate(found, replace(budget, **changes), **options)
    assert not list(Path(budget.out).glob('*'))


def test_another_budget_is_not_mixed_in(budget, trained):
    evaluate(FOUND, budget, baselines=[], seeds=[0], say=[].append)
    with pytest.raises(ValueError, match=r'other settings: lr was 0\.1 and is 0\.2'):
        evaluate(FOUND, replace(budget, lr=0.2), baselines=[], seeds=[0])
    with pytest.raises(ValueError, match=f'other tasks: found, seed 0 was .*{FOUND}.* and is .*{OTHER}'):
        evaluate(OTHER, budget, baselines=[], seeds=[0])


# ---- random genotypes ----


def test_random_genotypes():
    space = SearchSpace.parse('paper')
    drawn = random_genotypes(space, 20, 5)
    assert len(set(drawn)) == 20
    assert drawn[:7] == random_genotypes(space, 7, 5)
    assert set(drawn).isdisjoint(random_genotypes(space, 20, 6))
    assert random_genotypes(space, 19, 5, without=[drawn[0]]) == drawn[1:]


def test_random_genotypes_of_a_small_space():
    space = SearchSpace.parse(
        'channel_squeeze=avg,avg_max; channel_excite=conv3; gate_excite=affine,mlp; gated_squeeze=avg;'
        'spatial_squeeze=avg; spatial_excite=conv3x3'
    )
    everything = {f'{q},conv3,{d},avg,avg,conv3x3' for q in ('avg', 'avg_max') for d in ('affine', 'mlp')}
    assert set(random_genotypes(space, 4)) == everything
    found = 'avg,conv3,mlp,avg,avg,conv3x3'
    assert set(random_genotypes(space, 3, without=[found])) == everything - {found}
    # A found block from elsewhere takes no place.
    assert set(random_genotypes(space, 4, without=[OTHER])) == everything
    assert len(set(random_genotypes(space, 16, sets=2))) == 16
    for count, options in ((4, {'without': [found]}), (5, {}), (17, {'sets': 2})):
        with pytest.raises(ValueError, match=f'holds {count - 1} genotypes besides the found one, {count} random ones'):
            random_genotypes(space, count, **options)


# ---- statistics ----


def row(name, *accuracies, kind='baseline'):
    costs = {'parameters': 272474, 'macs': 41.4e6, 'ms_per_image': 1.0, 'time_ratio': 1.25}
    return {
        'name': name, 'kind': kind, 'genotype': name, **costs,
        'accuracies': {str(seed): value for seed, value in enumerate(accuracies)},
    }  # fmt: skip


def test_statistics_by_hand():
    result = compare([row('found', 90, 91, 92, kind='found'), row('se', 88, 90), row('none', 80)])
    found, se, none = result['candidates']
    assert (found['mean'], found['spread'], found['min'], found['max']) == (91, 1, 90, 92)
    assert (found['difference'], found['difference_error']) == (None, None)
    assert (se['difference'], none['difference'], none['difference_error']) == (-2, -11, None)
    assert se['spread'] == pytest.approx(statistics.stdev([88, 90]))
    assert se['difference_error'] == pytest.approx(math.sqrt(1 / 3 + 2 / 2))
    assert result['rank'] is None
    assert result['verdicts'] == [
        'found is 2.00 points above se, with a standard error of 1.15: within the spread over the seeds, no difference '
        'is shown.',
        'found is 11.00 points above none, on too few seeds to tell whether that is chance.',
    ]
    lines = format_table({**result, 'images': 400}).splitlines()
    assert [line.split()[0] for line in lines[2:5]] == ['found', 'se', 'none']
    assert lines[3].split() == (
        ['se', '89.00', '±', '1.41', '88.00', 'to', '90.00', '2', '-2.00', '±', '1.15', '272,474', '41.4', 'M', '1.25']
    )
    assert 'of 400 images (one image is 0.25 points)' in '\n'.join(lines)
    assert len({len(line) for line in lines[:5]}) == 1


@pytest.mark.parametrize(
    ('found', 'other', 'says'),
    [
        ((90, 91, 92), (87, 88, 89), 'found is 3.00 points above se, .* 0.82: more than 2 standard errors, beyond'),
        ((90, 91, 92), (93, 94, 95), 'found is 3.00 points below se, .* 0.82: more than 2 standard errors, beyond'),
        ((90, 91, 92), (89, 90, 91), 'found is 1.00 points above se, .* 0.82: within the spread'),
        ((90, 91, 92), (91, 91, 91), 'found is level with se, .* 0.58: within the spread'),
        ((90,), (90, 91), 'found is 0.50 points below se, on too few seeds'),
    ],
)
def test_verdicts(found, other, says):
    (verdict,) = compare([row('found', *found, kind='found'), row('se', *other)])['verdicts']
    assert re.match(says, verdict)


@pytest.mark.parametrize(
    ('randoms', 'place', 'share', 'by'),
    [
        ([80], 1, '0.50', 'is 10.00 points above'),
        ([80, 95, 85], 2, '0.50', 'is 3.33 points above'),
        ([95, 96, 97], 4, '1.00', 'is 6.00 points below'),
        ([90, 90, 90], 1, '1.00', 'is level with'),  # a tie is no merit
    ],
)
def test_rank_among_random_blocks(randoms, place, share, by):
    rows = [row(f'random {i}', value, kind='random') for i, value in enumerate(randoms)]
    result = compare([row('found', 90, kind='found'), *rows])
    assert result['rank'] == {'place': place, 'of': len(randoms) + 1}
    assert result['verdicts'][-1].startswith(f'found has place {place} among {len(randoms) + 1} with {len(randoms)} ')
    assert f'as well with probability {share}. It {by} their mean.' in result['verdicts'][-1]


# ---- agreement ----

TWO = SearchSpace.parse(
    'channel_squeeze=avg,avg_max; channel_excite=conv3,mlp,affine; gate_excite=affine; gated_squeeze=avg;'
    'spatial_squeeze=avg; spatial_excite=conv3x3'
)
ALONE = [0.0, 0.0, 0.0, 0.0]  # the edges of one operation


def found(seed, squeeze, *excites):
    """A result with these logits on edges 0 and 1, one list of excites a set."""
    return {'space': TWO.to_dict(), 'seed': seed, 'logits': [[*squeeze, *excite, *ALONE] for excite in excites]}


def test_agreement_by_hand():
    results = [
        found(0, [0, math.log(3)], [0, 1, 5]),
        found(1, [0, math.log(3)], [2, 1, 0]),
        found(2, [math.log(3), 0], [0, 2, 1]),
    ]
    agreement = compare_searches(results)
    (edges,) = agreement['sets']
    squeeze, excite = edges['channel_squeeze'], edges['channel_excite']
    assert (squeeze['winner'], squeeze['agree'], squeeze['votes']) == ('avg_max', 2, {'avg_max': 2, 'avg': 1})
    assert squeeze['probability'] == pytest.approx({'avg': 5 / 12, 'avg_max': 7 / 12})
    assert squeeze['margin'] == pytest.approx(0.5)
    assert squeeze['entropy'] == pytest.approx(-(0.25 * math.log(0.25) + 0.75 * math.log(0.75)) / math.log(2))
    assert squeeze['chance'] == 1  # two of three always agree on one of two
    assert squeeze['rank_correlation'] == pytest.approx((1 - 1 - 1) / 3)
    # One vote each: the mean probability decides, which the steepest search rules.
    assert (excite['winner'], excite['agree']) == ('affine', 1)
    assert excite['rank_correlation'] == pytest.approx((-1 + 0.5 - 0.5) / 3)
    alone = edges['gate_excite']
    assert (alone['winner'], alone['agree'], alone['chance'], alone['rank_correlation']) == ('affine', 3, 1, None)
    assert agreement['genotype'] == 'avg_max,affine,affine,avg,avg,conv3x3'
    assert (agreement['seeds'], agreement['null_seeds']) == ([0, 1, 2], [])
    assert json.loads(json.dumps(agreement)) == agreement
    text = format_agreement(agreement)
    assert re.search(r'^channel_squeeze +avg_max +2 of 3 +1\.00 +0\.58 +0\.500 +0\.81 +-0\.33$', text, re.MULTILINE)
    assert 'consensus: avg_max,affine,affine,avg,avg,conv3x3' in text
    assert 'random labels' not in text


def test_random_labels():
    results = [found(seed, [0, 1], [0, 1, 2]) for seed in (0, 1)]
    null = [found(5, [0, 1], [3, 1, 2]), found(6, [0, 1], [2, 1, 3]), found(7, [1, 0], [3, 1, 2])]
    agreement = compare_searches(results, null)
    (edges,) = agreement['sets']
    assert [state['by_construction'] for state in edges.values()] == [True, False, False, False, False, False]
    assert edges['channel_excite']['null_votes'] == {'conv3': 2, 'affine': 1}
    assert agreement['null_seeds'] == [5, 6, 7]
    lines = format_agreement(agreement).splitlines()
    assert lines[2].endswith('wins there too (2 of 3)')
    assert lines[3].endswith('conv3 wins there (2 of 3, this one in 1)')
    assert lines[4].endswith('nothing to choose')


def test_agreement_of_stages():
    agreement = compare_searches([found(0, [0, 1], [0, 1, 2], [2, 1, 0])])
    assert agreement['genotypes'] == ['avg_max,affine,affine,avg,avg,conv3x3', 'avg_max,conv3,affine,avg,avg,conv3x3']
    assert agreement['genotype'] == '; '.join(agreement['genotypes'])
    assert agreement['sets'][0]['channel_squeeze']['rank_correlation'] is None
    text = format_agreement(agreement)
    assert [line for line in text.splitlines() if line.startswith('stage')] == ['stage 1', 'stage 2']


def test_equal_logits_have_no_ranking():
    agreement = compare_searches([found(0, [0, 0], [0, 1, 1]), found(1, [0, 1], [0, 1, 2])])
    (edges,) = agreement['sets']
    assert edges['channel_squeeze']['rank_correlation'] == 0
    assert edges['channel_excite']['rank_correlation'] == pytest.approx(math.sqrt(3) / 2)


@pytest.mark.parametrize(
    ('results', 'null', 'says'),
    [
        ([], None, 'no searches to compare'),
        ([found(0, [0, 1], [0, 1, 2]), found(1, [0, 1], [0, 1, 2], [0, 1, 2])], None, 'numbers of sets .*seed 1 2'),
        ([found(0, [0, 1], [0, 1, 2])], [found(4, [0, 1], [0, 1, 2], [0, 1, 2])], 'numbers of sets .*seed 4 2'),
        (
            [found(0, [0, 1], [0, 1, 2]), {'seed': 1, 'space': SearchSpace.parse('paper').to_dict(), 'logits': [[]]}],
            None,
            'different spaces: seed 0 channel_squeeze=avg,avg_max; .*, seed 1 paper',
        ),
    ],
)
def test_searches_that_cannot_be_compared(results, null, says):
    with pytest.raises(ValueError, match=says):
        compare_searches(results, null)


@pytest.mark.parametrize(('searches', 'operations'), [(1, 3), (2, 7), (3, 3), (4, 2), (5, 3), (4, 1)])
def test_chance_of_agreement_counted(searches, operations):
    draws = list(itertools.product(range(operations), repeat=searches))
    for agree in range(1, searches + 1):
        counted = sum(max(map(draw.count, draw)) >= agree for draw in draws) / len(draws)
        assert chance_of_agreement(agree, searches, operations) == pytest.approx(counted, abs=1e-12)


@pytest.mark.parametrize('arguments', [(0, 3, 7), (4, 3, 7), (1, 1, 0)])
def test_chance_of_agreement_refused(arguments):
    with pytest.raises(ValueError, match='1 <= agree <= searches'):
        chance_of_agreement(*arguments)
