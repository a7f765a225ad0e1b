"""A federation with frozen blocks, running statistics, words and several tasks."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export import export_model
from petalfl import EdgeClient, WireError, wire
from petalfl.downlink import Downlink
from petalfl.engine import OrtEngine
from petalfl.local_data import ArrayData
from petalfl.model import ModelManifest, read_artifact
from petalfl.store import DeviceStore
from petalfl.trained_round import TrainedRound
from petalfl.trainer import _number
from petalfl.training import Hyperparameters, TrainingResult, train
from petalfl.vectors import Vector, from_bytes
from tests.integration.harness import Server, running_server, take_part
from tests.petalfl.torch_models import bare

FROZEN = "backbone-motion"
HYPERPARAMETERS = Hyperparameters(
    0.01, optimizer="adamw", weight_decay=0.1, batch_size=6, epochs=2, max_grad_norm=0.5,
    accumulation=2, proximal_mu=0.25,
)  # fmt: skip
ARGUMENTS = (
    "--scheme", "fm", "--min-devices", "2", "--seed", "7", "--server-momentum", "0.5",
    "--optimizer", "adamw", "--learning-rate", "0.01", "--weight-decay", "0.1",
    "--batch-size", "6", "--epochs", "2", "--max-grad-norm", "0.5", "--accumulation", "2",
    "--proximal-mu", "0.25", "--schedule", "constant", "--log-level", "warning",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Member:
    """A device's data: the modalities and tasks that it has."""

    name: str
    inputs: dict[str, Any]
    labels: dict[str, Any]

    def client(self, server: Server, folder: Path, **more: Any) -> EdgeClient:
        arguments = {"token": server.token, "data": self.inputs, "labels": self.labels}
        store = folder / self.name
        return EdgeClient(server.url, store=store, device=self.name, **{**arguments, **more})


def members() -> tuple[Member, Member]:
    """One with everything; one with words alone, and labels of two tasks."""
    rng = np.random.default_rng(0)

    def labels(n: int) -> dict[str, Any]:
        return {
            "kind": rng.integers(0, 3, n),
            "tags": rng.integers(0, 2, (n, 4)).astype(np.float32),
            "pace": rng.standard_normal((n, 2), dtype=np.float32),
        }

    motion = rng.standard_normal((13, 5), dtype=np.float32)  # a batch of one is left over
    full = Member("full", {"motion": motion, "text": rng.integers(0, 11, (13, 6))}, labels(13))
    words = Member("words", {"text": rng.integers(0, 11, (8, 3))}, labels(8))
    del words.labels["pace"]
    return full, words


@dataclass(frozen=True, slots=True)
class Federation:
    """What is left of one round."""

    server: Server
    manifest: ModelManifest
    initial: dict[str, Vector]
    stores: Path
    downloads: list[str]


@pytest.fixture(scope="module")
def federation(
    several_artifacts: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Federation]:
    folder = tmp_path_factory.mktemp("federation")
    manifest = ModelManifest.load(several_artifacts)
    initial = {
        b.name: from_bytes(read_artifact(several_artifacts, b.artifacts.parameters), b.size)
        for b in manifest.blocks
    }
    arguments = ("--rounds", "1", *ARGUMENTS)
    downloads: list[str] = []
    fetch_block = Downlink.fetch_block

    def spy(self: Downlink, block: Any, pointer: Any) -> Vector:
        downloads.append(block.name)
        return fetch_block(self, block, pointer)

    with (
        running_server(several_artifacts, folder / "server", *arguments) as server,
        pytest.MonkeyPatch.context() as patch,
        ExitStack() as stack,
    ):
        patch.setattr(Downlink, "fetch_block", spy)
        clients = [stack.enter_context(m.client(server, folder)) for m in members()]
        asyncio.run(take_part(clients))
        stack.close()
        yield Federation(server, manifest, initial, folder, downloads)


def test_who_sends_what(federation: Federation) -> None:
    """Nobody a frozen block; a head, whoever has labels for it."""
    rows = federation.server.query("SELECT device, block FROM updates")
    sent: dict[str, set[str]] = {"full": set(), "words": set()}
    for device, block in rows:
        sent[device].add(block)
    everything = {block.name for block in federation.manifest.blocks} - {FROZEN}
    assert sent == {
        "full": everything,
        "words": {"encoder-text", "fusion", "head-kind", "head-tags"},
    }
    status = federation.server.get("status")
    assert status["frozen_blocks"] == [FROZEN]
    assert status["private_blocks"] == []
    assert status["shared_blocks"] == dict.fromkeys(everything, 2)
    assert FROZEN not in federation.downloads


