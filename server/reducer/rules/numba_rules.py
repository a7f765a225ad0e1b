"""The kernels on a CPU with numba: networks of comparators rank many columns at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from petalfl.payloads import EncodedDelta, plain_delta
from petalfl.vectors import Vector

from . import numba_ranks as kernels
from .networks import between
from .numpy_rules import NumpyRules
from .tiles import read, tiling

MAX_UPDATES = 1024  # then a network takes half as long as numpy's sort, but grows faster


class NumbaRules(NumpyRules):
    """`Rules` on all cores: those by order have kernels of their own, the rest is numpy's."""

    def __init__(self) -> None:
        _warm_up(self)

    def median(self, deltas: Sequence[EncodedDelta]) -> Vector:
        """As of `Rules`."""
        num_updates = len(deltas)
        if num_updates > MAX_UPDATES:
            return super().median(deltas)
        pairs = between(num_updates, (num_updates - 1) // 2, num_updates // 2 + 1)
        return _by_columns(deltas, lambda values, out: kernels.median(values, pairs, out))

    def trimmed_mean(
        self, deltas: Sequence[EncodedDelta], weights: NDArray[np.float64], cut: int
    ) -> Vector:
        """As of `Rules`."""
        low, high = cut, len(deltas) - cut
        if len(deltas) > MAX_UPDATES:
            return super().trimmed_mean(deltas, weights, cut)
        if (weights == weights[0]).all():
            pairs = between(len(deltas), low, high)
            return _by_columns(deltas, lambda v, out: kernels.mean_between(v, pairs, cut, out))
        pairs = between(len(deltas), low, low + 1, high - 1, high)
        return _by_columns(
            deltas, lambda v, out: kernels.weighted_mean_between(v, pairs, cut, weights, out)
        )


def _by_columns(
    deltas: Sequence[EncodedDelta], kernel: Callable[[NDArray[np.float32], Vector], None]
) -> Vector:
    found = np.empty(deltas[0].size, np.float32)
    plan = tiling(deltas, bytes_per_value=4)

    def work(tiles: Iterator[slice]) -> None:
        values = np.empty((len(deltas), plan.width), np.float32)
        for part in tiles:
            for row, delta in zip(values, deltas, strict=True):
                read(delta, part, row[: part.stop - part.start])
            kernel(values, found[part])

    plan.run(work)
    return found


def _warm_up(rules: NumbaRules) -> None:
    """Compiles everything, or loads it as it was compiled before: a step would wait for it."""
    deltas = [plain_delta(np.ones(1, np.float32))] * 3
    rules.median(deltas)
    for weights in (np.ones(3), np.arange(1.0, 4.0)):
        rules.trimmed_mean(deltas, weights, 1)
