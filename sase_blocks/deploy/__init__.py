"""A trained network made ready for use: batch norms folded, and an ONNX file that was compared with torch."""

from .fusion import FuseReport, fuse
from .onnx_file import OnnxReport, export_onnx

__all__ = ['FuseReport', 'OnnxReport', 'export_onnx', 'fuse']
