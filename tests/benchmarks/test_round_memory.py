from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import round_memory

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
SMALL = ("--updates", "20", "--size", "500000", "--reducer", "numpy")


def test_a_round_in_files_and_one_in_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = []
    for more in ([], ["--in-memory"]):
        assert round_memory.main([*SMALL, "--json", "--folder", str(tmp_path), *more]) == 0
        rows.append(json.loads(capsys.readouterr().out))
    in_files, in_memory = rows
    assert in_files["payload_bytes"] == in_memory["payload_bytes"] == 40_000_000
    assert in_files["cache_bytes"] > 39_000_000 > 20_000_000 > in_memory["cache_bytes"]
    assert in_files["own_bytes"] < 30_000_000, "a tile is of 10 MB"
    assert list(tmp_path.iterdir()) == []  # its data folders are gone


def test_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert round_memory.main([*SMALL, "--updates", "3", "--codec", "int8"]) == 0
    assert "median of 3 x 500,000 int8, in files: payloads 2 MB" in capsys.readouterr().out
