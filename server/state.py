"""What the server must not lose, in its data folder.

SQLite holds devices, rounds and the journal of accepted updates; every version of a block is a
safetensors file that PyTorch users can open. An update is committed to the journal before its
receipt goes out, and a round is closed by one transaction.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import json
import os
import sqlite3
import threading
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from petalfl.model import Block
from petalfl.vectors import Vector
from petalfl.wire import BlockUpdate, Report

from .database import open_database, transaction
from .history import History
from .journal import DATABASE, Entry, Journal
from .optimizers import OptimizerState
from .rounds import Assignment
from .selection import Candidate
from .versions import (
    OLDEST,
    NewVersion,
    StateError,
    StoredVersion,
    checksum,
    version_path,
    write_version,
)

__all__ = [
    "Closing",
    "Entry",
    "NewVersion",
    "OpenRound",
    "ServerState",
    "StateError",
    "StoredVersion",
]

_NEWEST = """
(SELECT device, MAX(round_num) AS round_num, blocks FROM tasks LEFT JOIN revoked USING (device)
 WHERE opened_in >= ? AND round_num > COALESCE(last_task, 0) GROUP BY device ORDER BY device)
"""
_REVOKE = """
INSERT INTO revoked SELECT ?1, 1, COALESCE(MAX(round_num), 0) FROM tasks WHERE device = ?1
ON CONFLICT (device) DO UPDATE SET num_times = num_times + 1, last_task = excluded.last_task
"""


class OpenRound(NamedTuple):
    """A round that was open when the server stopped."""

    round_num: int
    opened_at_s: float


class Closing(NamedTuple):
    """What is noted when a round closes."""

    now_s: float
    loss: float | None
    num_late: int
    has_next: bool = False


class ServerState:
    """Opens the data folder for this process alone.

    Args:
        folder: Made where it is missing.

    Raises:
        StateError: Another server has it open, or it cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writing, self._is_closed = threading.Lock(), False
        try:
            (folder / "blocks").mkdir(parents=True, exist_ok=True)
            self._lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StateError(f"another server is running on the data folder {folder}") from error
        except OSError as error:
            raise StateError(f"cannot open the data folder {folder}: {error}") from error
        try:
            self._db = open_database(folder / DATABASE)
        except sqlite3.Error as error:
            os.close(self._lock)
            raise StateError(f"cannot open {folder / 'state.sqlite'}: {error}") from error
        except StateError:
            os.close(self._lock)
            raise
        try:
            self._journal = Journal(self._db, folder)
            self._num_devices: dict[tuple[str, ...], int] | None = None
        except StateError:
            self._db.close()
            os.close(self._lock)
            raise
        self.history = History(self._db)

    def close(self) -> None:
        """Makes durable what is not, and lets another server open the folder."""
        with self._writing:  # a thread may still be at a step
            self._is_closed = True
        try:
            self._journal.close()
        finally:
            self._db.close()
            os.close(self._lock)

    # Settings

    def setting(self, key: str, value: str) -> str:
        """The stored value; ``value`` is stored first where there is none yet."""
        self._db.execute("INSERT OR IGNORE INTO settings VALUES (?, ?)", (key, value))
        row = self._db.execute("SELECT value FROM settings WHERE key = ?", (key,)).fetchone()
        return str(row[0])

    def replace_setting(self, key: str, value: str) -> None:
        """Stores ``value`` whatever was there."""
        self._db.execute("INSERT OR REPLACE INTO settings VALUES (?, ?)", (key, value))

    # Devices

    def add_device(self, name: str, password: str, modalities: list[str], now_s: float) -> bool:
        """Enrolls a device; False, and nothing changed, when the name is taken."""
        self._num_devices = None
        salt = os.urandom(16)
        row = (name, salt, _digest(salt, password), json.dumps(modalities), now_s)
        try:
            self._db.execute("INSERT INTO devices VALUES (?, ?, ?, ?, ?)", row)
        except sqlite3.IntegrityError:
            return False
        return True

    def set_modalities(self, name: str, modalities: list[str]) -> None:
        """Notes what an enrolled device has."""
        self._num_devices = None
        row = (json.dumps(modalities), name)
        self._db.execute("UPDATE devices SET modalities = ? WHERE name = ?", row)

    def remove_device(self, name: str) -> None:
        """Forgets a device's enrollment; what it has contributed stays.

        Its tasks are over: who enrolls under its name later has others, of higher numbers.
        """
        self._num_devices = None
        with transaction(self._db):
            self._db.execute("DELETE FROM devices WHERE name = ?", (name,))
            self._db.execute("DELETE FROM cut_off WHERE device = ?", (name,))
            self._db.execute(_REVOKE, (name,))

    def cut_off(self, name: str) -> None:
        """Notes that a device has lost its login; it stays so until it is removed."""
        query = "INSERT OR IGNORE INTO cut_off SELECT name FROM devices WHERE name = ?"
        self._db.execute(query, (name,))

    def all_cut_off(self) -> list[str]:
        """The enrolled devices that have lost their login."""
        return [str(row[0]) for row in self._db.execute("SELECT device FROM cut_off")]

    def is_cut_off(self, name: str) -> bool:
        """Whether an enrolled device has lost its login."""
        query = "SELECT 1 FROM cut_off WHERE device = ?"
        return self._db.execute(query, (name,)).fetchone() is not None

    def num_revoked(self, name: str) -> int:
        """How often an enrollment under this name has ended."""
        query = "SELECT num_times FROM revoked WHERE device = ?"
        row = self._db.execute(query, (name,)).fetchone()
        return 0 if row is None else int(row[0])

    def is_password(self, name: str, password: str) -> bool:
        """Whether that is the device's password."""
        query = "SELECT salt, password_sha256 FROM devices WHERE name = ?"
        row = self._db.execute(query, (name,)).fetchone()
        return row is not None and hmac.compare_digest(_digest(row[0], password), row[1])

    def modalities(self, name: str) -> list[str] | None:
        """What a device has or had; None when it is not enrolled."""
        query = "SELECT modalities FROM devices WHERE name = ?"
        row = self._db.execute(query, (name,)).fetchone()
        return None if row is None else list(json.loads(row[0]))

    def num_devices(self) -> dict[tuple[str, ...], int]:
        """By the modalities that devices have enrolled with: how many have."""
        if self._num_devices is None:  # every task asks
            query = "SELECT modalities, COUNT(*) FROM devices GROUP BY modalities"
            rows = self._db.execute(query)
            self._num_devices = {tuple(json.loads(names)): count for names, count in rows}
        return self._num_devices

    def devices(self) -> dict[str, list[str]]:
        """Modalities by enrolled device."""
        rows = self._db.execute("SELECT name, modalities FROM devices ORDER BY name")
        return {name: json.loads(modalities) for name, modalities in rows}

    # Rounds and tasks

    def open_round(self, round_num: int, cohort: Mapping[str, Assignment], now_s: float) -> None:
        """Notes that a round is open, and who was asked, before the first task goes out."""
        with transaction(self._db):
            row = (round_num, now_s)
            self._db.execute("INSERT INTO rounds VALUES (?, ?, NULL, NULL, NULL)", row)
            self._insert_tasks(round_num, cohort, now_s)

    def add_tasks(self, round_num: int, cohort: Mapping[str, Assignment], now_s: float) -> None:
        """Notes who else was asked while a round was open, before the tasks go out."""
        with transaction(self._db):
            self._insert_tasks(round_num, cohort, now_s)

    def unclosed_round(self) -> OpenRound | None:
        """The round that was open when the server stopped, if any."""
        query = "SELECT round_num, opened_at_s FROM rounds WHERE closed_at_s IS NULL"
        row = self._db.execute(query).fetchone()
        return None if row is None else OpenRound(*row)

    def last_closed_round(self) -> int:
        """0 before the first."""
        query = "SELECT MAX(round_num) FROM rounds WHERE closed_at_s IS NOT NULL"
        return int(self._db.execute(query).fetchone()[0] or 0)

    def last_task(self, device: str) -> int:
        """The highest number of all tasks under this name, whoever had it; 0 before the first."""
        query = "SELECT MAX(round_num) FROM tasks WHERE device = ?"
        return int(self._db.execute(query, (device,)).fetchone()[0] or 0)

    def newest_tasks(self, since: int) -> dict[str, Assignment]:
        """By device, the newest of its tasks that went out in round ``since`` or later.

        Those of an enrollment that has ended are none.
        """
        rows = self._db.execute(f"SELECT * FROM {_NEWEST}", (since,))
        return {name: Assignment(n, frozenset(json.loads(blocks))) for name, n, blocks in rows}

    def candidates(self) -> dict[str, Candidate]:
        """By device that was ever asked, its record."""
        self._journal.commit()
        found: dict[str, Candidate] = {}
        tasks = self._db.execute(
            "SELECT device, COUNT(*), MAX(opened_in) FROM tasks GROUP BY device"
        )
        for device, num_tasks, last in tasks:
            found[device] = Candidate(frozenset(), num_selected=num_tasks, last_round=last)
        reports = self._db.execute(  # the columns are those of the newest report
            "SELECT device, COUNT(*), MAX(round_num), loss, num_examples, "
            "arrived_at_s - asked_at_s FROM reports JOIN tasks USING (device, round_num) "
            "GROUP BY device"
        )
        for device, num_reports, _, loss, num_examples, duration_s in reports:
            found[device] = replace(
                found[device], num_reported=num_reports, loss=loss, num_examples=num_examples,
                duration_s=duration_s,
            )  # fmt: skip
        return found

    def step(
        self,
        round_num: int,
        versions: Collection[StoredVersion],
        outcomes: Mapping[bytes, int],
        closing: Closing | None,
    ) -> None:
        """Notes new block versions, and which updates they are made of, all or nothing.

        Args:
            round_num: The open one.
            versions: As `write_version` has left them.
            outcomes: By update_id of a journaled update: the version that it went into, or 0
                where it was dropped.
            closing: Closes the round with this step, and opens the next where it says so.
        """
        self._journal.commit()
        with transaction(self._db):
            for new in versions:
                self._insert_version(new, round_num)
            self._db.executemany(
                "UPDATE updates SET delta = NULL, closed_in = ?, version = ? WHERE update_id = ?",
                [(round_num, version, update_id) for update_id, version in outcomes.items()],
            )
            if closing is not None:
                self._db.execute(
                    "UPDATE rounds SET closed_at_s = ?, loss = ?, num_late = ? WHERE round_num = ?",
                    (closing.now_s, closing.loss, closing.num_late, round_num),
                )
                if closing.has_next:
                    row = (round_num + 1, closing.now_s)
                    self._db.execute("INSERT INTO rounds VALUES (?, ?, NULL, NULL, NULL)", row)

    def _insert_tasks(self, round_num: int, cohort: Mapping[str, Assignment], now_s: float) -> None:
        self._db.executemany(
            "INSERT INTO tasks VALUES (?, ?, ?, ?, ?)",
            [
                (device, asked.round_num, json.dumps(sorted(asked.blocks)), round_num, now_s)
                for device, asked in cohort.items()
            ],
        )

    # The journal

    def journal_update(self, update: BlockUpdate) -> None:
        """Writes an accepted update; its receipt may go out after a `commit`."""
        self._journal.append(update)

    def mapped_payload(self, update_id: bytes) -> memoryview | None:
        """A journaled update's payload on the disk; None where that cannot be read in place."""
        return self._journal.mapped(update_id)

    def journal_report(self, device: str, report: Report, arrived_in: int, now_s: float) -> None:
        """The same for a report; the first of a device's task stands."""
        self._journal.append_report(device, report, arrived_in, now_s)

    async def commit(self) -> None:
        """Makes durable what was journaled before the call.

        Raises:
            StateError: It is not.
        """
        await self._journal.commit_on_thread()

    def find_update(self, update_id: bytes) -> Entry | None:
        """The update of whatever round that was accepted under this id."""
        return self._journal.find(update_id)

    def unconsumed_updates(self, blocks: Mapping[str, Block]) -> Iterator[BlockUpdate]:
        """The accepted updates that no step has consumed, in order of arrival."""
        self._journal.commit()
        return self._journal.unconsumed(blocks)

    def sent_updates(self, since: int) -> list[tuple[str, str, bytes]]:
        """Device, block and update_id of the accepted updates of the `newest_tasks`."""
        self._journal.commit()
        return self._db.execute(
            "SELECT device, block, update_id FROM updates "
            f"JOIN {_NEWEST} USING (device, round_num)",
            (since,),
        ).fetchall()

    def journaled_reports(self, since: int) -> dict[str, Report]:
        """By device, its report on its newest task, if there is one; as of `newest_tasks`."""
        self._journal.commit()
        rows = self._db.execute(
            "SELECT device, update_id, round_num, num_examples, loss FROM reports "
            f"JOIN {_NEWEST} USING (device, round_num)",
            (since,),
        )
        return {device: Report(*fields) for device, *fields in rows}

    def reports_in(self, round_num: int) -> list[Report]:
        """The reports that arrived while a round was open."""
        self._journal.commit()
        rows = self._db.execute(
            "SELECT update_id, round_num, num_examples, loss FROM reports WHERE arrived_in = ?",
            (round_num,),
        )
        return [Report(*row) for row in rows]

    # Blocks

    def add_initial_version(self, block: Block, parameters: Vector) -> None:
        """Version 1 of a block, unless it has one."""
        if block.name not in self.newest_versions():
            self._insert_version(self.write_version(NewVersion(block, 1, parameters, {})), 0)

    def write_version(self, new: NewVersion) -> StoredVersion:
        """Writes a version's file, on whatever thread; it counts from the `step` on.

        A crash in between leaves files that nothing refers to; the same step, taken again from
        the journal, writes the same bytes.

        Raises:
            StateError: The disk refused, or the folder may be another server's by now.
        """
        digest = checksum(new.parameters, new.optimizer_state)
        with self._writing:
            if self._is_closed:
                raise StateError(f"the data folder {self.folder} is closed")
            path = write_version(self.folder, new)
        return StoredVersion(new.block, new.version, path, digest)

    def prune_versions(self, keep: int) -> None:
        """Deletes the files of all but the newest ``keep`` versions of each block."""
        found = {
            block: range(self.oldest_version(block), newest - keep + 1)
            for block, newest in self.newest_versions().items()
        }
        dropped = {block: versions for block, versions in found.items() if versions}
        if not dropped:
            return
        with transaction(self._db):  # first: nobody misses a file
            for block, versions in dropped.items():
                self.replace_setting(OLDEST + block, str(versions.stop))
        for block, versions in dropped.items():
            for version in versions:
                version_path(self.folder, block, version).unlink(missing_ok=True)

    def oldest_version(self, block: str) -> int:
        """The oldest that is kept."""
        query = "SELECT value FROM settings WHERE key = ?"
        row = self._db.execute(query, (OLDEST + block,)).fetchone()
        return int(row[0]) if row else 1

    def newest_versions(self) -> dict[str, int]:
        """By block, its newest version."""
        rows = self._db.execute("SELECT block, MAX(version) FROM versions GROUP BY block")
        return {str(block): int(version) for block, version in rows}

    def stored_version(self, block: Block, version: int) -> StoredVersion:
        """Where a version lies; what is there can be read on whatever thread."""
        path = version_path(self.folder, block.name, version)
        query = "SELECT sha256 FROM versions WHERE block = ? AND version = ?"
        row = self._db.execute(query, (block.name, version)).fetchone()
        return StoredVersion(block, version, path, row[0] if row else "")

    def read_version(self, block: Block, version: int) -> tuple[Vector, OptimizerState]:
        """As `StoredVersion.read`."""
        return self.stored_version(block, version).read()

    # Traffic

    def add_traffic(self, counts: Mapping[tuple[int, str, str], tuple[int, int]]) -> None:
        """Adds bytes up and down by round, device and block."""
        with transaction(self._db):
            self._db.executemany(
                "INSERT INTO traffic VALUES (?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET "
                "bytes_up = bytes_up + excluded.bytes_up, "
                "bytes_down = bytes_down + excluded.bytes_down",
                [(*key, up, down) for key, (up, down) in counts.items()],
            )

    def _insert_version(self, new: StoredVersion, round_num: int) -> None:
        row = (new.block.name, new.version, new.sha256, round_num)
        self._db.execute("INSERT INTO versions VALUES (?, ?, ?, ?)", row)


def _digest(salt: bytes, password: str) -> bytes:
    # Passwords here are 256-bit random tokens: a slow hash would add nothing.
    return hashlib.sha256(salt + password.encode()).digest()
