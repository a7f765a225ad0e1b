"""Downloads that are cut in the middle, by real processes that die and servers that go away."""

from __future__ import annotations

import asyncio
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from petalfl import PetalError
from petalfl.partials import Partial
from tests.integration.harness import SCHEME, Server, running_server, three_devices
from tests.integration.lossy import lossy_proxy
from tests.integration.test_faults import device_process, read_until_here

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


def test_a_device_that_is_killed_amid_a_download_goes_on_there(
    watch_artifacts: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    with running_server(watch_artifacts, tmp_path / "server", *ALONE) as server:
        with device_process(server, store, "block 300000") as process:
            assert read_until_here(process) == []
            process.kill()
            assert process.wait() == -signal.SIGKILL
        [partial] = (store / "downloads" / "blocks").iterdir()
        before, size = bytes_down(server), partial.stat().st_size
        assert 300_000 <= size < BLOCK_BYTES
        with device_process(server, store, "none") as process:
            assert read_until_here(process) == ["round 1"]
            assert process.wait() == 0
        # The rest of the first version, and the second.
        assert bytes_down(server) - before == BLOCK_BYTES - size + BLOCK_BYTES
        assert before + BLOCK_BYTES - size < 2 * BLOCK_BYTES
        assert server.get("status")["is_finished"]
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
