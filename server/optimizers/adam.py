"""FedAdam: momentum, divided by the running size of the deltas."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from petalfl.model import Block
from petalfl.vectors import Vector

from .optimizer import OptimizerState, ServerOptimizer


def adam(
    learning_rate: float = 0.01,
    beta1: float = 0.9,
    beta2: float = 0.99,
    adaptivity: float = 1e-3,
) -> ServerOptimizer:
    """M ← β1 m + (1 − β1) Δ;  v ← β2 v + (1 − β2) Δ²;  x ← x + learning_rate · m / (√v + τ).

    No bias correction, as in the paper.

    Args:
        learning_rate: Above 0.
        beta1: In [0, 1), as is ``beta2``.
        adaptivity: τ, above 0: the smaller, the more the steps are normalized.

    Raises:
        ValueError: An argument is outside its interval.

    Source:
        Reddi et al. 2021, arXiv:2003.00295, algorithm 2, with m and v begun at 0.
    """
    keep, rest = np.float32(beta2), np.float32(1 - beta2)

    def second_moment(second: Vector, square: Vector) -> Vector:
        found: Vector = keep * second + rest * square
        return found

    return adaptive(second_moment, learning_rate, beta1, beta2, adaptivity)


def adaptive(
    second_moment: Callable[[Vector, Vector], Vector],
    learning_rate: float,
    beta1: float,
    beta2: float,
    adaptivity: float,
) -> ServerOptimizer:
    """What `adam` and `yogi` share; ``second_moment`` makes the next v of v and Δ²."""
    if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
        raise ValueError(f"expected beta1 and beta2 in [0, 1), found {beta1}, {beta2}")
    if not (0 < learning_rate < np.inf and 0 < adaptivity < np.inf):
        raise ValueError(
            f"expected learning_rate > 0 and adaptivity > 0, found {learning_rate}, {adaptivity}"
        )
    rest = np.float32(1 - beta1)

    def init(block: Block) -> OptimizerState:
        names = ("first_moment", "second_moment")
        return {name: np.zeros(block.num_trainable, np.float32) for name in names}

    def update(
        block: Block, parameters: Vector, delta: Vector, state: OptimizerState
    ) -> tuple[Vector, OptimizerState]:
        first = np.float32(beta1) * state["first_moment"] + rest * delta
        second = second_moment(state["second_moment"], delta * delta)
        scaled = first / (np.sqrt(second) + np.float32(adaptivity))
        moved = parameters + np.float32(learning_rate) * scaled
        return moved, {"first_moment": first, "second_moment": second}

    return ServerOptimizer(init, update)
