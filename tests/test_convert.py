"""Checkpoints from elsewhere: the authors' ResNets and detectors, plain ResNets, damaged and foreign files."""

import argparse
import json
import pickle
import zlib

import numpy as np
import pytest
import timm
import torch
from conftest import mostly_slow
from golden_data import GOLDEN, load, section
from torch.optim.swa_utils import AveragedModel

from sase_blocks import AttentionBlock, Genotype, convert_paper_state_dict, load_checkpoint
from sase_blocks.checkpoint import read_checkpoint


def fill(key: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The golden data's rule: a tensor from its key and shape."""
    r = np.random.default_rng(zlib.crc32(key.encode())).standard_normal(shape)
    last = key.rsplit('.', 1)[-1]
    if last == 'num_batches_tracked':
        return torch.tensor(0)
    if last in ('running_mean', 'bias', 'beta'):
        r = 0.1 * r
    elif last == 'running_var':
        r = np.exp(0.1 * r)
    elif last == 'alpha' or len(shape) == 1:
        r = (1 + 0.1 * r) * (0.2 if key.endswith('bn3.weight') else 1)
    else:
        r = r * np.sqrt((0.1 if 'attention._ops' in key else 2) / np.prod(shape[1:]))
    return torch.from_numpy(np.asarray(r))


def paper_state(depth: int) -> dict[str, torch.Tensor]:
    shapes = json.loads((GOLDEN / 'sase_resnet_state_shapes.json').read_text())[f'resnet{depth}']
    return {key: fill(key, tuple(shape)) for key, shape in shapes.items()}


@pytest.fixture(scope='module')
def paper50() -> dict[str, torch.Tensor]:
    return paper_state(50)


@pytest.mark.slow
@pytest.mark.parametrize('depth', [50, 101])
def test_authors_logits(depth):
    model = timm.create_model(f'resnet{depth}_sase', num_classes=10).double().eval()
    report = load_checkpoint(model, {'epoch': 3, 'state_dict': paper_state(depth), 'best_acc_top1': 1.0})
    assert report.added == []
    x = torch.from_numpy(
        np.random.default_rng(zlib.crc32(f'resnet{depth}/x'.encode())).standard_normal((2, 3, 224, 224))
    )
    golden = load('sase_resnet_logits.npz')
    key = next(k for k in golden if f'resnet{depth}' in k)
    with torch.no_grad():
        torch.testing.assert_close(model(x), golden[key], rtol=0, atol=1e-9)


WRAPPINGS = {
    'bare': lambda s: s,
    'module.': lambda s: {f'module.{k}': v for k, v in s.items()},
    'state_dict': lambda s: {'state_dict': s, 'epoch': 1},
    'state_dict of module.': lambda s: {'state_dict': {f'module.{k}': v for k, v in s.items()}},
}


@pytest.mark.parametrize('wrap', mostly_slow(WRAPPINGS, 'bare', 'state_dict of module.'))
def test_wrappings_of_an_imagenet_file(wrap, paper50):
    expected = timm.create_model('resnet50_sase', num_classes=10).state_dict()
    converted = convert_paper_state_dict(WRAPPINGS[wrap](paper50))
    assert {k: v.shape for k, v in converted.items()} == {k: v.shape for k, v in expected.items()}


@pytest.mark.parametrize('outer', mostly_slow(['', 'module.'], 'module.'))
def test_a_detectors_backbone(outer, paper50):
    detector = {f'{outer}backbone.{k}': v for k, v in paper50.items() if not k.startswith('fc.')}
    detector[f'{outer}neck.lateral_convs.0.conv.weight'] = torch.zeros(1)
    model = timm.create_model('resnet50_sase', num_classes=0)
    report = load_checkpoint(model, {'state_dict': detector, 'meta': {}})
    assert report.added == []
    assert torch.equal(model.conv1.weight, paper50['conv1.weight'].float())
    features = timm.create_model('resnet50_sase', features_only=True)
    missing, unexpected = features.load_state_dict(convert_paper_state_dict({'state_dict': detector}), strict=False)
    assert missing == []
    assert unexpected == []


@pytest.mark.parametrize('name', ['found', *(f'random{i}' for i in range(6))])
def test_a_single_blocks_state_dict(name):
    data = section('sase_blocks.npz', f'{name}/')
    block = AttentionBlock(32, Genotype.from_paper(data['genotype']), feat_size=(7, 6))
    load_checkpoint(block, {k.removeprefix('state/'): v for k, v in data.items() if k.startswith('state/')})
    key = '_ops.5.0.weight' if 'state/_ops.5.0.weight' in data else None
    if key:
        torch.testing.assert_close(
            block.spatial_excite.convs[0].weight.double(), data[f'state/{key}'], rtol=1e-6, atol=0
        )


@pytest.mark.slow
def test_a_plain_resnet_keeps_the_attentions_initial_values():
    plain = timm.create_model('resnet50', num_classes=10)
    model = timm.create_model('resnet50_sase', num_classes=10)
    before = {k: v.clone() for k, v in model.state_dict().items() if '.se.' in k}
    report = load_checkpoint(model, plain.state_dict())
    assert set(report.added) == set(before)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())
    assert torch.equal(model.layer4[0].conv2.weight, plain.layer4[0].conv2.weight)
    text = str(report)
    assert 'added attention' in text
    assert str(len(before)) in text
    assert '.se.' in text


