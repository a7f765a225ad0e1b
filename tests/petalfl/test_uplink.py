"""`Uplink` on a `MemoryBroker`, against a server that answers by a script."""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import AsyncIterator, Iterator

import pytest

from petalfl import topics, uplink, wire
from petalfl.errors import TransportError
from petalfl.store import Outgoing
from petalfl.transport import Handler, MemoryBroker, MemoryTransport
from petalfl.uplink import Uplink
from petalfl.wire import Chunk, Fin, Receipt, Report, UpdateManifest

ID = bytes(range(16))
NUM_CHUNKS = 20
PAYLOAD = bytes(i % 251 for i in range(NUM_CHUNKS * wire.CHUNK_BYTES - 5))
MANIFEST = UpdateManifest(
    update_id=ID,
    block="encoder-acc",
    round_num=3,
    base_version=3,
    num_examples=10,
    codec="f32",
    num_bytes=len(PAYLOAD),
    sha256=hashlib.sha256(PAYLOAD).hexdigest(),
)
UPDATE = Outgoing(wire.encode(MANIFEST), PAYLOAD)
REPORT = Report(ID, 3, 10, 0.5)
UP = topics.block_up("f", "encoder-acc", "dev-1")
REQUEST = topics.request("f", "dev-1")
ACCEPTED = Receipt(ID, "accepted")


class Server:
    """Takes what comes, and answers each `Fin` and `Report` by its script; None: not at all.

    That the device asks before it sends is answered first, with a wish for all chunks.
    """

    def __init__(self, transport: MemoryTransport, *script: Receipt | None) -> None:
        self.got: list[tuple[str, wire.Message]] = []
        self._transport = transport
        self._script = list(script)
        self._sending: list[asyncio.Task[None]] = []

    async def open(self) -> None:
        for topic_filter in topics.from_devices("f"):
            await self._transport.subscribe(topic_filter, self._receive)

    def _receive(self, topic: str, payload: bytes) -> None:
        message = wire.decode(payload)
        self.got.append((topic, message))
        receipt: Receipt | None = None
        if self.is_first_question:
            receipt = missing(*ALL)
        elif isinstance(message, (Fin, Report)):
            receipt = self._script.pop(0)
            is_lost = receipt is None or receipt.update_id != ID
            uplink.RECEIPT_TIMEOUT_S = 0.1 if is_lost else 30.0  # read after what is sent has come
        if receipt is not None:
            work = self._transport.publish(topics.acks("f", "dev-1"), wire.encode(receipt))
            self._sending.append(asyncio.create_task(work))

    @property
    def is_first_question(self) -> bool:
        return [type(message) for _, message in self.got] == [UpdateManifest, Fin]

    @property
    def attempts(self) -> list[list[object]]:
        """What came after the first question, by attempt: class names, indices for chunks."""
        attempts: list[list[object]] = [[]]
        for _, message in self.got:
            attempts[-1].append(message.index if isinstance(message, Chunk) else type(message))
            if isinstance(message, (Fin, Report)):
                attempts.append([])
        assert attempts.pop() == []
        return attempts[1:] if attempts[0] == [UpdateManifest, Fin] else attempts

    @property
    def payload(self) -> bytes:
        chunks = {m.index: m.data for _, m in self.got if isinstance(m, Chunk)}
        return b"".join(chunks[i] for i in sorted(chunks))


class Rig:
    """A device's uplink and its scripted server on one broker."""

    def __init__(self) -> None:
        self.broker = MemoryBroker()
        self.device = self.broker.connect()
        self.uplink = Uplink(self.device, "f", "dev-1")

    async def deliver(self, outgoing: Outgoing, *script: Receipt | None) -> tuple[Server, Receipt]:
        server = Server(self.broker.connect(), *script)
        await server.open()
        receipt = await asyncio.wait_for(self.uplink.deliver(outgoing), 30)
        assert server._script == [], "fewer attempts than expected"
        return server, receipt


