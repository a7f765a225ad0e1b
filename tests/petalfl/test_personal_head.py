"""A personal head on the device: one task, two heads, one prediction."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from petalfl.data import check_labels
from petalfl.engine import OrtEngine
from petalfl.errors import DataError, ModelError
from petalfl.local_data import ArrayData
from petalfl.local_model import LocalModel
from petalfl.model import ModelManifest, read_artifact
from petalfl.steps import predict_outputs
from petalfl.store import Identity
from petalfl.training import Hyperparameters, train
from petalfl.vectors import from_bytes


@pytest.fixture
def manifest(personal_artifacts: Path) -> ModelManifest:
    return ModelManifest.load(personal_artifacts)


@pytest.fixture
def model(manifest: ModelManifest, personal_artifacts: Path) -> LocalModel:
    held = manifest.blocks_for(["a", "b"])
    initial = {
        b.name: from_bytes(read_artifact(personal_artifacts, b.artifacts.parameters), b.size)
        for b in held
    }
    return LocalModel.open(manifest, personal_artifacts, held, 1).with_parameters(initial)


def draw(num_examples: int = 12) -> tuple[dict[str, Any], Any]:
    rng = np.random.default_rng(0)
    inputs = {"a": rng.normal(size=(num_examples, 5)), "b": rng.normal(size=(num_examples, 2, 8))}
    return {name: x.astype(np.float32) for name, x in inputs.items()}, rng.integers(
        0, 3, num_examples
    )


def softmax(logits: Any) -> Any:
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def test_labels_are_given_once(manifest: ModelManifest) -> None:
    _, labels = draw()
    assert list(manifest.heads) == ["head"]
    assert list(check_labels(manifest, labels, len(labels))) == ["head"]
    with pytest.raises(DataError, match="unknown task 'personal', the model has head"):
        check_labels(manifest, {"personal": labels}, len(labels))


def test_a_device_holds_it_with_the_head_of_its_task(manifest: ModelManifest) -> None:
    names = ["encoder-a", "fusion", "head", "head-personal"]
    assert [b.name for b in manifest.blocks_for(["a"])] == names
    assert [b.name for b in manifest.blocks_for(["a"], ["head"])] == names
    with pytest.raises(ModelError, match="found task 'personal', the model has head"):
        manifest.blocks_for(["a"], ["personal"])


def test_before_training_it_changes_no_decision(
    model: LocalModel, manifest: ModelManifest, personal_artifacts: Path
) -> None:
    inputs, _ = draw()
    outputs = predict_outputs(OrtEngine(personal_artifacts), manifest, model.parameters, inputs)
    assert (outputs["personal"] == 0).all()
    np.testing.assert_allclose(
        model.predict_proba(inputs), (softmax(outputs["head"]) + 1 / 3) / 2, atol=1e-6
    )
    assert (model.predict(inputs) == outputs["head"].argmax(axis=1)).all()


@pytest.mark.parametrize("method", ["fedsim", "fedalt"])
def test_both_train_and_the_prediction_is_their_mean(
    model: LocalModel, manifest: ModelManifest, personal_artifacts: Path, method: Any
) -> None:
    inputs, labels = draw()
    data = ArrayData(inputs, check_labels(manifest, labels, len(labels)))
    shared = [b.name for b in manifest.blocks if b.name not in manifest.private_blocks]
    settings = Hyperparameters(0.1, epochs=3, method=method)
    result = train(
        model.engine, manifest, model.parameters, data, settings, np.random.default_rng(0),
        shared=shared,
    )  # fmt: skip
    for block in manifest.blocks:
        moved = np.abs(result.parameters[block.name] - model.parameters[block.name]).max()
        assert moved > 1e-3
    trained = model.with_parameters(result.parameters)
    outputs = predict_outputs(OrtEngine(personal_artifacts), manifest, trained.parameters, inputs)
    both = (softmax(outputs["head"]) + softmax(outputs["personal"])) / 2
    assert np.abs(softmax(outputs["head"]) - both).max() > 1e-3
    np.testing.assert_allclose(trained.predict_proba(inputs), both, atol=1e-6)
    accuracy = float((both.argmax(axis=1) == labels).mean())
    assert trained.evaluate(inputs, labels)["accuracy"] == pytest.approx(accuracy)


def test_no_server_gets_it(manifest: ModelManifest) -> None:
    identity = Identity("default", "dev-1", "x" * 43, private_blocks=())
    shared = [block.name for block in manifest.blocks if identity.shares(block)]
    assert shared == ["encoder-a", "encoder-b", "fusion", "head"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"personalizes": "size"}, "head-personal: it personalizes 'size', no task"),
        ({"loss": "bce_with_logits"}, "expected head-personal, with head's task and output"),
        ({"name": "head-own"}, "expected head-personal, with head's task and output"),
    ],
)
def test_manifests_that_are_refused(
    manifest: ModelManifest, change: dict[str, Any], message: str
) -> None:
    value = json.loads(manifest.to_json())
    block = value["blocks"][-1]
    assert block["name"] == "head-personal"
    if name := change.get("name"):
        text = json.dumps(value).replace("head-personal", name)
    else:
        block["task"] |= change
        text = json.dumps(value)
    with pytest.raises(ModelError, match=message):
        ModelManifest.from_json(text.encode())
