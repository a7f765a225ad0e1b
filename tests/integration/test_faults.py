"""Power cuts, kill -9 and Ctrl-C, with real processes: nothing is lost, nothing counts twice."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from petalfl import EdgeClient, RoundInfo
from petalfl.store import DeviceStore, State
from tests.integration.harness import (
    ROOT,
    SCHEME,
    Outcome,
    Server,
    read_outcome,
    running_server,
    take_part,
    three_devices,
    wait_for_session,
)

HOLD_TIMEOUT_S = 120.0  # a server may have to start meanwhile
ONE_DEVICE = ("--rounds", "2", *SCHEME, "--min-devices", "1", "--epochs", "1")


@pytest.fixture(autouse=True)
def is_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("mqtt", "uplink", "participation"):
        monkeypatch.setattr(f"petalfl.{module}.BACKOFF_S", (0.05, 0.2))
    monkeypatch.setattr("petalfl.uplink.RECEIPT_TIMEOUT_S", 1)


@pytest.mark.parametrize(
    ("sign", "when"),
    [
        pytest.param(signal.SIGINT, "while it is down", id="SIGINT"),
        pytest.param(signal.SIGKILL, "when it is back", id="SIGKILL"),
    ],
)
def test_a_server_that_stops_amid_a_round_goes_on(
    watch_artifacts: Path,
    tmp_path: Path,
    undisturbed: Outcome,
    sign: signal.Signals,
    when: str,
) -> None:
    """One device has its receipts, two are training; they deliver as soon as they can."""
    is_free = threading.Event()
    num_held = 0
    trained: dict[str, list[int]] = {member.name: [] for member in three_devices()}

    def on_round(device: str, info: RoundInfo) -> None:
        nonlocal num_held
        trained[device].append(info.round_num)
        if info.round_num == 2 and device != "acc-only":
            num_held += 1
            assert is_free.wait(HOLD_TIMEOUT_S)

    def has_receipts(client: EdgeClient) -> bool:
        """So what it has sent is durable; the server counts a report before it is."""
        state = client._trainer.state
        return state.round_num == 2 and not state.outbox

    async def scenario(server: Server) -> None:
        with ExitStack() as stack:
            clients = [
                stack.enter_context(
                    member.client(
                        server, tmp_path, on_round=lambda i, d=member.name: on_round(d, i)
                    )
                )
                for member in three_devices()
            ]
            running = asyncio.create_task(take_part(clients))
            try:
                await server.until(
                    lambda s: s["num_reports"] == 1 and num_held == 2 and has_receipts(clients[0]),
                    "one report of round 2, and its receipt",
                )
                await asyncio.to_thread(server.stop, sign)
                rows = server.query("SELECT device, delta IS NULL FROM updates WHERE round_num = 2")
                assert rows == [("acc-only", 0)]
                assert server.query("SELECT device FROM reports WHERE round_num = 2") == [
                    ("acc-only",)
                ]
                if when == "while it is down":
                    is_free.set()
                    await asyncio.sleep(1)
                await asyncio.to_thread(server.start)
                is_free.set()
                await running
            finally:
                is_free.set()
                running.cancel()
                await asyncio.wait([running])

    arguments = ("--rounds", "3", *SCHEME)
    with running_server(watch_artifacts, tmp_path / "server", *arguments) as server:
        asyncio.run(scenario(server))
        outcome = read_outcome(watch_artifacts, server, tmp_path)
        holders = {"encoder-acc": 2, "encoder-gyro": 2}
        assert_one_update_each(server, num_rounds=3, holders=holders, num_closed=3)
        assert server.query("SELECT round_num, COUNT(*) FROM reports GROUP BY round_num") == [
            (1, 3), (2, 3), (3, 3),
        ]  # fmt: skip
    assert all(rounds == [1, 2, 3] for rounds in trained.values()), trained
    outcome.assert_close(undisturbed)  # measured difference: 0


def test_the_embedded_broker_is_killed(watch_artifacts: Path, tmp_path: Path) -> None:
    """Amid a federation: it comes back where it was, and so does everybody who was connected."""

    is_held, is_free = threading.Event(), threading.Event()

    def hold_round_2(info: RoundInfo) -> None:
        if info.round_num == 2:
            is_held.set()
            assert is_free.wait(HOLD_TIMEOUT_S)

    async def scenario() -> None:
        one, *others = three_devices()
        clients = [one.client(server, tmp_path, on_round=hold_round_2)]
        clients += [device.client(server, tmp_path) for device in others]
        running = asyncio.create_task(take_part(clients))
        try:
            assert await asyncio.to_thread(is_held.wait, HOLD_TIMEOUT_S)
            children = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text()
            [broker] = map(int, children.split())
            os.kill(broker, signal.SIGKILL)
        finally:
            is_free.set()
        await running

    with running_server(watch_artifacts, tmp_path / "server", "--rounds", "3", *SCHEME) as server:
        asyncio.run(scenario())
        assert "the embedded broker ended with code -9: starting it again" in server.log
        holders = {"encoder-acc": 2, "encoder-gyro": 2}
        assert_one_update_each(server, num_rounds=3, holders=holders, num_closed=3)
        assert "Traceback" not in server.log


def assert_one_update_each(
    server: Server, num_rounds: int, holders: dict[str, int], num_closed: int
) -> None:
    """In every round so far, each holder of a block has contributed to it once."""
    rows = server.query(
        "SELECT round_num, block, COUNT(*), COUNT(DISTINCT device) FROM updates "
        "GROUP BY round_num, block ORDER BY round_num, block"
    )
    assert rows == [
        (round_num, block, count, count)
        for round_num in range(1, num_rounds + 1)
        for block, count in holders.items()
    ]
    versions = server.query(
        "SELECT block, MAX(version) FROM versions WHERE round_num > 0 GROUP BY block"
    )
    assert dict(versions) == {block: num_closed + 1 for block in holders if num_closed}


@contextmanager
def device_process(server: Server, store: Path, point: str) -> Iterator[subprocess.Popen[str]]:
    """The accelerometer's device, in a session of its own; killed at the end if need be."""
    command = [sys.executable, "-m", "tests.integration.device_process", server.url, server.token]
    with subprocess.Popen(
        [*command, str(store), point],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def read_until_here(process: subprocess.Popen[str]) -> list[str]:
    """What it prints before it hangs; all of it, if it ends."""
    assert process.stdout is not None
    lines: list[str] = []
    for line in process.stdout:
        if line == "here\n":
            return lines
        lines.append(line.strip())
    return lines


def test_a_device_killed_at_every_step(watch_artifacts: Path, tmp_path: Path) -> None:
    """What was trained is delivered, not trained again; what was not, is trained."""
    store = tmp_path / "store"

    def kill_at(point: str) -> list[str]:
        with device_process(server, store, point) as process:
            lines = read_until_here(process)
            process.kill()
            assert process.wait() == -signal.SIGKILL
        return lines

    with running_server(watch_artifacts, tmp_path / "server", *ONE_DEVICE) as server:
        assert kill_at("training") == ["round 1"]
        assert left_in(store) == State()
        assert kill_at("Chunk 3") == ["round 1"]  # amid its update
        assert (left_in(store).round_num, len(left_in(store).outbox)) == (1, 2)
        assert server.query("SELECT * FROM updates") == []
        assert kill_at("Report 1") == []  # after the update's receipt
        assert len(left_in(store).outbox) == 2
        assert_one_update_each(server, num_rounds=1, holders={"encoder-acc": 1}, num_closed=0)
        assert kill_at("noted") == []  # after the report's receipt, which ends the round
        asyncio.run(server.until(lambda s: s["shared_blocks"]["encoder-acc"] == 2, "its end"))
        assert len(left_in(store).outbox) == 2
        assert_one_update_each(server, num_rounds=1, holders={"encoder-acc": 1}, num_closed=1)
        with device_process(server, store, "none") as process:
            assert read_until_here(process) == ["round 2"]
            assert process.wait() == 0
        assert server.get("status")["is_finished"]
        assert left_in(store).outbox == ()
        assert_one_update_each(server, num_rounds=2, holders={"encoder-acc": 1}, num_closed=2)


# Ctrl-C reaches every process of a terminal's foreground group at once.


def test_ctrl_c_ends_server_and_broker(watch_artifacts: Path, tmp_path: Path) -> None:
    with running_server(watch_artifacts, tmp_path / "server", *SCHEME) as server:
        group = os.getpgid(server.pid)
        assert group == server.pid
        os.killpg(group, signal.SIGINT)
        assert server.wait() == 0
        assert "the state is kept in" in server.log
        assert "Traceback" not in server.log
        assert not (server.data_dir / "server.json").exists()


def test_sigterm_is_as_good(watch_artifacts: Path, tmp_path: Path) -> None:
    with running_server(watch_artifacts, tmp_path / "server", *SCHEME) as server:
        assert server.stop(signal.SIGTERM) == 0
        assert "Traceback" not in server.log


def test_ctrl_c_ends_a_device(watch_artifacts: Path, tmp_path: Path) -> None:
    """Within a batch; the round is not kept."""
    with (
        running_server(watch_artifacts, tmp_path / "server", *ONE_DEVICE) as server,
        device_process(server, tmp_path / "store", "training") as process,
    ):
        assert read_until_here(process) == ["round 1"]
        os.killpg(process.pid, signal.SIGINT)
        assert process.stdout is not None
        assert process.stdout.read() == "", "it went on to further batches"
        assert process.wait(30) in (-signal.SIGINT, 1, 130)
        wait_for_session(process.pid)
    assert left_in(tmp_path / "store").round_num == 0


def left_in(folder: Path) -> State:
    """What a device has left in its store; that it opens says that nobody holds it."""
    store = DeviceStore(folder)
    try:
        return store.read_state()
    finally:
        store.close()
