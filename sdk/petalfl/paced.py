"""urllib with a least speed: a server that sends a byte now and then does not hold a device up."""

from __future__ import annotations

import functools
import http.client
import io
import selectors
import socket
import ssl
import time
import urllib.request
from collections.abc import Callable
from typing import Any

from petalfl.threads import CHECK_S, abandon, result_of, run_aside

TIMEOUT_S = 30.0  # without a byte
MIN_BYTES_PER_S = 256  # a server that is slower for a minute is given up
MOST_PATIENCE_S = 60.0
BUFFER_BYTES = 64 << 10


def build_opener(
    context: ssl.SSLContext | None, check: Callable[[], None] = lambda: None
) -> urllib.request.OpenerDirector:
    """An opener whose connections must come at `MIN_BYTES_PER_S`, and which follows no redirect.

    Args:
        context: Of ``https`` URLs; None: there are none.
        check: Called before every read, and now and then while it waits, for a connection, too;
            what it raises ends it.
    """
    nobody = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # else urllib reads the system's authorities
    https = _HttpsHandler(check, context or nobody)
    return urllib.request.build_opener(_NoRedirect, _HttpHandler(check), https)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: it would carry the credential to another server."""

    def redirect_request(self, *arguments: Any) -> None:
        """Follows none."""


class _Paced(io.RawIOBase):
    """What a server sends, as long as it comes at `MIN_BYTES_PER_S`.

    A timeout alone would let a byte now and then go on for ever: in the headers, too.
    """

    def __init__(
        self, connection: socket.socket, raw: io.RawIOBase, check: Callable[[], None]
    ) -> None:
        self._connection = connection
        self._check = check
        self._raw = raw
        self._patience_s = TIMEOUT_S

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        if self._patience_s <= 0:
            raise TimeoutError(f"less than {MIN_BYTES_PER_S} bytes a second come")
        timeout_s = min(TIMEOUT_S, self._patience_s)
        self._connection.settimeout(timeout_s)
        started_s = time.monotonic()
        self._await(started_s + timeout_s)
        count = self._raw.readinto(buffer)
        earned_s = (count or 0) / MIN_BYTES_PER_S - (time.monotonic() - started_s)
        self._patience_s = min(MOST_PATIENCE_S, self._patience_s + earned_s)
        return count

    def _await(self, end_s: float) -> None:
        """Until something has come; the socket could not be read again after its own timeout."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._connection, selectors.EVENT_READ)
            self._check()
            while not _num_pending(self._connection):
                left_s = end_s - time.monotonic()
                if selector.select(max(0.0, min(CHECK_S, left_s))):
                    return
                self._check()
                if left_s <= CHECK_S:
                    raise TimeoutError("timed out")

    def close(self) -> None:
        self._raw.close()
        super().close()


def _num_pending(connection: socket.socket) -> int:
    """Bytes that have come and been decrypted already: no selector knows of them."""
    return connection.pending() if isinstance(connection, ssl.SSLSocket) else 0


class _Response(http.client.HTTPResponse):
    def __init__(
        self, sock: socket.socket, *arguments: Any, check: Callable[[], None], **more: Any
    ) -> None:
        super().__init__(sock, *arguments, **more)
        self.fp = io.BufferedReader(_Paced(sock, self.fp.detach(), check), BUFFER_BYTES)


class _Connection(http.client.HTTPConnection):
    """Connects aside, for the names, the addresses and the handshake may take their time."""

    def __init__(self, host: str, *, check: Callable[[], None], **more: Any) -> None:
        super().__init__(host, **more)
        self.response_class: Any = functools.partial(_Response, check=check)
        self._check = check

    def connect(self) -> None:
        work = run_aside(super().connect)
        try:
            result_of(work, self._check)
        except BaseException:
            abandon(work, lambda connected: self.close())
            raise


class _HttpsConnection(_Connection, http.client.HTTPSConnection):
    """With the handshake of `http.client.HTTPSConnection`."""


class _HttpHandler(urllib.request.HTTPHandler):
    def __init__(self, check: Callable[[], None]) -> None:
        super().__init__()
        self._check = check

    def http_open(self, request: urllib.request.Request) -> Any:
        make: Any = functools.partial(_Connection, check=self._check)
        return self.do_open(make, request)


class _HttpsHandler(urllib.request.HTTPSHandler):
    def __init__(self, check: Callable[[], None], context: ssl.SSLContext) -> None:
        super().__init__(context=context)
        self._check, self._trust = check, context

    def https_open(self, request: urllib.request.Request) -> Any:
        make: Any = functools.partial(_HttpsConnection, check=self._check)
        return self.do_open(make, request, context=self._trust)
