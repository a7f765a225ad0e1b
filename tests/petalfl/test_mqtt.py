"""`MqttTransport` against the embedded broker, over a cable that a test can pull."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import socket
import sys
import threading
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

import petalfl.mqtt
from petalfl.errors import TransportError
from petalfl.mqtt import Endpoint, MqttTransport
from server.broker import Broker
from tests.mosquitto import free_port, missing_mosquitto, mosquitto
from tests.petalfl.cable import (
    CHUNK,
    DOWN,
    LOGIN,
    STATUS,
    UP,
    Cable,
    Inbox,
    Opener,
    open_sockets,
    settled,
    start_broker,
    until,
)
from tests.petalfl.deaf import deaf_listener, threads_aside

# Connecting


async def test_wrong_password(connect: Opener, broker: Broker) -> None:
    message = f"mqtt://127.0.0.1:{broker.endpoint.port} refuses the login: Not authorized"
    with pytest.raises(TransportError, match=message):
        await connect(login=("dev-1", "guess"))


async def test_no_broker(connect: Opener) -> None:
    port = free_port()
    with pytest.raises(
        TransportError, match=f"no broker answers at mqtt://127.0.0.1:{port}: .*ref"
    ):
        await connect(port=port)


async def test_no_such_host() -> None:
    transport = MqttTransport(Endpoint("nowhere.invalid", 1883), login=LOGIN, client_id="c")
    with pytest.raises(TransportError, match=r"no broker answers at mqtt://nowhere\.invalid:1883"):
        await transport.connect()
    await transport.close()


async def test_silent_peer(cable: Cable) -> None:
    cable.is_mute = True
    transport = MqttTransport(
        Endpoint("127.0.0.1", cable.port), login=LOGIN, client_id="c", timeout_s=0.1
    )
    message = f"127.0.0.1:{cable.port} accepted the connection but sent no CONNACK in 0.1 s"
    try:
        with pytest.raises(TransportError, match=message):
            await transport.connect()
    finally:
        await transport.close()


async def test_peer_that_hangs_up(connect: Opener, stack: AsyncExitStack) -> None:
    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    server = await asyncio.start_server(hang_up, "127.0.0.1", 0)
    stack.callback(server.close)
    port = server.sockets[0].getsockname()[1]
    started_s = time.monotonic()
    with pytest.raises(TransportError, match=f"mqtt://127.0.0.1:{port}"):
        await connect(port=port, timeout_s=120)
    assert time.monotonic() - started_s < 30, "the broken connection was waited on"


async def test_refused_subscription(connect: Opener, broker: Broker) -> None:
    device = await connect()
    inbox = Inbox()
    endpoint = f"mqtt://127.0.0.1:{broker.endpoint.port}"
    for topic_filter in ("fl/v1/f/#", "fl/v1/f/down/dev-2/+"):
        pattern = re.escape(f"{endpoint} refuses a subscription to {topic_filter}")
        with pytest.raises(TransportError, match=pattern):
            await device.subscribe(topic_filter, inbox)
    mine = Inbox()
    await device.subscribe(f"{DOWN}/+", mine)
    server = await connect(is_server=True)
    await server.publish(f"{DOWN}/task", b"x")
    await mine.wait_for((f"{DOWN}/task", b"x"))
    assert inbox.messages == []  # the refused handlers are gone


async def test_round_trip_of_120_kib_messages_in_order(connect: Opener) -> None:
    server, device = await connect(is_server=True), await connect()
    arrived, answered = Inbox(), Inbox()
    await server.subscribe("fl/v1/f/blocks/+/up/+", arrived)
    await device.subscribe(f"{DOWN}/+", answered)
    topic = "fl/v1/f/blocks/head/up/dev-1"
    sent = [(topic, os.urandom(CHUNK)) for _ in range(30)]
    await asyncio.gather(*(device.publish(*message) for message in sent))
    await arrived.wait_for(sent[-1])
    assert arrived.messages == sent
    for _, payload in sent[:5]:
        await server.publish(f"{DOWN}/chunk", payload)
    await answered.wait_for((f"{DOWN}/chunk", sent[4][1]))
    assert [payload for _, payload in answered.messages] == [payload for _, payload in sent[:5]]


async def test_a_newcomer_with_the_same_client_id_takes_over(
    connect: Opener, is_quick: None
) -> None:
    """As after a lost connection that the broker still holds."""
    await connect()
    server, inbox = await connect(is_server=True), Inbox()
    await server.subscribe("fl/v1/f/req/+", inbox)
    newcomer = await connect()
    await newcomer.publish(UP, b"new")
    await inbox.wait_for((UP, b"new"))


# Last will


WILLING = """
import asyncio, sys
from petalfl.mqtt import Endpoint, MqttTransport
from petalfl.tls import Tls

