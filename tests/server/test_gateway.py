from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from petalfl import topics, wire
from petalfl.codecs import parse_codec
from petalfl.errors import TransportError
from petalfl.model import ModelManifest
from petalfl.payloads import plain_delta
from petalfl.training import Hyperparameters
from petalfl.transport import MemoryBroker
from petalfl.vectors import Vector, to_bytes
from petalfl.wire import CHUNK_BYTES
from server.gateway import Gateway
from server.transfers import MAX_ATTEMPTS, MAX_PER_DEVICE
from tests.server.builders import (
    FED,
    Door,
    FakeJudge,
    announce,
    make_block,
    make_id,
    make_manifest,
    make_report,
    make_update,
    messages_of,
    settle,
    with_digest,
)

LAST_BYTES = 5000
BIG = (3 * CHUNK_BYTES + LAST_BYTES) // 4  # three chunks and a bit
MANIFEST = make_manifest(
    make_block("big", "encoder", ("acc",), {"weight": (BIG,)})[0],
    make_block("head", "head", ("big",), {"fc.weight": (2, 3), "fc.bias": (2,)})[0],
)
DEVICE = "watch"


def make_big(seed: int = 0) -> wire.BlockUpdate:
    delta = np.random.default_rng(seed).normal(size=BIG).astype(np.float32)
    return with_digest(make_id("big", seed), DEVICE, "big", 1, 1, 12, plain_delta(delta))


UPDATE = make_big()
BEGIN, *CHUNKS, FIN = messages_of(UPDATE)
HEAD = make_update(DEVICE, "head", np.arange(8), num_examples=3)


class Gate(Door):
    """A `Door` with a judge that accepts, and what must hold after any hostile message."""

    def __init__(self, manifest: ModelManifest = MANIFEST) -> None:
        self.judge = FakeJudge()
        super().__init__(manifest, self.judge)

    @property
    def refused(self) -> dict[str, int]:
        return dict(self.gateway.refused)

    def num_partials(self) -> int:
        return len(self.gateway.transfers)

    def held_bytes(self) -> int:
        return self.gateway.transfers.num_bytes

    def assert_counts_once(self, update: wire.BlockUpdate = UPDATE) -> None:
        [found] = self.judge.updates
        assert to_bytes(found.delta) == to_bytes(update.delta)
        assert replace(found, encoded=update.encoded) == update
        assert self.receipts[-1] == wire.Receipt(update.update_id, "accepted")
        assert self.transport.raised == []

    def assert_untouched(self, **refused: int) -> None:
        """Counted reasons and nothing else: no update, no report, no exception."""
        assert self.judge.updates == [] and self.judge.reports == []
        assert self.judge.ready == [] and self.judge.offline == []
        assert self.transport.raised == []
        assert self.refused == refused


@pytest.fixture
async def gate() -> AsyncIterator[Gate]:
    opened = Gate()
    await opened.open()
    yield opened
    await opened.gateway.close()


def missing(*indices: int) -> wire.Receipt:
    bitmap = sum(1 << i for i in indices)
    return wire.Receipt(UPDATE.update_id, "missing", missing=bytes([bitmap]))


# An update on its way


def test_the_example_has_four_chunks_of_which_the_last_is_short() -> None:
    sizes = [len(chunk.data) for chunk in CHUNKS if isinstance(chunk, wire.Chunk)]
    assert sizes == [CHUNK_BYTES] * 3 + [LAST_BYTES]


async def test_an_update_in_order(gate: Gate) -> None:
    await gate.send("big", BEGIN, *CHUNKS, FIN)
    gate.assert_counts_once()
    assert gate.received == [wire.Receipt(UPDATE.update_id, "accepted")]
    assert gate.num_partials() == 0 and gate.refused == {}


async def test_an_update_of_one_chunk(gate: Gate) -> None:
    await gate.send("head", *messages_of(HEAD))
    gate.assert_counts_once(HEAD)


@pytest.mark.parametrize("order", [(3, 2, 1, 0), (2, 0, 3, 1)])
async def test_chunks_out_of_order(gate: Gate, order: tuple[int, ...]) -> None:
    await gate.send("big", BEGIN, *[CHUNKS[i] for i in order], FIN)
    gate.assert_counts_once()


