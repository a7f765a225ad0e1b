"""The weighted mean: FedAvg, block-wise."""

from __future__ import annotations

from petalfl.model import Block
from petalfl.payloads import EncodedDelta

from ..reducer.weighted_sum import WeightedSum
from .aggregator import Aggregator


def weighted_mean() -> Aggregator[WeightedSum]:
    """The mean of the deltas: Σ w_k Δ_k / Σ w_k over a block's holders.

    Sums in float64, so that the float32 result does not depend on the order of arrival but for
    a last-bit rounding in rare cases. O(block.size) memory, however many arrive.

    Source:
        McMahan et al. 2017, arXiv:1602.05629; block-wise: BLOSSOM, arXiv:2603.27552.
    """

    def init(block: Block) -> WeightedSum:
        return WeightedSum(block.size)

    def accumulate(state: WeightedSum, delta: EncodedDelta, weight: float) -> WeightedSum:
        state.add(delta, weight)
        return state

    return Aggregator(init, accumulate, WeightedSum.mean)
