from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from benchmarks import bench_reducer, reducer_gpu
from benchmarks.bench_reducer import BLAS, FLOOR, mean_of
from petalfl.payloads import plain_delta
from tests.server.builders import make_block

SMALL = ("--work", "9x3000,3x5000", "--backends", "numpy", "--codecs", "f32,int8", "--repeats", "2")


def rows_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    assert bench_reducer.main(["--json", *arguments]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_the_sums(capsys: pytest.CaptureFixture[str]) -> None:
    rows = rows_of(capsys, "--rows", "sums", *SMALL)
    contenders = [(FLOOR, "f32"), (BLAS, "f32"), ("petalfl, numpy", "f32"),
                  ("petalfl, numpy", "int8")]  # fmt: skip
    assert [(row["contender"], row["updates"]) for row in rows] == contenders * 2
    assert [(row["num_updates"], row["size"]) for row in rows[::4]] == [(9, 3000), (3, 5000)]
    for row in rows:
        assert 0 < row["least_s"] <= row["wall_s"] <= row["most_s"] and row["cpu_s"] >= 0


def test_what_is_timed_is_the_mean() -> None:
    vectors = np.random.default_rng(0).standard_normal((5, 100), np.float32)
    block = make_block("head", "head", ("acc",), {"w": (100,)})[0]
    found = mean_of(block, [plain_delta(vector) for vector in vectors])
    expected = np.average(vectors.astype(np.float64), axis=0, weights=[1, 2, 3, 4, 5])
    assert found is not None
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-8)


def test_without_a_gpu_its_rows_say_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reducer_gpu, "missing", lambda: "no GPU")
    rows = rows_of(capsys, "--rows", "gpu")
    assert [(row["work"], row["updates"]) for row in rows] == [
        ("resident", "int8"), ("resident", "f32"), ("streamed", "int8"), ("streamed", "f32"),
    ]  # fmt: skip
    assert all(row["refused"] == "no GPU" and row["least_s"] is None for row in rows)


@pytest.mark.parametrize("flags", [(), ("--markdown",)])
def test_the_tables(capsys: pytest.CaptureFixture[str], flags: tuple[str, ...]) -> None:
    assert bench_reducer.main([*flags, "--rows", "sums,gpu", *SMALL]) == 0
    text = capsys.readouterr().out
    assert "9 x 3,000" in text and BLAS in text and "read GB/s" in text


def test_rows_that_there_are_none_of(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench_reducer.main(["--rows", "sums,speed"])
    assert "unknown ['speed'], expected sums, rules, gpu" in capsys.readouterr().err
