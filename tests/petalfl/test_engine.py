"""The engine on the small model and on graphs made by hand, against their formulas in numpy."""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import re
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from petalfl.engine import OrtEngine
from petalfl.errors import ModelError
from petalfl.model import Artifact, Block, ModelManifest, Parameter, check_artifact
from petalfl.runtime import EngineName, find_runtime
from tests.petalfl.builders import make_block

Vector = NDArray[np.float32]


@pytest.fixture(scope="module")
def manifest(small_artifacts: Path) -> ModelManifest:
    return ModelManifest.load(small_artifacts)


def draw(*shape: int, seed: int = 0) -> Vector:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def test_an_encoder_by_hand(small_artifacts: Path, manifest: ModelManifest) -> None:
    """z = m tanh(x Wᵀ + b), and its vector-Jacobian product by the chain rule."""
    block = manifest.block("encoder-a")
    assert [(p.name, p.shape) for p in block.parameters] == [("0.weight", (4, 5)), ("0.bias", (4,))]
    vector, x, d = draw(24, seed=1), draw(3, 5, seed=2), draw(3, 4, seed=3)
    mask = np.array([[2, 0, 2, 0], [0, 0, 2, 2], [2, 2, 2, 2]], np.float32)
    w, b = vector[:20].reshape(4, 5), vector[20:]
    tanh = np.tanh(x @ w.T + b)
    da = d * mask * (1 - tanh**2)  # (b, 4)
    engine, fed = OrtEngine(small_artifacts), {"a": x, "mask.0": mask}
    forward = engine.forward(block, vector, fed)
    assert forward.outputs.keys() == {"encoder-a"}
    assert forward.statistics is None
    assert all(name.startswith("saved.") for name in forward.saved)
    np.testing.assert_allclose(forward.outputs["encoder-a"], mask * tanh, atol=1e-6)
    np.testing.assert_allclose(engine.evaluate(block, vector, fed)["encoder-a"], tanh, atol=1e-6)
    back = engine.backward(block, vector, fed | forward.saved | {"d_encoder-a": d})
    expected = np.concatenate([(da.T @ x).ravel(), da.sum(axis=0)])
    assert back.parameters is not None
    np.testing.assert_allclose(back.parameters, expected, rtol=1e-5, atol=1e-5)
    assert back.parameters.dtype == np.float32
    assert back.parameters.shape == (block.size,)
    assert (back.loss, back.inputs, back.statistics) == (None, {}, None)


