from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score

from petalfl.metrics import accuracy, macro_f1

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
