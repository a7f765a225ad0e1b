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
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors.numpy import load, save

from petalfl.errors import PetalError
from petalfl.files import write_atomic
from petalfl.model import Block
from petalfl.vectors import Vector, from_bytes, to_bytes
from petalfl.wire import BlockUpdate, Report

from .optimizers import OptimizerState

_OPTIMIZER = "optimizer."  # before the names of its state, which lie beside the parameters
_SCHEMA = """
CREATE TABLE IF NOT EXISTS settings (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS devices (
    name TEXT PRIMARY KEY, salt BLOB NOT NULL, password_sha256 BLOB NOT NULL,
    modalities TEXT NOT NULL, enrolled_at_s REAL NOT NULL);
CREATE TABLE IF NOT EXISTS rounds (
    round_num INTEGER PRIMARY KEY, cohort TEXT NOT NULL, opened_at_s REAL NOT NULL,
    closed_at_s REAL, loss REAL);
CREATE TABLE IF NOT EXISTS updates (
    update_id BLOB PRIMARY KEY, round_num INTEGER NOT NULL, device TEXT NOT NULL,
    block TEXT NOT NULL, base_version INTEGER NOT NULL, num_examples INTEGER NOT NULL,
    delta BLOB, UNIQUE (round_num, device, block));
CREATE TABLE IF NOT EXISTS reports (
    round_num INTEGER, device TEXT, update_id BLOB NOT NULL, num_examples INTEGER NOT NULL,
    loss REAL NOT NULL, PRIMARY KEY (round_num, device));
CREATE TABLE IF NOT EXISTS versions (
    block TEXT, version INTEGER, sha256 TEXT NOT NULL, round_num INTEGER NOT NULL,
    PRIMARY KEY (block, version));
CREATE TABLE IF NOT EXISTS traffic (
    round_num INTEGER, device TEXT, block TEXT, bytes_up INTEGER NOT NULL,
    bytes_down INTEGER NOT NULL, PRIMARY KEY (round_num, device, block));
"""


class StateError(PetalError):
    """A data folder that is in use, belongs to another federation or cannot be written."""


class OpenRound(NamedTuple):
    """A round that was open when the server stopped."""

    round_num: int
    cohort: dict[str, frozenset[str]]
    opened_at_s: float


class NewVersion(NamedTuple):
    """A block as a closed round leaves it, with its server optimizer's state."""

    block: Block
    version: int
    parameters: Vector
    optimizer_state: OptimizerState