async def test_duplicate_chunks_and_manifests(gate: Gate) -> None:
    await gate.send("big", BEGIN, BEGIN, CHUNKS[0], CHUNKS[0], BEGIN, *CHUNKS, CHUNKS[2], FIN)
    gate.assert_counts_once()
    assert gate.refused == {}


async def test_missing_chunks_are_named_until_all_are_there(gate: Gate) -> None:
    await gate.send("big", BEGIN, CHUNKS[1], FIN)
    assert gate.receipts == [missing(0, 2, 3)]
    await gate.send("big", CHUNKS[3], CHUNKS[0], FIN)
    assert gate.receipts[1:] == [missing(2)]
    assert gate.judge.updates == []
    await gate.send("big", CHUNKS[2], FIN)
    gate.assert_counts_once()


async def test_a_manifest_sent_again_keeps_the_chunks(gate: Gate) -> None:
    await gate.send("big", BEGIN, CHUNKS[0], CHUNKS[1], BEGIN, FIN)
    assert gate.receipts == [missing(2, 3)]


async def test_a_fin_of_an_unknown_update_asks_for_everything(gate: Gate) -> None:
    await gate.send("big", FIN)
    assert gate.receipts == [wire.Receipt(UPDATE.update_id, "missing", missing=b"")]
    await gate.send("big", *CHUNKS, FIN)  # chunks without their manifest: still unknown
    assert gate.receipts[-1] == wire.Receipt(UPDATE.update_id, "missing", missing=b"")
    gate.assert_untouched()


async def test_several_updates_interleave(gate: Gate) -> None:
    other = make_big(1)
    interleaved = [m for pair in zip(messages_of(UPDATE), messages_of(other), strict=True)
                   for m in pair]  # fmt: skip
    await gate.send("big", *interleaved)
    assert [one.update_id for one in gate.judge.updates] == [UPDATE.update_id, other.update_id]
    assert to_bytes(gate.judge.updates[1].delta) == to_bytes(other.delta)


async def test_the_device_is_who_the_topic_says(gate: Gate) -> None:
    """The same update_id from two devices is two transfers, each answered on its own topic."""
    await gate.send("big", BEGIN, *CHUNKS)
    await gate.publish(topics.block_up(FED, "big", "phone"), FIN)
    gate.assert_untouched()
    assert gate.receipts == []  # that receipt went to the phone
    await gate.send("big", FIN)
    gate.assert_counts_once()


async def test_the_judges_rejection_is_passed_on_and_counted(gate: Gate) -> None:
    gate.judge.verdict = "round 1 is closed"
    await gate.send("head", *messages_of(HEAD))
    assert gate.receipts == [wire.Receipt(HEAD.update_id, "rejected", "round 1 is closed")]
    assert gate.refused == {"update": 1}


@given(
    st.lists(st.sampled_from(range(6)), max_size=10),
    st.lists(st.sampled_from(range(6)), max_size=10),
)
@settings(max_examples=40)
def test_whatever_was_lost_or_doubled_the_update_arrives(
    first: list[int], second: list[int]
) -> None:
    """Any part of the messages in any order, then what an honest device sends to the end."""
    messages = [BEGIN, *CHUNKS, FIN]

    async def scenario() -> None:
        gate = Gate()
        await gate.open()
        for message in (messages[i] for i in first + second):
            await gate.send("big", message)
        wanted: set[int] = set()
        for _ in range(2):  # asks what is missing, and sends that
            if any(one.status == "accepted" for one in gate.receipts):
                break
            await gate.send("big", BEGIN, *[CHUNKS[i] for i in sorted(wanted)], FIN)
            wanted = wire.read_bitmap(gate.receipts[-1].missing, 4)
        delivered = {to_bytes(one.delta) for one in gate.judge.updates}
        assert delivered == {to_bytes(UPDATE.delta)}
        assert gate.refused == {} and gate.transport.raised == []

    asyncio.run(scenario())


# What is wrong with it


def altered(**changes: object) -> wire.UpdateManifest:
    return replace(announce(UPDATE)[0], **changes)  # type: ignore[arg-type]


BAD_MANIFESTS = {
    "of another block": ("head", BEGIN),
    "of another block, in size as due": ("big", altered(block="head")),
    "of a block that the model has not": ("else", altered(block="else")),
    "too long": ("big", altered(num_bytes=4 * BIG + 4)),
    "too short": ("big", altered(num_bytes=4)),
}


