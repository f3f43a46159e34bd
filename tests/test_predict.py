"""`sase-blocks predict`: predictions and accuracy, as the training measured it."""

import contextlib
import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from test_data import make_images, truncate
from test_train import SMALL

from sase_blocks import cli
from sase_blocks.networks import load_model
from sase_blocks.train import TrainConfig, confusion_matrix, train
from sase_blocks.viz import plot_confusion, read_images

pytestmark = pytest.mark.usefixtures('one_thread')

CLASSES = ('10', '9', 'ant', 'bee', 'cat', 'dog')  # in the order of labels 9 comes before 10


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A folder with images and a run on them: 6 classes, an inserted block, and an average of the weights."""
    folder = tmp_path_factory.mktemp('trained')
    make_images(folder / 'data', train=4, val=3, classes=CLASSES)
    settings = {**SMALL, 'model': 'test_efficientnet', 'model_args': {}, 'img_size': 32, 'insert': 'se', 'epochs': 2}
    config = TrainConfig(data=str(folder / 'data'), out=str(folder / 'run'), ema_decay=0.5, lr=0.05, **settings)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(io.StringIO()):
        result = train(config)
    torch.set_num_threads(threads)
    return folder, result


@pytest.fixture
def here(trained, monkeypatch, tmp_path):
    """The working directory, with links to ``trained``."""
    monkeypatch.chdir(tmp_path)
    for name in ('data', 'run'):
        Path(name).symlink_to(trained[0] / name)
    return tmp_path


def run(capsys, *argv):
    code = cli.main(['predict', *argv, '--workers', '0', '--cpu'])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


BEST = ['--checkpoint', 'run/best.pt']


def test_accuracy_is_that_of_the_training(capsys, here, trained):
    """Also of each image, whatever the size of the batches."""
    result = trained[1]
    argv = ['data/val', '--checkpoint', 'run/last.pt', '-o', 'all.json', '--batch-size', '7', '--confusion', 'a.png']
    code, out, err = run(capsys, *argv)
    assert (code, [line for line in err.splitlines() if 'error' in line]) == (0, [])
    found = json.loads(Path('all.json').read_text())
    summary = found['summary']
    assert (summary['images'], summary['acc1']) == (18, pytest.approx(result['acc1']))
    assert summary['acc5'] == pytest.approx(result['history'][-1]['acc5'])
    assert found['classes'] == ['9', '10', 'ant', 'bee', 'cat', 'dog']
    assert 'written: a.png' in out
    assert Path('a.png').read_bytes().startswith(b'\x89PNG')
    model = load_model('run/last.pt').model
    files = [row['image'] for row in found['images']]
    assert sorted(files) == sorted(map(str, Path('data/val').rglob('*.png')))
    with torch.no_grad():
        expected = model(read_images(files, model, 32)[0]).softmax(1)
    confusion = np.zeros((6, 6), int)
    for row, values in zip(found['images'], expected, strict=True):
        assert row['label'] == Path(row['image']).parts[2]
        assert len(row['predictions']) == 5
        for one in row['predictions']:
            assert one['probability'] == pytest.approx(values[found['classes'].index(one['class'])].item(), abs=1e-5)
        confusion[found['classes'].index(row['label']), values.argmax()] += 1
    assert summary['confusion'] == confusion.tolist()
    assert summary['acc1'] == pytest.approx(100 * confusion.trace() / 18)
    for i, (name, one) in enumerate(summary['by_class'].items()):
        assert (name, one['images']) == (found['classes'][i], 3)
        assert one['acc1'] == pytest.approx(100 * confusion[i, i] / 3)
        assert f'{name:<5}       3' in out, out
    assert f'accuracy {summary["acc1"]:.2f} %, top 5 ' in out


def test_csv_and_screen(capsys, here):
    code, out, _ = run(capsys, 'data/val', *BEST, '-o', 'all.csv', '--top', '2')
    with open('all.csv', encoding='utf-8', newline='') as file:
        rows = list(csv.reader(file))
    assert (code, len(rows)) == (0, 19)
    assert rows[0] == ['image', 'label', 'class_1', 'probability_1', 'class_2', 'probability_2']
    assert rows[1][:2] == ['data/val/9/0.png', '9']
    assert 'data/val/9/0.png' not in out
    code, out, _ = run(capsys, *(row[0] for row in rows[1:3]), 'data/val/dog', *BEST, '--top', '2')
    assert code == 0
    lines = [line for line in out.splitlines() if '.png: ' in line]
    assert len(lines) == 5
    first = f'{rows[1][0]}: {rows[1][2]} {float(rows[1][3]):.3f}, {rows[1][4]} {float(rows[1][5]):.3f}'
    assert lines[0] == first
    assert 'accuracy' not in out  # no label is known


def test_a_part_of_the_classes_and_a_stranger(capsys, here):
    make_images(here / 'part', train=2, val=1, classes=('ant', 'dog'))
    code, out, _ = run(capsys, 'part/train', *BEST, '-o', 'a.json')
    assert (code, ' of 4 images' in out) == (0, True)
    assert set(json.loads(Path('a.json').read_text())['summary']['by_class']) == {'ant', 'dog'}
    make_images(here / 'other', train=2, val=1, classes=('x', 'y'))
    code, out, _ = run(capsys, 'other/train', *BEST)
    assert (code, 'note: no folder in other/train is a class of the network' in out) == (0, True)
    assert (out.count('.png: '), 'accuracy ' in out) == (4, False)


@pytest.mark.parametrize(('classes', 'labelled'), [(2, True), (3, False)])
def test_names_of_classes_from_the_folders(capsys, here, classes, labelled):
    """For weights that do not say them: as many folders as outputs are the classes in timm's order."""
    make_images(here / 'own', train=2, val=2, classes=('cat', 'dog'))
    torch.save(timm.create_model('test_resnet', num_classes=classes).state_dict(), 'plain.pth')
    options = ['--model', 'test_resnet', '--checkpoint', 'plain.pth', '--model-args', f'num_classes={classes}']
    code, out, _ = run(capsys, 'own/val', *options, '--img-size', '32')
    assert code == 0
    assert ('accuracy ' in out) == labelled
    assert (': cat 0.' in out or ': dog 0.' in out) == labelled
    assert (': class ' in out) != labelled


