"""The device's side of HTTP: enrollment and downloads, with the standard library alone."""

from __future__ import annotations

import base64
import http.client
import json
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

from petalfl.errors import EnrollError, TransportError
from petalfl.tls import Tls, explain

TIMEOUT_S = 30.0
MAX_JSON_BYTES = 1 << 20


class NotThereError(TransportError):
    """The server answers, and has nothing there (404)."""


class HttpClient:
    """Talks to one server. Its methods block: call them on a thread.

    Args:
        url: The server's base URL, ``http(s)://host:port``.
        tls: Whom to trust, and the certificate to show, at an ``https`` URL; the default is to
            trust the system's authorities.

    Raises:
        ValueError: ``url`` is of another form, or a file of ``tls`` cannot be used.
    """

    def __init__(self, url: str, tls: Tls | None = None) -> None:
        parts = urllib.parse.urlsplit(url)
        try:
            is_port = parts.port != 0
        except ValueError:
            is_port = False
        if parts.scheme not in ("http", "https") or not parts.hostname or not is_port:
            raise ValueError(f"found the server URL {url!r}, expected http(s)://host:port")
        self._url = url.rstrip("/")
        self.is_tls, self._tls = parts.scheme == "https", tls or Tls()
        handlers: list[urllib.request.BaseHandler] = [_NoRedirect()]
        if self.is_tls or tls is not None:
            handlers.append(urllib.request.HTTPSHandler(context=self._tls.context()))
        self._opener = urllib.request.build_opener(*handlers)
        self._authorization = ""

    def use_token(self, token: str) -> None:
        """Sends the join token from now on."""
        self._authorization = f"Bearer {token}"

    def use_login(self, device: str, password: str) -> None:
        """Sends the device's own credential from now on."""
        pair = base64.b64encode(f"{device}:{password}".encode()).decode()
        self._authorization = f"Basic {pair}"

    def post_json(self, path: str, body: object) -> Any:
        """Posts JSON and reads JSON; errors as in `get`."""
        return _parse(self._request(path, json.dumps(body).encode(), MAX_JSON_BYTES))

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

    def _request(self, path: str, body: bytes | None, max_bytes: int) -> bytes:
        headers = {"Authorization": self._authorization, "Content-Type": "application/json"}
        request = urllib.request.Request(self._url + path, body, headers)
        try:
            with self._opener.open(request, timeout=TIMEOUT_S) as response:
                data: bytes = response.read(max_bytes + 1)
                num_missing = response.length or 0
        except urllib.error.HTTPError as error:
            reason = _read_reason(error)
            kind = _ERRORS.get(error.code, TransportError)
            raise kind(f"{self._url}{path}: {error.code} {reason or error.reason}") from error
        except (OSError, ValueError, http.client.HTTPException) as error:
            cause = self._cause(error)
            raise TransportError(f"no petalfl server answers at {self._url}: {cause}") from error
        if len(data) > max_bytes:
            raise TransportError(f"{self._url}{path} sends more than the {max_bytes} bytes due")
        if num_missing:
            raise TransportError(f"{self._url}{path} hung up with {num_missing} bytes to go")
        return data

    def _cause(self, error: Exception) -> str:
        cause = error.reason if isinstance(error, urllib.error.URLError) else error
        if self.is_tls:
            return explain(cause, self._tls)
        if isinstance(cause, ConnectionResetError):  # as one does that expects a TLS handshake
            return f"{cause}; a server with TLS has a URL that begins with https"
        return str(cause)


_ERRORS: dict[int, type[EnrollError | TransportError]] = {
    **dict.fromkeys((400, 401, 403, 409), EnrollError),
    404: NotThereError,
}


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: it would carry the credential to another server."""

    def redirect_request(self, *arguments: Any) -> None:
        """Follows none."""


def _read_reason(error: urllib.error.HTTPError) -> str:
    try:
        with error:
            return error.read(500).decode(errors="replace").strip()
    except (OSError, http.client.HTTPException):
        return ""


def _parse(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise TransportError(f"the server sent no JSON: {error}") from error
