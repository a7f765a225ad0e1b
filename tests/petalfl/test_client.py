"""`EdgeClient`, one or two of them, with the real server on a small model.

What whole federations do is in tests/integration.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import petalfl.training
from petalfl import (
    DataError,
    EdgeClient,
    EnrollError,
    ExampleStore,
    PetalError,
    RoundInfo,
    RoundMetrics,
    StoreError,
    TransportError,
    wire,
)
from petalfl.downlink import Downlink, Session
from petalfl.http import HttpClient, NotThereError
from petalfl.mqtt import MqttTransport
from petalfl.participation import Participation
from petalfl.store import DeviceStore, Outgoing, State
from petalfl.threads import Threads
from petalfl.trainer import LocalData, Trainer
from petalfl.training import Hyperparameters, TrainingResult
from petalfl.transport import MemoryBroker
from petalfl.uplink import Uplink
from tests.integration.harness import Server, running_server

A = np.random.default_rng(1).standard_normal((24, 5), dtype=np.float32)
B = np.random.default_rng(2).standard_normal((24, 2, 8), dtype=np.float32)
LABELS = np.arange(24) % 3


@pytest.fixture(scope="module")
def idle(small_artifacts: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that enrolls devices and never has enough of them."""
    data_dir = tmp_path_factory.mktemp("idle")
    with running_server(small_artifacts, data_dir, "--min-devices", "99") as server:
        yield server


@pytest.fixture
def busy(small_artifacts: Path, tmp_path: Path) -> Iterator[Server]:
    """A server that gives a single device three rounds of 12 batches."""
    arguments = ("--rounds", "3", "--epochs", "2", "--batch-size", "4")
    with running_server(small_artifacts, tmp_path / "server", *arguments) as server:
        yield server


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., EdgeClient]]:
    """Makes clients that are closed after the test."""
    made: list[EdgeClient] = []

    def make(server: Server, device: str = "", **changes: Any) -> EdgeClient:
        defaults = {
            "token": server.token,
            "data": {"a": A},
            "labels": LABELS,
            "store": tmp_path / (device or "store"),
            "device": device,
        }
        made.append(EdgeClient(changes.pop("url", server.url), **{**defaults, **changes}))
        return made[-1]

    yield make
    for client in made:
        with contextlib.suppress(OSError):  # the test has closed it
            client.close()


Make = Callable[..., EdgeClient]


# Refusals


def test_wrong_token(idle: Server, make: Make) -> None:
    client = make(idle, "wrong-token", token="guess")
    with pytest.raises(EnrollError, match="401 wrong or no token"):
        client.run()
    assert "wrong-token" not in idle.get("devices")


def test_the_right_token_after_the_wrong_one(idle: Server, make: Make, tmp_path: Path) -> None:
    client = make(idle, "second-try", token="guess")
    with pytest.raises(EnrollError):
        client.run()
    client.close()
    run_and_stop(make(idle, "second-try"))
    assert idle.get("devices")["second-try"]["modalities"] == ["a"]


def test_a_name_that_is_taken(idle: Server, make: Make, tmp_path: Path) -> None:
    run_and_stop(make(idle, "taken"))
    other = make(idle, "taken", store=tmp_path / "other")
    with pytest.raises(EnrollError, match="409 device taken is enrolled already"):
        other.run()


def test_a_store_that_is_open(idle: Server, make: Make) -> None:
    client = make(idle, "first")
    with pytest.raises(StoreError, match="is open already; give every client its own"):
        make(idle, "first")
    client.close()
    make(idle, "first")


def test_no_server(idle: Server, make: Make) -> None:
    client = make(idle, url="http://127.0.0.1:9")
    with pytest.raises(TransportError, match=r"no petalfl server answers at http://127.0.0.1:9"):
        client.run()


def test_no_broker(idle: Server, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Downlink, "get_session", lambda self: Session("127.0.0.1", 9, False))
    with pytest.raises(TransportError, match=r"no broker answers at mqtt://127.0.0.1:9"):
        make(idle).run()


def test_another_federation(idle: Server, make: Make) -> None:
    with pytest.raises(TransportError, match="404"):
        make(idle, federation="other").run()


