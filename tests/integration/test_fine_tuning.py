"""Two rounds of three devices over the real wire, then each alone; and one that comes later."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from petalfl import EdgeClient, RoundInfo, RoundMetrics
from petalfl.local_data import ArrayData
from petalfl.store import DeviceStore, FineTuned
from petalfl.trainer import _number
from petalfl.training import Hyperparameters, train
from petalfl.vectors import Vector
from tests.integration.faulty_device import faulty_device, read_to_the_end, read_until
from tests.integration.harness import (
    SCHEME,
    Device,
    Server,
    assert_counted_once,
    running_server,
    take_part,
    three_devices,
)

FINE = Hyperparameters(learning_rate=0.01, batch_size=4, epochs=2)
FINISH = ("--rounds", "2", "--finish-epochs", "2", "--finish-rate", "0.2")


@dataclass(frozen=True, slots=True)
class Seen:
    """What the end of a device's run was like."""

    device: Device
    client: EdgeClient
    infos: list[RoundInfo]
    metrics: list[RoundMetrics]
    before: list[Vector]  # probabilities on its own data, when fine-tuning began

    def probabilities(self) -> Vector:
        found: Vector = self.client.predict_proba(self.device.data)
        return found

    def loss(self, probabilities: Vector) -> float:
        labels = self.device.labels
        return float(-np.log(probabilities[np.arange(len(labels)), labels]).mean())


def watched(stack: ExitStack, device: Device, server: Server, folder: Path) -> Seen:
    infos: list[RoundInfo] = []
    metrics: list[RoundMetrics] = []
    before: list[Vector] = []

    def look(info: RoundInfo) -> None:
        infos.append(info)
        if info.is_fine_tuning:
            before.append(seen.probabilities())

    client = device.client(server, folder, on_round=look, on_metrics=metrics.append)
    seen = Seen(device, stack.enter_context(client), infos, metrics, before)
    return seen


@pytest.fixture(scope="module")
def federation(
    watch_artifacts: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Server, list[Seen]]]:
    """The last of them is there for the finish alone."""
    folder = tmp_path_factory.mktemp("fine")
    with ExitStack() as stack:
        words = (*SCHEME, *FINISH)
        server = stack.enter_context(running_server(watch_artifacts, folder / "server", *words))
        members = three_devices()
        seen = [watched(stack, device, server, folder) for device in members]
        asyncio.run(take_part([one.client for one in seen]))
        late = watched(stack, replace(members[2], name="late"), server, folder)
        asyncio.run(take_part([late.client]))
        yield server, [*seen, late]


def test_every_device_has_a_model_of_its_own(federation: tuple[Server, list[Seen]]) -> None:
    server, everybody = federation
    for seen in everybody:
        trainer = seen.client._trainer
        shared = {n: server.block(n, 3) for n in trainer.model.parameters if "encoder" in n}
        for name, vector in shared.items():
            np.testing.assert_array_equal(trainer.model.parameters[name], vector)
        data = trainer.data.refresh(trainer.model)
        assert isinstance(data, ArrayData)
        expected = train(
            trainer.model.engine, trainer.model.manifest, trainer.model.parameters, data, FINE,
            np.random.default_rng([7, 0, _number(seen.device.name)]),
        )  # fmt: skip
        found = trainer.own_model.parameters
        assert found.keys() == expected.parameters.keys() == {*shared, "fusion", "head"}
        for name, vector in expected.parameters.items():
            np.testing.assert_array_equal(found[name], vector)
            assert np.abs(vector - trainer.model.parameters[name]).max() > 1e-4
        last = seen.metrics[-1]
        assert last.is_fine_tuning and last.loss == expected.loss


def test_it_fits_the_device_better(federation: tuple[Server, list[Seen]]) -> None:
    for seen in federation[1]:
        [before] = seen.before
        after = seen.probabilities()
        assert (before != after).any()
        assert seen.loss(after) < seen.loss(before)


def test_the_server_has_seen_two_rounds(federation: tuple[Server, list[Seen]]) -> None:
    server, everybody = federation
    status = server.get("status")
    assert status["is_finished"] and status["updates_accepted"] == 2 * 4
    assert status["shared_blocks"] == {"encoder-acc": 3, "encoder-gyro": 3}
    *members, late = everybody
    fine = RoundInfo(2, 2, is_fine_tuning=True)
    assert all(seen.infos == [RoundInfo(1, 2), RoundInfo(2, 2), fine] for seen in members)
    assert late.infos == [RoundInfo(0, 0, is_fine_tuning=True)]
    up = {name: one["blocks"] for name, one in server.get("devices").items()}
    assert all(block["bytes_up"] == 0 for block in up["late"].values())


def test_a_device_killed_amid_it_does_it_again(watch_artifacts: Path, tmp_path: Path) -> None:
    """Before the first batch or in it; what it makes is in the end the same, bit for bit."""
    folder = tmp_path / "store"
    words = (*SCHEME, *FINISH, "--min-devices", "1", "--epochs", "1")
    with running_server(watch_artifacts, tmp_path / "server", *words) as server:
        for held_at in ("fine-tuning", "training"):  # of which the second time no round is left
            held = {"hold_at": held_at, "until": str(tmp_path / "never")}
            with faulty_device(server.url, server.token, folder, **held) as process:
                read_until(process, "fine-tuning")
                read_until(process, "wait")
                process.kill()
            assert own_of(folder) is None
        made = []
        for _ in range(2):
            with faulty_device(server.url, server.token, folder) as process:
                read_to_the_end(process)
            made.append(own_of(folder))
            (folder / "fine-tuned.msgpack").unlink()
        assert made[0] is not None and made[0] == made[1]
        assert_counted_once(server, num_rounds=2, num_devices=1)


def own_of(folder: Path) -> FineTuned | None:
    store = DeviceStore(folder)
    try:
        return store.read_fine_tuned()
    finally:
        store.close()
