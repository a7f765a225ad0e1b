"""Updates that wait for their block's step in files, so that a cohort of any size fits in memory.

What a rule over all updates keeps is written to unlinked files in the data folder and mapped for
reading. Its pages are the kernel's cache: it drops them where memory is short, and reads them again
when a tile wants them. The journal has the same updates, but not so that they could be read in
tiles: what top-k sends is compressed, a payload begins at any byte, and a device's second update of
a block becomes one with its first.
"""

from __future__ import annotations

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

log = logging.getLogger("petalfl.server")

FILE_BYTES = 64 << 20  # of a file; it takes as much of the disk as was written to it
LINE = 64  # bytes: where every array begins


class Spill:
    """Files of arrays; one is gone, and its room on the disk, when no array in it is in use.

    Args:
        folder: On a disk with room for the updates of a round; nothing is left in it by a crash.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._descriptor = -1
        self._map: mmap.mmap | None = None
        self._close: Callable[[], object] = int
        self._end = 0

    def keep(self, delta: EncodedDelta) -> EncodedDelta:
        """The same delta, whose arrays lie in a file; the payload as it came is let go of.

        Where the disk does not take it, the delta stays in memory, and the log says so: it was
        accepted, so it must count.
        """
        if not delta.payload:  # it was kept before
            return delta
        try:
            parameters, statistics = map(self._written, (delta.parameters, delta.statistics))
        except OSError as error:
            log.error("an update stays in memory, %s does not take it: %s", self._folder, error)
            return delta
        kept = replace(delta, payload=b"", parameters=parameters, statistics=statistics)
        vars(kept)["norm"] = delta.norm  # to take it again would read the file
        return kept

    def _written(self, vector: Encoded) -> Encoded:
        bitmap, starts = vector.bitmap, vector.starts
        return replace(
            vector,
            values=self._write(vector.values),
            scales=self._write(vector.scales),
            bitmap=None if bitmap is None else self._write(bitmap),
            starts=None if starts is None else self._write(starts),
        )

    def _write(self, array: NDArray[Any]) -> NDArray[Any]:
        if not array.size:
            return np.zeros(0, array.dtype)  # a view would hold the payload
        data = np.ascontiguousarray(array).data.cast("B")
        if self._map is None or self._end + len(data) > len(self._map):
            self._open(max(FILE_BYTES, len(data)))
        assert self._map is not None
        start = offset = self._end
        while data:  # not by the map: a full disk would end the process there
            written = os.pwrite(self._descriptor, data, offset)
            data, offset = data[written:], offset + written
        self._end = -(-offset // LINE) * LINE
        return np.frombuffer(self._map, array.dtype, array.size, start)

    def _open(self, num_bytes: int) -> None:
        descriptor, name = tempfile.mkstemp(dir=self._folder)
        try:
            Path(name).unlink()
            os.ftruncate(descriptor, num_bytes)
            self._map = mmap.mmap(descriptor, num_bytes, prot=mmap.PROT_READ)
        except OSError:
            os.close(descriptor)
            raise
        self._close()  # the file before; the arrays in it keep its map
        closing = weakref.finalize(self, os.close, descriptor)
        closing.atexit = False  # a thread that nobody waits for may write until the process ends
        self._close = closing
        self._descriptor, self._end = descriptor, 0
