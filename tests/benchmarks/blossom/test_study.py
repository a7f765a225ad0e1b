from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.blossom import datasets
from benchmarks.blossom.artifacts import with_values
from benchmarks.blossom.cells import Cell, grid
from benchmarks.blossom.members import deal
from benchmarks.blossom.models import build, prepare
from benchmarks.blossom.schemes import SCHEMES, Finish, OwnData, interpolate, stop_early
from benchmarks.blossom.simulation import Device, train_alone
from benchmarks.blossom.study import run_cell
from export.weights import initial_weights
from petalfl.model import ModelManifest
from petalfl.steps import predict_outputs
from petalfl.training import Hyperparameters
from server.config import private_blocks
from tests.benchmarks.blossom.tiny_data import TINY, examples


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(datasets.DATASETS, "tiny", TINY)


def cell(**changes: Any) -> Cell:
    plain: dict[str, Any] = {
        "dataset": "tiny", "regime": "incomplete", "scheme": "fm", "missing": "mask",
        "partition": "natural", "data_fraction": 1.0, "seed": 0, "rounds": 4,
        "learning_rate": 0.1, "eval_every": 2,
    }  # fmt: skip
    return Cell(**{**plain, **changes})


def results_of(line: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in line.items() if k not in ("seconds", "seconds_in_rounds", "machine")}


@pytest.fixture(scope="module")
def two_heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Artifacts of the model with a personal head, and seed 1."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(datasets.DATASETS, "tiny", TINY)
        return prepare("tiny", "mask", 1, tmp_path_factory.mktemp("cache"), has_personal_head=True)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme(scheme: str, small_artifacts: Path, two_heads: Path, tmp_path: Path) -> None:
    told: list[int] = []
    asked = cell(scheme=scheme, rounds=3, devices=3, unseen=1)
    artifacts = two_heads if SCHEMES[scheme].has_personal_head else small_artifacts
    line = run_cell(asked, artifacts, tmp_path, told.append)
    num_federations = 2 if scheme == "unimodal" else 1
    assert told == [*range(3)] * num_federations
    assert [point[0] for point in line["curve"]] == [0, 2, 3]
    assert line["curve"][-1][1:] == [line["final"]["macro_f1"], line["final"]["accuracy"]]
    assert len(line["devices"]) == 3
    for device in line["devices"].values():
        assert 0 <= device["final"]["macro_f1"] <= 1 and device["num_test"] == 18
        assert (device["bytes_up"] > 0) == (scheme != "local")
    assert list(line["unseen"]) == ["a", "b", "a+b"]
    for by_rounds in line["unseen"].values():
        assert list(by_rounds) == ["0", "1", "3", "10"]
        # Whatever day one was like, ten rounds on the person's own examples help.
        assert by_rounds["10"]["accuracy"] >= by_rounds["0"]["accuracy"] - 0.1


@pytest.mark.parametrize("scheme", ["fm-mix", "phf-drop"])
def test_a_cell_comes_to_the_same_twice(scheme: str, small_artifacts: Path, tmp_path: Path) -> None:
    lines = [
        run_cell(cell(scheme=scheme, rounds=2, devices=3), small_artifacts, tmp_path / str(n))
        for n in range(2)
    ]
    assert results_of(lines[0]) == results_of(lines[1])
    other = run_cell(
        cell(scheme=scheme, rounds=2, devices=3, seed=1), small_artifacts, tmp_path / "other"
    )
    assert results_of(other)["devices"] != results_of(lines[0])["devices"]


def test_training_helps(small_artifacts: Path, tmp_path: Path) -> None:
    line = run_cell(
        cell(rounds=12, epochs=3, devices=4, unseen=1, eval_every=12), small_artifacts, tmp_path
    )
    assert line["curve"][0][2] < 0.6 < 0.9 < line["final"]["accuracy"]
    assert line["unseen"]["a+b"]["0"]["accuracy"] > 0.8


