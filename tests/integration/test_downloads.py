"""Downloads that are cut in the middle, by real processes that die and servers that go away."""

from __future__ import annotations

import asyncio
import re
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from petalfl import EdgeClient, PetalError
from petalfl.http import HttpClient
from petalfl.partials import Partial
from petalfl.wire import MAX_FETCH_BYTES
from tests.integration.harness import (
    ROOT,
    SCHEME,
    Device,
    Outcome,
    Server,
    read_outcome,
    running_server,
    take_part,
    three_devices,
)
from tests.integration.lossy import lossy_proxy
from tests.integration.test_faults import device_process, read_until_here
from tests.mosquitto import missing_mosquitto, mosquitto

MISSING = missing_mosquitto()
BLOCK_BYTES = 603_904  # of encoder-acc
ALONE = (*SCHEME, "--min-devices", "1", "--epochs", "1", "--rounds", "1")


def bytes_down(server: Server) -> int:
    """Of encoder-acc, to the accelerometer's device, once nothing more is under way."""
    found, num_alike = -1, 0
    while num_alike < 10:
        blocks = server.get("devices")["acc-only"]["blocks"]
        now = blocks.get("encoder-acc", {"bytes_down": 0})["bytes_down"]
        found, num_alike = now, num_alike + 1 if now == found else 0
        time.sleep(0.02)
    return found


def killed_amid_a_download(server: Server, through: Server, store: Path) -> tuple[int, int]:
    """A device that is killed amid the first version of a block, and started again.

    Args:
        through: As the device reaches the server.

    Returns:
        The bytes on its disk when it was killed, and those that the server sent from then on.
    """
    with device_process(through, store, "block 300000") as process:
        assert read_until_here(process) == []
        process.kill()
        assert process.wait() == -signal.SIGKILL
    [partial] = (store / "downloads" / "blocks").iterdir()
    before, size = bytes_down(server), partial.stat().st_size
    assert 300_000 <= size < BLOCK_BYTES
    with device_process(through, store, "none") as process:
        assert read_until_here(process) == ["round 1"]
        assert process.wait() == 0
    assert before + BLOCK_BYTES - size < 2 * BLOCK_BYTES
    assert server.get("status")["is_finished"]
    return size, bytes_down(server) - before


def test_a_device_that_is_killed_amid_a_download_goes_on_there(
    watch_artifacts: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    with running_server(watch_artifacts, tmp_path / "server", *ALONE) as server:
        came, rest = killed_amid_a_download(server, server, store)
        # The rest of the first version, and the second.
        assert rest == BLOCK_BYTES - came + BLOCK_BYTES
    assert not any(path.is_file() for path in (store / "downloads").rglob("*"))


def test_an_http_server_that_goes_away_amid_a_download(
    watch_artifacts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("petalfl.participation.BACKOFF_S", (0.05, 0.1))
    write = Partial.write
    sizes: list[int] = []
    errors: list[str] = []
    with (
        running_server(watch_artifacts, tmp_path / "server", *ALONE) as server,
        lossy_proxy(int(server.url.rpartition(":")[2])) as http,
    ):

        def write_until(self: Partial, offset: int, data: bytes) -> None:
            write(self, offset, data)
            if "blocks" in self.path.parts and self.num_bytes >= 200_000 and not sizes:
                sizes.append(self.num_bytes)
                http.vanish()

        def come_back(error: PetalError) -> None:
            errors.append(str(error))
            if len(errors) == 3:
                http.start()

        monkeypatch.setattr(Partial, "write", write_until)
        device = three_devices()[0]
        more: dict[str, Any] = {"on_error": come_back}
        through = Server(watch_artifacts, server.data_dir, ())
        through.url, through.token = f"http://127.0.0.1:{http.port}", server.token
        with device.client(through, tmp_path, **more) as client:
            asyncio.run(client.arun())
        assert len(errors) == 3 and "no blocks yet" in errors[0]
        assert server.get("status")["is_finished"]
        # What lay in the proxy and the sockets when it went is lost; all else came once.
        assert bytes_down(server) <= BLOCK_BYTES + (BLOCK_BYTES - sizes[0]) + BLOCK_BYTES


# MQTT alone


def enroll(server: Server, device: Device, out: Path) -> str:
    """As an operator does it on the server's machine; the URL that the app is to use."""
    command = [
        sys.executable, "-m", "server", "enroll", device.name,
        "--modalities", ",".join(device.data),
        "--data-dir", str(server.data_dir), "--out", str(out),
    ]  # fmt: skip
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert said.returncode == 0, said.stderr
    assert f"{device.name} is enrolled in 'default'" in said.stdout
    found = re.search(rf"EdgeClient\('(mqtt://127.0.0.1:\d+)', identity='{out}', …\)", said.stdout)
    assert found is not None, said.stdout
    return found[1]


def run_without_http(artifacts: Path, folder: Path, broker: str) -> Outcome:
    """As `run_federation`; no device speaks HTTP, or could."""
    arguments = ("--rounds", "3", "--broker", broker, *SCHEME)
    with running_server(artifacts, folder / "server", *arguments) as server, ExitStack() as stack:
        clients = []
        for device in three_devices():
            identity = folder / f"{device.name}.json"
            url = enroll(server, device, identity)
            client = EdgeClient(
                url, identity=identity, data=device.data, labels=device.labels,
                store=folder / device.name,
            )  # fmt: skip
            clients.append(stack.enter_context(client))
        asyncio.run(take_part(clients))
        stack.close()
        assert "Traceback" not in server.log
        return read_outcome(artifacts, server, folder)


def test_a_device_without_http_that_is_killed_amid_a_download_goes_on_there(
    watch_artifacts: Path, tmp_path: Path
) -> None:
    store, identity = tmp_path / "store", tmp_path / "identity.json"
    with running_server(watch_artifacts, tmp_path / "server", *ALONE) as server:
        through = Server(watch_artifacts, server.data_dir, ())
        through.url = enroll(server, three_devices()[0], identity)
        through.token = str(identity)
        came, rest = killed_amid_a_download(server, through, store)
        # The rest of the first version, and the second; what was sent twice, one window at most.
        assert rest <= 2 * BLOCK_BYTES - came + MAX_FETCH_BYTES // 4


BROKERS = ["embedded", pytest.param("mosquitto", marks=pytest.mark.mosquitto)]


@pytest.mark.parametrize("broker", BROKERS)
def test_a_federation_without_http_ends_with_the_same_blocks(
    watch_artifacts: Path,
    tmp_path: Path,
    undisturbed: Outcome,
    broker: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_http(self: object, *arguments: object) -> None:
        raise AssertionError("HTTP")

    monkeypatch.setattr(HttpClient, "_open", no_http)
    if broker == "embedded":
        outcome = run_without_http(watch_artifacts, tmp_path, "embedded")
    elif MISSING is not None:
        pytest.skip(MISSING)
    else:
        (tmp_path / "broker").mkdir()
        with mosquitto(tmp_path / "broker") as url:
            outcome = run_without_http(watch_artifacts, tmp_path, url)
    outcome.assert_close(undisturbed)