async def main():
    transport = MqttTransport(
        Endpoint("127.0.0.1", int(sys.argv[1])), login=("dev-1", "pw-1"), client_id="dev-1",
        will=("fl/v1/f/dev/dev-1/status", b"gone"),
    )
    await transport.connect()
    await transport.publish("fl/v1/f/dev/dev-1/status", b"here", retain=True)
    print("here", flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


async def test_the_will_of_a_killed_process_is_published(connect: Opener, broker: Broker) -> None:
    server, inbox = await connect(is_server=True), Inbox()
    await server.subscribe("fl/v1/f/dev/+/status", inbox)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", WILLING, str(broker.endpoint.port), stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    assert await process.stdout.readline() == b"here\n"
    await inbox.wait_for((STATUS, b"here"))
    process.kill()
    await process.wait()
    await inbox.wait_for((STATUS, b"gone"))
    late = Inbox()
    other = await connect(is_server=True, client_id="late")
    await other.subscribe("fl/v1/f/dev/+/status", late)
    await late.wait_for((STATUS, b"gone"))  # retained, so that a restarted server sees it


async def test_no_will_after_a_goodbye(connect: Opener) -> None:
    server, inbox = await connect(is_server=True), Inbox()
    await server.subscribe("fl/v1/f/dev/+/status", inbox)
    device = await connect(will=(STATUS, b"gone"))
    await device.close()
    assert device._socket is None
    await asyncio.sleep(0.1)
    await server.publish(STATUS, b"later")
    await inbox.wait_for((STATUS, b"later"))
    assert inbox.messages == [(STATUS, b"later")]


async def test_the_will_stands_for_what_the_broker_did_not_take(
    connect: Opener, broker: Broker, cable: Cable
) -> None:
    """A goodbye that no PUBACK came for is left behind by a DISCONNECT, which ends the will."""
    server, inbox = await connect(is_server=True), Inbox()
    await server.subscribe("fl/v1/f/dev/+/status", inbox)
    device = MqttTransport(
        Endpoint("127.0.0.1", cable.port), login=LOGIN, client_id="dev-1", will=(STATUS, b"gone")
    )
    await device.connect()
    device._timeout_s = 0.2
    cable.stall()
    with pytest.raises(TransportError, match="took no message"):
        await device.publish(STATUS, b"goodbye", retain=True)
    cable.num_stalled = 0  # what was swallowed stays lost, and the end comes through
    await device.close()
    assert device._socket is None
    await inbox.wait_for((STATUS, b"gone"))
    assert inbox.messages == [(STATUS, b"gone")]


# Leaving nothing behind


@pytest.mark.usefixtures("is_quick")
@pytest.mark.parametrize("when", ["idle", "after a break", "during a break", "after a refusal"])
async def test_close_leaves_nothing(
    broker: Broker, cable: Cable, when: str, caplog: pytest.LogCaptureFixture
) -> None:
    loop = asyncio.get_running_loop()
    loop.set_debug(True)
    loop.slow_callback_duration = 60  # a busy machine is no fault
    sockets, tasks = open_sockets(), len(asyncio.all_tasks())
    endpoint = Endpoint("127.0.0.1", cable.port)
    login = ("dev-1", "guess") if when == "after a refusal" else LOGIN
    calls: list[None] = []
    transport = MqttTransport(
        endpoint, login=login, client_id="dev-1", on_connect=lambda: calls.append(None)
    )
    if when == "after a refusal":
        with pytest.raises(TransportError):
            await transport.connect()
    else:
        await transport.connect()
        await transport.subscribe(f"{DOWN}/+", Inbox())
        await transport.publish(UP, b"x")
    if when == "after a break":
        cable.cut()
        await until(lambda: bool(calls), "on_connect")
    if when == "during a break":
        await cable.pull()
        await asyncio.sleep(0.1)
    await transport.close()
    assert transport._socket is None
    assert transport._misc_timer is None or transport._misc_timer.cancelled()
    await cable.pull()
    await settled(sockets - 1, tasks)  # the cable's listener is closed too
    assert [r for r in caplog.records if r.name == "asyncio" and r.levelno >= logging.WARNING] == []


async def test_a_failed_connect_leaves_nothing(broker: Broker, cable: Cable) -> None:
    """Nobody closes what never was open."""
    cable.is_mute = True
    sockets, tasks = open_sockets(), len(asyncio.all_tasks())
    transport = MqttTransport(
        Endpoint("127.0.0.1", cable.port), login=LOGIN, client_id="c", timeout_s=0.1
    )
    try:
        with pytest.raises(TransportError):
            await transport.connect()
        assert transport._socket is None
        await until(lambda: cable.num_connections == 1, "the other end")
        cable.cut()
        await settled(sockets, tasks)
    finally:
        await transport.close()


@pytest.mark.usefixtures("is_quick")
async def test_close_while_it_connects_again(
    cable: Cable, connect: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connect runs on a thread, which a cancelled task does not end."""
    num_sockets = open_sockets()
    device = await connect(port=cable.port)
    is_connecting, is_free = threading.Event(), threading.Event()

    def slow_connect(*arguments: Any) -> socket.socket:
        is_connecting.set()
        assert is_free.wait(30)
        return connected_to(*arguments)

    connected_to = petalfl.mqtt._connected_to
    monkeypatch.setattr("petalfl.mqtt._connected_to", slow_connect)
    cable.cut()
    assert await asyncio.to_thread(is_connecting.wait, 30)
    await device.close()  # does not wait for it
    num_connections = cable.num_connections
    is_free.set()
    await until(lambda: cable.num_connections > num_connections, "the late connection")
    await until(lambda: not cable.is_in_use, "its end")
    assert device._socket is None
    await until(lambda: open_sockets() == num_sockets, "the end of its sockets")


@pytest.mark.parametrize("what", ["TCP", "TLS"])
async def test_a_connect_that_hangs_holds_nobody_up(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither whoever gives it up nor, at the end, the process; its thread ends by itself."""
    monkeypatch.setattr("petalfl.mqtt.CONNECT_TIMEOUT_S", 3600.0)
    num_sockets = open_sockets()
    with deaf_listener(accepts=what == "TLS") as deaf:
        endpoint = Endpoint("127.0.0.1", deaf.port, is_tls=what == "TLS")
        transport = MqttTransport(endpoint, login=LOGIN, client_id="dev-1", timeout_s=3600.0)
        connecting = asyncio.create_task(transport.connect())
        await until(lambda: bool(threads_aside()), "the thread")
        connecting.cancel()
        await asyncio.wait((connecting,), timeout=30)
        assert connecting.cancelled()
        assert threads_aside(), "nobody has waited for it"
        await transport.close()
    await until(lambda: not threads_aside(), "its end")
    await until(lambda: open_sockets() == num_sockets, "the end of its socket")


async def test_100_clients_on_one_loop(tmp_path: Path, stack: AsyncExitStack) -> None:
    broker = await start_broker(tmp_path, stack)
    names = [f"dev-{i}" for i in range(100)]
    for name in names:
        await broker.grant(name, f"pw-{name}")
    sockets, tasks = open_sockets(), len(asyncio.all_tasks())
    endpoint = Endpoint("127.0.0.1", broker.endpoint.port)
    server = MqttTransport(endpoint, login=broker.server_login, client_id="server")
    clients = {
        name: MqttTransport(endpoint, login=(name, f"pw-{name}"), client_id=name) for name in names
    }
    up = Inbox()
    down = {name: Inbox() for name in names}
    await server.connect()
    await server.subscribe("fl/v1/f/req/+", up)
    await asyncio.gather(*(client.connect() for client in clients.values()))
    await asyncio.gather(*(clients[n].subscribe(f"fl/v1/f/down/{n}/+", down[n]) for n in names))
    await asyncio.gather(
        *(
            clients[n].publish(f"fl/v1/f/req/{n}", f"{n} {i}".encode())
            for n in names
            for i in (0, 1)
        )
    )
    await until(lambda: len(up.messages) >= 200, "200 messages")
    expected = [(f"fl/v1/f/req/{n}", f"{n} {i}".encode()) for n in names for i in (0, 1)]
    assert sorted(up.messages) == sorted(expected)
    await asyncio.gather(*(server.publish(f"fl/v1/f/down/{n}/task", n.encode()) for n in names))
    for name in names:
        await down[name].wait_for((f"fl/v1/f/down/{name}/task", name.encode()))
        assert len(down[name].messages) == 1
    await asyncio.gather(*(client.close() for client in clients.values()), server.close())
    await settled(sockets, tasks)


# Mosquitto


@pytest.mark.mosquitto
@pytest.mark.skipif(missing_mosquitto() is not None, reason=str(missing_mosquitto()))
async def test_mosquitto(tmp_path: Path, stack: AsyncExitStack) -> None:
    broker = await start_broker(tmp_path, stack, stack.enter_context(mosquitto(tmp_path)))
    endpoint = Endpoint(broker.endpoint.host, broker.endpoint.port)
    server = MqttTransport(endpoint, login=broker.server_login, client_id="server")
    device = MqttTransport(endpoint, login=LOGIN, client_id="dev-1", will=(STATUS, b"gone"))
    for transport in (server, device):
        stack.push_async_callback(transport.close)
        await transport.connect()
    inbox = Inbox()
    await server.subscribe("fl/v1/f/req/+", inbox)
    payloads = [os.urandom(CHUNK) for _ in range(30)]
    await asyncio.gather(*(device.publish(UP, payload) for payload in payloads))
    await inbox.wait_for((UP, payloads[-1]))
    assert [payload for _, payload in inbox.messages] == payloads
    with pytest.raises(TransportError, match="refuses a subscription to fl/v1/f/#"):
        await device.subscribe("fl/v1/f/#", inbox)
    wrong = MqttTransport(endpoint, login=("dev-1", "guess"), client_id="x")
    with pytest.raises(TransportError, match="refuses the login"):
        await wrong.connect()
    await wrong.close()
