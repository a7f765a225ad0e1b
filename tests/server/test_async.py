"""Asynchronous federations: nobody waits for anybody, and nothing is lost or counted twice."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from petalfl import wire
from petalfl.vectors import to_bytes
from server.aggregators import median, weighted_mean
from server.buffers import Buffer
from server.config import PerBlock
from server.state import StateError
from tests.server.builders import (
    BLOCKS,
    ENROLLED,
    INITIAL,
    LAYOUT,
    NOW_S,
    SIZES,
    Run,
    Site,
    make_block,
    make_id,
    make_report,
    settle,
)
from tests.server.builders import make_update as any_update
from tests.server.federations import HELD, Clock

EVERYBODY = tuple(ENROLLED)
ASYNC: dict[str, Any] = {"mode": "async", "buffer_size": PerBlock(2), "max_staleness": 3}


def newest(run: Run, device: str) -> wire.Task:
    """The last task that a device was sent."""
    tasks = [m for d, m in run.sender.sent if d == device and isinstance(m, wire.Task)]
    return tasks[-1]


def make_update(run: Run, device: str, block: str, delta: float = 1.0) -> wire.BlockUpdate:
    """What the device answers to its last task."""
    task = newest(run, device)
    return any_update(
        device, block, delta, round_num=task.round_num, base_version=task.blocks[block].version
    )


async def answer(run: Run, device: str, delta: float = 1.0) -> list[str]:
    """The device sends all blocks of its last task, and its report."""
    round_num = newest(run, device).round_num
    statuses: list[str] = [
        run.federation.on_update(make_update(run, device, block, delta)).status
        for block in newest(run, device).blocks
    ]
    report = make_report(device, round_num=round_num)
    statuses.append(run.federation.on_report(device, report).status)
    await settle()
    return statuses


async def test_a_device_gets_its_next_task_when_it_has_reported(site: Site) -> None:
    with site.run(ready=["watch", "phone"], **ASYNC) as run:
        assert [newest(run, device).round_num for device in ("watch", "phone")] == [1, 1]
        assert newest(run, "watch").num_rounds == 0
        for round_num in (2, 3, 4):
            assert set(await answer(run, "watch")) == {"accepted"}
            assert newest(run, "watch").round_num == round_num
        assert newest(run, "phone").round_num == 1, "it is still at work, and held nobody back"
        assert run.federation.shared.versions["encoder-acc"] == 2, "two of three are in it"
        assert newest(run, "watch").blocks["encoder-acc"].version == 2


async def test_a_block_steps_when_its_buffer_is_full_and_no_other_does(site: Site) -> None:
    sizes = PerBlock(9, {"head": 2})
    with site.run(ready=["watch", "phone"], **{**ASYNC, "buffer_size": sizes}) as run:
        run.federation.on_update(make_update(run, "watch", "head", 1.0))
        run.federation.on_update(make_update(run, "watch", "fusion", 1.0))
        await settle()
        assert run.federation.shared.versions == dict.fromkeys(SIZES, 1)
        run.federation.on_update(make_update(run, "phone", "head", 4.0))
        await settle()
        assert run.federation.shared.versions == {**dict.fromkeys(SIZES, 1), "head": 2}
        np.testing.assert_array_equal(run.block("head"), INITIAL["head"] + 2.5)
        assert [b for b, pointer in run.sender.versions if pointer.version == 2] == ["head"]


async def test_a_stale_update_weighs_less_and_a_too_stale_one_is_rejected(site: Site) -> None:
    with site.run(ready=EVERYBODY, **{**ASYNC, "max_staleness": 1}) as run:
        slow, too_slow = make_update(run, "phone", "head", 4.0), make_update(run, "both", "head")
        for _ in range(2):
            await answer(run, "watch", 0.0)  # head: version 2
        assert run.federation.on_update(slow).status == "accepted"
        await answer(run, "watch", 1.0)  # head: version 3
        weights = 1 / np.sqrt(2), 1.0
        expected = INITIAL["head"] + (weights[0] * 4.0 + weights[1] * 1.0) / sum(weights)
        np.testing.assert_allclose(run.block("head"), expected, rtol=1e-6)
        receipt = run.federation.on_update(too_slow)
        assert receipt.status == "rejected" and "too stale" in receipt.reason
        assert run.federation.refused == {"stale": 1}
        report = run.federation.on_report("both", make_report("both"))
        await settle()
        assert report.status == "accepted"
        assert newest(run, "both").round_num == 2, "it goes on with the next task"


async def test_a_round_is_a_step_of_the_fastest_block(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    with site.run(ready=["watch", "phone"], num_rounds=2, **ASYNC) as run:
        with caplog.at_level(logging.INFO):
            await answer(run, "watch")
            await answer(run, "phone")
            assert run.federation.round_num == 2
            await answer(run, "watch")
            assert not run.federation.finished.is_set()
            await answer(run, "phone")
        assert run.federation.finished.is_set() and run.federation.round is None
        assert run.sender.finishes()["watch"].blocks.keys() == HELD["watch"]
        first, second = run.state.history.rounds()
        assert first["blocks"]["head"]["version"] == 2
        assert first["blocks"]["head"]["holders"] == ["phone", "watch"]
        assert first["blocks"]["encoder-gyro"]["version"] == 1
        assert second["blocks"]["encoder-acc"]["version"] == 2
        late = run.federation.on_update(any_update("watch", "head", 1.0, round_num=3))
        assert (late.status, late.reason) == ("rejected", "no round is open")
    lines = [r.getMessage() for r in caplog.records if "closed" in r.getMessage()]
    assert [line.partition(":")[0] for line in lines] == ["round 1 closed", "round 2 closed"]


@pytest.mark.parametrize("mode", ["sync", "async"])
async def test_old_versions_that_cannot_be_deleted_stop_nothing(
    site: Site, mode: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The step that they are deleted after is committed already, and it may close a round."""
    with site.run(ready=["watch"], **{**ASYNC, "mode": mode, "buffer_size": PerBlock(1)}) as run:
        errors = iter([sqlite3.OperationalError("disk is full"), OSError("busy"), StateError("-")])

        def fail(keep: int) -> None:
            raise next(errors)

        with monkeypatch.context() as patch:
            patch.setattr(run.state, "prune_versions", fail)
            for round_num in (1, 2, 3):
                await run.finish_round(round_num, 1.0, "watch")
        assert run.state.last_closed_round() == 3 and run.federation.round_num == 4
        assert caplog.text.count("old versions of blocks are kept") == 3
        await run.finish_round(4, 1.0, "watch")
        assert run.federation.shared.versions["head"] == 5


