"""Servers and clients on a small model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from petalfl import (
    EdgeClient,
)
from tests.integration.harness import Server, running_server
from tests.petalfl.clients import LABELS, A


@pytest.fixture(scope="module")
def idle(small_artifacts: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that enrolls devices and never has enough of them."""
    data_dir = tmp_path_factory.mktemp("idle")
    with running_server(small_artifacts, data_dir, "--min-devices", "99") as server:
        yield server


@pytest.fixture
def busy(small_artifacts: Path, tmp_path: Path) -> Iterator[Server]:
    """A server that gives a single device three rounds of 12 batches."""
    arguments = ("--rounds", "3", "--epochs", "2", "--batch-size", "4")
    with running_server(small_artifacts, tmp_path / "server", *arguments) as server:
        yield server


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., EdgeClient]]:
    """Makes clients that are closed after the test."""
    made: list[EdgeClient] = []

    def make(server: Server, device: str = "", **changes: Any) -> EdgeClient:
        defaults = {
            "token": server.token,
            "data": {"a": A},
            "labels": LABELS,
            "store": tmp_path / (device or "store"),
            "device": device,
        }
        made.append(EdgeClient(changes.pop("url", server.url), **{**defaults, **changes}))
        return made[-1]

    yield make
    for client in made:
        with contextlib.suppress(OSError):  # the test has closed it
            client.close()
