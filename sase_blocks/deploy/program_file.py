"""Export a network to a file of ``torch.export``, and compare what is read back with torch before writing."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from sase_blocks.profiling import quietly

from .capture import Checks, axes, capture, compare, describe_checks, prepare, write

__all__ = ['ProgramReport', 'export_program']


@dataclass(frozen=True)
class ProgramReport:
    """The result of ``export_program``.

    Args:
        file: the file.
        input_shape: shape of the input, with a number or the name of a dynamic axis per dimension.
        bytes: size of the file.
        checks: as in ``OnnxReport``, of the program read back from the file.
    """

    file: Path
    input_shape: tuple[int | str, ...]
    bytes: int
    checks: Checks

    def __str__(self) -> str:
        head = f'{self.file}: torch.export, input {" x ".join(map(str, self.input_shape))}, {self.bytes / 1e6:.1f} MB'
        return '\n'.join([head, *describe_checks(self.checks, 'torch.export')])


def export_program(
    model: nn.Module,
    file: str | os.PathLike[str],
    input_size: int | tuple[int, ...] | None = None,
    *,
    dynamic: bool | str = True,
    check: bool = True,
    metadata: Mapping[str, str] | None = None,
) -> ProgramReport:
    """Export a network to a file that ``torch.export.load`` reads, in eval mode, and compare it with torch.

    The file needs neither this library nor timm: ``torch.export.load(file).module()(images)``. It appears only once it
    is complete and has passed its check; it replaces an existing file.

    Args:
        model, file, input_size, dynamic: as in ``export_onnx``; ``file`` should end in ``.pt2``.
        check: read it back and run it at the exported size and, if sizes may change, at another size and batch; outputs
            must be within 1e-4 of torch's.
        metadata: texts to store in the file; ``torch.export.load(file, extra_files={'NAME': ''})`` fills them in.

    Raises:
        TypeError, ValueError, FileNotFoundError, RuntimeError: as in ``export_onnx``, except for ONNX's limits.
    """
    target, image = prepare(model, file, input_size, dynamic, check)
    with quietly(model), warnings.catch_warnings():
        warnings.simplefilter('ignore')  # from the exporter itself
        program, _ = capture(model, image, dynamic)
        stream = io.BytesIO()
        torch.export.save(program, stream, extra_files=dict(metadata or {}))
        data = stream.getvalue()
        checks: Checks = ()
        if check:
            checks = compare(model, torch.export.load(io.BytesIO(data)).module(), image, dynamic, 'torch.export')
    write(target, data)
    shape = tuple(axes(dynamic).get(axis, size) for axis, size in enumerate(image.shape))
    return ProgramReport(target, shape, len(data), checks)
