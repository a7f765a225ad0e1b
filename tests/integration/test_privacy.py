"""What must not leave a device does not: everything it sends is recorded and searched."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import urllib.error
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import petalfl.participation
import petalfl.trainer
import petalfl.training
from petalfl import EdgeClient, WireError, topics, wire
from petalfl.http import HttpClient
from petalfl.model import ModelManifest
from petalfl.mqtt import MqttTransport
from petalfl.participation import Participation
from petalfl.store import DeviceStore
from petalfl.trained_round import TrainedRound
from petalfl.training import Hyperparameters, TrainingResult
from petalfl.transport import Handler, MemoryBroker, Transport
from petalfl.vectors import Vector, to_bytes
from tests.integration.harness import SCHEME, Server, running_server, take_part, three_devices

PRIVATE = ("fusion", "head")
RNG = np.random.default_rng(0)
SLICE = 64  # bytes: 16 parameters


@dataclass
class Record:
    """All that went over the network, as seen at the devices' last line before it."""

    published: list[tuple[str, str, bytes]] = field(default_factory=list)  # device, topic, payload
    subscribed: list[tuple[str, str]] = field(default_factory=list)
    received: list[tuple[str, str, bytes]] = field(default_factory=list)
    requests: list[tuple[str, str, bytes]] = field(default_factory=list)  # device, path, body
    trained: list[tuple[str, Mapping[str, Vector], Mapping[str, Vector]]] = field(
        default_factory=list
    )  # device, before, after

    def bodies(self) -> bytes:
        """Every byte sent: raw messages, HTTP bodies, and updates put together again."""
        updates: dict[bytes, list[bytes]] = {}
        for _, _, payload in self.published:
            message = wire.decode(payload)
            if isinstance(message, wire.Chunk):
                updates.setdefault(message.update_id, []).append(message.data)
        parts = [payload for _, _, payload in self.published]
        parts += [body for _, _, body in self.requests]
        parts += [b"".join(chunks) for chunks in updates.values()]
        return b"".join(parts)

    def vectors(self, is_wanted: Callable[[str], bool]) -> Iterator[Vector]:
        """Values before and after, and deltas, of some blocks in all rounds."""
        for _, before, after in self.trained:
            for block in filter(is_wanted, before):
                yield before[block]
                yield after[block]
                yield after[block] - before[block]


@dataclass(frozen=True)
class Run:
    """A recorded federation, its server still up."""

    record: Record
    server: Server
    folder: Path
    manifest: ModelManifest


