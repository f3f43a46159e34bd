"""Blocks in mmengine's configurations, in a process of their own; `make test-ecosystem` runs this."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.ecosystem

CONFIG = """
custom_imports = dict(imports=['sase_blocks.mmengine'])
model = dict(
    type='Stack',
    layers=[
        dict(type='SASE', channels=16),
        dict(type='CBAM', channels=16, reduction=4, kernel_size=3),
        dict(type='AttentionBlock', channels=16, genotype='avg_std,conv5,affine,p_norm,avg_max,conv7x7'),
    ],
)
"""

BUILD = """
import json
import sys

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, Registry

# As another library does: a registry of its own below mmengine's.
LIBRARY = Registry('model', parent=MODELS, scope='library')


@LIBRARY.register_module()
class Stack(torch.nn.Sequential):
    def __init__(self, layers):
        super().__init__(*(LIBRARY.build(layer) for layer in layers))


assert 'sase_blocks' not in sys.modules
config = Config.fromfile('config.py')
from sase_blocks import SASE, create_block, list_blocks

x = torch.randn(2, 16, 9, 7)
model = LIBRARY.build(config.model)
equal = [type(model[0]) is SASE, str(model[1]) == str(create_block('cbam(reduction=4, kernel_size=3)', 16))]
equal += [model(x).shape == x.shape, str(model[2].genotype) == config.model.layers[2].genotype]
for name in list_blocks():
    block, plain = LIBRARY.build(dict(type=name.upper(), channels=16)), create_block(name, 16)
    plain.load_state_dict(block.state_dict())
    equal.append(torch.equal(block.eval()(x), plain.eval()(x)))
errors = []
for wrong in (dict(type='CBAMM', channels=16), dict(type='CBAM'), dict(type='CBAM', channels=16, ratio=4)):
    try:
        LIBRARY.build(wrong)
    except Exception as error:
        errors.append(f'{type(error).__name__}: {error}')
print(json.dumps([equal, errors]))
"""


def test_blocks_by_name_in_a_configuration(tmp_path):
    (tmp_path / 'config.py').write_text(CONFIG)
    run = subprocess.run(
        [sys.executable, '-c', BUILD],
        cwd=tmp_path, env={**os.environ, 'PYTHONPATH': str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    equal, errors = json.loads(run.stdout.splitlines()[-1])
    assert len(equal) > 40
    assert all(equal), equal
    expected = ['KeyError: .*CBAMM is not in the', "TypeError: .*'channels'", "TypeError: .*'ratio'"]
    for error, pattern in zip(errors, expected, strict=True):
        assert re.match(pattern, error.replace('\n', ' ')), error
