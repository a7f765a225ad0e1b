"""Laws of the wire; its exact bytes and a table of attacks are in tests/contract/test_golden.py."""

from __future__ import annotations

import hashlib
import random
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from numpy.typing import NDArray

from petalfl.errors import WireError
from petalfl.training import Hyperparameters
from petalfl.wire import (
    CHUNK_BYTES,
    MAX_FETCH_BYTES,
    MAX_HEADER_BYTES,
    MAX_MESSAGE_BYTES,
    BlockUpdate,
    BlockVersion,
    Chunk,
    Declined,
    Excuse,
    Fetch,
    Fin,
    Finish,
    Message,
    Part,
    Ready,
    Receipt,
    Report,
    Status,
    Task,
    UpdateManifest,
    decode,
    decode_payload,
    encode,
    missing_bitmap,
    num_chunks,
    read_bitmap,
    split_chunks,
)
from tests.petalfl.builders import make_block

ID = bytes(range(16))
IDS = st.binary(min_size=16, max_size=16)
NAMES = st.from_regex(r"[a-z0-9][a-z0-9-]{0,63}", fullmatch=True)
SHAS = st.text("0123456789abcdef", min_size=64, max_size=64)
COUNTS = st.integers(0, 1 << 40)
POSITIVES = st.integers(1, 1 << 40)
VERSIONS = st.builds(BlockVersion, POSITIVES, SHAS)
BLOCKS = st.dictionaries(NAMES, VERSIONS, max_size=5)
HYPERPARAMETERS = st.builds(
    Hyperparameters,
    st.floats(0, 1e3),
    st.floats(0, 0.9999),
    st.floats(0, 1),
    st.integers(1, 1 << 16),
    st.integers(1, 1000),
    st.sampled_from(["sgd", "adamw"]),
    st.booleans(),
    st.floats(0, 0.9999),
    st.floats(0, 0.9999),
    st.floats(1e-12, 1),
    st.floats(0, 1e6),
    st.integers(1, 1 << 16),
    st.floats(0, 1e3),
)
PATHS = st.from_regex(r"[A-Za-z0-9._/-]{1,320}", fullmatch=True)
ASCII = st.text(st.characters(max_codepoint=127), max_size=256)
MESSAGES: dict[type, st.SearchStrategy[Message]] = {
    Status: st.builds(Status, st.booleans()),
    Ready: st.builds(
        Ready, st.lists(NAMES, min_size=1, max_size=64).map(tuple),
        st.lists(NAMES, min_size=1, max_size=64).map(tuple),
    ),
    UpdateManifest: st.builds(
        UpdateManifest, IDS, NAMES, POSITIVES, POSITIVES, POSITIVES, st.just("f32"),
        st.integers(1, 1 << 30), SHAS,
    ),
    Chunk: st.builds(Chunk, IDS, st.integers(0, 1 << 20), st.binary(min_size=1, max_size=300)),
    Fin: st.builds(Fin, IDS),
    Report: st.builds(
        Report, IDS, POSITIVES, POSITIVES, st.floats(allow_nan=False, allow_infinity=False)
    ),
    Receipt: st.builds(
        Receipt, IDS, st.sampled_from(["accepted", "rejected", "missing"]), ASCII,
        st.binary(max_size=300),
    ),
    BlockVersion: VERSIONS,
    Task: st.builds(Task, POSITIVES, COUNTS, HYPERPARAMETERS, COUNTS, BLOCKS),
    Finish: st.builds(
        Finish, BLOCKS, st.none(), st.none() | HYPERPARAMETERS, st.none() | COUNTS
    ),
    Excuse: st.builds(Excuse, POSITIVES),
    Fetch: st.builds(
        Fetch, PATHS, COUNTS, st.integers(1, MAX_FETCH_BYTES), st.binary(max_size=8),
        st.none() | SHAS,
    ),
    Part: st.builds(
        Part, PATHS, SHAS, COUNTS, COUNTS, st.binary(min_size=8, max_size=8),
        st.binary(max_size=300),
    ),
    Declined: st.builds(
        Declined, PATHS, st.sampled_from(["unchanged", "not-there", "not-held", "failed"]), ASCII
    ),
}  # fmt: skip
LARGEST: list[Message] = [
    Ready(tuple(f"{i:064}" for i in range(64)), tuple(f"{i:064}" for i in range(128))),
    Chunk(ID, 1 << 20, bytes(CHUNK_BYTES)),
    Receipt(ID, "missing", "x" * 256, b"\xff" * CHUNK_BYTES),
    Task(1 << 40, 1 << 40, Hyperparameters(1e3, 0.9999, 1.0, 1 << 16, 1000), 1 << 40,
         {f"{i:064}": BlockVersion(1 << 40, "f" * 64) for i in range(128)}),
    Finish({f"{i:064}": BlockVersion(1 << 40, "f" * 64) for i in range(128)},
           {f"{i:064}": 1 << 40 for i in range(128)},
           Hyperparameters(1e3, 0.9999, 1.0, 1 << 16, 1000), 1 << 40),
    Part("x" * 320, "f" * 64, 1 << 40, 1 << 40, bytes(8), bytes(CHUNK_BYTES)),
]  # fmt: skip


