"""Blocks in Ultralytics YOLO, in processes of its own as users have them; `make test-ecosystem` runs these."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib
import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.ecosystem

NETWORKS = ['yolov8n', 'yolo11n', 'yolov8n-seg', 'yolo11n-seg']


def run_python(folder, code, *args):
    """The last line of what a new process prints, as JSON."""
    return json.loads(run_output(folder, code, *args).splitlines()[-1])


def run_output(folder, code, *args):
    """What a new process prints. Ultralytics asks the network for nothing there."""
    environment = {
        'YOLO_CONFIG_DIR': f'{folder}/config',
        'YOLO_OFFLINE': 'true',
        'YOLO_AUTOINSTALL': 'false',
        'PYTHONPATH': os.pathsep.join([str(ROOT), str(ROOT / 'examples')]),
    }
    # It would download this font.
    font = folder / 'config' / 'Ultralytics' / 'Arial.ttf'
    if not font.exists():
        font.parent.mkdir(parents=True)
        shutil.copy(matplotlib.get_data_path() + '/fonts/ttf/DejaVuSans.ttf', font)
    # Ultralytics writes elsewhere under pytest.
    inherited = {key: value for key, value in os.environ.items() if not key.startswith('PYTEST')}
    run = subprocess.run(
        [sys.executable, '-c', code, *map(str, args)],
        cwd=folder, env=inherited | environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, f'{run.stdout[-3000:]}\n{run.stderr[-6000:]}'
    return run.stdout


ROWS = """
import json
import sys
from pathlib import Path

import torch
from ultralytics.nn import tasks

from sase_blocks.blocks import BLOCKS
from sase_blocks.ultralytics import AttentionRow
from yolo import add_rows

# No name of a block is one of Ultralytics' own.
taken = [name for name in BLOCKS if name in vars(tasks) or name.upper() in vars(tasks)]
widths = {}
for network in json.loads(sys.argv[1]):
    family, size, task = network.partition('n')
    path = add_rows(f'{network}.yaml', 'CBAM', Path())
    for scale in 'nsmlx':
        config = tasks.yaml_model_load(path) | {'scale': scale}
        with torch.device('meta'):
            model, _ = tasks.parse_model(config, ch=3, verbose=False)
        rows = [row for row in model if isinstance(row, AttentionRow)]
        widths[f'{network} {scale}'] = [row.block[0].channels for row in rows]
        assert widths[f'{network} {scale}'] == [branch[0].conv.in_channels for branch in model[-1].cv2]
print(json.dumps([taken, widths]))
"""


def test_rows_at_every_scale(tmp_path):
    """Three blocks before each head, with the channels of the maps they read."""
    taken, widths = run_python(tmp_path, ROWS, json.dumps(NETWORKS))
    assert taken == []
    assert len(widths) == 20
    assert widths['yolov8n n'] == [64, 128, 256]
    assert widths['yolov8n x'] == [320, 640, 640]
    assert widths['yolo11n-seg m'] == [256, 512, 512]


EVERY_BLOCK = """
import json

import numpy as np
import onnxruntime
import torch
from ultralytics import YOLO
from ultralytics.nn.tasks import yaml_model_load
from ultralytics.utils import YAML

import sase_blocks
import sase_blocks.ultralytics

# Ultralytics' exporter knows no operator of shuffle, and onnxruntime none of criss_cross.
names = [name for name in sase_blocks.list_blocks() if name not in ('shuffle', 'criss_cross')]
config = yaml_model_load('yolo11n.yaml')
*rows, head = config['head']
rows += [[16 if index == 0 else -1, 1, name.upper(), []] for index, name in enumerate(names)]
head[0] = [len(config['backbone']) + len(rows) - 1, *head[0][1:]]
config['head'] = [*rows, head]
YAML.save('every.yaml', config)
torch.manual_seed(0)
model = YOLO('every.yaml')
blocks = [row.block for row in model.model.model if hasattr(row, 'block')]
model.model.pt_path = 'every.pt'
model.model.eval()
for parameter in model.model.parameters():
    parameter.data += 0.05 * torch.randn_like(parameter)
