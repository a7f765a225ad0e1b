"""SCAFFOLD over the real wire, against the paper's algorithm written down in float64."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

from petalfl import EdgeClient, RoundMetrics
from petalfl.control_variates import SUM_NAME
from petalfl.engine import OrtEngine
from petalfl.model import ModelManifest, read_artifact
from petalfl.steps import draw_masks, step_gradients, take
from petalfl.store import DeviceStore
from petalfl.trainer import _number
from petalfl.vectors import from_bytes
from tests.integration.harness import Server, running_server, take_part

RATE, SEED, NUM_ROUNDS = 0.05, 7, 4
ARGUMENTS = (
    "--scaffold", "--scheme", "ph", "--rounds", str(NUM_ROUNDS), "--min-devices", "3",
    "--selection", "random", "--cohort-size", "2", "--seed", str(SEED), "--momentum", "0",
    "--weight-decay", "0", "--learning-rate", str(RATE), "--schedule", "constant",
    "--batch-size", "4", "--epochs", "2", "--log-level", "warning",
)  # fmt: skip
LENGTHS = {"one": 8, "two": 12, "both": 20}
Vector64 = NDArray[np.float64]


def inputs_of(device: str) -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(len(device) + LENGTHS[device])
    inputs = {"a": rng.standard_normal((LENGTHS[device], 5), dtype=np.float32)}
    if device == "both":
        inputs["b"] = rng.standard_normal((LENGTHS[device], 2, 8), dtype=np.float32)
    return inputs


def labels_of(device: str) -> NDArray[np.int64]:
    """Each has classes of its own for the most part."""
    shift = {"one": 0, "two": 1, "both": 0}[device]
    return np.where(np.arange(LENGTHS[device]) % 4, shift, shift + 1)


@dataclass
class Run:
    server: Server
    artifacts: Path
    stores: Path


@pytest.fixture(scope="module")
def run(small_artifacts: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    folder = tmp_path_factory.mktemp("scaffold")
    with running_server(small_artifacts, folder / "server", *ARGUMENTS) as server:
        asyncio.run(take_part_with_a_restart(server, folder))
        yield Run(server, small_artifacts, folder)


async def take_part_with_a_restart(server: Server, folder: Path) -> None:
    """The third is restarted when it has trained and sent nothing yet."""

    def client(device: str, **more: Any) -> EdgeClient:
        return EdgeClient(
            server.url, token=server.token, data=inputs_of(device), labels=labels_of(device),
            store=folder / device, device=device, **more,
        )  # fmt: skip

    def stop(metrics: RoundMetrics) -> None:
        first.stop()

    with ExitStack() as stack:
        others = [stack.enter_context(client(device)) for device in ("one", "two")]
        runs = [asyncio.create_task(other.arun()) for other in others]
        with client("both", on_metrics=stop) as first:
            await asyncio.wait_for(first.arun(), 60)
        with client("both") as again:
            await take_part([again])
        await asyncio.wait_for(asyncio.gather(*runs), 60)


class Paper:
    """Karimireddy et al. 2020, algorithm 1 with option II, block by block and in float64.

    x ← x + the mean of Δy by examples, as FedAvg weighs; c ← c + (1/N) Σ (c_i⁺ − c_i).
    """

    def __init__(self, artifacts: Path) -> None:
        self.manifest = ModelManifest.load(artifacts)
        self.engine = OrtEngine(artifacts)
        initial = {
            b.name: from_bytes(read_artifact(artifacts, b.artifacts.parameters), b.size)
            for b in self.manifest.blocks
        }
        self.shared = [b.name for b in self.manifest.blocks if b.kind != "head"]
        self.x = {name: initial[name].astype(np.float64) for name in self.shared}
        self.c = {name: np.zeros(self.x[name].size) for name in self.shared}
        self.own_c = {d: dict(self.c) for d in LENGTHS}
        self.heads = {d: initial["head"].astype(np.float64) for d in LENGTHS}

    def num_holders(self, block: str) -> int:
        return 1 if block == "encoder-b" else 3

    def local_round(self, device: str, round_num: int) -> tuple[dict[str, Vector64], int]:
        """y after K steps, and K."""
        inputs, labels = inputs_of(device), {"head": labels_of(device)}
        held = self.manifest.blocks_for(inputs)
        rng = np.random.default_rng([SEED, round_num, _number(device)])
        orders = [rng.permutation(LENGTHS[device]) for _ in range(2)]
        batches = [batch for order in orders for batch in np.split(order, range(4, len(order), 4))]
        y = {b.name: self.x.get(b.name, self.heads[device]) for b in held}
        for batch in batches:
            masks = draw_masks(held, len(batch), rng)
            now = {name: vector.astype(np.float32) for name, vector in y.items()}
            step = step_gradients(
                self.engine, self.manifest, now, take(inputs, batch), take(labels, batch), masks
            )
            for name, gradient in step.gradients.items():
                g = gradient.astype(np.float64)
                if name in self.shared:
                    g = g - self.own_c[device][name] + self.c[name]
                y[name] = y[name] - RATE * g
        return y, len(batches)

    def round(self, round_num: int, cohort: list[str]) -> None:
        deltas: dict[str, list[tuple[Vector64, int]]] = {}
        changes: dict[str, list[Vector64]] = {}
        for device in cohort:
            y, num_steps = self.local_round(device, round_num)
            self.heads[device] = y.pop("head")
            for name, vector in y.items():
                own = self.own_c[device][name]
                new = own - self.c[name] + (self.x[name] - vector) / (num_steps * RATE)
                deltas.setdefault(name, []).append((vector - self.x[name], LENGTHS[device]))
                changes.setdefault(name, []).append(new - own)
                self.own_c[device][name] = new
        for name, found in deltas.items():
            self.x[name] = self.x[name] + np.average(
                [delta for delta, _ in found], axis=0, weights=[n for _, n in found]
            )
            self.c[name] = self.c[name] + np.sum(changes[name], axis=0) / self.num_holders(name)


@pytest.fixture(scope="module")
def paper(run: Run) -> Paper:
    """After the same rounds with the same cohorts."""
    found = Paper(run.artifacts)
    for round_num in range(1, NUM_ROUNDS + 1):
        query = "SELECT DISTINCT device FROM updates WHERE round_num = ? ORDER BY device"
        cohort = [row[0] for row in run.server.query(query, round_num)]
        assert len(cohort) == 2
        found.round(round_num, cohort)
    return found


def test_all_had_a_turn(run: Run) -> None:
    counts = run.server.query("SELECT device, COUNT(DISTINCT round_num) FROM updates GROUP BY 1")
    assert len(counts) == 3 and max(n for _, n in counts) > 1


def test_the_blocks_are_the_paper_s(run: Run, paper: Paper) -> None:
    versions = run.server.query("SELECT block, MAX(version) FROM versions GROUP BY block")
    assert {name for name, _ in versions} == set(paper.shared)
    for name, version in versions:
        found, expected = run.server.block(name, version), paper.x[name]
        moved = expected - run.server.block(name, 1)
        assert np.abs(moved).max() > 1e-2
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_so_are_the_control_variates(run: Run, paper: Paper) -> None:
    """On the devices, and their sum with the server."""
    totals = {name: np.zeros(paper.x[name].size) for name in paper.shared}
    for device in LENGTHS:
        store = DeviceStore(run.stores / device)
        state = store.read_state()
        store.close()
        assert not state.next_controls and "head" not in state.controls
        for name, expected in paper.own_c[device].items():
            if name not in state.controls:
                assert not expected.any()
                continue
            found = from_bytes(state.controls[name], expected.size)
            np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
            totals[name] += found
    newest = run.server.get("status")["shared_blocks"]
    for name, total in totals.items():
        path = run.server.data_dir / "blocks" / name / f"{newest[name]}.safetensors"
        found = load_file(path)[SUM_NAME]
        assert np.abs(found).max() > 1e-3
        np.testing.assert_allclose(found, total, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(
            found / paper.num_holders(name), paper.c[name], rtol=1e-3, atol=1e-4
        )
