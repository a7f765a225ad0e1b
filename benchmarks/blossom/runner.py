"""Runs cells, each in a process of its own, some at once; a line of results when one is done."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol

from petalfl.errors import PetalError

from .cells import Cell
from .results import Line
from .study import run_cell

MEMORY = Path("/dev/shm")  # stores need no disk: nobody goes on with a cell
_PREFIX = "petalfl-blossom-"


class Observer(Protocol):
    """Is told what happens."""

    def began(self, cell: Cell) -> None:
        """A cell has a process."""

    def advanced(self, cell: Cell, rounds: int) -> None:
        """It has done so many rounds."""

    def finished(self, cell: Cell, line: Line) -> None:
        """Its line is in the results."""

    def failed(self, cell: Cell, reason: str) -> None:
        """There is none."""


@dataclass(slots=True)
class _Running:
    cell: Cell
    process: BaseProcess
    connection: Connection
    folder: Path


def run_cells(
    cells: Sequence[Cell],
    artifacts_of: Callable[[Cell], Path],
    jobs: int,
    keep: Callable[[Line], None],
    observer: Observer,
) -> int:
    """Runs cells in their order, ``jobs`` at once.

    However it ends, no process is left; what a cell under way has done is lost, no more.

    Args:
        artifacts_of: As `run_cell` needs them.
        keep: Called with every line.

    Returns:
        The number of cells that failed.
    """
    remove_leftovers()
    waiting, running, num_failed = list(cells), list[_Running](), 0
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                cell = waiting.pop(0)
                running.append(_start(cell, artifacts_of(cell)))
                observer.began(cell)
            ready = wait([one.connection for one in running])
            for one in [one for one in running if one.connection in ready]:
                kind, value = _receive(one)
                if kind == "round":
                    observer.advanced(one.cell, value)
                    continue
                running.remove(one)
                _end(one)
                if kind == "done":
                    keep(value)
                    observer.finished(one.cell, value)
                else:
                    num_failed += 1
                    observer.failed(one.cell, value)
    finally:
        for one in running:
            one.process.terminate()
            _end(one)
    return num_failed


def remove_leftovers() -> None:
    """Removes what processes have left in memory that were killed."""
    for folder in _root().glob(f"{_PREFIX}*"):
        pid = folder.name.removeprefix(_PREFIX).partition("-")[0]
        if pid.isdigit() and not Path("/proc", pid).exists():
            shutil.rmtree(folder, ignore_errors=True)


def _root() -> Path:
    return MEMORY if os.access(MEMORY, os.W_OK) else Path(tempfile.gettempdir())


def _start(cell: Cell, artifacts: Path) -> _Running:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=_root()))
    process = context.Process(
        target=_work, args=(cell, artifacts, folder, theirs), daemon=True, name=cell.label
    )
    process.start()
    theirs.close()
    return _Running(cell, process, ours, folder)


def _end(one: _Running) -> None:
    one.process.join()
    one.connection.close()
    shutil.rmtree(one.folder, ignore_errors=True)


def _receive(one: _Running) -> tuple[str, Any]:
    try:
        message: tuple[str, Any] = one.connection.recv()
        return message
    except EOFError:
        one.process.join()
        return "failed", f"its process ended with {one.process.exitcode}"


def _work(cell: Cell, artifacts: Path, folder: Path, connection: Connection) -> None:
    """What a cell's process does."""
    try:
        line = run_cell(cell, artifacts, folder, lambda n: connection.send(("round", n)))
    except (PetalError, ValueError) as error:
        connection.send(("failed", str(error)))
    except (KeyboardInterrupt, BrokenPipeError):  # the study has ended; so does this
        os._exit(130)
    else:
        connection.send(("done", line))
