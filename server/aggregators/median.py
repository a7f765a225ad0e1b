"""The median of every coordinate."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from petalfl.vectors import Vector

from .aggregator import Aggregator
from .over_all import Kept, Weights, columns, over_all


def median() -> Aggregator[Kept]:
    """The median of the deltas in every coordinate; of an even number, the mean of the two.

    One holder, one vote: weights do not count, for a device names its own. Stays within the
    honest holders' values while these are more than half. Keeps all deltas until `finalize`.

    Source:
        Yin et al. 2018, arXiv:1803.01498.
    """

    def rule(deltas: Sequence[Vector], weights: Weights) -> Vector:
        found = np.empty_like(deltas[0])
        low, high = (len(deltas) - 1) // 2, len(deltas) // 2
        for part, values in columns(deltas):
            values.sort(axis=1)  # numpy sorts float32 faster than it partitions
            # Halved first, as the sum of two large values is none in float32.
            found[part] = values[:, low] / np.float64(2) + values[:, high] / np.float64(2)
        return found

    return over_all(rule)
