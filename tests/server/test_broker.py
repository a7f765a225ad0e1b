"""One suite over both brokers, then what is particular to each."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import socket
import stat
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

import server.broker
from petalfl.mqtt import Endpoint
from server.broker import Broker, BrokerError, open_broker
from server.broker._amqtt_child import _Reader
from server.broker.credentials import make_credential
from server.broker.grants import covers, device_grants
from tests.mosquitto import missing_mosquitto, mosquitto
from tests.server.conftest import OpenBroker, Peer, broker_poll

ROOT = Path(__file__).parents[2]
Connect = Callable[..., Peer]
needs_mosquitto = [
    pytest.mark.mosquitto,
    pytest.mark.skipif(missing_mosquitto() is not None, reason=str(missing_mosquitto())),
]

REFUSED_FILTERS = (
    "#",
    "+/#",
    "fl/#",
    "fl/v1/f/#",
    "fl/v1/f/blocks/#",
    "fl/v1/f/blocks/+/+",
    "fl/v1/f/blocks/+/up/+",
    "fl/v1/f/blocks/b/up/dev-1",
    "fl/v1/f/down/#",
    "fl/v1/f/down/+/+",
    "fl/v1/f/down/+/task",
    "fl/v1/f/down/dev-1/+",
    "fl/v1/f/down/dev-1/task",
    "fl/v1/f/down/dev-2/#",
    "fl/v1/f/dev/+/status",
    "fl/v1/other/blocks/+/meta",
    "$SYS/#",
    "$CONTROL/#",
)
GRANTED_FILTERS = (
    "fl/v1/f/down/dev-2/+",
    "fl/v1/f/down/dev-2/task",
    "fl/v1/f/blocks/+/meta",
    "fl/v1/f/blocks/b/meta",
)
REFUSED_TOPICS = (
    "fl/v1/f/blocks/b/up/dev-1",
    "fl/v1/f/blocks/b/meta",
    "fl/v1/f/req/dev-1",
    "fl/v1/f/req/dev-2/more",
    "fl/v1/f/dev/dev-1/status",
    "fl/v1/f/down/dev-1/task",
    "fl/v1/f/down/dev-2/task",
    "fl/v1/f/elsewhere",
)
GRANTED_TOPICS = ("fl/v1/f/blocks/b/up/dev-2", "fl/v1/f/dev/dev-2/status", "fl/v1/f/req/dev-2")


@asynccontextmanager
async def running(broker: Broker) -> AsyncIterator[Broker]:
    await broker.start()
    try:
        yield broker
    finally:
        await broker.close()


@pytest.fixture
async def broker(broker_open: OpenBroker) -> AsyncIterator[Broker]:
    """A started broker with two devices, whose passwords are pw-1 and pw-2."""
    async with running(broker_open()) as started:
        await started.grant("dev-1", "pw-1")
        await started.grant("dev-2", "pw-2")
        yield started


# The contract of both brokers


async def test_only_the_right_login_connects(broker: Broker, broker_peer: Connect) -> None:
    username, password = broker.server_login
    good = [(username, password), ("dev-1", "pw-1")]
    bad = [None, (username, "guess"), ("dev-1", "pw-2"), ("dev-1", ""), ("dev-3", "pw-1"), ("", "")]
    assert [broker_peer(broker.endpoint, login).is_connected for login in good] == [True] * 2
    assert [broker_peer(broker.endpoint, login).is_connected for login in bad] == [False] * 6


async def test_publish_only_on_own_topics(broker: Broker, broker_peer: Connect) -> None:
    server = broker_peer(broker.endpoint, broker.server_login)
    assert server.subscribe("fl/v1/f/#") == [True]
    device = broker_peer(broker.endpoint, ("dev-2", "pw-2"), client_id="dev-1")
    for topic in (*REFUSED_TOPICS, *GRANTED_TOPICS):
        device.publish(topic)
    server.wait_for(GRANTED_TOPICS[-1])
    assert server.topics == list(GRANTED_TOPICS)


async def test_subscribe_only_to_own_topics(broker: Broker, broker_peer: Connect) -> None:
    device = broker_peer(broker.endpoint, ("dev-2", "pw-2"), client_id="dev-1")
    refused = dict(zip(REFUSED_FILTERS, device.subscribe(*REFUSED_FILTERS), strict=True))
    assert [one for one, is_granted in refused.items() if is_granted] == []
    assert device.subscribe(*GRANTED_FILTERS) == [True] * len(GRANTED_FILTERS)


async def test_device_receives_only_its_own(broker: Broker, broker_peer: Connect) -> None:
    server = broker_peer(broker.endpoint, broker.server_login)
    device = broker_peer(broker.endpoint, ("dev-2", "pw-2"))
    device.subscribe("#", "fl/v1/f/down/+/+", "fl/v1/f/down/dev-2/+")
    server.publish("fl/v1/f/down/dev-1/task", b"secret")
    server.publish("fl/v1/f/down/dev-2/task", b"mine")
    device.wait_for("fl/v1/f/down/dev-2/task")
    assert device.received == [("fl/v1/f/down/dev-2/task", b"mine")]


async def test_retained_messages_do_not_leak(broker: Broker, broker_peer: Connect) -> None:
    """amqtt 0.12.1 sends all who connect what is retained under anybody's filter."""
    server = broker_peer(broker.endpoint, broker.server_login)
    server.subscribe("fl/v1/f/#")
    server.publish("fl/v1/f/down/dev-1/task", b"secret", retain=True)
    server.publish("fl/v1/f/down/dev-2/task", b"mine", retain=True)
    one = broker_peer(broker.endpoint, ("dev-1", "pw-1"))
    one.subscribe("fl/v1/f/down/dev-1/+")
    one.wait_for("fl/v1/f/down/dev-1/task")
    two = broker_peer(broker.endpoint, ("dev-2", "pw-2"))
    two.subscribe("fl/v1/f/down/dev-2/+")
    two.wait_for("fl/v1/f/down/dev-2/task")
    assert two.topics == ["fl/v1/f/down/dev-2/task"]


