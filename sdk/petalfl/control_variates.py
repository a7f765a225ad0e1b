"""Control variates: SCAFFOLD's correction for devices whose data differ.

Of every shared block a device i keeps c_i, the mean gradient of its last round, and the server
C = Σ c_i, behind the block's vector, so that both have one version and one digest. A step goes
along g + C/N − c_i, N being the number of devices that hold the block, and with the block's delta
the device sends how its c_i has changed.

Source:
    Karimireddy et al. 2020, arXiv:1910.06378, option II: with plain SGD its
    c_i − c + (x − y)/(K η) is the mean gradient, which is well-defined for other optimizers, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from petalfl.model import Block, ModelManifest, Parameter
from petalfl.vectors import Vector, from_bytes

SUM_NAME = "optimizer.control-variates"  # on the server's disk it lies among its optimizer's state


def with_sum(block: Block) -> Block:
    """The block as it travels: ``(size + num_trainable,)``, C or its change at the end.

    To codecs and server C is a further running statistic: it is sent as float32, and added to.
    """
    tail = Parameter(SUM_NAME, (block.num_trainable,))
    size = block.size + block.num_trainable
    return replace(block, size=size, statistics=(*block.statistics, tail))


def without_sum(block: Block) -> Block:
    """The inverse of `with_sum`; a block without C as it is."""
    if not block.statistics or block.statistics[-1].name != SUM_NAME:
        return block
    size = block.size - block.num_trainable
    return replace(block, size=size, statistics=block.statistics[:-1])


def with_sums(manifest: ModelManifest) -> ModelManifest:
    """The model as it travels: `with_sum` of every block that trains."""
    blocks = (block if block.is_frozen else with_sum(block) for block in manifest.blocks)
    return replace(manifest, blocks=tuple(blocks))


def own_control(block: Block, controls: Mapping[str, bytes]) -> Vector:
    """A device's own control variate of a shared block; zeros before the first.

    Args:
        controls: By block, as in `petalfl.store.State`.
    """
    kept = controls.get(block.name)
    if kept is None or len(kept) != 4 * block.num_trainable:  # of a model before this one
        return np.zeros(block.num_trainable, np.float32)
    return from_bytes(kept, block.num_trainable)


def correction(total: Vector, num_holders: int, own: Vector) -> Vector:
    """What a device adds to its gradients: C/N − c_i."""
    mean = total.astype(np.float64) / num_holders
    return (mean - own).astype(np.float32)


class Corrections:
    """What control variates do to the steps of one round.

    Args:
        by_block: C/N − c_i, ``(block.num_trainable,)``, of the blocks to correct.
    """

    def __init__(self, by_block: Mapping[str, Vector]) -> None:
        self._by_block = by_block
        self._sums: dict[str, NDArray[np.float64]] = {}
        self._num_steps: dict[str, int] = {}

    def __contains__(self, block: object) -> bool:
        return block in self._by_block

    def apply(self, block: str, gradient: Vector) -> Vector:
        """The gradient to descend along; notes the one that is given."""
        total = self._sums.setdefault(block, np.zeros(gradient.size, np.float64))
        total += gradient
        self._num_steps[block] = self._num_steps.get(block, 0) + 1
        return gradient + self._by_block[block]

    @property
    def mean_gradients(self) -> dict[str, Vector]:
        """By block that has been trained: the new c_i."""
        return {
            name: (total / self._num_steps[name]).astype(np.float32)
            for name, total in self._sums.items()
        }
