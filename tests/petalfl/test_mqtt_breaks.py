"""`MqttTransport` over a cable that is pulled, and to brokers that are away for a while."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

import petalfl.mqtt
from petalfl.errors import TransportError
from petalfl.mqtt import KEEPALIVE_S, Endpoint, MqttTransport
from server.broker import Broker
from tests.petalfl.cable import (
    CHUNK,
    DOWN,
    LOGIN,
    STATUS,
    UP,
    Cable,
    Inbox,
    Opener,
    put_away,
    start_broker,
    until,
    until_arrived,
)


@pytest.mark.usefixtures("is_quick")
async def test_a_break_is_mended_with_its_subscriptions(connect: Opener, cable: Cable) -> None:
    calls: list[int] = []
    device = await connect(port=cable.port, on_connect=lambda: calls.append(cable.num_connections))
    inbox = Inbox()
    await device.subscribe(f"{DOWN}/+", inbox)
    await device.subscribe("fl/v1/f/blocks/+/meta", inbox)
    assert calls == []  # the first connect is the caller's own
    server = await connect(is_server=True)
    for number in (1, 2, 3):
        cable.cut()
        await until(lambda n=number: len(calls) == n, "on_connect")  # type: ignore[misc]
        for topic in (f"{DOWN}/task", f"fl/v1/f/blocks/{number}/meta"):
            await until_arrived(server, topic, inbox, str(number).encode())
    assert calls == [2, 3, 4]


@pytest.mark.usefixtures("is_quick")
async def test_what_is_published_during_a_break_arrives(connect: Opener, cable: Cable) -> None:
    server, inbox = await connect(is_server=True), Inbox()
    await server.subscribe("fl/v1/f/req/+", inbox)
    device = await connect(port=cable.port)
    await device.publish(UP, b"before")
    await cable.pull()
    await asyncio.sleep(0.05)
    publishing = [asyncio.create_task(device.publish(UP, bytes([i]))) for i in range(40)]
    await asyncio.sleep(0.2)
    assert not any(task.done() for task in publishing)  # none is claimed to be there
    await cable.plug()
    await asyncio.gather(*publishing)
    await inbox.wait_for((UP, bytes([39])))
    payloads = [payload for _, payload in inbox.messages]
    assert payloads == [b"before", *(bytes([i]) for i in range(40))]


@pytest.mark.usefixtures("is_quick")
async def test_a_break_amid_large_messages_loses_none(connect: Opener, cable: Cable) -> None:
    server, inbox = await connect(is_server=True), Inbox()
    await server.subscribe("fl/v1/f/blocks/+/up/+", inbox)
    device = await connect(port=cable.port)
    topic = "fl/v1/f/blocks/head/up/dev-1"
    sent = [bytes([i]) * CHUNK for i in range(60)]
    cable.cut_after_bytes = cable.num_bytes + 10 * CHUNK
    await asyncio.gather(*(device.publish(topic, payload) for payload in sent))
    await until(lambda: cable.num_connections == 2, "the second connection")
    await until(lambda: {p[0] for _, p in inbox.messages} == set(range(60)), "the last messages")
    assert {payload for _, payload in inbox.messages} == set(sent)  # whole; some came twice


@pytest.mark.usefixtures("is_quick")
async def test_what_a_break_cannot_be_mended_for_is_told_once(
    connect: Opener, cable: Cable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once for each reason, and again at the next break."""
    tries, told, calls = list[None](), list[str](), list[None]()
    connected_to = petalfl.mqtt._connected_to

    def counted(*arguments: Any) -> socket.socket:
        tries.append(None)
        return connected_to(*arguments)

    monkeypatch.setattr("petalfl.mqtt._connected_to", counted)
    device = await connect(
        port=cable.port,
        on_connect=lambda: calls.append(None),
        on_trouble=lambda error: told.append(str(error)),
    )
    refused = f"no broker answers at mqtt://127.0.0.1:{cable.port}: "
    for number in (1, 2):
        await cable.pull()
        tries.clear()
        await until(lambda: len(tries) > 3, "more tries")
        assert len(told) == 1 and told[0].startswith(refused)
        cable.is_mute, device._timeout_s = True, 0.2  # another reason
        await cable.plug()
        await until(lambda: len(told) > 1, "the second reason")
        assert "sent no CONNACK in 0.2 s" in told[1]
        device._timeout_s = 30
        cable.unmute()
        await until(lambda n=number: len(calls) == n, "on_connect")  # type: ignore[misc]
        told.clear()


@pytest.mark.usefixtures("is_quick")
async def test_subscribing_during_a_break(connect: Opener, cable: Cable) -> None:
    calls: list[None] = []
    device = await connect(port=cable.port, on_connect=lambda: calls.append(None))
    server, inbox = await connect(is_server=True), Inbox()
    await cable.pull()
    await asyncio.sleep(0.05)
    await asyncio.wait_for(device.subscribe(f"{DOWN}/+", inbox), 20)
    await cable.plug()
    await until(lambda: bool(calls), "on_connect")
    await until_arrived(server, f"{DOWN}/task", inbox, b"x")