@pytest.fixture
async def rig(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Rig]:
    monkeypatch.setattr(uplink, "RECEIPT_TIMEOUT_S", 30.0)
    monkeypatch.setattr(uplink, "BACKOFF_S", (0.005, 0.01))
    rig = Rig()

    def receive(topic: str, payload: bytes) -> None:
        receipt = wire.decode(payload)
        assert isinstance(receipt, Receipt)
        rig.uplink.receive(receipt)

    await rig.device.subscribe(topics.all_down("f", "dev-1"), receive)
    yield rig
    assert rig.uplink._waiting == {}


def missing(*indices: int) -> Receipt:
    return Receipt(ID, "missing", missing=wire.missing_bitmap(set(indices), NUM_CHUNKS))


ALL = list(range(NUM_CHUNKS))


async def test_happy_path(rig: Rig) -> None:
    server, receipt = await rig.deliver(UPDATE, ACCEPTED)
    assert receipt == ACCEPTED
    assert server.attempts == [[*ALL, Fin]]
    assert server.got[0][1] == MANIFEST
    assert server.got[-1][1] == Fin(ID)
    assert {topic for topic, _ in server.got} == {UP}
    assert server.payload == PAYLOAD
    assert all(m.update_id == ID for _, m in server.got if isinstance(m, Chunk))


async def test_an_early_rejection_saves_the_chunks(rig: Rig) -> None:
    """The server says no to the manifest; what is not sent yet never is."""
    server = Server(rig.broker.connect())
    await server.open()
    rejected = Receipt(ID, "rejected", "round 3 is closed, round 4 is open")
    publish = rig.device.publish

    async def publish_slowly(topic: str, payload: bytes, *, retain: bool = False) -> None:
        await publish(topic, payload, retain=retain)
        if isinstance(wire.decode(payload), UpdateManifest):
            down = topics.acks("f", "dev-1")
            await server._transport.publish(down, wire.encode(rejected))
        for _ in range(10):
            await asyncio.sleep(0)

    rig.device.publish = publish_slowly  # type: ignore[method-assign]
    receipt = await asyncio.wait_for(rig.uplink.deliver(UPDATE), 30)
    assert receipt == rejected
    kinds = [type(message) for _, message in server.got]
    assert kinds[0] is UpdateManifest and Fin not in kinds
    assert kinds.count(Chunk) < NUM_CHUNKS


async def test_only_the_missing_chunks_are_sent_again(rig: Rig) -> None:
    server, receipt = await rig.deliver(UPDATE, missing(0, 9, 19), missing(9), ACCEPTED)
    assert receipt.status == "accepted"
    assert server.attempts == [
        [*ALL, Fin],
        [0, 9, 19, Fin],
        [9, Fin],
    ]
    assert server.payload == PAYLOAD


async def test_a_lost_receipt_is_asked_for_without_chunks(rig: Rig) -> None:
    server, receipt = await rig.deliver(UPDATE, None, None, ACCEPTED)
    assert receipt.status == "accepted"
    assert server.attempts == [
        [*ALL, Fin],
        [UpdateManifest, Fin],
        [UpdateManifest, Fin],
    ]


async def test_after_a_lost_receipt_the_server_says_what_it_lacks(rig: Rig) -> None:
    server, _ = await rig.deliver(UPDATE, None, missing(4), ACCEPTED)
    assert server.attempts[1:] == [[UpdateManifest, Fin], [4, Fin]]


async def test_an_empty_bitmap_asks_for_everything(rig: Rig) -> None:
    server, _ = await rig.deliver(UPDATE, Receipt(ID, "missing"), ACCEPTED)
    assert server.attempts == [[*ALL, Fin], [UpdateManifest, *ALL, Fin]]


async def test_bits_beyond_the_last_chunk_are_ignored(rig: Rig) -> None:
    bitmap = wire.missing_bitmap({3, NUM_CHUNKS, NUM_CHUNKS + 40}, NUM_CHUNKS + 41)
    server, _ = await rig.deliver(UPDATE, Receipt(ID, "missing", missing=bitmap), ACCEPTED)
    assert server.attempts[1] == [3, Fin]


