from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import bench_server
from tests.mosquitto import missing_mosquitto

SMALL = ["--clients", "3", "--parameters", "40000", "--rounds", "2"]  # two chunks


def run(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert bench_server.main([*SMALL, *words]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    "broker",
    [
        "embedded",
        pytest.param(
            "mosquitto",
            marks=[
                pytest.mark.mosquitto,
                pytest.mark.skipif(missing_mosquitto() is not None, reason="no Mosquitto"),
            ],
        ),
    ],
)
def test_it_measures_a_fleet(capsys: pytest.CaptureFixture[str], broker: str) -> None:
    printed = run(capsys, "--broker", broker, "--codecs", "f32,int8", "--json")
    row, shorter = map(json.loads, printed.splitlines())
    assert (row["num_clients"], row["num_rounds"], row["refused"]) == (3, 2, None)
    assert 0 < row["latency_p50_s"] <= row["latency_p99_s"] < 60
    assert row["mb_per_s"] == pytest.approx(row["updates_per_s"] * 0.16)
    assert shorter["mb_per_s"] < 0.3 * 0.16 * shorter["updates_per_s"]
    assert row["peak_bytes"] > 10e6
    assert row["broker_peak_bytes"] > 1e6 and row["cpu_s"] > 0


def test_the_table_says_what_flower_lacks(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """In an environment without it, its row holds the reason."""
    python = ["--flower-python", sys.executable]
    table = run(capsys, "--broker", "embedded", "--markdown", *python)
    lines = table.splitlines()
    assert lines[1].startswith("|---|--:|")
    assert lines[2].startswith("| petalfl, embedded | f32 | 3 | 2 |")
    assert "refused: ModuleNotFoundError: No module named 'flwr'" in lines[3]
    assert "fdatasync" in table
