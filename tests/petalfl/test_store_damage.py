"""The device store's files, damaged: the good one before takes over."""

from __future__ import annotations

import errno
import itertools
import json
import logging
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from petalfl.errors import StoreError
from petalfl.store import DeviceStore, Identity, Outgoing, Residual, Shared, State
from tests.petalfl.stores import (
    KEY,
    SHARED,
    STATE,
    Copies,
    damaged,
    kept,
    keyed,
)


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
