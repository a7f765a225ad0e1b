"""A PyTorch model of blocks becomes per-block ONNX training artifacts, and PyTorch again."""

from .artifacts import export_model
from .merge import merge
from .model import BlockModel
from .warm import warm_start

__all__ = ["BlockModel", "export_model", "merge", "warm_start"]
