"""The engine on the small model, against its formulas written out in numpy."""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray

from petalfl.engine import OrtTrainingEngine
from petalfl.errors import ModelError
from petalfl.model import Artifact, ModelManifest, check_artifact

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
    parameters, x, g = draw(24, seed=1), draw(3, 5, seed=2), draw(3, 4, seed=3)
    mask = np.array([[2, 0, 2, 0], [0, 0, 2, 2], [2, 2, 2, 2]], np.float32)
    w, b = parameters[:20].reshape(4, 5), parameters[20:]
    tanh = np.tanh(x @ w.T + b)
    da = g * mask * (1 - tanh**2)  # (b, 4)
    engine = OrtTrainingEngine(small_artifacts)
    fed = {"a": x, block.dropouts[0].name: mask}
    np.testing.assert_allclose(engine.forward(block, parameters, fed), mask * tanh, atol=1e-6)
    np.testing.assert_allclose(engine.forward(block, parameters, {"a": x}), tanh, atol=1e-6)
    back = engine.backward(block, parameters, fed | {"g": g})
    expected = np.concatenate([(da.T @ x).ravel(), da.sum(axis=0)])
    np.testing.assert_allclose(back.parameters, expected, rtol=1e-5, atol=1e-5)
    assert back.parameters.dtype == np.float32
    assert back.parameters.shape == (block.size,)
    assert back.loss is None
    assert back.inputs == {}


def test_a_head_by_hand(small_artifacts: Path, manifest: ModelManifest) -> None:
    """The mean cross-entropy of a perceptron, its gradients, and that of its input."""
    block = manifest.block("head")
    assert [p.shape for p in block.parameters] == [(8, 6), (8,), (3, 8), (3,)]
    parameters, z = draw(83, seed=1), draw(5, 6, seed=2)
    labels = np.array([0, 2, 1, 1, 0])
    mask = (draw(5, 8, seed=3) > -0.7).astype(np.float32) / np.float32(0.75)
    w1, b1, w2, b2 = np.split(parameters.astype(np.float64), [48, 56, 80])
    w1, w2 = w1.reshape(8, 6), w2.reshape(3, 8)
    a = z @ w1.T + b1
    h = np.maximum(a, 0) * mask
    logits = h @ w2.T + b2
    exponentials = np.exp(logits)
    probabilities = exponentials / exponentials.sum(axis=1, keepdims=True)
    loss = -np.log(probabilities[np.arange(5), labels]).mean()
    d_logits = (probabilities - np.eye(3)[labels]) / 5
    d_a = (d_logits @ w2) * mask * (a > 0)
    engine = OrtTrainingEngine(small_artifacts)
    fed = {"fusion": z, block.dropouts[0].name: mask}
    np.testing.assert_allclose(engine.forward(block, parameters, fed), logits, rtol=1e-4, atol=1e-5)
    back = engine.backward(block, parameters, fed | {"labels": labels})
    expected = [(d_a.T @ z).ravel(), d_a.sum(0), (d_logits.T @ h).ravel(), d_logits.sum(0)]
    np.testing.assert_allclose(back.parameters, np.concatenate(expected), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(back.inputs["fusion"], d_a @ w1, rtol=1e-4, atol=1e-5)
    assert back.inputs.keys() == {"fusion"}
    assert back.loss == pytest.approx(loss, rel=1e-5)
    assert type(back.loss) is float


def test_it_keeps_no_state_and_changes_no_argument(
    small_artifacts: Path, manifest: ModelManifest
) -> None:
    block, engine = manifest.block("encoder-a"), OrtTrainingEngine(small_artifacts)
    one, other, x, g = draw(24, seed=1), draw(24, seed=2), draw(3, 5), draw(3, 4)
    fed = {"a": x, block.dropouts[0].name: np.ones((3, 4), np.float32), "g": g}
    copies = {name: array.copy() for name, array in fed.items()}
    first = engine.backward(block, one, fed).parameters.copy()
    assert (engine.backward(block, other, fed).parameters != first).any()
    np.testing.assert_array_equal(engine.backward(block, one, fed).parameters, first)
    np.testing.assert_array_equal(one, draw(24, seed=1))
    for name, array in fed.items():
        np.testing.assert_array_equal(array, copies[name])


def test_read_only_parameters_will_do(small_artifacts: Path, manifest: ModelManifest) -> None:
    """As `petalfl.vectors.from_bytes` gives them."""
    parameters = np.frombuffer(draw(24, seed=1).tobytes(), np.float32)
    assert not parameters.flags.writeable
    engine, x = OrtTrainingEngine(small_artifacts), draw(3, 5)
    z = engine.forward(manifest.block("encoder-a"), parameters, {"a": x})
    w, b = parameters[:20].reshape(4, 5), parameters[20:]
    np.testing.assert_allclose(z, np.tanh(x @ w.T + b), atol=1e-6)


def test_threads_do_not_mix_their_clients_up(
    small_artifacts: Path, manifest: ModelManifest
) -> None:
    block, engine = manifest.block("head"), OrtTrainingEngine(small_artifacts)
    mask = np.ones((5, 8), np.float32)
    fed: dict[str, NDArray[Any]] = {"fusion": draw(5, 6), block.dropouts[0].name: mask}
    fed["labels"] = np.arange(5) % 3
    clients = [draw(83, seed=i) for i in range(8)]
    alone = [engine.backward(block, parameters, fed).parameters for parameters in clients]
    wrong: list[int] = []
    start = threading.Barrier(len(clients))

    def work(i: int) -> None:
        start.wait()
        for _ in range(30):
            if (engine.backward(block, clients[i], fed).parameters != alone[i]).any():
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(clients))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


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
    block, parameters, fed = manifest.block("encoder-a"), draw(24), {"a": draw(3, 5)}
    engines = [OrtTrainingEngine(folder, num_threads=2) for folder in (small_artifacts, copy)]
    for engine in engines * 2:
        engine.forward(block, parameters, fed)
    assert len(opened) == 1
    OrtTrainingEngine(copy, num_threads=3).forward(block, parameters, fed)
    assert len(opened) == 2  # another number of threads is another session
    del engine, engines
    gc.collect()
    OrtTrainingEngine(copy, num_threads=2).forward(block, parameters, fed)
    assert len(opened) == 3  # the last engine took it along


