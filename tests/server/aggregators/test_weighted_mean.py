from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from petalfl.payloads import plain_delta
from petalfl.vectors import Vector, from_bytes, to_bytes
from server.aggregators import weighted_mean
from tests.server.aggregators.builders import (
    SIZE,
    Update,
    aggregate,
    any_updates,
    exact_updates,
    stacked,
    vector_block,
)


def mean(updates: Sequence[Update]) -> Vector:
    return aggregate(weighted_mean(), updates)


def test_the_mean_by_hand() -> None:
    updates = [
        (np.array([1, 2, 0], np.float32), 1),
        (np.array([4, -2, 8], np.float32), 3),
    ]
    # (1·1 + 3·4) / 4,  (1·2 − 3·2) / 4,  (0 + 3·8) / 4
    np.testing.assert_array_equal(mean(updates), [3.25, -1.0, 6.0])


@given(any_updates)
def test_the_mean_is_numpys_average(updates: list[Update]) -> None:
    deltas, weights = stacked(updates)
    expected = np.average(deltas, axis=0, weights=weights)
    scale = np.abs(deltas).max()
    np.testing.assert_allclose(mean(updates), expected, rtol=1.2e-7, atol=1e-13 * scale + 1e-37)


@given(exact_updates)
def test_the_mean_is_the_exact_fraction_rounded_once(updates: list[Update]) -> None:
    total = sum(int(n) for _, n in updates)
    for i, found in enumerate(mean(updates)):
        exact = sum(Fraction(float(delta[i])) * int(n) for delta, n in updates) / total
        assert found == np.float32(float(exact))


@given(exact_updates, st.randoms(use_true_random=False))
def test_the_order_of_arrival_makes_no_difference(updates: list[Update], random: object) -> None:
    shuffled = list(updates)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert to_bytes(mean(shuffled)) == to_bytes(mean(updates))


@given(any_updates)
def test_the_mean_lies_between_the_least_and_the_greatest(updates: list[Update]) -> None:
    deltas = np.stack([delta for delta, _ in updates])
    found = mean(updates)
    assert (deltas.min(axis=0) <= found).all()
    assert (found <= deltas.max(axis=0)).all()


@given(any_updates)
def test_equal_updates_have_themselves_as_mean(updates: list[Update]) -> None:
    delta = updates[0][0]
    np.testing.assert_array_equal(mean([(delta, n) for _, n in updates]), delta)


def test_without_updates_there_is_no_mean() -> None:
    aggregator = weighted_mean()
    assert aggregator.finalize(aggregator.init(vector_block(4))) is None


def test_weights_may_be_fractions() -> None:
    updates = [(np.array([1, 2, 0], np.float32), 0.25), (np.array([4, -2, 8], np.float32), 0.75)]
    np.testing.assert_array_equal(mean(updates), [3.25, -1.0, 6.0])


def test_the_mean_is_float32_and_leaves_the_deltas_alone() -> None:
    delta = from_bytes(to_bytes(np.array([1, 2, 3], np.float32)), 3)  # read-only, as decoded
    assert mean([(delta, 2), (delta, 5)]).dtype == np.float32
    np.testing.assert_array_equal(delta, [1, 2, 3])


@pytest.mark.parametrize("value", [1e30, 3.4e38, -3.4e38, 1e-30])
def test_extreme_values_neither_overflow_nor_vanish(value: float) -> None:
    delta = np.full(SIZE, value, np.float32)
    np.testing.assert_array_equal(mean([(delta, 1 << 40), (delta, 1 << 40), (delta, 1)]), delta)


def test_states_are_independent() -> None:
    aggregator = weighted_mean()
    first, second = aggregator.init(vector_block(1)), aggregator.init(vector_block(1))
    first = aggregator.accumulate(first, plain_delta(np.ones(1, np.float32)), 1)
    assert aggregator.finalize(second) is None
    np.testing.assert_array_equal(aggregator.finalize(first), [1])
