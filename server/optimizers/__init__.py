"""Server optimizers: how a block's delta becomes its next version; one rule a file."""

from __future__ import annotations

from collections.abc import Callable

from ..choices import parse_choice
from .adagrad import adagrad
from .adam import adam
from .optimizer import OptimizerState, ServerOptimizer, step
from .orthogonal import orthogonal
from .sgd import momentum, sgd
from .yogi import yogi

__all__ = [
    "OPTIMIZERS",
    "OptimizerState",
    "ServerOptimizer",
    "adagrad",
    "adam",
    "momentum",
    "orthogonal",
    "parse_optimizer",
    "sgd",
    "step",
    "yogi",
]

OPTIMIZERS: dict[str, Callable[..., ServerOptimizer]] = {
    "sgd": sgd,
    "momentum": momentum,
    "adagrad": adagrad,
    "adam": adam,
    "yogi": yogi,
    "orthogonal": orthogonal,
}


def parse_optimizer(text: str) -> ServerOptimizer:
    """The server optimizer that a text such as ``adam:0.01`` names.

    Raises:
        ValueError: It names none, or its parameters are not that one's.
    """
    return parse_choice("server optimizer", text, OPTIMIZERS)
