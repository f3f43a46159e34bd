"""Architectures as values and texts, and TrioNet, the network of one: timm's interface, training, files."""

import dataclasses
import json
import math
import pickle
import re

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import group_parameters
from torch import nn

from sase_blocks import models
from sase_blocks.models import Architecture, TrioNet
from sase_blocks.models.architecture import EXAMPLE, Block, Stage
from sase_blocks.models.trionet import DEFAULT, read_architecture
from sase_blocks.search.trionet.space import SPACES, draw

pytestmark = pytest.mark.usefixtures('one_thread')

SMALL = 'image 16; stem 8; heads 2; 16: conv3/4 + local3/8; 24: axial/8*2'
LARGE = 'image 64; stem 8/4; heads 2; 16: local5/8; 16: conv1/4; 24: axial/8; 8: conv3/4'


def build(text=SMALL, num_classes=5, **kwargs):
    return timm.create_model('trionet', architecture=text, num_classes=num_classes, **kwargs)


# ---- the value and its forms ----


@pytest.mark.parametrize('name', SPACES)
def test_forms_of_random_points(name):
    space, rng = SPACES[name], np.random.default_rng(0)
    points = [space.architecture(draw(space, rng)) for _ in range(100)]
    assert len(set(points)) > 95
    for point in points:
        forms = [
            Architecture.parse(str(point)),
            Architecture.parse(point.to_json()),
            Architecture.from_dict(point.to_dict()),
            Architecture.from_dict(json.loads(json.dumps(point.to_dict()))),
            pickle.loads(pickle.dumps(point)),
        ]
        for form in forms:
            assert form == point
            assert hash(form) == hash(point)
            assert str(form) == str(point)


@pytest.mark.parametrize(
    ('text', 'same'),
    [
        ('image 32;stem 16;heads 4;64:conv3/16+conv3/16', 'image 32; stem 16; heads 4; 64: conv3/16*2'),
        (
            '  heads 4 ;\n stem  16/1;image 32; 64 : conv3/16*1 + conv3/16*2 ; 8: axial/8\n',
            'image 32; stem 16; heads 4; 64: conv3/16*3; 8: axial/8',
        ),
        (
            'image 32; stem 16/4; heads 1; 64: conv3/16 + conv5/16 + conv3/16',
            'image 32; stem 16/4; heads 1; 64: conv3/16 + conv5/16 + conv3/16',
        ),
    ],
    ids=['without blanks', 'any order', 'runs'],
)
def test_the_text_form_is_one(text, same):
    assert str(Architecture.parse(text)) == same


def test_what_the_text_says():
    stages = (Stage(64, (Block('conv', 3, 16),) * 2), Stage(128, (Block('local', 5, 32), Block('axial', None, 32))))
    architecture = Architecture(32, 16, 1, 4, stages)
    assert Architecture.parse(EXAMPLE) == architecture
    assert architecture.operators == ('conv', 'conv', 'local', 'axial')
    assert Architecture.parse(EXAMPLE.replace('stem 16', 'stem 16/4')).reduction == 4


def test_it_is_a_value():
    architecture = Architecture.parse(SMALL)
    for part, name in (
        (architecture, 'heads'),
        (architecture.stages[0], 'width'),
        (architecture.stages[0].blocks[0], 'width'),
    ):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(part, name, 3)
    lists = Architecture(16, 8, 1, 2, [Stage(s.width, list(s.blocks)) for s in architecture.stages])
    assert lists == architecture
    assert len({lists, architecture, Architecture.parse(LARGE)}) == 2


BLOCK = 'OPERATOR[SIZE]/WIDTH[*COUNT]'

