from __future__ import annotations

import builtins
import hashlib
import json
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from petalfl import sealed
from petalfl.errors import StoreError
from petalfl.sealed import FORMAT, HEADER_BYTES, MIGRATIONS, DamagedError, Seal

KEY, OTHER_KEY = bytes(range(32)), bytes(range(1, 33))
NAME = "state.msgpack"
KEYS = st.none() | st.binary(min_size=32, max_size=32)


@given(st.binary(max_size=500), KEYS)
def test_round_trip(body: bytes, key: bytes | None) -> None:
    data = Seal(key).wrap(NAME, body)
    assert Seal(key).unwrap(NAME, data) == body
    assert Seal(key).is_of(data[:HEADER_BYTES])


@given(st.binary(max_size=200), KEYS)
def test_any_bytes_are_damaged(data: bytes, key: bytes | None) -> None:
    for name in (NAME, "identity.json"):
        with pytest.raises(DamagedError):
            Seal(key).unwrap(name, data)


def test_bytes_by_hand() -> None:
    rest = b"\0\2" + bytes(16) + b"body"
    assert Seal().wrap(NAME, b"body") == b"petalfl\n" + hashlib.sha256(rest).digest() + rest


@pytest.mark.parametrize("key", [None, KEY])
def test_every_truncation_and_every_flipped_bit(key: bytes | None) -> None:
    seal = Seal(key)
    data = seal.wrap(NAME, b"twelve bytes")
    for length in range(len(data)):
        with pytest.raises(DamagedError):
            seal.unwrap(NAME, data[:length])
    for bit in range(8 * len(data)):
        bad = bytearray(data)
        bad[bit // 8] ^= 1 << bit % 8
        with pytest.raises(DamagedError):
            seal.unwrap(NAME, bytes(bad))
    with pytest.raises(DamagedError):
        seal.unwrap(NAME, data + b"\0")


# Encryption


def test_what_is_encrypted_cannot_be_read() -> None:
    body = b"a private block" * 3
    first, second = Seal(KEY).wrap(NAME, body), Seal(KEY).wrap(NAME, body)
    assert b"private" in Seal().wrap(NAME, body)
    assert b"private" not in first
    assert first[HEADER_BYTES:] != second[HEADER_BYTES:]  # a fresh nonce each time
    assert len(first) == HEADER_BYTES + 12 + len(body) + 16
    assert KEY not in first


def test_another_key_is_told_from_damage() -> None:
    data = Seal(KEY).wrap(NAME, b"body")
    with pytest.raises(StoreError, match=r"the key is not the one with which state\.msgpack was"):
        Seal(OTHER_KEY).unwrap(NAME, data)
    with pytest.raises(StoreError, match=r"state\.msgpack is encrypted; open .* with its key"):
        Seal().unwrap(NAME, data)
    with pytest.raises(DamagedError):
        Seal(OTHER_KEY).unwrap(NAME, data[:-1])


def test_files_cannot_be_swapped() -> None:
    with pytest.raises(DamagedError, match="not encrypted under this name"):
        Seal(KEY).unwrap("shared.msgpack", Seal(KEY).wrap(NAME, b"body"))


def test_a_forged_body_is_refused_though_its_checksum_is_right() -> None:
    """A checksum needs no key: against purpose, only the encryption's own tag helps."""
    rest = bytearray(Seal(KEY).wrap(NAME, b"body")[40:])
    rest[-1] ^= 1
    with pytest.raises(DamagedError):
        Seal(KEY).unwrap(NAME, b"petalfl\n" + hashlib.sha256(rest).digest() + rest)
    for cut in (18, 25, 40):  # no nonce, half a nonce, half a tag
        short = bytes(rest[:cut])
        with pytest.raises(DamagedError):
            Seal(KEY).unwrap(NAME, b"petalfl\n" + hashlib.sha256(short).digest() + short)


def test_a_plain_file_is_read_with_a_key_but_is_not_of_it() -> None:
    data = Seal().wrap(NAME, b"body")
    assert Seal(KEY).unwrap(NAME, data) == b"body"
    assert not Seal(KEY).is_of(data)
    assert not Seal().is_of(Seal(KEY).wrap(NAME, b"body"))
    assert not Seal(OTHER_KEY).is_of(Seal(KEY).wrap(NAME, b"body"))


@pytest.mark.parametrize(
    ("key", "found"),
    [(b"", "0 bytes"), (b"x" * 31, "31 bytes"), (b"x" * 33, "33 bytes"), ("x" * 32, "str")],
)
def test_keys_that_are_none(key: Any, found: str) -> None:
    with pytest.raises(ValueError, match=f"the store's key is {found}, expected 32 random bytes"):
        Seal(key)


def test_without_cryptography(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def absent(name: str, *arguments: Any, **named: Any) -> Any:
        if name.startswith("cryptography"):
            raise ImportError(name)
        return real(name, *arguments, **named)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(StoreError, match=r"pip install petalfl\[encryption\]"):
        Seal(KEY)
    assert Seal().unwrap(NAME, Seal().wrap(NAME, b"body")) == b"body"


# Formats


def of_format(number: int, body: bytes) -> bytes:
    rest = number.to_bytes(2, "big") + bytes(16) + body
    return b"petalfl\n" + hashlib.sha256(rest).digest() + rest


def test_a_newer_format_is_refused() -> None:
    with pytest.raises(StoreError, match=r"of format 3, this petalfl knows 2 at most; update"):
        Seal().unwrap(NAME, of_format(FORMAT + 1, b"whatever comes"))


def test_a_format_that_never_was() -> None:
    with pytest.raises(DamagedError, match="there is no format 0"):
        Seal().unwrap(NAME, of_format(0, b""))


def test_every_older_format_has_its_migration() -> None:
    assert sorted(MIGRATIONS) == list(range(1, FORMAT))


def test_migrations_run_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    def one(name: str, data: bytes) -> bytes:
        return data + b"1"

    def two(name: str, data: bytes) -> bytes:
        return data + b"2"

    monkeypatch.setattr(sealed, "FORMAT", 3)
    monkeypatch.setattr(sealed, "MIGRATIONS", {1: one, 2: two})
    assert Seal().unwrap(NAME, b"x") == b"x12"
    assert Seal().unwrap(NAME, of_format(2, b"x")) == b"x2"
    assert Seal().unwrap(NAME, of_format(3, b"x")) == b"x"


def test_format_1() -> None:
    body = msgpack.packb({"round_num": 7})
    assert Seal().unwrap(NAME, hashlib.sha256(body).digest() + body) == body
    identity = {"device": "d", "federation": "f"}
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    data = json.dumps({"identity": identity, "sha256": digest}, indent=1).encode()
    assert json.loads(Seal().unwrap("identity.json", data)) == identity
    assert not Seal().is_of(data)
    with pytest.raises(DamagedError, match="checksum"):
        Seal().unwrap("identity.json", data.replace(b'"d"', b'"e"'))


def test_a_body_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sealed, "MAX_BODY_BYTES", 4)
    assert Seal().unwrap(NAME, Seal().wrap(NAME, b"1234")) == b"1234"
    with pytest.raises(StoreError, match=r"state\.msgpack would hold 5 bytes, at most 4 fit"):
        Seal().wrap(NAME, b"12345")
