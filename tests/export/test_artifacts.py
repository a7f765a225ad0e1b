"""The artifacts folder: what lies in it, what is refused, and what is left untouched."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from export import BlockModel, export_model
from export.models.har import watch
from petalfl.errors import ModelError
from petalfl.model import MANIFEST_NAME, STATE_NAME, ModelManifest, Task, read_artifact
from petalfl.reference import REFERENCE_NAME
from tests.export.tiny import CLASSES, Lambda, law_errors, small, tiny, vectors_of
from tests.petalfl.torch_models import several

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture
def without_law(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of files and folders alone: the law takes time, and has tests of its own."""
    monkeypatch.setattr("export.artifacts.check_one_step", lambda model, folder: None)


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def linear(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(24, 4), *layers)


# --- what lies in the folder ---


OPTIMIZERS = {"optimizers/sgd.onnx", "optimizers/adamw.onnx"}
TRAINED = ["eval_model.onnx", "training_forward.onnx", "training_backward.onnx", "parameters.bin"]
HEAD = ["eval_model.onnx", "training_backward.onnx", "parameters.bin"]
FROZEN = ["eval_model.onnx", "parameters.bin"]


def test_the_folder_holds_what_the_manifest_lists(watch_artifacts: Path) -> None:
    manifest = ModelManifest.load(watch_artifacts)
    blocks = dict.fromkeys(["encoder-acc", "encoder-gyro", "fusion"], TRAINED) | {"head": HEAD}
    assert [b.name for b in manifest.blocks] == [*blocks]
    assert [b.kind for b in manifest.blocks] == ["encoder", "encoder", "fusion", "head"]
    assert files(watch_artifacts).keys() == OPTIMIZERS | {
        MANIFEST_NAME, REFERENCE_NAME, STATE_NAME,
        *(f"{name}/{kind}" for name in blocks for kind in blocks[name])
    }  # fmt: skip
    assert manifest.modalities.keys() == {"acc", "gyro"}
    assert manifest.modalities["acc"].shape == (3, 100)
    assert [b.inputs for b in manifest.blocks] == [
        ("acc",), ("gyro",), ("encoder-acc", "encoder-gyro"), ("fusion",)
    ]  # fmt: skip
    assert [[(t.name, t.shape) for t in b.outputs] for b in manifest.blocks] == [
        [("encoder-acc", (128,))], [("encoder-gyro", (128,))], [("fusion", (256,))],
        [("head", (7,))],
    ]  # fmt: skip
    assert [b.state_prefix for b in manifest.blocks] == [
        "encoders.acc.", "encoders.gyro.", "fusion.", "head."
    ]  # fmt: skip
    assert manifest.private_blocks == ("fusion", "head")
    assert manifest.missing == "mask"
    task = manifest.heads["head"].task
    assert task is not None and task.loss == "cross_entropy" and len(task.class_names) == 7


def test_the_folder_of_a_model_with_everything(several_artifacts: Path) -> None:
    manifest = ModelManifest.load(several_artifacts)
    heads = ["head-kind", "head-tags", "head-pace"]
    blocks = {"backbone-motion": FROZEN, "projector-motion": TRAINED, "encoder-text": TRAINED,
              "fusion": TRAINED, **dict.fromkeys(heads, HEAD)}  # fmt: skip
    assert [b.name for b in manifest.blocks] == [*blocks]
    assert files(several_artifacts).keys() == OPTIMIZERS | {
        MANIFEST_NAME, REFERENCE_NAME, STATE_NAME,
        *(f"{name}/{kind}" for name in blocks for kind in blocks[name])
    }  # fmt: skip
    assert [b.is_frozen for b in manifest.blocks] == [True, *[False] * 6]
    assert manifest.block("backbone-motion").num_trainable == 0
    assert manifest.block("backbone-motion").size == 5 * 6 + 6 + 2 * 6 + 2 * 6
    fusion = manifest.block("fusion")
    assert [(t.name, t.shape) for t in fusion.statistics] == [
        ("norm.running_mean", (6,)), ("norm.running_var", (6,))
    ]  # fmt: skip
    assert fusion.size == fusion.num_trainable + 12
    assert [b.min_batch for b in manifest.blocks] == [1, 1, 1, 2, 1, 1, 1]
    assert manifest.modalities["text"].shape == (None,)
    assert (manifest.modalities["text"].dtype, manifest.modalities["text"].num_values) == (
        "int64", 11
    )  # fmt: skip
    assert {name: head.task for name, head in manifest.heads.items()} == {
        name: Task(*task)  # type: ignore[arg-type]  # of its own literals
        for name, task in several().tasks.items()
    }
    assert manifest.missing == "zero"


