"""Updates that wait for their block's step on the disk: a cohort of any size fits in memory.

What a rule over all updates keeps is read from files that are mapped: their pages are the kernel's
cache, which drops them where memory is short, and reads them again when a tile wants them. Payloads
that can be read in tiles as they came are read from the journal. What top-k sends is compressed
there, and updates of one device become one: these are written to unlinked files beside it.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import tempfile
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from petalfl.codecs import Encoded
from petalfl.payloads import EncodedDelta

from .descriptors import map_to_read

log = logging.getLogger("petalfl.server")

FILE_BYTES = 64 << 20  # of a file; it takes as much of the disk as was written to it
LINE = 64  # bytes: where every array begins

Move = Callable[[NDArray[Any]], NDArray[Any]]


class Spill:
    """Files of arrays; one is gone, and its room on the disk, when no array in it is in use.

    Args:
        folder: On a disk with room for what is written; nothing is left in it by a crash.
        find: An update_id to its payload in the journal, mapped for reading, if that can be had.
        reserve_bytes: Of the disk, left to others: the files are gone with the step of their
            block, and that must be able to write its version first.
    """

    def __init__(
        self,
        folder: Path,
        find: Callable[[bytes], memoryview | None] = lambda update_id: None,
        reserve_bytes: int = 0,
    ) -> None:
        self._folder = folder
        self._reserve_bytes = reserve_bytes
        self._find = find
        self._descriptor = -1
        self._map: mmap.mmap | None = None
        self._close: Callable[[], object] = int
        self._end = 0

    def keep(self, delta: EncodedDelta, update_id: bytes = b"") -> EncodedDelta:
        """The same delta, whose arrays lie in files; the payload as it came is let go of.

        Where the disk does not take it, the delta stays in memory, and the log says so: it was
        accepted, so it must count.

        Args:
            update_id: Of the journaled update that it is, if it is one.
        """
        if is_on_disk(delta):
            return delta
        payload = self._find(update_id) if update_id and _is_in_payload(delta) else None
        try:
            if payload is not None:
                kept = replace(_moved(delta, _to(payload, delta.payload)), payload=payload)
            else:
                kept = replace(_moved(delta, self._write), payload=b"")
        except OSError as error:
            log.error("an update stays in memory, %s does not take it: %s", self._folder, error)
            return delta
        vars(kept)["norm"] = delta.norm  # to take it again would read the file
        return kept

    def _write(self, array: NDArray[Any]) -> NDArray[Any]:
        data = np.ascontiguousarray(array).data.cast("B")
        self._check_room(len(data))
        if self._map is None or self._end + len(data) > len(self._map):
            self._open(max(FILE_BYTES, len(data)))
        assert self._map is not None
        start = offset = self._end
        while data:  # not by the map: a full disk would end the process there
            written = os.pwrite(self._descriptor, data, offset)
            data, offset = data[written:], offset + written
        self._end = -(-offset // LINE) * LINE
        return np.frombuffer(self._map, array.dtype, array.size, start)

    def _check_room(self, num_bytes: int) -> None:
        disk = os.statvfs(self._folder)
        if disk.f_bavail * disk.f_frsize < num_bytes + self._reserve_bytes:
            why = f"{os.strerror(errno.ENOSPC)} beside {self._reserve_bytes} bytes for versions"
            raise OSError(errno.ENOSPC, why)

    def _open(self, num_bytes: int) -> None:
        descriptor, name = tempfile.mkstemp(dir=self._folder)
        try:
            Path(name).unlink()
            os.ftruncate(descriptor, num_bytes)
            found = map_to_read(descriptor)
        except OSError:
            os.close(descriptor)
            raise
        self._map = found
        self._close()  # the file before; the arrays in it keep its map
        closing = weakref.finalize(self, os.close, descriptor)
        closing.atexit = False  # a thread that nobody waits for may write until the process ends
        self._close = closing
        self._descriptor, self._end = descriptor, 0


def is_on_disk(delta: EncodedDelta) -> bool:
    """Whether `Spill.keep` has moved it."""
    return not delta.payload or isinstance(memoryview(delta.payload).obj, mmap.mmap)


def _is_in_payload(delta: EncodedDelta) -> bool:
    """Whether its arrays are views of the payload, as of every codec that does not compress."""
    payload = np.frombuffer(delta.payload, np.uint8)
    return all(not one.size or np.may_share_memory(one, payload) for one in _arrays(delta))


def _to(payload: memoryview, before: bytes | memoryview) -> Move:
    """Moves a view of a payload to another that has the same bytes."""
    old, new = np.frombuffer(before, np.uint8), np.frombuffer(payload, np.uint8)

    def move(array: NDArray[Any]) -> NDArray[Any]:
        start = array.ctypes.data - old.ctypes.data
        return new[start : start + array.nbytes].view(array.dtype)

    return move


def _arrays(delta: EncodedDelta) -> list[NDArray[Any]]:
    parts = (delta.parameters, delta.statistics)
    found = [(one.values, one.scales, one.bitmap, one.starts) for one in parts]
    return [array for several in found for array in several if array is not None]


def _moved(delta: EncodedDelta, move: Move) -> EncodedDelta:
    def moved(array: NDArray[Any]) -> NDArray[Any]:
        # A view of nothing would hold what it is a view of.
        return move(array) if array.size else np.zeros(0, array.dtype)

    def all_of(vector: Encoded) -> Encoded:
        return replace(
            vector,
            values=moved(vector.values),
            scales=moved(vector.scales),
            bitmap=None if vector.bitmap is None else moved(vector.bitmap),
            starts=None if vector.starts is None else moved(vector.starts),
        )

    return replace(delta, parameters=all_of(delta.parameters), statistics=all_of(delta.statistics))
