"""Local training on closed-form blocks; on exported models, tests/export/test_law.py."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from petalfl.engine import Arrays, Forward, Gradients
from petalfl.errors import DataError, ModelError
from petalfl.local_data import ArrayData
from petalfl.model import Block, Dropout, ModelManifest, Tensor
from petalfl.steps import Step, draw_masks, predict_outputs, step_gradients
from petalfl.training import Hyperparameters, TrainingResult, train
from petalfl.vectors import Vector
from tests.petalfl.builders import (
    NumpyEngine,
    draw_vectors,
    fusionless_manifest,
    make_block,
    make_manifest,
    rich_manifest,
)

RICH = rich_manifest()
FUSIONLESS = fusionless_manifest()
MANIFESTS = {"rich": RICH, "fusionless": FUSIONLESS}
SUBSETS = [("a",), ("b",), ("a", "b")]
PLAIN = Hyperparameters(0.1, momentum=0.0, weight_decay=0.0, batch_size=4)


def data(manifest: ModelManifest, length: int = 10, seed: int = 5) -> tuple[Any, Any]:
    """Inputs by modality and labels by task."""
    rng = np.random.default_rng(seed)
    inputs = {
        name: rng.standard_normal((length, *modality.shape), dtype=np.float32)  # type: ignore[arg-type]
        for name, modality in manifest.modalities.items()
    }
    labels: dict[str, NDArray[Any]] = {}
    for task, head in manifest.heads.items():
        assert head.task is not None
        width = head.outputs[0].shape[0] or 0
        if head.task.loss == "cross_entropy":
            labels[task] = rng.integers(0, width, length)
        else:
            labels[task] = rng.random((length, width), dtype=np.float32)
    return inputs, labels


def run(
    hyperparameters: Hyperparameters,
    *,
    manifest: ModelManifest = RICH,
    engine: Any = None,
    length: int = 10,
    modalities: tuple[str, ...] = (),
    tasks: tuple[str, ...] = (),
    seed: int = 0,
    **more: Any,
) -> TrainingResult:
    inputs, labels = data(manifest, length)
    return train(
        engine or NumpyEngine(),
        manifest,
        draw_vectors(manifest),
        ArrayData(inputs, labels).only(modalities or tuple(inputs), tasks or tuple(labels)),
        hyperparameters,
        np.random.default_rng(seed),
        **more,
    )


def assert_same(one: TrainingResult, other: TrainingResult) -> None:
    assert one.parameters.keys() == other.parameters.keys()
    for name, vector in one.parameters.items():
        np.testing.assert_array_equal(vector, other.parameters[name])


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


# Optimizers


def first_step() -> Step:
    """The step that `run` takes first, on a whole set of four examples."""
    inputs, labels = data(RICH, 4)
    rng = np.random.default_rng(0)
    batch = rng.permutation(4)
    masks = draw_masks(RICH.blocks, 4, rng)
    x, y = ({name: array[batch] for name, array in d.items()} for d in (inputs, labels))
    return step_gradients(NumpyEngine(), RICH, draw_vectors(RICH), x, y, masks)


def by_hand(update: Callable[[Any, Any], Any]) -> dict[str, NDArray[Any]]:
    """What ``update(w, g)`` makes of every trainable part in that step."""
    vectors, step = draw_vectors(RICH), first_step()
    for name, g in step.gradients.items():
        tail = step.statistics.get(name, vectors[name][g.size :])
        vectors[name] = np.concatenate([update(vectors[name][: g.size], g), tail])
    return vectors


HYPERPARAMETERS: dict[str, tuple[Hyperparameters, Any]] = {
    "sgd": (PLAIN, lambda w, g: w - 0.1 * g),
    "decay": (replace(PLAIN, weight_decay=0.5), lambda w, g: w - 0.1 * (g + 0.5 * w)),
    "nesterov": (
        replace(PLAIN, momentum=0.5, nesterov=True), lambda w, g: w - 0.1 * (g + 0.5 * g)
    ),
    "adamw": (
        replace(PLAIN, optimizer="adamw", weight_decay=0.5, epsilon=1e-12),
        lambda w, g: w * (1 - 0.1 * 0.5) - 0.1 * np.sign(g),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", HYPERPARAMETERS)
def test_the_first_step_of_each_optimizer(case: str) -> None:
    hyperparameters, update = HYPERPARAMETERS[case]
    result = run(hyperparameters, length=4)
    for name, expected in by_hand(update).items():
        np.testing.assert_allclose(result.parameters[name], expected, rtol=1e-5, atol=1e-6)


def test_momentum_acts_across_batches_and_starts_fresh_each_round() -> None:
    """With the whole set in each batch and no dropout, two epochs are two steps."""
    manifest = make_manifest({"a": 2}, make_block("encoder-a", ("a",), 2, 2),
                             make_block("head", ("encoder-a",), 2, 2))  # fmt: skip
    hyperparameters = replace(PLAIN, momentum=0.5, weight_decay=0.25)
    two = run(replace(hyperparameters, epochs=2), manifest=manifest, length=4)
    inputs, labels = data(manifest, 4)
    vectors, velocity = draw_vectors(manifest), dict.fromkeys(("encoder-a", "head"), np.float64(0))
    for _ in range(2):
        gradients = step_gradients(NumpyEngine(), manifest, vectors, inputs, labels, {}).gradients
        for name, g in gradients.items():
            velocity[name] = 0.5 * velocity[name] + g + 0.25 * vectors[name]
            vectors[name] = (vectors[name] - 0.1 * velocity[name]).astype(np.float32)
    for name, vector in vectors.items():
        np.testing.assert_allclose(two.parameters[name], vector, rtol=1e-5, atol=1e-6)
    engine = NumpyEngine()
    run(replace(hyperparameters, epochs=2), manifest=manifest, length=4, engine=engine)
    velocities = [fed["velocity"] for fed in engine.fed("step", "optimizers/sgd.onnx")]
    assert [v.any() for v in velocities] == [False, False, True, True]


def test_adamw_counts_its_steps() -> None:
    engine = NumpyEngine()
    run(replace(PLAIN, optimizer="adamw"), engine=engine, length=8, tasks=("q",))
    steps = [float(fed["step"]) for fed in engine.fed("step", "optimizers/adamw.onnx")]
    assert steps == [1.0] * 4 + [2.0] * 4
    assert not engine.fed("step", "optimizers/sgd.onnx")


def test_clipping_is_of_all_blocks_together() -> None:
    """As torch.nn.utils.clip_grad_norm_ on the whole model."""
    gradients = first_step().gradients.values()
    norm = math.sqrt(sum(float((g**2).sum()) for g in gradients))
    clipped = run(replace(PLAIN, max_grad_norm=norm / 4), length=4)
    for name, expected in by_hand(lambda w, g: w - 0.1 * g / 4).items():
        np.testing.assert_allclose(clipped.parameters[name], expected, rtol=1e-4, atol=1e-6)
    assert_same(run(replace(PLAIN, max_grad_norm=norm * 1.01), length=4), run(PLAIN, length=4))


def test_the_proximal_term_pulls_shared_blocks_to_the_start_of_the_round() -> None:
    hyperparameters = replace(PLAIN, learning_rate=0.01, proximal_mu=20.0, epochs=3)
    engine, start = NumpyEngine(), draw_vectors(RICH)
    run(hyperparameters, engine=engine, length=4, shared={"projector-a", "fusion"})
    trained = [b for b in reversed(RICH.blocks) if b.num_trainable]
    for i, fed in enumerate(engine.fed("step", "optimizers/sgd.onnx")):
        block = trained[i % len(trained)]
        np.testing.assert_array_equal(fed["anchor"], start[block.name][: block.num_trainable])
        assert float(fed["proximal"]) == (20.0 if block.name in ("projector-a", "fusion") else 0.0)
    free = run(replace(hyperparameters, proximal_mu=0.0), length=4)
    pulled = run(hyperparameters, length=4, shared=[b.name for b in RICH.blocks])
    for block in trained:
        distances = [
            np.linalg.norm((r.parameters[block.name] - start[block.name])[: block.num_trainable])
            for r in (free, pulled)
        ]
        assert distances[1] < distances[0]


def corrections(*blocks: str) -> dict[str, Vector]:
    rng = np.random.default_rng(3)
    sizes = {name: RICH.block(name).num_trainable for name in blocks}
    return {name: rng.standard_normal(size, np.float32) for name, size in sizes.items()}


def test_a_correction_is_added_behind_clipping() -> None:
    gradients = first_step().gradients
    norm = math.sqrt(sum(float((g**2).sum()) for g in gradients.values()))
    given = corrections("fusion", "head-q")
    hyperparameters = replace(PLAIN, max_grad_norm=norm / 4)
    found = run(hyperparameters, length=4, corrections=given)
    plain = run(hyperparameters, length=4)
    for name, vector in plain.parameters.items():
        end = RICH.block(name).num_trainable
        moved = vector.copy()
        moved[:end] -= np.float32(0.1) * given.get(name, np.float32(0))
        np.testing.assert_allclose(found.parameters[name], moved, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(found.parameters[name][end:], vector[end:])
    assert found.mean_gradients.keys() == given.keys()
    for name, mean in found.mean_gradients.items():
        np.testing.assert_allclose(mean, gradients[name] / 4, rtol=1e-4, atol=1e-7)
    assert not plain.mean_gradients


@pytest.mark.parametrize("method", ["fedsim", "fedalt"])
@pytest.mark.parametrize("max_steps", [0, 4])
def test_the_mean_gradient_is_scaffold_s_second_option(method: Any, max_steps: int) -> None:
    """c_i⁺ = c_i − c + (x − y) / (K η), of the steps that the block was trained in."""
    hyperparameters = replace(
        PLAIN, learning_rate=0.01, epochs=2, max_steps=max_steps, method=method
    )
    shared = ("fusion", "head-p", "head-q")
    given = corrections(*shared)
    found = run(hyperparameters, shared=shared, corrections=given)
    start, num_steps = draw_vectors(RICH), max_steps or 6
    for name, correction in given.items():
        end = correction.size
        x, y = start[name][:end].astype(np.float64), found.parameters[name][:end]
        expected = -correction + (x - y) / (num_steps * 0.01)
        np.testing.assert_allclose(found.mean_gradients[name], expected, rtol=1e-3, atol=1e-5)


def test_the_mean_gradient_of_a_round_that_is_stopped() -> None:
    """Of the steps that were taken."""
    given, calls = corrections("fusion"), iter([True, True, False])
    stopped = run(replace(PLAIN, epochs=2), corrections=given, should_train=lambda: next(calls))
    short = run(replace(PLAIN, epochs=2, max_steps=2), corrections=given)
    np.testing.assert_array_equal(stopped.mean_gradients["fusion"], short.mean_gradients["fusion"])
    none = run(PLAIN, corrections=given, should_train=lambda: False)
    assert not none.mean_gradients


def test_a_correction_of_zeros_changes_nothing() -> None:
    zeros = {name: np.zeros_like(vector) for name, vector in corrections("fusion").items()}
    momentum = replace(PLAIN, momentum=0.9, epochs=2, max_grad_norm=0.5)
    assert_same(run(momentum, corrections=zeros), run(momentum))


@pytest.mark.parametrize(("length", "accumulation"), [(8, 2), (8, 4), (7, 3), (5, 16)])
@pytest.mark.parametrize("model", MANIFESTS)
def test_accumulated_gradients_are_the_whole_batch_s(
    model: str, length: int, accumulation: int
) -> None:
    """Dropout included, and parts of unequal length; statistics see the parts, as in PyTorch."""
    manifest = MANIFESTS[model]
    hyperparameters = replace(PLAIN, batch_size=length, momentum=0.9, epochs=3)
    whole = run(hyperparameters, manifest=manifest, length=length)
    engine = NumpyEngine()
    parts = run(
        replace(hyperparameters, accumulation=accumulation),
        manifest=manifest, length=length, engine=engine,
    )  # fmt: skip
    assert parts.loss == pytest.approx(whole.loss, rel=1e-6)
    for block in manifest.blocks:
        one, other = (r.parameters[block.name][: block.num_trainable] for r in (whole, parts))
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
    sizes = [len(fed["b"]) for fed in engine.fed("forward", "encoder-b")]
    num_parts = min(accumulation, length // (2 if model == "rich" else 1))
    assert len(sizes) == 3 * num_parts
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= (2 if model == "rich" else 1)


def test_statistics_go_from_part_to_part() -> None:
    """Two parts of a batch leave those of two batches, where nothing else moves or is drawn."""
    still = replace(PLAIN, learning_rate=0.0)
    parts, batches = (
        run(h, length=8, modalities=("a",), tasks=("p",)).parameters
        for h in (replace(still, batch_size=8, accumulation=2), still)
    )
    for name in ("fusion", "head-p"):
        np.testing.assert_array_equal(parts[name], batches[name])


# Batches


def test_the_same_generator_gives_the_same_result() -> None:
    one, same, other = (run(PLAIN, seed=seed) for seed in (1, 1, 2))
    assert one.loss == same.loss != other.loss
    assert one.num_examples == 10
    assert_same(one, same)
    assert (one.parameters["fusion"] != other.parameters["fusion"]).any()


def test_training_lowers_the_loss_and_keeps_the_start() -> None:
    start = draw_vectors(FUSIONLESS)
    inputs, labels = data(FUSIONLESS, 32)
    before = {name: vector.copy() for name, vector in start.items()}
    hyperparameters = replace(PLAIN, learning_rate=0.02, batch_size=16, epochs=20)
    results = [
        train(NumpyEngine(), FUSIONLESS, start, ArrayData(inputs, labels),
              replace(hyperparameters, epochs=n), np.random.default_rng(0)).loss
        for n in (1, 20)
    ]  # fmt: skip
    assert results[1] < results[0]
    for name, vector in start.items():
        np.testing.assert_array_equal(vector, before[name])


def test_every_example_is_seen_once_an_epoch_in_a_new_order() -> None:
    inputs, labels = data(RICH, 10)
    inputs["b"][:, 0] = np.arange(10)
    labels["q"] = np.arange(10) % 3
    engine = NumpyEngine()
    still = replace(PLAIN, learning_rate=0.0, epochs=2)
    train(
        engine, RICH, draw_vectors(RICH), ArrayData(inputs, labels), still, np.random.default_rng(0)
    )
    batches = [fed["b"] for fed in engine.fed("forward", "encoder-b")]
    assert [len(batch) for batch in batches] == [4, 4, 2, 4, 4, 2]
    seen = [int(x) for batch in batches for x in batch[:, 0]]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]
    assert list(range(10)) not in (seen[:10], seen[10:])
    of_labels = [int(x) for fed in engine.fed("backward", "head-q") for x in fed["labels"]]
    assert of_labels == [i % 3 for i in seen]


@pytest.mark.parametrize(
    ("modalities", "length", "sizes"),
    [
        (("a", "b"), 9, [4, 4]),  # projector-a needs two
        (("b",), 9, [4, 4, 1]),
        (("a",), 6, [4, 2]),
    ],
)
def test_batches_too_short_for_a_block_are_dropped(
    modalities: tuple[str, ...], length: int, sizes: list[int]
) -> None:
    engine = NumpyEngine()
    steps: list[tuple[int, int]] = []
    result = run(
        PLAIN, engine=engine, length=length, modalities=modalities,
        on_batch=lambda done, total: steps.append((done, total)),
    )  # fmt: skip
    first = "b" if "b" in modalities else "backbone-a.x"
    name = "encoder-b" if "b" in modalities else "projector-a"
    assert [len(fed[first]) for fed in engine.fed("forward", name)] == sizes
    assert steps == [(i, len(sizes)) for i in range(1, len(sizes) + 1)]
    assert result.num_examples == length


@pytest.mark.parametrize(("length", "batch_size"), [(1, 16), (9, 1)])
def test_no_batch_is_long_enough(length: int, batch_size: int) -> None:
    with pytest.raises(
        DataError,
        match=rf"^block projector-a trains on batches of at least 2, found {length} examples in "
        rf"batches of {batch_size}$",
    ):
        run(replace(PLAIN, batch_size=batch_size), length=length)


@given(
    max_steps=st.integers(0, 9), epochs=st.integers(1, 3), length=st.integers(3, 11),
    model=st.sampled_from(sorted(MANIFESTS)), seed=st.integers(0, 9),
)  # fmt: skip
def test_max_steps_is_a_prefix_of_the_longer_run(
    max_steps: int, epochs: int, length: int, model: str, seed: int
) -> None:
    """Of its losses and blocks to the bit, dropout included."""
    seen: list[tuple[int, int]] = []
    hyperparameters = replace(PLAIN, learning_rate=0.01, momentum=0.5, epochs=epochs)
    whole = run(hyperparameters, manifest=MANIFESTS[model], length=length, seed=seed)
    short = run(
        replace(hyperparameters, max_steps=max_steps), manifest=MANIFESTS[model], length=length,
        seed=seed, on_batch=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    num_steps = min(max_steps or whole.num_steps, whole.num_steps)
    assert short.losses == whole.losses[:num_steps]
    assert short.num_steps == num_steps
    assert seen == [(i, num_steps) for i in range(1, num_steps + 1)]
    assert short.num_examples == length
    if num_steps == whole.num_steps:
        assert_same(short, whole)


# Stops


def stopping_after(num_batches: int) -> Callable[[], bool]:
    """A policy that says yes so many times."""
    answers = iter([True] * num_batches)
    return lambda: next(answers, False)


@settings(deadline=None)
@given(
    num_batches=st.integers(1, 9), accumulation=st.integers(1, 2), seed=st.integers(0, 9),
    optimizer=st.sampled_from(["sgd", "adamw"]),
)  # fmt: skip
def test_training_that_is_stopped_is_that_of_max_steps(
    num_batches: int, accumulation: int, seed: int, optimizer: Any
) -> None:
    hyperparameters = replace(
        PLAIN, learning_rate=0.01, momentum=0.5, epochs=2, accumulation=accumulation,
        optimizer=optimizer,
    )  # fmt: skip
    stopped = run(hyperparameters, seed=seed, should_train=stopping_after(num_batches))
    short = run(replace(hyperparameters, max_steps=num_batches), seed=seed)
    assert stopped.losses == short.losses
    assert stopped.loss == short.loss
    assert_same(stopped, short)
    assert short.is_complete
    assert stopped.is_complete == (num_batches >= 6)
    assert stopped.num_examples == min(4 * num_batches, 10)  # of ten, in batches of 4, 4 and 2


def test_should_train_is_asked_before_every_batch() -> None:
    calls: list[str] = []

    def should_train() -> bool:
        calls.append("asked")
        return True

    result = run(PLAIN, should_train=should_train, on_batch=lambda *_: calls.append("trained"))
    assert calls == ["asked", "trained"] * 3
    assert result.is_complete


@pytest.mark.parametrize("stop", [{"should_train": lambda: False}, {"max_seconds": 0.0}])
def test_training_that_is_stopped_before_its_first_batch(stop: dict[str, Any]) -> None:
    engine = NumpyEngine()
    result = run(PLAIN, engine=engine, **stop)
    assert not engine.calls
    assert (result.losses, result.num_steps, result.num_examples) == ((), 0, 0)
    assert not result.is_complete
    for name, vector in result.parameters.items():
        np.testing.assert_array_equal(vector, draw_vectors(RICH)[name])
    with pytest.raises(ValueError, match="stopped before its first batch: there is no loss"):
        _ = result.loss


class Watch:
    """A clock that shows 1000 s at the start, and with every batch one more."""

    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s

    def tick(self, done: int, total: int) -> None:
        self.now_s += 1.0


@pytest.mark.parametrize(
    ("max_seconds", "num_steps"),
    [(0.5, 1), (1.0, 1), (1.5, 2), (5.0, 5), (5.5, 6), (6.0, 6), (math.inf, 6), (None, 6)],
)
def test_no_batch_begins_when_the_time_is_over(max_seconds: float | None, num_steps: int) -> None:
    watch = Watch()
    result = run(
        replace(PLAIN, learning_rate=0.01, epochs=2), max_seconds=max_seconds, clock=watch,
        on_batch=watch.tick,
    )  # fmt: skip
    assert result.num_steps == num_steps
    assert result.is_complete == (num_steps == 6)


@pytest.mark.parametrize("max_seconds", [-1.0, math.nan])
def test_a_time_that_is_none(max_seconds: float) -> None:
    with pytest.raises(ValueError, match="expected max_seconds of at least 0, found"):
        run(PLAIN, max_seconds=max_seconds)


# FedAlt

ALTERNATING = replace(
    PLAIN, learning_rate=0.01, momentum=0.5, weight_decay=0.25, method="fedalt", proximal_mu=0.5
)
SHARED = {"backbone-a", "projector-a", "fusion", "head-q"}  # private: encoder-b, head-p


class Watching(NumpyEngine):
    """Keeps the vectors that each batch is trained with."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[dict[str, Vector]] = []

    def backward(self, block: Block, vector: Vector, feeds: Arrays) -> Gradients:
        if block.name == "head-q":  # the last block, and so the first on the way back
            self.batches.append({})
        self.batches[-1][block.name] = vector.copy()
        return super().backward(block, vector, feeds)


