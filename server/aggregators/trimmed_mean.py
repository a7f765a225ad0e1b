"""The mean of every coordinate without its extremes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from petalfl.vectors import Vector

from .aggregator import Aggregator
from .over_all import Kept, Weights, columns, over_all, weighted_sum


def trimmed_mean(fraction: float) -> Aggregator[Kept]:
    """Weighted mean of the deltas after dropping the extremes of every coordinate.

    Of n updates, ⌊fraction · n⌋ are dropped at each end, whatever their weights, so that up to so
    many holders cannot carry a coordinate beyond the others' values. With none dropped it is
    `weighted_mean`. Keeps all deltas until `finalize`.

    Args:
        fraction: Share cut from each end, in [0, 0.5).

    Raises:
        ValueError: ``fraction`` is outside [0, 0.5).

    Source:
        Yin et al. 2018, arXiv:1803.01498, there without weights.
    """
    if not 0 <= fraction < 0.5:
        raise ValueError(f"expected fraction in [0, 0.5), found {fraction}")

    def rule(deltas: Sequence[Vector], weights: Weights) -> Vector:
        num_updates = len(deltas)
        cut = int(fraction * num_updates + 1e-9)  # 0.1 of 30 is 3, and so is 0.3 of 10
        if not cut:
            return weighted_sum(deltas, weights / weights.sum())
        # Of equal values the lighter comes first, so that the order of arrival does not matter.
        order = np.argsort(weights, kind="stable")
        deltas, weights = [deltas[k] for k in order], weights[order]
        found = np.empty_like(deltas[0])
        for part, values in columns(deltas):
            if weights[0] == weights[-1]:
                values.sort(axis=1)
                found[part] = values[:, cut:-cut].mean(axis=1, dtype=np.float64)
                continue
            kept, holders = _sort(values)
            shares = weights[holders[:, cut:-cut]]
            found[part] = np.einsum("ik,ik->i", kept[:, cut:-cut], shares) / shares.sum(axis=1)
        return found

    return over_all(rule)


def _sort(values: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Each row's values in order, and where in the row they were; of equals the first is first.

    Value and place are sorted as one integer, many times faster than by argsort.
    """
    keys = _ordered(values.view(np.int32)).astype(np.int64) << 32
    keys |= np.arange(values.shape[1])
    keys.sort(axis=1)
    return _ordered((keys >> 32).astype(np.int32)).view(np.float32), keys & 0xFFFFFFFF


def _ordered(bits: NDArray[np.int32]) -> NDArray[np.int32]:
    """The bits of floats as integers of the same order, and back."""
    return np.asarray(bits ^ ((bits >> 31) & np.int32(0x7FFFFFFF)), np.int32)
