"""Updates that stay as they came, expanded tile by tile within a budget of memory."""

from __future__ import annotations

import functools
import itertools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController

from petalfl.codecs.encoded import ALIGN
from petalfl.payloads import EncodedDelta
from petalfl.vectors import Vector

BUDGET_BYTES = 256 << 20  # of working memory, beside the stored updates and the result
TILE_VALUES = 1 << 20  # of all updates together: 4 MiB of float32
R = TypeVar("R")


class Tiling(NamedTuple):
    """How a block is cut: the values of every update in a tile, and the threads."""

    size: int
    width: int
    num_threads: int

    def run(self, work: Callable[[Iterator[slice]], R]) -> list[R]:
        """``work`` of each thread's tiles; they are dealt in turn, the same in every run."""
        if self.num_threads == 1:
            return [work(self._tiles(0))]
        with ThreadPoolExecutor(self.num_threads, "rules") as pool:
            return list(pool.map(work, map(self._tiles, range(self.num_threads))))

    def _tiles(self, thread: int) -> Iterator[slice]:
        return itertools.islice(parts(0, self.size, self.width), thread, None, self.num_threads)


def parts(start: int, stop: int, width: int) -> Iterator[slice]:
    """A range in parts, all but the last of that width."""
    for first in range(start, stop, width):
        yield slice(first, min(first + width, stop))


def tiling(deltas: Sequence[EncodedDelta], bytes_per_value: int) -> Tiling:
    """Tiles of a block that together take `BUDGET_BYTES` at most, however many the updates are.

    Args:
        bytes_per_value: What a rule needs for every value in a tile.
    """
    width = max(ALIGN, TILE_VALUES // len(deltas) // ALIGN * ALIGN)
    return within_budget(deltas[0].size, width, len(deltas) * bytes_per_value)


def within_budget(size: int, width: int, num_bytes: int) -> Tiling:
    """Tiles of up to ``width``, of which each of ``size`` takes so many bytes, and threads."""
    fitting = max(1, BUDGET_BYTES // num_bytes)  # of all threads together
    width = min(size, fitting, width)
    return Tiling(size, width, min(num_cores(), fitting // width, -(-size // width)))


def num_cores() -> int:
    """That this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def columns(
    deltas: Sequence[EncodedDelta], tiles: Iterator[slice], width: int
) -> Iterator[tuple[slice, NDArray[np.float32]]]:
    """Each tile with all updates' values in it: float32 ``(tile, n)``, overwritten by the next."""
    num_updates = len(deltas)
    # A row of 2^k values would put each column's into a few sets of the cache.
    tile = np.empty((width, num_updates | 1), np.float32)[:, :num_updates]
    for part in tiles:
        values = tile[: part.stop - part.start]
        for k, delta in enumerate(deltas):
            read(delta, part, values[:, k])
        yield part, values


def read(delta: EncodedDelta, part: slice, out: Vector) -> None:
    """Writes the part's values into ``out``, wherever the part begins."""
    skip = part.start % ALIGN
    if not skip:
        delta.read(part.start, part.stop, out)
        return
    piece = np.empty(skip + out.size, np.float32)
    delta.read(part.start - skip, part.stop, piece)
    out[:] = piece[skip:]


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Keeps the BLAS from starting threads beside ours: they wait for one another by spinning.

    The limit is the process's: the first who asks for it sets it, and the last one lifts it.
    """
    global _limit, _num_limiting
    with _limiting:
        if not _num_limiting:
            _limit = _controller().limit(limits=1, user_api="blas")
        _num_limiting += 1
    try:
        yield
    finally:
        with _limiting:
            _num_limiting -= 1
            if not _num_limiting:
                _limit.restore_original_limits()


_limiting = threading.Lock()
_limit: Any = None
_num_limiting = 0


@functools.cache
def _controller() -> ThreadpoolController:
    return ThreadpoolController()
