"""Aggregators: how the updates of a block's holders become one delta; one rule a file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..choices import parse_choice
from .aggregator import Aggregator
from .weighted_mean import weighted_mean

__all__ = ["AGGREGATORS", "Aggregator", "parse_aggregator", "weighted_mean"]

AGGREGATORS: dict[str, Callable[..., Aggregator[Any]]] = {"weighted-mean": weighted_mean}


def parse_aggregator(text: str) -> Aggregator[Any]:
    """The aggregator that a text such as ``trimmed-mean:0.1`` names.

    Raises:
        ValueError: It names none, or its parameters are not that one's.
    """
    return parse_choice("aggregator", text, AGGREGATORS)
