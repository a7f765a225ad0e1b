"""Networks rank whatever they are given; what need not be ranked they leave out."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import numpy as np
import pytest

from server.reducer.rules.networks import between, sorting
from tests.server.reducer.rules.builders import Array


def applied(comparators: Iterable[Sequence[int]], columns: Array) -> Array:
    """What becomes of every column of ``(n, width)``."""
    found: Array = columns.copy()
    for i, j in comparators:
        found[i], found[j] = np.minimum(found[i], found[j]), np.maximum(found[i], found[j])
    return found


def every(n: int) -> Array:
    """All columns of zeros and ones: a network that ranks these ranks all (Knuth 5.3.4, Z)."""
    rows: Array = np.array(list(itertools.product([0.0, 1.0], repeat=n)))
    return np.asarray(rows.T)


@pytest.mark.parametrize("n", range(1, 13))
def test_every_number_of_values_is_sorted(n: int) -> None:
    columns = every(n)
    found = applied(sorting(n), columns)
    np.testing.assert_array_equal(found, np.sort(columns, axis=0))


@pytest.mark.parametrize("n", range(1, 11))
def test_every_value_comes_to_a_place_of_its_kind(n: int) -> None:
    columns = every(n)
    ranked = np.sort(columns, axis=0)
    for low, high in itertools.combinations(range(n + 1), 2):
        found = applied(between(n, low, high), columns)
        for part in (slice(0, low), slice(low, high), slice(high, n)):
            np.testing.assert_array_equal(np.sort(found[part], axis=0), ranked[part])


@pytest.mark.parametrize("n", [64, 100, 101, 257])
def test_of_many_values(n: int) -> None:
    columns = np.random.default_rng(n).integers(0, 2 * n, (n, 500)).astype(np.float64)
    low, high = (n - 1) // 2, n // 2 + 1
    found = applied(between(n, low, high), columns)[low:high].mean(axis=0)
    np.testing.assert_array_equal(found, np.median(columns, axis=0))


def test_a_part_takes_fewer_comparators_by_hand() -> None:
    assert [tuple(pair) for pair in between(2, 1)] == [(0, 1)]
    assert len(between(4, 0, 4)) == 0, "all are of one kind"
    assert len(between(100, 49, 51)) < 0.9 * len(list(sorting(100)))
