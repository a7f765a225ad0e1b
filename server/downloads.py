"""Files for devices that have no HTTP: parts of them over MQTT, as they are asked for.

A device may ask for anything, any number of times. It has one request at a time, a newer one takes
the place of the older; what it gets is bounded in bytes and in the server's time; and more is sent
to a device only as it shows that it gets what is sent, or the broker would have to hold it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

from petalfl import topics, wire
from petalfl.errors import PetalError, TransportError
from petalfl.transport import Transport

from .catalog import Catalog, File, NotHeldError, NotServedError

log = logging.getLogger("petalfl.server.downloads")

MAX_PARTS = 8  # on their way to the broker, of all devices
MAX_BYTES_PER_S = 8 << 20  # to one device
MAX_SHARE = 0.05  # of the server's time, for one device
MAX_UNPROVEN_BYTES = 2 << 20  # sent to a device that has not shown that anything comes
FORGIVEN_BYTES_PER_S = 16 << 10  # of those


@dataclass(slots=True)
class _Device:
    """What one device wants, and what it has been sent in vain, for all that is known.

    Attributes:
        wanted: Until all of it is sent.
        ticket: Of the parts sent last.
    """

    wanted: wire.Fetch | None = None
    ticket: bytes = b""
    unproven_bytes: float = 0.0
    since_s: float = 0.0
    work: asyncio.Task[None] | None = None


class Downloads:
    """Serves the files of one federation.

    Args:
        now_s: A clock that never goes back.
    """

    def __init__(
        self,
        transport: Transport,
        federation: str,
        catalog: Catalog,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._transport = transport
        self._federation = federation
        self._catalog = catalog
        self._now_s = now_s
        self._devices: dict[str, _Device] = {}
        self._on_their_way = asyncio.Semaphore(MAX_PARTS)

    async def close(self) -> None:
        """Sends nothing more."""
        work = [one.work for one in self._devices.values() if one.work is not None]
        for task in work:
            task.cancel()
        await asyncio.gather(*work, return_exceptions=True)

    def fetch(self, device: str, wanted: wire.Fetch) -> bool:
        """Answers a request, in the background; False where that was one too many."""
        one = self._devices.setdefault(device, _Device())
        self._forgive(one, wanted.ticket)
        if one.unproven_bytes + wanted.num_bytes > MAX_UNPROVEN_BYTES:
            return False
        is_first = one.wanted is None
        one.wanted = wanted
        if one.work is None or one.work.done():
            one.work = asyncio.get_running_loop().create_task(self._serve(device, one))
        return is_first

    def _forgive(self, one: _Device, ticket: bytes) -> None:
        now_s = self._now_s()
        forgiven = (now_s - one.since_s) * FORGIVEN_BYTES_PER_S
        is_proven = bool(ticket) and ticket == one.ticket
        one.unproven_bytes = 0.0 if is_proven else max(0.0, one.unproven_bytes - forgiven)
        one.since_s = now_s

    async def _serve(self, device: str, one: _Device) -> None:
        """Sends what the device wants, and takes breaks that leave room for others."""
        while (wanted := one.wanted) is not None:
            one.ticket = os.urandom(8)
            offset, end = wanted.offset, wanted.offset + wanted.num_bytes
            while one.wanted is wanted:  # until a newer one takes its place
                started_s = time.perf_counter()
                found = await self._find(device, wanted)
                busy_s = time.perf_counter() - started_s
                async with self._on_their_way:
                    started_s = time.perf_counter()
                    answer = self._answer(device, wanted, found, offset, end, one.ticket)
                    data = wire.encode(answer)
                    busy_s += time.perf_counter() - started_s
                    one.unproven_bytes += len(data)
                    is_sent = await self._publish(device, data)
                if isinstance(answer, wire.Part):
                    offset, end = offset + len(answer.data), min(end, answer.num_bytes)
                is_last = isinstance(answer, wire.Declined) or offset >= end or not is_sent
                if is_last and one.wanted is wanted:
                    one.wanted = None
                await asyncio.sleep(max(len(data) / MAX_BYTES_PER_S, busy_s / MAX_SHARE))

    async def _find(self, device: str, wanted: wire.Fetch) -> File | wire.Declined:
        """What is at the path, or why there is nothing."""
        try:
            file = await self._catalog.find(device, wanted.path)
        except NotServedError as error:
            return wire.Declined(wanted.path, "not-there", str(error)[:256])
        except NotHeldError as error:
            return wire.Declined(wanted.path, "not-held", str(error)[:256])
        except PetalError as error:
            return _failed(device, wanted, error)
        return wire.Declined(wanted.path, "unchanged") if wanted.known == file.sha256 else file

    def _answer(
        self,
        device: str,
        wanted: wire.Fetch,
        found: File | wire.Declined,
        offset: int,
        end: int,
        ticket: bytes,
    ) -> wire.Part | wire.Declined:
        """The part at ``offset``, or why there is none."""
        if isinstance(found, wire.Declined):
            return found
        size = max(0, min(wire.CHUNK_BYTES, end - offset, found.num_bytes - offset))
        try:
            data = bytes(found.read(offset, offset + size))
        except PetalError as error:
            return _failed(device, wanted, error)
        self._catalog.sent(device, found, size)
        return wire.Part(wanted.path, found.sha256, found.num_bytes, offset, ticket, data)

    async def _publish(self, device: str, data: bytes) -> bool:
        try:
            await self._transport.publish(topics.files(self._federation, device), data)
        except TransportError as error:
            log.warning("a part of a file was not sent: %s", error)  # it asks again
            return False
        return True


def _failed(device: str, wanted: wire.Fetch, error: PetalError) -> wire.Declined:
    log.error("cannot serve %s to %s: %s", wanted.path, device, error)
    return wire.Declined(wanted.path, "failed", str(error)[:256])
