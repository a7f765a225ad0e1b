from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from petalfl.payloads import plain_delta
from petalfl.vectors import Vector
from server.norms import Outlier, clip, norm_of, outlier_report

vectors = st.lists(st.floats(-1e6, 1e6, width=32), min_size=3, max_size=3).map(
    lambda values: np.array(values, np.float32)
)


def f32(*values: float) -> Vector:
    return np.array(values, np.float32)


def test_clipping_by_hand() -> None:
    np.testing.assert_array_equal(clip(plain_delta(f32(3, 4)), 2.5).decode(), [1.5, 2])
    np.testing.assert_array_equal(clip(plain_delta(f32(0, 0)), 1).decode(), [0, 0])


@given(vectors, st.floats(1e-3, 1e3))
def test_a_clipped_delta_is_short_and_points_the_same_way(delta: Vector, most: float) -> None:
    found = clip(plain_delta(delta), most).decode()
    assert found.dtype == np.float32
    assert norm_of(found) <= most * (1 + 1e-6)
    cosine = float(found.astype(np.float64) @ delta) - norm_of(found) * norm_of(delta)
    assert abs(cosine) <= 1e-5 * max(1.0, norm_of(delta)) * most
    if norm_of(delta) <= most:
        assert found is delta  # no copy


def test_the_largest_delta_has_a_norm_and_is_clipped() -> None:
    delta = np.full(1000, 3.4e38, np.float32)
    assert norm_of(delta) == pytest.approx(3.4e38 * math.sqrt(1000))
    assert norm_of(clip(plain_delta(delta), 1.0).decode()) == pytest.approx(1)


@pytest.mark.parametrize("bound", [0.0, -1.0, math.nan])
def test_a_bound_that_is_none_is_refused(bound: float) -> None:
    with pytest.raises(ValueError, match="expected max_norm > 0, found"):
        clip(plain_delta(f32(1)), bound)


def test_the_report_by_hand() -> None:
    deltas = {"a": f32(3, 4), "b": f32(0, 10), "c": f32(-20, 0)}
    assert outlier_report(deltas, f32(0, 2)) == {
        "a": Outlier(5, 10, 0.5, 0.8),
        "b": Outlier(10, 10, 1, 1),
        "c": Outlier(20, 10, 2, 0),
    }


def test_zeros_are_reported_without_a_fault() -> None:
    zero = f32(0, 0)
    assert outlier_report({}, zero) == {}
    assert outlier_report({"a": zero}, zero) == {"a": Outlier(0, 0, 1, 0)}
    found = outlier_report({"a": zero, "b": zero, "c": f32(1, 0)}, f32(1, 0))
    assert found["c"] == Outlier(1, 0, math.inf, 1)


@given(st.lists(vectors, min_size=1, max_size=5))
def test_a_cosine_is_one(deltas: list[Vector]) -> None:
    report = outlier_report({str(i): d for i, d in enumerate(deltas)}, np.sum(deltas, axis=0))
    assert all(-1 <= one.cosine <= 1 and one.ratio >= 0 for one in report.values())