def test_a_head_by_hand(small_artifacts: Path, manifest: ModelManifest) -> None:
    """The mean cross-entropy of a perceptron, its gradients, and that of its input."""
    block = manifest.block("head")
    assert [p.shape for p in block.parameters] == [(8, 6), (8,), (3, 8), (3,)]
    vector, z = draw(83, seed=1), draw(5, 6, seed=2)
    labels = np.array([0, 2, 1, 1, 0])
    mask = (draw(5, 8, seed=3) > -0.7).astype(np.float32) / np.float32(0.75)
    w1, b1, w2, b2 = np.split(vector.astype(np.float64), [48, 56, 80])
    w1, w2 = w1.reshape(8, 6), w2.reshape(3, 8)
    a = z @ w1.T + b1
    h = np.maximum(a, 0) * mask
    logits = h @ w2.T + b2
    exponentials = np.exp(logits)
    probabilities = exponentials / exponentials.sum(axis=1, keepdims=True)
    loss = -np.log(probabilities[np.arange(5), labels]).mean()
    d_logits = (probabilities - np.eye(3)[labels]) / 5
    d_a = (d_logits @ w2) * mask * (a > 0)
    engine = OrtEngine(small_artifacts)
    back = engine.backward(block, vector, {"fusion": z, "mask.0": mask, "labels": labels})
    expected = [(d_a.T @ z).ravel(), d_a.sum(0), (d_logits.T @ h).ravel(), d_logits.sum(0)]
    assert back.parameters is not None
    np.testing.assert_allclose(back.parameters, np.concatenate(expected), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(back.inputs["fusion"], d_a @ w1, rtol=1e-4, atol=1e-5)
    assert back.inputs.keys() == {"fusion"}
    assert back.loss == pytest.approx(loss, rel=1e-5)
    assert type(back.loss) is float
    found = engine.evaluate(block, vector, {"fusion": z})["head"]
    np.testing.assert_allclose(found, np.maximum(a, 0) @ w2.T + b2, rtol=1e-4, atol=1e-5)


def test_it_keeps_no_state_and_changes_no_argument(
    small_artifacts: Path, manifest: ModelManifest
) -> None:
    block, engine = manifest.block("encoder-a"), OrtEngine(small_artifacts)
    one, other, x, d = draw(24, seed=1), draw(24, seed=2), draw(3, 5), draw(3, 4)
    fed = {"a": x, "mask.0": np.ones((3, 4), np.float32), "d_encoder-a": d}
    copies = {name: array.copy() for name, array in fed.items()}

    def gradient(vector: Vector) -> Vector:
        saved = engine.forward(block, vector, fed).saved
        parameters = engine.backward(block, vector, fed | saved).parameters
        assert parameters is not None
        return parameters

    first = gradient(one)
    assert (gradient(other) != first).any()
    np.testing.assert_array_equal(gradient(one), first)
    np.testing.assert_array_equal(one, draw(24, seed=1))
    for name, array in fed.items():
        np.testing.assert_array_equal(array, copies[name])


def test_read_only_parameters_will_do(small_artifacts: Path, manifest: ModelManifest) -> None:
    """As `petalfl.vectors.from_bytes` gives them."""
    vector = np.frombuffer(draw(24, seed=1).tobytes(), np.float32)
    assert not vector.flags.writeable
    engine, x = OrtEngine(small_artifacts), draw(3, 5)
    z = engine.evaluate(manifest.block("encoder-a"), vector, {"a": x})["encoder-a"]
    w, b = vector[:20].reshape(4, 5), vector[20:]
    np.testing.assert_allclose(z, np.tanh(x @ w.T + b), atol=1e-6)


def test_threads_do_not_mix_their_clients_up(
    small_artifacts: Path, manifest: ModelManifest
) -> None:
    block, engine = manifest.block("head"), OrtEngine(small_artifacts)
    mask = np.ones((5, 8), np.float32)
    fed: dict[str, NDArray[Any]] = {"fusion": draw(5, 6), "mask.0": mask}
    fed["labels"] = np.arange(5) % 3
    clients = [draw(83, seed=i) for i in range(8)]

    def gradient(vector: Vector) -> Vector:
        parameters = engine.backward(block, vector, fed).parameters
        assert parameters is not None
        return parameters

    alone = [gradient(vector) for vector in clients]
    wrong: list[int] = []
    start = threading.Barrier(len(clients))

    def work(i: int) -> None:
        start.wait()
        for _ in range(30):
            if (gradient(clients[i]) != alone[i]).any():
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(clients))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# Graphs made by hand: what goes in and comes out by which name


VECTOR = np.array([2, 3, 0.5], np.float32)  # a weight, a bias, a running mean
X = np.array([[1], [3]], np.float32)


def value(name: str, *shape: Any) -> Any:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def write_graph(path: Path, nodes: list[Any], inputs: list[Any], outputs: list[Any]) -> Artifact:
    ends = [numpy_helper.from_array(np.array([i], np.int64), f"end.{i}") for i in range(4)]
    graph = helper.make_graph(nodes, "graph", inputs, outputs, ends)
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    data = model.SerializeToString()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    name = f"{path.parent.name}/{path.name}"
    return Artifact(name, hashlib.sha256(data).hexdigest(), len(data))


def part(name: str, i: int, of: str = "parameters") -> Any:
    return helper.make_node("Slice", [of, f"end.{i}", f"end.{i + 1}"], [name])


