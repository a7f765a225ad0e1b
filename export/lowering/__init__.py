"""A traced program as an ONNX graph of standard operators, for any ONNX Runtime.

One function per ``aten`` operator, in a table; an operator that is not in it is refused by name.
"""

from __future__ import annotations

from onnx import ModelProto

from ..program import Program
from ..rewrites import UnsupportedError
from . import elementwise, reductions, shapes  # noqa: F401  # they fill the table
from .writer import TABLE, GraphWriter


def to_onnx(name: str, program: Program) -> ModelProto:
    """The program as a model whose inputs and outputs have the program's names.

    Raises:
        UnsupportedError: An operator has no counterpart here.
    """
    graph = GraphWriter(program)
    for op in program.ops:
        lower = TABLE.get(op.target) or TABLE.get(_functional(op.target))
        if lower is None:
            hint = _HINTS.get(op.target.rsplit(".", 1)[0].removeprefix("aten."), "")
            raise UnsupportedError(f"PyTorch's operator {op.target} is not supported{hint}")
        lower(graph, op, *op.arguments, **dict(op.keywords))
    return graph.model(name)


_HINTS = {
    "_local_scalar_dense": ": a value is read out of a tensor, as by item(); compute with tensors",
    "new_empty_strided": ": a part of a tensor is written in place; use torch.cat or torch.where",
    "nonzero": ": its result has no fixed size; use torch.where",
    "sort": "; use max or min over the axis",
    "topk": "; use max or min over the axis",
}


def _functional(target: str) -> str:
    """Of an in-place operator: the one that returns a new tensor, which is how a trace uses it."""
    parts = target.split(".")
    return ".".join([*parts[:-2], parts[-2].removesuffix("_"), parts[-1]])
