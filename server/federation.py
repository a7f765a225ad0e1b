"""A federation: devices, block versions, and the steps from one version to the next.

The stateful heart of the server. It runs on the event loop, is told of arrivals by the gateway
and of enrollments by HTTP, and writes to the state before it answers. Whatever arrives ends in
`_advance`, which does what has become due: steps blocks, closes and opens rounds, hands out tasks.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Protocol

from petalfl import wire
from petalfl.control_variates import with_sums
from petalfl.errors import ModelError
from petalfl.model import ModelManifest

from .aggregators import parse_aggregator
from .config import Config
from .control_variates import summed
from .optimizers import parse_optimizer
from .resume import check_owner, round_from_journal
from .roster import Roster
from .rounds import Announced, Assignment, Refusal, Round, mean_loss
from .shared_blocks import SharedBlocks
from .state import Closing, Entry, ServerState, StateError, StoredVersion
from .stepping import Step, make_step, on_own_thread
from .tally import Tally
from .tasks import make_task
from .traffic import Traffic

log = logging.getLogger("petalfl.server")

RETRY_S = 10.0  # until what the disk has refused is tried again


class Sender(Protocol):
    """What the federation needs of the gateway."""

    def send_task(self, device: str, message: wire.Task | wire.Finish) -> None:
        """Tells a device what to do."""

    def publish_version(self, block: str, version: wire.BlockVersion) -> None:
        """Tells everybody of a block's newest version."""


