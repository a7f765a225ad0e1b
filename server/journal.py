"""The journal: what devices were promised would count, on disk before they are told.

A payload is appended to a segment file as it came, and a row in SQLite says where it lies. Both
become durable together, in groups: `commit` syncs the segment, then commits the rows, and only then
may the receipts of those updates go out. SQLite alone would write every delta twice, into its log
and again into its pages: 105 to 375 updates of 400 kB a second where this does 1,500.

Positions count bytes from the journal's beginning, over all segments; a segment's name is the
position of its first byte. An update is consumed when its `delta` is set to NULL; a segment that no
row points into is written over by a later one, which costs the disk less than a new file. Payloads
begin at multiples of `LINE`, so that rules can read them where they lie (`mapped`); a segment that
is read so has its full length, of which the disk holds what was written.
"""

from __future__ import annotations

import asyncio
import logging
import mmap
import os
import sqlite3
import threading
import zlib
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

from petalfl.codecs import parse_codec
from petalfl.errors import WireError
from petalfl.model import Block
from petalfl.payloads import parse_payload
from petalfl.wire import BlockUpdate, Report

from .descriptors import map_to_read
from .rounds import Announced
from .segments import read_delta, segment_path, segments, translated
from .versions import StateError

log = logging.getLogger("petalfl.server.journal")

DATABASE, FOLDER = "state.sqlite", "journal"  # in a data folder
SEGMENT_BYTES = 64 << 20
LINE = 64  # bytes of a segment: where payloads begin
SCHEMA = """
CREATE TABLE IF NOT EXISTS updates (
    update_id BLOB PRIMARY KEY, round_num INTEGER NOT NULL, device TEXT NOT NULL,
    block TEXT NOT NULL, base_version INTEGER NOT NULL, num_examples INTEGER NOT NULL,
    delta INTEGER, num_bytes INTEGER NOT NULL, crc32 INTEGER NOT NULL, norm REAL NOT NULL,
    closed_in INTEGER, version INTEGER, codec TEXT NOT NULL DEFAULT 'f32',
    sha256 TEXT NOT NULL DEFAULT '', UNIQUE (device, round_num, block));
CREATE INDEX IF NOT EXISTS updates_unconsumed ON updates (delta) WHERE delta IS NOT NULL;
CREATE INDEX IF NOT EXISTS updates_by_round ON updates (closed_in);
CREATE TABLE IF NOT EXISTS reports (
    device TEXT, round_num INTEGER, update_id BLOB NOT NULL, num_examples INTEGER NOT NULL,
    loss REAL NOT NULL, arrived_in INTEGER NOT NULL, arrived_at_s REAL NOT NULL,
    PRIMARY KEY (device, round_num));
CREATE INDEX IF NOT EXISTS reports_by_round ON reports (arrived_in);
"""
_SPARE = "spare"  # a segment that nothing points into
_INSERT_UPDATE = """
INSERT INTO updates (update_id, round_num, device, block, base_version, num_examples, delta,
num_bytes, crc32, norm, codec, sha256) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
"""
_KEY, _POSITION, _NUM_BYTES = slice(1, 4), 6, 7  # in such a row
_INSERT_REPORT = "INSERT OR IGNORE INTO reports VALUES (?, ?, ?, ?, ?, ?, ?)"


class Entry(NamedTuple):
    """What the journal knows of an update.

    Attributes:
        sha256: Of its payload; empty in a row of a server that did not keep it.
        closed_in: The round that has consumed it; None while it waits.
        version: Of its block, which holds it; 0: it was dropped; None while it waits.
    """

    device: str
    block: str
    round_num: int
    base_version: int
    num_examples: int
    sha256: str
    closed_in: int | None = None
    version: int | None = None

    def is_of(self, device: str, update: Announced) -> bool:
        """Whether this very update comes again, and not another under its id."""
        return self.sha256 in ("", update.sha256) and self[:5] == (
            device, update.block, update.round_num, update.base_version, update.num_examples
        )  # fmt: skip


