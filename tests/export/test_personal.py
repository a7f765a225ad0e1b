"""Personal heads in PyTorch: what they begin with, what is exported, and the way back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from export import BlockModel, export_model
from export.merge import merge
from export.models.har import AttentionFusion, MlpHead
from export.verify import verify
from petalfl.errors import ModelError
from petalfl.model import ModelManifest
from tests.export.tiny import personal, small


class Towers(nn.Module):
    """A module of a user's own, which is cut into blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.towers = nn.ModuleDict({"a": nn.Linear(5, 4), "b": nn.Linear(3, 4)})
        self.mix = AttentionFusion(("a", "b"), d=4, out=6)
        self.top = MlpHead(6, 3, hidden=8)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        embeddings = {"a": self.towers["a"](a), "b": self.towers["b"](b)}
        logits: Tensor = self.top(self.mix(embeddings, torch.ones(len(a), 2)))
        return logits


def cut(module: Towers) -> BlockModel:
    return BlockModel.cut(
        module, name="cut", encoders={"a": "towers.a", "b": "towers.b"}, fusion="mix", head="top",
        examples={"a": torch.randn(2, 5), "b": torch.randn(2, 3)}, personal_head=True,
    )  # fmt: skip


def one_encoder(**changes: Any) -> BlockModel:
    options = {"head": nn.Linear(8, 3), **changes}
    return BlockModel(
        name="one", encoders={"a": nn.Linear(5, 8)}, examples={"a": torch.randn(2, 5)},
        personal_head=True, **options,
    )  # fmt: skip


def test_it_begins_as_a_copy_that_says_nothing() -> None:
    model, plain = personal(), small()
    assert [b.name for b in model.blocks()] == [*(b.name for b in plain.blocks()), "head-personal"]
    assert model.private_blocks == ("head-personal",)
    outputs = model.eval()(model.examples)
    assert list(outputs) == ["head", "personal"]
    assert (outputs["personal"] == 0).all()
    torch.testing.assert_close(outputs["head"], plain.eval()(plain.examples))
    twin = model.blocks()[-1].module
    assert isinstance(twin, MlpHead)
    assert isinstance(plain.head, MlpHead)
    torch.testing.assert_close(twin[0].weight, plain.head[0].weight)  # but for the last layer


def test_both_heads_learn_the_same_labels() -> None:
    model = personal().eval()
    labels = torch.tensor([0, 2])
    outputs = model(model.examples)
    losses = model.losses(outputs, labels)
    assert list(losses) == ["head", "personal"]
    assert losses["personal"].item() == pytest.approx(np.log(3))
    assert model.loss(outputs, labels).item() == pytest.approx(
        sum(x.item() for x in losses.values())
    )


def test_one_beside_every_head() -> None:
    heads = {"kind": nn.Linear(8, 3), "tags": nn.Linear(8, 2)}
    model = one_encoder(
        head=heads, loss={"kind": "cross_entropy", "tags": "bce_with_logits"},
        loss_weights={"tags": 0.5}, private_blocks=("head-tags",),
    )  # fmt: skip
    names = ["head-kind", "head-tags", "head-kind-personal", "head-tags-personal"]
    assert [b.name for b in model.blocks() if b.kind == "head"] == names
    assert model.private_blocks == ("head-tags", *names[2:])
    outputs = model(model.examples)
    assert list(outputs) == ["kind", "tags", "kind-personal", "tags-personal"]
    labels = {"tags": torch.ones(len(outputs["tags"]), 2)}
    losses = model.losses(outputs, labels)
    assert list(losses) == ["tags", "tags-personal"]
    assert model.loss(outputs, labels).item() == pytest.approx(
        0.5 * sum(loss.item() for loss in losses.values())
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": "mse"}, "head: a personal head needs a loss whose outputs"),
        ({"frozen_blocks": ("head",)}, "block head: it is frozen; a personal head beside it"),
        (
            {"head": nn.Sequential(nn.Linear(8, 3), nn.Softplus())},
            "block head-personal: with its last layer's parameters at 0 its outputs are not 0",
        ),
    ],
)
def test_heads_that_cannot_have_one(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        one_encoder(**changes)


@pytest.mark.parametrize("build", [personal, lambda: cut(Towers())], ids=["built", "cut"])
def test_its_artifacts_are_exact(build: Any, tmp_path: Path) -> None:
    """The export proves the first step; `verify` proves it again, on values that it loads."""
    torch.manual_seed(1)
    model = build()
    for block in model.blocks():
        for parameter in block.module.parameters():
            nn.init.normal_(parameter, std=0.3)
    manifest = export_model(model, tmp_path / "artifacts")
    assert list(manifest.heads) == list(manifest.personal_heads) == ["head"]
    assert manifest.personal_heads["head"].name == "head-personal"
    torch.manual_seed(2)
    findings = verify(build(), tmp_path / "artifacts", num_batches=1)
    assert all(finding.is_exact for finding in findings)
    assert {f.block for f in findings} >= {"head", "head-personal"}


def test_a_cut_module_gets_its_own_state_back(tmp_path: Path) -> None:
    module = Towers()
    export_model(cut(module), tmp_path / "artifacts")
    merge(tmp_path / "artifacts", tmp_path / "model.pt")
    Towers().load_state_dict(torch.load(tmp_path / "model.pt"), strict=True)


def test_the_servers_graph_has_none(personal_artifacts: Path, tmp_path: Path) -> None:
    """The server never has its values."""
    merged = merge(personal_artifacts, tmp_path / "model.onnx")
    assert "head-personal" not in merged
    outputs = onnx.load(tmp_path / "model.onnx").graph.output
    assert len(outputs) == len(ModelManifest.load(personal_artifacts).heads) == 1
