"""The journal while one thread commits and another appends."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from petalfl.codecs import parse_codec
from petalfl.payloads import encode_payload, parse_payload
from petalfl.wire import BlockUpdate
from server.database import open_database
from server.journal import DATABASE, LINE, SEGMENT_BYTES, Journal
from server.versions import StateError
from tests.server.builders import BLOCKS, SIZES, make_update


class Database:
    """Does `meanwhile` before or after it looks for what waits in segments."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db
        self.meanwhile: Callable[[], object] = lambda: None
        self.is_before = False

    def execute(self, query: str, *values: Any) -> sqlite3.Cursor:
        is_it = query.startswith("SELECT delta")
        if is_it and self.is_before:
            self.meanwhile()
        rows = self._db.execute(query, *values)
        if is_it and not self.is_before:
            self.meanwhile()
        return rows


@pytest.fixture
def db(tmp_path: Path) -> Iterator[Database]:
    opened = open_database(tmp_path / DATABASE)
    yield Database(opened)
    opened.close()


@pytest.fixture
def journal(tmp_path: Path, db: Database) -> Iterator[Journal]:
    opened = Journal(db, tmp_path)  # type: ignore[arg-type]
    yield opened
    opened.close()


def waiting(journal: Journal) -> list[tuple[str, float]]:
    return [(update.device, float(update.delta[0])) for update in journal.unconsumed(BLOCKS)]


@pytest.mark.parametrize("is_before", [True, False])
def test_an_update_committed_while_segments_are_set_aside_is_kept(
    journal: Journal, db: Database, monkeypatch: pytest.MonkeyPatch, is_before: bool
) -> None:
    monkeypatch.setattr("server.journal.SEGMENT_BYTES", 4 * SIZES["head"])  # one update in each
    db.meanwhile, db.is_before = journal.commit, is_before
    for number in range(3):
        journal.append(make_update(f"device-{number}", "head", number))
    db.meanwhile = lambda: None
    journal.commit()
    assert waiting(journal) == [("device-0", 0), ("device-1", 1), ("device-2", 2)]


def test_updates_are_appended_while_others_are_committed(journal: Journal) -> None:
    is_over = threading.Event()

    def commit() -> None:
        while not is_over.is_set():
            journal.commit()

    thread = threading.Thread(target=commit)
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread.start()
    try:
        for number in range(500):
            journal.append(make_update(f"device-{number}", "head", number))
    finally:
        is_over.set()
        thread.join()
        sys.setswitchinterval(interval_s)
    journal.commit()
    assert waiting(journal) == [(f"device-{n}", n) for n in range(500)]


@pytest.mark.parametrize("codec", ["f32", "f16", "int8", "topk-int8:0.3"])
def test_a_payload_is_kept_as_it_came(journal: Journal, tmp_path: Path, codec: str) -> None:
    vector = np.arange(8, dtype=np.float32) - 3
    payload, _ = encode_payload(
        parse_codec(codec), BLOCKS["head"], vector, None, np.random.default_rng(0)
    )
    encoded = parse_payload(parse_codec(codec), BLOCKS["head"], payload)
    journal.append(replace(make_update("watch", "head", 0.0), encoded=encoded))
    journal.commit()
    assert b"".join(path.read_bytes() for path in tmp_path.glob("journal/*")) == payload
    [found] = journal.unconsumed(BLOCKS)
    assert (found.encoded.codec, bytes(found.encoded.payload)) == (codec, payload)
    np.testing.assert_array_equal(found.delta, encoded.decode())


def drawn(number: int, codec: str = "f32") -> BlockUpdate:
    known, vector = parse_codec(codec), np.linspace(-1, number, 8, dtype=np.float32)
    payload, _ = encode_payload(known, BLOCKS["head"], vector, None, np.random.default_rng(0))
    encoded = parse_payload(known, BLOCKS["head"], payload)
    return replace(make_update(f"device-{number}", "head", 0.0), encoded=encoded)


