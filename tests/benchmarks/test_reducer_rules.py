from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks import reducer_rules
from benchmarks.bench_canonical import matrix_block
from benchmarks.contenders.resident import peak_bytes
from benchmarks.reducer_rules import aggregation, encode, resident_rows

SMALL = ("--updates", "10", "--size", "3000", "--rows", "30", "--columns", "20",
         "--repeats", "2", "--reducer", "numpy")  # fmt: skip
RULES = ("median", "trimmed-mean:0.1", "trimmed-mean:0.1 by examples", "multi-krum",
         "geometric-median", "canonical")  # fmt: skip


def test_every_rule_in_every_form(capsys: pytest.CaptureFixture[str]) -> None:
    assert reducer_rules.main(["--json", *SMALL]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    expected = [(rule, codec) for rule in RULES for codec in ("f32", "int8")]
    assert [(row["rule"], row["updates"]) for row in rows] == expected
    for row in rows:
        assert 0 < row["least_s"] <= row["wall_s"] <= row["most_s"]
        assert row["size"] == (600 if row["rule"] == "canonical" else 3000)


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    assert reducer_rules.main(["--markdown", "--svd", *SMALL]) == 0
    out = capsys.readouterr().out
    assert "| canonical | torch SVD | f32 |" in out
    assert "10 updates of 3,000 values; canonical: of 30 x 20. Reducer: numpy" in out


def test_values_that_lie_on_a_device() -> None:
    pytest.importorskip("torch")
    rows = resident_rows(10, 300, 2, "cpu")
    assert [(row.rule, row.contender) for row in rows] == [
        ("median on cpu", "petalfl"), ("median on cpu", "torch median"),
        ("median on cpu", "torch sort"), ("trimmed-mean:0.1 on cpu", "petalfl"),
        ("trimmed-mean:0.1 on cpu", "torch sort"),
    ]  # fmt: skip


def test_what_is_timed_is_the_rule() -> None:
    vectors = list(np.random.default_rng(0).standard_normal((7, 50), np.float32))
    block = matrix_block(1, 50)
    finalize = aggregation("median", block, encode(block, vectors, "f32"), [1.0] * 7)
    np.testing.assert_array_equal(finalize(), np.median(vectors, axis=0))


def test_the_peak_is_of_what_is_held_meanwhile() -> None:
    assert 40e6 < peak_bytes(lambda: np.ones(5_000_000)) < 60e6