def test_a_credential_that_was_revoked(idle: Server, make: Make, tmp_path: Path) -> None:
    client = make(idle, "revoked")
    run_and_stop(client)
    client.close()
    store = DeviceStore(tmp_path / "revoked")
    identity = store.read_identity()
    assert identity is not None
    store.write_identity(type(identity)("default", "revoked", "x" * 43, identity.private_blocks))
    store.close()
    with pytest.raises(
        EnrollError, match=r"401 .*not enrolled here, or its credential was revoked"
    ):
        make(idle, "revoked").run()


def test_malformed_replies(idle: Server, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(HttpClient, "post_json", lambda self, path, body: {"device": "../x"})
        with pytest.raises(TransportError, match="enrollment reply is malformed: Identity"):
            make(idle, "d1").run()
    monkeypatch.setattr(HttpClient, "get_json", lambda self, path: {"mqtt_port": 0})
    with pytest.raises(TransportError, match="session reply is malformed: Session"):
        make(idle, "d2").run()


BAD_DATA = {
    "shape": ({"data": {"a": A[:, :4]}}, r"modality a: found shape \(24, 4\), expected \(n, 5\)"),
    "NaN": ({"data": {"a": A * np.nan}}, "modality a: example 0 holds NaN"),
    "object": ({"data": {"a": A.astype(object)}}, "modality a: found object"),
    "lengths": ({"data": {"a": A, "b": B[:9]}}, r"found \{'a': 24, 'b': 9\}"),
    "fewer labels": ({"labels": LABELS[:9]}, r"labels: found int64 \(9,\)"),
    "a class too many": ({"labels": LABELS + 1}, "labels: found 1 to 3, expected 0 to 2"),
    "no labels": ({"labels": None}, r"labels: .* expected integers \(24,\)"),
    "by task": ({"labels": {"head": LABELS[:9]}}, r"labels of head: found int64 \(9,\)"),
}


@pytest.mark.parametrize(("changes", "message"), BAD_DATA.values(), ids=BAD_DATA.keys())
def test_bad_data(idle: Server, make: Make, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        make(idle, **changes).run()


def test_a_modality_that_the_model_lacks(idle: Server, make: Make) -> None:
    with pytest.raises(PetalError, match="found modality 'eeg', the model has a, b"):
        make(idle, data={"a": A, "eeg": A}).run()


@pytest.mark.parametrize(("labels", "found"), [({"mood": LABELS}, "task 'mood'"), ({}, "no task")])
def test_a_task_that_the_model_lacks(idle: Server, make: Make, labels: Any, found: str) -> None:
    with pytest.raises(PetalError, match=f"found {found}, the model has head"):
        make(idle, labels=labels).run()


@pytest.mark.parametrize("device", ["A", "a/b", "+", "#", "x" * 65, "-a", "a b", "é", ".."])
def test_malformed_device(idle: Server, tmp_path: Path, device: str) -> None:
    with pytest.raises(ValueError, match="is no name"):
        EdgeClient(idle.url, store=tmp_path, device=device)
    assert list(tmp_path.iterdir()) == []


def test_a_malformed_url_leaves_the_store_free(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected http"):
        EdgeClient("mqtt://h", store=tmp_path)
    DeviceStore(tmp_path).close()


def test_a_damaged_store_is_left_free(tmp_path: Path) -> None:
    (tmp_path / "state.msgpack").write_bytes(b"rubbish")
    for _ in range(2):
        with pytest.raises(StoreError, match="checksum"):
            EdgeClient("http://127.0.0.1:9", store=tmp_path)


def test_a_random_name_stays(idle: Server, make: Make) -> None:
    client = make(idle)
    run_and_stop(client)
    name = client.device
    client.close()
    assert make(idle).device == name
    assert name.startswith("device-")
    assert name in idle.get("devices")


def test_nothing_to_predict_with_yet(idle: Server, make: Make) -> None:
    with pytest.raises(StoreError, match=r"has no model yet: call run\(\) first"):
        make(idle).predict({"a": A})


# Stopping


def run_and_stop(client: EdgeClient) -> None:
    """Enrolls, and stops."""
    with running(client):
        pass


@contextlib.contextmanager
def running(client: EdgeClient) -> Iterator[None]:
    """Runs a client on a thread; stops it at the end, which must not take long."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            client.run()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        until(lambda: client._trainer.identity is not None or bool(errors), "enrollment")
        yield
    finally:
        client.stop()
        thread.join(4)
        assert not thread.is_alive()
    assert errors == []


def test_stop_while_waiting(idle: Server, make: Make) -> None:
    client = make(idle, "waiting")
    with running(client):
        until(lambda: is_ready(idle, "waiting"), "the device is ready")
    until(lambda: not is_ready(idle, "waiting"), "the device is gone")


def is_ready(server: Server, device: str) -> bool:
    return bool(server.get("devices").get(device, {}).get("is_ready"))


def until(is_so: Callable[[], bool], what: str, timeout_s: float = 10) -> None:
    give_up_s = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < give_up_s, f"waited for: {what}"
        time.sleep(0.02)


def test_stop_amid_training(busy: Server, make: Make) -> None:
    """The round is given up between two batches, and trained again by the next run."""
    rounds: list[int] = []
    batches: list[int] = []

    def stop_soon(done: int, total: int) -> None:
        batches.append(done)
        if done == 2:
            client.stop()

    client = make(
        busy, "d", on_round=lambda info: rounds.append(info.round_num), on_progress=stop_soon
    )
    client.run()
    assert (rounds, batches) == ([1], [1, 2])
    assert client._trainer.state.round_num == 0
    assert client._trainer.state.outbox == ()
    client.close()
    again = make(busy, "d", on_round=lambda info: rounds.append(info.round_num))
    again.run()
    assert rounds == [1, 1, 2, 3]


def test_nothing_is_written_after_run_has_returned(
    busy: Server, make: Make, tmp_path: Path
) -> None:
    """Even if a callback is slow when the client is stopped."""
    started = threading.Event()

    def dawdle(done: int, total: int) -> None:
        started.set()
        time.sleep(0.2)

    async def scenario() -> None:
        client = make(busy, "d", on_progress=dawdle)
        run = asyncio.create_task(client.arun())
        await asyncio.to_thread(started.wait, 10)
        client.stop()
        await asyncio.wait_for(run, 2)
        client.close()

    asyncio.run(scenario())
    before = {p: p.read_bytes() for p in tmp_path.rglob("*.msgpack")}
    time.sleep(0.5)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*.msgpack")} == before
    store = DeviceStore(tmp_path / "d")
    assert store.read_state().round_num == 0
    store.close()


def test_a_cancelled_run_ends_its_training(busy: Server, make: Make) -> None:
    async def scenario() -> None:
        started = threading.Event()

        def dawdle(done: int, total: int) -> None:
            started.set()
            time.sleep(0.05)

        client = make(busy, "d", on_progress=dawdle)
        run = asyncio.create_task(client.arun())
        await asyncio.to_thread(started.wait, 10)
        run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(run, 5)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(scenario())


def test_stop_before_and_after_run(busy: Server, make: Make) -> None:
    client = make(busy, "d")
    client.stop()  # nothing runs: nothing to stop
    client.run()
    assert client._trainer.state.round_num == 3
    client.stop()


def test_close_twice(idle: Server, make: Make) -> None:
    with make(idle) as client:
        client.close()


# Taking part


def test_callbacks(busy: Server, make: Make) -> None:
    infos: list[RoundInfo] = []
    progress: list[tuple[int, int]] = []
    threads: set[int] = set()

    def note(info: RoundInfo) -> None:
        infos.append(info)
        threads.add(threading.get_ident())

    def note_progress(done: int, total: int) -> None:
        progress.append((done, total))
        threads.add(threading.get_ident())

    make(busy, "d", on_round=note, on_progress=note_progress).run()
    assert infos == [RoundInfo(1, 3), RoundInfo(2, 3), RoundInfo(3, 3)]
    assert progress == [(done, 12) for _ in range(3) for done in range(1, 13)]
    assert threading.get_ident() not in threads


def test_metrics_of_every_round(busy: Server, make: Make) -> None:
    found: list[RoundMetrics] = []
    make(busy, "d", on_metrics=found.append).run()
    assert [m.round_num for m in found] == [1, 2, 3]
    assert {(m.num_examples, m.num_steps) for m in found} == {(24, 12)}
    assert all(m.seconds > 0 for m in found)
    reported = [row["loss"] for row in busy.get("rounds")]
    assert [m.loss for m in found] == pytest.approx(reported)


def test_start_runs_aside(busy: Server, make: Make) -> None:
    is_held, is_free = threading.Event(), threading.Event()

    def hold(done: int, total: int) -> None:
        is_held.set()
        assert is_free.wait(10)

    client = make(busy, "d", on_progress=hold)
    client.start()
    assert is_held.wait(20)
    with pytest.raises(RuntimeError, match="is running already; stop it first"):
        client.start()
    is_free.set()
    until(lambda: busy.get("status")["is_finished"], "the last round")
    client.close()
    assert client._trainer.state.round_num == 3


@pytest.mark.parametrize("when", ["at once", "amid training"])
def test_close_ends_what_was_started(busy: Server, make: Make, when: str) -> None:
    is_training = threading.Event()
    client = make(busy, "d", on_progress=lambda done, total: is_training.set())
    client.start()
    assert when == "at once" or is_training.wait(20)
    client.close()
    assert not [t for t in threading.enumerate() if t.name == "petalfl"]


def test_what_ends_a_started_client_is_told(idle: Server, make: Make) -> None:
    errors: list[PetalError] = []
    client = make(idle, "d", token="guess", on_error=errors.append)
    client.start()
    until(lambda: bool(errors), "the error")
    client.close()
    assert [type(error) for error in errors] == [EnrollError]


def test_a_failing_callback_is_told_where_nothing_raises_it(busy: Server, make: Make) -> None:
    errors: list[PetalError] = []

    def fail(info: RoundInfo) -> None:
        raise ValueError("the app's own")

    client = make(busy, "d", on_round=fail, on_error=errors.append)
    client.start()
    until(lambda: bool(errors), "the error")
    client.close()
    assert list(map(str, errors)) == ["ValueError: the app's own"]


def test_start_returns_where_no_loop_can_be_made(
    idle: Server, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(work: Any) -> None:
        work.close()
        raise OSError(24, "Too many open files")

    errors: list[PetalError] = []
    client = make(idle, "no-loop", on_error=errors.append)
    monkeypatch.setattr("petalfl.client.asyncio.run", fail)
    client.start()
    until(lambda: bool(errors), "the error")
    assert "Too many open files" in str(errors[0])


def test_data_set_during_a_snapshot_stays(
    busy: Server, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[int] = []
    with ExampleStore(tmp_path / "examples") as examples:
        for a, label in zip(A[:10], LABELS[:10], strict=True):
            examples.append({"a": a}, int(label))
        snapshot, num_snapshots = ExampleStore.snapshot, 0

        def slow(self: ExampleStore, *names: Any) -> Any:
            nonlocal num_snapshots
            num_snapshots += 1
            result = snapshot(self, *names)
            if num_snapshots == 2:  # the first is that of the start
                client.set_data({"a": A[:7]}, LABELS[:7])
            return result

        monkeypatch.setattr(ExampleStore, "snapshot", slow)
        client = make(
            busy, "d", data=examples, labels=None,
            on_metrics=lambda metrics: found.append(metrics.num_examples),
        )  # fmt: skip
        client.run()
    assert found == [7, 7, 7]


def test_an_update_that_was_rejected_is_told(
    busy: Server, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors: list[PetalError] = []

    async def reject(self: Uplink, outgoing: Outgoing) -> wire.Receipt:
        message = wire.decode(outgoing.message)
        if isinstance(message, wire.Report):
            return await deliver(self, outgoing)
        return wire.Receipt(message.update_id, "rejected", "too long")  # type: ignore[union-attr]

    deliver = Uplink.deliver
    monkeypatch.setattr(Uplink, "deliver", reject)
    make(busy, "d", on_error=errors.append).run()
    assert {str(error) for error in errors} == {"the server rejected an update: too long"}


def test_a_pause_lasts_until_resumed_or_stopped(busy: Server, make: Make) -> None:
    batches: list[int] = []

    def pause_once(done: int, total: int) -> None:
        batches.append(done)
        if len(batches) == 2:
            client.pause()

    client = make(busy, "d", on_progress=pause_once)
    with running(client):
        until(lambda: client.is_paused, "the pause")
        time.sleep(0.3)
        assert batches == [1, 2]  # within the batch
        client.resume()
        until(lambda: busy.get("status")["round_num"] == 2, "round 2")
        assert batches[:12] == list(range(1, 13))  # the round went on where it was
        client.pause()
        time.sleep(0.1)  # `running` stops it: a pause does not hold that up


def test_training_rests_while_the_device_says_so(
    busy: Server, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("petalfl.pacing.POLL_S", 0.02)
    is_charging, num_asked = True, 0
    batches: list[int] = []

    def unplug(done: int, total: int) -> None:
        nonlocal is_charging
        batches.append(done)
        is_charging = len(batches) != 5

    def should_train() -> bool:
        nonlocal num_asked
        num_asked += 1
        return is_charging

    client = make(busy, "d", on_progress=unplug, should_train=should_train)
    with running(client):
        until(lambda: num_asked > 10, "to be asked again and again")
        assert batches == [1, 2, 3, 4, 5]
        is_charging = True
        until(lambda: busy.get("status")["is_finished"], "the last round")
    assert len(batches) == 36


# Modalities come and go


def test_a_modality_that_goes_and_comes_back(busy: Server, make: Make, tmp_path: Path) -> None:
    """A watch is taken off after the first round, and put on again after the second."""
    both = {"a": A, "b": B}
    steps = {1: {"a": A}, 2: both}
    held: list[tuple[str, ...]] = []

    def change(metrics: RoundMetrics) -> None:
        held.append(tuple(client._trainer.local.inputs))
        if metrics.round_num in steps:
            client.set_data(steps[metrics.round_num], LABELS)

    client = make(busy, "d", data=both, on_metrics=change)
    client.run()
    assert held == [("a", "b"), ("a",), ("a", "b")]
    rows = busy.query("SELECT round_num, block FROM updates WHERE round_num > 1 ORDER BY 1, 2")
    assert rows == [(2, "encoder-a"), (3, "encoder-a"), (3, "encoder-b")]


def test_data_that_does_not_fit_changes_nothing(idle: Server, make: Make) -> None:
    client = make(idle, "fits-not")
    with running(client):
        until(lambda: is_ready(idle, "fits-not"), "ready")
        with pytest.raises(DataError, match="does not hold encoder-b; stop the client"):
            client.set_data({"a": A, "b": B}, LABELS)
        with pytest.raises(DataError, match="modality a: found shape"):
            client.set_data({"a": B}, LABELS)
        assert client._trainer.local.inputs.keys() == {"a"}
    client.set_data({"a": A[:7]}, LABELS[:7])  # it is looked at when it runs
    with running(client):
        until(lambda: len(client._trainer.local.inputs["a"]) == 7, "its data")


# Examples that grow, a store that is encrypted


def test_every_round_trains_on_what_has_labels_then(
    busy: Server, make: Make, tmp_path: Path
) -> None:
    found: list[int] = []
    with ExampleStore(tmp_path / "examples") as examples:
        for a, label in zip(A[:10], LABELS[:10], strict=True):
            examples.append({"a": a}, int(label))
        late = examples.append({"a": A[10]})

        def grow(info: RoundInfo) -> None:
            if info.round_num == 2:
                examples.label(late, 1)
            elif info.round_num == 3:
                examples.append({"a": A[11], "b": B[11]}, 0)  # a sensor more than it holds
                examples.append({"a": A[12]})

        client = make(
            busy, "d", data=examples, labels=None, on_round=grow,
            on_metrics=lambda metrics: found.append(metrics.num_examples),
        )  # fmt: skip
        client.run()
    assert found == [10, 11, 12]
    counted = busy.query("SELECT num_examples FROM reports ORDER BY round_num")
    assert counted == [(10,), (11,), (12,)]


def test_examples_that_will_not_do_cost_a_round_and_not_the_run(
    busy: Server, make: Make, tmp_path: Path
) -> None:
    errors: list[PetalError] = []
    with ExampleStore(tmp_path / "examples") as examples:
        for a, label in zip(A[:10], LABELS[:10], strict=True):
            examples.append({"a": a}, int(label))

        def spoil(info: RoundInfo) -> None:
            if info.round_num == 2:
                examples.append({"a": A[10]}, 7)  # no class of the model

        client = make(busy, "d", data=examples, labels=None, on_round=spoil, on_error=errors.append)
        with running(client):
            until(lambda: bool(errors), "the error")
        assert client._trainer.state.round_num == 1
    assert str(errors[0]).startswith("round 2 is left out: labels: found 0 to 7")


def test_an_example_store_that_will_not_do(idle: Server, make: Make, tmp_path: Path) -> None:
    with ExampleStore(tmp_path / "examples") as examples:
        examples.append({"a": A[0]})
        client = make(idle, "no-labels", data=examples, labels=None)
        with pytest.raises(DataError, match="no example has"):
            client.run()
        with pytest.raises(DataError, match="has its own labels: give none beside it"):
            make(idle, "two-labels", data=examples).run()


def test_an_encrypted_store(busy: Server, make: Make) -> None:
    key = bytes(range(32))
    with make(busy, "d", key=key) as client:
        client.run()
        before = client.predict_proba({"a": A})
    with pytest.raises(StoreError):
        make(busy, "d")
    with pytest.raises(StoreError):
        make(busy, "d", key=bytes(32))
    np.testing.assert_array_equal(make(busy, "d", key=key).predict_proba({"a": A}), before)


def test_on_round_may_evaluate(busy: Server, make: Make) -> None:
    """The round's blocks are in place by then."""
    scores: list[dict[str, float]] = []

    def evaluate(info: RoundInfo) -> None:
        scores.append(client.evaluate({"a": A}, LABELS))

    client: EdgeClient = make(busy, "d", on_round=evaluate)
    client.run()
    assert len(scores) == 3
    assert client.evaluate({"a": A}, LABELS)["num_examples"] == 24


def test_a_failing_callback_ends_the_run(busy: Server, make: Make) -> None:
    def fail(info: RoundInfo) -> None:
        raise ZeroDivisionError("in the app")

    with pytest.raises(ZeroDivisionError, match="in the app"):
        make(busy, "d", on_round=fail).run()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # overflows, on the training thread
def test_training_that_diverges_ends_the_run(
    small_artifacts: Path, tmp_path: Path, make: Make
) -> None:
    arguments = ("--rounds", "1", "--learning-rate", "1000", "--batch-size", "4")
    with running_server(small_artifacts, tmp_path / "server", *arguments) as server:
        client = make(server, "d", data={"a": A * 1e30})
        with pytest.raises(
            DataError, match=r"training diverged at batch .*lower the learning rate"
        ):
            client.run()
        assert client._trainer.state.round_num == 0  # nothing of it is kept


def test_a_device_that_fails_is_not_waited_for(busy: Server, make: Make) -> None:
    """It says that it goes, so that no later round opens with it and runs into its deadline."""

    def fail(info: RoundInfo) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        make(busy, "d", on_round=fail).run()
    until(lambda: not is_ready(busy, "d"), "the device is gone", 1.5)


def test_a_device_that_is_cancelled_is_not_waited_for(idle: Server, make: Make) -> None:
    """Ctrl-C cancels `run`."""

    async def scenario() -> None:
        run = asyncio.create_task(make(idle, "cancelled").arun())
        while not await asyncio.to_thread(is_ready, idle, "cancelled"):
            await asyncio.sleep(0.02)
        run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await run

    asyncio.run(scenario())
    until(lambda: not is_ready(idle, "cancelled"), "the device is gone", 1.5)


def test_when_it_is_over_there_is_no_more_training(busy: Server, make: Make) -> None:
    client = make(busy, "d")
    client.run()
    expected = client.predict_proba({"a": A})
    client.close()
    rounds: list[RoundInfo] = []
    again = make(busy, "d", on_round=rounds.append)
    again.run()
    assert rounds == []
    np.testing.assert_array_equal(again.predict_proba({"a": A}), expected)


def test_a_download_that_is_damaged_is_tried_again(
    busy: Server, make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("petalfl.participation.BACKOFF_S", (0.01, 0.02))
    get = HttpClient.get
    num_downloads = 0

    def flip_a_bit(self: HttpClient, path: str, max_bytes: int) -> bytes:
        nonlocal num_downloads
        data = get(self, path, max_bytes)
        if "/blocks/" in path:
            num_downloads += 1
            data = data[:-1] + bytes([data[-1] ^ num_downloads % 2])
        return data

    monkeypatch.setattr(HttpClient, "get", flip_a_bit)
    client = make(busy, "d")
    client.run()
    assert client._trainer.state.round_num == 3
    assert "block encoder-a version 1: wrong sha256" in caplog.text


def test_a_download_that_fails_is_tried_again(
    busy: Server, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once the device takes part, a server that is away for a while ends nothing."""
    monkeypatch.setattr("petalfl.participation.BACKOFF_S", (0.01, 0.02))
    fetch_block = Downlink.fetch_block
    calls: list[str] = []

    def flaky(self: Downlink, block: Any, pointer: Any) -> Any:
        calls.append(block.name)
        if len(calls) % 2:
            raise TransportError("503")
        return fetch_block(self, block, pointer)

    monkeypatch.setattr(Downlink, "fetch_block", flaky)
    client = make(busy, "d")
    client.run()
    assert client._trainer.state.round_num == 3
    assert len(calls) == 2 * 4


def test_of_a_version_with_another_digest_the_new_one_is_fetched(
    busy: Server, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a restore the server makes its versions anew: the number alone says nothing."""
    with make(busy, "d") as client:
        client.run()
    again = make(busy, "d")
    again.predict({"a": A})
    known = dict(again._trainer._pointers)
    fetched: list[wire.BlockVersion] = []

    def fetch_block(self: Downlink, block: Any, pointer: wire.BlockVersion) -> Any:
        fetched.append(pointer)
        return np.zeros(block.size, np.float32)

    monkeypatch.setattr(Downlink, "fetch_block", fetch_block)
    taking_part = part_of(again)
    taking_part._fetch_blocks(known)
    assert fetched == []
    other = wire.BlockVersion(known["encoder-a"].version, "0" * 64)
    taking_part._fetch_blocks(known | {"encoder-a": other})
    assert fetched == [other]
    assert again._trainer._pointers == known | {"encoder-a": other}


def part_of(client: EdgeClient) -> Participation:
    """Without a connection."""
    identity = client._trainer.identity
    assert identity is not None
    return Participation(
        identity, client._trainer, client._downlink, client._callbacks, client._pacing,
        client._threads,
    )  # fmt: skip


def numbered_task(round_num: int) -> wire.Task:
    return wire.Task(round_num, 0, Hyperparameters(0.1), 0, {"head": version(round_num)})


def version(number: int) -> wire.BlockVersion:
    return wire.BlockVersion(number, f"{number:064x}")


class Idler(Trainer):
    """A device that only notes what it should train."""

    def __init__(self, round_num: int) -> None:
        self.state = State(round_num)
        self.local = LocalData({}, {})
        self.trained: list[int] = []

    def check_blocks(self, task: wire.Task | wire.Finish) -> None:
        pass

    def train_round(self, task: wire.Task) -> bool:
        self.trained.append(task.round_num)
        self.state = State(task.round_num)
        return True

    def empty_outbox(self) -> None:
        pass


class Hearing(Participation):
    """An `Idler`'s, at a server that has no version but those in ``served``."""

    def __init__(self, round_num: int, served: set[int]) -> None:
        self.idler = Idler(round_num)
        self.served = served
        self.tried: list[int] = []
        self.answer: wire.Task | None = None
        unused: Any = None
        super().__init__(unused, self.idler, unused, unused, unused, Threads())

    @property
    def trained(self) -> list[int]:
        return self.idler.trained

    async def hear(self, *messages: wire.Task, answer: wire.Task | None = None) -> None:
        """Messages that come one after another; announced anew, the server may answer."""
        self._announced = self.idler.ready  # it has been said already
        self.answer = answer
        worker = asyncio.create_task(self._work(Uplink(MemoryBroker().connect(), "f", "d")))
        for message in messages:
            self._inbox.put(message)
            await asyncio.sleep(0.1)
        assert not worker.done()
        worker.cancel()
        await asyncio.gather(worker, return_exceptions=True)

    def _announce_soon(self) -> None:
        if self.answer is not None:
            self._inbox.put(self.answer)

    def _fetch_blocks(self, wanted: Any) -> None:
        self.tried.append(wanted["head"].version)
        if self.tried[-1] not in self.served:
            raise NotThereError("404")


@pytest.fixture
def no_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("petalfl.participation.BACKOFF_S", (0.01, 0.02))


async def test_a_version_that_is_gone_is_given_up(no_backoff: None) -> None:
    client = Hearing(0, served={2})
    await client.hear(numbered_task(1), numbered_task(2))
    assert client.trained == [2]
    asking = Hearing(0, served={2})
    await asking.hear(numbered_task(1), answer=numbered_task(2))
    assert (asking.tried, asking.trained) == ([1, 2], [2])


async def test_a_version_that_is_gone_is_not_asked_for_without_end() -> None:
    client = Hearing(0, served=set())
    await client.hear(*map(numbered_task, [1, 1, 1]), answer=numbered_task(1))
    assert client.tried in ([1], [1, 1])


async def test_a_server_that_went_back_is_followed() -> None:
    """It says again what the device has long trained; a replay nobody says again."""
    client = Hearing(8, served={3, 4, 9})
    await client.hear(*map(numbered_task, [3, 4]), answer=numbered_task(3))
    assert client.trained == [3, 4]
    other = Hearing(8, served={3, 4, 9})
    await other.hear(numbered_task(3), answer=numbered_task(9))
    assert other.trained == [9]


def test_a_round_that_came_to_nothing_is_taken_back(
    small_artifacts: Path, tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was learned of a shared block and did not count is dropped; of a private one, kept."""
    starts: list[dict[str, Any]] = []
    train, deliver = petalfl.training.train, Uplink.deliver

    def spy(*arguments: Any, **more: Any) -> TrainingResult:
        starts.append(dict(arguments[2]))
        return train(*arguments, **more)

    async def lose_round_1(self: Uplink, outgoing: Outgoing) -> wire.Receipt:
        message = wire.decode(outgoing.message)
        assert isinstance(message, (wire.UpdateManifest, wire.Report))
        if message.round_num == 1:
            return wire.Receipt(message.update_id, "rejected", "lost")
        return await deliver(self, outgoing)

    monkeypatch.setattr("petalfl.trainer.train", spy)
    monkeypatch.setattr(Uplink, "deliver", lose_round_1)
    arguments = ("--rounds", "2", "--scheme", "phf", "--deadline", "0.5")
    with running_server(small_artifacts, tmp_path / "server", *arguments) as server:
        make(server, "d").run()
        assert server.get("status")["shared_blocks"] == {"encoder-a": 2, "encoder-b": 1}
    np.testing.assert_array_equal(starts[0]["encoder-a"], starts[1]["encoder-a"])
    assert np.abs(starts[0]["head"] - starts[1]["head"]).max() > 1e-6


@pytest.mark.parametrize(
    ("scheme", "shared"),
    [
        ("fm", {"encoder-a", "fusion", "head"}),
        ("local", set()),
    ],
)
def test_sharing_schemes(
    small_artifacts: Path, tmp_path: Path, make: Make, scheme: str, shared: set[str]
) -> None:
    """What the device shares, keeps private, and can predict with."""
    arguments = ("--rounds", "2", "--scheme", scheme)
    with running_server(small_artifacts, tmp_path / "server", *arguments) as server:
        client = make(server, "d")
        client.run()
        traffic = server.get("devices")["d"]["blocks"]
        rows = server.query("SELECT block, COUNT(*) FROM updates GROUP BY block")
    assert dict(rows) == dict.fromkeys(shared, 2)
    assert set(traffic) == shared
    assert set(client._trainer.state.private) == {"encoder-a", "fusion", "head"} - shared
    assert client.predict({"a": A}).shape == (24,)
    client.close()
    offline = make(server, "d")
    assert offline.predict({"a": A}).shape == (24,)


def test_an_app_that_only_predicts(busy: Server, make: Make) -> None:
    """It gives neither data nor labels, once the device has taken part."""
    client = make(busy, "d")
    client.run()
    expected = client.predict_proba({"a": A})
    client.close()
    reader = make(busy, "d", token="", data=None, labels=None)
    np.testing.assert_array_equal(reader.predict_proba({"a": A}), expected)
    with pytest.raises(DataError, match="no parameters of encoder-b"):
        reader.predict({"b": B})


def is_gone(server: Server, device: str) -> bool:
    return not is_ready(server, device)


def test_nobody_can_guess_its_client_id(
    idle: Server, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who could would end its connection; after a restart it ends its own of before."""
    found: list[str] = []
    transport = MqttTransport

    def spied(*args: Any, **settings: Any) -> Any:
        found.append(settings["client_id"])
        return transport(*args, **settings)

    monkeypatch.setattr("petalfl.participation.MqttTransport", spied)
    for device in ("guessed", "guessed", "other"):
        client = make(idle, device)
        with running(client):
            until(functools.partial(is_ready, idle, device), "the device is ready")
        until(functools.partial(is_gone, idle, device), "the device is gone")
        client.close()
    assert found[0] == found[1] and found[0].startswith("default-guessed-")
    assert found[0].rpartition("-")[2] != found[2].rpartition("-")[2]
