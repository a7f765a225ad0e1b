"""Inner products around an origin: what Krum and the geometric median see of the updates."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.reducer.rules import Rules, tiles
from server.reducer.rules.products import median_norm, squared_distances
from tests.server.reducer.rules.builders import decoded, distances_plainly, mixed, plain


@pytest.mark.parametrize("num_updates", [1, 2, 13, 101])
@pytest.mark.parametrize("size", [18, 2049, 7001])
def test_distances_of_all_codecs(rules: Rules, num_updates: int, size: int) -> None:
    deltas = mixed(num_updates, size)
    found = squared_distances(rules.inner_products(deltas))
    expected = distances_plainly(decoded(deltas))
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12 * expected.max())


@given(seed=st.integers(0, 999), exponent=st.integers(-20, 12))
def test_updates_that_are_nearly_equal_far_from_zero(
    rules: Rules, seed: int, exponent: int
) -> None:
    """‖Δ_j − Δ_k‖² of a millionth of ‖Δ‖ and less: without an origin, digits would be lost."""
    rng = np.random.default_rng(seed)
    center = (2.0**exponent * rng.normal(size=500)).astype(np.float32)
    near = center * (1 + 1e-6 * rng.integers(-1, 2, size=(8, 500)))
    deltas = plain(near)
    found = squared_distances(rules.inner_products(deltas))
    np.testing.assert_allclose(found, distances_plainly(decoded(deltas)), rtol=1e-9)


@pytest.mark.parametrize("far", [1e12, -1e30, 3e38])
def test_a_minority_cannot_blur_the_distances_of_others(rules: Rules, far: float) -> None:
    """It would, were its update the origin: 1 is nothing next to 1e30."""
    values = np.random.default_rng(0).normal(size=(7, 40))
    values[[0, 6]] = far
    deltas = plain(values)
    found = squared_distances(rules.inner_products(deltas))[1:6, 1:6]
    np.testing.assert_allclose(found, distances_plainly(decoded(deltas)[1:6]), rtol=1e-9)


def test_the_origin_is_of_the_median_norm() -> None:
    values = np.array([[9.0, 0], [1, 0], [0, 3], [0, 0], [2, 0]])
    assert median_norm(plain(values)) == 4
    assert median_norm(plain(values[:4])) == 1  # the lower of 1 and 3
    assert median_norm(plain(values[:1])) == 0


@pytest.mark.parametrize("budget", [1 << 20, 20_000, 1])
def test_however_small_the_budget(
    rules: Rules, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    deltas = mixed(7, 700 if budget == 1 else 6000)
    expected = rules.inner_products(deltas)
    monkeypatch.setattr(tiles, "BUDGET_BYTES", budget)
    found = rules.inner_products(deltas)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12 * np.abs(expected).max())


def test_the_same_bits_in_every_run(rules: Rules) -> None:
    deltas = mixed(50, 60_000)
    assert len({rules.inner_products(deltas).tobytes() for _ in range(5)}) == 1
