"""Deploy a trained network: fold its batch norms, and export an ONNX file checked against torch."""

from .fusion import FuseReport, fuse
from .onnx_file import OnnxReport, export_onnx

__all__ = ['FuseReport', 'OnnxReport', 'export_onnx', 'fuse']