async def test_rejected_is_the_end(rig: Rig) -> None:
    rejected = Receipt(ID, "rejected", "round 3 is closed")
    server, receipt = await rig.deliver(UPDATE, rejected)
    assert receipt == rejected
    assert len(server.attempts) == 1


async def test_a_report_travels_alone(rig: Rig) -> None:
    server, receipt = await rig.deliver(Outgoing(wire.encode(REPORT), b""), None, ACCEPTED)
    assert receipt == ACCEPTED
    assert server.got == [(REQUEST, REPORT)] * 2


async def test_receipts_of_others_change_nothing(rig: Rig) -> None:
    other = Receipt(b"x" * 16, "accepted")
    rig.uplink.receive(other)
    rig.uplink.receive(ACCEPTED)  # before anything was sent
    server, receipt = await rig.deliver(UPDATE, other, missing(1), ACCEPTED)
    assert receipt == ACCEPTED
    assert server.attempts[1:] == [[UpdateManifest, Fin], [1, Fin]]


async def test_a_receipt_that_comes_twice(rig: Rig) -> None:
    server = Server(rig.broker.connect(), ACCEPTED)
    await server.open()
    delivery = asyncio.create_task(rig.uplink.deliver(UPDATE))
    while not server.got:
        await asyncio.sleep(0)
    rig.uplink.receive(ACCEPTED)
    rig.uplink.receive(Receipt(ID, "rejected"))
    assert (await delivery).status == "accepted"


class Flaky:
    """A transport that counts what is under way, and fails where it is told to."""

    def __init__(self, inner: MemoryTransport, *failures: int, delay_s: float = 0.001) -> None:
        self._inner = inner
        self._failures = set(failures)
        self._delay_s = delay_s
        self.num_published = self.num_chunks = self.most_chunks = 0
        self.is_overtaken = False  # a manifest or fin left while chunks were under way

    async def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        self.num_published += 1
        if self.num_published in self._failures:
            raise TransportError("the broker took no message")
        is_chunk = isinstance(wire.decode(payload), Chunk)
        self.num_chunks += is_chunk
        self.most_chunks = max(self.most_chunks, self.num_chunks)
        self.is_overtaken |= not is_chunk and self.num_chunks > 0
        try:
            await asyncio.sleep(self._delay_s)
        finally:  # also when the sender gives it up
            self.num_chunks -= is_chunk
        await self._inner.publish(topic, payload, retain=retain)

    async def subscribe(self, topic_filter: str, handler: Handler) -> None:
        await self._inner.subscribe(topic_filter, handler)

    async def close(self) -> None:
        await self._inner.close()


async def test_never_more_than_a_window_of_chunks_under_way(rig: Rig) -> None:
    flaky = Flaky(rig.device)
    rig.uplink = Uplink(flaky, "f", "dev-1")
    server, _ = await rig.deliver(UPDATE, ACCEPTED)
    assert flaky.most_chunks == uplink.WINDOW == 8
    assert not flaky.is_overtaken
    assert server.payload == PAYLOAD


@pytest.mark.parametrize("failure", [1, 2, 3, 13, 23])
async def test_a_publish_that_fails_is_tried_again(rig: Rig, failure: int) -> None:
    """Of the question, its fin, the first chunk, a later one, or the fin."""
    flaky = Flaky(rig.device, failure)
    rig.uplink = Uplink(flaky, "f", "dev-1")
    server = Server(rig.broker.connect())

    def answer(topic: str, payload: bytes) -> None:
        """As the real server does: by what has come."""
        server.got.append((topic, message := wire.decode(payload)))
        if isinstance(message, Fin):
            came = {m.index for _, m in server.got if isinstance(m, Chunk)}
            lacking = set(ALL) - came
            rig.uplink.receive(missing(*lacking) if lacking else ACCEPTED)

    for topic_filter in topics.from_devices("f"):
        await server._transport.subscribe(topic_filter, answer)
    receipt = await asyncio.wait_for(rig.uplink.deliver(UPDATE), 30)
    assert receipt == ACCEPTED
    assert server.payload == PAYLOAD


