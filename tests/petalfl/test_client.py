"""`EdgeClient` with the real server on a small model."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path
from typing import Any

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
from petalfl.pacing import Pacing
from petalfl.store import DeviceStore, Outgoing
from petalfl.uplink import Uplink
from tests.integration.harness import Server, running_server
from tests.petalfl.clients import (
    LABELS,
    A,
    Make,
    is_ready,
    running,
    until,
)

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
    assert client._thread is not None and not client._thread.is_alive()


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


def test_a_signal_s_handler_may_stop_it_at_any_moment(
    idle: Server, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes between two instructions of the thread that runs, whatever that holds."""

    def begin(self: Pacing) -> None:
        begin_at_once(self)
        client.stop()

    begin_at_once = Pacing.begin
    monkeypatch.setattr(Pacing, "begin", begin)
    client = make(idle, "d")
    runner = threading.Thread(target=client.run, daemon=True)
    runner.start()
    runner.join(30)
    assert not runner.is_alive()


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