async def test_a_publish_gives_up_in_time(connect: Opener, cable: Cable) -> None:
    device = await connect(port=cable.port)
    device._timeout_s = 0.3
    await cable.pull()
    with pytest.raises(TransportError, match=f"took no message on {UP} in 0.3 s"):
        await device.publish(UP, b"x")


@pytest.mark.usefixtures("is_quick")
async def test_broker_killed_and_started_again(
    tmp_path: Path, broker: Broker, connect: Opener, stack: AsyncExitStack
) -> None:
    calls: list[None] = []
    device = await connect(on_connect=lambda: calls.append(None))
    inbox, answers = Inbox(), Inbox()
    await device.subscribe(f"{DOWN}/+", answers)
    broker._keeper.cancel()  # type: ignore[attr-defined]  # the next one is the test's own
    os.kill(broker._child.pid, signal.SIGKILL)  # type: ignore[attr-defined]
    await broker._child.wait()  # type: ignore[attr-defined]  # and its port is free
    publishing = asyncio.create_task(device.publish(STATUS, b"during", retain=True))
    again = await start_broker(tmp_path, stack, f"embedded:{broker.endpoint.port}")
    server = await connect(is_server=True, login=again.server_login)
    await server.subscribe("fl/v1/f/dev/+/status", inbox)
    await publishing
    await inbox.wait_for((STATUS, b"during"))
    await until(lambda: bool(calls), "on_connect")
    await until_arrived(server, f"{DOWN}/task", answers, b"x")


@pytest.mark.usefixtures("is_quick")
async def test_a_broker_that_is_silent_for_a_while(cable: Cable) -> None:
    """It accepts connections before it answers, as when it starts or is overloaded."""
    calls: list[None] = []
    device = MqttTransport(
        Endpoint("127.0.0.1", cable.port),
        login=LOGIN,
        client_id="dev-1",
        on_connect=lambda: calls.append(None),
    )
    await device.connect()
    try:
        cable.is_mute, device._timeout_s = True, 0.2
        cable.cut()
        await until(lambda: cable.num_connections >= 4, "a third attempt")
        device._timeout_s = 30
        cable.unmute()
        await until(lambda: bool(calls), "on_connect")
        await device.publish(UP, b"x")
    finally:
        await put_away(device)


@pytest.mark.usefixtures("is_quick")
async def test_a_login_refused_for_a_while(
    broker: Broker, connect: Opener, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[None] = []
    device = await connect(on_connect=lambda: calls.append(None))
    await broker.revoke("dev-1")  # cuts the connection too
    await until(lambda: "refuses the login" in caplog.text, "a refused attempt")
    assert not calls
    await broker.grant(*LOGIN)
    await until(lambda: bool(calls), "on_connect")
    await device.publish(UP, b"x")


@pytest.mark.usefixtures("is_quick")
async def test_a_peer_that_fell_silent_is_given_up(
    connect: Opener, cable: Cable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dead radio link breaks no socket: only the missing answers to pings tell."""
    ahead_s, calls = 0.0, list[None]()
    monkeypatch.setattr("paho.mqtt.client.time_func", lambda: time.monotonic() + ahead_s)
    monkeypatch.setattr("petalfl.mqtt.MISC_INTERVAL_S", 0.05)
    device = await connect(port=cable.port, on_connect=lambda: calls.append(None))
    for _ in range(3):  # alive and idle: pings keep it

        def is_answered(num_bytes: int = cable.num_bytes) -> bool:
            return cable.num_bytes == num_bytes + 4 and not device._client._ping_t

        ahead_s += KEEPALIVE_S
        await until(is_answered, "an answer to a ping")
    assert (cable.num_connections, calls) == (1, [])
    cable.stall()
    ahead_s += KEEPALIVE_S
    await until(lambda: device._client._ping_t > 0, "a ping")
    assert calls == [], "its answer may still come"
    ahead_s += KEEPALIVE_S
    await until(lambda: bool(calls), "on_connect")
    assert cable.num_connections == 2
    await device.publish(UP, b"x")


@pytest.mark.usefixtures("is_quick")
async def test_a_failing_on_connect_ends_nothing(cable: Cable) -> None:
    calls: list[None] = []

    def fail() -> None:
        calls.append(None)
        raise ZeroDivisionError

    device = MqttTransport(
        Endpoint("127.0.0.1", cable.port), login=LOGIN, client_id="dev-1", on_connect=fail
    )
    await device.connect()
    try:
        for number in (1, 2):
            cable.cut()
            await until(lambda n=number: len(calls) == n, "on_connect")  # type: ignore[misc]
        await device.publish(UP, b"x")
    finally:
        await put_away(device)
