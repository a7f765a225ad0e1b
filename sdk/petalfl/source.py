"""Where files come from: the seam between a device's downloads and the network."""

from __future__ import annotations

from collections.abc import Generator
from typing import Protocol

from petalfl.errors import TransportError


class NotThereError(TransportError):
    """The server answers, and has nothing there."""


class BrokenOffError(TransportError):
    """A download ended before its end; it may go on from there."""


class NoSuchRangeError(TransportError):
    """The server's file ends before the place to go on from."""


class Source(Protocol):
    """A federation's files by path: ``manifest``, ``artifacts/…``, ``blocks/{name}/{version}``.

    Its methods block. They raise `EnrollError` where the server does not accept this device,
    `NotThereError` where it has no such file, and `TransportError` where it cannot be reached,
    fails, or sends what it should not.
    """

    def get_changed(self, path: str, max_bytes: int, sha256: str) -> bytes | None:
        """A small file; None where its digest is still this one."""
        ...

    def stream(
        self, path: str, sha256: str, start: int, num_bytes: int
    ) -> Generator[tuple[int, bytes], None, None]:
        """A file from ``start`` on, piece by piece, each with its offset, and to its very end.

        A source that cannot go on from there begins at 0 again.

        Args:
            sha256: Of the file; whether it is so is for the caller to check.
            num_bytes: Of the whole file.

        Raises:
            BrokenOffError: It ends, or comes too slowly, before all is there.
            NoSuchRangeError: The server's file is shorter.
        """
        ...
