"""The TrioNet search from the supernet to the file of a found network: training, scores, limits, errors, resuming."""

import copy
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from test_data import disguise, make_images, swap, truncate
from test_search_run import check_damaged
from torch import nn

from sase_blocks import runs
from sase_blocks.checkpoint import read_checkpoint
from sase_blocks.cli import main
from sase_blocks.demo import run_trionet_demo
from sase_blocks.models import Architecture
from sase_blocks.search.data import split_data
from sase_blocks.search.trionet import (
    SuperNet,
    TrioConfig,
    TrioSpace,
    cost,
    draw,
    hierarchical,
    load_supernet,
    search,
    searching,
    training,
    uniform,
)
from sase_blocks.search.trionet.cost import Costs, bound, macs
from sase_blocks.search.trionet.score import accuracy, recalibrate, resize
from sase_blocks.search.trionet.training import networks_of, sandwich_step

pytestmark = pytest.mark.usefixtures('one_thread')

ROOT = Path(__file__).parents[1]
CLASSES = ('dark', 'light', 'striped')
SPACE = {
    'image_sizes': [8, 12], 'stem': 4, 'reduction': 1, 'heads': 1,
    'depths': [[1], [1, 2]], 'widths': [[8], [8, 16]], 'expansions': [0.25, 0.5],
    'kernels': [3], 'windows': [3], 'attention_stages': [2],
}  # fmt: skip
STEPS = 6  # an epoch: 72 images for the weights, in batches of 12


def pictures(count=96, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    images = torch.randint(0, 60, (count, 1, 12, 12), generator=generator)
    images += 120 * (labels == 1)[:, None, None, None]
    images[labels == 2, :, ::2] += 150
    return images.to(torch.uint8), labels, CLASSES


@pytest.fixture
def config(tmp_path):
    (tmp_path / 'space.json').write_text(json.dumps(SPACE))
    return TrioConfig(
        data='', out=str(tmp_path / 'run'), space=str(tmp_path / 'space.json'), epochs=2, batch_size=12, fraction=0.75,
        lr=0.05, evaluations=8, population=4, calibration=24, workers=0, cpu=True, tensorboard=False,
        save_minutes=1e-9,
    )  # fmt: skip


@pytest.fixture
def look_often(monkeypatch):
    monkeypatch.setattr(runs, 'LOSS_CHECK_STEPS', 2)


@pytest.fixture
def supernet():
    torch.manual_seed(0)
    return SuperNet(TrioSpace.from_dict(SPACE), 3, 1)


# ---- a step ----


def test_a_step_adds_up_the_gradients_of_its_networks(supernet):
    """Against the extracted networks with their own losses, whose gradients go back to where the parts were cut."""
    supernet.double()
    networks = networks_of(supernet.space, hierarchical, 0, 0, 2)
    assert [str(n) for n in networks] == [str(n) for n in networks_of(supernet.space, hierarchical, 0, 0, 2)]
    assert [str(n) for n in networks] != [str(n) for n in networks_of(supernet.space, hierarchical, 0, 1, 2)]
    images, labels = torch.randn(6, 1, 12, 12, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])
    losses = sandwich_step(supernet, networks, images, labels, label_smoothing=0.1, autocast=nullcontext)
    found = {name: p.grad.clone() for name, p in supernet.named_parameters() if p.grad is not None}

    supernet.zero_grad()
    expected_losses, teacher = [], None
    for network in networks:
        outputs = supernet.activate(network)(
            F.interpolate(images, (network.image_size,) * 2, mode='bilinear', antialias=True)
        )
        if teacher is None:
            smoothed = F.one_hot(labels, 3) * 0.9 + 0.1 / 3
            loss = -(smoothed * outputs.log_softmax(1)).sum(1).mean()
            teacher = outputs.softmax(1).detach()
        else:
            loss = -(teacher * outputs.log_softmax(1)).sum(1).mean()
        loss.backward()
        expected_losses.append(loss.item())
    torch.testing.assert_close(losses, torch.tensor(expected_losses, dtype=torch.float64))
    assert found.keys() == {name for name, p in supernet.named_parameters() if p.grad is not None}
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, supernet.get_parameter(name).grad)


