"""A weighted mean that streams: updates wait encoded until there are enough for one pass."""

from __future__ import annotations

import numpy as np

from petalfl.payloads import EncodedDelta
from petalfl.vectors import Vector

from .backend import active

WAITING_BYTES = 64 << 20  # of updates that wait for the next pass; or as many as BATCH
BATCH = 8  # updates that a pass takes at least


class WeightedSum:
    """Σ w_k Δ_k and Σ w_k over a block's updates, in O(size) memory.

    Products and sums are in float64, on every backend: the order of arrival makes no difference
    but for a last-bit rounding of the float32 mean in rare cases. A pass over the sum costs 16
    bytes of memory traffic a value, so updates wait, encoded as they came, until at least
    `BATCH` of them and `WAITING_BYTES` have gathered.

    Args:
        size: Of the block.
    """

    def __init__(self, size: int) -> None:
        self.weight = 0.0
        self._size = size
        self._total = np.zeros(size, np.float64)
        self._waiting: list[tuple[EncodedDelta, float]] = []
        self._num_bytes = 0

    def add(self, delta: EncodedDelta, weight: float) -> None:
        """Counts an update; weight > 0."""
        self._waiting.append((delta, weight))
        self._num_bytes += len(delta.payload)
        self.weight += weight
        if len(self._waiting) >= BATCH and self._num_bytes >= WAITING_BYTES:
            self._fold()

    def mean(self) -> Vector | None:
        """Σ w_k Δ_k / Σ w_k so far as float32 ``(size,)``; None where nothing arrived."""
        self._fold()
        if not self.weight:
            return None
        return (self._total / self.weight).astype(np.float32)

    def _fold(self) -> None:
        if not self._waiting:
            return
        deltas = [delta for delta, _ in self._waiting]
        factors = np.array([weight * delta.factor for delta, weight in self._waiting])
        end = deltas[0].parameters.size
        backend = active()
        backend.fold(self._total[:end], [delta.parameters for delta in deltas], factors)
        if end < self._size:
            backend.fold(self._total[end:], [delta.statistics for delta in deltas], factors)
        self._waiting, self._num_bytes = [], 0
