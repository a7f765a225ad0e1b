"""What tests of `Federation` have in common."""

from __future__ import annotations

import asyncio
import hashlib

import pytest

from petalfl.vectors import to_bytes
from server.buffers import BlockResult
from tests.server.builders import (
    ENROLLED,
    Run,
    settle,
)

HELD = {
    "both": {"encoder-acc", "encoder-gyro", "fusion", "head"},
    "watch": {"encoder-acc", "fusion", "head"},
    "phone": {"encoder-gyro", "fusion", "head"},
}
EVERYBODY = tuple(ENROLLED)


class Clock:
    """The event loop's time, moved by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._ahead_s = 0.0
        loop = asyncio.get_running_loop()
        real = loop.time
        monkeypatch.setattr(loop, "time", lambda: real() + self._ahead_s)

    async def advance(self, seconds: float) -> None:
        self._ahead_s += seconds
        await settle()


def result(run: Run, block: str) -> BlockResult:
    """What has come of a block in the open round."""
    assert run.federation.round is not None
    return run.federation.round.results([block])[block]


def cohort(run: Run) -> dict[str, frozenset[str]]:
    """By device that the open round has asked: the blocks that it is to send."""
    assert run.federation.round is not None
    return {device: asked.blocks for device, asked in run.federation.round.cohort.items()}


def digest(run: Run, block: str) -> str:
    return hashlib.sha256(to_bytes(run.block(block))).hexdigest()
