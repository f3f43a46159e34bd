"""Deploy a trained network: fold its batch norms, and export files for ONNX or torch.export, checked against torch."""

from .fusion import FuseReport, fuse
from .onnx_file import OnnxReport, export_onnx
from .program_file import ProgramReport, export_program

__all__ = ['FuseReport', 'OnnxReport', 'ProgramReport', 'export_onnx', 'export_program', 'fuse']
