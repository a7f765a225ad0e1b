"""Whole federations over TLS, as real processes: own authority, mutual TLS, and every refusal."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from petalfl import PetalError, Tls, TransportError
from tests.certificates import DAY, Authority, Issued
from tests.integration.harness import (
    SCHEME,
    Outcome,
    Server,
    run_federation,
    running_server,
    take_part,
    three_devices,
)
from tests.mosquitto import missing_mosquitto, mosquitto


@pytest.fixture(scope="module")
def issued(authority: Authority) -> Issued:
    """The server's certificate: of an address, not of a name."""
    return authority.issue("server", ("127.0.0.1",))


@pytest.fixture(scope="module")
def client(authority: Authority) -> Tls:
    own = authority.issue("device", ("device.example",))
    return Tls(authority.ca, own.certificate, own.key)


def flags(issued: Issued, *more: object) -> tuple[str, ...]:
    return (
        "--tls-cert", str(issued.certificate), "--tls-key", str(issued.key), *map(str, more)
    )  # fmt: skip


# From the first round to the last, as without TLS


def test_embedded_broker(
    watch_artifacts: Path,
    tmp_path: Path,
    authority: Authority,
    issued: Issued,
    client: Tls,
    undisturbed: Outcome,
) -> None:
    mutual = flags(issued, "--tls-client-ca", authority.ca)
    outcome = run_federation(watch_artifacts, tmp_path, *mutual, num_rounds=3, tls=client)
    outcome.assert_close(undisturbed)


@pytest.mark.mosquitto
@pytest.mark.skipif(missing_mosquitto() is not None, reason=str(missing_mosquitto()))
def test_mosquitto(
    watch_artifacts: Path,
    tmp_path: Path,
    authority: Authority,
    issued: Issued,
    client: Tls,
    undisturbed: Outcome,
) -> None:
    """The broker asks for certificates, too, the server's own among them."""
    with mosquitto(tmp_path, issued=issued, client_ca=authority.ca) as url:
        own = ("--broker-cert", client.certificate, "--broker-key", client.key)
        words = flags(issued, "--broker", url, "--broker-ca", authority.ca, *own)
        outcome = run_federation(watch_artifacts, tmp_path, *words, num_rounds=3, tls=client)
    outcome.assert_close(undisturbed)


def test_the_broker_listens_where_http_does(
    watch_artifacts: Path, tmp_path: Path, authority: Authority
) -> None:
    """Beyond 127.0.0.1, because it has TLS; and not there, where nobody asked for it."""
    words = flags(authority.issue("elsewhere", ("127.0.0.2",)))
    server = Server(watch_artifacts, tmp_path / "server", words)
    server.url, server.tls = "https://127.0.0.2:0", Tls(authority.ca)
    server.start()
    try:
        port = broker_port(server, "127.0.0.2")
        assert name_at(port, server.tls, "127.0.0.2") == "elsewhere"
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), 60)
    finally:
        server.stop()


def broker_port(server: Server, host: str) -> int:
    """The port that the server's greeting names."""
    wait_until(lambda: "join with" in server.log)
    found = re.search(rf"^  broker +mqtts://{host}:(\d+)$", server.log, re.MULTILINE)
    assert found is not None, server.log
    return int(found[1])


# Refusals


@pytest.fixture(scope="module")
def mutual_server(
    watch_artifacts: Path,
    tmp_path_factory: pytest.TempPathFactory,
    authority: Authority,
    issued: Issued,
    client: Tls,
) -> Iterator[Server]:
    words = flags(issued, "--tls-client-ca", authority.ca, "--log-level", "warning")
    folder = tmp_path_factory.mktemp("mutual")
    with running_server(watch_artifacts, folder / "server", *words, tls=client) as server:
        yield server


def assert_refused(server: Server, folder: Path, message: str, **more: Any) -> None:
    """Before the token has been sent, and told to the app."""
    told: list[PetalError] = []
    device = three_devices()[0]
    with (
        device.client(server, folder, on_error=told.append, **more) as client,
        pytest.raises(TransportError, match=message) as caught,
    ):
        client.run()
    assert told == [caught.value]
    assert server.get("devices") == {}


