"""Files that survive a power cut: written whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path

PIECE_BYTES = 64 << 10  # read at once


def write_atomic(
    path: Path, data: bytes, mode: int = 0o600, *, previous: Path | None = None
) -> None:
    """Replaces ``path`` by ``data``: after a crash it holds the old bytes or the new ones.

    Args:
        previous: Where, in the same folder, the old file goes; None drops it. After a crash
            between the two renames the old bytes are there alone.

    Raises:
        OSError: The disk is full or not writable; ``path`` is as it was, or moved to ``previous``.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            os.fchmod(file.fileno(), mode)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if previous is not None:
            with contextlib.suppress(FileNotFoundError):
                path.replace(previous)  # no hard link: not every device's disk has them
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()  # of a full disk, it would keep what little is left
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes renames in a folder survive a power cut.

    Raises:
        OSError: The disk refuses.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str | None:
    """A file's digest, read piece by piece; None where there is no file.

    Raises:
        OSError: It cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb", buffering=0) as file:
            while piece := file.read(PIECE_BYTES):
                digest.update(piece)
    except FileNotFoundError:
        return None
    return digest.hexdigest()
