"""Bytes over the network, counted over a day that outlives restarts."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from petalfl.files import write_atomic
from petalfl.schema import Limit, plain, read
from petalfl.transport import Handler, Transport

log = logging.getLogger("petalfl.metering")

DAY_S, HOUR_S = 86_400.0, 3_600.0
_JUMP_S = DAY_S + HOUR_S  # after which nothing counts any longer
_MESSAGE_BYTES = 16  # of MQTT around a message: its header and its acknowledgement


@dataclass(frozen=True, slots=True)
class _Kept:
    """On disk: bytes by the hour of the believed clock, and what both clocks said last."""

    hours: Annotated[dict[str, Annotated[int, Limit(0, 1 << 62)]], Limit(0, 1000)]
    time_s: float
    wall_s: float


class ByteMeter:
    """Counts bytes, up and down together, against a limit for any 24 hours.

    They are forgotten by the hour, so that an hour more than a day may count. All methods may be
    called from any thread.

    Args:
        path: A file of its own. Where it is damaged, counting begins anew.
        now_s: The wall clock. Where it jumps, time moves by 25 hours at most, and back if the
            clock jumps back.
    """

    def __init__(self, limit: int, path: Path, now_s: Callable[[], float] = time.time) -> None:
        self.limit = limit
        self._path = path
        self._now_s = now_s
        self._lock = threading.Lock()
        self._hours: dict[int, int] = {}
        self._time_s = self._wall_s = now_s()
        try:
            kept = read(_Kept, json.loads(path.read_bytes()))
            self._hours = {int(hour): num_bytes for hour, num_bytes in kept.hours.items()}
            self._time_s, self._wall_s = kept.time_s, kept.wall_s
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:
            log.warning("%s is damaged, the day's bytes are counted anew: %s", path, error)

    def count(self, num_bytes: int) -> None:
        """So many bytes have gone over the network; `save` keeps that."""
        with self._lock:
            hour = self._advance()
            self._hours[hour] = self._hours.get(hour, 0) + num_bytes

    @property
    def used(self) -> int:
        """The bytes of the last 24 hours."""
        with self._lock:
            self._advance()
            return sum(self._hours.values())

    def rest_s(self, num_bytes: int) -> float:
        """How long until there is room for so many bytes; 0 where there is.

        Raises:
            ValueError: There never will be.
        """
        if num_bytes > self.limit:
            raise ValueError(f"{num_bytes} bytes, {self.limit} are all of a day")
        with self._lock:
            self._advance()
            used, rest_s = sum(self._hours.values()), 0.0
            for hour in sorted(self._hours):
                if used + num_bytes <= self.limit:
                    break
                used -= self._hours[hour]
                rest_s = _end_s(hour) - self._time_s
            return rest_s

    def save(self, num_reserved: int = 0) -> None:
        """Keeps what was counted; should the process die, the reserved bytes count as well."""
        with self._lock:
            hour = self._advance()
            hours = {**self._hours, hour: self._hours.get(hour, 0) + num_reserved}
            by_name = {str(hour): num_bytes for hour, num_bytes in hours.items()}
            kept = _Kept(by_name, self._time_s, self._wall_s)
            try:
                write_atomic(self._path, json.dumps(plain(kept)).encode())
            except OSError as error:  # the disk is full, say: what is in memory counts on
                log.warning("cannot keep the day's bytes: %s", error)

    def _advance(self) -> int:
        """Follows the wall clock, forgets what is a day old; gives the hour that it is now."""
        wall_s = self._now_s()
        self._time_s += min(max(wall_s - self._wall_s, -_JUMP_S), _JUMP_S)
        self._wall_s = wall_s
        self._hours = {h: n for h, n in self._hours.items() if _end_s(h) > self._time_s}
        return int(self._time_s // HOUR_S)


class MeteredTransport:
    """A transport whose messages are counted, topics included; see `Transport`."""

    def __init__(self, transport: Transport, count: Callable[[int], None]) -> None:
        self._transport = transport
        self._count = count

    async def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """See `Transport.publish`."""
        self._count(len(topic) + len(payload) + _MESSAGE_BYTES)
        await self._transport.publish(topic, payload, retain=retain)

    async def subscribe(self, topic_filter: str, handler: Handler) -> None:
        """See `Transport.subscribe`."""

        def counted(topic: str, payload: bytes) -> None:
            self._count(len(topic) + len(payload) + _MESSAGE_BYTES)
            handler(topic, payload)

        await self._transport.subscribe(topic_filter, counted)

    async def close(self) -> None:
        """See `Transport.close`."""
        await self._transport.close()


def _end_s(hour: int) -> float:
    """When the bytes of an hour no longer count."""
    return (hour + 1) * HOUR_S + DAY_S
