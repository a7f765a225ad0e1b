"""A block's buffer: the updates that its next version will be made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from petalfl.model import Block
from petalfl.payloads import EncodedDelta, plain_delta
from petalfl.vectors import Vector
from petalfl.wire import BlockUpdate

from .aggregators import Aggregator

# A delta, and the id of the journaled update that it is, if it is one: the same, held elsewhere
# than in memory. To keep it again changes nothing.
Keep: TypeAlias = Callable[[EncodedDelta, bytes], EncodedDelta]


def in_memory(delta: EncodedDelta, update_id: bytes) -> EncodedDelta:
    """The `Keep` that leaves it as it is."""
    return delta


class BlockResult(NamedTuple):
    """What a buffer holds, aggregated.

    Attributes:
        delta: None where nothing arrived.
        holders: The devices that it came from, sorted; one that sent several times is there once.
        num_examples: Of all updates, whatever their weights.
        update_ids: What was consumed.
    """

    delta: Vector | None
    holders: tuple[str, ...]
    num_examples: int
    update_ids: tuple[bytes, ...]


class _Vote(NamedTuple):
    """A holder's updates as one: their mean by weight, and the sum of their weights."""

    delta: EncodedDelta
    weight: float
    num_updates: int


class Buffer:
    """Folds every update into the aggregator's state as it comes.

    Of an aggregator with votes it keeps one by holder instead, whose weight is the mean of its
    updates' weights.

    Args:
        is_ordered: Keeps the updates, and takes them by device: the result has the same bits in
            whatever order they arrived.
        keep: Where deltas go that must wait for `result`, the aggregator's or the ordered ones.
    """

    def __init__(
        self,
        block: Block,
        aggregator: Aggregator[Any],
        *,
        is_ordered: bool = False,
        keep: Keep = in_memory,
    ) -> None:
        self._is_ordered = is_ordered
        self._keep = keep
        self._kept: list[tuple[BlockUpdate, float]] = []
        self._block = block
        self._aggregator = aggregator
        self._state = aggregator.init(block)
        self._votes: dict[str, _Vote] = {}
        self._holders: set[str] = set()
        self._num_examples = 0
        self._update_ids: list[bytes] = []

    def __len__(self) -> int:
        return len(self._update_ids)

    @property
    def num_holders(self) -> int:
        """The devices that the updates came from."""
        return len(self._holders)

    @property
    def keeps_deltas(self) -> bool:
        """Whether what is added waits for `result` as it came."""
        return self._is_ordered or self._aggregator.has_votes or self._aggregator.keeps_deltas

    def add(self, update: BlockUpdate, weight: float) -> None:
        """Counts an update; that it is counted once is for the caller to see to."""
        delta = update.encoded
        if self._is_ordered:
            self._kept.append(
                (replace(update, encoded=self._keep(delta, update.update_id)), weight)
            )
        elif self._aggregator.has_votes:
            before = self._votes.get(update.device)
            vote = _merged(before, delta, weight)
            kept = self._keep(vote.delta, b"" if before else update.update_id)
            self._votes[update.device] = vote._replace(delta=kept)
        else:
            if self._aggregator.keeps_deltas:
                delta = self._keep(delta, update.update_id)
            self._state = self._aggregator.accumulate(self._state, delta, weight)
        self._holders.add(update.device)
        self._num_examples += update.num_examples
        self._update_ids.append(update.update_id)

    def result(self) -> BlockResult:
        """The aggregate so far; changes nothing."""
        if self._is_ordered:
            return self._result_in_order()
        state = self._state
        if self._aggregator.has_votes:
            state = self._aggregator.init(self._block)
            for vote in self._votes.values():
                weight = vote.weight / vote.num_updates
                state = self._aggregator.accumulate(state, vote.delta, weight)
        return BlockResult(
            self._aggregator.finalize(state),
            tuple(sorted(self._holders)),
            self._num_examples,
            tuple(self._update_ids),
        )

    def _result_in_order(self) -> BlockResult:
        def keep(delta: EncodedDelta, update_id: bytes) -> EncodedDelta:
            return self._keep(delta, b"")  # the journal is not for this thread to read

        ordered = Buffer(self._block, self._aggregator, keep=keep)
        for update, weight in sorted(
            self._kept, key=lambda one: (one[0].device, one[0].round_num, one[0].update_id)
        ):
            ordered.add(update, weight)
        return ordered.result()


def _merged(vote: _Vote | None, delta: EncodedDelta, weight: float) -> _Vote:
    if vote is None:
        return _Vote(delta, weight, 1)
    total = vote.weight + weight
    mean = np.multiply(vote.delta.decode(), vote.weight / total, dtype=np.float64)
    mean += np.multiply(delta.decode(), weight / total, dtype=np.float64)
    merged = plain_delta(mean.astype(np.float32), delta.parameters.size)
    return _Vote(merged, total, vote.num_updates + 1)
