"""Is a found block better? Comparisons of trainings from scratch and of searches, and what wins by construction."""

import itertools
import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import mostly_slow
from PIL import Image
from test_comparing import fake_training
from test_comparing import row as trained_row
from test_data import make_images, swap

from sase_blocks import data
from sase_blocks.blocks import Genotype
from sase_blocks.checkpoint import read_checkpoint
from sase_blocks.comparing import format_comparison, judge
from sase_blocks.search.sase import SearchConfig, SearchSpace, campaign
from sase_blocks.search.sase.agreement import chance_of_agreement, compare_searches, format_agreement
from sase_blocks.search.sase.diagnostics import noise_leads
from sase_blocks.search.sase.evaluation import evaluate, random_genotypes, rank_found
from sase_blocks.search.sase.network import LOGITS_STD
from sase_blocks.search.sase.result import describe_result, draw_result
from sase_blocks.train import TrainConfig

pytestmark = pytest.mark.usefixtures('one_thread')

FOUND = 'avg_max,conv3,affine,p_norm,avg,conv3x3'
OTHER = 'avg,mlp(reduction=4),affine,avg,avg,conv5x5'
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
    return fake_training(monkeypatch)


# ---- trainings from scratch ----


@pytest.mark.slow
def test_evaluation(budget, tmp_path, monkeypatch, capsys):
    """On grey images, which are checked once for all four trainings."""
    budget = replace(budget, model_args={**budget.model_args, 'in_chans': 1})
    checked, real = [], data.decode_image
    monkeypatch.setattr(data, 'decode_image', lambda *args, **how: checked.append(how) or real(*args, **how))
    result = evaluate(FOUND, budget, baselines=['none', f'mine={OTHER}'], randoms=1, seeds=[3])
    out = Path(budget.out)
    assert json.loads((out / 'evaluation.json').read_text()) == result
    rows = {row['name']: row for row in result['candidates']}
    assert [(name, row['kind']) for name, row in rows.items()] == [
        ('found', 'found'), ('none', 'baseline'), ('mine', 'baseline'), ('random 0', 'random'),
    ]  # fmt: skip
    assert (rows['found']['block'], rows['mine']['block']) == (FOUND, OTHER)
    assert (result['found'], result['seeds'], result['images'], result['model']) == (FOUND, [3], 6, 'resnet20_cifar')
    for row in rows.values():
        folder = out / f'{row["name"].replace(" ", "_")}_seed_3'
        saved = read_checkpoint(folder / 'last.pt')
        assert (saved['config']['seed'], saved['config']['model_args']['genotype']) == (3, row['block'])
        assert saved['config']['model_args']['attn_stages'] == [3]
        assert saved['epoch'] == 2
        assert row['accuracies'] == {'3': saved['scores']['acc1']}
        assert 'training loss' in (folder / 'log.txt').read_text()
        assert row['parameters'] == sum(
            value.numel() for key, value in saved['state_dict'].items()
            if not re.search(r'running_|num_batches', key)
        )  # fmt: skip
        assert row['ms_per_image'] > 0
        assert row['spread'] is row['interval'] is row['p'] is None
    assert rows['none']['time_ratio'] == 1
    assert rows['none']['parameters'] < rows['found']['parameters']
    assert rows['none']['macs'] < rows['found']['macs'] < 1.05 * rows['none']['macs']
    assert checked.count({'smallest': True}) == 14 + 6
    said = [line for line in capsys.readouterr().out.splitlines() if line[1:3] == '/8']
    assert len(said) == 8
    assert said[0].startswith('1/8 cost of found: ')
    assert said[4].startswith('5/8 found, seed 3: accuracy ')
    assert result['budget']['epochs'] == 2
    assert not {'data', 'out', 'cpu', 'seed', 'resume'} & set(result['budget'])