def test_fedalt_trains_the_private_blocks_first_and_then_the_shared_ones() -> None:
    """Of frozen blocks, parameters and statistics stay to the bit."""
    engine, start = Watching(), draw_vectors(RICH)
    result = run(replace(ALTERNATING, epochs=2), engine=engine, shared=SHARED)
    num_steps = len(engine.batches)
    assert num_steps == result.num_steps == 2 * 6
    middle = num_steps // 2
    for vectors in engine.batches[: middle + 1]:
        for name in vectors.keys() & SHARED:
            np.testing.assert_array_equal(vectors[name], start[name])
    for vectors in engine.batches[middle:]:
        for name in vectors.keys() - SHARED:
            np.testing.assert_array_equal(vectors[name], result.parameters[name])
    for block in RICH.blocks:
        moved = result.parameters[block.name] != start[block.name]
        assert moved.all() != block.is_frozen


@pytest.mark.parametrize("shared", [set(), {block.name for block in RICH.blocks}])
def test_fedalt_without_private_or_without_shared_blocks_is_fedsim(shared: set[str]) -> None:
    one, other = (
        run(replace(ALTERNATING, method=method, epochs=2), shared=shared)
        for method in ("fedalt", "fedsim")
    )
    assert one.losses == other.losses
    assert_same(one, other)


