"""FedBN: the batch norm of a shared fusion stays on each device; all else is shared."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import petalfl.participation
import petalfl.trainer
from petalfl import EdgeClient, RoundMetrics, wire
from petalfl.model import ModelManifest, read_artifact
from petalfl.mqtt import MqttTransport
from petalfl.private_tensors import tensors_of
from petalfl.training import TrainingResult, train
from petalfl.vectors import Vector, from_bytes, to_bytes
from tests.integration.harness import Server, running_server, take_part
from tests.integration.test_several import members

PRIVATE = [f"fusion/norm.{end}" for end in ("weight", "bias", "running_mean", "running_var")]
ARGUMENTS = (
    "--scheme", "fm", "--private-tensors", "batch-norm", "--rounds", "3", "--min-devices", "2",
    "--batch-size", "4", "--learning-rate", "0.05", "--server-momentum", "0.5",
    "--log-level", "warning",
)  # fmt: skip


@dataclass
class Run:
    """What came of a federation of three rounds, in whose second one a device was restarted."""

    server: Server
    manifest: ModelManifest
    initial: Vector
    payloads: dict[bytes, bytes] = field(default_factory=dict)  # of updates
    messages: list[bytes] = field(default_factory=list)
    before: dict[str, list[Vector]] = field(default_factory=dict)  # of the fusion, round by round
    after: dict[str, list[Vector]] = field(default_factory=dict)
    final: dict[str, Vector] = field(default_factory=dict)

    def parts(self, vector: Vector, is_private: bool) -> dict[str, Vector]:
        """By tensor of the fusion: what the vector holds of it."""
        places = tensors_of(self.manifest.block("fusion"))
        return {n: vector[p] for n, p in places.items() if (n in PRIVATE) == is_private}


@pytest.fixture(scope="module")
def run(several_artifacts: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    folder = tmp_path_factory.mktemp("fedbn")
    manifest = ModelManifest.load(several_artifacts)
    fusion = manifest.block("fusion")
    initial = from_bytes(read_artifact(several_artifacts, fusion.artifacts.parameters), fusion.size)
    with ExitStack() as stack:
        server = stack.enter_context(
            running_server(several_artifacts, folder / "server", *ARGUMENTS)
        )
        made = Run(server, manifest, initial)
        with pytest.MonkeyPatch.context() as patch:
            spy_on(patch, made)
            asyncio.run(take_part_with_a_restart(made, folder))
        yield made


async def take_part_with_a_restart(made: Run, folder: Path) -> None:
    full, words = members()

    def stop(metrics: RoundMetrics) -> None:
        if metrics.round_num == 2:
            first.stop()

    with full.client(made.server, folder) as other:
        staying = asyncio.create_task(other.arun())
        with words.client(made.server, folder, on_metrics=stop) as first:
            await asyncio.wait_for(first.arun(), 60)
        with words.client(made.server, folder) as again:
            await take_part([again])
            await asyncio.wait_for(staying, 60)
            for member, client in ((full, other), (words, again)):
                made.final[member.name] = parameters_of(client)


def parameters_of(client: EdgeClient) -> Vector:
    """What the device predicts with."""
    return client._trainer.model.parameters["fusion"]


def spy_on(patch: pytest.MonkeyPatch, made: Run) -> None:
    class Spy(MqttTransport):
        async def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
            made.messages.append(payload)
            message = wire.decode(payload)
            if isinstance(message, wire.Chunk):  # one is enough for each of these blocks
                made.payloads[message.update_id] = message.data
            await super().publish(topic, payload, retain=retain)

    def spy(engine: Any, manifest: Any, before: Any, data: Any, *rest: Any, **more: Any) -> Any:
        result: TrainingResult = train(engine, manifest, before, data, *rest, **more)
        device = "full" if "motion" in data.modalities else "words"
        made.before.setdefault(device, []).append(before["fusion"])
        made.after.setdefault(device, []).append(result.parameters["fusion"])
        return result

    patch.setattr(petalfl.participation, "MqttTransport", Spy)
    patch.setattr(petalfl.trainer, "train", spy)


def versions(run: Run) -> list[Vector]:
    return [run.server.block("fusion", version) for version in (1, 2, 3, 4)]


def test_every_device_goes_on_with_its_own_values(run: Run) -> None:
    """Also behind a restart; it starts with the initial ones."""
    for device in ("full", "words"):
        for tensor, start in run.parts(run.initial, is_private=True).items():
            for round_num, vector in enumerate(run.before[device]):
                found = run.parts(vector, is_private=True)[tensor]
                np.testing.assert_array_equal(found, start, err_msg=f"{device} {round_num}")
                start = run.parts(run.after[device][round_num], is_private=True)[tensor]
            np.testing.assert_array_equal(run.parts(run.final[device], True)[tensor], start)
            assert (start != run.parts(run.initial, is_private=True)[tensor]).all()
    assert all(
        (a != b).all()
        for a, b in zip(
            run.parts(run.final["full"], True).values(),
            run.parts(run.final["words"], True).values(),
            strict=True,
        )
    )


def test_all_else_is_the_server_s(run: Run) -> None:
    newest = versions(run)
    for device in ("full", "words"):
        for found, version in zip([*run.before[device], run.final[device]], newest, strict=True):
            for tensor, values in run.parts(version, is_private=False).items():
                np.testing.assert_array_equal(run.parts(found, False)[tensor], values)
    moved = run.parts(newest[3] - newest[0], is_private=False)
    assert moved.keys() == {"fusion/projection.weight", "fusion/projection.bias"}
    assert np.abs(moved["fusion/projection.weight"]).max() > 1e-4


def test_the_server_keeps_the_initial_values(run: Run) -> None:
    for version in versions(run):
        for tensor, values in run.parts(version, is_private=True).items():
            np.testing.assert_array_equal(values, run.parts(run.initial, True)[tensor])
    assert run.server.get("status")["private_tensors"] == PRIVATE


def test_no_byte_of_a_private_tensor_is_sent(run: Run) -> None:
    """Neither values nor changes; those of the tensors beside it are found."""
    haystack = b"".join([*run.messages, *run.payloads.values()])
    for device in ("full", "words"):
        for before, after in zip(run.before[device], run.after[device], strict=True):
            for vector in (after, after - before):
                for tensor, values in run.parts(vector, is_private=True).items():
                    assert to_bytes(values.copy()) not in haystack, tensor
            for values in run.parts(after - before, is_private=False).values():
                assert to_bytes(values.copy()) in haystack
