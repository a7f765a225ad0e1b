"""`python -m server revoke` with real processes: the device is out at once and stays out."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path

import pytest

from petalfl import EdgeClient, EnrollError, PetalError
from server import __main__ as cli
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
