"""Aggregators: how the updates of a block's holders become one delta.

An aggregator folds each arrival into a state as it comes (`accumulate`) and ends in `finalize`;
it knows nothing of rounds, devices or the network.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from petalfl.vectors import Vector


class WeightedSum(NamedTuple):
    """The state of `weighted_mean`: Σ n_k Δ_k in float64 ``(size,)``, and Σ n_k."""

    total: NDArray[np.float64]
    num_examples: int


class Aggregator(NamedTuple):
    """Three pure functions.

    Attributes:
        init: The block's size to an empty state.
        accumulate: ``(state, delta, num_examples)`` to the state with one more update.
        finalize: The state to a float32 delta ``(size,)``; zeros when no update arrived.
    """

    init: Callable[[int], WeightedSum]
    accumulate: Callable[[WeightedSum, Vector, int], WeightedSum]
    finalize: Callable[[WeightedSum], Vector]


def weighted_mean() -> Aggregator:
    """The mean of the deltas, weighted by examples: Σ n_k Δ_k / Σ n_k over a block's holders.

    Sums in float64, so that the float32 result does not depend on the order of arrival but for
    a last-bit rounding in rare cases. O(block.size) memory. The state passed to `accumulate` is
    consumed: its array is added to in place.

    Source:
        McMahan et al. 2017, arXiv:1602.05629; block-wise: BLOSSOM, arXiv:2603.27552.
    """

    def init(size: int) -> WeightedSum:
        return WeightedSum(np.zeros(size, np.float64), 0)

    def accumulate(state: WeightedSum, delta: Vector, num_examples: int) -> WeightedSum:
        total = state.total
        total += np.multiply(delta, num_examples, dtype=np.float64)
        return WeightedSum(total, state.num_examples + num_examples)

    def finalize(state: WeightedSum) -> Vector:
        return (state.total / max(state.num_examples, 1)).astype(np.float32)

    return Aggregator(init, accumulate, finalize)