def test_the_ends_of_a_step_have_drawn_operators():
    space = TrioSpace.from_dict(SPACE)
    seen = {extent: set() for extent in ('largest', 'smallest')}
    for step in range(60):
        largest, smallest = networks_of(space, hierarchical, 0, step, 0)
        assert largest.image_size == 12
        assert smallest.image_size == 8
        assert [s.width for s in largest.stages] == [8, 16]
        assert [len(s.blocks) for s in smallest.stages] == [1, 1]
        seen['largest'] |= {b.operator for b in largest.stages[1].blocks}
        seen['smallest'] |= {b.operator for b in smallest.stages[1].blocks}
    assert seen['largest'] == seen['smallest'] == {'conv', 'local', 'axial'}


# ---- scores ----


def test_statistics_are_measured_anew(supernet):
    """All batch norms, also 1-d ones, get the mean over the batches of their inputs, by the test's own loop."""
    network = nn.Sequential(supernet.activate(architecture_of(supernet.space)).extract(), nn.BatchNorm1d(3)).train()
    batches = [torch.randn(8, 1, 12, 12, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.fill_(7.0)
    reference = copy.deepcopy(network)
    recalibrate(network, batches)
    assert network.training
    means = {}
    for name, module in reference.named_modules():
        if isinstance(module, (nn.BatchNorm2d, nn.BatchNorm1d)) and not name.endswith('logit_norm'):
            module.register_forward_hook(
                lambda m, x, y, name=name: means.setdefault(name, []).append(
                    x[0].detach().double().transpose(0, 1).flatten(1).mean(1)
                )
            )
    for batch in batches:
        reference(batch)
    assert len(means) > 8
    for name, values in means.items():
        found = network.get_submodule(name)
        torch.testing.assert_close(found.running_mean.double(), torch.stack(values).mean(0), rtol=1e-4, atol=1e-5)
    logits = [m for n, m in network.named_modules() if n.endswith('logit_norm')]
    assert logits
    assert all((m.running_mean != 7.0).all() for m in logits)
    assert all(m.momentum is not None for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))


def architecture_of(space, seed=0, operator=2):
    only = np.eye(3)[operator]
    return space.architecture(draw(space, np.random.default_rng(seed), lambda rng, count: only, 'largest'))


def test_every_image_is_counted_once(config):
    held_out = split_data(pictures(), config).held_out
    assert len(held_out) == 24
    parts = [labels for _, labels in held_out.once(10)]
    assert [len(part) for part in parts] == [10, 10, 4]
    assert torch.cat(parts).bincount().tolist() == [8, 8, 8]

    class Constant(nn.Module):
        def __init__(self, value=1.0):
            super().__init__()
            self.value = value

        def forward(self, x):
            return torch.tensor([[0.0, self.value, 0.5]]).repeat(len(x), 1)

    assert accuracy(Constant(), held_out.once(10)) == pytest.approx(100 / 3)
    with pytest.raises(ValueError, match='no images'):
        accuracy(Constant(), [])
    with pytest.raises(FloatingPointError, match='for 24 of 24 images are not finite'):
        accuracy(Constant(math.nan), held_out.once(10))


def test_images_are_brought_to_the_size_of_a_network():
    images = torch.randn(2, 1, 12, 12)
    assert resize(images, 12) is images
    assert resize(images, 8).shape == (2, 1, 8, 8)


# ---- the whole way ----


def test_what_a_search_leaves(config, look_often, capsys):
    config = replace(config, max_macs='40k', tensorboard=True)
    result = search(config, pictures(), pictures(30, seed=1)[:2])
    out = Path(config.out)
    assert {path.name for path in out.iterdir()} == {
        'architecture.json', 'architecture.png', 'candidates', 'front.png', 'metrics.jsonl', 'network.pt',
        'supernet.pt', 'tensorboard',
    }  # fmt: skip
    rows = [json.loads(line) for line in (out / 'metrics.jsonl').read_text().splitlines()]
    assert [row['step'] for row in rows] == [STEPS, 2 * STEPS]
    assert rows[-1]['largest_loss'] < rows[0]['largest_loss']
    stored = json.loads((out / 'architecture.json').read_text())
    assert stored == json.loads(json.dumps(result))
    assert stored['evaluations'] == 8
    assert stored['cost']['macs'] <= 40_000
    assert stored['cost']['macs'] == macs(Architecture.parse(stored['architecture']), 3, 1)
    assert {'conv', 'local', 'axial'} >= stored['pure'].keys() >= {'conv'}
    for entry in [*stored['front'], *stored['pure'].values()]:
        assert entry['cost']['macs'] <= 40_000
    front = [(entry['cost']['macs'], entry['score']) for entry in stored['front']]
    assert front == sorted(front)
    assert stored['score'] == max(score for _, score in front)

    model = timm.create_model(
        'trionet', architecture=str(out / 'architecture.json'), checkpoint_path=str(out / 'network.pt'), num_classes=3,
        in_chans=1,
    ).eval()  # fmt: skip
    assert sum(p.numel() for p in model.parameters()) == stored['cost']['parameters']
    held_out = split_data(pictures(), config).held_out
    size = Architecture.parse(stored['architecture']).image_size
    batches = [(resize(x, size), y) for x, y in held_out.once(12)]
    assert accuracy(model, batches) == pytest.approx(stored['score'])
    test_images, test_labels, _ = pictures(30, seed=1)
    normalised = (test_images - held_out.images.mean) / held_out.images.std
    assert accuracy(model, [(resize(normalised, size), test_labels)]) == pytest.approx(stored['test_accuracy'])
    said = capsys.readouterr().out
    assert 'epoch 2/2' in said
    assert 'test accuracy' in said
    assert 0 <= stored['tied'] <= 7
    assert stored['verdict'] in said

    again = search(replace(config, resume=True), pictures(), pictures(30, seed=1)[:2])
    assert again['architecture'] == result['architecture']
    more = search(replace(config, resume=True, max_macs=None, max_params='2k', evaluations=5), pictures())
    assert more['cost']['parameters'] <= 2000
    assert more['objective'] == 'parameters'
    supernet = load_supernet(out)
    assert supernet.space == TrioSpace.from_dict(SPACE)
    assert not supernet.training


@pytest.mark.parametrize(
    'changes',
    [
        pytest.param({'sampling': 'uniform', 'sharing': 'plain', 'networks': 0}, marks=pytest.mark.slow),
        pytest.param(
            {'mixed_precision': 'bf16', 'channels_last': True, 'ema_decay': None, 'clip_grad': None},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {'algorithm': 'random', 'deterministic': True, 'label_smoothing': 0.0, 'drop_rate': 0.0},
            marks=pytest.mark.slow,
        ),
        pytest.param({'max_ms': 1e4, 'evaluations': 5}, marks=pytest.mark.slow),
    ],
    ids=lambda changes: ','.join(changes),
)
def test_settings(config, changes, monkeypatch):
    monkeypatch.setattr(cost, 'Latency', lambda device: lambda network: 2e4 * macs(network, 3, 1) / 60_000)
    result = search(replace(config, **{'epochs': 1, **changes}), pictures())
    assert not torch.are_deterministic_algorithms_enabled()  # the setting ends with its run
    assert result['evaluations'] == changes.get('evaluations', 8)
    assert result['test_accuracy'] is None
    Architecture.parse(result['architecture'])
    if 'max_ms' in changes:
        assert result['cost']['milliseconds'] <= 1e4


@pytest.mark.slow
def test_images_from_files_and_finetuning(config, tmp_path, look_often, capsys):
    """File names are not UTF-8. A broken test image is found before any work."""
    data = disguise(make_images(tmp_path / 'images', train=8, val=3, classes=('cat', 'dog')))
    (image,) = (data / 'val').rglob('*\n*')
    truncate(image)
    config = replace(config, data=str(data), batch_size=4, epochs=1, evaluations=5, finetune=1, in_chans=1)
    with pytest.raises(ValueError, match=r'broken image .*\\udcff\\n0\.png.*--skip-broken'):
        search(config)
    assert not (Path(config.out) / 'supernet.pt').exists()
    (data / 'val' / 'dog' / '0.png').unlink()  # four good ones remain
    config = replace(config, skip_broken=True)
    result = search(config)
    assert 'warning: 1 broken image left out' in capsys.readouterr().out
    assert result['data']['classes'] == ['c\udce4t', 'dog']
    assert result['data']['weights'] == 12
    assert result['data']['held_out'] == 4
    assert result['test_accuracy'] in (0, 25, 50, 75, 100)
    (tuned,) = (Path(config.out) / 'finetuned').iterdir()
    rows = [json.loads(line) for line in (tuned / 'metrics.jsonl').read_text().splitlines()]
    assert result['finetuned'] == rows[-1]['acc1']
    start = read_checkpoint(Path(config.out) / 'network.pt')['state_dict']
    end = read_checkpoint(tuned / 'last.pt')['state_dict']
    assert start.keys() == end.keys()
    assert start['conv1.weight'].shape[1] == 1
    assert not torch.equal(start['conv1.weight'], end['conv1.weight'])
    swap(data / 'train' / 'dog')
    with pytest.raises(ValueError, match='holds a search on other data'):
        search(replace(config, resume=True))


@pytest.mark.slow
def test_the_demo_at_a_smaller_size(tmp_path, capsys):
    """Supernet, search, extraction and a test on the digits, by the function behind --demo."""
    result = run_trionet_demo(tmp_path / 'demo', epochs=1, evaluations=4, limit=200)
    assert result['evaluations'] == 4
    assert result['pure'].keys() == {'conv', 'local', 'axial'}
    assert result['cost']['macs'] <= 4_000_000
    assert 0 < result['test_accuracy'] <= 100
    assert result['data']['weights'] + result['data']['held_out'] == 200
    out = tmp_path / 'demo'
    for name in ('front.png', 'architecture.png'):
        assert (out / name).read_bytes().startswith(b'\x89PNG')
    model = timm.create_model(
        'trionet', architecture=out / 'architecture.json', checkpoint_path=str(out / 'network.pt'), num_classes=10,
        in_chans=1,
    )  # fmt: skip
    assert sum(p.numel() for p in model.parameters()) == result['cost']['parameters']
    assert 'written: ' in capsys.readouterr().out


@pytest.mark.slow
def test_the_command(config, tmp_path, capsys):
    data = make_images(tmp_path / 'images', train=8, val=2, classes=('cat', 'dog'))
    options = f"""
        search trionet --data {data} --space {config.space} --out {tmp_path / 'run'}
        --epochs 1 --batch-size 4 --fraction 0.75 --max-macs 80k --evaluations 4 --population 3 --calibration 8
        --networks 0 --workers 0 --cpu --no-tensorboard
    """.split()
    assert main(options) == 0
    assert (tmp_path / 'run' / 'candidates' / 'nsga2_max_macs=80k_population=3.jsonl').exists()
    assert f'written: {tmp_path / "run"}/architecture.json and network.pt' in capsys.readouterr().out
    for change, says in (
        ([], 'holds a run already: --resume'),
        (['--resume', '--max-macs', '10'], 'max_macs is 1e-05 M, below the cheapest network'),
        (['--resume', '--ray-gpus', '1'], '--ray-gpus needs --ray ADDRESS'),
        (['--resume', '--sharing', 'plain'], 'sharing was'),
    ):
        assert main([*options, *change]) == 2
        assert says in capsys.readouterr().err
    assert main(['search', 'trionet']) == 2
    assert '--data DIR is missing' in capsys.readouterr().err


@pytest.mark.slow
def test_another_limit_is_finetuned_beside_the_first(config, tmp_path):
    data = make_images(tmp_path / 'images', train=8, val=2, classes=('cat', 'dog'))
    one = replace(config, data=str(data), batch_size=4, epochs=1, evaluations=5, finetune=1)
    found = [search(one), search(replace(one, resume=True, max_macs='20k'))]
    assert found[0]['architecture'] != found[1]['architecture']
    assert len(list((Path(config.out) / 'finetuned').iterdir())) == 2


# ---- faults ----


@pytest.mark.slow
def test_no_test_images(config, tmp_path, capsys):
    data = make_images(tmp_path / 'images', train=8, val=2, classes=('cat', 'dog'))
    shutil.rmtree(data / 'val')
    one = replace(config, data=str(data), batch_size=4, epochs=1, evaluations=5)
    with pytest.raises(FileNotFoundError, match='has no folder val'):
        search(replace(one, finetune=1))
    assert not (Path(config.out) / 'supernet.pt').exists()
    assert search(one)['test_accuracy'] is None
    assert 'there will be no test: ' in capsys.readouterr().out


@pytest.mark.parametrize(
    ('test', 'says'),
    [
        ((torch.zeros(4, 1, 12, 12), torch.zeros(4)), 'expected uint8 images'),
        ((torch.zeros(4, 1, 12, 12, dtype=torch.uint8), torch.zeros(3)), 'and 3 labels'),
    ],
    ids=['float images', 'labels'],
)
def test_wrong_test_images_are_refused_before_any_work(config, test, says):
    with pytest.raises(ValueError, match=says):
        search(config, pictures(), test)
    assert not (Path(config.out) / 'supernet.pt').exists()


def test_other_classes_in_the_test_split_are_refused_before_any_work(config, tmp_path):
    data = make_images(tmp_path / 'images', train=8, val=2, classes=('cat', 'dog'))
    (data / 'val' / 'dog').rename(data / 'val' / 'owl')
    with pytest.raises(ValueError, match='the classes of train and val differ'):
        search(replace(config, data=str(data), batch_size=4))
    with pytest.raises(ValueError, match='test goes with images'):
        search(replace(config, data=str(data), batch_size=4), None, pictures()[:2])
    assert not (Path(config.out) / 'supernet.pt').exists()


@pytest.mark.slow
def test_a_network_without_finite_outputs_fails_alone(config, monkeypatch, capsys):
    real, calls = training.SupernetTraining.score, []

    def poisoned(self, architecture):
        calls.append(str(architecture))
        if len(calls) == 2 * config.epochs + 2:  # two scores per epoch, then the second candidate
            raise FloatingPointError('the outputs for 3 of 24 images are not finite')
        return real(self, architecture)

    monkeypatch.setattr(training.SupernetTraining, 'score', poisoned)
    result = search(config, pictures())
    assert result['evaluations'] == 8
    assert calls[2 * config.epochs + 1] not in [entry['architecture'] for entry in [*result['front'], result]]
    assert 'not finite' in capsys.readouterr().out


@pytest.fixture(scope='session')
def processes():
    """Processes that start from one with everything imported."""
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['sase_blocks.search.trionet', 'accelerate', 'optuna'])
    return context