@pytest.fixture
def two_tensors(tmp_path: Path) -> Block:
    """Outputs w x and x + b, running mean of x; the backward graph does not take everything."""
    node, folder = helper.make_node, tmp_path / "encoder-a"
    products = [part("w", 0), part("b", 1), node("Mul", ["a", "w"], ["encoder-a.x"]),
                node("Add", ["a", "b"], ["encoder-a.y"])]  # fmt: skip
    means = [part("s", 2), node("ReduceMean", ["a"], ["m"], axes=[0, 1], keepdims=0),
             node("Add", ["s", "m"], ["statistics"]),
             node("Identity", ["a"], ["saved.0"])]  # fmt: skip
    sums = [node("Mul", ["saved.0", "d_encoder-a.x"], ["dw.0"]),
            node("ReduceSum", ["dw.0", "end.0"], ["dw"], keepdims=0),
            node("ReduceSum", ["d_encoder-a.y", "end.0"], ["db"], keepdims=0),
            node("Concat", ["dw", "db"], ["gradient"], axis=0)]  # fmt: skip
    outputs = [value("encoder-a.x", "b", 1), value("encoder-a.y", "b", 1)]
    made = make_block("encoder-a", ("a",), {"x": 1, "y": 1}, 1)
    artifacts = dataclasses.replace(
        made.artifacts,
        eval_model=write_graph(folder / "eval_model.onnx", products,
                               [value("parameters", 3), value("a", "b", 1)], outputs),
        training_forward=write_graph(
            folder / "training_forward.onnx", products + means,
            [value("parameters", 3), value("a", "b", 1)],
            [*outputs, value("saved.0", "b", 1), value("statistics", 1)],
        ),
        training_backward=write_graph(
            folder / "training_backward.onnx", sums,
            [value("saved.0", "b", 1), value("d_encoder-a.x", "b", 1),
             value("d_encoder-a.y", "b", 1)],
            [value("gradient", 2)],
        ),
    )  # fmt: skip
    return dataclasses.replace(
        made, artifacts=artifacts, size=3, num_trainable=2,
        parameters=(Parameter("w", (1,)), Parameter("b", (1,))), statistics=(Parameter("s", (1,)),),
    )  # fmt: skip


def test_several_tensors_statistics_and_what_is_saved(tmp_path: Path, two_tensors: Block) -> None:
    """Whatever a graph has no use for may be fed all the same."""
    engine = OrtEngine(tmp_path)
    fed = {"a": X, "present": np.ones((2, 1), np.float32), "mask.0": X}
    evaluated = engine.evaluate(two_tensors, VECTOR, fed)
    assert {name: y.tolist() for name, y in evaluated.items()} == {
        "encoder-a.x": [[2], [6]], "encoder-a.y": [[4], [6]]
    }  # fmt: skip
    forward = engine.forward(two_tensors, VECTOR, fed)
    assert forward.outputs.keys() == evaluated.keys()
    assert forward.saved.keys() == {"saved.0"}
    assert forward.statistics is not None
    assert forward.statistics.tolist() == [2.5]
    d = {"d_encoder-a.x": X, "d_encoder-a.y": np.ones((2, 1), np.float32)}
    back = engine.backward(two_tensors, VECTOR, fed | forward.saved | d)
    assert back.parameters is not None
    assert back.parameters.tolist() == [10, 2]
    assert (back.loss, back.statistics) == (None, None)


def test_a_frozen_block_is_evaluated_in_training(tmp_path: Path, two_tensors: Block) -> None:
    artifacts = dataclasses.replace(two_tensors.artifacts, training_forward=None)
    frozen = dataclasses.replace(two_tensors, is_frozen=True, artifacts=artifacts)
    engine = OrtEngine(tmp_path)
    forward = engine.forward(frozen, VECTOR, {"a": X})
    assert (forward.statistics, forward.saved) == (None, {})
    for name, y in engine.evaluate(frozen, VECTOR, {"a": X}).items():
        np.testing.assert_array_equal(forward.outputs[name], y)
    artifacts = dataclasses.replace(artifacts, training_backward=None)
    frozen = dataclasses.replace(frozen, artifacts=artifacts)
    with pytest.raises(ValueError, match="nothing at or before block encoder-a trains"):
        engine.backward(frozen, VECTOR, {"a": X})


