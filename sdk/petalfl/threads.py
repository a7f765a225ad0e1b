"""Blocking work beside an event loop, on threads."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any, TypeVar

from petalfl.errors import PetalError
from petalfl.pacing import Stopped

T = TypeVar("T")


class Threads:
    """Runs blocking functions for a loop, and knows on which threads it does.

    Args:
        executor: Where; the default is asyncio's.
    """

    def __init__(self, executor: Executor | None = None) -> None:
        self._executor = executor
        self._own: set[int] = set()

    def is_own(self) -> bool:
        """Whether this is called, however deep, by a function that it runs."""
        return threading.get_ident() in self._own

    async def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """Runs on a thread; when cancelled, lets the thread end before it gives way."""
        loop = asyncio.get_running_loop()
        future = loop.run_in_executor(self._executor, self._run, function, *arguments)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            with contextlib.suppress(PetalError, Stopped):
                await future
            raise

    def _run(self, function: Callable[..., T], *arguments: Any) -> T:
        thread = threading.get_ident()
        self._own.add(thread)
        try:
            return function(*arguments)
        finally:
            self._own.discard(thread)