def test_a_device_that_knows_no_authority(mutual_server: Server, tmp_path: Path) -> None:
    other = Authority(tmp_path / "other").ca
    for tls in (None, Tls(other)):
        assert_refused(mutual_server, tmp_path, "of no authority that is trusted", tls=tls)


def test_a_device_without_a_certificate(
    mutual_server: Server, tmp_path: Path, authority: Authority
) -> None:
    message = r"may ask for a certificate \(mutual TLS\)"
    assert_refused(mutual_server, tmp_path, message, tls=Tls(authority.ca))


def test_a_device_with_a_bad_certificate(
    mutual_server: Server, tmp_path: Path, authority: Authority
) -> None:
    expired = authority.issue("expired", ends=-DAY / 2)
    foreign = Authority(tmp_path / "other").issue("foreign")
    for own in (expired, foreign):
        tls = Tls(authority.ca, own.certificate, own.key)
        assert_refused(mutual_server, tmp_path, f"may not accept {own.certificate}", tls=tls)


def test_a_server_under_another_name(mutual_server: Server, tmp_path: Path) -> None:
    named = copy_of(mutual_server, mutual_server.url.replace("127.0.0.1", "localhost"))
    with pytest.raises(TransportError, match="not valid for 'localhost'"):
        three_devices()[0].client(named, tmp_path).run()


def test_http_where_there_is_https(mutual_server: Server, tmp_path: Path) -> None:
    plain = copy_of(mutual_server, mutual_server.url.replace("https", "http"))
    with pytest.raises(TransportError, match="has a URL that begins with https"):
        three_devices()[0].client(plain, tmp_path).run()


def test_https_where_there_is_http(watch_artifacts: Path, tmp_path: Path, client: Tls) -> None:
    with running_server(watch_artifacts, tmp_path / "server") as server:
        secure = copy_of(server, server.url.replace("http", "https"))
        secure.tls = client
        with pytest.raises(TransportError, match="speaks no TLS on this port"):
            three_devices()[0].client(secure, tmp_path).run()


def copy_of(server: Server, url: str) -> Server:
    """The same server under another URL."""
    other = Server(Path(), server.data_dir, ())
    other.url, other.token, other.tls = url, server.token, server.tls
    return other


# A certificate that is renewed


def test_renewal_while_it_runs(watch_artifacts: Path, tmp_path: Path, authority: Authority) -> None:
    """At HTTP and at the broker, and a damaged one at neither; devices go on meanwhile."""
    used = Issued(tmp_path / "server.pem", tmp_path / "server.key")
    used.install(authority.issue("first"))
    tls = Tls(authority.ca)
    words = flags(used, "--rounds", "3", *SCHEME, "--log-level", "info")
    with running_server(watch_artifacts, tmp_path / "server", *words, tls=tls) as server:
        ports = [urlsplit(server.url).port or 0, broker_port(server, "127.0.0.1")]

        def shown() -> list[str]:
            return [name_at(port, tls) for port in ports]

        assert shown() == ["first", "first"]
        used.install(authority.issue("second"))
        os.kill(server.pid, signal.SIGHUP)
        wait_until(lambda: shown() == ["second", "second"])
        used.key.write_bytes(b"")
        os.kill(server.pid, signal.SIGHUP)
        wait_until(lambda: "the certificate in use stays: no certificate with" in server.log)
        assert shown() == ["second", "second"]
        clients = [device.client(server, tmp_path) for device in three_devices()]
        try:
            asyncio.run(take_part(clients))
        finally:
            for client in clients:
                client.close()
        assert server.get("status")["is_finished"]


def wait_until(is_so: Callable[[], bool]) -> None:
    give_up_s = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < give_up_s
        time.sleep(0.05)


def name_at(port: int, tls: Tls, host: str = "127.0.0.1") -> str:
    """The common name in the certificate that is shown there."""
    with (
        socket.create_connection((host, port), 60) as plain,
        tls.context().wrap_socket(plain, server_hostname=host) as secured,
    ):
        certificate: Any = secured.getpeercert()
    return str(dict(name[0] for name in certificate["subject"])["commonName"])
