from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import bench_device
from benchmarks.bench_device import Environment, Life, Start
from benchmarks.bench_server import running_server

STATUS = (
    "Name:\tpython 3\nVmHWM:\t   12 kB\nVmRSS:\t   11 kB\nThreads:\t4\nUid:\t0\t0\nSigQ:\t0/9\n"
)


def test_a_status() -> None:
    """A name that ends in a number, several numbers and a fraction are none."""
    assert bench_device.parse_status(STATUS) == {"VmHWM": 12288, "VmRSS": 11264, "Threads": 4}


def test_what_a_start_is_over_the_bare_one() -> None:
    """By hand: medians 20 and 170 ms of wall time, 10 and 110 of CPU."""
    bare = Start("ort", "pass", (0.02, 0.01, 0.9), (0.01,) * 3, (10**7,) * 3)
    other = Start("ort", "import x", (0.17, 0.07, 0.57), (0.11,) * 3, (4 * 10**7,) * 3)
    cells = bench_device.start_cells([bare, other])
    assert cells[1] == ("ort", "`pass`", "20", "12-724", "0", "10", "0", "10")
    assert cells[2] == ("ort", "`import x`", "170", "90-490", "150", "110", "100", "40")


def test_lives_are_joined_by_runtime() -> None:
    """By hand: the median of both repeats, or of all their rounds, with least and most."""
    lives = [
        Life("ort", 500_000, 60_000_000, 3, 0.0001, 0.25, peak, 4, rounds, (0.5,), 2_000_000)
        for peak, rounds in ((100_000_000, (0.2, 0.3)), (110_000_000, (0.4, 0.9)))
    ]
    assert bench_device.life_cells(lives)[1] == (
        "ort", "60.0", "105.0 (100.0-110.0)", "0.50", "3", "4", "0.010", "0.2", "0.35 (0.20-0.90)",
        "0.50", "2.00",
    )  # fmt: skip


def test_a_real_device(watch_artifacts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--starts", "1", "--idle", "0.5", "--rounds", "2", "--repeats", "1", "--json"]
    assert bench_device.main([*flags, "--artifacts", str(watch_artifacts)]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    environment, life = rows[0], rows[-1]
    assert [row["kind"] for row in rows] == ["environment", *["start"] * 5, "life"]
    assert life["runtime"] == environment["runtime"] == rows[1]["environment"]
    assert environment["runtime_bytes"] > 10e6 and environment["dependencies_bytes"] > 10e6
    assert 1e5 < environment["petalfl_bytes"] < 1e6
    resident = {row["statement"]: row["resident_bytes"][0] for row in rows[1:-1]}
    assert resident["pass"] < resident["import numpy"] < resident["from petalfl import EdgeClient"]
    assert life["data_bytes"] % (2 * 3 * 100 * 4 + 8) == 0  # windows of two modalities, and labels
    assert 20e6 < life["idle_bytes"] < life["peak_bytes"]
    assert 1 <= life["idle_threads"] <= life["training_threads"]
    assert len(life["round_cpu_s"]) == len(life["round_s"]) == 2 and sum(life["round_cpu_s"]) > 0
    manifest_bytes = (watch_artifacts / "manifest.json").stat().st_size
    assert life["store_bytes"] > manifest_bytes + life["peak_bytes"] / 1000


def test_the_report() -> None:
    environment = Environment("ort 1", "3.11.7", 200_000, 50_000_000, 26_000_000, 80_000_000)
    start = Start("ort 1", "pass", (0.02,), (0.01,), (10**7,))
    life = Life("ort 1", 1, 1, 1, 0.0, 0.0, 1, 1, (0.1,), (0.1,), 1)
    lines = bench_device.report([environment], [start], [life], is_markdown=True).splitlines()
    assert lines[0].startswith("|  | statement | wall ms |") and lines[1].startswith(
        "|---|---|--:|"
    )
    assert "| ort 1 | 3.11.7 | 0.20 | 50 | 26 | 80 |" in lines
    assert sum(line.startswith("| aim |") for line in lines) == 2


def test_a_device_that_fails_is_told(tmp_path: Path, watch_artifacts: Path) -> None:
    (tmp_path / "artifacts").symlink_to(watch_artifacts)
    with running_server(tmp_path, "--broker", "embedded", "--scheme", "phf") as server:
        process = bench_device._device(Path(sys.executable), server, "no-data", tmp_path)
        with process as one, pytest.raises(RuntimeError, match="no-data ended with code 1"):
            bench_device._wait_until_ready(server, "no-data", one)
