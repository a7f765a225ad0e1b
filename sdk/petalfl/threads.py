"""Blocking work beside an event loop, on threads."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future, wait
from typing import Any, TypeVar

from petalfl.errors import PetalError
from petalfl.pacing import Stopped

T = TypeVar("T")
CHECK_S = 0.5  # how often `check` is called while nothing comes


def run_aside(function: Callable[..., T], *arguments: Any) -> Future[T]:
    """Runs a function on a thread that nobody has to wait for: it does not keep a process alive.

    For what may block for long and cannot be interrupted, as a connect does.
    """
    work: Future[T] = Future()
    work.set_running_or_notify_cancel()  # whoever waits for it may be cancelled: it may not

    def run() -> None:
        try:
            result = function(*arguments)
        except BaseException as error:
            work.set_exception(error)
        else:
            work.set_result(result)

    threading.Thread(target=run, name="petalfl aside", daemon=True).start()
    return work


def result_of(work: Future[T], check: Callable[[], None]) -> T:
    """Waits for it; ``check`` is called now and then, and what it raises ends the waiting."""
    while not wait((work,), CHECK_S).done:
        check()
    return work.result()


def abandon(work: Future[T], discard: Callable[[T], object]) -> None:
    """Nobody waits for it any longer: what comes of it is discarded, on whatever thread."""
    work.add_done_callback(lambda done: done.exception() or discard(done.result()))


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

    async def call(
        self,
        function: Callable[..., T],
        *arguments: Any,
        on_cancel: Callable[[], None] = lambda: None,
    ) -> T:
        """Runs on a thread; when cancelled, lets the thread end before it gives way.

        Args:
            on_cancel: Called then: tells the function that it should.
        """
        loop = asyncio.get_running_loop()
        future = loop.run_in_executor(self._executor, self._run, function, *arguments)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            on_cancel()
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
