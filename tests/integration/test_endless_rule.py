"""A server that is told to stop amid an aggregation that may take for ever."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from benchmarks.light_clients import open_fleet
from petalfl import uplink
from petalfl.vectors import to_bytes
from tests.integration.harness import ROOT, running_server
from tests.server.builders import SIZES, make_update, write_artifacts

RULE = Path(__file__).parent / "endless_rule"
DEVICES, HELD = ["a", "b"], ["acc", "gyro"]


def make_payload(device: str, round_num: int, block: str) -> tuple[bytes, int]:
    return to_bytes(make_update(device, block, round_num).delta), 1


async def test_it_stops_at_once_and_the_round_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uplink, "RECEIPT_TIMEOUT_S", 1.0)
    begun, rounds = tmp_path / "begun", ("--rounds", "2", "--min-devices", "2")
    paths = (str(RULE), str(ROOT), str(ROOT / "sdk"), os.environ.get("PYTHONPATH"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    monkeypatch.setenv("PETALFL_TEST_RULE", str(begun))
    write_artifacts(tmp_path / "artifacts")
    with running_server(tmp_path / "artifacts", tmp_path / "server", *rounds) as server:
        fleet = await open_fleet(server.url, server.token, "default", DEVICES, HELD, make_payload)
        running = [asyncio.create_task(client.run()) for client in fleet]
        for client in fleet:
            await client.announce(HELD, ["head"])
        while not begun.exists():
            await asyncio.sleep(0.02)
        assert await asyncio.to_thread(server.stop, signal.SIGTERM) == 0
        assert "the state is kept in" in server.log and "Traceback" not in server.log
        assert server.query("SELECT COUNT(*) FROM updates WHERE version IS NULL") == [(8,)]
        monkeypatch.delenv("PETALFL_TEST_RULE")
        await asyncio.to_thread(server.start)
        await asyncio.wait_for(asyncio.gather(*running), 120)
        for client in fleet:
            await client.close()
        counted = server.query("SELECT version, COUNT(*) FROM updates GROUP BY 1")
        assert counted == [(2, 2 * len(SIZES)), (3, 2 * len(SIZES))]
        for block in SIZES:
            moved = server.block(block, 3) - server.block(block, 1)
            assert moved.tolist() == pytest.approx([3.0] * SIZES[block])
