"""Two federations on one server: one port, one broker, nothing in common."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from petalfl import EdgeClient, EnrollError, TransportError, topics, wire
from petalfl.mqtt import Endpoint, MqttTransport
from petalfl.store import DeviceStore
from petalfl.ways import Session
from tests.integration.harness import Server, running_server, take_part
from tests.integration.test_async import examples

SETTINGS = """
rounds = 3
log_level = "warning"
[federation.cars]
scheme = "private-head"
[federation.watches]
mode = "async"
buffer_size = 1
token = "of-the-watches"
"""


class Two:
    """The server and what opens its federations."""

    def __init__(self, server: Server, folder: Path) -> None:
        self.server = server
        self.folder = folder
        runtime = json.loads((server.data_dir / "server.json").read_bytes())
        self.tokens: dict[str, str] = runtime["tokens"]

    def client(self, federation: str, device: str, **more: Any) -> EdgeClient:
        mine = examples(5, 24)
        defaults = {"token": self.tokens[federation], "store": self.folder / device}
        return EdgeClient(
            self.server.url, data=mine.of("a"), labels=mine.labels, device=device,
            federation=federation, **{**defaults, **more},
        )  # fmt: skip

    def get(self, federation: str, what: str) -> Any:
        authorization = f"Bearer {self.tokens[federation]}"
        return self.server.get(what, authorization, federation)


@pytest.fixture
def two(small_artifacts: Path, tmp_path: Path) -> Iterator[Two]:
    (tmp_path / "server.toml").write_text(SETTINGS)
    arguments = ("--config", str(tmp_path / "server.toml"))
    with running_server(small_artifacts, tmp_path / "server", *arguments) as server:
        yield Two(server, tmp_path)


def test_each_trains_its_own_model_also_after_a_restart(
    two: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("petalfl.uplink.RECEIPT_TIMEOUT_S", 1.0)
    begun: set[str] = set()

    async def scenario(clients: list[EdgeClient]) -> None:
        taking_part = asyncio.create_task(take_part(clients))
        while begun != two.tokens.keys():
            await asyncio.sleep(0.01)
        await asyncio.to_thread(two.server.stop, signal.SIGKILL)
        await asyncio.to_thread(two.server.start)
        await taking_part

    with ExitStack() as stack:
        clients = [
            stack.enter_context(
                two.client(federation, device, on_round=lambda info, f=federation: begun.add(f))
            )
            for federation, device in (("cars", "car-1"), ("watches", "watch-1"))
        ]
        asyncio.run(scenario(clients))
    cars, watches = two.get("cars", "status"), two.get("watches", "status")
    assert (cars["mode"], watches["mode"]) == ("sync", "async")
    assert (cars["is_finished"], watches["is_finished"]) == (True, True)
    assert (cars["private_blocks"], watches["private_blocks"]) == (["head"], ["fusion", "head"])
    assert (cars["devices_enrolled"], watches["devices_enrolled"]) == (1, 1)
    assert two.get("cars", "devices").keys() == {"car-1"}
    for name in two.tokens:
        assert (two.folder / "server" / name / "state.sqlite").exists()


def test_a_token_opens_its_own_federation_alone(two: Two) -> None:
    assert two.tokens["watches"] == "of-the-watches" != two.tokens["cars"]
    with pytest.raises(EnrollError, match="401"):
        two.client("watches", "d-1", token=two.tokens["cars"]).run()


def test_a_name_is_one_device_on_the_whole_server(two: Two) -> None:
    enroll(two, "cars", "thing", "store-1")
    with pytest.raises(EnrollError, match="409 device thing is enrolled already"):
        two.client("watches", "thing", store=two.folder / "store-2").run()


def enroll(two: Two, federation: str, device: str, store: str) -> Session:
    client = two.client(federation, device, store=two.folder / store)
    try:
        return client._enter()
    finally:
        client.close()


async def test_a_device_hears_nothing_of_the_other_federation(two: Two) -> None:
    session = await asyncio.to_thread(enroll, two, "cars", "spy", "spy")
    store = DeviceStore(two.folder / "spy")
    identity = store.read_identity()
    store.close()
    assert identity is not None
    transport = MqttTransport(
        Endpoint(session.mqtt_host, session.mqtt_port), login=("spy", identity.password),
        client_id="spy",
    )  # fmt: skip
    await transport.connect()
    heard: list[str] = []
    try:
        await transport.subscribe(topics.all_down("cars", "spy"), lambda t, p: heard.append(t))
        for topic in (topics.all_down("watches", "spy"), topics.block_meta("watches", "head")):
            with pytest.raises(TransportError):
                await transport.subscribe(topic, lambda t, p: heard.append(t))
        ready = wire.encode(wire.Ready(("a",), ("head",)))
        await transport.publish(topics.request("watches", "spy"), ready)
        await asyncio.sleep(0.5)
        assert heard == []
        assert two.get("watches", "status")["devices_ready"] == 0
    finally:
        await transport.close()
