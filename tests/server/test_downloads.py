"""Files over MQTT, and devices that ask for more than their share."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from petalfl import topics, wire
from petalfl.errors import TransportError
from petalfl.transport import MemoryBroker
from petalfl.vectors import to_bytes
from petalfl.wire import CHUNK_BYTES, MAX_FETCH_BYTES, Declined, Fetch, Part
from server import downloads
from server.catalog import Catalog, File
from server.downloads import Downloads
from server.gateway import Gateway
from tests.server.builders import FED, INITIAL, FakeJudge, Run, Site, WatchedTransport

HEAD = to_bytes(INITIAL["head"])
LONG = bytes(range(256)) * 3000  # 768,000 bytes: six chunks and a bit
NOW_S = 100.0


class Clock:
    def __init__(self) -> None:
        self.now_s = NOW_S

    def __call__(self) -> float:
        return self.now_s


class Server:
    """A gateway with downloads on a memory broker, with any number of devices in front of it."""

    def __init__(self, site: Site, run: Run) -> None:
        self.site, self.run = site, run
        self.broker = MemoryBroker()
        self.transport = WatchedTransport(self.broker)
        self.clock = Clock()
        self.catalog = Catalog(run.federation, run.state)
        self.downloads = Downloads(self.transport, FED, self.catalog, self.clock)
        self.judge = FakeJudge()
        self.gateway = Gateway(
            self.transport, FED, site.manifest, self.judge, fetch=self.downloads.fetch
        )
        self.received: dict[str, list[Part | Declined]] = {}
        self.order: list[str] = []

    async def device(self, name: str) -> Device:
        client = self.broker.connect()
        mine = self.received.setdefault(name, [])

        def note(topic: str, payload: bytes) -> None:
            message = wire.decode(payload)
            assert isinstance(message, (Part, Declined))
            mine.append(message)
            self.order.append(name)

        await client.subscribe(topics.files(FED, name), note)
        return Device(self, name, client)

    async def settle(self) -> None:
        """Until everything that was asked for is sent."""
        for _ in range(3):
            await asyncio.sleep(0)
        work = [one.work for one in self.downloads._devices.values() if one.work is not None]
        await asyncio.gather(*work)
        for _ in range(3):
            await asyncio.sleep(0)


class Device:
    def __init__(self, server: Server, name: str, client: Any) -> None:
        self.server, self.name, self.client = server, name, client

    async def ask(self, fetch: Fetch | bytes) -> None:
        data = fetch if isinstance(fetch, bytes) else wire.encode(fetch)
        await self.client.publish(topics.request(FED, self.name), data)
        for _ in range(3):
            await asyncio.sleep(0)

    async def get(self, fetch: Fetch) -> list[Part | Declined]:
        mine = self.server.received[self.name]
        mine.clear()
        await self.ask(fetch)
        await self.server.settle()
        return list(mine)

    async def get_part(self, fetch: Fetch) -> Part:
        [part] = await self.get(fetch)
        assert isinstance(part, Part)
        return part


@contextmanager
def long_files(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every file is `LONG`."""
    with monkeypatch.context() as patch:

        async def find(self: Catalog, device: str, path: str) -> File:
            return File(hashlib.sha256(LONG).hexdigest(), len(LONG), LONG)

        patch.setattr(Catalog, "find", find)
        yield


@pytest.fixture
async def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Server]:
    monkeypatch.setattr(downloads, "MAX_BYTES_PER_S", 1e12)
    monkeypatch.setattr(downloads, "MAX_SHARE", 1e6)
    site = Site(tmp_path)
    with site.run() as run:
        server = Server(site, run)
        await server.gateway.open()
        yield server
        assert server.transport.raised == []
        await server.gateway.close()
        await server.downloads.close()


# What comes


async def test_every_kind_of_file(server: Server) -> None:
    watch = await server.device("watch")
    manifest = (server.site.artifacts / "manifest.json").read_bytes()
    for path, body in {
        "manifest": manifest,
        "artifacts/head/eval_model.onnx": b"eval head",
        "artifacts/optimizers/sgd.onnx": b"sgd",
        "blocks/head/1": HEAD,
    }.items():
        part = await watch.get_part(Fetch(path, 0, MAX_FETCH_BYTES))
        assert part == Part(path, hashlib.sha256(body).hexdigest(), len(body), 0, part.ticket, body)


async def test_a_part_of_a_file(server: Server) -> None:
    watch = await server.device("watch")
    for offset, num_bytes in ((0, 5), (5, 7), (31, 1), (30, 100), (32, 1), (1 << 40, 9)):
        part = await watch.get_part(Fetch("blocks/head/1", offset, num_bytes))
        assert (part.offset, part.data) == (offset, HEAD[offset : offset + num_bytes])
        assert part.num_bytes == 32


