"""Local training on closed-form blocks; on exported models, tests/export/test_law.py."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from petalfl.engine import Arrays, Gradients
from petalfl.errors import DataError
from petalfl.local_data import ArrayData
from petalfl.model import Block
from petalfl.training import train
from petalfl.vectors import Vector
from tests.petalfl.builders import (
    NumpyEngine,
    draw_vectors,
)
from tests.petalfl.trainings import (
    FUSIONLESS,
    MANIFESTS,
    PLAIN,
    RICH,
    assert_same,
    data,
    run,
    stopping_after,
)

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
