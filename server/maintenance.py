"""Looking after a data folder: `python -m server backup|restore|inspect`.

A backup is a data folder like any other: a server can start on it, and `inspect` reads it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from petalfl.errors import PetalError
from petalfl.files import write_atomic

from .journal import DATABASE, FOLDER
from .segments import read_delta, segments
from .settings import resolve
from .versions import OLDEST, StateError, checksum, read_any_version, version_path

ATTEMPTS = 10  # to copy what a running server is at work on
Elsewhere: TypeAlias = Mapping[str, Path]  # by federation
NOWHERE: Elsewhere = {}
_WAITING = "SELECT delta, num_bytes, crc32 FROM updates WHERE delta IS NOT NULL"


class MaintenanceError(PetalError):
    """A folder that cannot be backed up to, restored to or looked into."""


@dataclass(slots=True)
class Findings:
    """What one federation's folder holds.

    Attributes:
        versions: By block: ``newest``, and the ``num_files`` that are kept of it.
        journal: ``num_waiting`` updates that no version holds yet, their ``num_bytes``, and the
            ``num_segments`` on disk.
        num_bytes: Of all files.
        damages: What is not as it was written, one line each.
    """

    folder: str
    rounds_closed: int = 0
    is_round_open: bool = False
    devices: int = 0
    updates: int = 0
    versions: dict[str, dict[str, int]] = field(default_factory=dict)
    journal: dict[str, int] = field(default_factory=dict)
    num_bytes: int = 0
    damages: list[str] = field(default_factory=list)


def inspect(data_dir: Path, elsewhere: Elsewhere = NOWHERE) -> list[Findings]:
    """Reads everything and checks every checksum; the server may be running.

    Raises:
        MaintenanceError: There is no data folder.
    """
    return [_inspect(folder) for folder in _folders(data_dir, elsewhere).values()]


def backup(data_dir: Path, target: Path, elsewhere: Elsewhere = NOWHERE) -> None:
    """Copies a data folder, also one that a server is at work on, as it is at one moment.

    Args:
        elsewhere: By name, the folders of federations that do not lie below ``data_dir``.

    Raises:
        MaintenanceError: ``target`` is not empty, or the folder is damaged.
    """
    _check_empty(target)
    for name, folder in _folders(data_dir, elsewhere).items():
        _back_up(folder, target / name)
    _copy_credentials(data_dir, target)


def restore(source: Path, data_dir: Path, elsewhere: Elsewhere = NOWHERE) -> None:
    """Makes a data folder of a backup, once its checksums are found to be right.

    Raises:
        MaintenanceError: ``data_dir`` is not empty, as that of a running server never is, or the
            backup is damaged.
    """
    for folder in (data_dir, *elsewhere.values()):
        _check_empty(folder)
    if damages := [line for findings in inspect(source) for line in findings.damages]:
        raise MaintenanceError(f"the backup {source} is damaged: {damages[0]}")
    for name, folder in _folders(source).items():
        _back_up(folder, elsewhere.get(name, data_dir / name))
    _copy_credentials(source, data_dir)


def add_commands(subparsers: Any) -> None:
    """Adds the commands to a parser's; each sets ``run``, which returns the exit code."""
    add = subparsers.add_parser
    parser = add(
        "backup",
        help="copy the data folder, also of a running server",
        description="Copy the data folder as it is at one moment; the server may be running.",
    )
    parser.add_argument("target", type=Path, metavar="DIR", help="a new or empty folder")
    parser.set_defaults(run=_run_backup)
    parser = add(
        "restore",
        help="make a data folder of a backup",
        description="Make a data folder of a backup; refuses one that is in use or not empty.",
    )
    parser.add_argument("source", type=Path, metavar="DIR", help="made by backup")
    parser.set_defaults(run=_run_restore)
    parser = add(
        "inspect",
        help="show what is in the data folder and check it",
        description="Show rounds, versions, devices, journal and sizes, and check every "
        "checksum; exit code 1 where something is damaged. The server may be running.",
    )
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.set_defaults(run=_run_inspect)
    for name in ("backup", "restore", "inspect"):
        subparsers.choices[name].add_argument(
            "--data-dir", default=argparse.SUPPRESS, metavar="DIR",
            help="this folder alone; the default is where the settings say that the data lie",
        )  # fmt: skip
        subparsers.choices[name].add_argument(
            "--config", default=argparse.SUPPRESS, metavar="FILE", help="as the server's"
        )


