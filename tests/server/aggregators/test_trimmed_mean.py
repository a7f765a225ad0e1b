from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given

from server.aggregators import trimmed_mean, weighted_mean
from tests.server.aggregators.builders import (
    Update,
    aggregate,
    any_updates,
    any_values,
    stacked,
    updates_of,
)


def updates(*values: float, weights: tuple[float, ...] = ()) -> list[Update]:
    known = weights or (1.0,) * len(values)
    return [(np.array([v, -v, 0], np.float32), w) for v, w in zip(values, known, strict=True)]


def test_the_trimmed_mean_by_hand() -> None:
    found = aggregate(trimmed_mean(0.25), updates(1, 100, 2, 4))
    np.testing.assert_array_equal(found, [3, -3, 0])  # 1 and 100 go


def test_what_is_left_is_weighted_by_hand() -> None:
    found = aggregate(trimmed_mean(0.25), updates(1, 100, 2, 6, weights=(9, 9, 1, 3)))
    np.testing.assert_array_equal(found, [5, -5, 0])  # (1·2 + 3·6) / 4


@pytest.mark.parametrize(
    ("fraction", "num_updates", "num_left"),
    [(0.1, 9, 9), (0.1, 10, 8), (0.1, 30, 24), (0.3, 10, 4), (0.49, 3, 1), (0.49, 100, 2)],
)
def test_the_share_that_is_cut(fraction: float, num_updates: int, num_left: int) -> None:
    values = 10.0 ** np.arange(num_updates) if num_updates < 11 else np.arange(num_updates) ** 3
    cut = (num_updates - num_left) // 2
    expected = values[cut : num_updates - cut].mean()
    np.testing.assert_allclose(
        aggregate(trimmed_mean(fraction), updates(*values))[0], expected, rtol=1e-6
    )


@given(any_updates)
def test_without_trimming_it_is_the_weighted_mean(drawn: list[Update]) -> None:
    scale = np.abs(stacked(drawn)[0]).max()
    np.testing.assert_allclose(
        aggregate(trimmed_mean(0), drawn),
        aggregate(weighted_mean(), drawn),
        rtol=1.2e-7,
        atol=1e-13 * scale + 1e-37,
    )


@given(updates_of(any_values, min_size=4, max_size=9))
def test_it_is_the_sorted_middle_averaged_by_its_weights(drawn: list[Update]) -> None:
    deltas, weights = stacked(drawn)
    cut = int(0.25 * len(drawn))
    found = aggregate(trimmed_mean(0.25), drawn)
    for i in range(3):
        middle = sorted(zip(deltas[:, i], weights, strict=True))[cut:-cut]
        expected = np.average([v for v, _ in middle], weights=[w for _, w in middle])
        assert found[i] == pytest.approx(expected, rel=1e-6, abs=1e-9 * np.abs(deltas).max())