def test_a_graph_that_takes_what_nobody_has(tmp_path: Path, two_tensors: Block) -> None:
    engine = OrtEngine(tmp_path)
    with pytest.raises(
        ModelError, match=r"^encoder-a/training_backward\.onnx takes 'saved\.0', which nothing"
    ):
        engine.backward(two_tensors, VECTOR, {"d_encoder-a.x": X, "d_encoder-a.y": X})


def test_a_graph_that_fails_is_named(tmp_path: Path, two_tensors: Block) -> None:
    engine = OrtEngine(tmp_path)
    for wrong in ({"a": X[:, [0, 0]]}, {"a": X.astype(np.int64)}, {"a": "x"}):
        with pytest.raises(ModelError, match=r"^ONNX Runtime fails on encoder-a/eval_model\.onnx"):
            engine.evaluate(two_tensors, VECTOR, wrong)  # type: ignore[arg-type]


def test_a_block_without_parameters(tmp_path: Path) -> None:
    nodes = [helper.make_node("Neg", ["a"], ["fusion"])]
    graph = write_graph(
        tmp_path / "fusion" / "eval_model.onnx", nodes, [value("a", "b", 1)],
        [value("fusion", "b", 1)],
    )  # fmt: skip
    block = make_block("fusion", ("a",), 1, 1, is_frozen=True, reached=False)
    block = dataclasses.replace(
        block, artifacts=dataclasses.replace(block.artifacts, eval_model=graph)
    )
    found = OrtEngine(tmp_path).forward(block, np.zeros(0, np.float32), {"a": X}).outputs
    np.testing.assert_array_equal(found["fusion"], -X)


# Sessions


def test_engines_share_the_sessions_of_the_same_content(
    small_artifacts: Path,
    manifest: ModelManifest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened: list[bytes] = []
    session_type = onnxruntime.InferenceSession

    def open_session(data: bytes, *args: Any, **kwargs: Any) -> Any:
        opened.append(data)
        return session_type(data, *args, **kwargs)

    monkeypatch.setattr(onnxruntime, "InferenceSession", open_session)
    copy = shutil.copytree(small_artifacts, tmp_path / "copy")
    block, vector, fed = manifest.block("encoder-a"), draw(24), {"a": draw(3, 5)}
    engines = [OrtEngine(folder, num_threads=2) for folder in (small_artifacts, copy)]
    for engine in engines * 2:
        engine.evaluate(block, vector, fed)
    assert len(opened) == 1
    OrtEngine(copy, num_threads=3).evaluate(block, vector, fed)
    assert len(opened) == 2  # another number of threads is another session
    del engine, engines
    gc.collect()
    OrtEngine(copy, num_threads=2).evaluate(block, vector, fed)
    assert len(opened) == 3  # the last engine took it along


def test_only_the_blocks_used_need_be_there(
    small_artifacts: Path, manifest: ModelManifest, tmp_path: Path
) -> None:
    shutil.copytree(small_artifacts / "encoder-a", tmp_path / "encoder-a")
    engine = OrtEngine(tmp_path)
    engine.evaluate(manifest.block("encoder-a"), draw(24), {"a": draw(3, 5)})
    with pytest.raises(ModelError, match=r"encoder-b/eval_model\.onnx cannot be read"):
        engine.evaluate(manifest.block("encoder-b"), draw(100), {"b": draw(3, 2, 8)})


@pytest.mark.parametrize("kind", ["eval_model", "training_forward", "training_backward"])
def test_a_damaged_artifact_is_never_run(
    kind: str, small_artifacts: Path, manifest: ModelManifest, tmp_path: Path
) -> None:
    shutil.copytree(small_artifacts / "encoder-a", tmp_path / "encoder-a")
    path = tmp_path / "encoder-a" / f"{kind}.onnx"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    engine, block = OrtEngine(tmp_path), manifest.block("encoder-a")
    run = {"eval_model": engine.evaluate, "training_forward": engine.forward}.get(kind)
    with pytest.raises(ModelError, match=f"{kind}.onnx is damaged"):
        (run or engine.backward)(block, draw(24), {"a": draw(3, 5)})


def test_an_artifact_that_is_no_graph(manifest: ModelManifest, tmp_path: Path) -> None:
    data = b"\x0a\x03not"  # a message, of other fields
    artifact = Artifact("encoder-a/eval_model.onnx", hashlib.sha256(data).hexdigest(), len(data))
    check_artifact(artifact, data)
    (tmp_path / "encoder-a").mkdir()
    (tmp_path / artifact.path).write_bytes(data)
    block = manifest.block("encoder-a")
    artifacts = dataclasses.replace(block.artifacts, eval_model=artifact)
    swapped = dataclasses.replace(block, artifacts=artifacts)
    with pytest.raises(ModelError, match=r"^ONNX Runtime cannot load encoder-a/eval_model\.onnx: "):
        OrtEngine(tmp_path).evaluate(swapped, draw(24), {"a": draw(3, 5)})


def too_new(**wrong: Any) -> bytes:
    """A graph with an operator, operator set or IR version that no runtime has yet."""
    node = helper.make_node(wrong.get("op", "Neg"), ["a"], ["fusion"])
    graph = helper.make_graph([node], "graph", [value("a", "b", 1)], [value("fusion", "b", 1)])
    opsets = [helper.make_opsetid("", wrong.get("opset", 17))]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=wrong.get("ir", 8))
    return bytes(model.SerializeToString())


