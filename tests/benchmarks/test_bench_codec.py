from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from benchmarks import bench_codec
from petalfl.vectors import Vector

FAST = ("--rounds", "1", "--size", "5000", "--repeats", "3")


@pytest.fixture(autouse=True)
def few_deltas(monkeypatch: pytest.MonkeyPatch) -> None:
    def deltas(num_rounds: int) -> list[Vector]:
        rng = np.random.default_rng(num_rounds)
        return [rng.standard_normal(size, np.float32) ** 3 for size in (1000, 2000)]

    monkeypatch.setattr(bench_codec, "train_deltas", deltas)


def test_the_figures(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_codec.main(["--json", *FAST]) == 0
    rows: list[dict[str, Any]] = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["codec"] for row in rows] == ["memcpy", *bench_codec.CODECS]
    for row in rows:
        assert all(0 < p10 <= p50 <= p90 for p10, p50, p90 in (row["encode"], row["both"]))
    by_name = {row["codec"]: row for row in rows[1:]}
    assert by_name["f32"]["ratio"] == 1 and by_name["f32"]["error"] == 0
    assert by_name["bf16"]["ratio"] == 2 and 0 < by_name["bf16"]["error"] < 0.004
    assert 3.9 < by_name["int8"]["ratio"] < 4
    assert by_name["int8"]["mean_error"] < by_name["int8"]["error"] / 5 < 0.01
    assert by_name["topk:0.1"]["mean_error"] == pytest.approx(by_name["topk:0.1"]["error"])
    assert by_name["topk-int8:0.01"]["ratio"] > by_name["topk-int8:0.1"]["ratio"] > 15


@pytest.mark.parametrize("flags", [(), ("--markdown",)])
def test_the_tables(capsys: pytest.CaptureFixture[str], flags: tuple[str, ...]) -> None:
    assert bench_codec.main([*FAST, "--codecs", "int8", *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| codec |" if flags else "codec")
    assert sum("int8" in line for line in lines[:5]) == 1


def test_an_unknown_codec() -> None:
    with pytest.raises(ValueError, match="unknown codec 'zip'"):
        bench_codec.main([*FAST, "--codecs", "zip"])
