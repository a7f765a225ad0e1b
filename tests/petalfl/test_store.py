"""The device store: what it keeps, for whom, in which formats and within which bounds."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import struct
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import msgpack
import pytest

from petalfl.errors import StoreError
from petalfl.schema import plain
from petalfl.sealed import FORMAT
from petalfl.store import MAX_ASIDE, DeviceStore, Outgoing, Shared, State
from tests.petalfl.builders import make_block, make_manifest
from tests.petalfl.stores import (
    IDENTITY,
    KEPT,
    KEY,
    SHARED,
    STATE,
    Crash,
    damaged,
    fail_at,
    keyed,
)


def test_empty_at_first(store: DeviceStore) -> None:
    assert store.read_identity() is None
    assert store.read_state() == State(0, {}, ())
    assert store.read_shared() == Shared({}, {})
    assert store.read_file("head/eval_model.onnx") is None


def test_everything_comes_back_after_a_restart(tmp_path: Path) -> None:
    store = DeviceStore(tmp_path)
    store.write_identity(IDENTITY)
    store.write_state(STATE)
    store.write_shared(SHARED)
    store.write_file("head/eval_model.onnx", b"onnx")
    store.write_file("manifest.json", b"{}")
    store.close()
    again = DeviceStore(tmp_path)
    assert again.read_identity() == IDENTITY
    assert again.read_state() == STATE
    assert again.read_shared() == SHARED
    assert again.read_file("head/eval_model.onnx") == b"onnx"
    assert (again.artifacts / "head/eval_model.onnx").read_bytes() == b"onnx"
    assert again.read_file("manifest.json") == b"{}"
    again.close()


def test_a_state_from_before_residuals_is_read(store: DeviceStore) -> None:
    fields = {"round_num": 7, "private": {"head": bytes(8)}, "outbox": []}
    body = msgpack.packb(fields)
    path = store.folder / "state.msgpack"
    path.write_bytes(hashlib.sha256(body).digest() + body)
    assert store.read_state() == State(7, {"head": bytes(8)}, (), {})


def test_a_write_replaces(store: DeviceStore) -> None:
    store.write_state(STATE)
    store.write_state(State(8))
    assert store.read_state() == State(8)


# One owner


def test_second_open_in_this_process(store: DeviceStore) -> None:
    with pytest.raises(StoreError, match=f"{store.folder} is open already; give every client"):
        DeviceStore(store.folder)


OPEN = """
import sys
from pathlib import Path
from petalfl.errors import StoreError
from petalfl.store import DeviceStore
try:
    DeviceStore(Path(sys.argv[1]))
except StoreError as error:
    print(error)
