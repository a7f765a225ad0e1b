"""docs/embedding.md: its programs take part in one federation, and its messages are the wire's."""

from __future__ import annotations

import configparser
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np

from examples.android_sim.data import devices
from examples.android_sim.server_process import running_server
from petalfl.store import DeviceStore
from server.__main__ import main as server_main
from tests.contract.messages import written

REPOSITORY = Path(__file__).parents[2]
WITHOUT_TORCH = os.pathsep.join(map(str, (REPOSITORY / "tests" / "without_torch", REPOSITORY)))
PAGE = (REPOSITORY / "docs" / "embedding.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", PAGE, flags=re.DOTALL)
DESKTOP, ASYNCIO, OFFLINE, SERVICE = (text for language, text in BLOCKS if language == "python")
SENSORS = """
import numpy as np

def windows():
    for window, label in zip(np.load("acc.npy"), np.load("labels.npy"), strict=True):
        yield {"acc": window}, label
"""


def prepared(folder: Path, index: int) -> Path:
    """An app's folder, with a device's recordings."""
    folder.mkdir()
    windows = devices(20)[index].train
    np.save(folder / "acc.npy", windows.inputs["acc"])
    np.save(folder / "labels.npy", windows.labels)
    (folder / "sensors.py").write_text(SENSORS)
    return folder


def started(code: str, folder: Path, url: str, token: str) -> subprocess.Popen[str]:
    assert '"http://127.0.0.1:8080"' in code
    code = code.replace("http://127.0.0.1:8080", url).replace("TOKEN", token)
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", code], cwd=folder, text=True,
        env={**os.environ, "PYTHONPATH": f"{WITHOUT_TORCH}{os.pathsep}{folder}"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def revoke(store: Path, data_dir: Path) -> None:
    """As an operator does it on the server's machine."""
    opened = DeviceStore(store)
    identity = opened.read_identity()
    opened.close()
    assert identity is not None
    assert server_main(["revoke", identity.device, "--data-dir", str(data_dir)]) == 0


def test_the_programs_take_part_together(tmp_path: Path, watch_artifacts: Path) -> None:
    programs = {"desktop": DESKTOP, "asyncio": ASYNCIO, "service": SERVICE}
    folders = {name: prepared(tmp_path / name, i) for i, name in enumerate(programs)}
    arguments = ["--rounds", "1", "--min-devices", "3"]
    data_dir = tmp_path / "server"
    with running_server(watch_artifacts, data_dir, arguments) as server:
        running = {
            name: started(code, folders[name], server.url, server.token)
            for name, code in programs.items()
        }
        said = {"desktop": running["desktop"].communicate(timeout=200)[0]}
        # It leaves as soon as it has trained, and comes back another day: nobody waits for that.
        revoke(folders["desktop"] / "petalfl-store", data_dir)
        for name in ("asyncio", "service"):
            said[name], _ = running[name].communicate(timeout=200)
    for name, process in running.items():
        assert process.returncode == 0, f"{name}: {said[name]}"
    assert re.match(r"round 1: loss \d\.\d\d\n", said["desktop"])
    assert "goes on without" not in said["asyncio"]
    assert "petalfl" in said["service"]  # its log
    offline = started(OFFLINE, folders["asyncio"], server.url, "")
    output, _ = offline.communicate(timeout=100)
    assert offline.returncode == 0, output
    assert re.match(r"\[[0-6]\]\n\{'accuracy': ", output)


def test_the_unit_of_systemd_starts_the_service() -> None:
    (text,) = [text for language, text in BLOCKS if language == "ini"]
    unit = configparser.ConfigParser()
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read_string(text)
    assert unit["Service"]["ExecStart"].endswith("/service.py")
    assert float(unit["Service"]["TimeoutStopSec"]) > 10


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)]+)\)", PAGE):
        if not target.startswith("https://"):
            assert (REPOSITORY / "docs" / target.partition("#")[0]).exists(), target


def test_the_messages_are_the_golden_ones() -> None:
    page = json.loads((REPOSITORY / "docs" / "messages.json").read_text())
    assert page == written(), "make it anew: python -m tests.contract.messages"