def test_every_message_type_is_generated() -> None:
    assert set(MESSAGES) == set(Message.__args__)


@pytest.mark.parametrize("cls", MESSAGES)
def test_decode_is_the_inverse_of_encode(cls: type) -> None:
    @settings(max_examples=40, deadline=None)
    @given(MESSAGES[cls])
    def check(message: Message) -> None:
        found = decode(encode(message))
        assert type(found) is cls
        assert found == message

    check()


@pytest.mark.parametrize("message", LARGEST, ids=lambda message: type(message).__name__)
def test_the_largest_messages_fit(message: Message) -> None:
    data = encode(message)
    assert len(data) <= MAX_MESSAGE_BYTES
    assert decode(data) == message


def test_a_chunk_fits_where_brokers_stop() -> None:
    """AWS IoT takes 128 KB; the header has to fit in beside the data."""
    data = encode(Chunk(ID, 1 << 20, bytes(CHUNK_BYTES)))
    assert len(data) - CHUNK_BYTES <= MAX_HEADER_BYTES
    assert MAX_MESSAGE_BYTES <= 128_000


def test_a_message_that_is_too_long_is_not_sent() -> None:
    with pytest.raises(ValueError, match=f"the limit is {MAX_MESSAGE_BYTES}"):
        encode(Chunk(ID, 0, bytes(MAX_MESSAGE_BYTES)))


def test_a_reason_in_another_language() -> None:
    receipt = Receipt(ID, "rejected", "é" * 256)
    assert decode(encode(receipt)) == receipt


def survives(data: bytes) -> bool:
    """Decodes hostile bytes: a `WireError`, or a message that is itself on the wire."""
    try:
        message = decode(data)
    except WireError as error:
        assert len(str(error)) < 500
        return False
    assert decode(encode(message)) == message
    return True


@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes(data: bytes) -> None:
    survives(data)


LEAVES: st.SearchStrategy[Any] = (
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats()
    | st.text(max_size=20) | st.binary(max_size=20)
    | st.builds(msgpack.ExtType, st.integers(0, 127), st.binary(max_size=8))
    | st.just(msgpack.Timestamp(1, 1))
)  # fmt: skip
KEYS = st.text(max_size=5) | st.binary(max_size=5) | st.integers(0, 9) | st.booleans() | st.none()
STRUCTURES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=8,
)
FIELDS = st.sampled_from(
    ["update_id", "block", "status", "blocks", "hyperparameters", "loss", "modalities", "data"]
)
TYPES = st.sampled_from(["status", "ready", "update", "chunk", "fin", "report", "receipt",
                         "version", "task", "finish"])  # fmt: skip


@settings(max_examples=500, deadline=None)
@given(STRUCTURES)
def test_any_structure(value: Any) -> None:
    assert not survives(msgpack.packb(value))


