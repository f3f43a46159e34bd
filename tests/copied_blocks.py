"""Runs copied blocks where timm, einops and sase_blocks cannot be imported: a program of tests/test_copy.py.

    python copied_blocks.py FOLDER

FOLDER/rows.json has the rows: module, class, arguments, dtypes, what to capture. The results go to FOLDER/results.pt.
"""

import importlib
import inspect
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SHAPE = (2, 32, 7, 6)
FORBIDDEN = ('timm', 'einops', 'sase_blocks', 'torchvision')


class Forbidden:
    """Makes an import of a forbidden package fail."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.partition('.')[0] in FORBIDDEN:
            raise ImportError(f'{name} is forbidden here')


def results(build: Callable[[], nn.Module], dtypes: Sequence[str] = ('float32', 'bfloat16')) -> dict[str, Tensor]:
    """Initial values, and outputs, gradients and statistics in train and eval mode, for bf16 under autocast."""
    found: dict[str, Tensor] = {}
    for dtype in dtypes:
        width = torch.float64 if dtype == 'float64' else torch.float32
        torch.manual_seed(0)
        module = build().to(width)
        found |= {f'{dtype} initial {key}': value.clone() for key, value in module.state_dict().items()}
        for training in (True, False):
            x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)).to(width).requires_grad_()
            module.train(training).zero_grad()
            with torch.autocast('cpu', torch.bfloat16, enabled=dtype == 'bfloat16'):
                y = module(x)
            y.to(width).square().sum().backward()
            gradients = {'x': x.grad, **{name: p.grad for name, p in module.named_parameters()}}
            found |= {f'{dtype} {training} {name}': value for name, value in gradients.items() if value is not None}
            found[f'{dtype} {training} y'] = y.detach()
        found |= {f'{dtype} trained {key}': value.clone() for key, value in module.state_dict().items()}
    return found


def capture(build: Callable[[], nn.Module], forms: Sequence[str], smallest: int) -> None:
    """FX, TorchScript and torch.export with dynamic sizes agree with the block itself."""
    torch.manual_seed(0)
    module = build().eval()
    other = torch.randn(3, SHAPE[1], 9, 12, generator=torch.Generator().manual_seed(2))
    captured: list[Any] = [torch.fx.symbolic_trace(module)] if 'fx' in forms else []
    captured += [torch.jit.script(one) for one in (module, *captured)] if 'script' in forms else []
    for one in captured:
        torch.testing.assert_close(one(other), module(other))
    if 'export' not in forms:
        return
    sizes = {'height': 2, 'width': 3}
    shape = {0: torch.export.Dim('batch', min=1, max=64)}
    shape |= {axis: torch.export.Dim(name, min=smallest, max=512) for name, axis in sizes.items()}
    example = torch.randn(2, SHAPE[1], 2 * smallest + 3, 3 * smallest, generator=torch.Generator().manual_seed(2))
    exported = torch.export.export(module, (example,), dynamic_shapes=(shape,)).module()
    torch.testing.assert_close(exported(other), module(other), rtol=1e-4, atol=1e-5)


def builder(folder: Path, row: dict[str, Any]) -> Callable[[], nn.Module]:
    """A function that builds the block of a row."""
    module = importlib.import_module(row['module'])
    assert row['class'] in module.__all__
    cls = getattr(module, row['class'])
    arguments = dict(row['arguments'])
    if 'feat_size' in inspect.signature(cls).parameters:
        arguments['feat_size'] = SHAPE[2:]
    return lambda: cls(SHAPE[1], **arguments)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    sys.meta_path.insert(0, Forbidden())
    sys.path.insert(0, str(folder))
    found = {}
    for row in json.loads((folder / 'rows.json').read_text()):
        try:
            build = builder(folder, row)
            found[row['id']] = results(build, row['dtypes'])
            capture(build, row['capture'], row['smallest'])
        except Exception as error:
            raise RuntimeError(row['id']) from error
    loaded = [name for name in sys.modules if name.partition('.')[0] in FORBIDDEN]
    assert not loaded, loaded
    torch.save(found, folder / 'results.pt')


if __name__ == '__main__':
    main(Path(sys.argv[1]))
