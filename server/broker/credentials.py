"""Device logins of the embedded broker, kept as salted hashes in one JSON file."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
from dataclasses import asdict, dataclass
from pathlib import Path

from .broker import BrokerError


@dataclass(frozen=True, slots=True)
class Credential:
    """A salted SHA-256 of a password, in hex.

    One fast hash is enough because every password is a random 256-bit token: there is no
    dictionary to try.

    Attributes:
        federation: Whose device it is; empty: of the broker's first, or only one.
    """

    salt: str
    sha256: str
    federation: str = ""

    def admits(self, password: str) -> bool:
        """Whether ``password`` is the one; takes the same time either way."""
        return hmac.compare_digest(_digest(self.salt, password), self.sha256)


def make_credential(password: str, federation: str = "") -> Credential:
    """Hash a password under a fresh salt."""
    salt = secrets.token_hex(16)
    return Credential(salt, _digest(salt, password), federation)


def _digest(salt: str, password: str) -> str:
    return hashlib.sha256(bytes.fromhex(salt) + password.encode("utf-8", "replace")).hexdigest()


def load_credentials(path: Path) -> dict[str, Credential]:
    """Read the credentials by device; none if the file does not exist yet.

    Raises:
        BrokerError: The file cannot be read or is no credential file.
    """
    try:
        devices = json.loads(path.read_text("utf-8"))["devices"]
        return {device: Credential(**fields) for device, fields in devices.items()}
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise BrokerError(f"cannot read the broker's credentials: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BrokerError(
            f"{path} holds no broker credentials ({error!r}); restore it, or remove it and "
            "enroll all devices again"
        ) from error


def save_credentials(path: Path, credentials: dict[str, Credential]) -> None:
    """Replace the file atomically and durably; only the owner may read it.

    Raises:
        BrokerError: The disk refused.
    """
    text = json.dumps({"devices": {name: asdict(one) for name, one in credentials.items()}})
    fresh = path.with_suffix(".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh.unlink(missing_ok=True)
        with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
        _fsync_directory(path.parent)
    except OSError as error:
        raise BrokerError(f"cannot save the broker's credentials: {error}") from error


def _fsync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
