"""How devices behave: what they send in vain, and when that is enough.

MQTT 3.1.1 has no way to slow one publisher down: to stop reading, or to hold back
acknowledgements, would stop the broker's one stream to the server, and so every device. What a
device sends in vain is therefore dropped before it is decoded, and a device that does not stop
is cut off at the broker.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

FORGIVEN_BYTES_PER_S = 1 << 20
MALFORMED_BYTES = 256 << 10  # what a malformed message costs at least
MESSAGE_BYTES = 4 << 10  # and any other that was in vain


class Standing(Enum):
    """What becomes of a device's messages: they are read, dropped unread, or its last ones."""

    GOOD = "good"
    THROTTLED = "throttled"
    CUT_OFF = "cut off"


class Conduct:
    """Bytes sent in vain by device, forgotten at `FORGIVEN_BYTES_PER_S`.

    Args:
        tolerated_bytes: More than these, and a device is throttled until enough of them are
            forgotten; four times as many, and it is cut off.
        now_s: A clock that never goes back.
    """

    def __init__(self, tolerated_bytes: int, now_s: Callable[[], float]) -> None:
        self._tolerated = tolerated_bytes
        self._now_s = now_s
        self._wasted: dict[str, tuple[float, float]] = {}  # bytes, and when they were counted

    def standing(self, device: str) -> Standing:
        """Of a device now."""
        if device not in self._wasted:
            return Standing.GOOD
        wasted = self._wasted_bytes(device)
        if wasted <= 0:
            del self._wasted[device]
        if wasted <= self._tolerated:
            return Standing.GOOD
        return Standing.THROTTLED if wasted <= 4 * self._tolerated else Standing.CUT_OFF

    def forgiven_in_s(self, device: str) -> float:
        """Until a device is in good standing, should it send nothing more in vain."""
        return max(0.0, self._wasted_bytes(device) - self._tolerated) / FORGIVEN_BYTES_PER_S

    def note(self, device: str, num_bytes: int, at_least: int = MESSAGE_BYTES) -> None:
        """A message was sent in vain."""
        wasted = self._wasted_bytes(device) + max(num_bytes, at_least)
        self._wasted[device] = (wasted, self._now_s())

    def forget(self, device: str) -> None:
        """Begins anew with a device."""
        self._wasted.pop(device, None)

    def _wasted_bytes(self, device: str) -> float:
        wasted, noted_s = self._wasted.get(device, (0.0, 0.0))
        return max(0.0, wasted - FORGIVEN_BYTES_PER_S * (self._now_s() - noted_s))