# A text, the part of it that is wrong, and what the message says.
WRONG = [
    ('image 32; stem 16; heads 4; 64: conv4/16', 'conv4/16', 'its size must be odd, got 4'),
    ('image 32; stem 16; heads 4; 64: conv3/16 +  pool/16', 'pool/16', "'pool'; there are conv, local, axial"),
    ('image 32; stem 16; heads 4; 64: conv3/16; 8: axial3/16', 'axial3/16', 'axial attention takes no size, got 3'),
    ('image 32; stem 16; heads 4; 64: local/16', 'local/16', 'local: its size must be an int of at least 1, got None'),
    ('image 32; stem 16; heads 4; 64: conv3/0', 'conv3/0', 'conv: width must be an int of at least 1, got 0'),
    ('image 32; stem 16; heads 4; 64: conv3/8 + conv3/16*0', 'conv3/16*0', 'a count must be from 1 to 1000'),
    ('image 32; stem 16; heads 4; 64: conv3/8*1001', 'conv3/8*1001', 'a count must be from 1 to 1000'),
    ('image 32; stem 16; heads 4; 64: conv3', 'conv3', BLOCK),
    ('image 32; stem 16; heads 4; 64: conv3/16*', 'conv3/16*', BLOCK),
    ('image 32; stem 16; heads 4; 64: conv-3/16', 'conv-3/16', BLOCK),
    ('image 32; stem 16; heads 4; 64 conv3/16', '64 conv3/16', 'is not image, stem or heads with a number, or a stage'),
    ('image 32; stem 16; heads 4; 64: conv3/16; 8 conv3/8', '8 conv3/8', 'is not a stage, WIDTH: BLOCK + BLOCK'),
    ('image 32; stem 16; heads 4; 64: conv3/16; image 9', 'image 9', 'is not a stage'),
    ('image 32; stem 16; image 33; heads 4; 64: conv3/16', 'image 33', 'given twice'),
    ('image 32; stem 16; heads 4/4; 64: conv3/16', 'heads 4/4', 'too many numbers'),
    ('image 32; stem x; heads 4; 64: conv3/16', 'stem x', 'is not image, stem or heads'),
    ('width 32; stem 16; heads 4; 64: conv3/16', 'width 32', 'is not image, stem or heads'),
]  # fmt: skip


@pytest.mark.parametrize(('text', 'part', 'says'), WRONG, ids=[part for _, part, _ in WRONG])
def test_wrong_texts_and_their_place(text, part, says):
    with pytest.raises(ValueError, match='architecture') as caught:
        Architecture.parse(text)
    message = str(caught.value)
    assert says in message
    assert repr(part) in message
    assert f'at character {text.index(part) + 1} of' in message
    assert repr(text) in message


def test_the_place_of_a_part_that_is_empty():
    with pytest.raises(ValueError, match='at character 43 of'):
        Architecture.parse('image 32; stem 16; heads 4; 64: conv3/16 + ')
    with pytest.raises(ValueError, match='at character 1 of'):
        Architecture.parse('')


GOOD = Architecture.parse(SMALL).to_dict()


