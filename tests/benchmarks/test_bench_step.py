from __future__ import annotations

import importlib.metadata
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import bench_step
from benchmarks.bench_step import MODELS, main
from benchmarks.contenders import worker
from benchmarks.step_report import CONTENDERS, HEADER, Row, report

SMALL = "tests.export.tiny:small"
ODD = "tests.benchmarks.odd_models"


def rows_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    """With this very Python as the stock one: that it is another engine is tested elsewhere."""
    assert main(["--json", "--stock-python", sys.executable, *arguments]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_the_figures(capsys: pytest.CaptureFixture[str]) -> None:
    rows = rows_of(capsys, "--models", SMALL, "--batch", "4,5", "--repeats", "2")
    assert [(row["batch"], row["contender"]) for row in rows] == [
        (batch, contender) for batch in (4, 5) for contender in CONTENDERS
    ]
    for row in rows:
        assert row["refused"] is None and row["note"] is None
        assert row["model"] == SMALL and row["num_steps"] == 2
        assert 0 < row["p10_s"] <= row["median_s"] <= row["p90_s"] < 10
        assert 0 < row["start_s"] < 60
        assert 10e6 < row["imports_bytes"] <= row["peak_bytes"] < 4e9
        assert 1000 < row["disk_bytes"] < 1e6
        package, _, version = row["engine"].partition(" ")
        assert importlib.metadata.version(package) == version
    for row, reference, composed in zip(
        rows,
        [r for r in rows[::4] for _ in CONTENDERS],
        [r for r in rows[3::4] for _ in CONTENDERS],
        strict=True,
    ):
        assert row["composed_ratio"] == row["median_s"] / composed["median_s"]
        assert row["time_ratio"] == row["median_s"] / reference["median_s"]
        assert row["memory_ratio"] == row["peak_bytes"] / reference["peak_bytes"]
    # PyTorch is not in the device's processes.
    assert all(row["imports_bytes"] < rows[0]["imports_bytes"] / 1.5 for row in rows[1:4])


def test_a_refusal_is_a_row_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    rows = rows_of(capsys, "--models", f"{ODD}:grouped", "--batch", "4", "--repeats", "2")
    *measured, composed = rows
    assert all(row["refused"] is None and row["median_s"] > 0 for row in measured)
    assert composed["refused"] and "\n" not in composed["refused"]
    assert composed["median_s"] is None and composed["time_ratio"] is None
    (line,) = report([Row(**composed)], is_markdown=True).splitlines()[2:3]
    assert line == f"| {ODD}:grouped | 4 | ORT composed |  | refused: {composed['refused']} |"


def test_without_an_evaluation_graph(capsys: pytest.CaptureFixture[str]) -> None:
    """onnxruntime-training trains a batch norm, but its evaluation graph does not load."""
    *rows, composed = rows_of(
        capsys, "--models", f"{ODD}:normalized", "--batch", "4", "--repeats", "1"
    )
    assert all(row["refused"] is None and row["note"] is None for row in rows)
    assert composed["refused"] is None and composed["median_s"] > 0
    assert composed["note"].startswith("evaluation graph refused: ")


def test_the_table_and_the_profile(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--models", SMALL, "--batch", "4", "--repeats", "1", "--profile", "--markdown",
                 "--stock-python", sys.executable]  # fmt: skip
    assert main(arguments) == 0
    printed = capsys.readouterr()
    table = [line for line in printed.out.splitlines() if line.startswith("|")]
    assert table[0] == f"| {' | '.join(HEADER)} |"
    assert len(table) == 2 + len(CONTENDERS)
    assert len({line.count("|") for line in table}) == 1
    for block in ("encoder-a", "encoder-b", "fusion", "head", "Python around them", "step"):
        assert any(line.startswith(block) for line in printed.out.splitlines())
    assert "operator" in printed.out
    assert "exporting" in printed.err and "exporting" not in printed.out


def test_without_a_stock_runtime(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["--models", SMALL, "--batch", "4", "--repeats", "1", "--json"]
    assert main([*arguments, "--stock-python", str(tmp_path / "python")]) == 0
    rows = {r["contender"]: r for r in map(json.loads, capsys.readouterr().out.splitlines())}
    stock = rows.pop("petalfl_stock")
    assert stock["refused"] == f"no Python at {tmp_path / 'python'}; make one with: make stock"
    assert all(row["refused"] is None for row in rows.values())


def test_a_table_of_plain_text() -> None:
    rows = [
        Row(
            "m",
            16,
            "pytorch",
            None,
            None,
            "torch 2",
            0.0123,
            0.012,
            0.0131,
            9,
            1.0,
            0.9,
            0.5,
            1,
            2,
            1.0,
            1.0,
            3,
        ),
        Row("m", 16, "composed", refused="why " * 30),
        Row("m", 16, "petalfl_sdk", note="odd"),
    ]
    lines = report(rows, is_markdown=False).splitlines()
    assert len(lines[0]) == len(lines[1]) < 140
    assert "12.30" in lines[1] and "12.00-13.10" in lines[1]
    assert lines[2].endswith(f"  refused: {'why ' * 30}")
    assert "m, petalfl: odd" in lines


def test_a_process_that_crashes_is_a_refusal() -> None:
    assert bench_step._end_of(-signal.SIGFPE) == "its process ended with SIGFPE"
    assert bench_step._end_of(3) == "its process ended with code 3"


def test_a_reason_is_one_short_line() -> None:
    assert worker.reason_of(ValueError("one\ntwo")) == "ValueError: one"
    assert worker.reason_of(ValueError()) == "ValueError: "
    assert len(worker.reason_of(ValueError("x" * 1000))) <= 165


def test_the_peak_is_of_this_process_alone() -> None:
    """A child of a large process does not inherit its peak."""
    ballast = b"x" * (200 << 20)
    read, write = os.pipe()
    if os.fork() == 0:
        code = "from benchmarks.contenders.worker import _resident_bytes as r; print(r('VmHWM'))"
        os.dup2(write, 1)
        os.execv(sys.executable, [sys.executable, "-c", code])
    os.close(write)
    with os.fdopen(read) as lines:
        assert int(lines.read()) < 60 << 20
    os.wait()
    assert len(ballast) == 200 << 20


@pytest.mark.parametrize("name", MODELS)
def test_the_reference_models_are_there(name: str) -> None:
    module, _, function = MODELS[name].partition(":")
    assert Path(*module.split(".")).with_suffix(".py").read_text().count(f"def {function}(") == 1
