"""The real server as a process of its own, and devices that take part in its federation."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray
from safetensors.numpy import load_file

from examples.android_sim.data import devices
from petalfl import EdgeClient
from petalfl.model import ModelManifest
from petalfl.store import DeviceStore
from petalfl.tls import Tls
from petalfl.vectors import Vector, from_bytes
from tests.mosquitto import free_port

ROOT = Path(__file__).parents[2]
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 60.0
RUN_TIMEOUT_S = 120.0
WAIT_TIMEOUT_S = 60.0


class Server:
    """`python -m server` on one data folder; may be stopped and started again."""

    def __init__(self, artifacts: Path, data_dir: Path, arguments: Sequence[str]) -> None:
        self.data_dir = data_dir
        self.url = f"http://127.0.0.1:{free_port()}"  # it stays free while it restarts
        self.token = ""
        self.tls: Tls | None = None  # of whoever asks it
        self._artifacts = artifacts
        self._arguments = arguments
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def log(self) -> str:
        return (self.data_dir / "server.log").read_text(errors="replace")

    def start(self) -> None:
        """Starts it, where it was if it has run before, and waits until it serves."""
        self.data_dir.mkdir(parents=True, exist_ok=True)
        runtime_file = self.data_dir / "server.json"
        runtime_file.unlink(missing_ok=True)  # kill -9 leaves it
        command = [
            sys.executable, "-m", "server", "--artifacts", str(self._artifacts),
            "--data-dir", str(self.data_dir), "--http", self.url.partition("://")[2],
            "--reducer", "numpy",  # numba takes seconds to load, and some tests start 50 servers
            *self._arguments,
        ]  # fmt: skip
        with (self.data_dir / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=ROOT,
                start_new_session=True,
            )
        give_up_s = time.monotonic() + START_TIMEOUT_S
        while not runtime_file.exists():
            assert self._process.poll() is None, f"the server did not start: {self.log}"
            assert time.monotonic() < give_up_s, f"the server does not come up: {self.log}"
            time.sleep(0.02)
        runtime = json.loads(runtime_file.read_bytes())
        assert runtime["pid"] == self.pid
        self.url, self.token = runtime["url"], runtime["token"]

    def stop(self, sign: signal.Signals = signal.SIGINT) -> int:
        """Sends a signal, unless it has ended, and waits as `wait`; the exit code."""
        assert self._process is not None
        self._process.send_signal(sign)
        return self.wait()

    def wait(self) -> int:
        """Waits for its end and its children's; the exit code."""
        process = self._process
        assert process is not None
        try:
            code = process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise
        wait_for_session(process.pid)
        return code

    def get(self, what: str, authorization: str = "", federation: str = "default") -> Any:
        """The JSON at ``/v1/{federation}/{what}``, as the operator sees it or another."""
        headers = {"Authorization": authorization or f"Bearer {self.token}"}
        request = urllib.request.Request(f"{self.url}/v1/{federation}/{what}", headers=headers)
        context = self.tls.context() if self.tls else None
        with urllib.request.urlopen(request, timeout=30, context=context) as response:
            return json.load(response)

    async def until(self, is_so: Any, what: str) -> None:
        """Waits until ``is_so(status)`` holds."""
        give_up_s = time.monotonic() + WAIT_TIMEOUT_S
        while not is_so(status := await asyncio.to_thread(self.get, "status")):
            assert time.monotonic() < give_up_s, f"waited for {what}: {status}"
            await asyncio.sleep(0.02)

    def query(self, sql: str, *values: object) -> list[Any]:
        """Reads the server's database, also while it runs."""
        path = self.data_dir / "state.sqlite"
        with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
            return db.execute(sql, values).fetchall()

    def block(self, name: str, version: int) -> Vector:
        """A block's version as the server's file has it."""
        block = ModelManifest.load(self._artifacts).block(name)
        tensors = load_file(self.data_dir / "blocks" / name / f"{version}.safetensors")
        return np.concatenate([tensors[p.name].ravel() for p in block.tensors])


def assert_counted_once(server: Server, num_rounds: int, num_devices: int) -> None:
    """Of so many devices with an accelerometer, in every round of a federation that is over."""
    for what in ("updates", "reports"):
        rows = server.query(
            f"SELECT round_num, COUNT(*), COUNT(DISTINCT device) FROM {what} GROUP BY 1"
        )
        assert rows == [(n, num_devices, num_devices) for n in range(1, num_rounds + 1)]
    assert server.get("status")["is_finished"]
    assert server.get("status")["shared_blocks"]["encoder-acc"] == num_rounds + 1
    assert "Traceback" not in server.log


@contextlib.contextmanager
def running_server(
    artifacts: Path, data_dir: Path, *arguments: str, tls: Tls | None = None
) -> Iterator[Server]:
    """Runs a server; stops it by SIGINT at the end."""
    server = Server(artifacts, data_dir, arguments)
    server.tls = tls
    try:
        server.start()
        yield server
    finally:
        if server._process is not None:
            server.stop()