def _searching(config, delay):
    torch.set_num_threads(1)
    runs.LOSS_CHECK_STEPS = 2
    if delay is not None:
        threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
    search(config, pictures())


@pytest.mark.slow
def test_killed_at_any_moment(config, processes):
    """After SIGKILLs in supernet and search, a run ends with the bits and scores of an undisturbed one."""
    config = replace(config, resume=True, epochs=3)
    rng = random.Random(0)
    kills = 0
    while kills < 8:
        process = processes.Process(target=_searching, args=(config, rng.uniform(0.1, 2.5)))
        process.start()
        process.join()
        if process.exitcode == 0 and kills < 2:  # on a fast machine: start again
            shutil.rmtree(config.out)
            continue
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        kills += 1
    whole = replace(config, out=config.out + '-whole', resume=False)
    for one in (config, whole):
        process = processes.Process(target=_searching, args=(one, None))
        process.start()
        process.join()
        assert process.exitcode == 0
    a, b = (read_checkpoint(Path(c.out) / 'supernet.pt') for c in (config, whole))
    assert a['step'] == b['step'] == 3 * STEPS
    for part in ('supernet', 'average', 'optimizer'):
        torch.testing.assert_close(a[part], b[part], rtol=0, atol=0)
    rows = [(Path(c.out) / 'metrics.jsonl').read_text().splitlines() for c in (config, whole)]
    for one, two in zip(*rows, strict=True):
        assert {**json.loads(one), 'seconds_per_step': 0} == {**json.loads(two), 'seconds_per_step': 0}
    results = [json.loads((Path(c.out) / 'architecture.json').read_text()) for c in (config, whole)]
    for name in ('architecture', 'score', 'front', 'pure', 'evaluations'):
        assert results[0][name] == results[1][name]


