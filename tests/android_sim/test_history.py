from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from examples.android_sim.history import RunFolder, Settings
from petalfl import PetalError

SETTINGS = Settings(4, "incomplete", "phf", 3, 0, 0.05, 0.5, "f32", "")


def test_history_is_by_round_and_device(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run", SETTINGS)
    folder.record("b", 1, {"accuracy": 0.5, "macro_f1": 0.4, "num_examples": 7})
    folder.record("a", 0, {"accuracy": 0.2, "macro_f1": 0.1, "num_examples": 7})
    folder.record("a", 0, {"accuracy": 0.3, "macro_f1": 0.2, "num_examples": 7})
    assert folder.history() == {
        0: {"a": {"accuracy": 0.3, "macro_f1": 0.2}},
        1: {"b": {"accuracy": 0.5, "macro_f1": 0.4}},
    }


def test_an_unfinished_run_is_gone_on_with(tmp_path: Path) -> None:
    first = RunFolder(tmp_path, SETTINGS)
    assert not first.is_resumed
    first.record("a", 0, {"accuracy": 0.2, "macro_f1": 0.1})
    second = RunFolder(tmp_path, SETTINGS)
    assert second.is_resumed
    assert second.history() == first.history() != {}


@pytest.mark.parametrize("is_fresh", [False, True])
def test_a_run_that_is_over_or_unwanted_is_replaced(tmp_path: Path, is_fresh: bool) -> None:
    first = RunFolder(tmp_path, SETTINGS)
    first.record("a", 0, {"accuracy": 0.2, "macro_f1": 0.1})
    (tmp_path / "server").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    if not is_fresh:
        first.finish()
    second = RunFolder(tmp_path, SETTINGS, is_fresh)
    assert not second.is_resumed
    assert second.history() == {}
    assert not (tmp_path / "server").exists()
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_other_settings_are_refused(tmp_path: Path) -> None:
    RunFolder(tmp_path, SETTINGS)
    with pytest.raises(PetalError, match=r"rounds 3, now 9.*--fresh"):
        RunFolder(tmp_path, dataclasses.replace(SETTINGS, rounds=9))


def test_a_folder_of_somebody_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"mine")
    with pytest.raises(PetalError, match="no run folder"):
        RunFolder(tmp_path, SETTINGS, is_fresh=True)
    assert [p.name for p in tmp_path.iterdir()] == ["photo.jpg"]
