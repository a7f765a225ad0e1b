"""Power cuts and disks that fail under the device store."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from petalfl.errors import StoreError
from petalfl.store import DeviceStore, State
from tests.petalfl.stores import (
    IDENTITY,
    SHARED,
    STATE,
    Crash,
    fail_at,
    kept,
    keyed,
)


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
