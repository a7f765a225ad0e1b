"""`EdgeClient` at work in a federation of one or two, with the real server."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import petalfl.training
from petalfl import (
    Budgets,
    DataError,
    EdgeClient,
    PetalError,
    RoundInfo,
    StoreError,
    TransportError,
    topics,
    wire,
)
from petalfl.app_data import AppData
from petalfl.downlink import Downlink
from petalfl.http import HttpClient
from petalfl.mqtt import MqttTransport
from petalfl.pacing import Pacing
from petalfl.participation import Participation
from petalfl.source import NotThereError
from petalfl.store import DeviceStore, Outgoing, Shared, State
from petalfl.threads import Threads
from petalfl.trainer import Trainer
from petalfl.training import Hyperparameters, TrainingResult
from petalfl.transport import MemoryBroker
from petalfl.uplink import Uplink
from petalfl.vectors import to_bytes
from tests.integration.harness import Server, running_server
from tests.integration.lossy import lossy_proxy
from tests.petalfl.clients import (
    A,
    B,
    Make,
    is_gone,
    is_ready,
    running,
    until,
)


def test_a_device_that_fails_is_not_waited_for(busy: Server, make: Make) -> None:
    """It says that it goes, so that no later round opens with it and runs into its deadline."""

    def fail(info: RoundInfo) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        make(busy, "d", on_round=fail).run()
    until(lambda: not is_ready(busy, "d"), "the device is gone")


def test_a_broker_that_is_away_is_told(
    idle: Server, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("petalfl.mqtt.BACKOFF_S", (0.05, 0.1))
    get_session = Downlink.get_session
    with lossy_proxy(mqtt_port(idle)) as proxy:
        monkeypatch.setattr(
            Downlink, "get_session", lambda self: replace(get_session(self), mqtt_port=proxy.port)
        )
        errors: list[PetalError] = []
        client = make(idle, "away", on_error=errors.append)
        with running(client):
            until(lambda: is_ready(idle, "away"), "the device is ready")
            proxy.vanish()
            until(lambda: bool(errors), "what the app is told")
            proxy.start()
            until(lambda: client._participation is not None, "its part")
    where = f"no broker answers at mqtt://127.0.0.1:{proxy.port}: "
    assert all(isinstance(error, TransportError) for error in errors)
    assert str(errors[0]).startswith(where)


def mqtt_port(server: Server) -> int:
    return int(server.query("SELECT value FROM settings WHERE key = 'broker port'")[0][0])


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
    until(lambda: not is_ready(idle, "cancelled"), "the device is gone")


def test_no_round_waits_for_a_device_that_leaves_it_out(
    small_artifacts: Path, tmp_path: Path, make: Make
) -> None:
    """Its deadline is far away; it takes part in the end nevertheless."""
    errors: list[PetalError] = []
    arguments = ("--rounds", "2", "--min-devices", "2", "--batch-size", "4", "--deadline", "3600")
    with running_server(small_artifacts, tmp_path / "server", *arguments) as server:
        hasty = make(server, "hasty", budgets=Budgets(seconds=1e-9), on_error=errors.append)
        busy = make(server, "busy")
        with running(hasty), running(busy):
            until(lambda: server.get("status")["is_finished"], "two rounds", 30)
            until(lambda: is_gone(server, "hasty") and is_gone(server, "busy"), "both end", 30)
        assert [str(error)[:21] for error in errors] == [
            "round 1 is left out: ", "round 2 is left out: "
        ]  # fmt: skip
        [first, _] = server.get("rounds")
        assert (first["cohort_size"], first["num_reports"]) == (2, 1)


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
    stream = HttpClient.stream
    num_downloads = 0

    def flip_a_bit(self: HttpClient, path: str, *arguments: Any) -> Any:
        nonlocal num_downloads
        num_downloads += "/blocks/" in path
        for offset, data in stream(self, path, *arguments):
            is_damaged = "/blocks/" in path and num_downloads % 3
            yield offset, bytes([data[0] ^ 1]) + data[1:] if is_damaged else data

    monkeypatch.setattr(HttpClient, "stream", flip_a_bit)
    client = make(busy, "d")
    client.run()
    assert client._trainer.state.round_num == 3
    assert "blocks/encoder-a/1 comes with the wrong sha256" in caplog.text


@pytest.mark.parametrize("error", [TransportError("503"), StoreError("No space left")])
def test_a_download_that_fails_is_tried_again(
    busy: Server, make: Make, monkeypatch: pytest.MonkeyPatch, error: PetalError
) -> None:
    """Once the device takes part, a server that is away or a full disk ends nothing."""
    monkeypatch.setattr("petalfl.participation.BACKOFF_S", (0.01, 0.02))
    fetch_block = Downlink.fetch_block
    calls: list[str] = []

    def flaky(self: Downlink, block: Any, pointer: Any) -> Any:
        calls.append(block.name)
        if len(calls) % 2:
            raise error
        return fetch_block(self, block, pointer)

    monkeypatch.setattr(Downlink, "fetch_block", flaky)
    client = make(busy, "d")
    client.run()
    assert client._trainer.state.round_num == 3
    assert len(calls) == 2 * 4


def test_what_could_not_be_written_is_downloaded_again(
    busy: Server, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A round starts from the versions that its task names, whatever the disk has of them."""
    write_shared, errors = DeviceStore.write_shared, list[PetalError]()
    bases: list[tuple[bool, bytes]] = []

    def full_once(self: DeviceStore, shared: Shared) -> None:
        if len(bases) == 1:
            raise StoreError("No space left on device")
        write_shared(self, shared)

    def spy(*arguments: Any, **more: Any) -> TrainingResult:
        vector = arguments[2]["encoder-a"]
        wanted = more["shared"]["encoder-a"].sha256
        bases.append((hashlib.sha256(to_bytes(vector)).hexdigest() == wanted, vector))
        return petalfl.training.train(*arguments, **more)

    monkeypatch.setattr(DeviceStore, "write_shared", full_once)
    monkeypatch.setattr("petalfl.trainer.train", spy)
    client = make(busy, "d", on_error=errors.append)
    client.run()
    assert [is_right for is_right, _ in bases] == [True, True, True]
    assert [str(error) for error in errors] == ["No space left on device"]
    wanted = wire.Finish(client._trainer.pointers())
    assert client._trainer.lacking(wanted) == {}
    for path in (tmp_path / "d").glob("shared.msgpack*"):
        path.unlink()
    assert client._trainer.lacking(wanted) == wanted.blocks