def _places(options: argparse.Namespace) -> tuple[Path, Elsewhere]:
    """The data folder, and those of federations that lie elsewhere."""
    given = vars(options)
    if "data_dir" in given:
        return Path(given["data_dir"]), NOWHERE
    effective = resolve(given, os.environ)
    data_dir: Path = effective.server["data_dir"].value
    folders = {name: own["data_dir"].value for name, own in effective.federations.items()}
    return data_dir, {n: f for n, f in folders.items() if f not in (data_dir, data_dir / n)}


def _run_backup(options: argparse.Namespace) -> int:
    data_dir, elsewhere = _places(options)
    backup(data_dir, options.target, elsewhere)
    folders = ", ".join(str(folder) for folder in (data_dir, *elsewhere.values()))
    print(f"backed up {folders} to {options.target}")
    return 0


def _run_restore(options: argparse.Namespace) -> int:
    data_dir, elsewhere = _places(options)
    restore(options.source, data_dir, elsewhere)
    folders = ", ".join(str(folder) for folder in (data_dir, *elsewhere.values()))
    print(f"restored {options.source} to {folders}")
    return 0


def _run_inspect(options: argparse.Namespace) -> int:
    found = inspect(*_places(options))
    if options.json:
        print(json.dumps([asdict(findings) for findings in found], indent=2))
    else:
        print("\n\n".join(_as_text(findings) for findings in found))
    return 1 if any(findings.damages for findings in found) else 0


def _as_text(found: Findings) -> str:
    versions = ", ".join(
        f"{block} {of['newest']} ({of['num_files']} kept)" for block, of in found.versions.items()
    )
    journal = found.journal
    return "\n".join(
        [
            found.folder,
            f"  rounds    {found.rounds_closed} closed{', one open' * found.is_round_open}",
            f"  versions  {versions or 'none'}",
            f"  devices   {found.devices}",
            f"  updates   {found.updates} accepted, {journal.get('num_waiting', 0)} of them in no "
            "version yet",
            f"  journal   {journal.get('num_bytes', 0)} bytes wait in "
            f"{journal.get('num_segments', 0)} segments",
            f"  size      {found.num_bytes / 1e6:.1f} MB",
            *(f"  DAMAGED   {line}" for line in found.damages),
            *([] if found.damages else ["  every checksum is right"]),
        ]
    )


# One federation's folder


def _folders(data_dir: Path, elsewhere: Elsewhere = NOWHERE) -> dict[str, Path]:
    """By their places in a backup: the folder itself, or one of each federation of several."""
    paths = [*data_dir.glob(DATABASE), *sorted(data_dir.glob(f"*/{DATABASE}"))]
    found = {str(path.parent.relative_to(data_dir)): path.parent for path in paths}
    found |= elsewhere
    for folder in found.values() or [data_dir]:
        if not (folder / DATABASE).exists():
            raise MaintenanceError(f"{folder} is no data folder: it has no {DATABASE}")
    return found


def _copy_credentials(folder: Path, target: Path) -> None:
    """Those of the embedded broker."""
    credentials = folder / "broker" / "credentials.json"
    if credentials.exists():
        (target / "broker").mkdir(parents=True)
        write_atomic(target / "broker" / credentials.name, credentials.read_bytes())