async def test_retained_meta_reaches_all(broker: Broker, broker_peer: Connect) -> None:
    server = broker_peer(broker.endpoint, broker.server_login)
    server.publish("fl/v1/f/blocks/head/meta", b"v1", retain=True)
    server.publish("fl/v1/f/blocks/head/meta", b"v2", retain=True)
    for login in (("dev-1", "pw-1"), ("dev-2", "pw-2")):
        device = broker_peer(broker.endpoint, login)
        device.subscribe("fl/v1/f/blocks/+/meta")
        device.wait_for("fl/v1/f/blocks/head/meta")
        assert device.received == [("fl/v1/f/blocks/head/meta", b"v2")]


async def test_will_only_on_own_topics(broker: Broker, broker_peer: Connect) -> None:
    server = broker_peer(broker.endpoint, broker.server_login)
    server.subscribe("fl/v1/f/#")
    for topic in ("fl/v1/f/down/dev-1/task", "fl/v1/f/dev/dev-2/status"):
        peer = broker_peer(broker.endpoint, ("dev-2", "pw-2"), will=(topic, b"gone"))
        if peer.is_connected:
            peer.stall()
            peer._client.socket().close()  # type: ignore[union-attr]
    server.wait_for("fl/v1/f/dev/dev-2/status")
    assert server.topics == ["fl/v1/f/dev/dev-2/status"]


async def test_client_id_gives_no_access(broker: Broker, broker_peer: Connect) -> None:
    """Neither the session nor the messages of whoever used a client id before."""
    server = broker_peer(broker.endpoint, broker.server_login)
    same = {"client_id": "same", "clean_session": False}
    one = broker_peer(broker.endpoint, ("dev-1", "pw-1"), **same)
    one.subscribe("fl/v1/f/down/dev-1/+")
    assert not broker_peer(broker.endpoint, ("dev-1", "guess"), **same).is_connected
    server.publish("fl/v1/f/down/dev-1/task")
    one.wait_for("fl/v1/f/down/dev-1/task")
    one.close()
    server.publish("fl/v1/f/down/dev-1/task", b"queued")
    two = broker_peer(broker.endpoint, ("dev-2", "pw-2"), **same)
    two.subscribe("fl/v1/f/down/dev-2/+")
    server.publish("fl/v1/f/down/dev-1/task", b"secret")
    server.publish("fl/v1/f/down/dev-2/task", b"mine")
    two.wait_for("fl/v1/f/down/dev-2/task")
    assert two.topics == ["fl/v1/f/down/dev-2/task"]


