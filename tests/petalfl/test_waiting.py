"""A time limit that loses neither a result nor a cancellation."""

from __future__ import annotations

import asyncio

import pytest

from petalfl.waiting import within


def test_gives_the_result() -> None:
    async def work() -> int:
        await asyncio.sleep(0)
        return 7

    assert asyncio.run(within(5, work())) == 7


def test_passes_an_error_on() -> None:
    async def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        asyncio.run(within(5, fail()))


def test_what_takes_longer_is_cancelled() -> None:
    async def scenario() -> None:
        work = asyncio.create_task(asyncio.sleep(3600))
        with pytest.raises(asyncio.TimeoutError):
            await within(0.01, work)
        await asyncio.wait((work,))
        assert work.cancelled()

    asyncio.run(scenario())


def test_a_cancellation_that_comes_with_the_result_is_not_lost() -> None:
    async def scenario() -> None:
        result = asyncio.get_running_loop().create_future()
        waiter = asyncio.create_task(within(3600, result))
        await asyncio.sleep(0)
        result.set_result(None)
        waiter.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiter

    asyncio.run(scenario())


def test_whoever_is_cancelled_cancels_what_it_waits_for() -> None:
    async def scenario() -> None:
        work = asyncio.create_task(asyncio.sleep(3600))
        waiter = asyncio.create_task(within(3600, work))
        await asyncio.sleep(0)
        waiter.cancel()
        await asyncio.wait((waiter, work))
        assert waiter.cancelled() and work.cancelled()

    asyncio.run(scenario())