@pytest.mark.parametrize(("num_batches", "num_examples"), [(1, 0), (3, 0), (4, 4), (5, 8)])
def test_fedalt_that_is_stopped_weighs_what_the_shared_blocks_have_seen(
    num_batches: int, num_examples: int
) -> None:
    """Three batches for the private blocks, then three for the shared ones."""
    start = draw_vectors(RICH)
    result = run(ALTERNATING, shared=SHARED, should_train=stopping_after(num_batches))
    assert (result.num_examples, result.num_steps) == (num_examples, num_batches)
    assert not result.is_complete
    for name in ("encoder-b", "head-p"):
        assert (result.parameters[name] != start[name]).any()
    for name in ("projector-a", "fusion", "head-q"):
        assert (result.parameters[name] != start[name]).any() == (num_examples > 0)
    alone = run(ALTERNATING, should_train=stopping_after(1))
    assert alone.num_examples == 4, "of nothing shared, what the private blocks have seen"


def test_each_phase_has_its_epochs_its_max_steps_and_a_fresh_optimizer() -> None:
    steps: list[tuple[int, int]] = []
    engine = NumpyEngine()
    run(
        replace(ALTERNATING, optimizer="adamw", epochs=3, max_steps=2), engine=engine,
        shared=SHARED, on_batch=lambda done, total: steps.append((done, total)),
    )  # fmt: skip
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
    fed = [float(f["step"]) for f in engine.fed("step", "optimizers/adamw.onnx")]
    assert fed == [1.0] * 2 + [2.0] * 2 + [1.0] * 3 + [2.0] * 3