@pytest.mark.slow
def test_last_epoch_counts_and_more_may_be_added(budget, trained):
    trained.accuracies.update({FOUND: lambda seed: 70.0 + seed, OTHER: 60.0})
    first = evaluate(FOUND, budget, baselines=['none'], randoms=2, seeds=[0, 1])
    assert first['candidates'][0]['accuracies'] == {'0': 70.0, '1': 71.0}
    assert [config.seed for config in trained.configs] == [0] * 4 + [1] * 4
    assert len({config.out for config in trained.configs}) == 8
    assert all(config.resume for config in trained.configs)
    trained.configs.clear()
    again = evaluate(FOUND, budget, baselines=['none'], randoms=2, seeds=[0, 1])
    assert (again, trained.configs) == (first, [])
    more = evaluate(FOUND, budget, baselines=['none', f'b={OTHER}'], randoms=3, seeds=[0, 1, 2])
    assert len(trained.configs) == 6 * 3 - 8
    assert more['candidates'][2]['accuracies'] == {'0': 60.0, '1': 60.0, '2': 60.0}
    old = [row['block'] for row in first['candidates'] if row['kind'] == 'random']
    assert [row['block'] for row in more['candidates'] if row['kind'] == 'random'][:2] == old


@pytest.mark.parametrize('check', mostly_slow([True, False], True))
def test_other_images_are_refused(budget, trained, tmp_path, check):
    """Names and counts are the same, and sizes too if the images are checked."""
    root = make_images(tmp_path / 'own', train=7, val=3, classes=('cat', 'dog'))
    budget = replace(budget, data=str(root), check=check)
    evaluate(FOUND, budget, baselines=['none'], seeds=[0])
    if check:
        swap(root / 'val' / 'dog')
    else:
        Image.new('RGB', (40, 40)).save(root / 'val' / 'dog' / '0.png')
    with pytest.raises(ValueError, match='images'):
        evaluate(FOUND, budget, baselines=['none'], seeds=[0, 1])
    assert len(trained.configs) == 2


@pytest.mark.slow
def test_one_block_for_each_stage(budget, trained):
    found = f'{FOUND};{OTHER} ; {FOUND}'
    result = evaluate(found, budget, baselines=['none'], randoms=1, seeds=[0])
    assert result['found'] == f'{FOUND}; {OTHER}; {FOUND}'
    parts = result['candidates'][2]['block'].split(';')
    assert len(parts) == 3
    assert len({str(Genotype.parse(part)) for part in parts}) == 3


@pytest.mark.slow
def test_a_candidate_that_fails(budget, trained):
    trained.accuracies[OTHER] = lambda seed: FloatingPointError('the loss is nan') if seed else 60.0
    trained.accuracies['none'] = ValueError('no')
    result = evaluate(FOUND, budget, baselines=['none', f'b={OTHER}'], seeds=[0, 1])
    none, mine = result['candidates'][1:]
    assert (none['accuracies'], none['mean'], none['difference']) == ({}, None, None)
    assert (mine['accuracies'], mine['mean'], mine['spread']) == ({'0': 60.0}, 60.0, None)
    assert result['errors'] == {
        'none, seed 0': 'ValueError: no',
        'none, seed 1': 'ValueError: no',
        'b, seed 1': 'FloatingPointError: the loss is nan',
    }
    text = format_comparison(result)
    assert 'failed: b, seed 1: FloatingPointError: the loss is nan' in text
    assert re.search(r'^none +- +- +0 +- +- +- +[\d,]+ +[\d.]+ M +2\.00 +1\.00 +1\.00 +1\.00$', text, re.MULTILINE)
    trained.accuracies.update(dict.fromkeys([FOUND, OTHER], ValueError('no')))
    with pytest.raises(RuntimeError, match='all 1 trainings failed; the first one, found, seed 0: ValueError: no'):
        evaluate(FOUND, replace(budget, out=f'{budget.out}2'), baselines=[], seeds=[0])