def test_only_the_blocks_used_need_be_there(
    small_artifacts: Path, manifest: ModelManifest, tmp_path: Path
) -> None:
    shutil.copytree(small_artifacts / "encoder-a", tmp_path / "encoder-a")
    engine = OrtTrainingEngine(tmp_path)
    engine.forward(manifest.block("encoder-a"), draw(24), {"a": draw(3, 5)})
    with pytest.raises(ModelError, match=r"encoder-b/eval_model\.onnx cannot be read"):
        engine.forward(manifest.block("encoder-b"), draw(100), {"b": draw(3, 2, 8)})


@pytest.mark.parametrize("kind", ["eval_model", "training_model"])
def test_a_damaged_artifact_is_never_run(
    kind: str, small_artifacts: Path, manifest: ModelManifest, tmp_path: Path
) -> None:
    shutil.copytree(small_artifacts / "encoder-a", tmp_path / "encoder-a")
    path = tmp_path / "encoder-a" / f"{kind}.onnx"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    engine, block = OrtTrainingEngine(tmp_path), manifest.block("encoder-a")
    run = engine.forward if kind == "eval_model" else engine.backward
    with pytest.raises(ModelError, match=f"{kind}.onnx is damaged"):
        run(block, draw(24), {"a": draw(3, 5)})


def test_an_artifact_that_is_no_graph(manifest: ModelManifest, tmp_path: Path) -> None:
    data = b"no graph at all"
    artifact = Artifact("encoder-a/eval_model.onnx", hashlib.sha256(data).hexdigest(), len(data))
    check_artifact(artifact, data)
    (tmp_path / "encoder-a").mkdir()
    (tmp_path / artifact.path).write_bytes(data)
    block = manifest.block("encoder-a")
    artifacts = dataclasses.replace(block.artifacts, eval_model=artifact)
    swapped = dataclasses.replace(block, artifacts=artifacts)
    with pytest.raises(ModelError, match=r"^ONNX Runtime cannot load encoder-a/eval_model\.onnx: "):
        OrtTrainingEngine(tmp_path).forward(swapped, draw(24), {"a": draw(3, 5)})


def test_without_the_runtime_it_says_how_to_get_it(
    small_artifacts: Path, manifest: ModelManifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    engine = OrtTrainingEngine(small_artifacts, num_threads=4)  # with no session open yet
    with pytest.raises(ModelError, match=r"pip install petalfl\[ort\]"):
        engine.forward(manifest.block("encoder-a"), draw(24), {"a": draw(3, 5)})
