"""`Tls` against an HTTPS server on OpenSSL's own sockets, which says why it refuses."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import ssl
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from petalfl import EdgeClient, Tls
from petalfl.downlink import Downlink
from petalfl.errors import TransportError
from petalfl.http import HttpClient
from petalfl.store import DeviceStore
from petalfl.tls import explain
from tests.certificates import DAY, Authority, Issued

Serve = Callable[..., str]


class Https(ThreadingHTTPServer):
    """Answers every GET with ``body``, over TLS; the handshake is the request thread's."""

    def __init__(self, context: ssl.SSLContext, body: bytes) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *arguments: Any) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        self._context = context

    def finish_request(self, request: Any, client_address: Any) -> None:
        with (
            contextlib.suppress(OSError),  # of those that are refused
            self._context.wrap_socket(request, server_side=True) as secured,
        ):
            super().finish_request(secured, client_address)


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Serves with a certificate, and to those of an authority alone; gives the URL's end."""
    with ExitStack() as stack:

        def serve(
            issued: Issued,
            client_ca: Path | None = None,
            body: bytes = b"1",
            newest: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3,
        ) -> str:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(issued.certificate, issued.key)
            context.maximum_version = newest
            if client_ca is not None:
                context.load_verify_locations(client_ca)
                context.verify_mode = ssl.CERT_REQUIRED
            site = Https(context, body)
            thread = threading.Thread(target=site.serve_forever, args=(0.02,))
            thread.start()
            stack.callback(thread.join)
            stack.callback(site.server_close)
            stack.callback(site.shutdown)
            return f"https://127.0.0.1:{site.server_address[1]}"

        yield serve


@pytest.fixture(scope="session")
def issued(authority: Authority) -> Issued:
    return authority.issue("server")


def refusal(url: str, tls: Tls | None) -> str:
    with pytest.raises(TransportError, match=f"no petalfl server answers at {url}: ") as caught:
        HttpClient(url, tls).get("/x", 1)
    return str(caught.value)


# Who is believed


def test_own_authority(serve: Serve, authority: Authority, issued: Issued) -> None:
    url = serve(issued)
    assert HttpClient(url, Tls(ca=authority.ca)).get("/x", 1) == b"1"
    assert HttpClient(url, Tls(ca=str(authority.ca))).get("/x", 1) == b"1"


def test_the_systems_authorities(
    serve: Serve, authority: Authority, issued: Issued, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = serve(issued)
    message = refusal(url, None)
    assert "of no authority that is trusted here: give the CA that signed it" in message
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.ca))  # what OpenSSL takes for the system's
    assert HttpClient(url).get("/x", 1) == b"1"


def test_an_authority_is_instead_of_the_systems(
    serve: Serve, authority: Authority, issued: Issued, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.ca))
    assert "no authority that is trusted" in refusal(serve(issued), Tls(Authority(tmp_path).ca))


def test_another_host(serve: Serve, authority: Authority) -> None:
    url = serve(authority.issue("elsewhere", ("elsewhere.example",)))
    assert "not valid for '127.0.0.1'" in refusal(url, Tls(authority.ca))
    url = serve(authority.issue("by-address", ("127.0.0.1",))).replace("127.0.0.1", "localhost")
    assert "not valid for 'localhost'" in refusal(url, Tls(authority.ca))


def test_expired(serve: Serve, authority: Authority) -> None:
    url = serve(authority.issue("expired", ends=-DAY / 2))
    assert "its certificate has expired" in refusal(url, Tls(authority.ca))


def test_not_valid_yet(serve: Serve, authority: Authority) -> None:
    url = serve(authority.issue("future", begins=DAY / 2))
    assert "not valid yet; is the clock right?" in refusal(url, Tls(authority.ca))


def test_old_versions_are_refused(authority: Authority) -> None:
    context = Tls(authority.ca).context()
    assert context.minimum_version == ssl.TLSVersion.TLSv1_2
    assert context.check_hostname and context.verify_mode == ssl.CERT_REQUIRED