@pytest.mark.parametrize("case", BAD_MANIFESTS)
async def test_a_manifest_that_does_not_fit_is_refused(gate: Gate, case: str) -> None:
    block, message = BAD_MANIFESTS[case]
    await gate.send(block, message)
    gate.assert_untouched(malformed=1)
    assert gate.num_partials() == 0
    await gate.send(block, *CHUNKS, FIN)
    [receipt] = gate.receipts  # or its device would send it again and again
    assert receipt.update_id == UPDATE.update_id and receipt.status == "rejected"
    assert receipt.reason.startswith("block")
    assert gate.held_bytes() == 0


async def test_another_manifest_under_the_same_id_is_refused(gate: Gate) -> None:
    await gate.send("big", BEGIN, altered(num_examples=99))
    gate.assert_untouched(malformed=1)
    await gate.send("big", *CHUNKS, FIN)
    gate.assert_counts_once()  # under the first manifest


BAD_CHUNKS = {
    "short": wire.Chunk(UPDATE.update_id, 1, bytes(CHUNK_BYTES - 1)),
    "one byte": wire.Chunk(UPDATE.update_id, 0, b"x"),
    "last too long": wire.Chunk(UPDATE.update_id, 3, bytes(LAST_BYTES + 1)),
    "last too short": wire.Chunk(UPDATE.update_id, 3, bytes(LAST_BYTES - 1)),
    "just beyond the end": wire.Chunk(UPDATE.update_id, 4, bytes(CHUNK_BYTES)),
    "far beyond the end": wire.Chunk(UPDATE.update_id, 1 << 20, bytes(1)),
}


@pytest.mark.parametrize("case", BAD_CHUNKS)
async def test_a_chunk_that_does_not_fit_is_refused(gate: Gate, case: str) -> None:
    await gate.send("big", BEGIN, BAD_CHUNKS[case])
    gate.assert_untouched(malformed=1)
    await gate.send("big", FIN)
    assert gate.receipts == [missing(0, 1, 2, 3)]
    await gate.send("big", *CHUNKS, FIN)
    gate.assert_counts_once()


async def test_a_device_that_sends_wrong_chunks_again_and_again_is_told_to_stop(gate: Gate) -> None:
    for _ in range(MAX_ATTEMPTS):
        await gate.send("big", BEGIN, BAD_CHUNKS["short"], FIN)
    statuses = [receipt.status for receipt in gate.receipts]
    assert statuses == ["missing"] * (MAX_ATTEMPTS - 1) + ["rejected"]
    assert "chunk 1 has 122879 bytes" in gate.receipts[-1].reason
    assert gate.num_partials() == 0


async def test_an_announcement_that_cannot_be_read_ends_in_a_rejection(gate: Gate) -> None:
    fields = wire.encode(BEGIN).replace(b"\xa3f32", b"\xa3f99")
    await gate.send("big", fields, *CHUNKS, FIN)
    assert [receipt.status for receipt in gate.receipts] == ["rejected"]
    assert "f99" in gate.receipts[0].reason
    gate.assert_untouched(malformed=1)


async def test_a_payload_with_another_digest_is_rejected(gate: Gate) -> None:
    await gate.send("big", altered(sha256="0" * 64), *CHUNKS, FIN)
    gate.assert_untouched(payload=1)
    reason = "block big: the payload's sha256 is not the manifest's"
    assert gate.receipts == [wire.Receipt(UPDATE.update_id, "rejected", reason)]
    assert gate.num_partials() == 0


def encoded(codec: str, delta: Vector) -> tuple[wire.UpdateManifest, bytes]:
    """`HEAD`, with another delta, as a device with that codec sends it."""
    payload = parse_codec(codec).encode(delta, np.random.default_rng(0))
    manifest, _ = announce(HEAD)
    digest = hashlib.sha256(payload).hexdigest()
    return replace(manifest, codec=codec, num_bytes=len(payload), sha256=digest), payload