def test_all_schemes_of_a_seed_have_the_same_devices() -> None:
    def described(**changes: Any) -> list[tuple[Any, ...]]:
        members, unseen = deal(cell(unseen=2, data_fraction=0.5, **changes))
        assert len(members) == 4 and len({h.person for h in unseen}) == 2
        assert not {m.name for m in members} & {h.name for h in unseen}
        return [
            (m.name, m.modalities, m.data.every.spans[m.modalities[0]].tolist()) for m in members
        ]

    assert described(scheme="fm") == described(scheme="local") == described(scheme="fm-mix")
    assert described(seed=1) != described(seed=0)


def test_zero_and_incomplete_modalities_reach_the_devices() -> None:
    for regime, counts in {"complete": (0, 0, 8), "exclusive": (4, 4, 0)}.items():
        members, _ = deal(cell(regime=regime))
        kinds = [m.modalities for m in members]
        assert tuple(map(kinds.count, [("a",), ("b",), ("a", "b")])) == counts


@pytest.mark.parametrize("seed", [0, 1])
def test_an_untrained_encoder_answers_for_an_absent_modality(seed: int, tmp_path: Path) -> None:
    """By the initial values of the seed."""
    artifacts = prepare("tiny", "untrained", seed, tmp_path / "cache")
    data = examples(0, 0, 4).only(["a"])
    device = Device("p", tmp_path / "p", artifacts, (), data)
    plain = build("tiny", "mask", seed).eval()
    assert plain.fusion is not None
    with torch.no_grad():
        seen = plain.encoders["a"](torch.from_numpy(data.inputs["a"]))
        zeros = torch.zeros_like(plain.examples["b"][:1])
        constant = plain.encoders["b"](zeros).expand(len(seen), -1)
        fused = plain.fusion({"a": seen, "b": constant}, torch.ones(len(seen), 2))
        expected = plain.head(fused).softmax(dim=1).numpy()
    try:
        weights = initial_weights(artifacts, device.model.manifest)
        device.keep({name: weight.vector for name, weight in weights.items()})
        found = device.model.predict_proba(data.inputs)
    finally:
        device.close()
    assert np.abs(constant.numpy()).max() > 0.1  # not what zero-fill would do
    assert np.allclose(found, expected, atol=1e-5)


def test_an_unseen_person_begins_with_what_is_shared(small_artifacts: Path, tmp_path: Path) -> None:
    manifest = ModelManifest.load(small_artifacts)
    shared = {b.name: np.full(b.size, 0.5, np.float32) for b in manifest.blocks}
    private = private_blocks("ph", manifest)
    device = Device("p", tmp_path, small_artifacts, private, examples(0, 0, 2).only(["a"]))
    try:
        initial = device.model.parameters["head"]
        device.keep(shared)
        found = device.model.parameters
        assert found.keys() == {"encoder-a", "fusion", "head"}
        assert (found["encoder-a"] == 0.5).all() and (found["fusion"] == 0.5).all()
        assert np.array_equal(found["head"], initial) and not (initial == 0.5).all()
    finally:
        device.close()


def test_a_second_head_says_nothing_before_it_is_trained(two_heads: Path, tmp_path: Path) -> None:
    manifest = ModelManifest.load(two_heads)
    assert manifest.private_blocks == ("head-personal",)
    data = examples(0, 0, 10)
    device = Device("p", tmp_path, two_heads, manifest.private_blocks, data)
    try:
        device.keep({n: w.vector for n, w in initial_weights(two_heads, manifest).items()})
        before = device.model.parameters
        outputs = predict_outputs(device.model.engine, manifest, before, data.inputs)
        assert (outputs["personal"] == 0).all()
        found = device.model.predict(data.inputs)
        assert np.array_equal(found, outputs["head"].argmax(axis=1))
        trained = train_alone(
            device.model, data, Hyperparameters(0.1, epochs=20), np.random.default_rng(0)
        )
        outputs = predict_outputs(trained.engine, manifest, trained.parameters, data.inputs)
        for head, logits in outputs.items():
            assert (logits.argmax(axis=1) == data.labels).mean() > 0.9, head
    finally:
        device.close()


