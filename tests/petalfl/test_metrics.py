from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import (
    accuracy_score,
    f1_score,
    mean_absolute_error,
    mean_squared_error,
)

from petalfl.metrics import accuracy, macro_f1, mae, mse, multilabel_macro_f1

PAIRS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=40)


def test_by_hand() -> None:
    labels, predictions = np.array([0, 0, 0, 1, 2]), np.array([0, 0, 1, 1, 1])
    assert accuracy(labels, predictions) == pytest.approx(3 / 5)
    # F1 of 0: 2 hits, 3 + 2 seen; of 1: 1 hit, 1 + 3 seen; of 2: none.
    assert macro_f1(labels, predictions) == pytest.approx((4 / 5 + 2 / 4 + 0) / 3)


def test_the_ends() -> None:
    labels = np.array([0, 1, 2])
    for metric in (accuracy, macro_f1):
        assert metric(labels, labels) == 1.0
        assert metric(labels, labels[[1, 2, 0]]) == 0.0
        assert type(metric(labels, labels)) is float


@settings(max_examples=150, deadline=None)
@given(PAIRS)
def test_as_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    labels, predictions = np.array(pairs).T
    assert accuracy(labels, predictions) == pytest.approx(accuracy_score(labels, predictions))
    expected = f1_score(labels, predictions, average="macro")
    assert macro_f1(labels, predictions) == pytest.approx(expected, abs=1e-12)


TAGS = st.lists(st.tuples(*[st.integers(0, 1)] * 6), min_size=1, max_size=20)


def test_several_labels_by_hand() -> None:
    """The first: 1 hit, 2 + 1 seen; the second: no hit, 1 seen; the third never occurs."""
    labels = np.array([[1, 1, 0], [1, 0, 0]])
    predictions = np.array([[1, 0, 0], [0, 0, 0]])
    assert multilabel_macro_f1(labels, predictions) == pytest.approx((2 / 3 + 0) / 2)
    assert multilabel_macro_f1(labels * 0, labels * 0) == 1.0
    assert multilabel_macro_f1(np.array([1, 0, 1]), np.array([1, 1, 1])) == pytest.approx(4 / 5)
    of_pixels = (a.reshape(2, 3, 1) for a in (labels, predictions))
    assert multilabel_macro_f1(*of_pixels) == multilabel_macro_f1(labels, predictions)


@settings(max_examples=100, deadline=None)
@given(TAGS)
def test_several_labels_as_scikit_learn(rows: list[tuple[int, ...]]) -> None:
    labels, predictions = np.hsplit(np.array(rows), 2)
    pairs = [(t, g) for t, g in zip(labels.T, predictions.T, strict=True) if t.any() or g.any()]
    expected = np.mean([f1_score(t, g) for t, g in pairs]) if pairs else 1.0
    assert multilabel_macro_f1(labels, predictions) == pytest.approx(expected, abs=1e-12)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(*[st.floats(-1e3, 1e3, width=32)] * 4), min_size=1, max_size=20))
def test_regression_as_scikit_learn(rows: list[tuple[float, ...]]) -> None:
    labels, predictions = np.hsplit(np.array(rows, np.float32), 2)
    assert mae(labels, predictions) == pytest.approx(
        mean_absolute_error(labels, predictions), rel=1e-5
    )
    assert mse(labels, predictions) == pytest.approx(
        mean_squared_error(labels, predictions), rel=1e-4
    )
    assert type(mae(labels, predictions)) is type(mse(labels, predictions)) is float
