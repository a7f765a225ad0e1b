"""Server optimizers: how a block's aggregated delta becomes its next version."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from petalfl.vectors import Vector


class ServerOptimizer(NamedTuple):
    """Two pure functions, applied per block and only where an update arrived.

    Attributes:
        init: The block's size to the state before its first step.
        update: ``(parameters, delta, state)`` to new parameters and state; all ``(size,)``.
    """

    init: Callable[[int], Vector]
    update: Callable[[Vector, Vector, Vector], tuple[Vector, Vector]]


def momentum(beta: float = 0.0, learning_rate: float = 1.0) -> ServerOptimizer:
    """FedAvgM: v ← beta · v + Δ;  x ← x + learning_rate · v. With beta 0 it is FedAvg.

    Args:
        beta: In [0, 1).
        learning_rate: Above 0.

    Raises:
        ValueError: An argument is outside its interval.

    Source:
        Hsu et al. 2019, arXiv:1909.06335; Reddi et al. 2021, arXiv:2003.00295.
    """
    if not 0 <= beta < 1 or not learning_rate > 0:
        raise ValueError(
            f"expected 0 <= beta < 1 and learning_rate > 0, found {beta}, {learning_rate}"
        )

    def init(size: int) -> Vector:
        return np.zeros(size, np.float32)

    def update(parameters: Vector, delta: Vector, velocity: Vector) -> tuple[Vector, Vector]:
        velocity = np.float32(beta) * velocity + delta
        return parameters + np.float32(learning_rate) * velocity, velocity

    return ServerOptimizer(init, update)
