"""``sase-blocks export``: a network as an ONNX file or a program of torch.export, fused and checked."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch

from sase_blocks.data import image_config
from sase_blocks.deploy import export_onnx, export_program, fuse
from sase_blocks.deploy.capture import compare
from sase_blocks.profiling import quietly
from sase_blocks.reading import quoted
from sase_blocks.runs import check_writable, say

from .network import open_network, take_network

__all__ = ['DYNAMIC', 'export']

DYNAMIC: dict[str, bool | str] = {'all': True, 'batch': 'batch', 'none': False}


def export(
    out: str, checkpoint: str | None, dynamic: str, opset: int | None, fused: bool, check: bool, **options: Any
) -> None:
    given = take_network(options)
    file = Path(out)
    onnx = file.suffix.lower() == '.onnx'
    if not onnx and file.suffix.lower() != '.pt2':
        raise ValueError(f'a network is exported as .onnx or, for torch.export, as .pt2, got {quoted(out)}')
    if opset is not None and not onnx:
        raise ValueError('--opset is for .onnx; leave it out')
    check_writable(file.parent, make=False)
    opened = open_network(given, checkpoint)
    model, config = opened.model, image_config(opened.model, opened.img_size)
    say(opened.note)
    if fused:
        before = copy.deepcopy(model)
        say(str(fuse(model)))
        if check:
            image = torch.zeros(1, *config['input_size'])
            with quietly(before), torch.no_grad():
                compare(before, model, image, False, 'the fused network')
    facts: dict[str, Any] = {
        'model': opened.config.model,
        'insert': opened.config.insert,
        'classes': opened.classes,
        **{name: config[name] for name in ('input_size', 'mean', 'std', 'interpolation', 'crop_pct')},
    }
    shared: dict[str, Any] = {
        'input_size': tuple(config['input_size']),
        'dynamic': DYNAMIC[dynamic],
        'check': check,
        'metadata': {name: json.dumps(value) for name, value in facts.items()},
    }
    report = export_onnx(model, file, opset_version=opset, **shared) if onnx else export_program(model, file, **shared)
    say(str(report))