errors = {}
file = model.export(format='onnx', imgsz=64, opset=18, simplify=False, dynamic=True)
session = onnxruntime.InferenceSession(file)
for size in ((1, 3, 64, 64), (2, 3, 96, 160)):
    x = torch.rand(size)
    with torch.no_grad():
        expected = model.model(x)[0]
        maps = []
        for block in blocks:
            block.register_forward_hook(lambda block, inputs, y: maps.append(float((inputs[0] - y).abs().max())))
        model.model(x)
    found = session.run(None, {'images': x.numpy()})[0]
    errors[str(size)] = float(np.abs(found - expected.numpy()).max() / expected.abs().max())
print(json.dumps([len(names), len(blocks), min(maps), errors]))
"""


def test_every_block_as_a_row_exports_to_onnx(tmp_path):
    named, found, least, errors = run_python(tmp_path, EVERY_BLOCK)
    assert named == found > 40
    assert least > 0  # each block acts
    assert len(errors) == 2
    assert max(errors.values()) < 1e-5, errors


READ = """
import contextlib
import json
import sys

from ultralytics.nn import tasks

import sase_blocks.ultralytics

results = []
for row in json.loads(sys.argv[1]):
    rows = [[-1, 1, 'Conv', [32, 3, 2]], [-1, 1, 'Conv', [64, 3, 2]], row]
    try:
        model, _ = tasks.parse_model({'nc': 1, 'backbone': rows, 'head': []}, ch=3, verbose=False)
        results.append(repr(model[2]))
    except Exception as error:
        results.append(f'{type(error).__name__}: {error}')
print(json.dumps(results))
"""

CASES = [
    # A row, and what is in the module's representation, or in the error.
    ([-1, 1, 'SASE', []], 'SASE(\n    64'),
    ([0, 1, 'SASE', []], 'SASE(\n    32'),
    ([-2, 1, 'SASE', []], 'SASE(\n    32'),
    ([-1, 1, 'CBAM', [8]], 'in_features=64, out_features=8,'),
    ([-1, 1, 'cbam', [8, 3]], 'kernel_size=(3, 3)'),
    ([-1, 1, 'CBAM', ['kernel_size=3']], 'kernel_size=(3, 3)'),
    ([-1, 1, 'CBAM', [8, 'kernel_size=3']], 'in_features=64, out_features=8,'),
    ([-1, 1, 'CBAM(reduction=8, kernel_size=3)', []], 'in_features=64, out_features=8,'),
    ([-1, 1, 'ECA', ['None', 3]], 'Conv1d(1, 1, kernel_size=(3,)'),
    ([-1, 1, 'ECA', [None, 3]], 'Conv1d(1, 1, kernel_size=(3,)'),
    ([-1, 1, 'SCSA', [2, 7, [3, 5, 7, 9]]], 'SynergisticAttention'),
    ([-1, 1, 'GSOP', [64]], 'rd_channels=64'),
    ([-1, 1, 'avg_std,conv5,affine,p_norm,avg_max,conv7x7', []], 'AttentionBlock'),
    ([-1, 1, 'gsop(rd_channels=32),identity,affine,avg,avg,conv7x7', []], 'rd_channels=32'),
    ([-1, 2, 'GE_THETA', []], '(1): AttentionRow'),
    ([-1, 1, 'nn.Identity', []], 'Identity()'),
    ([-1, 1, 'Conv', [32]], 'Conv('),
    ([-1, 1, 'CBAMM', []], "row 2 of the model YAML, [-1, 1, 'CBAMM', []]: Ultralytics has no layer 'CBAMM', and"),
    ([-1, 1, 'CBAMM', []], "Did you mean 'cbam'?"),
    ([-1, 1, 'CBAM', [1024]], '1024 would be the reduction of cbam, but looks like a number of channels'),
    ([-1, 1, 'SimAM', [64]], 'leave it out, or write e_lambda=64'),
    ([-1, 1, 'CBAM', [8, 7, 1]], 'cbam takes at most 2 arguments, its options (reduction, kernel_size), got [8, 7, 1]'),
    ([-1, 1, 'SRM', [8]], 'srm takes at most 0 arguments, its options (none)'),
    ([-1, 1, 'CBAM', ['c2']], 'the value of reduction is not a literal'),
    ([-1, 1, 'CBAM', ['ratio=8']], "cbam has no option 'ratio'"),
    ([-1, 1, 'CBAM', ['kernel_size=3', 5]], 'kernel_size is given twice'),
    ([-1, 1, 'CBAM(reduction=8)', [7]], 'give the options in the name or as arguments, not both'),
    ([-1, 1, 'CBAM', ['kernel_size=4']], 'kernel_size'),
    ([-1, 1, 'avg_std,conv5,affine,p_norm,avg_max,conv7x7', [8]], 'a genotype has its options in its text'),
    ([[-1, 0], 1, 'CBAM', []], 'a block reads one row, got [-1, 0]'),
    ([-1, 1, 'avg,mlp,affine,avg,l2_norm,affine', []], 'feat_size'),
]  # fmt: skip


def test_what_a_row_may_say(tmp_path):
    found = run_python(tmp_path, READ, json.dumps([row for row, _ in CASES]))
    wrong = [(row, expected, text) for (row, expected), text in zip(CASES, found, strict=True) if expected not in text]
    assert wrong == []
    assert all('\n' not in text for (row, _), text in zip(CASES, found, strict=True) if 'Error: ' in text)


NETWORKS_AND_WAYS = [('yolov8n', 'rows'), ('yolo11n', 'insert'), ('yolov8n-seg', 'insert'), ('yolo11n-seg', 'rows')]

# Train for two epochs and stop after the first. Keep the attention and the network's outputs with and without it.
START = """
import copy
import json
import os
import sys
from pathlib import Path

