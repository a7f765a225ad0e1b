"""A weighted mean that streams: updates wait encoded until there are enough for one pass."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from petalfl.payloads import EncodedDelta
from petalfl.vectors import Vector

from .backend import active

WAITING_VALUES = 1 << 24  # of the updates that wait for the next pass: 64 MiB as float32
BATCH = 8  # updates that a pass takes at least
_POOL = ThreadPoolExecutor(2, "weighted-sum")

Batch = Sequence[tuple[EncodedDelta, float]]


class WeightedSum:
    """Σ w_k Δ_k and Σ w_k over a block's updates, in O(size) memory.

    Products and sums are in float64, on every backend: the order of arrival makes no difference
    but for a last-bit rounding of the float32 mean in rare cases. A pass over the sum costs 16
    bytes of memory traffic a value, so updates wait, encoded as they came, until at least
    `BATCH` of them and `WAITING_VALUES` have gathered; the pass itself runs on a thread. So there
    are never more updates held than two passes take.

    Args:
        size: Of the block.
    """

    def __init__(self, size: int) -> None:
        self.weight = 0.0
        self._size = size
        self._total = np.zeros(size, np.float64)
        self._waiting: list[tuple[EncodedDelta, float]] = []
        self._folding: Future[None] | None = None

    def add(self, delta: EncodedDelta, weight: float) -> None:
        """Counts an update; weight > 0. Waits where the pass before the last is not over."""
        self._waiting.append((delta, weight))
        self.weight += weight
        if len(self._waiting) >= BATCH and len(self._waiting) * self._size >= WAITING_VALUES:
            self._settle()
            self._folding = _POOL.submit(self._fold, self._waiting)
            self._waiting = []

    def mean(self) -> Vector | None:
        """Σ w_k Δ_k / Σ w_k so far as float32 ``(size,)``; None where nothing arrived."""
        self._settle()
        if self._waiting:
            self._fold(self._waiting)
            self._waiting = []
        if not self.weight:
            return None
        return (self._total / self.weight).astype(np.float32)

    def _settle(self) -> None:
        if self._folding is not None:
            self._folding.result()
        self._folding = None

    def _fold(self, batch: Batch) -> None:
        deltas = [delta for delta, _ in batch]
        factors = np.array([weight * delta.factor for delta, weight in batch])
        end = deltas[0].parameters.size
        backend = active()
        backend.fold(self._total[:end], [delta.parameters for delta in deltas], factors)
        if end < self._size:
            backend.fold(self._total[end:], [delta.statistics for delta in deltas], factors)
