"""Comparisons of blocks: candidates from text, the jobs of a comparison, what is claimed and how often by chance."""

import csv
import json
import math
import re
import signal
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_data import make_images

from sase_blocks.blocks import SASE_GENOTYPE
from sase_blocks.checkpoint import read_checkpoint
from sase_blocks.cli import main
from sase_blocks.comparing import (
    Candidate,
    CompareConfig,
    Rule,
    check_candidates,
    compare,
    comparison,
    format_comparison,
    judge,
    parse_candidate,
    split_blocks,
    write_results,
)
from sase_blocks.comparing.significance import holm, paired_test
from sase_blocks.copying import copy_blocks
from sase_blocks.networks import build_network, load_model

pytestmark = pytest.mark.usefixtures('one_thread')

GENOTYPE = 'avg_max,conv3,affine,p_norm,avg,conv3x3'
OTHER = 'avg,mlp(reduction=4),affine,avg,avg,conv5x5'


@pytest.fixture(scope='session')
def images(tmp_path_factory):
    return str(make_images(tmp_path_factory.mktemp('images'), train=7, val=3, classes=('cat', 'dog')))


@pytest.fixture
def budget(images, tmp_path):
    return CompareConfig(
        data=images, out=str(tmp_path / 'out'), model='resnet20_cifar', img_size=12, batch_size=4, epochs=2,
        workers=0, cpu=True, tensorboard=False,
    )  # fmt: skip


@pytest.fixture
def trained(monkeypatch):
    return fake_training(monkeypatch)


def fake_training(monkeypatch):
    """Replaces ``train`` by a table of accuracies, or errors, by block, and the seed if it is a function."""
    accuracies = {}

    def train(config, data):
        trained.configs.append(config)
        accuracy = accuracies.get(config.insert or config.model_args.get('genotype'), 50.0)
        accuracy = accuracy(config.seed) if callable(accuracy) else accuracy
        if isinstance(accuracy, Exception):
            raise accuracy
        print('a line of the training')
        history = [{'epoch': 1, 'acc1': accuracy / 2}, {'epoch': config.epochs, 'acc1': accuracy}]
        return {'acc1': accuracy, 'loss': 1.0, 'best_acc1': 99.0, 'epochs': config.epochs, 'history': history}

    trained = type('Trained', (), {'accuracies': accuracies, 'configs': []})
    monkeypatch.setattr(comparison, 'train', train)
    monkeypatch.setattr(
        comparison, 'milliseconds_per_image', lambda networks, images, **how: dict.fromkeys(networks, 2.0)
    )
    return trained


def candidates(*texts):
    return [parse_candidate(text) for text in texts]


# ---- candidates ----


@pytest.mark.parametrize(
    ('text', 'expected'),
    [
        ('none', Candidate('none', 'none')),
        ('se(reduction=4)', Candidate('se(reduction=4)', 'se(reduction=4)')),
        ('mine=se(reduction=4)', Candidate('mine', 'se(reduction=4)')),
        (f'mine={OTHER}', Candidate('mine', OTHER)),
        (f'{GENOTYPE}; {OTHER}', Candidate(f'{GENOTYPE}; {OTHER}', f'{GENOTYPE}; {OTHER}')),
        ('sase@start=paper', Candidate('sase@start=paper', 'sase', {'start': 'paper'})),
        (
            'p=sase@start=paper@stages=[3,4]@insert-lr=0.5@where=layer*.bn2',
            Candidate('p', 'sase', {'start': 'paper', 'stages': [3, 4], 'insert_lr': 0.5, 'where': 'layer*.bn2'}),
        ),
        ('big=model:resnet50_sase', Candidate('big', 'model:resnet50_sase')),
        ('a=se@model_args={"attn_stages": [3]}', Candidate('a', 'se', {'model_args': {'attn_stages': [3]}})),
    ],
)
def test_candidates_from_text(text, expected):
    assert parse_candidate(text) == expected


def test_a_candidate_from_a_file(tmp_path):
    file = tmp_path / 'genotype.json'
    file.write_text(SASE_GENOTYPE.to_json())
    assert parse_candidate(f'mine={file}') == Candidate('mine', str(SASE_GENOTYPE))
    file.write_text(json.dumps({'genotypes': [GENOTYPE, OTHER]}))
    assert parse_candidate(str(file)) == Candidate(str(file), f'{GENOTYPE}; {OTHER}')


