"""What `Transport` promises, kept by both of them; MQTT's own troubles are in test_mqtt."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NamedTuple

import pytest

from petalfl.mqtt import Endpoint, MqttTransport
from petalfl.transport import Handler, MemoryBroker, Transport, dispatch
from server.broker import open_broker

CHUNK = 120 * 1024
DOWN = "fl/v1/f/down/dev-1"


class Pair(NamedTuple):
    """Two ends of one broker: the server's, and the device dev-1's."""

    server: Transport
    device: Transport


@pytest.fixture(params=["memory", "mqtt"])
async def pair(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Pair]:
    if request.param == "memory":
        memory = MemoryBroker()
        yield Pair(memory.connect(), memory.connect())
        return
    broker = open_broker("embedded", data_dir=tmp_path, federation="f")
    await broker.start()
    await broker.grant("dev-1", "pw-1")
    endpoint = Endpoint(broker.endpoint.host, broker.endpoint.port)
    server = MqttTransport(endpoint, login=broker.server_login, client_id="server")
    device = MqttTransport(endpoint, login=("dev-1", "pw-1"), client_id="dev-1")
    await server.connect()
    await device.connect()
    yield Pair(server, device)
    await server.close()
    await device.close()
    await broker.close()


class Inbox:
    """A handler that remembers, and can be waited for."""

    def __init__(self) -> None:
        self.messages: list[tuple[str, bytes]] = []
        self._news = asyncio.Event()

    def __call__(self, topic: str, payload: bytes) -> None:
        self.messages.append((topic, payload))
        self._news.set()

    async def wait_for(self, number: int) -> list[tuple[str, bytes]]:
        async def wait() -> None:
            while len(self.messages) < number:
                self._news.clear()
                await self._news.wait()

        await asyncio.wait_for(wait(), 30)
        return self.messages

    @property
    def topics(self) -> list[str]:
        return [topic for topic, _ in self.messages]


async def test_binary_messages_of_120_kib_in_order(pair: Pair) -> None:
    inbox = Inbox()
    await pair.server.subscribe("fl/v1/f/blocks/+/up/+", inbox)
    topic = "fl/v1/f/blocks/head/up/dev-1"
    sent = [bytes([i]) * CHUNK + bytes(range(256)) for i in range(20)]
    for payload in sent:
        await pair.device.publish(topic, payload)
    assert await inbox.wait_for(20) == [(topic, payload) for payload in sent]


async def test_order_of_concurrent_publishes(pair: Pair) -> None:
    inbox = Inbox()
    await pair.device.subscribe(f"{DOWN}/+", inbox)
    await asyncio.gather(*(pair.server.publish(f"{DOWN}/task", bytes([i])) for i in range(50)))
    await inbox.wait_for(50)
    assert [payload[0] for _, payload in inbox.messages] == list(range(50))


async def test_empty_payload(pair: Pair) -> None:
    inbox = Inbox()
    await pair.device.subscribe(f"{DOWN}/+", inbox)
    await pair.server.publish(f"{DOWN}/task", b"")
    assert await inbox.wait_for(1) == [(f"{DOWN}/task", b"")]


async def test_filters(pair: Pair) -> None:
    level, tail = Inbox(), Inbox()
    await pair.server.subscribe("fl/v1/f/req/+", level)
    await pair.server.subscribe("fl/v1/f/blocks/#", tail)
    for topic in ("fl/v1/f/blocks/b/up/dev-1", "fl/v1/f/dev/dev-1/status", "fl/v1/f/req/dev-1"):
        await pair.device.publish(topic, b"x")
    await level.wait_for(1)
    assert level.topics == ["fl/v1/f/req/dev-1"]
    assert tail.topics == ["fl/v1/f/blocks/b/up/dev-1"]


async def test_retained_messages_wait_for_subscribers(pair: Pair) -> None:
    seen = Inbox()
    await pair.server.subscribe("fl/v1/f/blocks/+/meta", seen)
    for block, payload in (("a", b"1"), ("a", b"2"), ("b", b"3")):
        await pair.server.publish(f"fl/v1/f/blocks/{block}/meta", payload, retain=True)
    await seen.wait_for(3)  # the broker may acknowledge before it keeps it
    inbox = Inbox()
    await pair.device.subscribe("fl/v1/f/blocks/+/meta", inbox)
    await inbox.wait_for(2)
    await pair.server.publish("fl/v1/f/blocks/a/meta", b"4", retain=True)
    await inbox.wait_for(3)
    assert sorted(inbox.messages[:2]) == [
        ("fl/v1/f/blocks/a/meta", b"2"),
        ("fl/v1/f/blocks/b/meta", b"3"),
    ]
    assert inbox.messages[2:] == [("fl/v1/f/blocks/a/meta", b"4")]


async def test_nothing_arrives_from_before_the_subscription(pair: Pair) -> None:
    seen, inbox = Inbox(), Inbox()
    await pair.server.subscribe(f"{DOWN}/+", seen)
    await pair.server.publish(f"{DOWN}/task", b"before")
    await seen.wait_for(1)  # the broker may acknowledge before it passes it on
    await pair.device.subscribe(f"{DOWN}/+", inbox)
    await pair.server.publish(f"{DOWN}/task", b"after")
    await inbox.wait_for(1)
    assert inbox.messages == [(f"{DOWN}/task", b"after")]


async def test_an_empty_retained_message_removes_the_former(pair: Pair) -> None:
    seen = Inbox()
    await pair.server.subscribe("fl/v1/f/blocks/+/meta", seen)
    await pair.server.publish("fl/v1/f/blocks/a/meta", b"1", retain=True)
    await pair.server.publish("fl/v1/f/blocks/a/meta", b"", retain=True)
    await pair.server.publish("fl/v1/f/blocks/b/meta", b"2", retain=True)
    await seen.wait_for(3)  # the broker may acknowledge before it keeps it
    inbox = Inbox()
    await pair.device.subscribe("fl/v1/f/blocks/+/meta", inbox)
    await inbox.wait_for(1)
    assert inbox.messages == [("fl/v1/f/blocks/b/meta", b"2")]


async def test_a_handler_runs_on_the_event_loop_after_publish(pair: Pair) -> None:
    threads = []
    await pair.device.subscribe(f"{DOWN}/+", lambda *_: threads.append(threading.get_ident()))
    inbox = Inbox()
    await pair.device.subscribe("fl/v1/f/blocks/+/meta", inbox)
    await pair.server.publish(f"{DOWN}/task", b"x")
    await pair.server.publish("fl/v1/f/blocks/b/meta", b"x")
    await inbox.wait_for(1)
    assert threads == [threading.get_ident()]


async def test_a_handler_that_fails_hurts_nobody(
    pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    inbox = Inbox()

    def fail_once(topic: str, payload: bytes) -> None:
        if payload == b"bad":
            raise ZeroDivisionError
        inbox(topic, payload)

    await pair.device.subscribe(f"{DOWN}/+", fail_once)
    await pair.server.publish(f"{DOWN}/task", b"bad")
    await pair.server.publish(f"{DOWN}/task", b"good")
    assert await inbox.wait_for(1) == [(f"{DOWN}/task", b"good")]
    (record,) = [r for r in caplog.records if r.name == "petalfl.transport"]
    assert record.levelno == logging.ERROR
    assert f"{DOWN}/+" in record.getMessage()


async def test_nothing_arrives_after_close(pair: Pair) -> None:
    inbox, other = Inbox(), Inbox()
    await pair.device.subscribe(f"{DOWN}/+", inbox)
    await pair.server.subscribe(f"{DOWN}/+", other)
    await pair.server.publish(f"{DOWN}/task", b"1")
    await inbox.wait_for(1)
    await pair.device.close()
    await pair.server.publish(f"{DOWN}/task", b"2")
    await other.wait_for(2)
    await asyncio.sleep(0.02)
    assert inbox.messages == [(f"{DOWN}/task", b"1")]


async def test_closing_twice_is_closing_once(pair: Pair) -> None:
    await pair.device.close()
    await pair.device.close()
    await pair.server.publish(f"{DOWN}/task", b"x")


def test_dispatch_calls_every_handler_that_matches() -> None:
    inboxes = {f: Inbox() for f in ("a/b", "a/+", "a/#", "#", "b/+", "a/b/c")}
    handlers: dict[str, Handler] = dict(inboxes)
    dispatch(handlers, "a/b", b"x")
    called = [name for name, inbox in inboxes.items() if inbox.messages == [("a/b", b"x")]]
    assert called == ["a/b", "a/+", "a/#", "#"]


def test_a_handler_may_change_the_handlers() -> None:
    handlers: dict[str, Handler] = {}
    handlers["#"] = lambda t, p: handlers.clear()
    dispatch(handlers, "a", b"")
    assert handlers == {}
