"""Attacks by name: each is refused for a counted reason, raises nothing and changes nothing."""

from __future__ import annotations

import asyncio
import hashlib
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import msgpack
import numpy as np
import pytest

from petalfl import wire
from server.conduct import FORGIVEN_BYTES_PER_S
from server.gateway import TOLERATED_BYTES
from server.transfers import MAX_PER_DEVICE
from tests.server.attacks.victim import MEMBER, STRANGER, Victim, open_victim
from tests.server.builders import BLOCKS, announce, make_id, make_report, make_update, messages_of

Attack = list[tuple[str, wire.Message | bytes]]
UP, UP_STRANGER = f"blocks/head/up/{MEMBER}", f"blocks/head/up/{STRANGER}"
UPDATE = make_update(MEMBER, "head", np.arange(8), num_examples=3)
BEGIN, CHUNK, FIN = messages_of(UPDATE)
MANIFEST, PAYLOAD = announce(UPDATE)


def update_of(device: str = MEMBER, block: str = "head", payload: bytes = PAYLOAD,
              **changes: object) -> Attack:  # fmt: skip
    """A whole update, of which something is not as it should be."""
    fields: dict[str, object] = {
        "block": block,
        "update_id": make_update(device, block, 1.0).update_id,
        "num_bytes": len(payload),
        "sha256": hashlib.sha256(payload).hexdigest(),
    }
    manifest = replace(MANIFEST, **{**fields, **changes})  # type: ignore[arg-type]
    chunks = wire.split_chunks(manifest.update_id, payload)
    messages: list[wire.Message] = [manifest, *chunks, wire.Fin(manifest.update_id)]
    return [(f"blocks/{block}/up/{device}", message) for message in messages]


def floats(*values: float) -> bytes:
    return np.array(values, "<f4").tobytes()


def as_fields(message: wire.Message, **changes: object) -> bytes:
    """The message's bytes with fields that the schema would not let it have."""
    fields = msgpack.unpackb(wire.encode(message))
    return bytes(msgpack.packb({**fields, **changes}))


def nested(depth: int) -> bytes:
    return b"\x91" * depth + b"\x90"


