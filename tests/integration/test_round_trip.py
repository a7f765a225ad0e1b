"""A whole federation on real recordings: three devices, three rounds, private heads and fusion."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from examples.android_sim.data import devices
from petalfl import DataError, EdgeClient
from petalfl.model import ModelManifest
from petalfl.store import DeviceStore, Outgoing
from petalfl.trained_round import TrainedRound
from petalfl.vectors import Vector, from_bytes
from petalfl.wire import UpdateManifest, decode
from tests.integration.harness import (
    SCHEME,
    Device,
    Outcome,
    Server,
    read_outcome,
    run_federation,
    running_server,
    take_part,
    three_devices,
)
from tests.mosquitto import missing_mosquitto, mosquitto

SHARED = {"encoder-acc": ("acc-only", "both"), "encoder-gyro": ("both", "gyro-only")}
SIZES = {"acc-only": 21, "gyro-only": 30, "both": 40}
BATCH = {m: x[:9] for m, x in devices(1)[0].test.inputs.items()}  # windows nobody trained on


@dataclass(frozen=True, slots=True)
class Federation:
    """What a federation leaves; its server is down, its clients are closed."""

    artifacts: Path
    folder: Path
    server: Server
    devices: dict[str, Device]
    deltas: dict[bytes, Vector]  # by update_id, as the devices made them
    predictions: dict[str, Any]  # of `BATCH`, by device, made before it closed
    rounds: list[dict[str, Any]]
    status: dict[str, Any]
    traffic: dict[str, dict[str, dict[str, int]]]
    outcome: Outcome

    def reopen(self, device: str) -> EdgeClient:
        """The device offline, with nothing but its store."""
        return EdgeClient("http://127.0.0.1:9", store=self.folder / device)

    def shared_in_store(self, device: str) -> dict[str, bytes]:
        store = DeviceStore(self.folder / device)
        try:
            return dict(store.read_shared().vectors)
        finally:
            store.close()


@pytest.fixture(scope="module")
def federation(
    watch_artifacts: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Federation]:
    folder = tmp_path_factory.mktemp("federation")
    manifest = ModelManifest.load(watch_artifacts)
    deltas: dict[bytes, Vector] = {}
    make_update = TrainedRound.make_update

    def spy(self: TrainedRound, *arguments: Any) -> tuple[Outgoing, Any]:
        outgoing, residual = make_update(self, *arguments)
        message = decode(outgoing.message)
        assert isinstance(message, UpdateManifest)
        size = manifest.block(message.block).size
        deltas[message.update_id] = from_bytes(outgoing.payload, size)
        return outgoing, residual

    members = three_devices()
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        patch.setattr(TrainedRound, "make_update", spy)
        server = stack.enter_context(
            running_server(watch_artifacts, folder / "server", "--rounds", "3", *SCHEME)
        )
        clients = [stack.enter_context(member.client(server, folder)) for member in members]
        asyncio.run(take_part(clients))
        predictions = {
            c.device: c.predict_proba(batch_of(m)) for c, m in zip(clients, members, strict=True)
        }
        answers = {what: server.get(what) for what in ("rounds", "status", "devices")}
    yield Federation(
        watch_artifacts,
        folder,
        server,
        {member.name: member for member in members},
        deltas,
        predictions,
        answers["rounds"],
        answers["status"],
        {name: device["blocks"] for name, device in answers["devices"].items()},
        read_outcome(watch_artifacts, server, folder),
    )


def batch_of(device: Device) -> dict[str, Any]:
    return {modality: BATCH[modality] for modality in device.data}


def test_three_rounds_make_version_four(federation: Federation) -> None:
    assert federation.status["is_finished"]
    assert federation.status["round_num"] == 3
    assert federation.status["shared_blocks"] == {"encoder-acc": 4, "encoder-gyro": 4}
    assert federation.status["private_blocks"] == ["fusion", "head"]
    assert [one["cohort_size"] for one in federation.rounds] == [3, 3, 3]
    for number, one in enumerate(federation.rounds, 1):
        assert {b: v["version"] for b, v in one["blocks"].items()} == dict.fromkeys(
            SHARED, number + 1
        )
    files = (federation.folder / "server" / "blocks").rglob("*.safetensors")
    assert sorted(f"{f.parent.name}/{f.stem}" for f in files) == sorted(
        f"{block}/{version}" for block in SHARED for version in range(1, 5)
    )


def test_each_block_is_averaged_over_its_holders(federation: Federation) -> None:
    for one in federation.rounds:
        for block, holders in SHARED.items():
            assert tuple(one["blocks"][block]["holders"]) == holders
            assert one["blocks"][block]["num_examples"] == sum(SIZES[h] for h in holders)


def test_the_training_loss_falls(federation: Federation) -> None:
    losses = [one["loss"] for one in federation.rounds]
    assert losses[-1] < 0.9 * losses[0]
    assert losses[0] == pytest.approx(np.log(7), rel=0.2)  # seven classes, all but untrained


@pytest.mark.parametrize("round_num", [1, 2, 3])
@pytest.mark.parametrize("block", SHARED)
def test_a_version_is_the_mean_weighted_by_examples(
    federation: Federation, block: str, round_num: int
) -> None:
    """From the server's journal and block files, and from what the devices made."""
    journal = federation.server.query(
        "SELECT update_id, device, num_examples, base_version FROM updates "
        "WHERE round_num = ? AND block = ? ORDER BY device",
        round_num,
        block,
    )
    assert [row[1] for row in journal] == list(SHARED[block])
    assert [row[2] for row in journal] == [SIZES[row[1]] for row in journal]
    assert {row[3] for row in journal} == {round_num}
    deltas = [federation.deltas[row[0]].astype(np.float64) for row in journal]
    mean = np.average(deltas, axis=0, weights=[row[2] for row in journal])
    assert np.abs(mean).max() > 1e-4  # something was learned
    before, after = (federation.server.block(block, round_num + i) for i in (0, 1))
    np.testing.assert_allclose(after, before + mean, rtol=1e-6, atol=1e-8)


