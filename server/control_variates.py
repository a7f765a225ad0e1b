"""SCAFFOLD on the server: the sum of control variates moves with its block, by its own rule."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from petalfl.codecs.encoded import plain
from petalfl.control_variates import without_sum
from petalfl.model import Block
from petalfl.payloads import EncodedDelta
from petalfl.vectors import Vector

from .aggregators import Aggregator


class Summed(NamedTuple):
    """The state of the rule for the block, and Σ (c_i⁺ − c_i) in float64 ``(num_trainable,)``."""

    inner: Any
    total: NDArray[np.float64]


def summed(rule: Aggregator[Any]) -> Aggregator[Summed]:
    """A rule for blocks of `petalfl.control_variates.with_sum`.

    The block itself is aggregated by ``rule``; the changes of control variates are added up, each
    device's once and whatever its weight.

    Source:
        Karimireddy et al. 2020, arXiv:1910.06378: c ← c + (1/N) Σ (c_i⁺ − c_i), here of C = N c.
    """

    def init(block: Block) -> Summed:
        return Summed(rule.init(without_sum(block)), np.zeros(block.num_trainable, np.float64))

    def accumulate(state: Summed, delta: EncodedDelta, weight: float) -> Summed:
        tail, total = delta.statistics.values, state.total
        end = tail.size - total.size
        total += tail[end:]
        own = replace(delta, statistics=plain(tail[:end]))
        return Summed(rule.accumulate(state.inner, own, weight), total)

    def finalize(state: Summed) -> Vector | None:
        found = rule.finalize(state.inner)
        if found is None:
            return None
        return np.concatenate([found, state.total.astype(np.float32)])

    return replace(rule, init=init, accumulate=accumulate, finalize=finalize)