@pytest.mark.slow
def test_timm_loads_plain_and_authors_files_by_itself(tmp_path, paper50):
    """timm's own pretrained path, strict: the filter fills in the attention of a plain file only."""
    for state, fits in [
        (timm.create_model('resnet50', num_classes=10).state_dict(), True),
        (paper50, True),
        ({k: v for k, v in paper50.items() if 'layer3.2.attention._ops.1' not in k}, False),
    ]:
        torch.save(state, tmp_path / 'w.pth')
        overlay = {'file': str(tmp_path / 'w.pth'), 'num_classes': 10}
        build = lambda o=overlay: timm.create_model(  # noqa: E731
            'resnet50_sase', pretrained=True, num_classes=10, pretrained_cfg_overlay=o
        )
        if fits:
            assert torch.equal(build().conv1.weight, state['conv1.weight'].float())
        else:
            with pytest.raises(RuntimeError, match=r'layer3\.2\.se\.channel_excite\.fc1'):
                build()


def without(part):
    return lambda s: {k: v for k, v in s.items() if part not in k}


DAMAGED = {
    'attention keys missing': (
        without('layer2.1.attention._ops.2'),
        r'2 keys missing: layer2\.1\.se\.gate_excite\.weight',
    ),
    'backbone keys missing': (without('layer2.1.conv2'), r'1 keys missing: layer2\.1\.conv2\.weight'),
    'unknown attention key': (
        lambda s: {**s, 'layer1.0.attention._ops.0.zzz': s['fc.bias']},
        r'unknown key .*_ops\.0\.zzz',
    ),
    'attention of another shape': (
        lambda s: {**s, 'layer1.0.attention.mixer.0.weight': torch.zeros(2)},
        r"layer1\.0\.attention\.mixer\.0\.weight' has shape \(2,\), expected 1 two 1 1",
    ),
    'a key too many': (lambda s: {**s, 'extra.weight': s['fc.bias']}, r'not in the model: extra\.weight'),
    'another shape': (lambda s: {**s, 'fc.weight': s['fc.weight'][:3]}, r'fc\.weight is \(3, 2048\).*keep_head=True'),
    'no tensors': (lambda s: {'epoch': 3}, r'state dict of tensors.*epoch: int'),
    'empty': (lambda s: {}, r'got nothing'),
}


@pytest.mark.parametrize(
    ('damage', 'text'),
    [
        pytest.param(
            *row,
            id=name,
            marks=() if name in ('attention keys missing', 'another shape', 'no tensors') else pytest.mark.slow,
        )
        for name, row in DAMAGED.items()
    ],
)
def test_a_damaged_checkpoint_is_refused_and_the_model_unchanged(damage, text, paper50):
    model = timm.create_model('resnet50_sase', num_classes=10)
    before = model.conv1.weight.clone()
    with pytest.raises(ValueError, match=text):
        load_checkpoint(model, damage(paper50))
    assert torch.equal(model.conv1.weight, before)


def test_another_models_checkpoint_is_refused():
    model = timm.create_model('resnet50_sase', num_classes=10)
    with pytest.raises(ValueError, match='keys missing'):
        load_checkpoint(model, timm.create_model('resnet18', num_classes=10).state_dict())
    with pytest.raises(ValueError, match="not a SASE authors' checkpoint"):
        convert_paper_state_dict(timm.create_model('resnet18').state_dict())


