"""The server's door: MQTT messages in as typed values, typed values out as messages.

Everything that arrives is hostile until decoded. The gateway knows the form of a message and
who sent it (the topic, which the broker's ACL ties to the login); what it means is for the
federation to judge.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import sqlite3
import time
from collections import Counter, deque
from collections.abc import Callable, Coroutine
from typing import Protocol

from petalfl import topics, wire
from petalfl.errors import PetalError, WireError
from petalfl.model import ModelManifest
from petalfl.schema import NAME_REGEX
from petalfl.transport import Transport

from .conduct import MALFORMED_BYTES, Conduct, Standing
from .transfers import MAX_ATTEMPTS, MAX_PER_DEVICE, Transfers

log = logging.getLogger("petalfl.server.gateway")

MAX_TRANSFER_BYTES = 64 << 20  # of all unfinished updates; or four of the longest block
TOLERATED_BYTES = 16 << 20  # sent in vain by one device; and four of the longest block
MAX_STATUS_BYTES = 64  # a longer one is none, and need not be read
NUM_ACCEPTED = 64  # remembered by device, to know what it repeats


class Judge(Protocol):
    """What the gateway hands typed messages to."""

    def on_ready(self, device: str, ready: wire.Ready) -> None:
        """A device can take a task."""

    def on_offline(self, device: str) -> None:
        """A device has left or was lost."""

    def on_manifest(self, device: str, manifest: wire.UpdateManifest) -> wire.Receipt | None:
        """An update is announced; its receipt where its payload need not come."""

    def on_question(self, device: str, update_id: bytes) -> wire.Receipt | None:
        """A device asks after an update that is not under way; None where it never came."""

    def on_update(self, update: wire.BlockUpdate) -> wire.Receipt:
        """A whole, well-formed update; the receipt goes back to its device after a `commit`."""

    def on_report(self, device: str, report: wire.Report) -> wire.Receipt:
        """A device has trained its round."""

    def on_excuse(self, device: str, excuse: wire.Excuse) -> None:
        """A device leaves its task out."""

    async def commit(self) -> None:
        """Makes durable what has been accepted so far."""

    def on_bytes_up(self, device: str, block: str, num_bytes: int) -> None:
        """So many bytes of a block's updates have come from a device."""