@pytest.mark.parametrize(
    ('text', 'says'),
    [
        ('', "expected BLOCK or LABEL=BLOCK, maybe with @SETTING=VALUE, got ''"),
        ('=se', 'expected BLOCK or LABEL=BLOCK'),
        ('mine=', 'expected BLOCK or LABEL=BLOCK'),
        ('@start=paper', 'expected BLOCK or LABEL=BLOCK'),
        ('se@start', 'se@start: expected @SETTING=VALUE with one of where, stages'),
        ('se@lr=1', 'se@lr=1: expected @SETTING=VALUE'),
        ('se@start=paper@start=identity', 'each once'),
        ('se(reduction=4', r'\( has no partner'),
        ('nowhere.json', 'nowhere.json cannot be read'),
    ],
)
def test_wrong_candidates(text, says):
    with pytest.raises(ValueError, match=says):
        parse_candidate(text)


@pytest.mark.parametrize(
    ('items', 'expected'),
    [
        (['none,se,eca'], ['none', 'se', 'eca']),
        (['none', 'se,eca'], ['none', 'se', 'eca']),
        (['none,', ',se'], ['none', 'se']),
        (['none,cbam(reduction=8, kernel_size=3),x=se'], ['none', 'cbam(reduction=8, kernel_size=3)', 'x=se']),
        ([f'none,{GENOTYPE},se'], ['none', GENOTYPE, 'se']),
        ([f'mine={GENOTYPE},other={OTHER},se'], [f'mine={GENOTYPE}', f'other={OTHER}', 'se']),
        ([f'mine={GENOTYPE}@start=paper,se'], [f'mine={GENOTYPE}@start=paper', 'se']),
        ([f'a={GENOTYPE}; {OTHER}'], [f'a={GENOTYPE}; {OTHER}']),
        (['a.json,m=b/c.json,none'], ['a.json', 'm=b/c.json', 'none']),
        (['model:resnet18,x=se@stages=[3,4],eca'], ['model:resnet18', 'x=se@stages=[3,4]', 'eca']),
        (['sasse'], ['sasse']),
        ([], []),
    ],
)
def test_blocks_of_an_option(items, expected):
    assert split_blocks(items) == expected


def test_how_a_block_gets_into_the_model(budget):
    """As genotype where the model takes one, by insertion otherwise; a candidate's own settings come last."""
    timm_model = replace(budget, model='resnet10t', img_size=32)
    listed = candidates('none', 'se', 'p=se@start=paper@where=layer4*.bn2', 'm=model:resnet20_cifar')
    own = check_candidates(listed, timm_model, Rule(insertion={'start': 'identity', 'stages': [4]}))
    assert [(one.model, one.insert, one.start, one.stages, one.where, one.model_args) for one in own.values()] == [
        ('resnet10t', None, 'identity', None, None, {}),
        ('resnet10t', 'se', 'identity', [4], None, {}),
        ('resnet10t', 'se', 'paper', [4], 'layer4*.bn2', {}),
        ('resnet20_cifar', None, 'identity', None, None, {}),
    ]
    ours = check_candidates(candidates('none', 'se', 'b=se@model_args={"attn_stages": [3]}'), budget)
    assert [(one.insert, one.model_args) for one in ours.values()] == [
        (None, {'genotype': 'none'}), (None, {'genotype': 'se'}), (None, {'attn_stages': [3], 'genotype': 'se'}),
    ]  # fmt: skip
    inserted = check_candidates(candidates('none', 'se'), budget, Rule('insert'))
    assert [(one.insert, one.model_args) for one in inserted.values()] == [
        (None, {'genotype': 'none'}), ('se', {'genotype': 'none'}),
    ]  # fmt: skip


def test_only_networks_with_blocks_are_compiled(budget):
    own = check_candidates(candidates('none', 'se'), replace(budget, compile=True))
    assert [one.compile for one in own.values()] == [False, True]


def copied(folder):
    """SE as one file, and a class of one's own in another."""
    (folder / 'copied.py').write_text(copy_blocks(['Mine=se'], 'copied.py'))
    (folder / 'own.py').write_text(
        'from torch import nn\nclass Own(nn.Conv2d):\n    def __init__(self, channels, *, size=1):\n'
        '        super().__init__(channels, channels, size, padding=size // 2)\n'
    )
    (folder / 'broken.py').write_text('import nowhere_at_all')
    return [f'{folder}/copied.py:Mine', f'{folder}/own.py:Own(size=3)']