async def test_a_failed_attempt_leaves_no_chunk_under_way(rig: Rig) -> None:
    """The next one must not compete with it for the window."""
    flaky = Flaky(rig.device, 2, delay_s=0.03)
    rig.uplink = Uplink(flaky, "f", "dev-1")
    await rig.deliver(UPDATE, missing(*ALL), ACCEPTED)
    assert flaky.most_chunks <= uplink.WINDOW
    assert not flaky.is_overtaken


async def test_cancelled_it_lets_go(rig: Rig) -> None:
    delivery = asyncio.create_task(rig.uplink.deliver(UPDATE))
    await asyncio.sleep(0.02)
    delivery.cancel()
    with pytest.raises(asyncio.CancelledError):
        await delivery
    rig.uplink.receive(ACCEPTED)


async def test_two_updates_at_once(rig: Rig) -> None:
    """Receipts are told apart by update_id."""
    other_id = b"o" * 16
    other = UpdateManifest(
        other_id, "head", 3, 3, 10, "f32", 4, hashlib.sha256(b"1234").hexdigest()
    )
    seen: Counter[bytes] = Counter()

    def answer(topic: str, payload: bytes) -> None:
        if isinstance(message := wire.decode(payload), Fin):
            seen[message.update_id] += 1
            rejected = message.update_id == other_id
            rig.uplink.receive(Receipt(message.update_id, "rejected" if rejected else "accepted"))

    server = rig.broker.connect()
    await server.subscribe("fl/v1/f/blocks/+/up/+", answer)
    deliveries = (
        rig.uplink.deliver(UPDATE),
        rig.uplink.deliver(Outgoing(wire.encode(other), b"1234")),
    )
    first, second = await asyncio.wait_for(asyncio.gather(*deliveries), 30)
    assert (first.status, second.status) == ("accepted", "rejected")
    assert seen == {ID: 1, other_id: 1}


async def test_a_receipt_that_comes_during_a_pause_is_heard(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server without room answers when it has some."""
    is_pausing = asyncio.Event()

    def delays(first_s: float, longest_s: float) -> Iterator[float]:
        is_pausing.set()
        yield 3600.0

    monkeypatch.setattr(uplink, "delays", delays)
    server = Server(rig.broker.connect(), None, ACCEPTED)
    await server.open()
    delivery = asyncio.create_task(rig.uplink.deliver(UPDATE))
    await asyncio.wait_for(is_pausing.wait(), 30)
    assert not delivery.done()
    rig.uplink.receive(missing(2))
    assert await asyncio.wait_for(delivery, 30) == ACCEPTED
    assert server.attempts[1:] == [[2, Fin]]


async def test_a_server_that_never_has_enough_is_not_sent_it_without_a_pause(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Back-off from the third time on: it would cost a device its battery and its data plan."""
    pauses = 0

    def delays(first_s: float, longest_s: float) -> Iterator[float]:
        nonlocal pauses
        while True:
            pauses += 1
            yield 0.001

    monkeypatch.setattr(uplink, "delays", delays)
    _, receipt = await rig.deliver(UPDATE, *[missing(3)] * 10, ACCEPTED)
    assert receipt == ACCEPTED
    assert pauses == 1 + 10 - uplink.MOST_ASKED


async def test_a_receipt_is_told_of_when_it_comes(rig: Rig) -> None:
    """Also where the delivery is given up in the same turn of the loop, for a newer task."""
    told: list[Receipt] = []
    delivery = asyncio.create_task(rig.uplink.deliver(UPDATE, told.append))
    while ID not in rig.uplink._waiting:
        await asyncio.sleep(0)
    rig.uplink.receive(ACCEPTED)
    delivery.cancel()
    await asyncio.gather(delivery, return_exceptions=True)
    assert told == [ACCEPTED]
    assert delivery.cancelled()
