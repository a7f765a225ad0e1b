"""`HttpClient` against a small local server that answers whatever a test wants."""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import json
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from petalfl.errors import EnrollError, PetalError, TransportError
from petalfl.http import HttpClient
from petalfl.paced import TIMEOUT_S, _Paced
from petalfl.pacing import Stopped
from tests.petalfl.deaf import deaf_listener


class Site:
    """A server on loopback; what it got, and what it answers by path."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, str, str | None, bytes]] = []
        self.answers: dict[str, tuple[int, bytes, dict[str, str]]] = {}
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,))
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def answer(self, path: str, status: int, body: bytes = b"", **headers: str) -> None:
        self.answers[path] = status, body, headers

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                got = self.command, self.path, self.headers.get("Authorization")
                site.requests.append((*got, self.rfile.read(length)))
                status, body, headers = site.answers[self.path]
                self.send_response(status)
                for name, value in ({"Content-Length": str(len(body))} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            do_POST = do_GET  # noqa: N815

            def log_message(self, *arguments: Any) -> None:
                pass

        return Handler


@pytest.fixture
def site() -> Iterator[Site]:
    site = Site()
    yield site
    site.close()


def test_get(site: Site) -> None:
    body = bytes(range(256)) * 500
    site.answer("/v1/f/artifacts/head/eval.onnx", 200, body)
    client = HttpClient(site.url)
    assert client.get("/v1/f/artifacts/head/eval.onnx", len(body)) == body


def test_a_slash_after_the_url(site: Site) -> None:
    site.answer("/x", 200, b"y")
    assert HttpClient(site.url + "/").get("/x", 1) == b"y"


def test_json_both_ways(site: Site) -> None:
    site.answer("/enroll", 200, b'{"device": "d"}')
    client = HttpClient(site.url)
    assert client.post_json("/enroll", {"modalities": ["acc"]}) == {"device": "d"}
    assert client.get_json("/enroll") == {"device": "d"}
    (post, get) = site.requests
    assert (post[0], json.loads(post[3])) == ("POST", {"modalities": ["acc"]})
    assert (get[0], get[3]) == ("GET", b"")


def test_credentials(site: Site) -> None:
    site.answer("/x", 200, b"1")
    client = HttpClient(site.url)
    client.use_token("t-0")
    client.get("/x", 1)
    client.use_login("dev-1", "pw:with:colons")
    client.get("/x", 1)
    kind, _, pair = str(site.requests[1][2]).partition(" ")
    assert site.requests[0][2] == "Bearer t-0"
    assert (kind, base64.b64decode(pair)) == ("Basic", b"dev-1:pw:with:colons")


@pytest.mark.parametrize("status", [400, 401, 403, 409])
def test_refused(site: Site, status: int) -> None:
    site.answer("/v1/f/enroll", status, b"device d is enrolled already\n")
    message = rf"{site.url}/v1/f/enroll: {status} device d is enrolled already$"
    with pytest.raises(EnrollError, match=message):
        HttpClient(site.url).post_json("/v1/f/enroll", {})


@pytest.mark.parametrize("status", [404, 500, 502, 503])
def test_failed(site: Site, status: int) -> None:
    site.answer("/x", status, b"the disk is full")
    with pytest.raises(TransportError, match=f"/x: {status} the disk is full$"):
        HttpClient(site.url).get("/x", 10)


def test_failed_without_a_word(site: Site) -> None:
    site.answer("/x", 503)
    with pytest.raises(TransportError, match=r"503 Service Unavailable$"):
        HttpClient(site.url).get("/x", 10)


def test_a_long_complaint_is_cut(site: Site) -> None:
    site.answer("/x", 500, b"\xff" * 100_000)
    with pytest.raises(TransportError) as caught:
        HttpClient(site.url).get("/x", 10)
    assert len(str(caught.value)) < 600


def test_body_as_long_as_it_may_be(site: Site) -> None:
    site.answer("/x", 200, b"12345")
    assert HttpClient(site.url).get("/x", 5) == b"12345"


def test_too_long_a_body(site: Site) -> None:
    site.answer("/x", 200, b"123456")
    with pytest.raises(TransportError, match="/x sends more than the 5 bytes due"):
        HttpClient(site.url).get("/x", 5)


def test_too_long_json(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("petalfl.http.MAX_JSON_BYTES", 5)
    site.answer("/x", 200, b"[1,2,3]")
    with pytest.raises(TransportError, match="more than the 5 bytes due"):
        HttpClient(site.url).get_json("/x")


@pytest.mark.parametrize("body", [b"", b"<html>", b"{", b"\xff", b"[" * 100_000])
def test_not_json(site: Site, body: bytes) -> None:
    site.answer("/x", 200, body)
    with pytest.raises(TransportError, match="no JSON"):
        HttpClient(site.url).get_json("/x")


def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    with pytest.raises(TransportError, match=f"no petalfl server answers at {url}: .*refused"):
        HttpClient(url).get("/x", 10)


def test_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("petalfl.paced.TIMEOUT_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(TransportError, match=f"no petalfl server answers at {url}: timed out"):
            HttpClient(url).get("/x", 10)


def test_a_connection_that_comes_too_late_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    is_free = threading.Event()
    connect = http.client.HTTPConnection.connect

    def connect_late(self: http.client.HTTPConnection) -> None:
        assert is_free.wait(30)
        connect(self)

    def check() -> None:
        raise Stopped

    monkeypatch.setattr(http.client.HTTPConnection, "connect", connect_late)
    with deaf_listener(accepts=True) as deaf:
        with pytest.raises(Stopped):
            HttpClient(f"http://127.0.0.1:{deaf.port}", check=check).get("/x", 10)
        is_free.set()
        deaf.wait_for_the_end()


@pytest.mark.parametrize("says", [b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 1000])
def test_a_check_ends_it(says: bytes) -> None:
    """Whatever the server does: an app that stops waits for nobody."""
    checks: list[float] = []

    def check() -> None:
        checks.append(time.monotonic())
        if len(checks) > 2 and checks[-1] - checks[0] > 1:
            raise Stopped

    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        ended = threading.Event()

        def keep_saying() -> None:
            connection, _ = server.accept()
            with connection, contextlib.suppress(OSError):
                while not ended.wait(0.1):
                    connection.sendall(says)

        thread = threading.Thread(target=keep_saying)
        thread.start()
        try:
            with pytest.raises(Stopped):
                HttpClient(url, check=check).get("/x", 10)
        finally:
            ended.set()
            thread.join()


ODD_ANSWERS = {
    "another protocol": b"SSH-2.0-OpenSSH_9.6\r\n",
    "nothing": b"",
    "half a status line": b"HTTP/1.1 2",
    "endless header": b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000,
    "a hundred thousand headers": b"HTTP/1.1 200 OK\r\n" + b"X: x\r\n" * 100_000,
    "length that is no number": b"HTTP/1.1 200 OK\r\nContent-Length: x\r\nX-: \r\n",
    "broken chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    "failure cut short": b"HTTP/1.1 500 No\r\nContent-Length: 9\r\n\r\nhalf",
}


@pytest.mark.parametrize("answer", ODD_ANSWERS.values(), ids=ODD_ANSWERS.keys())
def test_odd_answers(answer: bytes) -> None:
    with raw_server(answer) as url, pytest.raises(TransportError):
        HttpClient(url).get_json("/x")


def test_a_failure_in_broken_chunks() -> None:
    answer = b"HTTP/1.1 500 No\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"
    with raw_server(answer) as url, pytest.raises(TransportError, match="500"):
        HttpClient(url).get_json("/x")


def test_a_body_cut_short() -> None:
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf"
    with raw_server(answer) as url, pytest.raises(TransportError):
        HttpClient(url).get("/x", 100)


# Downloads; what becomes of them is in test_downlink.py

SHA = "ab" * 32


def test_what_has_not_changed_does_not_come(site: Site) -> None:
    client = HttpClient(site.url)
    site.answer("/x", 304)
    assert client.get_changed("/x", 10, SHA) is None
    site.answer("/x", 200, b"new")
    assert client.get_changed("/x", 10, SHA) == b"new"


def test_not_changed_without_being_asked(site: Site) -> None:
    site.answer("/x", 304)
    with pytest.raises(TransportError, match="304"):
        HttpClient(site.url).get("/x", 10)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than a trickle has to come."""
    monkeypatch.setattr("petalfl.paced.TIMEOUT_S", 0.3)
    monkeypatch.setattr("petalfl.paced.MOST_PATIENCE_S", 0.3)
    monkeypatch.setattr("petalfl.paced.MIN_BYTES_PER_S", 10_000)


HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n"
TRICKLES = {
    "status line": b"HTTP/1.1 200 ",
    "headers": b"HTTP/1.1 200 OK\r\nX: ",
    "body": HEAD,
    "body after a good start": HEAD + bytes(50_000),
    "chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nfff\r\n",
    "complaint": b"HTTP/1.1 500 No\r\nContent-Length: 400\r\n\r\n",
}


@pytest.mark.parametrize("trickle", TRICKLES)
def test_a_byte_now_and_then_is_not_enough(impatient: None, trickle: str) -> None:
    """No timeout ever passes without a byte, and it ends nonetheless."""
    with raw_server(TRICKLES[trickle], trickles=True) as url, pytest.raises(TransportError):
        HttpClient(url).get("/x", 100_000)
    with raw_server(TRICKLES[trickle], trickles=True) as url, pytest.raises(TransportError):
        for _ in HttpClient(url).stream("/x", SHA, 0, 100_000):
            pass


# Reads of so many bytes in so many seconds, over and over, and whether that may go on.
PACES = {
    "a byte every 20 s": (1, 20.0, False),
    "a byte every second": (1, 1.0, False),
    "a bit too slow": (250, 1.0, False),
    "just fast enough": (260, 1.0, True),
    "fast enough with long breaks": (8000, 29.0, True),
    "fast": (65536, 0.1, True),
}