@pytest.mark.parametrize(
    ("wrong", "found"),
    [
        ({"ir": 999}, r"Unsupported model IR version: 999, max supported IR version: \d+"),
        ({"opset": 999}, r"Opset 999 is under development; .* is till opset \d+"),
        ({"op": "NoSuchOperator"}, "No Op registered for NoSuchOperator"),
    ],
)
def test_a_graph_that_is_too_new_for_the_runtime(
    wrong: dict[str, Any], found: str, tmp_path: Path
) -> None:
    data, path = too_new(**wrong), "fusion/eval_model.onnx"
    (tmp_path / "fusion").mkdir()
    (tmp_path / path).write_bytes(data)
    block = make_block("fusion", ("a",), 1, 1, is_frozen=True, reached=False)
    graph = Artifact(path, hashlib.sha256(data).hexdigest(), len(data))
    artifacts = dataclasses.replace(block.artifacts, eval_model=graph)
    block = dataclasses.replace(block, artifacts=artifacts)
    runtime = re.escape(str(find_runtime()))
    message = rf"^{path} needs a newer ONNX Runtime than {runtime} \({found}.*\); install one with"
    with pytest.raises(ModelError, match=message):
        OrtEngine(tmp_path).evaluate(block, np.zeros(0, np.float32), {"a": X})


def test_an_engine_that_is_not_installed(small_artifacts: Path, manifest: ModelManifest) -> None:
    other: EngineName = "ort" if find_runtime().engine == "ort-training" else "ort-training"
    engine = OrtEngine(small_artifacts, name=other)
    with pytest.raises(ModelError, match=f"engine {other} is asked for, .* is installed"):
        engine.evaluate(manifest.block("encoder-a"), draw(24), {"a": draw(3, 5)})


def test_without_the_runtime_it_says_how_to_get_it(
    small_artifacts: Path, manifest: ModelManifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    engine = OrtEngine(small_artifacts, num_threads=4)  # with no session open yet
    with pytest.raises(ModelError, match=r"pip install petalfl\[ort\]"):
        engine.evaluate(manifest.block("encoder-a"), draw(24), {"a": draw(3, 5)})