def is_mapped(journal: Journal, update: BlockUpdate) -> bool:
    """And what is mapped is the payload."""
    found = journal.mapped(update.update_id)
    if found is not None:
        assert found.readonly and bytes(found) == update.encoded.payload
        with pytest.raises(TypeError):
            found[0] = 1
    return found is not None


CODECS = ("f32", "topk:0.3", "int8", "f16", "topk-int8:0.5", "bf16")


def test_payloads_are_read_where_they_lie(
    journal: Journal, db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before and after the commit, in the open segment and those before, and after a restart."""
    monkeypatch.setattr("server.journal.SEGMENT_BYTES", 3 * LINE)
    updates = [drawn(k, CODECS[k % len(CODECS)]) for k in range(20)]
    for update in updates:
        journal.append(update)
        assert is_mapped(journal, update)
    assert all(is_mapped(journal, update) for update in updates)
    journal.commit()
    assert all(is_mapped(journal, update) for update in updates)
    assert len(list(tmp_path.glob("journal/*.deltas"))) == 7
    again = Journal(db, tmp_path)  # type: ignore[arg-type]
    try:
        again.append(drawn(20))
        assert all(is_mapped(again, update) for update in [*updates, drawn(20)])
        again.commit()
        assert [update.device for update in again.unconsumed(BLOCKS)] == [
            f"device-{k}" for k in range(21)
        ]
    finally:
        again.close()


def test_segments_are_listed_once(
    journal: Journal, db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There may be one for each of thousands of updates."""
    monkeypatch.setattr("server.journal.SEGMENT_BYTES", LINE)
    updates = [drawn(k) for k in range(9)]
    for update in updates:
        journal.append(update)
    journal.commit()
    again = Journal(db, tmp_path)  # type: ignore[arg-type]
    try:
        with monkeypatch.context() as patch:
            patch.setattr(Path, "glob", None)
            for opened in (journal, again):
                assert len(list(opened.unconsumed(BLOCKS))) == 9
                assert all(is_mapped(opened, update) for update in updates)
    finally:
        again.close()


def test_a_segment_that_has_not_half_of_its_length_is_not_mapped(
    journal: Journal, db: Database, tmp_path: Path
) -> None:
    """Once nothing more is written to it: there may be many of them."""
    journal.append(drawn(0))
    journal.commit()
    again = Journal(db, tmp_path)  # type: ignore[arg-type]
    try:
        assert not is_mapped(again, drawn(0))
        assert is_mapped(journal, drawn(0)), "which is the one that writes to it"
        assert is_mapped(again, drawn(0)), "it has its full length since"
    finally:
        again.close()


def test_a_payload_longer_than_a_segment_is_mapped(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.journal.SEGMENT_BYTES", 8)
    updates = [drawn(k) for k in range(3)]
    for update in updates:
        journal.append(update)
    assert all(is_mapped(journal, update) for update in updates)


def test_a_segment_is_mapped_once_and_takes_no_more_of_the_disk(
    journal: Journal, tmp_path: Path
) -> None:
    updates = [drawn(k) for k in range(5)]
    for update in updates:
        journal.append(update)
    found = [journal.mapped(update.update_id) for update in updates]
    assert len({id(one.obj) for one in found if one is not None}) == 1
    [path] = tmp_path.glob("journal/*.deltas")
    assert path.stat().st_size == SEGMENT_BYTES
    assert 512 * path.stat().st_blocks < SEGMENT_BYTES / 100
    del found
    assert not journal._maps, "nobody looks at it any more"


def test_what_is_still_in_use_is_not_written_over(
    journal: Journal, db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.journal.SEGMENT_BYTES", LINE)
    updates, found = [drawn(k) for k in range(9)], {}
    for number, update in enumerate(updates):
        journal.append(update)
        journal.commit()
        found[number] = journal.mapped(update.update_id)
        if number % 3:  # consumed
            db.execute("UPDATE updates SET delta = NULL WHERE update_id = ?", (update.update_id,))
    for number in (0, 3, 6):
        assert bytes(found[number] or b"") == updates[number].encoded.payload
    assert journal.mapped(updates[1].update_id) is None, "it is consumed"
    assert bytes(found[1] or b"") != updates[1].encoded.payload, "else this would show nothing"


def test_where_payloads_are_not_aligned_they_are_not_mapped(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a server before this one wrote them."""
    updates = [drawn(0, "topk:0.3"), drawn(1)]
    with monkeypatch.context() as patch:
        patch.setattr("server.journal.LINE", 1)
        for update in updates:
            journal.append(update)
    assert [is_mapped(journal, update) for update in updates] == [True, False]


def test_a_segment_that_cannot_be_mapped(
    journal: Journal, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    journal.append(drawn(0))

    def refuse(*what: object, **how: object) -> None:
        raise OSError(19, "No such device")

    monkeypatch.setattr("server.journal.mmap.mmap", refuse)
    assert journal.mapped(drawn(0).update_id) is None
    assert "cannot map a segment of the journal" in caplog.text


def test_a_payload_of_an_unknown_codec_is_an_error(journal: Journal, db: Database) -> None:
    """Of a newer server's journal, say."""
    journal.append(make_update("watch", "head", 1.0))
    journal.commit()
    db.execute("UPDATE updates SET codec = 'f8'")
    with pytest.raises(StateError, match="unknown codec 'f8'"):
        list(journal.unconsumed(BLOCKS))


OTHERS = [("phone", "head", 1), ("watch", "fusion", 1), ("watch", "head", 2)]


def test_a_row_knows_its_task_before_and_after_its_commit(journal: Journal) -> None:
    journal.append(make_update("watch", "head", 1.0))
    for _ in range(2):
        for device, block, round_num in OTHERS:
            assert not journal._has_other(make_update(device, block, 1.0, round_num=round_num))
        with pytest.raises(StateError, match="has an update of that task"):
            journal.append(make_update("watch", "head", 2.0, update_id=bytes(16)))
        journal.commit()
    assert journal._sent == set()


async def test_without_a_descriptor_to_spare_what_is_held_stays(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal.append(make_update("watch", "head", 1.0))

    def dup(descriptor: int) -> int:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patch, pytest.raises(StateError, match="Too many open files"):
        patch.setattr(os, "dup", dup)
        await journal.commit_on_thread()
    assert waiting(journal) == []
    await asyncio.gather(journal.commit_on_thread(), journal.commit_on_thread())
    assert waiting(journal) == [("watch", 1.0)]


async def test_a_commit_that_nobody_waits_for_goes_on(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a server that stops gives up its step while that commits."""
    journal.append(make_update("watch", "head", 1.0))
    begun, go_on, sync = threading.Event(), threading.Event(), os.fdatasync

    def slow(segment: int) -> None:
        begun.set()
        assert go_on.wait(60)
        sync(segment)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", slow)
        given_up = asyncio.create_task(journal.commit_on_thread())
        assert await asyncio.to_thread(begun.wait, 60)
        given_up.cancel()
        with pytest.raises(asyncio.CancelledError):
            await given_up
        go_on.set()
        journal.append(make_update("phone", "head", 2.0))
        await journal.commit_on_thread()
    assert waiting(journal) == [("watch", 1.0), ("phone", 2.0)]


async def test_a_commit_on_a_thread_leaves_no_descriptor(journal: Journal) -> None:
    opened = []
    for number in range(3):
        journal.append(make_update(f"device-{number}", "head", number))
        await journal.commit_on_thread()
        opened.append(len(list(Path("/proc/self/fd").iterdir())))
    assert opened[1] == opened[2], "of the first, SQLite's log is new"
