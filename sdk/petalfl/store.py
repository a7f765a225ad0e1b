"""The device store: what a device must not lose, in one folder of the app's.

``identity.json`` says who the device is, ``state.msgpack`` holds its private blocks, the
outbox of what has no receipt yet and the residuals of lossy codecs, ``shared.msgpack`` the newest
shared blocks, ``fine-tuned.msgpack`` what fine-tuning after the last round has made of both,
``artifacts/`` the model's files. State and outbox are one file, so that after a
crash a round has either been trained and its updates wait in the outbox, or it has not been
trained at all. Of each of the three the good one before it stays, as ``.previous``, and takes over
when the newest is damaged; docs/device_store.md says what follows.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgpack

from petalfl.errors import ModelError, StoreError
from petalfl.files import sha256_of, write_atomic
from petalfl.model import MANIFEST_NAME, MAX_BLOCK_SIZE, Block, ModelManifest
from petalfl.partials import Partials
from petalfl.schema import Limit, Name, Pattern, Sha256, plain, read
from petalfl.sealed import HEADER_BYTES, DamagedError, Seal

log = logging.getLogger("petalfl.store")
# What to do when both copies are damaged, by name; shared blocks can be downloaded again.
_WAY_OUT = {
    "identity.json": "restore the folder, or delete it and enroll as another device",
    "state.msgpack": "restore both or delete both; then the private blocks begin anew",
    "shared.msgpack": "",
}
_TensorName = Annotated[str, Limit(3, 64 + 1 + 256)]  # BLOCK/TENSOR
MAX_ASIDE = 8  # states of other models that are kept
_ENROLLMENT = "enrollment.json"
_FINE_TUNED = "fine-tuned.msgpack"  # there is one alone: it can be made again
_ROOM_BYTES = 4096
_VectorBytes = Annotated[bytes, Limit(0, 4 * MAX_BLOCK_SIZE)]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Enrollment:
    """One that is under way: its answer may be lost, and is asked for again."""

    device: Name
    key: Annotated[str, Pattern("[A-Za-z0-9_-]{22,128}")]


@dataclass(frozen=True, slots=True)
class Identity:
    """What enrollment gave this device; ``password`` opens HTTP and MQTT.

    Attributes:
        private_tensors: Of the blocks that are not private as a whole, see
            `petalfl.private_tensors`.
    """

    federation: Name
    device: Name
    password: Annotated[str, Pattern(r"[!-~]{16,256}")]
    private_blocks: Annotated[tuple[Name, ...], Limit(0, 128)]
    private_tensors: Annotated[tuple[_TensorName, ...], Limit(0, 4096)] = ()

    def shares(self, block: Block) -> bool:
        """Whether the block's deltas may leave this device; a personal head's never do."""
        is_own = block.is_frozen or block.is_personal
        return not is_own and block.name not in self.private_blocks


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
        private_tensors: By ``BLOCK/TENSOR`` of a shared block: the device's own values.
        layout: `petalfl.model.ModelManifest.layout_sha256` of the model that it is of; "" in a
            store from before this was kept.
        controls: By shared block: its control variate, as the server knows it.
        next_controls: What it becomes when the block's update in the outbox is accepted.
    """

    round_num: Annotated[int, Limit(0, 1 << 40)] = 0
    private: Annotated[dict[Name, _VectorBytes], Limit(0, 128)] = field(default_factory=dict)
    outbox: Annotated[tuple[Outgoing, ...], Limit(0, 256)] = ()
    residuals: Annotated[dict[Name, Residual], Limit(0, 128)] = field(default_factory=dict)
    private_tensors: Annotated[dict[_TensorName, _VectorBytes], Limit(0, 4096)] = field(
        default_factory=dict
    )
    layout: Annotated[str, Limit(0, 64)] = ""
    controls: Annotated[dict[Name, _VectorBytes], Limit(0, 128)] = field(default_factory=dict)
    next_controls: Annotated[dict[Name, _VectorBytes], Limit(0, 128)] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Shared:
    """Shared blocks as last downloaded: version and float32 vector by name."""

    versions: Annotated[dict[Name, int], Limit(0, 128)]
    vectors: Annotated[dict[Name, _VectorBytes], Limit(0, 128)]


