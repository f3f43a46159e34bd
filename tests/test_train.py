"""Training: resumed, parallel and uninterrupted runs end with the same weights, and wrong settings end at once."""

import contextlib
import errno
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from PIL import Image
from test_data import disguise, make_images, swap, truncate
from timm.utils import ModelEmaV3
from torch import nn

from sase_blocks import runs
from sase_blocks.checkpoint import read_checkpoint, save_checkpoint
from sase_blocks.data import TransformedSamples
from sase_blocks.networks import build_model
from sase_blocks.runs import open_accelerator, read_rows, run_lock
from sase_blocks.search.trionet import score
from sase_blocks.train import TrainConfig, evaluate, hits, train

pytestmark = pytest.mark.usefixtures('one_thread')

ROOT = Path(__file__).parents[1]
STEPS = 3  # an epoch of SMALL: 14 images and batches of 4, so two images are dropped
SMALL = {
    'model': 'resnet20_cifar',
    'model_args': {'genotype': 'sase', 'attn_stages': [3], 'drop_rate': 0.2},
    'img_size': 12,
    'epochs': 3,
    'batch_size': 4,
    'workers': 0,
    'cpu': True,
    'tensorboard': False,
}


@pytest.fixture(scope='session')
def images(tmp_path_factory):
    return str(make_images(tmp_path_factory.mktemp('images'), train=7, val=3, classes=('cat', 'dog')))


@pytest.fixture
def config(images, tmp_path):
    return TrainConfig(data=images, out=str(tmp_path / 'run'), **SMALL)


@pytest.fixture(scope='session')
def processes():
    """Processes that start from one with everything imported: importing it takes many times as long as a test."""
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['sase_blocks.train', 'accelerate', 'torch.utils.tensorboard'])
    return context


def run(processes, config, disturb=None):
    """``train(config)`` in a process of its own; returns its exit code."""
    process = processes.Process(target=_run, args=(config, disturb))
    process.start()
    process.join()
    return process.exitcode


def _run(config, disturb):
    torch.set_num_threads(1)
    multiprocessing.set_start_method('fork', force=True)  # or loading processes would import everything anew
    if disturb is not None:
        disturb()
    try:
        train(config)
    except Exception as error:  # what this process prints goes to wherever the first one was started
        Path(f'{config.out}.error').write_text(str(error))
        sys.exit(1)


def kill_in_epoch():
    """SIGKILL in the middle of the second epoch."""
    from timm.scheduler import CosineLRScheduler

    real = CosineLRScheduler.step_update

    def step_update(self, step):
        if step == STEPS + 1:
            os.kill(os.getpid(), signal.SIGKILL)
        real(self, step)

    CosineLRScheduler.step_update = step_update


def kill_in_write():
    """SIGKILL in the middle of writing last.pt at the end of the second epoch."""
    from sase_blocks import checkpoint

    real, files = checkpoint._Writer.write, []

    def write(self, data):
        if Path(self.file.name).name == 'last.pt.tmp' and self.file not in files:
            files.append(self.file)
        if len(files) == 2 and self.file.tell() > 100_000:
            self.file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, data)

    checkpoint._Writer.write = write


def full_disk():
    """No file may grow beyond 1 MB once the first epoch is saved."""
    import resource

    from sase_blocks import train as module

    real = module.save_checkpoint

    def save(state, path):
        if state['epoch'] == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))
        return real(state, path)

    module.save_checkpoint = save


def assert_same(a, b, path=''):
    """Equal to the bit, all the way down."""
    assert type(a) is type(b), path
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_same(a[key], b[key], f'{path}.{key}')
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, pair in enumerate(zip(a, b, strict=True)):
            assert_same(*pair, f'{path}.{i}')
    else:
        assert a == b, path


def assert_same_run(a, b):
    """Two runs left the same checkpoints (but for the settings that may differ) and the same metrics."""
    for name in ('last.pt', 'best.pt'):
        left, right = ({k: v for k, v in read_checkpoint(Path(c.out, name)).items() if k != 'config'} for c in (a, b))
        assert_same(left, right, name)
    rows = []
    for c in (a, b):
        lines = [json.loads(line) for line in Path(c.out, 'metrics.jsonl').read_text().splitlines()]
        rows.append([{k: v for k, v in line.items() if k != 'images_per_second'} for line in lines])
    assert [row['epoch'] for row in rows[0]] == [1, 2, 3]
    assert rows[0] == rows[1]


