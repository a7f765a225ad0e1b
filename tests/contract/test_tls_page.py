"""The commands of docs/tls.md, and the certificates that they make."""

from __future__ import annotations

import re
import shlex
import shutil
import socket
import subprocess
import threading
from pathlib import Path

import pytest

from petalfl import Tls
from server.tls import ServerTls

PAGE = (Path(__file__).parents[2] / "docs" / "tls.md").read_text()
COMMANDS = [
    line for text in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL) for line in text.splitlines()
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the page's openssl commands were run."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not on PATH")
    for command in COMMANDS:
        if command.startswith("openssl "):
            subprocess.run(shlex.split(command), cwd=tmp_path, check=True, capture_output=True)
    return tmp_path


def test_its_commands_make_a_mutual_handshake(folder: Path) -> None:
    at = ServerTls(folder / "server.crt", folder / "server.key", folder / "ca.crt").context()
    own = Tls(folder / "ca.crt", folder / "device.crt", folder / "device.key").context()
    for name in ("petal.example", "localhost", "127.0.0.1"):
        ours, theirs = socket.socketpair()

        def serve(theirs: socket.socket = theirs) -> None:
            with at.wrap_socket(theirs, server_side=True) as secured:
                secured.sendall(b"hello")

        thread = threading.Thread(target=serve)
        thread.start()
        with own.wrap_socket(ours, server_hostname=name) as secured:
            assert secured.recv(5) == b"hello"
        thread.join()


def test_they_satisfy_a_strict_reader(folder: Path) -> None:
    """As Python's own default context is from 3.13 on."""
    for name in ("server.crt", "device.crt"):
        command = ["openssl", "verify", "-x509_strict", "-CAfile", "ca.crt", name]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
