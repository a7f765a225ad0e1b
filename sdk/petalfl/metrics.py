"""Metrics of a model's tasks, small enough to run on a device."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray


def accuracy(labels: NDArray[np.int64], predictions: NDArray[np.int64]) -> float:
    """Share of predictions that equal their label, in [0, 1]; both ``(n,)``, n at least 1."""
    return float(np.mean(labels == predictions))


def macro_f1(labels: NDArray[np.int64], predictions: NDArray[np.int64]) -> float:
    """Unweighted mean of the classes' F1, in [0, 1]; both ``(n,)``, n at least 1.

    Over the classes that occur among labels or predictions, as scikit-learn's `f1_score` does.
    """
    return _mean_f1((labels == c, predictions == c) for c in np.union1d(labels, predictions))


def multilabel_macro_f1(labels: NDArray[Any], predictions: NDArray[Any]) -> float:
    """Unweighted mean of the labels' F1, in [0, 1]; both 0 or 1, ``(n, …)``, n at least 1.

    Over the labels that occur in truth or prediction; 1 where none does.
    """
    truths, guesses = (a.reshape(len(a), -1).T.astype(bool) for a in (labels, predictions))
    pairs = [(t, g) for t, g in zip(truths, guesses, strict=True) if t.any() or g.any()]
    return _mean_f1(pairs) if pairs else 1.0


def mae(labels: NDArray[np.float32], predictions: NDArray[np.float32]) -> float:
    """Mean absolute error over all values; both of one shape."""
    return float(np.mean(np.abs(labels - predictions), dtype=np.float64))


def mse(labels: NDArray[np.float32], predictions: NDArray[np.float32]) -> float:
    """Mean squared error over all values; both of one shape."""
    return float(np.mean(np.square(labels - predictions), dtype=np.float64))


def _mean_f1(pairs: Iterable[tuple[NDArray[np.bool_], NDArray[np.bool_]]]) -> float:
    """Of truth and prediction, neither of which may be empty together with the other."""
    return float(np.mean([2 * np.sum(t & g) / (np.sum(t) + np.sum(g)) for t, g in pairs]))
