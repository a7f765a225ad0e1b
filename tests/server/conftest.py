from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
import pytest
from paho.mqtt.enums import CallbackAPIVersion

from petalfl.mqtt import Endpoint
from petalfl.tls import Tls
from server.broker import Broker, open_broker
from tests.mosquitto import missing_mosquitto, mosquitto
from tests.server.builders import (
    Site,
)
from tests.server.federations import Clock

WAIT_S = 30.0
OpenBroker = Callable[[], Broker]


class Peer:
    """An MQTT client on its own thread that remembers what it received."""

    def __init__(self, endpoint: Endpoint, login: tuple[str, str] | None, **more: Any) -> None:
        will, keepalive = more.pop("will", None), more.pop("keepalive", 60)
        tls: Tls | None = more.pop("tls", None)
        self.received: list[tuple[str, bytes]] = []
        self._news = threading.Condition()
        self._state: dict[str, Any] = {}
        self._client = paho.Client(CallbackAPIVersion.VERSION2, reconnect_on_failure=False, **more)
        if login is not None:
            self._client.username_pw_set(*login)
        if tls is not None:
            self._client.tls_set_context(tls.context())
        if will is not None:
            self._client.will_set(will[0], will[1], 1)
        self._client.on_connect = lambda c, u, f, reason, p: self._note("connected", reason)
        self._client.on_subscribe = lambda c, u, mid, reasons, p: self._note(mid, reasons[0])
        self._client.on_disconnect = lambda c, u, f, reason, p: self._note("gone", reason)
        self._client.on_message = self._on_message
        self._client.connect(endpoint.host, endpoint.port, keepalive)
        self._client.loop_start()
        self.is_connected = not self._wait("connected").is_failure

    def subscribe(self, *filters: str) -> list[bool]:
        return [
            not self._wait(self._mid(self._client.subscribe(one, 1))).is_failure for one in filters
        ]

    def publish(self, topic: str, payload: bytes = b"x", *, retain: bool = False) -> None:
        self._client.publish(topic, payload, 1, retain).wait_for_publish(WAIT_S)

    def send(self, topic: str, payload: bytes) -> None:
        self._client.publish(topic, payload, 1)

    def wait_for(self, topic: str, num_messages: int = 1, timeout_s: float = WAIT_S) -> None:
        """Wait until a message on this topic, or so many messages in all, have arrived."""

        def is_here() -> bool:
            return topic in self.topics and len(self.received) >= num_messages

        with self._news:
            assert self._news.wait_for(is_here, timeout_s), (
                f"{topic} never came: {self.topics[:20]}"
            )

    def wait_until_gone(self) -> None:
        self._wait("gone")

    @property
    def topics(self) -> list[str]:
        return [topic for topic, _ in self.received]

    def stall(self) -> None:
        """Keep the connection, but neither send nor receive any more."""
        self._client._thread_terminate = True
        self._client._thread.join()  # type: ignore[union-attr]

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def _mid(self, sent: tuple[Any, int | None]) -> Any:
        return sent[1]

    def _on_message(self, client: Any, data: Any, message: paho.MQTTMessage) -> None:
        with self._news:
            self.received.append((message.topic, bytes(message.payload)))
            self._news.notify_all()

    def _note(self, key: Any, value: Any) -> None:
        with self._news:
            self._state[key] = value
            self._news.notify_all()

    def _wait(self, key: Any) -> Any:
        with self._news:
            assert self._news.wait_for(lambda: key in self._state, WAIT_S), f"waited for {key}"
            return self._state[key]


@pytest.fixture
def broker_peer() -> Iterator[Callable[..., Peer]]:
    """Connect clients that are closed after the test."""
    with ExitStack() as stack:

        def connect(endpoint: Endpoint, login: tuple[str, str] | None, **more: Any) -> Peer:
            peer = Peer(endpoint, login, **more)
            stack.callback(peer.close)
            return peer

        yield connect


@pytest.fixture(params=["embedded", pytest.param("mosquitto", marks=pytest.mark.mosquitto)])
def broker_open(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[OpenBroker]:
    """Open, not start, a broker of each kind on the same data every time."""
    with ExitStack() as stack:
        spec = "embedded"
        if request.param == "mosquitto":
            spec = stack.enter_context(broker_mosquitto(tmp_path))
        yield lambda: open_broker(spec, data_dir=tmp_path, federation="f")


def broker_mosquitto(directory: Path) -> Any:
    if reason := missing_mosquitto():
        pytest.skip(reason)
    return mosquitto(directory)


def broker_poll(is_so: Callable[[], bool], what: str) -> None:
    """Wait until a condition holds that nobody announces."""
    deadline_s = time.monotonic() + WAIT_S
    while not is_so():
        assert time.monotonic() < deadline_s, f"waited for: {what}"
        time.sleep(0.02)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


@pytest.fixture
def other_db(site: Site) -> Iterator[sqlite3.Connection]:
    """Another connection to the database: it sees what is committed and nothing else."""
    connection = sqlite3.connect(site.data_dir / "state.sqlite", isolation_level=None)
    yield connection
    connection.close()


@pytest.fixture
async def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)
