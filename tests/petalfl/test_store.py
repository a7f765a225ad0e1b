from __future__ import annotations

import errno
import hashlib
import itertools
import json
import logging
import os
import stat
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from petalfl.errors import StoreError
from petalfl.schema import plain
from petalfl.sealed import FORMAT
from petalfl.store import MAX_ASIDE, DeviceStore, Identity, Outgoing, Residual, Shared, State
from tests.petalfl.builders import make_block, make_manifest

IDENTITY = Identity("default", "dev-1", "p" * 43, ("fusion", "head"))
STATE = State(
    7,
    {"head": b"\0\1\2\3" * 5, "fusion": b""},
    (Outgoing(b"m", b"12"), Outgoing(b"", b"")),
    {"encoder-acc": Residual(8, b"\4\5\6\7" * 3)},
)
KEY = bytes(range(100, 132))
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


# Damage: the good one before takes over


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


def damaged(data: bytes) -> Iterator[bytes]:
    """Every truncation, and of every byte one flipped bit, each bit in its turn."""
    for length in range(len(data)):
        yield data[:length]
    for index in range(len(data)):
        yield data[:index] + bytes([data[index] ^ (1 << index % 8)]) + data[index + 1 :]


# Name, how to write and to read it, the value before and the newest.
KEPT: list[Any] = [
    (
        "identity.json",
        DeviceStore.write_identity,
        DeviceStore.read_identity,
        replace(IDENTITY, device="dev-0"),
        IDENTITY,
    ),
    ("state.msgpack", DeviceStore.write_state, DeviceStore.read_state, State(6), STATE),
    (
        "shared.msgpack",
        DeviceStore.write_shared,
        DeviceStore.read_shared,
        Shared({"encoder-acc": 7}, {}),
        SHARED,
    ),
]
kept = pytest.mark.parametrize(
    ("name", "write", "read", "before", "newest"), KEPT, ids=["identity", "state", "shared"]
)
keyed = pytest.mark.parametrize("key", [None, KEY], ids=["plain", "encrypted"])


class Copies:
    """Both copies of a file, after two values were written."""

    def __init__(
        self, folder: Path, name: str, key: bytes | None, write: Any, values: tuple[Any, Any]
    ) -> None:
        with closing(DeviceStore(folder, key)) as store:
            for value in values:
                write(store, value)
        self.path, self.previous = folder / name, folder / f"{name}.previous"
        self.good, self.good_before = self.path.read_bytes(), self.previous.read_bytes()

    def damage(self, bad: bytes) -> None:
        self.path.write_bytes(bad)
        self.previous.write_bytes(self.good_before)


@keyed
@kept
def test_damage_brings_back_the_one_before(
    tmp_path: Path, name: str, write: Any, read: Any, before: Any, newest: Any, key: bytes | None
) -> None:
    copies = Copies(tmp_path, name, key, write, (before, newest))
    with closing(DeviceStore(tmp_path, key)) as store:
        for bad in (*damaged(copies.good), copies.good + b"\0"):
            copies.damage(bad)
            assert read(store) == before
            assert (tmp_path / f"{name}.damaged").read_bytes() == bad
            assert copies.path.read_bytes() == copies.good_before
            assert not copies.previous.exists()
    again = DeviceStore(tmp_path, key)
    assert read(again) == before
    write(again, newest)
    assert read(again) == newest
    assert copies.previous.read_bytes() == copies.good_before
    again.close()


@keyed
@kept
def test_damage_before_the_opening(
    tmp_path: Path, name: str, write: Any, read: Any, before: Any, newest: Any, key: bytes | None
) -> None:
    copies = Copies(tmp_path, name, key, write, (before, newest))
    for bad in itertools.islice(damaged(copies.good), 0, None, 5):
        copies.damage(bad)
        with closing(DeviceStore(tmp_path, key)) as store:
            assert read(store) == before


@keyed
@kept
def test_both_copies_damaged(
    tmp_path: Path, name: str, write: Any, read: Any, before: Any, newest: Any, key: bytes | None
) -> None:
    store = DeviceStore(tmp_path, key)
    write(store, before)
    write(store, newest)
    path, previous = tmp_path / name, tmp_path / f"{name}.previous"
    pairs = zip(damaged(path.read_bytes()), damaged(previous.read_bytes()), strict=False)
    for bad, bad_before in pairs:
        path.write_bytes(bad)
        previous.write_bytes(bad_before)
        if name == "shared.msgpack":  # it can be downloaded again
            assert read(store) == Shared({}, {})
            assert not path.exists()
            continue
        for _ in range(2):  # nothing is moved: it stays refused until a person decides
            with pytest.raises(StoreError, match=f"{name} is damaged: .*; {name}.previous is dam"):
                read(store)
        with pytest.raises(StoreError, match="restore"):
            write(store, newest)
        assert (path.read_bytes(), previous.read_bytes()) == (bad, bad_before)
    store.close()


