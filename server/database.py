"""The SQLite database of a data folder: its tables, how it is opened, and transactions."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .journal import SCHEMA as JOURNAL_SCHEMA
from .versions import StateError

FORMAT = 4  # PRAGMA user_version
_UPGRADES = {
    2: "ALTER TABLE updates ADD COLUMN codec TEXT NOT NULL DEFAULT 'f32'",
    3: "ALTER TABLE updates ADD COLUMN sha256 TEXT NOT NULL DEFAULT ''",
}
SCHEMA = """
CREATE TABLE IF NOT EXISTS settings (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS devices (
    name TEXT PRIMARY KEY, salt BLOB NOT NULL, password_sha256 BLOB NOT NULL,
    modalities TEXT NOT NULL, enrolled_at_s REAL NOT NULL);
CREATE TABLE IF NOT EXISTS cut_off (device TEXT PRIMARY KEY);
CREATE TABLE IF NOT EXISTS revoked (
    device TEXT PRIMARY KEY, num_times INTEGER NOT NULL, last_task INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS rounds (
    round_num INTEGER PRIMARY KEY, opened_at_s REAL NOT NULL, closed_at_s REAL, loss REAL,
    num_late INTEGER);
CREATE TABLE IF NOT EXISTS tasks (
    device TEXT, round_num INTEGER, blocks TEXT NOT NULL, opened_in INTEGER NOT NULL,
    asked_at_s REAL NOT NULL, PRIMARY KEY (device, round_num));
CREATE INDEX IF NOT EXISTS tasks_by_round ON tasks (opened_in);
CREATE TABLE IF NOT EXISTS versions (
    block TEXT, version INTEGER, sha256 TEXT NOT NULL, round_num INTEGER NOT NULL,
    PRIMARY KEY (block, version));
CREATE TABLE IF NOT EXISTS traffic (
    round_num INTEGER, device TEXT, block TEXT, bytes_up INTEGER NOT NULL,
    bytes_down INTEGER NOT NULL, PRIMARY KEY (round_num, device, block));
"""


def open_database(path: Path) -> sqlite3.Connection:
    """A connection to the database, which is made where it is missing.

    Raises:
        StateError: It has another format.
        sqlite3.Error: It is damaged or cannot be written.
    """
    db = sqlite3.connect(path, isolation_level=None)
    try:
        path.chmod(0o600)
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=FULL")  # a committed update survives a power cut
        _upgrade(db, path)
        db.executescript(SCHEMA + JOURNAL_SCHEMA)
        db.execute(f"PRAGMA user_version={FORMAT}")
    except (sqlite3.Error, StateError):
        db.close()
        raise
    return db


@contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[None]:
    """All or nothing of what is executed in the block."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    finally:
        if db.in_transaction:  # also where the commit itself has failed
            db.execute("ROLLBACK")


def _upgrade(db: sqlite3.Connection, path: Path) -> None:
    (version,) = db.execute("PRAGMA user_version").fetchone()
    (num_tables,) = db.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
    if not num_tables:
        return
    while version in _UPGRADES:
        with transaction(db):
            db.execute(_UPGRADES[version])
            version += 1
            db.execute(f"PRAGMA user_version={version}")
    if version != FORMAT:
        raise StateError(
            f"{path} has format {version}, this server reads {FORMAT}; choose another --data-dir"
        )
