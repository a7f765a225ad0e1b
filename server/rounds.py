"""Who was asked for which blocks, what of it counts, and when it is time to go on.

Sans-I/O: it decides and accumulates; journal, network and clock are others' business.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any, Literal, NamedTuple, Protocol

from petalfl.model import Block
from petalfl.wire import BlockUpdate, Report

from .aggregators import Aggregator
from .buffers import BlockResult, Buffer, Keep, in_memory
from .norms import clip
from .weighting import Weighting, staleness_factor


class Assignment(NamedTuple):
    """What a device was asked for: its task's number, and the blocks that it is to send."""

    round_num: int
    blocks: frozenset[str]


class Refusal(NamedTuple):
    """Why an update or a report does not count.

    Attributes:
        kind: late: its round is over; stale: its base version is too old; duplicate: another
            one came before; foreign: nobody asked that device for it.
    """

    kind: Literal["late", "stale", "duplicate", "foreign"]
    reason: str


class Announced(Protocol):
    """What of an update there is to judge before its payload has come."""

    @property
    def update_id(self) -> bytes:
        """Of this update for good."""

    @property
    def block(self) -> str:
        """Its block."""

    @property
    def round_num(self) -> int:
        """Of the task that it answers."""

    @property
    def base_version(self) -> int:
        """What its device has started from."""

    @property
    def num_examples(self) -> int:
        """That it was trained on."""

    @property
    def sha256(self) -> str:
        """Of its payload."""