def wait_for_session(leader: int, timeout_s: float = 30) -> None:
    """Waits until no process is left of those that a session's leader has started."""
    give_up_s = time.monotonic() + timeout_s
    while left := [pid for pid in psutil.pids() if _is_of_session(pid, leader)]:
        assert time.monotonic() < give_up_s, f"processes {left} outlive {leader}"
        time.sleep(0.02)


def _is_of_session(pid: int, leader: int) -> bool:
    try:
        return os.getsid(pid) == leader and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except (ProcessLookupError, psutil.NoSuchProcess):
        return False


@dataclass(frozen=True, slots=True)
class Device:
    """A device's name and the recordings it trains on, by modality."""

    name: str
    data: dict[str, NDArray[np.float32]]
    labels: NDArray[np.int64]

    def client(self, server: Server, folder: Path, **more: Any) -> EdgeClient:
        """This device, its store below ``folder``."""
        arguments: dict[str, Any] = {
            "token": server.token,
            "data": self.data,
            "labels": self.labels,
        }
        store = folder / self.name
        arguments |= {"tls": server.tls, **more}
        return EdgeClient(server.url, store=store, device=self.name, **arguments)

    def private_blocks(self, artifacts: Path, folder: Path) -> dict[str, Vector]:
        """What its store holds for itself."""
        manifest = ModelManifest.load(artifacts)
        store = DeviceStore(folder / self.name)
        try:
            private = store.read_state().private
        finally:
            store.close()
        return {name: from_bytes(data, manifest.block(name).size) for name, data in private.items()}


def three_devices() -> list[Device]:
    """One with an accelerometer, one with a gyroscope, one with both; 21 to 42 windows each."""
    chosen = (("acc-only", ("acc",), 10), ("gyro-only", ("gyro",), 6), ("both", ("acc", "gyro"), 5))
    made = []
    for (name, modalities, step), recorded in zip(chosen, devices(3), strict=True):
        windows = recorded.train.take(np.arange(0, len(recorded.train), step))
        made.append(Device(name, {m: windows.inputs[m] for m in modalities}, windows.labels))
    return made


async def take_part(clients: Sequence[EdgeClient]) -> None:
    """Runs them together until all have finished; the first failure ends it."""
    runs = [asyncio.create_task(client.arun()) for client in clients]
    try:
        await asyncio.wait_for(asyncio.gather(*runs), RUN_TIMEOUT_S)
    finally:
        for client in clients:
            client.stop()
        await asyncio.wait(runs, timeout=30)


SCHEME = (
    "--scheme", "phf", "--min-devices", "3", "--seed", "7", "--log-level", "warning",
    "--batch-size", "4", "--epochs", "3", "--learning-rate", "0.05", "--schedule", "constant",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Outcome:
    """The models at the end of a federation."""

    shared: dict[str, Vector]
    private: dict[tuple[str, str], Vector]  # by device and block

    def largest_difference(self, other: Outcome) -> float:
        """Over all parameters, absolute."""
        assert self.shared.keys() == other.shared.keys()
        assert self.private.keys() == other.private.keys()
        pairs = [(self.shared[k], other.shared[k]) for k in self.shared]
        pairs += [(self.private[k], other.private[k]) for k in self.private]
        return max(float(np.abs(a - b).max()) for a, b in pairs)

    def assert_close(self, other: Outcome) -> None:
        """Equal but for float rounding."""
        assert self.shared.keys() == other.shared.keys()
        assert self.private.keys() == other.private.keys()
        for name, vector in self.shared.items():
            np.testing.assert_allclose(vector, other.shared[name], rtol=1e-5, atol=1e-7)
        for key, vector in self.private.items():
            np.testing.assert_allclose(vector, other.private[key], rtol=1e-5, atol=1e-7)


def read_outcome(artifacts: Path, server: Server, stores: Path) -> Outcome:
    """What server and (closed) devices hold."""
    versions = server.query("SELECT block, MAX(version) FROM versions GROUP BY block")
    private = {
        (device.name, block): vector
        for device in three_devices()
        for block, vector in device.private_blocks(artifacts, stores).items()
    }
    return Outcome({name: server.block(name, version) for name, version in versions}, private)


def run_federation(
    artifacts: Path, folder: Path, *flags: str, num_rounds: int, tls: Tls | None = None
) -> Outcome:
    """Three devices from the first round to the last, nothing in their way."""
    arguments = ("--rounds", str(num_rounds), *flags, *SCHEME)
    serving = running_server(artifacts, folder / "server", *arguments, tls=tls)
    with serving as server, ExitStack() as stack:
        clients = [device.client(server, folder) for device in three_devices()]
        for client in clients:
            stack.enter_context(client)
        asyncio.run(take_part(clients))
        stack.close()
        return read_outcome(artifacts, server, folder)