@keyed
def test_the_first_one_damaged(tmp_path: Path, key: bytes | None) -> None:
    store = DeviceStore(tmp_path, key)
    store.write_state(STATE)
    for bad in damaged((tmp_path / "state.msgpack").read_bytes()):
        (tmp_path / "state.msgpack").write_bytes(bad)
        with pytest.raises(StoreError, match=r"state\.msgpack is damaged: .*previous is missing"):
            store.read_state()
    store.close()


def test_the_log_says_what_happened(store: DeviceStore, caplog: pytest.LogCaptureFixture) -> None:
    path = store.folder / "state.msgpack"
    for state in (State(6), STATE):
        store.write_state(state)
    path.write_bytes(b"rubbish")
    assert store.read_state() == State(6)
    store.write_shared(SHARED)
    (store.folder / "shared.msgpack").write_bytes(b"")
    assert store.read_shared() == Shared({}, {})
    assert [(r.name, r.levelno, r.getMessage()) for r in caplog.records] == [
        (
            "petalfl.store",
            logging.WARNING,
            f"{path} is damaged: its checksum is wrong; going on with the one before",
        ),
        (
            "petalfl.store",
            logging.WARNING,
            f"{store.folder}/shared.msgpack is damaged: its checksum is wrong; "
            f"it is downloaded again",
        ),
    ]


def test_what_is_damaged_never_becomes_the_one_before(tmp_path: Path) -> None:
    store = DeviceStore(tmp_path)
    for num in (1, 2):
        store.write_state(State(num))
    store.close()
    (tmp_path / "state.msgpack").write_bytes(b"rubbish")
    store = DeviceStore(tmp_path)
    store.write_state(State(3))  # without reading first
    (tmp_path / "state.msgpack").write_bytes(b"rubbish")
    assert store.read_state() == State(1)
    store.close()