def test_classes_in_files(budget, tmp_path):
    """Inserted with the paper's start into a model that takes a genotype. A copy has the cost of its original."""
    mine, own = copied(tmp_path)
    assert split_blocks([f'none,{mine},x={own},se']) == ['none', mine, f'x={own}', 'se']
    listed = candidates('none', 'se', f'mine={mine}', f'own={own}@start=identity')
    configs = check_candidates(listed, budget)
    assert [(one.insert, one.start) for one in configs.values()] == [
        (None, 'identity'), (None, 'identity'), (mine, 'paper'), (own, 'identity'),
    ]  # fmt: skip
    counts = [sum(p.numel() for p in build_network(one)[0].parameters()) for one in configs.values()]
    assert counts[0] < counts[1] == counts[2] < counts[3]
    for text, changes, says in (
        (f'{tmp_path}/nowhere.py:Mine', {}, 'there is no file .*nowhere.py'),
        (f'{tmp_path}/own.py:Owl', {}, "own.py has no class 'Owl'; it has Own"),
        (f'{tmp_path}/broken.py:Own', {}, 'broken.py cannot be imported: ModuleNotFoundError: .*nowhere_at_all'),
        (f'{tmp_path}/own.py:Own(sizes=3)', {}, 'sizes'),
        (mine, {'compile': True}, 'compile must be off for a class in a file'),
    ):
        with pytest.raises(ValueError, match=says):
            check_candidates(candidates('none', text), replace(budget, **changes))


def test_a_changed_file_is_another_block(budget, trained, tmp_path):
    listed = candidates('none', f'mine={copied(tmp_path)[0]}')
    compare(listed, budget, seeds=[0])
    with (tmp_path / 'copied.py').open('a') as file:
        file.write('# changed')
    with pytest.raises(ValueError, match='another job: cost of mine was'):
        compare(listed, budget, seeds=[0, 1])


@pytest.mark.parametrize(
    ('texts', 'changes', 'rule', 'says'),
    [
        (['none', 'sasse'], {}, Rule(), 'sasse of the comparison: .*sasse'),
        (
            ['none', 'se', 'se'],
            {},
            Rule(),
            "two blocks of the comparison have the name 'se'; LABEL=BLOCK",
        ),
        (['se(rd=4)'], {}, Rule(), r"se\(rd=4\) of the comparison: .* se has no option 'rd'"),
        (['se(rd=4)'], {}, Rule('insert'), r"se\(rd=4\) of the comparison: .*no option 'rd'"),
        (['se'], {'model_args': {'genotype': 'se'}}, Rule(), 'leave genotype and insert out'),
        (['se'], {'model_args': {'attn_stages': [9]}}, Rule(), 'attn_stages'),
        (['se'], {'model': 'resnet2_cifar'}, Rule(), "no model 'resnet2_cifar'"),
        (['model:resnet2_cifar'], {}, Rule(), "no model 'resnet2_cifar'"),
        (['model:resnet18@start=paper'], {}, Rule(), 'start is a setting of an inserted block, and here nothing is'),
        (['none@start=paper'], {}, Rule('insert'), 'start is a setting of an inserted block'),
        (['se@start=paper'], {}, Rule(), r'resnet20_cifar takes blocks as genotype=, and start is .*--as insert'),
        (['se'], {}, Rule(insertion={'start': 'paper'}), 'takes blocks as genotype=, and start is'),
        (['se@start=never'], {}, Rule('insert'), "start must be one of .*, got 'never'"),
        (['se@where=nothing*'], {}, Rule('insert'), 'se@where=nothing. of the comparison: '),
        (['se@insert_lr=x'], {}, Rule('insert'), 'se@insert_lr=x of the comparison: '),
        (['se'], {'model': 'resnet18', 'img_size': 32}, Rule('genotype'), 'se of the comparison: .*genotype'),
        ([f'{GENOTYPE}; {OTHER}'], {}, Rule('insert'), 'holds 2 genotypes'),
    ],
)
def test_wrong_comparisons(budget, texts, changes, rule, says):
    with pytest.raises(ValueError, match=says):
        check_candidates(candidates(*texts), replace(budget, **changes), rule)


def test_wrong_rule():
    with pytest.raises(ValueError, match="how must be 'genotype', 'insert' or None, got 'magic'"):
        Rule('magic')


# ---- the jobs ----


