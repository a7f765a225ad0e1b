"""A device's way down: enrollment, the model's files and block versions, over HTTP.

Everything is checked against a digest before it is kept. Its methods block: call them on a
thread.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Collection
from dataclasses import dataclass
from typing import Annotated

from petalfl.errors import TransportError
from petalfl.http import HttpClient
from petalfl.model import (
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    Artifact,
    Block,
    ModelManifest,
    check_artifact,
)
from petalfl.schema import Limit, read
from petalfl.store import DeviceStore, Identity
from petalfl.tls import Tls
from petalfl.vectors import Vector, from_bytes
from petalfl.wire import BlockVersion


@dataclass(frozen=True, slots=True)
class Session:
    """Where the federation's broker is now."""

    mqtt_host: Annotated[str, Limit(1, 256)]
    mqtt_port: Annotated[int, Limit(1, 65535)]
    mqtt_is_tls: bool


class Downlink:
    """One federation on one server, as one device reaches it.

    Args:
        tls: As in `HttpClient`.

    Every method raises `EnrollError` where the server does not accept the token or credential,
    and `TransportError` where it cannot be reached or sends what it should not.
    """

    def __init__(
        self, url: str, federation: str, store: DeviceStore, tls: Tls | None = None
    ) -> None:
        self._http = HttpClient(url, tls)
        self._root = f"/v1/{federation}"
        self._store = store

    def enroll(self, token: str, device: str, modalities: Collection[str]) -> Identity:
        """Trades the join token for this device's own credential, and keeps that."""
        self._http.use_token(token)
        body = {"device": device, "modalities": sorted(modalities)}
        try:
            identity = read(Identity, self._http.post_json(f"{self._root}/enroll", body))
        except ValueError as error:
            raise TransportError(f"the server's enrollment reply is malformed: {error}") from error
        self._store.write_identity(identity)
        return identity

    def log_in(self, identity: Identity) -> None:
        """Uses the device's own credential from now on."""
        self._http.use_login(identity.device, identity.password)

    def add_modalities(self, modalities: Collection[str]) -> None:
        """Has the server know of modalities that came after enrollment; an error if it cannot."""
        self._http.post_json(f"{self._root}/modalities", {"modalities": sorted(modalities)})

    def get_session(self) -> Session:
        """Asks where the broker is.

        Raises:
            TransportError: Also where the server itself has TLS and its broker has not: the
                password that was kept secret so far would cross the network in the clear.
        """
        try:
            session = read(Session, self._http.get_json(f"{self._root}/session"))
        except ValueError as error:
            raise TransportError(f"the server's session reply is malformed: {error}") from error
        if self._http.is_tls and not session.mqtt_is_tls and not _is_loopback(session.mqtt_host):
            raise TransportError(
                f"the server has TLS, and its broker at {session.mqtt_host}:{session.mqtt_port} "
                "none: no password is sent there; give the broker TLS (mqtts://), too"
            )
        return session

    def fetch_model(
        self,
        modalities: Collection[str],
        tasks: Collection[str] | None,
        private_blocks: Collection[str],
    ) -> None:
        """Brings manifest and artifacts of the device's own blocks up to date in the store.

        Args:
            modalities: The device's; empty means all of the model's.
            tasks: Those that it has labels of; None means all.
            private_blocks: Their initial values are fetched too, as those of frozen blocks;
                shared ones come as versions.

        Raises:
            ModelError: The manifest is unusable, or has none of the modalities or tasks.
        """
        data = self._http.get(f"{self._root}/manifest", MAX_MANIFEST_BYTES)
        manifest = ModelManifest.from_json(data)
        files = list(manifest.optimizers.values())
        for block in manifest.blocks_for(modalities or manifest.modalities, tasks):
            files.extend(block.artifacts.graphs)
            if block.is_frozen or block.name in private_blocks:
                files.append(block.artifacts.parameters)
        for artifact in files:
            self._fetch_artifact(artifact)
        self._store.write_file(MANIFEST_NAME, data)

    def fetch_block(self, block: Block, pointer: BlockVersion) -> Vector:
        """A version of a shared block."""
        path = f"{self._root}/blocks/{block.name}/{pointer.version}"
        data = self._http.get(path, 4 * block.size)
        if hashlib.sha256(data).hexdigest() != pointer.sha256:
            raise TransportError(f"block {block.name} version {pointer.version}: wrong sha256")
        try:
            return from_bytes(data, block.size)
        except ValueError as error:
            raise TransportError(f"block {block.name}: {error}") from error

    def _fetch_artifact(self, artifact: Artifact) -> None:
        known = self._store.read_file(artifact.path)
        if known is not None and hashlib.sha256(known).hexdigest() == artifact.sha256:
            return
        data = self._http.get(f"{self._root}/artifacts/{artifact.path}", artifact.num_bytes)
        check_artifact(artifact, data)
        self._store.write_file(artifact.path, data)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
