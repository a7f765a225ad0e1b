"""The results: one JSON line per finished cell, appended whole, in files that git keeps."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from petalfl.errors import PetalError

from .cells import Cell

Line = dict[str, Any]


class ResultsError(PetalError):
    """A results file that cannot be read."""


class Results:
    """The lines of all data sets, a file for each.

    Args:
        folder: Made where it is missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def append(self, line: Line) -> None:
        """Adds a cell's line; a crash leaves all of it or, at the file's end, a torn one.

        A torn line, of a crash before, is cut off first.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._path(line["cell"]["dataset"])
        data = (json.dumps(line, sort_keys=True) + "\n").encode()
        with path.open("ab+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            whole = file.read().rfind(b"\n") + 1
            file.truncate(whole)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def lines(self, dataset: str = "") -> list[Line]:
        """All of a data set's, or of all, in the order of the files.

        Raises:
            ResultsError: A line is no JSON, or not of a cell.
        """
        paths = [self._path(dataset)] if dataset else sorted(self.folder.glob("*.jsonl"))
        return [line for path in paths if path.exists() for line in _read(path)]

    def missing(self, cells: Sequence[Cell]) -> list[Cell]:
        """Those without a line of today's protocol, in their order."""
        done = {key_of(line) for line in self.lines()}
        return [cell for cell in cells if cell.key not in done]

    def _path(self, dataset: str) -> Path:
        return self.folder / f"{dataset}.jsonl"


def key_of(line: Line) -> str:
    """As `Cell.key` of the line's cell, by the protocol of that time."""
    return json.dumps({"protocol": line["protocol"], **line["cell"]}, sort_keys=True)


def _read(path: Path) -> list[Line]:
    lines = []
    whole, _, _ = path.read_bytes().rpartition(b"\n")  # behind it lies nothing, or a torn line
    for number, data in enumerate(whole.splitlines(), start=1):
        try:
            line = json.loads(data)
            key_of(line)
        except (ValueError, KeyError, TypeError) as error:
            raise ResultsError(
                f"{path}, line {number} is no result ({error!r}): restore it from git, or delete it"
            ) from error
        lines.append(line)
    return lines