import torch
from ultralytics import YOLO
from yolo import add_rows, draw_squares

import sase_blocks
from sase_blocks.ultralytics import AttentionRow, keep_attention


def shake(trainer):
    # At its initial values a head hardly depends on its input.
    torch.manual_seed(0)
    for parameter in trainer.model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)


def stop(trainer):
    net = copy.deepcopy(trainer.ema.ema).half().float().eval()
    x = torch.rand(1, 3, 64, 64)
    attention = {k: v.clone() for k, v in net.state_dict().items() if 'inserted_attention' in k or '.block.' in k}
    with torch.no_grad():
        y = net(x)[0]
        for row in net.model:
            if isinstance(row, AttentionRow):
                row.block = torch.nn.Identity()
        sase_blocks.remove(net)
        torch.save({'x': x, 'y': y, 'without': net(x)[0], 'attention': attention}, 'kept.pt')
    raise SystemExit


for network, way in json.loads(sys.argv[1]):
    folder = Path(sys.argv[2], network)
    folder.mkdir()
    os.chdir(folder)
    trainer = {}
    if way == 'rows':
        model = YOLO(add_rows(f'{network}.yaml', 'CBAM', folder))
    else:
        model = YOLO(f'{network}.yaml')
        sase_blocks.insert(model.model, 'cbam', start='paper', input_size=64)
        trainer = {'trainer': keep_attention(model)}
    model.add_callback('on_train_start', shake)
    model.add_callback('on_model_save', stop)
    try:
        model.train(
            data=str(draw_squares(folder)), imgsz=64, epochs=2, batch=4, nbs=4, optimizer='SGD', warmup_epochs=0,
            plots=False, workers=0, project=str(folder), name='run', **trainer,
        )
    except SystemExit:
        continue
    raise RuntimeError('not stopped')
print('null')
"""

# In a new process, without our import where none is needed.
GO_ON = """
import copy
import json
import os
import sys
from pathlib import Path

import onnxruntime
import torch
from ultralytics import YOLO

results = {}