"""


def open_elsewhere(folder: Path) -> str:
    command = [sys.executable, "-c", OPEN, str(folder)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_second_open_in_another_process(store: DeviceStore) -> None:
    assert "is open already" in open_elsewhere(store.folder)


def test_closed_it_is_free(tmp_path: Path) -> None:
    for _ in range(2):
        DeviceStore(tmp_path).close()
    assert open_elsewhere(tmp_path) == ""


def test_a_refused_open_leaks_nothing(store: DeviceStore) -> None:
    before = sorted(Path("/proc/self/fd").iterdir())
    for _ in range(3):
        with pytest.raises(StoreError):
            DeviceStore(store.folder)
    assert sorted(Path("/proc/self/fd").iterdir()) == before


def test_closing_twice_closes_nothing_of_others(tmp_path: Path) -> None:
    store = DeviceStore(tmp_path)
    store.close()
    with (tmp_path / "other").open("w") as other:  # gets the number that became free
        store.close()
        other.write("x")


def test_the_key_of_an_enrollment_is_kept_until_there_is_an_identity(tmp_path: Path) -> None:
    keys = []
    for device in ("dev-0", "dev-0", "dev-1"):
        store = DeviceStore(tmp_path / "store", KEY)
        keys.append(store.enrollment_key(device))
        assert store.enrollment_key(device) == keys[-1]
        assert keys[-1].encode() not in (store.folder / "enrollment.json").read_bytes()
        store.close()
    assert keys[0] == keys[1] != keys[2]
    store = DeviceStore(tmp_path / "store", KEY)
    store.write_identity(IDENTITY)
    assert not (store.folder / "enrollment.json").exists()
    assert store.enrollment_key("dev-1") not in keys
    store.close()


# Formats


def fill(store: DeviceStore) -> None:
    for write, before, newest in ((k[1], k[3], k[4]) for k in KEPT):
        write(store, before)
        write(store, newest)


def assert_full(store: DeviceStore) -> None:
    assert store.read_identity() == IDENTITY
    assert store.read_state() == STATE
    assert store.read_shared() == SHARED


def fill_format_1(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in (("state.msgpack", STATE), ("shared.msgpack", SHARED)):
        body = msgpack.packb(plain(value))
        (folder / name).write_bytes(hashlib.sha256(body).digest() + body)
    identity = plain(IDENTITY)
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    data = json.dumps({"identity": identity, "sha256": digest}, indent=1)
    (folder / "identity.json").write_text(data)


@keyed
def test_format_1_is_migrated_when_it_is_opened(tmp_path: Path, key: bytes | None) -> None:
    fill_format_1(tmp_path)
    store = DeviceStore(tmp_path, key)
    for name, *_ in KEPT:
        header = (tmp_path / name).read_bytes()[:42]
        assert (header[:8], struct.unpack(">H", header[40:])) == (b"petalfl\n", (FORMAT,))
    assert_full(store)
    store.close()
    assert_full(again := DeviceStore(tmp_path, key))
    again.close()


@pytest.mark.parametrize("name", ["identity.json", "state.msgpack"])
def test_damaged_format_1_is_refused(tmp_path: Path, name: str) -> None:
    fill_format_1(tmp_path)
    good = (tmp_path / name).read_bytes()
    for bad in itertools.islice(damaged(good), 0, None, 7):
        (tmp_path / name).write_bytes(bad)
        with pytest.raises(StoreError, match=f"{name} is damaged"):
            DeviceStore(tmp_path)
    (tmp_path / name).write_bytes(good)
    assert_full(store := DeviceStore(tmp_path))  # nothing was lost, and nobody holds the lock
    store.close()


@pytest.mark.parametrize("name", [k[0] for k in KEPT])
def test_a_newer_format_is_refused_and_left_alone(tmp_path: Path, name: str) -> None:
    store = DeviceStore(tmp_path)
    fill(store)
    store.close()
    rest = struct.pack(">H", FORMAT + 1) + b"whatever comes"
    newer = b"petalfl\n" + hashlib.sha256(rest).digest() + rest
    (tmp_path / name).write_bytes(newer)
    for key in (None, KEY):
        with pytest.raises(StoreError, match=f"{name} is of format 3, .* update petalfl"):
            DeviceStore(tmp_path, key)
    assert (tmp_path / name).read_bytes() == newer


# Encryption


def secrets_in(folder: Path) -> list[str]:
    secrets = (IDENTITY.password.encode(), STATE.private["head"], SHARED.vectors["encoder-acc"])
    data = {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    return [name for name, found in data.items() if any(secret in found for secret in secrets)]


def test_with_a_key_nothing_private_can_be_read(tmp_path: Path) -> None:
    for key, found in ((None, 4), (KEY, 0)):  # the identity before has the same password
        store = DeviceStore(tmp_path / str(found), key)
        fill(store)
        assert len(secrets_in(store.folder)) == found
        assert_full(store)
        store.close()


def test_a_plain_store_becomes_encrypted_and_leaves_no_plain_copy(tmp_path: Path) -> None:
    store = DeviceStore(tmp_path)
    fill(store)
    fill(store)
    for name, *_ in KEPT:
        (tmp_path / f"{name}.damaged").write_bytes((tmp_path / name).read_bytes())
        (tmp_path / f"{name}.tmp").write_bytes((tmp_path / name).read_bytes())
    store.close()
    assert len(secrets_in(tmp_path)) == 4 + 3 + 3
    store = DeviceStore(tmp_path, KEY)
    assert secrets_in(tmp_path) == []
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        ["artifacts", "lock", *(k[0] for k in KEPT)]
    )
    assert_full(store)
    store.close()


def test_a_crash_at_any_step_on_the_way_to_encryption(tmp_path: Path) -> None:
    for step in range(200):
        folder = tmp_path / str(step)
        store = DeviceStore(folder)
        fill(store)
        store.close()
        with pytest.MonkeyPatch.context() as patch:
            fail_at(patch, step, Crash())
            try:
                store = DeviceStore(folder, KEY)
            except Crash:
                pass
            else:
                break
        again = DeviceStore(folder, KEY)
        assert_full(again)
        assert secrets_in(folder) == []
        again.close()
    assert step > 20
    store.close()


@pytest.mark.parametrize(
    ("key", "message"),
    [(None, "is encrypted; open the device store with its key"), (bytes(32), "the key is not the")],
    ids=["none", "another"],
)
def test_the_wrong_key(tmp_path: Path, key: bytes | None, message: str) -> None:
    store = DeviceStore(tmp_path, KEY)
    fill(store)
    store.close()
    before = {p: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
    for _ in range(2):
        with pytest.raises(StoreError, match=message):
            DeviceStore(tmp_path, key)
    (tmp_path / "state.msgpack").write_bytes(b"rubbish")  # damaged, and the one before is foreign
    with pytest.raises(StoreError, match=message):
        DeviceStore(tmp_path, key)
    (tmp_path / "state.msgpack").write_bytes(before[tmp_path / "state.msgpack"])
    assert {p: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()} == before
    assert_full(again := DeviceStore(tmp_path, KEY))
    again.close()


def test_swapped_files_are_noticed(tmp_path: Path) -> None:
    store = DeviceStore(tmp_path, KEY)
    store.write_state(STATE)
    store.write_shared(SHARED)
    (tmp_path / "state.msgpack").write_bytes((tmp_path / "shared.msgpack").read_bytes())
    with pytest.raises(StoreError, match="not encrypted under this name"):
        store.read_state()
    store.close()


# Bounds


def test_no_more_than_three_copies(store: DeviceStore) -> None:
    for round_num in range(1, 9):
        fill(store)
        for name, _, read, *_ in KEPT:
            (store.folder / name).write_bytes(b"rubbish %d" % round_num)
            read(store)
    fill(store)
    assert sorted(p.name for p in store.folder.iterdir() if p.is_file()) == sorted(
        ["lock", *(f"{k[0]}{end}" for k in KEPT for end in ("", ".previous", ".damaged"))]
    )


def test_leftovers_are_removed(tmp_path: Path) -> None:
    encoder = make_block("encoder-acc", ("acc",), 2, 3)
    head = make_block("head", ("encoder-acc",), 2, 2)
    manifest = make_manifest({"acc": 3}, encoder, head)
    store = DeviceStore(tmp_path)
    fill(store)
    named = ["head/eval_model.onnx", "head/parameters.bin", "optimizers/sgd.onnx"]
    for path in (*named, "head/old.onnx", "encoder-old/eval_model.onnx", "head/x.onnx.tmp"):
        store.write_file(path, b"x")
    (tmp_path / "state.msgpack.tmp").write_bytes(b"x")
    (tmp_path / "notes.tmp").write_bytes(b"of the app's")
    store.close()

    store = DeviceStore(tmp_path)  # no manifest yet: a download was cut off
    assert not (tmp_path / "state.msgpack.tmp").exists()
    assert store.read_file("head/x.onnx.tmp") is None
    assert store.read_file("head/old.onnx") == b"x"
    store.write_file("manifest.json", manifest.to_json())
    store.close()

    store = DeviceStore(tmp_path)
    files = [p for p in store.artifacts.rglob("*") if p.is_file()]
    assert sorted(p.relative_to(store.artifacts).as_posix() for p in files) == [
        *named[:2],
        "manifest.json",
        named[2],
    ]
    assert (tmp_path / "notes.tmp").exists()
    assert_full(store)
    store.close()


# States of other models


def of_model(number: int) -> State:
    return State(number, {"head": bytes([number])}, layout=f"{number:064x}"[::-1])


def test_a_state_that_was_set_aside_comes_back(tmp_path: Path) -> None:
    with closing(DeviceStore(tmp_path)) as store:
        assert store.take_up("0" * 64) is None
        path = store.set_aside(replace(of_model(1), outbox=(Outgoing(b"m", b"p"),)))
        assert path.parent == tmp_path / "aside"
        assert store.take_up(of_model(1).layout) == of_model(1)  # what was to be sent is dropped
        assert store.take_up(of_model(2).layout) is None
        store.set_aside(replace(of_model(1), round_num=9))
    with closing(DeviceStore(tmp_path)) as store:
        assert store.take_up(of_model(1).layout) == replace(of_model(1), round_num=9)


def test_of_many_models_the_newest_stay(tmp_path: Path) -> None:
    with closing(DeviceStore(tmp_path)) as store:
        for number in range(MAX_ASIDE + 2):
            os.utime(store.set_aside(of_model(number)), (number, number))
        found = [store.take_up(of_model(number).layout) for number in range(MAX_ASIDE + 2)]
        assert found[:2] == [None, None]
        assert found[2:] == [of_model(number) for number in range(2, MAX_ASIDE + 2)]


def test_what_was_set_aside_is_encrypted_with_the_store(tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    with closing(DeviceStore(tmp_path)) as store:
        path = store.set_aside(State(1, {"head": b"private" * 9}, layout="a" * 64))
    with closing(DeviceStore(tmp_path, bytes(32))) as store:
        assert b"private" not in path.read_bytes()
        assert store.take_up("a" * 64) == State(1, {"head": b"private" * 9}, layout="a" * 64)


def test_what_was_set_aside_may_be_damaged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with closing(DeviceStore(tmp_path)) as store:
        path = store.set_aside(of_model(1))
    path.write_bytes(path.read_bytes()[:-1])
    path.with_name("x.msgpack.tmp").touch()
    with closing(DeviceStore(tmp_path)) as store:
        assert store.take_up(of_model(1).layout) is None
    assert "is damaged: its checksum is wrong; it is lost" in caplog.text
    assert [one.name for one in path.parent.iterdir()] == [f"{path.name}.damaged"]
