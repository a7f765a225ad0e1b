"""Aggregators: how the updates of a block's holders become one delta; one rule a file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..choices import parse_choice
from .aggregator import Aggregator
from .canonical import canonical
from .geometric_median import geometric_median
from .krum import krum, multi_krum
from .median import median
from .trimmed_mean import trimmed_mean
from .weighted_mean import weighted_mean

__all__ = [
    "AGGREGATORS",
    "Aggregator",
    "canonical",
    "geometric_median",
    "krum",
    "median",
    "multi_krum",
    "parse_aggregator",
    "trimmed_mean",
    "weighted_mean",
]

AGGREGATORS: dict[str, Callable[..., Aggregator[Any]]] = {
    "weighted-mean": weighted_mean,
    "median": median,
    "trimmed-mean": trimmed_mean,
    "krum": krum,
    "multi-krum": multi_krum,
    "geometric-median": geometric_median,
    "canonical": canonical,
}


def parse_aggregator(text: str) -> Aggregator[Any]:
    """The aggregator that a text such as ``trimmed-mean:0.1`` names.

    Raises:
        ValueError: It names none, or its parameters are not that one's.
    """
    return parse_choice("aggregator", text, AGGREGATORS)
