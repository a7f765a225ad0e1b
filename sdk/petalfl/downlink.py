"""A device's way down: enrollment, the model's files and block versions, over HTTP or MQTT.

Everything is checked against a digest before it is kept, and what has come of it so far outlives
breaks and crashes. Its methods block: call them on a thread.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Callable, Collection

from petalfl.errors import ModelError, StoreError, TransportError
from petalfl.model import (
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    Artifact,
    Block,
    ModelManifest,
)
from petalfl.partials import Partial, Partials
from petalfl.source import BrokenOffError, NoSuchRangeError
from petalfl.store import DeviceStore, Identity
from petalfl.tls import Tls
from petalfl.vectors import Vector, from_bytes
from petalfl.ways import Session, open_way
from petalfl.wire import BlockVersion

MAX_MODEL_BYTES = 2 << 30  # of all files that a device takes
WORTH_BYTES = 64 << 10  # a break after so many is mended at once


class Downlink:
    """One federation on one server, as one device reaches it.

    Every method raises `EnrollError` where the server does not accept the token or credential,
    `TransportError` where it cannot be reached or sends what it should not, and `StoreError`
    where the disk refuses.

    Args:
        url: As of `EdgeClient`.
        tls: As in `open_way`.
        check: Called between the pieces of a download; what it raises ends that.
        on_bytes: As in `HttpClient`.
    """

    def __init__(
        self,
        url: str,
        federation: str,
        store: DeviceStore,
        tls: Tls | None = None,
        check: Callable[[], None] = lambda: None,
        on_bytes: Callable[[int], None] = lambda num_bytes: None,
    ) -> None:
        self._way = open_way(url, federation, tls, check, on_bytes)
        self.tls = tls
        self._store = store
        self._check = check
        self.attach, self.receive = self._way.attach, self._way.receive
        self.reconnected = self._way.reconnected

    def enroll(self, token: str, device: str, modalities: Collection[str]) -> Identity:
        """Trades the join token for this device's own credential, and keeps that."""
        key = self._store.enrollment_key(device)  # an answer that is lost comes again
        identity = self._way.enroll(token, device, modalities, key)
        self._store.write_identity(identity)
        return identity

    def log_in(self, identity: Identity) -> None:
        """Uses the device's own credential from now on."""
        self._way.log_in(identity)

    def add_modalities(self, modalities: Collection[str]) -> None:
        """Has the server know of modalities that came after enrollment; an error if it cannot."""
        self._way.add_modalities(modalities)

    def get_session(self) -> Session:
        """Says where the broker is."""
        return self._way.get_session()

    def fetch_model(
        self,
        modalities: Collection[str],
        tasks: Collection[str] | None,
        is_shared: Callable[[Block], bool],
    ) -> None:
        """Brings manifest and artifacts of the device's own blocks up to date in the store.

        Args:
            modalities: The device's; empty means all of the model's.
            tasks: Those that it has labels of; None means all.
            is_shared: Of a block: whether it comes as versions; of others the initial values are
                fetched.

        Raises:
            ModelError: The manifest is unusable, has none of the modalities or tasks, or names
                files of more than `MAX_MODEL_BYTES`.
        """
        known = self._store.read_file(MANIFEST_NAME) or b""
        digest = hashlib.sha256(known).hexdigest()
        changed = self._way.get_changed("manifest", MAX_MANIFEST_BYTES, digest)
        data = known if changed is None else changed
        manifest = ModelManifest.from_json(data)
        files = list(manifest.optimizers.values())
        for block in manifest.blocks_for(modalities or manifest.modalities, tasks):
            files.extend(block.artifacts.graphs)
            if not is_shared(block):
                files.append(block.artifacts.parameters)
        self._fetch_artifacts(files)
        if changed is not None:
            self._store.write_file(MANIFEST_NAME, changed)

    def drop_all_but(self, pointers: Collection[BlockVersion]) -> None:
        """Drops what has been downloaded of other block versions than these."""
        self._store.block_downloads.keep_only({pointer.sha256 for pointer in pointers})

    def fetch_block(self, block: Block, pointer: BlockVersion) -> Vector:
        """A version of a shared block; it stays at hand until `drop_all_but` drops it."""
        path, num_bytes = f"blocks/{block.name}/{pointer.version}", 4 * block.size
        downloads = self._store.block_downloads
        with self._fetch(path, pointer.sha256, num_bytes, downloads) as partial:
            data = partial.read()
        try:
            return from_bytes(data, block.size)
        except ValueError as error:
            raise TransportError(f"block {block.name}: {error}") from error

    def _fetch_artifacts(self, files: Collection[Artifact]) -> None:
        wanted = [one for one in files if self._store.file_sha256(one.path) != one.sha256]
        downloads = self._store.artifact_downloads
        there = downloads.keep_only({one.sha256 for one in wanted})
        num_bytes = sum(one.num_bytes for one in wanted)
        self._check_room(num_bytes, num_bytes - there)
        alike: dict[str, list[Artifact]] = {}  # two encoders of one shape have the same graphs
        for one in wanted:
            alike.setdefault(one.sha256, []).append(one)
        for sha256, (one, *_) in alike.items():
            self._fetch(f"artifacts/{one.path}", sha256, one.num_bytes, downloads).close()
        for sha256, (first, *others) in alike.items():
            # All have come: until here, the model before this one is whole.
            with downloads.open(sha256) as partial:
                for other in others:
                    self._store.write_file(other.path, bytes(partial.read()))
                partial.move_to(self._store.artifacts / first.path)

    def _check_room(self, num_bytes: int, num_missing: int) -> None:
        if num_bytes > MAX_MODEL_BYTES:
            raise ModelError(
                f"the model's files have {num_bytes} bytes, a device takes {MAX_MODEL_BYTES}"
            )
        free = shutil.disk_usage(self._store.folder).free
        if num_missing > free:
            raise StoreError(
                f"the model's files have {num_missing} bytes to come, the disk has {free} free"
            )

    def _fetch(self, path: str, sha256: str, num_bytes: int, downloads: Partials) -> Partial:
        """A whole download whose digest is right; one that is wrong is tried once more."""
        for _ in range(2):
            partial = downloads.open(sha256)
            try:
                self._fill(partial, path, sha256, num_bytes)
                if partial.sha256() == sha256:
                    return partial
                partial.discard()
            except NoSuchRangeError:
                partial.discard()
            except BaseException:
                partial.close()
                raise
            partial.close()
        raise TransportError(f"{path} comes with the wrong sha256, expected {sha256[:12]}…")

    def _fill(self, partial: Partial, path: str, sha256: str, num_bytes: int) -> None:
        """Downloads what is missing; a line that breaks, but brings something, is used again."""
        while (start := partial.num_bytes) < num_bytes:
            pieces = self._way.stream(path, sha256, start, num_bytes)
            try:
                with contextlib.closing(pieces):
                    for offset, data in pieces:
                        partial.write(offset, data)
                        self._check()
            except BrokenOffError:
                if partial.num_bytes - start < WORTH_BYTES:
                    raise
