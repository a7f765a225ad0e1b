"""FedAdagrad: a step per coordinate that shrinks with all it has seen."""

from __future__ import annotations

import numpy as np

from petalfl.model import Block
from petalfl.vectors import Vector

from .optimizer import OptimizerState, ServerOptimizer


def adagrad(learning_rate: float = 0.01, adaptivity: float = 1e-3) -> ServerOptimizer:
    """V ← v + Δ²;  x ← x + learning_rate · Δ / (√v + adaptivity).

    Args:
        learning_rate: Above 0.
        adaptivity: The paper's τ, above 0: the smaller, the more the steps are normalized.

    Raises:
        ValueError: An argument is outside its interval.

    Source:
        Reddi et al. 2021, arXiv:2003.00295, algorithm 2, with β1 = 0 and v begun at 0.
    """
    if not 0 < learning_rate < np.inf or not 0 < adaptivity < np.inf:
        raise ValueError(
            f"expected learning_rate > 0 and adaptivity > 0, found {learning_rate}, {adaptivity}"
        )

    def init(block: Block) -> OptimizerState:
        return {"second_moment": np.zeros(block.num_trainable, np.float32)}

    def update(
        block: Block, parameters: Vector, delta: Vector, state: OptimizerState
    ) -> tuple[Vector, OptimizerState]:
        second = state["second_moment"] + delta * delta
        scaled = delta / (np.sqrt(second) + np.float32(adaptivity))
        return parameters + np.float32(learning_rate) * scaled, {"second_moment": second}

    return ServerOptimizer(init, update)
