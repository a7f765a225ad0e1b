"""Rules that need all updates at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from petalfl.model import Block
from petalfl.payloads import EncodedDelta
from petalfl.vectors import Vector

from ..reducer.weighted_sum import WeightedSum
from .aggregator import Aggregator

Weights: TypeAlias = NDArray[np.float64]  # (n,)


class Kept(NamedTuple):
    """The state: every delta, as it came, and every weight, in order of arrival."""

    deltas: list[EncodedDelta]
    weights: list[float]


def over_all(
    rule: Callable[[Sequence[EncodedDelta], Weights], Vector], quorum: int = 1
) -> Aggregator[Kept]:
    """An aggregator that keeps the deltas, encoded, and reads them tile by tile at the end.

    Args:
        rule: ``(deltas, weights)``, at least one, to a float32 delta ``(block.size,)``.
        quorum: As of `Aggregator`.
    """

    def init(block: Block) -> Kept:
        return Kept([], [])

    def accumulate(state: Kept, delta: EncodedDelta, weight: float) -> Kept:
        state.deltas.append(delta)
        state.weights.append(weight)
        return state

    def finalize(state: Kept) -> Vector | None:
        if not state.deltas:
            return None
        return rule(state.deltas, np.array(state.weights, np.float64))

    return Aggregator(init, accumulate, finalize, quorum, has_votes=True, keeps_deltas=True)


def mean(deltas: Sequence[EncodedDelta], weights: Weights) -> Vector:
    """Σ w_k Δ_k / Σ w_k, summed in float64; a delta of weight 0 is not read."""
    total = WeightedSum(deltas[0].size)
    for delta, weight in zip(deltas, weights.tolist(), strict=True):
        if weight:
            total.add(delta, weight)
    found = total.mean()
    assert found is not None  # there is a weight above 0
    return found