async def test_a_device_that_is_back_gets_its_open_task_again(site: Site) -> None:
    with site.run(ready=["watch"], **ASYNC) as run:
        run.ready("watch")
        tasks = [m for _, m in run.sender.sent]
        assert len(tasks) == 2 and tasks[0] == tasks[1]
        run.federation.on_offline("watch")
        await answer(run, "watch")
        assert len(run.sender.sent) == 2, "nobody is there to get the next one"
        run.ready("watch")
        assert newest(run, "watch").round_num == 2


def succeed(run: Run, device: str) -> None:
    """The device is revoked, and somebody enrolls under its name."""
    run.state.remove_device(device)
    run.federation.remove(device)
    assert run.state.add_device(device, "another password", ENROLLED[device], NOW_S)


async def test_a_successor_goes_on_with_the_next_number(site: Site) -> None:
    """Nothing of it is taken for its predecessor's, and nobody else waits."""
    with site.run(ready=["watch", "phone"], **ASYNC) as run:
        await answer(run, "watch")
        old = make_update(run, "watch", "head")
        assert run.federation.on_update(old).status == "accepted"
        succeed(run, "watch")
        await settle()
        run.ready("watch")
        await answer(run, "phone")
        assert (newest(run, "watch").round_num, newest(run, "phone").round_num) == (3, 2)
        assert set(await answer(run, "watch")) == {"accepted"}
        assert (newest(run, "watch").round_num, newest(run, "phone").round_num) == (4, 2)
        assert run.federation.on_update(old).status == "accepted", "as it was told before"


