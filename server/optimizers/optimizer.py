"""What a server optimizer is, and the one step that all of them take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from petalfl.model import Block
from petalfl.vectors import Vector

OptimizerState: TypeAlias = Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class ServerOptimizer:
    """Two pure functions over a block's trainable part: its ``num_trainable`` leading values.

    Attributes:
        init: The block to the state before its first step: arrays by name, of the same names
            ever after.
        update: ``(block, parameters, delta, state)`` to new parameters and state; all vectors
            are float32 ``(block.num_trainable,)``.
    """

    init: Callable[[Block], OptimizerState]
    update: Callable[[Block, Vector, Vector, OptimizerState], tuple[Vector, OptimizerState]]


def step(
    optimizer: ServerOptimizer,
    block: Block,
    parameters: Vector,
    delta: Vector,
    state: OptimizerState,
) -> tuple[Vector, OptimizerState]:
    """A block's next parameters and state; only for a block with an update.

    Running statistics are added to, whatever the optimizer: they are averages, not descended
    along, and momentum could carry a variance below zero. A state of other names, as of another
    optimizer or of none, is begun anew.

    Args:
        parameters: ``(block.size,)``, as is ``delta``.
    """
    fresh = optimizer.init(block)
    if state.keys() != fresh.keys():
        state = fresh
    end = block.num_trainable
    moved = np.empty_like(parameters)
    moved[:end], state = optimizer.update(block, parameters[:end], delta[:end], state)
    np.add(parameters[end:], delta[end:], out=moved[end:])
    return moved, state