@pytest.mark.slow
def test_a_second_command_waits_and_finds_it_done(config, processes, twice_at_once):
    config = replace(config, resume=True)
    twice_at_once(processes, _searching, config, None)
    out = Path(config.out)
    rows = [json.loads(line) for line in (out / 'metrics.jsonl').read_text().splitlines()]
    assert [row['epoch'] for row in rows] == [1, 2]
    supernet = read_checkpoint(out / 'supernet.pt')
    assert supernet['step'] == 2 * STEPS
    assert json.loads((out / 'architecture.json').read_text())['evaluations'] == config.evaluations
    assert not list(out.glob('*.tmp'))


@pytest.mark.slow
def test_two_processes_search_as_one(config, tmp_path):
    """The command under torchrun: both processes have the same weights and share the scoring."""
    data = make_images(tmp_path / 'images', train=8, val=2, classes=('cat', 'dog'))
    command = [
        sys.executable,
        '-m',
        'torch.distributed.run',
        '--standalone',
        '--nproc-per-node',
        '2',
        '-m',
        'sase_blocks',
    ]
    command += f'search trionet --data {data} --space {config.space} --out {tmp_path / "two"} --epochs 1'.split()
    command += [
        '--batch-size',
        '4',
        '--fraction',
        '0.75',
        '--evaluations',
        '6',
        '--population',
        '3',
        '--cpu',
        '--no-tensorboard',
    ]
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'GLOO_SOCKET_IFNAME': 'lo'}
    two = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert two.returncode == 0, two.stderr
    assert '2 process(es)' in two.stdout
    assert two.stdout.count('found: ') == 1
    assert two.stdout.count('test accuracy') == 1
    assert json.loads((tmp_path / 'two' / 'architecture.json').read_text())['evaluations'] == 6