@settings(max_examples=500, deadline=None)
@given(TYPES, st.dictionaries(FIELDS, STRUCTURES, max_size=4))
def test_any_fields_of_a_known_type(name: str, fields: dict[str, Any]) -> None:
    survives(msgpack.packb({"v": 2, "t": name, **fields}))


def test_thousands_of_mutations() -> None:
    """Valid messages with bytes flipped, cut, doubled, inserted and replaced by markers."""
    rng = random.Random(0)
    sha = "0" * 64
    valid = [
        encode(message)
        for message in (
            Status(True), Ready(("acc", "gyro"), ("head",)), Chunk(ID, 0, b"data"), Fin(ID),
            Report(ID, 1, 1, 0.5), Receipt(ID, "accepted"),
            UpdateManifest(ID, "head", 1, 1, 1, "f32", 4, sha),
            BlockVersion(1, sha), Finish({"head": BlockVersion(1, sha)}),
            Finish({"head": BlockVersion(1, sha)}, None, Hyperparameters(0.1), 3),
            Task(1, 0, Hyperparameters(0.1), 0, {"head": BlockVersion(1, sha)}),
        )
    ]  # fmt: skip
    markers = bytes.fromhex("80 81 90 91 a0 c0 c1 c2 c4 c7 ca cb cf d0 d3 d4 d6 d7 d9 dc dd de df")
    survivors = 0
    for _ in range(20_000):
        data = bytearray(rng.choice(valid))
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(data)) if data else 0
            kind = rng.randrange(5)
            if kind == 0:
                data[at : at + 1] = bytes([rng.randrange(256)])
            elif kind == 1:
                data[at : at + 1] = bytes([rng.choice(markers)])
            elif kind == 2:
                del data[at : at + rng.randint(1, 8)]
            elif kind == 3:
                data[at:at] = data[at : at + rng.randint(1, 8)]
            else:
                data[at:at] = rng.randbytes(rng.randint(1, 4))
        survivors += survives(bytes(data))
    assert 100 < survivors < 10_000  # the mutations reach both sides of the door


def test_a_bool_is_no_number_and_a_number_no_bool() -> None:
    for fields in (
        {"t": "status", "is_online": 1},
        {"t": "version", "version": True, "sha256": "0" * 64},
        {"t": "report", "update_id": ID, "round_num": 1, "num_examples": 1, "loss": True},
    ):
        with pytest.raises(WireError, match=r"expected (bool|int|float), found (1|True)"):
            decode(msgpack.packb({"v": 2, **fields}))


def test_a_whole_number_will_do_for_a_loss() -> None:
    fields = {"t": "report", "update_id": ID, "round_num": 1, "num_examples": 1, "loss": 2}
    message = decode(msgpack.packb({"v": 2, **fields}))
    assert isinstance(message, Report)
    assert type(message.loss) is float


DELTA = np.array([0.0, -0.0, 1.5, -2.0, 1e-45], np.float32)
FIVE = make_block("head", ("fusion",), 1, 4)  # as many parameters


def announce(payload: bytes) -> UpdateManifest:
    sha = hashlib.sha256(payload).hexdigest()
    return UpdateManifest(ID, "head", 3, 2, 70, "f32", len(payload), sha)


def test_a_payload() -> None:
    payload = bytes.fromhex("00000000 00000080 0000c03f 000000c0 01000000")
    update = decode_payload(announce(payload), payload, "watch-1", FIVE)
    assert isinstance(update, BlockUpdate)
    assert update.delta.dtype == np.float32
    assert update.delta.tobytes() == DELTA.astype("<f4").tobytes()
    assert (update.update_id, update.device, update.block) == (ID, "watch-1", "head")
    assert (update.round_num, update.base_version, update.num_examples) == (3, 2, 70)


