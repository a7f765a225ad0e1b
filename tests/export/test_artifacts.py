from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from export import BlockModel, export_model
from export.models.har import watch
from petalfl.errors import ModelError
from petalfl.model import MANIFEST_NAME, ModelManifest, read_artifact
from tests.export.tiny import CLASSES, Lambda, SumFusion, blocks_of, small, tiny


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture
def without_law(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of files and folders alone: the law takes seconds, and has tests of its own."""
    monkeypatch.setattr("export.artifacts.check_one_step", lambda model, folder: None)


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def linear(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(24, 4), *layers)


def test_the_folder_holds_what_the_manifest_lists(watch_artifacts: Path) -> None:
    manifest = ModelManifest.load(watch_artifacts)
    names = ["encoder-acc", "encoder-gyro", "fusion", "head"]
    kinds = ["training_model.onnx", "eval_model.onnx", "parameters.bin"]
    assert [b.name for b in manifest.blocks] == names
    assert [b.kind for b in manifest.blocks] == ["encoder", "encoder", "fusion", "head"]
    assert files(watch_artifacts).keys() == {
        MANIFEST_NAME,
        *(f"{n}/{k}" for n in names for k in kinds),
    }
    assert manifest.modalities.keys() == {"acc", "gyro"}
    assert manifest.modalities["acc"].shape == (3, 100)
    assert [b.inputs for b in manifest.blocks] == [
        ("acc",), ("gyro",), ("encoder-acc", "encoder-gyro"), ("fusion",)
    ]  # fmt: skip
    assert [b.output_shape for b in manifest.blocks] == [(128,), (128,), (256,), (7,)]
    assert manifest.private_blocks == ("fusion", "head")
    assert manifest.num_classes == len(manifest.class_names) == 7


def test_the_dropouts_are_listed_with_shape_and_rate(watch_artifacts: Path) -> None:
    manifest = ModelManifest.load(watch_artifacts)
    encoder, head = manifest.block("encoder-acc"), manifest.block("head")
    assert [(d.shape, d.rate) for d in encoder.dropouts] == [
        ((32, 50), 0.1), ((64, 25), 0.1), ((128, 12), 0.1)
    ]  # fmt: skip
    assert [(d.shape, d.rate) for d in head.dropouts] == [((64,), 0.1)]
    assert manifest.block("fusion").dropouts == ()


def test_the_initial_values_are_the_parameters_in_order(watch_artifacts: Path) -> None:
    manifest = ModelManifest.load(watch_artifacts)
    for name, module in blocks_of(watch(), ("acc", "gyro")).items():
        block = manifest.block(name)
        assert [(p.name, p.shape) for p in block.parameters] == [
            (n, tuple(p.shape)) for n, p in module.named_parameters()
        ]
        data = np.frombuffer(read_artifact(watch_artifacts, block.artifacts.parameters), "<f4")
        expected = np.concatenate([p.detach().numpy().ravel() for p in module.parameters()])
        np.testing.assert_array_equal(data, expected)


def test_the_graphs_load_in_onnxruntime_training_1_19(watch_artifacts: Path) -> None:
    """Which knows ONNX IR 10 and opset 21 at most."""
    for path in watch_artifacts.rglob("*.onnx"):
        model = onnx.load(path)
        assert model.ir_version <= 10
        assert {o.domain: o.version for o in model.opset_import}[""] <= 21


@pytest.mark.usefixtures("without_law")
def test_the_same_model_gives_the_same_bytes(watch_artifacts: Path, tmp_path: Path) -> None:
    export_model(watch(), tmp_path / "again")
    assert files(tmp_path / "again") == files(watch_artifacts)
    export_model(watch(seed=1), tmp_path / "other")
    other, same = files(tmp_path / "other"), files(watch_artifacts)
    assert {name for name in same if same[name] != other[name]} == {
        MANIFEST_NAME, *(name for name in same if name.endswith("parameters.bin"))
    }  # fmt: skip


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    model = small().eval()
    before = copy.deepcopy(model.state_dict())
    export_model(model, tmp_path / "out")
    assert not model.training
    assert all(not module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)


@pytest.mark.usefixtures("without_law")
def test_the_progress_names_every_block(tmp_path: Path) -> None:
    steps: list[str] = []
    export_model(small(), tmp_path / "out", steps.append)
    assert steps[:4] == ["encoder-a", "encoder-b", "fusion", "head"]


def shared() -> BlockModel:
    encoder = nn.Linear(5, 4)
    examples = {"a": torch.randn(2, 5), "b": torch.randn(2, 5)}
    return tiny(encoder, encoders={"a": encoder, "b": encoder}, examples=examples)


def unused() -> BlockModel:
    return tiny(Lambda(lambda m, x: m.one(x.flatten(1)), one=nn.Linear(24, 4), two=nn.Linear(3, 2)))


def dropped_twice() -> nn.Module:
    return Lambda(
        lambda m, x: m.drop(m.out(m.drop(x).flatten(1))), drop=nn.Dropout(0.3), out=nn.Linear(24, 4)
    )


def functional_dropout(m: Any, x: torch.Tensor) -> torch.Tensor:
    return nn.functional.dropout(m.out(x.flatten(1)), 0.3)


# What cannot be exported: how to build it, and what the message must name.
REFUSED: dict[str, tuple[Callable[[], BlockModel], str]] = {
    "batch-norm": (
        lambda: tiny(nn.Sequential(nn.BatchNorm1d(3), nn.Flatten(), nn.Linear(24, 4))),
        r"block encoder-a: layer 0 \(BatchNorm1d\) keeps running statistics",
    ),
    "batch-norm-in-the-head": (
        lambda: tiny(linear(), head=nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3))),
        r"block head: layer 0 \(BatchNorm1d\)",
    ),
    "functional-dropout": (
        lambda: tiny(Lambda(functional_dropout, out=nn.Linear(24, 4))),
        r"block encoder-a: .*Dropout draws random numbers inside the graph; use nn.Dropout",
    ),
    "dropout-inside-a-gru": (
        lambda: tiny(
            Lambda(
                lambda m, x: m.cell(x.transpose(1, 2))[0].mean(1),
                cell=nn.GRU(3, 4, num_layers=2, dropout=0.1, batch_first=True),
            )
        ),
        r"block encoder-a: .*dropout",
    ),
    "dropout-used-twice": (
        lambda: tiny(dropped_twice()),
        r"block encoder-a: dropout layer drop runs 2 times in a forward pass, expected once",
    ),
    "dropout-never-used": (
        lambda: tiny(
            Lambda(lambda m, x: m.out(x.flatten(1)), out=nn.Linear(24, 4), drop=nn.Dropout(0.3))
        ),
        r"block encoder-a: dropout layer drop runs 0 times",
    ),
    "everything-dropped": (lambda: tiny(linear(nn.Dropout(1.0))), r"rate: 1.0 is outside"),
    "shared-parameters": (
        shared, r"blocks encoder-a and encoder-b share the parameter weight"
    ),
    "unused-parameter": (
        unused, r"block encoder-a: parameter two\.\w+ is not used in the forward pass"
    ),
    "no-parameter": (
        lambda: tiny(nn.Flatten(), fusion=SumFusion({"a": 24, "b": 4})),
        r"block encoder-a: it has no trainable parameter",
    ),
    "frozen": (
        lambda: tiny(linear().requires_grad_(False)),
        r"block encoder-a: 1\.weight is frozen",
    ),
    "double": (
        lambda: tiny(
            Lambda(
                lambda m, x: m.out(x.flatten(1).double()).float(), out=nn.Linear(24, 4).double()
            )
        ),
        r"block encoder-a: out\.weight is torch\.float64, expected torch\.float32",
    ),
    "logits-of-another-width": (
        lambda: tiny(linear(), head=nn.Linear(4, 5)),
        r"block head: logits of shape \(2, 5\), expected \(2, 3\) for 3 class names",
    ),
    "embedding-of-another-rank": (
        lambda: tiny(nn.Linear(8, 4)),
        r"block encoder-a: output of \(2, 3, 4\), expected a tensor \(batch, d\)",
    ),
    "one-class": (
        lambda: tiny(linear(), head=nn.Linear(4, 1), class_names=("x",)), r"num_classes: 1"
    ),
    "upper-case-name": (lambda: tiny(linear(), name="Tiny"), r"'Tiny' does not match"),
    "upper-case-modality": (
        lambda: renamed("Acc"), r"'Acc' does not match"
    ),
    "modality-called-as-a-block": (lambda: renamed("head"), r"block head: the name is used twice"),
    "modality-called-as-the-upstream-gradient": (lambda: renamed("g"), r"block encoder-g: "),
    "unknown-private-block": (
        lambda: tiny(linear(), private_blocks=("tail",)), r"private block 'tail' is no block"
    ),
    "random-noise": (
        lambda: tiny(
            Lambda(lambda m, x: m.out(x.flatten(1)) + torch.randn(4), out=nn.Linear(24, 4))
        ),
        r"block encoder-a: .*Random.* draws random numbers inside the graph",
    ),
}  # fmt: skip


def renamed(modality: str) -> BlockModel:
    return tiny(
        nn.Linear(5, 4),
        encoders={modality: nn.Linear(5, 4)},
        fusion=SumFusion({modality: 4}),
        examples={modality: torch.randn(2, 5)},
    )


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str, tmp_path: Path) -> None:
    build, message = REFUSED[case]
    with pytest.raises(ModelError, match=message):
        export_model(build(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


# What torch, onnxruntime or Python itself would stumble over.
UNFIT: dict[str, Callable[[], BlockModel]] = {
    "integer-examples": lambda: tiny(
        nn.Sequential(nn.Embedding(9, 3), nn.Flatten(), nn.Linear(24, 4)),
        examples={"a": torch.zeros(2, 8, dtype=torch.int64), "b": torch.randn(2, 5)},
    ),
    "double-examples": lambda: tiny(
        linear(), examples={"a": torch.randn(2, 3, 8).double(), "b": torch.randn(2, 5)}
    ),
    "a-slash-in-a-modality": lambda: renamed("a/b"),
    "custom-gradient": lambda: tiny(
        Lambda(lambda m, x: twice(m.out(x.flatten(1))), out=nn.Linear(24, 4))
    ),
}


class Twice(torch.autograd.Function):
    """The identity with twice its gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 1

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
        return g * 2


twice: Callable[[torch.Tensor], torch.Tensor] = cast(Any, Twice).apply


@pytest.mark.parametrize("case", UNFIT)
def test_errors_of_other_libraries_are_translated(case: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"encoder-a|modality"):
        export_model(UNFIT[case](), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ({"a": torch.zeros(2, 3, 8)}, r"encoders are given for \['a', 'b'\], examples for \['a'\]"),
        ({"a": torch.zeros(2, 3, 8), "b": torch.zeros(3, 5)}, r"differ in length"),
    ],
)
def test_examples_that_do_not_fit(examples: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        tiny(linear(), examples=examples)


@pytest.mark.usefixtures("without_law")
def test_an_artifacts_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_model(small(), out)
    model = tiny(linear(), name="second")
    assert export_model(model, out) == ModelManifest.load(out)
    assert ModelManifest.load(out).name == "second"
    assert {p.name for p in out.iterdir()} == {
        MANIFEST_NAME, "encoder-a", "encoder-b", "fusion", "head"
    }  # fmt: skip
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.usefixtures("without_law")
def test_a_refused_model_leaves_the_old_artifacts(tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_model(small(), out)
    before = files(tmp_path)
    with pytest.raises(ModelError):
        export_model(tiny(linear(), head=nn.Linear(4, 5)), out)
    assert files(tmp_path) == before


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


@pytest.mark.usefixtures("without_law")
def test_a_folder_with_a_foreign_manifest_is_not_touched(tmp_path: Path) -> None:
    """Browser extensions and web apps have a manifest.json, too."""
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / MANIFEST_NAME).write_text('{"manifest_version": 3}')
    (tmp_path / "app" / "source.js").write_text("years of work")
    before = files(tmp_path)
    with pytest.raises(ModelError):
        export_model(small(), tmp_path / "app")
    assert files(tmp_path) == before


@pytest.mark.usefixtures("without_law")
def test_the_current_folder_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    export_model(small(), Path())
    assert ModelManifest.load(tmp_path / "out").class_names == CLASSES
