"""The device's side of HTTP: enrollment and downloads, with the standard library alone."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Generator, Iterator
from typing import Any

from petalfl.errors import EnrollError, TransportError, printable
from petalfl.paced import TIMEOUT_S, build_opener
from petalfl.source import BrokenOffError, NoSuchRangeError, NotThereError
from petalfl.tls import Tls, explain

PIECE_BYTES = 64 << 10
MAX_JSON_BYTES = 1 << 20


class HttpClient:
    """Talks to one server. Its methods block: call them on a thread.

    Args:
        url: The server's base URL, ``http(s)://host:port``.
        tls: Whom to trust, and the certificate to show, at an ``https`` URL; the default is to
            trust the system's authorities.
        on_bytes: Told of the bytes of every body that was sent, and of what came of one.
        check: Called while it waits for an answer; what it raises ends that.

    Raises:
        ValueError: ``url`` is of another form, or a file of ``tls`` cannot be used.
    """

    def __init__(
        self,
        url: str,
        tls: Tls | None = None,
        on_bytes: Callable[[int], None] = lambda num_bytes: None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        parts = urllib.parse.urlsplit(url)
        try:
            is_port = parts.port != 0
        except ValueError:
            is_port = False
        if parts.scheme not in ("http", "https") or not parts.hostname or not is_port:
            raise ValueError(f"found the server URL {url!r}, expected http(s)://host:port")
        self._url = url.rstrip("/")
        self.is_tls, self._tls = parts.scheme == "https", tls or Tls()
        self._context = self._tls.context() if self.is_tls or tls is not None else None
        self._opener = build_opener(self._context, check)
        self._authorization = ""
        self._on_bytes = on_bytes

    def use_token(self, token: str) -> None:
        """Sends the join token from now on."""
        self._authorization = f"Bearer {token}"

    def use_login(self, device: str, password: str) -> None:
        """Sends the device's own credential from now on."""
        pair = base64.b64encode(f"{device}:{password}".encode()).decode()
        self._authorization = f"Basic {pair}"

    def post_json(self, path: str, body: object, headers: dict[str, str] | None = None) -> Any:
        """Posts JSON and reads JSON; errors as in `get`."""
        return _parse(self._request(path, json.dumps(body).encode(), MAX_JSON_BYTES, headers))

    def get_json(self, path: str) -> Any:
        """Reads JSON; errors as in `get`."""
        return _parse(self._request(path, None, MAX_JSON_BYTES))

    def get(self, path: str, max_bytes: int) -> bytes:
        """The body at ``path``.

        Raises:
            EnrollError: The server does not accept the token or credential (401, 403, 409).
            NotThereError: It has nothing there.
            TransportError: It cannot be reached, fails, or sends more than ``max_bytes``.
        """
        return self._request(path, None, max_bytes)

    def get_changed(self, path: str, max_bytes: int, sha256: str) -> bytes | None:
        """The body at ``path``; None where its digest is still this one. Errors as in `get`."""
        try:
            return self._request(path, None, max_bytes, {"If-None-Match": f'"{sha256}"'})
        except _NotModifiedError:
            return None

    def stream(
        self, path: str, sha256: str, start: int, num_bytes: int
    ) -> Generator[tuple[int, bytes], None, None]:
        """See `Source.stream`: of ``path``; ``sha256`` is its ETag."""
        headers = {"Range": f"bytes={start}-", "If-Range": f'"{sha256}"'} if start else {}
        with self._open(path, None, headers) as response:
            offset = start if response.status == 206 else 0
            _check_announced(f"{self._url}{path}", response, offset, num_bytes)
            while offset < num_bytes:
                try:
                    data = response.read1(min(PIECE_BYTES, num_bytes - offset))
                    if not data:
                        raise ConnectionError("the server hung up")
                except (OSError, ValueError, http.client.HTTPException) as error:
                    raise BrokenOffError(
                        f"{self._url}{path}: {error} with {num_bytes - offset} bytes to go"
                    ) from error
                self._on_bytes(len(data))
                yield offset, data
                offset += len(data)

    def _request(
        self, path: str, body: bytes | None, max_bytes: int, headers: dict[str, str] | None = None
    ) -> bytes:
        self._on_bytes(len(body or b""))
        with self._open(path, body, headers or {}) as response:
            try:
                data = response.read(max_bytes + 1)
                self._on_bytes(len(data))
                num_missing = response.length or 0
            except (OSError, ValueError, http.client.HTTPException) as error:
                raise TransportError(f"{self._url}{path} broke off: {error}") from error
        if len(data) > max_bytes:
            raise TransportError(f"{self._url}{path} sends more than the {max_bytes} bytes due")
        if num_missing:
            raise TransportError(f"{self._url}{path} hung up with {num_missing} bytes to go")
        return data

    @contextlib.contextmanager
    def _open(
        self, path: str, body: bytes | None, headers: dict[str, str]
    ) -> Iterator[http.client.HTTPResponse]:
        known = {"Authorization": self._authorization, "Content-Type": "application/json"}
        request = urllib.request.Request(self._url + path, body, known | headers)
        try:
            response = self._opener.open(request, timeout=TIMEOUT_S)
        except urllib.error.HTTPError as error:
            reason = _read_reason(error)
            kind = _ERRORS.get(error.code, TransportError)
            raise kind(f"{self._url}{path}: {error.code} {reason or error.reason}") from error
        except (OSError, ValueError, http.client.HTTPException) as error:
            cause = self._cause(error)
            if self._context is not None:  # the next try may be with a renewed certificate
                self._tls.renew(self._context)
            raise TransportError(f"no petalfl server answers at {self._url}: {cause}") from error
        with response:
            yield response

    def _cause(self, error: Exception) -> str:
        cause = error.reason if isinstance(error, urllib.error.URLError) else error
        if self.is_tls:
            return explain(cause, self._tls)
        if isinstance(cause, ConnectionResetError):  # as one does that expects a TLS handshake
            return f"{cause}; a server with TLS has a URL that begins with https"
        return str(cause)


class _NotModifiedError(TransportError):
    """What the client has is still so (304)."""


_ERRORS: dict[int, type[EnrollError | TransportError]] = {
    **dict.fromkeys((400, 401, 403, 409), EnrollError),
    304: _NotModifiedError,
    404: NotThereError,
    416: NoSuchRangeError,
}


def _check_announced(
    where: str, response: http.client.HTTPResponse, offset: int, num_bytes: int
) -> None:
    """Refuses another part, or another length, than was asked for."""
    if response.status == 206:
        found = response.headers.get("Content-Range", "")
        due = f"bytes {offset}-{num_bytes - 1}/"
        if found not in (f"{due}{num_bytes}", f"{due}*"):
            raise TransportError(f"{where} sends {found[:80]!r}, due are {due}{num_bytes}")
    if response.length is not None and response.length != num_bytes - offset:
        raise TransportError(
            f"{where} sends {response.length} bytes from {offset} on, due are {num_bytes - offset}"
        )


def _read_reason(error: urllib.error.HTTPError) -> str:
    try:
        with error:
            return printable(error.read(500).decode(errors="replace"))
    except (OSError, http.client.HTTPException):
        return ""


def _parse(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise TransportError(f"the server sent no JSON: {error}") from error
