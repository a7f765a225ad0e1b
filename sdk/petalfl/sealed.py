"""Files that vouch for themselves: checksum, format number and, with a key, encryption.

A file is ``petalfl`` and a line feed, the sha256 of all that follows, the format number (2 bytes,
big-endian), the key's mark (16 bytes; zeros: not encrypted) and the body. An encrypted body is a
fresh nonce (12 bytes) and AES-256-GCM of the body; the header and the file's name are its
associated data. Up to the format number this stays as it is in every format to come; format 1
had no header at all.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
from collections.abc import Callable, Mapping

from petalfl.errors import StoreError

FORMAT = 2
KEY_BYTES = 32
HEADER_BYTES = 58
MAX_BODY_BYTES = (1 << 31) - 1  # what one AES-GCM call takes
_MAGIC = b"petalfl\n"
_DIGEST_END = len(_MAGIC) + 32
_FORMAT_END = _DIGEST_END + 2
_NO_MARK = bytes(16)
_NONCE_BYTES = 12
STREAM_NONCE_BYTES = 16


class DamagedError(Exception):
    """Bytes that are not those once written."""


class Seal:
    """Wraps and unwraps the files of one store.

    Args:
        key: 32 random bytes to encrypt with; None keeps the bodies readable.

    Raises:
        ValueError: ``key`` is not 32 bytes.
        StoreError: `cryptography` is not installed.
    """

    def __init__(self, key: bytes | None = None) -> None:
        self._mark = _NO_MARK
        if key is None:
            return
        if not isinstance(key, bytes) or len(key) != KEY_BYTES:
            found = f"{len(key)} bytes" if isinstance(key, bytes) else type(key).__name__
            raise ValueError(f"the store's key is {found}, expected {KEY_BYTES} random bytes")
        try:
            from cryptography.hazmat.primitives.ciphers.aead import AESGCM
        except ImportError as error:
            raise StoreError(
                "to encrypt the device store takes cryptography: pip install petalfl[encryption]"
            ) from error
        self._mark = _derive(key, b"mark")[: len(_NO_MARK)]
        self._cipher = AESGCM(_derive(key, b"cipher"))
        self._stream_key = _derive(key, b"stream")

    @property
    def has_key(self) -> bool:
        """Whether it encrypts."""
        return self._mark != _NO_MARK

    def wrap(self, name: str, body: bytes) -> bytes:
        """The file ``name`` that holds ``body``, in today's format.

        Raises:
            StoreError: ``body`` is longer than `MAX_BODY_BYTES`.
        """
        if len(body) > MAX_BODY_BYTES:
            raise StoreError(f"{name} would hold {len(body)} bytes, at most {MAX_BODY_BYTES} fit")
        rest = FORMAT.to_bytes(2, "big") + self._mark
        if self.has_key:
            nonce = os.urandom(_NONCE_BYTES)
            body = nonce + self._cipher.encrypt(nonce, body, rest + name.encode())
        rest += body
        return _MAGIC + hashlib.sha256(rest).digest() + rest

    def unwrap(self, name: str, data: bytes) -> bytes:
        """The body in today's format, of a file of any format, encrypted or not.

        Raises:
            DamagedError: The file is not as it was written, or not under this name.
            StoreError: It is of a format to come, or encrypted with another key than this.
        """
        if not data.startswith(_MAGIC):
            return _migrate(name, 1, data)
        if hashlib.sha256(data[_DIGEST_END:]).digest() != data[len(_MAGIC) : _DIGEST_END]:
            raise DamagedError("its checksum is wrong")
        number = int.from_bytes(data[_DIGEST_END:_FORMAT_END], "big")
        if number > FORMAT:
            raise StoreError(
                f"{name} is of format {number}, this petalfl knows {FORMAT} at most; update petalfl"
            )
        mark, body = data[_FORMAT_END:HEADER_BYTES], data[HEADER_BYTES:]
        if mark != _NO_MARK:
            body = self._decrypt(name, data[_DIGEST_END:HEADER_BYTES], body)
        return _migrate(name, number, body)

    def is_of(self, header: bytes) -> bool:
        """Whether a file that begins so was wrapped by a seal like this, unless it is damaged."""
        rest = FORMAT.to_bytes(2, "big") + self._mark
        return header.startswith(_MAGIC) and header[_DIGEST_END:HEADER_BYTES] == rest

    def crypt(self, nonce: bytes, offset: int, data: bytes) -> bytes:
        """Encrypts part of a stream, or decrypts it; without a key, ``data`` itself.

        AES-256-CTR under a key of its own: it hides, and somebody else must vouch for the bytes.

        Args:
            nonce: `STREAM_NONCE_BYTES` drawn for this stream.
            offset: Of ``data`` in the stream, in bytes.
        """
        if not self.has_key:
            return data
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

        block, skipped = divmod(offset, 16)
        counter = (int.from_bytes(nonce, "big") + block) % (1 << 128)
        mode = modes.CTR(counter.to_bytes(16, "big"))
        stream = Cipher(algorithms.AES(self._stream_key), mode).encryptor()
        stream.update(bytes(skipped))
        return bytes(stream.update(data))

    def _decrypt(self, name: str, header: bytes, body: bytes) -> bytes:
        from cryptography.exceptions import InvalidTag

        if not self.has_key:
            raise StoreError(f"{name} is encrypted; open the device store with its key")
        if not header.endswith(self._mark):
            raise StoreError(
                f"the key is not the one with which {name} was encrypted; open the device store "
                f"with that one"
            )
        nonce, body = body[:_NONCE_BYTES], body[_NONCE_BYTES:]
        try:
            return self._cipher.decrypt(nonce, body, header + name.encode())
        except (InvalidTag, ValueError) as error:
            raise DamagedError("it was not encrypted under this name") from error


def _derive(key: bytes, purpose: bytes) -> bytes:
    return hmac.digest(key, b"petalfl device store: " + purpose, "sha256")


def _from_1(name: str, data: bytes) -> bytes:
    """Format 1: the identity was JSON that held its own checksum, the others began with theirs."""
    if not name.endswith(".json"):
        if hashlib.sha256(data[32:]).digest() != data[:32]:
            raise DamagedError("its checksum is wrong")
        return data[32:]
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DamagedError(str(error)) from error
    if not isinstance(value, dict) or value.keys() != {"identity", "sha256"}:
        raise DamagedError("it has other fields than identity and sha256")
    body = json.dumps(value["identity"], sort_keys=True).encode()
    if hashlib.sha256(body).hexdigest() != value["sha256"]:
        raise DamagedError("its checksum is wrong")
    return body


# From each older format to the one after it.
MIGRATIONS: Mapping[int, Callable[[str, bytes], bytes]] = {1: _from_1}


def _migrate(name: str, number: int, body: bytes) -> bytes:
    for step in range(number, FORMAT):
        if step not in MIGRATIONS:
            raise DamagedError(f"there is no format {step}")
        body = MIGRATIONS[step](name, body)
    return body