@pytest.mark.parametrize("codec", ["f32", "f16", "bf16", "int8", "topk:0.3", "topk-int8:0.3"])
async def test_an_update_in_every_codec(gate: Gate, codec: str) -> None:
    manifest, payload = encoded(codec, HEAD.delta)
    chunk = wire.Chunk(HEAD.update_id, 0, payload)
    await gate.send("head", manifest, chunk, wire.Fin(HEAD.update_id))
    [found] = gate.judge.updates
    np.testing.assert_array_equal(found.delta, parse_codec(codec).decode(payload, 8))
    vector = found.encoded.parameters
    arrays = [vector.values, vector.scales, vector.bitmap]  # kernels are compiled for such
    assert not any(one.flags.writeable for one in arrays if one is not None and one.size)
    assert replace(found, encoded=HEAD.encoded, sha256=HEAD.sha256) == HEAD
    assert gate.receipts == [wire.Receipt(HEAD.update_id, "accepted")]


@pytest.mark.parametrize("codec", ["f32", "f16", "bf16", "int8", "topk:0.3", "topk-int8:0.3"])
async def test_a_length_that_no_payload_has_is_malformed(gate: Gate, codec: str) -> None:
    most = parse_codec(codec).max_bytes(8)
    manifest = replace(encoded(codec, HEAD.delta)[0], num_bytes=most + 1)
    await gate.send("head", manifest)
    assert gate.num_partials() == 0 and gate.refused == {"malformed": 1}
    await gate.send("head", replace(manifest, num_bytes=most - 1))
    assert gate.num_partials() == codec.startswith("topk"), "which may be shorter"


async def test_a_payload_that_its_codec_cannot_have_written_is_rejected(gate: Gate) -> None:
    payload = b"\xff" + bytes(8)  # all bits are set
    manifest = replace(
        encoded("topk:0.3", HEAD.delta)[0],
        num_bytes=9,
        sha256=hashlib.sha256(payload).hexdigest(),
    )
    chunk = wire.Chunk(HEAD.update_id, 0, payload)
    await gate.send("head", manifest, chunk, wire.Fin(HEAD.update_id))
    gate.assert_untouched(payload=1)
    reason = "block head: topk:0.3: 8 bits are set, expected 2"
    assert gate.receipts == [wire.Receipt(HEAD.update_id, "rejected", reason)]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
async def test_a_payload_that_is_not_finite_is_rejected(gate: Gate, value: float) -> None:
    vector = np.array([0, 1, 2, 3, value, 5, 6, 7], np.float32)
    bad = replace(HEAD, encoded=plain_delta(vector))
    await gate.send("head", *messages_of(bad))
    gate.assert_untouched(payload=1)
    reason = "block head: f32: a value is NaN or infinite"
    assert gate.receipts == [wire.Receipt(HEAD.update_id, "rejected", reason)]


TASK = wire.Task(1, 0, Hyperparameters(0.1), 0, {})
ON_UPDATES: list[wire.Message] = [
    wire.Status(True),
    wire.Status(False),
    wire.Ready(("acc",), ("head",)),
    make_report(DEVICE),
    wire.Excuse(1),
    wire.Receipt(UPDATE.update_id, "accepted"),
    wire.BlockVersion(1, "0" * 64),
    TASK,
    wire.Finish({}),
]
ON_REQUESTS: list[wire.Message] = [
    *[
        message
        for message in ON_UPDATES
        if not isinstance(message, (wire.Ready, wire.Report, wire.Excuse))
    ],
    BEGIN,
    CHUNKS[0],
    FIN,
]
ON_STATUS: list[wire.Message] = [
    *[message for message in ON_UPDATES if not isinstance(message, wire.Status)],
    BEGIN,
    CHUNKS[0],
    FIN,
]
MISPLACED = [
    *[(topics.block_up(FED, "big", DEVICE), message) for message in ON_UPDATES],
    *[(topics.request(FED, DEVICE), message) for message in ON_REQUESTS],
    *[(topics.status(FED, DEVICE), message) for message in ON_STATUS],
]


@pytest.mark.parametrize(
    ("topic", "message"), MISPLACED, ids=lambda v: v if isinstance(v, str) else type(v).__name__
)
async def test_a_message_on_the_wrong_topic_is_refused(
    gate: Gate, topic: str, message: wire.Message
) -> None:
    await gate.publish(topic, message)
    gate.assert_untouched(malformed=1)
    assert gate.receipts == []