@pytest.mark.parametrize('classes', [7, 0])
def test_keep_head(classes, paper50):
    model = timm.create_model('resnet50_sase', num_classes=classes)
    with pytest.raises(ValueError, match='keep_head=True'):
        load_checkpoint(model, paper50)
    report = load_checkpoint(model, paper50, keep_head=True)
    assert report.kept_head == (['fc.weight', 'fc.bias'] if classes else [])
    assert torch.equal(model.layer4[0].conv2.weight, paper50['layer4.0.conv2.weight'].float())


class Hostile:
    def __reduce__(self):
        return (exec, ('raise SystemExit("code of the file ran")',))


@pytest.mark.parametrize('kind', ['missing', 'truncated', 'hostile', 'hostile pickle'])
def test_files_that_are_no_checkpoints(kind, tmp_path):
    path = tmp_path / 'w.pth'
    model = timm.create_model('resnet20_cifar')
    if kind == 'truncated':
        torch.save(model.state_dict(), path)
        path.write_bytes(path.read_bytes()[:-5000])
    elif kind == 'hostile':
        torch.save({'state_dict': Hostile()}, path)
    elif kind == 'hostile pickle':
        path.write_bytes(pickle.dumps({'state_dict': Hostile()}))
    with pytest.raises(FileNotFoundError if kind == 'missing' else ValueError, match=r'w\.pth'):
        load_checkpoint(model, path)


