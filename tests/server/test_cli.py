from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from petalfl.training import Hyperparameters
from server import __main__ as cli
from server import service
from server.config import Config, ConfigError
from server.settings import Effective
from tests.server.builders import SIZES, write_artifacts

ROOT = Path(__file__).parents[2]
START_S = 60.0
ENVIRONMENT = {key: value for key, value in os.environ.items() if not key.startswith("PETALFL_")}


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "artifacts"
    write_artifacts(folder)
    return folder


def arguments(artifacts: Path, data_dir: Path, *more: str) -> list[str]:
    places = ["--artifacts", str(artifacts), "--data-dir", str(data_dir)]
    return [*places, "--http", "127.0.0.1:0", *more]


def run(*words: str) -> subprocess.CompletedProcess[str]:
    """`python -m server`, to its end."""
    command = [sys.executable, "-m", "server", *words]
    return subprocess.run(
        command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=60
    )


def assert_refused(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    """Exit code 2 and one line on stderr that says what is wrong."""
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ")
    for part in parts:
        assert part in line


@dataclass
class Server:
    """A running `python -m server`."""

    process: subprocess.Popen[str]
    data_dir: Path

    @property
    def runtime(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.data_dir / "server.json").read_text())
        return found

    def status(self, path: str) -> int:
        with urllib.request.urlopen(self.runtime["url"] + path, timeout=30) as response:
            return int(response.status)

    def children(self) -> list[int]:
        pid = self.process.pid
        return [
            int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        ]

    def stop(self, sign: signal.Signals) -> tuple[int, str, str]:
        self.process.send_signal(sign)
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, out, err