def test_of_a_version_with_another_digest_the_new_one_is_fetched(
    busy: Server, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a restore the server makes its versions anew: the number alone says nothing."""
    with make(busy, "d") as client:
        client.run()
    again = make(busy, "d")
    again.predict({"a": A})
    known = again._trainer.pointers()
    fetched: list[wire.BlockVersion] = []

    def fetch_block(self: Downlink, block: Any, pointer: wire.BlockVersion) -> Any:
        fetched.append(pointer)
        return np.zeros(block.size, np.float32)

    monkeypatch.setattr(Downlink, "fetch_block", fetch_block)
    taking_part = part_of(again)
    taking_part._fetch_blocks(wire.Finish(known))
    assert fetched == []
    body = bytes(4 * again._trainer.model.manifest.block("encoder-a").size)
    other = wire.BlockVersion(known["encoder-a"].version, hashlib.sha256(body).hexdigest())
    taking_part._fetch_blocks(wire.Finish(known | {"encoder-a": other}))
    assert fetched == [other]
    assert again._trainer.pointers() == known | {"encoder-a": other}


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


# The outbox


class Accepting(Uplink):
    """Accepts everything, and notes which control variates are on disk when it is asked to."""

    def __init__(self, store: DeviceStore) -> None:
        self.on_disk: list[dict[str, bytes]] = []
        self._store = store

    async def deliver(
        self,
        outgoing: Outgoing,
        on_judged: Callable[[wire.Receipt], None] = lambda receipt: None,
    ) -> wire.Receipt:
        self.on_disk.append(self._store.read_state().controls)
        receipt = wire.Receipt(bytes(16), "accepted", "")
        on_judged(receipt)
        return receipt


async def test_control_variates_are_on_disk_before_the_next_update_goes(tmp_path: Path) -> None:
    """After a crash, what the server has accepted of SCAFFOLD counts here, too."""
    state = State(
        1,
        outbox=(outgoing_update("encoder-a"), outgoing_update("encoder-b")),
        controls={"encoder-b": b"old."},
        next_controls={"encoder-a": b"newa", "encoder-b": b"newb"},
    )
    with contextlib.closing(DeviceStore(tmp_path)) as store:
        store.write_state(state)
        unused: Any = None
        trainer = Trainer(store, unused, Pacing(), Budgets(), 1, "auto")
        uplink = Accepting(store)
        await Participation(unused, trainer, unused, unused, unused, Threads())._deliver_outbox(
            uplink
        )
        assert uplink.on_disk == [
            {"encoder-b": b"old."},
            {"encoder-a": b"newa", "encoder-b": b"old."},
        ]
        assert store.read_state() == State(1, controls=state.next_controls)


async def test_control_variates_of_a_round_that_is_over_go_by_what_the_server_says_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the next round; an update in vain changes nothing, nor one that is not answered."""
    monkeypatch.setattr("petalfl.uplink.RECEIPT_TIMEOUT_S", 0.5)
    blocks = ("encoder-a", "encoder-b", "fusion", "head")
    outbox = [outgoing_update(block, b"....") for block in blocks]
    old, new = ({block: (when + block[-1:]).encode() for block in blocks} for when in "on")
    report = Outgoing(wire.encode(wire.Report(bytes(16), 1, 24, 0.5)), b"")
    answers = dict(zip(blocks, ("accepted", "rejected", "missing", None), strict=True))
    broker, asked = MemoryBroker(), list[wire.Message]()
    server, device = broker.connect(), broker.connect()
    uplink = Uplink(device, "fed", "dev")

    def answer(topic: str, payload: bytes) -> None:
        asked.append(message := wire.decode(payload))
        status: Any = answers[topic.split("/")[4]]
        if isinstance(message, wire.Fin) and status:
            uplink.receive(wire.Receipt(message.update_id, status))

    for block in blocks:
        await server.subscribe(topics.block_up("fed", block, "dev"), answer)
    with contextlib.closing(DeviceStore(tmp_path)) as store:
        state = State(1, outbox=(*outbox, report), controls=old, next_controls=new)
        store.write_state(state)
        unused: Any = None
        trainer = Trainer(store, unused, Pacing(), Budgets(), 1, "auto")
        part = Participation(unused, trainer, unused, unused, unused, Threads())
        await part._ask_for_controls(uplink)
        kept = store.read_state()
        assert kept.controls == old | {"encoder-a": new["encoder-a"]}
        assert kept.outbox == (*outbox[2:], report)
        assert not any(isinstance(message, wire.Chunk) for message in asked)
        trainer.empty_outbox()
        asked.clear()
        await part._ask_for_controls(uplink)
        assert asked == []


def outgoing_update(block: str, payload: bytes = b"") -> Outgoing:
    update_id = hashlib.sha256(block.encode()).digest()[:16]
    manifest = wire.UpdateManifest(update_id, block, 1, 1, 24, "f32", 4, "0" * 64)
    return Outgoing(wire.encode(manifest), payload)


def version(number: int) -> wire.BlockVersion:
    return wire.BlockVersion(number, f"{number:064x}")


class Idler(Trainer):
    """A device that only notes what it should train."""

    def __init__(self, round_num: int) -> None:
        self.state = State(round_num)
        self.data = AppData()
        self.trained: list[int] = []

    def check_blocks(self, task: wire.Task | wire.Finish) -> None:
        pass

    def train_round(self, task: wire.Task) -> bool:
        self.trained.append(task.round_num)
        self.state = State(task.round_num)
        return True

    def empty_outbox(self) -> None:
        pass


class AtOnce(Executor):
    """Runs what it is given where it is given it: turns of the loop are all that passes."""

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **more: Any) -> Future[Any]:
        done: Future[Any] = Future()
        try:
            done.set_result(function(*arguments, **more))
        except Exception as error:
            done.set_exception(error)
        return done


