"""The long part of a step, off the event loop: aggregation, server optimizer and files."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import NamedTuple, TypeVar

from .buffers import BlockResult
from .optimizers import ServerOptimizer
from .rounds import Round
from .shared_blocks import NextVersion, SharedBlocks
from .versions import StoredVersion

THREAD_NAME = "step"
T = TypeVar("T")


class Step(NamedTuple):
    """What a step comes to: results of its blocks, and the versions of those that get one."""

    results: Mapping[str, BlockResult]
    versions: Mapping[str, NextVersion]


def make_step(
    stepping: Round,
    bases: Mapping[str, StoredVersion],
    quorums: Mapping[str, int],
    shared: SharedBlocks,
    optimizer: ServerOptimizer,
) -> Step:
    """Aggregates blocks and writes their next versions, of which nothing knows yet.

    Args:
        bases: By block that steps, its newest version.
        quorums: By block, the fewest devices that a version is made of.

    Raises:
        StateError: The disk does not read or write.
    """
    results, versions = stepping.results(bases.keys()), {}
    for name, result in results.items():
        if result.delta is not None and len(result.holders) >= quorums[name]:
            made = shared.make_next(bases[name], result.delta, optimizer)
            if made is not None:
                versions[name] = made
    return Step(results, versions)


async def on_own_thread(work: Callable[[], T]) -> T:
    """As `asyncio.to_thread`, on a thread that nothing waits for once it is given up."""
    done = Future[T]()
    done.set_running_or_notify_cancel()  # so that nobody settles it but the thread

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, name=THREAD_NAME, daemon=True).start()
    return await asyncio.wrap_future(done)


def is_stepping() -> bool:
    """Whether such a thread of this process is at work."""
    return any(thread.name == THREAD_NAME for thread in threading.enumerate())
