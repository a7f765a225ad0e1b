"""Local training on the small model; its numbers are proved in tests/export/test_law.py."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from petalfl.engine import Arrays, Gradients, OrtTrainingEngine
from petalfl.errors import DataError, ModelError
from petalfl.model import Artifact, Artifacts, Block, Dropout, ModelManifest, Parameter
from petalfl.training import (
    Hyperparameters,
    draw_masks,
    predict_logits,
    step_gradients,
    train,
)

Vector = NDArray[np.float32]
HYPERPARAMETERS = Hyperparameters(0.1, momentum=0.9, weight_decay=1e-3, batch_size=4, epochs=2)


class Spy:
    """An engine that notes the blocks it ran and what it fed them, in order."""

    def __init__(self, folder: Path) -> None:
        self.inner = OrtTrainingEngine(folder)
        self.calls: list[tuple[str, str, Arrays]] = []

    def forward(self, block: Block, parameters: Vector, inputs: Arrays) -> Vector:
        self.calls.append(("forward", block.name, inputs))
        return self.inner.forward(block, parameters, inputs)

    def backward(self, block: Block, parameters: Vector, inputs: Arrays) -> Gradients:
        self.calls.append(("backward", block.name, inputs))
        return self.inner.backward(block, parameters, inputs)

    @property
    def names(self) -> list[tuple[str, str]]:
        return [(direction, name) for direction, name, _ in self.calls]

    def labels(self) -> list[NDArray[np.int64]]:
        return [inputs["labels"] for _, name, inputs in self.calls if name == "head"]


class Fake:
    """An engine with the given losses and a gradient of ones."""

    def __init__(self, losses: list[float]) -> None:
        self.losses = losses

    def forward(self, block: Block, parameters: Vector, inputs: Arrays) -> Vector:
        return np.zeros((len(next(iter(inputs.values()))), *block.output_shape), np.float32)

    def backward(self, block: Block, parameters: Vector, inputs: Arrays) -> Gradients:
        back = {name: inputs[name] for name in block.inputs}
        loss = self.losses.pop(0) if block.kind == "head" else None
        return Gradients(np.ones_like(parameters), back, loss)


@pytest.fixture(scope="module")
def manifest(small_artifacts: Path) -> ModelManifest:
    return ModelManifest.load(small_artifacts)


@pytest.fixture(scope="module")
def parameters(small_artifacts: Path, manifest: ModelManifest) -> Mapping[str, Vector]:
    return {
        b.name: np.fromfile(small_artifacts / b.artifacts.parameters.path, "<f4")
        for b in manifest.blocks
    }


@pytest.fixture
def spy(small_artifacts: Path) -> Spy:
    return Spy(small_artifacts)


def data(length: int = 10) -> tuple[dict[str, Vector], NDArray[np.int64]]:
    rng = np.random.default_rng(5)
    a = rng.standard_normal((length, 5), dtype=np.float32)
    b = rng.standard_normal((length, 2, 8), dtype=np.float32)
    return {"a": a, "b": b}, rng.integers(0, 3, length)


def test_the_same_generator_gives_the_same_result(
    spy: Spy, manifest: ModelManifest, parameters: Mapping[str, Vector]
) -> None:
    inputs, labels = data()
    results = [
        train(spy, manifest, parameters, inputs, labels, HYPERPARAMETERS,
              np.random.default_rng(seed))
        for seed in (1, 1, 2)
    ]  # fmt: skip
    assert results[0].loss == results[1].loss != results[2].loss
    assert results[0].num_examples == 10
    for block in manifest.blocks:
        one, same, other = (result.parameters[block.name] for result in results)
        np.testing.assert_array_equal(one, same)
        assert (one != other).any()
        assert one.dtype == np.float32
        assert one.shape == (block.size,)


def test_training_lowers_the_loss_and_keeps_the_start(
    spy: Spy, manifest: ModelManifest, parameters: Mapping[str, Vector]
) -> None:
    inputs, _ = data(64)
    labels = (inputs["a"][:, 0] > 0).astype(np.int64)
    before = {name: vector.copy() for name, vector in parameters.items()}
    hyperparameters = Hyperparameters(0.1, batch_size=16, epochs=40)
    result = train(spy, manifest, parameters, inputs, labels, hyperparameters,
                   np.random.default_rng(0))  # fmt: skip
    for name, vector in parameters.items():
        np.testing.assert_array_equal(vector, before[name])
    logits = predict_logits(spy, manifest, result.parameters, inputs)
    start = predict_logits(spy, manifest, parameters, inputs)
    assert np.mean(logits.argmax(axis=1) == labels) > 0.9
    assert np.mean(start.argmax(axis=1) == labels) < 0.75


def test_a_device_with_one_modality_never_touches_the_other_encoder(
    spy: Spy, manifest: ModelManifest, parameters: Mapping[str, Vector]
) -> None:
    inputs, labels = data(4)
    alone = {"a": inputs["a"]}
    own = {name: vector for name, vector in parameters.items() if name != "encoder-b"}
    hyperparameters = Hyperparameters(0.1, batch_size=4)
    result = train(spy, manifest, own, alone, labels, hyperparameters, np.random.default_rng(0))
    assert spy.names == [
        ("forward", "encoder-a"), ("forward", "fusion"),
        ("backward", "head"), ("backward", "fusion"), ("backward", "encoder-a"),
    ]  # fmt: skip
    assert result.parameters.keys() == {"encoder-a", "fusion", "head"}
    spy.calls.clear()
    predict_logits(spy, manifest, own, alone)
    assert spy.names == [("forward", "encoder-a"), ("forward", "fusion"), ("forward", "head")]


def test_the_fusion_is_told_who_is_present(
    spy: Spy, manifest: ModelManifest, parameters: Mapping[str, Vector]
) -> None:
    inputs, _ = data(3)
    for present, modalities in [([1, 0], ["a"]), ([0, 1], ["b"]), ([1, 1], ["b", "a"])]:
        spy.calls.clear()
        predict_logits(spy, manifest, parameters, {m: inputs[m] for m in modalities})
        (fed,) = (inputs for _, name, inputs in spy.calls if name == "fusion")
        np.testing.assert_array_equal(fed["present"], [present] * 3)
        for modality, is_present in zip("ab", present, strict=True):
            assert fed[f"encoder-{modality}"].shape == (3, 4)
            assert fed[f"encoder-{modality}"].any() == bool(is_present)


def test_both_passes_see_the_same_masks_and_predictions_none(
    spy: Spy, manifest: ModelManifest, parameters: Mapping[str, Vector]
) -> None:
    inputs, labels = data(4)
    train(spy, manifest, parameters, inputs, labels, Hyperparameters(0.1), np.random.default_rng(0))
    for name in ("encoder-a", "encoder-b"):
        mask = manifest.block(name).dropouts[0].name
        forward, backward = (fed[mask] for _, block, fed in spy.calls if block == name)
        np.testing.assert_array_equal(forward, backward)
    spy.calls.clear()
    predict_logits(spy, manifest, parameters, inputs)
    assert all("mask" not in key for _, _, fed in spy.calls for key in fed)


def test_every_example_is_seen_once_an_epoch_in_a_new_order(
    spy: Spy, manifest: ModelManifest, parameters: Mapping[str, Vector]
) -> None:
    inputs, _ = data(10)
    inputs["a"][:, 0] = np.arange(10)
    labels = np.arange(10) % 3
    train(spy, manifest, parameters, inputs, labels, HYPERPARAMETERS, np.random.default_rng(0))
    batches = [fed for _, name, fed in spy.calls if name == "encoder-a"][::2]
    assert [len(fed["a"]) for fed in batches] == [4, 4, 2, 4, 4, 2]
    seen = [int(x) for fed in batches for x in fed["a"][:, 0]]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]
    assert list(range(10)) not in (seen[:10], seen[10:])
    assert [int(x) for batch in spy.labels() for x in batch] == [i % 3 for i in seen]


def test_the_progress_and_the_mean_loss(
    manifest: ModelManifest, parameters: Mapping[str, Vector]
) -> None:
    inputs, labels = data(10)
    steps: list[tuple[int, int]] = []
    result = train(
        Fake([1.0, 2.0, 3.0, 4.0, 5.0, 7.5]), manifest, parameters, inputs, labels,
        HYPERPARAMETERS, np.random.default_rng(0), lambda done, total: steps.append((done, total)),
    )  # fmt: skip
    assert steps == [(i, 6) for i in range(1, 7)]
    assert result.loss == 3.75


def test_momentum_and_decay_act_across_batches(
    manifest: ModelManifest, parameters: Mapping[str, Vector]
) -> None:
    """A gradient of ones, twice: w1 = w - r (1 + d w), then v = m v + (1 + d w1)."""
    inputs, labels = data(8)
    hyperparameters = Hyperparameters(0.5, momentum=0.9, weight_decay=0.1, batch_size=4)
    result = train(Fake([1.0, 1.0]), manifest, parameters, inputs, labels, hyperparameters,
                   np.random.default_rng(0))  # fmt: skip
    for name, w in parameters.items():
        v1 = 1 + 0.1 * w.astype(np.float64)
        w1 = w - 0.5 * v1
        w2 = w1 - 0.5 * (0.9 * v1 + 1 + 0.1 * w1)
        np.testing.assert_allclose(result.parameters[name], w2, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_divergence(loss: float, manifest: ModelManifest, parameters: Mapping[str, Vector]) -> None:
    inputs, labels = data(10)
    steps: list[int] = []
    with pytest.raises(DataError, match=r"diverged at batch 3: the loss is .*\(now 0\.1\)"):
        train(
            Fake([1.0, 1.0, loss, 1.0]), manifest, parameters, inputs, labels, HYPERPARAMETERS,
            np.random.default_rng(0), lambda done, total: steps.append(done),
        )  # fmt: skip
    assert steps == [1, 2]


def test_divergence_of_a_real_model(
    spy: Spy, manifest: ModelManifest, parameters: Mapping[str, Vector]
) -> None:
    inputs, labels = data(10)
    hyperparameters = Hyperparameters(1e3, momentum=0.99, batch_size=2, epochs=200)
    with pytest.raises(DataError, match="diverged"), np.errstate(all="ignore"):
        train(spy, manifest, parameters, inputs, labels, hyperparameters, np.random.default_rng(0))


def test_divergence_in_the_last_step(
    manifest: ModelManifest, parameters: Mapping[str, Vector]
) -> None:
    """What is not finite must neither be kept as a private block nor be sent."""

    class Exploding(Fake):
        def backward(self, block: Block, parameters: Vector, inputs: Arrays) -> Gradients:
            return (
                super()
                .backward(block, parameters, inputs)
                ._replace(parameters=np.full_like(parameters, np.inf))
            )

    inputs, labels = data(4)
    with pytest.raises(DataError, match="diverged"):
        train(Exploding([1.0]), manifest, parameters, inputs, labels, Hyperparameters(0.1),
              np.random.default_rng(0))  # fmt: skip


def test_unknown_and_no_modalities(
    spy: Spy, manifest: ModelManifest, parameters: Mapping[str, Vector]
) -> None:
    inputs, labels = data(4)
    for given, message in [({"lidar": inputs["a"]}, "modality 'lidar'"), ({}, "no modality")]:
        with pytest.raises(ModelError, match=message):
            step_gradients(spy, manifest, parameters, given, labels, {})
    assert not spy.calls


def dropping(rate: float, shape: tuple[int, ...]) -> Block:
    artifact = Artifact("a/x", "0" * 64, 4)
    return Block(
        "encoder-a", "encoder", ("a",), shape, 1, (Parameter("w", (1,)),),
        (Dropout("mask.one", shape, rate), Dropout("mask.two", (7,), rate)),
        Artifacts(artifact, artifact, artifact),
    )  # fmt: skip


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.9])
def test_the_masks_have_the_rate_and_the_scale(rate: float) -> None:
    masks = draw_masks((dropping(rate, (50, 10)),), 100, np.random.default_rng(0))
    assert masks.keys() == {"encoder-a"}
    assert {name: mask.shape for name, mask in masks["encoder-a"].items()} == {
        "mask.one": (100, 50, 10), "mask.two": (100, 7)
    }  # fmt: skip
    mask = masks["encoder-a"]["mask.one"]
    assert mask.dtype == np.float32
    np.testing.assert_allclose(np.unique(mask), [0, 1 / (1 - rate)] if rate else [1], rtol=1e-6)
    n = mask.size  # 50,000 draws: within four standard errors
    assert abs(np.mean(mask == 0) - rate) <= 4 * math.sqrt(rate * (1 - rate) / n)
    assert mask.mean() == pytest.approx(1, abs=4 * math.sqrt(rate / (1 - rate) / n) + 1e-6)


def test_the_masks_differ_by_example_layer_and_draw() -> None:
    rng = np.random.default_rng(0)
    block = dropping(0.5, (7,))
    one, two = (draw_masks((block,), 64, rng)["encoder-a"] for _ in range(2))
    assert len(np.unique(one["mask.one"], axis=0)) > 32  # of 128 patterns
    assert (one["mask.one"] != one["mask.two"]).any()
    assert (one["mask.one"] != two["mask.one"]).any()
    again = draw_masks((block,), 64, np.random.default_rng(0))["encoder-a"]
    for name in one:
        np.testing.assert_array_equal(one[name], again[name])