def _check_empty(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise MaintenanceError(f"{folder} is not empty; give a new or an empty folder")


@contextmanager
def _reading(folder: Path) -> Iterator[sqlite3.Connection]:
    try:
        with closing(sqlite3.connect(f"file:{folder / DATABASE}?mode=ro", uri=True)) as db:
            yield db
    except sqlite3.Error as error:
        raise MaintenanceError(f"cannot read {folder / DATABASE}: {error}") from error


def _inspect(folder: Path) -> Findings:
    found = Findings(str(folder))
    try:
        with _reading(folder) as db:
            _read_tables(db, folder, found)
    except MaintenanceError as error:
        found.damages.append(str(error))
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # gone since: a running server's
            found.num_bytes += path.stat().st_size if path.is_file() else 0
    return found


def _read_tables(db: sqlite3.Connection, folder: Path, found: Findings) -> None:
    for (line,) in db.execute("PRAGMA integrity_check"):
        if line != "ok":
            found.damages.append(f"{DATABASE}: {line}")
    num_open, found.rounds_closed = db.execute(
        "SELECT COUNT(*) FILTER (WHERE closed_at_s IS NULL), COUNT(closed_at_s) FROM rounds"
    ).fetchone()
    found.is_round_open = num_open > 0
    (found.devices,) = db.execute("SELECT COUNT(*) FROM devices").fetchone()
    (found.updates,) = db.execute("SELECT COUNT(*) FROM updates").fetchone()
    blocks = _newest_versions(db)  # before what is kept: a running server goes on
    for block, version, sha256 in _kept_versions(db):
        of = found.versions.setdefault(block, {"newest": 0, "num_files": 0})
        of["newest"] = max(of["newest"], version)
        of["num_files"] += 1
        try:
            _check_version(folder, block, version, sha256)
        except StateError as error:
            if version >= _oldest_version(db, block):  # else a running server has dropped it
                found.damages.append(str(error))
    lost = blocks.keys() - found.versions.keys()
    found.damages += [f"no version of the block {block} is kept" for block in sorted(lost)]
    waiting = db.execute(_WAITING).fetchall()
    starts = list(segments(folder / FOLDER))
    found.journal = {
        "num_waiting": len(waiting),
        "num_bytes": sum(num_bytes for _, num_bytes, _ in waiting),
        "num_segments": len(starts),
    }
    for position, num_bytes, crc32 in waiting:
        try:
            read_delta(folder / FOLDER, starts, position, num_bytes, crc32)
        except StateError as error:
            # A running server may have consumed it meanwhile, and written over it.
            query = f"{_WAITING} AND delta = ?"
            if db.execute(query, (position,)).fetchone() is not None:
                found.damages.append(str(error))


def _kept_versions(db: sqlite3.Connection) -> list[tuple[str, int, str]]:
    return db.execute(
        "SELECT block, version, sha256 FROM versions LEFT JOIN settings ON key = ? || block "
        "WHERE version >= COALESCE(CAST(value AS INTEGER), 1) ORDER BY block, version",
        (OLDEST,),
    ).fetchall()


def _newest_versions(db: sqlite3.Connection) -> dict[str, int]:
    return dict(db.execute("SELECT block, MAX(version) FROM versions GROUP BY block"))


def _oldest_version(db: sqlite3.Connection, block: str) -> int:
    row = db.execute("SELECT value FROM settings WHERE key = ?", (OLDEST + block,)).fetchone()
    return int(row[0]) if row else 1


def _check_version(folder: Path, block: str, version: int, sha256: str) -> None:
    path = version_path(folder, block, version)
    if checksum(*read_any_version(path)) != sha256:
        raise StateError(f"{path} is damaged: its checksum is not the recorded one")


def _back_up(folder: Path, target: Path) -> None:
    for attempt in range(ATTEMPTS):
        try:
            _copy(folder, target)
            return
        except StateError as error:  # the server has gone on meanwhile, or it is damaged
            shutil.rmtree(target)
            if attempt == ATTEMPTS - 1:
                raise MaintenanceError(f"cannot back up {folder}: {error}") from error
        except OSError as error:
            raise MaintenanceError(f"cannot write {target}: {error}") from error


def _copy(folder: Path, target: Path) -> None:
    (target / FOLDER).mkdir(parents=True)
    with _reading(folder) as source, closing(sqlite3.connect(target / DATABASE)) as db:
        (target / DATABASE).chmod(0o600)
        source.backup(db)
        newest = _newest_versions(db)
        for block, version, sha256 in reversed(_kept_versions(db)):  # the newest first
            try:
                _copy_version(folder, target, block, version, sha256)
            except StateError:
                if version == newest[block] or version >= _oldest_version(source, block):
                    raise  # without it, a server could not go on
                row = (OLDEST + block, str(max(version + 1, _oldest_version(db, block))))
                db.execute("INSERT OR REPLACE INTO settings VALUES (?, ?)", row)
                db.commit()
        starts = list(segments(folder / FOLDER))
        for position, num_bytes, crc32 in db.execute(_WAITING):
            delta = read_delta(folder / FOLDER, starts, position, num_bytes, crc32)
            # A segment of its own, so that its row need not change.
            write_atomic(target / FOLDER / f"{position:020}.deltas", delta)


def _copy_version(folder: Path, target: Path, block: str, version: int, sha256: str) -> None:
    """Copies what is then checked: the source's file may go away, or be damaged."""
    source, copy = (version_path(root, block, version) for root in (folder, target))
    copy.parent.mkdir(parents=True, exist_ok=True)
    try:
        data = source.read_bytes()
    except OSError as error:
        raise StateError(f"cannot read {source}: {error}") from error
    write_atomic(copy, data, mode=0o644)
    _check_version(target, block, version, sha256)
