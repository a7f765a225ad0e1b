"""A real Mosquitto with dynamic security, as a child process on a free loopback port."""

from __future__ import annotations

import contextlib
import getpass
import random
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.certificates import Issued

ADMIN, PASSWORD = "admin", "an admin's p@ss/word"
_PATH = "/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin:/opt/homebrew/sbin"  # Debian: sbin
_LIBRARIES = [Path("/usr/lib"), Path("/usr/local/lib"), Path("/opt/homebrew/lib")]


def missing_mosquitto() -> str | None:
    """Say why Mosquitto cannot run here; None if it can."""
    for program in ("mosquitto", "mosquitto_ctrl"):
        if _find(program) is None:
            return f"{program} is not on PATH"
    return None if _find_plugin() else "mosquitto_dynamic_security.so is not installed"


@contextmanager
def mosquitto(
    directory: Path, port: int = 0, *, issued: Issued | None = None, client_ca: Path | None = None
) -> Iterator[str]:
    """Run a Mosquitto whose state is in ``directory``; yield its URL with the admin login.

    A second run in the same directory finds the logins that the first one left. It has TLS if a
    certificate is ``issued``, and asks for those of ``client_ca``.
    """
    logins = directory / "dynamic-security.json"
    if not logins.exists():
        init = [str(_find("mosquitto_ctrl")), "dynsec", "init", str(logins), ADMIN, PASSWORD]
        subprocess.run(init, check=True, stdout=subprocess.DEVNULL)
    port = port or free_port()
    config = directory / "mosquitto.conf"
    config.write_text(_config(port, logins) + _tls_config(issued, client_ca))
    with (directory / "mosquitto.log").open("ab") as log:
        command = [str(_find("mosquitto")), "-c", str(config)]
        child = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        _wait_for(port, child, directory / "mosquitto.log")
        scheme = "mqtts" if issued else "mqtt"
        yield f"{scheme}://{ADMIN}:an%20admin%27s%20p%40ss%2Fword@127.0.0.1:{port}"
    finally:
        child.terminate()
        child.wait(30)


def _config(port: int, logins: Path) -> str:
    return f"""\
listener {port} 127.0.0.1
allow_anonymous false
plugin {_find_plugin()}
plugin_opt_config_file {logins}
max_queued_messages 100000
set_tcp_nodelay true
persistence false
user {getpass.getuser()}
"""


def _tls_config(issued: Issued | None, client_ca: Path | None) -> str:
    lines = [f"certfile {issued.certificate}", f"keyfile {issued.key}"] if issued else []
    if client_ca is not None:
        lines += [f"cafile {client_ca}", "require_certificate true"]
    return "\n".join([*lines, ""])


def _find(program: str) -> str | None:
    return shutil.which(program) or shutil.which(program, path=_PATH)


def _find_plugin() -> Path | None:
    name = "mosquitto_dynamic_security.so"
    shallow = (
        path for root in _LIBRARIES for depth in ("", "*/") for path in root.glob(depth + name)
    )
    return next(shallow, None)


def free_port() -> int:
    """One that the kernel gives to nobody: no test takes it while a broker restarts."""
    for port in random.SystemRandom().sample(range(20_000, 32_000), 100):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise RuntimeError("of 100 ports between 20000 and 32000 none is free")


def _wait_for(port: int, child: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(3000):
        if child.poll() is not None:
            raise RuntimeError(f"mosquitto ended with code {child.returncode}: {log.read_text()}")
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            time.sleep(0.01)
    raise RuntimeError(f"mosquitto does not listen on port {port}")
