"""What an aggregator is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from petalfl.model import Block
from petalfl.payloads import EncodedDelta
from petalfl.vectors import Vector

S = TypeVar("S")


@dataclass(frozen=True, slots=True)
class Aggregator(Generic[S]):
    """Three functions that fold the updates of a block's holders into one delta.

    They know nothing of rounds, devices or the network.

    Attributes:
        init: The block to an empty state.
        accumulate: ``(state, delta, weight)`` to the state with one more update; weight > 0. The
            state passed in is consumed. The delta is as its codec wrote it, may be kept, and is
            never written to.
        finalize: The state to a float32 delta ``(block.size,)``; None where no update arrived.
        quorum: The fewest holders that the rule is defined for.
        has_votes: The rule bounds what a few of its updates can do, so that a holder must have
            one, however often it sends.
        keeps_deltas: The state holds every delta until `finalize`.
    """

    init: Callable[[Block], S]
    accumulate: Callable[[S, EncodedDelta, float], S]
    finalize: Callable[[S], Vector | None]
    quorum: int = 1
    has_votes: bool = False
    keeps_deltas: bool = False
