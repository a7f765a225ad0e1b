"""FedAdagrad, FedAdam and FedYogi."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from petalfl.vectors import Vector
from server.optimizers import ServerOptimizer, adagrad, adam, parse_optimizer, yogi
from tests.server.optimizers.builders import f32, run, vector_block, vectors

Array = NDArray[np.float64]


def test_adagrad_by_hand() -> None:
    # v: 9, 25 · steps: 0.5 · 3 / (3 + 1), 0.5 · 4 / (5 + 1)
    trail = run(adagrad(0.5, 1.0), f32([1]), f32([3]), f32([4]))
    np.testing.assert_allclose(trail, [[1 + 1.5 / 4], [1 + 1.5 / 4 + 2 / 6]], rtol=1e-6)


def test_adam_by_hand() -> None:
    # m: 2, 2 + … = 0.5 · 2 + 0.5 · 0 = 1 · v: 0.75 · 16 = 12, 0.25 · 12 + 0 = 3
    trail = run(adam(1.0, 0.5, 0.25, 1.0), f32([0]), f32([4]), f32([0]))
    steps = 2 / (np.sqrt(12) + 1), 1 / (np.sqrt(3) + 1)
    np.testing.assert_allclose(trail, [[steps[0]], [sum(steps)]], rtol=1e-6)


def test_yogi_by_hand() -> None:
    # v: 0 + 0.75 · 16 = 12, then 12 − 0.75 · 1 = 11.25, as 1 is less than 12
    trail = run(yogi(1.0, 0.0, 0.25, 1.0), f32([0]), f32([4]), f32([1]))
    steps = 4 / (np.sqrt(12) + 1), 1 / (np.sqrt(11.25) + 1)
    np.testing.assert_allclose(trail, [[steps[0]], [sum(steps)]], rtol=1e-6)


def plainly(
    second_moment: Callable[[Array, Array], Array],
    start: Vector,
    deltas: list[Vector],
    beta1: float,
) -> Array:
    """Algorithm 2 of arXiv:2003.00295 in float64, at η 0.1 and τ 0.01."""
    x, m, v = (np.array(values, np.float64) for values in (start, [0] * 3, [0] * 3))
    for delta in deltas:
        m = beta1 * m + (1 - beta1) * delta
        v = second_moment(v, delta.astype(np.float64) ** 2)
        x = x + 0.1 * m / (np.sqrt(v) + 0.01)
    return x


REFERENCES: dict[str, tuple[ServerOptimizer, Callable[[Array, Array], Array], float]] = {
    "adagrad": (adagrad(0.1, 0.01), lambda v, d: v + d, 0.0),
    "adam": (adam(0.1, 0.9, 0.99, 0.01), lambda v, d: 0.99 * v + 0.01 * d, 0.9),
    "yogi": (yogi(0.1, 0.9, 0.99, 0.01), lambda v, d: v - 0.01 * d * np.sign(v - d), 0.9),
}


@pytest.mark.parametrize("name", REFERENCES)
@given(start=vectors, deltas=st.lists(vectors, min_size=1, max_size=8))
def test_it_is_the_papers_algorithm(name: str, start: Vector, deltas: list[Vector]) -> None:
    optimizer, second_moment, beta1 = REFERENCES[name]
    deltas = [delta / np.float32(1000) for delta in deltas]
    expected = plainly(second_moment, start, deltas, beta1)
    np.testing.assert_allclose(run(optimizer, start, *deltas)[-1], expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", REFERENCES)
def test_no_update_changes_what_it_was_given(name: str) -> None:
    block, optimizer = vector_block(2), REFERENCES[name][0]
    parameters, delta, state = f32([1, 2]), f32([3, -4]), dict(optimizer.init(block))
    for array in (parameters, delta, *state.values()):
        array.flags.writeable = False
    first, second = (optimizer.update(block, parameters, delta, state) for _ in range(2))
    np.testing.assert_array_equal(first[0], second[0])
    assert first[0].dtype == np.float32
    assert all(array.dtype == np.float32 and array.any() for array in first[1].values())


@pytest.mark.parametrize("name", REFERENCES)
@given(deltas=st.lists(vectors, min_size=1, max_size=8))
def test_the_scale_of_the_deltas_hardly_matters(name: str, deltas: list[Vector]) -> None:
    """With a small adaptivity the steps are those of deltas a thousand times as large."""
    optimizer = parse_optimizer(name + {"adagrad": ":0.1:1e-9"}.get(name, ":0.1:0.9:0.99:1e-9"))
    start = f32([0, 0, 0])
    small, large = (
        run(optimizer, start, *[s * d for d in deltas])[-1] for s in (f32(1), f32(1000))
    )
    np.testing.assert_allclose(small, large, rtol=1e-3, atol=1e-5)


BAD = {
    "adagrad:0": "expected learning_rate > 0 and adaptivity > 0, found 0.0, 0.001",
    "adagrad:1:0": "expected learning_rate > 0 and adaptivity > 0, found 1.0, 0.0",
    "adam:1:1": "expected beta1 and beta2 in [0, 1), found 1.0, 0.99",
    "adam:1:0.9:-1": "expected beta1 and beta2 in [0, 1), found 0.9, -1.0",
    "yogi:inf": "expected learning_rate > 0 and adaptivity > 0, found inf, 0.001",
    "yogi:1:0.9:0.9:nan": "expected learning_rate > 0 and adaptivity > 0, found 1.0, nan",
    "orthogonal:1": "expected beta in [0, 1) and energy in (0, 1], found 1.0, 0.99",
    "orthogonal:0.5:0": "expected beta in [0, 1) and energy in (0, 1], found 0.5, 0.0",
}


@pytest.mark.parametrize("text", BAD)
def test_a_setting_outside_its_interval_is_refused(text: str) -> None:
    with pytest.raises(ValueError) as raised:
        parse_optimizer(text)
    assert BAD[text] in str(raised.value)
