"""Files that survive a power cut: written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path


def write_atomic(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Replaces ``path`` by ``data``: after a crash it holds the old bytes or the new ones.

    Raises:
        OSError: The disk is full or not writable; ``path`` is as it was.
    """
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        os.fchmod(file.fileno(), mode)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself
    finally:
        os.close(folder)
