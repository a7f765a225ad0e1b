"""Metrics of a classifier, small enough to run on a device."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def accuracy(labels: NDArray[np.int64], predictions: NDArray[np.int64]) -> float:
    """Share of predictions that equal their label, in [0, 1]; both ``(n,)``, n at least 1."""
    return float(np.mean(labels == predictions))


def macro_f1(labels: NDArray[np.int64], predictions: NDArray[np.int64]) -> float:
    """Unweighted mean of the classes' F1, in [0, 1]; both ``(n,)``, n at least 1.

    Over the classes that occur among labels or predictions, as scikit-learn's `f1_score` does.
    """
    scores = []
    for label in np.union1d(labels, predictions):
        hits = np.sum((labels == label) & (predictions == label))
        scores.append(2 * hits / (np.sum(labels == label) + np.sum(predictions == label)))
    return float(np.mean(scores))
