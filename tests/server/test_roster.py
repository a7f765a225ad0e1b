"""Whom a federation asks, for what, and when it has enough."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from petalfl import wire
from server.config import PerBlock
from server.roster import Roster
from server.selection import Candidate
from tests.server.builders import (
    INITIAL,
    LAYOUT,
    SIZES,
    Run,
    Site,
    make_block,
    make_config,
    make_report,
    make_update,
    settle,
)
from tests.server.federations import HELD, Clock, cohort

BLOCKS = {name: make_block(name, *rest)[0] for name, rest in LAYOUT.items()}
MANY = {f"watch-{i}": ["acc"] for i in range(8)} | {"phone-0": ["gyro"]}


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path, enrolled=MANY)


def ready(run: Run, *devices: str) -> None:
    for device in devices or MANY:
        run.federation.on_ready(device, wire.Ready(tuple(MANY[device]), ("head",)))


# Selection


@pytest.mark.parametrize(
    ("cohort_size", "over_selection", "num_asked", "num_enough"),
    [
        (0, 1.0, 9, 9),
        (4, 1.0, 4, 4),
        (4, 1.5, 6, 4),
        (7, 1.5, 9, 6),
        (0, 1.5, 9, 6),
        (20, 1.0, 9, 9),
    ],
)
async def test_more_are_asked_than_are_waited_for(
    site: Site, cohort_size: int, over_selection: float, num_asked: int, num_enough: int
) -> None:
    with site.run(
        min_devices=9, selection="random", cohort_size=cohort_size, over_selection=over_selection
    ) as run:
        ready(run)
        asked = list(cohort(run))
        assert len(asked) == num_asked == len(run.sender.tasks(1))
        for number, device in enumerate(asked[::-1], start=1):
            assert run.federation.round_num == 1
            await run.finish_round(1, 1.0, device)
            if number == num_enough:
                break
        assert run.federation.round_num == 2, "enough have reported"
        if num_enough < num_asked:
            late = run.federation.on_report(asked[0], make_report(asked[0]))
            assert (late.status, late.reason) == ("rejected", "round 1 is closed, round 2 is open")
            assert run.federation.refused == {"late": 1}


async def test_the_cohort_changes_from_round_to_round_and_not_with_the_run(tmp_path: Path) -> None:
    drawn = []
    for name in ("one", "two"):
        site = Site(tmp_path / name, enrolled=MANY)
        with site.run(min_devices=9, selection="random", cohort_size=3, num_rounds=4) as run:
            ready(run)
            cohorts = []
            for round_num in range(1, 5):
                cohorts.append(frozenset(cohort(run)))
                await run.finish_round(round_num)
        drawn.append(cohorts)
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) > 1


async def test_a_rare_modality_is_never_starved(site: Site) -> None:
    with site.run(min_devices=9, selection="coverage", cohort_size=2, num_rounds=5) as run:
        ready(run)
        for round_num in range(1, 6):
            assert "phone-0" in cohort(run)
            await run.finish_round(round_num)
        assert run.federation.shared.versions["encoder-gyro"] == 6


async def test_utility_knows_the_past_also_after_a_restart(site: Site) -> None:
    """Who never answers is asked no longer, when others do."""
    arguments: dict[str, Any] = {"min_devices": 9, "selection": "utility:60:0", "cohort_size": 2}
    with site.run(**arguments, over_selection=4.5, num_rounds=1) as run:
        ready(run)
        for device in ("watch-1", "watch-2"):
            await run.finish_round(1, 1.0, device)
    with site.run(**arguments) as run:
        ready(run)
        for round_num in (2, 3):
            assert cohort(run).keys() == {"watch-1", "watch-2"}
            await run.finish_round(round_num)


def test_a_record_grows() -> None:
    roster = Roster(BLOCKS, {"watch": Candidate(frozenset(), num_selected=3, last_round=2)})
    roster.note_asked("watch", 5, 100.0)
    roster.note_report("watch", make_report("watch", num_examples=9, loss=0.25), 107.5)
    roster.note_asked("phone", 5, 100.0)
    assert roster._known == {
        "watch": Candidate(frozenset(), 4, 1, 5, 0.25, 9, 7.5),
        "phone": Candidate(frozenset(), 1, 0, 5),
    }


# A byte budget


async def test_a_device_sends_what_its_budget_has_room_for(site: Site) -> None:
    """watch: 24 + 16 + 32 bytes; within 60, every block has its turn."""
    with site.run(max_upload_bytes=60) as run:
        ready(run, "watch-0")
        sent: list[str] = []
        for round_num in range(1, 5):
            task = run.task("watch-0", round_num)
            assert task.blocks.keys() == HELD["watch"], "it trains all of them"
            assert task.uploads is not None
            assert sum(4 * SIZES[block] for block in task.uploads) <= 60
            sent += task.uploads
            unasked = next(iter(HELD["watch"] - set(task.uploads)))
            base = task.blocks[unasked].version
            receipt = run.federation.on_update(
                make_update("watch-0", unasked, 1.0, round_num=round_num, base_version=base)
            )
            assert receipt.status == "rejected" and "was not asked for" in receipt.reason
            await run.finish_round(round_num)
        assert set(sent) == HELD["watch"]


async def test_without_a_budget_a_task_says_nothing_of_uploads(site: Site) -> None:
    with site.run() as run:
        ready(run, "watch-0")
        assert run.task("watch-0", 1).uploads is None


async def test_a_device_whose_blocks_are_all_too_long_is_named(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    """The phone's gyroscope has a block of 12 bytes, of the watch's the shortest has 16."""
    with site.run(max_upload_bytes=15) as run:
        ready(run, "phone-0", "watch-0")
    assert [m for m in caplog.messages if "sends nothing" in m] == [
        "device watch-0 sends nothing: all of its shared blocks are longer than the "
        "max-upload-bytes of 15"
    ]


def test_the_blocks_that_matter_go_first(tmp_path: Path) -> None:
    config = make_config(tmp_path, tmp_path, max_upload_bytes=60)
    roster = Roster(BLOCKS, {})
    roster.ready["watch"] = frozenset(HELD["watch"])
    for block, delta in (("encoder-acc", 9.0), ("fusion", 0.001), ("head", 0.001)):
        roster.note_sent(make_update("watch", block, delta))
    assert "encoder-acc" in roster.uploads("watch", 2, config)


# Quorum


async def test_a_block_below_its_quorum_keeps_its_version_and_says_so(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    quorum = PerBlock(1, {"encoder-gyro": 2})
    with site.run(min_devices=2, quorum=quorum, num_rounds=1) as run:
        ready(run, "watch-0", "phone-0")
        with caplog.at_level(logging.INFO):
            await run.finish_round(1, 2.0)
        assert run.federation.shared.versions == {
            "encoder-acc": 2, "encoder-gyro": 1, "fusion": 2, "head": 2
        }  # fmt: skip
        np.testing.assert_array_equal(run.block("encoder-gyro"), INITIAL["encoder-gyro"])
        [closed] = run.state.history.rounds()
        assert closed["blocks"]["encoder-gyro"]["num_dropped"] == 1
        assert closed["blocks"]["encoder-gyro"]["holders"] == []
        assert closed["blocks"]["encoder-gyro"]["num_asked"] == 1
        assert run.state.history.totals()["updates_dropped"] == 1
        assert "encoder-gyro keeps its version, 1 dropped" in caplog.text


async def test_an_aggregator_s_own_quorum_counts_too(site: Site) -> None:
    """Krum among n needs more than two of them."""
    with site.run(min_devices=2, aggregator="krum:1", num_rounds=2) as run:
        ready(run, "watch-0", "watch-1")
        await run.finish_round(1, 2.0)
        assert run.federation.shared.versions["head"] == 1
        ready(run, *MANY)
        await run.finish_round(2, 2.0, *cohort(run))
        await settle()


async def test_late_updates_are_counted(site: Site, clock: Clock) -> None:
    with site.run(min_devices=2, num_rounds=2) as run:
        ready(run, "watch-0", "watch-1")
        await run.finish_round(1, 1.0, "watch-0")
        await clock.advance(61)
        run.federation.on_update(make_update("watch-1", "head", 1.0))
        run.federation.on_report("watch-1", make_report("watch-1"))
        await run.finish_round(2)
        assert [closed["num_late"] for closed in run.state.history.rounds()] == [0, 2]


# Codecs


async def test_a_task_names_the_best_codec_that_the_device_knows(site: Site) -> None:
    with site.run(codec="topk-int8:0.1", min_devices=2) as run:
        run.federation.on_ready("watch-0", wire.Ready(("acc",), ("head",)))
        run.federation.on_ready("watch-1", wire.Ready(("acc",), ("head",), ("f32", "int8")))
        assert run.task("watch-0", 1).codec is None, "f32 needs no word of it"
        assert run.task("watch-1", 1).codec == "int8"


async def test_a_device_that_learns_a_codec_is_asked_to_use_it(site: Site) -> None:
    with site.run(codec="int8") as run:
        ready(run, "watch-0")
        assert run.task("watch-0", 1).codec is None
        run.federation.on_ready("watch-0", wire.Ready(("acc",), ("head",), ("f32", "int8")))
        assert run.task("watch-0", 1).codec == "int8"


@pytest.mark.parametrize(("codec", "most"), [("f32", 1), ("int8", 2), ("topk:0.1", 3)])
def test_a_budget_counts_bytes_as_they_are_sent(tmp_path: Path, codec: str, most: int) -> None:
    """24 + 16 + 32 bytes of f32, 10 + 8 + 12 of int8, 5 each of one value with its bitmap."""
    config = make_config(tmp_path, tmp_path, max_upload_bytes=22, codec=codec)
    roster = Roster(BLOCKS, {})
    roster.ready["watch"] = frozenset(HELD["watch"])
    roster.codecs["watch"] = ("int8", "topk")
    assert len(roster.uploads("watch", 1, config)) == most
