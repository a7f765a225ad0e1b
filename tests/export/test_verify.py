"""What `verify` makes of the law's errors; that they are right is test_law's."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from export import BlockModel
from export.law import Error
from export.verify import load_values, verify
from petalfl.errors import ModelError
from petalfl.model import ModelManifest
from tests.export.test_merge import own
from tests.export.tiny import small

KEY = ("fusion", "gradient of w")


# By case: the errors of one batch after another, how many are run of 1, whether that is exact.
CASES: dict[str, tuple[list[float], int, bool]] = {
    "none": ([0.0], 1, True),
    "at the limit": ([1e-5], 1, True),
    "rounding": ([1e-4, 1e-7], 2, True),
    "rounding, twice": ([1e-4, 2e-5, 1e-7], 3, True),
    "wrong": ([1e-4, 2e-5, 3e-5], 3, False),
    "far off": ([0.1, 1e-7, 1e-7], 3, False),
    "NaN": ([math.nan, 1e-7, 1e-7], 3, False),
}


@pytest.mark.parametrize("case", CASES)
def test_a_coincidence_is_told_from_an_error(
    case: str, small_artifacts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors, num_run, is_exact = CASES[case]
    seeds: list[int] = []

    def worst_errors(model: Any, folder: Any, seed: int, progress: Any) -> Any:
        seeds.append(seed)
        progress(1, 3)
        return {("", "loss"): Error(0.0), KEY: Error(errors[len(seeds) - 1])}

    monkeypatch.setattr("export.verify.worst_errors", worst_errors)
    ticks: list[tuple[int, int]] = []
    findings = verify(
        small(), small_artifacts, num_batches=1, seed=5, progress=lambda *t: ticks.append(t)
    )
    assert seeds == [5, 6, 7][:num_run]
    assert ticks == [(1, 3), (4, 6), (7, 9)][:num_run]
    assert [finding.block for finding in findings] == [
        "", "encoder-a", "encoder-b", "fusion", "head"
    ]  # fmt: skip
    found = findings[3]
    assert (found.what, found.is_exact) == ("gradient of w", is_exact)
    worst = math.nan if case == "NaN" else max(errors)
    assert found.error == worst or (math.isnan(found.error) and math.isnan(worst))
    assert all(finding.is_exact for finding in findings if finding is not found)


def test_as_many_batches_as_asked_for(
    small_artifacts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds: list[int] = []

    def worst_errors(model: Any, folder: Any, seed: int, progress: Any) -> Any:
        seeds.append(seed)
        return {KEY: Error(1e-4)}

    monkeypatch.setattr("export.verify.worst_errors", worst_errors)
    verify(small(), small_artifacts, num_batches=5)
    assert seeds == [0, 1, 2, 3, 4]


def test_the_model_gets_what_was_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers, too: the factory may draw others."""
    from export import export_model

    monkeypatch.setattr("export.artifacts.check_one_step", lambda model, folder: None)
    expected = own()
    manifest = export_model(expected, tmp_path / "artifacts")
    model = own(seed=1)
    load_values(model, tmp_path / "artifacts", manifest)
    for (key, value), other in zip(
        model.whole().state_dict().items(), expected.whole().state_dict().values(), strict=True
    ):
        assert torch.equal(value, other), key
    findings = verify(own(seed=2), tmp_path / "artifacts", num_batches=1)
    assert all(finding.is_exact for finding in findings)


def test_a_buffer_of_another_shape(small_artifacts: Path) -> None:
    model: BlockModel = small()
    model.register_buffer("later", torch.zeros(2))
    with pytest.raises(ModelError, match=r"does not fit the artifacts: .*later"):
        load_values(model, small_artifacts, ModelManifest.load(small_artifacts))