@pytest.mark.parametrize(
    ('text', 'says'),
    [
        ('image 32; stem 16; 64: conv3/16', 'heads missing in'),
        ('64: conv3/16', 'image, stem, heads missing in'),
        ('image 32; stem 16; heads 4', 'stages missing in'),
        ('image 0; stem 16; heads 4; 64: conv3/16', 'image_size must be an int of at least 1, got 0'),
        ('image 32; stem 16; heads 0; 64: conv3/16', 'heads must be an int of at least 1, got 0'),
        ('image 32; stem 16/2; heads 4; 64: conv3/16', 'the stem must reduce by 1 or 4, got 2'),
        ('image 32; stem 16/0; heads 4; 64: conv3/16', 'the stem must reduce by 1 or 4, got 0'),
        ('image 32; stem 16; heads 4; 64: conv3/16; 0: conv3/16', 'stage 2: width must be an int of at least 1, got 0'),
        (
            'image 32; stem 16; heads 4; 64: conv3/16; 64: conv3/12 + local3/12',
            'stage 2: the width of local3/12 must be a multiple of 2 x heads = 8',
        ),
        ('image 32; stem 16; heads 4; 64: axial/4', 'stage 1: the width of axial/4 must be a multiple'),
        ('{"stem": 3', 'is no valid JSON'),
        ('{}', "KeyError: 'stages'"),
        (json.dumps({**GOOD, 'depth': 3}), 'depth'),
        (json.dumps({**GOOD, 'stages': 3}), 'not an architecture'),
        (json.dumps({**GOOD, 'stages': []}), 'at least one stage'),
        (json.dumps({**GOOD, 'stages': [{'width': 3, 'blocks': []}]}), 'stage 1 has no blocks'),
        (json.dumps({**GOOD, 'stages': [{**GOOD['stages'][0], 'name': 'x'}]}), 'name'),
        (json.dumps({**GOOD, 'heads': 2.0}), 'heads must be an int of at least 1, got 2.0'),
        (json.dumps({**GOOD, 'stem': True}), 'stem must be an int of at least 1, got True'),
    ],
)  # fmt: skip
def test_wrong_values(text, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        Architecture.parse(text)


@pytest.mark.parametrize('value', [3, None, b'image 32', {'image_size': 32}], ids=str)
def test_no_text(value):
    with pytest.raises(TypeError, match='an architecture is a text such as'):
        Architecture.parse(value)


@pytest.mark.parametrize('form', ['text', 'json', 'result', 'nested result'])
@pytest.mark.parametrize('entry', ['read', 'create_model'])
def test_files(tmp_path, form, entry):
    point = Architecture.parse(SMALL)
    path = tmp_path / ('a.txt' if form == 'text' else 'a.json')
    content = {
        'text': f'\n{point}\n',
        'json': point.to_json(),
        'result': json.dumps({'space': {'stem': 3}, 'architecture': str(point), 'accuracy': 0.9}),
        'nested result': json.dumps({'architecture': point.to_dict()}),
    }[form]
    path.write_text(content, encoding='utf-8')
    if entry == 'read':
        assert Architecture.read(path) == Architecture.read(str(path)) == read_architecture(str(path)) == point
    else:
        built = {name: p.shape for name, p in build(str(path), device='meta').named_parameters()}
        assert built == {name: p.shape for name, p in TrioNet(point, 5, device='meta').named_parameters()}


@pytest.mark.parametrize(
    ('content', 'says'),
    [
        (None, 'cannot be read'),
        (b'\xff\xfe\x00', 'cannot be read'),
        (b'', 'is empty'),
        (b'{"architecture": ', 'Expecting value'),
        (b'{"architecture": 3}', 'not an architecture: 3'),
        (b'{"architecture": "image 32; stem x"}', "'stem x' is not"),
        (b'{"accuracy": 3}', "KeyError: 'stages'"),
        (b'[1]', "'[1]' is not image"),
    ],
    ids=str,
)
def test_wrong_files(tmp_path, content, says):
    path = tmp_path / 'wrong.json'
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(says)) as caught:
        read_architecture(str(path))
    assert 'wrong.json' in str(caught.value)


# ---- the network ----


def test_registered():
    assert 'trionet' in timm.list_models()
    assert 'trionet' not in timm.list_models(pretrained=True)
    model = timm.create_model('trionet', device='meta')
    assert isinstance(model, models.TrioNet)
    assert [len(stage) for stage in model.stages] == [3, 4, 6, 3]
    assert model.num_classes == 1000
    assert model.pretrained_cfg['input_size'] == (3, 224, 224)
    assert Architecture.parse(DEFAULT).image_size == 224
    small = build(device='meta').pretrained_cfg
    assert (small['input_size'], small['crop_pct']) == ((3, 16, 16), 1.0)
    assert build(device='meta', img_size=(96, 40)).pretrained_cfg['input_size'] == (3, 96, 40)
    with pytest.raises(RuntimeError, match='No pretrained weights'):
        build(pretrained=True)


@pytest.mark.parametrize('image', [1, 15, 16, 17, 30])
@pytest.mark.parametrize('text', [SMALL, LARGE], ids=['1', '4'])
def test_places_are_where_the_blocks_are(text, image):
    """Channels, stride and maps that come in, in the network itself."""
    point = dataclasses.replace(Architecture.parse(text), image_size=image)
    model, seen = TrioNet(point, 5).eval(), []
    for stage in model.stages:
        for block in stage:
            block.register_forward_hook(lambda m, args, y: seen.append((m, args[0].shape, y.shape)))
    model(torch.randn(1, 3, image, image))
    places = list(point.places())
    assert [places[n][:2] for n in range(len(seen))] == [
        (i, j) for i, s in enumerate(point.stages) for j in range(len(s.blocks))
    ]
    for (i, j, block, channels, stride, size), (module, before, after) in zip(places, seen, strict=True):
        assert module is model.stages[i][j]
        assert (channels, size, size) == before[1:]
        assert after[1:] == (point.stages[i].width, math.ceil(size / stride), math.ceil(size / stride))
        assert block.operator == module.operator
        if block.operator == 'axial':
            assert module.middle.size == (size, size)


