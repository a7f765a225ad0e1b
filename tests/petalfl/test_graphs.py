"""Graphs of a hostile server, checked by themselves and run by the engine."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper

from petalfl.engine import OrtEngine, memory_bytes
from petalfl.errors import ModelError
from petalfl.graphs import check_graph
from petalfl.model import Artifact, Block, ModelManifest
from tests.petalfl.builders import make_block

X = np.array([[1, 2], [3, 4]], np.float32)
SECRET = b"of the app alone"  # 4 floats


def value(name: str, *shape: Any, dtype: int = TensorProto.FLOAT) -> Any:
    return helper.make_tensor_value_info(name, dtype, shape)


def graph(*nodes: NodeProto, constants: tuple[TensorProto, ...] = (), **more: Any) -> GraphProto:
    """From ``a`` ``(b, 2)`` to ``fusion``."""
    outputs = more.get("outputs", [value("fusion", "b", None)])
    return helper.make_graph(nodes, "g", [value("a", "b", 2)], outputs, constants)


def model(made: GraphProto, **more: Any) -> ModelProto:
    domains = more.pop("domains", [])
    opsets = [helper.make_opsetid("", 17), *(helper.make_opsetid(d, 1) for d in domains)]
    return helper.make_model(made, opset_imports=opsets, ir_version=8, **more)


def elsewhere(path: str) -> TensorProto:
    """A tensor whose values are those of a file."""
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2, 2])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=path)
    return tensor


def branching(tensor: TensorProto, depth: int = 1) -> NodeProto:
    """An `If` whose branches hold a constant, perhaps branches within branches."""
    inner = (
        helper.make_node("Constant", [], ["c"], value=tensor)
        if depth == 1
        else branching(tensor, depth - 1)
    )
    branch = helper.make_graph([inner], "branch", [], [value("c", 2, 2)])
    return helper.make_node("If", ["is"], ["c"], then_branch=branch)


def loop() -> NodeProto:
    condition = value("k", dtype=TensorProto.BOOL)
    body = helper.make_graph(
        [helper.make_node("Identity", ["k"], ["k2"])], "body",
        [value("i", dtype=TensorProto.INT64), condition], [value("k2", dtype=TensorProto.BOOL)],
    )  # fmt: skip
    return helper.make_node("Loop", ["", "is"], [], body=body)


def function() -> ModelProto:
    own = helper.make_function(
        "own", "Own", ["x"], ["y"], [helper.make_node("Neg", ["x"], ["y"])],
        [helper.make_opsetid("", 17)],
    )  # fmt: skip
    return model(graph(TIMES_W, constants=(HERE,)), functions=[own], domains=["own"])


HERE = helper.make_tensor("w", TensorProto.FLOAT, [2, 2], [1, 0, 0, 1])
TIMES_W = helper.make_node("MatMul", ["a", "w"], ["fusion"])
FILE = "the values of a tensor lie in another file"
SPARSE = helper.make_sparse_tensor(
    helper.make_tensor("s", TensorProto.FLOAT, [1], [1.0]),
    helper.make_tensor("i", TensorProto.INT64, [1], [0]),
    [2],
)
REFUSED: dict[str, tuple[Callable[[str], ModelProto], str]] = {
    "a file": (lambda path: model(graph(TIMES_W, constants=(elsewhere(path),))), FILE),
    "a file as an attribute": (
        lambda path: model(graph(helper.make_node("Constant", [], ["c"], value=elsewhere(path)))),
        FILE,
    ),
    "a file in a branch": (lambda path: model(graph(branching(elsewhere(path)))), FILE),
    "branches without end": (lambda path: model(graph(branching(HERE, 20))), "branches lie in"),
    "a loop": (lambda path: model(graph(loop())), "it has a loop, Loop"),
    "a function": (lambda path: function(), "it has functions"),
    "an operator of the runtime's own": (
        lambda path: model(
            graph(helper.make_node("Gelu", ["a"], ["fusion"], domain="com.microsoft"))
        ),
        "operators of domain b'com.microsoft', not of ONNX",
    ),
    "a sparse constant": (
        lambda path: model(graph(helper.make_node("Constant", [], ["c"], sparse_value=SPARSE))),
        "sparse",
    ),
    "no protobuf": (lambda path: b"no graph at all", "no protobuf message"),  # type: ignore[dict-item, return-value]
    "a runtime's own format": (lambda path: b"\x18\0\0\0ORTM" + bytes(60), "no protobuf message"),  # type: ignore[dict-item, return-value]
}


def block_of(folder: Path, data: bytes) -> Block:
    """A block that runs a graph."""
    path = "fusion/eval_model.onnx"
    (folder / "fusion").mkdir(parents=True)
    (folder / path).write_bytes(data)
    block = make_block("fusion", ("a",), 2, 1, is_frozen=True, reached=False)
    found = Artifact(path, hashlib.sha256(data).hexdigest(), len(data))
    return replace(block, artifacts=replace(block.artifacts, eval_model=found))


def run(folder: Path, data: bytes) -> dict[str, NDArray[np.float32]]:
    return OrtEngine(folder, is_foreign=True).evaluate(
        block_of(folder, data), np.zeros(0, np.float32), {"a": X}
    )


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_graph_may_not_hold(case: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(SECRET)
    make, message = REFUSED[case]
    for path in (str(secret), os.path.relpath(secret)):
        made = make(path)
        data = made if isinstance(made, bytes) else made.SerializeToString()
        with pytest.raises(ModelError, match=f"^fusion/eval_model.onnx is no graph.*{message}"):
            run(tmp_path / path.replace("/", "-"), data)


def test_what_it_may(tmp_path: Path) -> None:
    data = model(graph(TIMES_W, constants=(HERE,))).SerializeToString()
    np.testing.assert_array_equal(run(tmp_path, data)["fusion"], X)


@pytest.mark.parametrize("model_folder", ["small_artifacts", "several_artifacts"])
def test_all_graphs_of_an_export(request: pytest.FixtureRequest, model_folder: str) -> None:
    folder: Path = request.getfixturevalue(model_folder)
    manifest = ModelManifest.load(folder)
    paths = [*(a.path for b in manifest.blocks for a in b.artifacts.graphs)]
    paths += [a.path for a in manifest.optimizers.values()]
    assert len(paths) > 10
    for path in paths:
        check_graph(path, (folder / path).read_bytes())


GOOD = model(graph(TIMES_W, branching(HERE), constants=(HERE,))).SerializeToString()


@settings(max_examples=300, deadline=None)
@given(st.integers(0, len(GOOD) - 1), st.binary(max_size=3), st.integers(0, 4))
def test_any_bytes_are_read_or_refused(at: int, inserted: bytes, num_cut: int) -> None:
    try:
        check_graph("x", GOOD[:at] + inserted + GOOD[at + num_cut :])
    except ModelError as error:
        assert str(error).startswith("x is no graph")


# Graphs that run, and want too much or give the wrong thing


def giant(num_floats: int) -> ModelProto:
    shape = helper.make_tensor("shape", TensorProto.INT64, [1], [num_floats])
    return model(
        graph(
            helper.make_node("ConstantOfShape", ["shape"], ["c"]),
            helper.make_node("ReduceSum", ["c"], ["sum"]),
            helper.make_node("Add", ["a", "sum"], ["fusion"]),
            constants=(shape,),
        )
    )


def test_a_graph_cannot_take_all_memory(tmp_path: Path) -> None:
    """Neither when it is run nor when it is loaded, by folding its constants."""
    for share in (0.75, 100):
        data = giant(int(share * memory_bytes() / 4)).SerializeToString()
        with pytest.raises(ModelError, match=r"^ONNX Runtime (fails on|cannot load) fusion"):
            run(tmp_path / f"{share}", data)


def test_a_constant_of_more_than_it_holds(tmp_path: Path) -> None:
    liar = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2, 1 << 40], raw_data=b"1234")
    data = model(graph(TIMES_W, constants=(liar,))).SerializeToString()
    with pytest.raises(ModelError, match=r"^ONNX Runtime cannot load fusion"):
        run(tmp_path, data)


OUTPUTS: dict[str, tuple[tuple[str, list[str], list[str], dict[str, Any]], str]] = {
    "nothing": (("Neg", ["a"], ["other"], {}), "nothing as 'fusion'"),
    "another width": (("Concat", ["a", "a"], ["fusion"], {"axis": 1}), r"float32 \(2, 4\)"),
    "another length": (("Concat", ["a", "a"], ["fusion"], {"axis": 0}), r"float32 \(4, 2\)"),
    "another rank": (("Flatten", ["a"], ["fusion"], {"axis": 0}), r"float32 \(1, 4\)"),
    "doubles": (("Cast", ["a"], ["fusion"], {"to": TensorProto.DOUBLE}), r"float64 \(2, 2\)"),
    "words": (("Cast", ["a"], ["fusion"], {"to": TensorProto.STRING}), r"object \(2, 2\)"),
    "a list": (("SplitToSequence", ["a"], ["fusion"], {}), "nothing"),
}


@pytest.mark.parametrize("case", OUTPUTS)
def test_an_output_of_another_form(case: str, tmp_path: Path) -> None:
    (operator, inputs, outputs, more), message = OUTPUTS[case]
    node = helper.make_node(operator, inputs, outputs, **more)
    made = graph(node, outputs=[helper.make_empty_tensor_value_info(outputs[0])])
    with pytest.raises(ModelError, match=f"^fusion/eval_model.onnx gives {message}"):
        run(tmp_path, model(made).SerializeToString())
