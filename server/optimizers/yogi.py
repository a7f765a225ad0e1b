"""FedYogi: as FedAdam, with a second moment that moves by no more than the delta's square."""

from __future__ import annotations

import numpy as np

from petalfl.vectors import Vector

from .adam import adaptive
from .optimizer import ServerOptimizer


def yogi(
    learning_rate: float = 0.01,
    beta1: float = 0.9,
    beta2: float = 0.99,
    adaptivity: float = 1e-3,
) -> ServerOptimizer:
    """As `adam`, but v ← v − (1 − β2) Δ² sign(v − Δ²).

    Args and Raises:
        As of `adam`.

    Source:
        Reddi et al. 2021, arXiv:2003.00295, algorithm 2, with m and v begun at 0.
    """
    rest = np.float32(1 - beta2)

    def second_moment(second: Vector, square: Vector) -> Vector:
        found: Vector = second - rest * square * np.sign(second - square)
        return found

    return adaptive(second_moment, learning_rate, beta1, beta2, adaptivity)
