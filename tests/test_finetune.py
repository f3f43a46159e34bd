"""Training with inserted attention: its own rate, frozen epochs, and a checkpoint that says what was inserted."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from test_data import make_images
from test_train import SMALL, STEPS, assert_same, assert_same_run
from timm.scheduler import CosineLRScheduler

from sase_blocks import insert
from sase_blocks.checkpoint import read_checkpoint, save_checkpoint
from sase_blocks.networks import NetworkConfig, build_network, load_model
from sase_blocks.train import TrainConfig, make_optimizer, train

pytestmark = pytest.mark.usefixtures('one_thread')

ROOT = Path(__file__).parents[1]
NETWORK = {'model': 'test_efficientnet', 'model_args': {'drop_rate': 0.2}, 'img_size': 32, 'insert': 'cbam'}


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    return str(make_images(tmp_path_factory.mktemp('images'), train=7, val=3, classes=('cat', 'dog')))


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    """Weights of other classes and without attention, as of a pretrained network."""
    torch.manual_seed(1)
    file = tmp_path_factory.mktemp('weights') / 'plain.pth'
    torch.save(timm.create_model(NETWORK['model'], num_classes=5).state_dict(), file)
    return str(file)


@pytest.fixture
def config(images, weights, tmp_path):
    settings = {**SMALL, **NETWORK, 'lr': 0.05, 'checkpoint': weights}
    return TrainConfig(data=images, out=str(tmp_path / 'run'), **settings)


def interrupt_at(monkeypatch, step):
    """Ctrl-C at a step."""
    real = CosineLRScheduler.step_update

    def step_update(self, number):
        if number == step:
            raise KeyboardInterrupt
        real(self, number)

    monkeypatch.setattr(CosineLRScheduler, 'step_update', step_update)


def is_trained_first(name):
    return 'inserted_attention' in name or name.startswith('classifier.')


@pytest.mark.parametrize(
    ('settings', 'expected'),
    [
        ({}, {f'blocks.{i}.0.inserted_attention' for i in (1, 2, 3, 4)}),
        ({'insert': 'se(reduction=4)', 'where': 'blocks.3.*', 'start': 'paper'}, {'blocks.3.0.inserted_attention'}),
        ({'insert': 'avg,conv3,affine,p_norm,avg,conv7x7', 'stages': (3,)}, {'blocks.2.0.inserted_attention'}),
        pytest.param(
            {'model': 'test_vit', 'where': 'blocks.1', 'layout': 'tokens+1'},
            {'blocks.1.inserted_attention'},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_checkpoint_alone_rebuilds_its_network(config, settings, expected, capsys):
    config = replace(config, checkpoint=None, epochs=1, **settings)
    result = train(config)
    out = capsys.readouterr().out
    assert f"{config.insert} (start='{config.start}') in " in out
    for name in ('last.pt', 'best.pt'):
        file = Path(config.out, name)
        trained = load_model(file)
        found = {key[: key.index('attention') + 9] for key in trained.report.loaded if 'inserted_attention' in key}
        assert found == expected
        assert (trained.classes, trained.model.training) == (['cat', 'dog'], False)
        assert trained.config == NetworkConfig(
            **{key: getattr(config, key) for key in NetworkConfig.__dataclass_fields__}
        )
        assert_same(dict(trained.model.state_dict()), dict(read_checkpoint(file)['state_dict']))
        by_hand = timm.create_model(config.model, num_classes=2, **({'img_size': 32} if 'vit' in config.model else {}))
        stages = config.stages and tuple(config.stages)
        insert(
            by_hand,
            config.insert,
            config.where,
            config.start,
            stages=stages,
            layout=config.layout,
            input_size=(3, 32, 32),
        )
        by_hand.load_state_dict(read_checkpoint(file)['state_dict'])
        x = torch.randn(2, 3, 32, 32)
        assert torch.equal(by_hand.eval()(x), trained.model(x))
    assert train(replace(config, resume=True))['history'] == result['history']


def test_weights_with_another_insertion_are_named(config):
    """A run starts from one with the same insertion or without any."""
    train(replace(config, epochs=1))
    for block, says in [
        (None, "keys not in the model: .*it was trained with insert='cbam', and here it is None"),
        ('se', "it was trained with insert='cbam', and here it is 'se'"),
    ]:
        with pytest.raises(ValueError, match=says):
            train(replace(config, insert=block, checkpoint=f'{config.out}/last.pt', out=f'{config.out}2'))
    train(replace(config, checkpoint=f'{config.out}/last.pt', out=f'{config.out}2', epochs=1))


def test_the_average_is_loaded_if_the_run_kept_one(config):
    config = replace(config, epochs=1, ema_decay=0.5)
    train(config)
    saved = read_checkpoint(Path(config.out, 'last.pt'))
    loaded = load_model(Path(config.out, 'last.pt'))
    assert_same(dict(loaded.model.state_dict()), dict(saved['state_dict_ema']))
    assert not torch.equal(saved['state_dict']['conv_stem.weight'], saved['state_dict_ema']['conv_stem.weight'])
    assert loaded.report.entry == 'state_dict_ema'


def test_a_checkpoint_from_before_insertion_still_loads(config, tmp_path):
    """Of a version that knew no insertion."""
    config = replace(config, insert=None, epochs=1)
    train(config)
    saved = read_checkpoint(Path(config.out, 'last.pt'))
    old = {k: v for k, v in saved['config'].items() if k not in ('insert', 'where', 'stages', 'start', 'layout')}
    del old['insert_lr'], old['freeze_epochs']
    save_checkpoint({**saved, 'config': old}, Path(config.out, 'last.pt'))
    assert load_model(Path(config.out, 'last.pt')).config.insert is None
    assert train(replace(config, resume=True))['epochs'] == 1


def plain(state):
    return {name: value for name, value in state.items() if 'inserted_attention' not in name}


@pytest.mark.parametrize(
    ('harm', 'says'),
    [
        (lambda saved: saved['state_dict'], 'is not a checkpoint of `sase-blocks train`'),
        (lambda saved: {**saved, 'config': {'model': 'resnet18'}}, 'is not a checkpoint of `sase-blocks train`'),
        (lambda saved: {**saved, 'data': 'cats'}, 'is not a checkpoint of `sase-blocks train`'),
        (lambda saved: {**saved, 'config': {**saved['config'], 'insert': None}}, 'keys not in the model'),
        (lambda saved: {**saved, 'config': {**saved['config'], 'insert': 'sasse'}}, "Did you mean 'sase'"),
        (lambda saved: {**saved, 'config': {**saved['config'], 'model': 5}}, 'its network cannot be built'),
        (lambda saved: {**saved, 'config': {**saved['config'], 'model_args': 5}}, 'its network cannot be built'),
        (lambda saved: {**saved, 'config': {**saved['config'], 'img_size': 'x'}}, 'its network cannot be built'),
        (
            lambda saved: {
                **saved,
                'state_dict': {k: v for k, v in saved['state_dict'].items() if 'inserted' not in k},
            },
            'it holds none of the inserted attention',
        ),
    ],
)
def test_wrong_checkpoint(tmp_path, harm, says):
    settings = {**NETWORK, 'where': None, 'stages': None, 'start': 'identity', 'layout': None, 'pretrained': False}
    model, _ = build_network(NetworkConfig(**settings), 2)
    data = {'classes': ['cat', 'dog']}
    save_checkpoint(harm({'state_dict': model.state_dict(), 'config': settings, 'data': data}), tmp_path / 'a.pt')
    with pytest.raises(ValueError, match=says) as caught:
        load_model(tmp_path / 'a.pt')
    assert 'a.pt' in str(caught.value)


# ---- frozen epochs, and a rate of their own ----


@pytest.mark.parametrize(
    'settings', [{}, {'opt': 'adamw', 'lr': 1e-3, 'weight_decay': 0.1, 'ema_decay': 0.9}], ids=['sgd', 'adamw']
)
def test_frozen_epochs_train_the_attention_and_the_classifier_alone(config, weights, capsys, settings):
    """Bit for bit, and neither weight decay nor batch norm's statistics reach the rest."""
    before = torch.load(weights, weights_only=True)
    config = replace(config, freeze_epochs=2, warmup=0.0, **settings)

    def moved():
        saved = read_checkpoint(Path(config.out, 'last.pt'))
        for key in ('state_dict', 'state_dict_ema'):
            state = saved.get(key, saved['state_dict'])
            same = {name for name, value in before.items() if torch.equal(value, state[name])}
            yield saved['epoch'], before.keys() - same, state

    train(replace(config, epochs=2))
    out = capsys.readouterr().out
    assert 'epochs 1 to 2 train only the classifier and the inserted blocks: ' in out
    for epoch, names, state in moved():
        assert epoch == 2
        assert names
        assert all(map(is_trained_first, names))
        assert state['blocks.1.0.inserted_attention.alpha'] != 0
        # The attention's own batch norm is not frozen.
        assert any('running_mean' in name and value.any() for name, value in state.items() if 'inserted' in name)
    train(replace(config, out=f'{config.out}3', epochs=3))
    config = replace(config, out=f'{config.out}3')
    for _, names, _ in moved():
        assert {'conv_stem.weight', 'bn1.running_mean', 'bn1.weight', 'classifier.weight'} <= names


