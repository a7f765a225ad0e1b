"""Servers and clients on a small model."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from petalfl import (
    EdgeClient,
)
from petalfl.mqtt import Endpoint, MqttTransport
from petalfl.store import DeviceStore
from server.broker import Broker
from tests.integration.harness import Server, running_server
from tests.petalfl.cable import (
    LOGIN,
    Cable,
    Opener,
    start_broker,
)
from tests.petalfl.clients import LABELS, A


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


@pytest.fixture
def store(tmp_path: Path) -> Iterator[DeviceStore]:
    store = DeviceStore(tmp_path / "store")
    yield store
    store.close()


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


@pytest.fixture
async def broker(tmp_path: Path, stack: AsyncExitStack) -> Broker:
    return await start_broker(tmp_path, stack)


@pytest.fixture
def connect(broker: Broker, stack: AsyncExitStack) -> Opener:
    """Connects a device, or with ``is_server`` the server; closed after the test."""

    async def connect(*, is_server: bool = False, **changes: Any) -> MqttTransport:
        port = changes.pop("port", broker.endpoint.port)
        defaults = {
            "login": broker.server_login if is_server else LOGIN,
            "client_id": "server" if is_server else "dev-1",
        }
        transport = MqttTransport(Endpoint("127.0.0.1", port), **{**defaults, **changes})
        stack.push_async_callback(transport.close)
        await transport.connect()
        return transport

    return connect


@pytest.fixture
def is_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("petalfl.mqtt.BACKOFF_S", (0.05, 0.1))


@pytest.fixture
async def cable(broker: Broker, stack: AsyncExitStack) -> Cable:
    cable = Cable(broker.endpoint.port)
    await cable.plug()
    stack.push_async_callback(cable.pull)
    return cable