def test_a_comparison_and_what_extends_it(budget, trained, tmp_path):
    trained.accuracies.update({'none': lambda seed: 70.0 + seed, 'se': lambda seed: 71.0 + seed + seed % 2})
    first = compare(candidates('none', 'se'), budget, seeds=[0, 1])
    assert [(config.seed, config.model_args['genotype']) for config in trained.configs] == [
        (0, 'none'), (0, 'se'), (1, 'none'), (1, 'se'),
    ]  # fmt: skip
    none, se = first['candidates']
    assert (none['accuracies'], se['accuracies']) == ({'0': 70.0, '1': 71.0}, {'0': 71.0, '1': 73.0})
    assert (se['difference'], se['curve'], first['seeds']) == (1.5, {'1': 36.0, '2': 72.0}, [0, 1])
    network, _ = build_network(replace(trained.configs[1], seed=0), 2)
    assert se['parameters'] == sum(p.numel() for p in network.parameters()) > none['parameters']
    assert none['macs'] < se['macs']
    assert (none['time_ratio'], none['step_ratio'], none['kept_ratio']) == (1, 1, 1)
    assert none['kept_bytes_per_image'] < se['kept_bytes_per_image'] < 1.5 * none['kept_bytes_per_image']
    assert json.loads(json.dumps(first)) == first
    # Again: nothing. A seed more, a block more: only what is missing.
    trained.configs.clear()
    assert (compare(candidates('none', 'se'), budget, seeds=[0, 1]), trained.configs) == (first, [])
    more = compare(candidates('none', 'se', 'eca'), budget, seeds=[0, 1, 2])
    assert [(config.seed, config.model_args['genotype']) for config in trained.configs] == [
        (0, 'eca'), (1, 'eca'), (2, 'none'), (2, 'se'), (2, 'eca'),
    ]  # fmt: skip
    assert more['candidates'][0]['accuracies'] == {'0': 70.0, '1': 71.0, '2': 72.0}
    # Another block under a name, or another budget: refused.
    with pytest.raises(ValueError, match=r"another job: cost of se was .*'block': 'se'.* and is .*'block': 'eca'"):
        compare(candidates('none', 'se=eca'), budget, seeds=[0])
    with pytest.raises(ValueError, match=r'other settings: lr was 0\.1 and is 0\.2'):
        compare(candidates('none', 'se'), replace(budget, lr=0.2), seeds=[0])
    with pytest.raises(ValueError, match='another job'):
        compare(candidates('none', 'se'), budget, rule=Rule('insert'), seeds=[0])


def test_the_budget_of_hours_ends_after_complete_seeds(budget, trained):
    """With a clock that each training moves by half an hour."""
    trained.accuracies['none'] = lambda seed: 70.0 + seed
    time = [0.0]

    def train(config, data, real=comparison.train):
        time[0] += 1800
        return real(config, data)

    comparison.train = train  # which the fixture puts back
    options = {'seeds': [0, 1, 2], 'hours': 1.5, 'clock': lambda: time[0]}
    stopped = compare(candidates('none', 'se'), budget, **options)
    assert len(trained.configs) == 3
    assert (stopped['seeds'], stopped['asked']) == ([0], [0, 1, 2])
    assert [row['accuracies'] for row in stopped['candidates']] == [{'0': 70.0}, {'0': 50.0}]
    text = format_comparison(stopped)
    assert 'Stopped when its time was up: 1 of 3 seeds are complete, and only these count. The same command' in text
    # Later it goes on.
    ended = compare(candidates('none', 'se'), budget, **options)
    assert len(trained.configs) == 6
    assert (ended['seeds'], ended['asked']) == ([0, 1, 2], [0, 1, 2])
    assert 'Stopped' not in format_comparison(ended)
    # Before the first complete seed there is nothing to compare.
    other = replace(budget, out=f'{budget.out}2')
    nothing = compare(candidates('none', 'se'), other, **{**options, 'hours': 0.5})
    assert nothing['seeds'] == []
    assert '0 of 3 seeds are complete' in format_comparison(nothing)
    files = write_results(nothing, other.out)
    assert [path.name for path in files] == ['comparison.json', 'comparison.csv', 'epochs.csv', 'comparison.txt']