class Round:
    """The assignments of a cohort, and what has come back.

    A synchronous round is made, filled and finalized as one. In asynchronous mode one round stays
    open for good: devices are assigned again one by one, and blocks step one by one.

    Args:
        round_num: From 1.
        versions: By shared block, its newest version.
        blocks: The shared ones by name.
        weigh: An update's examples to its weight, which staleness reduces.
        max_staleness: An update may be based on a version so much older than the newest.
        max_norm: A longer delta is scaled down to it; 0: never.
        is_deterministic: The order in which updates arrive makes no difference at all.
        new_keep: Called for each block and version; as of `Buffer`.
    """

    def __init__(
        self,
        round_num: int,
        versions: Mapping[str, int],
        blocks: Mapping[str, Block],
        aggregator: Aggregator[Any],
        *,
        weigh: Weighting = float,
        max_staleness: int = 0,
        max_norm: float = 0.0,
        is_deterministic: bool = False,
        new_keep: Callable[[], Keep] = lambda: in_memory,
    ) -> None:
        self.round_num = round_num
        self.cohort: dict[str, Assignment] = {}  # by device, its newest
        self.reports: dict[str, Report] = {}  # by device, on its newest assignment
        self._is_deterministic = is_deterministic
        self._new_keep = new_keep
        self.buffers = {name: self._buffer(block, aggregator) for name, block in blocks.items()}
        self._open: dict[str, float] = {}  # deadlines of those at work, the earliest first
        self._excused: set[str] = set()  # those of them that leave their task out
        self._sent: dict[str, dict[str, bytes]] = {}  # by device and block: an update_id
        self._versions = dict(versions)
        self._blocks = blocks
        self._held: dict[str, list[BlockUpdate]] = {}
        self._keep_held = new_keep()
        self._weigh = weigh
        self._max_staleness = max_staleness
        self._max_norm = max_norm

    # Assignments

    def assign(self, device: str, assignment: Assignment, deadline_s: float = math.inf) -> None:
        """Asks a device; its assignment before, if any, is over."""
        self.give_up(device)
        self.reports.pop(device, None)
        self._sent.pop(device, None)
        self.cohort[device] = assignment
        self._open[device] = deadline_s

    def reopen(self, device: str, deadline_s: float) -> None:
        """Waits once more for what a device was last asked for."""
        self.give_up(device)  # the earliest deadline stays the first
        self._open[device] = deadline_s

    def give_up(self, device: str) -> None:
        """Waits no longer for a device; what it sends counts as before."""
        self._open.pop(device, None)
        self._excused.discard(device)

    def remove(self, device: str) -> None:
        """Takes nothing more from a device; its updates that count do so still."""
        self.give_up(device)
        self.cohort.pop(device, None)
        self.reports.pop(device, None)

    def excuse(self, device: str, round_num: int) -> bool:
        """Whether a device is at work on that task, which it leaves out from now on.

        It keeps its deadline: where nobody has reported, a round that closed at once would be
        followed by others like it.
        """
        if not self.is_open(device) or self.cohort[device].round_num != round_num:
            return False
        if device in self._excused:
            return False
        self._excused.add(device)
        return True

    def expect(self, device: str) -> None:
        """Waits for a device, whatever it has said before."""
        self._excused.discard(device)

    def is_open(self, device: str) -> bool:
        """Whether the device was asked and has neither reported nor missed its deadline."""
        return device in self._open

    @property
    def num_open(self) -> int:
        """The devices that are at work."""
        return len(self._open)

    @property
    def deadline_s(self) -> float | None:
        """When the next deadline is missed; None where nobody is at work."""
        return next(iter(self._open.values()), None)

    def expire(self, now_s: float) -> list[str]:
        """The devices that have missed their deadline: nobody waits for them any longer."""
        missed = [device for device, deadline_s in self._open.items() if deadline_s <= now_s]
        for device in missed:
            self.give_up(device)
        return missed

    def is_complete(self, num_enough: int) -> bool:
        """Whether so many devices have reported, or all that still may.

        Those that are excused are waited for only where there is no report at all.
        """
        waited_for = self._open.keys() - (self._excused if self.reports else set())
        return len(self.reports) >= num_enough or not waited_for

    # Updates

    def refuse(self, device: str, update: Announced) -> Refusal | None:
        """Why this update does not count; None when it does. Changes nothing."""
        if refusal := self._refuse_round(device, update.round_num):
            return refusal
        block = update.block
        if block not in self.cohort[device].blocks:
            return Refusal("foreign", f"device {device} was not asked for the block {block}")
        known = self._sent.get(device, {}).get(block)
        if known == update.update_id:
            return None
        if known is not None:
            return Refusal("duplicate", f"device {device} has sent another update of block {block}")
        newest, base = self._versions[block], update.base_version
        if base > newest or (base < newest and not self._max_staleness):
            return Refusal("stale", f"block {block}: base version {base}, expected {newest}")
        if newest - base > self._max_staleness:
            return Refusal(
                "stale",
                f"block {block}: base version {base} is too stale, the newest is {newest} and "
                f"at most {self._max_staleness} behind it count",
            )
        return None

    def has(self, device: str, update: Announced) -> bool:
        """Whether this very update counts already: a redelivery changes nothing."""
        return self._sent.get(device, {}).get(update.block) == update.update_id

    def add(self, update: BlockUpdate) -> None:
        """Counts an update that `refuse` lets pass, once however often it comes."""
        if self.has(update.device, update):
            return
        self.note(update.device, update.block, update.update_id)
        if update.block in self._held:
            if self.buffers[update.block].keeps_deltas:
                update = replace(update, encoded=self._keep_held(update.encoded, update.update_id))
            self._held[update.block].append(update)
        else:
            self.buffer(update)

    def note(self, device: str, block: str, update_id: bytes) -> None:
        """Knows from now on that this device has sent its update of this block."""
        self._sent.setdefault(device, {})[block] = update_id

    def buffer(self, update: BlockUpdate) -> None:
        """Adds to the block's next version, with a weight by examples and staleness."""
        staleness = self._versions[update.block] - update.base_version
        weight = self._weigh(update.num_examples) * staleness_factor(staleness)
        if self._max_norm:
            update = replace(update, encoded=clip(update.encoded, self._max_norm))
        self.buffers[update.block].add(update, weight)

    def hold(self, blocks: Collection[str]) -> None:
        """Leaves those blocks' buffers as they are: updates that come wait for `release`."""
        self._held = {name: [] for name in blocks}
        self._keep_held = self._new_keep()

    def release(self) -> None:
        """Buffers what came since `hold`, by the versions that there are now."""
        held, self._held = self._held, {}
        for update in (one for updates in held.values() for one in updates):
            self.buffer(update)

    def results(self, blocks: Collection[str]) -> dict[str, BlockResult]:
        """What those blocks' buffers hold; changes nothing."""
        return {name: self.buffers[name].result() for name in blocks}

    def full(self, sizes: Callable[[str], int], quorums: Callable[[str], int]) -> list[str]:
        """The blocks with so many updates as ``sizes`` says, of so many devices as ``quorums``."""
        return [
            name
            for name, buffer in self.buffers.items()
            if len(buffer) >= sizes(name) and buffer.num_holders >= quorums(name)
        ]

    def step(self, block: str, version: int, aggregator: Aggregator[Any]) -> None:
        """The buffer's updates were consumed; the block's newest version is now this one."""
        self._versions[block] = version
        self.buffers[block] = self._buffer(self._blocks[block], aggregator)

    def _buffer(self, block: Block, aggregator: Aggregator[Any]) -> Buffer:
        return Buffer(block, aggregator, is_ordered=self._is_deterministic, keep=self._new_keep())

    # Reports

    def refuse_report(self, device: str, report: Report) -> Refusal | None:
        """Why this report does not count; None when it does."""
        return self._refuse_round(device, report.round_num)

    def report(self, device: str, report: Report) -> None:
        """Notes that a device has done its task; the first report stands."""
        self.reports.setdefault(device, report)
        self.give_up(device)

    def _refuse_round(self, device: str, round_num: int) -> Refusal | None:
        asked = self.cohort.get(device)
        expected = asked.round_num if asked else self.round_num
        if round_num != expected:
            return Refusal("late", f"round {round_num} is closed, round {expected} is open")
        if asked is None:
            text = f"device {device} is not in the cohort of round {self.round_num}"
            return Refusal("foreign", text)
        return None


def mean_loss(reports: Collection[Report]) -> float | None:
    """The devices' training losses, weighted by examples; None without a report, or too large."""
    total = sum(report.num_examples for report in reports)
    if not total:
        return None
    mean = sum(report.loss * report.num_examples for report in reports) / total
    return mean if math.isfinite(mean) else None
