from __future__ import annotations

import numpy as np
from hypothesis import given

from server.aggregators import median
from tests.server.aggregators.builders import Update, aggregate, any_updates, stacked


def f32(*values: float) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    return np.array(values, np.float32)


def test_the_median_by_hand() -> None:
    updates: list[Update] = [(f32(1, 9, -5), 1), (f32(3, 2, 0), 1), (f32(2, 4, 100), 1)]
    np.testing.assert_array_equal(aggregate(median(), updates), [2, 4, 0])
    updates.append((f32(7, 5, 50), 1))  # 1 2 3 7 · 2 4 5 9 · -5 0 50 100
    np.testing.assert_array_equal(aggregate(median(), updates), [2.5, 4.5, 25])


@given(any_updates)
def test_the_median_is_numpys_and_weights_do_not_count(updates: list[Update]) -> None:
    deltas, _ = stacked(updates)
    expected = np.median(deltas, axis=0)
    np.testing.assert_allclose(aggregate(median(), updates), expected, rtol=1e-7, atol=1e-37)
