"""Every codec over the real wire: what the server merges is what devices encoded."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from petalfl import EdgeClient, wire
from petalfl.model import Block, ModelManifest
from petalfl.store import DeviceStore, Outgoing
from petalfl.trained_round import TrainedRound
from petalfl.vectors import Vector, from_bytes
from tests.integration.harness import Server, running_server, take_part
from tests.integration.test_async import examples

CODECS = ("f32", "f16", "bf16", "int8", "topk:0.2", "topk-int8:0.2")
DEVICES = {"one": "ab", "two": "a"}
SCHEME = ("--scheme", "fm", "--min-devices", "2", "--seed", "5", "--batch-size", "8")
Key = tuple[str, str]  # device and block


@dataclass
class Seen:
    """What devices trained and sent, by device and block."""

    trained: dict[Key, list[Vector]] = field(default_factory=lambda: defaultdict(list))
    sent: dict[Key, list[Vector]] = field(default_factory=lambda: defaultdict(list))
    manifests: list[wire.UpdateManifest] = field(default_factory=list)

    def totals(self, which: dict[Key, list[Vector]]) -> dict[Key, Vector]:
        return {key: np.sum(vectors, axis=0) for key, vectors in which.items()}


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Seen]:
    seen, make_update = Seen(), TrainedRound.make_update

    def spy(self: TrainedRound, block: Block, rng: np.random.Generator) -> tuple[Outgoing, Any]:
        assert self.identity is not None
        outgoing, residual = make_update(self, block, rng)
        manifest = wire.decode(outgoing.message)
        assert isinstance(manifest, wire.UpdateManifest)
        decoded = wire.decode_payload(manifest, outgoing.payload, self.identity.device, block)
        key = (self.identity.device, block.name)
        moved = self.result.parameters[block.name] - self.before[block.name]
        seen.trained[key].append(moved)
        seen.sent[key].append(decoded.delta)
        seen.manifests.append(manifest)
        return outgoing, residual

    monkeypatch.setattr(TrainedRound, "make_update", spy)
    yield seen


def train(server: Server, folder: Path) -> None:
    """Both devices until the last round."""
    with ExitStack() as stack:
        clients = []
        for number, (name, modalities) in enumerate(DEVICES.items()):
            mine = examples(number, 24)
            client = EdgeClient(
                server.url, token=server.token, data=mine.of(modalities), labels=mine.labels,
                store=folder / name, device=name,
            )  # fmt: skip
            clients.append(stack.enter_context(client))
        asyncio.run(take_part(clients))


def residuals(folder: Path) -> dict[Key, Vector]:
    found = {}
    for name in DEVICES:
        store = DeviceStore(folder / name)
        for block, kept in store.read_state().residuals.items():
            found[name, block] = np.frombuffer(kept.vector, "<f4")
        store.close()
    return found


@pytest.mark.parametrize("codec", CODECS)
def test_what_devices_encoded_is_what_the_server_merged(
    codec: str, seen: Seen, small_artifacts: Path, tmp_path: Path
) -> None:
    manifest = ModelManifest.load(small_artifacts)
    arguments = ("--rounds", "3", "--codec", codec, *SCHEME)
    with running_server(small_artifacts, tmp_path / "server", *arguments) as server:
        train(server, tmp_path)
        status = server.get("status")
        assert {m.codec for m in seen.manifests} == {codec}
        assert status["updates_accepted"] == len(seen.manifests)
        for block in manifest.blocks:
            deltas = [
                d for (_, name), sent in seen.sent.items() if name == block.name for d in sent
            ]
            num_holders = len(deltas) // 3
            path = small_artifacts / block.artifacts.parameters.path
            initial = from_bytes(path.read_bytes(), block.size)
            # All have 24 examples.
            expected = initial + np.sum(deltas, axis=0) / num_holders
            version = status["shared_blocks"][block.name]
            assert version == 4
            np.testing.assert_allclose(server.block(block.name, version), expected, atol=1e-6)
    left = residuals(tmp_path)
    assert bool(left) == codec.startswith("topk")
    trained, sent = seen.totals(seen.trained), seen.totals(seen.sent)
    for key, residual in left.items():
        np.testing.assert_allclose(sent[key] + residual, trained[key], atol=1e-6)
    if codec != "f32":
        assert sum(m.num_bytes for m in seen.manifests) < 0.7 * 4 * sum(
            vector.size for vectors in seen.sent.values() for vector in vectors
        )


def test_residuals_outlive_a_restart_of_all(
    seen: Seen, small_artifacts: Path, tmp_path: Path
) -> None:
    for num_rounds, codec in ((2, "topk:0.05"), (4, "topk-int8:0.1")):
        arguments = ("--rounds", str(num_rounds), "--codec", codec, *SCHEME)
        with running_server(small_artifacts, tmp_path / "server", *arguments) as server:
            train(server, tmp_path)
    trained, sent, left = seen.totals(seen.trained), seen.totals(seen.sent), residuals(tmp_path)
    assert left.keys() == sent.keys()
    assert all(len(deltas) == 4 for deltas in seen.sent.values())
    for key, residual in left.items():
        np.testing.assert_allclose(sent[key] + residual, trained[key], atol=1e-6)


def test_a_device_that_knows_less(
    seen: Seen, small_artifacts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server asks it for the best codec that both know."""
    monkeypatch.setattr("petalfl.trainer.KINDS", ("f32", "f16", "int8"))
    arguments = ("--rounds", "1", "--codec", "topk-int8:0.1", *SCHEME)
    with running_server(small_artifacts, tmp_path / "server", *arguments) as server:
        train(server, tmp_path)
        assert server.get("status")["round_num"] == 1
    assert {m.codec for m in seen.manifests} == {"int8"}
