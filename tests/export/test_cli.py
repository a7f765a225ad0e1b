from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from export import BlockModel
from export.__main__ import main
from export.weights import Weights
from petalfl.model import ModelManifest
from tests.export.tiny import small, tiny

ROOT = Path(__file__).parents[2]
SMALL = "tests.export.tiny:small"
HERE = "tests.export.test_cli"


def number() -> int:
    return 3


def refused() -> BlockModel:
    norm = nn.BatchNorm1d(3, momentum=None)
    return tiny(nn.Sequential(norm, nn.Flatten(), nn.Linear(24, 4)))


def raising() -> BlockModel:
    raise ZeroDivisionError("of the user's\nown")


def talkative() -> BlockModel:
    print("building …")
    subprocess.run(["echo", "from a child"], check=True)
    return small()


def wider() -> BlockModel:
    return tiny(nn.Sequential(nn.Flatten(), nn.Linear(24, 4)))


def reseeded() -> BlockModel:
    """Of other initial values than `small`."""
    model = small()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape))
    return model


def deviant() -> BlockModel:
    """What `small` might become by an edit: it has the same parameters."""
    model = small()
    encoder = model.encoders["a"]
    assert isinstance(encoder, nn.Sequential)
    encoder[1] = nn.ReLU()
    return model


@pytest.fixture(autouse=True)
def _isolated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", sys.path[:])  # main looks in the current folder
    # The law takes seconds, and has tests of its own.
    monkeypatch.setattr("export.artifacts.check_one_step", lambda model, folder: None)
    torch.manual_seed(0)


def test_as_a_command(small_artifacts: Path, tmp_path: Path) -> None:
    """And the bytes do not depend on the process or on its hash seed."""
    result = subprocess.run(
        [sys.executable, "-m", "export", SMALL, "--out", tmp_path / "out"],
        cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": "7"}, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        "block      kind     parameters  default",
        "encoder-a  encoder          24  shared",
        "encoder-b  encoder          97  shared",
        "fusion     fusion           78  private",
        "head       head             83  private",
        "total                      282",
        f"written to {tmp_path / 'out'}; serve it with: "
        f"python -m server --artifacts {tmp_path / 'out'}",
    ]
    for path in small_artifacts.rglob("*.*"):
        data = (tmp_path / "out" / path.relative_to(small_artifacts)).read_bytes()
        if path.name == "manifest.json":
            data = data.replace(SMALL.encode(), b"")
        assert data == path.read_bytes(), path


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
    for option in ("MODULE:FACTORY", "--out DIR", "--format {onnx,ort}", "--json"):
        assert option in text
    for form in FORMS:
        assert f"\n  {form} " in text


FORMS = {
    "inspect": "python -m export inspect artifacts",
    "verify": "python -m export verify artifacts --model my_model:build --batches 10",
    "merge": "--weights http://host:8080 --token TOKEN",
    "warm": "python -m export warm --artifacts artifacts --weights petalfl-data --out warm",
    "schema": "python -m export schema > manifest.schema.json",
}


