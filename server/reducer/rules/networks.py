"""Networks of comparators: the least and the greater of two places, over and over.

What is compared does not depend on the values, so that many columns are ranked at a time.

Source:
    Knuth, The Art of Computer Programming 3, 5.2.2, algorithm M (Batcher's merge exchange).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray


def sorting(n: int) -> Iterator[tuple[int, int]]:
    """Comparators that sort n values: each puts the lesser first."""
    top = p = 1 << max(0, n - 1).bit_length() >> 1
    while p:
        q, r, d = top, 0, p
        while True:
            for i in range(n - d):
                if i & p == r:
                    yield i, i + d
            if q == p:
                break
            d, q, r = q - p, q // 2, p
        p //= 2


def selecting(kinds: Sequence[int]) -> NDArray[np.int64]:
    """Those of them that bring the values of every rank to a place of its kind: ``(m, 2)``.

    Args:
        kinds: Of each rank. Which of the values of one kind lies where is left open, as for the
            sum of them.
    """
    labels, kept = list(kinds), []
    for i, j in reversed(list(sorting(len(labels)))):
        # From here to the end, values on places of one label may be exchanged.
        if labels[i] != labels[j]:
            kept.append((i, j))
            labels[i], labels[j] = -2 * len(kept), -2 * len(kept) - 1
    return np.array(kept[::-1], np.int64).reshape(-1, 2)


@functools.lru_cache(maxsize=64)
def between(n: int, *edges: int) -> NDArray[np.int64]:
    """The comparators that part n values at ranks ``edges``, ascending."""
    return selecting([sum(rank >= edge for edge in edges) for rank in range(n)])
