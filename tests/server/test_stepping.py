"""What arrives while a block's updates are being aggregated, which is off the event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import server.federation
import server.state
import server.versions
from petalfl.model import Block
from petalfl.vectors import Vector, to_bytes
from server.aggregators import Aggregator, median, weighted_mean
from server.optimizers import ServerOptimizer, sgd
from server.options import PerBlock
from server.rounds import Assignment, Round
from server.spill import Spill
from server.stepping import THREAD_NAME
from server.versions import read_version, write_version
from tests.server.builders import BLOCKS, INITIAL, Run, Site, make_report, make_update, settle

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


def test_what_comes_while_a_block_steps_is_kept_where_its_buffer_keeps_it(
    tmp_path: Path,
) -> None:
    """Not in memory, and in files that do not go with the buffer that steps."""
    stepping = Round(
        1, {"head": 1}, {"head": BLOCKS["head"]}, median(), new_keep=lambda: Spill(tmp_path).keep
    )
    for name in ("watch", "phone", "both"):
        stepping.assign(name, Assignment(1, frozenset(["head"])))
    stepping.add(make_update("watch", "head", 1.0))
    stepping.hold(["head"])
    stepping.add(make_update("phone", "head", 3.0))
    [held] = stepping._held["head"]
    assert not held.encoded.payload
    stepping.step("head", 2, median())
    stepping.release()
    stepping.buffer(make_update("both", "head", 5.0, base_version=2))
    found = stepping.results(["head"])["head"]
    assert found.holders == ("both", "phone")
    np.testing.assert_array_equal(found.delta, np.full(8, 4.0, np.float32))


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


async def test_the_optimizer_runs_and_versions_are_written_off_the_loop(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As are the old ones read that a device asks for."""
    threads: dict[str, set[threading.Thread]] = {"optimizer": set(), "write": set(), "read": set()}
    optimizer = sgd()

    def note(what: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*arguments: Any) -> Any:
            threads[what].add(threading.current_thread())
            return work(*arguments)

        return noted

    def parse(text: str) -> ServerOptimizer:
        return replace(optimizer, update=note("optimizer", optimizer.update))

    monkeypatch.setattr(server.federation, "parse_optimizer", parse)
    with site.run(ready=["watch"]) as run:
        monkeypatch.setattr(server.state, "write_version", note("write", write_version))
        monkeypatch.setattr(server.versions, "read_version", note("read", read_version))
        await run.finish_round(1)
        assert versions(run)["head"] == 2
        assert await run.federation.shared.body("head", 1) is not None
        assert all(threads.values())
        assert threading.current_thread() not in set.union(*threads.values())


async def test_old_versions_are_read_one_after_another_and_once(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, most, paths = 0, 0, list[str]()
    lock = threading.Lock()

    def read(path: Path, block: Block) -> Any:
        nonlocal reading, most
        with lock:
            reading, most = reading + 1, max(most, reading + 1)
            paths.append(path.parent.name)
        try:
            return read_version(path, block)
        finally:
            with lock:
                reading -= 1

    with site.run(ready=["watch"]) as run:
        await run.finish_round(1)
        monkeypatch.setattr(server.versions, "read_version", read)
        wanted = ["head", "fusion", "head", "encoder-acc", "fusion", "head"]
        bodies = await asyncio.gather(*[run.federation.shared.body(name, 1) for name in wanted])
        assert [body and body.data for body in bodies] == [to_bytes(INITIAL[n]) for n in wanted]
        assert most == 1 and sorted(paths) == ["encoder-acc", "fusion", "head"]


async def test_a_version_that_is_pruned_while_it_is_read_is_not_there(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_asked, is_pruned = threading.Event(), threading.Event()

    def read(path: Path, block: Block) -> Any:
        is_asked.set()
        assert is_pruned.wait(TIMEOUT_S)
        return read_version(path, block)

    with site.run(ready=["watch"], keep_versions=2) as run:
        await run.finish_round(1)
        monkeypatch.setattr(server.versions, "read_version", read)
        asked = asyncio.create_task(run.federation.shared.body("head", 1))
        while not is_asked.is_set():
            await asyncio.sleep(0.001)
        run.state.prune_versions(1)
        is_pruned.set()
        assert await asked is None


async def test_a_step_given_up_writes_nothing_into_a_folder_that_is_another_servers(
    site: Site, gate: Gate
) -> None:
    with site.run(ready=["watch"]) as run:
        run.federation.on_update(make_update("watch", "head", 1.0))
        run.federation.on_report("watch", make_report("watch"))
        await gate.reached()
    [left] = [one for one in threading.enumerate() if one.name == THREAD_NAME]
    before = sorted(site.data_dir.rglob("*.safetensors"))
    gate.is_open.set()
    await asyncio.to_thread(left.join)
    assert sorted(site.data_dir.rglob("*.safetensors")) == before


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