@pytest.mark.parametrize(
    ('found', 'changes', 'options', 'says'),
    [
        ('avg,mlp', {}, {}, 'a genotype has six choices'),
        ('se', {}, {}, 'a genotype has six choices'),
        (f'{FOUND}; {FOUND}', {}, {}, 'found of the comparison: .*2 genotypes, one for each stage'),
        (FOUND, {}, {'baselines': ['sase', 'sasse']}, 'sasse of the comparison: .*sasse'),
        (FOUND, {}, {'baselines': ['se', 'se']}, "two blocks of the comparison have the name 'se'; LABEL=BLOCK"),
        (FOUND, {}, {'baselines': [f'found={OTHER}']}, "have the name 'found'"),
        (FOUND, {}, {'baselines': ['se(rd=4)']}, r"se\(rd=4\) of the comparison: .* se has no option 'rd'"),
        (FOUND, {}, {'baselines': ['mine=se(reduction=4']}, r'\( has no partner in'),
        (FOUND, {}, {'seeds': []}, 'needs at least one seed'),
        (FOUND, {}, {'randoms': -1}, 'randoms must be at least 0, got -1'),
        (f'{FOUND}; {FOUND}', {'model': 'resnet18', 'model_args': {}}, {}, 'found of the comparison: .*2 genotypes'),
        (FOUND, {'model': 'resnet2_cifar'}, {}, "no model 'resnet2_cifar'"),
        (FOUND, {'model_args': {'genotype': 'se'}}, {}, 'leave genotype and insert out'),
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
    evaluate(FOUND, budget, baselines=[], seeds=[0])
    with pytest.raises(ValueError, match=r'other settings: lr was 0\.1 and is 0\.2'):
        evaluate(FOUND, replace(budget, lr=0.2), baselines=[], seeds=[0])
    with pytest.raises(ValueError, match=f'another job: cost of found was .*{FOUND}.* and is .*{re.escape(OTHER)}'):
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
    # A found block from another space takes no place.
    assert set(random_genotypes(space, 4, without=[OTHER])) == everything
    assert len(set(random_genotypes(space, 16, sets=2))) == 16
    for count, options in ((4, {'without': [found]}), (5, {}), (17, {'sets': 2})):
        with pytest.raises(ValueError, match=f'holds {count - 1} genotypes besides the found one, {count} random ones'):
            random_genotypes(space, count, **options)


# ---- the rank among random blocks ----


def test_without_scipy(budget, monkeypatch):
    monkeypatch.setitem(sys.modules, 'scipy', None)
    config = SearchConfig(data='', out=budget.out, tensorboard=False)
    for call in (lambda: evaluate(FOUND, budget, seeds=[0]), lambda: campaign(config, evaluations=1)):
        with pytest.raises(ImportError, match=r'pip install "sase-blocks\[search\]"'):
            call()
    assert not list(Path(budget.out).glob('*'))


@pytest.mark.parametrize(
    ('randoms', 'place', 'p', 'says'),
    [
        ([80], 1, 0.5, 'probability 0.50: nothing is shown, .* at least 19 .* It is 10.00 points above'),
        ([80, 95, 85], 2, 0.5, 'probability 0.50: nothing is shown, .* It is 3.33 points above'),
        ([95, 96, 97], 4, 1.0, 'probability 1.00: nothing is shown, .* It is 6.00 points below'),
        ([90, 90, 90], 1, 1.0, 'It is level with'),  # a tie is no merit
        ([80] * 19, 1, 0.05, 'probability 0.05: the search is better than drawing at random. It is 10.00'),
        ([80] * 18 + [90], 1, 0.1, 'probability 0.10: no advantage over drawing at random is shown'),
    ],
)
def test_rank_among_random_blocks(randoms, place, p, says):
    def compare(rows):
        result = judge(rows, 'found', ())
        rank, said = rank_found(result['candidates'])
        return {**result, 'rank': rank, 'verdicts': [*result['verdicts'], *said]}

    rows = [trained_row(f'random {i}', value, kind='random') for i, value in enumerate(randoms)]
    result = compare([trained_row('found', 90, kind='found'), *rows])
    assert result['rank'] == {'place': place, 'of': len(randoms) + 1, 'p': p}
    verdict = result['verdicts'][-1]
    assert verdict.startswith(f'found has place {place} among {len(randoms) + 1} with {len(randoms)} ')
    assert re.search(says, verdict)
    # Blocks with other seeds do not count.
    more = compare([trained_row('found', 90, kind='found'), *rows, trained_row('random x', 99, 99, kind='random')])
    assert more['rank'] == result['rank']
    assert more['verdicts'][-1] == f'{verdict} 1 random block is left out, with other seeds.'
    assert (
        compare([trained_row('found', 90, kind='found'), trained_row('random x', 99, 99, kind='random')])['rank']
        is None
    )


# ---- what a search decided ----


def moved(gradients, lr, start):
    """The logits (runs, operations) after steps of the search's Adam with all gradients (T, runs, operations)."""
    logits = torch.nn.Parameter(start.clone())
    adam = torch.optim.Adam([logits], lr, betas=(0.5, 0.999), weight_decay=1e-3)
    for gradient in gradients:
        logits.grad = gradient
        adam.step()
    return logits.detach()


@pytest.mark.parametrize('updates', [0, 1, 5, 40, 400])
def test_gradients_of_noise_decide_nothing(updates):
    """At most one search in twenty decides an edge of two operations, where leads are widest, or of seven."""
    generator = torch.Generator().manual_seed(updates)
    runs, lr = 1000, 3e-3
    for size in (2, 7):
        choices = {'channel_excite': ['conv3', 'mlp', 'conv3_x3', 'conv5', 'conv7', 'conv3_x2', 'affine'][:size]}
        fixed = {edge: [names[0]] for edge, names in SearchSpace.parse('paper')}
        space = SearchSpace.of({**fixed, **choices})
        bound = noise_leads(space, 1, updates, lr)['channel_excite']
        gradients = torch.randn(updates, runs, size, generator=generator)
        gradients -= gradients.mean(-1, keepdim=True)  # as gradients through a softmax do
        start = LOGITS_STD * torch.randn(runs, size, generator=generator)
        first, second = moved(gradients, lr, start).topk(2).values.T
        assert (first - second > bound).double().mean() < 0.05 + 3 * math.sqrt(0.05 * 0.95 / runs)
        # An operation whose gradient has one sign in three steps of four is found within a few hundred steps.
        if updates >= 400:
            gradients[..., 0] = -1.0 * torch.sign(torch.rand(updates, runs, generator=generator) - 0.25)
            logits = moved(gradients, lr, start)
            lead = logits[:, 0] - logits[:, 1:].max(1).values
            assert (lead > bound).double().mean() > 0.95


def test_noise_leads_by_hand():
    space = SearchSpace.parse('channel_squeeze=avg; channel_excite=conv3,mlp; gate_excite=affine; gated_squeeze=avg')
    # Three edges with a choice in each of two sets; the quantile of 1 - 0.05 / 12.
    leads = noise_leads(space, 2, 100, 0.01)
    assert leads['channel_excite'] == pytest.approx(2.638257 * math.sqrt(2 * (2 * 0.1**2 + LOGITS_STD**2)), rel=1e-5)
    assert leads['spatial_squeeze'] == pytest.approx(
        2.638257 * math.sqrt(2 * (7 / 6 * 0.1**2 + LOGITS_STD**2)), rel=1e-5
    )
    assert noise_leads(space, 2, 0, 0.01)['channel_excite'] > LOGITS_STD


SPACE = SearchSpace.parse(
    'channel_squeeze=avg,avg_max; channel_excite=conv3,mlp,affine; gate_excite=affine; gated_squeeze=avg;'
    'spatial_squeeze=avg; spatial_excite=conv3x3'
)


@pytest.mark.parametrize(
    ('sets', 'decided', 'verdict'),
    [
        ([[0, 0, 0, 0, 0]], [[False, False]], '^nothing was decided: .* take the genotype as drawn at random$'),
        ([[0, 9, 0, 5, 5]], [[True, False]], r'^decided: 1 of 2 edges \(channel_squeeze\); on the others'),
        ([[0, 9, 0, 5, 9]], [[True, True]], '^all 2 edges were decided'),
        pytest.param(
            [[0, 0.1, 0, 0, 0], [0, 0, 0, 0.1, 4]], [[False, False], [False, True]],
            r'^decided: 1 of 4 edges \(stage 2, channel_excite\)',
            marks=pytest.mark.slow,
        ),
    ],
)  # fmt: skip
def test_a_result_says_what_was_decided(sets, decided, verdict, tmp_path, monkeypatch):
    logits = torch.tensor([[*row, 0, 0, 0, 0] for row in sets], dtype=torch.float)
    config = {'arch_lr': 0.01, 'seed': 0}
    result = describe_result(SPACE, logits, config=config, facts={}, epoch=1, updates=100)
    marks = [[edges[edge]['decided'] for edge in ('channel_squeeze', 'channel_excite')] for edges in result['edges']]
    assert marks == decided
    assert result['edges'][0]['gate_excite']['decided'] is None
    assert re.search(verdict, result['verdict'])
    assert json.loads(json.dumps(result))['verdict'] == result['verdict']
    said = {}

    def save(figure, path):
        said[path.name] = [text.get_text() for text in figure.findobj(lambda part: hasattr(part, 'get_text'))]
        return path

    monkeypatch.setattr('sase_blocks.viz.save_figure', save)
    draw_result([logits], SPACE, result['edges'], tmp_path)
    nothing = 'nothing was decided'
    assert any(text.startswith(nothing) for text in said['logits.png']) == (verdict[1:].startswith(nothing))
    assert sum('not decided' in text for text in said['logits.png']) == sum(row.count(False) for row in marks)
    for stage, row in enumerate(marks, start=1):
        drawn = said['genotype.png' if len(marks) == 1 else f'genotype-{stage}.png']
        assert (nothing in drawn) == (not any(row))
        open_edges = [edge for edge, mark in zip(('channel_squeeze', 'channel_excite'), row, strict=True) if not mark]
        assert (f'not decided: {", ".join(open_edges)}' in drawn) == (0 < len(open_edges) < 2)


# ---- agreement ----

TWO = SearchSpace.parse(
    'channel_squeeze=avg,avg_max; channel_excite=conv3,mlp,affine; gate_excite=affine; gated_squeeze=avg;'
    'spatial_squeeze=avg; spatial_excite=conv3x3'
)
ALONE = [0.0, 0.0, 0.0, 0.0]  # the edges of one operation


def found(seed, squeeze, *excites):
    """A result with these logits on edges 0 and 1, with one list of excites for each set."""
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
    assert squeeze['chance'] == 1  # of three searches, two always agree on one of two operations
    assert squeeze['rank_correlation'] == pytest.approx((1 - 1 - 1) / 3)
    # With one vote each, the mean probability decides, so the steepest search does.
    assert (excite['winner'], excite['agree']) == ('affine', 1)
    assert excite['rank_correlation'] == pytest.approx((-1 + 0.5 - 0.5) / 3)
    alone = edges['gate_excite']
    assert (alone['winner'], alone['agree'], alone['chance'], alone['rank_correlation']) == ('affine', 3, 1, None)
    assert agreement['genotype'] == 'avg_max,affine,affine,avg,avg,conv3x3'
    assert (agreement['seeds'], agreement['null_seeds']) == ([0, 1, 2], [])
    assert json.loads(json.dumps(agreement)) == agreement
    text = format_agreement(agreement)
    assert re.search(r'^channel_squeeze +avg_max +2 of 3 +1\.00 +0\.58 +0\.500 +0\.81 +-0\.33$', text, re.MULTILINE)
    assert 'consensus: avg_max,affine,affine,avg,avg,conv3x3\nnothing was decided: on no edge' in text
    assert (squeeze['chance_adjusted'], squeeze['decided'], alone['decided']) == (1, False, None)
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


@pytest.mark.parametrize(
    ('squeezes', 'excites', 'null', 'verdict'),
    [
        # By chance, five of five agree with 2 / 2^5 = 0.0625 on two operations, with 1 / 81 on three. Holm doubles it.
        (
            [1] * 5,
            [2] * 5,
            None,
            r'decided: 1 of 2 edges \(channel_excite\); there the searches agree more',
        ),
        ([1] * 8, [2] * 8, None, r'decided: 2 of 2 edges \(channel_squeeze; channel_excite\)'),
        ([1] * 8, [2] * 8, [1, 2], 'nothing was decided: .* does not win on random labels$'),
        ([1] * 8, [2] * 8, [0, 2], r'decided: 1 of 2 edges \(channel_squeeze\)'),
        ([1] * 3, [2] * 3, None, r'nothing was decided: .* than chance would \(3 are too few to show it .*, 5 can\)'),
        ([1] * 4 + [0] * 4, [0, 1, 2, 0, 1, 2, 0, 1], None, 'nothing was decided: .* than chance would$'),
        ([1], [2], None, r'nothing was decided: .*\(1 is too few'),
    ],
)
def test_agreement_that_decides(squeezes, excites, null, verdict):
    def search(seed, squeeze, excite):
        return found(seed, [3 * (i == squeeze) for i in range(2)], [3 * (i == excite) for i in range(3)])

    results = [search(seed, *pair) for seed, pair in enumerate(zip(squeezes, excites, strict=True))]
    agreement = compare_searches(results, null and [search(0, *null)])
    assert re.match(verdict, agreement['verdict'])
    assert agreement['verdict'] in format_agreement(agreement)


def test_searches_without_a_choice():
    space = {edge: [names[0]] for edge, names in SearchSpace.parse('paper')}
    agreement = compare_searches([{'space': space, 'seed': 0, 'logits': [[0.0] * 6]}])
    assert agreement['verdict'] == 'there was nothing to decide: each edge has one operation'


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
