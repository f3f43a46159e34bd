"""The SASE search: a resumed run ends with the bits of an uninterrupted one, two processes with the numbers of one."""

import json
import math
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from test_data import disguise, make_images, swap, truncate

from sase_blocks import runs
from sase_blocks.blocks import Genotype
from sase_blocks.checkpoint import read_checkpoint, save_checkpoint
from sase_blocks.search.sase import bilevel, searching
from sase_blocks.search.sase.bilevel import VirtualStep, logits_gradient
from sase_blocks.search.sase.config import SearchConfig
from sase_blocks.search.sase.diagnostics import (
    dead_operations,
    describe_edges,
    hessian_eigenvalue,
    noise_leads,
    verdict_of,
    warnings_of,
)
from sase_blocks.search.sase.network import SearchNetwork
from sase_blocks.search.sase.result import read_result
from sase_blocks.search.sase.searching import search
from sase_blocks.search.sase.space import SearchSpace
from sase_blocks.search.sync_batch_norm import synchronize_norms

pytestmark = pytest.mark.usefixtures('one_thread')

ROOT = Path(__file__).parents[1]
SPACE = (
    'channel_squeeze=avg,l2_norm; channel_excite=conv3,mlp(reduction=4); gate_excite=affine,conv3; '
    'gated_squeeze=p_norm,avg_std; spatial_squeeze=avg,avg_max; spatial_excite=conv3x3,affine'
)
CLASSES = ('dark', 'light', 'striped')
SMALL = {
    'data': '',
    'space': SPACE,
    # With 4 channels oneDNN's strided 1x1 convolution (AVX2, channels last) writes beyond its memory, and from 8 to 8
    # its result differs.
    'model_args': {'layers': [1, 1, 1], 'channels': [8, 16, 16], 'drop_rate': 0.1},
    'img_size': 12,
    'epochs': 2,
    'batch_size': 8,
    'lr': 0.05,
    'arch_lr': 0.01,
    'workers': 0,
    'cpu': True,
    'tensorboard': False,
    'save_minutes': 1e-9,  # at every read of the losses
}
STEPS = 6  # an epoch: 48 images for the weights


def pictures() -> tuple[torch.Tensor, torch.Tensor, tuple[str, ...]]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(96) % 3
    images = torch.randint(0, 60, (96, 3, 12, 12), generator=generator)
    images += 120 * (labels == 1)[:, None, None, None]
    images[labels == 2, :, ::2] += 150
    return images.to(torch.uint8), labels, CLASSES


@pytest.fixture
def config(tmp_path):
    return SearchConfig(out=str(tmp_path / 'run'), **SMALL)


@pytest.fixture
def look_often(monkeypatch):
    monkeypatch.setattr(runs, 'LOSS_CHECK_STEPS', 2)


# ---- the loop ----


def test_what_a_search_leaves(config, look_often, capsys):
    result = search(replace(config, tensorboard=True), pictures())
    out = Path(config.out)
    rows = [json.loads(line) for line in (out / 'metrics.jsonl').read_text().splitlines()]
    assert [row['epoch'] for row in rows] == [1, 2]
    assert rows[-1]['step'] == 2 * STEPS
    assert rows[-1]['train_loss'] < rows[0]['train_loss']
    assert rows[0]['lr'] == config.lr
    assert all(math.isfinite(row['hessian']) for row in rows)
    assert 0 <= rows[-1]['held_out_acc1'] <= 100
    with np.load(out / 'alphas.npz') as file:
        logits, labels = file['logits'], file['labels'].tolist()
    assert logits.shape == (3, 1, 12)
    assert labels == SearchSpace.parse(SPACE).labels
    assert np.abs(logits[0]).max() < 0.01 < np.abs(logits[-1] - logits[0]).max()
    stored = read_result(out)
    assert stored == json.loads(json.dumps(result))
    assert stored['genotype'] == str(SearchSpace.parse(SPACE).genotype(torch.tensor(logits[-1, 0])))
    assert stored['seed'] == 0
    assert stored['data']['classes'] == list(CLASSES)
    assert {path.name for path in out.iterdir()} == {
        'alphas.npz', 'genotype.json', 'genotype.png', 'last.pt', 'logits.png', 'metrics.jsonl', 'tensorboard',
    }  # fmt: skip
    model = timm.create_model('resnet50_sase', genotype=str(out / 'genotype.json'), img_size=64, num_classes=3)
    assert str(model.layer1[0].se.genotype) == stored['genotype']
    said = capsys.readouterr().out
    assert '3 mixed blocks' in said
    assert 'epoch 2/2' in said
    space = SearchSpace.parse(SPACE)
    described = describe_edges(space, torch.tensor(logits[-1, 0]), noise_leads(space, 1, 2 * STEPS, config.arch_lr))
    assert {edge: state['decided'] for edge, state in rows[-1]['edges'][''].items()} == {
        edge: state['decided'] for edge, state in described.items()
    }
    assert stored['verdict'] == verdict_of([described])
    assert f'{sum(state["decided"] for state in described.values())} of 6 edges decided' in said