class ServerState:
    """Opens the data folder for this process alone.

    Args:
        folder: Made where it is missing.

    Raises:
        StateError: Another server has it open, or it cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            (folder / "blocks").mkdir(parents=True, exist_ok=True)
            self._lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StateError(f"another server is running on the data folder {folder}") from error
        except OSError as error:
            raise StateError(f"cannot open the data folder {folder}: {error}") from error
        try:
            self._db = _open_database(folder / "state.sqlite")
        except sqlite3.Error as error:
            os.close(self._lock)
            raise StateError(f"cannot open {folder / 'state.sqlite'}: {error}") from error

    def close(self) -> None:
        """Lets another server open the folder."""
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
        salt = os.urandom(16)
        row = (name, salt, _digest(salt, password), json.dumps(modalities), now_s)
        try:
            self._db.execute("INSERT INTO devices VALUES (?, ?, ?, ?, ?)", row)
        except sqlite3.IntegrityError:
            return False
        return True

    def remove_device(self, name: str) -> None:
        """Forgets a device's enrollment; what it has contributed stays."""
        self._db.execute("DELETE FROM devices WHERE name = ?", (name,))

    def is_password(self, name: str, password: str) -> bool:
        """Whether that is the device's password."""
        query = "SELECT salt, password_sha256 FROM devices WHERE name = ?"
        row = self._db.execute(query, (name,)).fetchone()
        return row is not None and hmac.compare_digest(_digest(row[0], password), row[1])

    def modalities(self, name: str) -> list[str] | None:
        """What a device enrolled with; None when it is not enrolled."""
        query = "SELECT modalities FROM devices WHERE name = ?"
        row = self._db.execute(query, (name,)).fetchone()
        return None if row is None else list(json.loads(row[0]))

    def devices(self) -> dict[str, list[str]]:
        """Modalities by enrolled device."""
        rows = self._db.execute("SELECT name, modalities FROM devices ORDER BY name")
        return {name: json.loads(modalities) for name, modalities in rows}

    # Rounds and their journal

    def open_round(
        self, round_num: int, cohort: Mapping[str, frozenset[str]], now_s: float
    ) -> None:
        """Notes that a round is open, before its first task goes out."""
        text = json.dumps({device: sorted(blocks) for device, blocks in cohort.items()})
        self._db.execute(
            "INSERT INTO rounds VALUES (?, ?, ?, NULL, NULL)", (round_num, text, now_s)
        )

    def unclosed_round(self) -> OpenRound | None:
        """The round that was open when the server stopped, if any."""
        query = "SELECT round_num, cohort, opened_at_s FROM rounds WHERE closed_at_s IS NULL"
        row = self._db.execute(query).fetchone()
        if row is None:
            return None
        cohort = {device: frozenset(blocks) for device, blocks in json.loads(row[1]).items()}
        return OpenRound(row[0], cohort, row[2])

    def last_closed_round(self) -> int:
        """0 before the first."""
        query = "SELECT MAX(round_num) FROM rounds WHERE closed_at_s IS NOT NULL"
        return int(self._db.execute(query).fetchone()[0] or 0)

    def journal_update(self, update: BlockUpdate) -> None:
        """Makes an accepted update durable; its receipt may go out when this returns."""
        row = (update.update_id, update.round_num, update.device, update.block,
               update.base_version, update.num_examples, to_bytes(update.delta))  # fmt: skip
        self._db.execute("INSERT INTO updates VALUES (?, ?, ?, ?, ?, ?, ?)", row)

    def has_update(self, update_id: bytes) -> bool:
        """Whether an update of whatever round was accepted under this id."""
        query = "SELECT 1 FROM updates WHERE update_id = ?"
        return self._db.execute(query, (update_id,)).fetchone() is not None

    def journal_report(self, device: str, report: Report) -> None:
        """Makes a report durable; the first of a device stands."""
        self._db.execute(
            "INSERT OR IGNORE INTO reports VALUES (?, ?, ?, ?, ?)",
            (report.round_num, device, report.update_id, report.num_examples, report.loss),
        )

    def journaled_updates(self, round_num: int, sizes: Mapping[str, int]) -> Iterator[BlockUpdate]:
        """The accepted updates of an open round, in order of arrival."""
        rows = self._db.execute(
            "SELECT update_id, device, block, base_version, num_examples, delta FROM updates "
            "WHERE round_num = ? ORDER BY rowid",
            (round_num,),
        )
        for update_id, device, block, base_version, num_examples, delta in rows:
            vector = from_bytes(delta, sizes[block])
            yield BlockUpdate(
                update_id, device, block, round_num, base_version, num_examples, vector
            )

    def journaled_reports(self, round_num: int) -> dict[str, Report]:
        """The reports of a round by device."""
        rows = self._db.execute(
            "SELECT device, update_id, num_examples, loss FROM reports WHERE round_num = ?",
            (round_num,),
        )
        return {device: Report(i, round_num, n, loss) for device, i, n, loss in rows}

    def close_round(
        self, round_num: int, versions: list[NewVersion], loss: float | None, now_s: float
    ) -> None:
        """Writes the new block versions, then closes the round, all or nothing.

        A crash in between leaves files that nothing refers to; the same round, closed again
        from its journal, writes the same bytes.
        """
        for new in versions:
            self._write_version(new)
        with self._transaction():
            for new in versions:
                self._insert_version(new, round_num)
            self._db.execute(
                "UPDATE rounds SET closed_at_s = ?, loss = ? WHERE round_num = ?",
                (now_s, loss, round_num),
            )
            self._db.execute("UPDATE updates SET delta = NULL WHERE round_num = ?", (round_num,))

    # Blocks

    def add_initial_version(self, block: Block, parameters: Vector) -> None:
        """Version 1 of a block, unless it has one."""
        if block.name not in self.newest_versions():
            new = NewVersion(block, 1, parameters, {})
            self._write_version(new)
            self._insert_version(new, 0)

    def newest_versions(self) -> dict[str, int]:
        """By block, its newest version."""
        rows = self._db.execute("SELECT block, MAX(version) FROM versions GROUP BY block")
        return {str(block): int(version) for block, version in rows}

    def read_version(self, block: Block, version: int) -> tuple[Vector, OptimizerState]:
        """The vector ``(size,)`` and optimizer state (empty before the block's first step).

        Raises:
            StateError: The file is missing or is not the one that was written.
        """
        path = self._path(block.name, version)
        query = "SELECT sha256 FROM versions WHERE block = ? AND version = ?"
        row = self._db.execute(query, (block.name, version)).fetchone()
        try:
            tensors = load(path.read_bytes())
            vector = np.concatenate([tensors[t.name].ravel() for t in block.tensors])
        except Exception as error:  # safetensors raises its own and KeyError
            raise StateError(f"cannot read {path}: {error}") from error
        own = {tensor.name for tensor in block.tensors}
        optimizer_state = {
            name.removeprefix(_OPTIMIZER): tensor
            for name, tensor in tensors.items()
            if name.startswith(_OPTIMIZER) and name not in own
        }
        if row is None or _checksum(vector, optimizer_state) != row[0]:
            raise StateError(f"{path} is damaged: its checksum is not the recorded one")
        return vector, optimizer_state

    # Traffic

    def add_traffic(self, counts: Mapping[tuple[int, str, str], tuple[int, int]]) -> None:
        """Adds bytes up and down by round, device and block."""
        with self._transaction():
            self._db.executemany(
                "INSERT INTO traffic VALUES (?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET "
                "bytes_up = bytes_up + excluded.bytes_up, "
                "bytes_down = bytes_down + excluded.bytes_down",
                [(*key, up, down) for key, (up, down) in counts.items()],
            )

    # Reading back, for status pages

    def rounds(self) -> list[dict[str, object]]:
        """Every closed round: per block its version, holders, num_examples and bytes."""
        rows = self._db.execute(
            "SELECT round_num, opened_at_s, closed_at_s, loss, cohort FROM rounds "
            "WHERE closed_at_s IS NOT NULL ORDER BY round_num"
        ).fetchall()
        return [
            {
                "round_num": round_num,
                "cohort_size": len(json.loads(cohort)),
                "duration_s": closed - opened,
                "loss": loss,
                "blocks": self._round_blocks(round_num),
            }
            for round_num, opened, closed, loss, cohort in rows
        ]

    def device_traffic(self) -> dict[str, dict[str, dict[str, int]]]:
        """By device and block: bytes_up and bytes_down in all."""
        result: dict[str, dict[str, dict[str, int]]] = {name: {} for name in self.devices()}
        rows = self._db.execute(
            "SELECT device, block, SUM(bytes_up), SUM(bytes_down) FROM traffic "
            "GROUP BY device, block ORDER BY device, block"
        )
        for device, block, up, down in rows:
            result.setdefault(device, {})[block] = {"bytes_up": up, "bytes_down": down}
        return result

    def totals(self) -> dict[str, int]:
        """Accepted updates and bytes of block payloads, over all rounds."""
        (accepted,) = self._db.execute("SELECT COUNT(*) FROM updates").fetchone()
        query = "SELECT COALESCE(SUM(bytes_up), 0), COALESCE(SUM(bytes_down), 0) FROM traffic"
        up, down = self._db.execute(query).fetchone()
        return {"updates_accepted": accepted, "bytes_up": up, "bytes_down": down}

    def _round_blocks(self, round_num: int) -> dict[str, dict[str, object]]:
        blocks: dict[str, dict[str, object]] = {}
        for block, version in self._db.execute(
            "SELECT block, MAX(version) FROM versions WHERE round_num <= ? GROUP BY block",
            (round_num,),
        ).fetchall():
            holders = self._db.execute(
                "SELECT device, num_examples FROM updates WHERE round_num = ? AND block = ? "
                "ORDER BY device",
                (round_num, block),
            ).fetchall()
            up, down = self._db.execute(
                "SELECT COALESCE(SUM(bytes_up), 0), COALESCE(SUM(bytes_down), 0) FROM traffic "
                "WHERE round_num = ? AND block = ?",
                (round_num, block),
            ).fetchone()
            blocks[block] = {
                "version": version,
                "holders": [device for device, _ in holders],
                "num_examples": sum(n for _, n in holders),
                "bytes_up": up,
                "bytes_down": down,
            }
        return blocks

    def _path(self, block: str, version: int) -> Path:
        return self.folder / "blocks" / block / f"{version}.safetensors"

    def _write_version(self, new: NewVersion) -> None:
        path = self._path(new.block.name, new.version)
        path.parent.mkdir(exist_ok=True)
        tensors, start = {}, 0
        for tensor in new.block.tensors:
            part = new.parameters[start : start + tensor.size]
            tensors[tensor.name] = part.reshape(tensor.shape)
            start += tensor.size
        tensors |= {_OPTIMIZER + name: array for name, array in new.optimizer_state.items()}
        try:
            write_atomic(path, save(tensors), mode=0o644)
        except OSError as error:
            raise StateError(f"cannot write {path}: {error}") from error

    def _insert_version(self, new: NewVersion, round_num: int) -> None:
        checksum = _checksum(new.parameters, new.optimizer_state)
        row = (new.block.name, new.version, checksum, round_num)
        self._db.execute("INSERT INTO versions VALUES (?, ?, ?, ?)", row)

    def _transaction(self) -> _Transaction:
        return _Transaction(self._db)


def _open_database(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, isolation_level=None)
    try:
        path.chmod(0o600)
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=FULL")  # a committed update survives a power cut
        db.executescript(_SCHEMA)
    except sqlite3.Error:
        db.close()
        raise
    return db


class _Transaction:
    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def __enter__(self) -> None:
        self._db.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: object, *rest: object) -> None:
        self._db.execute("COMMIT" if kind is None else "ROLLBACK")


def _checksum(parameters: Vector, optimizer_state: OptimizerState) -> str:
    digest = hashlib.sha256(to_bytes(parameters))
    for name, array in sorted(optimizer_state.items()):
        digest.update(f"{name} {array.shape}".encode() + to_bytes(array))
    return digest.hexdigest()


def _digest(salt: bytes, password: str) -> bytes:
    # Passwords here are 256-bit random tokens: a slow hash would add nothing.
    return hashlib.sha256(salt + password.encode()).digest()