async def test_a_window_comes_in_chunks(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = await server.device("watch")
    with long_files(monkeypatch):
        found = await watch.get(Fetch("x", 1000, 3 * CHUNK_BYTES + 5))
    assert [p.offset for p in found if isinstance(p, Part)] == [
        1000 + i * CHUNK_BYTES for i in range(4)
    ]
    data = b"".join(p.data for p in found if isinstance(p, Part))
    assert data == LONG[1000 : 1000 + 3 * CHUNK_BYTES + 5]
    assert len({p.ticket for p in found if isinstance(p, Part)}) == 1


async def test_what_is_known_does_not_come(server: Server) -> None:
    watch = await server.device("watch")
    part = await watch.get_part(Fetch("manifest", 0, 1))
    known = Fetch("manifest", 0, 1, known=part.sha256)
    assert await watch.get(known) == [Declined("manifest", "unchanged")]
    assert await watch.get_part(Fetch("manifest", 0, 1, known="0" * 64))


async def test_bytes_of_blocks_are_counted_as_traffic(server: Server) -> None:
    watch = await server.device("watch")
    await watch.get(Fetch("blocks/head/1", 0, 20))
    await watch.get(Fetch("blocks/head/1", 20, 20))
    await watch.get(Fetch("artifacts/head/parameters.bin", 0, 20))
    server.run.federation.flush_traffic()
    traffic = server.run.state.history.device_traffic()
    assert traffic["watch"] == {"head": {"bytes_up": 0, "bytes_down": 32}}


# What does not

NOT_HERE = {
    "x": "not-there",
    "manifest/": "not-there",
    "manifest/x": "not-there",
    "artifacts": "not-there",
    "artifacts/": "not-there",
    "artifacts/manifest.json": "not-there",
    "artifacts/head/secret.txt": "not-there",
    "artifacts/head/../../data/state.sqlite": "not-there",
    "artifacts/../data/state.sqlite": "not-there",
    "artifacts//etc/passwd": "not-there",
    "/etc/passwd": "not-there",
    "../data/state.sqlite": "not-there",
    "artifacts/encoder-gyro/eval_model.onnx": "not-held",
    "blocks/encoder-gyro/1": "not-held",
    "blocks/no-such-block/1": "not-held",
    "blocks/head": "not-there",
    "blocks/head/": "not-there",
    "blocks/head/0": "not-there",
    "blocks/head/2": "not-there",
    "blocks/head/-1": "not-there",
    "blocks/head/1.0": "not-there",
    "blocks/head/" + "9" * 16: "not-there",
    "blocks/head/1/1": "not-there",
}


@pytest.mark.parametrize("path", NOT_HERE)
async def test_nothing_but_what_the_device_holds(server: Server, path: str) -> None:
    (server.site.artifacts / "head" / "secret.txt").write_text("not in the manifest")
    watch = await server.device("watch")
    [declined] = await watch.get(Fetch(path, 0, 100))
    assert isinstance(declined, Declined)
    assert (declined.path, declined.why) == (path, NOT_HERE[path])


async def test_a_private_block_is_nobodys(tmp_path: Path) -> None:
    site = Site(tmp_path)
    with site.run(private_blocks=("head",)) as run:
        server = Server(site, run)
        await server.gateway.open()
        watch = await server.device("watch")
        [declined] = await watch.get(Fetch("blocks/head/1", 0, 100))
        assert isinstance(declined, Declined) and declined.why == "not-there"


async def test_a_file_that_cannot_be_read(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    watch = await server.device("watch")
    (server.site.artifacts / "head" / "eval_model.onnx").unlink()
    [declined] = await watch.get(Fetch("artifacts/head/eval_model.onnx", 0, 100))
    assert isinstance(declined, Declined) and declined.why == "failed"
    assert "cannot serve artifacts/head/eval_model.onnx to watch" in caplog.text


@pytest.mark.parametrize(
    "message",
    [Part("x", "0" * 64, 1, 0, bytes(8), b"x"), Declined("x", "failed")],
    ids=["part", "declined"],
)
async def test_a_device_serves_nothing(server: Server, message: Part | Declined) -> None:
    watch = await server.device("watch")
    await watch.ask(wire.encode(message))
    assert server.gateway.refused == {"malformed": 1}


# More than its share


async def test_a_newer_request_takes_the_place_of_the_older(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often it asks, the server has one request of a device."""
    watch = await server.device("watch")
    with long_files(monkeypatch):
        for i in range(50):
            server.downloads._devices.setdefault("watch", downloads._Device()).unproven_bytes = 0
            server.downloads.fetch("watch", Fetch("x", i, MAX_FETCH_BYTES))
        await server.settle()
    found = [p.offset for p in server.received["watch"] if isinstance(p, Part)]
    assert found == [49 + i * CHUNK_BYTES for i in range(7)]
    assert watch


async def test_requests_in_vain_are_counted_against_a_device(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = await server.device("watch")
    await watch.get(Fetch("manifest", 0, 1))
    assert server.gateway._conduct._wasted == {}
    with long_files(monkeypatch):
        for _ in range(3):
            for message in (Fetch("x", 0, MAX_FETCH_BYTES), Fetch("x", 1, MAX_FETCH_BYTES)):
                await watch.client.publish(topics.request(FED, "watch"), wire.encode(message))
        await server.settle()
    assert "watch" in server.gateway._conduct._wasted


async def test_a_device_that_shows_nothing_is_sent_little(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it does not read lies in the broker's memory."""
    watch = await server.device("watch")
    with long_files(monkeypatch):
        for _ in range(100):
            await watch.get(Fetch("x", 0, MAX_FETCH_BYTES))
            server.downloads.fetch("watch", Fetch("x", 0, MAX_FETCH_BYTES, ticket=b"guess"))
            await server.settle()
        sent = server.order.count("watch") * CHUNK_BYTES
        assert sent <= downloads.MAX_UNPROVEN_BYTES
        server.clock.now_s += 10  # which forgives 160 KiB
        assert len(await watch.get(Fetch("x", 0, MAX_FETCH_BYTES))) == 0
        assert len(await watch.get(Fetch("x", 0, CHUNK_BYTES))) == 1


async def test_a_device_that_shows_what_came_gets_everything(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch, ticket = await server.device("watch"), b""
    with long_files(monkeypatch):
        for _ in range(50):
            found = await watch.get(Fetch("x", 0, MAX_FETCH_BYTES, ticket))
            assert len(found) == 7 and isinstance(found[-1], Part)
            assert found[-1].ticket != ticket
            ticket = found[-1].ticket


async def test_another_devices_ticket_is_none(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch, phone = await server.device("watch"), await server.device("phone")
    with long_files(monkeypatch):
        for _ in range(2):
            await phone.get(Fetch("x", 0, MAX_FETCH_BYTES))
        for _ in range(9):
            part = (await watch.get(Fetch("x", 0, 1, b"")))[0]
            assert isinstance(part, Part)
            assert await phone.get(Fetch("x", 0, MAX_FETCH_BYTES, part.ticket)) == []


async def test_devices_take_turns(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.downloads, "_on_their_way", asyncio.Semaphore(1))
    greedy, modest = await server.device("watch"), await server.device("phone")
    with long_files(monkeypatch):
        await greedy.client.publish(
            topics.request(FED, "watch"), wire.encode(Fetch("x", 0, MAX_FETCH_BYTES))
        )
        await modest.client.publish(
            topics.request(FED, "phone"), wire.encode(Fetch("x", 0, 2 * CHUNK_BYTES))
        )
        await server.settle()
    assert server.order[:4] in (["watch", "phone"] * 2, ["watch", "watch", "phone", "watch"])
    assert server.order.count("watch") == 7


async def test_few_parts_are_in_memory_at_once(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many devices ask, and however slow the broker is."""
    gate, under_way, most = asyncio.Event(), 0, 0

    async def publish(topic: str, payload: bytes, *, retain: bool = False) -> None:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await gate.wait()
        under_way -= 1

    monkeypatch.setattr(server.transport, "publish", publish)
    with long_files(monkeypatch):
        for i in range(100):
            server.downloads.fetch(f"device-{i}", Fetch("x", 0, MAX_FETCH_BYTES))
        for _ in range(20):
            await asyncio.sleep(0)
        assert (under_way, most) == (downloads.MAX_PARTS,) * 2
        gate.set()
        await server.settle()
    assert most == downloads.MAX_PARTS


async def test_a_device_has_its_rate(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    sleep = asyncio.sleep

    async def note(seconds: float) -> None:
        pauses.append(seconds)
        await sleep(0)

    monkeypatch.setattr(downloads, "MAX_BYTES_PER_S", 1 << 20)
    server.downloads.fetch("watch", Fetch("manifest", 0, 1))
    monkeypatch.setattr(downloads.asyncio, "sleep", note)  # type: ignore[attr-defined]
    with long_files(monkeypatch):
        server.downloads.fetch("phone", Fetch("x", 0, MAX_FETCH_BYTES))
        work = server.downloads._devices["phone"].work
        assert work is not None
        await work
    assert sum(pauses) >= len(LONG) / (1 << 20)


async def test_a_part_that_the_broker_does_not_take_is_asked_for_again(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def refuse(topic: str, payload: bytes, *, retain: bool = False) -> None:
        raise TransportError("the broker took no message")

    watch = await server.device("watch")
    with monkeypatch.context() as patch:
        patch.setattr(server.transport, "publish", refuse)
        assert await watch.get(Fetch("manifest", 0, MAX_FETCH_BYTES)) == []
    assert "a part of a file was not sent: the broker took no message" in caplog.text
    assert await watch.get_part(Fetch("manifest", 0, MAX_FETCH_BYTES))
