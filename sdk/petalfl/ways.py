"""The two ways to a server: HTTP beside MQTT, or MQTT alone."""

from __future__ import annotations

import urllib.parse
from collections.abc import Callable, Collection, Generator
from dataclasses import dataclass
from typing import Annotated, Protocol

from petalfl import wire
from petalfl.errors import EnrollError, TransportError
from petalfl.http import HttpClient
from petalfl.pull import Pull
from petalfl.schema import Limit, Pattern, read
from petalfl.source import Source
from petalfl.store import Identity
from petalfl.tls import Tls, is_loopback

PORTS = {"mqtt": 1883, "mqtts": 8883}


@dataclass(frozen=True, slots=True)
class Session:
    """Where the federation's broker is now."""

    mqtt_host: Annotated[str, Pattern(r"[!-~]{1,256}")]
    mqtt_port: Annotated[int, Limit(1, 65535)]
    mqtt_is_tls: bool


class Way(Source, Protocol):
    """How a device enrolls, finds its broker and gets its files. Errors as of `Source`."""

    def enroll(
        self, token: str, device: str, modalities: Collection[str], key: str = ""
    ) -> Identity:
        """Trades the join token for this device's own credential.

        Args:
            key: A secret of the device's: with the same one it gets the same again.
        """
        ...

    def log_in(self, identity: Identity) -> None:
        """Uses the device's own credential from now on."""
        ...

    def add_modalities(self, modalities: Collection[str]) -> None:
        """Has the server know of modalities that came after enrollment."""
        ...

    def get_session(self) -> Session:
        """Says where the broker is."""
        ...

    def attach(self, send: Callable[[wire.Fetch], None]) -> None:
        """There is a connection to the broker: ``send`` blocks, and raises `TransportError`."""
        ...

    def receive(self, message: wire.Part | wire.Declined) -> None:
        """Something came over it."""
        ...

    def reconnected(self) -> None:
        """It broke, and was mended."""
        ...


def open_way(
    url: str,
    federation: str,
    tls: Tls | None,
    check: Callable[[], None],
    on_bytes: Callable[[int], None] = lambda num_bytes: None,
) -> Way:
    """The way that a URL names.

    Args:
        tls: Whom to trust, and the certificate to show.
        check: Called while a download waits; what it raises ends that.
        on_bytes: As in `HttpClient`; what comes over the broker is counted there.

    Raises:
        ValueError: ``url`` is malformed, or a file of ``tls`` cannot be used.
    """
    if url.startswith(("mqtt:", "mqtts:")):
        return MqttWay(parse_mqtt_url(url), Pull(check))
    return HttpWay(HttpClient(url, tls, on_bytes, check), f"/v1/{federation}")


class HttpWay:
    """Enrollment and files over HTTP."""

    def __init__(self, http: HttpClient, root: str) -> None:
        self._http = http
        self._root = root

    def enroll(
        self, token: str, device: str, modalities: Collection[str], key: str = ""
    ) -> Identity:
        """See `Way.enroll`."""
        self._http.use_token(token)
        body = {"device": device, "modalities": sorted(modalities)}
        try:
            headers = {"Idempotency-Key": key} if key else {}
            return read(Identity, self._http.post_json(f"{self._root}/enroll", body, headers))
        except ValueError as error:
            raise TransportError(f"the server's enrollment reply is malformed: {error}") from error

    def log_in(self, identity: Identity) -> None:
        """See `Way.log_in`."""
        self._http.use_login(identity.device, identity.password)

    def add_modalities(self, modalities: Collection[str]) -> None:
        """See `Way.add_modalities`."""
        self._http.post_json(f"{self._root}/modalities", {"modalities": sorted(modalities)})

    def get_session(self) -> Session:
        """See `Way.get_session`.

        Raises:
            TransportError: Also where the server itself has TLS and its broker has not: the
                password that was kept secret so far would cross the network in the clear.
        """
        try:
            session = read(Session, self._http.get_json(f"{self._root}/session"))
        except ValueError as error:
            raise TransportError(f"the server's session reply is malformed: {error}") from error
        if self._http.is_tls and not session.mqtt_is_tls and not is_loopback(session.mqtt_host):
            raise TransportError(
                f"the server has TLS, and its broker at {session.mqtt_host}:{session.mqtt_port} "
                "none: no password is sent there; give the broker TLS (mqtts://), too"
            )
        return session

    def attach(self, send: Callable[[wire.Fetch], None]) -> None:
        """See `Way.attach`: it has no need of it."""

    def receive(self, message: wire.Part | wire.Declined) -> None:
        """See `Way.receive`: it has asked for none."""

    def reconnected(self) -> None:
        """See `Way.reconnected`: no file comes over it."""

    def get_changed(self, path: str, max_bytes: int, sha256: str) -> bytes | None:
        """See `Source.get_changed`."""
        return self._http.get_changed(f"{self._root}/{path}", max_bytes, sha256)

    def stream(
        self, path: str, sha256: str, start: int, num_bytes: int
    ) -> Generator[tuple[int, bytes], None, None]:
        """See `Source.stream`."""
        return self._http.stream(f"{self._root}/{path}", sha256, start, num_bytes)


class MqttWay:
    """Files over MQTT; the device has been enrolled by somebody else."""

    def __init__(self, session: Session, pull: Pull) -> None:
        self._session = session
        self.attach, self.receive = pull.attach, pull.receive
        self.reconnected = pull.reconnected
        self.get_changed, self.stream = pull.get_changed, pull.stream

    def enroll(
        self, token: str, device: str, modalities: Collection[str], key: str = ""
    ) -> Identity:
        """See `Way.enroll`.

        Raises:
            EnrollError: Over MQTT nobody can.
        """
        raise EnrollError(
            "a device with MQTT alone cannot enroll itself: give identity=FILE, which "
            "python -m server enroll DEVICE writes"
        )

    def log_in(self, identity: Identity) -> None:
        """See `Way.log_in`: the connection to the broker does."""

    def add_modalities(self, modalities: Collection[str]) -> None:
        """See `Way.add_modalities`: of others than it was enrolled with, no file comes."""

    def get_session(self) -> Session:
        """See `Way.get_session`."""
        return self._session


def parse_mqtt_url(url: str) -> Session:
    """Reads ``mqtt(s)://host[:port]``; the ports are 1883 and 8883 where there is none.

    Raises:
        ValueError: It is of another form.
    """
    parts = urllib.parse.urlsplit(url)
    try:
        port = PORTS.get(parts.scheme, 0) if parts.port is None else parts.port
    except ValueError:
        port = 0
    is_bare = not (parts.path.strip("/") or parts.query or parts.fragment or "@" in parts.netloc)
    if not parts.hostname or not port or not is_bare:
        found = url.rpartition("@")[2]  # never a password in a message
        raise ValueError(f"found the broker URL {found!r}, expected mqtt(s)://host:port")
    return Session(parts.hostname, port, parts.scheme == "mqtts")