@contextmanager
def serve(*words: str) -> Iterator[Server]:
    """A server that has started; ended for certain when the block is left."""
    data_dir = Path(words[words.index("--data-dir") + 1])
    (data_dir / "server.json").unlink(missing_ok=True)
    process = subprocess.Popen(
        [sys.executable, "-m", "server", *words],
        cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    server = Server(process, data_dir)
    try:
        wait_until((data_dir / "server.json").exists, process)
        yield server
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()
        for stream in (process.stdout, process.stderr):
            assert stream is not None
            stream.close()


def wait_until(is_so: Callable[[], bool], process: subprocess.Popen[str] | None = None) -> None:
    deadline_s = time.monotonic() + START_S
    while not is_so():
        if process is not None and process.poll() is not None:
            raise AssertionError(f"the server ended with {process.returncode}")
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def is_gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


# Refusals


def test_help_names_every_option() -> None:
    done = run("--help")
    assert (done.returncode, done.stderr) == (0, "")
    for option in ("--artifacts", "--data-dir", "--http", "--broker", "--scheme", "--rounds",
                   "--min-devices", "--deadline", "--token", "--federation", "--optimizer",
                   "--nesterov", "--beta1", "--beta2", "--epsilon", "--max-grad-norm",
                   "--accumulation", "--proximal-mu", "--finish-epochs",
                   "--finish-rate"):  # fmt: skip
        assert option in done.stdout


def test_without_artifacts_it_says_how_to_make_them(tmp_path: Path) -> None:
    missing = tmp_path / "none"
    done = run(*arguments(missing, tmp_path / "data"))
    assert_refused(done, f"no artifacts at {missing}", "python -m export ", f"--out {missing}")
    assert not (tmp_path / "data").exists()


def test_a_broker_that_nobody_runs_is_named(artifacts: Path, tmp_path: Path) -> None:
    broker = ("--broker", "mqtt://x:y-secret@127.0.0.1:1")
    done = run(*arguments(artifacts, tmp_path, *broker, "--log-level", "error"))
    assert_refused(done, "cannot reach the MQTT broker at 127.0.0.1:1")
    assert "y-secret" not in done.stderr
    assert not (tmp_path / "server.json").exists()


def test_an_http_port_in_use_is_named_and_no_broker_is_left(
    artifacts: Path, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        words = arguments(artifacts, tmp_path, "--http", address, "--log-level", "error")
        assert_refused(run(*words), f"cannot listen on {address}", "--http")
    assert not (tmp_path / "server.json").exists()
    assert not servers_on(tmp_path)


def servers_on(folder: Path) -> list[int]:
    """Processes that have a file of this folder open."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                files = [os.readlink(link) for link in (entry / "fd").iterdir()]  # noqa: PTH115
            except OSError:
                continue
            if any(file.startswith(str(folder)) for file in files):
                found.append(int(entry.name))
    return found


# A life


def test_a_server_from_start_to_interrupt_and_again(artifacts: Path, tmp_path: Path) -> None:
    words = arguments(artifacts, tmp_path, "--rounds", "3", "--scheme", "ph")
    with serve(*words) as server:
        runtime, children = server.runtime, server.children()
        assert runtime["pid"] == server.process.pid
        assert (tmp_path / "server.json").stat().st_mode & 0o777 == 0o600
        assert server.status("/healthz") == 200
        assert len(children) == 1, "the broker"
        second = run(*words)
        assert_refused(second, f"another server is running on the data folder {tmp_path}")
        assert server.status("/healthz") == 200
        code, out, err = server.stop(signal.SIGINT)
    assert code == 0, err
    assert "Traceback" not in err
    wait_until(lambda: all(map(is_gone, children)))
    assert not (tmp_path / "server.json").exists() and not servers_on(tmp_path)
    for shown in (runtime["url"], runtime["token"], "model 'tiny'", "3 rounds", "head"):
        assert shown in out
    assert out.splitlines()[-1].startswith(f"stopped; the state is kept in {tmp_path}")

    with serve(*words) as server:  # devices find the broker and use their token as before
        assert server.runtime["token"] == runtime["token"]
        code, again, err = server.stop(signal.SIGTERM)
    assert (code, "Traceback" in err) == (0, False)
    [broker] = [line for line in out.splitlines() if line.startswith("  broker")]
    assert broker in again.splitlines()


def test_a_killed_server_leaves_no_broker_and_starts_again(artifacts: Path, tmp_path: Path) -> None:
    words = arguments(artifacts, tmp_path, "--token", "a-token-of-mine")
    with serve(*words) as server:
        children = server.children()
        server.process.kill()
        server.process.wait()
    wait_until(lambda: all(map(is_gone, children)))
    with serve(*words) as server:
        assert server.runtime["token"] == "a-token-of-mine"
        assert server.status("/healthz") == 200
        assert server.stop(signal.SIGINT)[0] == 0


# From words to a configuration, without a process


@pytest.fixture
def configured(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """The configurations that `main` would have served."""
    served: list[Config] = []

    async def serve_not(
        effective: Effective, models: dict[str, service.Model], again: Callable[[], Effective]
    ) -> None:
        served.extend(model.config for model in models.values())

    monkeypatch.setattr(cli, "serve", serve_not)
    return served


def test_the_defaults(artifacts: Path, tmp_path: Path, configured: list[Config]) -> None:
    assert cli.main(arguments(artifacts, tmp_path)) == 0
    assert configured == [
        Config(
            artifacts=artifacts,
            data_dir=tmp_path,
            federation="default",
            private_blocks=(),
            num_rounds=0,
            min_devices=1,
            deadline_s=600.0,
            hyperparameters=Hyperparameters(0.05, 0.9, 1e-5, 16, 1),
            schedule="constant",
            seed=0,
        )
    ]


def test_every_option_arrives(artifacts: Path, tmp_path: Path, configured: list[Config]) -> None:
    words = (
        "--federation f-2 --scheme local --rounds 7 --min-devices 3 --deadline 2.5 "
        "--server-momentum 0.5 --learning-rate 0.25 --momentum 0.125 --weight-decay 0.5 "
        "--batch-size 4 --epochs 2 --seed 9 --optimizer adamw --nesterov --beta1 0.5 "
        "--beta2 0.75 --epsilon 0.001 --max-grad-norm 2.5 --accumulation 3 --proximal-mu 0.01"
    )
    assert cli.main(arguments(artifacts, tmp_path, *words.split())) == 0
    assert configured == [
        Config(
            artifacts=artifacts,
            data_dir=tmp_path,
            federation="f-2",
            private_blocks=tuple(SIZES),
            num_rounds=7,
            min_devices=3,
            deadline_s=2.5,
            hyperparameters=Hyperparameters(
                0.25,
                0.125,
                0.5,
                4,
                2,
                optimizer="adamw",
                nesterov=True,
                beta1=0.5,
                beta2=0.75,
                epsilon=0.001,
                max_grad_norm=2.5,
                accumulation=3,
                proximal_mu=0.01,
            ),
            schedule="cosine",
            seed=9,
            server_optimizer="momentum:0.5",
        )
    ]


REFUSED = {
    "--scheme full": "unknown scheme 'full', expected one of fm, ph, phf, local, personal",
    "--min-devices 0": "--min-devices: found 0, expected at least 1",
    "--batch-size 0": "--batch-size: 0 is outside [1, 65536]",
    "--batch-size 100000": "--batch-size: 100000 is outside",
    "--epochs -1": "--epochs: -1 is outside [1, 1000]",
    "--epochs 5000": "--epochs: 5000 is outside",
    "--rounds -1": "--rounds: found -1, expected at least 0",
    "--seed -1": "--seed: found -1, expected at least 0",
    "--deadline 0": "--deadline: found 0, expected seconds above 0",
    "--deadline nan": "--deadline: found nan, expected seconds above 0",
    "--learning-rate 0": "--learning-rate: found 0, expected more than 0",
    "--learning-rate 5000": "--learning-rate: 5000.0 is outside [0, 1000]",
    "--learning-rate nan": "--learning-rate: expected a finite number, found nan",
    "--momentum 1.5": "--momentum: 1.5 is outside",
    "--momentum -0.5": "--momentum: -0.5 is outside",
    "--weight-decay 2": "--weight-decay: 2.0 is outside",
    "--beta1 1": "--beta1: 1.0 is outside",
    "--beta2 1": "--beta2: 1.0 is outside",
    "--epsilon 0": "--epsilon: 0.0 is outside",
    "--max-grad-norm -1": "--max-grad-norm: -1.0 is outside [0, 1e+06]",
    "--accumulation 0": "--accumulation: 0 is outside [1, 65536]",
    "--proximal-mu -0.1": "--proximal-mu: -0.1 is outside [0, 1000]",
    "--schedule cosine": "--schedule cosine needs --rounds",
    "--finish-epochs -1": "--finish-epochs: found -1, expected at least 0",
    "--finish-epochs 1001": "--finish-epochs: found 1001, expected at most 1000",
    "--finish-rate 0": "--finish-rate: found 0, expected a share above 0, of 1 at most",
    "--finish-rate 1.5": "--finish-rate: found 1.5, expected a share above 0, of 1 at most",
    "--finish-rate nan": "--finish-rate: found nan, expected a share above 0",
}


@pytest.mark.parametrize("words", REFUSED)
def test_a_setting_that_makes_no_sense_is_refused(
    artifacts: Path,
    tmp_path: Path,
    configured: list[Config],
    capsys: pytest.CaptureFixture[str],
    words: str,
) -> None:
    assert cli.main(arguments(artifacts, tmp_path, *words.split())) == 2
    assert configured == []
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {REFUSED[words]}")


@pytest.mark.parametrize("address", ["nope", ":8080", "127.0.0.1:", "127.0.0.1:65536", "1:x"])
def test_an_http_address_of_another_form_is_refused(address: str) -> None:
    async def listen() -> None:
        async with AsyncExitStack() as stack:
            await service._listen(web.Application(), address, stack)

    with pytest.raises(ConfigError, match=r"expected HOST:PORT, e\.g\. 127\.0\.0\.1:8080"):
        asyncio.run(listen())


UNWINDING = """
import asyncio, sys, threading
from concurrent.futures import ThreadPoolExecutor
from server import __main__ as cli
from server.broker import BrokerError
from server.stepping import on_own_thread

begun, never = threading.Event(), threading.Event()

def step():  # on a pool's thread, as robust rules, for which Python waits
    with ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: (begun.set(), never.wait())).result()

async def serve(*arguments):
    stepping = asyncio.ensure_future(on_own_thread(step))
    await asyncio.sleep(0)
    assert begun.wait(60)
    raise %s

cli.serve = serve
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        ("BrokerError('the broker is gone')", 2, "error: the broker is gone\n"),
        ("RuntimeError('unforeseen')", 1, "RuntimeError: unforeseen\n"),
    ],
)
def test_a_server_that_fails_amid_a_step_ends_at_once(
    artifacts: Path, tmp_path: Path, error: str, code: int, said: str
) -> None:
    command = [sys.executable, "-c", UNWINDING % error, *arguments(artifacts, tmp_path / "data")]
    done = subprocess.run(
        command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == code and done.stderr.endswith(said), done.stderr
    assert ("Traceback" in done.stderr) == (code == 1)