def test_trainings_that_fail(budget, trained):
    trained.accuracies['se'] = lambda seed: FloatingPointError('the loss is nan') if seed else 60.0
    result = compare(candidates('none', 'se'), budget, seeds=[0, 1])
    assert result['errors'] == {'se, seed 1': 'FloatingPointError: the loss is nan'}
    assert [list(row['accuracies']) for row in result['candidates']] == [['0', '1'], ['0']]
    assert 'failed: se, seed 1: FloatingPointError: the loss is nan' in format_comparison(result)
    trained.accuracies.update(none=ValueError('no'), se=ValueError('no'))
    with pytest.raises(RuntimeError, match='all 2 trainings failed; the first one, none, seed 0: ValueError: no'):
        compare(candidates('none', 'se'), replace(budget, out=f'{budget.out}2'), seeds=[0])


@pytest.mark.parametrize(
    ('options', 'says'),
    [
        ({'seeds': []}, 'needs at least one seed'),
        ({'seeds': [0, -1]}, 'seed must be at least 0 and below .*, got -1'),
        ({'hours': 0}, 'hours must be above 0, got 0'),
        ({'difference': -1}, 'difference must be above 0, got -1'),
        ({'reference': 'eca'}, r"the reference 'eca' is not one of the blocks \('none', 'se'\); add it, or"),
    ],
)
def test_wrong_arguments(budget, trained, options, says):
    with pytest.raises(ValueError, match=says):
        compare(candidates('none', 'se'), budget, **options)
    assert not Path(budget.out).exists()


def test_code_runs_only_if_it_is_named(images, tmp_path, capsys):
    """A checkpoint names its class in a file, but nothing runs that file without the user's word."""
    _, own = copied(tmp_path)
    out = tmp_path / 'out'
    command = f'train --data {images} --model resnet20_cifar --img-size 12 --batch-size 4 --epochs 1 --cpu --workers 0'
    command = [*command.split(), '--no-tensorboard', '--out', str(out), '--insert', own]
    assert main(command) == 0
    checkpoint, image = str(out / 'last.pt'), f'{images}/val/cat/0.png'
    says = 'code that no checkpoint runs by itself: if you trust that file, name it, --insert'
    with pytest.raises(ValueError, match=says):
        load_model(checkpoint)
    trained = load_model(checkpoint, own)
    assert trained.config.insert == own
    state = read_checkpoint(checkpoint)['state_dict']
    assert any('Own' in type(module).__name__ for module in trained.model.modules())
    assert all(torch.equal(value, state[key]) for key, value in trained.model.state_dict().items())
    (tmp_path / 'own.py').rename(tmp_path / 'moved.py')
    moved = own.replace('own.py', 'moved.py')
    capsys.readouterr()
    for options, code, text in (
        (['predict', '--checkpoint', checkpoint, image], 2, says),
        (['predict', '--checkpoint', checkpoint, image, '--insert', moved], 0, '0.png'),
        (['predict', '--checkpoint', checkpoint, image, '--insert', own], 2, 'there is no file'),
        (['predict', '--checkpoint', checkpoint, image, '--insert', 'se'], 2, "not 'se'; leave --insert out"),
        (['train', '--resume', '--out', str(out)], 2, says),
    ):
        assert main(options) == code
        said = capsys.readouterr()
        assert text in (said.err if code else said.out)


@pytest.mark.slow
def test_killed_and_started_again(budget, tmp_path):
    """The same results as without a kill, and no training is repeated."""
    compare(candidates('none', 'se'), budget, seeds=[0, 1])
    whole, out = Path(budget.out), tmp_path / 'killed'
    command = [sys.executable, '-m', 'sase_blocks', 'compare', '--data', budget.data, '--model', budget.model]
    command += ['--img-size', '12', '--batch-size', '4', '--epochs', '2', '--workers', '0', '--cpu', '--no-tensorboard']
    command += ['--blocks', 'none,se', '--seeds', '0,1', '--out', str(out)]
    first, second = out / 'none_seed_0', out / 'se_seed_0'
    with subprocess.Popen(command) as process:
        while not (second / 'last.pt').exists():  # one training is done, and one is under way or done
            assert process.poll() is None
        process.kill()
    assert process.returncode == -signal.SIGKILL
    before = (first / 'result.json').stat().st_mtime_ns
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert 'of 6 jobs are done already' in done.stdout
    assert (first / 'result.json').stat().st_mtime_ns == before
    for name in ('none_seed_0', 'se_seed_0', 'none_seed_1', 'se_seed_1'):
        results = [json.loads((root / name / 'result.json').read_text())['result'] for root in (whole, out)]
        assert results[0] == results[1]


# ---- the command ----