@pytest.mark.parametrize("form", FORMS)
def test_help_of_every_form(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([form, "--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: python -m export {form}" in text
    assert FORMS[form] in text and "--json" in text


WRONG: dict[str, list[str]] = {
    "the following arguments are required: MODULE:FACTORY, --out": [],
    "required: --out": [SMALL],
    "required: MODULE:FACTORY": ["--out", "x"],
    "unrecognized arguments: y": [SMALL, "--out", "x", "y"],
    "invalid choice: 'tflite'": [SMALL, "--out", "x", "--format", "tflite"],
    "required: DIR": ["inspect"],
    "--batches: found '0', expected a number from 1": ["verify", "x", "--batches", "0"],
    "--seed: found '-1', expected a number from 0": ["verify", "x", "--seed=-1"],
    "required: --artifacts, --to": ["merge"],
    "required: --artifacts, --out, --weights": ["warm"],
    "unrecognized arguments: x": ["schema", "x"],
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments(message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(WRONG[message])
    assert exit_.value.code == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ") and message in line and line.endswith("--help")
    assert captured.out == ""


BAD_FACTORIES = {
    "no_colon": "found 'no_colon', expected MODULE:FACTORY",
    "": "found '', expected MODULE:FACTORY",
    ":build": "expected MODULE:FACTORY",
    "tests.export.tiny:": "expected MODULE:FACTORY",
    "no_such_module:build": "cannot find no_such_module:build: No module named 'no_such_module'",
    "tests.export.tiny:nothing": "has no attribute 'nothing'",
    "tests.export.test_cli:number": "returned int, expected export.BlockModel",
    "tests.export.test_cli:HERE": "test_cli:HERE fails: TypeError(",
    "tests.export.test_cli:raising": 'raising fails: ZeroDivisionError("of the user',
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
    assert line.startswith("error: block encoder-a: layer 0 (BatchNorm1d) has momentum=None")
    assert not list(tmp_path.iterdir())


def test_a_module_in_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my_model_here.py").write_text("from tests.export.tiny import small as build\n")
    monkeypatch.chdir(tmp_path)
    assert main(["my_model_here:build", "--out", "out"]) == 0
    assert ModelManifest.load(tmp_path / "out").name == "small"
    del sys.modules["my_model_here"]


def test_a_module_that_cannot_be_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my_broken_model.py").write_text("x = 1\ny = no_such_name\n")
    monkeypatch.chdir(tmp_path)
    assert main(["my_broken_model:build", "--out", "out"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: importing my_broken_model fails: NameError(")
    assert line.endswith("my_broken_model.py, line 2)")


def test_stdout_is_for_the_result_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([f"{HERE}:talkative", "--out", str(tmp_path / "out"), "--json"]) == 0
    captured = capfd.readouterr()
    assert json.loads(captured.out)["name"] == "small"
    assert "building …" in captured.err and "from a child" in captured.err


def test_a_relative_module(tmp_path: Path) -> None:
    assert main([".tiny:small", "--out", str(tmp_path / "out")]) == 2


def test_an_out_that_cannot_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main([SMALL, "--out", str(tmp_path / "file" / "out")]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")


def test_the_source_and_the_format_are_noted(tmp_path: Path) -> None:
    assert main([SMALL, "--out", str(tmp_path / "out"), "--format", "ort"]) == 0
    manifest = ModelManifest.load(tmp_path / "out")
    assert manifest.source == SMALL
    assert {Path(a.path).suffix for b in manifest.blocks for a in b.artifacts.graphs} == {".ort"}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert main([SMALL, "--out", str(tmp_path / "out")]) == 0
    text = terminal.getvalue()
    assert "█░" in text and "\n" not in text
    for block in ("encoder-a", "encoder-b", "fusion", "head"):
        assert f" {block}\r" in text
    assert text.endswith("\r\033[K")  # and nothing of it stays


# --- inspect ---


def test_inspect(small_artifacts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(small_artifacts)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("small: ") and lines[0].endswith(" as onnx, all files intact")
    assert lines[2].split() == ["block", "kind", "modality", "parameters", "files",
                                "activations", "FLOPs", "default", "loss"]  # fmt: skip
    rows = {line.split()[0]: line.split() for line in lines[3:8]}
    assert rows["encoder-a"][1:4] == ["encoder", "a", "24"]
    assert rows["encoder-a"][-1] == "shared"
    assert rows["head"][-2:] == ["private", "cross_entropy"]
    assert rows["total"][1] == "282"
    both = next(line for line in lines if line.startswith("a, b "))
    assert both.endswith("  484 B     484 B  encoder-a, encoder-b, fusion, head")


def test_inspect_as_json(small_artifacts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(small_artifacts), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [block["name"] for block in found["blocks"]] == [
        "encoder-a", "encoder-b", "fusion", "head"
    ]  # fmt: skip
    assert found["total"]["parameters"] == 282
    assert [device["modalities"] for device in found["devices"]] == [["a"], ["b"], ["a", "b"]]
    assert found["devices"][2]["upload_bytes"] == 4 * (24 + 97)


@pytest.mark.parametrize("form", ["inspect", "verify"])
def test_no_artifacts(form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([form, str(tmp_path / "nowhere")]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: no artifacts at ")
    assert len(captured.err.splitlines()) == 1


@pytest.mark.parametrize("form", ["inspect", "verify"])
def test_a_swapped_file(
    form: str, small_artifacts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(small_artifacts, folder)
    shutil.copy(folder / "head" / "parameters.bin", folder / "fusion" / "parameters.bin")
    extra = ["--model", SMALL] if form == "verify" else []
    assert main([form, str(folder), *extra]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: artifact fusion/parameters.bin is damaged or was swap")


# --- verify ---


def test_verify_whatever_the_seed(
    small_artifacts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["verify", str(small_artifacts), "--model", f"{HERE}:reseeded", "--batches", "1"]
    assert main(arguments) == 0
    captured = capsys.readouterr()
    lines = [line.split() for line in captured.out.splitlines()]
    assert lines[0] == ["block", "worst", "error", "in"]
    assert [line[0] for line in lines[1:6]] == ["(all)", "encoder-a", "encoder-b", "fusion", "head"]
    for _, error, verdict, *what in lines[1:6]:
        assert float(error) < 1e-5 and verdict == "ok" and what
    assert captured.err == "  batch 9/9\n"


def test_verify_names_the_block_that_differs(
    small_artifacts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["verify", str(small_artifacts), "--model", f"{HERE}:deviant", "--batches", "1"]
    assert main([*arguments, "--json"]) == 1
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert not found["is_exact"] and found["tolerance"] == 1e-5
    assert not found["blocks"]["encoder-a"]["is_exact"]
    assert found["blocks"]["encoder-a"]["error"] > 1e-2
    assert found["blocks"]["encoder-b"]["what"]
    assert "failed: block encoder-a: its " in captured.err
    assert main(arguments) == 1
    assert "FAILED" in capsys.readouterr().out


def test_verify_takes_the_model_from_the_manifest(
    small_artifacts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(small_artifacts)]) == 2  # exported without a source
    assert "give it with --model MODULE:FACTORY" in capsys.readouterr().err
    shutil.copytree(small_artifacts, tmp_path / "copy")
    path = tmp_path / "copy" / "manifest.json"
    path.write_text(path.read_text().replace('"source": ""', f'"source": "{SMALL}"'))
    assert main(["verify", str(tmp_path / "copy"), "--batches", "1", "--seed", "7"]) == 0


MISFITS = {
    f"{HERE}:wider": "block encoder-a: the model's 1.weight is (4, 24), the artifacts' is missing",
    f"{HERE}:number": "returned int",
    "export.models.har:watch": "the model has blocks encoder-acc, encoder-gyro, fusion, head, the "
    "artifacts encoder-a, ",
}


@pytest.mark.parametrize("factory", MISFITS)
def test_verify_with_another_model(
    factory: str, small_artifacts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(small_artifacts), "--model", factory]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert captured.out == "" and line.startswith("error: ") and MISFITS[factory] in line


# --- merge ---


def test_merge(small_artifacts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    to = tmp_path / "model.pt"
    assert main(["merge", "--artifacts", str(small_artifacts), "--to", str(to)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "block      values  from",
        "encoder-a      24  artifacts",
        "encoder-b      97  artifacts",
        "fusion         78  artifacts",
        "head           83  artifacts",
        f"written to {to}",
    ]
    model = reseeded()
    model.load_state_dict(torch.load(to), strict=True)
    for found, expected in zip(model.parameters(), small().parameters(), strict=True):
        assert torch.equal(found, expected)


def test_merge_to_onnx_as_json(
    small_artifacts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    to = tmp_path / "model.onnx"
    arguments = ["merge", "--artifacts", str(small_artifacts), "--to", str(to), "--json"]
    assert main([*arguments, "--modalities", "b, a"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {"to": str(to), "blocks": dict.fromkeys(
        ["encoder-a", "encoder-b", "fusion", "head"], "artifacts"
    )}  # fmt: skip
    assert [value.name for value in onnx.load(to).graph.input] == ["a", "b"]


def test_merge_hands_everything_on(
    small_artifacts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def server_weights(url: str, manifest: ModelManifest, **options: Any) -> dict[str, Weights]:
        asked.update(options, url=url)
        options["progress"](2, 2)
        return {"fusion": Weights(np.zeros(78, np.float32), "server, version 4")}

    monkeypatch.setattr("export.weights.server_weights", server_weights)
    files = ["--artifacts", str(small_artifacts), "--to", str(tmp_path / "model.pt")]
    server = ["--weights", "https://host", "--token", "secret", "--federation", "hall"]
    assert main(["merge", *files, *server]) == 0
    del asked["progress"]
    assert asked == {"url": "https://host", "token": "secret", "federation": "hall"}
    assert not torch.load(tmp_path / "model.pt")["fusion.attention.weight"].any()
    asked.clear()
    out = tmp_path / "warm"
    assert main(["warm", "--artifacts", str(small_artifacts), "--out", str(out), *server]) == 0
    assert asked.keys() == {"url", "token", "federation", "progress"}
    assert not np.frombuffer((out / "fusion" / "parameters.bin").read_bytes(), np.uint8).any()


BAD_MERGES = {
    "found 'model.txt', expected a file that ends in": ["--to", "model.txt"],
    "no weights at nowhere": ["--to", "model.pt", "--weights", "nowhere"],
    "no petalfl server answers at http://127.0.0.1:9": [
        "--to", "model.pt", "--weights", "http://127.0.0.1:9", "--token", "x"
    ],
    "nowhere is no device store": ["--to", "model.pt", "--private", "nowhere"],
    "found modality 'c', the model has a, b": ["--to", "model.onnx", "--modalities", "a,c"],
    "found no modality": ["--to", "model.onnx", "--modalities", ","],
    "cannot write nowhere/model.pt": ["--to", "nowhere/model.pt"],
}  # fmt: skip


@pytest.mark.parametrize("message", BAD_MERGES)
def test_a_bad_merge(
    message: str,
    small_artifacts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["merge", "--artifacts", str(small_artifacts), *BAD_MERGES[message]]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert captured.out == "" and line.startswith(f"error: {message}")
    assert not list(tmp_path.iterdir())


# --- schema ---


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_schema(more: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema", *more]) == 0
    assert capsys.readouterr().out == (ROOT / "docs" / "manifest.schema.json").read_text()
