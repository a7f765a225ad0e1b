"""An identity that ships with the app, for a device that cannot enroll itself."""

from __future__ import annotations

import json
import os
from pathlib import Path

from petalfl.errors import StoreError
from petalfl.schema import plain, read
from petalfl.store import DeviceStore, Identity

MAX_FILE_BYTES = 64 << 10


def write_identity_file(path: Path, identity: Identity) -> None:
    """Writes a new file that its owner alone can read.

    Raises:
        ValueError: The file is there already, or cannot be written.
    """
    data = json.dumps(plain(identity), indent=1).encode() + b"\n"
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}") from error


def read_identity_file(path: Path) -> Identity:
    """The inverse of `write_identity_file`.

    Raises:
        ValueError: There is no such file, or it holds something else.
    """
    try:
        with path.open("rb") as file:
            return read(Identity, json.loads(file.read(MAX_FILE_BYTES)))
    except OSError as error:
        raise ValueError(f"no identity in {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"no identity in {path}, expected what python -m server enroll writes: {error}"
        ) from error


def take_identity(store: DeviceStore, path: Path) -> Identity:
    """Makes a store that of the device in a file, unless it is that already.

    A new password of the same device replaces the old one.

    Raises:
        ValueError: The file is no identity.
        StoreError: The store is another device's.
    """
    identity, known = read_identity_file(path), store.read_identity()
    if known is not None:
        found, given = (f"{one.device} of {one.federation}" for one in (known, identity))
        if found != given:
            raise StoreError(f"the store {store.folder} is that of {found}, {path} is of {given}")
    if known != identity:
        store.write_identity(identity)
    return identity
