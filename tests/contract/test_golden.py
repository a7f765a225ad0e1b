"""The wire's bytes, written out: devices in the field speak this, whatever the code becomes.

A change here is a change of the protocol: raise `WIRE_VERSION` with it.
"""

from __future__ import annotations

import struct
import tracemalloc

import msgpack
import pytest

from petalfl.errors import WireError
from petalfl.training import Hyperparameters
from petalfl.wire import (
    CHUNK_BYTES,
    MAX_MESSAGE_BYTES,
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
    encode,
)

ID = bytes(range(16))
SHA = "ab" * 32

# Key and value by key and value, so that a changed byte can be found by eye.
ID_HEX = "a9 7570646174655f6964  c410 000102030405060708090a0b0c0d0e0f"
SHA_HEX = "a6 736861323536  d940" + "6162" * 32
GOLDEN: dict[str, tuple[Message, str]] = {
    "status": (Status(True), "83 a176 02  a174 a6 737461747573  a9 69735f6f6e6c696e65 c3"),
    "ready": (
        Ready(("acc", "gyro"), ("head",), ("f32", "topk-int8")),
        "85 a176 02  a174 a5 7265616479  aa 6d6f64616c6974696573 92 a3 616363 a4 6779726f"
        "a5 7461736b73 91 a4 68656164  a6 636f64656373 92 a3 663332 a9 746f706b2d696e7438",
    ),
    "update": (
        UpdateManifest(ID, "head", 3, 2, 70, "f32", 400, SHA),
        "8a a176 02  a174 a6 757064617465 " + ID_HEX + " a5 626c6f636b a4 68656164"
        "a9 726f756e645f6e756d 03  ac 626173655f76657273696f6e 02  ac 6e756d5f6578616d706c6573 46"
        "a5 636f646563 a3 663332  a9 6e756d5f6279746573 cd0190 " + SHA_HEX,
    ),
    "chunk": (
        Chunk(ID, 1, b"\0\1"),
        "85 a176 02  a174 a5 6368756e6b " + ID_HEX + " a5 696e646578 01  a4 64617461 c402 0001",
    ),
    "fin": (Fin(ID), "83 a176 02  a174 a3 66696e " + ID_HEX),
    "report": (
        Report(ID, 3, 70, 1.5),
        "86 a176 02  a174 a6 7265706f7274 " + ID_HEX + " a9 726f756e645f6e756d 03"
        "ac 6e756d5f6578616d706c6573 46  a4 6c6f7373 cb3ff8000000000000",
    ),
    "receipt": (
        Receipt(ID, "missing", "", b"\5"),
        "86 a176 02  a174 a7 72656365697074 " + ID_HEX + " a6 737461747573 a7 6d697373696e67"
        "a6 726561736f6e a0  a7 6d697373696e67 c401 05",
    ),
    "version": (
        BlockVersion(4, SHA),
        "84 a176 02  a174 a7 76657273696f6e  a7 76657273696f6e 04 " + SHA_HEX,
    ),
    "task": (
        Task(3, 60, Hyperparameters(0.05), 7, {"fusion": BlockVersion(2, SHA)}),
        "87 a176 02  a174 a4 7461736b  a9 726f756e645f6e756d 03  aa 6e756d5f726f756e6473 3c"
        "af 6879706572706172616d6574657273 8f"
        "  ad 6c6561726e696e675f72617465 cb3fa999999999999a  a8 6d6f6d656e74756d cb3feccccccccccccd"
        "  ac 7765696768745f6465636179 cb3ee4f8b588e368f1  aa 62617463685f73697a65 10"
        "  a6 65706f636873 01  a9 6f7074696d697a6572 a3 736764  a8 6e65737465726f76 c2"
        "  a5 6265746131 cb3feccccccccccccd  a5 6265746132 cb3feff7ced916872b"
        "  a7 657073696c6f6e cb3e45798ee2308c3a  ad 6d61785f677261645f6e6f726d cb0000000000000000"
        "  ac 616363756d756c6174696f6e 01  ab 70726f78696d616c5f6d75 cb0000000000000000"
        "  a9 6d61785f7374657073 00  a6 6d6574686f64 a6 66656473696d"
        "a4 73656564 07  a6 626c6f636b73 81 a6 667573696f6e 82 a7 76657273696f6e 02 " + SHA_HEX,
    ),
    "task with uploads and codec": (
        Task(1, 0, Hyperparameters(0.5), 0, {"head": BlockVersion(1, SHA)}, ("head",), "int8"),
        "89 a176 02  a174 a4 7461736b  a9 726f756e645f6e756d 01  aa 6e756d5f726f756e6473 00"
        "af 6879706572706172616d6574657273 8f"
        "  ad 6c6561726e696e675f72617465 cb3fe0000000000000  a8 6d6f6d656e74756d cb3feccccccccccccd"
        "  ac 7765696768745f6465636179 cb3ee4f8b588e368f1  aa 62617463685f73697a65 10"
        "  a6 65706f636873 01  a9 6f7074696d697a6572 a3 736764  a8 6e65737465726f76 c2"
        "  a5 6265746131 cb3feccccccccccccd  a5 6265746132 cb3feff7ced916872b"
        "  a7 657073696c6f6e cb3e45798ee2308c3a  ad 6d61785f677261645f6e6f726d cb0000000000000000"
        "  ac 616363756d756c6174696f6e 01  ab 70726f78696d616c5f6d75 cb0000000000000000"
        "  a9 6d61785f7374657073 00  a6 6d6574686f64 a6 66656473696d"
        "a4 73656564 00  a6 626c6f636b73 81 a4 68656164 82 a7 76657273696f6e 01 "
        + SHA_HEX
        + "a7 75706c6f616473 91 a4 68656164  a5 636f646563 a4 696e7438",
    ),
    "finish": (
        Finish({"fusion": BlockVersion(9, SHA)}),
        "83 a176 02  a174 a6 66696e697368"
        "a6 626c6f636b73 81 a6 667573696f6e 82 a7 76657273696f6e 09 " + SHA_HEX,
    ),
    "finish with fine-tuning": (
        Finish({"fusion": BlockVersion(9, SHA)}, None, Hyperparameters(0.005, epochs=30), 7),
        "85 a176 02  a174 a6 66696e697368"
        "a6 626c6f636b73 81 a6 667573696f6e 82 a7 76657273696f6e 09 "
        + SHA_HEX
        + "af 6879706572706172616d6574657273 8f"
        "  ad 6c6561726e696e675f72617465 cb3f747ae147ae147b  a8 6d6f6d656e74756d cb3feccccccccccccd"
        "  ac 7765696768745f6465636179 cb3ee4f8b588e368f1  aa 62617463685f73697a65 10"
        "  a6 65706f636873 1e  a9 6f7074696d697a6572 a3 736764  a8 6e65737465726f76 c2"
        "  a5 6265746131 cb3feccccccccccccd  a5 6265746132 cb3feff7ced916872b"
        "  a7 657073696c6f6e cb3e45798ee2308c3a  ad 6d61785f677261645f6e6f726d cb0000000000000000"
        "  ac 616363756d756c6174696f6e 01  ab 70726f78696d616c5f6d75 cb0000000000000000"
        "  a9 6d61785f7374657073 00  a6 6d6574686f64 a6 66656473696d"
        "a4 73656564 07",
    ),
    "excuse": (
        Excuse(3),
        "83 a176 02  a174 a6 657863757365  a9 726f756e645f6e756d 03",
    ),
    "fetch": (
        Fetch("blocks/head/7", 122880, 4096),
        "86 a176 02  a174 a5 6665746368  a4 70617468 ad 626c6f636b732f686561642f37"
        "a6 6f6666736574 ce0001e000  a9 6e756d5f6279746573 cd1000  a6 7469636b6574 c400",
    ),
    "fetch of what is known": (
        Fetch("manifest", 0, 1, bytes(range(8)), SHA),
        "87 a176 02  a174 a5 6665746368  a4 70617468 a8 6d616e6966657374"
        "a6 6f6666736574 00  a9 6e756d5f6279746573 01  a6 7469636b6574 c408 0001020304050607"
        "a5 6b6e6f776e d940" + "6162" * 32,
    ),
    "part": (
        Part("manifest", SHA, 3, 1, bytes(range(8)), b"\4\5"),
        "88 a176 02  a174 a4 70617274  a4 70617468 a8 6d616e6966657374 "
        + SHA_HEX
        + "a9 6e756d5f6279746573 03  a6 6f6666736574 01  a6 7469636b6574 c408 0001020304050607"
        "a4 64617461 c402 0405",
    ),
    "declined": (
        Declined("manifest", "not-there", "no"),
        "85 a176 02  a174 a8 6465636c696e6564  a4 70617468 a8 6d616e6966657374"
        "a3 776879 a9 6e6f742d7468657265  a6 726561736f6e a2 6e6f",
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_the_bytes_of_every_message(name: str) -> None:
    message, written = GOLDEN[name]
    assert encode(message) == bytes.fromhex(written)
    assert decode(bytes.fromhex(written)) == message


def test_a_device_that_says_no_codecs_knows_f32() -> None:
    old = "84 a176 02  a174 a5 7265616479  aa 6d6f64616c6974696573 91 a3 616363"
    old += "a5 7461736b73 91 a4 68656164"
    assert decode(bytes.fromhex(old)) == Ready(("acc",), ("head",), ("f32",))


def test_every_message_type_is_pinned() -> None:
    assert {type(message) for message, _ in GOLDEN.values()} == set(Message.__args__)


def pack(**fields: object) -> bytes:
    packed: bytes = msgpack.packb({"v": 2, **fields})
    return packed


def receipt(**changes: object) -> bytes:
    return pack(**{"t": "receipt", "update_id": ID, "status": "accepted", **changes})


def update(**changes: object) -> bytes:
    fields = {"block": "head", "round_num": 3, "base_version": 2, "num_examples": 70,
              "codec": "f32", "num_bytes": 400, "sha256": SHA}  # fmt: skip
    return pack(**{"t": "update", "update_id": ID, **fields, **changes})


def report(loss: bytes, num_examples: bytes = b"\x46") -> bytes:
    return bytes.fromhex(
        "86 a176 02  a174 a6 7265706f7274 " + ID_HEX + " a9 726f756e645f6e756d 03"
        "ac 6e756d5f6578616d706c6573" + num_examples.hex() + "a4 6c6f7373" + loss.hex()
    )


def ready(modalities: bytes) -> bytes:
    return (
        bytes.fromhex("84 a176 02 a174 a5 7265616479 a5 7461736b73 91 a4 68656164")
        + bytes.fromhex("aa 6d6f64616c6974696573")
        + modalities
    )


def task(num_blocks: int) -> bytes:
    blocks = {f"b{i}": {"version": 1, "sha256": SHA} for i in range(num_blocks)}
    hyperparameters = {"learning_rate": 0.1}
    return pack(t="task", round_num=1, num_rounds=0, hyperparameters=hyperparameters, seed=0,
                blocks=blocks)  # fmt: skip


def fetch(**changes: object) -> bytes:
    return pack(**{"t": "fetch", "path": "manifest", "offset": 0, "num_bytes": 1, **changes})


def part(**changes: object) -> bytes:
    fields = {"path": "manifest", "sha256": SHA, "num_bytes": 1, "offset": 0, "ticket": bytes(8)}
    return pack(**{"t": "part", "data": b"x", **fields, **changes})


def test_the_attacks_start_from_valid_messages() -> None:
    """What they change is what they are refused for."""
    valid = (receipt(), update(), report(b"\xca\0\0\0\0"), ready(b"\x91\xa3acc"), task(128))
    for data in (*valid, fetch(), part()):
        decode(data)


NESTED = b"\xdc\x01\x00" + b"\x80" * 256  # 256 empty maps
ATTACKS: dict[str, bytes] = {
    # No message
    "nothing": b"",
    "nil": b"\xc0",
    "never used": b"\xc1",
    "an integer": b"\x01",
    "a list": b"\x93\x01\x02\x03",
    "text": b"\xa5hello",
    "json": b'{"v": 1, "t": "fin"}',
    "empty map": b"\x80",
    "cut short": encode(Fin(ID))[:-1],
    "one byte too many": encode(Fin(ID)) + b"\0",
    "two messages": encode(Fin(ID)) * 2,
    "too long": encode(Chunk(ID, 0, bytes(CHUNK_BYTES))) + bytes(MAX_MESSAGE_BYTES),
    # Version and type
    "no version": msgpack.packb({"t": "status", "is_online": True}),
    "older version": pack(v=1, t="status", is_online=True),
    "newer version": pack(v=3, t="status", is_online=True),
    "version true": pack(v=True, t="status", is_online=True),
    "version 2.0": pack(v=2.0, t="status", is_online=True),
    "version as text": pack(v="2", t="status", is_online=True),
    "a list as version": pack(v=[2], t="status", is_online=True),
    "no type": pack(is_online=True),
    "unknown type": pack(t="shell", command="rm -rf /"),
    "type is a list": pack(t=["fin"], update_id=ID),
    "type is a map": pack(t={"fin": 1}, update_id=ID),
    "class name as type": pack(t="Fin", update_id=ID),
    # Fields
    "missing field": pack(t="fin"),
    "unknown field": pack(t="fin", update_id=ID, admin=True),
    "dunder field": pack(t="fin", update_id=ID, __class__="x"),
    "bytes as key": msgpack.packb({b"v": 1, b"t": b"fin", b"update_id": ID}),
    "one key of bytes": msgpack.packb({"v": 1, "t": "fin", "update_id": ID, b"x": 1}),
    "integer as key": b"\x84\xa1v\x01\xa1t\xa3fin\xa9update_id\xc4\x10" + ID + b"\x01\x01",
    "map as key": b"\x81\x80\x01",
    "list as key": b"\x81\x90\x01",
    "invalid utf-8": b"\x83\xa1v\x01\xa1t\xa3fin\xa9\xff\xfe\xfd\xfc\xfb\xfa\xf9\xf8\xf7\x01",
    "text as bytes": pack(t="fin", update_id="0123456789abcdef"),
    "id too short": pack(t="fin", update_id=ID[:15]),
    "id too long": pack(t="fin", update_id=ID + b"\0"),
    "integer as bool": pack(t="status", is_online=1),
    "null as bool": pack(t="status", is_online=None),
    "bool as integer": update(num_examples=True),
    "float as integer": update(num_examples=70.0),
    "text as integer": update(num_examples="70"),
    "zero examples": update(num_examples=0),
    "negative examples": update(num_examples=-5),
    "examples beyond 2^40": update(num_examples=(1 << 40) + 1),
    "examples of 2^64 - 1": report(b"\xca\0\0\0\0", b"\xcf" + b"\xff" * 8),
    "round zero": update(round_num=0),
    "version zero": update(base_version=0),
    "no payload": update(num_bytes=0),
    "payload beyond the largest block": update(num_bytes=(1 << 30) + 1),
    "unknown codec": update(codec="pickle"),
    "codec and a newline": update(codec="f32\n"),
    "codec that keeps all": update(codec="topk:1.0"),
    "codec that keeps nothing": update(codec="topk:0.000"),
    "codec that keeps too much": update(codec="topk-int8:0.6"),
    "codec of many digits": update(codec="topk:0.0" + "1" * 1000),
    "codecs none": pack(t="ready", modalities=["acc"], tasks=["head"], codecs=[]),
    "33 codecs": pack(t="ready", modalities=["acc"], tasks=["head"], codecs=["f32"] * 33),
    "codecs as text": pack(t="ready", modalities=["acc"], tasks=["head"], codecs="f32"),
    "a task's unknown codec": pack(t="task", round_num=1, num_rounds=0, seed=0, blocks={},
                                   hyperparameters={"learning_rate": 0.1}, codec="zip"),
    "sha in upper case": update(sha256=SHA.upper()),
    "sha too short": update(sha256=SHA[:-1]),
    "sha and a newline": update(sha256=SHA + "\n"),
    "block climbs": update(block="../head"),
    "block with a wildcard": update(block="+"),
    "block with a slash": update(block="a/b"),
    "block in upper case": update(block="Head"),
    "block too long": update(block="a" * 65),
    "block empty": update(block=""),
    "block begins with a dash": update(block="-head"),
    "block and a newline": update(block="head\n"),
    "block in other letters": update(block="h\u0435ad"),
    "block in other digits": update(block="head\u0661"),
    "unknown status": receipt(status="maybe"),
    "status true": receipt(status=True),
    "reason too long": receipt(reason="x" * 257),
    "reason is null": receipt(reason=None),
    "bitmap as list": receipt(missing=[1, 2]),
    "chunk empty": pack(t="chunk", update_id=ID, index=0, data=b""),
    "chunk too long": pack(t="chunk", update_id=ID, index=0, data=bytes(CHUNK_BYTES + 1)),
    "chunk index negative": pack(t="chunk", update_id=ID, index=-1, data=b"x"),
    "chunk index far out": pack(t="chunk", update_id=ID, index=(1 << 20) + 1, data=b"x"),
    "no modalities": ready(b"\x90"),
    "no tasks": pack(t="ready", modalities=["acc"], tasks=[]),
    "129 tasks": pack(t="ready", modalities=["acc"], tasks=["head"] * 129),
    "a task climbs": pack(t="ready", modalities=["acc"], tasks=["../head"]),
    "unsaid tasks": pack(t="ready", modalities=["acc"]),
    "65 modalities": ready(b"\xdc\x00\x41" + b"\xa1a" * 65),
    "modalities as text": ready(b"\xa3acc"),
    "modalities as map": ready(b"\x81\xa3acc\x01"),
    "loss NaN": report(b"\xcb\x7f\xf8" + bytes(6)),
    "loss NaN in 32 bits": report(b"\xca\x7f\xc0\x00\x00"),
    "loss infinite": report(b"\xcb" + struct.pack(">d", float("inf"))),
    "loss minus infinite": report(b"\xcb" + struct.pack(">d", float("-inf"))),
    "loss true": report(b"\xc3"),
    "loss as text": report(b"\xa3nan"),
    "129 blocks": task(129),
    "learning rate NaN": pack(t="task", round_num=1, num_rounds=0, seed=0, blocks={},
                              hyperparameters={"learning_rate": float("nan")}),
    "batch of nothing": pack(t="task", round_num=1, num_rounds=0, seed=0, blocks={},
                             hyperparameters={"learning_rate": 0.1, "batch_size": 0}),
    "unknown optimizer": pack(t="task", round_num=1, num_rounds=0, seed=0, blocks={},
                              hyperparameters={"learning_rate": 0.1, "optimizer": "lion"}),
    "nesterov as a number": pack(t="task", round_num=1, num_rounds=0, seed=0, blocks={},
                                 hyperparameters={"learning_rate": 0.1, "nesterov": 1}),
    "fetch of nothing": fetch(num_bytes=0),
    "fetch of too much": fetch(num_bytes=8 * CHUNK_BYTES + 1),
    "fetch before the start": fetch(offset=-1),
    "fetch far out": fetch(offset=(1 << 40) + 1),
    "fetch of no path": fetch(path=""),
    "fetch of a long path": fetch(path="a" * 321),
    "fetch of odd letters": fetch(path="blocks/h\u00e9ad/1"),
    "fetch with a line break": fetch(path="manifest\n"),
    "fetch with a NUL": fetch(path="manifest\0"),
    "fetch with a long ticket": fetch(ticket=bytes(9)),
    "fetch of half a digest": fetch(known=SHA[:32]),
    "part too long": part(data=bytes(CHUNK_BYTES + 1)),
    "part with a short ticket": part(ticket=bytes(7)),
    "part of less than nothing": part(num_bytes=-1),
    "part without a digest": part(sha256=""),
    "declined for another reason": pack(t="declined", path="manifest", why="because"),
    # Extension types decode silently unless they are refused
    "extension": receipt(missing=msgpack.ExtType(5, b"payload")),
    "extension of nothing": ready(b"\xc7\x00\x05"),
    "timestamp of 32 bits": ready(b"\xd6\xff" + bytes(4)),
    "timestamp of 64 bits": ready(b"\xd7\xff" + bytes(8)),
    "timestamp of 96 bits": ready(b"\xc7\x0c\xff" + bytes(12)),
    "timestamp of nothing": ready(b"\xc7\x00\xff"),
    "timestamp as the message": b"\xd6\xff" + bytes(4),
    "timestamp as key": b"\x81\xd6\xff" + bytes(5),
    # Lengths that promise what never comes
    "list of 2^32 - 1": b"\xdd\xff\xff\xff\xff",
    "map of 2^32 - 1": b"\xdf\xff\xff\xff\xff",
    "text of 2^32 - 1": b"\xdb\xff\xff\xff\xff",
    "bytes of 2^32 - 1": b"\xc6\xff\xff\xff\xff",
    "extension of 2^32 - 1": b"\xc9\xff\xff\xff\xff\x05",
    # Bombs
    "122 KB of empty maps": b"\xdc\xff\xff" + b"\x80" * (MAX_MESSAGE_BYTES - 3),
    "lists of 256 empty maps": b"\xdc\x01\x00" + (b"\xdc\x01\x00" + NESTED * 256)[:120_000],
    "a pit of lists": b"\x91" * MAX_MESSAGE_BYTES,
    "a pit of maps": b"\x81\xa0" * (MAX_MESSAGE_BYTES // 2),
    "a pit of lists under a field": ready(b"\x91" * 100_000),
}  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks(name: str) -> None:
    data = ATTACKS[name]
    tracemalloc.start()
    try:
        with pytest.raises(WireError) as error:
            decode(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(str(error.value)) < 500  # no attack fills the log
    # 72 bytes for each empty map is the worst; without the limits a message costs what it likes.
    assert peak < 80 * MAX_MESSAGE_BYTES
    if name == "122 KB of empty maps":
        assert peak < 100_000