class Gateway:
    """Decodes, assembles and answers for one federation.

    Args:
        cut_off: Called with the name of a device that sends in vain without end; it should end
            its login at the broker. Called again only where the device is heard again.
        fetch: Called with a device and what it wants of a file; False where that was in vain.
        max_transfer_bytes: Of all unfinished updates; raised to four times the longest block.
        now_s: A clock that never goes back.
    """

    def __init__(
        self,
        transport: Transport,
        federation: str,
        manifest: ModelManifest,
        judge: Judge,
        *,
        cut_off: Callable[[str], None] = lambda device: None,
        fetch: Callable[[str, wire.Fetch], bool] = lambda device, wanted: False,
        max_transfer_bytes: int = MAX_TRANSFER_BYTES,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self.refused: Counter[str] = Counter()  # by reason
        self._transport = transport
        self._federation = federation
        self._blocks = {b.name: b for b in manifest.blocks if not b.is_frozen}
        self._judge = judge
        longest = max((4 * b.size for b in self._blocks.values()), default=0)
        self.transfers = Transfers(max(max_transfer_bytes, 4 * longest), now_s)
        self._conduct = Conduct(TOLERATED_BYTES + 4 * longest, now_s)
        self._cut_off, self._fetch = cut_off, fetch
        self._now_s = now_s
        self._malformed: dict[str, str] = {}  # by device, why one since its last Fin was refused
        self._judged: dict[str, dict[bytes, wire.Receipt]] = {}  # by device, until its Fin comes
        self._has_left: set[str] = set()
        self._unheard: dict[str, wire.Ready] = {}  # of devices that are throttled
        self._timers: dict[str, asyncio.TimerHandle] = {}  # until they are forgiven
        self._accepted: dict[str, deque[bytes]] = {}  # by device, ids of updates and reports
        self._versions: dict[str, wire.BlockVersion] = {}  # as published
        self._is_cut_off: set[str] = set()
        # Receipts wait until they are true after a crash, too; tasks for the receipts before them.
        self._held: list[tuple[str, wire.Receipt | wire.Task | wire.Finish]] = []
        self._committing: asyncio.Task[None] | None = None
        self._sending: set[asyncio.Task[None]] = set()
        self._is_closed = False

    async def open(self) -> None:
        """Subscribes to everything that devices send."""
        for topic_filter in topics.from_devices(self._federation):
            await self._transport.subscribe(topic_filter, self._receive)

    async def close(self) -> None:
        """Hears nothing more, and waits for what is on its way out.

        The transport stays open: it may be that of other federations, too.
        """
        self._is_closed = True
        for timer in self._timers.values():
            timer.cancel()
        if self._committing is not None:
            await asyncio.wait((self._committing,), timeout=5)
        if self._sending:
            await asyncio.wait(self._sending, timeout=5)

    def send_task(self, device: str, message: wire.Task | wire.Finish) -> None:
        """Publishes a task to one device, in the background."""
        if self._is_committing:  # after the receipts that it follows from
            self._held.append((device, message))
        else:
            self._publish(device, message)

    def forget(self, device: str) -> None:
        """Gives up what is under way from a device, and what is known of it."""
        self.transfers.end_all(device)
        self._ask_waiting()
        for known in (self._malformed, self._judged, self._unheard, self._accepted):
            known.pop(device, None)
        self._conduct.forget(device)
        self._is_cut_off.discard(device)

    def publish_version(self, block: str, version: wire.BlockVersion) -> None:
        """Publishes the retained pointer to a block's newest version, in the background."""
        self._versions[block] = version
        topic = topics.block_meta(self._federation, block)
        self._send(self._transport.publish(topic, wire.encode(version), retain=True))

    def publish_versions(self) -> None:
        """Publishes all pointers again, for a broker that has lost what it retained."""
        for block, version in self._versions.items():
            self.publish_version(block, version)

    def _receive(self, topic: str, payload: bytes) -> None:
        kind, block, device = _split(topic)
        is_status = kind == "status" and len(payload) <= MAX_STATUS_BYTES
        if self._is_closed or (self._drops(device, kind, payload) and not is_status):
            return  # a last will counts, whoever was lost
        try:
            if not re.fullmatch(NAME_REGEX, device):  # a broker of ours lets no such login in
                raise WireError("the topic names no device")
            message = wire.decode(payload)
            if kind == "up":
                self._receive_up(device, block, message, len(payload))
            elif kind == "req" and isinstance(message, wire.Ready):
                self._conduct.note(device, len(payload))  # it says so seldom
                if device not in self._has_left:  # retained by a device that is gone
                    self._judge.on_ready(device, message)
            elif kind == "req" and isinstance(message, wire.Report):
                receipt = self._judge.on_report(device, message)
                if receipt.status == "rejected":
                    self._conduct.note(device, len(payload))
                self._answer(device, receipt)
            elif kind == "req" and isinstance(message, wire.Excuse):
                self._conduct.note(device, len(payload))
                self._judge.on_excuse(device, message)
            elif kind == "req" and isinstance(message, wire.Fetch):
                if not self._fetch(device, message):
                    self._conduct.note(device, len(payload))
            elif kind == "status" and isinstance(message, wire.Status):
                self._conduct.note(device, len(payload))
                if message.is_online:
                    self._has_left.discard(device)
                else:
                    self._has_left.add(device)
                    self._unheard.pop(device, None)
                    self._judge.on_offline(device)
            else:
                raise WireError(f"a {type(message).__name__} does not belong on this topic")
        except WireError as error:
            self.refused["malformed"] += 1
            self._conduct.note(device, len(payload), MALFORMED_BYTES)
            if kind == "up":
                self._malformed[device] = str(error)[:256]
            log.warning("refused a message of %s bytes from %s: %s", len(payload), device, error)
        except (PetalError, sqlite3.Error) as error:  # the disk is full, say: it asks again
            self.refused["not stored"] += 1
            log.error("cannot keep what %s sent: %s", device, error)

    def _drops(self, device: str, kind: str, payload: bytes) -> bool:
        standing = self._conduct.standing(device)
        if standing is Standing.GOOD:
            self._is_cut_off.discard(device)  # it has its login still: the broker did not answer
            return False
        self.refused[standing.value] += 1
        self._conduct.note(device, len(payload))
        if standing is Standing.THROTTLED and kind == "req":
            self._keep_ready(device, payload)
        if standing is Standing.CUT_OFF and device not in self._is_cut_off:
            self._is_cut_off.add(device)
            self._unheard.pop(device, None)
            log.error("device %s sends in vain without end: cut off", device)
            self._judge.on_offline(device)
            self._cut_off(device)
        return True

    def _keep_ready(self, device: str, payload: bytes) -> None:
        """It is said once and counts until the device leaves: heard when that is forgiven."""
        with contextlib.suppress(WireError):
            message = wire.decode(payload)
            if isinstance(message, wire.Ready):
                self._unheard[device] = message
                if device not in self._timers:
                    self._hear_later(device)

    def _hear_later(self, device: str) -> None:
        delay_s = self._conduct.forgiven_in_s(device)
        self._timers[device] = asyncio.get_running_loop().call_later(
            delay_s, self._hear_again, device
        )

    def _hear_again(self, device: str) -> None:
        del self._timers[device]
        if device not in self._unheard:
            return
        if self._conduct.standing(device) is not Standing.GOOD:
            self._hear_later(device)
            return
        ready = self._unheard.pop(device)
        if device not in self._has_left:
            self._judge.on_ready(device, ready)

    def _receive_up(self, device: str, block: str, message: wire.Message, num_bytes: int) -> None:
        self._judge.on_bytes_up(device, block, num_bytes)
        if isinstance(message, wire.Chunk):
            self._add_chunk(device, message)
        elif isinstance(message, wire.UpdateManifest):
            self._begin(device, block, message)
        elif isinstance(message, wire.Fin):
            receipt = self._finish(device, message.update_id)
            if receipt is not None:
                self._answer(device, receipt)
        else:
            raise WireError(f"a {type(message).__name__} does not belong on this topic")

    def _begin(self, device: str, block: str, manifest: wire.UpdateManifest) -> None:
        if block not in self._blocks or manifest.block != block:
            raise WireError(f"block {manifest.block!r} announced on the topic of {block!r}")
        wire.check_announced(manifest, self._blocks[block])
        judged = self._judged.setdefault(device, {})
        judged.pop(manifest.update_id, None)
        if receipt := self._judge_early(device, manifest):
            judged[manifest.update_id] = receipt  # the answer to its Fin, which comes next
            if len(judged) > MAX_PER_DEVICE:
                del judged[next(iter(judged))]
            return
        if not self.transfers.announce(device, manifest):
            self._conduct.note(device, 0)
        self._ask_waiting()

    def _add_chunk(self, device: str, chunk: wire.Chunk) -> None:
        transfer = self.transfers.get(device, chunk.update_id)
        # Without one: it waits for room, or is unknown after a restart; its Fin will be answered.
        if transfer is None or not transfer.add(chunk, self._now_s()):
            self._conduct.note(device, len(chunk.data))

    def _finish(self, device: str, update_id: bytes) -> wire.Receipt | None:
        """The answer to a Fin; None where it must wait for its turn."""
        malformed = self._malformed.pop(device, "")
        if receipt := self._judged.get(device, {}).pop(update_id, None):
            return receipt
        transfer = self.transfers.get(device, update_id)
        if transfer is None or transfer.missing:
            self._conduct.note(device, 0)
        if transfer is None:
            if self.transfers.is_waiting(device, update_id):
                return None
            if malformed:  # what was to announce it: to ask for it again would go on forever
                return wire.Receipt(update_id, "rejected", malformed)
            receipt = self._judge.on_question(device, update_id)
            return receipt or wire.Receipt(update_id, "missing")
        if transfer.missing:
            if receipt := self._judge_early(device, transfer.manifest):
                return receipt
            transfer.num_bad_attempts += bool(malformed)
            if transfer.num_bad_attempts < MAX_ATTEMPTS:
                return transfer.request()
            self._end(device, update_id)
            return wire.Receipt(update_id, "rejected", malformed)
        self._end(device, update_id)
        block = self._blocks[transfer.manifest.block]
        payload = transfer.payload.toreadonly()
        try:
            update = wire.decode_payload(transfer.manifest, payload, device, block)
        except WireError as error:
            self.refused["payload"] += 1
            self._conduct.note(device, transfer.manifest.num_bytes)
            return wire.Receipt(update_id, "rejected", str(error))
        return self._counted(device, self._judge.on_update(update))

    def _judge_early(self, device: str, manifest: wire.UpdateManifest) -> wire.Receipt | None:
        """The receipt of an update that need not come, and then nothing of it stays."""
        receipt = self._judge.on_manifest(device, manifest)
        if receipt is None:
            return None
        if self.transfers.is_known(device, manifest.update_id):
            self._end(device, manifest.update_id)
        return self._counted(device, receipt)

    def _counted(self, device: str, receipt: wire.Receipt) -> wire.Receipt:
        if receipt.status == "rejected":
            self.refused["update"] += 1
            self._conduct.note(device, MALFORMED_BYTES)
        return receipt

    def _end(self, device: str, update_id: bytes) -> None:
        self.transfers.end(device, update_id)
        self._ask_waiting()

    def _ask_waiting(self) -> None:
        for begun in self.transfers.begin_waiting():
            self._publish(begun.device, begun.request())

    def _answer(self, device: str, receipt: wire.Receipt) -> None:
        if receipt.status != "accepted":
            self._publish(device, receipt)
            return
        accepted = self._accepted.setdefault(device, deque(maxlen=NUM_ACCEPTED))
        if receipt.update_id in accepted:
            self._conduct.note(device, 0)
        else:
            accepted.append(receipt.update_id)
        self._held.append((device, receipt))
        if not self._is_committing:
            self._committing = asyncio.create_task(self._commit())

    @property
    def _is_committing(self) -> bool:
        return self._committing is not None and not self._committing.done()

    async def _commit(self) -> None:
        """Lets receipts go once what they say is durable; more gather meanwhile."""
        while self._held:
            held, self._held = self._held, []
            try:
                await self._judge.commit()
            except (PetalError, sqlite3.Error) as error:
                kept = [one for one in held if not isinstance(one[1], wire.Receipt)]
                self.refused["not stored"] += len(held) - len(kept)
                log.error("%d receipts are held back: %s", len(held) - len(kept), error)
                held = kept
            for device, message in held:
                self._publish(device, message)

    def _publish(self, device: str, message: wire.Receipt | wire.Task | wire.Finish) -> None:
        address = topics.acks if isinstance(message, wire.Receipt) else topics.tasks
        topic = address(self._federation, device)
        self._send(self._transport.publish(topic, wire.encode(message)))

    def _send(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._sending.add(task)
        task.add_done_callback(self._sent)

    def _sent(self, task: asyncio.Task[None]) -> None:
        self._sending.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.warning("a message was not sent: %s", error)  # the device asks again


def _split(topic: str) -> tuple[str, str, str]:
    """Kind, block (or empty) and device of a topic that matched `topics.from_devices`."""
    levels = topic.split("/")[3:]
    if levels[0] == "blocks":
        return "up", levels[1], levels[3]
    if levels[0] == "req":
        return "req", "", levels[1]
    return "status", "", levels[1]