def test_what_a_device_makes_its_own(small_artifacts: Path, tmp_path: Path) -> None:
    data = OwnData.split(examples(0, 0, 10), 0.2)
    assert data.held_out is not None and len(data.held_out) == 6 and len(data.rounds) == 24
    device = Device("p", tmp_path, small_artifacts, (), data.rounds)
    manifest = device.model.manifest
    try:
        names = frozenset(b.name for b in device.model.held)
        settings = Hyperparameters(0.1, batch_size=8)
        device.keep({n: w.vector for n, w in initial_weights(small_artifacts, manifest).items()})
        for personalize in (stop_early, interpolate):
            own = personalize(device.model, data, Finish(settings, 10, names, (1,)))
            again = personalize(device.model, data, Finish(settings, 10, names, (1,)))
            scores = [m.evaluate(data.every.inputs, data.every.labels)["accuracy"]
                      for m in (device.model, own)]  # fmt: skip
            assert scores[1] > scores[0]
            for name in names:
                assert np.array_equal(own.parameters[name], again.parameters[name])
    finally:
        device.close()


def test_artifacts_with_other_values(small_artifacts: Path, tmp_path: Path) -> None:
    block = ModelManifest.load(small_artifacts).block("head")
    values = {"head": np.arange(block.size, dtype=np.float32)}
    manifest = with_values(small_artifacts, values, tmp_path / "new")
    path = tmp_path / "new" / block.artifacts.parameters.path
    assert np.array_equal(np.frombuffer(path.read_bytes(), "<f4"), values["head"])
    assert manifest.block("head").artifacts.parameters != block.artifacts.parameters
    assert manifest.block("fusion") == ModelManifest.load(small_artifacts).block("fusion")
    with pytest.raises(ValueError, match="block head: expected"):
        with_values(small_artifacts, {"head": np.zeros(3, np.float32)}, tmp_path / "x")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dataset": "har"}, "dataset 'har': expected one of watch"),
        ({"scheme": "fedavg"}, "scheme 'fedavg': expected one of fm, ph"),
        ({"regime": "none"}, "regime 'none': expected one of complete"),
        ({"missing": "mean"}, "missing 'mean': expected one of mask, zero, untrained"),
        ({"partition": "dirichlet"}, "partition 'dirichlet': expected natural"),
        ({"data_fraction": 0.0}, "data fraction 0: expected in"),
        ({"data_fraction": float("nan")}, "data fraction nan: expected in"),
        ({"rounds": 0}, "rounds 0: expected at least 1"),
        ({"seed": -1}, "seed -1: expected at least 0"),
        ({"schedule": "step"}, "schedule 'step': expected one of constant"),
        ({"server_optimizer": "lion"}, "server optimizer: .*lion"),
        ({"codec": "zip"}, "codec: .*zip"),
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"optimizer": "lion"}, "optimizer"),
        ({"unseen": 1, "partition": "iid"}, "unseen 1 needs partition natural, found iid"),
    ],
)
def test_cells_that_cannot_be(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        cell(**changes)


def test_too_many_people_left_out() -> None:
    with pytest.raises(ValueError, match="unseen 4: tiny has 4 people"):
        deal(cell(unseen=4))


def test_the_grid() -> None:
    cells = grid(
        {"seed": range(2), "dataset": ["tiny"], "partition": ["natural"], "data_fraction": [0.1, 1],
         "regime": ["complete", "exclusive"], "missing": ["mask", "zero"], "scheme": ["fm", "ph"]},
        rounds=3,
    )  # fmt: skip
    assert len({c.key for c in cells}) == len(cells) == 2 * 2 * (1 + 2) * 2
    assert [c.seed for c in cells] == sorted(c.seed for c in cells)
    for one, other in itertools.pairwise(cells):
        assert one.key != other.key
    assert not any(c.regime == "complete" and c.missing == "zero" for c in cells)