def test_a_round_trip_through_a_file(tmp_path):
    model, other = (timm.create_model('resnet20_cifar', genotype='sase') for _ in range(2))
    torch.save({'model': model.state_dict()}, tmp_path / 'w.pt')
    report = load_checkpoint(other, tmp_path / 'w.pt')
    assert len(report.loaded) == len(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


def small(**kwargs):
    return timm.create_model('resnet20_cifar', layers=(1, 1, 1), channels=(8, 16, 16), num_classes=3, **kwargs)


def before(prefix, state):
    return {prefix + key: value for key, value in state.items()}


def other(state):
    return {key: value + 1 for key, value in state.items()}


def averaged(model):
    return AveragedModel(model, use_buffers=True).state_dict()


def profiled(state):
    """As thop leaves it: two buffers in each module and in the network itself."""
    modules = {key.rpartition('.')[0] for key in state} | {''}
    names = (f'{m}.{name}'.lstrip('.') for m in modules for name in ('total_ops', 'total_params'))
    return {**state, **{name: torch.zeros(1, dtype=torch.float64) for name in names}}


def in_itself(state):
    state['model'] = state
    return state


EXTRA = {'criterion.weight': torch.ones(3), 'neck.conv.weight': torch.ones(2)}
# What a file holds, for a network and its state dict; entry, prefix and what is left out (None: not asked), arguments.
TRAINERS = {
    **{
        repr(prefix): (lambda m, s, prefix=prefix: before(prefix, s), '', prefix, [], {})
        for prefix in (
            'model.', 'module.', '_orig_mod.', 'backbone.', 'encoder.', 'module.model.', 'model.module.',
            '_orig_mod.module.', 'module._orig_mod.', 'model.encoder.backbone._orig_mod.', 'module.module.',
        )
    },
    'Lightning': (
        lambda m, s: {'state_dict': {**before('model.', s), **EXTRA}, 'callbacks': {}, 'loops': {}, 'epoch': 3},
        'state_dict', 'model.', list(EXTRA), {},
    ),
    'compiled, in DDP': (lambda m, s: {'model': before('module._orig_mod.', s)}, 'model', 'module._orig_mod.', [], {}),
    'DeepSpeed': (lambda m, s: {'module': before('model.', s), 'ds_config': {}}, 'module', 'model.', [], {}),
    'settings beside': (lambda m, s: {'model': {'name': 'x'}, 'state_dict': s}, 'state_dict', '', [], {}),
    'AveragedModel': (lambda m, s: averaged(m), '', 'module.', ['n_averaged'], {}),
    'AveragedModel, in a module': (
        lambda m, s: {'state_dict': before('model.', averaged(m))},
        'state_dict', 'model.module.', ['model.n_averaged'], {},
    ),
    **{
        f'{name} alone': (lambda m, s, name=name: {name: s, 'epoch': 1}, name, '', [], {})
        for name in ('state_dict_ema', 'model_ema', 'ema_model', 'ema_state_dict', 'ema')
    },
    'the weights, not their average': (
        lambda m, s: {'state_dict': s, 'state_dict_ema': other(s)}, 'state_dict', '', ['state_dict_ema'], {},
    ),
    'the average, not the weights': (
        lambda m, s: {'state_dict': other(s), 'state_dict_ema': s},
        'state_dict_ema', '', ['state_dict'], {'use_ema': True},
    ),
    'torchvision, its average': (
        lambda m, s: {'model': other(s), 'model_ema': averaged(m), 'args': {}},
        'model_ema', 'module.', ['model', 'n_averaged'], {'use_ema': True},
    ),
    'an average in an entry': (lambda m, s: {'ema': {'module': s}}, 'ema.module', '', [], {'use_ema': True}),
    'in an entry': (lambda m, s: {'checkpoint': {'model': s, 'epoch': 1}}, 'checkpoint.model', '', [], {}),
    'in an entry, the average': (
        lambda m, s: {'checkpoint': {'model': other(s), 'ema_model': s}},
        'checkpoint.ema_model', '', ['model'], {'use_ema': True},
    ),
    'four entries deep': (
        lambda m, s: {'checkpoint': {'net': {'module': {'state_dict': s}}}},
        'checkpoint.net.module.state_dict', '', [], {},
    ),
    'profiled': (lambda m, s: profiled(s), '', '', None, {}),
    'profiled, in DDP': (lambda m, s: before('module.', profiled(s)), '', 'module.', None, {}),
    'a prefix of its own': (lambda m, s: before('student.', s), '', 'student.', [], {'prefix': 'student.'}),
    'without its dot, and others': (
        lambda m, s: {**before('module.student.model.', s), **before('module.teacher.model.', other(s))},
        '', 'module.student.model.', None, {'prefix': 'student'},
    ),
    'one of two': (
        lambda m, s: {**before('model.', other(s)), **before('module.', s)}, '', 'module.', None, {'prefix': 'module.'},
    ),
    'no prefix of two': (lambda m, s: {**before('model.', other(s)), **s}, '', '', None, {'prefix': ''}),
    'the whole one of two': (
        lambda m, s: {**s, **before('model.', {k: v + 1 for k, v in s.items() if 'fc' not in k})}, '', '', None, {},
    ),
}  # fmt: skip


@pytest.mark.parametrize(('wrap', 'entry', 'prefix', 'left_out', 'arguments'), TRAINERS.values(), ids=TRAINERS)
def test_other_trainers_files(wrap, entry, prefix, left_out, arguments, tmp_path):
    torch.manual_seed(0)
    model, loaded = small(), small()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    torch.save(wrap(model, state), tmp_path / 'w.pt')
    report = load_checkpoint(loaded, tmp_path / 'w.pt', **arguments)
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())
    assert (report.entry, report.prefix) == (entry, prefix)
    if left_out is not None:
        assert report.left_out == left_out
    if entry:
        assert f'tensors loaded from {entry!r}' in str(report)
    if prefix:
        assert f'{prefix!r} removed from their names' in str(report)
    if report.left_out:
        assert f'left out of the file: {len(report.left_out)} entries: {report.left_out[0]}' in str(report)


def test_names_of_the_model_itself_are_no_prefixes():
    for name in ('model', 'encoder', '_orig_mod'):
        model, loaded = (torch.nn.ModuleDict({name: small()}) for _ in range(2))
        report = load_checkpoint(loaded, before('module.', model.state_dict()))
        assert report.prefix == 'module.'
        assert load_checkpoint(loaded, model.state_dict()).prefix == ''
        assert torch.equal(loaded[name].conv1.weight, model[name].conv1.weight)


