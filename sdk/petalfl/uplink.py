"""Delivers a message or a block update until the server's receipt ends it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from petalfl import topics, wire
from petalfl.backoff import delays
from petalfl.errors import TransportError
from petalfl.store import Outgoing
from petalfl.transport import Transport
from petalfl.waiting import within

log = logging.getLogger("petalfl.uplink")

MOST_ASKED = 3  # times that a server is sent what it says is missing, without a pause
WINDOW = 8  # chunks on their way to the broker at once
RECEIPT_TIMEOUT_S = 10.0
BACKOFF_S = (0.5, 30.0)


class Uplink:
    """One device's way up. Feed it every receipt that arrives.

    A PUBACK is no delivery: brokers drop acknowledged messages when a queue is full. So what
    got no receipt is asked about again, and the server names the chunks that it lacks.
    """

    def __init__(self, transport: Transport, federation: str, device: str) -> None:
        self._transport = transport
        self._federation = federation
        self._device = device
        self._waiting: dict[bytes, asyncio.Future[wire.Receipt]] = {}
        self._judges: dict[bytes, Callable[[wire.Receipt], None]] = {}

    def receive(self, receipt: wire.Receipt) -> None:
        """Hands in a receipt from the server."""
        future = self._waiting.get(receipt.update_id)
        if future is not None and not future.done():
            future.set_result(receipt)
            self._judges[receipt.update_id](receipt)

    async def deliver(
        self,
        outgoing: Outgoing,
        on_receipt: Callable[[wire.Receipt], None] = lambda receipt: None,
    ) -> wire.Receipt:
        """Sends until the server has accepted or rejected it; returns that receipt.

        ``on_receipt`` gets every receipt when it comes, also where the delivery is given up before
        it can return.

        Of an update in several chunks it asks first what the server wants: it may have no room
        yet, and then answers when it has, or may not want it at all. A last word that comes before
        everything is sent ends the sending, too.
        """
        message = wire.decode(outgoing.message)
        assert isinstance(message, (wire.UpdateManifest, wire.Report))
        chunks = list(wire.split_chunks(message.update_id, outgoing.payload))
        self._judges[message.update_id] = on_receipt
        try:
            return await self._until_judged(message, chunks)
        finally:
            del self._judges[message.update_id]

    async def ask(self, outgoing: Outgoing) -> wire.Receipt | None:
        """What has become of an update, asked once and without sending it.

        None where the server has not got all of it, or nobody answers.
        """
        message = wire.decode(outgoing.message)
        assert isinstance(message, wire.UpdateManifest)
        self._judges[message.update_id] = lambda receipt: None
        try:
            receipt = await self._attempt(message, [], is_known=False)
        except (TransportError, asyncio.TimeoutError):
            return None
        finally:
            del self._judges[message.update_id]
        return None if receipt.status == "missing" else receipt

    async def _until_judged(
        self, message: wire.UpdateManifest | wire.Report, chunks: list[wire.Chunk]
    ) -> wire.Receipt:
        missing = set(range(len(chunks))) if len(chunks) == 1 else set()
        is_known = False  # to the server, as a receipt with a bitmap shows
        num_asked = 0
        delay_s = delays(*BACKOFF_S)
        while True:
            try:
                wanted = [chunks[i] for i in sorted(missing)]
                receipt = await self._attempt(message, wanted, is_known)
            except (TransportError, asyncio.TimeoutError) as error:
                log.warning("no receipt yet (%s): asking again", error or "timeout")
                missing, is_known = set(), False  # ask first what has arrived
                late = await self._listen(message.update_id, next(delay_s))
                if late is None:
                    continue
                receipt = late
            if receipt.status != "missing":
                return receipt
            if (num_asked := num_asked + 1) > MOST_ASKED:
                await asyncio.sleep(next(delay_s))
            missing = wire.read_bitmap(receipt.missing, len(chunks))
            is_known = bool(missing)
            missing = missing or set(range(len(chunks)))

    async def _listen(self, update_id: bytes, timeout_s: float) -> wire.Receipt | None:
        """A receipt that comes late, while nothing is sent."""
        future = asyncio.get_running_loop().create_future()
        self._waiting[update_id] = future
        try:
            return await within(timeout_s, future)
        except asyncio.TimeoutError:
            return None
        finally:
            del self._waiting[update_id]

    async def _attempt(
        self,
        message: wire.UpdateManifest | wire.Report,
        chunks: list[wire.Chunk],
        is_known: bool,
    ) -> wire.Receipt:
        future = asyncio.get_running_loop().create_future()
        self._waiting[message.update_id] = future
        sending = asyncio.create_task(self._send(message, chunks, is_known))
        try:
            await asyncio.wait((sending, future), return_when=asyncio.FIRST_COMPLETED)
            if not future.done() or future.result().status == "missing":
                await sending
            return await within(RECEIPT_TIMEOUT_S, future)
        finally:
            del self._waiting[message.update_id]
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)

    async def _send(
        self,
        message: wire.UpdateManifest | wire.Report,
        chunks: list[wire.Chunk],
        is_known: bool,
    ) -> None:
        if isinstance(message, wire.Report):
            topic = topics.request(self._federation, self._device)
            await self._transport.publish(topic, wire.encode(message))
            return
        topic = topics.block_up(self._federation, message.block, self._device)
        if not is_known:
            await self._transport.publish(topic, wire.encode(message))
        window = asyncio.Semaphore(WINDOW)

        async def send_chunk(chunk: wire.Chunk) -> None:
            async with window:
                await self._transport.publish(topic, wire.encode(chunk))

        sending = [asyncio.create_task(send_chunk(chunk)) for chunk in chunks]
        try:
            await asyncio.gather(*sending)
        finally:  # of a failed attempt, nothing stays under way
            for task in sending:
                task.cancel()
            await asyncio.gather(*sending, return_exceptions=True)
        await self._transport.publish(topic, wire.encode(wire.Fin(message.update_id)))
