"""Bytes of block payloads, counted until they are written to the state."""

from __future__ import annotations

from collections.abc import Mapping

Key = tuple[int, str, str]  # round, device, block


class Traffic:
    """Bytes up and down by round, device and block."""

    def __init__(self) -> None:
        self._counts: dict[Key, tuple[int, int]] = {}

    def add(self, round_num: int, device: str, block: str, up: int = 0, down: int = 0) -> None:
        """Counts so many bytes more."""
        key = (round_num, device, block)
        before = self._counts.get(key, (0, 0))
        self._counts[key] = (before[0] + up, before[1] + down)

    @property
    def counts(self) -> Mapping[Key, tuple[int, int]]:
        """What was counted since `clear`."""
        return self._counts

    def clear(self) -> None:
        """It is written: counts from zero again."""
        self._counts = {}
