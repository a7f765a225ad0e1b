from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from petalfl.__main__ import main
from petalfl.engine import OrtEngine
from petalfl.errors import ModelError
from petalfl.model import ModelManifest
from petalfl.reference import REFERENCE_NAME, TOLERANCE, Reference, take_reference, take_steps
from petalfl.runtime import find_runtime
from petalfl.training import Hyperparameters


@pytest.fixture
def artifacts(small_artifacts: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_artifacts, tmp_path / "artifacts"))


def checked(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict[str, Any]]:
    code = main(["check", *map(str, arguments), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_the_steps_of_the_export(artifacts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reference = Reference.load(artifacts)
    assert len(reference.losses) == 20
    assert len(set(reference.losses)) == 20  # each step trains on something else
    code, found = checked(capsys, artifacts)
    assert code == 0
    assert found["runtime"] == str(find_runtime())
    assert found["reference_runtime"] == reference.runtime
    np.testing.assert_allclose(found["losses"], reference.losses, rtol=TOLERANCE)
    assert found["largest_difference"] <= found["tolerance"] == TOLERANCE
    assert 0 < found["median_step_s"] < 10
    assert 10e6 < found["peak_bytes"] < 8e9


def test_other_losses_are_told(artifacts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reference = Reference.load(artifacts)
    *others, last = reference.losses
    for factor, expected in ((1 + 0.9 * TOLERANCE, 0), (1 + 1.2 * TOLERANCE, 1)):
        changed = dataclasses.replace(reference, losses=(*others, last * factor))
        (artifacts / REFERENCE_NAME).write_bytes(changed.to_json())
        code, found = checked(capsys, artifacts)
        assert code == expected
        assert found["is_equal"] == (expected == 0)
    assert main(["check", str(artifacts)]) == 1
    assert "DIFFERENT: 20 local steps differ by at most 1." in capsys.readouterr().out


def test_a_reference_of_another_length_differs(
    artifacts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reference = Reference.load(artifacts)
    shorter = dataclasses.replace(reference, losses=reference.losses[:-1])
    (artifacts / REFERENCE_NAME).write_bytes(shorter.to_json())
    code, found = checked(capsys, artifacts)
    assert code == 1 and not found["is_equal"]


def test_what_a_person_reads(artifacts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(artifacts)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"runtime   {find_runtime()} (engine {find_runtime().engine}), ")
    assert lines[2].startswith("losses    equal: 20 local steps differ by at most ")
    assert "ms (median, batch of 16); memory " in lines[3]


def test_what_cannot_be_checked(artifacts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = "ort" if find_runtime().engine == "ort-training" else "ort-training"
    assert main(["check", str(artifacts), "--engine", other]) == 2
    assert f"error: engine {other} is asked for" in capsys.readouterr().err
    (artifacts / REFERENCE_NAME).write_text('{"losses": []}')
    assert main(["check", str(artifacts)]) == 2
    assert "is unusable: reference.json: field 'hyperparameters'" in capsys.readouterr().err
    (artifacts / REFERENCE_NAME).unlink()
    assert main(["check", str(artifacts)]) == 2
    assert "has no reference.json" in capsys.readouterr().err
    assert main(["check", str(artifacts / "none")]) == 2
    assert "error: no artifacts at" in capsys.readouterr().err


@pytest.mark.parametrize("file", ["head/training_backward.onnx", "fusion/parameters.bin"])
def test_damaged_artifacts(file: str, artifacts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (artifacts / file).open("r+b") as opened:
        opened.seek(-1, 2)
        opened.write(b"\xff")
    assert main(["check", str(artifacts)]) == 2
    assert f"{file} is damaged" in capsys.readouterr().err


def test_the_seed_decides(several_artifacts: Path) -> None:
    """A model with a modality of varying length, one of integers, and several heads."""
    manifest, engine = ModelManifest.load(several_artifacts), OrtEngine(several_artifacts)
    first = take_reference(engine, manifest, several_artifacts, "this one")
    assert take_steps(engine, manifest, several_artifacts, first).losses == first.losses
    again = dataclasses.replace(first, seed=1)
    steps = take_steps(engine, manifest, several_artifacts, again)
    assert steps.difference(first) > 100 * TOLERANCE
    assert len(steps.seconds) == len(steps.losses) == 20


def test_a_reference_is_read_strictly(tmp_path: Path) -> None:
    reference = Reference("runtime 1", 3, 8, Hyperparameters(0.1), (0.5, 0.25))
    (tmp_path / REFERENCE_NAME).write_bytes(reference.to_json())
    assert Reference.load(tmp_path) == reference
    for wrong in (b"[]", b"{", reference.to_json().replace(b'"seed": 3', b'"seed": "3"')):
        (tmp_path / REFERENCE_NAME).write_bytes(wrong)
        with pytest.raises(ModelError, match="is unusable"):
            Reference.load(tmp_path)
