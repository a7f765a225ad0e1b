"""What arrives while a block's updates are being aggregated, which is off the event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import server.federation
from petalfl.vectors import Vector
from server.aggregators import Aggregator, weighted_mean
from server.options import PerBlock
from tests.server.builders import INITIAL, Run, Site, make_report, make_update, settle

TIMEOUT_S = 60.0


class Gate:
    """Lets an aggregation begin, and end when it is opened."""

    def __init__(self) -> None:
        self.has_begun, self.is_open = threading.Event(), threading.Event()
        self.error: Exception | None = None

    def finalize(self, state: Any) -> Vector | None:
        self.has_begun.set()
        assert self.is_open.wait(TIMEOUT_S)
        if self.error is not None:
            raise self.error
        return weighted_mean().finalize(state)

    async def reached(self) -> None:
        """The event loop goes on, or this would never return."""
        while not self.has_begun.is_set():
            await asyncio.sleep(0.001)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    made = Gate()

    def parse(text: str) -> Aggregator[Any]:
        return replace(weighted_mean(), finalize=made.finalize)

    monkeypatch.setattr(server.federation, "parse_aggregator", parse)
    yield made
    made.is_open.set()


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def versions(run: Run) -> dict[str, int]:
    return run.federation.shared.versions


async def test_a_round_that_closes_takes_no_more_updates(site: Site, gate: Gate) -> None:
    with site.run(ready=["watch", "phone"], min_devices=2, over_selection=2.0) as run:
        counted = make_update("watch", "head", 1.0)
        run.federation.on_update(counted)
        run.federation.on_report("watch", make_report("watch"))
        await gate.reached()
        late = run.federation.on_update(make_update("phone", "head", 5.0))
        assert (late.status, late.reason) == ("rejected", "round 1 is closing")
        again = run.federation.on_update(counted)
        assert again.status == "accepted", "it counts already"
        assert run.federation.on_report("phone", make_report("phone")).status == "accepted"
        assert run.federation.round_num == 1 and versions(run)["head"] == 1
        gate.is_open.set()
        await settle()
        assert run.federation.round_num == 2
        np.testing.assert_array_equal(run.block("head"), INITIAL["head"] + 1)
        assert list(run.state.unconsumed_updates(run.federation.shared.blocks)) == []


ASYNC: dict[str, Any] = {"mode": "async", "buffer_size": PerBlock(9, {"head": 1}), "schedule": ""}


async def test_an_update_of_a_block_that_steps_goes_into_its_next_buffer(
    site: Site, gate: Gate
) -> None:
    with site.run(ready=["watch", "phone"], max_staleness=5, **ASYNC) as run:
        run.federation.on_update(make_update("watch", "head", 1.0))
        await gate.reached()
        assert run.federation.on_update(make_update("phone", "head", 3.0)).status == "accepted"
        assert run.federation.on_update(make_update("phone", "fusion", 3.0)).status == "accepted"
        gate.is_open.set()
        await settle()
        assert versions(run)["head"] == 3, "one update each"
        np.testing.assert_allclose(run.block("head"), INITIAL["head"] + 4, rtol=1e-6)
        assert run.federation.round is not None
        assert len(run.federation.round.buffers["fusion"]) == 1


async def test_a_stop_in_between_loses_nothing(site: Site, gate: Gate) -> None:
    with site.run(ready=["watch", "phone"], max_staleness=5, **ASYNC) as run:
        run.federation.on_update(make_update("watch", "head", 1.0))
        await gate.reached()
        run.federation.on_update(make_update("phone", "head", 3.0))
    gate.is_open.set()
    await settle()
    with site.run(max_staleness=5, **{**ASYNC, "buffer_size": PerBlock(9, {"head": 2})}) as run:
        await settle()
        assert versions(run)["head"] == 2
        np.testing.assert_array_equal(run.block("head"), INITIAL["head"] + 2)


async def test_an_aggregation_that_fails_is_tried_again(
    site: Site, gate: Gate, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(server.federation, "RETRY_S", 0.01)
    gate.error = MemoryError("no room")
    gate.is_open.set()
    with site.run(ready=["watch"]) as run:
        run.federation.on_update(make_update("watch", "head", 1.0))
        run.federation.on_report("watch", make_report("watch"))
        await settle()
        assert run.federation.round_num == 1
        assert "round 1 has to wait: its updates cannot be aggregated" in caplog.text
        assert "MemoryError: no room" in caplog.text
        gate.error = None
        while run.federation.round_num == 1:
            await asyncio.sleep(0.005)
        np.testing.assert_array_equal(run.block("head"), INITIAL["head"] + 1)