@pytest.mark.parametrize(
    'changes',
    [
        pytest.param({'order': '2'}, marks=pytest.mark.slow),
        pytest.param({'order': '2-fd'}, marks=pytest.mark.slow),
        pytest.param({'per_stage': True}, marks=pytest.mark.slow),
        pytest.param({'paper_mixing': True, 'arch_every': 4}, marks=pytest.mark.slow),
        pytest.param({'null': True, 'channels_last': True, 'form': 'plain', 'clip_grad': None}, marks=pytest.mark.slow),
        pytest.param({'mixed_precision': 'bf16', 'deterministic': True}, marks=pytest.mark.slow),
        pytest.param({'space': 'extended', 'order': '2'}, marks=pytest.mark.slow),
    ],
    ids=lambda changes: ','.join(changes),
)
def test_settings(config, changes):
    result = search(replace(config, **{'epochs': 1, 'hessian_every': 0, **changes}), pictures())
    assert not torch.are_deterministic_algorithms_enabled()  # the setting ends with its run
    sets = 3 if 'per_stage' in changes else 1
    assert len(result['genotypes']) == sets
    for text in result['genotypes']:
        Genotype.parse(text)
    if sets == 3:
        model = timm.create_model('resnet20_cifar', genotype=f'{config.out}/genotype.json')
        assert [str(getattr(model, f'layer{i}')[0].se.genotype) for i in (1, 2, 3)] == result['genotypes']
        with pytest.raises(ValueError, match='3 genotypes, one for each stage, for a network of 4 stages'):
            timm.create_model('resnet50_sase', genotype=f'{config.out}/genotype.json')


@pytest.mark.slow
def test_the_memory_format_changes_nothing(config):
    changes = {'epochs': 1, 'hessian_every': 0, 'mixed_precision': 'no'}
    rows, last = (
        search(replace(config, **changes, channels_last=c, out=f'{config.out}{c}'), pictures()) for c in (False, True)
    )
    torch.testing.assert_close(torch.tensor(last['logits']), torch.tensor(rows['logits']), rtol=0, atol=1e-3)


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore::UserWarning', 'ignore::DeprecationWarning')  # from dynamo
def test_compiled(config):
    """The same search within rounding. What compiled code cannot measure runs eagerly."""
    changes = {'epochs': 1, 'hessian_every': 1}
    eager = search(replace(config, **changes), pictures())
    compiled = search(replace(config, **changes, compile=True, out=config.out + '2'), pictures())
    torch.testing.assert_close(torch.tensor(compiled['logits']), torch.tensor(eager['logits']), rtol=0, atol=1e-3)
    rows = [json.loads((Path(o) / 'metrics.jsonl').read_text()) for o in (config.out, config.out + '2')]
    assert rows[0]['dead'] == rows[1]['dead']
    assert rows[1]['hessian'] == pytest.approx(rows[0]['hessian'], rel=0.05)


@pytest.mark.slow
def test_another_network(config):
    """Any network that insertion supports, at its own size."""
    changes = {'model': 'test_resnet', 'model_args': {}, 'img_size': 32, 'epochs': 1, 'hessian_every': 0}
    assert Genotype.parse(search(replace(config, **changes), pictures_of(32))['genotype'])


def pictures_of(size):
    images, labels, classes = pictures()
    return F.interpolate(images.float(), size=size).to(torch.uint8), labels, classes


