"""The files of the journal, as whoever reads them needs to know them."""

from __future__ import annotations

import sqlite3
import zlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from .versions import StateError


def segments(folder: Path) -> dict[int, Path]:
    """By the position of its first byte, each segment's file; in order."""
    paths = {int(path.stem): path for path in folder.glob("*.deltas")}
    return dict(sorted(paths.items()))


def read_delta(
    folder: Path, starts: Sequence[int], position: int, num_bytes: int, crc32: int
) -> bytes:
    """The bytes that a row of `updates` points to.

    Args:
        starts: Of all `segments`, in order.

    Raises:
        StateError: They are not there, or not those that were written.
    """
    if not starts or position < starts[0]:
        raise StateError(f"the journal {folder} has lost the segment of position {position}")
    start = starts[bisect_right(starts, position) - 1]
    path = segment_path(folder, start)
    with translated(f"cannot read {path}"), path.open("rb") as file:
        file.seek(position - start)
        data = file.read(num_bytes)
    if len(data) != num_bytes or zlib.crc32(data) != crc32:
        raise StateError(f"{path} is damaged at position {position}")
    return data


def segment_path(folder: Path, start: int) -> Path:
    """Of the segment whose first byte has that position."""
    return folder / f"{start:020}.deltas"


@contextmanager
def translated(what: str) -> Iterator[None]:
    """Says of an error of the disk or the database what could not be done."""
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        raise StateError(f"{what}: {error}") from error
