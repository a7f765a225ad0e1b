"""`python -m server revoke` with real processes: the device is out at once and stays out."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from pathlib import Path

import pytest

from petalfl import EdgeClient, EnrollError, PetalError
from petalfl.errors import TransportError
from petalfl.mqtt import Endpoint, MqttTransport
from petalfl.store import DeviceStore
from server import __main__ as cli
from server.state import ServerState
from tests.integration.harness import running_server
from tests.mosquitto import missing_mosquitto, mosquitto
from tests.petalfl.clients import Make, is_ready, until
from tests.petalfl.conftest import make

__all__ = ["make"]  # a fixture
MISSING = missing_mosquitto()
MOSQUITTO = pytest.param(
    "mosquitto",
    marks=[pytest.mark.mosquitto, pytest.mark.skipif(MISSING is not None, reason=str(MISSING))],
)


def run(client: EdgeClient, errors: list[PetalError]) -> None:
    try:
        client.run()
    except PetalError as error:
        errors.append(error)


@pytest.mark.parametrize("broker", ["embedded", MOSQUITTO])
def test_a_revoked_device_is_out(
    small_artifacts: Path, tmp_path: Path, make: Make, broker: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Amid a connection, over a restart of the server, and after one of its own."""
    (tmp_path / "broker").mkdir()
    data_dir = tmp_path / "server"
    with contextlib.ExitStack() as stack:
        url = stack.enter_context(mosquitto(tmp_path / "broker")) if broker != "embedded" else ""
        arguments = ("--min-devices", "3", *(["--broker", url] if url else []))
        with running_server(small_artifacts, data_dir, *arguments) as server:
            errors: list[PetalError] = []
            client = make(server, "lost", on_error=errors.append)
            thread = threading.Thread(target=run, args=(client, errors))
            thread.start()
            until(lambda: is_ready(server, "lost"), "the device", 30)
            assert cli.main(["revoke", "lost", "--data-dir", str(data_dir)]) == 0
            assert "lost is revoked" in capsys.readouterr().out
            assert "lost" not in server.get("devices")
            until(lambda: bool(errors), "the device hears of it", 30)
            assert "refuses the login" in str(errors[0])
            client.stop()
            thread.join(30)
            assert not thread.is_alive()
            client.close()
            server.stop()
            server.start()
            with pytest.raises(EnrollError, match="its credential was revoked"):
                make(server, "lost", url=server.url).run()


@pytest.mark.parametrize("broker", ["embedded", MOSQUITTO])
def test_a_login_that_outlived_a_crash_ends_at_the_next_start(
    small_artifacts: Path, tmp_path: Path, make: Make, broker: str
) -> None:
    """The server notes that a device is cut off, and dies before the broker hears of it."""
    (tmp_path / "broker").mkdir()
    data_dir = tmp_path / "server"
    with contextlib.ExitStack() as stack:
        url = stack.enter_context(mosquitto(tmp_path / "broker")) if broker != "embedded" else ""
        arguments = ("--broker", url) if url else ()
        server = stack.enter_context(running_server(small_artifacts, data_dir, *arguments))
        for name in ("flooder", "other"):
            client = make(server, name)
            session = client._enter()
            client.close()
        endpoint = Endpoint(session.mqtt_host, session.mqtt_port)
        assert may_connect(endpoint, tmp_path / "flooder")
        server.stop()
        state = ServerState(data_dir)
        state.cut_off("flooder")
        state.close()
        server.start()
        until(lambda: not may_connect(endpoint, tmp_path / "flooder"), "the login's end", 30)
        assert may_connect(endpoint, tmp_path / "other")


def may_connect(endpoint: Endpoint, folder: Path) -> bool:
    """Whether the broker takes the login that a device's store has."""
    store = DeviceStore(folder)
    identity = store.read_identity()
    store.close()
    assert identity is not None
    name, login = identity.device, (identity.device, identity.password)

    async def connect() -> bool:
        transport = MqttTransport(endpoint, login=login, client_id=name)
        try:
            await transport.connect()
        except TransportError as error:
            assert "refuses the login" in str(error), error
            return False
        await transport.close()
        return True

    return asyncio.run(connect())