REFUSED = {
    'two that fit': (
        lambda m, s: {**before('model.', s), **before('module.', s)}, {},
        r"^state dict: the keys under 'model\.' and under 'module\.' fit .* equally well: choose .* prefix='module\.'$",
    ),
    'none and another': (lambda m, s: {**s, **before('encoder.', s)}, {}, r"under '' and under 'encoder\.' fit"),
    'not a prefix of it': (
        lambda m, s: before('model.', s), {'prefix': 'student'},
        r"no key of the model has prefix='student\.'; first keys: model\.conv1\.weight, ",
    ),
    'none, where there is one': (lambda m, s: before('model.', s), {'prefix': ''}, r"prefix=''; first keys: model\."),
    'one that nobody knows': (lambda m, s: before('student.', s), {}, r"; its keys fit with prefix='student\.'$"),
    'one within a known one': (
        lambda m, s: before('module.net.', s), {}, r"keys missing: .*; its keys fit with prefix='module\.net\.'$",
    ),
    'no average': (
        lambda m, s: {'state_dict': s}, {'use_ema': True},
        r'^state dict: use_ema=True, but there is no average of the weights under state_dict_ema, model_ema, ',
    ),
    'a profile alone': (lambda m, s: {'total_ops': torch.zeros(1)}, {}, r'keys missing: conv1\.weight'),
    'a broken copy': (
        lambda m, s: {k: v for k, v in before('module.', s).items() if 'bn1' not in k}, {}, r'missing: bn1\.weight',
    ),
    'settings alone': (lambda m, s: {'model': {'name': 'x'}}, {}, 'expected a state dict of .* got model: dict'),
    'an entry in itself': (lambda m, s: in_itself({}), {}, 'expected a state dict of .* got model: dict'),
    'an entry in itself, and weights': (lambda m, s: in_itself(s), {}, 'expected a state dict of .* got conv1'),
    'five entries deep': (
        lambda m, s: {'model': {'model': {'model': {'model': {'model': s}}}}}, {}, r' at most 4 deep, got model: dict$',
    ),
    'numbers for names': (
        lambda m, s: {1: s['conv1.weight']}, {}, r'^state dict: expected .* with string keys, got 1 \(int\)',
    ),
    'numbers for names in an entry': (
        lambda m, s: {'model': {**s, 2: s['conv1.weight']}}, {}, r'with string keys, got 2 \(int\)$',
    ),
}  # fmt: skip


@pytest.mark.parametrize(('wrap', 'arguments', 'text'), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused(wrap, arguments, text):
    model = small()
    state = {key: value + 1 for key, value in model.state_dict().items()}
    kept = model.conv1.weight.clone()
    with pytest.raises(ValueError, match=text) as error:
        load_checkpoint(model, wrap(model, state), **arguments)
    assert '\n' not in str(error.value)
    assert torch.equal(model.conv1.weight, kept)


def test_a_refused_file_is_named(tmp_path):
    torch.save({1: torch.ones(1)}, tmp_path / 'w.pt')
    with pytest.raises(ValueError, match=r'^\S*w\.pt: expected a state dict with string keys, got 1 \(int\)$'):
        load_checkpoint(small(), tmp_path / 'w.pt')


def test_the_authors_keys_behind_any_prefix(paper50):
    expected = {key: value.shape for key, value in convert_paper_state_dict(paper50).items()}
    state = profiled(before('module.model.', paper50))
    assert {key: value.shape for key, value in convert_paper_state_dict({'state_dict': state}).items()} == expected
    data = section('sase_blocks.npz', 'found/')
    block = AttentionBlock(32, Genotype.from_paper(data['genotype']), feat_size=(7, 6))
    plain = {k.removeprefix('state/'): v for k, v in data.items() if k.startswith('state/')}
    assert load_checkpoint(block, before('module.encoder.', plain)).prefix == 'module.encoder.'


class Options(argparse.Namespace):
    pass


@pytest.mark.parametrize(
    ('args', 'text'),
    [
        (argparse.Namespace(lr=0.1, model='resnet20_cifar', betas=(0.9, 0.999), opts=[None, True]), None),
        (argparse.Namespace(inner=argparse.Namespace(a=1)), None),
        (Options(lr=0.1), r'w\.pth: it holds .*Options'),
        (argparse.Namespace(lr=Hostile()), r'w\.pth: it holds .*exec'),
        (argparse.FileType('r'), r'w\.pth: it holds argparse\.FileType'),
    ],
    ids=['timm', 'nested', 'a subclass', 'hostile within', 'another class'],
)
def test_options_beside_the_weights(args, text, tmp_path):
    """timm's train.py stores its argparse.Namespace: that one class is plain values, no other is let in."""
    model, loaded = small(), small()
    torch.save({'state_dict': model.state_dict(), 'args': args, 'arch': 'resnet20_cifar'}, tmp_path / 'w.pth')
    if text is None:
        load_checkpoint(loaded, tmp_path / 'w.pth')
        assert torch.equal(loaded.conv1.weight, model.conv1.weight)
        assert vars(read_checkpoint(tmp_path / 'w.pth')['args']) == vars(args)
    else:
        with pytest.raises(ValueError, match=text):
            load_checkpoint(loaded, tmp_path / 'w.pth')
