"""Client optimizers: pure functions over a block's flat vector.

An optimizer is a pair of functions, `init` and `update`; its state lives for one round, as in
FedAvg, so that no device carries momentum from one base version to another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from petalfl.vectors import Vector


class ClientOptimizer(NamedTuple):
    """How a gradient becomes a step.

    Attributes:
        init: Parameters ``(size,)`` to the state before the first step.
        update: ``(parameters, gradient, state, learning_rate)`` to new parameters and state.
    """

    init: Callable[[Vector], Vector]
    update: Callable[[Vector, Vector, Vector, float], tuple[Vector, Vector]]


def sgd(momentum: float = 0.0, weight_decay: float = 0.0) -> ClientOptimizer:
    """Stochastic gradient descent, as `torch.optim.SGD` defines it.

    v ← momentum · v + (g + weight_decay · w);  w ← w − learning_rate · v.

    Args:
        momentum: In [0, 1).
        weight_decay: L2 penalty, at least 0.

    Raises:
        ValueError: An argument is outside its interval.
    """
    if not 0 <= momentum < 1 or not weight_decay >= 0:
        raise ValueError(f"expected 0 <= momentum < 1 and weight_decay >= 0, found {momentum}, "
                         f"{weight_decay}")  # fmt: skip

    def init(parameters: Vector) -> Vector:
        return np.zeros_like(parameters)

    def update(
        parameters: Vector, gradient: Vector, velocity: Vector, learning_rate: float
    ) -> tuple[Vector, Vector]:
        f32 = np.float32
        velocity = f32(momentum) * velocity + (gradient + f32(weight_decay) * parameters)
        return parameters - f32(learning_rate) * velocity, velocity

    return ClientOptimizer(init, update)