def test_first_version_is_the_exported_one(federation: Federation) -> None:
    for block in SHARED:
        exported = np.fromfile(federation.artifacts / block / "parameters.bin", "<f4")
        np.testing.assert_array_equal(federation.server.block(block, 1), exported)


def test_private_blocks_are_each_devices_own(federation: Federation) -> None:
    private = federation.outcome.private
    assert set(private) == {(d, b) for d in SIZES for b in ("fusion", "head")}
    for block in ("fusion", "head"):
        initial = np.fromfile(federation.artifacts / block / "parameters.bin", "<f4")
        vectors = [initial, *(private[device, block] for device in SIZES)]
        for i, one in enumerate(vectors):
            for other in vectors[:i]:
                assert np.abs(one - other).max() > 1e-4


def test_shared_blocks_are_the_same_everywhere(federation: Federation) -> None:
    for block, holders in SHARED.items():
        final = federation.outcome.shared[block].astype("<f4").tobytes()
        for device in SIZES:
            stored = federation.shared_in_store(device)
            assert stored.get(block) == (final if device in holders else None)


def test_nothing_waits_in_an_outbox(federation: Federation) -> None:
    for device in SIZES:
        store = DeviceStore(federation.folder / device)
        assert (store.read_state().round_num, store.read_state().outbox) == (3, ())
        store.close()


def test_traffic_is_counted_by_device_and_block(federation: Federation) -> None:
    size = 4 * ModelManifest.load(federation.artifacts).block("encoder-acc").size
    for device, member in federation.devices.items():
        assert set(federation.traffic[device]) == {f"encoder-{m}" for m in member.data}
        for counts in federation.traffic[device].values():
            assert counts["bytes_down"] == 4 * size  # versions 1 to 4
            assert 3 * size < counts["bytes_up"] < 3 * size * 1.01


@pytest.mark.parametrize("device", SIZES)
def test_predicts_offline_from_the_store_alone(federation: Federation, device: str) -> None:
    batch = batch_of(federation.devices[device])
    with federation.reopen(device) as client:
        assert client.device == device
        np.testing.assert_array_equal(client.predict_proba(batch), federation.predictions[device])
        classes = client.predict(batch)
    assert classes.dtype == np.int64
    assert classes.tolist() == federation.predictions[device].argmax(axis=1).tolist()


@pytest.mark.parametrize("modalities", [("acc",), ("gyro",), ("acc", "gyro")])
def test_predicts_with_whatever_is_there(
    federation: Federation, modalities: tuple[str, ...]
) -> None:
    with federation.reopen("both") as client:
        batch = {m: BATCH[m] for m in modalities}
        probabilities = client.predict_proba(batch)
        assert probabilities.shape == (9, 7)
        np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-6)
        for i in (0, 8):
            one = client.predict_proba({m: x[i] for m, x in batch.items()})
            np.testing.assert_allclose(one, probabilities[i : i + 1], rtol=1e-5, atol=1e-7)


def test_modalities_make_a_difference(federation: Federation) -> None:
    with federation.reopen("both") as client:
        found = [client.predict_proba({m: BATCH[m] for m in s}) for s in (["acc"], ["gyro"], BATCH)]
    assert all(np.abs(a - b).max() > 1e-3 for i, a in enumerate(found) for b in found[:i])


def test_a_modality_that_the_device_never_had(federation: Federation) -> None:
    with federation.reopen("acc-only") as client:
        for batch in ({"gyro": BATCH["gyro"]}, BATCH):
            with pytest.raises(DataError, match="no parameters of encoder-gyro"):
                client.predict(batch)


def test_devices_have_learned(federation: Federation) -> None:
    for device, member in federation.devices.items():
        with federation.reopen(device) as client:
            scores = client.evaluate(member.data, member.labels)
        assert scores["num_examples"] == SIZES[device]
        assert scores["accuracy"] > 1.5 / 7  # three short rounds: twice chance or so


# The same scenario again


def test_the_same_seed_gives_the_same_models(federation: Federation, undisturbed: Outcome) -> None:
    """Another process, other tokens, another order of arrival: measured difference 0."""
    undisturbed.assert_close(federation.outcome)


@pytest.mark.mosquitto
@pytest.mark.skipif(missing_mosquitto() is not None, reason=str(missing_mosquitto()))
def test_a_real_mosquitto_gives_the_same_models(
    watch_artifacts: Path, tmp_path: Path, undisturbed: Outcome
) -> None:
    """Measured difference to the embedded broker: 0."""
    with mosquitto(tmp_path) as url:
        outcome = run_federation(watch_artifacts, tmp_path, "--broker", url, num_rounds=3)
    outcome.assert_close(undisturbed)


def test_close_means_close(undisturbed: Outcome) -> None:
    """The comparison itself notices a difference of one part in ten thousand."""
    changed = {name: vector * np.float32(1.0001) for name, vector in undisturbed.shared.items()}
    with pytest.raises(AssertionError):
        Outcome(changed, undisturbed.private).assert_close(undisturbed)
