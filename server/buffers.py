"""A block's buffer: the updates that its next version will be made of."""

from __future__ import annotations

from typing import Any, NamedTuple

from petalfl.model import Block
from petalfl.vectors import Vector
from petalfl.wire import BlockUpdate

from .aggregators import Aggregator


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


class Buffer:
    """Folds every update into the aggregator's state as it comes."""

    def __init__(self, block: Block, aggregator: Aggregator[Any]) -> None:
        self._aggregator = aggregator
        self._state = aggregator.init(block)
        self._holders: set[str] = set()
        self._num_examples = 0
        self._update_ids: list[bytes] = []

    def __len__(self) -> int:
        return len(self._update_ids)

    def add(self, update: BlockUpdate, weight: float) -> None:
        """Counts an update; that it is counted once is for the caller to see to."""
        self._state = self._aggregator.accumulate(self._state, update.delta, weight)
        self._holders.add(update.device)
        self._num_examples += update.num_examples
        self._update_ids.append(update.update_id)

    def result(self) -> BlockResult:
        """The aggregate so far; changes nothing."""
        return BlockResult(
            self._aggregator.finalize(self._state),
            tuple(sorted(self._holders)),
            self._num_examples,
            tuple(self._update_ids),
        )
