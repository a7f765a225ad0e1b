"""Downloads under way: what has come so far is on disk, so that a break or a crash costs little.

A download lies in a file named by the sha256 that it must have in the end. Nothing in it counts
before the whole has that digest, so it needs neither fsync nor checksums.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Collection, Iterator
from pathlib import Path

from petalfl.errors import StoreError
from petalfl.files import PIECE_BYTES, sync_folder
from petalfl.sealed import STREAM_NONCE_BYTES, Seal


class Partials:
    """The downloads in one folder; a name each, so there are never two of one file.

    Args:
        seal: With a key, what comes is encrypted on its way to disk.
    """

    def __init__(self, folder: Path, seal: Seal) -> None:
        self._folder = folder
        self._seal = seal

    def open(self, sha256: str) -> Partial:
        """The download of the file with this digest, as far as it has come.

        Raises:
            StoreError: The disk refuses.
        """
        path = self._folder / sha256
        with _writing(path):
            self._folder.mkdir(parents=True, exist_ok=True)
            return Partial(path, self._seal)

    def keep_only(self, digests: Collection[str]) -> int:
        """Removes every other download; returns the bytes that stay.

        Raises:
            StoreError: The disk refuses.
        """
        num_bytes = 0
        with _writing(self._folder):
            if self._folder.is_dir():
                for path in self._folder.iterdir():
                    if path.name in digests:
                        num_bytes += path.stat().st_size
                    else:
                        path.unlink()
        return num_bytes


class Partial:
    """A download as far as it has come; a context manager that closes its file."""

    def __init__(self, path: Path, seal: Seal) -> None:
        self.path = path
        self._seal = seal
        self._file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+b", buffering=0)
        self._head = STREAM_NONCE_BYTES if seal.has_key else 0
        self._nonce = self._file.read(self._head)
        self.num_bytes = max(0, self._file.seek(0, os.SEEK_END) - self._head)
        if len(self._nonce) < self._head:
            self.discard()

    def __enter__(self) -> Partial:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file; what is in it stays."""
        self._file.close()

    def write(self, offset: int, data: bytes) -> None:
        """Puts ``data`` at ``offset``, which is where it ends or before; it ends there from now on.

        Raises:
            StoreError: The disk refuses.
            ValueError: ``offset`` is beyond the end.
        """
        if not 0 <= offset <= self.num_bytes:
            raise ValueError(f"bytes at {offset} of a download that ends at {self.num_bytes}")
        with _writing(self.path):
            if offset < self.num_bytes:
                self._file.truncate(self._head + offset)
                self.num_bytes = offset
            data = self._seal.crypt(self._nonce, offset, data)
            self._file.seek(self._head + offset)
            while data:  # the disk may take it in parts
                data = data[self._file.write(data) :]
            self.num_bytes = self._file.tell() - self._head

    def pieces(self) -> Iterator[bytes]:
        """All that is there, in order.

        Raises:
            StoreError: The disk refuses.
        """
        with _writing(self.path):
            for offset in range(0, self.num_bytes, PIECE_BYTES):
                self._file.seek(self._head + offset)
                data = self._file.read(min(PIECE_BYTES, self.num_bytes - offset))
                yield self._seal.crypt(self._nonce, offset, data)

    def read(self) -> memoryview:
        """All that is there, as one; there is no second copy of it meanwhile."""
        data, offset = memoryview(bytearray(self.num_bytes)), 0
        for piece in self.pieces():
            data[offset : offset + len(piece)] = piece
            offset += len(piece)
        return data

    def sha256(self) -> str:
        """The digest of what is there."""
        digest = hashlib.sha256()
        for piece in self.pieces():
            digest.update(piece)
        return digest.hexdigest()

    def discard(self) -> None:
        """Begins anew.

        Raises:
            StoreError: The disk refuses.
        """
        with _writing(self.path):
            self._file.truncate(0)
            self._file.seek(0)
            self._nonce = os.urandom(self._head)  # no bytes are encrypted twice alike
            self._file.write(self._nonce)
            self.num_bytes = 0

    def move_to(self, path: Path) -> None:
        """Makes it the file ``path``, whole or not at all; it must not be encrypted.

        Raises:
            StoreError: The disk refuses.
        """
        with _writing(path):
            path.parent.mkdir(exist_ok=True)
            os.fsync(self._file.fileno())
            self.path.replace(path)
            sync_folder(path.parent)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error}") from error
