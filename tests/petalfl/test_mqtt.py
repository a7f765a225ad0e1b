"""`MqttTransport` against the embedded broker, over a cable that a test can pull."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import re
import signal
import socket
import ssl
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

import petalfl.mqtt
from petalfl.errors import TransportError
from petalfl.mqtt import Endpoint, MqttTransport
from petalfl.tls import Tls
from server.broker import Broker, open_broker
from tests.certificates import Authority, Issued
from tests.mosquitto import missing_mosquitto, mosquitto
from tests.petalfl.deaf import deaf_listener, threads_aside

CHUNK = 120 * 1024
UP, STATUS = "fl/v1/f/req/dev-1", "fl/v1/f/dev/dev-1/status"
DOWN = "fl/v1/f/down/dev-1"
LOGIN = ("dev-1", "pw-1")
Opener = Callable[..., Awaitable[MqttTransport]]


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


@pytest.fixture
async def broker(tmp_path: Path, stack: AsyncExitStack) -> Broker:
    return await start_broker(tmp_path, stack)


async def start_broker(folder: Path, stack: AsyncExitStack, spec: str = "embedded") -> Broker:
    broker = open_broker(spec, data_dir=folder, federation="f")
    await broker.start()
    stack.push_async_callback(broker.close)
    await broker.grant(*LOGIN)
    return broker


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


class Cable:
    """A TCP relay to a broker: `pull` breaks it, `plug` mends it, `mute` keeps only the form."""

    def __init__(self, port: int, tls: ssl.SSLContext | None = None) -> None:
        self.target, self.port = port, 0
        self.num_connections = 0
        self.is_mute = False
        self.num_stalled = 0
        self.num_bytes, self.cut_after_bytes = 0, 1 << 62
        self.is_flowing = asyncio.Event()  # when not, what comes is kept and then sent as one
        self.is_flowing.set()
        self.tls = tls
        self._server: asyncio.Server | None = None
        self._ends: set[asyncio.StreamWriter] = set()
        self._relays: set[asyncio.Task[None]] = set()

    @property
    def is_in_use(self) -> bool:
        return bool(self._relays)

    async def plug(self) -> None:
        self._server = await asyncio.start_server(
            self._accept, "127.0.0.1", self.port, limit=1 << 20, ssl=self.tls
        )
        self.port = self._server.sockets[0].getsockname()[1]

    async def pull(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        self.cut()
        for end in self._ends:
            with contextlib.suppress(OSError):
                await end.wait_closed()
        if self._relays:
            await asyncio.wait(self._relays)

    def cut(self) -> None:
        """Breaks the connections there are; new ones come through."""
        for end in self._ends:
            end.transport.abort()
        for relay in self._relays:
            relay.cancel()

    def stall(self) -> None:
        """Swallows what the connections there are carry, without breaking them."""
        self.num_stalled = self.num_connections

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        self._ends.add(writer)
        if self.is_mute:
            return
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.target)
        self._ends.add(far_writer)
        for source, sink in ((reader, far_writer), (far_reader, writer)):
            relay = asyncio.create_task(self._relay(self.num_connections, source, sink))
            self._relays.add(relay)
            relay.add_done_callback(self._relays.discard)

    async def _relay(
        self, number: int, source: asyncio.StreamReader, sink: asyncio.StreamWriter
    ) -> None:
        try:
            while data := await source.read(1 << 16):
                await self.is_flowing.wait()
                if number > self.num_stalled:
                    sink.write(data)
                    await sink.drain()
                self.num_bytes += len(data)
                if self.num_bytes > self.cut_after_bytes:
                    self.cut_after_bytes = 1 << 62
                    self.cut()
        except (OSError, asyncio.CancelledError):
            pass
        if number > self.num_stalled:
            sink.close()


@pytest.fixture
async def cable(broker: Broker, stack: AsyncExitStack) -> Cable:
    cable = Cable(broker.endpoint.port)
    await cable.plug()
    stack.push_async_callback(cable.pull)
    return cable


class Inbox:
    """A handler that remembers, and can be waited for."""

    def __init__(self) -> None:
        self.messages: list[tuple[str, bytes]] = []

    def __call__(self, topic: str, payload: bytes) -> None:
        self.messages.append((topic, payload))

    async def wait_for(self, message: tuple[str, bytes]) -> None:
        await until(lambda: message in self.messages, f"{message[0]}: {self.messages[-3:]}")


async def until(is_so: Callable[[], bool], what: str, timeout_s: float = 30) -> None:
    give_up_s = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < give_up_s, f"waited for {what}"
        await asyncio.sleep(0.01)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


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


# Breaks


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


async def until_arrived(sender: MqttTransport, topic: str, inbox: Inbox, payload: bytes) -> None:
    """Sends until it comes: on_connect is called before the subscriptions are answered."""

    async def attempt() -> bool:
        await sender.publish(topic, payload)
        await asyncio.sleep(0.05)
        return (topic, payload) in inbox.messages

    for _ in range(600):
        if await attempt():
            return
    raise AssertionError(f"{topic} never came")


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
        cable.is_mute, device._timeout_s = False, 30
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
    device = await connect(port=cable.port, timeout_s=0.3)
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
    await asyncio.sleep(0.1)
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
        cable.is_mute, device._timeout_s = False, 30
        await until(lambda: bool(calls), "on_connect")
        await device.publish(UP, b"x")
    finally:
        await put_away(device)


async def put_away(transport: MqttTransport) -> None:
    """Closes a transport even if its keeper has died."""
    with contextlib.suppress(Exception):
        await transport.close()
    transport._keeper = None
    await transport.close()


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
    monkeypatch.setattr("petalfl.mqtt.KEEPALIVE_S", 2)
    monkeypatch.setattr("petalfl.mqtt.MISC_INTERVAL_S", 0.05)
    calls: list[None] = []
    device = await connect(port=cable.port, on_connect=lambda: calls.append(None))
    await asyncio.sleep(4)  # alive and idle: pings keep it, the broker waits 3 s
    assert (cable.num_connections, calls) == (1, [])
    cable.stall()
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


# Leaving nothing behind


def open_sockets() -> int:
    gc.collect()
    links = [fd.readlink() for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink()]
    return sum(str(link).startswith("socket:") for link in links)


async def settled(sockets: int, tasks: int) -> None:
    await until(
        lambda: (open_sockets(), len(asyncio.all_tasks())) == (sockets, tasks),
        f"{sockets} sockets and {tasks} tasks: {open_sockets()} and {asyncio.all_tasks()}",
        3,
    )


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


# TLS


@pytest.fixture
async def tls_cable(broker: Broker, stack: AsyncExitStack, authority: Authority) -> Cable:
    """Asks for certificates, and takes those of `authority`."""
    cable = Cable(broker.endpoint.port, tls_of(authority, authority.ca))
    await cable.plug()
    stack.push_async_callback(cable.pull)
    return cable


def tls_of(authority: Authority, client_ca: Path) -> ssl.SSLContext:
    """A server with a certificate of one authority, which asks for those of another."""
    issued = authority.issue("broker", ("127.0.0.1",))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(issued.certificate, issued.key)
    context.load_verify_locations(client_ca)
    context.verify_mode = ssl.CERT_REQUIRED
    return context


@pytest.mark.usefixtures("is_quick")
async def test_tls(
    tls_cable: Cable,
    authority: Authority,
    connect: Opener,
    stack: AsyncExitStack,
) -> None:
    issued = authority.issue("dev-1")
    calls: list[None] = []
    device = MqttTransport(
        Endpoint("127.0.0.1", tls_cable.port, is_tls=True),
        login=LOGIN,
        client_id="dev-1",
        on_connect=lambda: calls.append(None),
        tls=Tls(authority.ca, issued.certificate, issued.key),
    )
    stack.push_async_callback(device.close)
    await device.connect()
    server, up, down = await connect(is_server=True), Inbox(), Inbox()
    await server.subscribe("fl/v1/f/req/+", up)
    await device.subscribe(f"{DOWN}/+", down)
    payloads = [os.urandom(CHUNK) for _ in range(10)]
    await asyncio.gather(*(device.publish(UP, payload) for payload in payloads))
    await asyncio.gather(*(server.publish(f"{DOWN}/chunk", payload) for payload in payloads))
    await up.wait_for((UP, payloads[-1]))
    await down.wait_for((f"{DOWN}/chunk", payloads[-1]))
    assert [p for _, p in up.messages] == [p for _, p in down.messages] == payloads
    burst = [bytes([i]) for i in range(100)]  # all but the first in one TLS record
    tls_cable.is_flowing.clear()
    await asyncio.gather(*(server.publish(f"{DOWN}/task", payload) for payload in burst))
    await asyncio.sleep(0.2)
    tls_cable.is_flowing.set()
    await down.wait_for((f"{DOWN}/task", burst[-1]))
    tls_cable.cut()
    await until(lambda: bool(calls), "on_connect")
    await device.publish(UP, b"again")


@pytest.mark.usefixtures("is_quick")
async def test_a_certificate_that_is_renewed_amid_a_break(
    tls_cable: Cable, authority: Authority, stack: AsyncExitStack, tmp_path: Path
) -> None:
    """The broker takes those of another authority from now on."""
    used = Issued(tmp_path / "device.pem", tmp_path / "device.key")
    used.install(authority.issue("dev-1"))
    device = MqttTransport(
        Endpoint("127.0.0.1", tls_cable.port, is_tls=True),
        login=LOGIN,
        client_id="dev-1",
        tls=Tls(authority.ca, used.certificate, used.key),
    )
    stack.push_async_callback(device.close)
    await device.connect()
    await device.publish(UP, b"before")
    await tls_cable.pull()
    other = Authority(tmp_path / "other")
    used.install(other.issue("dev-1"))
    tls_cable.tls = tls_of(authority, other.ca)
    await tls_cable.plug()
    await device.publish(UP, b"after")


async def test_a_broker_that_is_not_trusted(
    tls_cable: Cable, stack: AsyncExitStack, tmp_path: Path
) -> None:
    await assert_refused(tls_cable, stack, None, "of no authority that is trusted")
    other = Authority(tmp_path).ca
    await assert_refused(tls_cable, stack, Tls(other), "of no authority that is trusted")
    gc.collect()  # paho leaves the socket of a failed handshake open


async def test_a_broker_of_another_name(
    tls_cable: Cable, stack: AsyncExitStack, authority: Authority
) -> None:
    tls = Tls(authority.ca)
    await assert_refused(tls_cable, stack, tls, "not valid for 'localhost'", host="localhost")


async def test_a_device_that_is_not_trusted(
    tls_cable: Cable, stack: AsyncExitStack, authority: Authority, tmp_path: Path
) -> None:
    other = Authority(tmp_path).issue("dev-1")
    await assert_refused(tls_cable, stack, Tls(authority.ca), r"may ask for a certificate")
    tls = Tls(authority.ca, other.certificate, other.key)
    await assert_refused(tls_cable, stack, tls, f"may not accept {other.certificate}")


async def test_a_broker_without_tls(
    broker: Broker, stack: AsyncExitStack, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The embedded one takes the handshake for the beginning of a packet, and waits."""
    monkeypatch.setattr("petalfl.mqtt.CONNECT_TIMEOUT_S", 0.5)
    await assert_refused(broker.endpoint, stack, Tls(authority.ca), "has it TLS on this port?")


async def assert_refused(
    where: Cable | Endpoint,
    stack: AsyncExitStack,
    tls: Tls | None,
    message: str,
    host: str = "127.0.0.1",
) -> None:
    endpoint = Endpoint(host, where.port, is_tls=True)
    device = MqttTransport(endpoint, login=LOGIN, client_id="dev-1", tls=tls)
    stack.push_async_callback(device.close)
    with pytest.raises(TransportError, match=f"no broker answers at {endpoint}: .*{message}"):
        await device.connect()


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
