"""Vectors as the server optimizers' tests draw them, and one way to take steps."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st
from numpy.typing import ArrayLike

from petalfl.model import Block
from petalfl.vectors import Vector
from server.optimizers import OptimizerState, ServerOptimizer, step
from tests.server.builders import make_block

vectors = st.lists(st.integers(-1000, 1000), min_size=3, max_size=3).map(
    lambda values: np.array(values, np.float32)
)


def vector_block(size: int) -> Block:
    return make_block("head", "head", ("acc",), {"w": (size,)})[0]


def f32(values: ArrayLike) -> Vector:
    return np.asarray(values, np.float32)


def run(optimizer: ServerOptimizer, parameters: Vector, *deltas: Vector) -> list[Vector]:
    """The parameters after each step."""
    block, trail = vector_block(parameters.size), []
    state: OptimizerState = {}
    for delta in deltas:
        parameters, state = step(optimizer, block, parameters, delta, state)
        trail.append(parameters)
    return trail