def go_on(folder, way):
    kept = torch.load('kept.pt')
    first = lambda y: first(y[0]) if isinstance(y, (tuple, list)) else y  # a segmentation network also gives prototypes
    expected, without = first(kept['y']), first(kept['without'])
    effect = (without - expected).abs().max()
    difference = {}

    def compare(name, y):
        difference[name] = float((first(y) - expected).abs().max() / effect)

    def attention(net):
        return {k: v.clone() for k, v in net.state_dict().items() if 'inserted_attention' in k or '.block.' in k}

    last = f'{folder}/run/weights/last.pt'
    model = YOLO(last)
    with torch.no_grad():
        compare('reloaded', model.model(kept['x'])[0])
        compare('fused', copy.deepcopy(model.model).fuse(verbose=False)(kept['x'])[0])
        model.val(data='squares.yaml', imgsz=64, batch=4, plots=False, workers=0)
        model.predict('images/val/0.png', imgsz=64)
        compare('after val and predict', model.model(kept['x'])[0])
    file = YOLO(last).export(format='onnx', imgsz=64, opset=18, simplify=False)
    compare('ONNX', torch.from_numpy(onnxruntime.InferenceSession(file).run(None, {'images': kept['x'].numpy()})[0]))
    YOLO(file, task=model.task).predict('images/val/0.png', imgsz=64)

    options = {}
    resumed = YOLO(last)
    if way == 'insert':
        from sase_blocks.ultralytics import keep_attention

        options = {'trainer': keep_attention(resumed)}
    starts = []
    resumed.add_callback('on_train_start', lambda trainer: starts.append(attention(trainer.model)))
    resumed.train(resume=True, **options)
    (start,) = starts
    equal = start.keys() == kept['attention'].keys()
    equal = equal and all(torch.equal(start[key], value) for key, value in kept['attention'].items())

    # Train the result on other data, with two classes.
    Path('two.yaml').write_text(Path('squares.yaml').read_text() + '\\n- other')
    best = YOLO(resumed.trainer.best)
    if way == 'insert':
        options = {'trainer': keep_attention(best)}
    best.train(data='two.yaml', epochs=1, imgsz=64, plots=False, workers=0, project=folder, **options)
    counts = [len(attention(YOLO(weights).model)) for weights in (resumed.trainer.best, best.trainer.last)]
    return {
        'effect': float(effect / expected.abs().max()), 'difference': difference, 'equal': equal,
        'epoch': resumed.trainer.epoch, 'attention': [len(kept['attention']), *counts],
    }


for network, way in json.loads(sys.argv[1]):
    folder = f'{sys.argv[2]}/{network}'
    os.chdir(folder)
    assert results or 'sase_blocks' not in sys.modules
    results[network] = go_on(folder, way)
print(json.dumps(results))
"""


def test_attention_stays(tmp_path):
    """In training, reloads in a new process, val, predict, fuse, ONNX, resuming and training on other classes."""
    cases = json.dumps(NETWORKS_AND_WAYS)
    run_python(tmp_path, START, cases, tmp_path)
    for network, found in run_python(tmp_path, GO_ON, cases, tmp_path).items():
        case = f'{network}: {found}'
        assert found['effect'] > 1e-4, case  # of the attention, relative to the largest output
        assert len(found['difference']) == 4, case
        assert max(found['difference'].values()) < 1e-2, case  # relative to that effect
        assert found['equal'], case
        assert found['epoch'] == 1, case
        before, *after = found['attention']
        assert after == [before, before], case
        assert before > 20, case


# The trainer class, as Ultralytics sends it to the processes of several GPUs; what is wrong; a trainer of one's own.
KEEP = """
import json
from pathlib import Path
from types import SimpleNamespace

import torch
from ray import cloudpickle  # which Ultralytics installs alone where it trains on several GPUs
from ultralytics import YOLO
from ultralytics.models.yolo.detect import DetectionTrainer

import sase_blocks
from sase_blocks.ultralytics import keep_attention


class MyTrainer(DetectionTrainer):
    pass


def build(trainer, cfg, weights=None, nc=3):
    made = trainer.__new__(trainer)
    made.data, made.args = {'nc': nc, 'channels': 3, 'names': {i: f'class {i}' for i in range(nc)}}, SimpleNamespace()
    return trainer.get_model(made, cfg=cfg, weights=weights, verbose=False)


errors = []


def fails(call, *args):
    try:
        call(*args)
    except Exception as error:
        errors.append(f'{type(error).__name__}: {error}')
    else:
        errors.append('')


plain, model = YOLO('yolov8n.yaml'), YOLO('yolov8n.yaml')
sase_blocks.insert(model.model, 'cbam', input_size=64)
for parameter in model.model.parameters():
    parameter.requires_grad_(False)
    parameter += 1
fails(keep_attention, 'yolov8n.yaml')
fails(keep_attention, plain)
fails(keep_attention, model.model)
trainer = keep_attention(model, MyTrainer)
fails(build, trainer, 'yolov8n-cls.yaml')
head = YOLO('yolov8n.yaml')
sase_blocks.insert(head.model, 'se', where='model.22.cv3.?', input_size=64)
fails(build, keep_attention(head), 'yolov8n.yaml', head.model, 3)
fails(build, keep_attention(head), 'yolov8n.yaml', head.model, 80)
first = build(trainer, 'yolov8n.yaml')  # from its YAML, with what was inserted
second = build(trainer, 'yolov8n.yaml', plain.model)  # from plain weights
inserted = {k: v for k, v in model.model.state_dict().items() if 'inserted_attention' in k}
kept = [all(torch.equal(new.state_dict()[k], v) for k, v in inserted.items()) for new in (first, second)]
second.model[0].conv.weight.data += 1
changed = {k: v for k, v in second.state_dict().items() if k in inserted}
for value in changed.values():
    value += 1
