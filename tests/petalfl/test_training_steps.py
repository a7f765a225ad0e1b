"""One step of local training, on closed-form blocks: what is chained, who is present, masks."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from petalfl.engine import Arrays, Forward, Gradients
from petalfl.errors import DataError, ModelError
from petalfl.model import Block, Dropout, ModelManifest, Tensor
from petalfl.steps import draw_masks, predict_outputs, step_gradients
from petalfl.vectors import Vector
from tests.petalfl.builders import (
    NumpyEngine,
    draw_vectors,
    make_block,
    make_manifest,
)
from tests.petalfl.trainings import (
    FUSIONLESS,
    MANIFESTS,
    PLAIN,
    RICH,
    SUBSETS,
    assert_same,
    data,
    run,
)

# One chained step


@pytest.mark.parametrize("modalities", SUBSETS)
@pytest.mark.parametrize("model", MANIFESTS)
def test_the_chained_gradient_is_the_loss_s_derivative(
    model: str, modalities: tuple[str, ...]
) -> None:
    """Of every coordinate of every block: chains, frozen stages, several tensors, several heads."""
    manifest = MANIFESTS[model]
    inputs, labels = data(manifest, 3)
    inputs = {name: inputs[name] for name in modalities}
    held = manifest.blocks_for(modalities)
    masks = draw_masks(held, 3, np.random.default_rng(1))
    vectors = {k: v.astype(np.float64) for k, v in draw_vectors(manifest).items()}

    def loss(name: str, i: int, by: float) -> float:
        moved = vectors[name].copy()
        moved[i] += by
        moved_vectors: Any = {**vectors, name: moved}
        return step_gradients(NumpyEngine(), manifest, moved_vectors, inputs, labels, masks).loss

    start: Any = vectors
    step = step_gradients(NumpyEngine(), manifest, start, inputs, labels, masks)
    assert step.gradients.keys() == {block.name for block in held if block.num_trainable}
    for name, gradient in step.gradients.items():
        assert gradient.shape == (manifest.block(name).num_trainable,)
        h = 1e-5
        for i in range(gradient.size):
            derivative = (loss(name, i, h) - loss(name, i, -h)) / (2 * h)
            assert gradient[i] == pytest.approx(derivative, rel=1e-4, abs=1e-7), (name, i)


def test_the_loss_is_the_weighted_sum() -> None:
    inputs, labels = data(RICH, 4)
    step = step_gradients(NumpyEngine(), RICH, draw_vectors(RICH), inputs, labels, {})
    assert step.losses.keys() == {"p", "q"}
    assert step.loss == pytest.approx(0.5 * step.losses["p"] + step.losses["q"])


def test_only_the_device_s_own_blocks_are_run() -> None:
    """One modality, one task; the frozen stage is evaluated and has no backward pass."""
    engine = NumpyEngine()
    inputs, labels = data(RICH, 4)
    vectors = draw_vectors(RICH)
    own = {k: v for k, v in vectors.items() if k not in ("encoder-b", "head-p")}
    step = step_gradients(engine, RICH, own, {"a": inputs["a"]}, {"q": labels["q"]}, {})
    assert engine.names == [
        ("evaluate", "backbone-a"), ("forward", "projector-a"), ("forward", "fusion"),
        ("backward", "head-q"), ("backward", "fusion"), ("backward", "projector-a"),
    ]  # fmt: skip
    assert step.gradients.keys() == {"projector-a", "fusion", "head-q"}
    assert step.losses.keys() == {"q"}


def test_gradients_stop_where_nothing_behind_trains() -> None:
    """A frozen chain is not run backwards, on a device without the modality that trains."""
    manifest = make_manifest(
        {"a": 2, "b": 2},
        make_block("encoder-a", ("a",), 2, 2, is_frozen=True, reached=False),
        make_block("encoder-b", ("b",), 2, 2),
        make_block("fusion", ("encoder-a", "encoder-b"), 2, 4, is_frozen=True),
        make_block("head", ("fusion",), 2, 2),
    )
    inputs, labels = data(manifest, 4)
    engine, vectors = NumpyEngine(), draw_vectors(manifest)
    step_gradients(engine, manifest, vectors, inputs, labels, {})
    assert [n for m, n in engine.names if m == "backward"] == ["head", "fusion", "encoder-b"]
    engine.calls.clear()
    step_gradients(engine, manifest, vectors, {"a": inputs["a"]}, labels, {})
    assert [name for method, name in engine.names if method == "backward"] == ["head"]


def test_a_head_is_not_run_where_nothing_trains_for_it() -> None:
    manifest = make_manifest(
        {"a": 2, "b": 2},
        make_block("encoder-a", ("a",), 2, 2, is_frozen=True, reached=False),
        make_block("encoder-b", ("b",), 2, 2),
        make_block("head", ("encoder-a", "encoder-b"), 2, 4, is_frozen=True),
    )
    run(PLAIN, manifest=manifest, modalities=("b",))
    with pytest.raises(DataError, match="with a there is nothing to train: all is frozen"):
        run(PLAIN, manifest=manifest, modalities=("a",))


def test_an_output_that_no_loss_depends_on_has_a_gradient_of_zeros() -> None:
    manifest = make_manifest(
        {"b": 3},
        make_block("encoder-b", ("b",), {"0": 2, "1": 1}, 3),
        make_block("head", ("encoder-b",), 2, 3),
    )
    inputs, labels = data(manifest, 4)

    class Aloof(NumpyEngine):
        def backward(self, block: Block, vector: Vector, feeds: Arrays) -> Gradients:
            back = super().backward(block, vector, feeds)
            back.inputs.pop("encoder-b.1", None)
            return back

    engine = Aloof()
    step_gradients(engine, manifest, draw_vectors(manifest), inputs, labels, {})
    (fed,) = engine.fed("backward", "encoder-b")
    np.testing.assert_array_equal(fed["d_encoder-b.1"], np.zeros((4, 1)))
    assert fed["d_encoder-b.0"].any()


def test_who_is_present() -> None:
    inputs, _ = data(RICH, 3)
    engine = NumpyEngine()
    for present, modalities in [([1, 0], "a"), ([0, 1], "b"), ([1, 1], "ba")]:
        engine.calls.clear()
        predict_outputs(engine, RICH, draw_vectors(RICH), {m: inputs[m] for m in modalities})
        (fed,) = engine.fed("evaluate", "fusion")
        np.testing.assert_array_equal(fed["present"], [present] * 3)
        assert fed["present"].dtype == np.float32
        for name, width, i in [("projector-a", 2, 0), ("encoder-b.0", 2, 1), ("encoder-b.1", 1, 1)]:
            assert fed[name].shape == (3, width)
            assert fed[name].any() == bool(present[i])
        (fed,) = engine.fed("evaluate", "head-q")
        assert fed.keys() == {"fusion"}


def test_zeros_without_a_word_where_the_manifest_says_so() -> None:
    inputs, _ = data(FUSIONLESS, 3)
    engine = NumpyEngine()
    predict_outputs(engine, FUSIONLESS, draw_vectors(FUSIONLESS), {"b": inputs["b"]})
    (fed,) = engine.fed("evaluate", "head-p")
    assert fed.keys() == {"encoder-a", "encoder-b"}
    np.testing.assert_array_equal(fed["encoder-a"], np.zeros((3, 2), np.float32))


def test_zeros_for_a_tensor_of_varying_length() -> None:
    encoder = make_block("encoder-a", ("a",), 2, 2)
    encoder = replace(encoder, outputs=(Tensor("encoder-a", (None, 2)),))
    manifest = make_manifest(
        {"a": 2, "b": 2},
        encoder,
        make_block("encoder-b", ("b",), 2, 2),
        make_block("fusion", ("encoder-a", "encoder-b"), 2, 4),
        make_block("head", ("fusion",), 2, 2),
    )

    class Looking(NumpyEngine):
        def evaluate(self, block: Block, vector: Vector, inputs: Arrays) -> dict[str, Any]:
            if block.name == "fusion":
                assert inputs["encoder-a"].shape == (3, 1, 2)
                assert not inputs["encoder-a"].any()
                inputs = {**inputs, "encoder-a": inputs["encoder-a"][:, 0]}
            return super().evaluate(block, vector, inputs)

    inputs, _ = data(manifest, 3)
    engine = Looking()
    predict_outputs(engine, manifest, draw_vectors(manifest), {"b": inputs["b"]})
    assert engine.fed("evaluate", "fusion")


def test_fusionless_heads_are_told_who_is_present() -> None:
    manifest = ModelManifest.from_json(
        FUSIONLESS.to_json().replace(b'"missing": "zero"', b'"missing": "mask"')
    )
    inputs, _ = data(manifest, 3)
    engine = NumpyEngine()
    predict_outputs(engine, manifest, draw_vectors(manifest), {"b": inputs["b"]}, ["q"])
    (fed,) = engine.fed("evaluate", "head-q")
    np.testing.assert_array_equal(fed["present"], [[1, 0]] * 3)  # in the order of its inputs
    assert not engine.fed("evaluate", "head-p")


def test_both_passes_see_the_same_masks_and_predictions_none() -> None:
    engine = NumpyEngine()
    run(PLAIN, engine=engine, length=4)
    (forward,), (backward,) = (engine.fed(m, "encoder-b") for m in ("forward", "backward"))
    np.testing.assert_array_equal(forward["mask.0"], backward["mask.0"])
    assert "mask.0" in engine.fed("backward", "head-q")[0]
    engine.calls.clear()
    predict_outputs(engine, RICH, draw_vectors(RICH), data(RICH)[0])
    assert all("mask" not in key for _, _, fed in engine.calls for key in fed)


def test_unknown_and_no_modalities_and_tasks() -> None:
    inputs, labels = data(RICH, 4)
    engine = NumpyEngine()
    for x, y, message in [
        ({"lidar": inputs["a"]}, labels, "modality 'lidar'"), ({}, labels, "no modality"),
        (inputs, {"r": labels["p"]}, "task 'r', the model has p, q"), (inputs, {}, "no task"),
    ]:  # fmt: skip
        with pytest.raises(ModelError, match=message):
            step_gradients(engine, RICH, draw_vectors(RICH), x, y, {})
    assert not engine.calls


# Running statistics


def test_statistics_are_taken_over_batch_by_batch() -> None:
    """Each step starts from the statistics that the one before it left."""
    engine = NumpyEngine()
    result = run(PLAIN, engine=engine, length=8)
    seen: list[NDArray[Any]] = []

    class Watching(NumpyEngine):
        def forward(self, block: Block, vector: Vector, inputs: Arrays) -> Forward:
            found = super().forward(block, vector, inputs)
            if block.name == "fusion":
                seen.extend((vector[-3:].copy(), np.asarray(found.statistics)))
            return found

    again = run(PLAIN, engine=Watching(), length=8)
    assert_same(result, again)
    start = draw_vectors(RICH)["fusion"][-3:]
    np.testing.assert_array_equal(seen[0], start)
    np.testing.assert_array_equal(seen[2], seen[1])
    np.testing.assert_array_equal(result.parameters["fusion"][-3:], seen[3])
    assert (seen[3] != start).all()


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_statistics_get_no_momentum_no_decay_and_no_pull(optimizer: Any) -> None:
    """With a rate of 0 the parameters stay, and the statistics are the same whatever is set."""
    still = replace(PLAIN, learning_rate=0.0, optimizer=optimizer)
    wild = replace(
        still, momentum=0.9, weight_decay=0.5, proximal_mu=10.0, max_grad_norm=0.1, nesterov=True
    )
    shared = [block.name for block in RICH.blocks]
    one, other = (run(h, length=8, shared=shared) for h in (still, wild))
    start = draw_vectors(RICH)
    for name, size in [("fusion", 3), ("head-p", 2)]:
        np.testing.assert_array_equal(one.parameters[name], other.parameters[name])
        np.testing.assert_array_equal(one.parameters[name][:-size], start[name][:-size])
        assert (one.parameters[name][-size:] != start[name][-size:]).all()


def test_frozen_blocks_stay_to_the_bit() -> None:
    hyperparameters = replace(PLAIN, weight_decay=0.5, momentum=0.9)
    start = draw_vectors(RICH)
    result = run(hyperparameters)
    np.testing.assert_array_equal(result.parameters["backbone-a"], start["backbone-a"])
    for block in RICH.blocks:
        moved = (result.parameters[block.name] != start[block.name]).any()
        assert moved != block.is_frozen
        assert result.parameters[block.name].dtype == np.float32
        assert result.parameters[block.name].shape == (block.size,)
    frozen = run(hyperparameters, manifest=FUSIONLESS).parameters["head-p"]
    np.testing.assert_array_equal(frozen, draw_vectors(FUSIONLESS)["head-p"])


# Masks


def dropping(rate: float, shape: tuple[int, ...]) -> Block:
    dropouts = (Dropout("mask.0", shape, rate), Dropout("mask.1", (7,), rate))
    return make_block("encoder-a", ("a",), 1, 1, dropouts=dropouts)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.9])
def test_the_masks_have_the_rate_and_the_scale(rate: float) -> None:
    masks = draw_masks((dropping(rate, (50, 10)),), 100, np.random.default_rng(0))
    assert masks.keys() == {"encoder-a"}
    assert {name: mask.shape for name, mask in masks["encoder-a"].items()} == {
        "mask.0": (100, 50, 10), "mask.1": (100, 7)
    }  # fmt: skip
    mask = masks["encoder-a"]["mask.0"]
    assert mask.dtype == np.float32
    np.testing.assert_allclose(np.unique(mask), [0, 1 / (1 - rate)] if rate else [1], rtol=1e-6)
    n = mask.size  # 50,000 draws: within four standard errors
    assert abs(np.mean(mask == 0) - rate) <= 4 * math.sqrt(rate * (1 - rate) / n)
    assert mask.mean() == pytest.approx(1, abs=4 * math.sqrt(rate / (1 - rate) / n) + 1e-6)


def test_the_masks_differ_by_example_layer_and_draw() -> None:
    rng = np.random.default_rng(0)
    block = dropping(0.5, (7,))
    one, two = (draw_masks((block,), 64, rng)["encoder-a"] for _ in range(2))
    assert len(np.unique(one["mask.0"], axis=0)) > 32  # of 128 patterns
    assert (one["mask.0"] != one["mask.1"]).any()
    assert (one["mask.0"] != two["mask.0"]).any()
    again = draw_masks((block,), 64, np.random.default_rng(0))["encoder-a"]
    for name in one:
        np.testing.assert_array_equal(one[name], again[name])