@pytest.mark.parametrize(
    ('disturb', 'settings'),
    [
        (kill_in_epoch, {'clip_grad': 5.0}),
        pytest.param(  # nine steps are all within the warm-up of this average, so its decay has to know the step
            kill_in_write,
            {'opt': 'adamw', 'lr': 1e-3, 'ema_decay': 0.9999, 'mixed_precision': 'bf16'},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_killed_run_resumes_to_the_same_weights(processes, config, tmp_path, disturb, settings):
    whole = replace(config, out=str(tmp_path / 'whole'), **settings)
    killed = replace(config, out=str(tmp_path / 'killed'), resume=True, **settings)
    assert run(processes, whole) == 0
    assert run(processes, killed, disturb) == -signal.SIGKILL
    assert read_checkpoint(Path(killed.out, 'last.pt'))['epoch'] == 1
    assert Path(killed.out, 'last.pt.tmp').exists() == (disturb is kill_in_write)
    # The number of loading processes may change, and nothing else does.
    assert run(processes, replace(killed, workers=1)) == 0
    assert_same_run(whole, killed)
    assert sorted(os.listdir(killed.out)) == ['best.pt', 'config.toml', 'last.pt', 'metrics.jsonl']


def test_damaged_lines_of_a_log_are_left_out(tmp_path):
    log = tmp_path / 'metrics.jsonl'
    good = [{'epoch': 1, 'loss': 0.5}, {'epoch': 2, 'loss': 0.25}]
    bad = [b'{"epoch": 1, "lo', b'5', b'{}', b'{"epoch": "two"}', b'null', b'\xff\xfe', b'[' * 100_000, b'']
    log.write_bytes(b'\n'.join([json.dumps(good[0]).encode(), *bad, json.dumps(good[1]).encode(), b'{"epoch": 3}']))
    assert read_rows(log, 2) == good
    assert read_rows(tmp_path / 'nowhere', 2) == []


# ---- a folder is one run's ----


def _holding(config, pipe):
    with open_accelerator(config, 'a test') as accelerator, run_lock(config, accelerator):
        # Like a process that loads images, and that is not there to see its parent killed.
        if os.fork() == 0:
            pipe.poll(None)
            os._exit(0)
        pipe.send('held')
        pipe.poll(None)


@pytest.fixture
def holder(processes, config):
    """Another process that has the folder of ``config`` until something comes through the pipe."""
    pipe, its = processes.Pipe()
    process = processes.Process(target=_holding, args=(config, its))
    process.start()
    its.close()  # so that recv() fails, should the process end
    assert pipe.recv() == 'held'
    yield process, pipe
    pipe.close()
    process.join()


def test_folder_of_another_run_is_refused(config, holder):
    says = rf'run is being written by another run, process {holder[0].pid} on .*: --resume waits for it'
    for _ in range(2):  # and being refused leaves the other one's lock as it is
        with pytest.raises(ValueError, match=says):
            train(config)
    Path(config.out, '.lock-owner').write_bytes(b'\xff')
    with pytest.raises(ValueError, match='run is being written by another run, \ufffd: --resume'):
        train(config)


def test_two_runs_of_one_process_are_told_apart(config):
    says = rf'run is being written by another run, process {os.getpid()} on '
    with open_accelerator(config, 'a test') as accelerator, run_lock(config, accelerator):
        with pytest.raises(ValueError, match=says), run_lock(config, accelerator):
            pass
        with ThreadPoolExecutor(1) as pool, pytest.raises(ValueError, match=says):
            pool.submit(run_lock(config, accelerator).__enter__).result()
        assert {'.lock', '.lock-owner'} <= set(os.listdir(config.out))
    with run_lock(config, accelerator):
        pass
    assert os.listdir(config.out) == []


def test_a_refused_run_leaves_the_others_state_alone(config):
    with open_accelerator(config, 'a test') as accelerator:
        with pytest.raises(ValueError, match='refused'), open_accelerator(config, 'another'):
            raise ValueError('refused')
        assert accelerator.device.type == 'cpu'
        assert accelerator.is_main_process
    with open_accelerator(replace(config, mixed_precision='bf16'), 'one more') as accelerator:
        assert accelerator.mixed_precision == 'bf16'


def test_resume_waits_for_another_run(config, holder, monkeypatch, capsys):
    process, pipe = holder
    waits = []

    def sleep(seconds):
        waits.append(seconds)
        if len(waits) == 3:
            pipe.send('enough')
            process.join()

    monkeypatch.setattr(runs.time, 'sleep', sleep)
    assert train(replace(config, epochs=1, resume=True))['epochs'] == 1
    assert len(waits) >= 3
    assert capsys.readouterr().out.count('; waiting for it') == 1
    assert not Path(config.out, '.lock').exists()


def test_killed_run_holds_no_folder(config, holder):
    """Nor do the processes that it forked and that live on."""
    process, _ = holder
    process.kill()
    process.join()
    assert Path(config.out, '.lock').exists()
    train(replace(config, epochs=1))
    assert not list(Path(config.out).glob('.lock*'))


def test_lock_that_was_removed_meanwhile_is_none(config, monkeypatch):
    """Between opening and locking it, its owner ended: what was opened is the lock of no folder any more."""
    import fcntl

    real, removed = fcntl.flock, []

    def flock(file, how):
        if how & fcntl.LOCK_EX and not removed:
            Path(config.out, '.lock').unlink()
            removed.append(file)
        real(file, how)

    monkeypatch.setattr(fcntl, 'flock', flock)
    with open_accelerator(replace(config, resume=True), 'a test') as accelerator:
        monkeypatch.setattr(runs, 'LOCK_POLL_SECONDS', 0.0)
        with run_lock(replace(config, resume=True), accelerator):
            assert removed
            with pytest.raises(ValueError, match='another run'), run_lock(config, accelerator):
                pass


@pytest.mark.parametrize('code', ['ENOLCK', 'EOPNOTSUPP', 'ENOSYS'])
def test_folder_without_locks_is_not_guarded(config, monkeypatch, capsys, code):
    import fcntl

    error = OSError(getattr(errno, code), os.strerror(getattr(errno, code)))

    def flock(file, how):
        raise error

    monkeypatch.setattr(fcntl, 'flock', flock)
    with open_accelerator(config, 'a test') as accelerator, run_lock(config, accelerator):
        pass
    assert f'nothing keeps other runs out of {config.out}: {error.strerror}' in capsys.readouterr().out


def test_full_disk_keeps_the_last_good_checkpoint(processes, config):
    assert run(processes, config, full_disk) == 1
    assert re.search(r'could not write .*last\.pt.*the last good one is still', Path(f'{config.out}.error').read_text())
    assert read_checkpoint(Path(config.out, 'last.pt'))['epoch'] == 1
    assert not list(Path(config.out).glob('*.tmp'))


@pytest.mark.slow
def test_two_processes_equal_one(images, tmp_path):
    """torchrun with gloo against one process with the same global batch; the model has no batch norm."""
    common = f'--data {images} --model test_efficientnet_ln --img-size 32 --epochs 2 --batch-size 4 --lr 0.05'.split()
    common += ['--clip-grad', '1', '--workers', '0', '--cpu', '--no-tensorboard']
    launch = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2']
    launch += ['-m', 'sase_blocks', 'train', *common, '--out', str(tmp_path / 'two')]
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'GLOO_SOCKET_IFNAME': 'lo'}
    two = subprocess.run(launch, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert two.returncode == 0, two.stderr
    assert '2 process(es)' in two.stdout
    assert two.stdout.count('finished') == 1
    one = train(
        TrainConfig(
            data=images,
            model='test_efficientnet_ln',
            img_size=32,
            epochs=2,
            batch_size=4,
            lr=0.05,
            workers=0,
            cpu=True,
            tensorboard=False,
            clip_grad=1.0,
            out=str(tmp_path / 'one'),
        )
    )
    left, right = (read_checkpoint(tmp_path / name / 'last.pt') for name in ('one', 'two'))
    start = build_model('test_efficientnet_ln', 2).state_dict()
    moved = max((left['state_dict'][k] - start[k]).abs().max().item() for k in start)
    assert moved > 1e-3, 'the comparison needs weights that moved'
    torch.testing.assert_close(left['state_dict'], right['state_dict'], atol=1e-6, rtol=0)
    for key in ('val_loss', 'acc1', 'train_loss'):
        theirs = json.loads((tmp_path / 'two/metrics.jsonl').read_text().splitlines()[-1])[key]
        assert one['history'][-1][key] == pytest.approx(theirs, abs=1e-5)


def test_result_metrics_and_log(config, tmp_path, capsys, monkeypatch):
    seen, real = [], TransformedSamples.__getitem__
    monkeypatch.setattr(TransformedSamples, '__getitem__', lambda self, key: seen.append(key) or real(self, key))
    result = train(replace(config, tensorboard=True))
    images = 4 * STEPS  # of an epoch, which are followed by 6 of the validation
    epochs = [seen[start : start + images] for start in range(0, len(seen), images + 6)]
    assert [{epoch for epoch, _ in keys} for keys in epochs] == [{0}, {1}, {2}]
    assert len({tuple(position for _, position in keys) for keys in epochs}) == 3, 'each epoch in an order of its own'
    rows = [json.loads(line) for line in (tmp_path / 'run/metrics.jsonl').read_text().splitlines()]
    assert result['history'] == rows
    assert [row['step'] for row in rows] == [STEPS, 2 * STEPS, 3 * STEPS]
    assert rows[0]['lr'] > rows[1]['lr'] > rows[2]['lr'] > 0
    best = max(rows, key=lambda row: row['acc1'])
    assert (result['best_acc1'], result['best_epoch']) == (best['acc1'], best['epoch'])
    assert list((tmp_path / 'run/tensorboard').glob('events*'))
    out = capsys.readouterr().out
    assert re.search(r'14 training and 6 validation images of 2 classes \(data [0-9a-f+]{33}\), as 3 x 12 x 12', out)
    assert 'epoch 3/3: training loss' in out
    # The checkpoint is one of timm's, too.
    model = timm.create_model(
        'resnet20_cifar', num_classes=2, genotype='sase', attn_stages=[3], checkpoint_path=result['checkpoint']
    )
    assert_same(dict(model.state_dict()), dict(read_checkpoint(result['checkpoint'])['state_dict']))


def test_weights_from_a_checkpoint_and_a_finished_run(config, tmp_path, capsys):
    first = train(replace(config, epochs=1))
    again = train(replace(config, epochs=1, resume=True))  # nothing is left to do
    assert again['history'] == first['history']
    train(replace(config, epochs=1, lr=1e-9, out=str(tmp_path / 'second'), checkpoint=first['checkpoint']))
    assert 'tensors loaded' in capsys.readouterr().out
    weights = [read_checkpoint(tmp_path / name / 'last.pt')['state_dict']['fc.weight'] for name in ('run', 'second')]
    torch.testing.assert_close(*weights, atol=1e-6, rtol=0)


def test_skip_broken_leaves_images_out(config, tmp_path, capsys):
    root = make_images(tmp_path / 'spoiled', train=7, val=3, classes=('cat', 'dog'))
    truncate(root / 'train/dog/1.png')
    truncate(root / 'val/cat/0.png')
    with pytest.raises(ValueError, match=r'broken image .*dog.1\.png.*\(and 1 more\).*--skip-broken'):
        train(replace(config, data=str(root)))
    train(replace(config, data=str(root), skip_broken=True, epochs=1))
    out = capsys.readouterr().out
    assert 'warning: 2 broken images left out' in out
    assert '13 training and 5 validation images' in out


# A loading process that an error leaves behind ends ten seconds later, when it is collected.
@pytest.mark.parametrize('workers', [0, pytest.param(1, marks=pytest.mark.slow)])
def test_broken_image_met_in_training(config, tmp_path, workers):
    """Without the check before, the same error, also out of a loading process."""
    root = make_images(tmp_path / 'spoiled', train=7, val=3, classes=('cat', 'dog'))
    truncate(root / 'val/dog/1.png')
    with pytest.raises(ValueError, match=r'^broken image .*dog.1\.png') as caught:
        train(replace(config, data=str(root), check=False, workers=workers))
    assert 'Traceback' not in str(caught.value)


@pytest.mark.filterwarnings('ignore')  # a diverging run may warn
def test_diverged_loss_stops_with_step_and_checkpoint(config):
    with pytest.raises(FloatingPointError, match=r'the loss is (nan|inf) at step \d+; no checkpoint was written yet'):
        train(replace(config, lr=1e30, warmup=0.0))
    train(replace(config, epochs=2))
    saved = read_checkpoint(Path(config.out, 'last.pt'))
    saved['state_dict']['fc.weight'][:] = float('nan')
    saved['epoch'] = 1
    save_checkpoint(saved, Path(config.out, 'last.pt'))
    with pytest.raises(FloatingPointError, match=rf'the loss is nan at step {STEPS + 1}; the last good .*last\.pt'):
        train(replace(config, epochs=2, resume=True))


@pytest.mark.slow
def test_average_of_the_weights_is_warmed_up(config, monkeypatch):
    """A short run scores its weights, not those that it started from, and a resumed one knows how far it is."""
    seen = []
    real = ModelEmaV3.update

    def update(self, model, step=None):
        before = {name: value.clone() for name, value in self.module.state_dict().items()}
        real(self, model, step)
        # 0 at first, then as timm has it for the supernet, too; never above the setting.
        decay = min(1 - max(step, 1) ** (-2 / 3), 0.5)
        for name, value in self.module.state_dict().items():
            if value.is_floating_point():
                expected = torch.lerp(before[name], model.state_dict()[name], 1 - decay)
                torch.testing.assert_close(value, expected, msg=name)
        seen.append(step)

    monkeypatch.setattr(ModelEmaV3, 'update', update)
    config = replace(config, ema_decay=0.5)
    train(replace(config, epochs=1))
    saved = read_checkpoint(Path(config.out, 'last.pt'))
    save_checkpoint({**saved, 'config': {**saved['config'], 'epochs': 2}}, Path(config.out, 'last.pt'))
    train(replace(config, epochs=2, resume=True))
    assert seen == list(range(2 * STEPS))


def test_average_of_a_short_run_is_near_its_weights(config):
    torch.manual_seed(config.seed)
    start = build_model(config.model, 2, **config.model_args, img_size=config.img_size).state_dict()
    saved = read_checkpoint(train(replace(config, ema_decay=0.9999))['checkpoint'])
    moved, behind = (
        sum((saved[key][name] - other[name]).norm() ** 2 for name in start if name.endswith('conv1.weight')) ** 0.5
        for key, other in (('state_dict', start), ('state_dict_ema', saved['state_dict']))
    )
    assert moved > 0.01
    assert behind < 0.5 * moved


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ('logits', 'labels', 'k', 'expected'),
    [
        ([[1, 3, 2], [3, 1, 2]], [1, 1], 1, [True, False]),
        # All equal: as a classifier that always says the same, not always right.
        ([[0, 0, 0]] * 3, [0, 1, 2], 1, [True, False, False]),
        ([[0, 0, 0]] * 3, [0, 1, 2], 2, [True, True, False]),
        ([[0, 2, 2], [0, 2, 2]], [1, 2], 1, [True, False]),
        ([[NAN, 1, 0]] * 3, [0, 1, 2], 1, [False] * 3),
        ([[NAN, NAN, NAN]] * 3, [0, 1, 2], 3, [False] * 3),
        ([[-INF, 1, INF]] * 2, [2, 0], 1, [True, False]),
        ([[NAN], [0]], [0, 0], 1, [False, True]),
        ([[5, 4, 3, 2]] * 2, [1, 2], 2, [True, False]),
    ],
)
def test_what_counts_as_right(logits, labels, k, expected):
    logits, labels = torch.tensor(logits, dtype=torch.float), torch.tensor(labels)
    assert hits(logits, labels, k).tolist() == expected
    assert hits(logits.bfloat16(), labels, k).tolist() == expected


def test_a_network_that_tells_nothing_apart_is_at_chance():
    """By every accuracy of the package."""

    class Constant(nn.Module):
        def forward(self, x):
            return x.new_zeros(len(x), 10)

    accelerator = SimpleNamespace(device='cpu', autocast=contextlib.nullcontext, gather=lambda x: x)
    images, labels = torch.zeros(20, 3, 4, 4), torch.arange(20) % 10
    scores, confusion = evaluate(Constant(), [(images, labels)], 20, accelerator)
    assert (scores['acc1'], scores['acc5']) == (pytest.approx(10), pytest.approx(50))
    assert confusion.tolist() == [[2, *[0] * 9]] * 10
    assert score.accuracy(Constant(), [(images, labels)]) == pytest.approx(10)
    scores, _ = evaluate(nn.Sequential(Constant(), Poison()), [(images, labels)], 20, accelerator)
    assert (scores['acc1'], scores['acc5']) == (0, 0)


class Poison(nn.Module):
    def forward(self, x):
        return x * math.nan


def test_evaluate_counts_every_image_once(images):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    accelerator = Accelerator(cpu=True)
    model = build_model('resnet20_cifar', 10)
    inputs, labels = torch.randn(7, 3, 12, 12), torch.arange(7)
    filled = [(inputs[i], labels[i]) for i in (slice(0, 4), [4, 5, 6, 0])]  # as several processes get them
    scores, confusion = evaluate(model, filled, 7, accelerator)
    with torch.no_grad():
        logits = model(inputs)
    top = logits.topk(5).indices
    assert scores['val_loss'] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    assert scores['acc1'] == pytest.approx(100 * (top[:, 0] == labels).double().mean().item())
    assert confusion.nonzero().tolist() == [[label, top[label, 0]] for label in range(7)]
    assert scores['acc5'] == pytest.approx(100 * (top == labels[:, None]).any(1).double().mean().item())
    AcceleratorState._reset_state(reset_partial_state=True)


def test_compile_needs_one_of_our_blocks(config):
    with pytest.raises(ValueError, match='holds no attention block'):
        train(replace(config, model='test_efficientnet_ln', model_args={}, img_size=32, compile=True))


@pytest.mark.parametrize(
    ('setting', 'says'),
    [
        ({'epochs': 0}, 'epochs must be at least 1, got 0'),
        ({'batch_size': 0}, 'batch_size must be at least 1'),
        ({'lr': 0.0}, 'lr must be above 0'),
        ({'lr': float('nan')}, 'lr must be above 0, got nan'),
        ({'warmup': 1.0}, 'warmup must be at least 0 and below 1'),
        ({'workers': -1}, 'workers must be at least 0'),
        ({'seed': -1}, 'seed must be at least 0'),
        ({'seed': 2**64}, r'seed must be at least 0 and below 2\*\*64, got 18446744073709551616'),
        ({'img_size': 0}, 'img_size must be at least 1'),
        ({'hflip': 2.0}, 'hflip must be a probability'),
        ({'clip_grad': 0.0}, 'clip_grad must be above 0'),
        ({'ema_decay': 1.0}, 'ema_decay must be between 0 and 1'),
        ({'opt': 'sdg'}, "opt must be one of .*'sgd'.*got 'sdg'"),
        ({'mixed_precision': 'fp8'}, 'mixed_precision must be one of'),
        ({'check': False, 'skip_broken': True}, 'skip_broken must be used with the check'),
        ({'val_split': 'test'}, "val_split must be left at 'validation' without a dataset, got 'test'"),
        ({'download': True}, 'download must be left at False without a dataset'),
        ({'opt': 'adamw', 'momentum': 0.5}, r'momentum must be left at 0\.9 for adamw, got 0\.5'),
        ({'batch_size': 100}, '14 training images are fewer than one batch of 100'),
        ({'model': 'resnet50_sasse', 'model_args': {}}, "no model 'resnet50_sasse'; did you mean resnet50_sase"),
        ({'model_args': {'num_classes': 7}}, r"model_args must be without num_classes, .* got {'num_classes': 7}"),
        ({'model_args': {'gennotype': 'sase'}}, 'resnet20_cifar cannot be built with .*gennotype'),
        (
            {'pretrained': True, 'model_args': {'pretrained_cfg_overlay': {'file': f'{"folder/" * 20}weights.pt'}}},
            r'cannot be built with .*(folder/){20}weights\.pt',
        ),
        ({'model_args': {'genotype': 'avg,mlp,affine,avg,avg'}}, 'a genotype has six choices'),
        ({'data': '/nowhere/at/all'}, 'there is no data folder'),
        ({'checkpoint': '/nowhere.pt'}, r'there is no checkpoint .*nowhere\.pt'),
        ({'auto_augment': 'rand-m9'}, 'larger than 64 px'),
        ({'num_classes': 7}, r'num_classes is 7, but train has 2 classes \(cat, dog\)'),
        ({'model_args': {'in_chans': 4}}, 'the model takes images of 4 channels; image files have 1'),
    ],
)
def test_wrong_setting_is_refused_before_any_work(config, setting, says):
    with pytest.raises((ValueError, OSError), match=says):
        train(replace(config, **setting))
    assert not list(Path(config.out).glob('*'))


@pytest.mark.parametrize(
    ('setting', 'says'),
    [
        ({}, 'holds a run already: --resume continues it'),
        ({'resume': True, 'lr': 0.5, 'seed': 3}, r'other settings: lr was 0\.1 and is 0\.5; seed was 0 and is 3'),
        (
            {'resume': True, 'epochs': 9},
            'epochs was 1 and is 9; the learning rate depends on them, so train on from these',
        ),
    ],
)
def test_run_with_other_settings_is_not_resumed(config, setting, says):
    first = replace(config, epochs=1)
    train(first)
    kept = Path(config.out, 'last.pt').read_bytes()
    with pytest.raises(ValueError, match=says):
        train(replace(first, **setting))
    assert Path(config.out, 'last.pt').read_bytes() == kept


def test_run_on_other_data_or_of_something_else_is_not_resumed(config, tmp_path):
    first = replace(config, epochs=1)
    train(first)
    other = make_images(tmp_path / 'other', train=8, val=3, classes=('cat', 'dog'))
    with pytest.raises(ValueError, match=r'trained on other data: 14 training .* this is 16 training'):
        train(replace(first, data=str(other), resume=True))
    save_checkpoint({'state_dict': {}}, Path(config.out, 'last.pt'))
    with pytest.raises(ValueError, match='is not a checkpoint of'):
        train(replace(first, resume=True))


def other_shapes(state):
    return {name: value.new_zeros(2, 3) if value.dim() else value for name, value in state.items()}


def harmed_optimizer(state):
    return {**state, 'state': {number: other_shapes(one) for number, one in state['state'].items()}}


def harmed(optimizer):
    """States of an AdamW that torch loads, by what is wrong with them."""
    group, *groups = optimizer['param_groups']
    for name, value in [
        ('lr', 'x'),
        ('betas', 0.9),
        ('betas', (0.9, 'x')),
        ('eps', None),
        ('eps', torch.ones(2)),
        ('foreach', 'x'),
    ]:
        yield f'{name} {value}', {**optimizer, 'param_groups': [{**group, name: value}, *groups]}
    for name in ('weight_decay', 'betas'):
        less = {key: value for key, value in group.items() if key != name}
        yield f'no {name}', {**optimizer, 'param_groups': [less, *groups]}
    first = next(iter(optimizer['state']))
    state = optimizer['state'][first]
    for name, value in [('exp_avg', 'x'), ('exp_avg', None), ('exp_avg_sq', torch.ones(())), ('step', torch.ones(2))]:
        yield f'{name} {value}', {**optimizer, 'state': {**optimizer['state'], first: {**state, name: value}}}
    yield 'no exp_avg', {**optimizer, 'state': {**optimizer['state'], first: {'step': state['step']}}}


@pytest.mark.slow
def test_damaged_checkpoint_is_named_with_what_to_do(config):
    """Whatever is missing or has another form: one line, and the file stays as it was."""
    small = {'genotype': 'none', 'layers': [1, 1, 1], 'channels': [8, 16, 16]}
    config = replace(config, epochs=1, opt='adamw', ema_decay=0.9, model_args=small)
    train(config)
    last = Path(config.out, 'last.pt')
    whole, content = read_checkpoint(last), last.read_bytes()
    needed = [name for name in whole if name != 'arch']
    harms = {
        f'no {name}': {key: value for key, value in whole.items() if key != name}
        for name in needed
        if name != 'confusion'  # older versions kept none
    }
    harms |= {f'{name} is text': {**whole, name: 'text'} for name in needed if name != 'scaler'}
    harms |= {f'epoch is {epoch}': {**whole, 'epoch': epoch} for epoch in (-1, 2, 0.5)}
    harms |= {
        f'shapes of {name}': {**whole, name: other_shapes(whole[name])} for name in ('state_dict', 'state_dict_ema')
    }
    harms['shapes of the optimizer'] = {**whole, 'optimizer': harmed_optimizer(whole['optimizer'])}
    harms |= {f'{name} of the optimizer': {**whole, 'optimizer': one} for name, one in harmed(whole['optimizer'])}
    harms['scores are empty'] = {**whole, 'scores': {}}
    harms['scores are texts'] = {**whole, 'scores': {'acc1': 'x', 'val_loss': 1.0}}
    harms['settings are empty'] = {**whole, 'config': {}}
    harms['settings are tensors'] = {**whole, 'config': dict.fromkeys(whole['config'], torch.ones(2))}
    files = {'text': b'broken', 'empty': b'', 'cut': content[: len(content) // 2]}
    for what, value in [('a list', [1]), ('a tensor', torch.ones(2)), ('a module', nn.Linear(1, 1))]:
        torch.save(value, last)
        files[what] = last.read_bytes()
    for what in [*harms, *files]:
        if what in harms:
            save_checkpoint(harms[what], last)
        else:
            last.write_bytes(files[what])
        before = last.read_bytes()
        with pytest.raises(ValueError, match=r'last\.pt') as caught:
            train(replace(config, resume=True))
        said = str(caught.value)
        assert len(said.replace(config.out, '')) < 600, what
        assert ('config' in what) == ('give another --out' in said), what
        if 'config' not in what:
            advice = f'delete it to start over; {config.out}/best.pt has the best weights, copy it first'
            assert said.endswith(advice), what
        assert last.read_bytes() == before


def test_splits_that_were_checked_are_not_checked_again(config, monkeypatch):
    from sase_blocks.train import checked_samples

    seen = []
    monkeypatch.setattr(runs, 'inspect_images', lambda samples: seen.append(samples.split) or ({}, ''))
    with open_accelerator(config, 'a test') as accelerator:
        data = checked_samples(config, accelerator)
    train(replace(config, epochs=1), data)
    assert seen == ['train', 'val']


def test_run_on_exchanged_images_is_not_resumed(config, tmp_path):
    """The same names and counts, and other images; without the check it is their sizes that tell."""
    root = make_images(tmp_path / 'own', train=7, val=3, classes=('cat', 'dog'))
    first = replace(config, data=str(root), epochs=1)
    train(first)
    again = replace(first, resume=True)
    for changes in ({}, {'check': False}):
        assert train(replace(again, **changes))['epochs'] == 1
    for split in ('train', 'val'):
        other = shutil.copytree(root, tmp_path / split)
        swap(other / split / 'dog')
        with pytest.raises(ValueError, match=r'trained on other data: .*\(data \w+\+\w+\), this is .*\(data \w+\+'):
            train(replace(again, data=str(other)))
        Image.new('RGB', (12, 12)).save(other / split / 'dog' / '0.png')
        with pytest.raises(ValueError, match=r'trained on other data: .*\(data \w+\+\w+\), this is .*\(data \w+\+'):
            train(replace(again, data=str(other), check=False))


def test_grey_images_under_names_that_are_not_utf8(config, tmp_path, capsys):
    root = disguise(make_images(tmp_path / 'own', train=7, val=3, classes=('cat', 'dog')))
    config = replace(config, data=str(root), model_args={**config.model_args, 'in_chans': 1}, epochs=1)
    assert train(config)['epochs'] == train(replace(config, resume=True))['epochs'] == 1
    saved = read_checkpoint(Path(config.out, 'last.pt'))
    assert (saved['data']['classes'], saved['state_dict']['conv1.weight'].shape[1]) == (['c\udce4t', 'dog'], 1)
    assert 'as 1 x 12 x 12' in capsys.readouterr().out
    (image,) = (root / 'train').rglob('*\n*')
    truncate(image)
    with pytest.raises(ValueError, match=r'broken image .*c\\udce4t/part0/\\udcff\\n0\.png'):
        train(replace(config, out=str(tmp_path / 'second')))
    train(replace(config, out=str(tmp_path / 'second'), skip_broken=True))
    assert r'c\udce4t/part0/\udcff\n0.png' in capsys.readouterr().out


def test_output_folder_that_cannot_be_written(config, tmp_path):
    (tmp_path / 'file').write_text('in the way')
    with pytest.raises(OSError, match=r'the output folder .*file.run cannot be written'):
        train(replace(config, out=str(tmp_path / 'file' / 'run')))


@pytest.mark.parametrize('missing', ['accelerate', 'torch.utils.tensorboard'])
def test_missing_extra_is_named(config, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with contextlib.ExitStack() as stack:
        stack.enter_context(pytest.raises(ImportError, match=r'pip install "sase-blocks\[train\]"'))
        train(replace(config, tensorboard=True))
