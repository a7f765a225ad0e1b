"""Compiled kernels of the rules that go by the order of a coordinate's values.

Needs numba. Of a tile, float32 ``(n, at least width)``, and comparators of `networks`, ``(m, 2)``,
each writes one number a column, ``(width,)``. `COLUMNS` of them are ranked at a time, in the L1
cache, with vector instructions. All release the GIL.
"""

from __future__ import annotations

import numpy as np
from numba import njit

COLUMNS = 64  # of 100 updates: 25 KiB
_OPTIONS = {"nogil": True, "error_model": "numpy", "cache": True}


@njit(**_OPTIONS)
def median(values, pairs, out):  # type: ignore[no-untyped-def]
    """The mean of the middle two, or the middle one."""
    num_rows, width = len(values), out.size
    low, high = (num_rows - 1) // 2, num_rows // 2
    ranked = np.zeros((num_rows, COLUMNS), np.float32)
    for start in range(0, width, COLUMNS):
        stop = min(start + COLUMNS, width)
        _rank(values, start, stop, pairs, ranked)
        for i in range(stop - start):
            # Halved first, as the sum of two large values is none in float32.
            out[start + i] = np.float64(ranked[low, i]) / 2 + np.float64(ranked[high, i]) / 2


@njit(**_OPTIONS)
def mean_between(values, pairs, cut, out):  # type: ignore[no-untyped-def]
    """The mean without the least and greatest ``cut``."""
    num_rows, width = len(values), out.size
    ranked, sums = np.zeros((num_rows, COLUMNS), np.float32), np.zeros(COLUMNS)
    for start in range(0, width, COLUMNS):
        stop = min(start + COLUMNS, width)
        _rank(values, start, stop, pairs, ranked)
        sums[:] = 0
        for k in range(cut, num_rows - cut):
            row = ranked[k]
            for i in range(COLUMNS):
                sums[i] += row[i]
        for i in range(stop - start):
            out[start + i] = sums[i] / (num_rows - 2 * cut)


@njit(**_OPTIONS)
def weighted_mean_between(values, pairs, cut, weights, out):  # type: ignore[no-untyped-def]
    """The same by weights ``(n,)``; of equal values the first row's is the least."""
    num_rows, width = len(values), out.size
    ranked = np.zeros((num_rows, COLUMNS), np.float32)
    sums, shares = np.zeros(COLUMNS), np.zeros(COLUMNS)
    below, above = np.zeros(COLUMNS, np.int32), np.zeros(COLUMNS, np.int32)
    for start in range(0, width, COLUMNS):
        stop = min(start + COLUMNS, width)
        _rank(values, start, stop, pairs, ranked)
        least, greatest = ranked[cut], ranked[num_rows - 1 - cut]
        sums[:], shares[:], below[:], above[:] = 0, 0, 0, 0
        for k in range(num_rows):
            row, weight = values[k, start:stop], weights[k]
            for i in range(stop - start):
                value = row[i]
                share = weight if least[i] <= value <= greatest[i] else 0.0
                sums[i] += share * value
                shares[i] += share
                below[i] += value < least[i]
                above[i] += value > greatest[i]
        for i in range(stop - start):
            if below[i] < cut or above[i] < cut:  # a value that goes is equal to one that stays
                column = values[:, start + i]
                sums[i], shares[i] = _without_ties(
                    column, least[i], greatest[i], cut - below[i], cut - above[i], weights
                )
            out[start + i] = sums[i] / shares[i]


@njit(inline="always")
def _rank(values, start, stop, pairs, ranked):  # type: ignore[no-untyped-def]
    """Brings some columns to the places that the comparators have for them."""
    for k in range(values.shape[0]):
        row, copy = values[k, start:stop], ranked[k]
        for i in range(row.size):
            copy[i] = row[i]
    for k in range(len(pairs)):
        first, second = ranked[pairs[k, 0]], ranked[pairs[k, 1]]
        for i in range(COLUMNS):
            a, b = first[i], second[i]
            first[i] = a if a < b else b
            second[i] = b if a < b else a


@njit(**_OPTIONS)
def _without_ties(  # type: ignore[no-untyped-def]
    column, least, greatest, num_least, num_greatest, weights
):
    """Sum and weights of what stays: so many of the least go, the first, and of the greatest."""
    total = shares = 0.0
    spare = -num_greatest  # greatest values that stay, and are still to come
    for value in column:
        spare += value == greatest
    for k in range(column.size):
        value = column[k]
        is_kept = least <= value <= greatest
        if value == greatest:
            is_kept = spare > 0
            spare -= 1
        if value == least and num_least > 0:
            is_kept = False
            num_least -= 1
        if is_kept:
            total += weights[k] * value
            shares += weights[k]
    return total, shares
