"""Starts `python -m server` as a process of its own, and stops it whatever happens."""

from __future__ import annotations

import contextlib
import ctypes
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from petalfl.errors import PetalError

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 15.0
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class ServerAddress:
    """Where a server is, and the token that joins it."""

    url: str
    token: str


@contextlib.contextmanager
def running_server(
    artifacts: Path, data_dir: Path, arguments: Sequence[str]
) -> Iterator[ServerAddress]:
    """Runs the server while the context is open; its log goes to ``data_dir/server.log``.

    Raises:
        PetalError: It does not come up; the message is its own last line.
    """
    data_dir.mkdir(parents=True, exist_ok=True)
    runtime_file = data_dir / "server.json"
    runtime_file.unlink(missing_ok=True)
    command = [sys.executable, "-m", "server", "--artifacts", str(artifacts),
               "--data-dir", str(data_dir), "--http", "127.0.0.1:0", *arguments]  # fmt: skip
    with (data_dir / "server.log").open("ab") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=Path(__file__).parents[2],
            start_new_session=True,  # Ctrl-C is for us; we stop the server after its devices
            preexec_fn=die_with_parent,
        )
    try:
        yield _wait_for_address(process, runtime_file, data_dir / "server.log")
    finally:
        _stop(process)


def die_with_parent() -> None:
    """For `subprocess.Popen`'s ``preexec_fn``: the child is ended when its parent dies."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _wait_for_address(
    process: subprocess.Popen[bytes], runtime_file: Path, log: Path
) -> ServerAddress:
    give_up_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < give_up_s:
        if runtime_file.exists():
            runtime = json.loads(runtime_file.read_bytes())
            return ServerAddress(runtime["url"], runtime["token"])
        if process.poll() is not None:
            lines = log.read_text(errors="replace").strip().splitlines() or ["it printed nothing"]
            reason = lines[-1].removeprefix("error: ")
            raise PetalError(f"the server did not start: {reason}")
        time.sleep(0.05)
    raise PetalError(f"the server did not come up in {START_TIMEOUT_S:g} s; see {log}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
