"""Server optimizers: how a block's delta becomes its next version; one rule a file."""

from __future__ import annotations

from collections.abc import Callable

from ..choices import parse_choice
from .optimizer import OptimizerState, ServerOptimizer, step
from .sgd import momentum, sgd

__all__ = [
    "OPTIMIZERS",
    "OptimizerState",
    "ServerOptimizer",
    "momentum",
    "parse_optimizer",
    "sgd",
    "step",
]

OPTIMIZERS: dict[str, Callable[..., ServerOptimizer]] = {"sgd": sgd, "momentum": momentum}


def parse_optimizer(text: str) -> ServerOptimizer:
    """The server optimizer that a text such as ``adam:0.01`` names.

    Raises:
        ValueError: It names none, or its parameters are not that one's.
    """
    return parse_choice("server optimizer", text, OPTIMIZERS)
