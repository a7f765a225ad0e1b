"""The README's code blocks, run as a newcomer would run them."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from examples.android_sim import __main__ as android_sim
from examples.android_sim.data import devices
from examples.in_vehicle import __main__ as in_vehicle
from server import __main__ as server

REPOSITORY = Path(__file__).parents[2]
README = (REPOSITORY / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)
PYTHON = [text for language, text in BLOCKS if language == "python"]
COMMANDS = [
    line for language, text in BLOCKS if language == "bash" for line in text.strip().splitlines()
]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
WITHOUT_TORCH = os.pathsep.join(map(str, (REPOSITORY / "tests" / "without_torch", REPOSITORY)))
ON_A_DEVICE = {**os.environ, "PYTHONPATH": WITHOUT_TORCH}


def command(start: str) -> list[str]:
    """The one command of the README that starts so, with this Python."""
    (line,) = [c for c in COMMANDS if c.startswith(start)]
    return [sys.executable if word == "python" else word for word in shlex.split(line)]


def test_there_is_nothing_else_to_run() -> None:
    known = ("make ", "source .venv", "python -m export", "python -m petalfl check",
             "python -m server", "python -m examples")  # fmt: skip
    assert all(line.startswith(known) for line in COMMANDS)
    assert len(PYTHON) == 2
    assert {language for language, _ in BLOCKS} == {"bash", "python"}


@pytest.mark.parametrize("target", [c for c in COMMANDS if c.startswith("make ")])
def test_make_targets_exist(target: str) -> None:
    subprocess.run([*target.split(), "-n"], cwd=REPOSITORY, check=True, capture_output=True)


@pytest.mark.parametrize("line", [c for c in COMMANDS if "examples.android_sim" in c])
def test_the_emulator_takes_these_options(line: str) -> None:
    assert android_sim._parser().parse_args(shlex.split(line)[3:])


def test_the_vehicles_take_these_options() -> None:
    (line,) = [c for c in COMMANDS if "examples.in_vehicle" in c]
    assert in_vehicle._parser().parse_args(shlex.split(line)[3:])


def test_the_server_takes_a_broker() -> None:
    (line,) = [c for c in COMMANDS if "--broker" in c]
    assert server._parser().parse_args(shlex.split(line)[3:]).broker.startswith("mqtt://admin:")


def test_the_server_takes_rules() -> None:
    (line,) = [c for c in COMMANDS if "--mode" in c]
    assert server._parser().parse_args(shlex.split(line)[3:]).aggregator == "trimmed-mean:0.1"


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert target.startswith("https://arxiv.org/") or (REPOSITORY / target).exists(), target


def test_export_serve_and_embed(tmp_path: Path) -> None:
    (tmp_path / "my_model.py").write_text(PYTHON[0])
    run_all("python -m export my_model", tmp_path)
    run_all("python -m petalfl check", tmp_path, ON_A_DEVICE)
    with running_server(tmp_path) as (url, token):
        apps = [start_app(tmp_path / f"app-{i}", i, url, token) for i in range(2)]
        outputs = [app.communicate(timeout=120)[0] for app in apps]
    for app, output in zip(apps, outputs, strict=True):
        assert app.returncode == 0, output
        assert re.fullmatch(r"\[[0-6]\]", output.strip().splitlines()[-1])
    for form in ("export inspect", "export verify", "export merge"):
        run_all(f"python -m {form}", tmp_path)
    subprocess.run(command("python -m server --artifacts artifacts check"), cwd=tmp_path,
                   env=ENVIRONMENT, check=True)  # fmt: skip
    assert torch.load(tmp_path / "model.pt").keys()
    assert [i.name for i in onnx.load(tmp_path / "model.onnx").graph.input] == ["acc"]


def run_all(start: str, folder: Path, environment: dict[str, str] = ENVIRONMENT) -> None:
    """The README's commands that start so."""
    lines = [c for c in COMMANDS if c.startswith(start)]
    assert lines
    for line in lines:
        words = [sys.executable if word == "python" else word for word in shlex.split(line)]
        subprocess.run(words, cwd=folder, env=environment, check=True)


@contextmanager
def running_server(folder: Path) -> Iterator[tuple[str, str]]:
    words = command("python -m server --artifacts artifacts --rounds")
    words[words.index("--rounds") + 1] = "2"
    process = subprocess.Popen([*words, "--http", "127.0.0.1:0"], cwd=folder, env=ENVIRONMENT)
    runtime = folder / "petalfl-data" / "server.json"
    try:
        for _ in range(1200):
            if runtime.exists():
                break
            assert process.poll() is None, "the server has ended"
            time.sleep(0.05)
        found = json.loads(runtime.read_bytes())
        yield found["url"], found["token"]
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0


def start_app(folder: Path, index: int, url: str, token: str) -> subprocess.Popen[str]:
    folder.mkdir()
    windows = devices(20)[index].train
    np.save(folder / "acc.npy", windows.inputs["acc"])
    np.save(folder / "labels.npy", windows.labels)
    assert '"http://127.0.0.1:8080"' in PYTHON[1] and '"TOKEN"' in PYTHON[1]
    code = PYTHON[1].replace("http://127.0.0.1:8080", url).replace("TOKEN", token)
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", code],
        cwd=folder, env=ON_A_DEVICE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
