"""urllib with a least speed: a server that sends a byte now and then does not hold a device up."""

from __future__ import annotations

import http.client
import io
import socket
import ssl
import time
import urllib.request
from typing import Any

TIMEOUT_S = 30.0  # without a byte
MIN_BYTES_PER_S = 256  # a server that is slower for a minute is given up
MOST_PATIENCE_S = 60.0
BUFFER_BYTES = 64 << 10


def build_opener(context: ssl.SSLContext | None) -> urllib.request.OpenerDirector:
    """An opener whose connections must come at `MIN_BYTES_PER_S`, and which follows no redirect.

    Args:
        context: Of ``https`` URLs; None: there are none.
    """
    nobody = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # else urllib reads the system's authorities
    https = _HttpsHandler(context=context or nobody)
    return urllib.request.build_opener(_NoRedirect, _HttpHandler, https)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: it would carry the credential to another server."""

    def redirect_request(self, *arguments: Any) -> None:
        """Follows none."""


class _Paced(io.RawIOBase):
    """What a server sends, as long as it comes at `MIN_BYTES_PER_S`.

    A timeout alone would let a byte now and then go on for ever: in the headers, too.
    """

    def __init__(self, connection: socket.socket, raw: io.RawIOBase) -> None:
        self._connection = connection
        self._raw = raw
        self._patience_s = TIMEOUT_S

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        if self._patience_s <= 0:
            raise TimeoutError(f"less than {MIN_BYTES_PER_S} bytes a second come")
        self._connection.settimeout(min(TIMEOUT_S, self._patience_s))
        started_s = time.monotonic()
        count = self._raw.readinto(buffer)
        earned_s = (count or 0) / MIN_BYTES_PER_S - (time.monotonic() - started_s)
        self._patience_s = min(MOST_PATIENCE_S, self._patience_s + earned_s)
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Response(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *arguments: Any, **more: Any) -> None:
        super().__init__(sock, *arguments, **more)
        self.fp = io.BufferedReader(_Paced(sock, self.fp.detach()), BUFFER_BYTES)


class _HttpConnection(http.client.HTTPConnection):
    response_class = _Response


class _HttpsConnection(http.client.HTTPSConnection):
    response_class = _Response


class _HttpHandler(urllib.request.HTTPHandler):
    def http_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(_HttpConnection, request)


class _HttpsHandler(urllib.request.HTTPSHandler):
    _context: ssl.SSLContext

    def https_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(_HttpsConnection, request, context=self._context)
