"""Files over MQTT, for devices that have no HTTP: asked for window by window.

What is lost on its way is asked for again. The window grows while the line is fast and shrinks
when nothing comes, so that a slow line is not given more than it can bear.
"""

from __future__ import annotations

import contextlib
import hashlib
import queue
import time
from collections.abc import Callable, Generator

from petalfl import wire
from petalfl.errors import EnrollError, TransportError
from petalfl.source import BrokenOffError, NotThereError

TIMEOUT_S = 10.0  # for the next part
POLL_S = 0.5  # how soon a download gives way
MIN_WINDOW_BYTES = 4 << 10
FIRST_WINDOW_BYTES = 64 << 10
QUICK_S = 1.0  # a window that takes less is doubled
MOST_LOST = 3  # windows in a row of which nothing came


class Pull:
    """A `Source` of files over MQTT: one download at a time, on any thread but the event loop's.

    Args:
        check: Called while it waits; what it raises ends the download.
    """

    def __init__(self, check: Callable[[], None] = lambda: None) -> None:
        self._check = check
        self._send: Callable[[wire.Fetch], None] = _not_connected
        self._path = ""  # of the download under way
        self._arrived: queue.Queue[wire.Part | wire.Declined | None] = queue.Queue(16)
        self._window_bytes = FIRST_WINDOW_BYTES
        self._ticket = b""

    def attach(self, send: Callable[[wire.Fetch], None]) -> None:
        """Sends over this connection from now on; ``send`` blocks, and raises `TransportError`."""
        self._send = send

    def receive(self, message: wire.Part | wire.Declined) -> None:
        """Hands in what has come, from any thread; what nobody waits for is dropped."""
        if message.path == self._path:
            with contextlib.suppress(queue.Full):  # more than a window has: it is asked for again
                self._arrived.put_nowait(message)

    def reconnected(self) -> None:
        """The connection is a new one: what was asked for over the old one may not come."""
        with contextlib.suppress(queue.Full):
            self._arrived.put_nowait(None)

    def get_changed(self, path: str, max_bytes: int, sha256: str) -> bytes | None:
        """See `Source.get_changed`."""
        data, digest = bytearray(), ""
        try:
            for part in self._parts(path, 0, sha256):
                if part.num_bytes > max_bytes:
                    raise TransportError(
                        f"{path} has {part.num_bytes} bytes, due are {max_bytes} at most"
                    )
                if part.sha256 != (digest := digest or part.sha256):
                    raise TransportError(f"{path} has changed while it came")
                data += part.data
        except _UnchangedError:
            return None
        if hashlib.sha256(data).hexdigest() != digest:
            raise TransportError(f"{path} comes with the wrong sha256, expected {digest[:12]}…")
        return bytes(data)

    def stream(
        self, path: str, sha256: str, start: int, num_bytes: int
    ) -> Generator[tuple[int, bytes], None, None]:
        """See `Source.stream`."""
        for part in self._parts(path, start):
            if (part.sha256, part.num_bytes) != (sha256, num_bytes):
                raise TransportError(
                    f"{path} is another file on the server: {part.num_bytes} bytes, sha256 "
                    f"{part.sha256[:12]}…; due are {num_bytes} and {sha256[:12]}…"
                )
            yield part.offset, part.data

    def _parts(
        self, path: str, offset: int, known: str | None = None
    ) -> Generator[wire.Part, None, None]:
        """The parts of a file from ``offset`` to its end, in order."""
        end, num_lost = offset + 1, 0  # the end is known once something has come
        self._path = path
        try:
            while offset < end and num_lost < MOST_LOST:
                num_lost += 1
                for part in self._window(path, offset, known):
                    offset, end, num_lost = offset + len(part.data), part.num_bytes, 0
                    yield part
        finally:
            self._path = ""
        if offset < end:
            raise BrokenOffError(f"nothing comes of {path} over MQTT any longer")

    def _window(
        self, path: str, offset: int, known: str | None
    ) -> Generator[wire.Part, None, None]:
        """The parts of one answer, in order, as far as they come."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._arrived.get_nowait()
        end, started_s = offset + self._window_bytes, time.monotonic()
        self._send(wire.Fetch(path, offset, self._window_bytes, self._ticket, known))
        while offset < end:
            part = self._next(offset, end)
            if part is None:
                self._window_bytes = max(MIN_WINDOW_BYTES, self._window_bytes // 2)
                return
            if offset + len(part.data) > part.num_bytes > 0:
                raise TransportError(f"{path} goes on behind its {part.num_bytes} bytes")
            self._ticket = part.ticket
            yield part
            offset, end = offset + len(part.data), min(end, part.num_bytes)
        if time.monotonic() - started_s < QUICK_S:
            self._window_bytes = min(wire.MAX_FETCH_BYTES, 2 * self._window_bytes)

    def _next(self, offset: int, end: int) -> wire.Part | None:
        """The part at ``offset``, as long as parts are; None where it is to be asked for again.

        What has come is taken however late it is, since the device may have slept meanwhile; what
        goes on coming is not.
        """
        give_up_s, num_late = time.monotonic() + TIMEOUT_S, 0
        while num_late <= self._arrived.maxsize:
            self._check()
            left_s = give_up_s - time.monotonic()
            num_late += left_s <= 0
            try:
                message = self._arrived.get(timeout=max(0.0, min(left_s, POLL_S)))
            except queue.Empty:
                if left_s <= 0:
                    return None
                continue
            if message is None:
                return None
            if isinstance(message, wire.Declined):
                raise _ERRORS[message.why](f"{message.path}: {message.reason or message.why}")
            size = min(wire.CHUNK_BYTES, end - offset, message.num_bytes - offset)
            if message.offset == offset and len(message.data) >= size:
                return message  # others are of an earlier answer, or after one that was lost
        return None


class _UnchangedError(TransportError):
    """What the device has is still so."""


_ERRORS: dict[str, type[EnrollError | TransportError]] = {
    "unchanged": _UnchangedError,
    "not-there": NotThereError,
    "not-held": EnrollError,
    "failed": TransportError,
}


def _not_connected(message: wire.Fetch) -> None:
    raise TransportError("there is no connection to the broker yet")
