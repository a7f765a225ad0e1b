from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.aggregators import geometric_median, median, weighted_mean
from tests.server.aggregators.builders import Update, aggregate, any_updates, vector_block


def updates(*points: tuple[float, ...], weights: tuple[float, ...] = ()) -> list[Update]:
    known = weights or (1.0,) * len(points)
    return [(np.array(p, np.float32), w) for p, w in zip(points, known, strict=True)]


def test_the_middle_of_a_square_and_the_fermat_point_by_hand() -> None:
    square = updates((0, 0, 0), (2, 0, 0), (2, 2, 0), (0, 2, 0))
    np.testing.assert_allclose(aggregate(geometric_median(), square), [1, 1, 0], atol=1e-6)
    # From (0, 0), (1, 0), (0, 1) all sides are seen under 120° at (t, t), t = (3 − √3) / 6.
    corner = updates((0, 0, 0), (1, 0, 0), (0, 1, 0))
    t = (3 - 3**0.5) / 6
    np.testing.assert_allclose(aggregate(geometric_median(), corner), [t, t, 0], atol=1e-6)


def test_a_point_of_more_than_half_the_weight_is_the_median() -> None:
    drawn = updates((1, 0, 0), (5, 5, 5), (9, 0, 2), weights=(5, 2, 2))
    np.testing.assert_allclose(aggregate(geometric_median(), drawn), [1, 0, 0], atol=1e-4)
    drawn = updates((1, 0, 0), (5, 5, 5), (9, 0, 2), weights=(5, 2, 20))
    np.testing.assert_allclose(aggregate(geometric_median(), drawn), [9, 0, 2], atol=1e-4)


def test_on_a_line_it_is_the_median() -> None:
    drawn = updates((1, 2, 0), (2, 4, 0), (40, 80, 0))
    np.testing.assert_allclose(
        aggregate(geometric_median(), drawn), aggregate(median(), drawn), rtol=1e-4
    )


@pytest.mark.parametrize("seed", range(4))
def test_it_has_the_least_weighted_sum_of_distances(seed: int) -> None:
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(8, 30)).astype(np.float32)
    weights = rng.uniform(0.5, 2, 8)
    drawn: list[Update] = list(zip(points, weights.tolist(), strict=True))

    def cost(z: np.ndarray[tuple[int], np.dtype[np.float32]]) -> float:
        return float(weights @ np.linalg.norm(points - z, axis=1))

    found = aggregate(geometric_median(), drawn, vector_block(30))
    best = cost(found)
    assert best < cost(aggregate(weighted_mean(), drawn, vector_block(30)))
    for _ in range(50):
        assert best <= cost(found + rng.normal(0, 0.01, 30).astype(np.float32)) + 1e-6


@given(any_updates, st.sampled_from([2.0**-20, 2.0**10]))
def test_scaled_deltas_have_the_scaled_median(drawn: list[Update], scale: float) -> None:
    scaled = [(delta * np.float32(scale), weight) for delta, weight in drawn]
    found, expected = (aggregate(geometric_median(), u) for u in (scaled, drawn))
    most = max(np.abs(delta).max() for delta, _ in drawn)
    np.testing.assert_allclose(found / scale, expected, rtol=1e-4, atol=1e-4 * most + 1e-30)