class Journal:
    """Segments below ``journal`` in a data folder, rows in its database.

    It commits over a connection of its own, so that nobody waits for the disk who only reads.

    Args:
        db: To read with, on the thread that calls.

    Raises:
        StateError: The folder or the database cannot be used.
    """

    def __init__(self, db: sqlite3.Connection, folder: Path) -> None:
        self._db = db
        self._folder = folder / FOLDER
        # Rows that are not yet durable. Whoever commits takes them out afterwards: one that is
        # no longer here is in the database, and so the database is asked second.
        self._updates: dict[bytes, tuple[Any, ...]] = {}
        self._sent: set[tuple[Any, ...]] = set()  # round, device and block of each of those
        self._reports: dict[tuple[str, int], tuple[Any, ...]] = {}
        self._segment = -1  # the open one's file descriptor
        self._start = 0  # and its first byte's position
        self._maps: WeakValueDictionary[int, mmap.mmap] = WeakValueDictionary()  # by first byte
        self._is_broken = False
        self._committing = threading.Lock()
        with translated(f"cannot use the journal {self._folder}"):
            self._folder.mkdir(exist_ok=True)
            found = segments(self._folder).items()
            self._end = max((start + path.stat().st_size for start, path in found), default=0)
            self._starts = [start for start, _ in found]  # to list 2,000 files takes 10 ms
            self._writer = sqlite3.connect(
                folder / DATABASE, isolation_level=None, check_same_thread=False
            )
            self._writer.execute("PRAGMA synchronous=FULL")  # a receipt survives a power cut

    def close(self) -> None:
        """Makes durable what is not, and lets go of the files."""
        try:
            self.commit()
        except StateError as error:
            log.error("%d updates, which nobody was promised, are lost: %s",
                      len(self._updates), error)  # fmt: skip
        with self._committing:  # a thread may still be at it
            self._close_segment()
            self._writer.close()

    # Writing

    def append(self, update: BlockUpdate) -> None:
        """Writes an update; it is durable, and its receipt may go out, after a `commit`.

        Raises:
            StateError: The disk is full, say, or another update stands for it in the journal;
                nothing has changed.
        """
        if self._has_other(update):  # which no commit would get past
            raise StateError(f"device {update.device} has an update of that task in the journal")
        encoded = update.encoded
        data = memoryview(encoded.payload).cast("B")
        self._end = -(-self._end // LINE) * LINE
        with translated(f"cannot write to the journal {self._folder}"):
            if self._segment < 0 or self._end - self._start + len(data) > SEGMENT_BYTES:
                self._open_segment()
            _write(self._segment, data, self._end - self._start)
        row: tuple[Any, ...] = (
            update.update_id, update.round_num, update.device, update.block, update.base_version,
            update.num_examples, self._end, len(data), zlib.crc32(data), encoded.norm,
            encoded.codec, update.sha256,
        )  # fmt: skip
        self._sent.add(row[_KEY])
        self._updates[update.update_id] = row
        self._end += len(data)

    def append_report(
        self, device: str, report: Report, arrived_in: int, arrived_at_s: float
    ) -> None:
        """The same for a report; the first of a device's task stands."""
        key = (device, report.round_num)
        row = (*key, report.update_id, report.num_examples, report.loss, arrived_in, arrived_at_s)
        self._reports.setdefault(key, row)

    def commit(self) -> None:
        """Makes durable all that was appended.

        Raises:
            StateError: It is not; where the disk has failed, only a restart, which reads back
                what is there, makes the journal usable again.
        """
        if self._updates or self._reports:
            self._commit(self._segment, list(self._updates), list(self._reports))

    async def commit_on_thread(self) -> None:
        """As `commit`, of what was appended before the call; others may append meanwhile.

        Who is cancelled meanwhile waits no longer; the thread goes on to its end.
        """
        updates, reports = list(self._updates), list(self._reports)
        if not (updates or reports):
            return
        # The open segment may be full, and closed, before the thread comes to it.
        with translated(f"cannot commit to the journal {self._folder}"):
            segment = os.dup(self._segment) if updates and self._segment >= 0 else -1

        def work() -> None:
            try:
                self._commit(segment, updates, reports)
            finally:  # here, where no cancellation closes it under the thread
                if segment >= 0:
                    os.close(segment)

        await asyncio.shield(asyncio.get_running_loop().run_in_executor(None, work))

    # Reading

    def find(self, update_id: bytes) -> Entry | None:
        """The update of whatever round that was appended under this id."""
        if (row := self._updates.get(update_id)) is not None:
            _, round_num, device, block, base_version, num_examples, *_, sha256 = row
            return Entry(device, block, round_num, base_version, num_examples, sha256)
        query = (
            "SELECT device, block, round_num, base_version, num_examples, sha256, closed_in, "
            "version FROM updates WHERE update_id = ?"
        )
        found = self._db.execute(query, (update_id,)).fetchone()
        return None if found is None else Entry(*found)

    def mapped(self, update_id: bytes) -> memoryview | None:
        """An update's payload where it lies on the disk, read when it is looked at.

        It stays what it is until the update is consumed. None of one that is consumed, of a
        payload that does not begin at a multiple of `LINE`, as in older segments, of a segment
        that has not half of its length, as those of a restored backup, of which there may be one
        for each update, and where the system does not map files, or not so many.
        """
        if (row := self._updates.get(update_id)) is not None:
            position, num_bytes = row[_POSITION], row[_NUM_BYTES]
        else:
            query = "SELECT delta, num_bytes FROM updates WHERE update_id = ? AND delta IS NOT NULL"
            row = self._db.execute(query, (update_id,)).fetchone()
            if row is None:
                return None
            position, num_bytes = row
        start = self._starts[bisect_right(self._starts, position) - 1]
        first = position - start
        if first % LINE:
            return None
        try:
            found = self._map(start, first + num_bytes)
        except OSError as error:
            log.warning("cannot map a segment of the journal %s: %s", self._folder, error)
            return None
        return None if found is None else memoryview(found)[first : first + num_bytes]

    def _has_other(self, update: BlockUpdate) -> bool:
        key = (update.round_num, update.device, update.block)
        if key in self._sent or self.find(update.update_id) is not None:
            return True
        query = "SELECT 1 FROM updates WHERE round_num = ? AND device = ? AND block = ?"
        return self._db.execute(query, key).fetchone() is not None

    def unconsumed(self, blocks: Mapping[str, Block]) -> Iterator[BlockUpdate]:
        """The updates that no version holds yet, in order of arrival.

        Raises:
            StateError: One of them is not what was written.
        """
        rows = self._db.execute(
            "SELECT codec, update_id, device, block, round_num, base_version, num_examples, delta, "
            "num_bytes, crc32, sha256 FROM updates WHERE delta IS NOT NULL ORDER BY delta"
        )
        for codec, update_id, device, block, *numbers, sha256 in rows.fetchall():
            round_num, base, count, *where = numbers
            payload = read_delta(self._folder, self._starts, *where)
            try:
                encoded = parse_payload(parse_codec(codec), blocks[block], payload)
            except (ValueError, WireError) as error:
                raise StateError(f"the journal {self._folder}: {error}") from error
            yield BlockUpdate(update_id, device, block, round_num, base, count, encoded, sha256)

    # How

    def _map(self, start: int, num_bytes: int) -> mmap.mmap | None:
        """The whole segment; of one that is still written to, with room for what is to come."""
        found = self._maps.get(start)
        if found is None or len(found) < num_bytes:
            segment = os.open(segment_path(self._folder, start), os.O_RDWR)
            try:
                is_open = self._segment >= 0 and start == self._start
                size = os.fstat(segment).st_size
                if not is_open and 2 * size < SEGMENT_BYTES:
                    return None
                if size < SEGMENT_BYTES and is_open:
                    os.ftruncate(segment, SEGMENT_BYTES)  # which takes nothing of the disk
                found = map_to_read(segment)
            finally:
                os.close(segment)
            self._maps[start] = found
        return found

    def _open_segment(self) -> None:
        if self._segment >= 0:
            with self._committing:
                self._sync(self._segment)
        self._close_segment()
        self._recycle()
        path = segment_path(self._folder, self._end)
        with suppress(FileNotFoundError):
            (self._folder / _SPARE).replace(path)
        self._segment = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
        self._start = self._end
        self._starts.append(self._start)
        folder = os.open(self._folder, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new file's name
        finally:
            os.close(folder)

    def _recycle(self) -> None:
        """Sets aside the segments that no update waits in any more."""
        waiting = [row[_POSITION] for row in list(self._updates.values())]
        rows = self._db.execute("SELECT delta FROM updates WHERE delta IS NOT NULL")
        waiting += [position for (position,) in rows]
        found = segments(self._folder)
        starts = list(found)
        used = {starts[bisect_right(starts, position) - 1] for position in waiting if starts}
        for start in found.keys() - used:
            found[start].replace(self._folder / _SPARE)  # one is enough
        self._starts = sorted(used)

    def _close_segment(self) -> None:
        if self._segment >= 0:
            os.close(self._segment)
        self._segment = -1

    def _commit(self, segment: int, updates: list[bytes], reports: list[tuple[str, int]]) -> None:
        """On whatever thread; rows that another call has committed meanwhile are left out."""
        with self._committing:
            self._sync(segment)
            updates = [update_id for update_id in updates if update_id in self._updates]
            reports = [key for key in reports if key in self._reports]
            if not (updates or reports):
                return
            with translated("cannot commit to the journal"):
                self._writer.execute("BEGIN IMMEDIATE")
                try:
                    self._writer.executemany(_INSERT_UPDATE, [self._updates[i] for i in updates])
                    self._writer.executemany(_INSERT_REPORT, [self._reports[k] for k in reports])
                    self._writer.execute("COMMIT")
                finally:
                    if self._writer.in_transaction:
                        self._writer.execute("ROLLBACK")
            for update_id in updates:
                self._sent.remove(self._updates.pop(update_id)[_KEY])
            for key in reports:
                del self._reports[key]

    def _sync(self, segment: int) -> None:
        if self._is_broken:
            raise StateError("the disk has failed before: start the server again")
        if segment < 0:  # reports alone
            return
        with translated(f"cannot write the journal {self._folder} to disk"):
            try:
                os.fdatasync(segment)
            except OSError:  # after which nobody knows what is on the disk
                self._is_broken = True
                raise


def _write(segment: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(segment, data, offset)
        data, offset = data[written:], offset + written
