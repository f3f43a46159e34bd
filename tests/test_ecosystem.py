"""Our models inside other libraries: the examples that need the extra `ecosystem`; `make test-ecosystem` runs these."""

import copy
import importlib.util
import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image, ImageDraw

import sase_blocks
from sase_blocks.blocks import AttentionModule

ROOT = Path(__file__).parent.parent
pytestmark = [
    pytest.mark.ecosystem,
    # pycocotools' compiled part on numpy 2.
    pytest.mark.filterwarnings('ignore:__array__ implementation:DeprecationWarning'),
]

# Warnings are errors, but for those of the other library about itself.
ERRORS = ['-W', 'error']
LIGHTNING = [*ERRORS, '-W', 'ignore::FutureWarning', '-W', 'ignore::UserWarning', '-W', 'ignore::DeprecationWarning']


@pytest.mark.parametrize(
    ('name', 'warnings', 'args', 'expected'),
    [
        ('segmentation.py', ERRORS, ['--steps', '5'], ['Unet on resnet50_sase: loss', 'mean IoU']),
        ('segmentation.py', ERRORS, ['--steps', '5', '--arch', 'DeepLabV3Plus'], ['DeepLabV3Plus on resnet50_sase']),
        ('hub.py', ERRORS, [], ["'config.json', 'model.safetensors']: equal True", 'SASE block from']),
        (
            'transformers_backbone.py',
            ERRORS,
            [],
            [
                '[(256, 16, 16), (512, 8, 8), (1024, 4, 4), (2048, 2, 2)]',
                'UPerNet: loss',
                'UPerNet, saved and loaded: equal True',
                'classifier, saved and loaded: equal True',
            ],
        ),
        ('lightning_digits.py', LIGHTNING, [], ['accuracy']),
        ('prune_channels.py', [], [], ['resnet18 with SE: 11,', 'classes 10']),
    ],
    ids=lambda value: value if isinstance(value, str) else '-'.join(value)[:20],
)
def test_example_runs(name, warnings, args, expected):
    code = f"import runpy, sys; sys.argv[1:] = {args}; runpy.run_path('examples/{name}', run_name='__main__')"
    run = subprocess.run([sys.executable, *warnings, '-c', code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert [text for text in expected if text not in run.stdout] == []
    assert 'equal False' not in run.stdout
    for first, last in re.findall(r'loss ([\d.]+) -> ([\d.]+)', run.stdout):
        assert float(last) < float(first)
    assert all(float(accuracy) > 0.8 for accuracy in re.findall(r'accuracy ([\d.]+) after', run.stdout)), run.stdout


def example(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / 'examples' / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ('name', 'args'),
    [
        ('resnet20_cifar', {'genotype': 'sase', 'num_classes': 7}),
        ('resnet20_cifar', {'genotype': 'avg,conv3,affine,avg,avg,conv7x7', 'attn_stages': [2, 3]}),
        ('resnet20_cifar', {'genotype': str(sase_blocks.Genotype.random(3)), 'img_size': 48, 'in_chans': 1}),
        ('resnet20_cifar', {'genotype': sase_blocks.Genotype.random(4).to_json(), 'img_size': [32, 48]}),
        ('resnet50_channel', {'squeeze': 'avg_std', 'excite': 'conv5', 'layers': [1, 1, 1, 1]}),
        ('resnet20_cifar', {'genotype': 'cbam(reduction=8, kernel_size=3); se(reduction=2);se'}),
    ],
    ids=str,
)
def test_a_model_survives_the_hub(tmp_path, name, args):
    """Equal outputs of a model with other initial weights, and a card that says what to import."""
    model = timm.create_model(name, **args).eval()
    example('hub').save_model(model, name, args, tmp_path, 'someone/model')
    saved = json.loads((tmp_path / 'config.json').read_text())
    assert saved['architecture'] == name
    assert {key: saved['model_args'][key] for key in args} == args
    assert 'import sase_blocks' in (tmp_path / 'README.md').read_text()
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    x = torch.randn(2, args.get('in_chans', 3), 32, 48)
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize('name', ['avg_std,conv5,affine,p_norm,avg_max,conv7x7', 'cbam(reduction=8, kernel_size=3)'])
def test_a_block_survives_the_hub(tmp_path, name):
    hub = example('hub')
    block = hub.HubBlock(name, 16).eval()
    block.save_pretrained(tmp_path)
    assert json.loads((tmp_path / 'config.json').read_text()) == {
        'block': block._hub_mixin_config['block'],
        'channels': 16,
    }
    assert 'import sase_blocks' in (tmp_path / 'README.md').read_text()
    x = torch.randn(2, 16, 9, 7)
    with torch.no_grad():
        assert torch.equal(hub.HubBlock.from_pretrained(tmp_path).eval()(x), block(x))


# Detection. A ResNet-14 with SASE, and few boxes in the second stage, which is where a small image spends its time.
TINY = ['--model-args', '{"layers": [1, 1, 1, 1]}', '--min-size', '64', '--workers', '0', '--warmup', '2']
TINY += ['--detector-args']
TINY += ['{"box_batch_size_per_image": 32, "rpn_post_nms_top_n_train": 100, "rpn_post_nms_top_n_test": 30}']


def draw_coco(folder, count=4, size=64):
    """A COCO-format folder with a square (category 7) and a triangle (category 9) an image, and one crowd."""
    rng = np.random.default_rng(0)
    (folder / 'images').mkdir(parents=True)
    images, annotations = [], []
    for i in range(1, count + 1):
        image = Image.fromarray(rng.integers(0, 60, (size, size, 3), dtype=np.uint8))
        draw = ImageDraw.Draw(image)
        for category in (7, 9):
            w, h = rng.integers(size // 4, size // 2, 2).tolist()
            x, y = int(rng.integers(0, size - w)), int(rng.integers(0, size - h))
            corners = (
                [x, y, x + w, y, x + w, y + h, x, y + h] if category == 7 else [x, y + h, x + w, y + h, x + w // 2, y]
            )
            draw.polygon(corners, fill=tuple(rng.integers(150, 255, 3).tolist()))
            annotations.append(
                {'image_id': i, 'category_id': category, 'bbox': [x, y, w, h], 'segmentation': [corners], 'iscrowd': 0}
            )
        image.save(folder / 'images' / f'{i}.png')
        images.append({'id': i, 'file_name': f'{i}.png', 'width': size, 'height': size})
    crowd = {'size': [size, size], 'counts': [0, size * size]}
    annotations.append(
        {'image_id': 1, 'category_id': 7, 'bbox': [0, 0, size, size], 'segmentation': crowd, 'iscrowd': 1}
    )
    for number, annotation in enumerate(annotations, start=1):
        annotation['id'] = number
    content = {
        'images': images,
        'annotations': annotations,
        'categories': [{'id': 7, 'name': 'square'}, {'id': 9, 'name': 'triangle'}],
    }
    (folder / 'objects.json').write_text(json.dumps(content))
    return content


def arguments(folder, *more):
    return ['--data', f'{folder}/images', '--annotations', f'{folder}/objects.json', *TINY, *more]


def test_mask_rcnn_learns(tmp_path, capsys):
    detection = example('coco_detection')
    draw_coco(tmp_path)
    argv = arguments(tmp_path, '--mask', '--out', f'{tmp_path}/run', '--epochs', '5', '--batch-size', '2')
    precision = detection.run(detection.parse([*argv, '--lr', '0.02', '--clip-grad', '5']))
    out = capsys.readouterr().out
    losses = [float(loss) for loss in re.findall(r'epoch \d of 5: loss ([\d.]+)', out)]
    assert len(losses) == 5
    assert losses[-1] < 0.7 * losses[0]
    assert set(precision) == {'bbox', 'segm'}
    assert 'mAP on the training images: bbox' in out
    assert [path.name for path in (tmp_path / 'run').iterdir()] == ['last.pt']


@pytest.mark.parametrize(
    ('spoil', 'expected'),
    [
        (lambda target: None, {'bbox': 1.0, 'segm': 1.0}),
        (lambda target: target['masks'].zero_(), {'bbox': 1.0, 'segm': 0.0}),
        (lambda target: target.update(labels=3 - target['labels']), {'bbox': 0.0, 'segm': 0.0}),
        (lambda target: target.update({k: v[:0] for k, v in target.items()}), {'bbox': 0.0, 'segm': 0.0}),
    ],
    ids=['right', 'no-masks', 'other-labels', 'nothing-found'],
)
def test_evaluation_of_a_detector_that_knows_the_answers(tmp_path, spoil, expected):
    from torchvision.models.detection import MaskRCNN

    detection = example('coco_detection')
    draw_coco(tmp_path)
    args = detection.parse(arguments(tmp_path))
    data = detection.CocoFolder(args.data, args.annotations, masks=True, only_with_objects=False)

    class Oracle(MaskRCNN):
        def __init__(self):
            torch.nn.Module.__init__(self)
            self.answers = iter(data)

        def forward(self, images):
            targets = [next(self.answers)[1] for _ in images]
            for target in targets:
                del target['image_id']
                target['scores'] = torch.ones(len(target['boxes']))
                target['masks'] = target['masks'][:, None].float()
                spoil(target)
            return targets

    precision = detection.evaluate(Oracle(), data, args, torch.device('cpu'))
    assert precision == pytest.approx(expected)


def test_faster_rcnn_resumes_to_the_same_weights(tmp_path, monkeypatch):
    detection = example('coco_detection')
    draw_coco(tmp_path)
    argv = arguments(tmp_path, '--epochs', '2', '--batch-size', '2', '--out')
    straight = detection.run(detection.parse([*argv, f'{tmp_path}/straight']))

    save = detection.save_checkpoint
    monkeypatch.setattr(detection, 'save_checkpoint', lambda *args: (save(*args), sys.exit('killed')))
    with pytest.raises(SystemExit, match='killed'):
        detection.run(detection.parse([*argv, f'{tmp_path}/stopped']))
    monkeypatch.undo()
    assert detection.main([*argv, f'{tmp_path}/stopped']) == 2  # there is a run, and no --resume
    assert detection.main([*argv, f'{tmp_path}/stopped', '--resume', '--lr', '1']) == 2  # another run
    resumed = detection.run(detection.parse([*argv, f'{tmp_path}/stopped', '--resume']))

    one, other = (torch.load(tmp_path / name / 'last.pt') for name in ('straight', 'stopped'))
    assert one['epoch'] == other['epoch'] == 2
    assert [k for k, v in one['model'].items() if not torch.equal(v, other['model'][k])] == []
    assert resumed == straight


@pytest.mark.parametrize('attention_in_file', [True, False])
def test_a_given_backbone_keeps_its_statistics(tmp_path, attention_in_file):
    """Batch norms that came with the file, the stem and the first stage are frozen; new attention is not."""
    detection = example('coco_detection')
    source = timm.create_model('resnet50_sase' if attention_in_file else 'resnet50', layers=[1, 1, 1, 1])
    torch.nn.init.constant_(source.layer2[0].bn1.running_mean, 0.5)
    torch.save(source.state_dict(), tmp_path / 'weights.pt')
    model = detection.create_detector(
        'resnet50_sase', 3, checkpoint=str(tmp_path / 'weights.pt'), model_args={'layers': [1, 1, 1, 1]}, min_size=64
    )
    body = model.backbone.body.train()
    frozen = {name for name, p in body.named_parameters() if not p.requires_grad}
    assert {name.split('.')[0] for name in frozen} == {'conv1', 'layer1'}
    live = [name for name, m in body.named_modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert live == ([] if attention_in_file else [f'layer{i}.0.se.norm' for i in range(1, 5)])
    body(torch.randn(2, 3, 64, 64))
    assert body.layer2[0].bn1.running_mean.eq(0.5).all()


def test_flipping_twice_changes_nothing():
    detection = example('coco_detection')
    image = torch.rand(3, 5, 8)
    target = {'boxes': torch.tensor([[1.0, 0.0, 3.0, 5.0]]), 'masks': (torch.rand(1, 5, 8) > 0.5).byte()}
    mirrored, other = detection.flipped(image, target)
    assert other['boxes'].tolist() == [[5.0, 0.0, 7.0, 5.0]]
    again, back = detection.flipped(mirrored, other)
    assert torch.equal(again, image)
    assert all(torch.equal(back[key], target[key]) for key in target)


def drop(key):
    return lambda content: content.pop(key)


@pytest.mark.parametrize(
    ('spoil', 'more', 'message'),
    [
        (drop('images'), [], 'is no COCO annotation file: it has no images'),
        (drop('categories'), [], 'it has no categories'),
        (lambda c: c['images'][0].update(file_name='other.png'), [], 'names other.png, not in'),
        (lambda c: c.update(annotations=[]), [], 'has no image with an object'),
        (lambda c: [a.update(iscrowd=1) for a in c['annotations']], [], 'has no image with an object'),
        (lambda c: c['annotations'][1].pop('bbox'), [], 'object 2 has no bbox of four numbers'),
        (lambda c: c['annotations'][2].update(category_id=1), [], 'object 3 has no bbox of four numbers or no known'),
        (lambda c: [a.pop('segmentation') for a in c['annotations']], ['--mask'], 'without a segmentation'),
        (lambda c: None, ['--model', 'resnet50_sasee'], 'did you mean resnet50_sase'),
        (lambda c: None, ['--model', 'convnext_atto', '--model-args', '{}'], 'no stages layer1'),
        (lambda c: None, ['--checkpoint', 'nowhere.pth'], 'there is no checkpoint nowhere.pth'),
        (lambda c: None, ['--val-data', '.'], '--val-data and --val-annotations go together'),
        (lambda c: None, ['--epochs', '0'], '--epochs must be at least 1, got 0'),
        (lambda c: None, ['--lr', '1e30'], 'a lower --lr'),
    ],
    ids=lambda value: str(value) if not callable(value) else '',
)
def test_bad_input(tmp_path, capsys, spoil, more, message):
    detection = example('coco_detection')
    content = draw_coco(tmp_path)
    spoil(content)
    (tmp_path / 'objects.json').write_text(json.dumps(content))
    try:
        code = detection.main(arguments(tmp_path, '--out', f'{tmp_path}/run', '--epochs', '3', *more))
    except SystemExit as exit_:  # argparse's own
        code = exit_.code
    assert code == 2
    assert message in capsys.readouterr().err


def test_an_annotation_file_that_is_no_json(tmp_path, capsys):
    detection = example('coco_detection')
    draw_coco(tmp_path)
    (tmp_path / 'objects.json').write_text('{"images": [')
    assert detection.main(arguments(tmp_path)) == 2
    assert 'objects.json is no JSON file' in capsys.readouterr().err


RESNET = timm.models.resnet


def network(block, way):
    """A small ResNet with a block behind each second batch norm, whose biases number its channels."""
    torch.manual_seed(0)
    args = {'num_classes': 5, 'channels': (32, 64, 64, 64), 'zero_init_last': False}
    if way == 'slot':
        args['block_args'] = {'attn_layer': partial(sase_blocks.create_block, block)}
    model = RESNET.ResNet(RESNET.BasicBlock, (1, 1, 1, 1), **args)
    if way == 'inserted':
        sase_blocks.insert(model, block)
    for name, parameter in model.named_parameters():
        if name.endswith('alpha'):
            torch.nn.init.constant_(parameter, 0.7)
        elif name.endswith('bn2.bias'):
            parameter.data = torch.arange(float(len(parameter))) / 64
        elif '.se.' in name:
            torch.nn.init.uniform_(parameter, -0.5, 0.5)
    return model


@pytest.mark.parametrize('way', ['slot', 'inserted'])
@pytest.mark.parametrize('block', sase_blocks.list_blocks())
@pytest.mark.filterwarnings('ignore:Unwrapped parameters detected')
def test_pruned_channels(block, way):
    """What torch-pruning leaves of each block is the block of the channels that are left, and it still acts."""
    model, x = network(block, way), torch.randn(2, 3, 64, 64)
    whole = copy.deepcopy(model)
    prune = example('prune_channels')
    prune.make_pruner(model, x, pruning_ratio=0.5, round_to=16, ignored_layers=[model.fc]).step()
    assert model.conv1.out_channels == 32
    for name, width in (('layer1', 16), ('layer2', 32), ('layer3', 32), ('layer4', 32)):
        kept = getattr(model, name)[0].bn2.bias.mul(64).long().tolist()
        assert len(kept) == width
        expected = getattr(whole, name)[0]
        for part in expected.modules():
            if part is not expected and isinstance(part, AttentionModule):
                sase_blocks.keep_channels(part, kept)
        found = attention(getattr(model, name)[0]).state_dict()
        torch.testing.assert_close(found, attention(expected).state_dict(), rtol=0, atol=0)
    model.train()(x).sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    y = model.eval()(x)
    blocks = [module for module in model.modules() if isinstance(module, AttentionModule)]
    for module in blocks:
        module.register_forward_hook(lambda module, inputs, y: inputs[0])
    assert not torch.allclose(model(x), y)


def attention(block):
    """What stands in the slot of a ResNet's block, or was inserted into it."""
    return torch.nn.ModuleList(m for m in block.modules() if m is not block and isinstance(m, AttentionModule))


@pytest.mark.parametrize(('block', 'ratio', 'multiple'), [('ema', 0.35, 2), ('ela', 0.3, 16)])
@pytest.mark.filterwarnings('ignore:Unwrapped parameters detected')
def test_pruned_groups_name_their_multiple(block, ratio, multiple):
    model = network(block, 'inserted')
    pruner = example('prune_channels').make_pruner(
        model, torch.randn(2, 3, 64, 64), pruning_ratio=ratio, ignored_layers=[model.fc]
    )
    with pytest.raises(ValueError, match=rf'round_to={multiple} in torch-pruning') as error:
        pruner.step()
    assert '\n' not in str(error.value)
