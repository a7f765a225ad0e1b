"""`LocalModel` on real artifacts, judged by PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from petalfl.errors import DataError, ModelError
from petalfl.local_model import LocalModel
from petalfl.model import ModelManifest, read_artifact
from petalfl.vectors import Vector, from_bytes

Inputs = dict[str, NDArray[np.float32]]
SUBSETS = [("a",), ("b",), ("a", "b")]


def open_model(
    folder: Path, modalities: tuple[str, ...], tasks: tuple[str, ...] | None = None
) -> LocalModel:
    manifest = ModelManifest.load(folder)
    held = manifest.blocks_for(modalities, tasks)
    initial = {
        block.name: from_bytes(read_artifact(folder, block.artifacts.parameters), block.size)
        for block in held
    }
    return LocalModel.open(manifest, folder, held, 1).with_parameters(initial)


@pytest.fixture
def model(small_artifacts: Path) -> LocalModel:
    return open_model(small_artifacts, ("a", "b"))


@pytest.fixture
def inputs() -> Inputs:
    rng = np.random.default_rng(0)
    return {
        "a": rng.standard_normal((6, 5), dtype=np.float32),
        "b": rng.standard_normal((6, 2, 8), dtype=np.float32),
    }


def torch_probabilities(inputs: Mapping[str, NDArray[np.float32]]) -> NDArray[np.float32]:
    torch = pytest.importorskip("torch", reason="without torch: PyTorch is the judge")
    from tests.export.tiny import small

    reference = small().eval()
    with torch.no_grad():
        logits = reference({name: torch.from_numpy(x) for name, x in inputs.items()})
    probabilities: NDArray[np.float32] = logits.softmax(dim=1).numpy()
    return probabilities


@pytest.mark.parametrize("modalities", SUBSETS)
def test_any_subset_is_predicted_as_pytorch_does(
    model: LocalModel, inputs: Inputs, modalities: tuple[str, ...]
) -> None:
    given = {name: inputs[name] for name in modalities}
    found = model.predict_proba(given)
    assert found.shape == (6, 3)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, torch_probabilities(given), atol=1e-6)
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("modalities", SUBSETS)
def test_one_example_is_a_batch_of_one(
    model: LocalModel, inputs: Inputs, modalities: tuple[str, ...]
) -> None:
    one = {name: inputs[name][2] for name in modalities}
    batch = {name: inputs[name][2:3] for name in modalities}
    assert model.predict_proba(one).shape == (1, 3)
    np.testing.assert_array_equal(model.predict_proba(one), model.predict_proba(batch))


def test_plain_lists_will_do(model: LocalModel, inputs: Inputs) -> None:
    np.testing.assert_array_equal(
        model.predict_proba({"a": inputs["a"].tolist()}), model.predict_proba({"a": inputs["a"]})
    )


def test_large_logits_do_not_overflow(model: LocalModel, inputs: Inputs) -> None:
    huge = {name: vector * 1e4 for name, vector in model.parameters.items()}
    found = model.with_parameters(huge).predict_proba(inputs)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-6)


def test_evaluate(model: LocalModel, inputs: Inputs) -> None:
    predictions = model.predict_proba(inputs).argmax(axis=1)
    assert model.evaluate(inputs, predictions) == {
        "accuracy": 1.0,
        "macro_f1": 1.0,
        "num_examples": 6,
    }
    wrong = predictions.copy()
    wrong[:3] = (wrong[:3] + 1) % 3
    assert model.evaluate(inputs, wrong)["accuracy"] == 0.5


def test_a_device_with_one_modality(small_artifacts: Path, inputs: Inputs) -> None:
    model = open_model(small_artifacts, ("a",))
    assert [block.name for block in model.held] == ["encoder-a", "fusion", "head"]
    model.predict_proba({"a": inputs["a"]})
    for given in ({"b": inputs["b"]}, inputs):
        with pytest.raises(DataError, match="no parameters of encoder-b yet"):
            model.predict_proba(given)


def test_before_the_first_download(small_artifacts: Path, inputs: Inputs) -> None:
    manifest = ModelManifest.load(small_artifacts)
    model = LocalModel.open(manifest, small_artifacts, manifest.blocks, 1)
    with pytest.raises(DataError, match="no parameters of encoder-a, fusion, head yet"):
        model.predict_proba({"a": inputs["a"]})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "no modality was given"),
        ({"c": np.zeros((1, 5))}, "unknown modality 'c'"),
        ({"a": np.zeros(4)}, "modality a: found shape"),
        ({"a": np.zeros((0, 5))}, "at least 1"),
        ({"a": np.zeros((2, 5)), "b": np.zeros((3, 2, 8))}, "the same number of examples"),
        ({"a": np.zeros(5), "b": np.zeros((1, 2, 8))}, "modality a: found shape"),
        ({"a": np.full((1, 5), np.nan)}, "NaN"),
    ],
)
def test_bad_inputs(model: LocalModel, given: dict[str, NDArray[np.float64]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        model.predict_proba(given)


def test_bad_labels(model: LocalModel, inputs: Inputs) -> None:
    with pytest.raises(DataError, match=r"labels: found int64 \(5,\), expected integers \(6,\)"):
        model.evaluate(inputs, np.zeros(5, np.int64))


def test_new_parameters_make_a_new_model(model: LocalModel, inputs: Inputs) -> None:
    before = model.predict_proba(inputs)
    size = model.manifest.block("head").size
    changed = model.with_parameters({"head": np.zeros(size, np.float32)})
    np.testing.assert_allclose(changed.predict_proba(inputs), 1 / 3, atol=1e-6)
    np.testing.assert_array_equal(model.predict_proba(inputs), before)
    assert changed.parameters["fusion"] is model.parameters["fusion"]
    with pytest.raises(FrozenInstanceError):
        model.parameters = {}  # type: ignore[misc]


def test_damaged_artifact(small_artifacts: Path, tmp_path: Path, inputs: Inputs) -> None:
    manifest = ModelManifest.load(small_artifacts)
    path = manifest.block("head").artifacts.eval_model.path
    for block in manifest.blocks:
        (tmp_path / block.name).mkdir()
        for artifact in (block.artifacts.eval_model, block.artifacts.parameters):
            (tmp_path / artifact.path).write_bytes((small_artifacts / artifact.path).read_bytes())
    (tmp_path / path).write_bytes((tmp_path / path).read_bytes() + b"x")
    parameters: dict[str, Vector] = {b.name: np.zeros(b.size, np.float32) for b in manifest.blocks}
    model = LocalModel.open(manifest, tmp_path, manifest.blocks, 1).with_parameters(parameters)
    with pytest.raises(ModelError, match=f"{path} is damaged or was swapped"):
        model.predict_proba(inputs)


def test_the_most_likely_class(model: LocalModel, inputs: Inputs) -> None:
    found = model.predict(inputs)
    assert found.dtype == np.int64
    np.testing.assert_array_equal(found, model.predict_proba(inputs).argmax(axis=1))


# A model of three tasks, frozen and running statistics, words of any number


MOTION_AND_TEXT = ("motion", "text")


@pytest.fixture
def rich_inputs() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        "motion": rng.standard_normal((6, 5), dtype=np.float32),
        "text": rng.integers(0, 11, (6, 9)),
    }


def torch_outputs(inputs: Mapping[str, NDArray[Any]]) -> dict[str, Any]:  # tensors
    torch = pytest.importorskip("torch", reason="without torch: PyTorch is the judge")
    from tests.petalfl.torch_models import several

    with torch.no_grad():
        outputs = several().eval()({name: torch.from_numpy(x) for name, x in inputs.items()})
    assert isinstance(outputs, dict)
    return outputs


@pytest.mark.parametrize("modalities", [("motion",), ("text",), MOTION_AND_TEXT])
def test_every_task_is_predicted_as_pytorch_does(
    several_artifacts: Path, rich_inputs: dict[str, Any], modalities: tuple[str, ...]
) -> None:
    given = {name: rich_inputs[name] for name in modalities}
    expected = torch_outputs(given)
    model = open_model(several_artifacts, modalities)
    probabilities, decisions = model.predict_proba(given), model.predict(given)
    assert probabilities.keys() == decisions.keys() == {"kind", "tags", "pace"}
    for task, found in {
        "kind": expected["kind"].softmax(dim=1),
        "tags": expected["tags"].sigmoid(),
        "pace": expected["pace"],
    }.items():
        np.testing.assert_allclose(probabilities[task], found.numpy(), atol=1e-5, err_msg=task)
        assert probabilities[task].dtype == np.float32
    np.testing.assert_array_equal(decisions["kind"], expected["kind"].argmax(dim=1))
    np.testing.assert_array_equal(decisions["tags"], expected["tags"] >= 0)
    assert decisions["tags"].dtype == decisions["kind"].dtype == np.int64
    np.testing.assert_array_equal(decisions["pace"], probabilities["pace"])


def test_one_text_of_any_length(several_artifacts: Path) -> None:
    model = open_model(several_artifacts, MOTION_AND_TEXT)
    for words in ([3], [1, 2, 3, 4, 5]):
        one, batch = model.predict_proba({"text": words}), model.predict_proba({"text": [words]})
        assert one["kind"].shape == (1, 3)
        np.testing.assert_array_equal(one["tags"], batch["tags"])
    with pytest.raises(DataError, match="text: found 11 to 11, expected 0 to 10"):
        model.predict_proba({"text": [11]})


def test_the_metrics_of_every_task(several_artifacts: Path, rich_inputs: dict[str, Any]) -> None:
    model = open_model(several_artifacts, MOTION_AND_TEXT)
    labels = model.predict(rich_inputs)
    assert model.evaluate(rich_inputs, labels) == {
        "kind": {"accuracy": 1.0, "macro_f1": 1.0, "num_examples": 6},
        "tags": {"macro_f1": 1.0, "num_examples": 6},
        "pace": {"mae": 0.0, "mse": 0.0, "num_examples": 6},
    }
    off = {"pace": labels["pace"] + np.array([[1.0, -3.0]], np.float32)}
    found = model.evaluate(rich_inputs, off)
    assert found.keys() == {"pace"}
    assert found["pace"] == pytest.approx({"mae": 2.0, "mse": 5.0, "num_examples": 6})
    with pytest.raises(DataError, match="labels: expected a mapping by task"):
        model.evaluate(rich_inputs, labels["kind"])


def test_a_device_with_one_of_the_tasks(
    several_artifacts: Path, rich_inputs: dict[str, Any]
) -> None:
    model = open_model(several_artifacts, MOTION_AND_TEXT, ("tags",))
    assert model.predict_proba(rich_inputs).keys() == {"tags"}
    with pytest.raises(DataError, match="does not hold the head of task 'kind'"):
        model.evaluate(rich_inputs, {"kind": np.zeros(6, int)})


def test_probabilities_of_huge_logits(several_artifacts: Path, rich_inputs: dict[str, Any]) -> None:
    model = open_model(several_artifacts, MOTION_AND_TEXT)
    huge = {name: model.parameters[name] * 1e6 for name in ("head-kind", "head-tags")}
    found = model.with_parameters(huge).predict_proba(rich_inputs)
    for task in ("kind", "tags"):
        assert np.isfinite(found[task]).all()
        assert found[task].min() >= 0
        assert found[task].max() <= 1