def test_the_loss_is_the_whole_one_in_both_phases() -> None:
    """Also of a head that no training block needs; nothing moves, is drawn or left out."""
    still = replace(ALTERNATING, learning_rate=0.0, batch_size=8)
    manifest = make_manifest(
        {"a": 2},
        make_block("encoder-a", ("a",), 2, 2),
        make_block("head-p", ("encoder-a",), 2, 2),
        make_block("head-q", ("encoder-a",), 2, 2),
    )
    result = run(still, manifest=manifest, length=8, shared={"encoder-a", "head-p"})
    assert result.num_steps == 2
    assert result.losses[0] == pytest.approx(result.losses[1], rel=1e-6)


def test_what_no_training_block_needs_is_not_run_backwards() -> None:
    """The heads are, for their losses."""
    engine = NumpyEngine()
    run(replace(ALTERNATING, batch_size=8), engine=engine, length=8,
        shared={"backbone-a", "projector-a", "encoder-b", "fusion"})  # fmt: skip
    backward = [name for method, name in engine.names if method == "backward"]
    heads = ["head-q", "head-p"]
    assert backward == [*heads, *heads, "fusion", "encoder-b", "projector-a"]


def test_clipping_is_of_the_blocks_that_train() -> None:
    engine = NumpyEngine()
    run(replace(ALTERNATING, max_grad_norm=1e-3, batch_size=8), engine=engine, length=8,
        shared=SHARED)  # fmt: skip
    fed = engine.fed("step", "optimizers/sgd.onnx")
    for phase in (fed[:2], fed[2:]):
        norm = math.sqrt(sum(float((f["gradient"] ** 2).sum()) for f in phase))
        for f in phase:
            assert float(f["gradient_scale"]) == pytest.approx(1e-3 / norm, rel=1e-3)
    assert [float(f["proximal"]) for f in fed] == [0.0] * 2 + [0.5] * 3


