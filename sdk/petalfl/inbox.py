"""What the server last told a device to do: whatever came before it no longer matters."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from petalfl.waiting import within
from petalfl.wire import Finish, Task

T = TypeVar("T")


class Inbox:
    """Holds one message; a newer one takes its place."""

    def __init__(self) -> None:
        self._message: Task | Finish | None = None
        self._arrival = asyncio.Event()  # replaced whenever something arrives

    def put(self, message: Task | Finish) -> None:
        """The server says something new."""
        self._message = message
        self._arrival.set()
        self._arrival = asyncio.Event()

    async def get(self) -> Task | Finish:
        """Waits until there is a message, and takes it."""
        while self._message is None:
            await self._arrival.wait()
        message, self._message = self._message, None
        return message

    async def has_other_than(self, message: Task | Finish, timeout_s: float) -> bool:
        """Waits, at most so long, until there is another message than this one."""
        try:
            await within(timeout_s, self._until_other_than(message))
        except asyncio.TimeoutError:
            return False
        return True

    async def unless_over(self, round_num: int, work: Coroutine[Any, Any, T]) -> T | None:
        """Does some work for a round; None, and it is given up, once that round is over."""
        doing, over = asyncio.create_task(work), asyncio.create_task(self._until_over(round_num))
        try:
            await asyncio.wait((doing, over), return_when=asyncio.FIRST_COMPLETED)
            return doing.result() if doing.done() else None
        finally:
            for task in (doing, over):
                task.cancel()
            await asyncio.gather(doing, over, return_exceptions=True)

    async def _until_other_than(self, message: Task | Finish) -> None:
        while self._message in (None, message):
            await self._arrival.wait()

    async def _until_over(self, round_num: int) -> None:
        while self._message is None or (
            isinstance(self._message, Task) and self._message.round_num <= round_num
        ):
            await self._arrival.wait()
