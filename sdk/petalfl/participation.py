"""A device's part in a federation while it is connected: tasks come down, updates go up."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import logging
from collections.abc import Callable

from petalfl import topics, wire
from petalfl.backoff import delays
from petalfl.callbacks import Callbacks
from petalfl.downlink import Downlink
from petalfl.errors import PetalError, StoreError, TransportError, WireError, printable
from petalfl.inbox import Inbox
from petalfl.logs import RareLog
from petalfl.metering import ByteMeter, MeteredTransport
from petalfl.mqtt import Endpoint, MqttTransport
from petalfl.pacing import Pacing, Stopped
from petalfl.source import NotThereError
from petalfl.store import Identity, Outgoing
from petalfl.threads import Threads, result_of
from petalfl.trainer import Trainer
from petalfl.transport import Transport
from petalfl.uplink import Uplink
from petalfl.waiting import within
from petalfl.ways import Session

log = logging.getLogger("petalfl.client")
BACKOFF_S = (0.5, 30.0)
GOODBYE_TIMEOUT_S = 1.0
ROOM_BYTES = 16 << 10  # for a round's other messages
REST_POLL_S = 60.0  # how often a client that rests looks at the clock
ANNOUNCE_PAUSE_S = 0.1


class Participation:
    """One run's, from the connection to the goodbye; made and used on one event loop.

    Args:
        identity: Under which the device connects.
        pacing: Stopped when the run ends, so that training gives way.
        meter: Of the day's bytes, if they are limited; the downlink's count there, too.
    """

    def __init__(
        self,
        identity: Identity,
        trainer: Trainer,
        downlink: Downlink,
        callbacks: Callbacks,
        pacing: Pacing,
        threads: Threads,
        meter: ByteMeter | None = None,
    ) -> None:
        self._identity = identity
        self._trainer, self._downlink = trainer, downlink
        self._callbacks, self._pacing, self._call = callbacks, pacing, threads.call
        self._meter, self._is_resting = meter, False
        self._inbox = Inbox()
        self._stopped = asyncio.Event()
        self._transport: Transport | None = None
        self._announced: wire.Ready | None = None
        self._announcing: asyncio.Future[None] | None = None
        self._must_announce = False
        self._log = RareLog(log)

    def stop(self) -> None:
        """Makes `run` end."""
        self._stopped.set()

    def announce_changes(self) -> None:
        """Tells the server of other modalities or tasks than it was told of."""
        if self._announced is not None and self._trainer.ready != self._announced:
            self._announce_soon()

    async def run(self, session: Session, get_ready: Callable[[], None]) -> None:
        """Takes part until the federation's last round, or `stop`; errors as `EdgeClient.arun`.

        Args:
            get_ready: Gets the model and checks the data, on a thread, once there is a connection.
        """
        try:
            await self._until_stopped(asyncio.create_task(self._take_part(session, get_ready)))
        finally:  # however it ends: no later round waits for this device
            await self._leave()
            if self._meter is not None:
                self._meter.save()

    async def _take_part(self, session: Session, get_ready: Callable[[], None]) -> None:
        self._transport = await self._connect(session)
        if self._meter is not None:
            self._transport = MeteredTransport(self._transport, self._meter.count)
        uplink = Uplink(self._transport, self._identity.federation, self._identity.device)
        self._downlink.attach(functools.partial(self._send, asyncio.get_running_loop()))
        handler = functools.partial(self._receive, uplink)
        await self._transport.subscribe(self._topic(topics.all_down), handler)
        await self._call(get_ready)
        await self._announce()
        finish = await self._work(uplink)
        await self._leave()  # this may take long, and nothing more is to be said
        await self._call(self._trainer.fine_tune, finish)

    # The connection

    async def _connect(self, session: Session) -> Transport:
        # The same after a restart, so that it ends a connection before; a guess would end this one.
        secret = hashlib.sha256(self._identity.password.encode()).hexdigest()[:16]
        transport = MqttTransport(
            Endpoint(session.mqtt_host, session.mqtt_port, session.mqtt_is_tls),
            login=(self._identity.device, self._identity.password),
            client_id=f"{self._identity.federation}-{self._identity.device}-{secret}",
            will=(self._topic(topics.status), wire.encode(wire.Status(is_online=False))),
            on_connect=self._reconnected,
            on_trouble=self._callbacks.survived,
            tls=self._downlink.tls,
        )
        try:
            await transport.connect()
        except BaseException:  # for one, it was stopped
            await transport.close()
            raise
        return transport

    async def _leave(self) -> None:
        """Says goodbye, if it is connected."""
        if self._announcing is not None:
            self._announcing.cancel()
        if (transport := self._transport) is None:
            return
        with contextlib.suppress(TransportError, asyncio.TimeoutError):
            await within(GOODBYE_TIMEOUT_S, self._publish_status(False))
        await transport.close()
        self._transport = None

    def _topic(self, name: Callable[[str, str], str]) -> str:
        return name(self._identity.federation, self._identity.device)

    async def _announce(self) -> None:
        """Says that the device is here and can take a task, at the start and after a break."""
        assert self._transport is not None
        if self._is_resting:
            return
        self._announced = ready = self._trainer.ready
        await self._publish_status(True)
        await self._transport.publish(self._topic(topics.request), wire.encode(ready), retain=True)

    def _reconnected(self) -> None:
        self._downlink.reconnected()
        if self._announced is not None:
            self._announce_soon()

    def _send(self, loop: asyncio.AbstractEventLoop, message: wire.Fetch) -> None:
        """Publishes a request for a part of a file; called on a thread."""
        assert self._transport is not None
        work = self._transport.publish(self._topic(topics.request), wire.encode(message))
        sending = asyncio.run_coroutine_threadsafe(work, loop)
        try:
            result_of(sending, self._pacing.check)
        except BaseException:
            sending.cancel()
            raise

    def _announce_soon(self) -> None:
        """At once, or after the one under way: a server that wants it cannot pile them up."""
        self._must_announce = True
        if self._transport is not None and (self._announcing is None or self._announcing.done()):
            self._announcing = asyncio.ensure_future(self._announce_while_due())
            self._announcing.add_done_callback(_log_failure)

    async def _announce_while_due(self) -> None:
        while self._must_announce:
            self._must_announce = False
            await self._announce()
            await asyncio.sleep(ANNOUNCE_PAUSE_S)

    async def _publish_status(self, is_online: bool) -> None:
        assert self._transport is not None
        status = wire.encode(wire.Status(is_online))
        await self._transport.publish(self._topic(topics.status), status, retain=True)

    def _receive(self, uplink: Uplink, topic: str, payload: bytes) -> None:
        try:
            message = wire.decode(payload)
        except WireError as error:
            self._log.warning("ignored a malformed message on %s: %s", topic, error)
            return
        if isinstance(message, wire.Receipt):
            uplink.receive(message)
        elif isinstance(message, (wire.Task, wire.Finish)):
            self._inbox.put(message)
        elif isinstance(message, (wire.Part, wire.Declined)):
            self._downlink.receive(message)

    async def _until_stopped(self, worker: asyncio.Task[None]) -> None:
        stopped = asyncio.create_task(self._stopped.wait())
        try:
            await asyncio.wait((worker, stopped), return_when=asyncio.FIRST_COMPLETED)
            if worker.done() and not self._stopped.is_set():
                with contextlib.suppress(Stopped):  # it may know before the loop does
                    worker.result()
        finally:
            self._pacing.stop()  # training gives way within a batch
            stopped.cancel()
            worker.cancel()
            with contextlib.suppress(asyncio.CancelledError, PetalError, Stopped):
                await worker

    # Tasks

    async def _work(self, uplink: Uplink) -> wire.Finish:
        """Until the last round is over, and its blocks are here."""
        doubted = 0  # a round long trained, of which the server was asked whether it means it
        trainer = self._trainer
        while True:
            task = await self._inbox.get()
            trainer.check_blocks(task)
            is_new = isinstance(task, wire.Finish) or task.round_num > trainer.state.round_num
            if is_new:
                await self._ask_for_controls(uplink)
                if not await self._has_room(task):
                    continue
            if isinstance(task, wire.Finish):
                if await self._fetch_patiently(task):
                    await self._call(trainer.empty_outbox)  # nothing counts any longer
                    return task
                continue
            if task.round_num > trainer.state.round_num or task.round_num == doubted:
                doubted = 0
                if not await self._fetch_patiently(task):
                    continue
                is_trained = await self._call(trainer.train_round, task)
                self.announce_changes()  # an example store may have lost the last of a modality
                if not is_trained:
                    await self._excuse(task)
                    continue
            elif task.round_num < trainer.state.round_num or not trainer.state.outbox:
                # A replay; or the server has gone back to a backup, and then it says it again.
                self._log.warning("ignored a task of round %d, long trained", task.round_num)
                doubted = task.round_num
                self._announce_soon()
                continue
            await self._inbox.unless_over(task.round_num, self._deliver_outbox(uplink))

    async def _excuse(self, task: wire.Task) -> None:
        """Says that the others need not wait for this device's report."""
        assert self._transport is not None
        excuse = wire.encode(wire.Excuse(task.round_num))
        with contextlib.suppress(TransportError):
            await self._transport.publish(self._topic(topics.request), excuse)

    async def _has_room(self, task: wire.Task | wire.Finish) -> bool:
        """Whether the day's bytes allow for the task; if not, the device has rested until then."""
        if (meter := self._meter) is None:
            return True
        wanted = self._trainer.num_bytes(task) + ROOM_BYTES
        try:
            rest_s = meter.rest_s(wanted)
        except ValueError as error:
            raise PetalError(f"the budget is too small for a round: {error}") from error
        if not rest_s:
            await self._call(meter.save, wanted)
            return True
        left = max(0, meter.limit - meter.used)
        reason = (
            f"a round takes up to {wanted} bytes, {left} are left of the {meter.limit} of 24 hours:"
            f" no round for the next {rest_s / 3600:.1f} h"
        )
        self._callbacks.survived(PetalError(reason))
        self._is_resting = True
        try:
            if isinstance(task, wire.Task):
                await self._excuse(task)
            with contextlib.suppress(TransportError):
                await self._publish_status(False)
            await self._call(meter.save)
            while rest_s := meter.rest_s(wanted):
                await asyncio.sleep(min(rest_s, REST_POLL_S))
        finally:
            self._is_resting = False
        with contextlib.suppress(TransportError):  # a connection that comes back announces it, too
            await self._announce()
        return False

    async def _fetch_patiently(self, task: wire.Task | wire.Finish) -> bool:
        """Whether the blocks are here; if not, the server has said something else meanwhile."""
        for delay_s in delays(*BACKOFF_S):
            try:
                await self._call(self._fetch_blocks, task)
                break
            except NotThereError as error:  # the server has gone on, or back
                self._log.warning("no blocks (%s): asking for another task", error)
                self._announce_soon()
            except (TransportError, StoreError) as error:  # a server or a disk may come back
                self._callbacks.survived(type(error)(f"no blocks yet ({error}): trying again"))
            if await self._inbox.has_other_than(task, delay_s):
                return False
        return True

    def _fetch_blocks(self, task: wire.Task | wire.Finish) -> None:
        lacking = self._trainer.lacking(task)
        self._downlink.drop_all_but(lacking.values())
        fetched = {
            name: self._downlink.fetch_block(self._trainer.travelling(name, task), pointer)
            for name, pointer in lacking.items()
        }
        self._trainer.outdate(task)
        self._trainer.keep_blocks(lacking, fetched)
        self._downlink.drop_all_but(())

    async def _ask_for_controls(self, uplink: Uplink) -> None:
        """Of a round that is over: which of its updates count, as control variates go by that."""
        trainer = self._trainer
        for outgoing in trainer.state.outbox if trainer.state.next_controls else ():
            if outgoing.payload and (receipt := await uplink.ask(outgoing)) is not None:
                self._judged(outgoing, receipt)
                await self._call(trainer.keep_controls)

    async def _deliver_outbox(self, uplink: Uplink) -> None:
        for outgoing in self._trainer.state.outbox:
            receipt = await uplink.deliver(outgoing, functools.partial(self._judged, outgoing))
            if receipt.status == "rejected":
                reason = f"the server rejected an update: {printable(receipt.reason)}"
                self._callbacks.survived(WireError(reason))
            await self._call(self._trainer.keep_controls)
        if self._meter is not None:
            await self._call(self._meter.save)
        await self._call(self._trainer.empty_outbox)

    def _judged(self, outgoing: Outgoing, receipt: wire.Receipt) -> None:
        """At once, or a task that comes with the receipt would end the delivery before it."""
        if receipt.status != "missing":
            is_accepted = receipt.status == "accepted"
            self._trainer.note_delivered(outgoing, is_accepted=is_accepted)


def _log_failure(task: asyncio.Future[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.warning("%s", error)
