from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from petalfl.vectors import Vector
from server.optimizers import momentum, sgd
from tests.server.optimizers.builders import f32, run, vector_block, vectors


def test_momentum_by_hand() -> None:
    trail = run(momentum(0.5), f32([0, 10]), f32([4, -2]), f32([4, 0]), f32([0, 0]))
    # v: 4, −2 · then 0.5·4 + 4 = 6, −1 · then 3, −0.5
    np.testing.assert_array_equal(trail, [[4, 8], [10, 7], [13, 6.5]])


def test_the_learning_rate_scales_the_step_and_not_the_velocity() -> None:
    trail = run(momentum(0.5, learning_rate=0.25), f32([0]), f32([4]), f32([4]))
    np.testing.assert_array_equal(trail, [[1], [2.5]])  # 0.25·4, then + 0.25·6


@given(vectors, st.lists(vectors, min_size=1, max_size=5))
def test_without_momentum_it_is_fedavg(start: Vector, deltas: list[Vector]) -> None:
    for optimizer in (sgd(), momentum(0)):
        trail = run(optimizer, start, *deltas)
        np.testing.assert_array_equal(trail[-1], start + np.sum(deltas, axis=0))


def test_without_momentum_nothing_is_kept() -> None:
    assert sgd().init(vector_block(3)) == momentum(0).init(vector_block(3)) == {}


@given(vectors, st.lists(vectors, min_size=1, max_size=6))
def test_momentum_is_the_sum_of_decayed_deltas(start: Vector, deltas: list[Vector]) -> None:
    # Unrolled: delta i is applied 1 + β + … + β^(t−i) times by step t.
    beta, last = 0.5, len(deltas)
    weights = [(1 - beta ** (last - i)) / (1 - beta) for i in range(last)]
    expected = start + sum(w * d for w, d in zip(weights, deltas, strict=True))
    np.testing.assert_allclose(run(momentum(beta), start, *deltas)[-1], expected, rtol=1e-5)


def test_the_first_state_is_zero_and_the_steps_stay_float32() -> None:
    optimizer = momentum(0.9)
    block = vector_block(3)
    state = optimizer.init(block)
    np.testing.assert_array_equal(state["velocity"], [0, 0, 0])
    parameters, after = optimizer.update(block, f32([1, 2, 3]), f32([1, 1, 1]), state)
    arrays = (state["velocity"], parameters, after["velocity"])
    assert [array.dtype for array in arrays] == ["float32"] * 3


def test_an_update_is_pure() -> None:
    parameters, delta, velocity = f32([1]), f32([2]), f32([3])
    for array in (parameters, delta, velocity):
        array.flags.writeable = False
    for _ in range(2):
        found, state = momentum(0.5).update(
            vector_block(1), parameters, delta, {"velocity": velocity}
        )
        np.testing.assert_array_equal([found, state["velocity"]], [[4.5], [3.5]])


@pytest.mark.parametrize(
    ("beta", "learning_rate"), [(-0.1, 1), (1, 1), (1.5, 1), (0, 0), (0, -1), (float("nan"), 1),
                                (0, float("nan"))]
)  # fmt: skip
def test_a_setting_outside_its_interval_is_refused(beta: float, learning_rate: float) -> None:
    with pytest.raises(ValueError, match="expected 0 <= beta < 1 and learning_rate > 0, found"):
        momentum(beta, learning_rate)