def test_every_artifact_has_its_digest(several_artifacts: Path) -> None:
    manifest = ModelManifest.load(several_artifacts)
    listed = {MANIFEST_NAME, REFERENCE_NAME}
    assert manifest.state is not None
    for artifact in [
        manifest.state,
        *manifest.optimizers.values(),
        *(a for b in manifest.blocks for a in (*b.artifacts.graphs, b.artifacts.parameters)),
    ]:
        data = (several_artifacts / artifact.path).read_bytes()
        assert hashlib.sha256(data).hexdigest() == artifact.sha256
        assert len(data) == artifact.num_bytes
        listed.add(artifact.path)
    assert files(several_artifacts).keys() == listed


def test_the_manifest_is_that_which_is_returned(tmp_path: Path) -> None:
    returned = export_model(small(), tmp_path / "out", source="tests.export.tiny:small")
    assert returned == ModelManifest.load(tmp_path / "out")
    assert returned.source == "tests.export.tiny:small"


def test_the_dropouts_are_listed_with_shape_and_rate(watch_artifacts: Path) -> None:
    manifest = ModelManifest.load(watch_artifacts)
    dropouts = {b.name: [(d.name, d.shape, d.rate) for d in b.dropouts] for b in manifest.blocks}
    assert dropouts["encoder-acc"] == [
        ("mask.0", (32, 50), 0.1), ("mask.1", (64, 25), 0.1), ("mask.2", (128, 12), 0.1)
    ]  # fmt: skip
    assert dropouts["head"] == [("mask.0", (64,), 0.1)]
    assert dropouts["fusion"] == []


