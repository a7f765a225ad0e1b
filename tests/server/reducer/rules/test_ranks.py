"""Median and trimmed mean of every coordinate, whatever the codecs, ties and tiles."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from petalfl.vectors import Vector
from server.reducer.rules import Rules, tiles
from tests.server.reducer.rules.builders import (
    Array,
    decoded,
    encoded,
    mixed,
    plain,
    trimmed_plainly,
)
from tests.server.reducer.rules.kinds import KINDS, rules_of


@pytest.fixture(params=[*KINDS, "numba"], scope="session")
def rules(request: pytest.FixtureRequest) -> Rules:
    """Numba's, too, which has kernels of its own for these rules alone."""
    return rules_of(request.param)


shapes = st.tuples(st.integers(1, 40), st.integers(1, 6))
# Of few values, so that many are equal; of many; and of the ends of float32.
few = st.sampled_from([-2.0, -0.0, 0.0, 1.0, 3.0])
many = st.floats(-1e6, 1e6, width=32)
extreme = st.sampled_from([3.4e38, -3.4e38, 1e-45, -1e-38, 0.0, 1.0])
some_values = st.sampled_from([few, many, extreme]).flatmap(
    lambda values: shapes.flatmap(lambda shape: arrays(np.float32, shape, elements=values))
)


def assert_close(found: Vector, expected: Array, values: Array) -> None:
    """To the rounding of the result, and of float64 sums over the greatest."""
    slack = 1e-12 * np.abs(values).max()
    np.testing.assert_allclose(found, expected, rtol=1.2e-7, atol=slack + 1e-37)


@given(values=some_values)
def test_the_median_is_numpys(rules: Rules, values: Array) -> None:
    expected = np.median(values.astype(np.float64), axis=0)
    np.testing.assert_array_equal(rules.median(plain(values)), expected.astype(np.float32))


@settings(max_examples=50)
@given(values=some_values, cut=st.integers(1, 19), seed=st.integers(0, 99))
def test_the_trimmed_mean_is_that_of_each_coordinate_sorted(
    rules: Rules, values: Array, cut: int, seed: int
) -> None:
    cut = min(cut, (len(values) - 1) // 2)
    assume(cut)
    for weights in (np.full(len(values), 3.0), np.random.default_rng(seed).random(len(values)) + 1):
        expected = trimmed_plainly(values.astype(np.float64), weights, cut)
        assert_close(rules.trimmed_mean(plain(values), weights, cut), expected, values)


def test_of_equals_the_first_go_at_the_lower_end_by_hand(rules: Rules) -> None:
    deltas = plain(np.array([[1, 0], [1, 0], [1, 0], [9, 0], [9, 0]]))
    # 1 1 1 9 9 of weights 1 2 4 8 16: the first 1 goes, and the last 9.
    found = rules.trimmed_mean(deltas, np.array([1.0, 2, 4, 8, 16]), 1)
    np.testing.assert_allclose(found, [(2 * 1 + 4 * 1 + 8 * 9) / 14, 0], rtol=1e-7)


@pytest.mark.parametrize("cut", [1, 5, 10])
def test_values_tied_at_both_ends(rules: Rules, cut: int) -> None:
    values = np.random.default_rng(cut).integers(-1, 3, (21, 300)).astype(np.float64)
    weights = np.linspace(1, 9, 21)
    found = rules.trimmed_mean(plain(values), weights, cut)
    assert_close(found, trimmed_plainly(values, weights, cut), values)


@pytest.mark.parametrize("num_updates", [1, 2, 3, 13, 64, 101])
@pytest.mark.parametrize("size", [18, 2048, 2049, 7001])
def test_of_all_codecs_in_all_tiles(rules: Rules, num_updates: int, size: int) -> None:
    deltas = mixed(num_updates, size)
    values = decoded(deltas)
    assert_close(rules.median(deltas), np.median(values, axis=0), values)
    if num_updates > 2:
        weights = np.linspace(1, 2, num_updates)
        expected = np.average(np.sort(values, axis=0)[1:-1], axis=0)
        assert_close(rules.trimmed_mean(deltas, np.ones(num_updates), 1), expected, values)
        few = [0, 1, 17, size - 1]
        expected = trimmed_plainly(values[:, few], weights, 1)
        assert_close(rules.trimmed_mean(deltas, weights, 1)[few], expected, values)


@pytest.mark.parametrize("budget", [1 << 20, 20_000, 1])
def test_however_small_the_budget(
    rules: Rules, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Down to tiles that begin where no codec's piece does."""
    deltas = mixed(11, 700 if budget == 1 else 6000)
    weights = np.linspace(1, 2, 11)
    median = rules.median(deltas)
    mean = rules.trimmed_mean(deltas, weights, 2).astype(np.float64)
    monkeypatch.setattr(tiles, "BUDGET_BYTES", budget)
    np.testing.assert_array_equal(rules.median(deltas), median)
    assert_close(rules.trimmed_mean(deltas, weights, 2), mean, mean)


def test_sparse_updates_are_tied_at_zero(rules: Rules) -> None:
    rng = np.random.default_rng(5)
    deltas = [encoded(row, "topk:0.1") for row in rng.normal(size=(20, 300))]
    values, weights = decoded(deltas), np.linspace(1, 9, 20)
    assert (values == 0).mean() > 0.8
    expected = trimmed_plainly(values, weights, 4)
    assert_close(rules.trimmed_mean(deltas, weights, 4), expected, values)