@pytest.mark.parametrize(
    ('size', 'channels'),
    [
        pytest.param(12, 1, id='grey, in memory', marks=pytest.mark.slow),
        pytest.param(72, 3, id='by loading processes', marks=pytest.mark.slow),
    ],
)
def test_images_from_files(config, tmp_path, size, channels, look_often):
    """File names are not UTF-8. The same names and counts with other images are other data."""
    data = disguise(make_images(tmp_path / 'images', train=6, val=1, classes=('cat', 'dog')))
    changes = {'data': str(data), 'img_size': size, 'batch_size': 2, 'hessian_every': 0, 'epochs': 1}
    config = replace(config, model_args={**config.model_args, 'in_chans': channels}, **changes)
    result = search(config)
    assert result['data']['weights'] == result['data']['held_out'] == 6
    assert result['data']['classes'] == read_result(config.out)['data']['classes'] == ['c\udce4t', 'dog']
    again = search(replace(config, out=config.out + '2'))
    assert again['logits'] == result['logits']
    swap(data / 'train' / 'dog')
    with pytest.raises(ValueError, match='holds a search on other data'):
        search(replace(config, resume=True))


def test_images_of_other_channels_than_the_models(config, tmp_path):
    data = str(make_images(tmp_path / 'images', train=6, val=1, classes=('cat', 'dog')))
    with pytest.raises(ValueError, match='the model takes images of 2 channels; image files have 1'):
        search(replace(config, data=data, model_args={**config.model_args, 'in_chans': 2}))
    with pytest.raises(ValueError, match='the images have 3 channels, the model takes 1'):
        search(replace(config, model_args={**config.model_args, 'in_chans': 1}), pictures())


# ---- faults ----


@pytest.fixture(scope='session')
def processes():
    """Processes that start from one with everything imported."""
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(
        [
            'sase_blocks.search.sase.searching',
            'sase_blocks.viz',
            'accelerate',
            'torch.utils.tensorboard',
            'matplotlib.pyplot',
        ]
    )
    return context


def _searching(config, delay):
    torch.set_num_threads(1)
    runs.LOSS_CHECK_STEPS = 2
    if delay is not None:
        threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
    search(config, pictures())


@pytest.mark.slow
def test_killed_at_any_moment(config, processes):
    """After a dozen SIGKILLs, a run ends with the bits, the log and the files of an undisturbed one."""
    config = replace(config, resume=True, epochs=3)
    rng = random.Random(0)
    kills = 0
    while kills < 12:
        # At a moment in or around the loop. A run that is through by then starts again.
        process = processes.Process(target=_searching, args=(config, rng.uniform(0.05, 2.0)))
        process.start()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        if process.exitcode == 0:
            for path in Path(config.out).iterdir():
                path.unlink()
    process = processes.Process(target=_searching, args=(config, None))
    process.start()
    process.join()
    assert process.exitcode == 0
    whole = replace(config, out=config.out + '-whole', resume=False)
    process = processes.Process(target=_searching, args=(whole, None))
    process.start()
    process.join()

    a, b = (read_checkpoint(Path(c.out) / 'last.pt') for c in (config, whole))
    assert a['step'] == b['step'] == 3 * STEPS
    for part in ('network', 'optimizer', 'arch', 'logits_history'):
        torch.testing.assert_close(a[part], b[part], rtol=0, atol=0)
    rows = [(Path(c.out) / 'metrics.jsonl').read_text().splitlines() for c in (config, whole)]
    for one, two in zip(*rows, strict=True):
        assert {**json.loads(one), 'seconds_per_step': 0} == {**json.loads(two), 'seconds_per_step': 0}
    assert read_result(config.out)['logits'] == read_result(whole.out)['logits']
    assert {p.name for p in Path(config.out).iterdir() if p.suffix != '.tmp'} == {
        p.name for p in Path(whole.out).iterdir()
    }


@pytest.mark.slow
def test_a_second_process_waits_and_finds_it_done(config, processes, twice_at_once):
    """The same command twice at once: one searches, the other waits, and neither disturbs the other."""
    config = replace(config, resume=True)
    twice_at_once(processes, _searching, config, None)
    rows = [json.loads(line) for line in (Path(config.out) / 'metrics.jsonl').read_text().splitlines()]
    assert [row['epoch'] for row in rows] == [1, 2]
    assert not list(Path(config.out).glob('*.tmp'))


