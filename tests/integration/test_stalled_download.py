"""A server that is told to stop while somebody downloads and does not read."""

from __future__ import annotations

import signal
import socket
from pathlib import Path
from urllib.parse import urlsplit

from tests.integration.harness import running_server
from tests.server.builders import LAYOUT, write_artifacts

NUM_VALUES = 8 << 20  # far more bytes than sockets hold


def test_it_stops_all_the_same(tmp_path: Path) -> None:
    """The download goes on with `Range` when the server is back."""
    shapes = {"weight": (NUM_VALUES,)}
    layout = {**LAYOUT, "encoder-acc": ("encoder", ("acc",), shapes)}
    write_artifacts(tmp_path / "artifacts", layout)
    with running_server(tmp_path / "artifacts", tmp_path / "server") as server:
        address = urlsplit(server.url)
        assert address.hostname is not None and address.port is not None
        with socket.create_connection((address.hostname, address.port)) as connection:
            connection.sendall(
                f"GET /v1/default/blocks/encoder-acc/1 HTTP/1.1\r\nHost: x\r\n"
                f"Authorization: Bearer {server.token}\r\n\r\n".encode()
            )
            assert connection.recv(12) == b"HTTP/1.1 200"
            assert server.stop(signal.SIGTERM) == 0
            assert "Traceback" not in server.log
