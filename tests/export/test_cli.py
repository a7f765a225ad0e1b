from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from export import BlockModel
from export.__main__ import main
from petalfl.model import ModelManifest
from tests.export.tiny import Lambda, tiny

ROOT = Path(__file__).parents[2]
SMALL = "tests.export.tiny:small"


def number() -> int:
    return 3


def refused() -> BlockModel:
    return tiny(nn.Sequential(nn.BatchNorm1d(3), nn.Flatten(), nn.Linear(24, 4)))


def recurrent() -> BlockModel:
    """PyTorch's exporter itself gives up on this one."""
    cell = nn.GRU(3, 4, num_layers=2, dropout=0.1, batch_first=True)
    return tiny(Lambda(lambda m, x: m.cell(x.transpose(1, 2))[0].mean(1), cell=cell))


@pytest.fixture(autouse=True)
def _isolated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", sys.path[:])  # main looks in the current folder
    # The law takes seconds, and has tests of its own.
    monkeypatch.setattr("export.artifacts.check_one_step", lambda model, folder: None)
    torch.manual_seed(0)


def test_as_a_command(watch_artifacts: Path, tmp_path: Path) -> None:
    """And the bytes do not depend on the process or on its hash seed."""
    result = subprocess.run(
        [sys.executable, "-m", "export", "export.models.har:watch", "--out", tmp_path / "out"],
        cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": "7"}, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        "block               kind        parameters  default",
        "encoder-acc         encoder        150,976  shared",
        "encoder-gyro        encoder        150,976  shared",
        "fusion              fusion          66,562  private",
        "head                head            16,903  private",
        "total                              385,417",
        f"written to {tmp_path / 'out'}; serve it with: "
        f"python -m server --artifacts {tmp_path / 'out'}",
    ]
    for path in watch_artifacts.rglob("*.*"):
        assert (tmp_path / "out" / path.relative_to(watch_artifacts)).read_bytes() == (
            path.read_bytes()
        )


def test_json_prints_the_manifest_and_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([SMALL, "--out", str(tmp_path / "out"), "--json"]) == 0
    printed = capsys.readouterr().out
    assert json.loads(printed) == json.loads((tmp_path / "out" / "manifest.json").read_bytes())
    assert ModelManifest.from_json(printed.encode()) == ModelManifest.load(tmp_path / "out")


def test_the_progress_goes_to_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([SMALL, "--out", str(tmp_path / "out")]) == 0
    captured = capsys.readouterr()
    for block in ("encoder-a", "encoder-b", "fusion", "head"):
        assert f"  {block} …" in captured.err.splitlines()
    assert "…" not in captured.out


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    assert "usage: python -m export" in text
    assert "python -m export export.models.har:watch --out artifacts" in text
    for option in ("MODULE:FACTORY", "--out DIR", "--json"):
        assert option in text


@pytest.mark.parametrize("arguments", [[], [SMALL], ["--out", "x"], [SMALL, "--out", "x", "y"]])
def test_wrong_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert "error: " in capsys.readouterr().err


BAD_FACTORIES = {
    "no_colon": "found 'no_colon', expected MODULE:FACTORY",
    "": "found '', expected MODULE:FACTORY",
    ":build": "expected MODULE:FACTORY",
    "tests.export.tiny:": "expected MODULE:FACTORY",
    "no_such_module:build": "cannot find no_such_module:build: No module named 'no_such_module'",
    "tests.export.tiny:nothing": "has no attribute 'nothing'",
    "tests.export.test_cli:number": "returned int, expected export.BlockModel",
}


@pytest.mark.parametrize("factory", BAD_FACTORIES)
def test_a_bad_factory(factory: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([factory, "--out", str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ")
    assert BAD_FACTORIES[factory] in line
    assert not list(tmp_path.iterdir())


def test_a_refused_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tests.export.test_cli:refused", "--out", str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines()[0] == "  encoder-a …"
    (line,) = captured.err.splitlines()[1:]
    assert line.startswith("error: block encoder-a: layer 0 (BatchNorm1d)")
    assert not list(tmp_path.iterdir())


def test_a_module_in_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my_model_here.py").write_text("from tests.export.tiny import small as build\n")
    monkeypatch.chdir(tmp_path)
    assert main(["my_model_here:build", "--out", "out"]) == 0
    assert ModelManifest.load(tmp_path / "out").name == "small"
    del sys.modules["my_model_here"]


def test_stdout_is_clean_when_pytorch_gives_up(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["tests.export.test_cli:recurrent", "--out", str(tmp_path / "out"), "--json"]) == 2
    assert capfd.readouterr().out == ""


def test_a_relative_module(tmp_path: Path) -> None:
    assert main([".tiny:small", "--out", str(tmp_path / "out")]) == 2


def test_an_out_that_cannot_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main([SMALL, "--out", str(tmp_path / "file" / "out")]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")