# Who one is oneself

VERSIONS = [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3]  # which refuse at other moments


@pytest.mark.parametrize("newest", VERSIONS)
def test_mutual(
    serve: Serve, authority: Authority, issued: Issued, tmp_path: Path, newest: ssl.TLSVersion
) -> None:
    url = serve(issued, authority.ca, newest=newest)
    own = authority.issue("device")
    assert HttpClient(url, Tls(authority.ca, own.certificate, own.key)).get("/x", 1) == b"1"
    both = tmp_path / "both.pem"
    both.write_bytes(own.certificate.read_bytes() + own.key.read_bytes())
    assert HttpClient(url, Tls(authority.ca, both)).get("/x", 1) == b"1"


@pytest.mark.parametrize("newest", VERSIONS)
def test_a_server_that_asks_for_a_certificate(
    serve: Serve, authority: Authority, issued: Issued, tmp_path: Path, newest: ssl.TLSVersion
) -> None:
    url = serve(issued, authority.ca, newest=newest)
    assert "may ask for a certificate (mutual TLS)" in refusal(url, Tls(authority.ca))
    other = Authority(tmp_path).issue("device")
    for own in (authority.issue("expired-device", ends=-DAY / 2), other):
        message = refusal(url, Tls(authority.ca, own.certificate, own.key))
        assert f"may not accept {own.certificate}: is it expired, or of another" in message


# Renewal


def test_a_renewed_certificate_is_taken(
    serve: Serve, authority: Authority, issued: Issued, tmp_path: Path
) -> None:
    """By the try after the one that the old one was refused at."""
    url = serve(issued, authority.ca)
    used = Issued(tmp_path / "device.pem", tmp_path / "device.key")
    used.install(authority.issue("expired-device", ends=-DAY / 2))
    client = HttpClient(url, Tls(authority.ca, used.certificate, used.key))
    used.install(authority.issue("device"))
    with pytest.raises(TransportError, match="may not accept"):
        client.get("/x", 1)
    assert client.get("/x", 1) == b"1"


