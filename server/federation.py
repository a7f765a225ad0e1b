"""A federation: devices, block versions, and one round after another.

The stateful heart of the server. It runs on the event loop, is told of arrivals by the gateway
and of enrollments by HTTP, and writes to the state before it answers.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import sqlite3
import time
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Protocol

import numpy as np

from petalfl import wire
from petalfl.errors import ModelError
from petalfl.model import Block, ModelManifest, read_artifact
from petalfl.vectors import Vector, from_bytes, to_bytes

from .aggregators import weighted_mean
from .config import Config, ConfigError
from .optimizers import momentum, step
from .rounds import Round
from .schedules import learning_rate
from .state import NewVersion, ServerState, StateError

log = logging.getLogger("petalfl.server")

RETRY_S = 10.0  # until a round that could not be closed is tried again


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

    Raises:
        ConfigError: The data folder belongs to another model or sharing scheme.
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
        self.ready: dict[str, frozenset[str]] = {}  # by device: the shared blocks it holds
        self._state = state
        self._now_s = now_s
        self._sender: Sender | None = None
        self._aggregator = weighted_mean()
        self._optimizer = momentum(config.server_momentum)
        self._deadline: asyncio.TimerHandle | None = None
        self._traffic: dict[tuple[int, str, str], tuple[int, int]] = {}
        self._check_settings()
        self.shared: dict[str, Block] = {
            b.name: b
            for b in manifest.blocks
            if not b.is_frozen and b.name not in config.private_blocks
        }
        self._pointers: dict[str, wire.BlockVersion] = {}
        self._bodies: dict[str, bytes] = {}  # the newest versions, as they are served
        self._load_blocks()
        unclosed = self._state.unclosed_round()
        if unclosed is not None:  # before anything arrives: its updates must not be refused
            self._resume(unclosed.round_num, unclosed.cohort)
        elif self._is_over():
            self.finished.set()

    def start(self, sender: Sender) -> None:
        """Publishes the versions and goes on where the last run stopped."""
        self._sender = sender
        for name, pointer in self._pointers.items():
            sender.publish_version(name, pointer)
        for device in self.ready:
            self._answer_ready(device)

    def close(self) -> None:
        """Stops the clock; an open round stays open in the state."""
        if self._deadline is not None:
            self._deadline.cancel()
        self.flush_traffic()

    @property
    def round_num(self) -> int:
        """The open round, or the last one that was closed."""
        return self.round.round_num if self.round else self._state.last_closed_round()

    @property
    def versions(self) -> dict[str, int]:
        """By shared block, its newest version."""
        return {name: pointer.version for name, pointer in self._pointers.items()}

    def block_body(self, block: str, version: int) -> bytes | None:
        """A version's float32 vector as bytes; None where there is none such."""
        if block not in self.shared:
            return None
        if version == self._pointers[block].version:
            return self._bodies[block]
        if not 1 <= version < self._pointers[block].version:
            return None
        return to_bytes(self._state.read_version(self.shared[block], version)[0])

    def blocks_of(
        self, modalities: Collection[str], tasks: Collection[str] | None = None
    ) -> frozenset[str]:
        """The shared blocks of a device; arguments and errors as of `ModelManifest.blocks_for`."""
        held = {block.name for block in self.manifest.blocks_for(modalities, tasks)}
        return frozenset(held & self.shared.keys())

    # What devices say (the gateway's `Judge`)

    def on_ready(self, device: str, ready: wire.Ready) -> None:
        """Sends the open round's task, the end, or waits for enough devices."""
        enrolled = self._state.modalities(device)
        try:
            if enrolled is None or not set(ready.modalities) <= set(enrolled):
                raise ModelError(f"it enrolled with {enrolled}")
            self.ready[device] = self.blocks_of(ready.modalities, ready.tasks)
        except ModelError as error:
            log.warning("device %s with %s cannot take part: %s", device, ready, error)
            return
        if self._sender is not None:
            self._answer_ready(device)

    def _answer_ready(self, device: str) -> None:
        if self.finished.is_set():
            self._send(device, wire.Finish(self._pointers_for(device)))
        elif self.round is None:
            self._open_round_if_possible()
        elif (
            device not in self.round.reports
            and device in self.round.cohort
            and self.round.cohort[device] <= self.ready[device]  # else it came back with less
        ):
            self._send(device, self._task(device))

    def on_offline(self, device: str) -> None:
        """The device takes no part in the rounds to come until it is ready again."""
        self.ready.pop(device, None)

    def on_update(self, update: wire.BlockUpdate) -> wire.Receipt:
        """Counts an update once; it is in the journal before its receipt exists."""
        if self.round is None:
            return wire.Receipt(update.update_id, "rejected", "no round is open")
        if reason := self.round.refuse(update):
            log.warning("refused an update: %s", reason)
            return wire.Receipt(update.update_id, "rejected", reason[:256])
        if not self.round.has(update):
            if self._state.has_update(update.update_id):
                return wire.Receipt(update.update_id, "rejected", "its update_id is another's")
            self._state.journal_update(update)
            self.round.add(update)
            self._close_round_if_complete()
        return wire.Receipt(update.update_id, "accepted")

    def on_report(self, device: str, report: wire.Report) -> wire.Receipt:
        """Notes that a device has trained."""
        if self.round is None:
            return wire.Receipt(report.update_id, "rejected", "no round is open")
        if reason := self.round.refuse_report(device, report):
            return wire.Receipt(report.update_id, "rejected", reason[:256])
        self._state.journal_report(device, report)
        self.round.report(device, report)
        self._close_round_if_complete()
        return wire.Receipt(report.update_id, "accepted")

    def on_bytes_up(self, device: str, block: str, num_bytes: int) -> None:
        """Counts traffic of the open round."""
        if block in self.shared:
            self._count(device, block, num_bytes, 0)

    def on_bytes_down(self, device: str, block: str, num_bytes: int) -> None:
        """Counts traffic of the open round; between rounds, of the one to come."""
        self._count(device, block, 0, num_bytes)

    # Rounds

    def _open_round_if_possible(self) -> None:
        if self.round is not None or self._is_over():
            return
        if len(self.ready) < self.config.min_devices:
            return
        round_num = self._state.last_closed_round() + 1
        self._state.open_round(round_num, self.ready, self._now_s())
        self._begin(round_num, self.ready)
        for device in self.ready:
            self._send(device, self._task(device))

    def _resume(self, round_num: int, cohort: dict[str, frozenset[str]]) -> None:
        """Takes up an open round from its journal; devices get its task when they are back."""
        resumed = self._begin(round_num, cohort)
        sizes = {name: block.size for name, block in self.shared.items()}
        for update in self._state.journaled_updates(round_num, sizes):
            resumed.add(update)
        for device, report in self._state.journaled_reports(round_num).items():
            resumed.report(device, report)
        log.info("round %d goes on with %d of %d reports", round_num, len(resumed.reports),
                 len(cohort))  # fmt: skip
        self._close_round_if_complete()

    def _begin(self, round_num: int, cohort: dict[str, frozenset[str]]) -> Round:
        self.round = Round(round_num, cohort, self.versions, self.shared, self._aggregator)
        loop = asyncio.get_running_loop()
        self._deadline = loop.call_later(self.config.deadline_s, self._miss_deadline, round_num)
        return self.round

    def _miss_deadline(self, round_num: int) -> None:
        if self.round is not None and self.round.round_num == round_num:
            missing = sorted(self.round.cohort.keys() - self.round.reports.keys())
            log.warning(
                "round %d: deadline after %g s without %s", round_num, self.config.deadline_s,
                ", ".join(missing),
            )  # fmt: skip
            self._close_round()

    def _close_round_if_complete(self) -> None:
        if self.round is not None and self.round.is_complete:
            # Later, so that the receipt which completed the round goes out before the next task.
            asyncio.get_running_loop().call_soon(self._close_complete, self.round)

    def _close_complete(self, complete: Round) -> None:
        if self.round is complete:
            self._close_round()

    def _close_round(self) -> None:
        assert self.round is not None and self._deadline is not None
        self._deadline.cancel()
        closing = self.round
        results = closing.finalize()
        try:
            new = [
                version
                for name, result in results.items()
                if result.delta is not None and (version := self._step(name, result.delta))
            ]
            self.flush_traffic()
            self._state.close_round(closing.round_num, new, closing.loss, self._now_s())
        except (StateError, sqlite3.Error) as error:  # the disk is full, say
            log.error("round %d cannot be closed yet: %s", closing.round_num, error)
            loop = asyncio.get_running_loop()
            self._deadline = loop.call_later(RETRY_S, self._close_complete, closing)
            return
        self.round = None
        for version in new:
            self._install(version.block, version.version, version.parameters)
        _log_round(closing, {name: len(result.holders) for name, result in results.items()})
        if self._is_over():
            self.finished.set()
            for device in self.ready:
                self._send(device, wire.Finish(self._pointers_for(device)))
        self._open_round_if_possible()

    def _step(self, name: str, delta: Vector) -> NewVersion | None:
        """The block's next version; None where it would not be finite, and the old one stays."""
        block, version = self.shared[name], self._pointers[name].version
        parameters, state = self._state.read_version(block, version)
        with np.errstate(over="ignore", invalid="ignore"):
            parameters, state = step(self._optimizer, block, parameters, delta, state)
        if not all(np.isfinite(array).all() for array in (parameters, *state.values())):
            log.error("block %s keeps version %d: the next would not be finite", name, version)
            return None
        return NewVersion(block, version + 1, parameters, state)

    def _is_over(self) -> bool:
        return 0 < self.config.num_rounds <= self._state.last_closed_round()

    def _task(self, device: str) -> wire.Task:
        assert self.round is not None
        config, round_num = self.config, self.round.round_num
        rate = learning_rate(
            config.schedule, config.hyperparameters.learning_rate, round_num, config.num_rounds
        )
        return wire.Task(
            round_num=round_num,
            num_rounds=config.num_rounds,
            hyperparameters=replace(config.hyperparameters, learning_rate=rate),
            seed=config.seed,
            blocks={name: self._pointers[name] for name in sorted(self.round.cohort[device])},
        )

    def _pointers_for(self, device: str) -> dict[str, wire.BlockVersion]:
        return {name: self._pointers[name] for name in sorted(self.ready[device])}

    def _send(self, device: str, message: wire.Task | wire.Finish) -> None:
        assert self._sender is not None
        self._sender.send_task(device, message)

    # Blocks, settings, traffic

    def _load_blocks(self) -> None:
        for name, block in self.shared.items():
            initial = read_artifact(self.config.artifacts, block.artifacts.parameters)
            self._state.add_initial_version(block, from_bytes(initial, block.size))
            version = self._state.newest_versions()[name]
            self._install(block, version, self._state.read_version(block, version)[0])

    def _install(self, block: Block, version: int, parameters: Vector) -> None:
        body = to_bytes(parameters)
        pointer = wire.BlockVersion(version, hashlib.sha256(body).hexdigest())
        self._bodies[block.name], self._pointers[block.name] = body, pointer
        if self._sender is not None:
            self._sender.publish_version(block.name, pointer)

    def _check_settings(self) -> None:
        for key, value in (
            ("model layout", self.manifest.layout_sha256),
            ("private blocks", ",".join(sorted(self.config.private_blocks))),
        ):
            stored = self._state.setting(key, value)
            if stored != value:
                raise ConfigError(
                    f"the data folder {self.config.data_dir} was made for another {key} "
                    f"({stored[:60]!r}, now {value[:60]!r}); choose another --data-dir"
                )

    def _count(self, device: str, block: str, up: int, down: int) -> None:
        open_round = self.round.round_num if self.round else self._state.last_closed_round() + 1
        key = (open_round, device, block)
        before = self._traffic.get(key, (0, 0))
        self._traffic[key] = (before[0] + up, before[1] + down)

    def flush_traffic(self) -> None:
        """Writes the traffic counted so far to the state."""
        self._state.add_traffic(self._traffic)
        self._traffic = {}


def _log_round(closed: Round, num_holders: dict[str, int]) -> None:
    loss = "none" if closed.loss is None else f"{closed.loss:.4f}"
    holders = ", ".join(f"{name} {count}" for name, count in num_holders.items())
    log.info("round %d closed: loss %s, updates: %s", closed.round_num, loss, holders or "none")
