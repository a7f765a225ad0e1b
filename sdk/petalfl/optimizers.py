"""Client optimizers: the artifacts' optimizer graphs, run on a block's flat vector.

An optimizer is a pair of functions, `init` and `update`; its state lives for one round, as in
FedAvg, so that no device carries momentum from one base version to another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from petalfl.engine import Engine
from petalfl.model import Artifact
from petalfl.vectors import Vector


class OptimizerState(NamedTuple):
    """What an optimizer remembers of a block.

    Attributes:
        anchor: The parameters at the start of the round.
        moments: By the graph's name: running averages of the gradient, each ``(size,)``.
        num_steps: Taken so far.
    """

    anchor: Vector
    moments: Mapping[str, Vector]
    num_steps: int


class ClientOptimizer(NamedTuple):
    """How a gradient becomes a step.

    Attributes:
        init: Parameters ``(size,)`` to the state before the first step.
        update: ``(parameters, gradient, state, scalars)`` to new parameters and state. Of the
            scalars, `Scalars` says what they do.
    """

    init: Callable[[Vector], OptimizerState]
    update: Callable[[Vector, Vector, OptimizerState, Scalars], tuple[Vector, OptimizerState]]


class Scalars(NamedTuple):
    """What may differ from step to step, or from block to block.

    The gradient that is descended along is
    gradient_scale · gradient + proximal · (parameters − anchor).
    """

    learning_rate: float
    gradient_scale: float = 1.0
    proximal: float = 0.0


def sgd(
    engine: Engine,
    graph: Artifact,
    *,
    momentum: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
) -> ClientOptimizer:
    """Stochastic gradient descent, as `torch.optim.SGD` defines it, without dampening.

    v ← momentum · v + (g + weight_decay · w);  w ← w − learning_rate · v, or with ``nesterov``
    w ← w − learning_rate · (g + weight_decay · w + momentum · v).

    Args:
        graph: The artifacts' ``sgd``.
        momentum: In [0, 1).
        weight_decay: L2 penalty, at least 0.

    Raises:
        ValueError: An argument is outside its interval.
    """
    if not 0 <= momentum < 1 or not weight_decay >= 0:
        raise ValueError(f"expected 0 <= momentum < 1 and weight_decay >= 0, found {momentum}, "
                         f"{weight_decay}")  # fmt: skip
    settings = {"momentum": momentum, "nesterov": float(nesterov), "weight_decay": weight_decay}
    return _optimizer(engine, graph, ("velocity",), settings)


def adamw(
    engine: Engine,
    graph: Artifact,
    *,
    beta1: float = 0.9,
    beta2: float = 0.999,
    epsilon: float = 1e-8,
    weight_decay: float = 0.0,
) -> ClientOptimizer:
    """Adam with decoupled weight decay, as `torch.optim.AdamW` defines it.

    Args:
        graph: The artifacts' ``adamw``.
        beta1: In [0, 1).
        beta2: In [0, 1).
        epsilon: Above 0.
        weight_decay: At least 0.

    Raises:
        ValueError: An argument is outside its interval.

    Source:
        Loshchilov and Hutter 2019, arXiv:1711.05101.
    """
    if not (0 <= beta1 < 1 and 0 <= beta2 < 1 and epsilon > 0 and weight_decay >= 0):
        raise ValueError(
            "expected 0 <= beta1, beta2 < 1, epsilon > 0 and weight_decay >= 0, "
            f"found {beta1}, {beta2}, {epsilon}, {weight_decay}"
        )
    settings = {"beta1": beta1, "beta2": beta2, "epsilon": epsilon, "weight_decay": weight_decay}
    return _optimizer(engine, graph, ("first_moment", "second_moment"), settings)


def _optimizer(
    engine: Engine, graph: Artifact, moments: tuple[str, ...], settings: Mapping[str, float]
) -> ClientOptimizer:
    def init(parameters: Vector) -> OptimizerState:
        zeros = {name: np.zeros(parameters.size, np.float32) for name in moments}
        return OptimizerState(parameters, zeros, 0)

    def update(
        parameters: Vector, gradient: Vector, state: OptimizerState, scalars: Scalars
    ) -> tuple[Vector, OptimizerState]:
        num_steps = state.num_steps + 1
        numbers = {**settings, **scalars._asdict(), "step": num_steps}
        vectors = {"parameters": parameters, "gradient": gradient, "anchor": state.anchor}
        feeds = {name: np.array(number, np.float32) for name, number in numbers.items()}
        outputs = engine.step(graph, {**vectors, **state.moments, **feeds})
        new_moments = {name: outputs[f"new_{name}"] for name in moments}
        return outputs["new_parameters"], OptimizerState(state.anchor, new_moments, num_steps)

    return ClientOptimizer(init, update)