async def test_a_successor_is_another_device_after_restarts(site: Site) -> None:
    """It enrolls before the first, and is ready for the first time after the second."""
    with site.run(ready=["watch", "phone"], **ASYNC) as run:
        assert run.federation.on_update(make_update(run, "watch", "head")).status == "accepted"
        await run.federation.commit()
        succeed(run, "watch")
    for _ in range(2):
        with site.run(ready=["phone"], **ASYNC) as run:
            assert run.federation.round is not None
            assert run.federation.round.cohort.keys() == {"phone"}
            assert newest(run, "phone").round_num == 1
    with site.run(ready=["watch", "phone"], **ASYNC) as run:
        assert (newest(run, "watch").round_num, newest(run, "phone").round_num) == (2, 1)
        assert set(await answer(run, "watch")) == {"accepted"}
        succeed(run, "watch")
    with site.run(ready=["watch"], **ASYNC) as run:
        assert newest(run, "watch").round_num == 4, "3 was open"


async def test_a_device_slower_than_the_deadline_counts(site: Site, clock: Clock) -> None:
    with site.run(ready=["watch", "phone"], deadline_s=60, **ASYNC) as run:
        await clock.advance(40)
        await answer(run, "phone")
        old = make_update(run, "watch", "head")
        await clock.advance(21)
        assert [d for d, _ in run.sender.sent].count("watch") == 2, "its task may have been lost"
        assert (newest(run, "watch").round_num, newest(run, "phone").round_num) == (1, 2)
        assert run.federation.on_update(old).status == "accepted"
        await answer(run, "watch")
        assert newest(run, "watch").round_num == 2
        run.federation.on_offline("watch")
        await clock.advance(61)
        assert [d for d, _ in run.sender.sent].count("watch") == 3
        run.ready("watch")
        assert newest(run, "watch").round_num == 2, "it may have trained it meanwhile"
        assert set(await answer(run, "watch")) == {"accepted"}


async def test_a_device_that_is_back_with_less_is_asked_for_less(site: Site, clock: Clock) -> None:
    with site.run(ready=["both", "phone"], deadline_s=60, **ASYNC) as run:
        run.federation.on_offline("both")
        await clock.advance(61)
        run.federation.on_ready("both", wire.Ready(("acc",), ("head",)))
        assert newest(run, "both").round_num == 1
        assert newest(run, "both").blocks.keys() == HELD["watch"]
        await answer(run, "both")
        assert newest(run, "both").round_num == 2


@pytest.mark.parametrize("aggregator", ["median", "krum:0", "geometric-median"])
async def test_one_device_is_one_vote(site: Site, aggregator: str) -> None:
    changes = {**ASYNC, "buffer_size": PerBlock(5), "aggregator": aggregator}
    with site.run(ready=EVERYBODY, **changes) as run:
        for _ in range(3):
            await answer(run, "watch", 1000.0)
        await answer(run, "both", 0.01)
        await answer(run, "phone", 0.01)
        assert run.federation.shared.versions["head"] == 2
        assert np.abs(run.block("head") - INITIAL["head"]).max() < 1


