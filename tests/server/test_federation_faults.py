"""What goes wrong in a `Federation`."""

from __future__ import annotations

import asyncio
import logging
import shutil
import sqlite3
from pathlib import Path

import numpy as np
import pytest

import server.federation
from petalfl import wire
from petalfl.vectors import to_bytes
from server.federation import Federation
from server.state import StateError
from tests.server.builders import (
    FakeSender,
    Site,
    make_config,
    make_id,
    make_report,
    make_update,
    settle,
)
from tests.server.federations import EVERYBODY, Clock


@pytest.mark.parametrize("block", ["fusion", "head"])
async def test_an_update_id_used_twice_is_rejected(site: Site, block: str) -> None:
    used = make_id("used")
    with site.run(ready=["watch"]) as run:
        run.federation.on_update(make_update("watch", "head", 1.0, update_id=used))
        round_num = 1
        if block == "head":  # in the next round
            for other in ("encoder-acc", "fusion"):
                run.federation.on_update(make_update("watch", other, 1.0))
            run.federation.on_report("watch", make_report("watch"))
            await settle()
            round_num = 2
        again = make_update(
            "watch", block, 1.0, update_id=used, round_num=round_num, base_version=round_num
        )
        assert run.federation.on_update(again).status == "rejected"


async def test_a_version_is_always_finite(site: Site) -> None:
    with site.run(ready=["watch"], num_rounds=2) as run, np.errstate(over="ignore"):
        for round_num in (1, 2):
            await run.finish_round(round_num, 3e38)
        assert np.isfinite(run.block("head")).all()


async def test_a_round_whose_closing_failed_is_closed_later(
    site: Site, clock: Clock, other_db: sqlite3.Connection
) -> None:
    with site.run(ready=["watch"]) as run:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
        fault = "BEFORE UPDATE ON rounds BEGIN SELECT RAISE(ABORT, 'disk full'); END"
        other_db.execute(f"CREATE TRIGGER fault {fault}")
        await run.finish_round(1)
        assert run.state.last_closed_round() == 0
        other_db.execute("DROP TRIGGER fault")
        run.ready("watch")
        await clock.advance(100)
        assert run.state.last_closed_round() >= 1


@pytest.mark.parametrize("mode", ["sync", "async"])
async def test_a_round_whose_opening_failed_half_way_is_opened_later(
    site: Site, clock: Clock, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    with site.run(mode=mode) as run:
        with monkeypatch.context() as patch:

            def fail(*arguments: object) -> None:
                raise StateError("the disk does not read")

            patch.setattr(server.federation, "round_from_journal", fail)
            run.ready("watch")
            assert run.federation.round is None and run.sender.sent == []
        await clock.advance(11)
        assert run.sender.tasks(1).keys() == {"watch"}
        await run.finish_round(1)
        assert run.federation.refused == {}


async def test_an_update_of_an_open_round_is_not_rejected_before_the_start(site: Site) -> None:
    with site.run(ready=["watch"]):
        pass
    config = make_config(site.artifacts, site.data_dir)
    with site.state() as state:
        federation = Federation(config, site.manifest, state)
        receipt = federation.on_update(make_update("watch", "head", 1.0))
        federation.close()
        assert receipt.status != "rejected"


@pytest.mark.parametrize("has_open_round", [False, True])
async def test_a_device_may_be_ready_before_the_start(site: Site, has_open_round: bool) -> None:
    if has_open_round:
        with site.run(ready=["watch"]):
            pass
    config = make_config(site.artifacts, site.data_dir)
    with site.state() as state:
        federation, sender = Federation(config, site.manifest, state), FakeSender()
        try:
            federation.on_ready("watch", wire.Ready(("acc",), ("head",)))
            federation.start(sender)
            assert sender.tasks(1).keys() == {"watch"}
        finally:
            federation.close()


async def test_a_damaged_block_stops_the_start(site: Site) -> None:
    with site.run():
        pass
    path = site.data_dir / "blocks" / "head" / "1.safetensors"
    shutil.copy(site.data_dir / "blocks" / "fusion" / "1.safetensors", path)
    with pytest.raises(Exception, match=r"cannot read .*head/1\.safetensors"), site.run():
        pass


async def test_one_line_is_logged_per_round(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    with site.run(ready=["watch"], num_rounds=1) as run, caplog.at_level(logging.INFO):
        await run.finish_round(1)
    lines = [r.getMessage() for r in caplog.records if r.levelno == logging.INFO]
    expected = (
        "round 1 closed: loss 0.5000, updates: encoder-acc 1, encoder-gyro 0, fusion 1, head 1"
    )
    assert lines == [expected]


async def test_deterministic_rounds_do_not_depend_on_who_is_first(tmp_path: Path) -> None:
    """By default, too, they hardly ever do; here a float64 sum of another order would show."""
    values = {"both": 1e17, "watch": -1e17, "phone": 3.0}
    found = []
    for k, order in enumerate((["both", "watch", "phone"], ["phone", "both", "watch"])):
        site = Site(tmp_path / str(k))
        with site.run(ready=EVERYBODY, min_devices=3, is_deterministic=True) as run:
            for device in order:
                run.federation.on_update(make_update(device, "head", values[device]))
            for device in order:
                run.federation.on_report(device, make_report(device))
            await settle()
            assert run.federation.shared.versions["head"] == 2
            found.append(to_bytes(run.block("head")))
    assert found[0] == found[1]
