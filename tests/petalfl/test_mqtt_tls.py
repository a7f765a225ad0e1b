"""`MqttTransport` with TLS: whom it trusts, and who trusts it."""

from __future__ import annotations

import asyncio
import gc
import os
import ssl
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from petalfl.errors import TransportError
from petalfl.mqtt import Endpoint, MqttTransport
from petalfl.tls import Tls
from server.broker import Broker
from tests.certificates import Authority, Issued
from tests.petalfl.cable import (
    CHUNK,
    DOWN,
    LOGIN,
    UP,
    Cable,
    Inbox,
    Opener,
    until,
)


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
