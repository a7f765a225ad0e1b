"""A weighted mean that streams: updates wait encoded until there are enough for one pass."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

import numpy as np

from petalfl.payloads import EncodedDelta
from petalfl.vectors import Vector

from .backend import active

# A pass reads and writes 16 bytes of the sum for each of its values, and is handed to a thread. It
# is worth its while when the updates that wait for it have 32 times as many,
BYTES_A_VALUE = 512
MAX_BYTES = 128 << 20  # and due with so many bytes of a long block,
MAX_VALUES = 1 << 27  # or so many values of short codecs; but with so many updates at least:
MIN_UPDATES = 8
_PIECE = 1 << 14
_POOL = ThreadPoolExecutor(2, "weighted-sum")

Batch = Sequence[tuple[EncodedDelta, float]]


class WeightedSum:
    """Σ w_k Δ_k and Σ w_k over a block's updates, in O(size) memory.

    Products and sums are in float64, on every backend: the order of arrival makes no difference
    but for a last-bit rounding of the float32 mean in rare cases. Updates wait, encoded as they
    came, until a pass over the sum is worth its while, which then runs on a thread; no more of
    them are held than two passes take.

    Args:
        size: Of the block.
    """

    def __init__(self, size: int) -> None:
        self.weight = 0.0
        self._size = size
        self._end: int | None = None  # of the parameters, behind which are statistics
        self._total = np.zeros(size, np.float64)
        self._waiting: list[tuple[EncodedDelta, float]] = []
        self._num_bytes = 0
        self._folding: Future[None] | None = None
        self._error: BaseException | None = None

    def add(self, delta: EncodedDelta, weight: float) -> None:
        """Counts an update; weight > 0. Waits where the pass before the last is not over.

        Raises:
            ValueError: It is of another length, or cut otherwise than those before.
        """
        if self._error is not None:
            return  # `mean` will say so
        end = delta.parameters.size if self._end is None else self._end
        if delta.size != self._size or delta.parameters.size != end:
            raise ValueError(
                f"a delta of {delta.parameters.size} + {delta.statistics.size} values, expected "
                f"{end} + {self._size - end}"
            )
        self._end = end
        self._waiting.append((delta, weight))
        self._num_bytes += delta.num_bytes
        self.weight += weight
        num_updates = len(self._waiting)
        if num_updates >= MIN_UPDATES and (
            self._num_bytes >= min(BYTES_A_VALUE * self._size, MAX_BYTES)
            or num_updates * self._size >= MAX_VALUES
        ):
            self._settle()
            self._folding = _POOL.submit(self._fold, self._waiting)
            self._waiting, self._num_bytes = [], 0

    def mean(self) -> Vector | None:
        """Σ w_k Δ_k / Σ w_k so far as float32 ``(size,)``; None where nothing arrived.

        Raises:
            RuntimeError: A pass has failed, for want of memory, say. It may have added a part, so
                that to make it again would count that twice; a server that is started again has
                all of it in its journal.
        """
        self._settle()
        if self._error is not None:
            raise RuntimeError("a sum has failed: start the server again") from self._error
        if self._waiting:
            self._fold(self._waiting)
            self._waiting, self._num_bytes = [], 0
        if not self.weight:
            return None
        mean = np.empty(self._size, np.float32)
        for start in range(0, self._size, _PIECE):  # which stays in the cache
            part = slice(start, start + _PIECE)
            mean[part] = self._total[part] / self.weight
        return mean

    def _settle(self) -> None:
        """Waits for the pass that runs."""
        if self._folding is not None:
            wait((self._folding,))
            self._folding = None

    def _fold(self, batch: Batch) -> None:
        try:
            self._add(batch)
        except BaseException as error:
            self._error = error
            raise

    def _add(self, batch: Batch) -> None:
        deltas = [delta for delta, _ in batch]
        factors = np.array([weight * delta.factor for delta, weight in batch])
        end = deltas[0].parameters.size
        backend = active()
        backend.fold(self._total[:end], [delta.parameters for delta in deltas], factors)
        if end < self._size:
            backend.fold(self._total[end:], [delta.statistics for delta in deltas], factors)
