"""Files that survive a power cut: written whole or not at all."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


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
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the renames themselves
    finally:
        os.close(folder)