def test_fedalt_in_parts_is_that_of_whole_batches() -> None:
    whole, parts = (
        run(replace(ALTERNATING, batch_size=8, accumulation=n), length=8, shared=SHARED)
        for n in (1, 2)
    )
    for block in RICH.blocks:
        one, other = (r.parameters[block.name][: block.num_trainable] for r in (whole, parts))
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


class Scripted(NumpyEngine):
    """An engine whose head has the given losses."""

    def __init__(self, losses: list[float]) -> None:
        super().__init__()
        self.losses = losses

    def backward(self, block: Block, vector: Vector, feeds: Arrays) -> Gradients:
        back = super().backward(block, vector, feeds)
        return back._replace(loss=self.losses.pop(0)) if block.kind == "head" else back


def test_the_progress_and_the_mean_loss() -> None:
    steps: list[tuple[int, int]] = []
    result = run(
        replace(PLAIN, epochs=2), engine=Scripted([1.0, 2.0, 3.0, 4.0, 5.0, 7.5]), tasks=("q",),
        on_batch=lambda done, total: steps.append((done, total)),
    )  # fmt: skip
    assert steps == [(i, 6) for i in range(1, 7)]
    assert result.loss == 3.75


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_divergence(loss: float) -> None:
    steps: list[int] = []
    with pytest.raises(DataError, match=r"diverged at batch 3: the loss is .*\(now 0\.1\)"):
        run(PLAIN, engine=Scripted([1.0, 1.0, loss, 1.0]), tasks=("q",),
            on_batch=lambda done, total: steps.append(done))  # fmt: skip
    assert steps == [1, 2]


def test_divergence_in_the_last_step() -> None:
    """What is not finite must neither be kept as a private block nor be sent."""

    class Exploding(NumpyEngine):
        def backward(self, block: Block, vector: Vector, feeds: Arrays) -> Gradients:
            back = super().backward(block, vector, feeds)
            assert back.parameters is not None
            return back._replace(parameters=np.full_like(back.parameters, np.inf))

    with pytest.raises(DataError, match="diverged: a parameter is NaN or infinite"):
        run(PLAIN, engine=Exploding(), length=4)


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