@pytest.mark.parametrize("garbage", [b"", b"\x00", b"\xc1", b"\xff" * 50, b"{}", bytes(200_000)])
async def test_garbage_is_refused_on_every_topic(gate: Gate, garbage: bytes) -> None:
    for topic in ALL_TOPICS:
        await gate.publish(topic, garbage)
    gate.assert_untouched(malformed=len(ALL_TOPICS))
    assert gate.judge.bytes_up == []


ALL_TOPICS = (
    topics.block_up(FED, "big", DEVICE),
    topics.block_up(FED, "head", DEVICE),
    topics.block_up(FED, "no-such-block", DEVICE),
    topics.request(FED, DEVICE),
    topics.status(FED, DEVICE),
)
mutated = st.builds(
    lambda data, place, byte: data[: place % len(data)] + byte + data[place % len(data) + 1 :],
    st.sampled_from([wire.encode(m) for m in (*ON_UPDATES, *messages_of(HEAD), FIN)]),
    st.integers(0, 400),
    st.binary(max_size=3),
)
payloads = st.binary(max_size=60) | mutated


@given(st.lists(st.tuples(st.sampled_from(ALL_TOPICS), payloads), min_size=1, max_size=30))
@settings(max_examples=150)
def test_arbitrary_bytes_raise_nothing_and_are_no_update(arrived: list[tuple[str, bytes]]) -> None:
    async def scenario() -> None:
        gate = Gate()
        await gate.open()
        for topic, payload in arrived:
            await gate.publish(topic, payload)
        assert gate.transport.raised == []
        for update in gate.judge.updates:  # only where the mutation changed nothing
            assert to_bytes(update.delta) == to_bytes(HEAD.delta)
        assert gate.num_partials() <= MAX_PER_DEVICE

    asyncio.run(scenario())


@given(st.lists(st.tuples(st.sampled_from(ALL_TOPICS), st.binary(max_size=80)), max_size=30))
def test_random_bytes_never_reach_the_judge(arrived: list[tuple[str, bytes]]) -> None:
    async def scenario() -> None:
        gate = Gate()
        await gate.open()
        for topic, payload in arrived:
            await gate.publish(topic, payload)
        gate.assert_untouched(**({"malformed": len(arrived)} if arrived else {}))

    asyncio.run(scenario())


BAD_TOPICS = ("blocks/head/up/Not-A-Name", "blocks/head/up/", "req/UPPER", "blocks//up/watch")


async def test_a_topic_with_a_bad_device_name_raises_nothing(gate: Gate) -> None:
    """Only a broker without our access rules lets such a topic pass."""
    for topic in BAD_TOPICS:
        message = make_report("x") if topic.startswith("req") else FIN
        await gate.publish(f"fl/v1/{FED}/{topic}", message)
    assert gate.transport.raised == []


# Limits


async def test_too_many_partial_updates_push_out_the_oldest(gate: Gate) -> None:
    updates = [make_big(seed) for seed in range(MAX_PER_DEVICE + 2)]
    for update in updates:
        begin, first, *_ = messages_of(update)
        await gate.send("big", begin, first)
    assert gate.num_partials() == MAX_PER_DEVICE
    assert gate.held_bytes() == MAX_PER_DEVICE * 4 * BIG
    for update in updates:
        await gate.send("big", wire.Fin(update.update_id))
    rest = bytes([0b1110])
    assert [r.missing for r in gate.receipts] == [b"", b""] + [rest] * MAX_PER_DEVICE
    assert gate.judge.updates == [] and gate.transport.raised == []


async def test_memory_stays_bounded_under_a_flood(gate: Gate) -> None:
    for seed in range(60):
        update_id = make_id("flood", seed)
        await gate.send("big", altered(update_id=update_id))
        for chunk in CHUNKS:
            assert isinstance(chunk, wire.Chunk)
            await gate.send("big", *[replace(chunk, update_id=update_id)] * 2)
        assert gate.held_bytes() <= MAX_PER_DEVICE * 4 * BIG
    assert gate.num_partials() == MAX_PER_DEVICE


async def test_one_devices_flood_pushes_out_nothing_of_another(gate: Gate) -> None:
    await gate.send("big", BEGIN, *CHUNKS)
    for seed in range(MAX_PER_DEVICE + 1):
        flood = altered(update_id=make_id("flood", seed))
        await gate.publish(topics.block_up(FED, "big", "phone"), flood)
    await gate.send("big", FIN)
    gate.assert_counts_once()


# Other messages, in and out