def test_tables_follow_img_size():
    model = build('image 16; stem 8; heads 2; 16: axial/8; 24: axial/8*2', img_size=(20, 9), device='meta')
    assert [block.middle.size for stage in model.stages for block in stage] == [(20, 9), (20, 9), (10, 5)]
    with pytest.raises(ValueError, match='img_size'):
        build(img_size=0)


@pytest.mark.parametrize('text', [SMALL, LARGE], ids=['1', '4'])
def test_any_image(text):
    model = build(text, in_chans=2, num_classes=7).eval()
    for height, width in ((16, 16), (15, 17), (33, 9), (1, 5)):
        assert model(torch.randn(1, 2, height, width)).shape == (1, 7)
    assert model.conv1.in_channels == 2
    with pytest.raises(RuntimeError, match='channels'):
        model(torch.randn(1, 3, 16, 16))


@pytest.mark.parametrize('stages', [1, 2, 3, 4])
@pytest.mark.parametrize('stem', ['8', '8/4'])
def test_features(stem, stages):
    """Of the stem and of every stage: channels, reductions, sizes, and the same from forward_intermediates."""
    widths = [16, 24, 24, 8][:stages]
    blocks = ['conv3/4', 'local3/8 + conv3/4', 'axial/8', 'conv1/4'][:stages]
    text = f'image 30; stem {stem}; heads 2; ' + '; '.join(f'{w}: {b}' for w, b in zip(widths, blocks, strict=True))
    torch.manual_seed(1)
    plain = build(text, num_classes=0, zero_init_last=False).eval()
    torch.manual_seed(1)
    model = build(text, zero_init_last=False, features_only=True).eval()
    model.load_state_dict({name.replace('stages.', 'stages_'): t for name, t in plain.state_dict().items()})
    reductions = [2, 4, 8, 16, 32] if '/' in stem else [1, 1, 2, 4, 8]
    assert model.feature_info.channels() == [8, *widths]
    assert model.feature_info.reduction() == reductions[: stages + 1]
    x = torch.randn(2, 3, 30, 17)
    features = model(x)
    shapes = [(2, c, math.ceil(30 / r), math.ceil(17 / r)) for c, r in zip([8, *widths], reductions, strict=False)]
    assert [f.shape for f in features] == shapes
    last, intermediates = plain.forward_intermediates(x)
    assert all(torch.equal(a, b) for a, b in zip(features, intermediates, strict=True))
    assert torch.equal(last, plain.forward_features(x))
    assert torch.equal(last, features[-1])
    for index in range(stages + 1):
        (one,) = plain.forward_intermediates(x, indices=[index], stop_early=True, intermediates_only=True)
        assert torch.equal(one, features[index])
    assert torch.equal(plain(x), F.adaptive_avg_pool2d(last, 1).flatten(1))


def test_pruning_and_the_head():
    model = build(LARGE).eval()
    x = torch.randn(2, 3, 40, 40)
    features = model.forward_intermediates(x, intermediates_only=True)
    model.reset_classifier(9)
    assert model(x).shape == (2, 9)
    assert model.get_classifier() is model.fc
    model.reset_classifier(0)
    assert torch.equal(model(x), features[-1].mean((2, 3)))
    with pytest.raises(ValueError, match='NCHW'):
        model.forward_intermediates(x, output_fmt='NLC')
    before = sum(p.numel() for p in model.parameters())
    assert model.prune_intermediate_layers(indices=[1, 2]) == [1, 2]
    assert sum(p.numel() for p in model.parameters()) < before
    assert all(map(torch.equal, model.forward_intermediates(x, [1, 2], intermediates_only=True), features[1:3]))


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore:.torch.jit.*is deprecated')
def test_scripted():
    model = build(zero_init_last=False).eval()
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))


def test_a_step_of_training_in_bf16():
    model = build(drop_rate=0.1).train()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):  # in the first, blocks are the identity
        with torch.autocast('cpu', dtype=torch.bfloat16):
            loss = F.cross_entropy(model(torch.randn(4, 3, 16, 16)), torch.arange(4))
        optimiser.zero_grad()
        loss.backward()
        assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
        optimiser.step()
    assert [n for n, p in model.named_parameters() if not p.grad.any() and not n.endswith('logit_norm.bias')] == []