@pytest.mark.slow
def test_not_a_number_stops(config, look_often, monkeypatch):
    real = searching.logits_gradient

    def poisoned(network, *args, **kwargs):
        if kwargs['mean'].__self__.step == STEPS + 3:
            with torch.no_grad():
                network.model.fc.weight.fill_(float('nan'))
        return real(network, *args, **kwargs)

    monkeypatch.setattr(searching, 'logits_gradient', poisoned)
    with pytest.raises(FloatingPointError, match=rf'the loss is nan at step {STEPS + 4}; the last good .*last.pt'):
        search(config, pictures())
    saved = read_checkpoint(Path(config.out) / 'last.pt')
    assert all(value.isfinite().all() for value in saved['network'].values())
    assert saved['step'] == STEPS + 2


@pytest.mark.slow
def test_full_disk_keeps_the_last_checkpoint(config, look_often, monkeypatch):
    search(replace(config, epochs=1), pictures())
    before = (Path(config.out) / 'last.pt').read_bytes()

    def full(*args):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr('sase_blocks.checkpoint._Writer.write', full)
    with pytest.raises(OSError, match='No space left'):
        search(replace(config, epochs=1, out=config.out + '2'), pictures())
    monkeypatch.undo()
    assert (Path(config.out) / 'last.pt').read_bytes() == before


