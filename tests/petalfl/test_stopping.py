"""`EdgeClient` is stopped: in front of a server or a broker that hangs, and at work."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from petalfl import (
    EdgeClient,
    PetalError,
    wire,
)
from petalfl.pacing import Pacing, Stopped
from petalfl.participation import Participation
from petalfl.provisioning import write_identity_file
from petalfl.schema import read
from petalfl.store import DeviceStore, Identity
from petalfl.threads import Threads, abandon, run_aside
from petalfl.transport import Handler
from tests.integration.harness import Server
from tests.petalfl.clients import (
    HOUR_S,
    LABELS,
    A,
    Make,
    is_ready,
    running,
    until,
)
from tests.petalfl.deaf import Deaf, deaf_listener, threads_aside
from tests.petalfl.hostile_server import IDENTITY

OWN = read(Identity, IDENTITY)

# Of a URL's scheme: whether a listener gets a connection, and where the client waits then.
HANGS = {
    "HTTP, connecting": ("http", False),
    "HTTP, shaking hands": ("https", True),
    "HTTP, listening": ("http", True),
    "MQTT, connecting": ("mqtt", False),
    "MQTT, shaking hands": ("mqtts", True),
    "MQTT, listening": ("mqtt", True),
}


@pytest.fixture(params=HANGS)
def peer(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[str, Deaf]]:
    """One that hangs, and its URL; afterwards, nothing is left of whoever waited there.

    No limit of time passes by itself.
    """
    scheme, accepts = HANGS[request.param]
    for limit in ("http.TIMEOUT_S", "paced.TIMEOUT_S", "mqtt.CONNECT_TIMEOUT_S"):
        monkeypatch.setattr(f"petalfl.{limit}", HOUR_S)
    with deaf_listener(accepts=accepts) as deaf:
        yield f"{scheme}://127.0.0.1:{deaf.port}", deaf
    until(lambda: not threads_aside(), "the end of the thread that connects")


def client_at(url: str, folder: Path, told: list[PetalError]) -> EdgeClient:
    who: dict[str, Any] = {"token": "t", "device": "d"}
    if url.startswith("mqtt"):
        write_identity_file(folder / "identity", OWN)
        who = {"identity": folder / "identity"}
    return EdgeClient(
        url, data={"a": A}, labels=LABELS, store=folder / "store", on_error=told.append, **who
    )


def test_stop(peer: tuple[str, Deaf], tmp_path: Path) -> None:
    told: list[PetalError] = []
    url, deaf = peer
    client = client_at(url, tmp_path, told)
    client.start()
    until(lambda: deaf.is_waited_for, "its connecting")
    client.close()
    assert told == []
    if deaf.accepts and not threads_aside():
        deaf.wait_for_the_end()


async def test_cancel(peer: tuple[str, Deaf], tmp_path: Path) -> None:
    told: list[PetalError] = []
    url, deaf = peer
    client = client_at(url, tmp_path, told)
    run = asyncio.create_task(client.arun())
    await asyncio.to_thread(until, lambda: deaf.is_waited_for, "its connecting", 30)
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    client.close()
    assert told == []


async def test_a_request_for_a_file_while_the_connection_is_broken() -> None:
    class Broken:
        def __init__(self) -> None:
            self.is_asked, self.is_cancelled = threading.Event(), threading.Event()

        async def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
            self.is_asked.set()
            try:
                await asyncio.sleep(HOUR_S)
            finally:
                self.is_cancelled.set()

        async def subscribe(self, topic_filter: str, handler: Handler) -> None: ...

        async def close(self) -> None: ...

    pacing, transport, unused = Pacing(), Broken(), Any
    participation = Participation(OWN, unused, unused, unused, pacing, Threads())  # type: ignore[arg-type]
    participation._transport = transport
    loop, fetch = asyncio.get_running_loop(), wire.Fetch("manifest", 0, 1 << 16, b"", None)
    asking = asyncio.create_task(asyncio.to_thread(participation._send, loop, fetch))
    assert await asyncio.to_thread(transport.is_asked.wait, 30)
    pacing.stop()
    with pytest.raises(Stopped):
        await asking
    assert await asyncio.to_thread(transport.is_cancelled.wait, 30), "it is sent later"


@pytest.mark.parametrize("is_late", [True, False])
def test_what_was_abandoned_is_discarded(is_late: bool) -> None:
    is_free = threading.Event()
    discarded: list[str] = []

    def get() -> str:
        assert is_free.wait(30)
        return "it"

    work = run_aside(get)
    if not is_late:
        is_free.set()
        work.result(30)
    abandon(work, discarded.append)
    assert discarded == ([] if is_late else ["it"])
    is_free.set()
    until(lambda: discarded == ["it"], "its end")


def test_nothing_is_discarded_of_what_failed() -> None:
    def fail() -> str:
        raise OSError

    work = run_aside(fail)
    abandon(work, lambda result: pytest.fail("there is nothing"))
    assert isinstance(work.exception(30), OSError)


# At work


def test_stop_while_waiting(idle: Server, make: Make) -> None:
    client = make(idle, "waiting")
    with running(client):
        until(lambda: is_ready(idle, "waiting"), "the device is ready")
    until(lambda: not is_ready(idle, "waiting"), "the device is gone")


def test_stop_amid_training(busy: Server, make: Make) -> None:
    """The round is given up between two batches, and trained again by the next run."""
    rounds: list[int] = []
    batches: list[int] = []

    def stop_soon(done: int, total: int) -> None:
        batches.append(done)
        if done == 2:
            client.stop()

    client = make(
        busy, "d", on_round=lambda info: rounds.append(info.round_num), on_progress=stop_soon
    )
    client.run()
    assert (rounds, batches) == ([1], [1, 2])
    assert client._trainer.state.round_num == 0
    assert client._trainer.state.outbox == ()
    client.close()
    again = make(busy, "d", on_round=lambda info: rounds.append(info.round_num))
    again.run()
    assert rounds == [1, 1, 2, 3]


def test_nothing_is_written_after_run_has_returned(
    busy: Server, make: Make, tmp_path: Path
) -> None:
    """Even if a callback is slow when the client is stopped."""
    started = threading.Event()
    client: EdgeClient

    def dawdle(done: int, total: int) -> None:
        started.set()
        until(lambda: client._pacing.is_stopping, "the stop")
        time.sleep(0.2)

    async def scenario() -> None:
        nonlocal client
        client = make(busy, "d", on_progress=dawdle)
        run = asyncio.create_task(client.arun())
        assert await asyncio.to_thread(started.wait, 30)
        client.stop()
        await asyncio.wait_for(run, 30)
        client.close()

    asyncio.run(scenario())
    before = {p: p.read_bytes() for p in tmp_path.rglob("*.msgpack")}
    time.sleep(0.5)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*.msgpack")} == before
    store = DeviceStore(tmp_path / "d")
    assert store.read_state().round_num == 0
    store.close()


def test_a_cancelled_run_ends_its_training(busy: Server, make: Make) -> None:
    async def scenario() -> None:
        started = threading.Event()

        def dawdle(done: int, total: int) -> None:
            started.set()
            until(lambda: client._pacing.is_stopping, "the end")

        client = make(busy, "d", on_progress=dawdle)
        run = asyncio.create_task(client.arun())
        assert await asyncio.to_thread(started.wait, 30)
        run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(run, 30)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(scenario())


def test_stop_before_and_after_run(busy: Server, make: Make) -> None:
    client = make(busy, "d")
    client.stop()  # nothing runs: nothing to stop
    client.run()
    assert client._trainer.state.round_num == 3
    client.stop()


def test_close_twice(idle: Server, make: Make) -> None:
    with make(idle) as client:
        client.close()
