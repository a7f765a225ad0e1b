"""`python -m examples.in_vehicle` as a person starts it, with real processes."""

from __future__ import annotations

import functools
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from examples.in_vehicle.__main__ import main
from examples.in_vehicle.drive import simulate, write_csv

pytestmark = pytest.mark.usefixtures("numpy_reducer")
REPOSITORY = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "examples.in_vehicle"]


def leftovers(out: Path) -> list[str]:
    """Command lines of processes that still belong to a run in that folder."""
    return [
        " ".join(process.info["cmdline"])
        for process in psutil.process_iter(["cmdline"])
        if str(out) in " ".join(process.info["cmdline"] or [])
    ]


def test_recordings_become_a_model_in_two_vehicles(tmp_path: Path) -> None:
    both = simulate(1, minutes=5, modalities=("acc", "gyro")).without("gyro", 0.4, 0.5)
    drives = {"van": both, "truck": simulate(2, minutes=5, modalities=("acc",))}
    arguments = []
    for name, drive in drives.items():
        with (tmp_path / f"{name}.csv").open("w") as file:
            write_csv(drive, file)
        arguments += ["--recording", str(tmp_path / f"{name}.csv")]
    done = subprocess.run(
        [*COMMAND, *arguments, "--trips", "2", "--rounds", "7", "--pace", "5000",
         "--out", str(tmp_path / "out"), "--json"],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=250,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert leftovers(tmp_path) == []
    summary = json.loads(done.stdout)
    assert summary == json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["source"], summary["rounds"]) == ("recordings", 14)
    van, truck = summary["units"]["unit-1"], summary["units"]["unit-2"]
    assert (van["sensors"], truck["sensors"]) == (["acc", "gyro"], ["acc"])
    for unit in (van, truck):
        assert unit["rounds"] == 14
        assert 0 < unit["labeled"] < unit["examples"]
        assert unit["macro_f1_after"] > unit["macro_f1_before"] + 0.1
        first, second = unit["while_driving"]
        assert first is None  # there was no model yet
        assert 0 < second <= 1


def test_ctrl_c_ends_every_process(tmp_path: Path) -> None:
    with (tmp_path / "stderr").open("w") as log:
        process = subprocess.Popen(
            # A drive takes its time: the signal comes amid one.
            [*COMMAND, "--units", "2", "--minutes", "3", "--pace", "1",
             "--out", str(tmp_path / "out")],
            cwd=REPOSITORY, stderr=log, stdout=subprocess.DEVNULL,
            # Also where the tests run in the background of a shell, which has Ctrl-C ignored.
            preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        while "driving" not in (said := (tmp_path / "stderr").read_text()):
            assert process.poll() is None, said
            time.sleep(0.05)
        assert len(leftovers(tmp_path)) >= 4  # itself, a server, two units
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    assert (tmp_path / "stderr").read_text().endswith("stopped\n")
    assert leftovers(tmp_path) == []
    assert not (tmp_path / "out" / "summary.json").exists()


def test_a_recording_that_is_none_is_refused_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "drive.csv").write_text("time_s,event\n")
    arguments = ["--recording", str(tmp_path / "drive.csv"), "--out", str(tmp_path / "out")]
    assert main(arguments) == 2
    assert "has 0 samples, expected 100 at least" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