@pytest.mark.parametrize(
    ('changes', 'says'),
    [
        ({'epochs': 0}, 'epochs must be at least 1, got 0'),
        ({'lr': 0.0}, 'lr must be above 0, got 0'),
        ({'min_lr': 1.0}, r'min_lr must be at most lr \(0.05\), got 1'),
        ({'fraction': 1.0}, 'fraction must be between 0 and 1, got 1'),
        ({'order': '3'}, "order must be one of .*got '3'"),
        ({'order': '2', 'compile': True}, 'compile must be off for order 2'),
        ({'space': 'channel_squeeze='}, 'channel_squeeze: no operation is left'),
        ({'space': 'channel_squeeze=avg,avg'}, 'avg is in it twice'),
        ({'space': 'chanel=avg'}, "no edge 'chanel'"),
        ({'space': 'gate_excite=mlp(reduction=4),mlp( reduction = 4 )'}, r'mlp\(reduction=4\) is in it twice'),
        ({'space': 'gate_excite=mlp(reduction=4'}, r'\( has no partner in'),
        ({'space': 'gate_excite=mlp(rd=4)'}, "gate_excite: mlp has no option 'rd'; it has reduction"),
        ({'space': 'gate_excite=avg'}, "gate_excite: 'avg' is not a channel excite"),
        ({'space': 'nowhere.json'}, 'the search space file nowhere.json cannot be read: No such file'),
        ({'space': '{}'}, "a search space is 'paper'"),
        ({'space': ''}, "a search space is 'paper'"),
        ({'seed': -1}, r'seed must be at least 0 and below 2\*\*64, got -1'),
        ({'seed': 2**64}, r'seed must be at least 0 and below 2\*\*64'),
        ({'space': '{"a"'}, 'no valid JSON'),
        ({'space': 'all'}, "a search space is 'paper'"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_wrong_settings(config, changes, says):
    with pytest.raises(ValueError, match=says):
        replace(config, **changes)


def without_class(images, labels, classes):
    return images, torch.where(labels == 2, 1, labels), classes


@pytest.mark.parametrize(
    ('changes', 'data', 'says'),
    [
        ({'batch_size': 64}, pictures, '48 training images are fewer than one batch of 64'),
        ({'fraction': 0.95}, pictures, '6 held-out images are fewer than one batch of 8'),
        ({'model': 'resnet20_cifr'}, pictures, 'did you mean resnet20_cifar'),
        ({'model': 'vit_tiny_patch16_224', 'model_args': {}}, pictures, 'fails for an input of'),
        ({}, lambda: without_class(*pictures()), "class 'striped' has 0 training images"),
        ({}, lambda: (pictures()[0].float(), *pictures()[1:]), 'expected uint8 images'),
    ],
    ids=['batch', 'held out', 'name', 'another size', 'empty class', 'float images'],
)
def test_wrong_data(config, changes, data, says):
    with pytest.raises(ValueError, match=says):
        search(replace(config, **changes), data())
    assert not (Path(config.out) / 'last.pt').exists()


@pytest.mark.parametrize(
    ('harm', 'says'),
    [
        (lambda root: truncate(next((root / 'train' / 'cat').iterdir())), 'broken image .*--skip-broken'),
        (lambda root: next((root / 'train' / 'cat').iterdir()).write_bytes(b''), 'broken image'),
        (lambda root: [p.unlink() for p in (root / 'train' / 'cat').iterdir()], 'class folders without an image'),
        (lambda root: os.mkfifo(root / 'train' / 'cat' / 'a.png'), r'a\.png is not a regular file'),
        (lambda root: [p.unlink() for p in list((root / 'train' / 'cat').iterdir())[1:]], 'has 1 training images'),
    ],
    ids=['truncated', 'empty file', 'no image', 'a pipe', 'one image'],
)
def test_wrong_files(config, tmp_path, harm, says):
    data = make_images(tmp_path / 'images', train=6, val=1, classes=('cat', 'dog'))
    harm(data)
    with pytest.raises(ValueError, match=says):
        search(replace(config, data=str(data), batch_size=2))


@pytest.mark.slow
def test_a_folder_of_another_run(config, look_often):
    config = replace(config, epochs=1, hessian_every=0)
    search(config, pictures())
    with pytest.raises(ValueError, match='holds a run already: --resume'):
        search(config, pictures())
    with pytest.raises(ValueError, match=r'arch_lr was 0.01 and is 0.02'):
        search(replace(config, resume=True, arch_lr=0.02), pictures())
    images, labels, classes = pictures()
    with pytest.raises(ValueError, match='holds a search on other data'):
        search(replace(config, resume=True), (images + 1, labels, classes))
    check_damaged(Path(config.out) / 'last.pt', lambda: search(replace(config, resume=True), pictures()), 'network')


def check_damaged(last, resume, weights):
    """A checkpoint that lacks a part, or has a part of another form, gives one line with advice. The file stays."""

    def other_shapes(state):
        return {name: value.new_zeros(2, 3) if value.dim() else value for name, value in state.items()}

    whole = read_checkpoint(last)
    optimizer = whole['optimizer']
    shapes = {number: other_shapes(state) for number, state in optimizer['state'].items()}
    harms = {
        f'no {name}': {key: value for key, value in whole.items() if key != name}
        for name in ('config', 'step', weights)
    }
    harms |= {f'{name} is text': {**whole, name: 'text'} for name in ('data', 'sums', 'step')}
    harms['step is too much'] = {**whole, 'step': 10**6}
    harms['shapes of the weights'] = {**whole, weights: other_shapes(whole[weights])}
    harms['shapes of the optimizer'] = {**whole, 'optimizer': {**optimizer, 'state': shapes}}
    group, *groups = optimizer['param_groups']
    less = {name: value for name, value in group.items() if name != 'momentum'}
    harms['no momentum'] = {**whole, 'optimizer': {**optimizer, 'param_groups': [less, *groups]}}
    texts = {number: dict.fromkeys(state, 'x') for number, state in optimizer['state'].items()}
    harms['states are texts'] = {**whole, 'optimizer': {**optimizer, 'state': texts}}
    harms['settings are empty'] = {**whole, 'config': {}}
    for what, harmed in [*harms.items(), ('nothing', None)]:
        if harmed is None:
            last.write_bytes(b'nothing')
        else:
            save_checkpoint(harmed, last)
        before = last.read_bytes()
        with pytest.raises(ValueError, match=re.escape(str(last))) as caught:
            resume()
        said = str(caught.value)
        assert len(said.replace(str(last.parent), '')) < 600, what
        assert said.endswith('give another --out' if 'config' in what else 'delete it to start over'), what
        assert last.read_bytes() == before


# ---- what is watched ----


def small_network(form='plain', **more):
    model = timm.create_model('resnet20_cifar', layers=(1, 1, 1), channels=(8, 16, 16), num_classes=3)
    return SearchNetwork(model, SearchSpace.parse(SPACE), form=form, input_size=(3, 12, 12), **more)


def small_batch(n=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 12, 12, generator=generator), torch.arange(n) % 3


def test_edges_described():
    space = SearchSpace.parse(SPACE)
    logits = torch.tensor([0.0, math.log(3)] + [0.0] * 10)
    edges = describe_edges(space, logits)
    assert edges['channel_squeeze'] == {
        'leader': 'l2_norm',
        'probability': pytest.approx(0.75),
        'margin': pytest.approx(0.5),
        'entropy': pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(2)),
    }
    assert edges['gate_excite'] == {'leader': 'affine', 'probability': 0.5, 'margin': 0, 'entropy': pytest.approx(1)}


@pytest.mark.slow
def test_hessian_against_differences():
    network = small_network(per_stage=True).double().train()
    x, y = small_batch()
    value = hessian_eigenvalue(network, F.cross_entropy, x.double(), y)
    flat, columns = network.logits.detach().flatten().clone(), []
    for i in range(flat.numel()):
        sides = []
        for sign in (1, -1):
            moved = flat.clone()
            moved[i] += sign * 1e-5
            network.logits.data = moved.view_as(network.logits)
            sides.append(logits_gradient(network, F.cross_entropy, '1', (x.double(), y)).gradient.flatten())
        columns.append((sides[0] - sides[1]) / 2e-5)
    values = torch.linalg.eigvalsh(torch.stack(columns))
    assert value == pytest.approx(float(values[values.abs().argmax()]), rel=1e-4)


def test_dead_operations():
    network = small_network().train()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    block = next(iter(network.blocks.values()))
    block.channel_excite['mlp(reduction=4)'].fc2.weight.data.zero_()
    dead = dead_operations(network, small_batch()[0])
    assert dead['channel_excite.mlp(reduction=4)'] == [next(iter(network.blocks))]
    assert 'spatial_excite.conv3x3' not in dead
    for key, value in network.state_dict().items():
        assert 'mlp(reduction=4).fc2' in key or torch.equal(value, before[key])


@pytest.mark.parametrize(
    ('rows', 'says'),
    [
        ([{'train_loss': math.log(10) + 0.001}], 'stuck at ln(10)'),
        (
            [{'edges': {'': {'gate_excite': {'leader': 'mlp', 'probability': 0.95, 'entropy': 0.1}}}}],
            'mlp dominates with 95 %',
        ),
        ([{'dead': {'channel_squeeze.l2_norm': ['a', 'b']}}], 'channel_squeeze.l2_norm is constant in 2 of 9 blocks'),
        ([{'hessian': h} for h in [1, 1, 1, 1, 1, 2, 2, 2, 2, 2]], 'grew from 1 to 2 within 5 epochs'),
        ([{'hessian': h} for h in [2, 2, 2, 2, 2, 1, 1, 1, 1, 1]], None),
        ([{}], None),
    ],
    ids=['stuck', 'dominant', 'dead', 'hessian', 'falling hessian', 'nothing'],
)  # fmt: skip
def test_warnings(rows, says):
    full = [
        {'epoch': i + 2, 'train_loss': 1.0, 'edges': {}, 'dead': {}, 'blocks': 9, 'hessian': None, **row}
        for i, row in enumerate(rows)
    ]
    found = warnings_of(full, 10)
    assert found == [] if says is None else len(found) == 1 and says in found[0]


# ---- gradients ----


def test_second_order_needs_its_batch():
    network = small_network()
    with pytest.raises(ValueError, match='order 2 needs a training batch'):
        logits_gradient(network, F.cross_entropy, '2', small_batch())
    with pytest.raises(ValueError, match='order must be one of'):
        logits_gradient(network, F.cross_entropy, 'second', small_batch())


@pytest.mark.parametrize('form', ['plain', 'shared'])
def test_exact_second_order_is_the_derivative_of_one_step(form):
    """Against the total derivative of the held-out loss after one real step of SGD, by differences in float64."""
    network = small_network(form, fair=True).double().train()
    weights = network.weights()
    x, y = small_batch(seed=0)
    training, held_out = (x.double(), y), (small_batch(seed=1)[0].double(), y)
    buffers = {name: torch.randn_like(w) * 0.01 for name, w in weights.items()}
    step = VirtualStep(0.05, 0.9, 5e-4, buffers)
    found = logits_gradient(network, F.cross_entropy, '2', held_out, training, step).gradient.flatten()

    def after_a_step(logits):
        network.logits.data = logits.view_as(network.logits)
        with network.statistics_kept():
            grads = bilevel.gradients(F.cross_entropy(network(training[0]), y), list(weights.values()))
            moved = {
                n: (w - 0.05 * (0.9 * buffers[n] + g + 5e-4 * w)).detach()
                for (n, w), g in zip(weights.items(), grads, strict=True)
            }
            return F.cross_entropy(network(held_out[0], moved), y).item()

    flat = network.logits.detach().flatten().clone()
    for i in range(0, 12, 3):
        change = torch.zeros_like(flat)
        change[i] = 1e-5
        difference = (after_a_step(flat + change) - after_a_step(flat - change)) / 2e-5
        assert found[i].item() == pytest.approx(difference, rel=1e-3, abs=1e-9)


def _gradients(rank, world, store, out):
    """Logits and weight gradients of one joint batch, in float64, as this process sees them."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = small_network('shared').double().train()
    part = slice(rank * 8 // world, (rank + 1) * 8 // world)

    def mean(flat):
        return flat

    if world > 1:
        torch.distributed.init_process_group('gloo', f'file://{store}', rank=rank, world_size=world)
        assert synchronize_norms(network.model) > 5

        def mean(flat):
            flat = flat.clone()
            torch.distributed.all_reduce(flat)
            return flat / world

    x, y = small_batch(seed=0)
    training, held_out = (x.double()[part], y[part]), (small_batch(seed=1)[0].double()[part], y[part])
    found = {}
    for order in bilevel.ORDERS:
        step = VirtualStep(0.05, 0.9, 5e-4)
        gradient = logits_gradient(network, F.cross_entropy, order, held_out, training, step, mean=mean).gradient
        found[order] = gradient
    weights = list(network.weights().values())
    grads = torch.autograd.grad(F.cross_entropy(network(training[0]), training[1]), weights)
    found['weights'] = mean(torch.cat([g.flatten() for g in grads]))
    found['statistics'] = torch.cat([b.double().flatten() for b in network.model.buffers()])
    torch.save(found, f'{out}-{rank}.pt')
    if world > 1:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_have_the_gradients_of_one(processes, to_a_good_end, tmp_path):
    _gradients(0, 1, None, tmp_path / 'one')
    places = (tmp_path / 'store', tmp_path / 'two')
    to_a_good_end([processes.Process(target=_gradients, args=(rank, 2, *places)) for rank in (0, 1)])
    one = torch.load(tmp_path / 'one-0.pt')
    for rank in (0, 1):
        two = torch.load(tmp_path / f'two-{rank}.pt')
        for name, value in one.items():
            tolerance = 1e-6 if name == '2-fd' else 1e-9  # its step divides by a small number
            torch.testing.assert_close(two[name], value, rtol=tolerance, atol=tolerance)
    assert torch.equal(torch.load(tmp_path / 'two-0.pt')['2'], torch.load(tmp_path / 'two-1.pt')['2'])


@pytest.mark.slow
def test_two_processes_search_as_one(config, tmp_path):
    """The command under torchrun gives one result, with the logits of one process within rounding."""
    data = make_images(tmp_path / 'images', train=8, val=1, classes=('cat', 'dog'))
    common = [*f'--data {data} --space'.split(), SPACE]
    common += ['--img-size', '12', '--batch-size', '4', '--epochs', '1', '--hessian-every', '0']
    common += ['--lr', '0.01', '--cpu', '--no-tensorboard']
    common += ['--model-args', 'layers=[1,1,1]', 'channels=[8,16,16]']
    launch = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2']
    launch += ['-m', 'sase_blocks', 'search', 'sase', *common, '--out', str(tmp_path / 'two')]
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'GLOO_SOCKET_IFNAME': 'lo'}
    two = subprocess.run(launch, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert two.returncode == 0, two.stderr
    assert '2 process(es)' in two.stdout
    assert two.stdout.count('found: ') == 1
    one = search(
        SearchConfig(
            data=str(data), out=str(tmp_path / 'one'), space=SPACE, img_size=12, batch_size=4, epochs=1, lr=0.01,
            hessian_every=0, cpu=True, tensorboard=False, model_args={'layers': [1, 1, 1], 'channels': [8, 16, 16]},
        )
    )  # fmt: skip
    torch.testing.assert_close(
        torch.tensor(read_result(tmp_path / 'two')['logits']), torch.tensor(one['logits']), rtol=0, atol=1e-3
    )