def test_names_of_imagenet(capsys, here):
    """Of timm's pretrained weights, here from a file."""
    model = timm.create_model('test_resnet')
    model.fc.bias.data[281] = 1e3
    torch.save(model.state_dict(), 'plain.pth')
    options = ['--model', 'test_resnet', '--pretrained', '--model-args', 'pretrained_cfg_overlay={"file": "plain.pth"}']
    code, out, err = run(capsys, 'data/val/ant/0.png', *options, '--top', '1')
    assert (code, "timm's pretrained weights" in out) == (0, True), err
    assert out.splitlines()[-1] == 'data/val/ant/0.png: tabby, tabby cat 1.000'


def test_names_that_are_not_utf8(capsys, here):
    Image.new('RGB', (40, 40)).save(here / 'a\udcff\n.png')
    code, _, _ = run(capsys, 'a\udcff\n.png', *BEST, '-o', 'a.csv')
    assert code == 0
    assert r'a\udcff\n.png,' in Path('a.csv').read_text()


@pytest.mark.parametrize(
    ('argv', 'says'),
    [
        (['nothing.png', *BEST], 'there is no image or folder nothing.png'),
        (['data', *BEST], 'data holds the splits train, val; pass one of them, such as data/val'),
        (['empty', *BEST], 'empty holds no images'),
        (['text.png', *BEST], 'broken image text.png: cannot identify image file; replace or remove it'),
        (['text.png', *BEST, '--skip-broken'], 'every image is broken, the first one: text.png: cannot identify image'),
        (['broken', *BEST], 'broken image broken/ant/1.png'),
        (['strange', *BEST], 'strange has folders that are no class of the network: zebra; 9, 10, ant'),
        (['loose', *BEST], 'loose holds images outside any class folder'),
        (['data/val', *BEST, '--top', '0'], '--top must be at least 1, got 0'),
        (['data/val', *BEST, '--batch-size', '0'], '--batch-size must be at least 1'),
        (['data/val', *BEST, '-o', 'a.txt'], "predictions are written as .csv or .json, got 'a.txt'"),
        (['data/val', *BEST, '-o', 'nowhere/a.csv'], 'there is no folder nowhere'),
        (['data/val', *BEST, '-o', 'folder.csv'], 'it is a folder'),
        (['data/val', *BEST, '--confusion', 'a.jpg'], "a picture must be .png, .svg or .pdf, got 'a.jpg'"),
        (['data/val/ant', *BEST, '--confusion', 'a.png'], '--confusion needs images in folders'),
        (['data/val'], 'pass --model NAME'),
        (['data/val', '--checkpoint', 'no.pt'], 'there is no checkpoint no.pt'),
        (['data/val', '--model', 'test_resnet', '--model-args', 'num_classes=0'], 'test_resnet has no classifier'),
        (['data/val', '--model', 'test_resnet', '--model-args', 'in_chans=5'], 'takes images of 5 channels'),
        (['data/val', *BEST, '--insert', 'se'], 'leave out --insert'),
    ],
)
def test_mistakes(capsys, here, argv, says):
    """One line, before any image is looked at, and nothing is written."""
    for name in ('empty', 'folder.csv', 'loose/ant'):
        Path(name).mkdir(parents=True)
    Path('text.png').write_text('a text')
    truncate(make_images(here / 'b', train=2, val=1, classes=('ant', 'dog')) / 'train/ant/1.png')
    Path('broken').symlink_to('b/train')
    make_images(here / 's', train=2, val=1, classes=('ant', 'zebra'))
    Path('strange').symlink_to('s/train')
    for name in ('loose/a.png', 'loose/ant/a.png'):
        Image.new('RGB', (8, 8)).save(name)
    before = sorted(here.rglob('*'))
    code, out, err = run(capsys, *argv)
    assert code == 2
    assert [line for line in err.splitlines() if says in line and 'error: ' in line], err
    assert ': 0.' not in out
    assert sorted(here.rglob('*')) == before