ATTACKS: dict[str, Attack] = {
    # truncated
    "nothing at all": [(UP, b"")],
    "half a manifest": [(UP, wire.encode(BEGIN)[:40])],
    "a manifest without its last byte": [(UP, wire.encode(BEGIN)[:-1])],
    "half a chunk's data": [(UP, BEGIN), (UP, replace(CHUNK, data=PAYLOAD[:16])), (UP, FIN)],  # type: ignore[arg-type]
    # oversized
    "more bytes than a message has": [(UP, bytes(wire.MAX_MESSAGE_BYTES + 1))],
    "a payload that is longer than its block": update_of(payload=PAYLOAD + bytes(4)),
    "a payload that is shorter than its block": update_of(payload=PAYLOAD[:-4]),
    "an announced gigabyte": [(UP, replace(MANIFEST, num_bytes=1 << 30)), (UP, FIN)],
    "a chunk beyond the end": [(UP, BEGIN), (UP, wire.Chunk(UPDATE.update_id, 1 << 20, b"x"))],
    # bombs
    "an array of 4 billion": [(UP, b"\xdd\xff\xff\xff\xff")],
    "a map of 4 billion": [(UP, b"\xdf\xff\xff\xff\xff")],
    "a string of 4 GB": [(UP, b"\xdb\xff\xff\xff\xffx")],
    "binary of 4 GB": [(UP, b"\xc6\xff\xff\xff\xffx")],
    "arrays in arrays": [(UP, nested(100_000))],
    "an extension": [(UP, msgpack.packb({"v": 2, "t": msgpack.ExtType(5, b"x" * 50)}))],
    "a timestamp": [(UP, msgpack.packb({"v": 2, "t": msgpack.Timestamp(1)}))],
    "a million modalities": [(f"req/{STRANGER}", as_fields(
        wire.Ready(("acc",), ("head",)), modalities=["acc"] * 300))],
    # values
    "not a number": update_of(payload=floats(0, 1, np.nan, 3, 4, 5, 6, 7)),
    "infinite": update_of(payload=floats(0, 1, 2, 3, 4, 5, 6, np.inf)),
    "minus infinite": update_of(payload=floats(-np.inf, *range(7))),
    "a report of a loss that is none": [(f"req/{MEMBER}", as_fields(
        make_report(MEMBER), loss=float("nan")))],
    "a weight of 0": [(UP, as_fields(BEGIN, num_examples=0)), (UP, CHUNK), (UP, FIN)],
    "a negative weight": [(UP, as_fields(BEGIN, num_examples=-5)), (UP, CHUNK), (UP, FIN)],
    "a weight beyond all": [(UP, as_fields(BEGIN, num_examples=1 << 62)), (UP, CHUNK), (UP, FIN)],
    # another dtype
    "float64": update_of(payload=np.arange(8, dtype="<f8").tobytes()),
    "an unknown codec": [(UP, as_fields(BEGIN, codec="f64")), (UP, CHUNK), (UP, FIN)],
    "a pickle": [(UP, b"\x80\x04\x95\x1f\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x8c\x06system.")],
    # a foreign device
    "an update of a device that was not asked": update_of(STRANGER),
    "an update of a block that the device has not": update_of(
        block="encoder-gyro", payload=floats(1, 2, 3)),
    "an update of a device that is not enrolled": update_of("nobody"),
    "a report of a device that was not asked": [(f"req/{STRANGER}", make_report(STRANGER))],
    "another device's transfer taken over": [(UP, BEGIN), (UP_STRANGER, CHUNK), (UP_STRANGER, FIN),
                                             ("blocks/head/up/X", b"")],
    "a block on another block's topic": [("blocks/fusion/up/watch", BEGIN), (UP, FIN)],
    # another round
    "a round that is not yet": update_of(round_num=2),
    "a round far away": update_of(round_num=1 << 40),
    "a base version that is not yet": update_of(base_version=2),
    "a report of another round": [(f"req/{MEMBER}", make_report(MEMBER, round_num=7))],
    # another hash
    "a wrong hash": update_of(sha256="0" * 64),
    "a hash that is none": [(UP, as_fields(BEGIN, sha256="../../etc/passwd")), (UP, FIN)],
    # path tricks
    "a block that climbs": [(UP, as_fields(BEGIN, block="../head")), (UP, FIN)],
    "a block of an absolute path": [(UP, as_fields(BEGIN, block="/etc/passwd")), (UP, FIN)],
    "a block with a null byte": [(UP, as_fields(BEGIN, block="head\0")), (UP, FIN)],
    "a device that climbs": [("blocks/head/up/..", BEGIN)],
    "a device with a wildcard": [("req/+", make_report(MEMBER)), ("dev/#/status", b"")],
    "a topic of a block that is none": [("blocks/..%2f..%2fhead/up/watch", BEGIN)],
    # the wrong way round
    "a device that plays the server": [(UP, wire.Receipt(UPDATE.update_id, "accepted")),
                                       (f"req/{STRANGER}", wire.Finish({}))],
    "a goodbye that is no status": [(f"dev/{MEMBER}/status", make_report(MEMBER))],
}  # fmt: skip


@pytest.fixture
async def victim(tmp_path: Path) -> Iterator[Victim]:  # type: ignore[misc]
    with open_victim(tmp_path) as opened:
        yield opened


@pytest.mark.parametrize("name", ATTACKS)
async def test_an_attack_is_counted_and_changes_nothing(victim: Victim, name: str) -> None:
    before = victim.snapshot()
    for topic, message in ATTACKS[name]:
        victim.receive(topic, message)
    assert all(receipt.status != "accepted" for receipt in await victim.receipts())
    assert victim.num_refused >= 1
    assert victim.snapshot() == before
    assert victim.cut_off == []
    honest_update_counts(victim)


def honest_update_counts(victim: Victim) -> None:
    """Whoever attacked: an update as it should be is taken."""
    update = make_update("phone", "fusion", 1.0)
    for message in messages_of(update):
        victim.receive("blocks/fusion/up/phone", message)
    assert victim.run.federation.round is not None
    assert victim.run.federation.round.has("phone", update)


async def test_a_replay_counts_once(victim: Victim) -> None:
    for _ in range(20):
        for message in messages_of(UPDATE):
            victim.receive(UP, message)
    await victim.run.federation.commit()
    victim.run.federation.round.results(["head"])  # type: ignore[union-attr]
    assert len(list(victim.run.state.unconsumed_updates(BLOCKS))) == 1
    other = replace(UPDATE, update_id=make_id("again"))
    for message in messages_of(other):
        victim.receive(UP, message)
    assert len(list(victim.run.state.unconsumed_updates(BLOCKS))) == 1
    assert victim.run.federation.refused["duplicate"] == 1