def test_a_sector_that_cannot_be_read(store: DeviceStore, monkeypatch: pytest.MonkeyPatch) -> None:
    for state in (State(6), STATE):
        store.write_state(state)
    real = Path.open

    def fail(self: Path, *arguments: Any) -> Any:
        if self.name == "state.msgpack":
            raise OSError(errno.EIO, "Input/output error")
        return real(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", fail)
        assert store.read_state() == State(6)
    assert store.read_state() == State(6)


@given(
    rounds=st.lists(st.integers(0, 99), min_size=1, max_size=4),
    where=st.floats(0, 1, exclude_max=True),
    bit=st.integers(0, 7) | st.none(),
    key=st.sampled_from([None, KEY]),
)
@settings(deadline=None)
def test_the_last_or_the_one_before(
    rounds: list[int], where: float, bit: int | None, key: bytes | None
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = DeviceStore(Path(folder), key)
        for round_num in rounds:
            store.write_state(State(round_num))
        path = Path(folder) / "state.msgpack"
        data = bytearray(path.read_bytes())
        index = int(where * len(data))
        if bit is None:
            del data[index:]
        else:
            data[index] ^= 1 << bit
        path.write_bytes(data)
        if len(rounds) > 1:
            assert store.read_state() == State(rounds[-2])
        else:
            with pytest.raises(StoreError, match="is damaged"):
                store.read_state()
        store.close()


names = st.from_regex(r"[a-z0-9][a-z0-9-]{0,9}", fullmatch=True)
vectors = st.dictionaries(names, st.binary(max_size=64), max_size=3)
states = st.builds(
    State,
    st.integers(0, 1 << 40),
    vectors,
    st.lists(st.builds(Outgoing, st.binary(max_size=9), st.binary(max_size=9)), max_size=3).map(
        tuple
    ),
    st.dictionaries(names, st.builds(Residual, st.integers(1, 9), st.binary(max_size=9))),
)
shared_blocks = st.builds(Shared, st.dictionaries(names, st.integers(0, 9)), vectors)
identities = st.builds(
    Identity,
    names,
    names,
    st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=16, max_size=30),
    st.lists(names, max_size=3).map(tuple),
)


@given(states, shared_blocks, identities, st.none() | st.binary(min_size=32, max_size=32))
@settings(deadline=None, max_examples=50)
def test_round_trip(state: State, shared: Shared, identity: Identity, key: bytes | None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(2):
            store = DeviceStore(Path(folder), key)
            store.write_state(state)
            store.write_shared(shared)
            store.write_identity(identity)
            store.close()
        store = DeviceStore(Path(folder), key)
        assert store.read_state() == state
        assert store.read_shared() == shared
        assert store.read_identity() == identity
        store.close()


@kept
def test_well_kept_but_of_another_version(
    store: DeviceStore, name: str, write: Any, read: Any, before: Any, newest: Any
) -> None:
    store._write_kept(name, {"unknown": 1})
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
store, left = DeviceStore(Path(sys.argv[1])), int(sys.argv[2])
def killed(real):
    def call(*arguments):
        global left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        return real(*arguments)
    return call
os.fsync, Path.replace = killed(os.fsync), killed(Path.replace)
store.write_state(State(8))
"""


@pytest.mark.parametrize(
    ("num_done", "files", "expected"),
    [
        (0, {"", ".tmp", ".previous"}, STATE),  # before the data's fsync
        (1, {"", ".tmp", ".previous"}, STATE),
        (2, {".tmp", ".previous"}, STATE),  # between the renames
        (3, {"", ".previous"}, State(8)),  # before the folder's fsync
    ],
)
def test_killed(tmp_path: Path, num_done: int, files: set[str], expected: State) -> None:
    store = DeviceStore(tmp_path)
    store.write_state(State(6))
    store.write_state(STATE)
    store.close()
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(num_done)]
    assert subprocess.run(command).returncode == -9
    assert {p.name.removeprefix("state.msgpack") for p in tmp_path.glob("state*")} == files
    again = DeviceStore(tmp_path)
    assert again.read_state() == expected
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


class Crash(BaseException):
    """The power is gone."""


def fail_at(patch: pytest.MonkeyPatch, step: int, error: BaseException) -> Iterator[int]:
    """Raises ``error`` before the file operation ``step`` and all that follow it."""
    count = itertools.count()

    def failing(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            if next(count) >= step:
                raise error
            return real(*arguments, **named)

        return call

    for owner, name in (
        (Path, "open"), (Path, "replace"), (Path, "unlink"),
        (os, "fchmod"), (os, "fsync"), (os, "open"),
    ):  # fmt: skip
        patch.setattr(owner, name, failing(getattr(owner, name)))
    return count


@keyed
@pytest.mark.parametrize("error", [Crash(), OSError(errno.ENOSPC, "No space left on device")])
@kept
def test_a_fault_at_any_step_of_a_write_leaves_old_or_new(
    tmp_path: Path, name: str, write: Any, read: Any, before: Any, newest: Any,
    key: bytes | None, error: BaseException,
) -> None:  # fmt: skip
    left = []
    for step in range(50):
        folder = tmp_path / str(step)
        store = DeviceStore(folder, key)
        write(store, before)
        with pytest.MonkeyPatch.context() as patch:
            count = fail_at(patch, step, error)
            try:
                write(store, newest)
            except (Crash, StoreError):
                pass
            else:
                assert next(count) <= step  # it is through, and nothing was raised
                break
        store.close()
        again = DeviceStore(folder, key)
        left.append(read(again) == newest)
        assert left[-1] or read(again) == before
        write(again, newest)
        assert read(again) == newest
        assert not list(folder.glob("*.tmp"))
        again.close()
    store.close()
    # open, fchmod, fsync, rename, rename leave the old one; then the folder's open and fsync, and
    # of an identity the end of its enrollment
    num_after = 3 if name == "identity.json" else 2
    assert left == [False] * 5 + [True] * num_after


@kept
def test_a_crash_at_any_step_of_a_recovery(
    tmp_path: Path, name: str, write: Any, read: Any, before: Any, newest: Any
) -> None:
    for step in range(50):
        folder = tmp_path / str(step)
        store = DeviceStore(folder)
        write(store, before)
        write(store, newest)
        (folder / name).write_bytes(b"rubbish")
        with pytest.MonkeyPatch.context() as patch:
            fail_at(patch, step, Crash())
            try:
                assert read(store) == before
                break
            except Crash:
                pass
        store.close()
        again = DeviceStore(folder)
        assert read(again) == before
        again.close()
    store.close()
    assert step == 4  # two files read, two renamed


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
