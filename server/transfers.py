"""Updates on their way in: chunks put together, within a stated number of bytes.

A transfer takes the room of its whole payload when it begins and gives it back when it ends.
Where there is no room it waits in line, its chunks are dropped, and its device is told to send
them when its turn comes: the line holds manifests alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from petalfl import wire
from petalfl.errors import WireError

MAX_PER_DEVICE = 4  # a client sends its blocks one after another
MAX_ATTEMPTS = 8  # of one transfer, with something malformed in each
IDLE_S = 30.0  # without a chunk, and a transfer gives its room to one that waits,
MIN_BYTES_PER_S = 32 << 10  # as does one that has lately been slower than this
MAX_SHARE = 0.25  # of the room for a device with several transfers, when others wait
Key = tuple[str, bytes]  # device and update_id


@dataclass(slots=True)
class Transfer:
    """An update on its way: its manifest and what has come of its payload."""

    device: str
    manifest: wire.UpdateManifest
    touched_s: float = 0.0
    since_s: float = 0.0  # what came since then tells how fast it is
    num_bytes_since: int = 0
    payload: memoryview = field(default_factory=lambda: memoryview(b""))
    missing: set[int] = field(default_factory=set)
    num_bad_attempts: int = 0

    def begin(self, now_s: float) -> None:
        """Takes its room."""
        self.since_s = self.touched_s = now_s
        self.payload = np.empty(self.manifest.num_bytes, np.uint8).data
        self.missing = set(range(wire.num_chunks(self.manifest.num_bytes)))

    def add(self, chunk: wire.Chunk, now_s: float) -> bool:
        """Puts a chunk in its place; False where it is there already.

        Raises:
            WireError: It has not the length that it must have.
        """
        start = chunk.index * wire.CHUNK_BYTES
        expected = min(wire.CHUNK_BYTES, self.manifest.num_bytes - start)
        if len(chunk.data) != expected:
            raise WireError(
                f"chunk {chunk.index} has {len(chunk.data)} bytes, expected {max(expected, 0)}"
            )
        if chunk.index not in self.missing:
            return False
        self.touched_s = now_s
        self.num_bytes_since += expected
        self.payload[start : start + expected] = chunk.data
        self.missing.discard(chunk.index)
        return True

    def request(self) -> wire.Receipt:
        """Asks for the chunks that have not come."""
        total = wire.num_chunks(self.manifest.num_bytes)
        bitmap = wire.missing_bitmap(self.missing, total)
        return wire.Receipt(self.manifest.update_id, "missing", missing=bitmap)

    def is_overdue(self, now_s: float) -> bool:
        """Whether others should not wait for it; asked now and then while somebody waits."""
        elapsed_s = now_s - self.since_s
        if elapsed_s <= IDLE_S:
            return False
        if now_s - self.touched_s > IDLE_S or self.num_bytes_since < MIN_BYTES_PER_S * elapsed_s:
            return True
        self.since_s, self.num_bytes_since = now_s, 0  # fast enough: from here on anew
        return False


class Transfers:
    """All of one federation: those under way and those that wait.

    Args:
        max_bytes: Of all payloads under way; no payload may be longer.
        now_s: A clock that never goes back.
    """

    def __init__(self, max_bytes: int, now_s: Callable[[], float]) -> None:
        self.num_bytes = 0  # of all payloads under way
        self._max_bytes = max_bytes
        self._now_s = now_s
        self._under_way: dict[Key, Transfer] = {}
        self._waiting: dict[Key, Transfer] = {}  # in the order in which they came
        self._by_device: dict[str, list[bytes]] = {}  # the oldest first

    def __len__(self) -> int:
        return len(self._under_way)

    def get(self, device: str, update_id: bytes) -> Transfer | None:
        """The transfer under way, if there is one."""
        return self._under_way.get((device, update_id))

    def is_known(self, device: str, update_id: bytes) -> bool:
        """Whether it has been announced, with or without room."""
        return update_id in self._by_device.get(device, ())

    def is_waiting(self, device: str, update_id: bytes) -> bool:
        """Whether it has been announced and has no room yet."""
        return (device, update_id) in self._waiting

    def announce(self, device: str, manifest: wire.UpdateManifest) -> bool:
        """Begins a transfer, or puts it in line; False where that brings nothing.

        It does not where it is known, or where the device gives up another one for it.

        Raises:
            WireError: Another manifest is known under its update_id.
        """
        key = (device, manifest.update_id)
        known = self._under_way.get(key) or self._waiting.get(key)
        if known is None:
            own = self._by_device.setdefault(device, [])
            is_too_many = len(own) >= MAX_PER_DEVICE
            while len(own) >= MAX_PER_DEVICE:
                self.end(device, own[0])  # given up by its sender
            own = self._by_device.setdefault(device, [])
            own.append(manifest.update_id)
            self._waiting[key] = Transfer(device, manifest)
            if len(self._waiting) == 1 and self._has_room(device, manifest):
                self._begin(key)
            return not is_too_many
        if known.manifest != manifest:
            raise WireError(f"block {manifest.block}: another manifest under the same update_id")
        return False

    def end(self, device: str, update_id: bytes) -> None:
        """Forgets a transfer and gives up its room, if it has any."""
        ended = self._under_way.pop((device, update_id), None)
        if ended is not None:
            self.num_bytes -= ended.manifest.num_bytes
        self._waiting.pop((device, update_id), None)
        self._by_device[device].remove(update_id)
        if not self._by_device[device]:
            del self._by_device[device]

    def end_all(self, device: str) -> None:
        """Forgets all transfers of a device."""
        for update_id in list(self._by_device.get(device, ())):
            self.end(device, update_id)

    def begin_waiting(self) -> list[Transfer]:
        """Begins those in line for which there is room now; their devices must be asked."""
        begun = []
        for key, first in list(self._waiting.items()):
            if key not in self._waiting or self._has_its_share(first):
                continue
            if not self._has_room(first.device, first.manifest):
                break
            self._begin(key)
            begun.append(first)
        return begun

    def _has_its_share(self, transfer: Transfer) -> bool:
        """Whether its device has enough under way while others wait."""
        if all(other.device == transfer.device for other in self._waiting.values()):
            return False
        held = self._held_bytes(transfer.device)
        return bool(held) and sum(held) + transfer.manifest.num_bytes > MAX_SHARE * self._max_bytes

    def _held_bytes(self, device: str) -> list[int]:
        """Of its transfers under way."""
        found = (self._under_way.get((device, one)) for one in self._by_device.get(device, ()))
        return [one.manifest.num_bytes for one in found if one is not None]

    def _begin(self, key: Key) -> None:
        transfer = self._waiting.pop(key)
        transfer.begin(self._now_s())
        self.num_bytes += transfer.manifest.num_bytes
        self._under_way[key] = transfer

    def _has_room(self, device: str, manifest: wire.UpdateManifest) -> bool:
        """Whether it fits, once what is overdue and what exceeds another's share has made way."""
        most = self._max_bytes - manifest.num_bytes
        if self.num_bytes > most:
            now_s = self._now_s()
            for key in [key for key, one in self._under_way.items() if one.is_overdue(now_s)]:
                self.end(*key)
        if self.num_bytes > most:
            for other, update_id in self._stalest():
                held = self._held_bytes(other)
                is_too_much = len(held) > 1 and sum(held) > MAX_SHARE * self._max_bytes
                if other != device and is_too_much and self.num_bytes > most:
                    self.end(other, update_id)
        return self.num_bytes <= most

    def _stalest(self) -> list[Key]:
        return sorted(self._under_way, key=lambda key: self._under_way[key].touched_s)
