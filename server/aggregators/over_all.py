"""Rules that need all updates at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from petalfl.model import Block
from petalfl.payloads import EncodedDelta
from petalfl.vectors import Vector

from .aggregator import Aggregator

_CHUNK = 1 << 18  # values at a time, of all updates together: they stay in the cache

Weights: TypeAlias = NDArray[np.float64]  # (n,)


class Kept(NamedTuple):
    """The state: every delta, not copied, and every weight, in order of arrival."""

    deltas: list[Vector]
    weights: list[float]


def over_all(
    rule: Callable[[Sequence[Vector], Weights], Vector], quorum: int = 1
) -> Aggregator[Kept]:
    """An aggregator that keeps the deltas: O(cohort × block.size) memory.

    Args:
        rule: ``(deltas, weights)``, at least one, to a float32 delta ``(block.size,)``.
        quorum: As of `Aggregator`.
    """

    def init(block: Block) -> Kept:
        return Kept([], [])

    def accumulate(state: Kept, delta: EncodedDelta, weight: float) -> Kept:
        state.deltas.append(delta.decode())
        state.weights.append(weight)
        return state

    def finalize(state: Kept) -> Vector | None:
        if not state.deltas:
            return None
        return rule(state.deltas, np.array(state.weights, np.float64))

    return Aggregator(init, accumulate, finalize, quorum, has_votes=True)


def columns(deltas: Sequence[Vector]) -> Iterator[tuple[slice, NDArray[np.float32]]]:
    """Slices of the block, with all updates' values in them: float32 ``(slice, n)``, a copy."""
    size, width = deltas[0].size, max(1, _CHUNK // len(deltas))
    for start in range(0, size, width):
        part = slice(start, min(start + width, size))
        yield part, np.stack([delta[part] for delta in deltas], axis=1)


def weighted_sum(deltas: Sequence[Vector], weights: Weights) -> Vector:
    """Σ w_k Δ_k, summed in float64; a delta of weight 0 is not read."""
    total = np.zeros(deltas[0].size, np.float64)
    for delta, weight in zip(deltas, weights, strict=True):
        if weight:
            total += np.multiply(delta, weight, dtype=np.float64)
    return total.astype(np.float32)


def inner_products(deltas: Sequence[Vector]) -> NDArray[np.float64]:
    """⟨Δ_j, Δ_k⟩ for all pairs: float64 ``(n, n)``."""
    products = np.zeros((len(deltas), len(deltas)), np.float64)
    for _, values in columns(deltas):
        rows = values.T.astype(np.float64)
        products += rows @ rows.T
    return products


def squared_distances(products: NDArray[np.float64]) -> NDArray[np.float64]:
    """‖Δ_j − Δ_k‖² for all pairs, of their `inner_products`; ≥ 0, and 0 on the diagonal."""
    norms = np.diag(products)
    return np.maximum(norms[:, None] + norms[None, :] - 2 * products, 0.0)
