"""The device store: what a device must not lose, in one folder of the app's.

``identity.json`` says who the device is, ``state.msgpack`` holds its private blocks, the
outbox of what has no receipt yet and the residuals of lossy codecs, ``shared.msgpack`` the newest
shared blocks, ``artifacts/`` the model's files. State and outbox are one file, so that after a
crash a round has either been trained and its updates wait in the outbox, or it has not been
trained at all.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgpack

from petalfl.errors import StoreError
from petalfl.files import write_atomic
from petalfl.model import MAX_BLOCK_SIZE
from petalfl.schema import Limit, Name, plain, read

_DIGEST_BYTES = 32
_VectorBytes = Annotated[bytes, Limit(0, 4 * MAX_BLOCK_SIZE)]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Identity:
    """What enrollment gave this device; ``password`` opens HTTP and MQTT."""

    federation: Name
    device: Name
    password: Annotated[str, Limit(16, 256)]
    private_blocks: Annotated[tuple[Name, ...], Limit(0, 128)]


@dataclass(frozen=True, slots=True)
class Outgoing:
    """One message of the outbox: an encoded `UpdateManifest` with its payload, or a `Report`."""

    message: bytes
    payload: _VectorBytes


@dataclass(frozen=True, slots=True)
class Residual:
    """What a codec left out of a shared block's update; ``base_version`` is that update's."""

    base_version: Annotated[int, Limit(1, 1 << 40)]
    vector: _VectorBytes


@dataclass(frozen=True, slots=True)
class State:
    """The last round trained, what it left private, and what still waits for its receipt.

    Attributes:
        residuals: By shared block, what goes into its next update.
    """

    round_num: Annotated[int, Limit(0, 1 << 40)] = 0
    private: Annotated[dict[Name, _VectorBytes], Limit(0, 128)] = field(default_factory=dict)
    outbox: Annotated[tuple[Outgoing, ...], Limit(0, 256)] = ()
    residuals: Annotated[dict[Name, Residual], Limit(0, 128)] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Shared:
    """Shared blocks as last downloaded: version and float32 vector by name."""

    versions: Annotated[dict[Name, int], Limit(0, 128)]
    vectors: Annotated[dict[Name, _VectorBytes], Limit(0, 128)]


class DeviceStore:
    """Opens the folder for this process alone; a second opening is refused.

    Raises:
        StoreError: Another process has it open, or it cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.artifacts = folder / "artifacts"
        try:
            self.artifacts.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise StoreError(f"cannot open the device store {folder}: {error}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._lock)
            raise StoreError(
                f"the device store {folder} is open already; give every client its own"
            ) from error

    def close(self) -> None:
        """Lets another process open the folder."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def read_identity(self) -> Identity | None:
        """Who this device is; None before its first enrollment."""
        path = self.folder / "identity.json"
        data = self._read(path)
        if data is None:
            return None
        try:
            value = json.loads(data)
            identity = read(Identity, value.pop("identity") if isinstance(value, dict) else value)
        except (KeyError, ValueError) as error:
            raise StoreError(f"{path} is damaged: {error}") from error
        if value != {"sha256": _checksum(identity)}:
            raise StoreError(f"{path} is damaged: its checksum is wrong")
        return identity

    def write_identity(self, identity: Identity) -> None:
        """Keeps the credential; the file is readable by its owner alone."""
        value = {"identity": plain(identity), "sha256": _checksum(identity)}
        self._write("identity.json", json.dumps(value, indent=1).encode())

    def read_state(self) -> State:
        """The state; an empty one before the first round."""
        return self._read_checked("state.msgpack", State) or State()

    def write_state(self, state: State) -> None:
        """Replaces private blocks and outbox as one."""
        self._write_checked("state.msgpack", state)

    def read_shared(self) -> Shared:
        """The shared blocks; none before the first download."""
        return self._read_checked("shared.msgpack", Shared) or Shared({}, {})

    def write_shared(self, shared: Shared) -> None:
        """Replaces the shared blocks."""
        self._write_checked("shared.msgpack", shared)

    def read_file(self, path: str) -> bytes | None:
        """An artifact's bytes, None when it is not there."""
        return self._read(self.artifacts / path)

    def write_file(self, path: str, data: bytes) -> None:
        """Keeps an artifact; ``path`` was checked when the manifest was read."""
        folder = (self.artifacts / path).parent
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise StoreError(f"cannot make {folder}: {error}") from error
        self._write(f"artifacts/{path}", data)

    def _read_checked(self, name: str, cls: type[T]) -> T | None:
        path = self.folder / name
        data = self._read(path)
        if data is None:
            return None
        digest, body = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
        if hashlib.sha256(body).digest() != digest:
            raise StoreError(f"{path} is damaged: its checksum is wrong; restore or delete it")
        try:
            return read(cls, msgpack.unpackb(body, max_bin_len=4 * MAX_BLOCK_SIZE))
        except ValueError as error:
            raise StoreError(f"{path} is not readable by this version: {error}") from error

    def _read(self, path: Path) -> bytes | None:
        try:
            return path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StoreError(f"cannot read {path}: {error}") from error

    def _write_checked(self, name: str, value: Any) -> None:
        body = msgpack.packb(plain(value))
        self._write(name, hashlib.sha256(body).digest() + body)

    def _write(self, name: str, data: bytes) -> None:
        try:
            write_atomic(self.folder / name, data)
        except OSError as error:
            raise StoreError(f"cannot write {self.folder / name}: {error}") from error


def _checksum(identity: Identity) -> str:
    return hashlib.sha256(json.dumps(plain(identity), sort_keys=True).encode()).hexdigest()