@dataclass(frozen=True, slots=True)
class FineTuned:
    """The blocks of the device's own model, see `petalfl.fine_tuning`.

    Attributes:
        origin: The sha256 of what asked for it.
        round_num: Of the state that it was made from: it is of no other.
        layout: As in `State`.
    """

    origin: Sha256
    round_num: Annotated[int, Limit(0, 1 << 40)]
    layout: Annotated[str, Limit(0, 64)]
    vectors: Annotated[dict[Name, _VectorBytes], Limit(1, 128)]

    def is_of(self, state: State) -> bool:
        """Whether it was made from this state."""
        return (self.round_num, self.layout) == (state.round_num, state.layout)


class DeviceStore:
    """Opens the folder for this process alone; a second opening is refused.

    Files of older formats are rewritten in today's, with a key encrypted ones in place of plain
    ones, and what a crash or an older model left behind is removed.

    Args:
        key: 32 random bytes that the app keeps; encrypts identity, state, shared and fine-tuned
            blocks.

    Attributes:
        artifact_downloads: Files of the model that are on their way.
        block_downloads: Versions of shared blocks that are; with a key, encrypted.

    Raises:
        StoreError: Another process has it open, it cannot be written, it is of a newer petalfl,
            ``key`` is not its key, or both copies of a file are damaged.
        ValueError: ``key`` is not 32 bytes.
    """

    def __init__(self, folder: Path, key: bytes | None = None) -> None:
        self.folder = folder
        self.artifacts = folder / "artifacts"
        self._seal = Seal(key)
        self.artifact_downloads = Partials(folder / "downloads" / "artifacts", Seal())
        self.block_downloads = Partials(self._block_folder(self._seal.has_key), self._seal)
        self._sound: set[str] = set()  # whose newest this process has read or written
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
        try:
            for name in (*_WAY_OUT, _FINE_TUNED, *self._names_aside()):
                self._bring_up_to_date(name)
            if self._seal.has_key:
                Partials(self._block_folder(False), Seal()).keep_only(())
            self._remove_leftovers()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Lets another process open the folder."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def read_identity(self) -> Identity | None:
        """Who this device is; None before its first enrollment."""
        return self._read_kept("identity.json", Identity)

    def write_identity(self, identity: Identity) -> None:
        """Keeps the credential; the file is readable by its owner alone."""
        self._write_kept("identity.json", identity)
        with _writing(self.folder / _ENROLLMENT):
            (self.folder / _ENROLLMENT).unlink(missing_ok=True)

    def enrollment_key(self, device: str) -> str:
        """A secret to enroll under that name with: the same until there is an identity."""
        kept = self._read_kept(_ENROLLMENT, Enrollment)
        if kept is None or kept.device != device:
            kept = Enrollment(device, secrets.token_urlsafe(32))
            self._write(_ENROLLMENT, _encode(_ENROLLMENT, plain(kept)), None)
        return kept.key

    def read_state(self) -> State:
        """The state; an empty one before the first round."""
        return self._read_kept("state.msgpack", State) or State()

    def write_state(self, state: State) -> None:
        """Replaces private blocks and outbox as one."""
        self._write_kept("state.msgpack", state)

    def set_aside(self, state: State) -> Path:
        """Keeps the private blocks of a model that the server has no longer; returns where.

        Of `MAX_ASIDE` models at most: then those that were set aside first are deleted.
        """
        name = _aside(state.layout)
        path = self.folder / name
        with _writing(path):
            path.parent.mkdir(exist_ok=True)
        self._write(name, _encode(name, plain(replace(state, outbox=()))), None)
        with _writing(path):
            kept = sorted(path.parent.glob("*.msgpack"), key=lambda one: one.stat().st_mtime)
            kept.remove(path)  # the newest, whatever the clock says
            for oldest in kept[: max(0, len(kept) + 1 - MAX_ASIDE)]:
                oldest.unlink()
        return path

    def take_up(self, layout: str) -> State | None:
        """What was set aside of a model, if anything; it stays there."""
        return self._read_kept(_aside(layout), State)

    def check_room(self) -> None:
        """Raises `StoreError` where the disk has no room for what must not be lost."""
        path = self.folder / "identity.json.tmp"
        with _writing(path):
            try:
                path.write_bytes(bytes(_ROOM_BYTES))
            finally:
                path.unlink(missing_ok=True)

    def read_shared(self) -> Shared:
        """The shared blocks; none before the first download, or when they are lost."""
        return self._read_kept("shared.msgpack", Shared) or Shared({}, {})

    def write_shared(self, shared: Shared) -> None:
        """Replaces the shared blocks."""
        self._write_kept("shared.msgpack", shared)

    def read_fine_tuned(self) -> FineTuned | None:
        """What fine-tuning has made; None where there is nothing, or it is lost."""
        return self._read_kept(_FINE_TUNED, FineTuned)

    def write_fine_tuned(self, fine_tuned: FineTuned) -> None:
        """Replaces what fine-tuning has made."""
        self._write(_FINE_TUNED, _encode(_FINE_TUNED, plain(fine_tuned)), None)

    def drop_fine_tuned(self) -> None:
        """Removes what fine-tuning has made, if anything."""
        with _writing(self.folder / _FINE_TUNED):
            (self.folder / _FINE_TUNED).unlink(missing_ok=True)

    def read_file(self, path: str) -> bytes | None:
        """An artifact's bytes, None when it is not there."""
        try:
            return _read(self.artifacts / path)
        except OSError as error:
            raise StoreError(f"cannot read {self.artifacts / path}: {error}") from error

    def file_sha256(self, path: str) -> str | None:
        """An artifact's digest, None when it is not there."""
        try:
            return sha256_of(self.artifacts / path)
        except OSError as error:
            raise StoreError(f"cannot read {self.artifacts / path}: {error}") from error

    def write_file(self, path: str, data: bytes) -> None:
        """Keeps an artifact; ``path`` was checked when the manifest was read."""
        folder = (self.artifacts / path).parent
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise StoreError(f"cannot make {folder}: {error}") from error
        with _writing(self.artifacts / path):
            write_atomic(self.artifacts / path, data)

    def _read_kept(self, name: str, cls: type[T]) -> T | None:
        body = self._load(name)
        if body is None:
            return None
        try:
            return read(cls, _decode(name, body))
        except ValueError as error:
            raise StoreError(
                f"{self.folder / name} is not readable by this version: {error}"
            ) from error

    def _write_kept(self, name: str, value: Any) -> None:
        body = _encode(name, plain(value))
        if name not in self._sound:
            self._load(name)  # what is damaged must not become the good one before
        self._write(name, body, self._previous(name))

    def _write(self, name: str, body: bytes, previous: Path | None) -> None:
        path = self.folder / name
        data = self._seal.wrap(name, body)
        with _writing(path):
            write_atomic(path, data, previous=previous)
        self._sound.add(name)

    def _load(self, name: str) -> bytes | None:
        """The newest copy's body; one that is damaged gives way to the one before."""
        path, previous = self.folder / name, self._previous(name)
        self._sound.discard(name)
        newest = self._unwrap(name, path)
        if isinstance(newest, bytes):
            self._sound.add(name)
            return newest
        before = self._unwrap(name, previous)
        if newest is None and before is None:
            return None
        fault = f"{path} is {'missing' if newest is None else f'damaged: {newest}'}"
        if not isinstance(before, bytes) and _WAY_OUT.get(name):
            fate = "missing" if before is None else f"damaged: {before}"
            raise StoreError(f"{fault}; {previous.name} is {fate}; {_WAY_OUT[name]}")
        with _writing(path):
            if newest is not None:
                path.replace(self._damaged(name))
            if isinstance(before, bytes):
                previous.replace(path)
            else:
                previous.unlink(missing_ok=True)
        if not isinstance(before, bytes):
            is_lost = name not in _WAY_OUT
            log.warning("%s; it is %s", fault, "lost" if is_lost else "downloaded again")
            return None
        log.warning("%s; going on with the one before", fault)
        self._sound.add(name)
        return before

    def _unwrap(self, name: str, path: Path) -> bytes | DamagedError | None:
        try:
            data = _read(path)
            return None if data is None else self._seal.unwrap(name, data)
        except DamagedError as error:
            return error
        except OSError as error:
            if error.errno == errno.EIO:  # how flash memory fails
                return DamagedError(str(error))
            raise StoreError(f"cannot read {path}: {error}") from error

    def _bring_up_to_date(self, name: str) -> None:
        """Leaves no copy of an older format, and with a key none that is not encrypted."""
        path, previous, damaged = self.folder / name, self._previous(name), self._damaged(name)
        copies = (path, previous, *([damaged] if self._seal.has_key else []))
        try:
            headers = [_read(copy, HEADER_BYTES) for copy in copies]
        except OSError:
            headers = [b""]  # reading it whole says more
        if all(header is None or self._seal.is_of(header) for header in headers):
            return
        body = self._load(name)
        if body is not None:
            self._write(name, body, None if self._seal.has_key else previous)
        if self._seal.has_key:
            with _writing(path):
                previous.unlink(missing_ok=True)
                damaged.unlink(missing_ok=True)

    def _remove_leftovers(self) -> None:
        """Removes half-written files, and artifacts that the manifest no longer names."""
        try:
            manifest = ModelManifest.from_json(_read(self.artifacts / MANIFEST_NAME) or b"")
            named = {MANIFEST_NAME, *_paths(manifest)}
        except (ModelError, OSError):
            named = None  # the first download was cut off: what is there is of use
        with _writing(self.folder):
            for name in (*_WAY_OUT, _FINE_TUNED):
                (self.folder / f"{name}.tmp").unlink(missing_ok=True)
            for path in self.folder.glob("aside/*.tmp"):
                path.unlink()
            for path in self.artifacts.rglob("*"):
                is_of_use = (
                    path.suffix != ".tmp"
                    if named is None
                    else (path.relative_to(self.artifacts).as_posix() in named)
                )
                if not is_of_use and path.is_file():
                    path.unlink()

    def _block_folder(self, is_encrypted: bool) -> Path:
        return self.folder / "downloads" / ("blocks-encrypted" if is_encrypted else "blocks")

    def _names_aside(self) -> list[str]:
        return [f"aside/{path.name}" for path in self.folder.glob("aside/*.msgpack")]

    def _previous(self, name: str) -> Path:
        return self.folder / f"{name}.previous"

    def _damaged(self, name: str) -> Path:
        return self.folder / f"{name}.damaged"


def _aside(layout: str) -> str:
    return f"aside/{layout[:32] or 'unknown'}.msgpack"


def _paths(manifest: ModelManifest) -> Iterator[str]:
    for artifact in manifest.optimizers.values():
        yield artifact.path
    for block in manifest.blocks:
        for artifact in (*block.artifacts.graphs, block.artifacts.parameters):
            yield artifact.path


def _encode(name: str, value: Any) -> bytes:
    if name.endswith(".json"):
        return json.dumps(value, sort_keys=True).encode()
    data: bytes = msgpack.packb(value)
    return data


def _decode(name: str, body: bytes) -> Any:
    if name.endswith(".json"):
        return json.loads(body)
    return msgpack.unpackb(body, max_bin_len=4 * MAX_BLOCK_SIZE)


def _read(path: Path, num_bytes: int = -1) -> bytes | None:
    try:
        with path.open("rb") as file:
            return file.read(num_bytes)
    except FileNotFoundError:
        return None


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error}") from error