async def test_a_replay_of_a_closed_round_is_late(victim: Victim) -> None:
    await victim.run.finish_round(1)
    before = victim.snapshot()
    assert before[2] == 2
    for message in messages_of(UPDATE):
        victim.receive(UP, message)
    victim.receive(f"req/{MEMBER}", make_report(MEMBER))
    assert {receipt.status for receipt in await victim.receipts()} == {"rejected"}
    assert victim.snapshot() == before


# Floods

GARBAGE: dict[str, Callable[[int], wire.Message | bytes]] = {
    "malformed": lambda i: struct.pack("<q", i),
    "chunks of nothing": lambda i: wire.Chunk(make_id("no", i), 0, bytes(wire.CHUNK_BYTES)),
    "questions": lambda i: wire.Fin(make_id("no", i)),
}


@pytest.mark.parametrize("kind", GARBAGE)
async def test_a_flood_is_dropped_unread_and_then_cut_off(victim: Victim, kind: str) -> None:
    """Of one device; others are heard meanwhile, and memory stays as it is."""
    before = victim.snapshot()
    for i in range(40_000):
        victim.receive(f"blocks/head/up/{STRANGER}", GARBAGE[kind](i), after_s=0.0001)
        if victim.cut_off:
            break
    assert victim.cut_off == [STRANGER]
    assert victim.gateway.refused["throttled"] > 0
    assert victim.gateway.transfers.num_bytes == 0
    assert victim.snapshot() == before
    honest_update_counts(victim)


READY = wire.Ready(("acc",), ("head",))
WELL_FORMED: dict[str, tuple[str, wire.Message]] = {
    "ready": (f"req/{MEMBER}", READY),
    "late reports": (f"req/{MEMBER}", make_report(MEMBER, round_num=99)),
    "one report again": (f"req/{MEMBER}", make_report(MEMBER)),
    "status": (f"dev/{MEMBER}/status", wire.Status(True)),
    "one manifest again": (UP, BEGIN),
    "late manifests": (UP, replace(MANIFEST, round_num=99)),
    "a Fin too early": (UP, FIN),
}


@pytest.mark.parametrize("kind", WELL_FORMED)
async def test_a_well_formed_flood_is_throttled(victim: Victim, kind: str) -> None:
    victim.receive(UP, BEGIN)
    topic, message = WELL_FORMED[kind]
    for _ in range(6000):
        victim.receive(topic, message, after_s=0.0001)
    assert victim.gateway.refused["throttled"] > 0
    honest_update_counts(victim)


async def test_chunks_of_an_update_that_waits_are_in_vain(victim: Victim) -> None:
    victim.gateway.transfers.num_bytes = 64 << 20  # as if others had all the room
    victim.receive(UP, BEGIN)
    assert victim.gateway.transfers.is_waiting(MEMBER, UPDATE.update_id)
    for _ in range(500):
        victim.receive(UP, wire.Chunk(UPDATE.update_id, 0, bytes(wire.CHUNK_BYTES)), after_s=0)
    assert victim.gateway.refused["throttled"] > 0


async def test_a_bad_line_is_no_flood(victim: Victim) -> None:
    """A device that connects again and again, and sends everything three times."""
    for _ in range(200):
        victim.receive(f"dev/{MEMBER}/status", wire.Status(False), after_s=0.01)
        victim.receive(f"dev/{MEMBER}/status", wire.Status(True), after_s=0.01)
        for message in (BEGIN, FIN, BEGIN, CHUNK, CHUNK, FIN):
            victim.receive(UP, message, after_s=0)
        victim.receive(f"req/{MEMBER}", READY, after_s=0)
        victim.receive(f"req/{MEMBER}", make_report(MEMBER), after_s=0)
    assert victim.gateway.refused["throttled"] == 0


async def test_what_would_not_count_is_refused_before_it_is_sent(victim: Victim) -> None:
    for manifest in (replace(MANIFEST, round_num=99), replace(MANIFEST, block="fusion")):
        up = f"blocks/{manifest.block}/up/{STRANGER}"
        victim.receive(up, replace(manifest, num_bytes=4 * BLOCKS[manifest.block].size))
        assert len(victim.gateway.transfers) == 0
        victim.receive(up, FIN)
        [receipt] = await victim.receipts()
        assert receipt.status == "rejected" and receipt.update_id == UPDATE.update_id