BAD_PAYLOADS = {
    "one value short": (DELTA[:4].tobytes(), "expected 20"),
    "one value more": (np.append(DELTA, DELTA).tobytes(), "expected 20"),
    "one byte short": (DELTA.tobytes()[:-1], "expected 20"),
    "one byte more": (DELTA.tobytes() + b"\0", "expected 20"),
    "nothing": (b"", "expected 20"),
    "a NaN": (np.array([0, np.nan, 0, 0, 0], "<f4").tobytes(), "NaN or infinit"),
    "infinity": (np.array([0, 0, 0, 0, np.inf], "<f4").tobytes(), "NaN or infinit"),
    "minus infinity": (np.array([-np.inf, 0, 0, 0, 0], "<f4").tobytes(), "NaN or infinit"),
    "a signalling NaN": (bytes(16) + bytes.fromhex("0100807f"), "NaN or infinit"),
}


@pytest.mark.parametrize("case", BAD_PAYLOADS)
def test_bad_payloads(case: str) -> None:
    payload, message = BAD_PAYLOADS[case]
    with pytest.raises(WireError, match=f"^block head: .*{message}"):
        decode_payload(announce(payload), payload, "watch-1", FIVE)


def test_a_payload_that_was_not_announced() -> None:
    with pytest.raises(WireError, match=r"^block head: .*sha256"):
        decode_payload(announce(DELTA.tobytes()), bytes(20), "watch-1", FIVE)


@settings(max_examples=200, deadline=None)
@given(st_numpy.arrays(np.float32, st.integers(1, 9)))
def test_only_finite_deltas_come_in(delta: NDArray[np.float32]) -> None:
    payload = delta.astype("<f4").tobytes()
    block = make_block("head", ("x",), 1, len(delta) - 1)
    try:
        update = decode_payload(announce(payload), payload, "d", block)
    except WireError:
        assert not all(np.isfinite(x) for x in delta)
    else:
        assert all(np.isfinite(x) for x in delta)
        assert update.delta.tobytes() == delta.tobytes()


CHUNKS = [
    (1, 1), (CHUNK_BYTES - 1, 1), (CHUNK_BYTES, 1), (CHUNK_BYTES + 1, 2), (2 * CHUNK_BYTES, 2),
    (3 * CHUNK_BYTES - 1, 3), (603_904, 5), (1 << 30, 8739),
]  # fmt: skip


@pytest.mark.parametrize(("num_bytes", "expected"), CHUNKS)
def test_the_number_of_chunks(num_bytes: int, expected: int) -> None:
    assert num_chunks(num_bytes) == expected


def test_the_chunks_make_the_payload() -> None:
    payload = random.Random(0).randbytes(2 * CHUNK_BYTES + 5)
    chunks = list(split_chunks(ID, payload))
    assert [chunk.index for chunk in chunks] == [0, 1, 2]
    assert [len(chunk.data) for chunk in chunks] == [CHUNK_BYTES, CHUNK_BYTES, 5]
    assert b"".join(chunk.data for chunk in chunks) == payload
    assert all(decode(encode(chunk)) == chunk for chunk in chunks)
    assert {chunk.update_id for chunk in chunks} == {ID}


BITMAPS: list[tuple[set[int], int, str]] = [
    (set(), 1, "00"), ({0}, 1, "01"), ({7}, 8, "80"), ({8}, 9, "0001"), ({0, 2, 9}, 10, "0502"),
    (set(range(16)), 16, "ffff"), (set(), 0, ""),
]  # fmt: skip


@pytest.mark.parametrize(("missing", "total", "written"), BITMAPS)
def test_bitmaps(missing: set[int], total: int, written: str) -> None:
    assert missing_bitmap(missing, total).hex() == written
    assert read_bitmap(bytes.fromhex(written), total) == missing


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 3000), st.sets(st.integers(0, 2999)))
def test_bitmaps_round_trip(total: int, missing: set[int]) -> None:
    missing = {i for i in missing if i < total}
    bitmap = missing_bitmap(missing, total)
    assert len(bitmap) == (total + 7) // 8
    assert read_bitmap(bitmap, total) == missing


def test_bits_beyond_the_last_chunk_are_ignored() -> None:
    assert read_bitmap(b"\xff" * 100, 3) == {0, 1, 2}
    assert read_bitmap(b"", 3) == set()
