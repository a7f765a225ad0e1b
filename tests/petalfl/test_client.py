"""`EdgeClient`, one or two of them, with the real server on a small model.

What whole federations do is in tests/integration.
"""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from petalfl import (
    DataError,
    EdgeClient,
    EnrollError,
    PetalError,
    RoundInfo,
    RoundMetrics,
    StoreError,
    TransportError,
    wire,
)
from petalfl.downlink import Downlink
from petalfl.http import HttpClient
from petalfl.pacing import Pacing
from petalfl.store import DeviceStore, Outgoing
from petalfl.uplink import Uplink
from petalfl.ways import Session
from tests.integration.harness import Server, running_server
from tests.petalfl.clients import (
    LABELS,
    A,
    B,
    Make,
    is_ready,
    run_and_stop,
    running,
    until,
)

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


def test_an_enrollment_whose_answer_was_lost(
    idle: Server, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device asks again after a restart, and gets what it would have had."""
    post, answers = HttpClient.post_json, []

    def lose(self: HttpClient, *of: Any) -> Any:
        answers.append(post(self, *of))
        raise TransportError("the line broke")

    with monkeypatch.context() as patch:
        patch.setattr(HttpClient, "post_json", lose)
        client = make(idle, "unlucky")
        with pytest.raises(TransportError, match="the line broke"):
            client.run()
        client.close()
    assert "unlucky" in idle.get("devices")
    assert (tmp_path / "unlucky" / "enrollment.json").stat().st_mode & 0o77 == 0
    again = make(idle, "unlucky")
    run_and_stop(again)
    assert again._trainer.identity is not None
    assert [answer["password"] for answer in answers] == [again._trainer.identity.password]
    assert not (tmp_path / "unlucky" / "enrollment.json").exists()


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
        patch.setattr(HttpClient, "post_json", lambda self, *of: {"device": "../x"})
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
        EdgeClient("ftp://h", store=tmp_path)
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


def test_stop_while_waiting(idle: Server, make: Make) -> None:
    client = make(idle, "waiting")
    with running(client):
        until(lambda: is_ready(idle, "waiting"), "the device is ready")
    until(lambda: not is_ready(idle, "waiting"), "the device is gone")


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
        await asyncio.to_thread(started.wait, 30)
        client.stop()
        await asyncio.wait_for(run, 30)
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
        await asyncio.to_thread(started.wait, 30)
        run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(run, 30)
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
        assert is_free.wait(60)

    client = make(busy, "d", on_progress=hold)
    client.start()
    assert is_held.wait(30)
    with pytest.raises(RuntimeError, match="is running already; stop it first"):
        client.start()
    is_free.set()
    until(lambda: busy.get("status")["is_finished"], "the last round")
    client.close()
    assert client._trainer.state.round_num == 3


@pytest.mark.parametrize("way", ["start", "run"])
def test_whoever_waits_for_the_end(busy: Server, make: Make, way: str) -> None:
    is_held, is_free = threading.Event(), threading.Event()

    def hold(done: int, total: int) -> None:
        is_held.set()
        assert is_free.wait(30)

    client = make(busy, "d", on_progress=hold)
    assert not client.is_running and client.wait(), "nothing runs: nothing to wait for"
    aside = threading.Thread(target=getattr(client, way))
    aside.start()
    assert is_held.wait(30)
    assert client.is_running and not client.wait(0.01)
    is_free.set()
    assert client.wait(60)
    assert not client.is_running and client._trainer.state.round_num == 3
    aside.join()


def test_what_ended_it_is_told_before_the_end(busy: Server, make: Make) -> None:
    errors: list[PetalError] = []

    def fail(info: RoundInfo) -> None:
        raise ValueError("the app's own")

    def tell(error: PetalError) -> None:
        time.sleep(0.2)
        errors.append(error)

    client = make(busy, "d", on_round=fail, on_error=tell)
    client.start()
    assert client.wait(60)
    assert len(errors) == 1


@pytest.mark.parametrize("callback", ["on_round", "on_error"])
def test_a_run_does_not_wait_for_itself(busy: Server, make: Make, callback: str) -> None:
    found: list[BaseException] = []

    def wait(news: object) -> None:
        try:
            client.wait()
        except RuntimeError as error:
            found.append(error)
        client.stop()

    token = "guess" if callback == "on_error" else busy.token
    client: EdgeClient = make(busy, "d", token=token, **{callback: wait})
    client.start()
    assert client.wait(60)
    assert list(map(str, found)) == ["a run cannot wait for its own end: wait elsewhere"]


def test_the_loop_of_a_run_does_not_wait_for_it(idle: Server, make: Make) -> None:
    async def scenario() -> None:
        client = make(idle, "d")
        run = asyncio.create_task(client.arun())
        await asyncio.to_thread(until, lambda: is_ready(idle, "d"), "the device is ready", 30)
        with pytest.raises(RuntimeError, match="cannot wait for its own end"):
            client.wait()
        client.stop()
        await run

    asyncio.run(scenario())


@pytest.mark.parametrize("when", ["at once", "amid training"])
def test_close_ends_what_was_started(busy: Server, make: Make, when: str) -> None:
    is_training = threading.Event()
    client = make(busy, "d", on_progress=lambda done, total: is_training.set())
    client.start()
    assert when == "at once" or is_training.wait(30)
    client.close()
    assert not [t for t in threading.enumerate() if t.name == "petalfl"]


@pytest.mark.parametrize("callback", ["on_round", "on_progress", "on_metrics"])
@pytest.mark.parametrize("way", ["run", "start"])
def test_close_from_a_callback(
    busy: Server, make: Make, tmp_path: Path, callback: str, way: str
) -> None:
    """It cannot wait for the run that it is part of: the store is free when that has ended."""
    client: EdgeClient = make(busy, "d", **{callback: lambda *news: client.close()})
    getattr(client, way)()
    until(lambda: client._loop is None, "the end")
    client.close()
    DeviceStore(tmp_path / "d").close()
    with pytest.raises(RuntimeError, match="the client is closed"):
        client.run()


def test_close_on_the_event_loop(busy: Server, make: Make, tmp_path: Path) -> None:
    async def scenario() -> None:
        started = asyncio.Event()
        loop = asyncio.get_running_loop()
        client = make(busy, "d", on_round=lambda info: loop.call_soon_threadsafe(started.set))
        run = asyncio.create_task(client.arun())
        await started.wait()
        client.close()
        await asyncio.wait_for(run, 30)

    asyncio.run(scenario())
    DeviceStore(tmp_path / "d").close()


def test_close_from_on_error(idle: Server, make: Make, tmp_path: Path) -> None:
    client: EdgeClient = make(idle, "d", token="guess", on_error=lambda error: client.close())
    client.start()
    until(lambda: client._loop is None, "the end")
    client.close()
    DeviceStore(tmp_path / "d").close()


def test_close_waits_for_a_run_elsewhere(busy: Server, make: Make, tmp_path: Path) -> None:
    started = threading.Event()
    client = make(busy, "d", on_progress=lambda done, total: started.set())
    thread = threading.Thread(target=client.run)
    thread.start()
    assert started.wait(30)
    client.close()
    DeviceStore(tmp_path / "d").close()
    thread.join()


class ContendedLock:
    """Says whether somebody has had to wait for it."""

    def __init__(self) -> None:
        self.is_wanted = threading.Event()
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            self.is_wanted.set()
            self._lock.acquire()

    def __exit__(self, *exception: object) -> None:
        self._lock.release()


@pytest.mark.parametrize("what", ["close", "stop"])
def test_an_end_at_the_very_beginning(
    idle: Server, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Between a run's looking whether it may begin and its having begun."""
    is_beginning, is_free = threading.Event(), threading.Event()

    def hold() -> None:
        if threading.current_thread() is runner:
            is_beginning.set()
            assert is_free.wait(30)

    class Held:
        """As `threading`, but ``get_ident``, which `_begin` calls in between, takes its time."""

        def __getattr__(self, name: str) -> Any:
            return getattr(threading, name)

        def get_ident(self) -> int:
            hold()
            return threading.get_ident()

    def begin(self: Pacing) -> None:
        hold()
        begin_at_once(self)

    begin_at_once = Pacing.begin
    if what == "close":
        monkeypatch.setattr("petalfl.client.threading", Held())
    else:
        monkeypatch.setattr(Pacing, "begin", begin)
    client = make(idle, "d")
    client._lifecycle = lock = ContendedLock()  # type: ignore[assignment]
    runner = threading.Thread(target=client.run)
    ender = threading.Thread(target=getattr(client, what))
    runner.start()
    assert is_beginning.wait(30)
    ender.start()
    until(lambda: lock.is_wanted.is_set() or not ender.is_alive(), "its end")
    with pytest.raises(StoreError, match="is open already"):
        DeviceStore(tmp_path / "d")
    is_free.set()
    for thread in (ender, runner):
        thread.join(30)
        assert not thread.is_alive()


def test_a_client_runs_once_at_a_time(idle: Server, make: Make) -> None:
    client = make(idle, "once")
    with running(client), pytest.raises(RuntimeError, match="running already"):
        client.run()


def test_an_on_error_that_fails_ends_nothing(
    busy: Server, make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fetch_block = Downlink.fetch_block
    calls: list[str] = []

    def flaky(self: Downlink, block: Any, pointer: Any) -> Any:
        calls.append(block.name)
        if len(calls) == 1:
            raise TransportError("503")
        return fetch_block(self, block, pointer)

    def fail(error: PetalError) -> None:
        raise ZeroDivisionError("in the app")

    monkeypatch.setattr(Downlink, "fetch_block", flaky)
    client = make(busy, "d", on_error=fail)
    client.run()
    assert client._trainer.state.round_num == 3
    assert "in the app" in caplog.text


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


def test_an_update_that_was_rejected_is_told(
    busy: Server, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors: list[PetalError] = []

    async def reject(self: Uplink, outgoing: Outgoing, *more: Any) -> wire.Receipt:
        message = wire.decode(outgoing.message)
        if isinstance(message, wire.Report):
            return await deliver(self, outgoing, *more)
        return wire.Receipt(message.update_id, "rejected", "too long")  # type: ignore[union-attr]

    deliver = Uplink.deliver
    monkeypatch.setattr(Uplink, "deliver", reject)
    make(busy, "d", on_error=errors.append).run()
    assert {str(error) for error in errors} == {"the server rejected an update: too long"}


def test_a_pause_lasts_until_resumed_or_stopped(busy: Server, make: Make) -> None:
    batches: list[int] = []

    def pause_twice(done: int, total: int) -> None:
        batches.append(done)
        if len(batches) in (2, 13):
            client.pause()

    client = make(busy, "d", on_progress=pause_twice)
    with running(client):
        until(lambda: client.is_paused, "the pause")
        time.sleep(0.3)
        assert batches == [1, 2]  # within the batch
        client.resume()
        until(lambda: client.is_paused, "the pause in round 2")
        assert batches == [*range(1, 13), 1]  # the round went on where it was
        # `running` stops it: a pause does not hold that up


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
