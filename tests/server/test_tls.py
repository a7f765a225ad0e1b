"""The server's certificate, and both brokers with TLS."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from petalfl.errors import TransportError
from petalfl.mqtt import Endpoint, MqttTransport
from petalfl.tls import Tls
from server.broker import Broker, BrokerError, open_broker
from server.broker._amqtt_child import GuardedBroker, _Child
from server.tls import ServerTls
from tests.certificates import Authority, Issued
from tests.mosquitto import missing_mosquitto, mosquitto
from tests.server.conftest import Peer

Connect = Callable[..., Peer]
needs_mosquitto = [
    pytest.mark.mosquitto,
    pytest.mark.skipif(missing_mosquitto() is not None, reason=str(missing_mosquitto())),
]
DEVICE = ("dev-1", "pw-1")


@pytest.fixture(scope="session")
def issued(authority: Authority) -> Issued:
    return authority.issue("broker", ("127.0.0.1", "localhost"))


@pytest.fixture
def client(authority: Authority, tmp_path: Path) -> Tls:
    own = authority.issue("client")
    return Tls(authority.ca, own.certificate, own.key)


# The certificate


def test_versions_and_clients(authority: Authority, issued: Issued) -> None:
    alone = ServerTls(issued.certificate, issued.key).context()
    mutual = ServerTls(issued.certificate, issued.key, authority.ca).context()
    assert alone.minimum_version == mutual.minimum_version == ssl.TLSVersion.TLSv1_2
    assert (alone.verify_mode, mutual.verify_mode) == (ssl.CERT_NONE, ssl.CERT_REQUIRED)


def test_renewal(authority: Authority, tmp_path: Path) -> None:
    first, second = authority.issue("first"), authority.issue("second")
    used = Issued(tmp_path / "cert.pem", tmp_path / "cert.key")
    tls = ServerTls(used.certificate, used.key)
    used.install(first)
    context = tls.context()
    assert shown_by(context, authority) == "first"
    used.install(second)
    assert shown_by(context, authority) == "first"
    tls.renew(context)
    assert shown_by(context, authority) == "second"


def test_a_damaged_renewal_leaves_things_as_they_are(authority: Authority, tmp_path: Path) -> None:
    used = Issued(tmp_path / "cert.pem", tmp_path / "cert.key")
    tls = ServerTls(used.certificate, used.key)
    used.install(authority.issue("first"))
    context = tls.context()
    used.certificate.write_bytes(authority.issue("second").certificate.read_bytes())  # no key
    with pytest.raises(ValueError, match="the key is of another certificate"):
        tls.renew(context)
    assert shown_by(context, authority) == "first"


def shown_by(context: ssl.SSLContext, authority: Authority) -> str:
    """The common name in the certificate that a client of the context sees."""
    ours, theirs = socket.socketpair()

    def serve() -> None:
        with context.wrap_socket(theirs, server_side=True) as secured:
            secured.recv(1)

    thread = threading.Thread(target=serve)
    thread.start()
    with Tls(authority.ca).context().wrap_socket(ours, server_hostname="localhost") as secured:
        name = common_name(secured)
    thread.join()
    return name


def common_name(secured: ssl.SSLSocket) -> str:
    certificate: Any = secured.getpeercert()
    return str(dict(name[0] for name in certificate["subject"])["commonName"])


# The embedded broker


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


async def started(broker: Broker, stack: AsyncExitStack) -> Broker:
    await broker.start()
    stack.push_async_callback(broker.close)
    await broker.grant(*DEVICE)
    return broker


def embedded(folder: Path, issued: Issued, client_ca: Path | None = None) -> Broker:
    tls = ServerTls(issued.certificate, issued.key, client_ca)
    return open_broker("embedded", data_dir=folder, federation="f", tls=tls)


@pytest.fixture
async def broker(
    tmp_path: Path, issued: Issued, authority: Authority, stack: AsyncExitStack
) -> Broker:
    """Asks for certificates of `authority`, and knows `DEVICE`."""
    return await started(embedded(tmp_path, issued, authority.ca), stack)


async def test_both_ways(broker: Broker, broker_peer: Connect, client: Tls) -> None:
    server = broker_peer(broker.endpoint, broker.server_login)
    server.subscribe("fl/v1/f/req/+")
    for host in ("127.0.0.1", "localhost"):
        endpoint = broker.device_endpoint(host)
        assert endpoint.is_tls and endpoint.host == host
        device = broker_peer(endpoint, DEVICE, tls=client)
        assert device.subscribe("fl/v1/f/down/dev-1/+", "fl/v1/f/down/dev-2/+") == [True, False]
        chunk = os.urandom(120 * 1024)
        for _ in range(20):
            device.publish("fl/v1/f/req/dev-1", chunk)
            server.publish("fl/v1/f/down/dev-1/task", chunk)
        server.wait_for("fl/v1/f/req/dev-1", 20)
        device.wait_for("fl/v1/f/down/dev-1/task", 20)
        assert {payload for _, payload in device.received} == {chunk}
        assert {payload for _, payload in server.received} == {chunk}
        server.received.clear()


async def test_only_the_server_comes_in_without_tls(broker: Broker, broker_peer: Connect) -> None:
    """Or a stolen password would be enough, on this machine, to get past the certificates."""
    assert not broker.endpoint.is_tls and broker.endpoint.host == "127.0.0.1"
    assert broker_peer(broker.endpoint, broker.server_login).is_connected
    assert not broker_peer(broker.endpoint, DEVICE).is_connected


async def test_a_wrong_password_behind_a_good_certificate(
    broker: Broker, broker_peer: Connect, client: Tls
) -> None:
    endpoint = broker.device_endpoint("127.0.0.1")
    assert not broker_peer(endpoint, ("dev-1", "guess"), tls=client).is_connected
    assert not broker_peer(endpoint, None, tls=client).is_connected


async def test_clients_without_a_good_certificate(
    broker: Broker, authority: Authority, tmp_path: Path
) -> None:
    endpoint = broker.device_endpoint("127.0.0.1")
    await assert_refused(endpoint, Tls(authority.ca), "it may ask for a certificate")
    other = Authority(tmp_path / "other").issue("dev-1")
    tls = Tls(authority.ca, other.certificate, other.key)
    await assert_refused(endpoint, tls, f"may not accept {other.certificate}")
    plain = Endpoint(endpoint.host, endpoint.port)
    await assert_refused(plain, None, "closed before a CONNACK")


async def assert_refused(endpoint: Endpoint, tls: Tls | None, message: str) -> None:
    transport = MqttTransport(endpoint, login=DEVICE, client_id="dev-1", tls=tls)
    with pytest.raises(TransportError, match=message):
        await transport.connect()
    await transport.close()


async def test_revoke_a_peer_that_stopped_reading(
    broker: Broker, broker_peer: Connect, client: Tls
) -> None:
    server = broker_peer(broker.endpoint, broker.server_login)
    device = broker_peer(broker.device_endpoint("127.0.0.1"), DEVICE, tls=client)
    device.subscribe("fl/v1/f/down/dev-1/+")
    device.stall()
    for _ in range(200):
        server.send("fl/v1/f/down/dev-1/chunk", bytes(120 * 1024))
    server.publish("fl/v1/f/down/dev-1/chunk")
    await broker.revoke("dev-1")
    await broker.grant("dev-1", "new")
    again = broker_peer(broker.device_endpoint("127.0.0.1"), ("dev-1", "new"), tls=client)
    assert again.is_connected


async def test_a_child_that_dies_comes_back_on_both_ports(
    broker: Broker,
    broker_peer: Connect,
    client: Tls,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("server.broker.embedded.BACKOFF_S", (0.01, 0.1))
    ends = broker.endpoint, broker.device_endpoint("127.0.0.1")
    broker._child.kill()  # type: ignore[attr-defined]
    while f"listens on port {ends[1].port} again" not in caplog.text:
        await asyncio.sleep(0.02)
    assert (broker.endpoint, broker.device_endpoint("127.0.0.1")) == ends
    assert broker_peer(ends[0], broker.server_login).is_connected
    assert broker_peer(ends[1], DEVICE, tls=client).is_connected


async def test_a_renewed_certificate(
    tmp_path: Path, authority: Authority, stack: AsyncExitStack, broker_peer: Connect
) -> None:
    used = Issued(tmp_path / "cert.pem", tmp_path / "cert.key")
    used.install(authority.issue("first"))
    broker = await started(embedded(tmp_path, used), stack)
    endpoint = broker.device_endpoint("127.0.0.1")
    device = broker_peer(endpoint, DEVICE, tls=Tls(authority.ca))
    assert common_name(device._client.socket()) == "first"  # type: ignore[arg-type]
    used.install(authority.issue("second"))
    await broker.renew_certificate()
    other = broker_peer(endpoint, DEVICE, tls=Tls(authority.ca))
    assert common_name(other._client.socket()) == "second"  # type: ignore[arg-type]
    assert device.subscribe("fl/v1/f/down/dev-1/+") == [True]  # connections stay
    used.key.write_bytes(b"")
    with pytest.raises(BrokerError, match="no certificate with its key"):
        await broker.renew_certificate()
    last = broker_peer(endpoint, DEVICE, tls=Tls(authority.ca))
    assert common_name(last._client.socket()) == "second"  # type: ignore[arg-type]


async def test_files_that_have_gone(tmp_path: Path, issued: Issued) -> None:
    gone = Issued(tmp_path / "gone.pem", issued.key)
    with pytest.raises(BrokerError, match=r"gone\.pem.*No such file"):
        await embedded(tmp_path, gone).start()


async def test_silence_instead_of_a_handshake(
    issued: Issued, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.broker._amqtt_child.CONNECT_TIMEOUT_S", 0.1)
    child = _Child(GuardedBroker(["f"], "$server", {}), ServerTls(issued.certificate, issued.key))
    where = asdict(Endpoint("127.0.0.1", 0, is_tls=True))
    async with await child.listen({"endpoint": where, "is_public": True}) as listening:
        port = listening.sockets[0].getsockname()[1]
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        assert await asyncio.wait_for(reader.read(), 30) == b""
        writer.close()
        await writer.wait_closed()


# What goes together


def test_a_broker_without_tls_behind_a_server_with_it(tmp_path: Path, issued: Issued) -> None:
    tls = ServerTls(issued.certificate, issued.key)

    def open_with(url: str) -> Broker:
        return open_broker(url, data_dir=tmp_path, federation="f", tls=tls)

    with pytest.raises(BrokerError, match=r"the broker mqtt://h:1883 none: .*mqtts://") as caught:
        open_with("mqtt://u:secret@h")
    assert "secret" not in str(caught.value)
    for url in ("mqtt://u:p@127.0.0.1", "mqtt://u:p@localhost", "mqtts://u:p@h"):
        assert open_with(url).device_endpoint("x") == open_with(url).endpoint


@pytest.mark.parametrize("spec", ["embedded", "mqtt://u:p@h"])
def test_a_ca_for_a_broker_without_tls(tmp_path: Path, authority: Authority, spec: str) -> None:
    with pytest.raises(BrokerError, match="no broker mqtts://"):
        open_broker(spec, data_dir=tmp_path, federation="f", broker_tls=Tls(authority.ca))


# Mosquitto


class TestMosquitto:
    pytestmark = needs_mosquitto

    async def test_own_authority(
        self, tmp_path: Path, authority: Authority, issued: Issued, stack: AsyncExitStack
    ) -> None:
        with mosquitto(tmp_path, issued=issued) as url:
            await started(opened(url, Tls(authority.ca)), stack)
            with pytest.raises(BrokerError, match=r"no authority that is trusted.*--broker-ca"):
                await opened(url).start()

    async def test_mutual(
        self,
        tmp_path: Path,
        authority: Authority,
        issued: Issued,
        client: Tls,
        stack: AsyncExitStack,
        broker_peer: Connect,
    ) -> None:
        with mosquitto(tmp_path, issued=issued, client_ca=authority.ca) as url:
            broker = await started(opened(url, client), stack)
            device = broker_peer(broker.device_endpoint("x"), DEVICE, tls=client)
            assert device.is_connected
            with pytest.raises(BrokerError, match=r"may ask for a certificate.*--broker-cert"):
                await opened(url, Tls(authority.ca)).start()
            await assert_refused(broker.endpoint, Tls(authority.ca), "may ask for a certificate")

    async def test_a_port_without_tls(self, tmp_path: Path, authority: Authority) -> None:
        message = r"cannot reach the MQTT broker .*hung up"
        with mosquitto(tmp_path) as url, pytest.raises(BrokerError, match=message):
            await opened(url.replace("mqtt:", "mqtts:"), Tls(authority.ca)).start()

    async def test_a_port_with_tls(self, tmp_path: Path, issued: Issued) -> None:
        message = "closed the connection: .*; a broker with TLS has a URL that begins with mqtts"
        with mosquitto(tmp_path, issued=issued) as url, pytest.raises(BrokerError, match=message):
            await opened(url.replace("mqtts:", "mqtt:")).start()


def opened(url: str, tls: Tls | None = None) -> Broker:
    return open_broker(url, data_dir=Path(), federation="f", broker_tls=tls)
