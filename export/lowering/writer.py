"""An ONNX graph being written, and the table of what writes which operator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from ..program import Op, Program, Ref, Size
from ..rewrites import UnsupportedError

OPSET, IR_VERSION = 17, 8
Dim: TypeAlias = int | Size

ONNX_TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float64: TensorProto.DOUBLE,
    torch.int64: TensorProto.INT64,
    torch.int32: TensorProto.INT32,
    torch.bool: TensorProto.BOOL,
}


class GraphWriter:
    """An ONNX graph being written: nodes, constants and the type of every value."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._inputs = dict(program.inputs)  # and what is read for its length alone
        self._nodes: list[NodeProto] = []
        self._constants: dict[tuple[Any, ...], str] = {}
        self._initializers: list[TensorProto] = []
        self._lengths: dict[str, str] = {}
        self.names: dict[str, Any] = {n: n for n in program.inputs}  # of ONNX values
        self.slices: dict[str, tuple[str, dict[int, tuple[Any, Any, int]]]] = {}  # by result
        self.shapes: dict[str, tuple[Dim, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        for name, value in program.inputs.items():
            self.shapes[name], self.dtypes[name] = value.shape, value.dtype
        for name, array in program.constants.items():
            self.names[name] = self.constant(array)
            self.shapes[name] = array.shape
            self.dtypes[name] = torch.from_numpy(array).dtype
        for op in program.ops:
            if op.dtype is not None:
                self.shapes[op.name], self.dtypes[op.name] = op.shape, op.dtype

    def constant(self, value: Any, dtype: Any = None) -> str:
        """An initializer; equal ones are one."""
        array = np.asarray(value, dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            name = f"_c{len(self._constants)}"
            self._constants[key] = name
            self._initializers.append(numpy_helper.from_array(array, name))
        return self._constants[key]

    def node(self, kind: str, inputs: Sequence[str], name: str = "", **attributes: Any) -> str:
        """Adds a node with one output and gives the output's name."""
        return self.nodes(kind, inputs, [name or f"_n{len(self._nodes)}"], **attributes)[0]

    def nodes(
        self, kind: str, inputs: Sequence[str], names: Sequence[str], **attributes: Any
    ) -> list[str]:
        """Adds a node with these outputs."""
        label = f"{kind}_{len(self._nodes)}"  # the runtime's fusions want every node named
        node = helper.make_node(kind, list(inputs), list(names), name=label, **attributes)
        self._nodes.append(node)
        return list(names)

    def put(self, op: Op, kind: str, inputs: Sequence[str], **attributes: Any) -> None:
        """Adds the node whose output is the operation's result."""
        self.names[op.name] = self.node(kind, inputs, op.name, **attributes)

    def same(self, op: Op, name: str) -> None:
        """The operation's result is a value that is there already."""
        self.names[op.name] = name

    def value(self, x: Any, dtype: torch.dtype | None = None) -> str:
        """A tensor, or a number as one; cast to ``dtype`` if that is given and another."""
        if isinstance(x, Ref):
            name: str = self.names[x.name]
            if dtype is None or self.dtypes[x.name] == dtype:
                return name
            return self.node("Cast", [name], to=ONNX_TYPES[dtype])
        if isinstance(x, Size):
            return self.node("Cast", [self.size(x)], to=ONNX_TYPES[dtype or torch.int64])
        assert dtype is not None  # of a plain number
        return self.constant(x, torch.empty((), dtype=dtype).numpy().dtype)

    def shape(self, x: Any) -> tuple[Dim, ...]:
        """Of the value of a `Ref`."""
        return self.shapes[x.name]

    def rank(self, x: Any) -> int:
        """Number of axes of the value of a `Ref`."""
        return len(self.shapes[x.name])

    def axis(self, x: Any, dim: int) -> int:
        """From 0, where PyTorch may count from the end."""
        return dim % max(self.rank(x), 1)

    def axes(self, x: Any, dims: Any) -> list[int]:
        """All axes where none is given."""
        if dims is None or dims == ():
            return list(range(self.rank(x)))
        return [self.axis(x, d) for d in (dims if isinstance(dims, tuple) else (dims,))]

    def size(self, size: Size) -> str:
        """A length that is known at run time, as an int64 of shape ()."""
        total = ""
        for coefficient, names in size.terms:
            term = self.constant(coefficient, np.int64)
            for name in names:
                term = self.node("Mul", [term, self._length(name)])
            total = self.node("Add", [total, term]) if total else term
        return total

    def _length(self, axis: str) -> str:
        wanted = Size(((1, (axis,)),))
        if axis not in self._lengths:
            every = self._inputs | self._program.available
            found = [n for n, v in every.items() if wanted in v.shape]
            if not found:
                raise UnsupportedError(f"no input has the axis {axis}")
            self._inputs[found[0]] = every[found[0]]
            shape = self.node("Shape", [found[0]])
            at = every[found[0]].shape.index(wanted)
            self._lengths[axis] = self.node("Gather", [shape, self.constant(at, np.int64)])
        return self._lengths[axis]

    def sizes(self, dims: Sequence[Dim]) -> str:
        """A shape as an int64 tensor."""
        if all(isinstance(d, int) for d in dims):
            return self.constant(dims, np.int64)
        first = self.constant([0], np.int64)
        parts = [
            self.constant([d], np.int64)
            if isinstance(d, int)
            else self.node("Unsqueeze", [self.size(d), first])
            for d in dims
        ]
        return self.node("Concat", parts, axis=0)

    def reshape(self, x: str, dims: Sequence[Dim]) -> str:
        """Reshapes; one length that is not known becomes -1."""
        if sum(isinstance(d, Size) for d in dims) == 1 and -1 not in dims:
            dims = [d if isinstance(d, int) else -1 for d in dims]
        return self.node("Reshape", [x, self.sizes(dims)])

    def model(self, name: str) -> ModelProto:
        """The finished model."""
        outputs = []
        for output, value in self._program.outputs.items():
            self.nodes("Identity", [self.names[value]], [output])
            outputs.append(_info(output, self.shapes[value], self.dtypes[value]))
        inputs = [_info(n, v.shape, v.dtype) for n, v in self._inputs.items()]
        nodes = _needed(self._nodes, {o.name for o in outputs})
        read = {name for node in nodes for name in node.input}
        constants = [c for c in self._initializers if c.name in read]
        graph = helper.make_graph(nodes, name, inputs, outputs, constants)
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", OPSET)], producer_name="petalfl"
        )
        model.ir_version = IR_VERSION
        _rename_results(model, self._program)
        onnx.checker.check_model(model)
        return model


def _needed(nodes: list[NodeProto], wanted: set[str]) -> list[NodeProto]:
    """Without nodes that nothing reads any more."""
    kept = []
    for node in reversed(nodes):
        if wanted.intersection(node.output):
            wanted.update(node.input)
            kept.append(node)
    return kept[::-1]


def _rename_results(model: ModelProto, program: Program) -> None:
    """Gives outputs their names where they are made, so that no Identity copies them."""
    graph = model.graph
    copies = [n for n in graph.node if n.op_type == "Identity" and n.output[0] in program.outputs]
    identities = {n.input[0]: n for n in copies}
    made = {o: node for node in graph.node for o in node.output}
    for name, identity in identities.items():
        twice = sum(n.input[0] == name for n in copies) > 1
        if name not in made or twice:
            continue
        for node in graph.node:
            for names in (node.input, node.output):
                for i, n in enumerate(names):
                    if n == name:
                        names[i] = identity.output[0]
        graph.node.remove(identity)


def _info(name: str, shape: Sequence[Dim], dtype: torch.dtype) -> onnx.ValueInfoProto:
    if dtype not in ONNX_TYPES:
        raise UnsupportedError(f"{name} is {dtype}; expected torch.float32")
    dims = [d if isinstance(d, int) else _dim_name(d) for d in shape]
    return helper.make_tensor_value_info(name, ONNX_TYPES[dtype], dims)


def _dim_name(size: Size) -> str | None:
    """Only a plain length has a name; the runtime need not know of the others."""
    is_plain = len(size.terms) == 1 and size.terms[0][0] == 1 and len(size.terms[0][1]) == 1
    return size.terms[0][1][0] if is_plain else None


Lower: TypeAlias = Callable[..., None]
TABLE: dict[str, Lower] = {}


def lowers(*targets: str) -> Callable[[Lower], Lower]:
    """Enters a function into the table for these operators of ``aten``."""

    def register(function: Lower) -> Lower:
        for target in targets:
            TABLE[f"aten.{target}" if "." in target else target] = function
        return function

    return register
