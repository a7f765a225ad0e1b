"""A PyTorch model of blocks becomes per-block ONNX training artifacts."""

from .artifacts import export_model
from .model import BlockModel

__all__ = ["BlockModel", "export_model"]
