"""Optimizers, clipping, pulls and corrections of local training, on closed-form blocks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from petalfl.steps import Step, draw_masks, step_gradients
from petalfl.training import Hyperparameters
from petalfl.vectors import Vector
from tests.petalfl.builders import (
    NumpyEngine,
    draw_vectors,
    make_block,
    make_manifest,
)
from tests.petalfl.trainings import (
    MANIFESTS,
    PLAIN,
    RICH,
    assert_same,
    data,
    run,
)

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