def test_the_new_versions_are_the_mean_of_what_was_trained(
    federation: Federation, several_artifacts: Path
) -> None:
    """Statistics among it; the devices' rounds are trained here once more."""
    engine = OrtEngine(several_artifacts)
    results: dict[str, TrainingResult] = {}
    for member in members():
        rng = np.random.default_rng([7, 1, _number(member.name)])
        shared = [name for name in federation.initial if name != FROZEN]
        results[member.name] = train(
            engine, federation.manifest, federation.initial,
            ArrayData(member.inputs, member.labels), HYPERPARAMETERS, rng, shared=shared,
        )  # fmt: skip
    for block in federation.manifest.blocks:
        if block.is_frozen:
            continue
        start = federation.initial[block.name]
        holders = [r for r in results.values() if block.name in r.parameters]
        delta = np.average(
            [r.parameters[block.name] - start for r in holders], axis=0,
            weights=[r.num_examples for r in holders],
        )  # fmt: skip
        found = federation.server.block(block.name, 2)
        np.testing.assert_allclose(found, start + delta, rtol=1e-5, atol=1e-7)
        assert (found[block.num_trainable :] != start[block.num_trainable :]).all()


def test_what_the_devices_keep(federation: Federation) -> None:
    """The frozen block's values lie with the artifacts, and nowhere else."""
    for member in members():
        store = DeviceStore(federation.stores / member.name)
        try:
            assert store.read_state().private == {}
            assert FROZEN not in store.read_shared().vectors
            has_frozen = store.read_file(f"{FROZEN}/parameters.bin") is not None
            assert has_frozen == ("motion" in member.inputs)
            assert store.read_file("encoder-text/parameters.bin") is None  # it is shared
            assert store.read_file("optimizers/adamw.onnx") is not None
            has_head = store.read_file("head-pace/eval_model.onnx") is not None
            assert has_head == ("pace" in member.labels)
        finally:
            store.close()


def test_predictions_offline(federation: Federation) -> None:
    """By task, of the heads that the device has; after a restart, without data or labels."""
    for member in members():
        with member.client(federation.server, federation.stores, data=None, labels=None) as reader:
            predictions = reader.predict(member.inputs)
            assert predictions.keys() == member.labels.keys()
            scores = reader.evaluate(member.inputs, member.labels)
            assert scores.keys() == member.labels.keys()
            assert scores["kind"]["num_examples"] == len(member.labels["kind"])


def test_a_frozen_block_cannot_become_an_update(federation: Federation) -> None:
    """Whatever a server asks for."""
    full, _ = members()
    block = federation.manifest.block(FROZEN)
    vector = federation.initial[FROZEN]
    task = wire.Task(2, 0, HYPERPARAMETERS, 0, {FROZEN: wire.BlockVersion(1, "0" * 64)})
    with full.client(federation.server, federation.stores) as client:
        with pytest.raises(WireError, match=f"asks for block {FROZEN}, which this device does not"):
            client._trainer.check_blocks(task)
        with pytest.raises(ValueError, match=f"block {FROZEN} is not shared"):
            result = TrainingResult({FROZEN: vector}, 1, (0.0,))
            trainer = client._trainer
            trained = TrainedRound(trainer.identity, trainer.state, task, {FROZEN: vector}, result)
            trained.make_update(block, np.random.default_rng(0))


def test_a_private_head_of_several(several_artifacts: Path, tmp_path: Path) -> None:
    """A device that comes back without labels of a task keeps its private head for it."""
    full, _ = members()
    arguments = ("--rounds", "2", "--scheme", "ph")
    with running_server(several_artifacts, tmp_path / "server", *arguments) as server:

        def stop_after_one(info: Any) -> None:
            if info.round_num == 2:
                client.stop()

        with full.client(server, tmp_path, on_round=stop_after_one) as client:
            client.run()
            heads = dict(client._trainer.state.private)
            assert heads.keys() == {"head-kind", "head-tags", "head-pace"}
        labels = {"kind": full.labels["kind"]}
        with full.client(server, tmp_path, labels=labels) as client:
            client.run()
            assert client._trainer.state.round_num == 2
            again = client._trainer.state.private
            assert again["head-pace"] == heads["head-pace"]
            assert again["head-kind"] != heads["head-kind"]
            assert client.predict(full.inputs).keys() == {"kind", "tags", "pace"}


def test_a_block_without_parameters(tmp_path: Path) -> None:
    """It has nothing to send, and the others are trained through it."""
    artifacts = tmp_path / "artifacts"
    export_model(bare(), artifacts)
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((8, d), dtype=np.float32) + 3 for d in (5, 4))
    member = Member("one", {"a": a, "b": b}, {"head": rng.random((8, 1), dtype=np.float32)})
    arguments = ("--rounds", "2", "--server-momentum", "0.5")
    with (
        running_server(artifacts, tmp_path / "server", *arguments) as server,
        member.client(server, tmp_path, labels=member.labels["head"]) as client,
    ):
        client.run()
        status = server.get("status")
        assert status["shared_blocks"] == {"encoder-a": 3, "encoder-b": 3, "head": 3}
        assert status["frozen_blocks"] == ["fusion"]
        for name in ("encoder-a", "encoder-b", "head"):
            assert (server.block(name, 3) != server.block(name, 1)).all()
        values = client.predict(member.inputs)
        assert values.shape == (8, 1)
        np.testing.assert_array_equal(client.predict_proba(member.inputs), values)
        scores = client.evaluate(member.inputs, member.labels)
        assert scores.keys() == {"mae", "mse", "num_examples"}
