"""Devices without a model: the SDK's wire, transport and uplink, with ready-made updates.

Many of them live in one process, so that a server can be put under load, or under test, by
more devices than a machine could train.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from base64 import b64encode
from collections.abc import Callable, Sequence

import aiohttp
import numpy as np

from petalfl import topics, wire
from petalfl.codecs import parse_codec
from petalfl.mqtt import Endpoint, MqttTransport
from petalfl.store import Outgoing
from petalfl.transport import Handler, Transport
from petalfl.uplink import Uplink

ENROLLING_AT_ONCE = 8
CONNECTING_AT_ONCE = 16

# From device, round and block to the payload of its update and its weight.
MakePayload = Callable[[str, int, str], tuple[bytes, int]]


def random_payload(num_parameters: int, codec: str = "f32") -> MakePayload:
    """The same small random update from everybody, made once."""
    rng = np.random.default_rng(0)
    delta = rng.normal(scale=1e-3, size=num_parameters).astype(np.float32)
    payload = parse_codec(codec).encode(delta, rng)
    return lambda device, round_num, block: (payload, 16)


class LightClient:
    """Answers each task with an update of every block and a report, until it is finished.

    Attributes:
        receipts: By update_id, every receipt that ended an upload.
        latencies_s: Of each accepted update: from its last chunk handed to the transport to its
            receipt.
        first_task_s: When it got its first task, as is ``last_receipt_s`` of the last receipt.
    """

    def __init__(
        self,
        transport: Transport,
        federation: str,
        device: str,
        make_payload: MakePayload,
        codec: str = "f32",
    ) -> None:
        self.device = device
        self.receipts: dict[bytes, wire.Receipt] = {}
        self.latencies_s: list[float] = []
        self.first_task_s = 0.0
        self.last_receipt_s = 0.0
        self.on_task: Callable[[wire.Task], None] = lambda task: None
        self._transport = _ClockedTransport(transport)
        self._federation = federation
        self._make_payload = make_payload
        self._codec = codec
        self._uplink = Uplink(self._transport, federation, device)
        self._queue: asyncio.Queue[wire.Task | wire.Finish] = asyncio.Queue()
        self._digests: dict[int, str] = {}  # by id of the payload
        self._announced: tuple[Sequence[str], Sequence[str]] | None = None
        self._announcing: asyncio.Task[None] | None = None

    async def subscribe(self) -> None:
        """Subscribes to what comes down."""
        topic = topics.all_down(self._federation, self.device)
        await self._transport.subscribe(topic, self._receive)

    async def announce(self, modalities: Sequence[str], tasks: Sequence[str]) -> None:
        """Says that it is here and can take a task, now and after each break."""
        self._announced = (modalities, tasks)
        online = wire.encode(wire.Status(is_online=True))
        status = topics.status(self._federation, self.device)
        await self._transport.publish(status, online, retain=True)
        ready = wire.encode(wire.Ready(tuple(modalities), tuple(tasks)))
        request = topics.request(self._federation, self.device)
        await self._transport.publish(request, ready, retain=True)

    def announce_again(self) -> None:
        """To a broker that may have forgotten it."""
        if self._announced is not None:
            self._announcing = asyncio.create_task(self.announce(*self._announced))

    async def run(self) -> wire.Finish:
        """Works off its tasks; the message that finished it."""
        round_num = 0
        while True:
            task = await self._queue.get()
            if isinstance(task, wire.Finish):
                return task
            if task.round_num <= round_num:  # once more after a restart: all of it was delivered
                continue
            round_num = task.round_num
            self.first_task_s = self.first_task_s or time.perf_counter()
            self.on_task(task)
            for outgoing in self._outbox(task):
                receipt = await self._uplink.deliver(outgoing)
                self.last_receipt_s = time.perf_counter()
                self.receipts[receipt.update_id] = receipt
                if outgoing.payload and receipt.status == "accepted":
                    self.latencies_s.append(self.last_receipt_s - self._transport.last_chunk_s)

    async def close(self) -> None:
        """Leaves."""
        await self._transport.close()

    def _outbox(self, task: wire.Task) -> list[Outgoing]:
        outbox, num_examples = [], 1
        for block, pointer in task.blocks.items():
            payload, num_examples = self._make_payload(self.device, task.round_num, block)
            manifest = wire.UpdateManifest(
                update_id=secrets.token_bytes(16),
                block=block,
                round_num=task.round_num,
                base_version=pointer.version,
                num_examples=num_examples,
                codec=self._codec,
                num_bytes=len(payload),
                sha256=self._digest(payload),
            )
            outbox.append(Outgoing(wire.encode(manifest), payload))
        report = wire.Report(secrets.token_bytes(16), task.round_num, num_examples, 0.5)
        return [*outbox, Outgoing(wire.encode(report), b"")]

    def _digest(self, payload: bytes) -> str:
        if id(payload) not in self._digests:
            self._digests = {id(payload): hashlib.sha256(payload).hexdigest()}
        return self._digests[id(payload)]

    def _receive(self, topic: str, payload: bytes) -> None:
        message = wire.decode(payload)
        if isinstance(message, wire.Receipt):
            self._uplink.receive(message)
        elif isinstance(message, (wire.Task, wire.Finish)):
            self._queue.put_nowait(message)


class _ClockedTransport:
    """A transport that remembers when a chunk last went out."""

    def __init__(self, transport: Transport) -> None:
        self.last_chunk_s = 0.0
        self._transport = transport

    async def subscribe(self, topic_filter: str, handler: Handler) -> None:
        """See `Transport.subscribe`."""
        await self._transport.subscribe(topic_filter, handler)

    async def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """See `Transport.publish`."""
        if "/up/" in topic and len(payload) > wire.MAX_HEADER_BYTES:
            self.last_chunk_s = time.perf_counter()
        await self._transport.publish(topic, payload, retain=retain)

    async def close(self) -> None:
        """See `Transport.close`."""
        await self._transport.close()


async def open_fleet(
    url: str,
    token: str,
    federation: str,
    devices: Sequence[str],
    modalities: Sequence[str],
    make_payload: MakePayload,
    codec: str = "f32",
) -> list[LightClient]:
    """Enrolls, connects and subscribes so many devices; none has said yet that it is ready."""
    root = f"{url}/v1/{federation}"
    enrolling, connecting = (asyncio.Semaphore(n) for n in (ENROLLING_AT_ONCE, CONNECTING_AT_ONCE))
    timeout = aiohttp.ClientTimeout(total=120)
    async with aiohttp.ClientSession(raise_for_status=True, timeout=timeout) as http:

        async def join(device: str) -> LightClient:
            body = {"device": device, "modalities": list(modalities)}
            bearer = {"Authorization": f"Bearer {token}"}
            async with enrolling, http.post(f"{root}/enroll", json=body, headers=bearer) as reply:
                password = (await reply.json())["password"]
            basic = {
                "Authorization": f"Basic {b64encode(f'{device}:{password}'.encode()).decode()}"
            }
            async with connecting:
                async with http.get(f"{root}/session", headers=basic) as reply:
                    session = await reply.json()
                transport = MqttTransport(
                    Endpoint(session["mqtt_host"], session["mqtt_port"], session["mqtt_is_tls"]),
                    login=(device, password),
                    client_id=f"{federation}-{device}",
                    on_connect=lambda: client.announce_again(),
                )
                client = LightClient(transport, federation, device, make_payload, codec)
                await transport.connect()
                await client.subscribe()
            return client

        return list(await asyncio.gather(*(join(device) for device in devices)))