async def test_ready_reports_and_departures_reach_the_judge(gate: Gate) -> None:
    await gate.request(wire.Ready(("acc", "gyro"), ("head",)))
    await gate.request(make_report(DEVICE))
    await gate.publish(topics.status(FED, DEVICE), wire.Status(is_online=True))
    await gate.request(wire.Excuse(2))
    assert gate.judge.offline == []
    await gate.publish(topics.status(FED, DEVICE), wire.Status(is_online=False))
    assert gate.judge.ready == [(DEVICE, wire.Ready(("acc", "gyro"), ("head",)))]
    assert gate.judge.reports == [(DEVICE, make_report(DEVICE))]
    assert gate.judge.excuses == [(DEVICE, wire.Excuse(2))]
    assert gate.judge.offline == [DEVICE]
    assert gate.receipts == [wire.Receipt(make_report(DEVICE).update_id, "accepted")]


async def test_traffic_is_what_travelled(gate: Gate) -> None:
    messages = messages_of(HEAD)
    await gate.send("head", *messages, b"garbage")
    await gate.request(make_report(DEVICE))
    expected = [(DEVICE, "head", len(wire.encode(message))) for message in messages]
    assert gate.judge.bytes_up == expected


async def test_tasks_go_to_one_device_and_versions_to_all(gate: Gate) -> None:
    version = wire.BlockVersion(3, "0" * 64)
    gate.gateway.send_task(DEVICE, TASK)
    gate.gateway.send_task("phone", TASK)
    gate.gateway.publish_version("head", version)
    await settle()
    assert gate.received == [TASK]
    late: list[bytes] = []  # retained: whoever subscribes later has it too
    meta = topics.block_meta(FED, "head")
    await gate.broker.connect().subscribe(meta, lambda topic, data: late.append(data))
    await settle()
    assert [wire.decode(data) for data in late] == [version]


async def test_a_broker_that_has_forgotten_the_versions_is_told_again(gate: Gate) -> None:
    for version in (3, 4):
        gate.gateway.publish_version("head", wire.BlockVersion(version, "0" * 64))
    await settle()
    heard: list[wire.Message] = []
    meta, client = topics.block_meta(FED, "head"), gate.broker.connect()
    await client.subscribe(meta, lambda topic, data: heard.append(wire.decode(data)))
    await settle()
    gate.gateway.publish_versions()
    await settle()
    assert heard == [wire.BlockVersion(4, "0" * 64)] * 2


async def test_a_receipt_that_cannot_be_sent_is_logged_and_no_more(
    gate: Gate, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(topic: str, payload: bytes, *, retain: bool = False) -> None:
        raise TransportError("the broker has gone")

    monkeypatch.setattr(gate.transport, "publish", fail)
    await gate.send("head", *messages_of(HEAD))
    assert gate.transport.raised == []
    assert len(gate.judge.updates) == 1
    assert "the broker has gone" in caplog.text


async def test_closing_sends_what_is_on_its_way_first() -> None:
    gate = Gate()
    await gate.open()
    gate.gateway.send_task(DEVICE, TASK)
    await gate.gateway.close()
    await settle()
    assert gate.received == [TASK]
    await gate.request(wire.Ready(("acc",), ("head",)))
    assert gate.judge.ready == []  # it has left


# Who is there when the server comes up


async def test_a_restarted_server_finds_the_devices_that_are_there() -> None:
    broker, judge = MemoryBroker(), FakeJudge()
    for device, is_online in (("watch", True), ("phone", True), ("phone", False)):
        transport = broker.connect()
        online = wire.encode(wire.Status(is_online))
        await transport.publish(topics.status(FED, device), online, retain=True)
        ready = wire.encode(wire.Ready(("acc",), ("head",)))
        await transport.publish(topics.request(FED, device), ready, retain=True)
    gateway = Gateway(broker.connect(), FED, MANIFEST, judge)
    await gateway.open()
    await settle()
    assert [device for device, _ in judge.ready] == ["watch"]  # not the phone, which has gone
    back = broker.connect()
    await back.publish(topics.status(FED, "phone"), wire.encode(wire.Status(is_online=True)))
    await back.publish(topics.request(FED, "phone"), wire.encode(wire.Ready(("acc",), ("head",))))
    await settle()
    assert [device for device, _ in judge.ready] == ["watch", "phone"]