def test_the_command(images, tmp_path, trained, capsys):
    trained.accuracies.update({'se': lambda seed: 60.0 + seed, 'eca': 50.0})
    out = tmp_path / 'out'
    command = ['compare', '--data', images, '--model', 'resnet20_cifar', '--img-size', '12', '--batch-size', '4']
    command += ['--epochs', '2', '--cpu', '--workers', '0', '--no-tensorboard', '--out', str(out)]
    assert main([*command, '--blocks', f'none,se,mine={GENOTYPE}', 'eca', '--seeds', '0,1,2']) == 0
    said = capsys.readouterr().out
    assert '16/16 eca, seed 2: accuracy 50.00 % (0 s)' in said
    assert re.search(r'^se +61.00 ± 1.00 ', said, re.MULTILINE)
    assert 'Differ from none beyond chance: se (+11.00)' in said
    assert f'mine: {GENOTYPE}' in said
    text = (out / 'comparison.txt').read_text()
    assert text in said
    rows = list(csv.DictReader((out / 'comparison.csv').read_text().splitlines()))
    assert [(row['name'], row['difference'], row['accuracy, seed 2']) for row in rows][:2] == [
        ('none', '', '50.0'), ('se', '11.0', '62.0'),
    ]  # fmt: skip
    assert float(rows[1]['interval_low']) < 11 < float(rows[1]['interval_high'])
    epochs = list(csv.DictReader((out / 'epochs.csv').read_text().splitlines()))
    assert len(epochs) == 4 * 3 * 2
    assert epochs[0] == {'name': 'none', 'seed': '0', 'epoch': '1', 'accuracy': '25.0'}
    assert (out / 'comparison.png').stat().st_size > 10_000
    assert json.loads((out / 'comparison.json').read_text())['seeds'] == [0, 1, 2]
    # Insertion into a timm model, with a setting for all and one for a single block.
    trained.configs.clear()
    command[4], command[6] = 'resnet10t', '32'
    command[-1] += '2'
    options = ['--blocks', 'none,se,p=se@start=paper', '--stages', '4', '--seeds', '5', '--mixed-precision', 'bf16']
    assert main([*command, *options, '--channels-last']) == 0
    assert [(one.insert, one.start, one.stages, one.channels_last) for one in trained.configs] == [
        (None, 'identity', None, True), ('se', 'identity', [4], True), ('se', 'paper', [4], True),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ('options', 'says'),
    [
        (['--blocks', 'se,eca'], "the reference 'none' is not one of the blocks ('se', 'eca'); add it"),
        (['--blocks', 'none,se', '--seeds', '0,x'], "--seeds takes comma-separated numbers, such as 0,1,2, got '0,x'"),
        (['--blocks', 'none,se', '--start', 'paper'], 'start is a setting of insertion; leave it out, or insert'),
        (['--blocks', 'none,se', '--budget-hours', '-1'], 'hours must be above 0, got -1'),
        (['--blocks', 'none,se', '--ray-gpus', '1'], '--ray-gpus needs --ray ADDRESS'),
        (['--blocks', 'none,se', '--data', 'nowhere'], 'there is no data folder nowhere'),
    ],
)
def test_errors_of_the_command(images, tmp_path, capsys, options, says):
    command = ['compare', '--data', images, '--model', 'resnet20_cifar', '--out', str(tmp_path / 'out'), '--cpu']
    assert main([*command, *options]) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1
    assert says in error[0]
    assert not (tmp_path / 'out').exists()


# ---- statistics ----


def row(name, *accuracies, kind='block', **more):
    costs = {'parameters': 272474, 'macs': 41.4e6, 'ms_per_image': 1.0, 'time_ratio': 1.25, 'kept_ratio': 1.5}
    return {
        'name': name, 'kind': kind, 'block': name, **costs,
        'accuracies': {str(seed): value for seed, value in enumerate(accuracies)}, **more,
    }  # fmt: skip


def test_one_seed_has_no_deviation():
    text = format_comparison({**judge([row('none', 90.0), row('se', 91.0)], 'none'), 'reference': 'none'})
    assert '±' not in text
    assert 'standard deviation over the seeds;' not in text