@pytest.mark.parametrize(
    ('step', 'settings'),
    [
        (STEPS + 1, {'freeze_epochs': 2, 'insert_lr': 0.2}),
        (2 * STEPS + 1, {'freeze_epochs': 2, 'opt': 'adamw', 'lr': 1e-3, 'ema_decay': 0.9}),
        pytest.param(STEPS + 1, {'freeze_epochs': 1, 'mixed_precision': 'bf16'}, marks=pytest.mark.slow),
        pytest.param(STEPS + 1, {'freeze_epochs': 3, 'insert': None}, marks=pytest.mark.slow),
    ],
    ids=['inside', 'after', 'at the end', 'classifier alone'],
)
def test_interrupted_run_with_frozen_epochs_resumes_to_the_same_weights(config, monkeypatch, step, settings):
    whole = replace(config, **settings)
    train(whole)
    again = replace(whole, out=f'{config.out}2', resume=True)
    with monkeypatch.context() as context:
        interrupt_at(context, step)
        with pytest.raises(KeyboardInterrupt):
            train(again)
    assert read_checkpoint(Path(again.out, 'last.pt'))['epoch'] == step // STEPS
    train(again)
    assert_same_run(whole, again)


@pytest.mark.parametrize('opt', ['sgd', 'adamw'])
def test_the_new_parameters_have_their_own_rate(config, opt):
    config = replace(config, opt=opt, lr=0.1, insert_lr=0.4)
    model, inserted = build_network(config, 2)
    optimizer = make_optimizer(config, model, inserted.parameters, config.insert_lr)
    new = {id(p) for p in inserted.parameters}
    groups = [({id(p) in new for p in group['params']}, group['weight_decay'] > 0) for group in optimizer.param_groups]
    assert groups == [({False}, False), ({False}, True), ({True}, False), ({True}, True)]
    counts = [len(group['params']) for group in optimizer.param_groups]
    assert (sum(counts), sum(counts[2:])) == (len(list(model.parameters())), len(new))
    scheduler = CosineLRScheduler(optimizer, 20, warmup_t=5, warmup_lr_init=0.02, t_in_epochs=False)
    for step in range(20):
        scheduler.step_update(step)
        rates = [group['lr'] for group in optimizer.param_groups]
        assert rates == pytest.approx([rates[0], rates[0], 4 * rates[0], 4 * rates[0]])
    row = train(config)['history'][1]
    assert row['insert_lr'] == pytest.approx(4 * row['lr'])