class Federation:
    """Runs the rounds of one model.

    Args:
        state: Open; a round that was open when the server stopped is taken up again.
        now_s: The wall clock, in seconds since the epoch.

    Attributes:
        roster: The devices that are ready.
        refused: Updates and reports that did not count, by `Refusal.kind`.
        served: The model as its blocks travel: with control variates, if there are any.

    Raises:
        ConfigError: The data folder belongs to another model, sharing scheme or mode.
    """

    def __init__(
        self,
        config: Config,
        manifest: ModelManifest,
        state: ServerState,
        now_s: Callable[[], float] = time.time,
    ) -> None:
        self.config = config
        self.manifest = manifest
        self.finished = asyncio.Event()
        self.round: Round | None = None
        self.refused: Counter[str] = Counter()
        self._state = state
        self._now_s = now_s
        self._sender: Sender | None = None
        self._timer: asyncio.Handle | None = None
        self._stepping: asyncio.Task[None] | None = None
        self._tally = Tally()
        self._traffic = Traffic()
        self.served = with_sums(manifest) if config.has_scaffold else manifest
        check_owner(state, config, manifest)
        self.shared = SharedBlocks(
            state, self.served, config.artifacts, config.private_blocks, config.private_tensors
        )
        self.roster = Roster(self.shared.blocks, state.candidates())
        self._use(config)
        unclosed = state.unclosed_round()
        if unclosed is not None:  # before anything arrives: its updates must not be refused
            self.round = self._from_journal(unclosed.round_num)
            log.info("round %d goes on with %d of %d reports", self.round.round_num,
                     len(self.round.reports), len(self.round.cohort))  # fmt: skip
        elif self._is_over():
            self.finished.set()

    def start(self, sender: Sender) -> None:
        """Publishes the versions and goes on where the last run stopped."""
        self._sender = sender
        for name, pointer in self.shared.pointers.items():
            sender.publish_version(name, pointer)
        for device in self.roster.ready:
            self._answer_ready(device)
        self._advance()

    def close(self) -> None:
        """Stops the clock; an open round stays open in the state."""
        self._set_timer(None)
        self._sender = None
        if self._stepping is not None:  # nothing is lost: its updates are in the journal
            self._stepping.cancel()
        self.flush_traffic()

    def reconfigure(self, config: Config) -> None:
        """Goes by other settings, from the next round on where one is open.

        Model, places, sharing, mode and seed must be the same.
        """
        self._next_config = config
        if self.round is None:
            self._use(config)
            self._advance_soon()

    @property
    def round_num(self) -> int:
        """The open round, or the last one that was closed."""
        return self.round.round_num if self.round else self._state.last_closed_round()

    # What devices say (the gateway's `Judge`)

    def on_ready(self, device: str, ready: wire.Ready) -> None:
        """Sends the device's open task or the end, or waits until there is a task for it."""
        enrolled = self._state.modalities(device)
        try:
            if enrolled is None or not set(ready.modalities) <= set(enrolled):
                raise ModelError(f"it enrolled with {enrolled}")
            self.roster.ready[device] = self.shared.held_with(ready.modalities, ready.tasks)
            self.roster.codecs[device] = ready.codecs
            self._warn_of_budget(device)
        except ModelError as error:
            log.warning("device %s with %s cannot take part: %s", device, ready, error)
            return
        if self._sender is not None:
            self._answer_ready(device)
            self._advance()

    def on_offline(self, device: str) -> None:
        """The device takes no part in the rounds to come until it is ready again."""
        self.roster.ready.pop(device, None)

    def remove(self, device: str) -> None:
        """Goes on without a device that is not enrolled any longer."""
        self.roster.ready.pop(device, None)
        if self.round is not None:
            self.round.remove(device)
            self._advance_soon()

    def on_question(self, device: str, update_id: bytes) -> wire.Receipt | None:
        """The receipt once more, of whatever round the update is; None where there was none."""
        entry = self._state.find_update(update_id)
        return None if entry is None or entry.device != device else self._again(update_id, entry)

    def on_manifest(self, device: str, manifest: wire.UpdateManifest) -> wire.Receipt | None:
        """The receipt of an update whose payload need not come."""
        if receipt := self._known(device, manifest):
            return receipt
        refusal = self._refuse(device, manifest)
        return self._rejected(manifest.update_id, refusal) if refusal else None

    def on_update(self, update: wire.BlockUpdate) -> wire.Receipt:
        """Counts an update once; it is in the journal before its receipt exists."""
        if receipt := self._known(update.device, update):
            return receipt
        if refusal := self._refuse(update.device, update):
            log.warning("refused an update: %s", refusal.reason)
            return self._rejected(update.update_id, refusal)
        assert self.round is not None
        self._state.journal_update(update)
        self.round.add(update)
        self.roster.note_sent(update)
        self._warn_of_quorum(update.block)
        self._advance_soon()
        return wire.Receipt(update.update_id, "accepted")

    def _known(self, device: str, update: Announced) -> wire.Receipt | None:
        """The receipt of an update that was counted before; None of one that is new."""
        entry = self._state.find_update(update.update_id)
        if entry is None:
            return None
        if entry.is_of(device, update):
            return self._again(update.update_id, entry)
        refusal = self._refuse(device, update) or Refusal("duplicate", "its update_id is another's")
        return self._rejected(update.update_id, refusal)

    def _again(self, update_id: bytes, entry: Entry) -> wire.Receipt:
        if entry.version == 0:
            text = f"round {entry.closed_in} closed without a new version of block {entry.block}"
            return self._rejected(update_id, Refusal("late", text))
        return wire.Receipt(update_id, "accepted")

    def _refuse(self, device: str, update: Announced) -> Refusal | None:
        """Why a new update of this device does not count; None when it does."""
        if self.round is None:
            return Refusal("late", "no round is open")
        refusal = self.round.refuse(device, update)
        if refusal is None and self._stepping is not None and not self.config.is_async:
            refusal = Refusal("late", f"round {self.round_num} is closing")
        return refusal

    def on_report(self, device: str, report: wire.Report) -> wire.Receipt:
        """Notes that a device has done its task."""
        if self.round is None:
            return self._rejected(report.update_id, Refusal("late", "no round is open"))
        if refusal := self.round.refuse_report(device, report):
            return self._rejected(report.update_id, refusal)
        self._state.journal_report(device, report, self.round.round_num, self._now_s())
        if device not in self.round.reports:
            self.roster.note_report(device, report, asyncio.get_running_loop().time())
        self.round.report(device, report)
        self._advance_soon()
        return wire.Receipt(report.update_id, "accepted")

    def on_excuse(self, device: str, excuse: wire.Excuse) -> None:
        """Waits for the device no longer than for those that do report."""
        if self.round is not None and self.round.excuse(device, excuse.round_num):
            log.debug("round %d: device %s leaves it out", self.round_num, device)
            self._advance_soon()

    async def commit(self) -> None:
        """Makes durable what has been accepted so far; receipts wait for it."""
        await self._state.commit()

    def on_bytes_up(self, device: str, block: str, num_bytes: int) -> None:
        """Counts traffic of the open round."""
        if block in self.shared.blocks:
            self._traffic.add(self._traffic_round, device, block, up=num_bytes)

    def on_bytes_down(self, device: str, block: str, num_bytes: int) -> None:
        """Counts traffic of the open round; between rounds, of the one to come."""
        self._traffic.add(self._traffic_round, device, block, down=num_bytes)

    def flush_traffic(self) -> None:
        """Writes the traffic counted so far to the state, if the disk takes it."""
        try:
            self._state.add_traffic(self._traffic.counts)
        except sqlite3.Error as error:
            log.error("cannot write the traffic, which is counted on: %s", error)
        else:
            self._traffic.clear()

    def _rejected(self, update_id: bytes, refusal: Refusal) -> wire.Receipt:
        self.refused[refusal.kind] += 1
        self._tally.num_late += refusal.kind in ("late", "stale")
        return wire.Receipt(update_id, "rejected", refusal.reason[:256])

    @property
    def _traffic_round(self) -> int:
        return self.round.round_num if self.round else self._state.last_closed_round() + 1

    # What becomes due

    def _advance_soon(self) -> None:
        """Later, so that the receipt which completes a round goes out before the next task."""
        if self._sender is not None:
            asyncio.get_running_loop().call_soon(self._advance)

    def _advance(self) -> None:
        if self._sender is None or self._stepping is not None:  # which ends in `_advance`
            return
        try:
            self._do_what_is_due()
        except (StateError, sqlite3.Error) as error:  # the disk is full, say
            self._wait(error)
        else:
            self._set_timer(self.round.deadline_s if self.round else None)

    def _wait(self, why: object) -> None:
        """Tries again later what could not be done now."""
        log.error("round %d has to wait: %s", self.round_num, why)
        self._set_timer(asyncio.get_running_loop().time() + RETRY_S)

    def _do_what_is_due(self) -> None:
        if self.round is not None:
            self._give_up_late()
        if self.round is not None and (due := self._due_blocks()) is not None:
            self.round.hold(due)
            self._stepping = asyncio.create_task(self._step(self.round, due), name="step")
            return
        if self.round is None and not self._is_over():
            self._open_round()
        if self.round is None and self._is_over() and not self.finished.is_set():
            self._finish()
        if self.round is not None and self.config.is_async:
            self._ask_the_idle()

    def _ask_the_idle(self) -> None:
        """Asynchronously, every ready device has a task."""
        assert self.round is not None
        idle = [device for device in self.roster.ready if not self.round.is_open(device)]
        cohort = {device: self._next_assignment(device) for device in idle}
        if cohort:
            self._state.add_tasks(self.round.round_num, cohort, self._now_s())
            self._assign(cohort)

    def _give_up_late(self) -> None:
        assert self.round is not None
        if missed := self.round.expire(asyncio.get_running_loop().time()):
            log.warning("round %d: deadline after %g s without %s", self.round_num,
                        self.config.deadline_s, ", ".join(sorted(missed)))  # fmt: skip
        if self.config.is_async:
            for device in missed:
                if device in self.roster.ready:
                    self._answer_ready(device)

    def _due_blocks(self) -> list[str] | None:
        """The blocks that step now; None where it is not yet time."""
        if self.round is None:
            return None
        if self.config.is_async:
            return self.round.full(self.config.buffer_size, self._quorum) or None
        num_enough = self.config.num_enough(len(self.round.cohort))
        return list(self.shared.blocks) if self.round.is_complete(num_enough) else None

    def _quorum(self, block: str) -> int:
        """The devices that a block's next version is made of, at least."""
        return max(self.config.quorum(block), self._aggregator.quorum)

    def _warn_of_quorum(self, block: str) -> None:
        """Once a buffer: it is full, and too few devices have filled it."""
        assert self.round is not None
        buffer, quorum = self.round.buffers[block], self._quorum(block)
        is_full = self.config.is_async and len(buffer) == self.config.buffer_size(block)
        if is_full and buffer.num_holders < quorum:
            log.warning("block %s has updates enough, of %d devices: it waits until they are of %d",
                        block, buffer.num_holders, quorum)  # fmt: skip

    # Rounds

    def _open_round(self) -> None:
        if unclosed := self._state.unclosed_round():  # where the disk failed in between
            self.round = self._from_journal(unclosed.round_num)
            for device in self.roster.ready:
                self._answer_ready(device)
            return
        if len(self.roster.ready) < self.config.min_devices:
            return
        round_num = self._state.last_closed_round() + 1
        chosen = {} if self.config.is_async else self.roster.choose(round_num, self.config)
        cohort = {device: Assignment(round_num, blocks) for device, blocks in chosen.items()}
        self._state.open_round(round_num, cohort, self._now_s())
        self.round = self._from_journal(round_num)
        self._assign(cohort)

    def _next_assignment(self, device: str) -> Assignment:
        """Asynchronously: each device counts its own tasks, on from those of its name before it."""
        round_num = self._state.last_task(device) + 1
        return Assignment(round_num, self.roster.uploads(device, round_num, self.config))

    def _assign(self, cohort: dict[str, Assignment]) -> None:
        assert self.round is not None
        now_s = asyncio.get_running_loop().time()
        for device, assignment in cohort.items():
            self.round.assign(device, assignment, now_s + self.config.deadline_s)
            self.roster.note_asked(device, self.round_num, now_s)
            self._send(device, self._task(device))

    def _from_journal(self, round_num: int) -> Round:
        """A round as the state knows it."""
        deadline_s = asyncio.get_running_loop().time() + self.config.deadline_s
        return round_from_journal(
            round_num, self._state, self.shared, self.config, self._aggregator, deadline_s
        )

    async def _step(self, stepping: Round, names: Collection[str]) -> None:
        """Makes the step on a thread, so that the loop goes on meanwhile, and takes it."""
        is_taken = False
        try:
            bases = {name: self.shared.newest_stored(name) for name in names}
            quorums = {name: self._quorum(name) for name in names}
            work = functools.partial(
                make_step, stepping, bases, quorums, self.shared, self._optimizer
            )
            made = await on_own_thread(work)
            await self._state.commit()
            self._take_step(stepping, made)
        except (StateError, sqlite3.Error) as error:  # the disk is full, say
            self._wait(error)
        except Exception:
            log.exception("round %d cannot step", stepping.round_num)
            self._wait("its updates cannot be aggregated")
        else:
            is_taken = True
        finally:
            stepping.release()
            self._stepping = None
        if is_taken:  # at once: what arrives while no round is open would be refused
            self._advance()

    def _take_step(self, stepping: Round, made: Step) -> None:
        """Blocks with enough updates get their next version; others drop what they have."""
        assert self._sender is not None
        versions = {name: new.stored for name, new in made.versions.items()}
        outcomes = {
            update_id: versions[name].version if name in versions else 0
            for name, result in made.results.items()
            for update_id in result.update_ids
        }
        closing = self._closing(versions)
        self.flush_traffic()
        self._state.step(stepping.round_num, list(versions.values()), outcomes, closing)
        for name, result in made.results.items():
            if new := made.versions.get(name):
                self._sender.publish_version(name, self.shared.install(new))
            count = self._tally.counted if name in versions else self._tally.dropped
            count[name] += len(result.update_ids)
            stepping.step(name, self.shared.versions[name], self._aggregator)
        if closing is not None:
            self._close(stepping, closing)
        self._prune()

    def _prune(self) -> None:
        """Lets go of old versions; what the disk refuses is left to the next step."""
        in_use = self.config.max_staleness + 1 if self.config.is_async else 1
        try:
            self._state.prune_versions(max(self.config.keep_versions, in_use))
        except (StateError, OSError, sqlite3.Error) as error:
            log.error("old versions of blocks are kept: %s", error)

    def _closing(self, versions: Mapping[str, StoredVersion]) -> Closing | None:
        """With the step of all blocks; asynchronously, with the n-th step of the first block."""
        assert self.round is not None
        round_num = self.round.round_num
        if self.config.is_async and all(new.version <= round_num for new in versions.values()):
            return None
        has_next = self.config.is_async and not 0 < self._next_config.num_rounds <= round_num
        loss = mean_loss(self._state.reports_in(round_num))
        return Closing(self._now_s(), loss, self._tally.num_late, has_next)

    def _close(self, closed: Round, closing: Closing) -> None:
        log.info("%s", self._tally.line(closed.round_num, closing.loss, self.shared.blocks))
        self._tally = Tally()
        self.round = None
        if closing.has_next and self._next_config == self.config:
            closed.round_num += 1
            self.round = closed
        else:
            self._use(self._next_config)

    def _finish(self) -> None:
        self.finished.set()
        for device, held in self.roster.ready.items():
            self._send(device, self._last_word(held))

    def _is_over(self) -> bool:
        return 0 < self.config.num_rounds <= self._state.last_closed_round()

    # Tasks

    def _warn_of_budget(self, device: str) -> None:
        if self.roster.ready[device] and not self.roster.uploads(device, 1, self.config):
            log.warning("device %s sends nothing: all of its shared blocks are longer than the "
                        "max-upload-bytes of %d", device, self.config.max_upload_bytes)  # fmt: skip

    def _answer_ready(self, device: str) -> None:
        held = self.roster.ready[device]
        if self.finished.is_set():
            self._send(device, self._last_word(held))
        elif self.round is not None and self._is_asked(device):
            asked = self.round.cohort[device].blocks
            if asked and not asked & held:  # it came back without any of them
                self.round.give_up(device)
                return
            self.round.expect(device)  # it may have something to train on by now
            if not self.round.is_open(device):
                now_s = asyncio.get_running_loop().time()
                self.round.reopen(device, now_s + self.config.deadline_s)
            self._send(device, self._task(device))

    def _is_asked(self, device: str) -> bool:
        """Whether a device's report counts; asynchronously, after its deadline too."""
        assert self.round is not None
        is_late = self.config.is_async and device in self.round.cohort
        return self.round.is_open(device) or (is_late and device not in self.round.reports)

    def _task(self, device: str) -> wire.Task:
        """What it was assigned, as far as it still holds that."""
        assert self.round is not None
        assignment, held = self.round.cohort[device], self.roster.ready[device]
        assignment = assignment._replace(blocks=assignment.blocks & held)
        codec = self.roster.codec(device, self.config)
        task = make_task(assignment, held, self.shared, self.config, self.round_num, codec)
        return replace(task, num_holders=self._num_holders(held))

    def _last_word(self, held: Collection[str]) -> wire.Finish:
        final, fine_tuning = self.shared.pointers_of(held), self.config.fine_tuning
        seed = None if fine_tuning is None else self.config.seed
        return wire.Finish(final, self._num_holders(held), fine_tuning, seed)

    def _num_holders(self, held: Collection[str]) -> dict[str, int] | None:
        """By block with control variates: the devices that hold it, enrolled as they are."""
        if not self.config.has_scaffold:
            return None
        found = dict.fromkeys(sorted(held), 0)
        for modalities, num_devices in self._state.num_devices().items():
            for block in self.shared.held_with(modalities) & found.keys():
                found[block] += num_devices
        return found

    def _send(self, device: str, message: wire.Task | wire.Finish) -> None:
        assert self._sender is not None
        self._sender.send_task(device, message)

    # Settings

    def _use(self, config: Config) -> None:
        self.config = self._next_config = config
        aggregator = parse_aggregator(config.aggregator)
        self._aggregator = summed(aggregator) if config.has_scaffold else aggregator
        self._optimizer = parse_optimizer(config.server_optimizer)
        if not self._is_over():  # more rounds were asked for
            self.finished.clear()

    def _set_timer(self, at_s: float | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
        if at_s is not None:
            self._timer = asyncio.get_running_loop().call_at(at_s, self._advance)