def test_statistics_by_hand():
    result = judge([row('found', 90, 91, 92), row('se', 88, 90), row('none', 80), row('cbam', 1, 4, 4)], 'found')
    found, se, none, cbam = result['candidates']
    assert (found['mean'], found['spread'], found['min'], found['max']) == (91, 1, 90, 92)
    assert [found[key] for key in ('difference', 'interval', 'p', 'p_adjusted')] == [None] * 4
    # Over the seeds 0 and 1: -2 and -1. The quantile of t with one degree of freedom, 12.706, is tan(0.475 pi).
    assert (se['difference'], none['difference'], none['interval'], none['p']) == (-1.5, -10, None, None)
    assert se['spread'] == pytest.approx(statistics.stdev([88, 90]))
    half = 0.5 * math.tan(0.475 * math.pi)
    assert se['interval'] == pytest.approx([-1.5 - half, -1.5 + half])
    assert se['p'] == pytest.approx(1 - 2 * math.atan(3) / math.pi)
    # With two degrees of freedom the distribution function is closed, too: t = 264 / 2 with differences 89, 87, 88.
    t = 88 / (1 / math.sqrt(3))
    assert cbam['p'] == pytest.approx(1 - t / math.sqrt(2 + t * t), rel=1e-6)
    # Holm over the three baselines, one of which could not be tested.
    assert cbam['p_adjusted'] == pytest.approx(3 * cbam['p'])
    assert (se['p_adjusted'], none['p_adjusted']) == (pytest.approx(2 * se['p']), None)
    assert json.loads(json.dumps(result)) == result
    seeds = [
        'To be shown, a difference must exceed its standard deviation over the seeds 4.4 times with these 3 seeds, '
        '1.8 times with 5 (the largest difference of 3 comparisons).',
        'To show a difference of 0.5 points with probability 80 % at the observed spread, a rough estimate from few '
        'seeds: se 24 seeds (21 more).',
    ]
    alone = 'none is 10.00 points below found on one seed, which cannot tell a difference from chance.'
    assert result['verdicts'] == [
        'se is 1.50 points below found (95 % interval -7.85 to +4.85, p = 0.410): no difference is shown.',
        alone,
        'cbam is 88.00 points below found (95 % interval -90.48 to -85.52, p < 0.001): a difference beyond chance.',
        *seeds,
    ]
    decided = 'Differ from found beyond chance: cbam (-88.00). Undecided, no difference is shown: se (-1.50).'
    assert result['summary'] == ' '.join([decided, alone, *seeds])
    # The interval of a mean: the quantile of t with one degree of freedom, times the deviation over the root of 2.
    around = math.tan(0.475 * math.pi)
    assert se['mean_interval'] == pytest.approx([89 - around, 89 + around])
    assert none['mean_interval'] is None
    text = format_comparison({**result, 'images': 400, 'reference': 'found'})
    assert '±' in text
    lines = text.splitlines()
    assert [line.split()[0] for line in lines[2:6]] == ['found', 'se', 'none', 'cbam']
    assert lines[3].split() == [
        'se', '89.00', '±', '1.41', '76.29', 'to', '101.71', '2', '-1.50', '-7.85', 'to', '+4.85', '0.410', '272,474',
        '41.4', 'M', '1.00', '1.25', '-', '1.50',
    ]  # fmt: skip
    assert lines[5].split()[12] == '<0.001'
    assert 'of 400 images (one image is 0.25 points)' in '\n'.join(lines)
    assert len({len(line) for line in lines[:6]}) == 1


@pytest.mark.parametrize(
    ('reference', 'other', 'says'),
    [
        (
            (90, 91, 92),
            (87.1, 88, 88.9),
            r'se is 3\.00 points below none \(.*, p < 0\.001\): a difference beyond chance',
        ),
        ((90, 91, 92), (93, 94, 95.2), r'se is 3\.07 points above none \(.*\): a difference beyond chance'),
        ((90, 91, 92), (89, 91, 90), r'se is 1\.00 points below none \(.*\): no difference is shown'),
        ((90, 91, 92), (91, 91, 91), r'se is level with none \(.*, p = 1\.000\): no difference is shown'),
        ((90,), (90, 91), 'se is level with none on one seed, which cannot tell'),
        ((90, 91), (94, 95), r'se is 4\.00 points above none on each of 2 seeds: .* nothing is decided'),
        ((34.6, 34.6, 34.6), (33, 33, 33), r'se is 1\.60 points below none on each of 3 seeds: .* nothing is decided'),
        (
            (90.3, 91.1, 92),
            (89.3, 90.1, 91),
            r'se is 1\.00 points below none on each of .* nothing is decided',
        ),
        ((90, 91, 92), (90, 91, 92), r'se is level with none on each of 3 seeds\.'),
    ],
)
def test_verdicts(reference, other, says):
    verdict, *_ = judge([row('none', *reference), row('se', *other)], 'none')['verdicts']
    assert re.match(says, verdict)