@pytest.mark.parametrize(
    ('settings', 'says'),
    [
        ({'insert': None, 'where': 'layer*'}, 'where must be left at None without insert'),
        ({'insert': None, 'stages': [3]}, r'stages must be left at None without insert, got \[3\]'),
        ({'insert': None, 'start': 'paper'}, "start must be left at 'identity' without insert"),
        ({'insert': None, 'layout': 'NCHW'}, 'layout must be left at None without insert'),
        ({'insert': None, 'insert_lr': 0.1}, 'insert_lr must be left at None without insert'),
        ({'start': 'papr'}, "start must be one of .*'paper'.*got 'papr'"),
        ({'insert_lr': 0.0}, r'insert_lr must be above 0, got 0\.0'),
        ({'freeze_epochs': -1}, 'freeze_epochs must be at least 0'),
        ({'freeze_epochs': 4}, 'freeze_epochs must be at most epochs, 3, got 4'),
        ({'freeze_epochs': 1, 'checkpoint': None}, 'freeze_epochs must be left at 0 for an untrained model'),
        ({'insert': 'sasse'}, "unknown attention block 'sasse'. Did you mean 'sase'"),
        ({'insert': 'se(rd=4)'}, "se has no option 'rd'"),
        ({'where': 'layer9*'}, 'layer9'),
        ({'stages': [9]}, '9'),
        ({'layout': 'NWHC'}, 'NWHC'),
        ({'insert': 'simam', 'start': 'paper', 'insert_lr': 0.1}, 'the inserted block has no parameters'),
    ],
)
def test_wrong_setting_is_refused_before_any_work(config, settings, says):
    with pytest.raises(ValueError, match=says):
        train(replace(config, **settings))
    assert not list(Path(config.out).glob('*'))


