"""What tests of the device store have in common: what it keeps, and what may befall that."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from petalfl.store import DeviceStore, Identity, Outgoing, Residual, Shared, State

IDENTITY = Identity("default", "dev-1", "p" * 43, ("fusion", "head"))
STATE = State(
    7,
    {"head": b"\0\1\2\3" * 5, "fusion": b""},
    (Outgoing(b"m", b"12"), Outgoing(b"", b"")),
    {"encoder-acc": Residual(8, b"\4\5\6\7" * 3)},
)
KEY = bytes(range(100, 132))
SHARED = Shared({"encoder-acc": 8}, {"encoder-acc": bytes(range(40))})


def damaged(data: bytes) -> Iterator[bytes]:
    """Every truncation, and of every byte one flipped bit, each bit in its turn."""
    for length in range(len(data)):
        yield data[:length]
    for index in range(len(data)):
        yield data[:index] + bytes([data[index] ^ (1 << index % 8)]) + data[index + 1 :]


# Name, how to write and to read it, the value before and the newest.
KEPT: list[Any] = [
    (
        "identity.json",
        DeviceStore.write_identity,
        DeviceStore.read_identity,
        replace(IDENTITY, device="dev-0"),
        IDENTITY,
    ),
    ("state.msgpack", DeviceStore.write_state, DeviceStore.read_state, State(6), STATE),
    (
        "shared.msgpack",
        DeviceStore.write_shared,
        DeviceStore.read_shared,
        Shared({"encoder-acc": 7}, {}),
        SHARED,
    ),
]
kept = pytest.mark.parametrize(
    ("name", "write", "read", "before", "newest"), KEPT, ids=["identity", "state", "shared"]
)
keyed = pytest.mark.parametrize("key", [None, KEY], ids=["plain", "encrypted"])


class Copies:
    """Both copies of a file, after two values were written."""

    def __init__(
        self, folder: Path, name: str, key: bytes | None, write: Any, values: tuple[Any, Any]
    ) -> None:
        with closing(DeviceStore(folder, key)) as store:
            for value in values:
                write(store, value)
        self.path, self.previous = folder / name, folder / f"{name}.previous"
        self.good, self.good_before = self.path.read_bytes(), self.previous.read_bytes()

    def damage(self, bad: bytes) -> None:
        self.path.write_bytes(bad)
        self.previous.write_bytes(self.good_before)


class Crash(BaseException):
    """The power is gone."""


def fail_at(patch: pytest.MonkeyPatch, step: int, error: BaseException) -> Iterator[int]:
    """Raises ``error`` before the file operation ``step`` and all that follow it."""
    count = itertools.count()

    def failing(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            if next(count) >= step:
                raise error
            return real(*arguments, **named)

        return call

    for owner, name in (
        (Path, "open"), (Path, "replace"), (Path, "unlink"),
        (os, "fchmod"), (os, "fsync"), (os, "open"),
    ):  # fmt: skip
        patch.setattr(owner, name, failing(getattr(owner, name)))
    return count
