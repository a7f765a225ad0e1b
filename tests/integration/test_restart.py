"""A server that comes back on a broker whose devices never left it."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import pytest

from tests.integration.harness import running_server, take_part, three_devices
from tests.mosquitto import missing_mosquitto, mosquitto

MISSING = missing_mosquitto()


@pytest.mark.mosquitto
@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
async def test_a_killed_server_finds_its_devices_again(
    watch_artifacts: Path, tmp_path: Path
) -> None:
    rounds = 12
    (tmp_path / "broker").mkdir()
    with (
        mosquitto(tmp_path / "broker") as url,
        running_server(
            watch_artifacts, tmp_path / "server", "--broker", url, "--rounds", str(rounds),
            "--min-devices", "3",
        ) as server,
    ):  # fmt: skip
        clients = [device.client(server, tmp_path / "stores") for device in three_devices()]
        taking_part = asyncio.create_task(take_part(clients))
        await server.until(lambda status: status["round_num"] >= 3, "three rounds")
        await asyncio.to_thread(server.stop, signal.SIGKILL)
        server.start()
        await taking_part
        for client in clients:
            client.close()
        status = server.get("status")
        assert status["is_finished"]
        assert status["updates_accepted"] == rounds * 4
        assert status["shared_blocks"] == {"encoder-acc": rounds + 1, "encoder-gyro": rounds + 1}