@pytest.mark.parametrize(
    ('accuracies', 'says'),
    [
        ([(90,), (80,)], 'One seed decides nothing. To be shown, .* 1.2 times with 5 .*one comparison\\)'),
        ([(90, 91), (80, 85), (70, 77)], 'Two seeds decide hardly anything. .* 18.0 times with these 2 seeds'),
        (
            [(90, 91, 92, 93, 94, 95), (90, 91, 92, 93, 94, 96)],
            '.* 1.0 times .* 6 seeds, 0.6 times with 12',
        ),
        ([(90, 91, 92), (80, 81, 82.1)], None),
        ([(90, 91, 92), ()], None),
    ],
)
def test_what_the_seeds_can_show(accuracies, says):
    found, *others = accuracies
    rows = [row('found', *found), *(row(f'b{i}', *values) for i, values in enumerate(others))]
    about_seeds = [verdict for verdict in judge(rows, 'found')['verdicts'] if 'To be shown' in verdict]
    assert len(about_seeds) == (says is not None)
    assert says is None or re.match(says, about_seeds[0])


def claims(rng, runs, seeds, baselines, ahead=0.0, steps=None, spreads=1.0, shared=0.0):
    """How many of the evaluations call the found block different from a baseline, and the share of such verdicts.

    Accuracies are normal, the found block ``ahead`` by so many standard deviations, with a part that a seed gives to
    all blocks, and come in steps of one image where ``steps`` says how many of them a standard deviation is.
    """
    own = rng.standard_normal((runs, baselines + 1, seeds)) * np.reshape(spreads, (-1, 1))
    accuracies = own + shared * rng.standard_normal((runs, 1, seeds))
    accuracies[:, 0] += ahead
    if steps is not None:
        accuracies = np.round(accuracies * steps) / steps
    p, low, high = paired_test(accuracies[:, 1:] - accuracies[:, :1])
    assert ((low > 0) | (high < 0))[p < 0.05].all()
    shown = holm(p) <= 0.05
    return shown.any(-1).mean(), shown.mean()


@pytest.mark.parametrize('seeds', [3, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 5))])
def test_claims_where_nothing_is_to_be_found(seeds):
    """At most one evaluation in twenty claims something, for any steps of the accuracies and spreads of the blocks."""
    rng, runs = np.random.default_rng(seeds), 20_000
    slack = 3 * math.sqrt(0.05 * 0.95 / runs)
    cases = [
        {}, {'baselines': 1}, {'steps': 0.3}, {'steps': 1}, {'steps': 4}, {'steps': 1, 'baselines': 1}, {'shared': 2.0},
        {'spreads': [0.1, 1, 1, 1, 1, 1]}, {'spreads': [1, 1, 1, 1, 1, 0.1]}, {'spreads': [1, 9], 'baselines': 1},
    ]  # fmt: skip
    rates = [claims(rng, runs, **{'seeds': seeds, 'baselines': 5, **case})[0] for case in cases]
    assert max(rates) < 0.05 + slack
    # Without a reason for caution, the rate is the nominal one.
    assert rates[1] > 0.05 - slack
    assert rates[0] > 0.03


def test_claims_where_there_is_something_to_be_found():
    rng = np.random.default_rng(0)
    power = {seeds: claims(rng, 4000, seeds, 5, ahead=3.0)[1] for seeds in (2, 3, 5, 8)}
    assert power[2] < 0.1 < power[3] < 0.3 < 0.7 < power[5] < 0.9 < power[8]
    # A part that a seed adds to all blocks does no harm, because they are compared seed by seed.
    assert claims(rng, 4000, 5, 5, ahead=3.0, shared=5.0)[1] > 0.7


def test_verdicts_of_evaluations_where_nothing_is_to_be_found():
    rng, runs = np.random.default_rng(1), 120
    wrong = 0
    for _ in range(runs):
        found, *others = np.round(5 * rng.standard_normal((6, 3)), 1) + 90
        rows = [row('found', *found), *(row(f'b{i}', *values) for i, values in enumerate(others))]
        wrong += any('beyond' in verdict for verdict in judge(rows, 'found')['verdicts'])
    assert wrong <= 13  # at a rate of 5 %, one case in 300 has more than 13 of 120
