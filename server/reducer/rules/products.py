"""Inner products and distances of updates, by the BLAS in float64."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from petalfl.payloads import EncodedDelta

from .tiles import one_blas_thread, read, tiling


def inner_products(deltas: Sequence[EncodedDelta]) -> NDArray[np.float64]:
    """⟨Δ_j − Δ_o, Δ_k − Δ_o⟩ for all pairs: float64 ``(n, n)``; reads the updates once.

    The origin Δ_o is the update of the median norm, which no minority can make long. Distances
    between updates do not depend on it, and what they lose to cancellation is relative to how far
    from it they lie: ‖Δ_j − Δ_k‖² is exact to about 1e-15 · (‖Δ_j − Δ_o‖² + ‖Δ_k − Δ_o‖²).
    """
    origin = deltas[median_norm(deltas)]
    plan = tiling(deltas, bytes_per_value=8)

    def work(tiles: Iterator[slice]) -> NDArray[np.float64]:
        products = np.zeros((len(deltas), len(deltas)))
        rows = np.empty((len(deltas), plan.width))
        piece, center = np.empty((2, plan.width), np.float32)
        for part in tiles:
            width = part.stop - part.start
            read(origin, part, center[:width])
            for row, delta in zip(rows, deltas, strict=True):
                read(delta, part, piece[:width])
                np.subtract(piece[:width], center[:width], out=row[:width], dtype=np.float64)
            products += rows[:, :width] @ rows[:, :width].T
        return products

    with one_blas_thread():
        return np.asarray(sum(plan.run(work)))


def squared_distances(products: NDArray[np.float64]) -> NDArray[np.float64]:
    """‖Δ_j − Δ_k‖² for all pairs, of their `inner_products`; ≥ 0, and 0 on the diagonal."""
    norms = np.diag(products)
    return np.maximum(norms[:, None] + norms[None, :] - 2 * products, 0.0)


def median_norm(deltas: Sequence[EncodedDelta]) -> int:
    """Which update is of the median norm; of an even number, the lower of the two."""
    norms = [delta.norm * delta.factor for delta in deltas]
    return int(np.argsort(norms, kind="stable")[(len(norms) - 1) // 2])
