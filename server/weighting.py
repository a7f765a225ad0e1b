"""How much an update counts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

from .choices import parse_choice

Weighting: TypeAlias = Callable[[int], float]  # num_examples to a weight above 0


def examples() -> Weighting:
    """By the examples that it was trained on: FedAvg, arXiv:1602.05629."""
    return float


def uniform() -> Weighting:
    """All alike: no device gains by claiming more examples than it has."""
    return lambda num_examples: 1.0


def capped(max_examples: int) -> Weighting:
    """By examples, of which no more than ``max_examples`` count.

    Raises:
        ValueError: ``max_examples`` is below 1.
    """
    if max_examples < 1:
        raise ValueError(f"expected max_examples >= 1, found {max_examples}")
    return lambda num_examples: float(min(num_examples, max_examples))


WEIGHTINGS: dict[str, Callable[..., Weighting]] = {
    "examples": examples,
    "uniform": uniform,
    "capped": capped,
}


def parse_weighting(text: str) -> Weighting:
    """The rule that a text such as ``capped:500`` names.

    Raises:
        ValueError: It names none, or its parameters are not that one's.
    """
    return parse_choice("weighting", text, WEIGHTINGS)


def weight(num_examples: int, rule: str) -> float:
    """The weight of an update of so many examples under a rule such as ``capped:500``.

    Raises:
        ValueError: As of `parse_weighting`.
    """
    return parse_weighting(rule)(num_examples)


def staleness_factor(staleness: int) -> float:
    """1 / √(1 + staleness): what remains of the weight of an update of an older version.

    Args:
        staleness: Versions since its base, at least 0.

    Source:
        FedBuff, Nguyen et al. 2022, arXiv:2106.06639.
    """
    if staleness < 0:
        raise ValueError(f"expected staleness >= 0, found {staleness}")
    return 1 / math.sqrt(1 + staleness)
