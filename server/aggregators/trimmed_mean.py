"""The mean of every coordinate without its extremes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from petalfl.payloads import EncodedDelta
from petalfl.vectors import Vector

from ..reducer import rules
from .aggregator import Aggregator
from .over_all import Kept, Weights, mean, over_all


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

    def rule(deltas: Sequence[EncodedDelta], weights: Weights) -> Vector:
        cut = int(fraction * len(deltas) + 1e-9)  # 0.1 of 30 is 3, and so is 0.3 of 10
        if not cut:
            return mean(deltas, weights)
        # Of equal values the lighter comes first, so that the order of arrival does not matter.
        order = np.argsort(weights, kind="stable")
        return rules.active().trimmed_mean([deltas[k] for k in order], weights[order], cut)

    return over_all(rule)
