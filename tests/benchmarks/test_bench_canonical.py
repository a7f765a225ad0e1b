from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from benchmarks import bench_aggregators, bench_canonical
from benchmarks.bench_canonical import RULES, SCENARIOS, STRATEGIES, merge, train
from server.aggregators import AGGREGATORS
from server.optimizers import OPTIMIZERS


def rows_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    assert bench_canonical.main(["--json", *arguments]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_the_figures(capsys: pytest.CaptureFixture[str]) -> None:
    rows = rows_of(capsys, "--seeds", "2", "--rounds", "2")
    merged, trained = rows[: -len(STRATEGIES)], rows[-len(STRATEGIES) :]
    assert len(merged) == sum(len(s[2]) for s in SCENARIOS.values()) * (len(RULES) - 1)
    for row in merged:
        assert 0 < row["p10"] <= row["ratio"] <= row["p90"] and row["num_seeds"] == 2
        assert 0 <= row["better"] <= 1 and row["mean_error"] > 0 and 0 < row["merge_s"] < 5
    assert [(row["aggregator"], row["optimizer"]) for row in trained] == [*STRATEGIES]
    assert trained[0]["ratio"] == 1
    assert all(0 < row["p10"] <= row["error"] <= row["p90"] < 1 for row in trained)


def test_what_the_docs_say_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    """Where canonical wins, and where it does not: of the medians of a few seeds."""
    rows = rows_of(capsys, "--seeds", "3", "--rounds", "0")
    ratios = {(r["scenario"], r["strength"], r["rule"]): r["ratio"] for r in rows}
    canonical = {key[:2]: ratio for key, ratio in ratios.items() if key[2] == "canonical"}
    assert canonical["interfere", 1] < 0.9
    assert all(canonical["conflict", share] < 0.6 for share in (0.1, 0.2, 0.3, 0.4))
    assert all(canonical["one noisy", noise] < 0.6 for noise in (1, 3, 10))
    assert canonical["agree", 1] > 1.1 and canonical["overlap", 2] > 1.2
    assert ratios["one noisy", 3, "by magnitude"] > 2


def test_what_the_docs_say_of_training() -> None:
    errors = {
        aggregator: train((aggregator, "sgd"), np.random.default_rng(0), 10, 40)[0]
        for aggregator in ("weighted-mean", "canonical")
    }
    assert errors["canonical"] < 0.8 * errors["weighted-mean"]


def test_the_mean_of_equal_deltas_is_theirs_by_any_rule() -> None:
    delta = bench_canonical.SCENARIOS["agree"][1](np.random.default_rng(0), 1, 0.0)[0]
    vector = delta.astype(np.float32).ravel()
    for rule in RULES:
        np.testing.assert_allclose(merge(rule, [vector] * 4), vector, atol=0.1 * vector.max())


@pytest.mark.parametrize("flags", [(), ("--markdown",)])
def test_the_tables(capsys: pytest.CaptureFixture[str], flags: tuple[str, ...]) -> None:
    arguments = ["--scenarios", "conflict,agree", "--seeds", "2", "--rounds", "2"]
    assert bench_canonical.main([*arguments, *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum("conflict" in line and "(" in line for line in lines) == 4
    assert any("orthogonal:0.9:0.7" in line for line in lines)
    assert ("|---" in lines[1]) == bool(flags)


def test_an_unknown_scenario_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench_canonical.main(["--scenarios", "peace"])
    assert "'peace': choose of interfere, overlap" in capsys.readouterr().err


def test_the_costs(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--updates", "7", "--rows", "30", "--columns", "20"]
    assert bench_aggregators.main([*arguments, "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    names = [row["rule"].partition(":")[0] for row in rows]
    assert names == [*AGGREGATORS, *OPTIMIZERS]
    kept = {row["rule"]: row["kept_bytes"] for row in rows}
    few = 7 * 600 * 4  # bytes: so few wait for a pass over the sum, too
    assert kept["weighted-mean"] == kept["median"] == few
    assert all(row["end_s"] > 0 and row["peak_bytes"] >= 600 * 4 for row in rows)
    assert bench_aggregators.main([*arguments, "--markdown"]) == 0
    assert capsys.readouterr().out.count("\n| ") == len(rows)