class Hearing(Participation):
    """An `Idler`'s, at a server that has no version but those in ``served``."""

    def __init__(self, round_num: int, served: set[int]) -> None:
        self.idler = Idler(round_num)
        self.served = served
        self.tried: list[int] = []
        self.answer: wire.Task | None = None
        unused: Any = None
        super().__init__(unused, self.idler, unused, unused, unused, Threads(AtOnce()))

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
            for _ in range(200):  # turns, of which a round takes about 20
                await asyncio.sleep(0)
        assert not worker.done()
        worker.cancel()
        await asyncio.gather(worker, return_exceptions=True)

    def _announce_soon(self) -> None:
        if self.answer is not None:
            self._inbox.put(self.answer)

    def _fetch_blocks(self, task: wire.Task | wire.Finish) -> None:
        self.tried.append(task.blocks["head"].version)
        if self.tried[-1] not in self.served:
            raise NotThereError("404")


@pytest.fixture
def no_pause_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """By itself."""
    monkeypatch.setattr("petalfl.participation.BACKOFF_S", (3600.0, 3600.0))


@pytest.mark.usefixtures("no_pause_ends")
async def test_a_version_that_is_gone_is_given_up() -> None:
    client = Hearing(0, served={2})
    await client.hear(numbered_task(1), numbered_task(2))
    assert client.trained == [2]
    asking = Hearing(0, served={2})
    await asking.hear(numbered_task(1), answer=numbered_task(2))
    assert (asking.tried, asking.trained) == ([1, 2], [2])


@pytest.mark.usefixtures("no_pause_ends")
async def test_a_version_that_is_gone_is_not_asked_for_without_end() -> None:
    client = Hearing(0, served=set())
    await client.hear(*map(numbered_task, [1, 1, 1]), answer=numbered_task(1))
    assert client.tried == [1]


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

    async def lose_round_1(self: Uplink, outgoing: Outgoing, *more: Any) -> wire.Receipt:
        message = wire.decode(outgoing.message)
        if isinstance(message, wire.UpdateManifest) and message.round_num == 1:
            return wire.Receipt(message.update_id, "rejected", "lost")
        return await deliver(self, outgoing, *more)

    monkeypatch.setattr("petalfl.trainer.train", spy)
    monkeypatch.setattr(Uplink, "deliver", lose_round_1)
    arguments = ("--rounds", "2", "--scheme", "phf")
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