third = build(trainer, 'yolov8n.yaml', second)  # what the weights hold comes first
kept.append(all(torch.equal(third.state_dict()[k], v) for k, v in changed.items()))
kept.append(all(p.requires_grad for name, p in third.named_parameters() if name in inserted))
kept.append(torch.equal(third.model[0].conv.weight, second.model[0].conv.weight))
kept.append(issubclass(trainer, MyTrainer))
Path('trainer.pkl').write_bytes(cloudpickle.dumps(keep_attention(model)))
print(json.dumps([kept, errors, len(inserted)]))
"""

WORKER = """
import json
import pickle
import sys
from types import SimpleNamespace

with open('trainer.pkl', 'rb') as file:
    trainer = pickle.load(file)
made = trainer.__new__(trainer)
made.data, made.args = {'nc': 3, 'channels': 3, 'names': {0: 'a', 1: 'b', 2: 'c'}}, SimpleNamespace()
network = trainer.get_model(made, cfg='yolov8n.yaml', verbose=False)
print(json.dumps(sum('inserted_attention' in key for key in network.state_dict())))
"""


def test_a_trainer_that_keeps_attention(tmp_path):
    kept, errors, count = run_python(tmp_path, KEEP)
    assert kept == [True] * 6
    expected = [
        'TypeError: expected a YOLO of Ultralytics that holds a PyTorch network, got str',
        'ValueError: this YOLO has no attention to keep: call insert',
        'TypeError: expected a YOLO of Ultralytics that holds a PyTorch network, got DetectionModel',
        'ValueError: 4 of 10 modules with inserted attention are not in this',
        'In the head, attention fits one number of classes: choose other places with where=',
    ]
    assert errors.pop() == ''  # for as many classes
    for error, text in zip(errors, expected, strict=True):
        assert text in error
        assert '\n' not in error
    assert count > 50
    assert run_python(tmp_path, WORKER) == count


# The files that docs/detectors.md names, and its Python, from top to bottom.
PAGE = """
import json
import re
import sys
from pathlib import Path

import yaml
from ultralytics import YOLO
from ultralytics.nn.tasks import yaml_model_load
from ultralytics.utils import YAML
from yolo import draw_squares

text = Path(sys.argv[1]).read_text()
draw_squares(Path.cwd()).rename('coco8.yaml')
YOLO('yolo11n.yaml').save('yolo11n.pt')
config = yaml_model_load('yolov8.yaml')
config['head'] = config['head'][:-1] + yaml.safe_load(re.search(r'```yaml\\n(.*?)```', text, re.DOTALL)[1])
YAML.save('yolov8-cbam.yaml', config)
namespace = {}
printed = []
namespace['print'] = lambda *values, **options: (printed.append(' '.join(map(str, values))), print(*values, **options))
snippets = re.findall(r'```python\\n(.*?)```', text, re.DOTALL)
for snippet in snippets:
    exec(compile(snippet, 'detectors.md', 'exec'), namespace)
shown = [line for block in re.findall(r'```text\\n(.*?)```', text, re.DOTALL) for line in block.splitlines()]
told = ', '.join(printed) + '\\n'.join(printed)
print()
print(json.dumps([len(snippets), [line for line in shown if line not in told]]))
"""


def test_the_page_about_detectors(tmp_path):
    snippets, missing = run_python(tmp_path, PAGE, ROOT / 'docs' / 'detectors.md')
    assert snippets == 5
    assert missing == []


def test_the_example(tmp_path):
    code = "import runpy, sys; sys.argv = ['yolo.py']; runpy.run_module('yolo', run_name='__main__')"
    run = run_output(tmp_path, code)
    assert 'DetectionModel: all 8 inserted places run' in run
    difference = float(run.splitlines()[-1].split('at most ')[1].split()[0])
    assert difference < 1e-5
