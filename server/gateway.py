"""The server's door: MQTT messages in as typed values, typed values out as messages.

Everything that arrives is hostile until decoded. The gateway knows the form of a message and
who sent it (the topic, which the broker's ACL ties to the login); what it means is for the
federation to judge.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections import Counter
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Protocol

from petalfl import topics, wire
from petalfl.errors import WireError
from petalfl.model import Block, ModelManifest
from petalfl.schema import NAME_REGEX
from petalfl.transport import Transport

log = logging.getLogger("petalfl.server.gateway")

MAX_PARTIALS_PER_DEVICE = 4  # a client sends its blocks one after another


class Judge(Protocol):
    """What the gateway hands typed messages to."""

    def on_ready(self, device: str, ready: wire.Ready) -> None:
        """A device can take a task."""

    def on_offline(self, device: str) -> None:
        """A device has left or was lost."""

    def on_update(self, update: wire.BlockUpdate) -> wire.Receipt:
        """A whole, well-formed update; the receipt goes back to its device."""

    def on_report(self, device: str, report: wire.Report) -> wire.Receipt:
        """A device has trained its round."""

    def on_bytes_up(self, device: str, block: str, num_bytes: int) -> None:
        """So many bytes of a block's updates have come from a device."""


@dataclass(slots=True)
class _Partial:
    """An update on its way: its manifest and the chunks that have come."""

    manifest: wire.UpdateManifest
    chunks: dict[int, bytes] = field(default_factory=dict)

    def missing(self) -> set[int]:
        return set(range(wire.num_chunks(self.manifest.num_bytes))) - self.chunks.keys()


class Gateway:
    """Decodes, assembles and answers for one federation.

    Memory for partial transfers is bounded: per device `MAX_PARTIALS_PER_DEVICE` updates, none
    longer than its block.
    """

    def __init__(
        self, transport: Transport, federation: str, manifest: ModelManifest, judge: Judge
    ) -> None:
        self.refused: Counter[str] = Counter()  # by reason
        self._transport = transport
        self._federation = federation
        self._blocks = {block.name: block for block in manifest.blocks if not block.is_frozen}
        self._judge = judge
        self._partials: dict[str, dict[bytes, _Partial]] = {}  # by device, by update_id
        self._offline: set[str] = set()
        self._sending: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """Subscribes to everything that devices send."""
        for topic_filter in topics.from_devices(self._federation):
            await self._transport.subscribe(topic_filter, self._receive)

    async def close(self) -> None:
        """Waits for what is on its way out, then leaves."""
        if self._sending:
            await asyncio.wait(self._sending, timeout=5)
        await self._transport.close()

    def send_task(self, device: str, message: wire.Task | wire.Finish) -> None:
        """Publishes a task to one device, in the background."""
        topic = topics.tasks(self._federation, device)
        self._send(self._transport.publish(topic, wire.encode(message)))

    def publish_version(self, block: str, version: wire.BlockVersion) -> None:
        """Publishes the retained pointer to a block's newest version, in the background."""
        topic = topics.block_meta(self._federation, block)
        self._send(self._transport.publish(topic, wire.encode(version), retain=True))

    def _receive(self, topic: str, payload: bytes) -> None:
        kind, block, device = _split(topic)
        try:
            if not re.fullmatch(NAME_REGEX, device):  # a broker of ours lets no such login in
                raise WireError("the topic names no device")
            message = wire.decode(payload)
            if kind == "up":
                self._judge.on_bytes_up(device, block, len(payload))
                self._receive_up(device, block, message)
            elif kind == "req" and isinstance(message, wire.Ready):
                if device not in self._offline:  # retained by a device that is gone
                    self._judge.on_ready(device, message)
            elif kind == "req" and isinstance(message, wire.Report):
                self._answer(device, self._judge.on_report(device, message))
            elif kind == "status" and isinstance(message, wire.Status):
                if message.is_online:
                    self._offline.discard(device)
                else:
                    self._offline.add(device)
                    self._judge.on_offline(device)
            else:
                raise WireError(f"a {type(message).__name__} does not belong on this topic")
        except WireError as error:
            self.refused["malformed"] += 1
            log.warning("refused a message of %s bytes from %s: %s", len(payload), device, error)

    def _receive_up(self, device: str, block: str, message: wire.Message) -> None:
        partials = self._partials.setdefault(device, {})
        if isinstance(message, wire.UpdateManifest):
            self._begin(device, block, message)
        elif isinstance(message, wire.Chunk):
            partial = partials.get(message.update_id)
            if partial is None:
                return  # its manifest was lost or the server restarted: the Fin will be answered
            self._add_chunk(partial, message)
        elif isinstance(message, wire.Fin):
            self._answer(device, self._finish(device, message.update_id))
        else:
            raise WireError(f"a {type(message).__name__} does not belong on this topic")

    def _begin(self, device: str, block: str, manifest: wire.UpdateManifest) -> None:
        expected = self._blocks.get(block)
        if expected is None or manifest.block != block:
            raise WireError(f"block {manifest.block!r} announced on the topic of {block!r}")
        if manifest.num_bytes != 4 * expected.size:
            raise WireError(
                f"block {block}: {manifest.num_bytes} bytes announced, expected {4 * expected.size}"
            )
        partials = self._partials[device]
        known = partials.get(manifest.update_id)
        if known is None:
            while len(partials) >= MAX_PARTIALS_PER_DEVICE:
                partials.pop(next(iter(partials)))  # the oldest: given up by its sender
            partials[manifest.update_id] = _Partial(manifest)
        elif known.manifest != manifest:
            raise WireError(f"block {block}: another manifest under the same update_id")

    def _add_chunk(self, partial: _Partial, chunk: wire.Chunk) -> None:
        total = partial.manifest.num_bytes
        start = chunk.index * wire.CHUNK_BYTES
        expected = min(wire.CHUNK_BYTES, total - start)
        if len(chunk.data) != expected:
            raise WireError(
                f"chunk {chunk.index} has {len(chunk.data)} bytes, expected {max(expected, 0)}"
            )
        partial.chunks[chunk.index] = chunk.data

    def _finish(self, device: str, update_id: bytes) -> wire.Receipt:
        partials = self._partials[device]
        partial = partials.get(update_id)
        if partial is None:
            return wire.Receipt(update_id, "missing")
        manifest = partial.manifest
        if missing := partial.missing():
            bitmap = wire.missing_bitmap(missing, wire.num_chunks(manifest.num_bytes))
            return wire.Receipt(update_id, "missing", missing=bitmap)
        del partials[update_id]
        payload = b"".join(partial.chunks[i] for i in sorted(partial.chunks))
        block: Block = self._blocks[manifest.block]
        try:
            update = wire.decode_payload(manifest, payload, device, block.size)
        except WireError as error:
            self.refused["payload"] += 1
            return wire.Receipt(update_id, "rejected", str(error))
        receipt = self._judge.on_update(update)
        if receipt.status == "rejected":
            self.refused["update"] += 1
        return receipt

    def _answer(self, device: str, receipt: wire.Receipt) -> None:
        topic = topics.acks(self._federation, device)
        self._send(self._transport.publish(topic, wire.encode(receipt)))

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