def test_a_damaged_renewal_is_not(
    serve: Serve,
    authority: Authority,
    issued: Issued,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    url = serve(issued, authority.ca)
    used = Issued(tmp_path / "device.pem", tmp_path / "device.key")
    used.install(authority.issue("device"))
    tls = Tls(authority.ca, used.certificate, used.key)
    context = tls.context()
    used.certificate.write_bytes(authority.issue("other").certificate.read_bytes())  # not its key
    tls.renew(context)
    assert "the certificates in use stay: " in caplog.text
    with urllib.request.urlopen(url, timeout=30, context=context) as response:
        assert response.read() == b"1"


def test_a_new_authority_is_trusted(
    serve: Serve, authority: Authority, issued: Issued, tmp_path: Path
) -> None:
    url = serve(issued)
    ca = tmp_path / "ca.pem"
    ca.write_bytes(Authority(tmp_path / "old").ca.read_bytes())
    client = HttpClient(url, Tls(ca))
    ca.write_bytes(ca.read_bytes() + authority.ca.read_bytes())
    with pytest.raises(TransportError, match="no authority that is trusted"):
        client.get("/x", 1)
    assert client.get("/x", 1) == b"1"


# Files


def test_files_that_are_not_there(authority: Authority, issued: Issued, tmp_path: Path) -> None:
    gone = tmp_path / "gone.pem"
    assert_unusable(Tls(gone), f"no certificates of authorities in {gone}: No such file")
    assert_unusable(Tls(certificate=gone), f"key in {gone}: No such file")
    assert_unusable(Tls(certificate=issued.certificate, key=gone), f"with {gone}: No such file")
    assert_unusable(Tls(key=issued.key), f"the key {issued.key} without its certificate")


def test_files_that_hold_something_else(issued: Issued, tmp_path: Path) -> None:
    other = tmp_path / "other.pem"
    for text in (b"", b"\x00\xff" * 500, b"-----BEGIN CERTIFICATE-----\nx\n"):
        other.write_bytes(text)
        assert_unusable(Tls(other), f"authorities in {other}: found something else than PEM")
        assert_unusable(Tls(certificate=other), f"key in {other}: found something else than PEM")
    assert_unusable(Tls(issued.key), "authorities in .*: found something else than PEM")
    assert_unusable(Tls(tmp_path), f"authorities in {tmp_path}: ")


def test_the_key_of_another(authority: Authority, issued: Issued) -> None:
    other = authority.issue("other")
    assert_unusable(Tls(certificate=issued.certificate, key=other.key), "of another certificate")


def test_an_encrypted_key(authority: Authority) -> None:
    """Refused, where OpenSSL would ask on the terminal."""
    locked = authority.issue("locked", passphrase=b"secret")
    assert_unusable(Tls(certificate=locked.certificate, key=locked.key), "the key is encrypted")


def assert_unusable(tls: Tls, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tls.context()


def test_files_are_read_at_once(tmp_path: Path) -> None:
    """Whatever the URL is: the broker may have TLS where the server has none."""
    for url in ("https://h:1", "http://h:1"):
        with pytest.raises(ValueError, match="No such file"):
            HttpClient(url, Tls(tmp_path / "gone.pem"))


def test_a_client_that_cannot_be_made_leaves_its_store_free(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="No such file"):
        EdgeClient("https://h:1", store=tmp_path / "store", tls=Tls(tmp_path / "gone.pem"))
    DeviceStore(tmp_path / "store").close()


# The wrong kind of URL


def test_http_where_there_is_tls(serve: Serve, issued: Issued) -> None:
    url = serve(issued).replace("https", "http")
    assert "a server with TLS has a URL that begins with https" in refusal(url, None)


def test_https_where_there_is_no_tls(authority: Authority) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        url = f"https://127.0.0.1:{listener.getsockname()[1]}"
        assert "it speaks no TLS on this port" in refusal(url, Tls(authority.ca))
        thread.join()


def test_other_errors_are_left_alone() -> None:
    assert explain(ConnectionRefusedError(111, "Connection refused"), Tls()) == (
        "[Errno 111] Connection refused"
    )
    assert explain("unknown host", Tls()) == "unknown host"


# The broker of a server with TLS


@pytest.mark.parametrize(
    ("host", "is_tls", "is_taken"),
    [
        ("broker.example", True, True),
        ("127.0.0.1", False, True),
        ("127.9.9.9", False, True),
        ("::1", False, True),
        ("localhost", False, True),
        ("broker.example", False, False),
        ("10.0.0.1", False, False),
        ("localhost.example", False, False),
        ("0.0.0.0", False, False),
    ],
)
def test_a_broker_without_tls(
    serve: Serve,
    authority: Authority,
    issued: Issued,
    tmp_path: Path,
    host: str,
    is_tls: bool,
    is_taken: bool,
) -> None:
    session = {"mqtt_host": host, "mqtt_port": 1883, "mqtt_is_tls": is_tls}
    url = serve(issued, body=json.dumps(session).encode())
    with contextlib.closing(DeviceStore(tmp_path)) as store:
        downlink = Downlink(url, "f", store, Tls(authority.ca))
        if is_taken:
            assert downlink.get_session().mqtt_host == host
        else:
            with pytest.raises(TransportError, match=rf"has TLS, and its broker at {host}:1883"):
                downlink.get_session()


# What it costs


def test_a_client_without_tls_reads_no_certificates() -> None:
    """The system's are a megabyte."""
    script = (
        "import ssl; ssl.SSLContext.load_default_certs = None\n"
        "from petalfl.http import HttpClient\n"
        "HttpClient('http://h:1')"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)