async def test_reconnect_takes_over(broker: Broker, broker_peer: Connect) -> None:
    server = broker_peer(broker.endpoint, broker.server_login)
    old = broker_peer(broker.endpoint, ("dev-1", "pw-1"), client_id="dev-1")
    new = broker_peer(broker.endpoint, ("dev-1", "pw-1"), client_id="dev-1")
    old.wait_until_gone()
    new.subscribe("fl/v1/f/down/dev-1/+")
    server.publish("fl/v1/f/down/dev-1/task")
    new.wait_for("fl/v1/f/down/dev-1/task")


async def test_acknowledged_messages_outlive_their_sender(
    broker: Broker, broker_peer: Connect
) -> None:
    server = broker_peer(broker.endpoint, broker.server_login)
    server.subscribe("fl/v1/f/req/+")
    for _ in range(10):
        device = broker_peer(broker.endpoint, ("dev-1", "pw-1"))
        for _ in range(9):
            device.send("fl/v1/f/req/dev-1", b"x")
        device.publish("fl/v1/f/req/dev-1")
        device.close()
    server.wait_for("fl/v1/f/req/dev-1", 100)


async def test_burst_of_a_cohort_arrives_whole(broker: Broker, broker_peer: Connect) -> None:
    """20 devices send 10 chunks of 120 KiB each at once, 24 MB."""
    server = broker_peer(broker.endpoint, broker.server_login)
    server.subscribe("fl/v1/f/blocks/+/up/+")
    names = [f"burst-{i}" for i in range(20)]
    for name in names:
        await broker.grant(name, name)
    devices = [broker_peer(broker.endpoint, (name, name)) for name in names]
    chunks = [bytes([i]) * 120 * 1024 for i in range(10)]
    for chunk in chunks:
        for name, device in zip(names, devices, strict=True):
            device.send(f"fl/v1/f/blocks/b/up/{name}", chunk)
    server.wait_for(f"fl/v1/f/blocks/b/up/{names[-1]}", 200, timeout_s=60)
    sent = sorted((f"fl/v1/f/blocks/b/up/{name}", chunk) for name in names for chunk in chunks)
    assert sorted(server.received) == sent


async def test_grant_replaces_the_password(broker: Broker, broker_peer: Connect) -> None:
    old = broker_peer(broker.endpoint, ("dev-1", "pw-1"))
    await broker.grant("dev-1", "fresh")
    old.wait_until_gone()
    assert not broker_peer(broker.endpoint, ("dev-1", "pw-1")).is_connected
    assert broker_peer(broker.endpoint, ("dev-1", "fresh")).is_connected


async def test_revoke(broker: Broker, broker_peer: Connect) -> None:
    one, two = (broker_peer(broker.endpoint, (f"dev-{i}", f"pw-{i}")) for i in (1, 2))
    await broker.revoke("dev-1")
    await broker.revoke("dev-1")
    await broker.revoke("unknown")
    one.wait_until_gone()
    assert not broker_peer(broker.endpoint, ("dev-1", "pw-1")).is_connected
    assert two.subscribe("fl/v1/f/down/dev-2/+") == [True]


async def test_grants_survive_a_restart(broker_open: OpenBroker, broker_peer: Connect) -> None:
    async with running(broker_open()) as first:
        await first.grant("dev-1", "pw-1")
        await first.grant("dev-2", "pw-2")
        await first.revoke("dev-2")
    async with running(broker_open()) as second:
        device = broker_peer(second.endpoint, ("dev-1", "pw-1"))
        assert device.is_connected
        assert device.subscribe("fl/v1/f/down/dev-1/+") == [True]
        assert not broker_peer(second.endpoint, ("dev-2", "pw-2")).is_connected


async def test_no_grant_for_a_name_that_is_no_topic_level(broker: Broker) -> None:
    for name in ("", "+", "#", "a/b", "$server", "a b", "é", "x" * 129):
        with pytest.raises(ValueError, match="found the name"):
            await broker.grant(name, "pw")


# The embedded broker


def embedded(tmp_path: Path, port: int | None = None) -> Broker:
    spec = "embedded" if port is None else f"embedded:{port}"
    return open_broker(spec, data_dir=tmp_path, federation="f")


