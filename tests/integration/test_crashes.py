"""kill -9 of the real server at random points, while devices send.

What it must come to is known without another run: every device's update of every round is drawn
from its name and the round's number, and a closed round holds all of them.
"""

from __future__ import annotations

import asyncio
import random
import signal
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.light_clients import LightClient, open_fleet
from petalfl import uplink
from petalfl.vectors import to_bytes
from tests.integration.harness import Server, running_server
from tests.mosquitto import free_port, missing_mosquitto, mosquitto
from tests.server.builders import INITIAL, SIZES, write_artifacts

NUM_KILLS = 50
LONGEST_LIFE_S = 0.3  # of a server, once it serves
DEVICES = [f"device-{i}" for i in range(5)]
MISSING = missing_mosquitto()


def draw(device: str, round_num: int, block: str) -> tuple[NDArray[np.float32], int]:
    """An update and its weight."""
    seed = [round_num, *f"{device} {block}".encode()]
    rng = np.random.default_rng(seed)
    return rng.normal(size=SIZES[block]).astype(np.float32), int(rng.integers(1, 100))


def make_payload(device: str, round_num: int, block: str) -> tuple[bytes, int]:
    delta, num_examples = draw(device, round_num, block)
    return to_bytes(delta), num_examples


def undisturbed(block: str, num_rounds: int) -> NDArray[np.float32]:
    """The block after so many rounds of all devices."""
    vector = INITIAL[block]
    for round_num in range(1, num_rounds + 1):
        drawn = [draw(device, round_num, block) for device in DEVICES]
        deltas = np.stack([delta.astype(np.float64) for delta, _ in drawn])
        mean = np.average(deltas, axis=0, weights=[n for _, n in drawn])
        vector = vector + mean.astype(np.float32)
    return vector


async def kill_again_and_again(server: Server, rng: random.Random) -> None:
    for _ in range(NUM_KILLS):
        await asyncio.sleep(rng.uniform(0, LONGEST_LIFE_S))
        await asyncio.to_thread(server.stop, signal.SIGKILL)
        await asyncio.to_thread(server.start)


def assert_nothing_is_lost_or_counted_twice(server: Server, fleet: list[LightClient]) -> None:
    acknowledged = {
        update_id
        for client in fleet
        for update_id, receipt in client.receipts.items()
        if receipt.status == "accepted"
    }
    kept = {row[0] for table in ("updates", "reports")
            for row in server.query(f"SELECT update_id FROM {table}")}  # fmt: skip
    assert acknowledged and acknowledged <= kept
    [[num_rounds]] = server.query("SELECT MAX(round_num) FROM rounds WHERE closed_at_s > 0")
    assert num_rounds > 3
    for block in SIZES:
        query = "SELECT round_num, COUNT(*) FROM updates WHERE block = ? AND version > 0 GROUP BY 1"
        counted = {n: count for n, count in server.query(query, block) if n <= num_rounds}
        assert counted == dict.fromkeys(range(1, num_rounds + 1), len(DEVICES))
        found = server.block(block, num_rounds + 1)
        np.testing.assert_allclose(found, undisturbed(block, num_rounds), rtol=1e-5, atol=1e-5)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Devices that ask again at once."""
    monkeypatch.setattr(uplink, "RECEIPT_TIMEOUT_S", 0.3)
    monkeypatch.setattr(uplink, "BACKOFF_S", (0.02, 0.1))


@pytest.mark.mosquitto
@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
async def test_fifty_kills_lose_nothing_and_count_nothing_twice(
    tmp_path: Path, impatient: None
) -> None:
    write_artifacts(tmp_path / "artifacts")
    (tmp_path / "broker").mkdir()
    with (
        mosquitto(tmp_path / "broker") as url,
        running_server(
            tmp_path / "artifacts", tmp_path / "server", "--broker", url,
            "--min-devices", str(len(DEVICES)), "--log-level", "warning",
        ) as server,
    ):  # fmt: skip
        held = ["acc", "gyro"]
        fleet = await open_fleet(server.url, server.token, "default", DEVICES, held, make_payload)
        running = [asyncio.create_task(client.run()) for client in fleet]
        for client in fleet:
            await client.announce(held, ["head"])
        await kill_again_and_again(server, random.Random(7))
        before = server.get("status")["round_num"]
        await server.until(lambda status: status["round_num"] > before + 2, "rounds after it all")
        await asyncio.to_thread(server.stop, signal.SIGKILL)
        for task in running:
            task.cancel()
        for client in fleet:
            await client.close()
        assert_nothing_is_lost_or_counted_twice(server, fleet)
        server.start()


@pytest.mark.mosquitto
@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
async def test_a_broker_that_restarts_again_and_again_changes_nothing(
    tmp_path: Path, impatient: None
) -> None:
    """Server and devices come back to it and subscribe again; it has forgotten everybody."""
    write_artifacts(tmp_path / "artifacts")
    (tmp_path / "broker").mkdir()
    port = free_port()
    held = ["acc", "gyro"]
    with ExitStack() as broker, ExitStack() as stack:
        url = broker.enter_context(mosquitto(tmp_path / "broker", port))
        server = stack.enter_context(
            running_server(
                tmp_path / "artifacts", tmp_path / "server", "--broker", url,
                "--min-devices", str(len(DEVICES)), "--log-level", "warning",
            )
        )  # fmt: skip
        fleet = await open_fleet(server.url, server.token, "default", DEVICES, held, make_payload)
        running = [asyncio.create_task(client.run()) for client in fleet]
        for client in fleet:
            await client.announce(held, ["head"])
        for _ in range(5):
            before = server.get("status")["round_num"]
            await server.until(lambda s: s["round_num"] > before + 2, "rounds")  # noqa: B023
            await asyncio.to_thread(broker.close)
            await asyncio.sleep(0.1)
            broker.enter_context(mosquitto(tmp_path / "broker", port))
        before = server.get("status")["round_num"]
        await server.until(lambda status: status["round_num"] > before + 2, "rounds after it all")
        for task in running:
            task.cancel()
        for client in fleet:
            await client.close()
        await asyncio.to_thread(server.stop)
        assert_nothing_is_lost_or_counted_twice(server, fleet)
