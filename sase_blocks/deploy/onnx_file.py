"""Export a network to ONNX with torch's dynamo exporter, and compare it with torch before writing."""

from __future__ import annotations

import ast
import importlib
import os
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sase_blocks.profiling import quietly

from .capture import Checks, axes, capture, compare, describe_checks, explaining, prepare, write

MIN_OPSET = 18  # the native opset of torch's exporter; it converts to lower ones, or silently keeps 18 if it cannot
MAX_BYTES = 2_000_000_000  # a protobuf holds 2 GB


@dataclass(frozen=True)
class OnnxReport:
    """The result of ``export_onnx``.

    Args:
        file: the ONNX file.
        opset: its operator set.
        input_shape: shape of the input, with a number or the name of a dynamic axis per dimension.
        bytes: size of the file.
        checks: shape of each input given to onnxruntime and torch, and the largest difference of their outputs,
            relative to the largest output or 1.
    """

    file: Path
    opset: int
    input_shape: tuple[int | str, ...]
    bytes: int
    checks: Checks

    def __str__(self) -> str:
        shape = ' x '.join(map(str, self.input_shape))
        lines = [f'{self.file}: opset {self.opset}, input {shape}, {self.bytes / 1e6:.1f} MB']
        return '\n'.join([*lines, *describe_checks(self.checks, 'onnxruntime')])


def export_onnx(
    model: nn.Module,
    file: str | os.PathLike[str],
    input_size: int | tuple[int, ...] | None = None,
    *,
    dynamic: bool | str = True,
    opset_version: int | None = None,
    check: bool = True,
    metadata: Mapping[str, str] | None = None,
) -> OnnxReport:
    """Export a network to an ONNX file, in eval mode, with torch's dynamo exporter, and compare it with torch.

    The file appears only once it is complete and has passed its check; it replaces an existing file. Its input is named
    ``input``, its output ``output`` (``output0``, ... if there are several), and node names contain the path of their
    module: ``layer1.0.se.spatial_excite.convs.0/node_conv2d_3``.

    Args:
        model: a network that takes one image batch (B, C, H, W); its mode is unchanged. ``fuse`` it first for a smaller
            file.
        file: where; its folder must exist.
        input_size: image size: an int, (H, W) or (C, H, W). Default: the model's own.
        dynamic: True: batch, height and width may change; 'batch': only the batch; False: nothing (the batch is 1).
        opset_version: at least 18; default: the exporter's choice.
        check: run it in onnxruntime on the CPU, at the exported size and, if sizes may change, at another size and
            batch; outputs must be within 1e-4 of torch's.
        metadata: texts to store in the file by name, which onnxruntime returns as ``custom_metadata_map``.

    Raises:
        ImportError: onnx, onnxscript or, for the check, onnxruntime is missing: the extra ``export``.
        TypeError: ``model`` is not a module.
        ValueError: an unsupported opset, an unknown input size, a network that cannot be exported (compiled, scripted,
            lazy, on the meta device, wrapped in DDP or FSDP, over 2 GB), or half precision with ``check``.
        FileNotFoundError: no such folder.
        RuntimeError: the exporter failed, onnxruntime's outputs differ, or an inserted attention is lost or does not
            run (see ``check``). Nothing is written.
    """
    if opset_version is not None and (not isinstance(opset_version, int) or opset_version < MIN_OPSET):
        raise ValueError(
            f'opset_version must be an int of at least {MIN_OPSET}, which onnxruntime reads from version 1.14 on, '
            f'got {opset_version!r}: the exporter does not write older opsets'
        )
    target, image = prepare(model, file, input_size, dynamic, check)
    weights = [*model.parameters(), *model.buffers()]
    if sum(t.numel() * t.element_size() for t in weights) > MAX_BYTES:
        raise ValueError('the network has more than 2 GB, too large for one ONNX file: use torch.onnx.export')
    _import_onnx(check)
    with quietly(model), warnings.catch_warnings():
        warnings.simplefilter('ignore')  # from the exporter itself
        proto = _onnx_proto(model, image, dynamic, opset_version)
        opset = next(i.version for i in proto.opset_import if i.domain in ('', 'ai.onnx'))
        if opset_version is not None and opset != opset_version:
            raise ValueError(
                f'opset_version={opset_version} cannot be written for this network: the exporter gave {opset}; '
                f'leave opset_version out, or choose a supported one, at least {MIN_OPSET}'
            )
        _tidy(proto.graph)
        proto.ClearField('metadata_props')
        for name, text in (metadata or {}).items():
            proto.metadata_props.add(key=name, value=text)
        data = proto.SerializeToString()
        checks = compare(model, _runner(data), image, dynamic, 'onnxruntime') if check else ()
    write(target, data)
    dims = proto.graph.input[0].type.tensor_type.shape.dim
    shape = tuple(dim.dim_param or dim.dim_value for dim in dims)
    return OnnxReport(target, opset, shape, len(data), checks)


def _import_onnx(check: bool) -> None:
    for name in ('onnx', 'onnxscript', *(['onnxruntime'] if check else [])):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ImportError(f'ONNX export needs {name}: pip install "sase-blocks[export]"') from error


def _onnx_proto(model: nn.Module, image: Tensor, dynamic: bool | str, opset_version: int | None) -> Any:
    # Captured here, because torch 2.8 would silently fall back to a trace of one branch. A captured network
    # accepts no axis names, so _name_axes adds them.
    captured, outputs = capture(model, image, dynamic)
    with explaining(model, image, dynamic):
        program: Any = torch.onnx.export(
            captured,
            (image,),
            dynamo=True,
            opset_version=opset_version,
            input_names=['input'],
            output_names=['output'] if outputs == 1 else [f'output{i}' for i in range(outputs)],
            verbose=False,
        )
        proto = program.model_proto
        _name_axes(proto.graph, dynamic)
        return proto


def _name_axes(graph: Any, dynamic: bool | str) -> None:
    """Name the dynamic axes in all shapes of the graph; raises ValueError if the exporter fixed one."""
    dims = graph.input[0].type.tensor_type.shape.dim
    fixed = [f'{name} at {dims[axis].dim_value}' for axis, name in axes(dynamic).items() if not dims[axis].dim_param]
    if fixed:
        raise ValueError(f'the exporter fixed {", ".join(fixed)}')
    names = {dims[axis].dim_param: name for axis, name in axes(dynamic).items()}
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = re.sub(r'\w+', lambda found: names.get(found[0], found[0]), dim.dim_param)


def _tidy(graph: Any) -> None:
    """Add the path of its module to the name of each node, and remove the exporter's notes.

    The notes are a third of a small file and contain the paths of source files on this machine.
    """
    for node in graph.node:
        notes = {note.key: note.value for note in node.metadata_props}
        scopes = ast.literal_eval(notes.get('pkg.torch.onnx.name_scopes', '[]'))  # the modules, then the node itself
        if len(scopes) > 1 and scopes[-2]:
            node.name = f'{scopes[-2]}/{node.name}'
    for part in (graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        part.ClearField('metadata_props')


def _runner(data: bytes) -> Callable[[Tensor], list[Tensor]]:
    """A function of images that runs an ONNX file on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(data, providers=['CPUExecutionProvider'])
    return lambda x: [torch.from_numpy(y) for y in session.run(None, {'input': x.cpu().numpy()})]
