"""The weighted mean: FedAvg, block-wise."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from petalfl.model import Block
from petalfl.vectors import Vector

from .aggregator import Aggregator


class WeightedSum(NamedTuple):
    """The state: Σ w_k Δ_k in float64 ``(size,)``, and Σ w_k."""

    total: NDArray[np.float64]
    weight: float


def weighted_mean() -> Aggregator[WeightedSum]:
    """The mean of the deltas: Σ w_k Δ_k / Σ w_k over a block's holders.

    Sums in float64, so that the float32 result does not depend on the order of arrival but for
    a last-bit rounding in rare cases. O(block.size) memory, however many arrive.

    Source:
        McMahan et al. 2017, arXiv:1602.05629; block-wise: BLOSSOM, arXiv:2603.27552.
    """

    def init(block: Block) -> WeightedSum:
        return WeightedSum(np.zeros(block.size, np.float64), 0.0)

    def accumulate(state: WeightedSum, delta: Vector, weight: float) -> WeightedSum:
        total = state.total
        total += np.multiply(delta, weight, dtype=np.float64)
        return WeightedSum(total, state.weight + weight)

    def finalize(state: WeightedSum) -> Vector | None:
        if not state.weight:
            return None
        return (state.total / state.weight).astype(np.float32)

    return Aggregator(init, accumulate, finalize)