async def test_a_full_buffer_waits_for_other_devices(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    with site.run(ready=EVERYBODY, aggregator="krum:0", **ASYNC) as run:
        for _ in range(4):
            await answer(run, "watch")
        await answer(run, "both")
        assert run.federation.shared.versions["head"] == 1
        assert caplog.messages.count(
            "block head has updates enough, of 1 devices: it waits until they are of 3"
        ) == 1  # fmt: skip
        await answer(run, "phone")
        assert run.federation.shared.versions["head"] == 2


def test_several_updates_of_a_holder_are_their_mean() -> None:
    block = make_block("head", *LAYOUT["head"])[0]
    for aggregator in (median(), weighted_mean()):
        buffer = Buffer(block, aggregator)
        for delta, weight in ((1.0, 1.0), (4.0, 2.0)):
            buffer.add(any_update("watch", "head", delta), weight)
        result = buffer.result()
        assert (result.holders, len(result.update_ids)) == (("watch",), 2)
        np.testing.assert_array_equal(result.delta, np.full(8, 3.0))


async def test_it_waits_for_enough_devices_once(site: Site) -> None:
    with site.run(min_devices=2, ready=["watch"], **ASYNC) as run:
        assert run.sender.sent == []
        run.ready("phone")
        assert {device for device, _ in run.sender.sent} == {"watch", "phone"}
        run.federation.on_offline("phone")
        await answer(run, "watch")
        assert newest(run, "watch").round_num == 2


# Restarts


@dataclass
class Script:
    """Devices that answer in a fixed order, each always the same, with restarts in between.

    A device has trained a task as it first saw it; a server that is back only repeats it.
    """

    site: Site
    order: list[str]
    restarts: set[int]
    aggregator: str
    tasks: dict[tuple[str, int], wire.Task] = field(default_factory=dict)

    async def play(self) -> tuple[dict[str, bytes], int]:
        """The block files at the end, and how many updates count."""
        with ExitStack() as stack:
            run = stack.enter_context(self.start())
            for number, device in enumerate(self.order):
                for step in self.steps(run, device):
                    step()
                    if number in self.restarts:
                        stack.close()
                        run = stack.enter_context(self.start())
                        break
                else:
                    await settle()
                    continue
                # What was not sent before the restart is sent after it, and all of it once more.
                for step in self.steps(run, device):
                    step()
                await settle()
            await run.federation.commit()
            accepted = run.state.history.totals()["updates_accepted"]
            pending = len(list(run.state.unconsumed_updates(BLOCKS)))
        root = self.site.data_dir / "blocks"
        files = {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}
        return {**files, "pending": bytes([pending])}, accepted

    def start(self) -> Any:
        return self.site.run(
            ready=EVERYBODY, min_devices=3, server_optimizer="momentum:0.5",
            aggregator=self.aggregator, quorum=PerBlock(1, {"fusion": 2}), **ASYNC,
        )  # fmt: skip

    def steps(self, run: Run, device: str) -> Iterator[Any]:
        for name, message in run.sender.sent:
            assert isinstance(message, wire.Task)
            self.tasks.setdefault((name, message.round_num), message)
        task = self.tasks[device, newest(run, device).round_num]
        for block in sorted(task.blocks):
            seed = list(f"{device} {task.round_num} {block}".encode())
            delta = np.random.default_rng(seed).normal(size=SIZES[block])
            update = any_update(
                device, block, delta, num_examples=len(device), round_num=task.round_num,
                base_version=task.blocks[block].version,
                update_id=make_id(device, task.round_num, block),
            )  # fmt: skip
            yield lambda update=update: run.federation.on_update(update)
        report = make_report(device, round_num=task.round_num)
        yield lambda: run.federation.on_report(device, report)


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(st.sampled_from(EVERYBODY), min_size=1, max_size=8),
    st.sets(st.integers(0, 7)),
    st.sampled_from(["weighted-mean", "geometric-median"]),
)
def test_a_restart_loses_nothing_and_counts_nothing_twice(
    tmp_path_factory: pytest.TempPathFactory,
    order: list[str],
    restarts: set[int],
    aggregator: str,
) -> None:
    async def both() -> None:
        folder = tmp_path_factory.mktemp("play")
        undisturbed = await Script(Site(folder / "undisturbed"), order, set(), aggregator).play()
        restarted = await Script(Site(folder / "restarted"), order, restarts, aggregator).play()
        assert restarted == undisturbed
        assert undisturbed[1] == sum(len(HELD[device]) for device in order)

    asyncio.run(both())


async def test_a_redelivered_update_is_known_after_its_block_has_stepped(site: Site) -> None:
    with site.run(ready=["watch", "phone"], **ASYNC) as run:
        update = make_update(run, "watch", "head", 3.0)
        run.federation.on_update(update)
        run.federation.on_update(make_update(run, "phone", "head", 1.0))
        await settle()
        assert run.federation.shared.versions["head"] == 2
    with site.run(ready=["watch"], **ASYNC) as run:
        assert run.federation.on_update(update) == wire.Receipt(update.update_id, "accepted")
        await settle()
        assert run.state.history.totals()["updates_accepted"] == 2
        assert to_bytes(run.block("head")) == to_bytes(INITIAL["head"] + 2)
        second = make_update(run, "watch", "head", 5.0)
        other = run.federation.on_update(replace(second, update_id=make_id("other")))
        assert "has sent another update" in other.reason
