"""All is shared first; then heads are private, and start from what was learned together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from export import warm_start
from petalfl import EdgeClient, RoundInfo
from petalfl.model import ModelManifest
from petalfl.vectors import Vector
from tests.integration.harness import Server, running_server

PLAIN = ("--rounds", "1", "--batch-size", "4", "--learning-rate", "0.05", "--log-level", "warning")
A = np.random.default_rng(1).standard_normal((24, 5), dtype=np.float32)
LABELS = np.arange(24) % 3


def starts_of(server: Server, store: Path, device: str) -> dict[str, Vector]:
    """What a device has of each block before it trains its first round."""
    starts: dict[str, Vector] = {}

    def note(info: RoundInfo) -> None:
        starts.update(client._trainer.model.parameters)

    more: dict[str, Any] = {"data": {"a": A}, "labels": LABELS, "on_round": note}
    with EdgeClient(server.url, token=server.token, store=store, device=device, **more) as client:
        client.run()
    return starts


def test_a_private_head_starts_from_the_last_shared_one(
    small_artifacts: Path, tmp_path: Path
) -> None:
    manifest = ModelManifest.load(small_artifacts)
    with running_server(small_artifacts, tmp_path / "first", "--scheme", "fm", *PLAIN) as server:
        cold = starts_of(server, tmp_path / "one", "one")
        shared = {b.name: server.block(b.name, 2) for b in manifest.blocks_for({"a"})}
    assert all(np.abs(shared[name] - cold[name]).max() > 1e-4 for name in shared)
    warm_start(small_artifacts, tmp_path / "warm", weights=tmp_path / "first")
    second = tmp_path / "second"
    with running_server(tmp_path / "warm", second, "--scheme", "ph", *PLAIN) as server:
        assert "head" not in server.get("status")["shared_blocks"]
        warm = starts_of(server, tmp_path / "two", "two")
    assert warm.keys() == shared.keys()
    for name, vector in shared.items():
        np.testing.assert_array_equal(warm[name], vector)
