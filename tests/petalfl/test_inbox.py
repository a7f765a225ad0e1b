from __future__ import annotations

import asyncio

import pytest

from petalfl.inbox import Inbox
from petalfl.training import Hyperparameters
from petalfl.wire import Finish, Task


def task(round_num: int) -> Task:
    return Task(round_num, 9, Hyperparameters(0.1), 0, {})


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_only_the_newest_message_is_taken_and_once() -> None:
    inbox = Inbox()
    for round_num in (1, 2, 3):
        inbox.put(task(round_num))
    assert await inbox.get() == task(3)
    waiting = asyncio.create_task(inbox.get())
    await settle()
    assert not waiting.done()
    inbox.put(Finish({}))
    assert await waiting == Finish({})


async def test_work_is_done_while_its_round_lasts() -> None:
    inbox, go_on = Inbox(), asyncio.Event()

    async def work() -> str:
        await go_on.wait()
        return "done"

    doing = asyncio.create_task(inbox.unless_over(3, work()))
    for round_num in (2, 3):  # said again after a break: the work goes on
        inbox.put(task(round_num))
        await settle()
    assert not doing.done()
    go_on.set()
    assert await doing == "done"
    assert await inbox.get() == task(3), "and the message is still there"


@pytest.mark.parametrize("message", [task(4), Finish({})])
@pytest.mark.parametrize("when", ["before", "after"])
async def test_work_for_a_round_that_is_over_is_given_up(message: Task | Finish, when: str) -> None:
    inbox, ended = Inbox(), []

    async def work() -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            ended.append(True)

    if when == "before":
        inbox.put(message)
    doing = asyncio.create_task(inbox.unless_over(3, work()))
    await settle()
    inbox.put(message)
    await asyncio.wait_for(doing, 30)
    assert await inbox.get() == message
    assert ended == [True] or when == "before"


async def test_an_error_and_a_cancellation_come_through() -> None:
    async def fail() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await Inbox().unless_over(1, fail())
    doing = asyncio.create_task(Inbox().unless_over(1, asyncio.sleep(3600)))
    await settle()
    doing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await doing
