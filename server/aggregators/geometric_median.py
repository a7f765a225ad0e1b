"""The geometric median, by the smoothed Weiszfeld algorithm."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from petalfl.payloads import EncodedDelta
from petalfl.vectors import Vector

from ..reducer import rules
from ..reducer.rules.products import squared_distances
from .aggregator import Aggregator
from .over_all import Kept, Weights, mean, over_all

_MAX_STEPS = 1000
_TOLERANCE = 1e-9  # of every share: a tiny one may be that of a huge delta


def geometric_median(smoothing: float = 1e-6) -> Aggregator[Kept]:
    """The point whose weighted distances to the deltas have the least sum.

    z ← Σ β_k Δ_k / Σ β_k with β_k = w_k / max(ν, ‖z − Δ_k‖), from the weighted mean on. Every z
    is a mixture of the deltas, so the iteration runs on their shares and inner products, and the
    deltas are read twice however many steps it takes. It breaks down when attackers hold half of
    the weight: weigh uniformly or capped where a device may lie about its examples. Keeps all
    deltas until `finalize`; O(cohort² · block.size) time, as one matrix product.

    Args:
        smoothing: ν relative to the median distance between two updates, in (0, 1); the paper's
            ν is absolute. Relative, the rule does not depend on the scale of the deltas.

    Raises:
        ValueError: ``smoothing`` is outside (0, 1).

    Source:
        Pillutla et al. 2022 (RFA), arXiv:1912.13445, algorithm 2.
    """
    if not 0 < smoothing < 1:
        raise ValueError(f"expected smoothing in (0, 1), found {smoothing}")

    def rule(deltas: Sequence[EncodedDelta], weights: Weights) -> Vector:
        products = rules.active().inner_products(deltas)
        return mean(deltas, weiszfeld(products, weights, smoothing))

    return over_all(rule)


def weiszfeld(
    products: NDArray[np.float64], weights: Weights, smoothing: float
) -> NDArray[np.float64]:
    """The deltas' shares in their geometric median: ``(n,)``, ≥ 0, of sum 1.

    Args:
        products: The deltas' inner products, around any origin.
    """
    shares: Weights = weights / weights.sum()
    pairs = np.sqrt(squared_distances(products))
    # The median of medians: a minority cannot make it large. Above 0, to divide by.
    floor = max(smoothing * float(np.median(np.median(pairs, axis=1))), 1e-150)
    norms = np.diag(products)
    for _ in range(_MAX_STEPS):
        mixed = products @ shares
        squares = norms - 2 * mixed + shares @ mixed  # ‖Δ_k − z‖²
        pulls = weights / np.maximum(np.sqrt(np.maximum(squares, 0.0)), floor)
        before, shares = shares, pulls / pulls.sum()
        if (np.abs(shares - before) <= _TOLERANCE * shares).all():
            break
    return shares