def test_broken_images_are_left_out_if_asked(capsys, here):
    truncate(make_images(here / 'b', train=3, val=1, classes=('ant', 'dog')) / 'train/ant/1.png')
    code, out, _ = run(capsys, 'b/train', *BEST, '--skip-broken', '-o', 'a.json')
    assert (code, 'warning: 1 broken image left out' in out, ' of 5 images' in out) == (0, True, True)
    rows = json.loads(Path('a.json').read_text())['images']
    assert [(row['image'], row['label']) for row in rows][:2] == [
        ('b/train/ant/0.png', 'ant'),
        ('b/train/ant/2.png', 'ant'),
    ]


def test_non_finite_values_are_an_error(capsys, here):
    model = timm.create_model('test_resnet', num_classes=6)
    model.fc.bias.data[2] = float('nan')
    torch.save(model.state_dict(), 'nan.pth')
    argv = ['data/val', '--model', 'test_resnet', '--checkpoint', 'nan.pth', '--model-args', 'num_classes=6']
    code, _, err = run(capsys, *argv, '--img-size', '32')
    assert (code, 'the network gives no finite values for data/val/9/0.png' in err) == (2, True)


# ---- the confusion matrix ----


def test_confusion_matrix():
    labels, predicted = torch.tensor([0, 0, 2, 2, 2]), torch.tensor([0, 1, 2, 2, 0])
    assert confusion_matrix(labels, predicted, 3).tolist() == [[1, 1, 0], [0, 0, 0], [1, 0, 2]]


@pytest.mark.parametrize(('count', 'named', 'numbered'), [(2, True, True), (21, True, False), (61, False, False)])
def test_confusion_picture(count, named, numbered):
    confusion = torch.eye(count, dtype=torch.int64) * 3
    confusion[0, 1] = 1
    figure = plot_confusion(confusion, [f'class {i} \x1b and a long name' for i in range(count)], 'title')
    axis = figure.axes[0]
    assert axis.get_title(loc='left') == 'title'
    assert [text.get_text() for text in axis.texts] == (['3', '1', '3'] if numbered else [])
    labels = [label.get_text() for label in axis.get_yticklabels()]
    assert ('class 0 \\\u2026ong name' in labels) == named
    assert np.asarray(axis.images[0].get_array())[0, :2] == pytest.approx([0.75, 0.25])


@pytest.mark.parametrize(
    ('confusion', 'classes'), [([[1, 2]], ['a', 'b']), ([[1]], ['a', 'b']), ([[0, 0], [0, 0]], ['a', 'b']), ([], [])]
)
def test_wrong_confusion(confusion, classes):
    with pytest.raises(ValueError, match='confusion must have a row and a column for each of'):
        plot_confusion(confusion, classes)