def test_files_of_weights(tmp_path):
    """Built from the files that a search leaves."""
    model = build().train()
    model(torch.randn(4, 3, 16, 16))
    torch.save(model.state_dict(), tmp_path / 'network.pt')
    (tmp_path / 'architecture.json').write_text(json.dumps({'architecture': SMALL}), encoding='utf-8')
    again = build(str(tmp_path / 'architecture.json'), checkpoint_path=str(tmp_path / 'network.pt'))
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(again.eval()(x), model.eval()(x))
    with pytest.raises(RuntimeError, match=r'size mismatch|Missing key'):
        build(LARGE, checkpoint_path=str(tmp_path / 'network.pt'))


@pytest.mark.parametrize('coarse', [False, True])
def test_parameter_groups(coarse):
    model = build(device='meta')
    layers = group_parameters(model, model.group_matcher(coarse), return_values=False, reverse=True)
    assert set(layers) == {name for name, _ in model.named_parameters()}
    by_place = {}
    for name, layer in layers.items():
        parts = name.split('.')
        place = ('stem',) if parts[0] in ('conv1', 'bn1') else tuple(parts[: 2 if coarse else 3])
        by_place.setdefault('head' if parts[0] == 'fc' else place, set()).add(layer)
    assert len(by_place) == (4 if coarse else 6)
    assert sorted(layer for (layer,) in by_place.values() if layer != max(layers.values())) == list(
        range(len(by_place) - 1)
    )


@pytest.mark.parametrize('training', [False, True])
def test_blocks_start_as_the_identity(training):
    text = 'image 8; stem 16; heads 2; 16: conv3/4 + local3/8 + axial/8'
    x = torch.rand(4, 16, 8, 8)
    assert torch.equal(build(text).train(training).stages(x), x)
    assert not torch.allclose(build(text, zero_init_last=False).train(training).stages(x), x, atol=1e-2)


@pytest.mark.parametrize('zero_init_last', [False, True])
def test_initialisation(zero_init_last):
    """He's for the convolutions; the attentions keep their own, whose logits start small."""
    model = build('image 8; stem 64; heads 4; 256: conv3/64 + local3/64 + axial/64', zero_init_last=zero_init_last)
    conv, local, axial = model.stages[0]
    for weight, deviation in (
        (model.conv1.weight, math.sqrt(2 / (9 * 64))),
        (conv.middle.weight, math.sqrt(2 / (9 * 64))),
        (conv.conv3.weight, math.sqrt(2 / 256)),
        (local.middle.query.weight, 1 / math.sqrt(64 * 16)),
        (local.middle.key.weight, 1 / math.sqrt(64)),
        (axial.middle.height.project.weight, 1 / math.sqrt(64)),
        (axial.middle.width.relative, 1 / math.sqrt(16)),
    ):
        assert weight.std().item() == pytest.approx(deviation, rel=0.1)
    assert all(block.norm3.weight.eq(0 if zero_init_last else 1).all() for block in (conv, local, axial))


def test_gradient_checkpointing():
    model = build(zero_init_last=False).double().train()
    x, found = torch.randn(4, 3, 16, 16, dtype=torch.float64), []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).square().sum().backward()
        found.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    model.eval()
    y = [model.forward_intermediates(x)[0], model.forward_features(x)]
    model.set_grad_checkpointing(False)
    assert all(torch.equal(one, model.forward_features(x)) for one in y)


@pytest.mark.parametrize(
    ('kwargs', 'error', 'says'),
    [
        ({'text': 'resnet50'}, ValueError, "'resnet50' is not image"),
        ({'text': 'missing.json'}, ValueError, 'the architecture file missing.json cannot be read'),
        ({'text': 'missing.txt'}, ValueError, 'the architecture file missing.txt cannot be read'),
        ({'text': 5}, TypeError, 'an architecture is a text'),
        ({'img_size': -1}, ValueError, 'img_size'),
        ({'no_such_argument': 1}, TypeError, 'no_such_argument'),
    ],
    ids=str,
)
def test_wrong_arguments(kwargs, error, says):
    with pytest.raises(error, match=re.escape(says)):
        build(**kwargs)


def test_dropout_is_before_the_classifier():
    model = build(drop_rate=0.5).train()
    x = torch.ones(1, 24, 2, 2)
    assert set(model.forward_head(x, pre_logits=True).unique().tolist()) == {0.0, 2.0}
    assert torch.equal(model.eval().forward_head(x, pre_logits=True), torch.ones(1, 24))
    assert isinstance(model.fc, nn.Linear)