def test_other_insertion_is_not_resumed(config):
    train(replace(config, epochs=1))
    for settings, says in [
        ({'insert': 'se'}, "insert was 'cbam' and is 'se'"),
        ({'stages': [3, 4]}, r'stages was None and is \[3, 4\]'),
        ({'insert_lr': 0.3}, r'insert_lr was None and is 0\.3'),
        ({'freeze_epochs': 1}, 'freeze_epochs was 0 and is 1'),
    ]:
        with pytest.raises(ValueError, match=says):
            train(replace(config, epochs=1, resume=True, **settings))


@pytest.mark.slow
def test_two_processes_equal_one_with_frozen_epochs(images, tmp_path):
    """torchrun with gloo against one process with the same global batch; the model has no batch norm."""
    torch.manual_seed(1)
    torch.save(timm.create_model('test_efficientnet_ln').state_dict(), tmp_path / 'plain.pth')
    settings = {'model': 'test_efficientnet_ln', 'img_size': 32, 'insert': 'se', 'insert_lr': 0.02, 'freeze_epochs': 1}
    settings |= {'epochs': 3, 'batch_size': 4, 'lr': 0.005, 'checkpoint': str(tmp_path / 'plain.pth')}
    settings |= {'data': images, 'workers': 0}
    options = [text for key, value in settings.items() for text in (f'--{key.replace("_", "-")}', str(value))]
    launch = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2']
    launch += ['-m', 'sase_blocks', 'train', *options, '--cpu', '--no-tensorboard', '--out', str(tmp_path / 'two')]
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'GLOO_SOCKET_IFNAME': 'lo', 'PYTHONPATH': str(ROOT)}
    two = subprocess.run(launch, env=environment, capture_output=True, text=True)
    assert two.returncode == 0, two.stderr
    one = train(TrainConfig(**settings, cpu=True, tensorboard=False, out=str(tmp_path / 'one')))
    left, right = (read_checkpoint(tmp_path / name / 'last.pt')['state_dict'] for name in ('one', 'two'))
    start = torch.load(tmp_path / 'plain.pth', weights_only=True)
    moved = max((left[k] - start[k]).abs().max().item() for k in start if left[k].shape == start[k].shape)
    assert moved > 1e-3, 'the comparison needs weights that moved'
    torch.testing.assert_close(left, right, atol=1e-6, rtol=0)
    theirs = json.loads((tmp_path / 'two/metrics.jsonl').read_text().splitlines()[-1])
    assert one['history'][-1]['val_loss'] == pytest.approx(theirs['val_loss'], abs=1e-5)
