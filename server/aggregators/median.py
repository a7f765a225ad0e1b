"""The median of every coordinate."""

from __future__ import annotations

from ..reducer import rules
from .aggregator import Aggregator
from .over_all import Kept, over_all


def median() -> Aggregator[Kept]:
    """The median of the deltas in every coordinate; of an even number, the mean of the two.

    One holder, one vote: weights do not count, for a device names its own. Stays within the
    honest holders' values while these are more than half. Keeps all deltas until `finalize`.

    Source:
        Yin et al. 2018, arXiv:1803.01498.
    """
    return over_all(lambda deltas, weights: rules.active().median(deltas))
