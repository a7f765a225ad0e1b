"""One synchronous round, per block: who belongs to it, what counts, when it is complete.

Sans-I/O: it decides and accumulates; journal, network and clock are others' business.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from petalfl.model import Block
from petalfl.vectors import Vector
from petalfl.wire import BlockUpdate, Report

from .aggregators import Aggregator


class BlockResult(NamedTuple):
    """What a closed round says of one block; ``delta`` is None where nobody contributed."""

    delta: Vector | None
    holders: tuple[str, ...]
    num_examples: int


class Round:
    """The updates and reports of a cohort.

    Args:
        round_num: From 1.
        cohort: By device: the shared blocks that it trains and is to send.
        base_versions: By block: the version that the cohort starts from.
        blocks: By name: the shared ones.
    """

    def __init__(
        self,
        round_num: int,
        cohort: Mapping[str, frozenset[str]],
        base_versions: Mapping[str, int],
        blocks: Mapping[str, Block],
        aggregator: Aggregator[Any],
    ) -> None:
        self.round_num = round_num
        self.cohort = dict(cohort)
        self.base_versions = dict(base_versions)
        self.reports: dict[str, Report] = {}
        self._aggregator = aggregator
        self._states: dict[str, Any] = {n: aggregator.init(b) for n, b in blocks.items()}
        self._num_examples = dict.fromkeys(blocks, 0)
        self._contributors: dict[str, dict[str, bytes]] = {name: {} for name in blocks}

    def refuse(self, update: BlockUpdate) -> str:
        """Why this update does not count; empty when it does. Changes nothing."""
        if update.round_num != self.round_num:
            return f"round {update.round_num} is closed, round {self.round_num} is open"
        if update.device not in self.cohort:
            return f"device {update.device} is not in the cohort of round {self.round_num}"
        if update.block not in self.cohort[update.device]:
            return f"device {update.device} does not hold the shared block {update.block}"
        if update.base_version != self.base_versions[update.block]:
            return (
                f"block {update.block}: base version {update.base_version}, "
                f"expected {self.base_versions[update.block]}"
            )
        known = self._contributors[update.block].get(update.device)
        if known not in (None, update.update_id):
            return f"device {update.device} has sent another update of block {update.block}"
        return ""

    def has(self, update: BlockUpdate) -> bool:
        """Whether this very update counts already: a redelivery changes nothing."""
        known = self._contributors.get(update.block, {}).get(update.device)
        return known == update.update_id

    def add(self, update: BlockUpdate) -> None:
        """Counts an update that `refuse` lets pass, once however often it comes."""
        if self.has(update):
            return
        block = update.block
        self._states[block] = self._aggregator.accumulate(
            self._states[block], update.delta, update.num_examples
        )
        self._num_examples[block] += update.num_examples
        self._contributors[block][update.device] = update.update_id

    def refuse_report(self, device: str, report: Report) -> str:
        """Why this report does not count; empty when it does."""
        if report.round_num != self.round_num:
            return f"round {report.round_num} is closed, round {self.round_num} is open"
        return "" if device in self.cohort else f"device {device} is not in the cohort"

    def report(self, device: str, report: Report) -> None:
        """Notes that a device has trained; the first report stands."""
        self.reports.setdefault(device, report)

    @property
    def is_complete(self) -> bool:
        """Whether every device of the cohort has reported and sent all its blocks."""
        return all(
            device in self.reports and all(device in self._contributors[b] for b in blocks)
            for device, blocks in self.cohort.items()
        )

    @property
    def loss(self) -> float | None:
        """The devices' training losses, weighted by examples; None before the first report."""
        total = sum(r.num_examples for r in self.reports.values())
        if not total:
            return None
        return sum(r.loss * r.num_examples for r in self.reports.values()) / total

    def finalize(self) -> dict[str, BlockResult]:
        """The aggregated delta of every block over those of its holders that sent one."""
        return {
            block: BlockResult(
                self._aggregator.finalize(state),
                tuple(sorted(self._contributors[block])),
                self._num_examples[block],
            )
            for block, state in self._states.items()
        }
