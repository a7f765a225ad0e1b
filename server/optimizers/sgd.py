"""FedAvg and FedAvgM: add the delta, with momentum or without."""

from __future__ import annotations

import numpy as np

from petalfl.model import Block
from petalfl.vectors import Vector

from .optimizer import OptimizerState, ServerOptimizer


def sgd(learning_rate: float = 1.0) -> ServerOptimizer:
    """FedAvg: x ← x + learning_rate · Δ. Keeps no state.

    Args:
        learning_rate: Above 0.

    Raises:
        ValueError: It is not.

    Source:
        McMahan et al. 2017, arXiv:1602.05629.
    """
    if not 0 < learning_rate < np.inf:
        raise ValueError(f"expected learning_rate > 0, found {learning_rate}")

    def init(block: Block) -> OptimizerState:
        return {}

    def update(
        block: Block, parameters: Vector, delta: Vector, state: OptimizerState
    ) -> tuple[Vector, OptimizerState]:
        return parameters + np.float32(learning_rate) * delta, state

    return ServerOptimizer(init, update)


def momentum(beta: float = 0.9, learning_rate: float = 1.0) -> ServerOptimizer:
    """FedAvgM: v ← beta · v + Δ;  x ← x + learning_rate · v. With beta 0 it is `sgd`.

    Args:
        beta: In [0, 1).
        learning_rate: Above 0.

    Raises:
        ValueError: An argument is outside its interval.

    Source:
        Hsu et al. 2019, arXiv:1909.06335; Reddi et al. 2021, arXiv:2003.00295.
    """
    if not 0 <= beta < 1 or not 0 < learning_rate < np.inf:
        raise ValueError(
            f"expected 0 <= beta < 1 and learning_rate > 0, found {beta}, {learning_rate}"
        )
    if not beta:
        return sgd(learning_rate)

    def init(block: Block) -> OptimizerState:
        return {"velocity": np.zeros(block.num_trainable, np.float32)}

    def update(
        block: Block, parameters: Vector, delta: Vector, state: OptimizerState
    ) -> tuple[Vector, OptimizerState]:
        velocity = np.float32(beta) * state["velocity"] + delta
        return parameters + np.float32(learning_rate) * velocity, {"velocity": velocity}

    return ServerOptimizer(init, update)