@pytest.mark.parametrize(
    ("artifacts", "build"), [("watch_artifacts", watch), ("several_artifacts", several)]
)
def test_the_initial_values_are_the_parameters_in_order(
    artifacts: str, build: Callable[[], BlockModel], request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(artifacts)
    manifest, model = ModelManifest.load(folder), build()
    vectors = vectors_of(model)
    for spec in model.blocks():
        block = manifest.block(spec.name)
        assert [(p.name, p.shape) for p in block.parameters] == [
            (name, tuple(p.shape)) for name, p in spec.module.named_parameters()
        ]
        data = np.frombuffer(read_artifact(folder, block.artifacts.parameters), "<f4")
        np.testing.assert_array_equal(data, vectors[spec.name])


def test_the_graphs_are_plain_onnx(several_artifacts: Path) -> None:
    paths = [*several_artifacts.rglob("*.onnx")]
    assert len(paths) == len(OPTIMIZERS) + 1 + 3 * 3 + 3 * 2
    for path in paths:
        model = onnx.load(path)
        assert model.ir_version == 8
        assert [(o.domain, o.version) for o in model.opset_import] == [("", 17)]


def test_the_format_of_onnx_runtime(tmp_path: Path) -> None:
    manifest = export_model(small(), tmp_path / "out", file_format="ort")
    graphs = [path for path in files(tmp_path / "out") if path.endswith((".ort", ".onnx"))]
    assert len(graphs) == 2 + 3 * 3 + 2 and all(path.endswith(".ort") for path in graphs)
    assert manifest.optimizers["sgd"].path == "optimizers/sgd.ort"
    assert law_errors(small(), tmp_path / "out", ("a", "b"), 4) == {}


# --- the same every time ---


EXPORT = """
import sys
from pathlib import Path
from export import export_model
from tests.petalfl.torch_models import several
export_model(several(), Path(sys.argv[1]))
"""


def test_another_process_gives_the_same_bytes(several_artifacts: Path, tmp_path: Path) -> None:
    """Also with another order of its sets."""
    environment = {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "12345"}
    subprocess.run(
        [sys.executable, "-c", EXPORT, str(tmp_path / "out")], check=True, cwd=tmp_path,
        env={**os.environ, **environment},
    )  # fmt: skip
    assert files(tmp_path / "out") == files(several_artifacts)


@pytest.mark.usefixtures("without_law")
def test_other_values_change_the_values_alone(tmp_path: Path) -> None:
    export_model(small(), tmp_path / "one")
    model = small()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    export_model(model, tmp_path / "two")
    one, two = files(tmp_path / "one"), files(tmp_path / "two")
    assert one.keys() == two.keys()
    assert {name for name in one if one[name] != two[name]} == {
        MANIFEST_NAME, REFERENCE_NAME,
        *(name for name in one if name.endswith("parameters.bin"))
    }  # fmt: skip


# --- the model is left as it was ---


def snapshot(model: BlockModel) -> dict[str, Any]:
    return {
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "gradients": {n: None if p.grad is None else p.grad.clone()
                      for n, p in model.named_parameters()},
        "modes": {name: module.training for name, module in model.named_modules()},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "attributes": {name: {*vars(module)} for name, module in model.named_modules()},
        "examples": {name: x.clone() for name, x in model.examples.items()},
        "torch": [torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_rng_state()],
    }  # fmt: skip


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


def mixed_modes(model: BlockModel) -> BlockModel:
    model.encoders["text"].eval()
    return model


@pytest.mark.parametrize("set_mode", [BlockModel.train, BlockModel.eval, mixed_modes])
def test_the_model_is_left_as_it_was(
    set_mode: Callable[[BlockModel], BlockModel], tmp_path: Path, several_artifacts: Path
) -> None:
    model = several()
    model.fusion.projection.weight.grad = torch.ones(6, 8)  # type: ignore[union-attr]
    set_mode(model)
    before = snapshot(model)
    export_model(model, tmp_path / "out")
    after = snapshot(model)
    for what, value in before.items():
        assert equal(value, after[what]), what
    assert files(tmp_path / "out") == files(several_artifacts), "the mode makes no difference"


def test_a_refused_model_is_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(model: BlockModel, folder: Path) -> None:
        raise ModelError("no")

    monkeypatch.setattr("export.artifacts.check_one_step", refuse)
    model = several().eval()
    before = snapshot(model)
    with pytest.raises(ModelError, match=r"^no$"):
        export_model(model, tmp_path / "out")
    assert all(equal(value, snapshot(model)[what]) for what, value in before.items())
    assert not list(tmp_path.iterdir())


def test_the_exported_values_are_those_at_the_time(tmp_path: Path) -> None:
    model = small()
    manifest = export_model(model, tmp_path / "out")
    expected = vectors_of(copy.deepcopy(model))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    for block in manifest.blocks:
        data = np.frombuffer(read_artifact(tmp_path / "out", block.artifacts.parameters), "<f4")
        np.testing.assert_array_equal(data, expected[block.name])


# --- folders ---


@pytest.mark.usefixtures("without_law")
def test_the_progress_names_every_block(tmp_path: Path) -> None:
    steps: list[str] = []
    export_model(small(), tmp_path / "out", steps.append)
    assert steps == ["encoder-a", "encoder-b", "fusion", "head", "one-step law", "reference steps"]


@pytest.mark.usefixtures("without_law")
def test_an_artifacts_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_model(small(), out)
    model = tiny(linear(), name="second")
    assert export_model(model, out) == ModelManifest.load(out)
    assert ModelManifest.load(out).name == "second"
    assert {p.name for p in out.iterdir()} == {
        MANIFEST_NAME, REFERENCE_NAME, STATE_NAME, "encoder-a", "encoder-b", "fusion", "head",
        "optimizers",
    }  # fmt: skip
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.usefixtures("without_law")
def test_artifacts_of_another_version_are_replaced(tmp_path: Path) -> None:
    (tmp_path / MANIFEST_NAME).write_text(json.dumps({"format_version": 1, "modalities": {}}))
    (tmp_path / "tail").mkdir()
    (tmp_path / "tail" / "training_model.onnx").write_text("of version 1")
    export_model(small(), tmp_path)
    assert "tail/training_model.onnx" not in files(tmp_path)


@pytest.mark.usefixtures("without_law")
@pytest.mark.parametrize("path", ["notes.txt", "head/thesis.tex", "deep/er/manifest.json"])
def test_artifacts_with_a_file_of_somebody_else_are_not_replaced(path: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_model(small(), out)
    (out / path).parent.mkdir(parents=True, exist_ok=True)
    (out / path).write_text("years of work")
    before = files(tmp_path)
    with pytest.raises(ModelError, match=path):
        export_model(small(), out)
    assert files(tmp_path) == before


def noisy() -> BlockModel:
    noise = Lambda(lambda m, x: m.out(x.flatten(1)) + torch.randn(4), out=nn.Linear(24, 4))
    return tiny(noise)


@pytest.mark.usefixtures("without_law")
def test_a_refused_model_leaves_the_old_artifacts(tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_model(small(), out)
    before = files(tmp_path)
    with pytest.raises(ModelError, match="block encoder-a: randn draws random numbers"):
        export_model(noisy(), out)
    assert files(tmp_path) == before


def test_an_interrupted_export_leaves_the_old_artifacts(
    tmp_path: Path, small_artifacts: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / MANIFEST_NAME).write_bytes((small_artifacts / MANIFEST_NAME).read_bytes())

    def interrupt(step: str) -> None:
        if step == "head":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_model(small(), out, interrupt)
    assert files(tmp_path).keys() == {f"out/{MANIFEST_NAME}"}


@pytest.mark.usefixtures("without_law")
def test_an_empty_folder_and_missing_parents_will_do(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    export_model(small(), tmp_path / "empty")
    export_model(small(), tmp_path / "new" / "deep" / "out")
    assert files(tmp_path / "empty") == files(tmp_path / "new" / "deep" / "out")


@pytest.mark.usefixtures("without_law")
def test_a_folder_that_holds_something_else_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    (tmp_path / "file").write_text("a file")
    before = files(tmp_path)
    for name in ("thesis", "file"):
        with pytest.raises(ModelError, match=f"{name} holds something that is no artifacts folder"):
            export_model(small(), tmp_path / name)
    assert files(tmp_path) == before


@pytest.mark.parametrize("manifest", ['{"manifest_version": 3}', "[]", "{", '"format_version"'])
def test_a_folder_with_a_foreign_manifest_is_not_touched(manifest: str, tmp_path: Path) -> None:
    """Browser extensions and web apps have a manifest.json, too."""
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / MANIFEST_NAME).write_text(manifest)
    (tmp_path / "app" / "source.js").write_text("years of work")
    before = files(tmp_path)
    with pytest.raises(ModelError, match="holds something that is no artifacts folder"):
        export_model(small(), tmp_path / "app")
    assert files(tmp_path) == before


@pytest.mark.usefixtures("without_law")
def test_the_current_folder_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    export_model(small(), Path())
    heads = ModelManifest.load(tmp_path / "out").heads
    assert heads["head"].task == Task("cross_entropy", 1.0, CLASSES)


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file")
    with pytest.raises(ModelError, match=r"cannot write to .*file"):
        export_model(small(), tmp_path / "file" / "out")
    assert files(tmp_path) == {"file": b"a file"}


@pytest.mark.usefixtures("without_law")
def test_others_may_read_the_folder(tmp_path: Path) -> None:
    """`tempfile.mkdtemp` would keep it to its owner."""
    export_model(small(), tmp_path / "out")
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755


# Other runtimes


def test_another_runtime_takes_the_reference_steps(tmp_path: Path) -> None:
    seen: list[str] = []
    export_model(small(), tmp_path / "a", seen.append, check_with=[Path(sys.executable)])
    assert seen[-2:] == ["reference steps", f"reference steps with {sys.executable}"]


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("exit 3", "do not run with .*: exit code 3"),
        ("echo 'error: no onnxruntime' >&2; exit 2", "do not run with .*: error: no onnxruntime"),
        (
            'echo \'{"is_equal": false, "runtime": "onnxruntime 9", "largest_difference": 0.5, '
            '"num_steps": 20, "tolerance": 0.0001, "reference_runtime": "onnxruntime 8"}\'; exit 1',
            r"on onnxruntime 9 \(.*\) the losses of 20 local steps differ by 5\.0e-01",
        ),
        (None, "cannot run .*: No such file"),
    ],
)
def test_another_runtime_that_differs(script: str | None, message: str, tmp_path: Path) -> None:
    python = tmp_path / "python"
    if script is not None:
        python.write_text(f"#!/bin/sh\n{script}\n")
        python.chmod(0o755)
    with pytest.raises(ModelError, match=message):
        export_model(small(), tmp_path / "a", check_with=[python])
    assert not (tmp_path / "a").exists()  # and nothing else is left
    assert [path for path in tmp_path.iterdir() if path != python] == []
