"""One inference graph of all blocks, for places where nothing trains.

The blocks' own graphs are joined as they are: a tensor between blocks keeps its name, and what is
inside a block gets the block's name in front. The node that cuts a block's vector up goes; every
parameter becomes an initializer ``<block>/<parameter>``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import (
    GraphProto,
    ModelProto,
    NodeProto,
    TensorProto,
    ValueInfoProto,
    helper,
    numpy_helper,
)

from petalfl.errors import ModelError
from petalfl.model import Block, ModelManifest, read_artifact
from petalfl.vectors import Vector

MAX_BYTES = (2 << 30) - (1 << 20)  # what one ONNX file can hold
_BATCH_SIZE = "/batch_size"  # no name of a tensor in a block begins so


def compose(
    folder: Path,
    manifest: ModelManifest,
    vectors: Mapping[str, Vector],
    modalities: Collection[str],
) -> ModelProto:
    """The model of a device with these modalities: what is absent is fixed.

    Args:
        vectors: Of every block that such a device holds.

    Returns:
        Inputs by modality ``(batch, *shape)``; outputs by task, as the heads give them (logits
        of a classifier). A task that is called like a modality or block goes by its head's name.

    Raises:
        ModelError: An unknown modality, artifacts in ORT format or damaged, or too large a model.
    """
    held = manifest.blocks_for(modalities)
    joined = _Joined(manifest, [m for m in manifest.modalities if m in modalities])
    for block in held:
        joined.add(block, _load(folder, block), vectors[block.name])
    model = joined.finish()
    if model.ByteSize() > MAX_BYTES:
        raise ModelError(f"{model.ByteSize():,} bytes are more than one ONNX file can hold")
    onnx.checker.check_model(model, full_check=True)
    return model


def _load(folder: Path, block: Block) -> ModelProto:
    artifact = block.artifacts.eval_model
    if artifact.path.endswith(".ort"):
        raise ModelError(
            "the artifacts are in ORT format, which cannot be joined; export the model again "
            "with --format onnx"
        )
    try:
        return onnx.load_from_string(read_artifact(folder, artifact))
    except ModelError:
        raise
    except Exception as error:  # protobuf's own kinds
        raise ModelError(f"{artifact.path} is no ONNX model: {error}") from error


class _Joined:
    """A graph in the making, blocks in topological order."""

    def __init__(self, manifest: ModelManifest, modalities: list[str]) -> None:
        self._manifest = manifest
        self._inputs = [_input_info(manifest, name) for name in modalities]
        self._there = set(modalities)
        self._outputs: list[ValueInfoProto] = []
        self._nodes = [helper.make_node("Shape", modalities[:1], [_BATCH_SIZE], start=0, end=1)]
        self._filled: set[str] = set()
        self._values: dict[str, TensorProto] = {}
        self._opsets: dict[str, int] = {}
        self._ir_version = 0
        taken = {*manifest.modalities, *(t.name for b in manifest.blocks for t in b.outputs)}
        self._tasks = {
            head.outputs[0].name: head.name if task in taken else task
            for task, head in manifest.heads.items()
        }

    def add(self, block: Block, model: ModelProto, vector: Vector) -> None:
        for opset in model.opset_import:
            self._opsets[opset.domain] = max(opset.version, self._opsets.get(opset.domain, 0))
        self._ir_version = max(model.ir_version, self._ir_version)
        graph = model.graph
        names = {value.name for value in graph.input}
        self._feed(block, names)
        between = names - {"parameters", "present"} | {value.name for value in graph.output}
        _embed(graph, block, vector)
        _rename(graph, {n: self._tasks.get(n, n) for n in between}, f"{block.name}/")
        self._nodes.extend(graph.node)
        self._values |= {value.name: value for value in graph.initializer}
        self._there.add(block.name)
        if block.kind == "head":
            self._outputs.extend(graph.output)

    def finish(self) -> ModelProto:
        graph = helper.make_graph(
            self._nodes, self._manifest.name, self._inputs, self._outputs, [*self._values.values()]
        )
        return helper.make_model(
            graph,
            ir_version=self._ir_version,
            opset_imports=[helper.make_opsetid(*opset) for opset in self._opsets.items()],
            producer_name="petalfl",
        )

    def _feed(self, block: Block, names: set[str]) -> None:
        """Makes what a device would feed: ``present``, and zeros for what it lacks."""
        for name in block.inputs:
            if name not in self._there:
                for tensor in self._manifest.block(name).outputs:
                    if tensor.name in names and tensor.name not in self._filled:
                        shape = [dim or 1 for dim in tensor.shape]
                        self._fill(tensor.name, np.zeros([1] * len(shape), np.float32), shape)
        if "present" in names:
            row = np.array([float(name in self._there) for name in block.inputs], np.float32)
            self._fill(f"{block.name}/present", row, [row.size])

    def _fill(self, name: str, row: NDArray[np.float32], shape: list[int]) -> None:
        """A tensor ``(batch, *shape)`` that repeats ``row``."""
        self._filled.add(name)
        row_name, shape_name, full = f"{name}/row", f"{name}/row_shape", f"{name}/shape"
        self._values[row_name] = numpy_helper.from_array(row, row_name)
        self._values[shape_name] = numpy_helper.from_array(np.array(shape, np.int64), shape_name)
        self._nodes += [
            helper.make_node("Concat", [_BATCH_SIZE, shape_name], [full], axis=0),
            helper.make_node("Expand", [row_name, full], [name]),
        ]


def _input_info(manifest: ModelManifest, name: str) -> ValueInfoProto:
    modality = manifest.modalities[name]
    dims = [f"{name}.{i}" if d is None else d for i, d in enumerate(modality.shape, 1)]
    dtype = TensorProto.FLOAT if modality.dtype == "float32" else TensorProto.INT64
    return helper.make_tensor_value_info(name, dtype, ["batch", *dims])


def _embed(graph: GraphProto, block: Block, vector: Vector) -> None:
    """Replaces the input ``parameters`` by an initializer for each of its tensors."""
    constants = {value.name: value for value in graph.initializer}
    taken = {name for node in graph.node for name in (*node.input, *node.output)}
    flat = {"parameters": ("parameters", vector)}  # by name in the graph
    values: dict[str, NDArray[np.float32]] = {}
    renamed: dict[str, str] = {}
    nodes = []
    for node in graph.node:
        if _cuts_vector(node, constants, block):
            parts = np.split(vector, np.cumsum([t.size for t in block.tensors])[:-1])
            flat |= {
                output: (tensor.name, part)
                for output, tensor, part in zip(node.output, block.tensors, parts, strict=True)
            }
        elif node.op_type == "Reshape" and node.input[0] in flat and node.input[1] in constants:
            name, part = flat[node.input[0]]
            if len(block.tensors) == 1:
                name = block.tensors[0].name
            name = node.output[0] if name in taken or name in values else name
            values[name] = part.reshape(numpy_helper.to_array(constants[node.input[1]]))
            renamed[node.output[0]] = name
        else:
            nodes.append(node)
    for node in nodes:
        node.input[:] = [renamed.get(name, name) for name in node.input]
    used = {name for node in nodes for name in node.input}
    values |= {name: part for name, (_, part) in flat.items() if name in used}
    initializers = [value for value in graph.initializer if value.name in used]
    initializers += [numpy_helper.from_array(x, name) for name, x in values.items()]
    for field, items in ((graph.node, nodes), (graph.initializer, initializers)):
        copies = [type(item).FromString(item.SerializeToString()) for item in items]
        del field[:]
        field.extend(copies)


def _cuts_vector(node: NodeProto, constants: Mapping[str, TensorProto], block: Block) -> bool:
    if node.op_type != "Split" or node.input[0] != "parameters" or len(block.tensors) == 1:
        return False
    sizes = numpy_helper.to_array(constants[node.input[1]]).tolist()
    return bool(sizes == [tensor.size for tensor in block.tensors])


def _rename(graph: GraphProto, between: Mapping[str, str], prefix: str) -> None:
    def new(name: str) -> str:
        return between.get(name, prefix + name) if name else name

    for node in graph.node:
        node.name = prefix + node.name if node.name else ""
        node.input[:] = [new(name) for name in node.input]
        node.output[:] = [new(name) for name in node.output]
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _rename(attribute.g, between, prefix)
    for value in (*graph.initializer, *graph.output):
        value.name = new(value.name)
