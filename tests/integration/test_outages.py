"""Broker, HTTP server or network that fail amid a federation of real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.integration.faulty_device import faulty_device, read_to_the_end, read_until
from tests.integration.harness import SCHEME, Server, assert_counted_once, running_server
from tests.integration.lossy import LossyProxy, lossy_proxy
from tests.mosquitto import free_port, missing_mosquitto, mosquitto

MISSING = missing_mosquitto()
ALONE = (*SCHEME, "--min-devices", "1", "--epochs", "1")


def port_of(url: str) -> int:
    return int(url.rpartition(":")[2])


def mqtt_port(server: Server) -> int:
    return int(server.query("SELECT value FROM settings WHERE key = 'broker port'")[0][0])


# The broker, amid an upload


def kill_embedded(server: Server) -> None:
    children = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text()
    [broker] = map(int, children.split())
    os.kill(broker, signal.SIGKILL)


@pytest.mark.parametrize("is_before", ["Chunk 3", "Report 1"])
def test_the_embedded_broker_is_killed_amid_an_upload(
    watch_artifacts: Path, tmp_path: Path, is_before: str
) -> None:
    arguments = (*ALONE, "--rounds", "2")
    with (
        running_server(watch_artifacts, tmp_path / "server", *arguments) as server,
        faulty_device(
            server.url, server.token, tmp_path / "store",
            hold_at=is_before, until=str(tmp_path / "go on"),
        ) as process,
    ):  # fmt: skip
        read_until(process, "wait")
        kill_embedded(server)
        (tmp_path / "go on").touch()
        read_to_the_end(process)
        assert "the embedded broker ended with code -9: starting it again" in server.log
        assert_counted_once(server, num_rounds=2, num_devices=1)


@pytest.mark.mosquitto
@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
@pytest.mark.parametrize(
    ("is_before", "comes_back"), [("Chunk 3", "at once"), ("Fin 2", "when it was missed")]
)
def test_mosquitto_restarts_amid_an_upload(
    watch_artifacts: Path, tmp_path: Path, is_before: str, comes_back: str
) -> None:
    """It has forgotten what it acknowledged: some chunks, or all, and a word is said meanwhile."""
    (tmp_path / "broker").mkdir()
    port = free_port()
    with ExitStack() as broker, ExitStack() as stack:
        url = broker.enter_context(mosquitto(tmp_path / "broker", port))
        arguments = (*ALONE, "--rounds", "2", "--broker", url)
        server = stack.enter_context(
            running_server(watch_artifacts, tmp_path / "server", *arguments)
        )
        process = stack.enter_context(
            faulty_device(
                server.url, server.token, tmp_path / "store",
                hold_at=is_before, until=str(tmp_path / "go on"),
            )
        )  # fmt: skip
        read_until(process, "wait")
        broker.close()
        if comes_back == "at once":
            broker.enter_context(mosquitto(tmp_path / "broker", port))
        (tmp_path / "go on").touch()
        if comes_back != "at once":
            read_until(process, "upload")
            broker.enter_context(mosquitto(tmp_path / "broker", port))
        read_to_the_end(process)
        assert_counted_once(server, num_rounds=2, num_devices=1)


# The HTTP server, while the broker is there


@contextmanager
def gone_after_round_1(
    artifacts: Path, folder: Path, **options: Any
) -> Iterator[tuple[Server, LossyProxy, subprocess.Popen[str]]]:
    """A federation of one device and two rounds, whose HTTP server vanishes behind its proxy."""
    with ExitStack() as stack:
        server = stack.enter_context(
            running_server(artifacts, folder / "server", *ALONE, "--rounds", "2")
        )
        http = stack.enter_context(lossy_proxy(port_of(server.url)))
        url, gone = f"http://127.0.0.1:{http.port}", folder / "gone"
        options |= {"hold_at": "round 1", "until": str(gone)}
        device = faulty_device(url, server.token, folder / "store", **options)
        process = stack.enter_context(device)
        read_until(process, "wait")
        http.vanish()
        gone.touch()
        yield server, http, process


def test_the_http_server_is_gone_when_a_round_begins(watch_artifacts: Path, tmp_path: Path) -> None:
    """The device tries again, however long it takes; here it is seconds."""
    with gone_after_round_1(watch_artifacts, tmp_path) as (server, http, process):
        for _ in range(5):
            read_until(process, "error TransportError: no blocks yet")
        http.start()
        assert "round 2" in read_to_the_end(process)
        assert_counted_once(server, num_rounds=2, num_devices=1)


def test_the_http_server_is_gone_for_a_minute(watch_artifacts: Path, tmp_path: Path) -> None:
    """A real one, with the back-off that an app has; MQTT stays."""
    with gone_after_round_1(watch_artifacts, tmp_path, is_quick=False) as (server, http, process):
        gone_s = time.monotonic()
        read_until(process, "error TransportError: no blocks yet")
        while time.monotonic() < gone_s + 60:
            assert server.get("devices")["acc-only"]["is_ready"]
            time.sleep(5)
        http.start()
        said = read_to_the_end(process)
        assert "round 2" in said
        errors = [line for line in said if line.startswith("error")]
        assert all("no blocks yet" in error for error in errors)
        assert 1 <= len(errors) <= 9, "0.5 s, twice that and so on, each up to half shorter"
        assert_counted_once(server, num_rounds=2, num_devices=1)


def test_the_http_server_is_gone_at_the_start(watch_artifacts: Path, tmp_path: Path) -> None:
    """A new device says so and ends, and enrolls next time; one that has enrolled waits for it."""
    arguments = (*ALONE, "--rounds", "2")
    with ExitStack() as stack:
        server = stack.enter_context(
            running_server(watch_artifacts, tmp_path / "server", *arguments)
        )
        http = stack.enter_context(lossy_proxy(port_of(server.url)))
        device = (f"http://127.0.0.1:{http.port}", server.token, tmp_path / "store")
        http.vanish()
        with faulty_device(*device) as process:
            read_until(process, "error TransportError: no petalfl server answers")
            assert process.wait() == 1
        http.start()
        with faulty_device(*device) as process:
            read_until(process, "round 1")
        http.vanish()
        with faulty_device(*device) as process:
            for _ in range(5):
                read_until(process, "error TransportError: no part in the federation yet")
            http.start()
            read_to_the_end(process)
        assert_counted_once(server, num_rounds=2, num_devices=1)


# A network at 2 % loss and 300 ms


def test_a_lossy_network(watch_artifacts: Path, tmp_path: Path) -> None:
    """HTTP and MQTT of two devices, with a reset every 600 kB of MQTT or so."""
    bad = {"delay_s": 0.15, "loss": 0.02, "stall_s": 0.3}
    arguments = (*SCHEME, "--min-devices", "2", "--epochs", "1", "--rounds", "2")
    with ExitStack() as stack:
        server = stack.enter_context(
            running_server(watch_artifacts, tmp_path / "server", *arguments)
        )
        http = stack.enter_context(
            lossy_proxy(port_of(server.url), 1, **bad, reset_every_bytes=4_000_000)
        )
        mqtt = stack.enter_context(
            lossy_proxy(mqtt_port(server), 2, **bad, reset_every_bytes=600_000)
        )
        devices = [
            stack.enter_context(
                faulty_device(
                    f"http://127.0.0.1:{http.port}", server.token, tmp_path / name,
                    device=name, mqtt_port=mqtt.port, receipt_timeout_s=5,
                )
            )
            for name in ("one", "two")
        ]  # fmt: skip
        for process in devices:
            read_to_the_end(process)
        assert_counted_once(server, num_rounds=2, num_devices=2)
    print({p.port: (p.num_connections, p.num_stalls, p.num_resets) for p in (http, mqtt)})
    assert http.num_stalls and mqtt.num_stalls
    assert mqtt.num_resets