async def test_excuses_without_end_neither_fill_the_log_nor_keep_the_round_busy(
    victim: Victim, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor with a word between them that it is ready after all."""
    caplog.set_level("INFO")
    advances: list[int] = []
    monkeypatch.setattr(victim.run.federation, "_advance_soon", lambda: advances.append(1))
    for i in range(100):
        victim.receive(f"req/{MEMBER}", wire.Excuse(1))
        assert len(advances) == 1 + i // 50
        if i == 49:
            victim.receive(f"req/{MEMBER}", READY)
    assert caplog.records == []


# Who is throttled or cut off, and the rounds to come


def flood(victim: Victim, device: str, until: str) -> None:
    while not victim.gateway.refused[until]:
        victim.receive(f"req/{device}", b"garbage", after_s=0)


async def test_the_last_will_of_a_throttled_device_counts(victim: Victim) -> None:
    flood(victim, MEMBER, "throttled")
    victim.receive(f"dev/{MEMBER}/status", wire.Status(False), after_s=0)
    assert victim.gateway.refused["throttled"] == 2
    assert set(victim.run.federation.roster.ready) == {"phone"}


async def test_no_round_waits_for_a_device_that_was_cut_off(victim: Victim) -> None:
    flood(victim, MEMBER, "cut off")
    assert victim.cut_off == [MEMBER]
    assert set(victim.run.federation.roster.ready) == {"phone"}


@pytest.mark.parametrize("why", ["forgiven", "forgotten"])
async def test_a_device_that_is_heard_again_can_be_cut_off_again(victim: Victim, why: str) -> None:
    """The broker may have kept its login; or it was revoked, and has a successor."""
    flood(victim, MEMBER, "cut off")
    victim.receive(f"req/{MEMBER}", b"garbage", after_s=0)
    assert victim.cut_off == [MEMBER]
    if why == "forgiven":
        victim.now_s += 10_000
    else:
        victim.gateway.forget(MEMBER)
    victim.receive(f"req/{MEMBER}", READY, after_s=0)
    assert MEMBER in victim.run.federation.roster.ready
    victim.gateway.refused.clear()
    flood(victim, MEMBER, "cut off")
    assert victim.cut_off == [MEMBER, MEMBER]
    assert MEMBER not in victim.run.federation.roster.ready


@pytest.mark.parametrize("has_left", [True, False])
async def test_a_throttled_device_is_ready_when_it_is_forgiven(
    victim: Victim, has_left: bool
) -> None:
    victim.receive(f"dev/{MEMBER}/status", wire.Status(False))
    victim.receive(f"dev/{MEMBER}/status", wire.Status(True))
    flood(victim, MEMBER, "throttled")
    victim.receive(f"req/{MEMBER}", READY, after_s=0)
    if has_left:
        victim.receive(f"dev/{MEMBER}/status", wire.Status(False), after_s=0)
    assert MEMBER not in victim.run.federation.roster.ready
    victim.now_s += 1000
    if has_left:
        await asyncio.sleep(0.6)  # it was not far above what is tolerated
        assert MEMBER not in victim.run.federation.roster.ready
    else:
        while MEMBER not in victim.run.federation.roster.ready:
            await asyncio.sleep(0.01)
    await victim.gateway.close()


async def test_a_device_that_stops_in_time_is_heard_again(victim: Victim) -> None:
    while not victim.gateway.refused["throttled"]:
        victim.receive(UP, b"garbage", after_s=0)
    victim.receive(UP, BEGIN, after_s=0)
    assert len(victim.gateway.transfers) == 0
    victim.now_s += 2 * TOLERATED_BYTES / FORGIVEN_BYTES_PER_S
    for message in messages_of(UPDATE):
        victim.receive(UP, message)
    assert victim.run.federation.round.has(MEMBER, UPDATE)  # type: ignore[union-attr]
    assert victim.cut_off == []


async def test_announcements_alone_take_no_more_than_their_share(victim: Victim) -> None:
    for i in range(1000):
        victim.receive(UP, replace(MANIFEST, update_id=make_id("share", i)))
    assert len(victim.gateway.transfers) == MAX_PER_DEVICE
    assert victim.gateway.transfers.num_bytes == MAX_PER_DEVICE * len(PAYLOAD)
