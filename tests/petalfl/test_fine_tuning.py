"""The device's own model after the last round, with the real server on a small model."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import petalfl.trainer
from petalfl import (
    Budgets,
    DataError,
    EdgeClient,
    PetalError,
    RoundInfo,
    RoundMetrics,
    wire,
)
from petalfl.data import check_inputs, check_labels
from petalfl.fine_tuning import origin_of
from petalfl.local_data import ArrayData
from petalfl.mqtt import MqttTransport
from petalfl.store import DeviceStore, FineTuned, State
from petalfl.trainer import _number
from petalfl.training import Hyperparameters, TrainingResult, train
from petalfl.vectors import Vector, to_bytes
from tests.integration.harness import Server, running_server
from tests.petalfl.clients import LABELS, A, Make, is_ready, until

FINE = Hyperparameters(0.005, momentum=0.5, batch_size=4, epochs=3)
SEED = 3
NUM_STEPS = 3 * 6  # of 24 examples
ROUNDS = (
    "--epochs", "2", "--batch-size", "4", "--momentum", "0.5", "--method", "fedalt",
    "--max-steps", "5", "--proximal-mu", "0.1", "--scheme", "ph", "--seed", str(SEED),
)  # fmt: skip
FINISH = ("--learning-rate", "0.05", "--finish-epochs", "3")
SHA = "ab" * 32
ORIGIN = "cd" * 32


@pytest.fixture
def fine(small_artifacts: Path, tmp_path: Path) -> Iterator[Server]:
    """Two rounds, then three epochs of every device alone."""
    arguments = ("--rounds", "2", *ROUNDS, *FINISH)
    with running_server(small_artifacts, tmp_path / "server", *arguments) as server:
        yield server


@pytest.fixture(scope="module")
def trained(
    small_artifacts: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[EdgeClient]:
    """A device after two rounds without fine-tuning; each test makes its own model anew."""
    folder = tmp_path_factory.mktemp("trained")
    with ExitStack() as stack:
        server = stack.enter_context(
            running_server(small_artifacts, folder / "server", "--rounds", "2", *ROUNDS)
        )
        client = EdgeClient(
            server.url, token=server.token, data={"a": A}, labels=LABELS,
            store=folder / "d", device="d",
        )  # fmt: skip
        stack.callback(client.close)
        client.run()
        yield client


@pytest.fixture
def device(trained: EdgeClient) -> EdgeClient:
    """Without a model of its own, and in a mood to train."""
    trained._pacing.begin()
    trained._trainer.outdate(finish_of(trained, None))
    trained.set_data({"a": A}, LABELS)
    return trained


def finish_of(client: EdgeClient, hyperparameters: Hyperparameters | None = FINE) -> wire.Finish:
    return wire.Finish(client._trainer.pointers(), None, hyperparameters, SEED)


def own(client: EdgeClient) -> dict[str, Vector]:
    return dict(client._trainer._own.vectors)


def fine_tuned(client: EdgeClient, hyperparameters: Hyperparameters = FINE) -> TrainingResult:
    """What `train` alone makes of the federation's model."""
    model = client._trainer.model
    data = ArrayData(check_inputs(model.manifest, {"a": A}),
                     check_labels(model.manifest, LABELS, 24))  # fmt: skip
    rng = np.random.default_rng([SEED, 0, _number(client.device)])
    return train(model.engine, model.manifest, model.parameters, data, hyperparameters, rng)


def assert_own(client: EdgeClient, expected: dict[str, Vector]) -> None:
    found = own(client)
    assert found.keys() == expected.keys() == {"encoder-a", "fusion", "head"}
    for name, vector in expected.items():
        np.testing.assert_array_equal(found[name], vector)
    federations = client._trainer.model
    assert all((found[n] != federations.parameters[n]).any() for n in found)
    best = federations.with_parameters(expected).predict_proba({"a": A})
    np.testing.assert_array_equal(client.predict_proba({"a": A}), best)
    assert (best != federations.predict_proba({"a": A})).any()


# A federation