@pytest.mark.parametrize("pace", PACES)
def test_how_slow_a_server_may_be(pace: str, monkeypatch: pytest.MonkeyPatch) -> None:
    num_bytes, seconds, is_fine = PACES[pace]
    now_s = 0.0
    timeouts: list[float] = []

    class Line(io.RawIOBase):
        def readinto(self, buffer: Any) -> int:
            nonlocal now_s
            now_s += min(seconds, timeouts[-1])
            if seconds > timeouts[-1]:
                raise TimeoutError("timed out")
            return num_bytes

    class Connection:
        def settimeout(self, timeout_s: float) -> None:
            timeouts.append(timeout_s)

    class Ready(_Paced):
        def _await(self, end_s: float) -> None:
            """It is the line that takes its time."""

    monkeypatch.setattr("petalfl.paced.time.monotonic", lambda: now_s)
    paced = Ready(Connection(), Line(), lambda: None)  # type: ignore[arg-type]
    if is_fine:
        for _ in range(2000):
            assert paced.readinto(bytearray(65536)) == num_bytes
    else:
        with pytest.raises(TimeoutError):
            for _ in range(4000):
                paced.readinto(bytearray(65536))
        assert timeouts and min(timeouts) > 0
    assert max(timeouts) <= TIMEOUT_S


def test_a_connection_that_stays_open_after_the_last_byte() -> None:
    answer = b"HTTP/1.1 200 OK\r\n\r\nabc"
    with raw_server(answer, trickles=True) as url:
        pieces = list(HttpClient(url).stream("/x", SHA, 0, 3))
    assert b"".join(data for _, data in pieces) == b"abc"


@pytest.mark.parametrize("answer", ODD_ANSWERS.values(), ids=ODD_ANSWERS.keys())
def test_odd_answers_to_a_download(answer: bytes) -> None:
    with raw_server(answer) as url, pytest.raises(TransportError):
        for _ in HttpClient(url).stream("/x", SHA, 0, 1000):
            pass


def test_a_credential_stays_with_its_server(site: Site) -> None:
    """A redirect must not carry the password to another host."""
    other = Site()
    try:
        other.answer("/y", 200, b"1")
        site.answer("/x", 302, Location=f"{other.url}/y")
        client = HttpClient(site.url)
        client.use_login("dev-1", "secret")
        with contextlib.suppress(PetalError):
            client.get("/x", 10)
        assert [authorization for _, _, authorization, _ in other.requests if authorization] == []
    finally:
        other.close()


@pytest.mark.parametrize(
    "url",
    [
        "",
        "127.0.0.1:8080",
        "ftp://h:1",
        "mqtt://h:1",
        "file:///etc/passwd",
        "http://",
        "http://:80",
    ],
)
def test_malformed_url(url: str) -> None:
    with pytest.raises(ValueError, match=r"expected http\(s\)://host:port") as caught:
        HttpClient(url)
    assert repr(url) in str(caught.value)


@pytest.mark.parametrize("url", ["http://h:x", "http://h:99999", "http://h:-1"])
def test_malformed_port(url: str) -> None:
    with pytest.raises(ValueError, match="port"):
        HttpClient(url)


class raw_server:  # noqa: N801 - a context manager
    """Answers one connection with these bytes and hangs up, or sends a byte now and then for ever.

    Args:
        trickles: Until the client has enough.
    """

    def __init__(self, answer: bytes, trickles: bool = False) -> None:
        self._answer = answer
        self._trickles = trickles
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> str:
        self._thread.start()
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def __exit__(self, *exception: object) -> None:
        self._thread.join()
        self._listener.close()

    def _serve(self) -> None:
        connection, _ = self._listener.accept()
        with connection:
            connection.recv(4096)
            try:
                connection.sendall(self._answer)
                while self._trickles:
                    connection.sendall(b"0")
                    time.sleep(0.01)
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(4096):
                    pass
            except OSError:
                pass  # the client had enough
