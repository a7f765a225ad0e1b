"""Krum and Multi-Krum: the updates that lie closest to their neighbors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from petalfl.payloads import EncodedDelta
from petalfl.vectors import Vector

from ..reducer import rules
from ..reducer.rules.products import squared_distances
from .aggregator import Aggregator
from .over_all import Kept, Weights, mean, over_all


def krum(num_attackers: int) -> Aggregator[Kept]:
    """The one update whose n − num_attackers − 2 nearest others are nearest to it.

    Args:
        num_attackers: The most holders that may be malicious; of a block with fewer than
            2 · num_attackers + 3 updates the rule promises nothing.

    Raises:
        ValueError: ``num_attackers`` is below 0.

    Source:
        Blanchard et al. 2017, NeurIPS, arXiv:1703.02757.
    """
    return multi_krum(num_attackers, 1)


def multi_krum(num_attackers: int, num_selected: int = 0) -> Aggregator[Kept]:
    """The weighted mean of the updates with the lowest Krum scores.

    Score of an update: the sum of its squared distances to its n − num_attackers − 2 nearest
    others (at least one). Of equal scores the first to arrive is taken. Keeps all deltas until
    `finalize`, which computes all distances: O(cohort² · block.size) time, as one matrix product.

    Args:
        num_attackers: As of `krum`.
        num_selected: 0: all but ``num_attackers``.

    Raises:
        ValueError: An argument is below 0.

    Source:
        Blanchard et al. 2017, NeurIPS, arXiv:1703.02757, there without weights.
    """
    if num_attackers < 0 or num_selected < 0:
        raise ValueError(
            "expected num_attackers >= 0 and num_selected >= 0, "
            f"found {num_attackers}, {num_selected}"
        )

    def rule(deltas: Sequence[EncodedDelta], weights: Weights) -> Vector:
        num_updates = len(deltas)
        distances = squared_distances(rules.active().inner_products(deltas))
        np.fill_diagonal(distances, 0.0)
        num_neighbors = max(1, num_updates - num_attackers - 2)
        distances.sort(axis=1)  # its own 0 comes first
        scores = distances[:, 1 : 1 + num_neighbors].sum(axis=1)
        count = num_selected or max(1, num_updates - num_attackers)
        chosen = np.argsort(scores, kind="stable")[:count]
        return mean([deltas[k] for k in chosen], weights[chosen])

    return over_all(rule, quorum=2 * num_attackers + 3)
