"""What tests of `EdgeClient` have in common."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from petalfl import (
    EdgeClient,
)
from tests.integration.harness import Server

A = np.random.default_rng(1).standard_normal((24, 5), dtype=np.float32)
B = np.random.default_rng(2).standard_normal((24, 2, 8), dtype=np.float32)
LABELS = np.arange(24) % 3


Make = Callable[..., EdgeClient]

HOUR_S = 3600.0
STOP_S = 25.0  # less than a broker, a download or a receipt may be waited for


def run_and_stop(client: EdgeClient) -> None:
    """Enrolls, and stops."""
    with running(client):
        pass


@contextlib.contextmanager
def running(client: EdgeClient) -> Iterator[None]:
    """Runs a client on a thread; stops it at the end, which must not take long."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            client.run()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    with pytest.MonkeyPatch.context() as patch:
        for limit in ("uplink.RECEIPT_TIMEOUT_S", "pull.TIMEOUT_S"):
            patch.setattr(f"petalfl.{limit}", HOUR_S)
        thread.start()
        try:
            until(lambda: client._trainer.identity is not None or bool(errors), "enrollment")
            yield
        finally:
            client.stop()
            thread.join(STOP_S)
            assert not thread.is_alive()
    assert errors == []


def is_ready(server: Server, device: str) -> bool:
    return bool(server.get("devices").get(device, {}).get("is_ready"))


def until(is_so: Callable[[], bool], what: str, timeout_s: float = 30) -> None:
    give_up_s = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < give_up_s, f"waited for: {what}"
        time.sleep(0.02)


def is_gone(server: Server, device: str) -> bool:
    return not is_ready(server, device)