def _stepping(rank, world, store, out):
    """This process's weights after two steps on a joint batch in float64."""
    from accelerate import Accelerator

    torch.set_num_threads(1)
    if world > 1:
        os.environ |= {'RANK': str(rank), 'WORLD_SIZE': str(world), 'LOCAL_RANK': str(rank), 'MASTER_ADDR': 'localhost'}
        os.environ['MASTER_PORT'] = '29500'  # not used, because the group exists
        torch.distributed.init_process_group('gloo', f'file://{store}', rank=rank, world_size=world)
    config = TrioConfig(
        data='', out=str(out), space=str(out.parent / 'space.json'), batch_size=12, fraction=0.75, drop_rate=0.0,
        cpu=True,
    )  # fmt: skip
    accelerator = Accelerator(cpu=True)
    data = split_data(pictures(), config)
    one = training.SupernetTraining(config, accelerator, data, 1, None)
    one.supernet.double().eval()  # in training a batch norm sees only the images of its process
    batches = list(data.training.epoch(0, 12, 0, 2, rank, world))
    for images, labels in batches:
        one.train_step(images.double(), labels)
    torch.save([p.detach() for p in one.supernet.parameters()], f'{out}-{rank}.pt')


@pytest.mark.slow
def test_two_processes_step_as_one(processes, to_a_good_end, config, tmp_path):
    started = [processes.Process(target=_stepping, args=(r, 2, tmp_path / 'store', tmp_path / 'two')) for r in (0, 1)]
    started.append(processes.Process(target=_stepping, args=(0, 1, None, tmp_path / 'one')))
    to_a_good_end(started)
    one, first, second = (torch.load(tmp_path / f'{name}.pt') for name in ('one-0', 'two-0', 'two-1'))
    for alone, a, b in zip(one, first, second, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, alone, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_not_a_number_stops(config, look_often, monkeypatch):
    real = training.sandwich_step

    def poisoned(supernet, networks, *args, **kwargs):
        poisoned.step += 1
        losses = real(supernet, networks, *args, **kwargs)
        return losses * float('nan') if poisoned.step == STEPS + 3 else losses

    poisoned.step = 0
    monkeypatch.setattr(training, 'sandwich_step', poisoned)
    with pytest.raises(
        FloatingPointError, match=rf'nan at step {STEPS + 3}; the last good .*supernet.pt.*"image 12; stem'
    ):
        search(config, pictures())
    saved = read_checkpoint(Path(config.out) / 'supernet.pt')
    assert saved['step'] == STEPS + 2
    assert all(value.isfinite().all() for value in saved['supernet'].values())


@pytest.mark.parametrize(
    ('changes', 'says'),
    [
        ({'epochs': 0}, 'epochs must be at least 1, got 0'),
        ({'population': 1}, 'population must be at least 2'),
        ({'evaluations': 4}, r'population must be below evaluations \(4\), got 4'),
        ({'drop_rate': 1.0}, 'drop_rate must be at least 0 and below 1'),
        ({'concentration': 0.0}, 'concentration must be above 0'),
        ({'sampling': 'uniform', 'concentration': 0.5}, 'concentration must be left at 1.0 without hierarchical'),
        ({'finetune_lr': 0.1}, 'finetune_lr must be left at 0.01 without finetune'),
        ({'opt': 'adamw', 'momentum': 0.5}, 'momentum must be left at 0.9 for adamw'),
        ({'train_split': 'extra'}, "train_split must be left at 'train' without a dataset"),
        ({'sampling': 'fair'}, "sampling must be one of .*got 'fair'"),
        ({'sharing': 'all'}, "sharing must be one of .*got 'all'"),
        ({'algorithm': 'bo'}, "algorithm must be one of .*got 'bo'"),
        ({'seed': -1}, r'seed must be at least 0 and below 2\*\*64, got -1'),
        ({'seed': 2**64}, r'seed must be at least 0 and below 2\*\*64'),
        ({'max_macs': 'many'}, "max_macs: a count must be a number such as 300M.*got 'many'"),
        ({'max_params': '-1M'}, 'max_params: a count must be a number'),
        ({'max_ms': 0.0}, 'max_ms must be above 0'),
        ({'space': 'coco'}, "there is no space 'coco': give imagenet, cifar or a .json file"),
        ({'space': 'nowhere.json'}, 'the space file nowhere.json cannot be read'),
    ],
    ids=lambda value: str(value)[:30],
)
def test_wrong_settings(config, changes, says):
    with pytest.raises(ValueError, match=says):
        replace(config, **changes)


@pytest.mark.parametrize(
    ('changes', 'says'),
    [
        (
            {'max_macs': '1k'},
            r'max_macs is 0.001 M, below the cheapest network .* from .*image 8; .* to .*image 12; .*between',
        ),
        ({'max_macs': '9G'}, 'max_macs is 9000 M, above the most expensive network of the space.*or none'),
        ({'max_params': '10'}, 'max_params is 1e-05 M, below the cheapest'),
        ({'max_params': '1G'}, 'max_params is 1000 M, above the most expensive'),
        ({'max_ms': 1e-9}, 'max_ms is 1e-09 ms, below the cheapest'),
        ({'batch_size': 96}, '72 training images are fewer than one batch of 96'),
        ({'finetune': 1}, 'finetune reads class folders'),
    ],
    ids=lambda value: str(value)[:30],
)
def test_refused_before_any_work(config, changes, says):
    with pytest.raises(ValueError, match=says):
        search(replace(config, **changes), pictures())
    assert not (Path(config.out) / 'supernet.pt').exists()


@pytest.mark.slow
def test_a_folder_of_another_run(config, tmp_path):
    config = replace(config, epochs=1, evaluations=5)
    search(config, pictures())
    with pytest.raises(ValueError, match='holds a run already: --resume'):
        search(config, pictures())
    again = replace(config, resume=True)
    with pytest.raises(ValueError, match=r'sharing was .heads. and is .plain.'):
        search(replace(again, sharing='plain'), pictures())
    images, labels, classes = pictures()
    with pytest.raises(ValueError, match='holds a search on other data'):
        search(again, (images + 1, labels, classes))
    with pytest.raises(ValueError, match='made with other settings: calibration was 24 and is 12'):
        search(replace(again, calibration=12), pictures())
    whole = (Path(config.out) / 'supernet.pt').read_bytes()
    check_damaged(Path(config.out) / 'supernet.pt', lambda: search(again, pictures()), 'supernet')
    (Path(config.out) / 'supernet.pt').write_bytes(whole)
    (tmp_path / 'space.json').write_text(json.dumps({**SPACE, 'windows': [3, 5]}))
    with pytest.raises(ValueError, match=r'space of .*: windows was \[3\] and is \[3, 5\]'):
        search(again, pictures())
    with pytest.raises(ValueError, match='not the checkpoint of a supernet'):
        load_supernet(Path(config.out) / 'network.pt')
    (Path(config.out) / 'supernet.pt').write_bytes(b'nothing')
    with pytest.raises(ValueError, match=r'supernet\.pt'):
        load_supernet(config.out)


def test_pure_networks_fit_and_are_pure(config):
    space = TrioSpace.from_dict(SPACE)
    costs = Costs(3, 1, **replace(config, max_macs='40k').limits)
    found = searching.pure_networks(space, costs)
    assert found.keys() == {'conv', 'local', 'axial'}
    for name, genome in found.items():
        network = space.architecture(genome)
        assert {block.operator for block in network.stages[1].blocks} == {name}
        assert {block.operator for block in network.stages[0].blocks} == {'conv'}
        assert macs(network, 3, 1) <= 40_000
    only_conv = TrioSpace.from_dict({**SPACE, 'attention_stages': []})
    assert searching.pure_networks(only_conv, costs).keys() == {'conv'}


def test_concentration_is_that_of_the_draws(config):
    """The chance that two blocks of a network have one operator: (1 + a) / (1 + 3 a) for Dirichlet(a, a, a)."""
    for a in (0.2, 1.0, 5.0):
        law, rng = replace(config, concentration=a).law, np.random.default_rng(0)
        same = np.mean([(law(rng, 3) ** 2).sum() for _ in range(4000)])
        assert same == pytest.approx((1 + a) / (1 + 3 * a), rel=0.03)


def test_ends_by_time_are_not_those_by_products():
    """If attention is slow although it has few MACs, the most expensive network has attentions."""
    space = TrioSpace.from_dict(SPACE)

    def seconds(network):
        return sum({'conv': 1, 'local': 5, 'axial': 3}[name] for name in network.operators)

    assert bound(space.end('largest'), seconds, max)[1].operators == ('conv', 'local', 'local')
    assert bound(space.end('smallest'), seconds)[1].operators == ('conv', 'conv')


@pytest.mark.slow
def test_hierarchical_draws_train_pure_networks_more_often():
    """Of 16 blocks, pure networks are 3 of 153 compositions. Uniform draws never give one."""
    space = TrioSpace((8,), 4, 1, 1, ((8,), (8,)), ((8,), (8,)), (0.5,), (3,), (3,), (1, 2))
    count = {}
    for name, law in (('hierarchical', hierarchical), ('uniform', uniform)):
        rng = np.random.default_rng(0)
        pure = [len(set(space.architecture(draw(space, rng, law)).operators)) == 1 for _ in range(3000)]
        count[name] = sum(pure)
    assert count['uniform'] == 0
    assert math.isclose(count['hierarchical'], 3000 * 3 / 153, rel_tol=0.35)