def test_after_the_last_round_all_blocks_are_trained_alone(
    fine: Server, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    infos: list[RoundInfo] = []
    found: list[RoundMetrics] = []
    sent: list[wire.Message] = []
    publish = MqttTransport.publish

    async def noting(self: MqttTransport, topic: str, data: bytes, **more: Any) -> None:
        sent.append(wire.decode(data))
        await publish(self, topic, data, **more)

    monkeypatch.setattr(MqttTransport, "publish", noting)
    client = make(fine, "d", on_round=infos.append, on_metrics=found.append)
    client.run()
    expected = fine_tuned(client)
    assert_own(client, expected.parameters)
    assert infos == [RoundInfo(1, 2), RoundInfo(2, 2), RoundInfo(2, 2, is_fine_tuning=True)]
    assert [m.is_fine_tuning for m in found] == [False, False, True]
    last = found[-1]
    assert (last.round_num, last.num_examples, last.num_steps) == (2, 24, NUM_STEPS)
    assert last.loss == expected.loss and last.is_complete
    reports = [i for i, message in enumerate(sent) if isinstance(message, wire.Report)]
    assert len(reports) == 2 and sent[reports[-1] + 1 :] == [wire.Status(False)]
    assert fine.get("status")["shared_blocks"]["encoder-a"] == 3

    def never(*arguments: Any, **more: Any) -> Any:
        raise AssertionError("it was trained again")

    client.close()
    again = make(fine, "d")
    monkeypatch.setattr(petalfl.trainer, "train", never)
    again.predict({"a": A})  # offline, from the store alone
    assert_own(again, expected.parameters)
    again.run()
    assert_own(again, expected.parameters)


def test_later_rounds_go_on_from_the_rounds_blocks(
    small_artifacts: Path, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts: list[dict[str, Vector]] = []

    def spy(*arguments: Any, **more: Any) -> TrainingResult:
        starts.append(dict(arguments[2]))
        return train(*arguments, **more)

    folder, words = tmp_path / "server", ("--rounds", "2", *ROUNDS, *FINISH)
    with running_server(small_artifacts, folder, *words) as server:
        client = make(server, "d")
        client.run()
        model = client._trainer.model
    seen: list[dict[str, Vector]] = []
    client.close()
    words = ("--rounds", "3", *ROUNDS, *FINISH)
    with running_server(small_artifacts, folder, *words) as server:
        client = make(server, "d", on_round=lambda info: seen.append(own(client)))
        client.predict({"a": A})
        first = own(client)
        monkeypatch.setattr(petalfl.trainer, "train", spy)
        client.run()
    third, _ = starts  # and the fine-tuning
    for name in first:
        np.testing.assert_array_equal(third[name], model.parameters[name])
    assert first and seen == [{}, {}], "evaluated before the round and before the fine-tuning"
    assert_own(client, fine_tuned(client).parameters)
    assert all((own(client)[name] != first[name]).any() for name in first)


def test_a_pause_lasts_and_nobody_waits_for_the_device(fine: Server, make: Make) -> None:
    progress: list[int] = []

    def rest(metrics: RoundMetrics) -> None:
        if metrics.round_num == 2 and not metrics.is_fine_tuning:
            client.pause()
            progress.clear()

    client = make(fine, "d", on_metrics=rest, on_progress=lambda done, total: progress.append(done))
    client.start()
    until(lambda: fine.get("status")["is_finished"] and not is_ready(fine, "d"), "the goodbye")
    assert client.is_running and client.is_paused and progress == [] and own(client) == {}
    client.resume()
    assert client.wait(60)
    assert progress == [*range(1, NUM_STEPS + 1)]
    assert_own(client, fine_tuned(client).parameters)


@pytest.mark.parametrize("way", ["stop", "close"])
def test_what_was_stopped_is_done_again_at_the_next_finish(
    fine: Server, make: Make, way: str
) -> None:
    batches: list[int] = []

    def end(done: int, total: int) -> None:
        if total == NUM_STEPS:
            batches.append(done)
            if done == 2:
                getattr(client, way)()

    client = make(fine, "d", on_progress=end)
    client.run()
    assert batches == [1, 2]
    client.close()
    again = make(fine, "d")
    federations = again._trainer.model.predict_proba({"a": A})
    np.testing.assert_array_equal(again.predict_proba({"a": A}), federations)
    again.run()
    assert_own(again, fine_tuned(again).parameters)


# Of one device


def test_what_asks_for_the_same_finds_it_made(device: EdgeClient) -> None:
    trainer, finish = device._trainer, finish_of(device)
    trainer.fine_tune(finish)
    made = own(device)
    turned = replace(finish, blocks=dict(reversed(finish.blocks.items())), num_holders={})
    trainer.outdate(turned)
    assert own(device).items() == made.items(), "the same objects"
    newer = {name: replace(to, version=to.version + 1) for name, to in finish.blocks.items()}
    others: list[wire.Task | wire.Finish] = [
        finish_of(device, replace(FINE, epochs=4)),
        replace(finish, seed=None),
        replace(finish, blocks=newer),
        finish_of(device, None),
        wire.Task(3, 3, FINE, SEED, finish.blocks),
    ]
    for other in others:
        trainer.fine_tune(finish)
        assert own(device)
        trainer.outdate(other)
        assert own(device) == {} and trainer._store.read_fine_tuned() is None


def test_fedalt_and_the_proximal_term_know_the_shared_blocks(device: EdgeClient) -> None:
    chosen = replace(FINE, method="fedalt", proximal_mu=0.5)
    device._trainer.fine_tune(finish_of(device, chosen))
    model = device._trainer.model
    data = device._trainer.data.refresh(model)
    expected = train(
        model.engine, model.manifest, model.parameters, data, chosen,
        np.random.default_rng([SEED, 0, _number(device.device)]), shared={"encoder-a", "fusion"},
    )  # fmt: skip
    assert_own(device, expected.parameters)


FAILURES: dict[str, tuple[Hyperparameters, str]] = {
    "divergence": (replace(FINE, learning_rate=1e3, momentum=0.99), "training diverged"),
    "memory": (replace(FINE, batch_size=1 << 16), "training takes about"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_where_it_fails_the_federation_s_model_stays(
    device: EdgeClient, monkeypatch: pytest.MonkeyPatch, failure: str
) -> None:
    told: list[PetalError] = []
    hyperparameters, reason = FAILURES[failure]
    trainer = device._trainer
    monkeypatch.setattr(trainer, "_callbacks", replace(device._callbacks, on_error=told.append))
    if failure == "memory":
        monkeypatch.setattr(trainer, "_budgets", Budgets(memory_bytes=9))
    federations = trainer.model
    with np.errstate(all="ignore"):
        trainer.fine_tune(finish_of(device, hyperparameters))
    [error] = told
    assert isinstance(error, DataError)
    assert str(error).startswith(f"fine-tuning is left out: {reason}")
    assert own(device) == {} and trainer.model is federations
    assert device.evaluate({"a": A}, LABELS) == federations.evaluate({"a": A}, LABELS)


def test_a_budget_of_seconds_ends_it_early(
    device: EdgeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what was trained until then is the device's own model."""
    found: list[RoundMetrics] = []
    trainer = device._trainer
    monkeypatch.setattr(trainer, "_callbacks", replace(device._callbacks, on_metrics=found.append))
    monkeypatch.setattr(trainer, "_budgets", Budgets(seconds=60))
    ticks = iter(range(0, 10_000, 20))
    monkeypatch.setattr("petalfl.trainer.time.monotonic", lambda: float(next(ticks)))
    trainer.fine_tune(finish_of(device))
    [metrics] = found
    assert not metrics.is_complete and 0 < metrics.num_steps < NUM_STEPS
    assert own(device)


def test_stopped_it_leaves_nothing(device: EdgeClient, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, is_held, is_free = device._trainer, threading.Event(), threading.Event()

    def hold(done: int, total: int) -> None:
        is_held.set()
        assert is_free.wait(60)

    monkeypatch.setattr(trainer, "_callbacks", replace(device._callbacks, on_progress=hold))
    ended: list[type[BaseException]] = []

    def run() -> None:
        try:
            trainer.fine_tune(finish_of(device))
        except BaseException as error:
            ended.append(type(error))

    aside = threading.Thread(target=run)
    aside.start()
    assert is_held.wait(60)
    device.stop()
    is_free.set()
    aside.join(60)
    assert [error.__name__ for error in ended] == ["Stopped"]
    assert own(device) == {} and trainer._store.read_fine_tuned() is None


# On disk

MADE = FineTuned(ORIGIN, 2, "layout", {"head": to_bytes(np.arange(50, dtype=np.float32))})


def test_an_encrypted_store_shows_nothing_of_it(tmp_path: Path) -> None:
    path = tmp_path / "fine-tuned.msgpack"
    for key in (None, bytes(range(32))):  # a plain store that gets a key is encrypted at once
        store = DeviceStore(tmp_path, key)
        if key is None:
            store.write_fine_tuned(MADE)
        assert store.read_fine_tuned() == MADE
        store.close()
        assert (MADE.vectors["head"] in path.read_bytes()) == (key is None)
    assert [p.name for p in tmp_path.glob("fine-tuned*")] == [path.name]


def test_what_is_damaged_or_half_written_is_made_again(tmp_path: Path) -> None:
    path = tmp_path / "fine-tuned.msgpack"
    store = DeviceStore(tmp_path)
    store.write_fine_tuned(MADE)
    store.close()
    path.write_bytes(path.read_bytes()[:-1])
    (tmp_path / "fine-tuned.msgpack.tmp").write_bytes(b"half")
    store = DeviceStore(tmp_path)
    assert store.read_fine_tuned() is None
    assert not (tmp_path / "fine-tuned.msgpack.tmp").exists()
    store.write_fine_tuned(MADE)
    assert store.read_fine_tuned() == MADE
    store.drop_fine_tuned()
    assert store.read_fine_tuned() is None
    store.close()


@pytest.mark.parametrize("change", [{"round_num": 3}, {"layout": "other"}], ids=["round", "layout"])
def test_it_belongs_to_the_state_that_it_was_made_from(
    device: EdgeClient, change: dict[str, Any]
) -> None:
    """As after a crash between the next round and its removal, or with another model."""
    trainer = device._trainer
    trainer.fine_tune(finish_of(device))
    state: State = replace(trainer.state, **change)
    assert own(device)
    trainer._own.load(trainer.state, trainer.model.held)
    assert own(device)
    trainer._own.load(state, trainer.model.held)
    assert own(device) == {}


def test_a_task_asks_for_no_fine_tuning() -> None:
    blocks = {"head": wire.BlockVersion(1, SHA)}
    assert origin_of(wire.Task(1, 1, FINE, 0, blocks)) == ""
    assert origin_of(wire.Finish(blocks, None, None, 3)) == ""
    assert origin_of(wire.Finish(blocks, None, FINE, 3)) != ""