async def test_credentials_are_private_hashes(tmp_path: Path) -> None:
    async with running(embedded(tmp_path)) as broker:
        await broker.grant("dev-1", "pw-1")
    path = tmp_path / "broker" / "credentials.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(json.loads(path.read_text())["devices"]) == ["dev-1"]
    assert "pw-1" not in path.read_text()


async def test_damaged_credentials(tmp_path: Path) -> None:
    (tmp_path / "broker").mkdir()
    (tmp_path / "broker" / "credentials.json").write_text("[]")
    with pytest.raises(BrokerError, match="holds no broker credentials"):
        await embedded(tmp_path).start()


async def test_port_in_use(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(BrokerError, match=rf"port {port} .* in use .* embedded:PORT"):
            await embedded(tmp_path, port).start()


async def test_given_port(tmp_path: Path, broker_peer: Connect) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    for _ in range(2):
        async with running(embedded(tmp_path, port)) as broker:
            assert broker.endpoint == Endpoint("127.0.0.1", port)
            assert broker_peer(broker.endpoint, broker.server_login).is_connected


async def test_not_started(tmp_path: Path) -> None:
    with pytest.raises(BrokerError, match="not running"):
        await embedded(tmp_path).grant("dev-1", "pw")


async def test_child_ignores_ctrl_c(tmp_path: Path) -> None:
    async with running(embedded(tmp_path)) as broker:
        pid = broker._child.pid  # type: ignore[attr-defined]
        os.kill(pid, signal.SIGINT)
        await broker.grant("dev-1", "pw")
        assert broker._child.pid == pid  # type: ignore[attr-defined]


async def test_the_next_child_knows_what_the_last_one_did_not_hear(
    tmp_path: Path,
    broker_peer: Connect,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("server.broker.embedded.BACKOFF_S", (0.01, 0.1))
    async with running(embedded(tmp_path)) as broker:
        await broker.grant("dev-1", "pw-1")
        os.kill(broker._child.pid, signal.SIGKILL)  # type: ignore[attr-defined]
        await broker.grant("dev-2", "pw-2")
        await broker.revoke("dev-1")
        while "listens on port" not in caplog.text:
            await asyncio.sleep(0.02)
        assert "ended with code -9" in caplog.text
        assert broker_peer(broker.endpoint, ("dev-2", "pw-2")).is_connected
        assert not broker_peer(broker.endpoint, ("dev-1", "pw-1")).is_connected


async def test_a_grant_while_no_child_can_be_started(
    tmp_path: Path,
    broker_peer: Connect,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It is saved, and in force when one can."""
    monkeypatch.setattr("server.broker.embedded.BACKOFF_S", (0.01, 0.1))
    async with running(embedded(tmp_path)) as broker:
        child = broker._child  # type: ignore[attr-defined]
        child.kill()
        await child.wait()
        with socket.create_server(("127.0.0.1", broker.endpoint.port)):
            while "is in use" not in caplog.text:
                await asyncio.sleep(0.02)
            await broker.grant("dev-1", "pw-1")
        while "listens on port" not in caplog.text:
            await asyncio.sleep(0.02)
        assert broker_peer(broker.endpoint, ("dev-1", "pw-1")).is_connected


async def test_a_child_that_nobody_starts_again_is_an_error(tmp_path: Path) -> None:
    """The keeper has failed itself: a grant that is only saved would never be in force."""
    async with running(embedded(tmp_path)) as broker:
        broker._keeper.cancel()  # type: ignore[attr-defined]
        broker._child.kill()  # type: ignore[attr-defined]
        with pytest.raises(BrokerError, match="ended with code -9"):
            await broker.grant("dev-1", "pw-1")


async def test_a_child_that_dies_is_started_again(
    tmp_path: Path, broker_peer: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.broker.embedded.BACKOFF_S", (0.01, 0.1))
    async with running(embedded(tmp_path)) as broker:
        await broker.grant("dev-1", "pw-1")
        endpoint, login = broker.endpoint, broker.server_login
        for _ in range(2):
            pid = broker._child.pid  # type: ignore[attr-defined]
            os.kill(pid, signal.SIGKILL)
            while (
                broker._child.pid == pid  # type: ignore[attr-defined]
                or not is_listening(endpoint.port)
            ):
                await asyncio.sleep(0.02)
            await broker.grant("dev-2", "pw-2")
            for name in ("dev-1", "dev-2"):
                password = name.replace("dev", "pw")
                assert broker_peer(endpoint, (name, password)).is_connected
            assert broker_peer(endpoint, login).is_connected
        assert (broker.endpoint, broker.server_login) == (endpoint, login)
    assert not is_listening(endpoint.port)


PARENT = """
import asyncio, sys
from pathlib import Path
from server.broker import open_broker

async def main():
    broker = open_broker("embedded", data_dir=Path(sys.argv[1]), federation="f")
    await broker.start()
    print(broker._child.pid, broker.endpoint.port, flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


def test_no_child_outlives_a_killed_parent(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PARENT, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as parent:
        assert parent.stdout is not None
        pid, port = map(int, parent.stdout.readline().split())
        socket.create_connection(("127.0.0.1", port)).close()
        parent.kill()
    broker_poll(lambda: not (is_alive(pid) or is_listening(port)), "the end of the child")


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


async def test_silent_peer_is_given_up(tmp_path: Path, broker_peer: Connect) -> None:
    will = ("fl/v1/f/dev/dev-1/status", b"gone")
    async with running(embedded(tmp_path)) as broker:
        await broker.grant("dev-1", "pw")
        server = broker_peer(broker.endpoint, broker.server_login)
        server.subscribe("fl/v1/f/dev/+/status")
        broker_peer(broker.endpoint, ("dev-1", "pw"), will=will, keepalive=1).stall()
        server.wait_for("fl/v1/f/dev/dev-1/status")


async def test_a_ping_is_a_sign_of_life() -> None:
    stream = asyncio.StreamReader()
    reader = _Reader(stream, is_public=True)
    reader.heard_s = 0.0
    stream.feed_data(b"\xc0\0")
    assert await reader.read(2) == b"\xc0\0"
    assert reader.heard_s > 0


async def test_revoke_a_peer_that_stopped_reading(tmp_path: Path, broker_peer: Connect) -> None:
    async with running(embedded(tmp_path)) as broker:
        await broker.grant("dev-1", "pw")
        server = broker_peer(broker.endpoint, broker.server_login)
        device = broker_peer(broker.endpoint, ("dev-1", "pw"))
        device.subscribe("fl/v1/f/down/dev-1/+")
        device.stall()
        for _ in range(200):
            server.send("fl/v1/f/down/dev-1/chunk", bytes(120 * 1024))
        server.publish("fl/v1/f/down/dev-1/chunk")
        await broker.revoke("dev-1")
        await broker.grant("dev-1", "pw")
        assert broker_peer(broker.endpoint, ("dev-1", "pw")).is_connected


CONNECT = b"\x10\x18\0\4MQTT\4\xc2\0\0\0\1c\0\5dev-1\0\2pw"
BROKEN_STREAMS = (
    pytest.param(b"\x10\x18\0\4HTTP" + CONNECT[8:], id="another protocol"),
    pytest.param(CONNECT + CONNECT, id="second connect"),
    pytest.param(CONNECT + b"\x30\xff\xff\xff\x7f\0\1t", id="publish of 256 MB"),
    pytest.param(CONNECT + b"\x30\x07\0\4$SYSx", id="publish below $"),
    pytest.param(CONNECT + b"\xf0\0", id="reserved packet"),
)


@pytest.mark.parametrize("data", BROKEN_STREAMS)
async def test_broken_stream_is_hung_up(tmp_path: Path, data: bytes) -> None:
    async with running(embedded(tmp_path)) as broker:
        await broker.grant("dev-1", "pw")
        address = (broker.endpoint.host, broker.endpoint.port)
        with socket.create_connection(address, timeout=30) as raw:
            raw.sendall(data)
            answer = read_to_end(raw)
        assert answer == (struct.pack("BBBB", 0x20, 2, 0, 0) if data.startswith(CONNECT) else b"")
        await broker.grant("dev-1", "pw")


async def test_peer_that_leaves_at_once(tmp_path: Path, broker_peer: Connect) -> None:
    topic = b"fl/v1/f/dev/dev-1/status"
    body = b"\0\4MQTT\4\xc6\0\0\0\1c" + string(topic) + string(b"gone") + CONNECT[-11:]
    async with running(embedded(tmp_path)) as broker:
        await broker.grant("dev-1", "pw")
        server = broker_peer(broker.endpoint, broker.server_login)
        server.subscribe("fl/v1/f/#")
        with socket.create_connection((broker.endpoint.host, broker.endpoint.port)) as raw:
            raw.sendall(bytes([0x10, len(body)]) + body)
        server.wait_for(topic.decode())


def string(text: bytes) -> bytes:
    return struct.pack(">H", len(text)) + text


async def test_delivery_is_checked_too() -> None:
    """Even if a wider subscription got in."""
    from amqtt.contexts import Action

    from server.broker._amqtt_child import GuardedBroker

    broker = GuardedBroker(["f"], "$server", {"dev-1": make_credential("pw")})
    session = SimpleNamespace(username="dev-1")
    for user, topic, expected in (
        ("dev-1", "fl/v1/f/down/dev-1/task", True),
        ("dev-1", "fl/v1/f/down/dev-2/task", False),
        ("dev-3", "fl/v1/f/blocks/b/meta", False),
    ):
        session.username = user
        assert await broker._topic_filtering(session, topic, Action.RECEIVE) is expected


async def test_a_connection_lost_amid_a_message_is_no_traceback(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """amqtt leaves such a task's error behind; what else a task leaves is told of."""
    from amqtt.errors import ProtocolHandlerError

    from server.broker._amqtt_child import quiet_cut_offs

    async def fail(error: Exception) -> None:
        raise error

    asyncio.get_running_loop().set_exception_handler(quiet_cut_offs)
    for error in (ProtocolHandlerError("Packet handling was cancelled"), KeyError("a bug")):
        task = asyncio.create_task(fail(error))
        await asyncio.sleep(0)
        del task, error
        gc.collect()
    told = [record.getMessage() for record in caplog.records if record.name == "asyncio"]
    assert len(told) == 1
    assert "KeyError('a bug')" in told[0]


def read_to_end(raw: socket.socket) -> bytes:
    data = b""
    try:
        while piece := raw.recv(1024):
            data += piece
    except ConnectionResetError:
        pass
    return data


# The external broker


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("mqtt://u:p@h", Endpoint("h", 1883)),
        ("mqtts://u:p@h", Endpoint("h", 8883, is_tls=True)),
        ("mqtts://u:p@h:1/", Endpoint("h", 1, is_tls=True)),
    ],
)
def test_url(tmp_path: Path, url: str, found: Endpoint) -> None:
    broker = open_broker(url, data_dir=tmp_path, federation="f")
    assert (broker.endpoint, broker.server_login) == (found, ("u", "p"))


def test_login_in_the_url_is_decoded(tmp_path: Path) -> None:
    broker = open_broker("mqtt://u%40x:p%2F%3A@h", data_dir=tmp_path, federation="f")
    assert broker.server_login == ("u@x", "p/:")


def test_login_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PETALFL_BROKER_USERNAME", raising=False)
    monkeypatch.delenv("PETALFL_BROKER_PASSWORD", raising=False)
    with pytest.raises(BrokerError, match=r"no login .* PETALFL_BROKER_USERNAME"):
        open_broker("mqtt://h:1", data_dir=tmp_path, federation="f")
    monkeypatch.setenv("PETALFL_BROKER_USERNAME", "u")
    monkeypatch.setenv("PETALFL_BROKER_PASSWORD", "p")
    broker = open_broker("mqtt://h:1", data_dir=tmp_path, federation="f")
    assert broker.server_login == ("u", "p")


@pytest.mark.parametrize(
    "spec",
    [
        "",
        "auto",
        "embedded:",
        "embedded:0",
        "embedded:65536",
        "embedded:x",
        "http://u:secret@h",
        "mqtt:",
        "mqtt://u:secret@",
        "mqtt://u:secret@h:0x",
        "mqtt://u:secret@h:99999",
        "mqtt://u:secret@h/path",
        "mqtt://u:secret@[h",
    ],
)
def test_unknown_spec(tmp_path: Path, spec: str) -> None:
    with pytest.raises(BrokerError, match="expected") as caught:
        open_broker(spec, data_dir=tmp_path, federation="f")
    assert "secret" not in str(caught.value)


async def test_unreachable(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    broker = open_broker(f"mqtt://u:p@127.0.0.1:{port}", data_dir=tmp_path, federation="f")
    with pytest.raises(BrokerError, match=f"cannot reach .* 127.0.0.1:{port} .*refused"):
        await broker.start()


async def test_broker_without_the_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedded broker serves as one: it refuses its control topic."""
    monkeypatch.setattr("server.broker.external.ANSWER_TIMEOUT_S", 60.0)
    async with running(embedded(tmp_path)) as other:
        monkeypatch.setenv("PETALFL_BROKER_USERNAME", other.server_login[0])
        monkeypatch.setenv("PETALFL_BROKER_PASSWORD", other.server_login[1])
        url = f"mqtt://127.0.0.1:{other.endpoint.port}"
        with pytest.raises(BrokerError, match="may not administer"):
            await open_broker(url, data_dir=tmp_path, federation="f").start()


async def test_silent_broker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.broker.external.ANSWER_TIMEOUT_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"mqtt://u:p@127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(BrokerError, match=r"no answer .* mosquitto_dynamic_security\.so"):
            await open_broker(url, data_dir=tmp_path, federation="f").start()


class TestMosquitto:
    pytestmark = needs_mosquitto

    async def test_wrong_login(self, tmp_path: Path) -> None:
        with mosquitto(tmp_path) as url:
            wrong = url.replace("admin:", "admin:x")
            with pytest.raises(BrokerError, match="refused the login 'admin'"):
                await open_broker(wrong, data_dir=tmp_path, federation="f").start()

    async def test_login_that_may_not_administer(self, tmp_path: Path) -> None:
        with mosquitto(tmp_path) as url:
            broker = open_broker(url, data_dir=tmp_path, federation="f")
            await broker.start()
            await broker.grant("dev-1", "pw")
            device = f"mqtt://dev-1:pw@127.0.0.1:{broker.endpoint.port}"
            with pytest.raises(BrokerError, match="'dev-1' may not administer"):
                await open_broker(device, data_dir=tmp_path, federation="f").start()

    async def test_logins_of_others_are_left_alone(
        self, tmp_path: Path, broker_peer: Connect
    ) -> None:
        """Who may enroll must not become the administrator by choosing its name."""
        with mosquitto(tmp_path) as url:
            broker = open_broker(url, data_dir=tmp_path, federation="f")
            other = open_broker(url, data_dir=tmp_path, federation="other")
            await broker.start()
            await other.start()
            await other.grant("theirs", "pw")
            for name in ("admin", "theirs"):
                with pytest.raises(BrokerError, match="choose another device id"):
                    await broker.grant(name, "mine")
                await broker.revoke(name)
            assert broker_peer(broker.endpoint, broker.server_login).is_connected
            assert broker_peer(broker.endpoint, ("theirs", "pw")).is_connected

    async def test_grants_survive_the_end_of_mosquitto(
        self, tmp_path: Path, broker_peer: Connect
    ) -> None:
        with mosquitto(tmp_path) as url:
            broker = open_broker(url, data_dir=tmp_path, federation="f")
            await broker.start()
            await broker.grant("dev-1", "pw")
        with mosquitto(tmp_path) as url:
            broker = open_broker(url, data_dir=tmp_path, federation="f")
            await broker.start()
            assert broker_peer(broker.endpoint, ("dev-1", "pw")).is_connected


# Names and grants


def test_public_names() -> None:
    assert server.broker.__all__ == ["Broker", "BrokerError", "open_broker"]


@pytest.mark.parametrize(
    ("granted", "requested", "expected"),
    [
        ("a/b", "a/b", True),
        ("a/b", "a/c", False),
        ("a/b", "a/b/c", False),
        ("a/b", "a", False),
        ("a/b", "+/b", False),
        ("a/+", "a/b", True),
        ("a/+", "a/+", True),
        ("a/+", "a/#", False),
        ("a/+", "a/b/c", False),
        ("a/#", "a/b/c", True),
        ("a/#", "a/+/#", True),
        ("a/#", "a/#", True),
        ("a/#", "#", False),
        ("a/#", "+/b", False),
    ],
)
def test_covers(granted: str, requested: str, expected: bool) -> None:
    assert covers(granted, requested) is expected


def test_grants_of_a_device() -> None:
    grants = device_grants("f", "u")
    assert grants.publish == ("fl/v1/f/blocks/+/up/u", "fl/v1/f/req/u", "fl/v1/f/dev/u/status")
    assert grants.receive == ("fl/v1/f/down/u/+", "fl/v1/f/blocks/+/meta")