@pytest.fixture(scope="module")
def run(watch_artifacts: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    folder = tmp_path_factory.mktemp("privacy")
    with ExitStack() as stack:
        record = Record()
        server = stack.enter_context(
            running_server(watch_artifacts, folder / "server", "--rounds", "2", *SCHEME)
        )
        with pytest.MonkeyPatch.context() as patch, ExitStack() as clients:
            spy_on(patch, record)
            members = three_devices()
            opened = [clients.enter_context(member.client(server, folder)) for member in members]
            asyncio.run(take_part(opened))
        yield Run(record, server, folder, ModelManifest.load(watch_artifacts))


def spy_on(patch: pytest.MonkeyPatch, record: Record) -> None:
    class Spy(MqttTransport):
        def __init__(self, *arguments: Any, login: tuple[str, str], **more: Any) -> None:
            super().__init__(*arguments, login=login, **more)
            self.device = login[0]
            if more.get("will"):
                record.published.append((self.device, *more["will"]))

        async def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
            record.published.append((self.device, topic, payload))
            await super().publish(topic, payload, retain=retain)

        async def subscribe(self, topic_filter: str, handler: Handler) -> None:
            def note(topic: str, payload: bytes) -> None:
                record.received.append((self.device, topic, payload))
                handler(topic, payload)

            record.subscribed.append((self.device, topic_filter))
            await super().subscribe(topic_filter, note)

    open_request = HttpClient._open
    train = petalfl.training.train

    def spy_open(self: HttpClient, path: str, body: bytes | None, headers: dict[str, str]) -> Any:
        kind, _, pair = self._authorization.partition(" ")
        device = base64.b64decode(pair).decode().partition(":")[0] if kind == "Basic" else ""
        record.requests.append((device, path, body or b""))
        return open_request(self, path, body, headers)

    def spy_train(*arguments: Any, **more: Any) -> TrainingResult:
        result = train(*arguments, **more)
        modalities = "+".join(sorted(arguments[3].modalities))
        device = {"acc": "acc-only", "gyro": "gyro-only", "acc+gyro": "both"}[modalities]
        record.trained.append((device, dict(arguments[2]), result.parameters))
        return result

    patch.setattr(petalfl.participation, "MqttTransport", Spy)
    patch.setattr(HttpClient, "_open", spy_open)
    patch.setattr(petalfl.trainer, "train", spy_train)


def count_slices(haystack: bytes, vectors: Iterator[Vector]) -> tuple[int, int]:
    """How many 64-byte slices of the vectors occur anywhere in the haystack, and of how many.

    At every offset of the haystack, aligned or not. Slices of zeros tell nothing and are left out.
    """
    slices = {
        data[i : i + SLICE]
        for data in map(to_bytes, vectors)
        for i in range(0, len(data) - SLICE + 1, SLICE)
    }
    slices.discard(bytes(SLICE))
    heads = np.array([np.frombuffer(one[:8], "<u8")[0] for one in slices])
    found = set()
    for shift in range(8):
        length = (len(haystack) - shift) // 8 * 8
        words = np.frombuffer(haystack[shift : shift + length], "<u8")
        for index in np.flatnonzero(np.isin(words, heads)):
            start = shift + 8 * int(index)
            found.add(haystack[start : start + SLICE])
    return len(found & slices), len(slices)


# The search itself


def test_the_search_finds_what_is_there() -> None:
    rng = np.random.default_rng(0)
    one, other = (rng.standard_normal(1000, dtype=np.float32) for _ in range(2))
    for shift in range(9):
        haystack = bytes(shift) + rng.bytes(100) + to_bytes(one) + rng.bytes(99)
        assert count_slices(haystack, iter([one])) == (62, 62)
        assert count_slices(haystack, iter([other])) == (0, 62)
        assert count_slices(haystack, iter([other, one[320:352]])) == (2, 64)


def test_the_search_finds_shared_blocks(run: Run) -> None:
    """What is sent of the encoders, their deltas, is found whole."""
    haystack = run.record.bodies()
    deltas = [
        after[block] - before[block]
        for _, before, after in run.record.trained
        for block in before
        if block not in PRIVATE
    ]
    assert len(deltas) == 2 * 4
    found, total = count_slices(haystack, iter(deltas))
    assert found == total > 10_000
    for delta in deltas:
        assert to_bytes(delta) in haystack


# The claim


def test_the_private_blocks_were_trained(run: Run) -> None:
    assert sorted(d for d, _, _ in run.record.trained) == sorted(
        ["acc-only", "both", "gyro-only"] * 2
    )
    for _, before, after in run.record.trained:
        for block in PRIVATE:
            assert np.abs(after[block] - before[block]).max() > 1e-4


def test_no_byte_of_a_private_block_is_sent(run: Run) -> None:
    found, total = count_slices(run.record.bodies(), run.record.vectors(PRIVATE.__contains__))
    assert total > 10_000
    assert found == 0


def test_shared_blocks_leave_as_deltas_not_as_values(run: Run) -> None:
    values = (
        vector
        for _, before, after in run.record.trained
        for block in before
        for vector in (before[block], after[block])
    )
    found, total = count_slices(run.record.bodies(), values)
    assert total > 10_000
    assert found == 0


def test_no_private_block_is_named(run: Run) -> None:
    for device, topic, payload in run.record.published:
        assert not any(block in topic for block in PRIVATE), (device, topic)
        if isinstance(wire.decode(payload), wire.Ready):
            continue  # it names the device's tasks, and that of a single head is called "head"
        assert not any(block.encode() in payload[:300] for block in PRIVATE), (device, topic)
    for _, path, _ in run.record.requests:
        assert not any(f"/blocks/{block}" in path for block in PRIVATE), path
    assert run.server.get("status")["shared_blocks"].keys() == {"encoder-acc", "encoder-gyro"}


def test_no_window_is_sent(run: Run) -> None:
    """Neither the recordings themselves."""
    windows = (x.ravel() for member in three_devices() for x in member.data.values())
    found, total = count_slices(run.record.bodies(), windows)
    assert total > 1000
    assert found == 0


def test_the_server_holds_nothing_private(run: Run) -> None:
    files = [path.read_bytes() for path in run.server.data_dir.rglob("*") if path.is_file()]
    found, _ = count_slices(b"".join(files), run.record.vectors(PRIVATE.__contains__))
    assert found == 0
    folders = {path.name for path in (run.server.data_dir / "blocks").iterdir()}
    assert folders == {"encoder-acc", "encoder-gyro"}
    assert run.server.query("SELECT COUNT(*) FROM updates WHERE delta IS NOT NULL") == [(0,)]


def test_only_these_kinds_of_messages_are_sent(run: Run) -> None:
    kinds = {type(wire.decode(payload)) for _, _, payload in run.record.published}
    assert kinds == {
        wire.Status, wire.Ready, wire.UpdateManifest, wire.Chunk, wire.Fin, wire.Report
    }  # fmt: skip


# A device without a gyroscope has nothing to do with its encoder


def test_a_device_without_a_gyroscope_does_nothing_about_it(run: Run) -> None:
    record = run.record
    mine = [(t, p) for d, t, p in [*record.published, *record.received] if d == "acc-only"]
    assert len(mine) > 20
    for topic, payload in mine:
        assert "gyro" not in topic
        assert b"gyro" not in payload
    assert [t for d, t in record.subscribed if d == "acc-only"] == ["fl/v1/default/down/acc-only/+"]
    paths = [path for device, path, _ in record.requests if device == "acc-only"]
    assert sum("encoder-acc" in path for path in paths) == 3 + 3  # graphs, versions 1 to 3
    assert [path for path in paths if "gyro" in path] == []


def test_a_device_without_a_gyroscope_stores_nothing_of_it(run: Run) -> None:
    names = {
        str(p.relative_to(run.folder / "acc-only")) for p in (run.folder / "acc-only").rglob("*")
    }
    assert "artifacts/encoder-acc/eval_model.onnx" in names
    assert [name for name in names if "gyro" in name] == []
    store = DeviceStore(run.folder / "acc-only")
    held = {
        *store.read_shared().vectors,
        *store.read_shared().versions,
        *store.read_state().private,
    }
    store.close()
    assert held == {"encoder-acc", "fusion", "head"}


def test_the_server_counted_nothing_of_it_either(run: Run) -> None:
    traffic = {name: device["blocks"] for name, device in run.server.get("devices").items()}
    assert set(traffic["acc-only"]) == {"encoder-acc"}
    assert set(traffic["gyro-only"]) == {"encoder-gyro"}
    assert set(traffic["both"]) == {"encoder-acc", "encoder-gyro"}


def test_the_server_would_refuse_it(run: Run) -> None:
    store = DeviceStore(run.folder / "acc-only")
    identity = store.read_identity()
    store.close()
    assert identity is not None
    pair = base64.b64encode(f"acc-only:{identity.password}".encode()).decode()
    assert run.server.get("session", f"Basic {pair}")["mqtt_port"] > 0
    for path in ("blocks/encoder-gyro/1", "artifacts/encoder-gyro/training_backward.onnx"):
        with pytest.raises(urllib.error.HTTPError, match="403") as caught:
            run.server.get(path, f"Basic {pair}")
        caught.value.close()


# A hostile server


def hyperparameters() -> Hyperparameters:
    return Hyperparameters(learning_rate=0.1)


@pytest.fixture
def acc_only(run: Run) -> Iterator[EdgeClient]:
    """The accelerometer's device again, on its store."""
    member = three_devices()[0]
    with member.client(run.server, run.folder) as client:
        yield client


@pytest.mark.parametrize("block", PRIVATE)
def test_no_update_can_be_made_of_a_private_block(
    run: Run, acc_only: EdgeClient, block: str
) -> None:
    vector = np.zeros(run.manifest.block(block).size, np.float32)
    result = TrainingResult({block: vector}, 21, (0.5,))
    pointer = wire.BlockVersion(1, "0" * 64)
    task = wire.Task(3, 0, hyperparameters(), 0, {block: pointer})
    with pytest.raises(
        ValueError, match=f"block {block} is not shared: it cannot become an update"
    ):
        round_of(acc_only, task, result, vector).make_update(run.manifest.block(block), RNG)


def test_an_unenrolled_device_makes_no_update_at_all(run: Run, tmp_path: Path) -> None:
    """Nobody has told it what it may share: nothing."""
    vector = np.zeros(run.manifest.block("encoder-acc").size, np.float32)
    result = TrainingResult({"encoder-acc": vector}, 21, (0.5,))
    task = wire.Task(3, 0, hyperparameters(), 0, {"encoder-acc": wire.BlockVersion(1, "0" * 64)})
    client = EdgeClient(run.server.url, store=tmp_path)
    block = run.manifest.block("encoder-acc")
    with client, pytest.raises(ValueError, match="is not shared"):
        round_of(client, task, result, vector).make_update(block, RNG)


def round_of(
    client: EdgeClient, task: wire.Task, result: TrainingResult, before: Vector
) -> TrainedRound:
    """Of a round that began with one vector for every block."""
    trainer = client._trainer
    return TrainedRound(
        trainer.identity, trainer.state, task, dict.fromkeys(result.parameters, before), result
    )


def meet_server(
    client: EdgeClient, monkeypatch: pytest.MonkeyPatch, *answers: bytes, then: bytes = b""
) -> None:
    """Runs a client whose `Ready` is answered so, and its next one with ``then``.

    It may publish that and its status alone.
    """
    replies = iter([answers, (then,)])

    async def scenario() -> None:
        broker = MemoryBroker()
        server = broker.connect()
        seen: list[wire.Message] = []

        def answer(topic: str, payload: bytes) -> None:
            if "/down/" in topic:
                return
            seen.append(wire.decode(payload))
            if isinstance(seen[-1], wire.Ready):
                for message in next(replies):
                    broker._publish(topics.tasks("default", client.device), message, retain=False)

        await server.subscribe("#", answer)

        async def connect(*arguments: object) -> Transport:
            return broker.connect()

        monkeypatch.setattr(Participation, "_connect", connect)
        try:
            await asyncio.wait_for(client.arun(), 60)
        finally:
            await asyncio.sleep(0.05)
            assert {type(message) for message in seen} == {wire.Status, wire.Ready}

    asyncio.run(scenario())


@pytest.mark.parametrize("kind", ["task", "finish"])
@pytest.mark.parametrize(
    "asked",
    [("head",), ("encoder-acc", "fusion"), ("encoder-gyro",), ("unheard-of",)],
    ids=["private", "one private", "foreign", "unknown"],
)
def test_what_a_server_may_not_ask_for(
    run: Run,
    acc_only: EdgeClient,
    monkeypatch: pytest.MonkeyPatch,
    asked: tuple[str, ...],
    kind: str,
) -> None:
    """The device refuses, trains nothing, downloads nothing and publishes nothing."""
    body = bytes(4)
    pointers = {name: wire.BlockVersion(9, hashlib.sha256(body).hexdigest()) for name in asked}
    task = wire.Task(9, 0, hyperparameters(), 0, pointers)
    hostile = task if kind == "task" else wire.Finish(pointers)
    record = Record()
    spy_on(monkeypatch, record)

    with pytest.raises(WireError, match="which this device does not share; it shares"):
        meet_server(acc_only, monkeypatch, wire.encode(hostile))
    assert record.trained == []
    assert [path for _, path, _ in record.requests if "/blocks/" in path] == []
    assert acc_only._trainer.state.round_num == 2


def test_old_tasks_and_nonsense_are_ignored(
    acc_only: EdgeClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Round 1 is long trained: a replay of its task must not make a second update of it."""
    record = Record()
    spy_on(monkeypatch, record)
    replay = wire.Task(1, 0, hyperparameters(), 0, {})
    messages = (b"nonsense", wire.encode(wire.Ready(("acc",), ("head",))), wire.encode(replay))
    meet_server(acc_only, monkeypatch, *messages, then=wire.encode(wire.Finish({})))
    assert record.trained == []
    assert acc_only._trainer.state.round_num == 2
    assert "ignored a malformed message on fl/v1/default/down/acc-only/task" in caplog.text
    assert "ignored a task of round 1, long trained" in caplog.text
