"""Waiting with a time limit on an event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

T = TypeVar("T")


async def within(timeout_s: float, awaitable: Awaitable[T]) -> T:
    """Awaits it at most so long, and cancels it when it takes longer.

    What `asyncio.wait_for` does, but before Python 3.12 that loses a cancellation which comes
    in the same turn of the loop as the result: whoever is cancelled then goes on for ever.

    Raises:
        asyncio.TimeoutError: It took longer.
    """
    future = asyncio.ensure_future(awaitable)
    try:
        await asyncio.wait((future,), timeout=timeout_s)
        if not future.done():
            raise asyncio.TimeoutError
        return future.result()
    finally:
        future.cancel()  # nothing, if it is done
