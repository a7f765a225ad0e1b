from __future__ import annotations

import hashlib
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest

from petalfl.errors import StoreError
from petalfl.store import DeviceStore, Identity, Outgoing, Residual, Shared, State

IDENTITY = Identity("default", "dev-1", "p" * 43, ("fusion", "head"))
STATE = State(
    7,
    {"head": b"\0\1\2\3" * 5, "fusion": b""},
    (Outgoing(b"m", b"12"), Outgoing(b"", b"")),
    {"encoder-acc": Residual(8, b"\4\5\6\7" * 3)},
)
SHARED = Shared({"encoder-acc": 8}, {"encoder-acc": bytes(range(40))})


@pytest.fixture
def store(tmp_path: Path) -> Iterator[DeviceStore]:
    store = DeviceStore(tmp_path / "store")
    yield store
    store.close()


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


# Damage


def damaged(data: bytes) -> Iterator[bytes]:
    """Every truncation and every flipped bit."""
    for length in range(len(data)):
        yield data[:length]
    for index in range(len(data)):
        for bit in range(8):
            yield data[:index] + bytes([data[index] ^ (1 << bit)]) + data[index + 1 :]


CHECKED: list[Any] = [
    ("state.msgpack", lambda s: s.write_state(STATE), DeviceStore.read_state),
    ("shared.msgpack", lambda s: s.write_shared(SHARED), DeviceStore.read_shared),
]


@pytest.mark.parametrize(("name", "write", "read"), CHECKED, ids=["state", "shared"])
def test_damage_is_noticed(
    store: DeviceStore,
    name: str,
    write: Callable[[DeviceStore], None],
    read: Callable[[DeviceStore], object],
) -> None:
    write(store)
    path = store.folder / name
    good = path.read_bytes()
    for bad in damaged(good):
        path.write_bytes(bad)
        with pytest.raises(StoreError, match=f"{name} is damaged: its checksum is wrong"):
            read(store)
    path.write_bytes(good + b"\0")
    with pytest.raises(StoreError, match="checksum"):
        read(store)


@pytest.mark.parametrize(("name", "write", "read"), CHECKED, ids=["state", "shared"])
def test_well_kept_but_of_another_version(
    store: DeviceStore,
    name: str,
    write: Callable[[DeviceStore], None],
    read: Callable[[DeviceStore], object],
) -> None:
    store._write_checked(name, {"unknown": 1})
    with pytest.raises(StoreError, match=f"{name} is not readable by this version: .*'unknown'"):
        read(store)


BAD_IDENTITIES = {
    "empty": b"",
    "binary": b"\xff\xfe",
    "a list": b"[]",
    "a field too few": b'{"federation": "default"}',
    "a name that climbs": json.dumps(
        {"federation": "default", "device": "../x", "password": "p" * 43, "private_blocks": []}
    ).encode(),
    "a short password": json.dumps(
        {"federation": "default", "device": "d", "password": "p", "private_blocks": []}
    ).encode(),
}


@pytest.mark.parametrize("data", BAD_IDENTITIES.values(), ids=BAD_IDENTITIES.keys())
def test_bad_identity(store: DeviceStore, data: bytes) -> None:
    (store.folder / "identity.json").write_bytes(data)
    with pytest.raises(StoreError, match=r"identity\.json is damaged"):
        store.read_identity()


def test_damage_of_the_identity_is_noticed(store: DeviceStore) -> None:
    """A flipped bit in ``private_blocks`` would make a private block one that may be shared."""
    store.write_identity(IDENTITY)
    path = store.folder / "identity.json"
    for bad in damaged(path.read_bytes()):
        path.write_bytes(bad)
        with pytest.raises(StoreError, match=r"identity\.json"):
            store.read_identity()


# Power cuts and disks


def test_a_crash_before_the_rename_leaves_the_old_state(
    store: DeviceStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.write_state(STATE)

    def crash(self: Path, target: Path) -> Path:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            store.write_state(State(8))
    assert store.read_state() == STATE
    store.write_state(State(9))
    assert store.read_state() == State(9)


KILLED = """
import os, signal, sys
from pathlib import Path
from petalfl.store import DeviceStore, State
os.fsync = lambda fd: os.kill(os.getpid(), signal.SIGKILL)
DeviceStore(Path(sys.argv[1])).write_state(State(8))
"""


def test_killed_before_the_rename(tmp_path: Path) -> None:
    store = DeviceStore(tmp_path)
    store.write_state(STATE)
    store.close()
    assert subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)]).returncode == -9
    assert (tmp_path / "state.msgpack.tmp").exists()  # so far it came
    again = DeviceStore(tmp_path)
    assert again.read_state() == STATE
    again.write_state(State(9))
    assert again.read_state() == State(9)
    again.close()


def test_secrets_are_for_the_owner_alone(store: DeviceStore) -> None:
    store.write_identity(IDENTITY)
    store.write_state(STATE)
    for name in ("identity.json", "state.msgpack"):
        assert stat.S_IMODE((store.folder / name).stat().st_mode) == 0o600


@pytest.mark.parametrize(
    "write",
    [
        lambda s: s.write_identity(IDENTITY),
        lambda s: s.write_state(State(9)),
        lambda s: s.write_shared(SHARED),
        lambda s: s.write_file("head/eval_model.onnx", b"x"),
    ],
    ids=["identity", "state", "shared", "file"],
)
def test_full_disk(
    store: DeviceStore, monkeypatch: pytest.MonkeyPatch, write: Callable[[DeviceStore], None]
) -> None:
    store.write_state(STATE)

    def no_space(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(StoreError, match=r"cannot write .*No space left on device"):
        write(store)
    assert store.read_state() == STATE


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=f"cannot open the device store {tmp_path}/file/store"):
        DeviceStore(tmp_path / "file" / "store")


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("identity.json", DeviceStore.read_identity),
        ("state.msgpack", DeviceStore.read_state),
        ("shared.msgpack", DeviceStore.read_shared),
        ("artifacts/manifest.json", lambda s: s.read_file("manifest.json")),
    ],
)
def test_file_that_cannot_be_read(
    store: DeviceStore, name: str, read: Callable[[DeviceStore], object]
) -> None:
    (store.folder / name).mkdir()  # as root a mode would not stop us
    with pytest.raises(StoreError, match=name.rpartition("/")[2]):
        read(store)


def test_artifacts_folder_that_cannot_be_made(store: DeviceStore) -> None:
    (store.artifacts / "head").write_text("in the way")
    with pytest.raises(StoreError, match="head"):
        store.write_file("head/eval_model.onnx", b"x")
